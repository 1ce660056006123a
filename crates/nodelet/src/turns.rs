//! Turns at what takes the processors: VMs that start or are copied, containers that are made in them.
//!
//! Many at once are no sooner ready than few, and each costs more: what one has in the processor's caches the others
//! drive out. So as many are at it as the node has CPUs, of one namespace; of all namespaces together twice as many, so
//! that one cannot keep the others waiting. A start that takes long, for whatever reason, gives its turn
//! back before it is done.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Semaphore, time::timeout};

/// How long a turn is at most. It is a bound on what a guest that does not answer can do to others.
const LONGEST: Duration = Duration::from_secs(5);

/// Turns of one kind.
#[derive(Debug)]
pub(crate) struct Turns {
    each: usize,
    all: Semaphore,
    namespaces: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Turns {
    /// For a node with so many CPUs.
    pub(crate) fn new(cpus: u32) -> Self {
        let each = usize::try_from(cpus).unwrap_or(usize::MAX).clamp(2, 1024);
        Self {
            each,
            all: Semaphore::new(2 * each),
            namespaces: Mutex::default(),
        }
    }

    /// Does `work` for a pod of `namespace` when it is its turn: first come, first served. Dropped, it has given its
    /// turn back, or its place in the line.
    pub(crate) async fn take<T>(&self, namespace: &str, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let own = self.of(namespace);
        // Neither is ever closed; if they were, there would be no line.
        let turn = (own.acquire().await, self.all.acquire().await);
        match timeout(LONGEST, &mut work).await {
            Ok(done) => done,
            Err(_long) => {
                drop(turn);
                work.await
            }
        }
    }

    fn of(&self, namespace: &str) -> Arc<Semaphore> {
        let mut all = self
            .namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Lines in which nobody stands are made anew when they are needed.
        all.retain(|name, line| name == namespace || Arc::strong_count(line) > 1);
        all.entry(namespace.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(self.each)))
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;

    use super::*;

    /// A timer runs from when it is made: this one from when its turn comes.
    async fn busy(duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Most that were at work together, of each namespace and of all.
    async fn most(turns: &Turns, pods: &[&str], work: Duration) -> (Vec<usize>, usize, Duration) {
        let begun = tokio::time::Instant::now();
        let now: HashMap<&str, (AtomicUsize, AtomicUsize)> =
            pods.iter().map(|pod| (*pod, Default::default())).collect();
        let (together, peak) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let run = pods.iter().map(|pod| {
            let (own, own_peak) = &now[pod];
            turns.take(pod, async {
                own_peak.fetch_max(own.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                peak.fetch_max(
                    together.fetch_add(1, Ordering::SeqCst) + 1,
                    Ordering::SeqCst,
                );
                tokio::time::sleep(work).await;
                own.fetch_sub(1, Ordering::SeqCst);
                together.fetch_sub(1, Ordering::SeqCst);
            })
        });
        join_all(run).await;
        let own = now.values().map(|(_, peak)| peak.load(Ordering::SeqCst));
        (own.collect(), peak.into_inner(), begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_has_as_many_as_there_are_cpus_and_all_twice_as_many() {
        let turns = Turns::new(3);
        let second = Duration::from_secs(1);
        let (own, all, took) = most(&turns, &["a"; 9], second).await;
        assert_eq!((own, all, took.as_secs()), (vec![3], 3, 3));
        let pods: Vec<&str> = ["a", "b", "c"].repeat(6);
        let (own, all, took) = most(&turns, &pods, second).await;
        assert!(own.iter().all(|most| *most <= 3), "{own:?}");
        assert_eq!((all, took.as_secs()), (6, 3));
        turns.take("d", async {}).await;
        let left: Vec<String> = turns.namespaces.lock().unwrap().keys().cloned().collect();
        assert_eq!(left, ["d"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_with_many_does_not_keep_another_waiting() {
        let turns = Turns::new(2);
        let begun = tokio::time::Instant::now();
        let second = Duration::from_secs(1);
        let many = join_all((0..100).map(|_| turns.take("many", busy(second))));
        let one = async {
            tokio::task::yield_now().await;
            turns.take("one", busy(second)).await;
            begun.elapsed()
        };
        let (_, one) = tokio::join!(many, one);
        assert_eq!((one.as_secs(), begun.elapsed().as_secs()), (1, 50));
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_that_takes_long_gives_its_turn_back_and_ends() {
        let turns = Turns::new(1);
        let stuck = || turns.take("a", busy(Duration::from_secs(3600)));
        let begun = tokio::time::Instant::now();
        let next = async {
            tokio::task::yield_now().await;
            turns.take("a", async { begun.elapsed() }).await
        };
        let (_, _, waited) = tokio::join!(stuck(), stuck(), next);
        assert_eq!((waited, begun.elapsed().as_secs()), (LONGEST, 3600));
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_line_is_not_waited_for() {
        let turns = Turns::new(2);
        let hold = join_all((0..2).map(|_| turns.take("a", busy(LONGEST))));
        let leaves = timeout(
            Duration::from_secs(1),
            turns.take("a", std::future::pending::<()>()),
        );
        let stays = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            turns.take("a", async {}).await;
        };
        let begun = tokio::time::Instant::now();
        let (_, left, ()) = tokio::join!(hold, leaves, stays);
        assert!(left.is_err());
        assert_eq!(begun.elapsed(), LONGEST);
    }
}

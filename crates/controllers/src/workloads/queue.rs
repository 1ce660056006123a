//! Keys to be worked on: each once, none twice at a time, later again after a failure.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt::Debug,
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use kube::{
    Api, Resource, ResourceExt,
    api::ApiResource,
    core::DynamicResourceScope,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, pods};
use crate::seen::watching;

const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    ready: VecDeque<String>,
    queued: HashSet<String>,
    /// Being worked on; true if it is to be worked on again.
    busy: HashMap<String, bool>,
    failures: HashMap<String, u32>,
    later: Vec<(Instant, String)>,
}

/// A queue of keys.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    notify: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a key in, unless it is there.
    pub(crate) fn add(&self, key: String) {
        let mut state = self.lock();
        if let Some(again) = state.busy.get_mut(&key) {
            *again = true;
            return;
        }
        if state.queued.insert(key.clone()) {
            state.ready.push_back(key);
            drop(state);
            self.notify.notify_one();
        }
    }

    /// The next key to be worked on.
    pub(crate) async fn next(&self) -> String {
        loop {
            let wait = {
                let mut state = self.lock();
                let now = Instant::now();
                let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut state.later)
                    .into_iter()
                    .partition(|(at, _)| *at <= now);
                state.later = later;
                for (_, key) in due {
                    if !state.busy.contains_key(&key) && state.queued.insert(key.clone()) {
                        state.ready.push_back(key);
                    }
                }
                if let Some(key) = state.ready.pop_front() {
                    state.queued.remove(&key);
                    state.busy.insert(key.clone(), false);
                    if !state.ready.is_empty() {
                        self.notify.notify_one();
                    }
                    return key;
                }
                state.later.iter().map(|(at, _)| *at).min()
            };
            match wait {
                Some(at) => {
                    tokio::select! {
                        () = self.notify.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => self.notify.notified().await,
            }
        }
    }

    /// Says that a key has been worked on; after a failure it comes back, each time later.
    pub(crate) fn done(&self, key: String, failed: bool) {
        let mut state = self.lock();
        let again = state.busy.remove(&key).unwrap_or_default();
        if failed {
            let failures = state.failures.entry(key.clone()).or_default();
            *failures += 1;
            let wait = backoff(*failures);
            state.later.push((Instant::now() + wait, key));
        } else {
            state.failures.remove(&key);
            if again && state.queued.insert(key.clone()) {
                state.ready.push_back(key);
            }
        }
        drop(state);
        self.notify.notify_one();
    }
}

/// Puts in the keys of pods that are to be worked on, `NAMESPACE/NAME`, until `stop`. Of others nothing is kept.
pub(crate) async fn queue_pods<P>(
    cluster: &Cluster,
    queue: &Queue,
    stop: &CancellationToken,
    wanted: impl Fn(&P) -> bool,
) where
    P: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + 'static,
{
    let api: Api<P> = Api::all_with(cluster.client(), &pods().resource());
    let events = watcher(api, watching()).default_backoff();
    let mut events = pin!(events.take_until(stop.cancelled()));
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) => {
                if wanted(&pod) {
                    let namespace = pod.namespace().unwrap_or_default();
                    queue.add(format!("{namespace}/{}", pod.name_any()));
                }
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the watch of pods is begun anew"),
        }
    }
}

/// How long to wait after so many failures in a row.
pub(crate) fn backoff(failures: u32) -> Duration {
    let factor = 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    FIRST_WAIT.saturating_mul(factor).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_is_worked_on_once_at_a_time() {
        let queue = Queue::default();
        queue.add("a".into());
        queue.add("a".into());
        assert_eq!(queue.next().await, "a");
        queue.add("a".into());
        queue.add("b".into());
        assert_eq!(queue.next().await, "b");
        queue.done("a".into(), false);
        assert_eq!(queue.next().await, "a");
        queue.done("a".into(), true);
        queue.done("b".into(), false);
        let before = Instant::now();
        assert_eq!(queue.next().await, "a");
        assert!(before.elapsed() >= FIRST_WAIT);
    }

    #[test]
    fn waits_grow_to_a_bound() {
        assert_eq!(backoff(1), FIRST_WAIT);
        assert_eq!(backoff(3), FIRST_WAIT * 4);
        assert_eq!(backoff(100), LONGEST_WAIT);
    }
}

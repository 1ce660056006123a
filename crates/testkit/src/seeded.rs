//! Random schedules that can be run again: each is made from one number, its seed.
//!
//! A failure prints the seed and the smallest schedule that still fails. `HYPERNETES_SEED` runs that
//! one again, `HYPERNETES_SCHEDULES` runs so many, however long that takes, with seeds that no run had
//! before. Without either, as many are run as fit into the time that the test may have, from a seed that
//! is always the same: what fails then, a change has broken.

use std::{
    fmt::Debug,
    hash::{BuildHasher, RandomState},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

/// Environment variable with the seed of the one schedule, or the first, to run.
pub const SEED: &str = "HYPERNETES_SEED";
/// Environment variable with the number of schedules to run.
pub const SCHEDULES: &str = "HYPERNETES_SCHEDULES";

/// The first seed when the environment says nothing.
const USUAL: u64 = 1;

/// A small generator for schedules that are drawn while they run.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// With the seed of the environment, or the one that schedules begin with; it is printed.
    pub fn new(name: &str) -> Self {
        let seed = number(SEED).unwrap_or_else(first);
        eprintln!("{name}: {SEED}={seed}");
        // xorshift stays at zero.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// One of them, or `None` if there are none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let bound = u64::try_from(from.len())
            .ok()
            .filter(|&length| length > 0)?;
        from.get(usize::try_from(self.below(bound)).ok()?)
    }
}

/// How many schedules the environment asks for, or so many.
pub fn schedules(default: u64) -> u64 {
    number(SCHEDULES).unwrap_or(default)
}

/// The first seed when the environment does not tell one.
fn first() -> u64 {
    match number(SCHEDULES) {
        Some(_) => RandomState::new().hash_one(std::process::id()) >> 16,
        None => USUAL,
    }
}

/// How many schedules are run, and how.
#[derive(Debug, Clone, Copy)]
pub struct Seeded {
    /// For people.
    pub name: &'static str,
    /// So many at least, unless the environment says how many.
    pub least: u64,
    /// No further schedule begins after this time, unless the environment says how many.
    pub most: Duration,
    /// Schedules at a time. They wait more than they work.
    pub threads: usize,
    /// How long a smaller schedule that still fails is looked for.
    pub shrink: Duration,
}

/// A schedule that failed.
struct Failure {
    seed: u64,
    why: String,
}

impl Seeded {
    /// Runs schedules until one fails or there were enough.
    ///
    /// # Panics
    /// If one failed, with its seed.
    pub fn check<S: Strategy>(
        &self,
        strategy: impl Fn() -> S + Sync,
        run: impl Fn(&S::Value) -> Result<(), String> + Sync,
    ) {
        let told = number(SEED);
        let base = told.unwrap_or_else(first);
        let count = number(SCHEDULES).or(told.map(|_| 1));
        eprintln!("{}: {SEED}={base} is the first seed", self.name);
        let begun = Instant::now();
        let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let failures: Mutex<Vec<Failure>> = Mutex::default();
        let enough = |done: u64| match count {
            Some(count) => done >= count,
            None => done >= self.least && begun.elapsed() >= self.most,
        };
        let work = || {
            while !stop.load(Ordering::SeqCst) {
                let index = next.fetch_add(1, Ordering::SeqCst);
                if enough(index) {
                    next.fetch_sub(1, Ordering::SeqCst);
                    return;
                }
                let seed = base.wrapping_add(index);
                if let Err(why) = guarded(&run, &tree(&strategy(), seed).current()) {
                    stop.store(true, Ordering::SeqCst);
                    failures.lock().unwrap().push(Failure { seed, why });
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(work);
            }
        });
        let done = next.into_inner();
        let took = begun.elapsed();
        eprintln!("{}: {done} schedules in {took:.1?}", self.name);
        let mut failures = failures.into_inner().unwrap();
        failures.sort_by_key(|failure| failure.seed);
        if let Some(first) = failures.into_iter().next() {
            self.tell(tree(&strategy(), first.seed), &first, run);
        }
    }

    /// Looks for a smaller schedule that fails too, and panics with it.
    fn tell<T: ValueTree>(
        &self,
        mut tree: T,
        failure: &Failure,
        run: impl Fn(&T::Value) -> Result<(), String>,
    ) where
        T::Value: Debug,
    {
        let Failure { seed, why } = failure;
        eprintln!("{}: seed {seed} failed: {why}", self.name);
        let until = Instant::now() + self.shrink;
        let (mut smallest, mut why) = (tree.current(), why.clone());
        let mut went_on = tree.simplify();
        while went_on && Instant::now() < until {
            let candidate = tree.current();
            // What depends on timing may fail only now and then.
            let failed = (0..3).find_map(|_| guarded(&run, &candidate).err());
            went_on = match failed {
                Some(reason) => {
                    (smallest, why) = (candidate, reason);
                    tree.simplify()
                }
                None => tree.complicate(),
            };
        }
        panic!(
            "{}: {SEED}={seed} fails: {why}\nthe smallest schedule that was found:\n{smallest:?}",
            self.name
        );
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.trim().parse();
    Some(number.unwrap_or_else(|_| panic!("{variable} must be a number, not {text:?}")))
}

fn tree<S: Strategy>(strategy: &S, seed: u64) -> S::Tree {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    let tree = strategy.new_tree(&mut TestRunner::new_with_rng(config, rng));
    tree.expect("the strategy rejects nothing")
}

fn guarded<V>(run: impl Fn(&V) -> Result<(), String>, value: &V) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| run(value))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("without words")))
    })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;

    use super::*;

    fn seeded(least: u64) -> Seeded {
        Seeded {
            name: "numbers",
            least,
            most: Duration::ZERO,
            threads: 3,
            shrink: Duration::from_secs(5),
        }
    }

    #[test]
    fn a_failure_tells_its_seed_and_the_smallest_schedule() {
        let panic = catch_unwind(|| {
            seeded(500).check(
                || vec(0u32..1000, 0..50),
                |numbers| match numbers.iter().any(|number| *number >= 700) {
                    true => Err("too large".into()),
                    false => Ok(()),
                },
            );
        });
        let text = panic.unwrap_err().downcast::<String>().unwrap();
        assert!(
            text.contains("HYPERNETES_SEED=") && text.contains("too large"),
            "{text}"
        );
        assert!(text.ends_with("[700]"), "{text}");
    }

    #[test]
    fn a_seed_makes_the_same_schedule_again() {
        let strategy = || vec(0u64..u64::MAX, 5..50);
        let make = |seed| tree(&strategy(), seed).current();
        assert_eq!(make(7), make(7));
        assert_ne!(make(7), make(8));
    }

    #[test]
    fn as_many_are_run_as_were_asked_for() {
        let ran = AtomicU64::new(0);
        seeded(40).check(
            || 0..9u32,
            |_| {
                ran.fetch_add(1, Ordering::SeqCst);
                Ok(())
            },
        );
        assert_eq!(ran.into_inner(), 40);
    }
}

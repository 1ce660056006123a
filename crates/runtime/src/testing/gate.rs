//! The edges between a runtime's effects: where it can be cut off, and where trouble comes in.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    fmt, io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use hypernetes_store::Op;
use tokio::sync::Notify;

thread_local! {
    static GATE: RefCell<Gate> = RefCell::new(Gate::default());
}

/// What an effect is done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Records,
    Files,
    Network,
    Vmm,
    Volumes,
}

/// What becomes of an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// An error, and it is not done.
    Before(io::ErrorKind),
    /// An error, and it is done. Of a record: it may be found done after the next crash.
    After(io::ErrorKind),
    /// It takes a while.
    Slow(Duration),
}

type Action = Box<dyn FnOnce() + Send>;

/// Stops everything after a number of steps, as a crash would, and makes trouble on the way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<GateState>);

struct GateState {
    count: AtomicU64,
    limit: AtomicU64,
    hit: Notify,
    plan: Mutex<Plan>,
    /// What fits on the disk of the state directory.
    disk: AtomicU64,
    clock_ahead: AtomicI64,
}

#[derive(Default)]
struct Plan {
    actions: BTreeMap<u64, Vec<Action>>,
    trouble: HashMap<Place, VecDeque<Trouble>>,
    /// What a failed write of records may have left in the file.
    limbo: Vec<Op>,
}

impl fmt::Debug for GateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GateState")
            .field("count", &self.count)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Default for GateState {
    fn default() -> Self {
        Self {
            count: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            hit: Notify::new(),
            plan: Mutex::default(),
            disk: AtomicU64::new(u64::MAX),
            clock_ahead: AtomicI64::new(0),
        }
    }
}

impl Gate {
    /// The gate of this thread's test.
    pub(crate) fn current() -> Self {
        GATE.with(|gate| gate.borrow().clone())
    }

    /// Makes it this thread's.
    pub(crate) fn enter(&self) {
        GATE.with(|current| *current.borrow_mut() = self.clone());
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One edge between two effects. Never returns once the limit is reached.
    pub(crate) async fn step(&self) {
        let count = self.0.count.fetch_add(1, Ordering::SeqCst);
        let actions = self.plan().actions.remove(&count).unwrap_or_default();
        for action in actions {
            action();
        }
        if count >= self.0.limit.load(Ordering::SeqCst) {
            self.0.hit.notify_one();
            std::future::pending::<()>().await;
        }
    }

    /// An effect with an edge on both sides, and the trouble that waits at its place.
    pub(crate) async fn effect<T, E>(
        &self,
        place: Place,
        error: impl FnOnce(io::Error) -> E,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.step().await;
        let result = match self.trouble(place) {
            None => work.await,
            Some(Trouble::Slow(while_)) => {
                tokio::time::sleep(while_).await;
                work.await
            }
            Some(Trouble::Before(kind)) => Err(error(kind.into())),
            Some(Trouble::After(kind)) => match work.await {
                Ok(_) => Err(error(kind.into())),
                Err(own) => Err(own),
            },
        };
        self.step().await;
        result
    }

    /// The trouble that the next effect there meets.
    pub(crate) fn trouble(&self, place: Place) -> Option<Trouble> {
        self.plan().trouble.get_mut(&place)?.pop_front()
    }

    /// Has the next effects there meet this.
    pub(crate) fn make_trouble(&self, place: Place, trouble: impl IntoIterator<Item = Trouble>) {
        self.plan()
            .trouble
            .entry(place)
            .or_default()
            .extend(trouble);
    }

    /// Does something at the step of this number, counted from [`Gate::close_after`].
    pub(crate) fn at(&self, step: u64, action: impl FnOnce() + Send + 'static) {
        let mut plan = self.plan();
        plan.actions.entry(step).or_default().push(Box::new(action));
    }

    /// Forgets all trouble and plans.
    pub(crate) fn calm(&self) {
        let mut plan = self.plan();
        plan.actions.clear();
        plan.trouble.clear();
    }

    /// Notes what a failed write may have left.
    pub(crate) fn leave_in_limbo(&self, ops: Vec<Op>) {
        self.plan().limbo.extend(ops);
    }

    /// What writes that failed may have left, with no good one since.
    pub(crate) fn take_limbo(&self) -> Vec<Op> {
        std::mem::take(&mut self.plan().limbo)
    }

    /// Has the state directory be on a disk on which so many bytes are free now.
    pub(crate) fn set_free(&self, state_dir: &Path, bytes: u64) {
        self.0.disk.store(used(state_dir) + bytes, Ordering::SeqCst);
    }

    /// What is free there.
    pub(crate) fn free(&self, state_dir: &Path, real: u64) -> u64 {
        match self.0.disk.load(Ordering::SeqCst) {
            u64::MAX => real,
            size => size.saturating_sub(used(state_dir)),
        }
    }

    /// Sets the wall clock ahead, or back.
    pub(crate) fn set_clock_ahead(&self, nanos: i64) {
        self.0.clock_ahead.store(nanos, Ordering::SeqCst);
    }

    pub(crate) fn clock_ahead(&self) -> i64 {
        self.0.clock_ahead.load(Ordering::SeqCst)
    }

    /// Lets so many steps pass from here on.
    pub(crate) fn close_after(&self, steps: u64) {
        self.0.count.store(0, Ordering::SeqCst);
        self.0.limit.store(steps, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        self.0.limit.store(u64::MAX, Ordering::SeqCst);
    }

    pub(crate) async fn hit(&self) {
        self.0.hit.notified().await;
    }
}

fn used(directory: &Path) -> u64 {
    let usage = crate::usage::measured(directory.to_owned());
    usage.map_or(0, |usage| usage.used_bytes)
}

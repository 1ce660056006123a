//! A pool of VMs that have gone on where a template was and wait for a sandbox.
//!
//! For each template that is kept there are a few. Such a VM has no disk, no network, no cgroup and
//! nobody's configuration: it is the template's VM, a little later, with a session of its agent that
//! is open. It has an id, a user and a directory already, which the sandbox that takes it gets for
//! its own; so a VM that nobody has taken when the daemon dies is found by its directory and removed
//! at the next start, like any that was launched for a sandbox that was not recorded.
//!
//! One task fills the pool, one VM after the other, when no sandbox is starting; until a VM is taken
//! it stands back behind all others for CPU time.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hypernetes_agent_api::AgentClient;
use hypernetes_network::ParkedPlace;
use hypernetes_types::SandboxId;
use hypernetes_vmm::{NetDevice, Origin, Template, Vm, VmSpec};
use tokio::{sync::Notify, task::JoinHandle, time::timeout};

use crate::{
    error::RuntimeError,
    rehearsal,
    scratch::{blocking, remove_directory},
    shared::Shared,
    templates::{self, Key, Wish},
};

/// After so long the pool is looked at even if nothing was heard of: a VM may have ended.
const LOOK: Duration = Duration::from_secs(60);
/// After a VM could not be made.
const RETRY: Duration = Duration::from_secs(10);
/// How long no sandbox may have begun to start before a VM is made: its containers come next.
const SETTLE: Duration = Duration::from_millis(300);
/// A node that is never quiet gets its pool all the same.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How long the end of the pool may take.
const DRAIN: Duration = Duration::from_secs(15);

/// A VM that waits for a sandbox.
#[derive(Debug)]
pub(crate) struct Pooled {
    key: Key,
    /// Of the sandbox that it will be.
    pub(crate) id: SandboxId,
    /// User of its VMM.
    pub(crate) uid: u32,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) client: AgentClient,
    /// Where the tap is that its VMM has.
    pub(crate) nic: Option<ParkedPlace>,
}

/// What the pool has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolFigures {
    /// VMs that wait.
    pub idle: u64,
    /// Sandboxes that got one.
    pub hits: u64,
    /// Sandboxes for which there was none.
    pub misses: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pool {
    /// How many VMs wait for each template.
    each: usize,
    state: Mutex<State>,
    changed: Arc<Notify>,
    filler: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Pooled>,
    figures: PoolFigures,
    closed: bool,
}

/// A template with what it is of.
type Ready = (Key, Wish, Arc<Template>);

/// What is to be done next.
#[derive(Debug)]
enum Step {
    Discard(Vec<Pooled>),
    Make(Box<Ready>),
    Wait,
    End,
}

impl Pool {
    pub(crate) fn new(each: usize) -> Self {
        Self {
            each,
            state: Mutex::default(),
            changed: Arc::default(),
            filler: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_on(&self) -> bool {
        self.each > 0
    }

    /// A VM of this kernel and shape, if one waits.
    pub(crate) fn take(&self, key: &Key) -> Option<Pooled> {
        let mut state = self.lock();
        let fits = |pooled: &Pooled| pooled.key == *key && pooled.vm.exit().is_none();
        let found = state.idle.iter().position(fits);
        // The one that has waited longest.
        let taken = found.map(|at| state.idle.remove(at));
        match &taken {
            Some(_) => state.figures.hits += 1,
            None => state.figures.misses += 1,
        }
        drop(state);
        self.look();
        taken
    }

    /// Gives back what was not used.
    pub(crate) fn put_back(&self, pooled: Pooled) {
        let mut state = self.lock();
        state.figures.hits = state.figures.hits.saturating_sub(1);
        state.idle.push(pooled);
        drop(state);
        self.look();
    }

    /// Has the task look at templates and VMs again.
    pub(crate) fn look(&self) {
        self.changed.notify_one();
    }

    pub(crate) fn figures(&self) -> PoolFigures {
        let state = self.lock();
        PoolFigures {
            idle: state.idle.len() as u64,
            ..state.figures
        }
    }

    /// Whether every template has its VMs.
    #[cfg(test)]
    pub(crate) fn is_full(&self, templates: usize) -> bool {
        self.lock().idle.len() == self.each * templates
    }

    fn plan(&self, ready: Vec<Ready>) -> Step {
        let mut state = self.lock();
        let kept = |pooled: &Pooled| ready.iter().any(|(key, ..)| *key == pooled.key);
        let closed = state.closed;
        let (stay, go): (Vec<_>, Vec<_>) = state
            .idle
            .drain(..)
            .partition(|pooled| !closed && kept(pooled) && pooled.vm.exit().is_none());
        state.idle = stay;
        if !go.is_empty() {
            return Step::Discard(go);
        }
        if closed {
            return Step::End;
        }
        let waiting = |wanted: &Key| {
            let of = state.idle.iter().filter(|pooled| pooled.key == *wanted);
            of.count()
        };
        let mut short = ready
            .into_iter()
            .filter(|(key, ..)| waiting(key) < self.each);
        match short.next() {
            Some(short) => Step::Make(Box::new(short)),
            None => Step::Wait,
        }
    }

    /// Ends all VMs that wait, and makes no more.
    pub(crate) async fn drain(&self) {
        self.lock().closed = true;
        self.look();
        let filler = self
            .filler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(filler) = filler else { return };
        if timeout(DRAIN, filler).await.is_err() {
            tracing::warn!("the pool of VMs did not end in time: the next start clears it away");
        }
    }
}

/// Starts the task that fills the pool. It ends with the runtime, and leaves what is in the pool to
/// the next one, if it was not drained before.
pub(crate) fn spawn_filler(shared: &Arc<Shared>) {
    if !shared.pool.is_on() {
        return;
    }
    let changed = Arc::clone(&shared.pool.changed);
    let (weak, closing) = (Arc::downgrade(shared), shared.closing.clone());
    let task = tokio::spawn(closing.run_until_cancelled_owned(async move {
        loop {
            let Some(shared) = weak.upgrade() else { return };
            let pause = match shared.pool.plan(shared.templates.ready()) {
                Step::End => return,
                Step::Wait => LOOK,
                Step::Discard(vms) => {
                    for pooled in vms {
                        discard(&shared, pooled).await;
                    }
                    continue;
                }
                Step::Make(ready) => {
                    let (key, wish, template) = *ready;
                    // A node that is never quiet is no reason to have no pool.
                    drop(timeout(LONGEST_WAIT, quiet(&shared)).await);
                    if shared.pool.lock().closed {
                        continue;
                    }
                    match make(&shared, key, &wish, template).await {
                        Ok(pooled) => {
                            tracing::debug!(sandbox = %pooled.id, "a VM waits in the pool");
                            shared.pool.lock().idle.push(pooled);
                            continue;
                        }
                        Err(error) => {
                            let error = hypernetes_telemetry::chain(&error).to_string();
                            tracing::warn!(error, "cannot make a VM for the pool");
                            RETRY
                        }
                    }
                }
            };
            drop(shared);
            drop(timeout(pause, changed.notified()).await);
        }
    }));
    let task = tokio::spawn(async move { drop(task.await) });
    *shared
        .pool
        .filler
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some(task);
}

/// Waits until no sandbox is starting, and for a moment none has begun to.
async fn quiet(shared: &Shared) {
    loop {
        let begun = shared.starts.settled().await;
        tokio::time::sleep(SETTLE).await;
        if shared.starts.begun() == begun {
            return;
        }
    }
}

async fn make(
    shared: &Shared,
    key: Key,
    wish: &Wish,
    template: Arc<Template>,
) -> Result<Pooled, RuntimeError> {
    let (id, uid) = (SandboxId::random(), shared.take_uid()?);
    match start(shared, key, wish, template, (id.clone(), uid)).await {
        Ok(pooled) => Ok(pooled),
        Err(error) => {
            clear(shared, &id, uid).await;
            Err(error)
        }
    }
}

async fn start(
    shared: &Shared,
    key: Key,
    wish: &Wish,
    template: Arc<Template>,
    (id, uid): (SandboxId, u32),
) -> Result<Pooled, RuntimeError> {
    let run_dir = shared.run_dir(&id);
    let made = run_dir.clone();
    blocking(format!("make {}", run_dir.display()), move || {
        std::fs::create_dir_all(made)
    })
    .await?;
    let (net, nic) = match wish.nic {
        true => {
            let parked = shared.config.network.park().await?;
            let net = NetDevice {
                tap: parked.tap,
                mac: templates::MAC.to_owned(),
            };
            (Some(net), Some(parked.place))
        }
        false => (None, None),
    };
    let vm = shared.config.vmm.launch(VmSpec {
        sandbox: id.clone(),
        kernel: wish.kernel.clone(),
        origin: Origin::Template(template),
        vcpus: wish.vcpus,
        memory_mib: wish.memory_mib,
        extras: wish.extras,
        net,
        disks: Vec::new(),
        run_dir,
        uid,
        cgroup: None,
        ephemeral: false,
    });
    let vm: Arc<dyn Vm> = Arc::from(vm.await?);
    vm.stand_back(true).await?;
    let client = templates::agent(shared, vm.as_ref(), "wait in the pool").await?;
    rehearsal::rehearse(shared, vm.as_ref(), &client).await?;
    Ok(Pooled {
        key,
        id,
        uid,
        vm,
        client,
        nic,
    })
}

/// Ends a VM that nobody takes.
async fn discard(shared: &Shared, pooled: Pooled) {
    let Pooled { id, uid, vm, .. } = pooled;
    drop(vm);
    clear(shared, &id, uid).await;
}

/// Leaves nothing of a VM of the pool. What cannot be removed is found at the next start; its user
/// is not given to another then.
async fn clear(shared: &Shared, id: &SandboxId, uid: u32) {
    let run_dir = shared.run_dir(id);
    let cleared = async {
        shared.config.vmm.destroy(&run_dir).await?;
        remove_directory(run_dir.clone()).await
    };
    match cleared.await {
        Ok(()) => shared.free_uid(uid),
        Err(error) => {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(sandbox = %id, error, "cannot clear away a VM of the pool");
        }
    }
}

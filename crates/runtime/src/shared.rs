//! What all sandboxes of a node share, and what they show of themselves.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hypernetes_types::{ContainerId, SandboxId};
use tokio::sync::{broadcast, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    api::{ContainerState, ContainerStatus, RuntimeEvent, SandboxConfig, SandboxStatus},
    config::RuntimeConfig,
    container,
    error::RuntimeError,
    figures::Starts,
    link::LinkState,
    pool::Pool,
    records::{ContainerRecord, Records, SandboxRecord, VmSize},
    rehearsal,
    room::Room,
    sandbox,
    scratch::ScratchDisks,
    snapshots::Snapshots,
    templates::Templates,
    timing::Timing,
};

/// Events that a slow receiver may be behind.
const EVENTS: usize = 1024;

/// What all sandboxes share. Holds no sandbox, so that dropping the runtime ends them all.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: RuntimeConfig,
    pub(crate) records: Records,
    pub(crate) scratch: ScratchDisks,
    /// Where the scratch disks are, and suspended VMs and copies beside them.
    pub(crate) room: Room,
    pub(crate) snapshots: Snapshots,
    pub(crate) templates: Templates,
    pub(crate) pool: Pool,
    pub(crate) rehearsal: rehearsal::Layer,
    pub(crate) starts: Starts,
    pub(crate) events: broadcast::Sender<RuntimeEvent>,
    /// Cancelled when the runtime is dropped.
    pub(crate) closing: CancellationToken,
    /// Tasks of open sessions.
    pub(crate) sessions: TaskTracker,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    containers: HashMap<ContainerId, SandboxId>,
    uids: BTreeSet<u32>,
}

impl Shared {
    pub(crate) fn new(config: RuntimeConfig) -> Self {
        let records = Records::new(config.store.clone());
        let scratch = ScratchDisks::new(&config.state_dir, config.defaults.mkfs.clone());
        let room = Room::new(scratch.root().to_owned());
        Self {
            snapshots: Snapshots::new(&config.state_dir, records.clone(), room.clone()),
            records,
            scratch,
            room,
            templates: Templates::new(config.templates),
            pool: Pool::new(config.templates.pool),
            rehearsal: rehearsal::Layer::default(),
            starts: Starts::default(),
            events: broadcast::channel(EVENTS).0,
            closing: CancellationToken::new(),
            sessions: TaskTracker::new(),
            index: Mutex::default(),
            config,
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whoever listens.
    pub(crate) fn emit(&self, event: RuntimeEvent) {
        // Nobody may be listening.
        drop(self.events.send(event));
    }

    pub(crate) fn run_dir(&self, sandbox: &SandboxId) -> PathBuf {
        self.config.run_dir.join(sandbox.as_str())
    }

    /// Where VMs are that become templates.
    pub(crate) fn template_dir(&self) -> PathBuf {
        self.config.run_dir.join("templates")
    }

    /// Where log checkpoints of a sandbox are.
    pub(crate) fn checkpoints(&self, sandbox: &SandboxId) -> PathBuf {
        self.scratch.directory(sandbox).join("logs")
    }

    /// Where copies of a sandbox are until the clone or the snapshot takes them that they are for.
    pub(crate) fn copies(&self, sandbox: &SandboxId) -> PathBuf {
        self.scratch.directory(sandbox).join("copies")
    }

    /// Where the memory of a suspended sandbox is.
    pub(crate) fn suspended_file(&self, sandbox: &SandboxId) -> PathBuf {
        self.scratch.directory(sandbox).join("memory.vm")
    }

    /// What a sandbox's VM is started with.
    pub(crate) fn first_size(&self, config: &SandboxConfig) -> VmSize {
        let defaults = &self.config.defaults;
        let or = |asked: u32, default: u32| if asked == 0 { default } else { asked };
        VmSize {
            vcpus: or(config.vcpus, defaults.vcpus),
            memory_mib: or(config.memory_mib, defaults.memory_mib),
        }
    }

    pub(crate) fn sandbox_of(&self, container: &ContainerId) -> Option<SandboxId> {
        self.index().containers.get(container).cloned()
    }

    pub(crate) fn add_container(&self, container: &ContainerId, sandbox: &SandboxId) {
        self.index()
            .containers
            .insert(container.clone(), sandbox.clone());
    }

    pub(crate) fn forget_container(&self, container: &ContainerId) {
        self.index().containers.remove(container);
    }

    /// Takes a user id that no other VM has.
    pub(crate) fn take_uid(&self) -> Result<u32, RuntimeError> {
        let range = self.config.uid_range;
        let mut index = self.index();
        let free = (range.first..range.first.saturating_add(range.count))
            .find(|uid| !index.uids.contains(uid));
        let Some(uid) = free else {
            let rule = format!(
                "at most {} sandboxes fit the range of user ids",
                range.count
            );
            return Err(RuntimeError::Invalid {
                field: "uid_range".into(),
                rule,
            });
        };
        index.uids.insert(uid);
        Ok(uid)
    }

    pub(crate) fn reserve_uid(&self, uid: u32) {
        self.index().uids.insert(uid);
    }

    pub(crate) fn free_uid(&self, uid: u32) {
        self.index().uids.remove(&uid);
    }
}

/// A sandbox as its task last published it.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) record: SandboxRecord,
    pub(crate) containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    pub(crate) timing: Timing,
    pub(crate) link: Option<watch::Receiver<LinkState>>,
    /// The VM stands still for want of room on the node's disk.
    pub(crate) stalled: bool,
    /// The record is deleted.
    pub(crate) gone: bool,
}

impl Snapshot {
    pub(crate) fn status(&self) -> SandboxStatus {
        let record = &self.record;
        SandboxStatus {
            id: record.id.clone(),
            config: record.config.clone(),
            state: record.phase.state(),
            suspended: record.phase.is_suspended(),
            stalled: self.stalled,
            created_unix_nanos: record.created_unix_nanos,
            vcpus: record.vm_size().vcpus,
            memory_mib: record.vm_size().memory_mib,
            address: record.lease.as_ref().map(|lease| lease.address),
            more_addresses: match &record.lease {
                Some(lease) => lease.more_addresses().collect(),
                None => Vec::new(),
            },
            kernel_release: record.kernel_release.clone(),
            failure: record.failure.clone(),
        }
    }

    /// A container, if it is to be seen.
    pub(crate) fn container(
        &self,
        id: &ContainerId,
        silent: std::time::Duration,
    ) -> Option<ContainerStatus> {
        let record = self.containers.get(id)?;
        let mut state = record.phase.state()?;
        if state == ContainerState::Running && self.is_silent(silent) {
            state = ContainerState::Unknown;
        }
        Some(ContainerStatus {
            id: record.id.clone(),
            sandbox: record.sandbox.clone(),
            config: record.config.clone(),
            state,
            paused: record.paused && record.phase == container::Phase::Running,
            image_id: record.image_id.clone(),
            image_ref: record.image_ref.clone(),
            user: record.user.clone(),
            created_unix_nanos: record.created_unix_nanos,
            started_unix_nanos: match record.phase {
                container::Phase::Starting => 0,
                _ => record.started_unix_nanos,
            },
            finished_unix_nanos: record.finished_unix_nanos,
            exit_code: record.exit_code,
            reason: record.reason.clone(),
            message: record.message.clone(),
            log_path: self
                .record
                .config
                .log_directory
                .join(&record.config.log_path),
        })
    }

    /// What to say instead of that the guest does not answer, if it cannot.
    pub(crate) fn stalled_error(&self, action: &'static str) -> Option<RuntimeError> {
        self.stalled.then(|| RuntimeError::State {
            action,
            kind: "sandbox",
            id: self.record.id.to_string(),
            state: "standing still until the node has room for what it writes".to_owned(),
        })
    }

    fn is_silent(&self, limit: std::time::Duration) -> bool {
        // Nobody talks to a guest that is being copied, and one that stands still will answer when it goes on.
        self.record.phase == sandbox::Phase::Ready
            && !self.stalled
            && self.record.frozen.is_none()
            && self.link.as_ref().is_none_or(|link| {
                let link = link.borrow();
                link.client.is_none() && link.since.elapsed() > limit
            })
    }
}

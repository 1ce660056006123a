//! What is stored of sandboxes and containers on the host, and where.
//!
//! `/node/host/sandboxes/<id>` and `/node/host/containers/<id>`, JSON with a version. What is about
//! to be made stands in a record first.

use std::path::PathBuf;

use hypernetes_network::Lease;
use hypernetes_runtime::{
    ContainerConfig, ContainerState, ContainerStatus, ContainerUser, Failure, RuntimeError,
    SandboxConfig, SandboxState, SandboxStatus,
};
use hypernetes_store::{Durability, Op, Store, Value};
use hypernetes_types::{ContainerId, Digest, SandboxId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

const SANDBOXES: &str = "/node/host/sandboxes/";
const CONTAINERS: &str = "/node/host/containers/";
/// Of both kinds of record. Raised when an older daemon could misread a newer record.
const VERSION: u32 = 1;

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SandboxPhase {
    Starting,
    Ready,
    Stopping,
    Stopped,
    Removing,
}

/// A sandbox on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub(crate) version: u32,
    pub(crate) id: SandboxId,
    pub(crate) phase: SandboxPhase,
    pub(crate) config: SandboxConfig,
    pub(crate) created_unix_nanos: i64,
    /// Of the host when it was made: what is not on a disk is gone with the next one.
    pub(crate) boot: String,
    pub(crate) failure: Option<Failure>,
    /// The uppermost cgroup that was made for it.
    pub(crate) made_cgroup: Option<String>,
    pub(crate) owns_log_directory: bool,
    /// Where it is in a network that is not the host's.
    pub(crate) place: Option<Place>,
}

/// A pod's place in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Pinned network namespace.
    pub(crate) namespace: PathBuf,
    pub(crate) lease: Lease,
}

/// Where a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ContainerPhase {
    Creating,
    Created,
    Starting,
    Running,
    Exited,
    Removing,
}

impl ContainerPhase {
    /// Whether its program runs, or may.
    pub(crate) fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running)
    }
}

/// A layer, and the number of its mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerMount {
    pub(crate) diff_id: Digest,
    pub(crate) slot: u32,
}

/// An image that is mounted as a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageVolume {
    pub(crate) id: String,
    /// Lowest first.
    pub(crate) layers: Vec<LayerMount>,
}

/// A container on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) version: u32,
    pub(crate) id: ContainerId,
    pub(crate) sandbox: SandboxId,
    pub(crate) phase: ContainerPhase,
    pub(crate) config: ContainerConfig,
    pub(crate) image_id: String,
    pub(crate) image_ref: String,
    pub(crate) user: Option<ContainerUser>,
    pub(crate) stop_signal: u32,
    /// Lowest first.
    pub(crate) layers: Vec<LayerMount>,
    /// In the order of the configuration's mounts of images.
    pub(crate) volumes: Vec<ImageVolume>,
    /// Group of its processes.
    pub(crate) cgroup: String,
    /// Group of its monitor.
    pub(crate) monitor_cgroup: String,
    /// Process id of its monitor.
    pub(crate) monitor: Option<u32>,
    pub(crate) log_path: PathBuf,
    pub(crate) created_unix_nanos: i64,
    pub(crate) started_unix_nanos: i64,
    pub(crate) finished_unix_nanos: i64,
    pub(crate) exit_code: i32,
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl SandboxRecord {
    pub(crate) fn new(config: SandboxConfig, boot: String) -> Self {
        Self {
            version: VERSION,
            id: SandboxId::random(),
            phase: SandboxPhase::Starting,
            config,
            created_unix_nanos: now_nanos(),
            boot,
            failure: None,
            made_cgroup: None,
            owns_log_directory: false,
            place: None,
        }
    }

    /// Whether it is in the host's network.
    pub(crate) fn host_network(&self) -> bool {
        self.config.network.is_none()
    }

    /// Its network namespace, if that is not the host's.
    pub(crate) fn netns(&self) -> Option<PathBuf> {
        self.place.as_ref().map(|place| place.namespace.clone())
    }

    /// The name that its containers see.
    pub(crate) fn hostname(&self) -> String {
        match self.host_network() {
            true => rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            false => self.config.hostname.clone(),
        }
    }

    /// The group of the pod, in which those of its containers are.
    pub(crate) fn cgroup(&self) -> String {
        let asked = self.config.cgroup_parent.as_deref();
        let default = || format!("hypernetes/pod{}", self.config.metadata.uid);
        asked.map_or_else(default, |path| path.trim_matches('/').to_owned())
    }

    pub(crate) fn status(&self) -> SandboxStatus {
        let lease = self.place.as_ref().map(|place| &place.lease);
        SandboxStatus {
            id: self.id.clone(),
            config: self.config.clone(),
            state: match self.phase {
                SandboxPhase::Starting => SandboxState::Starting,
                SandboxPhase::Ready if self.failure.is_none() => SandboxState::Ready,
                SandboxPhase::Ready | SandboxPhase::Stopping | SandboxPhase::Stopped => {
                    SandboxState::NotReady
                }
                SandboxPhase::Removing => SandboxState::Removing,
            },
            suspended: false,
            stalled: false,
            created_unix_nanos: self.created_unix_nanos,
            vcpus: 0,
            memory_mib: 0,
            address: lease.map(|lease| lease.address),
            more_addresses: lease.map_or_else(Vec::new, |lease| lease.more_addresses().collect()),
            kernel_release: Some(
                rustix::system::uname()
                    .release()
                    .to_string_lossy()
                    .into_owned(),
            ),
            failure: self.failure.clone(),
        }
    }
}

impl ContainerRecord {
    pub(crate) fn new(sandbox: &SandboxRecord, config: ContainerConfig) -> Self {
        let id = ContainerId::random();
        let parent = sandbox.cgroup();
        Self {
            version: VERSION,
            sandbox: sandbox.id.clone(),
            phase: ContainerPhase::Creating,
            image_id: String::new(),
            image_ref: String::new(),
            user: None,
            stop_signal: 15,
            layers: Vec::new(),
            volumes: Vec::new(),
            cgroup: format!("{parent}/hypernetes-{id}"),
            monitor_cgroup: format!("{parent}/hypernetes-conmon-{id}"),
            monitor: None,
            log_path: sandbox.config.log_directory.join(&config.log_path),
            created_unix_nanos: now_nanos(),
            started_unix_nanos: 0,
            finished_unix_nanos: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            config,
            id,
        }
    }

    /// The host part of its configuration, which every container here has.
    pub(crate) fn host(&self) -> hypernetes_runtime::HostContainer {
        self.config.host.clone().unwrap_or_default()
    }

    /// All layers that it needs mounted.
    pub(crate) fn all_layers(&self) -> impl Iterator<Item = &LayerMount> {
        let volumes = self.volumes.iter().flat_map(|volume| &volume.layers);
        self.layers.iter().chain(volumes)
    }

    /// Writes down that it has ended.
    pub(crate) fn end(&mut self, exit_code: i32, reason: &str, message: String) {
        self.phase = ContainerPhase::Exited;
        self.exit_code = exit_code;
        reason.clone_into(&mut self.reason);
        self.message = message;
        self.finished_unix_nanos = now_nanos();
        self.monitor = None;
    }

    pub(crate) fn status(&self) -> ContainerStatus {
        ContainerStatus {
            id: self.id.clone(),
            sandbox: self.sandbox.clone(),
            config: self.config.clone(),
            state: match self.phase {
                ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Starting => {
                    ContainerState::Created
                }
                ContainerPhase::Running => ContainerState::Running,
                ContainerPhase::Exited | ContainerPhase::Removing => ContainerState::Exited,
            },
            paused: false,
            image_id: self.image_id.clone(),
            image_ref: self.image_ref.clone(),
            user: self.user.clone(),
            created_unix_nanos: self.created_unix_nanos,
            started_unix_nanos: self.started_unix_nanos,
            finished_unix_nanos: self.finished_unix_nanos,
            exit_code: self.exit_code,
            reason: self.reason.clone(),
            message: self.message.clone(),
            log_path: self.log_path.clone(),
        }
    }
}

pub(crate) fn now_nanos() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// Sandboxes that a runtime of host pods on this store looks after, and that may have a place in a
/// network.
///
/// # Errors
/// If records cannot be read.
pub fn known_sandboxes(store: &Store) -> Result<Vec<SandboxId>, RuntimeError> {
    let all = Records::new(store.clone()).sandboxes()?;
    let placed = all
        .into_iter()
        .filter(|record| record.phase != SandboxPhase::Stopped);
    Ok(placed.map(|record| record.id).collect())
}

/// Whether there are host pods on this store.
///
/// # Errors
/// If records cannot be read.
pub fn has_pods(store: &Store) -> Result<bool, RuntimeError> {
    let records = Records::new(store.clone());
    Ok(!records.sandboxes()?.is_empty() || !records.containers()?.is_empty())
}

/// The records of host pods on this node.
#[derive(Debug, Clone)]
pub(crate) struct Records(Store);

impl Records {
    pub(crate) fn new(store: Store) -> Self {
        Self(store)
    }

    pub(crate) async fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        self.put(format!("{SANDBOXES}{}", record.id), record).await
    }

    pub(crate) async fn put_container(&self, record: &ContainerRecord) -> Result<(), RuntimeError> {
        self.put(format!("{CONTAINERS}{}", record.id), record).await
    }

    pub(crate) async fn delete_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.write(Op::Delete(format!("{SANDBOXES}{id}"))).await
    }

    pub(crate) async fn delete_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.write(Op::Delete(format!("{CONTAINERS}{id}"))).await
    }

    pub(crate) fn sandboxes(&self) -> Result<Vec<SandboxRecord>, RuntimeError> {
        self.read(SANDBOXES)
    }

    pub(crate) fn containers(&self) -> Result<Vec<ContainerRecord>, RuntimeError> {
        self.read(CONTAINERS)
    }

    async fn put(&self, key: String, record: &impl Serialize) -> Result<(), RuntimeError> {
        let value = serde_json::to_vec(record)
            .map_err(|error| storage(format!("encode record {key}"), error))?;
        self.write(Op::Put(key, Value::Bytes(value.into()))).await
    }

    async fn write(&self, op: Op) -> Result<(), RuntimeError> {
        let written = self.0.txn(Vec::new(), vec![op], Durability::Sync).await;
        written
            .map(drop)
            .map_err(|error| storage("write a record of a host pod", error))
    }

    fn read<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<T>, RuntimeError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let page = self
            .0
            .list(prefix, None, None, None)
            .map_err(|error| storage(format!("read the records under {prefix}"), error))?;
        let parse = |entry: hypernetes_store::Entry| {
            let unreadable = |error| storage(format!("read record {}", entry.key), error);
            let Versioned { version } = serde_json::from_slice(&entry.value).map_err(unreadable)?;
            if version != VERSION {
                // Going on without it would leak a container.
                return Err(invalid(
                    format!("version of record {}", entry.key),
                    format!("must be {VERSION}, not {version}: made by another release"),
                ));
            }
            serde_json::from_slice(&entry.value).map_err(unreadable)
        };
        page.entries.into_iter().map(parse).collect()
    }
}

pub(crate) fn storage(
    action: impl Into<String>,
    error: impl std::error::Error + Send + Sync + 'static,
) -> RuntimeError {
    RuntimeError::Storage {
        action: action.into(),
        source: Box::new(error),
    }
}

pub(crate) fn invalid(field: impl Into<String>, rule: impl Into<String>) -> RuntimeError {
    RuntimeError::Invalid {
        field: field.into(),
        rule: rule.into(),
    }
}

pub(crate) fn not_found(kind: &'static str, id: &impl ToString) -> RuntimeError {
    RuntimeError::NotFound {
        kind,
        id: id.to_string(),
    }
}

pub(crate) fn state(
    action: &'static str,
    kind: &'static str,
    id: &impl ToString,
    state: impl Into<String>,
) -> RuntimeError {
    RuntimeError::State {
        action,
        kind,
        id: id.to_string(),
        state: state.into(),
    }
}

/// What an installed program said when it failed.
pub(crate) fn failed(action: &'static str, message: impl Into<String>) -> RuntimeError {
    RuntimeError::Host {
        action,
        message: message.into(),
    }
}

/// Work on files, off the threads that serve calls.
pub(crate) async fn blocking<T: Send + 'static>(
    action: impl Into<String>,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, RuntimeError> {
    let action = action.into();
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| storage(action, error)),
        Err(lost) => Err(storage(action, lost)),
    }
}

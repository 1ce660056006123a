//! What is stored of sandboxes and containers, and where.
//!
//! `/node/sandboxes/<id>`, `/node/containers/<id>` and `/node/snapshots/<id>`, JSON with a version. Only the
//! task that owns a sandbox writes its records, and [`snapshots`](crate::snapshots) those of snapshots.

use hypernetes_network::Lease;
use hypernetes_store::{Durability, Op, Store, Value};
use hypernetes_types::{ContainerId, Digest, SandboxId, SnapshotId};
use hypernetes_vmm::VmRecord;
use hypernetes_volume::{VolumeId, VolumeMode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    api::{ContainerConfig, ContainerUser, Failure, SandboxConfig},
    container,
    error::RuntimeError,
    sandbox,
};

const SANDBOXES: &str = "/node/sandboxes/";
const CONTAINERS: &str = "/node/containers/";
const SNAPSHOTS: &str = "/node/snapshots/";
/// Of sandboxes and containers. Raised when an older runtime could misread a newer record.
const VERSION: u32 = 1;
/// Of a sandbox with disks for volumes, which an older runtime would unplug.
const VERSION_WITH_DISKS: u32 = 2;
/// Of a container that mounts images or has devices, whose disks an older runtime would unplug.
const VERSION_WITH_IMAGES: u32 = 3;
/// Of a container that is confined by more than an older runtime knows: it would run an exec in it
/// without.
const VERSION_WITH_CONFINEMENT: u32 = 4;
/// Of a sandbox that has volumes attached, which an older runtime would not give back.
const VERSION_WITH_VOLUMES: u32 = 5;
/// Of a sandbox that is a file, or on its way there or back.
const VERSION_WITH_SUSPENSION: u32 = 6;
/// Of a sandbox whose containers stand still while its VM is copied: an older runtime would leave them so.
const VERSION_WITH_FROZEN: u32 = 7;
/// Of every snapshot. Raised too when a record of a container is, which a snapshot has in it.
const VERSION_WITH_SNAPSHOTS: u32 = 8;
pub(crate) const NEWEST_VERSION: u32 = VERSION_WITH_SNAPSHOTS;

/// A sandbox on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub(crate) version: u32,
    pub(crate) id: SandboxId,
    pub(crate) phase: sandbox::Phase,
    /// It was ready once: its uid and attempt are used up.
    pub(crate) was_ready: bool,
    pub(crate) config: SandboxConfig,
    /// User of its VMM.
    pub(crate) uid: u32,
    pub(crate) created_unix_nanos: i64,
    /// The log directory was made for this sandbox.
    pub(crate) owns_log_directory: bool,
    pub(crate) vm: Option<VmRecord>,
    pub(crate) lease: Option<Lease>,
    pub(crate) kernel_release: Option<String>,
    pub(crate) failure: Option<Failure>,
    /// Disks of volumes, plugged or about to be.
    #[serde(default)]
    pub(crate) disks: Vec<VolumeDisk>,
    /// Volumes that outlive the pod, attached or about to be.
    #[serde(default)]
    pub(crate) attached: Vec<AttachedDisk>,
    /// Size of the VM, where it is not as configured any more.
    #[serde(default)]
    pub(crate) size: Option<VmSize>,
    /// What the VM was, while there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) suspension: Option<Suspension>,
    /// The VM is being copied, or was: these containers stand still only for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) frozen: Option<Vec<ContainerId>>,
}

/// What a VM must have to go on where another was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Suspension {
    /// What it was started with.
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    /// Slots that it had disks in.
    pub(crate) slots: Vec<u32>,
    /// Its containers stood still: a clone may go on from it.
    #[serde(default)]
    pub(crate) still: bool,
}

/// What a VM that was copied goes on with, beside the copied files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopiedState {
    pub(crate) suspension: Suspension,
    pub(crate) size: Option<VmSize>,
    pub(crate) lease: Option<Lease>,
    pub(crate) disks: Vec<VolumeDisk>,
    pub(crate) containers: Vec<ContainerRecord>,
    /// Those that stand still only because they were copied.
    pub(crate) frozen: Vec<ContainerId>,
}

/// A snapshot on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub(crate) version: u32,
    pub(crate) id: SnapshotId,
    /// What its source was.
    pub(crate) config: SandboxConfig,
    /// None while it is being made, and once it is being removed.
    pub(crate) content: Option<SnapshotContent>,
}

/// What is in a snapshot that is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotContent {
    pub(crate) state: CopiedState,
    /// What its files take on the disk.
    pub(crate) size_bytes: u64,
    pub(crate) taken_unix_nanos: i64,
}

impl SnapshotRecord {
    /// One that is to be made.
    pub(crate) fn new(id: SnapshotId, config: SandboxConfig) -> Self {
        Self {
            version: VERSION_WITH_SNAPSHOTS,
            id,
            config,
            content: None,
        }
    }
}

/// What a VM has after it was resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmSize {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
}

/// A disk that a volume has for itself, and its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeDisk {
    pub(crate) volume: String,
    pub(crate) slot: u32,
    /// Bytes.
    pub(crate) size_limit: u64,
}

/// A volume that outlives the pod, and the slot of its disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttachedDisk {
    pub(crate) volume: VolumeId,
    pub(crate) slot: u32,
    pub(crate) read_only: bool,
    pub(crate) mode: VolumeMode,
}

impl SandboxRecord {
    pub(crate) fn new(
        id: SandboxId,
        config: SandboxConfig,
        uid: u32,
        created_unix_nanos: i64,
    ) -> Self {
        Self {
            version: VERSION,
            id,
            phase: sandbox::Phase::Starting,
            was_ready: false,
            config,
            uid,
            created_unix_nanos,
            owns_log_directory: false,
            vm: None,
            lease: None,
            kernel_release: None,
            failure: None,
            disks: Vec::new(),
            attached: Vec::new(),
            size: None,
            suspension: None,
            frozen: None,
        }
    }

    /// Size of the VM as it is.
    pub(crate) fn vm_size(&self) -> VmSize {
        self.size.unwrap_or(VmSize {
            vcpus: self.config.vcpus,
            memory_mib: self.config.memory_mib,
        })
    }

    pub(crate) fn set_disks(&mut self, disks: Vec<VolumeDisk>) {
        self.disks = disks;
        self.set_version();
    }

    pub(crate) fn set_attached(&mut self, attached: Vec<AttachedDisk>) {
        self.attached = attached;
        self.set_version();
    }

    pub(crate) fn set_suspension(&mut self, suspension: Option<Suspension>) {
        self.suspension = suspension;
        self.set_version();
    }

    pub(crate) fn set_frozen(&mut self, frozen: Option<Vec<ContainerId>>) {
        self.frozen = frozen;
        self.set_version();
    }

    fn set_version(&mut self) {
        if self.frozen.is_some() {
            self.version = VERSION_WITH_FROZEN;
            return;
        }
        if self.suspension.is_some() {
            self.version = VERSION_WITH_SUSPENSION;
            return;
        }
        self.version = match (self.attached.is_empty(), self.disks.is_empty()) {
            (true, true) => VERSION,
            (true, false) => VERSION_WITH_DISKS,
            (false, _) => VERSION_WITH_VOLUMES,
        };
    }

    /// Slots of all disks that volumes have.
    pub(crate) fn disk_slots(&self) -> impl Iterator<Item = u32> {
        let attached = self.attached.iter().map(|disk| disk.slot);
        self.disks.iter().map(|disk| disk.slot).chain(attached)
    }
}

/// A layer of a container's image, and the disk slot that it is plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerSlot {
    pub(crate) diff_id: Digest,
    pub(crate) slot: u32,
}

/// An image that a container mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountedImage {
    pub(crate) image_id: String,
    /// Lowest first.
    pub(crate) layers: Vec<LayerSlot>,
}

/// A container on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) version: u32,
    pub(crate) id: ContainerId,
    pub(crate) sandbox: SandboxId,
    pub(crate) phase: container::Phase,
    /// Its processes stand still, as the guest told last.
    #[serde(default)]
    pub(crate) paused: bool,
    pub(crate) config: ContainerConfig,
    pub(crate) image_id: String,
    pub(crate) image_ref: String,
    /// Of the first process, once the guest has told.
    #[serde(default)]
    pub(crate) user: Option<ContainerUser>,
    pub(crate) stop_signal: u32,
    /// Lowest first.
    pub(crate) layers: Vec<LayerSlot>,
    /// Images that it mounts, in the order of the mounts.
    #[serde(default)]
    pub(crate) images: Vec<MountedImage>,
    pub(crate) created_unix_nanos: i64,
    pub(crate) started_unix_nanos: i64,
    pub(crate) finished_unix_nanos: i64,
    pub(crate) exit_code: i32,
    pub(crate) reason: String,
    pub(crate) message: String,
    /// All its output stands in the log.
    pub(crate) drained: bool,
    /// What exec inherits from the first process.
    pub(crate) process: StoredProcess,
}

impl ContainerRecord {
    pub(crate) fn set_images(&mut self, images: Vec<MountedImage>) {
        if !images.is_empty() || !self.config.devices.is_empty() {
            self.version = self.version.max(VERSION_WITH_IMAGES);
        }
        self.images = images;
    }

    /// All layers that it shows: of its root, and of the images that it mounts.
    pub(crate) fn all_layers(&self) -> impl Iterator<Item = &LayerSlot> {
        let mounted = self.images.iter().flat_map(|image| &image.layers);
        self.layers.iter().chain(mounted)
    }

    /// Slots of all disks that it needs.
    pub(crate) fn all_slots(&self) -> impl Iterator<Item = u32> {
        // Those of volumes are the sandbox's.
        let own = self.config.devices.iter().filter(|it| it.volume.is_empty());
        let devices = own.map(|device| device.slot);
        self.all_layers().map(|layer| layer.slot).chain(devices)
    }

    /// Ids of the images that must stay for it.
    pub(crate) fn image_ids(&self) -> impl Iterator<Item = &str> {
        let mounted = self.images.iter().map(|image| image.image_id.as_str());
        std::iter::once(self.image_id.as_str()).chain(mounted)
    }

    pub(crate) fn new(id: ContainerId, sandbox: SandboxId, config: ContainerConfig) -> Self {
        Self {
            version: match config.security.seccomp {
                Some(_) => VERSION_WITH_CONFINEMENT,
                None => VERSION,
            },
            id,
            sandbox,
            phase: container::Phase::Creating,
            paused: false,
            config,
            image_id: String::new(),
            image_ref: String::new(),
            user: None,
            stop_signal: 15,
            layers: Vec::new(),
            images: Vec::new(),
            created_unix_nanos: 0,
            started_unix_nanos: 0,
            finished_unix_nanos: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            drained: false,
            process: StoredProcess::default(),
        }
    }
}

/// The part of a process that a later exec needs and the configuration alone does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredProcess {
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) username: String,
}

/// The records of this node.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    store: Store,
    #[cfg(test)]
    pub(crate) gate: crate::testing::Gate,
}

impl Records {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            #[cfg(test)]
            gate: crate::testing::Gate::current(),
        }
    }

    pub(crate) async fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        let key = format!("{SANDBOXES}{}", record.id);
        self.write("store a sandbox record", vec![put(key, record)?])
            .await
    }

    pub(crate) async fn put_container(&self, record: &ContainerRecord) -> Result<(), RuntimeError> {
        self.put_containers(std::slice::from_ref(record)).await
    }

    /// All of them or none.
    pub(crate) async fn put_containers(
        &self,
        records: &[ContainerRecord],
    ) -> Result<(), RuntimeError> {
        let ops = records
            .iter()
            .map(|record| put(format!("{CONTAINERS}{}", record.id), record));
        self.write("store a container record", ops.collect::<Result<_, _>>()?)
            .await
    }

    pub(crate) async fn delete_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.write(
            "delete a container record",
            vec![Op::Delete(format!("{CONTAINERS}{id}"))],
        )
        .await
    }

    /// The sandbox and these containers, all or none.
    pub(crate) async fn delete_sandbox(
        &self,
        id: &SandboxId,
        containers: impl Iterator<Item = &ContainerId>,
    ) -> Result<(), RuntimeError> {
        let mut ops: Vec<_> = containers
            .map(|id| Op::Delete(format!("{CONTAINERS}{id}")))
            .collect();
        ops.push(Op::Delete(format!("{SANDBOXES}{id}")));
        self.write("delete a sandbox record", ops).await
    }

    pub(crate) async fn put_snapshot(&self, record: &SnapshotRecord) -> Result<(), RuntimeError> {
        let key = format!("{SNAPSHOTS}{}", record.id);
        self.write("store a snapshot record", vec![put(key, record)?])
            .await
    }

    pub(crate) async fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        let ops = vec![Op::Delete(format!("{SNAPSHOTS}{id}"))];
        self.write("delete a snapshot record", ops).await
    }

    pub(crate) fn snapshots(&self) -> Result<Vec<SnapshotRecord>, RuntimeError> {
        self.read(SNAPSHOTS)
    }

    pub(crate) fn sandboxes(&self) -> Result<Vec<SandboxRecord>, RuntimeError> {
        self.read(SANDBOXES)
    }

    pub(crate) fn containers(&self) -> Result<Vec<ContainerRecord>, RuntimeError> {
        self.read(CONTAINERS)
    }

    async fn write(&self, action: &'static str, ops: Vec<Op>) -> Result<(), RuntimeError> {
        #[cfg(test)]
        let ops = crate::testing::before_records(&self.gate, action, ops).await?;
        let result = self.store.txn(Vec::new(), ops, Durability::Sync).await;
        #[cfg(test)]
        self.gate.step().await;
        result.map(drop).map_err(|error| storage(action, error))
    }

    fn read<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<T>, RuntimeError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let action = || format!("read the records under {prefix}");
        let page = self
            .store
            .list(prefix, None, None, None)
            .map_err(|error| storage(action(), error))?;
        let parse = |entry: hypernetes_store::Entry| {
            let unreadable = |error| storage(format!("read record {}", entry.key), error);
            let Versioned { version } = serde_json::from_slice(&entry.value).map_err(unreadable)?;
            if !(VERSION..=NEWEST_VERSION).contains(&version) {
                // Going on without it would leak a VM, or lose a pod.
                let rule = format!(
                    "must be {VERSION} to {NEWEST_VERSION}, not {version}: made by another release"
                );
                return Err(RuntimeError::Invalid {
                    field: format!("version of record {}", entry.key),
                    rule,
                });
            }
            serde_json::from_slice(&entry.value).map_err(unreadable)
        };
        page.entries.into_iter().map(parse).collect()
    }
}

fn put(key: String, record: &impl Serialize) -> Result<Op, RuntimeError> {
    let value = serde_json::to_vec(record)
        .map_err(|error| storage(format!("encode record {key}"), error))?;
    Ok(Op::Put(key, Value::Bytes(value.into())))
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

#[cfg(test)]
mod tests {
    use hypernetes_store::StoreConfig;

    use super::*;
    use crate::testing::{container_config, sandbox_config};

    #[tokio::test]
    async fn records_come_back_as_they_were() {
        let records = Records::new(Store::in_memory(StoreConfig::default()).unwrap());
        let sandbox = SandboxRecord::new(SandboxId::random(), sandbox_config("a"), 1000, 7);
        let container = ContainerRecord::new(
            ContainerId::random(),
            sandbox.id.clone(),
            container_config("c"),
        );
        records.put_sandbox(&sandbox).await.unwrap();
        records.put_container(&container).await.unwrap();
        assert_eq!(records.sandboxes().unwrap(), std::slice::from_ref(&sandbox));
        assert_eq!(
            records.containers().unwrap(),
            std::slice::from_ref(&container)
        );
        records
            .delete_sandbox(&sandbox.id, [&container.id].into_iter())
            .await
            .unwrap();
        assert!(
            records.sandboxes().unwrap().is_empty() && records.containers().unwrap().is_empty()
        );
    }

    #[test]
    fn a_record_from_before_volumes_had_disks_is_read() {
        let mut record = SandboxRecord::new(SandboxId::random(), sandbox_config("a"), 1000, 7);
        let mut value = serde_json::to_value(&record).unwrap();
        for field in ["disks", "attached"] {
            value.as_object_mut().unwrap().remove(field).unwrap();
        }
        let read: SandboxRecord = serde_json::from_value(value).unwrap();
        assert_eq!(read, record);
        record.set_disks(vec![VolumeDisk {
            volume: "v".into(),
            slot: 254,
            size_limit: 1,
        }]);
        assert_eq!(record.version, VERSION_WITH_DISKS);
        record.set_attached(vec![AttachedDisk {
            volume: "v".parse().unwrap(),
            slot: 253,
            read_only: false,
            mode: VolumeMode::Block,
        }]);
        assert_eq!(record.version, VERSION_WITH_VOLUMES);
        assert_eq!(record.disk_slots().collect::<Vec<_>>(), [254, 253]);
        record.set_disks(Vec::new());
        assert_eq!(record.version, VERSION_WITH_VOLUMES);
        record.set_attached(Vec::new());
        assert_eq!(read, record);
        record.set_suspension(Some(Suspension {
            vcpus: 1,
            memory_mib: 128,
            slots: vec![1],
            still: false,
        }));
        assert_eq!(record.version, VERSION_WITH_SUSPENSION);
        record.set_frozen(Some(Vec::new()));
        assert_eq!(record.version, VERSION_WITH_FROZEN);
        record.set_frozen(None);
        assert_eq!(record.version, VERSION_WITH_SUSPENSION);
        record.set_suspension(None);
        assert_eq!(read, record);
    }

    #[tokio::test]
    async fn another_release_s_records_are_not_guessed_at() {
        let store = Store::in_memory(StoreConfig::default()).unwrap();
        let value = Value::Bytes(r#"{"version":9}"#.into());
        store
            .txn(
                vec![],
                vec![Op::Put(format!("{SANDBOXES}x"), value)],
                Durability::Sync,
            )
            .await
            .unwrap();
        let error = Records::new(store).sandboxes().unwrap_err();
        assert!(matches!(error, RuntimeError::Invalid { .. }), "{error:?}");
    }
}

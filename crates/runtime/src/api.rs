//! What the runtime is asked and what it tells. No Kubernetes and no CRI types.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use hypernetes_network::HostPort;
use hypernetes_types::{
    Bandwidth, ContainerId, CpuSet, ImageReference, KernelName, NetworkId, SandboxId, SnapshotId,
};
use hypernetes_vmm::{HostShare, VmExtras};
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::{
    error::RuntimeError,
    figures::NodeFigures,
    host::{HostContainer, HostLimits, HostPod},
    seccomp::SeccompProfile,
    timing::Timing,
};

/// Who a sandbox is to its owner. `uid` and `attempt` together are unique.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SandboxMetadata {
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod uid.
    pub uid: String,
    /// Counts sandboxes of one pod.
    pub attempt: u32,
}

/// What a sandbox shall be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Owner's view.
    pub metadata: SandboxMetadata,
    /// Host name in the pod.
    pub hostname: String,
    /// Network to join; `None` = loopback only.
    pub network: Option<NetworkId>,
    /// Address to ask for.
    pub requested_address: Option<IpAddr>,
    /// Ports of the node that lead to the pod.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// Most that the pod receives and sends; needs a network.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Kernel to boot; `None` = the node's default.
    pub kernel: Option<KernelName>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB, the guest's own overhead included.
    pub memory_mib: u32,
    /// What the VM can be given later: more CPUs and memory, directories of the host.
    #[serde(default)]
    pub extras: VmExtras,
    /// Size limit of the pod's scratch disk in MiB (sparse): container layers and emptyDirs.
    pub scratch_mib: u64,
    /// Name servers, search list and options; empty servers = the network's own.
    pub dns: DnsConfig,
    /// Extra lines of /etc/hosts.
    pub hosts: Vec<HostAlias>,
    /// Kernel parameters inside the VM.
    pub sysctls: BTreeMap<String, String>,
    /// All containers see each other's processes.
    pub share_process_namespace: bool,
    /// The user namespace that all containers live in; `None` = the guest's own.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
    /// Where container logs go: `<log_directory>/<log_path of the container>`.
    pub log_directory: PathBuf,
    /// cgroup path for the VMM, relative to each hierarchy's root; `None` = no cgroup of its own.
    pub cgroup_parent: Option<String>,
    /// Kept and returned unchanged.
    pub labels: BTreeMap<String, String>,
    /// Kept and returned unchanged.
    pub annotations: BTreeMap<String, String>,
    /// What the owner wants to find again and the runtime does not read. Returned unchanged.
    #[serde(default)]
    pub memo: String,
    /// Plain containers on the host's kernel instead of a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostPod>,
}

/// A user namespace in the guest: whose root the containers' root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// Users.
    pub uids: IdMapping,
    /// Groups.
    pub gids: IdMapping,
}

/// The ids 0 to `count` of a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// In the guest, what is 0 inside.
    pub first: u32,
    /// How many, at least one. `first + count` fits 32 bits.
    pub count: u32,
}

/// resolv.conf of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search list.
    pub searches: Vec<String>,
    /// Options such as `ndots:5`.
    pub options: Vec<String>,
}

/// One line of /etc/hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAlias {
    /// Address.
    pub address: IpAddr,
    /// Names.
    pub names: Vec<String>,
}

/// The volume that holds all that [`PodRuntime::share`] has shared.
pub const SHARED_VOLUME: &str = "host";

/// A volume that all containers of a sandbox can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// Unique in the sandbox.
    pub name: String,
    /// What is in it.
    pub kind: VolumeKind,
    /// Group that owns the content (fsGroup).
    pub gid: Option<u32>,
}

/// Kinds of volume that live in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeKind {
    /// Empty at first.
    EmptyDir {
        /// In guest memory instead of on the scratch disk.
        memory: bool,
        /// Bytes; 0 = none.
        size_limit: u64,
    },
    /// Memory in huge pages, as files to map. The pages are those that containers were promised.
    HugePages {
        /// `2MB`, as in the names of cgroup files.
        page_size: String,
        /// Bytes; 0 = none.
        size_limit: u64,
    },
    /// Files that the node sends, replaced atomically as a whole.
    Files {
        /// Relative path to content.
        files: BTreeMap<String, VolumeFile>,
    },
    /// The file system of a volume that outlives the pod ([`crate::RuntimeConfig::volumes`]).
    Disk {
        /// The volume's name at its driver.
        volume: String,
        /// Mounted and attached so: other pods can read it too.
        read_only: bool,
        /// When [`VolumeConfig::gid`] is given to what is in it already. Of no effect if read-only.
        #[serde(default)]
        group_change: GroupChange,
    },
}

/// When the content of a volume gets its group (fsGroupChangePolicy).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupChange {
    /// For each pod.
    #[default]
    Always,
    /// If the volume's root does not have it yet.
    OnRootMismatch,
}

/// One file of a [`VolumeKind::Files`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFile {
    /// Bytes.
    pub content: Bytes,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
}

/// What a container shall be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// Name in the pod.
    pub name: String,
    /// Counts containers of one name in one sandbox.
    pub attempt: u32,
    /// An image in the store: any reference or id that resolves there.
    pub image: String,
    /// Replaces the image's entrypoint if not empty.
    pub command: Vec<String>,
    /// Replaces the image's default arguments if not empty (or if `command` is given).
    pub args: Vec<String>,
    /// Added to the image's environment.
    pub env: Vec<(String, String)>,
    /// Replaces the image's working directory if not empty.
    pub working_dir: String,
    /// Where volumes appear.
    pub mounts: Vec<MountConfig>,
    /// Block devices that it sees.
    #[serde(default)]
    pub devices: Vec<DeviceConfig>,
    /// With a terminal.
    pub tty: bool,
    /// With an open stdin.
    pub stdin: bool,
    /// stdin closes when the first client that attached leaves.
    pub stdin_once: bool,
    /// User and privileges.
    pub security: SecurityConfig,
    /// A running container of the same sandbox whose processes it sees, and with whose end it ends.
    #[serde(default)]
    pub pid_target: Option<ContainerId>,
    /// Limits inside the VM.
    pub resources: ResourceConfig,
    /// Number of the signal that asks it to end, before the image's.
    #[serde(default)]
    pub stop_signal: Option<u32>,
    /// Below the sandbox's log directory.
    pub log_path: PathBuf,
    /// Absolute path of the file whose content, up to 4096 bytes, becomes part of the message of
    /// the container's end; empty = none.
    #[serde(default)]
    pub termination_path: String,
    /// Kept and returned unchanged.
    pub labels: BTreeMap<String, String>,
    /// Kept and returned unchanged.
    pub annotations: BTreeMap<String, String>,
    /// What the owner wants to find again and the runtime does not read. Returned unchanged.
    #[serde(default)]
    pub memo: String,
    /// Of a container on the host's kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostContainer>,
}

/// One mount of a volume, or of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountConfig {
    /// Volume of the sandbox; empty if `image` is not.
    pub volume: String,
    /// An image in the store, mounted read-only: any reference or id that resolves there. What is
    /// at `sub_path` in it must exist, and no link may lead out of the image.
    #[serde(default)]
    pub image: String,
    /// Absolute path in the container.
    pub destination: String,
    /// Path inside the volume.
    pub sub_path: String,
    /// Not writable.
    pub readonly: bool,
}

/// A block device in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// As [`PodRuntime::attach_device`] said; 0 if `volume` is not empty.
    pub slot: u32,
    /// A block volume that outlives the pod, by its name at its driver
    /// ([`crate::RuntimeConfig::volumes`]).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub volume: String,
    /// Of such a volume: attached so, other pods can read it too.
    #[serde(default)]
    pub read_only: bool,
    /// Absolute path in the container.
    pub destination: String,
}

/// A block device of the host.
#[derive(Debug)]
pub struct HostDevice {
    /// Opened for what the container may do.
    pub file: std::fs::File,
    /// Not writable.
    pub read_only: bool,
}

/// User, groups, privileges of a container, inside the VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityConfig {
    /// Numeric user, before the image's.
    pub run_as_user: Option<u32>,
    /// Name of a user of the image, where there is no number.
    #[serde(default)]
    pub run_as_username: String,
    /// Numeric group.
    pub run_as_group: Option<u32>,
    /// Refuse to run as uid 0.
    pub run_as_non_root: bool,
    /// More groups.
    pub supplemental_groups: Vec<u32>,
    /// Whether the image's groups of the user are left out.
    #[serde(default)]
    pub only_supplemental_groups: bool,
    /// Capabilities on top of the default set.
    pub add_capabilities: Vec<String>,
    /// Capabilities taken from the default set; `ALL`.
    pub drop_capabilities: Vec<String>,
    /// Of those that it then has: ambient for any user, root too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ambient_capabilities: Vec<String>,
    /// Everything that the VM allows.
    pub privileged: bool,
    /// Root file system is not writable.
    pub readonly_rootfs: bool,
    /// setuid programs gain nothing.
    pub no_new_privs: bool,
    /// The engines' default system call filter.
    pub seccomp_default: bool,
    /// A system call filter instead of the default one. Of no effect if privileged.
    #[serde(default)]
    pub seccomp: Option<SeccompProfile>,
    /// Paths that are not to be seen; `None` = the engines' usual ones, none if privileged.
    #[serde(default)]
    pub masked_paths: Option<Vec<String>>,
    /// Paths that are not writable; `None` = the engines' usual ones, none if privileged.
    #[serde(default)]
    pub readonly_paths: Option<Vec<String>>,
}

/// Limits of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceConfig {
    /// Bytes; 0 = none.
    pub memory_limit: i64,
    /// Thousandths of a CPU; 0 = none.
    pub cpu_limit_milli: i64,
    /// Thousandths of a CPU, a weight; 0 = least.
    pub cpu_request_milli: i64,
    /// CPUs of the host that the VM is to run on, beside those of the other containers; empty = any.
    #[serde(default, skip_serializing_if = "CpuSet::is_empty")]
    pub cpuset_cpus: CpuSet,
    /// Memory nodes of the host: all of them, or empty.
    #[serde(default, skip_serializing_if = "CpuSet::is_empty")]
    pub cpuset_mems: CpuSet,
    /// Processes; 0 = none.
    pub pids_limit: i64,
    /// How soon the guest's kernel ends the first process when memory runs out, -1000 to 1000.
    #[serde(default)]
    pub oom_score_adj: Option<i32>,
    /// Files of the container's cgroup (version 2) and what is written to them.
    #[serde(default)]
    pub unified: BTreeMap<String, String>,
    /// Bytes of huge pages that it is promised and limited to, by size (`2MB`). They come out of the VM's
    /// memory, beside `memory_limit`.
    #[serde(default)]
    pub huge_pages: BTreeMap<String, u64>,
}

/// User and groups of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// More groups.
    pub groups: Vec<u32>,
}

/// State of a sandbox. See `sandbox` for the transitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SandboxState {
    /// Intent is stored; the VM is on its way.
    Starting,
    /// The agent answered, the network is up.
    Ready,
    /// Was stopped, or its VM ended; see [`SandboxStatus::failure`].
    NotReady,
    /// Being taken down.
    Removing,
}

/// A sandbox as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxStatus {
    /// Its id.
    pub id: SandboxId,
    /// As configured.
    pub config: SandboxConfig,
    /// Where it stands.
    pub state: SandboxState,
    /// There is no VM: its memory is on the disk, and its containers are as they were. It is `Ready` all
    /// the same.
    pub suspended: bool,
    /// The VM stands still because the node's disk has no room for what it writes. It goes on by itself
    /// when there is.
    pub stalled: bool,
    /// Nanoseconds since 1970.
    pub created_unix_nanos: i64,
    /// Virtual CPUs that the VM has now.
    pub vcpus: u32,
    /// Memory in MiB that the VM has now.
    pub memory_mib: u32,
    /// Pod address.
    pub address: Option<IpAddr>,
    /// Further ones, of the other family.
    pub more_addresses: Vec<IpAddr>,
    /// `uname -r` in the guest, once it answered.
    pub kernel_release: Option<String>,
    /// Why it is not ready though nobody stopped it: `KernelPanic`, `VmmDied`, …, with a message.
    pub failure: Option<Failure>,
}

/// A reason in CamelCase and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Machine-readable.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// State of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ContainerState {
    /// Prepared, its program does not run yet.
    Created,
    /// Its program runs.
    Running,
    /// Its program ended, or its VM did.
    Exited,
    /// The guest is not asked, or does not answer.
    Unknown,
}

/// A container as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStatus {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox: SandboxId,
    /// As configured.
    pub config: ContainerConfig,
    /// Where it stands.
    pub state: ContainerState,
    /// Of a running one: its processes stand still.
    pub paused: bool,
    /// Digest id of the image.
    pub image_id: String,
    /// `repository@digest` of the image, or its id.
    pub image_ref: String,
    /// Who its first process runs as, as the guest found out.
    pub user: Option<ContainerUser>,
    /// Nanoseconds since 1970; 0 = not yet.
    pub created_unix_nanos: i64,
    /// Nanoseconds since 1970; 0 = not yet.
    pub started_unix_nanos: i64,
    /// Nanoseconds since 1970; 0 = not yet.
    pub finished_unix_nanos: i64,
    /// Of an exited container.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `ContainerCannotRun`, `VmmDied`, `KernelPanic`.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Absolute.
    pub log_path: PathBuf,
}

/// Something changed; ask for the status. A lagging receiver lists again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// A sandbox changed.
    Sandbox(SandboxId),
    /// A container changed.
    Container(SandboxId, ContainerId),
}

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TtySize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Standard output, or the terminal.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
}

/// What to run beside a container's first process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecConfig {
    /// Program and arguments.
    pub command: Vec<String>,
    /// With a terminal.
    pub tty: bool,
    /// With an open stdin.
    pub stdin: bool,
}

/// A process that a caller talks to. Dropping it kills an exec, and only detaches an attach.
#[derive(Debug)]
pub struct Session {
    /// Dropping the sender is end of file.
    pub stdin: Option<mpsc::Sender<Bytes>>,
    /// Ends when all output has been delivered.
    pub output: mpsc::Receiver<Output>,
    /// Terminal size changes.
    pub resize: Option<mpsc::Sender<TtySize>>,
    /// Exit code after the output's end.
    pub exit: oneshot::Receiver<Result<i32, RuntimeError>>,
}

/// A byte stream to a port of a pod.
pub type Connection = Box<dyn hypernetes_vmm::Channel>;

/// What a file system holds of this node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesystemUsage {
    /// A directory on it.
    pub path: PathBuf,
    /// Bytes that are allocated.
    pub used_bytes: u64,
    /// Files.
    pub files: u64,
}

/// Where the node keeps images and what containers write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskUsage {
    /// Image layers and their documents.
    pub images: FilesystemUsage,
    /// Disks of sandboxes, the memory of those that are suspended, and snapshots.
    pub containers: FilesystemUsage,
}

/// What a sandbox uses, in its guest's words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SandboxStats {
    /// When the guest was asked, in nanoseconds since 1970.
    pub unix_nanos: i64,
    /// Bytes that the guest's kernel manages.
    pub memory_total: u64,
    /// Bytes that could be had without swapping.
    pub memory_available: u64,
    /// The guest's interfaces but the loopback.
    pub interfaces: Vec<InterfaceStats>,
    /// Containers that are not removed.
    pub containers: Vec<ContainerStats>,
}

/// Traffic of one interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// Its name in the guest.
    pub name: String,
    /// Bytes in.
    pub rx_bytes: u64,
    /// Failed receptions.
    pub rx_errors: u64,
    /// Bytes out.
    pub tx_bytes: u64,
    /// Failed transmissions.
    pub tx_errors: u64,
    /// Packets in.
    pub rx_packets: u64,
    /// Packets in that were dropped.
    pub rx_dropped: u64,
    /// Packets out.
    pub tx_packets: u64,
    /// Packets out that were dropped.
    pub tx_dropped: u64,
}

/// What one container uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStats {
    /// Which.
    pub id: ContainerId,
    /// CPU time in nanoseconds.
    pub cpu_usage_nanos: u64,
    /// Bytes charged.
    pub memory_usage: u64,
    /// Bytes that cannot be dropped at once.
    pub memory_working_set: u64,
    /// Bytes of anonymous memory.
    pub memory_rss: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that waited for a disk.
    pub major_page_faults: u64,
    /// Processes.
    pub pids: u64,
    /// More, if it was asked for and the guest knows it.
    pub detail: Option<Box<ContainerDetail>>,
}

/// What one container uses, in detail. Counters are from its start on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerDetail {
    /// CPU time in programs, in nanoseconds.
    pub cpu_user_nanos: u64,
    /// CPU time in the guest's kernel, in nanoseconds.
    pub cpu_system_nanos: u64,
    /// Periods of the CPU limit.
    pub cfs_periods: u64,
    /// Periods in which it was held up by the limit.
    pub cfs_throttled_periods: u64,
    /// Nanoseconds for which it was held up by the limit.
    pub cfs_throttled_nanos: u64,
    /// Bytes of files in memory.
    pub memory_cache: u64,
    /// Bytes of files that are mapped.
    pub memory_mapped_file: u64,
    /// Bytes of the kernel's for it.
    pub memory_kernel: u64,
    /// Bytes swapped out.
    pub memory_swap: u64,
    /// Most bytes at a time.
    pub memory_peak: u64,
    /// Times that the memory limit was hit.
    pub memory_failures: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Processes.
    pub processes: u64,
    /// Most threads; 0 = no limit.
    pub threads_max: u64,
    /// Open descriptors, up to a limit.
    pub file_descriptors: u64,
    /// Of those, sockets.
    pub sockets: u64,
    /// Soft limit of open files of the first process.
    pub open_files_soft: u64,
    /// Page size, bytes in use, most bytes at a time (0 = not known).
    pub huge_pages: Vec<(String, u64, u64)>,
    /// By device of the guest.
    pub devices: Vec<DeviceStats>,
    /// If the guest's kernel measures it.
    pub pressure: Option<Pressure>,
    /// Device of the guest that the writable layer is on.
    pub fs_device: String,
    /// Bytes of that file system.
    pub fs_limit: u64,
    /// Files that it can have.
    pub fs_inodes: u64,
    /// Files that it can have still.
    pub fs_inodes_free: u64,
    /// Bytes of the writable layer, a while ago.
    pub fs_usage: u64,
    /// Files of the writable layer, a while ago.
    pub fs_inodes_used: u64,
}

/// What was read from and written to a device of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Its name, without a directory.
    pub name: String,
    /// Number of its driver.
    pub major: u32,
    /// Number of its own.
    pub minor: u32,
    /// Requests.
    pub reads: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Requests.
    pub writes: u64,
    /// Bytes.
    pub write_bytes: u64,
}

/// Nanoseconds for which some, and all, tasks waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    /// For a CPU.
    pub cpu: (u64, u64),
    /// For memory.
    pub memory: (u64, u64),
    /// For a disk.
    pub io: (u64, u64),
}

/// A new size of a sandbox's VM, and the note that goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxUpdate {
    /// Virtual CPUs, at most [`VmExtras::max_vcpus`].
    pub vcpus: u32,
    /// Guest memory in MiB, from what the VM was started with up to [`VmExtras::max_memory_mib`].
    pub memory_mib: u32,
    /// Replaces [`SandboxConfig::memo`], if it is there.
    pub memo: Option<String>,
}

/// New limits of a container, and the note that goes with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerUpdate {
    /// All limits, not only those that change.
    pub resources: ResourceConfig,
    /// Replaces [`ContainerConfig::memo`].
    pub memo: String,
    /// Of a container on the host's kernel: replaces [`HostContainer::limits`].
    pub host: Option<HostLimits>,
}

/// What a sandbox is that goes on from another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneConfig {
    /// What is copied, of the same namespace and of the same shape.
    pub source: CloneSource,
    /// The containers of the clone: each goes on from the newest one of its name, if there is one that has
    /// been started. Image, program, mounts and privileges are the source's, whatever stands here.
    pub containers: Vec<ContainerConfig>,
    /// Volumes of files, which are written before anything goes on; others have what the source's have.
    pub volumes: Vec<VolumeConfig>,
}

/// What a sandbox can go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloneSource {
    /// A sandbox that is up or suspended.
    Sandbox(SandboxId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

impl std::fmt::Display for CloneSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sandbox(id) => id.fmt(f),
            Self::Snapshot(id) => id.fmt(f),
        }
    }
}

/// What a snapshot shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotConfig {
    /// Chosen by whoever asks: asked for again, the same snapshot is meant.
    pub id: SnapshotId,
    /// The sandbox that is copied, which is up or suspended.
    pub source: SandboxId,
    /// Bytes that it may take on the disk.
    pub size_limit: u64,
}

/// A snapshot as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotStatus {
    /// Which.
    pub id: SnapshotId,
    /// Whose copy it is.
    pub source: SandboxMetadata,
    /// Whether it is whole; else it is being made or removed, or was when the runtime ended.
    pub ready: bool,
    /// Bytes that it takes on the disk; 0 if it is not whole.
    pub size_bytes: u64,
    /// When the source stood still for it; 0 if it is not whole.
    pub taken_unix_nanos: i64,
    /// Containers that had been started in it.
    pub containers: Vec<ContainerConfig>,
    /// Images that it goes on from, by their ids: they must not be removed.
    pub image_ids: Vec<String>,
}

/// Progress of an image pull.
pub type PullProgress = Box<dyn Fn(hypernetes_image::PullEvent) + Send + Sync>;

/// Pods on this node. Every call is safe to repeat: what is already so is success.
#[async_trait]
pub trait PodRuntime: Send + Sync + std::fmt::Debug {
    /// Boots a pod's VM and joins its network. The same uid and attempt again gives the same
    /// sandbox, waiting for one that is still starting. On error nothing is left but a record
    /// that the next start or `remove_sandbox` clears.
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxId, RuntimeError>;
    /// As [`PodRuntime::run_sandbox`], but the VM goes on from a copy of another sandbox that is up or suspended, or of a
    /// snapshot, with an identity of its own: host name, addresses, clock, entropy, ids of its containers. A sandbox stands
    /// still while it is copied, its sessions end, and it goes on whatever comes of the clone.
    async fn clone_sandbox(
        &self,
        config: SandboxConfig,
        clone: CloneConfig,
    ) -> Result<SandboxId, RuntimeError> {
        let _ = config;
        Err(RuntimeError::Invalid {
            field: "source".to_owned(),
            rule: format!("{} is no VM and cannot be cloned", clone.source),
        })
    }
    /// Keeps a copy of a sandbox, memory and disks, that outlives it and any restart, until it is removed. The sandbox
    /// stands still while it is copied, its sessions end, and it goes on whatever comes of it. On an error nothing is
    /// kept. Dropped half-way, what was made goes with the next call for the same id, or with its removal.
    async fn take_snapshot(&self, config: SnapshotConfig) -> Result<SnapshotStatus, RuntimeError> {
        Err(RuntimeError::Invalid {
            field: "source".to_owned(),
            rule: format!("{} is no VM and has no snapshots", config.source),
        })
    }
    /// All snapshots.
    async fn list_snapshots(&self) -> Vec<SnapshotStatus> {
        Vec::new()
    }
    /// Removes a snapshot, once no clone copies it any more.
    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        let _ = id;
        Ok(())
    }
    /// Ends all containers, powers the VM off, releases the network. Logs and statuses stay.
    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError>;
    /// Stops and forgets the sandbox, its containers, disks and logs.
    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError>;
    /// One sandbox.
    async fn sandbox(&self, id: &SandboxId) -> Option<SandboxStatus>;
    /// All sandboxes.
    async fn list_sandboxes(&self) -> Vec<SandboxStatus>;
    /// Creates or replaces a volume of the sandbox.
    async fn write_volume(&self, id: &SandboxId, volume: VolumeConfig) -> Result<(), RuntimeError>;
    /// Lets the sandbox's guest see a directory or file of the host, of a sandbox whose
    /// [`VmExtras::shares`] is set. Returns the name by which it is a sub path of the volume
    /// [`SHARED_VOLUME`]; it stays until the sandbox is stopped.
    async fn share(&self, id: &SandboxId, share: HostShare) -> Result<String, RuntimeError>;
    /// Makes the VM of a sandbox that is up larger or smaller, at once. A guest that does not give
    /// memory back is an error, and keeps what it has.
    async fn resize_sandbox(
        &self,
        id: &SandboxId,
        update: SandboxUpdate,
    ) -> Result<(), RuntimeError>;
    /// Makes a block device a disk of the sandbox's VM and returns its slot, for the container that
    /// is created next and goes with it. What is attached and taken by no container is detached by
    /// [`PodRuntime::detach_unused`].
    async fn attach_device(&self, id: &SandboxId, device: HostDevice) -> Result<u32, RuntimeError>;
    /// Lets a sandbox that is up see a new size of one of its volumes, after the volume's driver has
    /// expanded it; a file system grows while it is mounted. Of a sandbox that does not have the volume:
    /// success, the next one that gets it sees the size that it has then.
    async fn grow_volume(&self, id: &SandboxId, volume: &str) -> Result<(), RuntimeError> {
        Err(RuntimeError::Invalid {
            field: "volume".to_owned(),
            rule: format!("{volume} cannot grow in {id}, which is no VM"),
        })
    }
    /// Detaches the devices that no container has taken.
    async fn detach_unused(&self, id: &SandboxId) -> Result<(), RuntimeError>;
    /// Prepares a container. The same name and attempt again gives the same container.
    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId, RuntimeError>;
    /// Runs its program. Of a running container: success.
    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError>;
    /// Sends the image's stop signal, waits up to `grace`, kills.
    async fn stop_container(
        &self,
        id: &ContainerId,
        grace: std::time::Duration,
    ) -> Result<(), RuntimeError>;
    /// Has all processes of a running container stand still, or go on. It is so after a restart of
    /// the node too, until the container ends. Stopping it does not wait for it to go on.
    async fn set_paused(&self, id: &ContainerId, paused: bool) -> Result<(), RuntimeError> {
        let _ = paused;
        Err(RuntimeError::Invalid {
            field: "paused".to_owned(),
            rule: format!("{id} runs on the node's own kernel and cannot be paused"),
        })
    }
    /// Frees the memory of a sandbox that is up: its VM stands still, goes to the disk, and ends. Address,
    /// disks and volumes stay its own, its containers are shown as they were, and what needs them is
    /// refused until [`PodRuntime::resume_sandbox`]. On an error it runs on. Stopping and removing it works
    /// as ever.
    async fn suspend_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        Err(RuntimeError::Invalid {
            field: "suspended".to_owned(),
            rule: format!("{id} is no VM and cannot be suspended"),
        })
    }
    /// Has a suspended sandbox go on where it was, with the clock of today. On an error it stays suspended.
    async fn resume_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        Err(RuntimeError::Invalid {
            field: "suspended".to_owned(),
            rule: format!("{id} is no VM and cannot be resumed"),
        })
    }
    /// Forgets an exited container and its log. Kills a running one.
    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError>;
    /// Changes the limits of a container that has not ended, at once and for later starts of the
    /// node.
    async fn update_container(
        &self,
        id: &ContainerId,
        update: ContainerUpdate,
    ) -> Result<(), RuntimeError>;
    /// Goes on in a new log file if somebody has taken the old one away. When it returns, the file
    /// is there and the old one gets no more.
    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError>;
    /// One container.
    async fn container(&self, id: &ContainerId) -> Option<ContainerStatus>;
    /// All containers, or one sandbox's.
    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus>;
    /// What a sandbox that is up and its containers use.
    async fn stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError>;
    /// What the kernel and the guest's program have written on the console of a sandbox's VM: the
    /// last 512 KiB at most, without control characters. Gone with the VM.
    async fn console(&self, id: &SandboxId) -> Result<String, RuntimeError> {
        Err(RuntimeError::Invalid {
            field: "sandbox".to_owned(),
            rule: format!("{id} is no VM and has no console"),
        })
    }
    /// The same in detail, which has the guest look at every process and file of its containers.
    async fn detailed_stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError>;
    /// Changes from now on.
    fn events(&self) -> broadcast::Receiver<RuntimeEvent>;
    /// Runs a process in a running container.
    async fn exec(&self, id: &ContainerId, config: ExecConfig) -> Result<Session, RuntimeError>;

    /// Runs a process of the pod's VM itself, with the files of a running container: as root, with all
    /// privileges, in the guest's own namespaces. It can do anything to the pod and nothing beyond
    /// its VM. For an operator who looks for a fault. Containers without a VM are refused.
    async fn exec_in_guest(
        &self,
        id: &ContainerId,
        config: ExecConfig,
    ) -> Result<Session, RuntimeError>;
    /// Joins the first process of a running container; output from now on.
    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError>;
    /// As [`attach`](Self::attach), for whoever has started the container: what its terminal has said
    /// before the first client came, the last 64 KiB of it, comes first.
    async fn attach_first(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        self.attach(id, stdin).await
    }
    /// How long the phases of its start took, if this process started it.
    async fn start_timing(&self, id: &SandboxId) -> Option<Timing> {
        let _ = id;
        None
    }
    /// Connects to a TCP port on the pod's localhost.
    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Connection, RuntimeError>;
    /// Makes an image be in the store and returns its record.
    async fn pull_image(
        &self,
        reference: &ImageReference,
        credentials: hypernetes_image::Credentials,
        progress: Option<PullProgress>,
    ) -> Result<hypernetes_image::Image, RuntimeError>;
    /// Finds an image in the store.
    async fn image(&self, reference: &str) -> Option<hypernetes_image::Image>;
    /// All images in the store.
    async fn list_images(&self) -> Result<Vec<hypernetes_image::Image>, RuntimeError>;
    /// Takes an image with all of its names out of the store. An image of a container is refused.
    async fn remove_image(&self, reference: &str) -> Result<(), RuntimeError>;
    /// Figures of the whole node, for whoever watches it.
    async fn figures(&self) -> NodeFigures;
    /// Ends what was made ahead and nobody uses yet, before an orderly stop. Pods run on.
    async fn drain(&self) {}
    /// What images and scratch disks take.
    async fn disk_usage(&self) -> Result<DiskUsage, RuntimeError>;
}

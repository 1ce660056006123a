//! What the child is told to make. Built by the agent from a request that it has checked.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Begins the message of a refusal if a mount of an image is why.
pub const IMAGE_VOLUME_FAILED: &str = "ImageVolumeMountFailed";

/// The child's work.
#[derive(Debug, Serialize, Deserialize)]
pub enum Job {
    /// A container's first process.
    Init(Box<InitSpec>),
    /// One more process in the container whose pidfd comes along.
    Exec(Box<ProcessSpec>),
    /// A process of the guest itself, with the files of the container whose pidfd comes along.
    Guest(Box<ProcessSpec>),
    /// First process of a shared pid namespace: reaps until it is killed.
    Pause,
    /// Makes a user namespace, and after the gate, when its ids are mapped, the network, IPC and UTS
    /// namespaces that belong to it. Answers [`crate::Reply::Ready`] after each step and lives until
    /// the socket is closed.
    Namespaces,
}

/// Which ids a user namespace has: 0 to `count` inside are `first` and the following outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// Outside, what is 0 inside.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl IdMap {
    /// The id outside of an id inside, if it has one.
    pub fn outside(self, id: u32) -> Option<u32> {
        (id < self.count).then(|| self.first.checked_add(id))?
    }
}

/// The ids of a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserMap {
    /// Users.
    pub uids: IdMap,
    /// Groups.
    pub gids: IdMap,
}

/// A container.
#[derive(Debug, Serialize, Deserialize)]
pub struct InitSpec {
    /// Its root file system.
    pub rootfs: RootfsSpec,
    /// Volumes and tmpfs.
    pub mounts: Vec<MountSpec>,
    /// Single files of the pod: hosts, resolv.conf, hostname.
    pub files: Vec<FileBind>,
    /// Block devices.
    pub devices: Vec<DeviceSpec>,
    /// The pod's shared memory directory.
    pub shm: PathBuf,
    /// Paths to hide.
    pub masked_paths: Vec<String>,
    /// Paths to make read-only.
    pub readonly_paths: Vec<String>,
    /// All devices, writable /sys, all capabilities.
    pub privileged: bool,
    /// The first process.
    pub process: ProcessSpec,
}

/// Overlay of image layers.
#[derive(Debug, Serialize, Deserialize)]
pub struct RootfsSpec {
    /// Directory in which the layers are mounted.
    pub layers_dir: PathBuf,
    /// Names in it, lowest layer first.
    pub layers: Vec<String>,
    /// Directory with `upper` and `work`, on one writable file system.
    pub writable: PathBuf,
    /// Empty directory to mount it on, seen only inside the container's mount namespace.
    pub target: PathBuf,
    /// Whether the root is read-only for the container.
    pub readonly: bool,
}

/// A mount that the container asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct MountSpec {
    /// Path in the container, absolute.
    pub destination: String,
    /// What is mounted.
    pub source: MountSource,
    /// Whether the container may not write.
    pub readonly: bool,
}

/// Where a mount comes from.
#[derive(Debug, Serialize, Deserialize)]
pub enum MountSource {
    /// A directory of the guest.
    Volume {
        /// The volume's directory.
        directory: PathBuf,
        /// Path below it, empty for all of it. Created as a directory if missing.
        sub_path: String,
    },
    /// Image layers, read-only.
    Image {
        /// Names in [`RootfsSpec::layers_dir`], lowest layer first.
        layers: Vec<String>,
        /// Path in the image, empty for all of it. It must be there, and no link leads out of it.
        sub_path: String,
    },
    /// A new tmpfs.
    Tmpfs {
        /// Bytes, 0 for the kernel's default.
        size: u64,
        /// Mode of its root, 0 for 1777.
        mode: u32,
    },
}

/// A block device of the guest that the container sees.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Its node in the guest.
    pub source: PathBuf,
    /// Its node in the container, absolute.
    pub destination: String,
}

/// One file bound over another.
#[derive(Debug, Serialize, Deserialize)]
pub struct FileBind {
    /// In the guest.
    pub source: PathBuf,
    /// In the container, absolute.
    pub destination: String,
}

/// A process.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, created if missing. Empty: `/`.
    pub cwd: String,
    /// Who runs it.
    pub user: UserSpec,
    /// Columns and rows of a terminal that is made for it; none: the streams come along.
    pub tty: Option<(u16, u16)>,
    /// Changes to the default capabilities.
    pub capabilities: CapabilitySpec,
    /// Never gain privileges by execve.
    pub no_new_privs: bool,
    /// Limits, by RLIMIT_ name.
    pub rlimits: Vec<RlimitSpec>,
    /// Which system calls it may make. Nothing of it holds for a privileged process.
    pub seccomp: SeccompSpec,
    /// For the kernel's choice of what to kill, -1000 to 1000.
    pub oom_score_adj: i32,
    /// The ids of the user namespace that it lives in. For a container's first process the
    /// namespace's descriptor comes along, as the first one.
    pub users: Option<UserMap>,
}

/// Who runs a process.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct UserSpec {
    /// Used unless `username` is there.
    pub uid: u32,
    /// Used unless `username` is there.
    pub gid: u32,
    /// Groups besides those of the image's group file.
    pub additional_gids: Vec<u32>,
    /// `user[:group]`, names or numbers, looked up in the image.
    pub username: Option<String>,
    /// Overrides the primary group that `username` led to.
    pub run_as_group: Option<u32>,
    /// No groups but `additional_gids`, whatever the image's group file says.
    pub only_additional_gids: bool,
}

/// Changes to the default capabilities.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct CapabilitySpec {
    /// Names with or without `CAP_`, or `ALL`.
    pub add: Vec<String>,
    /// Names with or without `CAP_`, or `ALL`.
    pub drop: Vec<String>,
    /// Names with or without `CAP_` of those that it then has: ambient for any user, root too.
    pub ambient: Vec<String>,
    /// Everything, whatever the lists say.
    pub privileged: bool,
}

/// One resource limit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RlimitSpec {
    /// `RLIMIT_NOFILE`.
    pub name: String,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Which system calls a process may make.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompSpec {
    /// All that its capabilities allow.
    #[default]
    Unconfined,
    /// What container engines allow by default.
    EngineDefault,
    /// What the owner's own filter allows.
    Profile(SeccompProfile),
}

/// A system call filter. Where several rules match a call, the strictest action holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompProfile {
    /// Of calls that no rule matches.
    pub default: SeccompAction,
    /// In any order.
    pub rules: Vec<SeccompRule>,
    /// Whether the kernel logs actions other than allowing.
    pub log: bool,
    /// Whether the mitigation of speculative store bypass is left out.
    pub spec_allow: bool,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SeccompAction {
    /// It is made.
    Allow,
    /// It fails with this error number.
    Errno(u16),
    /// The process is killed.
    KillProcess,
    /// The thread is killed.
    KillThread,
    /// It is made and logged.
    Log,
    /// A tracer is told with this message; without a tracer it fails with ENOSYS.
    Trace(u16),
    /// The process gets SIGSYS.
    Trap,
}

/// Calls and what becomes of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompRule {
    /// Names of system calls. Unknown ones are passed over.
    pub names: Vec<String>,
    /// What becomes of them.
    pub action: SeccompAction,
    /// Conditions, all of which must hold; several on one argument are alternatives.
    pub args: Vec<SeccompArg>,
    /// The rule is there only for a process that has all of these,
    pub include_capabilities: Vec<String>,
    /// and none of these.
    pub exclude_capabilities: Vec<String>,
}

/// One condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompArg {
    /// Which argument, 0 to 5.
    pub index: u8,
    /// How it is compared.
    pub op: SeccompOp,
    /// With what; of [`SeccompOp::MaskedEq`] the mask.
    pub value: u64,
    /// Of [`SeccompOp::MaskedEq`] what the masked argument is compared with.
    pub value_two: u64,
}

/// A comparison of 64 bits without sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompOp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
    /// Equal under a mask.
    MaskedEq,
}

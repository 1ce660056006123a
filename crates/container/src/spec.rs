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
    /// First process of a shared pid namespace: reaps until it is killed.
    Pause,
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
    /// Whether the default system call filter applies.
    pub seccomp: bool,
    /// For the kernel's choice of what to kill, -1000 to 1000.
    pub oom_score_adj: i32,
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

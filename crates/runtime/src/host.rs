//! What only a pod on the host's own kernel has. A pod in a VM has none of it: its configurations
//! leave it out, and [`crate::NodeRuntime`] refuses one that has it.

use std::{collections::BTreeMap, path::PathBuf};

use hypernetes_types::ContainerId;
use serde::{Deserialize, Serialize};

/// A pod of plain containers on the host's kernel. It is in the network that
/// [`crate::SandboxConfig::network`] names, or in the host's without one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPod {
    /// Its containers share the host's System V IPC, POSIX queues and `/dev/shm`.
    pub host_ipc: bool,
}

/// What a container on the host's kernel has beyond one in a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostContainer {
    /// Whose processes it sees.
    pub pid: PidNamespace,
    /// Host paths and images in it, in their order.
    pub mounts: Vec<HostMount>,
    /// Devices of the host.
    pub devices: Vec<HostPodDevice>,
    /// Its system call filter.
    pub seccomp: Seccomp,
    /// Name of a profile that is loaded in the host's AppArmor.
    pub apparmor: Option<String>,
    /// Capabilities, of those it has, that programs of an unprivileged user keep.
    pub ambient_capabilities: Vec<String>,
    /// Limits in the host's own units.
    pub limits: HostLimits,
}

/// A process namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidNamespace {
    /// Its own.
    #[default]
    Own,
    /// One that the containers of the pod share.
    Pod,
    /// The host's.
    Host,
    /// That of another container of the pod, which runs.
    Container(ContainerId),
}

/// A system call filter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    /// None.
    #[default]
    Unconfined,
    /// The usual one of container engines.
    RuntimeDefault,
    /// The OCI profile in this file of the host.
    Localhost(PathBuf),
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMountSource {
    /// A path of the host; a directory is made where there is nothing.
    Path(PathBuf),
    /// A directory of an image in the store.
    Image {
        /// A reference or id.
        image: String,
        /// Path inside of it; empty = its root.
        sub_path: String,
    },
}

/// Whether mounts made on one side are seen on the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// Neither way.
    #[default]
    Private,
    /// Mounts of the host are seen in the container.
    FromHost,
    /// Both ways.
    Both,
}

/// One mount of a container on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMount {
    /// What.
    pub source: HostMountSource,
    /// Absolute path in the container.
    pub destination: String,
    /// Not writable.
    pub readonly: bool,
    /// Not writable, and no mount below it either. Needs `readonly` and private propagation.
    pub recursive_readonly: bool,
    /// Which way mounts travel.
    pub propagation: Propagation,
}

/// One device, or a directory of devices, of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPodDevice {
    /// Path on the host.
    pub host: PathBuf,
    /// Path in the container.
    pub container: PathBuf,
    /// Of `r`, `w` and `m`.
    pub permissions: String,
}

/// Limits as the host's cgroups take them; 0 and empty = none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds in each period; below 0 = none.
    pub cpu_quota: i64,
    /// A weight, 1024 for one CPU.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory: i64,
    /// Bytes of memory and swap together.
    pub memory_swap: i64,
    /// Such as `0-2,4`.
    pub cpuset_cpus: String,
    /// Such as `0`.
    pub cpuset_mems: String,
    /// Page size, such as `2MB`, to bytes.
    pub hugepages: BTreeMap<String, u64>,
    /// Files of cgroup version 2 and what is written to them.
    pub unified: BTreeMap<String, String>,
}

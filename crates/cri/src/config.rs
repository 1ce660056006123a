//! What a node is told when it is made.

use std::{net::SocketAddr, path::PathBuf};

use hypernetes_runtime::VmExtras;

use crate::{host::HostHandler, resources, v1};

/// Configuration of a [`crate::CriServer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CriConfig {
    /// Where URLs of exec, attach and port-forward lead to; port 0 takes a free one.
    pub stream_address: SocketAddr,
    /// Where Prometheus finds the node's metrics, names of pods among them; `None` = nowhere. Port 0
    /// takes a free one.
    pub metrics_address: Option<SocketAddr>,
    /// The kubelet's directory: what is below `pods/` there is carried into the guest.
    pub kubelet_dir: PathBuf,
    /// Other host directories and files that pods may have a read-only copy of.
    pub copied_paths: Vec<PathBuf>,
    /// Directories of the host below which pods may see everything as it is. Not empty: every pod's
    /// VM is made so that it can.
    pub shared_paths: Vec<SharedPath>,
    /// Block devices of the host, and directories of them, that containers may have.
    pub devices: Vec<PathBuf>,
    /// Whether pods may see the volumes that the kubelet has mounted for them and that this node has
    /// no other way for: CSI, local, NFS and others.
    pub share_volumes: bool,
    /// Where containers log whose sandbox names no log directory.
    pub log_dir: PathBuf,
    /// cgroup of VMMs whose sandbox names no parent, relative to each hierarchy's root.
    pub cgroup_root: String,
    /// Directory of everything durable, as `crictl info` shows it.
    pub state_dir: PathBuf,
    /// How large VMs are.
    pub vm: VmSizes,
    /// Who may have pods on the node's own kernel.
    pub host: HostHandler,
}

/// A directory of the host for pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedPath {
    /// Absolute.
    pub path: PathBuf,
    /// Pods can only mount it, and what is in it, read-only.
    pub read_only: bool,
}

/// How large VMs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSizes {
    /// Least memory for containers.
    pub memory_mib: u32,
    /// Memory that the guest itself takes.
    pub overhead_mib: u32,
    /// Least number of virtual CPUs.
    pub vcpus: u32,
    /// Most virtual CPUs.
    pub max_vcpus: u32,
    /// Virtual CPUs that a running VM can be given; 0 = those that it starts with.
    pub resize_vcpus: u32,
    /// Memory for containers that a running VM can be given; 0 = what it starts with.
    pub resize_memory_mib: u32,
    /// Size limit of the scratch disk: container layers and emptyDirs.
    pub scratch_mib: u64,
}

impl Default for VmSizes {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            overhead_mib: 64,
            vcpus: 1,
            max_vcpus: 64,
            resize_vcpus: 0,
            resize_memory_mib: 0,
            scratch_mib: 10 * 1024,
        }
    }
}

impl CriConfig {
    /// Virtual CPUs, memory in MiB and extras of the VM of a pod without limits.
    pub fn usual_vm(&self) -> (u32, u32, VmExtras) {
        let size = resources::vm_size(&v1::LinuxPodSandboxConfig::default(), &self.vm);
        let extras = resources::vm_extras(size, self);
        (size.vcpus, size.memory_mib, extras)
    }

    /// The usual values for a node with this state directory.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            stream_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            metrics_address: None,
            kubelet_dir: PathBuf::from("/var/lib/kubelet"),
            copied_paths: Vec::new(),
            shared_paths: Vec::new(),
            devices: Vec::new(),
            share_volumes: false,
            log_dir: state_dir.join("logs"),
            cgroup_root: "hypernetes".to_owned(),
            state_dir,
            vm: VmSizes::default(),
            host: HostHandler::default(),
        }
    }
}

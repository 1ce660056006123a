//! What a node is told when it is made.

use std::{net::SocketAddr, path::PathBuf};

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
    /// Where containers log whose sandbox names no log directory.
    pub log_dir: PathBuf,
    /// cgroup of VMMs whose sandbox names no parent, relative to each hierarchy's root.
    pub cgroup_root: String,
    /// Directory of everything durable, as `crictl info` shows it.
    pub state_dir: PathBuf,
    /// How large VMs are.
    pub vm: VmSizes,
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
            scratch_mib: 10 * 1024,
        }
    }
}

impl CriConfig {
    /// The usual values for a node with this state directory.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            stream_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            metrics_address: None,
            kubelet_dir: PathBuf::from("/var/lib/kubelet"),
            copied_paths: Vec::new(),
            log_dir: state_dir.join("logs"),
            cgroup_root: "hypernetes".to_owned(),
            state_dir,
            vm: VmSizes::default(),
        }
    }
}

//! What a node is told when it is made.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use ipnet::{IpNet, Ipv4Net};

/// Memory that the guest itself takes.
const OVERHEAD_MIB: u32 = 64;
/// Memory of a container that says nothing.
const DEFAULT_MEMORY_MIB: u32 = 128;
/// Virtual CPUs and memory in MiB of the VM of a pod with one container that says nothing.
pub const USUAL_VM: (u32, u32) = (1, DEFAULT_MEMORY_MIB + OVERHEAD_MIB);

/// Configuration of a [`crate::Nodelet`].
#[derive(Debug, Clone)]
pub struct NodeletConfig {
    /// Name of the Node object.
    pub node_name: String,
    /// The node's address, as pods' `hostIP` shows it.
    pub address: IpAddr,
    /// State directory: logs are below it, and its file system is the node's ephemeral storage.
    pub state_dir: PathBuf,
    /// How many pods fit.
    pub max_pods: u32,
    /// Addresses of the network of namespaces that have none and belong to no tenant.
    pub default_cidr: IpNet,
    /// Pods of that network may open connections to the outside.
    pub default_egress: bool,
    /// MTU of pods where the Network names none.
    pub mtu: u32,
    /// Domain of the cluster's names.
    pub cluster_domain: String,
    /// Addresses of services, the same in every network.
    pub service_cidr: Ipv4Net,
    /// Size of a pod's scratch disk where no limit says otherwise.
    pub scratch_mib: u64,
    /// Memory that the guest itself takes, added to the sum of the containers'.
    pub overhead_mib: u32,
    /// Memory of a container that names neither limit nor request.
    pub default_memory_mib: u32,
    /// Directory of the system call filters that pods can name (seccomp `Localhost`).
    pub seccomp_profiles: Option<PathBuf>,
    /// cgroup below which each pod's VMM gets one of its own, relative to each hierarchy's root.
    pub cgroup_root: String,
}

impl NodeletConfig {
    /// The usual values for a node.
    pub fn new(
        node_name: impl Into<String>,
        address: IpAddr,
        state_dir: PathBuf,
        cidr: IpNet,
    ) -> Self {
        Self {
            node_name: node_name.into(),
            address,
            state_dir,
            max_pods: 110,
            default_cidr: cidr,
            default_egress: true,
            mtu: 1500,
            cluster_domain: "cluster.local".to_owned(),
            service_cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16),
            scratch_mib: 10 * 1024,
            overhead_mib: OVERHEAD_MIB,
            default_memory_mib: DEFAULT_MEMORY_MIB,
            seccomp_profiles: None,
            cgroup_root: "hypernetes".to_owned(),
        }
    }

    /// Directory of a pod's logs.
    pub(crate) fn log_directory(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.state_dir
            .join("logs")
            .join(format!("{namespace}_{name}_{uid}"))
    }
}

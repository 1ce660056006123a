//! Tenant networks on this node.
//!
//! A network is a network namespace in which every pod has a point-to-point tap (no bridge, no
//! shared L2). What the kernel shall hold is planned as data ([`plan`]) and then applied.
//! Pods of a cluster may be on the cluster's network instead, by its CNI plugins ([`cni`]).
#![forbid(unsafe_code)]

pub mod cni;
pub mod plan;

mod builtin;
#[cfg(feature = "fake")]
pub mod conformance;
mod conntrack;
mod dns;
#[cfg(feature = "fake")]
mod fake;
mod firewall;
mod ipam;
mod links;
mod netns;
mod record;
mod routed;
mod service;
mod shaping;
mod sysctl;
mod tap;
mod tc;

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::PathBuf,
};

use async_trait::async_trait;
use hypernetes_types::{Bandwidth, NetworkId, SandboxId};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use builtin::{ApiConnection, ApiPlace, BuiltinConfig, BuiltinDriver};
#[cfg(feature = "fake")]
pub use fake::FakeDriver;
pub use routed::RoutedDriver;
pub use service::{Backends, NameData, NetworkServices, ServiceName, ServicePort};

/// A tenant network as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Name on this node.
    pub id: NetworkId,
    /// Addresses of the pods; two networks may have the same.
    pub cidr: IpNet,
    /// Address of the network's router, inside `cidr`; also its DNS server.
    pub gateway: IpAddr,
    /// Pods may open connections to the outside, translated to the node's address.
    pub egress: bool,
    /// The node itself may open connections to pods; they cannot to it.
    #[serde(default)]
    pub node_access: bool,
    /// MTU of pods.
    pub mtu: u32,
    /// Search domain suffix for pod names, usually `cluster.local`.
    pub domain: String,
}

/// A pod's place on its network.
#[derive(Debug)]
pub struct Attachment {
    /// The tap's queue for the VMM (TAP | NO_PI | VNET_HDR).
    pub tap: OwnedFd,
    /// What the guest is to be told, and what a restarted daemon finds again.
    pub lease: Lease,
}

/// A tap that is nobody's yet: see [`NetworkDriver::park`].
#[derive(Debug)]
pub struct Parked {
    /// Its queue, as in [`Attachment::tap`].
    pub tap: OwnedFd,
    /// Where it is.
    pub place: ParkedPlace,
}

/// Where a parked tap is, for [`NetworkDriver::attach_parked`].
#[derive(Debug)]
pub struct ParkedPlace(pub(crate) OwnedFd);

/// The address of one pod. Durable: stored by the driver before it is handed out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Sandbox that holds the address.
    pub sandbox: SandboxId,
    /// Its network.
    pub network: NetworkId,
    /// The pod's address.
    pub address: IpAddr,
    /// Next hop of the pod's default route, reachable on link.
    pub gateway: IpAddr,
    /// Unicast, locally administered.
    pub mac: String,
    /// Name of the tap in the network's namespace.
    pub device: String,
    /// MTU for the guest.
    pub mtu: u32,
    /// DNS servers for the pod.
    pub dns: Vec<IpAddr>,
    /// DNS search list for the pod, without its namespace's part.
    pub search: Vec<String>,
    /// All addresses with the prefixes that are on link, `address` among them. Empty: `address`
    /// alone, with nothing on link but the gateway.
    #[serde(default)]
    pub prefixes: Vec<IpNet>,
    /// Routes besides those of `prefixes`. Empty like `prefixes`: the default route, by `gateway`.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Ports of the node that lead to the pod by the driver's own doing.
    #[serde(default)]
    pub host_ports: Vec<HeldPort>,
    /// What the driver itself lets through.
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

impl Lease {
    /// The addresses besides [`Lease::address`].
    pub fn more_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let all = self.prefixes.iter().map(IpNet::addr);
        all.filter(|address| *address != self.address)
    }
}

/// A route of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub destination: IpNet,
    /// Next hop; `None` = on link.
    pub gateway: Option<IpAddr>,
}

/// What a pod asks of its network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetworkRequest {
    /// One address of the network; taken or outside of it is an error.
    pub address: Option<IpAddr>,
    /// What the cluster calls the pod, for plugins.
    pub pod: PodName,
    /// Ports of the node that lead to the pod.
    pub host_ports: Vec<HostPort>,
    /// Most that the pod receives and sends.
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

/// A pod as its cluster names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Pod uid.
    pub uid: String,
}

/// A port of the node that leads to a port of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// Transport.
    pub protocol: Protocol,
    /// On the node.
    pub host_port: u16,
    /// In the pod.
    pub container_port: u16,
    /// The one address of the node that it is on; `None` = all.
    pub host_ip: Option<IpAddr>,
}

/// A port of the node that a pod holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPort {
    /// As asked for.
    #[serde(flatten)]
    pub port: HostPort,
    /// Port of the network's own address on its link to the node, which lies on the way.
    pub relay: u16,
}

/// Transport of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// The place of a pod whose processes are the node's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespacePlace {
    /// A network namespace with the pod's interface in it, and `lo` up.
    pub namespace: PathBuf,
    /// Its address.
    pub lease: Lease,
}

/// A name that pods of one network can resolve.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NameRecord {
    /// Fully qualified, lower case, without the final dot.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
}

/// Makes and removes tenant networks and the pods' places on them.
///
/// All calls are idempotent and may be repeated after a crash at any point; a failed call leaves
/// nothing that a later `detach`, `delete_network` or [`NetworkDriver::recover`] does not remove.
#[async_trait]
pub trait NetworkDriver: Send + Sync + std::fmt::Debug {
    /// Makes the network exist as specified.
    async fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetworkError>;
    /// Removes the network and all in it. [`NetworkError::InUse`] while pods are attached.
    async fn delete_network(&self, id: &NetworkId) -> Result<(), NetworkError>;
    /// Networks that exist, by specification.
    async fn list_networks(&self) -> Result<Vec<NetworkSpec>, NetworkError>;
    /// Gives the sandbox an address and a tap. Repeated for the same sandbox: the same lease and a
    /// fresh descriptor.
    async fn attach(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError>;
    /// Like [`NetworkDriver::attach`], for a pod that is no VM. Drivers whose networks have no such
    /// place refuse it.
    async fn join(
        &self,
        _sandbox: &SandboxId,
        network: &NetworkId,
        _request: &PodNetworkRequest,
    ) -> Result<NamespacePlace, NetworkError> {
        Err(NetworkError::OnlyVms(network.clone()))
    }
    /// Whether pods can join the network now; the reason if not.
    async fn ready(&self, network: &NetworkId) -> Result<(), NetworkError>;
    /// The lease of a sandbox, if it has one.
    async fn lease(&self, sandbox: &SandboxId) -> Result<Option<Lease>, NetworkError>;
    /// Releases tap and address.
    async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError>;
    /// A tap like those of [`NetworkDriver::attach`], but alone in a namespace that ends with it: for
    /// a VM that is nobody's yet. It carries nothing.
    async fn park(&self) -> Result<Parked, NetworkError>;
    /// Like [`NetworkDriver::attach`], for a sandbox whose VM has a parked tap, which becomes the
    /// sandbox's own.
    async fn attach_parked(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
        place: ParkedPlace,
    ) -> Result<Lease, NetworkError>;
    /// Replaces the names that pods of the network can resolve. Networks that are not this node's
    /// own refuse it.
    async fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError>;
    /// Replaces the services that pods of the network reach, and their names. Connections that are
    /// open go on. Networks that are not this node's own refuse it.
    async fn set_services(
        &self,
        id: &NetworkId,
        services: NetworkServices,
    ) -> Result<(), NetworkError>;
    /// Opens a connection to a pod from the gateway of its network, inside the network's own place:
    /// what listens on the node cannot be reached. Networks that are not this node's own refuse it.
    async fn dial(
        &self,
        network: &NetworkId,
        _address: SocketAddr,
    ) -> Result<tokio::net::TcpStream, NetworkError> {
        Err(NetworkError::NoGateway(network.clone()))
    }
    /// After a restart: repairs namespaces, rules and DNS of known networks, removes leases of
    /// sandboxes that are not in `alive`, and everything on the host that carries this driver's
    /// names but belongs to no known network.
    async fn recover(&self, alive: &[SandboxId]) -> Result<(), NetworkError>;
}

/// Failure of a network operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// No such network here.
    #[error("network {0} does not exist on this node")]
    NoNetwork(NetworkId),
    /// Pods are attached.
    #[error("network {network} still has {pods} pods")]
    InUse {
        /// Network.
        network: NetworkId,
        /// Count.
        pods: usize,
    },
    /// The address cannot be given.
    #[error("address {address} of network {network} cannot be used: {reason}")]
    Address {
        /// Asked for.
        address: IpAddr,
        /// Network.
        network: NetworkId,
        /// Why.
        reason: &'static str,
    },
    /// A port of the node cannot be had.
    #[error("host port {port}/{protocol} cannot be had: {reason}")]
    HostPort {
        /// Port of the node.
        port: u16,
        /// Transport.
        protocol: Protocol,
        /// Why.
        reason: String,
    },
    /// The network has places for VMs only.
    #[error("pods of the host handler cannot join network {0}: it has places for VMs only")]
    OnlyVms(NetworkId),
    /// Nothing of the node's is on the network.
    #[error("network {0} has no gateway on this node to connect from")]
    NoGateway(NetworkId),
    /// The plugins' configuration does not allow a pod.
    #[error("CNI: {0}")]
    NotReady(String),
    /// A plugin refused.
    #[error("CNI plugin {plugin} failed at {command}: {message}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// `ADD`, `DEL`, …
        command: &'static str,
        /// What it says, or how it ended.
        message: String,
    },
    /// No address is left.
    #[error("network {0} has no free address")]
    Exhausted(NetworkId),
    /// The specification is impossible.
    #[error("invalid network {network}: {field}: {rule}")]
    Spec {
        /// Network.
        network: NetworkId,
        /// Field.
        field: &'static str,
        /// What would be right.
        rule: String,
    },
    /// The system refused.
    #[error("cannot {action}")]
    System {
        /// What was attempted, on what.
        action: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

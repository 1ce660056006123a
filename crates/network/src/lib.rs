//! Tenant networks on this node.
//!
//! A network is a network namespace in which every pod has a point-to-point tap (no bridge, no
//! shared L2). What the kernel shall hold is planned as data ([`plan`]) and then applied.
#![forbid(unsafe_code)]

pub mod plan;

mod builtin;
#[cfg(feature = "fake")]
pub mod conformance;
mod dns;
#[cfg(feature = "fake")]
mod fake;
mod firewall;
mod ipam;
mod links;
mod netns;
mod record;
mod sysctl;
mod tap;

use std::{net::IpAddr, os::fd::OwnedFd};

use async_trait::async_trait;
use hypernetes_types::{NetworkId, SandboxId};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use builtin::{BuiltinConfig, BuiltinDriver};
#[cfg(feature = "fake")]
pub use fake::FakeDriver;

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
    /// fresh descriptor. `requested` asks for one address; taken or outside the CIDR is an error.
    async fn attach(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        requested: Option<IpAddr>,
    ) -> Result<Attachment, NetworkError>;
    /// The lease of a sandbox, if it has one.
    async fn lease(&self, sandbox: &SandboxId) -> Result<Option<Lease>, NetworkError>;
    /// Releases tap and address.
    async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError>;
    /// A tap like those of [`NetworkDriver::attach`], but alone in a namespace that ends with it: for
    /// a VM that is nobody's yet. It carries nothing.
    async fn park(&self) -> Result<OwnedFd, NetworkError>;
    /// Replaces the names that pods of the network can resolve.
    async fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError>;
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

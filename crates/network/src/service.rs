//! Services of a network, as asked for.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::Protocol;

/// All services of a network, with the names that their clients resolve.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetworkServices {
    /// Addresses that only services have: what none of them has is refused there. It must not
    /// overlap the pods' addresses.
    pub range: Option<IpNet>,
    /// Ports of services.
    pub ports: Vec<ServicePort>,
    /// Names of services and of their endpoints.
    pub names: Vec<ServiceName>,
}

/// A port of a service, and where connections to it go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// The service's address.
    pub address: IpAddr,
    /// Transport.
    pub protocol: Protocol,
    /// The service's port.
    pub port: u16,
    /// Seconds for which a client stays with the endpoint that it was given; `None` = each
    /// connection goes anywhere.
    pub affinity: Option<u32>,
    /// Where connections go.
    pub backends: Backends,
    /// Port of the node, on all its addresses, that leads there too. A pod's own port of the node
    /// comes first; of two networks' services, the one of the first network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_port: Option<u16>,
}

/// Where connections to a service go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Backends {
    /// To one of these, at random. None: they are refused.
    Endpoints(Vec<SocketAddr>),
    /// To whoever takes the connections of [`crate::BuiltinDriver::api_connections`].
    Api,
}

/// A name of a service or of an endpoint, and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceName {
    /// Fully qualified, lower case, without the final dot.
    pub name: String,
    /// What it stands for.
    pub data: NameData,
}

/// What a name stands for. A name may have several records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NameData {
    /// An address.
    Address {
        /// The address.
        address: IpAddr,
        /// The address has this name when it is asked for one.
        reverse: bool,
    },
    /// A port at another name.
    Service {
        /// The port.
        port: u16,
        /// Fully qualified, without the final dot.
        target: String,
    },
    /// Another name, here or anywhere.
    Alias(String),
}

//! What the kernel shall hold for a network, as data.
//!
//! Nothing here touches the system: every function maps a specification to names, sysctls,
//! addresses, routes and nft scripts, which [`crate::builtin`] applies. Scripts are atomic: `nft -f`
//! takes all of one or nothing. A pod is one set element and one ingress hook; adding it reloads
//! nothing.
//!
//! ```text
//!  pod ══ tapXXXX ─┐ network's namespace            host
//!  pod ══ tapXXXX ─┤ lo: gateway/32, DNS
//!                  ├── uplink ──── transit /31 ──── hnIIIIHHHHHHHH ── forward, masquerade ── out
//! ```

mod bucket;
mod ruleset;
mod services;

use std::net::{IpAddr, Ipv4Addr};

use hypernetes_types::{Bandwidth, NetworkId, SandboxId};
use ipnet::{IpNet, Ipv4Net};
use sha2::{Digest, Sha256};

pub use bucket::Bucket;
pub use ruleset::{
    Forward, HOST_LINK_PREFIX, forward_removal_rules, forward_rules, host_ruleset, host_table,
    network_ruleset, pod_removal_rules, pod_rules,
};
pub use services::{
    API_PORT, HOST_PORT_MARK, SERVICES_TABLE, ServiceKey, ServiceRoute, ServiceTable,
    ServicesChange, hairpin_element, host_port_removal_rules, host_port_rules, service_table,
    services_base, services_change, services_takeover,
};

use crate::{Lease, NetworkError, NetworkSpec};

/// Name of the network's way out, inside its namespace.
pub const UPLINK: &str = "uplink";
/// How the names of taps begin.
pub const TAP_PREFIX: &str = "tap";
/// How the names of links begin in which what pods send waits.
const OUTLET_PREFIX: &str = "ifb";

/// Destinations that no tenant may use or route to: this-host, loopback, link-local (cloud metadata), multicast,
/// reserved.
pub const REFUSED_V4: [Ipv4Net; 5] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// A value below `/proc/sys/net`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below `/proc/sys/net`.
    pub path: String,
    /// What to write.
    pub value: &'static str,
    /// A kernel that lacks it is as good.
    pub optional: bool,
}

impl Sysctl {
    fn new(path: impl Into<String>, value: &'static str) -> Self {
        Self {
            path: path.into(),
            value,
            optional: false,
        }
    }

    fn v6(path: impl Into<String>, value: &'static str) -> Self {
        Self {
            path: path.into(),
            value,
            optional: true,
        }
    }
}

/// A network's names on the host, derived from the instance and the network's id alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Eight hexadecimal digits for the network.
    pub hash: String,
    /// Network namespace below `/run/netns`.
    pub namespace: String,
    /// Host end of the veth pair.
    pub host_link: String,
}

impl Names {
    /// The names of `network` for daemon `instance`.
    pub fn new(instance: &str, network: &NetworkId) -> Self {
        let hash = hex(&Sha256::digest(network.as_str())[..4]);
        Self {
            namespace: format!("{}{hash}", namespace_prefix(instance)),
            host_link: format!("{}{hash}", host_link_prefix(instance)),
            hash,
        }
    }
}

/// How the names of all network namespaces of `instance` begin.
pub fn namespace_prefix(instance: &str) -> String {
    format!("hn-{instance}-")
}

/// How the names of all host links of `instance` begin.
pub fn host_link_prefix(instance: &str) -> String {
    format!("{HOST_LINK_PREFIX}{instance}")
}

/// Lower-case hexadecimal digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A network whose specification was found possible; IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPlan {
    /// Pods' addresses.
    pub cidr: Ipv4Net,
    /// Router and DNS server of the pods.
    pub gateway: Ipv4Addr,
    /// MTU of the veth pair and the taps.
    pub mtu: u32,
    /// Pods may open connections to the outside.
    pub egress: bool,
    /// The node itself may open connections to pods.
    pub node_access: bool,
    /// The whole pool of transit links.
    pub pool: Ipv4Net,
    /// This network's transit link: a /31, the host has its first address.
    pub transit: Ipv4Net,
}

impl NetworkPlan {
    /// Checks `spec` and joins it with its transit link.
    pub fn new(spec: &NetworkSpec, pool: Ipv4Net, transit: Ipv4Net) -> Result<Self, NetworkError> {
        let invalid = |field, rule: &str| NetworkError::Spec {
            network: spec.id.clone(),
            field,
            rule: rule.to_owned(),
        };
        let IpNet::V4(cidr) = spec.cidr else {
            return Err(invalid("cidr", "must be IPv4"));
        };
        let IpAddr::V4(gateway) = spec.gateway else {
            return Err(invalid("gateway", "must be IPv4"));
        };
        if cidr != cidr.trunc() {
            return Err(invalid("cidr", "must not have bits set beyond its prefix"));
        }
        if !(8..=30).contains(&cidr.prefix_len()) {
            return Err(invalid("cidr", "must have a prefix length of 8 to 30"));
        }
        let overlaps = |other: &Ipv4Net| cidr.contains(other) || other.contains(&cidr);
        if REFUSED_V4.iter().any(overlaps) {
            return Err(invalid(
                "cidr",
                "must be unicast addresses, not loopback or link-local",
            ));
        }
        if overlaps(&pool) {
            return Err(invalid(
                "cidr",
                &format!("must not overlap {pool}, which joins networks to the node"),
            ));
        }
        if !cidr.contains(&gateway) || gateway == cidr.network() || gateway == cidr.broadcast() {
            return Err(invalid("gateway", "must be a host address inside cidr"));
        }
        if !(1280..=9000).contains(&spec.mtu) {
            return Err(invalid("mtu", "must be 1280 to 9000"));
        }
        let label = |part: &str| {
            (1..=63).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if spec.domain.len() > 200 || !spec.domain.split('.').all(label) {
            return Err(invalid(
                "domain",
                "must be a DNS domain in lower case without a final dot",
            ));
        }
        Ok(Self {
            cidr,
            gateway,
            mtu: spec.mtu,
            egress: spec.egress,
            node_access: spec.node_access,
            pool,
            transit,
        })
    }

    /// The host's address on the transit link: the namespace's default route.
    pub fn transit_host(&self) -> Ipv4Addr {
        self.transit.network()
    }

    /// The namespace's address on the transit link.
    pub fn transit_inside(&self) -> Ipv4Addr {
        self.transit.broadcast()
    }

    /// Sysctls of the namespace, set before any of its links is up.
    pub fn sysctls(&self) -> Vec<Sysctl> {
        let mut all = vec![Sysctl::new("ipv4/ip_forward", "1")];
        for scope in ["all", "default"] {
            all.extend([
                Sysctl::new(format!("ipv4/conf/{scope}/rp_filter"), "1"),
                // Answer ARP only for the gateway, which each tap has: not for the transit address.
                Sysctl::new(format!("ipv4/conf/{scope}/arp_ignore"), "1"),
                Sysctl::new(format!("ipv4/conf/{scope}/accept_redirects"), "0"),
                Sysctl::new(format!("ipv4/conf/{scope}/send_redirects"), "0"),
                Sysctl::new(format!("ipv4/conf/{scope}/accept_source_route"), "0"),
                Sysctl::v6(format!("ipv6/conf/{scope}/disable_ipv6"), "1"),
                Sysctl::v6(format!("ipv6/conf/{scope}/accept_ra"), "0"),
            ]);
        }
        all
    }

    /// Sysctls of the host end of the veth pair.
    pub fn host_sysctls(&self, link: &str) -> Vec<Sysctl> {
        vec![
            Sysctl::new(format!("ipv4/conf/{link}/rp_filter"), "1"),
            Sysctl::new(format!("ipv4/conf/{link}/arp_ignore"), "1"),
            Sysctl::new(format!("ipv4/conf/{link}/accept_redirects"), "0"),
            Sysctl::new(format!("ipv4/conf/{link}/send_redirects"), "0"),
            Sysctl::new(format!("ipv4/conf/{link}/accept_source_route"), "0"),
            Sysctl::v6(format!("ipv6/conf/{link}/disable_ipv6"), "1"),
        ]
    }
}

/// What a pod's tap needs besides its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPlan {
    /// Name of the tap.
    pub device: String,
    /// MTU of the tap.
    pub mtu: u32,
    /// On the tap as /32.
    pub gateway: Ipv4Addr,
    /// Routed to the tap as /32, with a permanent neighbour.
    pub address: Ipv4Addr,
    /// The only source and destination on the link.
    pub mac: [u8; 6],
    /// Most that goes by the tap.
    pub bandwidth: Bandwidth,
}

impl PodPlan {
    /// The plan of a lease of this driver; `None` for what is not IPv4 or has no valid MAC.
    pub fn new(lease: &Lease) -> Option<Self> {
        let (IpAddr::V4(gateway), IpAddr::V4(address)) = (lease.gateway, lease.address) else {
            return None;
        };
        Some(Self {
            device: lease.device.clone(),
            mtu: lease.mtu,
            gateway,
            address,
            mac: parse_mac(&lease.mac)?,
            bandwidth: lease.bandwidth,
        })
    }

    /// Name of the link that what the pod sends waits in, if that is limited.
    pub fn outlet(&self) -> String {
        let tap = self.device.as_str();
        format!(
            "{OUTLET_PREFIX}{}",
            tap.strip_prefix(TAP_PREFIX).unwrap_or(tap)
        )
    }
}

/// The name of a sandbox's tap.
pub fn tap_name(sandbox: &SandboxId) -> String {
    format!("{TAP_PREFIX}{}", sandbox.short())
}

/// The MAC address of a sandbox: unicast, locally administered, always the same.
pub fn mac(sandbox: &SandboxId) -> String {
    let mut bytes: [u8; 6] = [0; 6];
    bytes.copy_from_slice(&Sha256::digest(sandbox.as_str())[..6]);
    bytes[0] = (bytes[0] & 0xfc) | 0x02;
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        *byte = u8::from_str_radix(parts.next().filter(|part| part.len() == 2)?, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

#[cfg(test)]
mod tests;

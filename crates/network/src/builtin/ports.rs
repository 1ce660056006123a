//! Ports of the node that lead to pods.
//!
//! ```text
//!  node:8080 ── host's table ──▶ transit address:relay ── network's table ──▶ pod:80
//! ```
//! Two steps, because only the network's namespace knows which pod an address means. The relay port
//! is the node's port, or the next one that the network has free where two pods have one port at two
//! addresses of the node; never one that a service can have, which is its own relay.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
};

use hypernetes_types::NetworkId;

use super::{Inner, Network, Tables, lock};
use crate::{
    HeldPort, HostPort, Lease, NetworkError, Protocol, conntrack, firewall,
    netns::Namespace,
    plan::{
        Forward, HOST_PORT_MARK, ServiceTable, forward_removal_rules, forward_rules,
        host_port_removal_rules, host_port_rules, host_table,
    },
    sysctl,
};

/// A port of the node.
pub(super) type NodePort = (Protocol, u16);

impl Tables {
    /// The ports as a lease of `network` can hold them.
    pub(super) fn hold(
        &self,
        network: &NetworkId,
        wanted: &[HostPort],
        node_ports: &RangeInclusive<u16>,
    ) -> Result<Vec<HeldPort>, NetworkError> {
        let mut relays: BTreeSet<(Protocol, u16)> = self
            .of(network)
            .flat_map(|lease| &lease.host_ports)
            .map(|held| (held.port.protocol, held.relay))
            .collect();
        let mut held: Vec<HeldPort> = Vec::new();
        for port in wanted {
            let refuse = |reason: String| NetworkError::HostPort {
                port: port.host_port,
                protocol: port.protocol,
                reason,
            };
            if matches!(port.host_ip, Some(IpAddr::V6(_))) {
                return Err(refuse("the network is IPv4".to_owned()));
            }
            let clashes = |other: &HeldPort| overlaps(&other.port, port);
            if held.iter().any(clashes) {
                return Err(refuse("the pod asks for it twice".to_owned()));
            }
            let holder = self
                .leases
                .values()
                .find(|lease| lease.host_ports.iter().any(clashes));
            if let Some(lease) = holder {
                return Err(refuse(format!("sandbox {} has it", lease.sandbox.short())));
            }
            let relay = (port.host_port..=u16::MAX)
                .chain(1..port.host_port)
                .filter(|relay| !node_ports.contains(relay))
                .find(|relay| !relays.contains(&(port.protocol, *relay)))
                .ok_or_else(|| refuse("the network has no port left".to_owned()))?;
            relays.insert((port.protocol, relay));
            held.push(HeldPort {
                port: port.clone(),
                relay,
            });
        }
        Ok(held)
    }

    /// What the host's table forwards to networks that are known.
    pub(super) fn forwards(&self) -> Vec<Forward> {
        self.leases
            .values()
            .filter_map(|lease| Some((lease, self.networks.get(&lease.network)?)))
            .flat_map(|(lease, network)| forwards(network, lease))
            .chain(self.service_forwards().into_values())
            .collect()
    }

    /// What the host's table forwards to services, by its key.
    fn service_forwards(&self) -> BTreeMap<NodePort, Forward> {
        let mut found = BTreeMap::new();
        for (id, ports) in &self.node_ports {
            let Some(network) = self.networks.get(id) else {
                continue;
            };
            for (protocol, port) in ports {
                found.entry((*protocol, *port)).or_insert(Forward {
                    at: None,
                    protocol: *protocol,
                    port: *port,
                    to: network.transit.broadcast(),
                    relay: *port,
                    service: true,
                });
            }
        }
        found
    }
}

/// The ports of the node that lead to services of `table`.
pub(super) fn node_ports(table: &ServiceTable) -> BTreeSet<NodePort> {
    table
        .iter()
        .filter_map(|(key, route)| Some((key.protocol, route.node_port?)))
        .collect()
}

/// Whether both cannot be had at once.
fn overlaps(one: &HostPort, other: &HostPort) -> bool {
    one.protocol == other.protocol
        && one.host_port == other.host_port
        && (one.host_ip.is_none() || other.host_ip.is_none() || one.host_ip == other.host_ip)
}

fn forwards(network: &Network, lease: &Lease) -> Vec<Forward> {
    let to = network.transit.broadcast();
    lease
        .host_ports
        .iter()
        .map(|held| Forward {
            at: match held.port.host_ip {
                Some(IpAddr::V4(address)) => Some(address),
                _ => None,
            },
            protocol: held.port.protocol,
            port: held.port.host_port,
            to,
            relay: held.relay,
            service: false,
        })
        .collect()
}

fn pod_address(lease: &Lease) -> io::Result<Ipv4Addr> {
    match lease.address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

impl Inner {
    /// Lets the lease's ports of the node lead to its pod.
    pub(super) fn open_ports(
        &self,
        network: &Network,
        namespace: &Namespace,
        lease: &Lease,
    ) -> io::Result<()> {
        if lease.host_ports.is_empty() {
            return Ok(());
        }
        let address = pod_address(lease)?;
        let inside: String = lease
            .host_ports
            .iter()
            .map(|held| host_port_rules(address, held))
            .collect();
        firewall::apply(namespace, &inside)?;
        self.allow_loopback(network)?;
        let table = host_table(&self.config.instance);
        let outside: String = forwards(network, lease)
            .iter()
            .map(|forward| forward_rules(&table, forward))
            .collect();
        firewall::apply(&self.host, &outside)
    }

    /// The node's own clients may say 127.0.0.1. What comes from the network to such an address is
    /// still dropped there, and by the host's table.
    pub(super) fn allow_loopback(&self, network: &Network) -> io::Result<()> {
        let path = format!("ipv4/conf/{}/route_localnet", network.names.host_link);
        sysctl::set(&self.host, &path, "1")
    }

    /// Undoes [`Self::open_ports`], whatever of it was done.
    pub(super) fn close_ports(&self, network: &Network, lease: &Lease) -> io::Result<()> {
        if lease.host_ports.is_empty() {
            return Ok(());
        }
        let table = host_table(&self.config.instance);
        if firewall::has_table(&self.host, "inet", &table)? {
            let outside: String = forwards(network, lease)
                .iter()
                .map(|forward| forward_removal_rules(&table, forward))
                .collect();
            firewall::apply(&self.host, &outside)?;
        }
        let Some(namespace) = Namespace::open(&network.names.namespace)? else {
            return Ok(());
        };
        if firewall::has_table(&namespace, "ip", crate::plan::SERVICES_TABLE)? {
            let address = pod_address(lease)?;
            let inside: String = lease
                .host_ports
                .iter()
                .map(|held| host_port_removal_rules(address, held))
                .collect();
            firewall::apply(&namespace, &inside)?;
        }
        // A client that goes on sending reaches who has the port next.
        conntrack::forget(&namespace, &[HOST_PORT_MARK])
    }

    /// Lets `ports` of the node, and no others, lead to services of the network, once its own rules
    /// know them.
    pub(super) fn forward_services(
        &self,
        network: &Network,
        id: &NetworkId,
        ports: BTreeSet<NodePort>,
    ) -> io::Result<()> {
        if !ports.is_empty() {
            self.allow_loopback(network)?;
        }
        // Of one change after the other the kernel hears in that order.
        let _host = lock(&self.host_gate);
        let (old, new) = {
            let mut tables = lock(&self.tables);
            let old = tables.service_forwards();
            match ports.is_empty() {
                true => tables.node_ports.remove(id),
                false => tables.node_ports.insert(id.clone(), ports),
            };
            (old, tables.service_forwards())
        };
        if old == new {
            return Ok(());
        }
        let table = host_table(&self.config.instance);
        if !firewall::has_table(&self.host, "inet", &table)? {
            // It will be made with what is known then.
            return Ok(());
        }
        let gone = (old.iter()).filter(|(key, forward)| new.get(key) != Some(forward));
        let come = (new.iter()).filter(|(key, forward)| old.get(key) != Some(forward));
        let script: String = gone
            .map(|(_key, forward)| forward_removal_rules(&table, forward))
            .chain(come.map(|(_key, forward)| forward_rules(&table, forward)))
            .collect();
        firewall::apply(&self.host, &script)
    }

    /// All forwards of networks that are known, for a table made anew.
    pub(super) fn known_forwards(&self) -> Vec<Forward> {
        lock(&self.tables).forwards()
    }
}

#[cfg(test)]
mod tests {
    use hypernetes_types::SandboxId;

    use super::*;

    const SERVICES: RangeInclusive<u16> = 30_000..=32_767;

    fn port(host_port: u16, host_ip: Option<&str>) -> HostPort {
        HostPort {
            protocol: Protocol::Tcp,
            host_port,
            container_port: 80,
            host_ip: host_ip.map(|text| text.parse().unwrap()),
        }
    }

    fn lease(host_ports: Vec<HeldPort>) -> Lease {
        Lease {
            sandbox: SandboxId::random(),
            network: "red.default".parse().unwrap(),
            address: "10.0.0.2".parse().unwrap(),
            gateway: "10.0.0.1".parse().unwrap(),
            mac: String::new(),
            device: String::new(),
            mtu: 1500,
            dns: Vec::new(),
            search: Vec::new(),
            prefixes: Vec::new(),
            routes: Vec::new(),
            host_ports,
            bandwidth: hypernetes_types::Bandwidth::default(),
        }
    }

    #[test]
    fn a_port_is_one_pods() {
        let mut tables = Tables::default();
        let (red, blue): (NetworkId, NetworkId) = (
            "red.default".parse().unwrap(),
            "blue.default".parse().unwrap(),
        );
        let first = lease(
            tables
                .hold(&red, &[port(80, Some("10.9.0.1"))], &SERVICES)
                .unwrap(),
        );
        tables.leases.insert(first.sandbox.clone(), first);
        for (network, asked, taken) in [
            (&red, port(80, None), true),
            (&blue, port(80, None), true),
            (&blue, port(80, Some("10.9.0.1")), true),
            (&blue, port(80, Some("10.9.0.2")), false),
            (&red, port(81, None), false),
            (&red, port(81, Some("fd00::1")), true),
            (
                &red,
                HostPort {
                    protocol: Protocol::Udp,
                    ..port(80, None)
                },
                false,
            ),
        ] {
            let result = tables.hold(network, std::slice::from_ref(&asked), &SERVICES);
            assert_eq!(result.is_err(), taken, "{asked:?}");
        }
        assert!(
            tables
                .hold(&red, &[port(90, None), port(90, None)], &SERVICES)
                .is_err()
        );
        // The relay differs where the node's port does not.
        let second = tables
            .hold(&red, &[port(80, Some("10.9.0.2"))], &SERVICES)
            .unwrap();
        assert_eq!(second[0].relay, 81);
        let third = tables.hold(&red, &[port(30_080, None)], &SERVICES).unwrap();
        assert_eq!(third[0].relay, 32_768);
        let message = tables
            .hold(&blue, &[port(80, None)], &SERVICES)
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with("host port 80/tcp cannot be had: sandbox"),
            "{message}"
        );
    }
}

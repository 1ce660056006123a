//! The services of a network: which address and port leads to which pods.
//!
//! ```text
//!  arrivals ── vmap @services ──▶ svc-… ── affinity, or at random ──▶ ep-… ── dnat
//! ```
//! A service port is one element of a verdict map and one chain; an endpoint is a chain, and a set
//! of clients where there is affinity. What changes is told by [`services_change`]; other services'
//! rules, and connections that are open, are not touched. A daemon that does not know what the
//! kernel has takes it over by [`services_takeover`]: one transaction, nothing is ever missing.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

use super::{NetworkPlan, TAP_PREFIX, UPLINK, hex};
use crate::{Backends, HeldPort, Protocol, ServicePort};

/// Port of the gateway on which the namespace's way to the API server listens.
pub const API_PORT: u16 = 6443;
/// Table of the services of a network, in its namespace.
pub const SERVICES_TABLE: &str = "services";
/// Mark of UDP flows to ports of the node.
pub const HOST_PORT_MARK: u32 = 1;
/// Clients of one endpoint that are remembered.
const MAX_CLIENTS: u32 = 65_535;

/// Service ports by their key.
pub type ServiceTable = BTreeMap<ServiceKey, ServiceRoute>;

/// What a client connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The service's address.
    pub address: Ipv4Addr,
    /// Transport.
    pub protocol: Protocol,
    /// The service's port.
    pub port: u16,
}

/// Where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRoute {
    /// Seconds for which a client stays with its endpoint.
    pub affinity: Option<u32>,
    /// Addresses and ports of pods, sorted.
    pub endpoints: BTreeSet<(Ipv4Addr, u16)>,
    /// Port of the node that leads there too.
    pub node_port: Option<u16>,
}

impl ServiceKey {
    fn digest(&self, extra: &str) -> [u8; 8] {
        let text = format!("{}/{}/{}{extra}", self.address, self.protocol, self.port);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&Sha256::digest(text)[..8]);
        bytes
    }

    fn chain(&self) -> String {
        format!("svc-{}", hex(&self.digest("")))
    }

    fn endpoint(&self, (address, port): (Ipv4Addr, u16)) -> String {
        hex(&self.digest(&format!("/{address}/{port}")))
    }

    fn element(&self) -> String {
        format!("{} . {} . {}", self.address, self.protocol, self.port)
    }

    /// Mark of the flows to an endpoint, so that they can be ended with it.
    fn mark(&self, (address, port): (Ipv4Addr, u16)) -> u32 {
        let bytes = self.digest(&format!("/{address}/{port}"));
        u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) | 0x8000_0000
    }
}

/// The routes of `ports`. A port without endpoints has none: it is refused like any other of the
/// range. Of two ports with one key the first counts; what is not IPv4 is left out.
pub fn service_table(plan: &NetworkPlan, ports: &[ServicePort]) -> ServiceTable {
    let mut table = ServiceTable::new();
    let mut node_ports = BTreeSet::new();
    for port in ports {
        let IpAddr::V4(address) = port.address else {
            continue;
        };
        let endpoints: BTreeSet<_> = match &port.backends {
            Backends::Api => BTreeSet::from([(plan.gateway, API_PORT)]),
            Backends::Endpoints(list) => list
                .iter()
                .filter_map(|endpoint| match endpoint.ip() {
                    IpAddr::V4(address) => Some((address, endpoint.port())),
                    IpAddr::V6(_) => None,
                })
                .collect(),
        };
        if endpoints.is_empty() {
            continue;
        }
        let key = ServiceKey {
            address,
            protocol: port.protocol,
            port: port.port,
        };
        if let Entry::Vacant(place) = table.entry(key) {
            place.insert(ServiceRoute {
                affinity: port.affinity,
                endpoints,
                node_port: port
                    .node_port
                    .filter(|number| node_ports.insert((port.protocol, *number))),
            });
        }
    }
    table
}

/// What every network's namespace has for services and for ports of the node, keeping what is
/// there.
pub fn services_base(
    plan: &NetworkPlan,
    range: Option<Ipv4Net>,
    held: &[(Ipv4Addr, HeldPort)],
) -> String {
    let inside = plan.transit_inside();
    let mut script = format!(
        "\
add table ip services
add map ip services services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
add map ip services host_ports {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
add map ip services node_ports {{ type inet_proto . inet_service : verdict; }}
add set ip services hairpins {{ type ipv4_addr . ipv4_addr; }}
add chain ip services arrivals {{ type nat hook prerouting priority dstnat; policy accept; }}
add chain ip services hairpin {{ type nat hook postrouting priority srcnat; policy accept; }}
add chain ip services strays {{ type filter hook forward priority filter - 1; policy accept; }}
flush chain ip services arrivals
flush chain ip services hairpin
flush chain ip services strays
flush map ip services host_ports
add rule ip services arrivals iifname \"{UPLINK}\" ip daddr {inside} meta l4proto udp ct mark set {HOST_PORT_MARK}
add rule ip services arrivals iifname \"{UPLINK}\" ip daddr {inside} dnat ip to meta l4proto . th dport map @host_ports
add rule ip services arrivals iifname \"{UPLINK}\" ip daddr {inside} meta l4proto . th dport vmap @node_ports
add rule ip services arrivals iifname \"{TAP_PREFIX}*\" ip daddr . meta l4proto . th dport vmap @services
add rule ip services hairpin ct status dnat ip saddr . ip daddr @hairpins masquerade
"
    );
    if let Some(range) = range {
        // What no service has: told at once, and never sent to the node.
        let _infallible = write!(
            script,
            "\
add rule ip services strays ip daddr {range} meta l4proto tcp reject with tcp reset
add rule ip services strays ip daddr {range} reject with icmp port-unreachable
"
        );
    }
    for (address, port) in held {
        script.push_str(&host_port_rules(*address, port));
    }
    script
}

/// Lets a port of the node lead to a pod, in its network's namespace.
pub fn host_port_rules(address: Ipv4Addr, held: &HeldPort) -> String {
    format!(
        "add element ip services host_ports {{ {} }}\n",
        host_port_element(address, held)
    )
}

/// Undoes [`host_port_rules`], whether or not it is there.
pub fn host_port_removal_rules(address: Ipv4Addr, held: &HeldPort) -> String {
    let element = host_port_element(address, held);
    format!(
        "\
add element ip services host_ports {{ {element} }}
delete element ip services host_ports {{ {} . {} }}
",
        held.port.protocol, held.relay
    )
}

fn host_port_element(address: Ipv4Addr, held: &HeldPort) -> String {
    format!(
        "{} . {} : {address} . {}",
        held.port.protocol, held.relay, held.port.container_port
    )
}

/// The element by which a pod can reach itself by a service's address.
pub fn hairpin_element(address: Ipv4Addr) -> String {
    format!("{address} . {address}")
}

/// A change of the rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServicesChange {
    /// The nft script; empty if nothing is to be done.
    pub script: String,
    /// Marks of UDP flows whose endpoint is gone: to be forgotten, or they would go on to it.
    pub ended: Vec<u32>,
}

/// From `old`, which the kernel has, to `new`.
pub fn services_change(old: &ServiceTable, new: &ServiceTable) -> ServicesChange {
    let mut change = ServicesChange::default();
    // First all that goes, then all that comes: names may be needed again.
    let mut added = String::new();
    for (key, was) in old {
        let is = new.get(key);
        if is == Some(was) {
            continue;
        }
        if is.is_none() {
            let _infallible = writeln!(
                change.script,
                "delete element ip services services {{ {} }}",
                key.element()
            );
        }
        if let Some(port) = was.node_port
            && is.and_then(|is| is.node_port) != Some(port)
        {
            let _infallible = writeln!(
                change.script,
                "delete element ip services node_ports {{ {} . {port} }}",
                key.protocol
            );
        }
        let chain = key.chain();
        let _infallible = writeln!(change.script, "flush chain ip services {chain}");
        if is.is_none() {
            let _infallible = writeln!(change.script, "delete chain ip services {chain}");
        }
        let kept = is.filter(|is| is.affinity == was.affinity);
        for endpoint in &was.endpoints {
            if kept.is_some_and(|is| is.endpoints.contains(endpoint)) {
                continue;
            }
            remove_endpoint(&mut change.script, key, *endpoint, was.affinity.is_some());
            let goes = is.is_none_or(|is| !is.endpoints.contains(endpoint));
            if goes && key.protocol == Protocol::Udp {
                change.ended.push(key.mark(*endpoint));
            }
        }
    }
    for (key, is) in new {
        let was = old.get(key);
        if was == Some(is) {
            continue;
        }
        let kept = was.filter(|was| was.affinity == is.affinity);
        for endpoint in &is.endpoints {
            if !kept.is_some_and(|was| was.endpoints.contains(endpoint)) {
                add_endpoint(&mut added, key, *endpoint, is.affinity);
            }
        }
        add_service(&mut added, key, is, was);
    }
    change.script.push_str(&added);
    change
}

/// From whatever the kernel has, of which only the names of chains and sets are known, to `new`.
/// Sets of clients are kept. [`services_base`] must be there.
pub fn services_takeover(chains: &[String], sets: &[String], new: &ServiceTable) -> String {
    let ours = |names: &[String], prefixes: &[&str]| {
        let mut names = names.to_vec();
        names.retain(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        names
    };
    let chains = ours(chains, &["svc-", "ep-"]);
    let sets = ours(sets, &["af-"]);
    let mut script =
        "flush map ip services services\nflush map ip services node_ports\n".to_owned();
    // Services before endpoints, which they refer to.
    for prefix in ["svc-", "ep-"] {
        for chain in chains.iter().filter(|name| name.starts_with(prefix)) {
            let _infallible = writeln!(script, "flush chain ip services {chain}");
            let _infallible = writeln!(script, "delete chain ip services {chain}");
        }
    }
    let wanted: BTreeMap<String, u32> = new
        .iter()
        .filter_map(|(key, route)| Some((key, route, route.affinity?)))
        .flat_map(|(key, route, seconds)| {
            let set = move |endpoint: &(Ipv4Addr, u16)| {
                (format!("af-{}", key.endpoint(*endpoint)), seconds)
            };
            route.endpoints.iter().map(set)
        })
        .collect();
    for set in sets.iter().filter(|set| !wanted.contains_key(*set)) {
        let _infallible = writeln!(script, "delete set ip services {set}");
    }
    for (key, route) in new {
        for endpoint in &route.endpoints {
            add_endpoint(&mut script, key, *endpoint, route.affinity);
        }
        add_service(&mut script, key, route, None);
    }
    script
}

fn add_service(
    script: &mut String,
    key: &ServiceKey,
    route: &ServiceRoute,
    was: Option<&ServiceRoute>,
) {
    let chain = key.chain();
    if was.is_none() {
        let _infallible = writeln!(script, "add chain ip services {chain}");
    }
    if route.affinity.is_some() {
        for endpoint in &route.endpoints {
            let id = key.endpoint(*endpoint);
            let _infallible = writeln!(
                script,
                "add rule ip services {chain} ip saddr @af-{id} goto ep-{id}"
            );
        }
    }
    let choices: Vec<String> = route
        .endpoints
        .iter()
        .enumerate()
        .map(|(index, endpoint)| format!("{index} : goto ep-{}", key.endpoint(*endpoint)))
        .collect();
    let _infallible = writeln!(
        script,
        "add rule ip services {chain} numgen random mod {} vmap {{ {} }}",
        choices.len(),
        choices.join(", ")
    );
    if let Some(port) = route.node_port
        && was.and_then(|was| was.node_port) != Some(port)
    {
        let _infallible = writeln!(
            script,
            "add element ip services node_ports {{ {} . {port} : goto {chain} }}",
            key.protocol
        );
    }
    if was.is_none() {
        let _infallible = writeln!(
            script,
            "add element ip services services {{ {} : goto {chain} }}",
            key.element()
        );
    }
}

fn add_endpoint(
    script: &mut String,
    key: &ServiceKey,
    endpoint: (Ipv4Addr, u16),
    affinity: Option<u32>,
) {
    let id = key.endpoint(endpoint);
    let (address, port) = endpoint;
    let protocol = key.protocol;
    let _infallible = writeln!(script, "add chain ip services ep-{id}");
    if let Some(seconds) = affinity {
        let _infallible = writeln!(
            script,
            "add set ip services af-{id} {{ type ipv4_addr; size {MAX_CLIENTS}; flags dynamic,timeout; timeout {seconds}s; }}"
        );
        let _infallible = writeln!(
            script,
            "add rule ip services ep-{id} update @af-{id} {{ ip saddr }}"
        );
    }
    if protocol == Protocol::Udp {
        let _infallible = writeln!(
            script,
            "add rule ip services ep-{id} ct mark set {}",
            key.mark(endpoint)
        );
    }
    let _infallible = writeln!(
        script,
        "add rule ip services ep-{id} meta l4proto {protocol} dnat to {address}:{port}"
    );
}

fn remove_endpoint(
    script: &mut String,
    key: &ServiceKey,
    endpoint: (Ipv4Addr, u16),
    affinity: bool,
) {
    let id = key.endpoint(endpoint);
    let _infallible = writeln!(script, "flush chain ip services ep-{id}");
    let _infallible = writeln!(script, "delete chain ip services ep-{id}");
    if affinity {
        let _infallible = writeln!(script, "delete set ip services af-{id}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16, protocol: Protocol) -> ServiceKey {
        ServiceKey {
            address: Ipv4Addr::new(10, 96, 0, 5),
            protocol,
            port,
        }
    }

    fn route(affinity: Option<u32>, hosts: &[u8]) -> ServiceRoute {
        ServiceRoute {
            affinity,
            endpoints: hosts
                .iter()
                .map(|host| (Ipv4Addr::new(10, 0, 0, *host), 8080))
                .collect(),
            node_port: None,
        }
    }

    #[test]
    fn a_change_touches_only_the_service_that_changes() {
        let mut old = ServiceTable::new();
        for port in 1..=1000 {
            old.insert(key(port, Protocol::Tcp), route(None, &[2, 3]));
        }
        let mut new = old.clone();
        new.insert(key(7, Protocol::Tcp), route(None, &[3, 4]));
        let change = services_change(&old, &new);
        let (seven, eight) = (key(7, Protocol::Tcp).chain(), key(8, Protocol::Tcp).chain());
        assert!(change.script.contains(&seven), "{}", change.script);
        assert!(!change.script.contains(&eight), "{}", change.script);
        assert!(change.script.lines().count() < 10, "{}", change.script);
        assert!(!change.script.contains("element"), "{}", change.script);
        assert_eq!(services_change(&new, &new), ServicesChange::default());
    }

    #[test]
    fn udp_flows_end_with_their_endpoint_only() {
        let service = key(53, Protocol::Udp);
        let old = ServiceTable::from([(service, route(None, &[2, 3]))]);
        let one = ServiceTable::from([(service, route(None, &[3]))]);
        let gone = service.mark((Ipv4Addr::new(10, 0, 0, 2), 8080));
        assert_eq!(services_change(&old, &one).ended, [gone]);
        assert!(services_change(&one, &old).ended.is_empty());
        assert_eq!(services_change(&old, &ServiceTable::new()).ended.len(), 2);
        // A change of affinity alone ends nothing.
        let sticky = ServiceTable::from([(service, route(Some(60), &[2, 3]))]);
        assert!(services_change(&old, &sticky).ended.is_empty());
    }

    #[test]
    fn a_port_of_the_node_moves_between_services() {
        let (one, two) = (key(80, Protocol::Tcp), key(81, Protocol::Tcp));
        let at = |node_port| ServiceRoute {
            node_port,
            ..route(None, &[2])
        };
        let old = ServiceTable::from([(one, at(Some(30080))), (two, at(None))]);
        let new = ServiceTable::from([(one, at(None)), (two, at(Some(30080)))]);
        let script = services_change(&old, &new).script;
        let lines: Vec<&str> = script
            .lines()
            .filter(|line| line.contains("node_ports"))
            .collect();
        let chain = two.chain();
        assert_eq!(
            lines,
            [
                "delete element ip services node_ports { tcp . 30080 }",
                &format!("add element ip services node_ports {{ tcp . 30080 : goto {chain} }}"),
            ]
        );
    }

    #[test]
    fn a_takeover_keeps_the_clients_of_what_stays() {
        let service = key(80, Protocol::Tcp);
        let new = ServiceTable::from([(service, route(Some(60), &[2]))]);
        let id = service.endpoint((Ipv4Addr::new(10, 0, 0, 2), 8080));
        let names = |list: &[&str]| {
            list.iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        let script = services_takeover(
            &names(&["arrivals", "svc-old", &format!("ep-{id}")]),
            &names(&["services", "hairpins", "af-old", &format!("af-{id}")]),
            &new,
        );
        assert!(
            script.contains("delete set ip services af-old\n"),
            "{script}"
        );
        assert!(
            !script.contains(&format!("delete set ip services af-{id}")),
            "{script}"
        );
        assert!(
            script.contains("delete chain ip services svc-old\n"),
            "{script}"
        );
        assert!(!script.contains("arrivals"), "{script}");
        assert!(!script.contains("hairpins"), "{script}");
    }
}

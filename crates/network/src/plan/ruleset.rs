//! The nft scripts.
//!
//! Layer by layer: `netdev pods` sees each frame of a pod first and lets through only IPv4 and ARP
//! with the pod's own MAC and address; `inet pods` decides what is routed; `inet hypernetes_*` on
//! the host keeps networks apart and away from the host itself. All chains with a policy drop, but
//! the host's, which must leave the host's other traffic alone.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{API_PORT, NetworkPlan, PodPlan, REFUSED_V4, TAP_PREFIX, UPLINK, host_link_prefix};
use crate::Protocol;

/// How the names of transit links of every daemon begin.
pub const HOST_LINK_PREFIX: &str = "hn";
/// Concurrent connections one pod may hold in its namespace's connection table, so that one pod
/// cannot fill it for the others.
const CONNECTIONS_PER_POD: u32 = 8192;

/// Name of the host's table.
pub fn host_table(instance: &str) -> String {
    format!("hypernetes_{instance}")
}

/// A port of the node, as the host's table forwards it to a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The one address of the node that it is on; `None` = all.
    pub at: Option<Ipv4Addr>,
    /// Transport.
    pub protocol: Protocol,
    /// Port of the node.
    pub port: u16,
    /// The network's own address on its transit link.
    pub to: Ipv4Addr,
    /// Port there.
    pub relay: u16,
    /// It is a service's: what a pod has comes first.
    pub service: bool,
}

impl Forward {
    fn place(&self) -> (&'static str, String) {
        let port = format!("{} . {}", self.protocol, self.port);
        match self.at {
            _ if self.service => ("node_ports", port),
            None => ("host_ports", port),
            Some(address) => ("host_ports_at", format!("{address} . {port}")),
        }
    }
}

/// Lets a port of the node lead to a network. Repeatable.
pub fn forward_rules(table: &str, forward: &Forward) -> String {
    let (map, key) = forward.place();
    let (to, relay) = (forward.to, forward.relay);
    format!("add element inet {table} {map} {{ {key} : {to} . {relay} }}\n")
}

/// Undoes [`forward_rules`], whether or not it is there.
pub fn forward_removal_rules(table: &str, forward: &Forward) -> String {
    let (map, key) = forward.place();
    format!(
        "{}delete element inet {table} {map} {{ {key} }}\n",
        forward_rules(table, forward)
    )
}

/// The host's table, replacing what was there.
pub fn host_ruleset(instance: &str, pool: Ipv4Net, forwards: &[Forward]) -> String {
    let table = host_table(instance);
    let own = format!("\"{}*\"", host_link_prefix(instance));
    let any = format!("\"{HOST_LINK_PREFIX}*\"");
    let mut script = format!(
        "\
table inet {table} {{}}
delete table inet {table}
table inet {table} {{
	counter host_refused {{}}
	counter cross_refused {{}}
	counter metadata_refused {{}}
	counter unsolicited_refused {{}}
	map host_ports {{
		type inet_proto . inet_service : ipv4_addr . inet_service
	}}
	map host_ports_at {{
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
	}}
	map node_ports {{
		type inet_proto . inet_service : ipv4_addr . inet_service
	}}
	chain ports {{
		fib daddr type != local return
		dnat ip to ip daddr . meta l4proto . th dport map @host_ports_at
		dnat ip to meta l4proto . th dport map @host_ports
		dnat ip to meta l4proto . th dport map @node_ports
	}}
	chain arrivals {{
		type nat hook prerouting priority dstnat; policy accept;
		iifname != {own} meta nfproto ipv4 jump ports
	}}
	chain departures {{
		type nat hook output priority -100; policy accept;
		meta nfproto ipv4 jump ports
	}}
	chain inbound {{
		type filter hook input priority filter - 10; policy accept;
		iifname {own} ct state established,related ct direction reply accept
		iifname {own} counter name host_refused drop
	}}
	chain through {{
		type filter hook forward priority filter - 10; policy accept;
		iifname {own} oifname {any} counter name cross_refused drop
		iifname {own} ip daddr 169.254.0.0/16 counter name metadata_refused drop
		iifname {own} meta nfproto ipv6 counter name metadata_refused drop
		oifname {own} ct state established,related accept
		oifname {own} ip daddr {pool} ct status dnat accept
		oifname {own} counter name unsolicited_refused drop
	}}
	chain translate {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {pool} iifname {own} oifname != {own} masquerade fully-random
		ip saddr 127.0.0.0/8 oifname {own} masquerade fully-random
	}}
}}
"
    );
    for forward in forwards {
        script.push_str(&forward_rules(&table, forward));
    }
    script
}

/// All rules of a network's namespace, with `pods` on it, replacing what was there. The taps must
/// exist.
pub fn network_ruleset(plan: &NetworkPlan, pods: &[PodPlan]) -> String {
    let gateway = plan.gateway;
    let refused = REFUSED_V4
        .iter()
        .chain([&plan.pool])
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    // Without egress even connections that were open before end.
    let (closed, open) = if plan.egress {
        (
            String::new(),
            format!("\t\tiifname \"{TAP_PREFIX}*\" oifname \"{UPLINK}\" accept\n"),
        )
    } else {
        let drop = "counter name refused_forward drop";
        (
            format!("\t\tiifname \"{UPLINK}\" {drop}\n\t\toifname \"{UPLINK}\" {drop}\n"),
            String::new(),
        )
    };
    // The node's address is among the refused ones, and answers go there without egress too.
    let node = if plan.node_access {
        let node = plan.transit_host();
        format!(
            "\t\tiifname \"{UPLINK}\" oifname \"{TAP_PREFIX}*\" ip saddr {node} ct state new,established,related accept\n\t\tiifname \"{TAP_PREFIX}*\" oifname \"{UPLINK}\" ip daddr {node} ct state established,related ct direction reply accept\n"
        )
    } else {
        String::new()
    };
    let mut script = format!(
        "\
table netdev pods {{}}
delete table netdev pods
table netdev pods {{
	set addresses {{
		type ifname . ether_addr . ipv4_addr
	}}
	counter refused_vlan {{}}
	counter refused_ipv6 {{}}
	counter refused_ethertype {{}}
	counter spoofed_ip {{}}
	counter spoofed_arp {{}}
	chain guard {{
		ether type {{ 0x8100, 0x88a8 }} counter name refused_vlan drop
		ether type 0x86dd counter name refused_ipv6 drop
		ether type 0x0800 iifname . ether saddr . ip saddr @addresses accept
		ether type 0x0800 counter name spoofed_ip drop
		ether type 0x0806 iifname . ether saddr . arp saddr ip @addresses iifname . arp saddr ether . arp saddr ip @addresses accept
		ether type 0x0806 counter name spoofed_arp drop
		counter name refused_ethertype drop
	}}
}}
table inet pods {{}}
delete table inet pods
table inet pods {{
	set refused {{
		type ipv4_addr
		flags interval
		elements = {{ {refused} }}
	}}
	set connections {{
		type ipv4_addr
		size 65535
		flags dynamic
	}}
	counter refused_destination {{}}
	counter refused_input {{}}
	counter refused_forward {{}}
	counter refused_output {{}}
	counter too_many_connections {{}}
	chain limits {{
		ct state new add @connections {{ ip saddr ct count over {CONNECTIONS_PER_POD} }} counter name too_many_connections drop
	}}
	chain inbound {{
		type filter hook input priority filter; policy drop;
		iifname \"lo\" accept
		ct state invalid counter name refused_input drop
		ct state established,related accept
		iifname \"{TAP_PREFIX}*\" jump limits
		iifname \"{TAP_PREFIX}*\" ip daddr {gateway} udp dport 53 accept
		iifname \"{TAP_PREFIX}*\" ip daddr {gateway} tcp dport 53 accept
		iifname \"{TAP_PREFIX}*\" ip daddr {gateway} icmp type echo-request limit rate 200/second burst 50 packets accept
		iifname \"{TAP_PREFIX}*\" ip daddr {gateway} tcp dport {API_PORT} ct status dnat accept
		counter name refused_input drop
	}}
	chain through {{
		type filter hook forward priority filter; policy drop;
		meta nfproto ipv6 counter name refused_forward drop
		iifname \"{UPLINK}\" oifname \"{TAP_PREFIX}*\" ct status dnat ct state new,established,related accept
		iifname \"{TAP_PREFIX}*\" oifname \"{UPLINK}\" ct status dnat ct state established,related ct direction reply accept
{node}		ip daddr @refused counter name refused_destination drop
{closed}		ct state invalid counter name refused_forward drop
		oifname \"{UPLINK}\" tcp flags syn tcp option maxseg size set rt mtu
		ct state established,related accept
		iifname \"{TAP_PREFIX}*\" jump limits
		iifname \"{TAP_PREFIX}*\" oifname \"{TAP_PREFIX}*\" accept
{open}		counter name refused_forward drop
	}}
	chain outbound {{
		type filter hook output priority filter; policy drop;
		oifname \"lo\" accept
		ct state established,related accept
		oifname \"{TAP_PREFIX}*\" ip saddr {gateway} meta l4proto tcp accept
		counter name refused_output drop
	}}
	chain translate {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname \"{UPLINK}\" masquerade fully-random
	}}
}}
"
    );
    for pod in pods {
        script.push_str(&pod_rules(pod));
    }
    script
}

/// Puts a pod on its network's rules. Its tap must exist, and must not be up before this.
/// Repeatable.
pub fn pod_rules(pod: &PodPlan) -> String {
    let device = &pod.device;
    let element = element(pod);
    let hairpin = super::hairpin_element(pod.address);
    // The chain is made with its hook or found with it; its one rule is renewed.
    format!(
        "\
add chain netdev pods {device} {{ type filter hook ingress device \"{device}\" priority -500; policy drop; }}
flush chain netdev pods {device}
add rule netdev pods {device} jump guard
add element netdev pods addresses {{ {element} }}
add table ip services
add set ip services hairpins {{ type ipv4_addr . ipv4_addr; }}
add element ip services hairpins {{ {hairpin} }}
"
    )
}

/// Takes a pod off its network's rules, whether or not they are there.
pub fn pod_removal_rules(pod: &PodPlan) -> String {
    let device = &pod.device;
    let element = element(pod);
    let hairpin = super::hairpin_element(pod.address);
    // What may be missing is added first: nft 1.0.6 has no `destroy`.
    format!(
        "\
add chain netdev pods {device}
flush chain netdev pods {device}
delete chain netdev pods {device}
add element netdev pods addresses {{ {element} }}
delete element netdev pods addresses {{ {element} }}
add table ip services
add set ip services hairpins {{ type ipv4_addr . ipv4_addr; }}
add element ip services hairpins {{ {hairpin} }}
delete element ip services hairpins {{ {hairpin} }}
"
    )
}

fn element(pod: &PodPlan) -> String {
    let mac = pod.mac.map(|byte| format!("{byte:02x}")).join(":");
    format!("\"{}\" . {mac} . {}", pod.device, pod.address)
}

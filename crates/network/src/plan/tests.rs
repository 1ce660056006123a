use super::*;

fn spec() -> NetworkSpec {
    NetworkSpec {
        id: "acme.default".parse().unwrap(),
        cidr: "10.42.0.0/24".parse().unwrap(),
        gateway: "10.42.0.1".parse().unwrap(),
        egress: true,
        node_access: false,
        mtu: 1450,
        domain: "cluster.local".to_owned(),
    }
}

fn plan(spec: &NetworkSpec) -> Result<NetworkPlan, NetworkError> {
    NetworkPlan::new(
        spec,
        "100.64.0.0/16".parse().unwrap(),
        "100.64.0.6/31".parse().unwrap(),
    )
}

fn pod() -> PodPlan {
    PodPlan {
        device: "tap0123456789".to_owned(),
        mtu: 1450,
        gateway: "10.42.0.1".parse().unwrap(),
        address: "10.42.0.2".parse().unwrap(),
        mac: [2, 0, 0, 0, 0xab, 1],
        bandwidth: Bandwidth::default(),
    }
}

#[test]
fn names_fit_the_kernel_and_differ_by_instance() {
    let (one, other) = (
        Names::new("ab12", &spec().id),
        Names::new("cd34", &spec().id),
    );
    assert_eq!(one.host_link.len(), 14);
    assert_ne!(one.host_link, other.host_link);
    assert_ne!(one.namespace, other.namespace);
    assert!(one.namespace.starts_with("hn-ab12-"));
    assert!(tap_name(&SandboxId::random()).len() <= 15);
}

#[test]
fn macs_are_unicast_and_locally_administered() {
    for _ in 0..64 {
        let mac = parse_mac(&mac(&SandboxId::random())).unwrap();
        assert_eq!(mac[0] & 0x03, 0x02);
    }
    for bad in [
        "",
        "02:00",
        "02:00:00:00:00:00:00",
        "2:0:0:0:0:0",
        "02:00:00:00:00:xx",
    ] {
        assert_eq!(parse_mac(bad), None, "{bad}");
    }
}

#[test]
fn impossible_specifications_are_refused_by_field() {
    type Change = fn(&mut NetworkSpec);
    let cases: [(&str, Change); 10] = [
        ("cidr", |s| s.cidr = "fd00::/64".parse().unwrap()),
        ("cidr", |s| s.cidr = "10.42.0.1/24".parse().unwrap()),
        ("cidr", |s| s.cidr = "10.42.0.0/31".parse().unwrap()),
        ("cidr", |s| s.cidr = "169.254.169.0/24".parse().unwrap()),
        ("cidr", |s| s.cidr = "100.64.3.0/24".parse().unwrap()),
        ("gateway", |s| s.gateway = "10.43.0.1".parse().unwrap()),
        ("gateway", |s| s.gateway = "10.42.0.0".parse().unwrap()),
        ("gateway", |s| s.gateway = "fd00::1".parse().unwrap()),
        ("mtu", |s| s.mtu = 100),
        ("domain", |s| s.domain = "Cluster.local.".to_owned()),
    ];
    for (want, change) in cases {
        let mut changed = spec();
        change(&mut changed);
        match plan(&changed) {
            Err(NetworkError::Spec { field, .. }) => assert_eq!(field, want, "{changed:?}"),
            other => panic!("{changed:?}: {other:?}"),
        }
    }
}

#[test]
fn transit_link_has_two_addresses() {
    let plan = plan(&spec()).unwrap();
    assert_eq!(plan.transit_host().to_string(), "100.64.0.6");
    assert_eq!(plan.transit_inside().to_string(), "100.64.0.7");
}

#[test]
fn host_rules() {
    insta::assert_snapshot!(host_ruleset("ab12", "100.64.0.0/16".parse().unwrap(), &[]), @r#"
table inet hypernetes_ab12 {}
delete table inet hypernetes_ab12
table inet hypernetes_ab12 {
	counter host_refused {}
	counter cross_refused {}
	counter metadata_refused {}
	counter unsolicited_refused {}
	map host_ports {
		type inet_proto . inet_service : ipv4_addr . inet_service
	}
	map host_ports_at {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
	}
	map node_ports {
		type inet_proto . inet_service : ipv4_addr . inet_service
	}
	chain ports {
		fib daddr type != local return
		dnat ip to ip daddr . meta l4proto . th dport map @host_ports_at
		dnat ip to meta l4proto . th dport map @host_ports
		dnat ip to meta l4proto . th dport map @node_ports
	}
	chain arrivals {
		type nat hook prerouting priority dstnat; policy accept;
		iifname != "hnab12*" meta nfproto ipv4 jump ports
	}
	chain departures {
		type nat hook output priority -100; policy accept;
		meta nfproto ipv4 jump ports
	}
	chain inbound {
		type filter hook input priority filter - 10; policy accept;
		iifname "hnab12*" ct state established,related ct direction reply accept
		iifname "hnab12*" counter name host_refused drop
	}
	chain through {
		type filter hook forward priority filter - 10; policy accept;
		iifname "hnab12*" oifname "hn*" counter name cross_refused drop
		iifname "hnab12*" ip daddr 169.254.0.0/16 counter name metadata_refused drop
		iifname "hnab12*" meta nfproto ipv6 counter name metadata_refused drop
		oifname "hnab12*" ct state established,related accept
		oifname "hnab12*" ip daddr 100.64.0.0/16 ct status dnat accept
		oifname "hnab12*" counter name unsolicited_refused drop
	}
	chain translate {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 100.64.0.0/16 iifname "hnab12*" oifname != "hnab12*" masquerade fully-random
		ip saddr 127.0.0.0/8 oifname "hnab12*" masquerade fully-random
	}
}
"#);
}

#[test]
fn network_rules() {
    insta::assert_snapshot!(network_ruleset(&plan(&spec()).unwrap(), &[pod()]), @r#"
table netdev pods {}
delete table netdev pods
table netdev pods {
	set addresses {
		type ifname . ether_addr . ipv4_addr
	}
	counter refused_vlan {}
	counter refused_ipv6 {}
	counter refused_ethertype {}
	counter spoofed_ip {}
	counter spoofed_arp {}
	chain guard {
		ether type { 0x8100, 0x88a8 } counter name refused_vlan drop
		ether type 0x86dd counter name refused_ipv6 drop
		ether type 0x0800 iifname . ether saddr . ip saddr @addresses accept
		ether type 0x0800 counter name spoofed_ip drop
		ether type 0x0806 iifname . ether saddr . arp saddr ip @addresses iifname . arp saddr ether . arp saddr ip @addresses accept
		ether type 0x0806 counter name spoofed_arp drop
		counter name refused_ethertype drop
	}
}
table inet pods {}
delete table inet pods
table inet pods {
	set refused {
		type ipv4_addr
		flags interval
		elements = { 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4, 100.64.0.0/16 }
	}
	set connections {
		type ipv4_addr
		size 65535
		flags dynamic
	}
	counter refused_destination {}
	counter refused_input {}
	counter refused_forward {}
	counter refused_output {}
	counter too_many_connections {}
	chain limits {
		ct state new add @connections { ip saddr ct count over 8192 } counter name too_many_connections drop
	}
	chain inbound {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ct state invalid counter name refused_input drop
		ct state established,related accept
		iifname "tap*" jump limits
		iifname "tap*" ip daddr 10.42.0.1 udp dport 53 accept
		iifname "tap*" ip daddr 10.42.0.1 tcp dport 53 accept
		iifname "tap*" ip daddr 10.42.0.1 icmp type echo-request limit rate 200/second burst 50 packets accept
		iifname "tap*" ip daddr 10.42.0.1 tcp dport 6443 ct status dnat accept
		counter name refused_input drop
	}
	chain through {
		type filter hook forward priority filter; policy drop;
		meta nfproto ipv6 counter name refused_forward drop
		iifname "uplink" oifname "tap*" ct status dnat ct state new,established,related accept
		iifname "tap*" oifname "uplink" ct status dnat ct state established,related ct direction reply accept
		ip daddr @refused counter name refused_destination drop
		ct state invalid counter name refused_forward drop
		oifname "uplink" tcp flags syn tcp option maxseg size set rt mtu
		ct state established,related accept
		iifname "tap*" jump limits
		iifname "tap*" oifname "tap*" accept
		iifname "tap*" oifname "uplink" accept
		counter name refused_forward drop
	}
	chain outbound {
		type filter hook output priority filter; policy drop;
		oifname "lo" accept
		ct state established,related accept
		oifname "tap*" ip saddr 10.42.0.1 meta l4proto tcp accept
		counter name refused_output drop
	}
	chain translate {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "uplink" masquerade fully-random
	}
}
add chain netdev pods tap0123456789 { type filter hook ingress device "tap0123456789" priority -500; policy drop; }
flush chain netdev pods tap0123456789
add rule netdev pods tap0123456789 jump guard
add element netdev pods addresses { "tap0123456789" . 02:00:00:00:ab:01 . 10.42.0.2 }
add table ip services
add set ip services hairpins { type ipv4_addr . ipv4_addr; }
add element ip services hairpins { 10.42.0.2 . 10.42.0.2 }
"#);
}

#[test]
fn without_egress_nothing_new_goes_out() {
    let mut spec = spec();
    spec.egress = false;
    let closed = network_ruleset(&plan(&spec).unwrap(), &[]);
    assert!(!closed.contains("oifname \"uplink\" accept"));
    let (drop, established) = (
        closed.find("oifname \"uplink\" counter"),
        closed.rfind("established,related"),
    );
    assert!(drop.is_some() && drop < established, "{closed}");
}

#[test]
fn the_node_s_way_to_pods_is_open_only_where_it_is_asked_for() {
    let mut spec = spec();
    assert!(!network_ruleset(&plan(&spec).unwrap(), &[]).contains("100.64.0.6"));
    spec.node_access = true;
    let open = network_ruleset(&plan(&spec).unwrap(), &[]);
    let (node, refused) = (
        open.find("ip daddr 100.64.0.6 ct state established,related ct direction reply accept"),
        open.find("ip daddr @refused"),
    );
    assert!(node.is_some() && node < refused, "{open}");
    assert!(open.contains("ip saddr 100.64.0.6 ct state new,"), "{open}");
}

#[test]
fn pod_rules_are_one_hook_and_one_element() {
    insta::assert_snapshot!(pod_rules(&pod()), @r#"
add chain netdev pods tap0123456789 { type filter hook ingress device "tap0123456789" priority -500; policy drop; }
flush chain netdev pods tap0123456789
add rule netdev pods tap0123456789 jump guard
add element netdev pods addresses { "tap0123456789" . 02:00:00:00:ab:01 . 10.42.0.2 }
add table ip services
add set ip services hairpins { type ipv4_addr . ipv4_addr; }
add element ip services hairpins { 10.42.0.2 . 10.42.0.2 }
"#);
    insta::assert_snapshot!(pod_removal_rules(&pod()), @r#"
add chain netdev pods tap0123456789
flush chain netdev pods tap0123456789
delete chain netdev pods tap0123456789
add element netdev pods addresses { "tap0123456789" . 02:00:00:00:ab:01 . 10.42.0.2 }
delete element netdev pods addresses { "tap0123456789" . 02:00:00:00:ab:01 . 10.42.0.2 }
add table ip services
add set ip services hairpins { type ipv4_addr . ipv4_addr; }
add element ip services hairpins { 10.42.0.2 . 10.42.0.2 }
delete element ip services hairpins { 10.42.0.2 . 10.42.0.2 }
"#);
}

//! Services and ports of the node, on a real kernel, with pods made of frames.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "an integration test is a test module"
)]

mod world;

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

use hypernetes_network::{
    Backends, BuiltinConfig, BuiltinDriver, HostPort, NetworkDriver, NetworkError, NetworkServices,
    NetworkSpec, PodNetworkRequest, Protocol, ServicePort, conformance::spec, plan::Names,
};
use hypernetes_types::SandboxId;
use world::{
    Guest, ICMP, PATIENCE, UDP, eventually, host_state, inside, make_outside, on_own_host, sh, udp,
};

const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 9);

fn open(dir: &Path) -> BuiltinDriver {
    BuiltinDriver::open(BuiltinConfig {
        instance: "t2".to_owned(),
        upstream_dns: vec![],
        ..BuiltinConfig::new(dir)
    })
    .unwrap()
}

async fn boot(driver: &BuiltinDriver, network: &NetworkSpec, ports: &[HostPort]) -> Guest {
    let request = PodNetworkRequest {
        host_ports: ports.to_vec(),
        ..PodNetworkRequest::default()
    };
    let attachment = driver
        .attach(&SandboxId::random(), &network.id, &request)
        .await
        .unwrap();
    Guest::boot(attachment).await
}

fn port(host_port: u16, host_ip: Option<&str>) -> HostPort {
    HostPort {
        protocol: Protocol::Udp,
        host_port,
        container_port: 53,
        host_ip: host_ip.map(|text| text.parse().unwrap()),
    }
}

fn services(affinity: Option<u32>, endpoints: &[&Guest]) -> NetworkServices {
    let endpoints = endpoints
        .iter()
        .map(|pod| SocketAddr::from((pod.address(), 9)))
        .collect();
    NetworkServices {
        range: Some("10.96.0.0/16".parse().unwrap()),
        ports: vec![ServicePort {
            address: CLUSTER_IP.into(),
            protocol: Protocol::Udp,
            port: 80,
            affinity,
            backends: Backends::Endpoints(endpoints),
            node_port: None,
        }],
        names: Vec::new(),
    }
}

/// The datagram that comes to the pod's port, with where it is from.
async fn take(pod: &mut Guest, port: u16) -> (SocketAddr, Vec<u8>) {
    let frame = pod
        .receive(|frame| is_udp(frame) && frame[36..38] == port.to_be_bytes())
        .await;
    let source = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
    let from = u16::from_be_bytes([frame[34], frame[35]]);
    let length = usize::from(u16::from_be_bytes([frame[38], frame[39]]));
    ((source, from).into(), frame[42..34 + length].to_vec())
}

fn is_udp(frame: &[u8]) -> bool {
    frame.len() >= 42 && frame[12..14] == [8, 0] && frame[23] == UDP
}

async fn answer(pod: &Guest, to: SocketAddr, from: u16, payload: &[u8]) {
    let SocketAddr::V4(to) = to else {
        panic!("{to}")
    };
    pod.send_ip(*to.ip(), UDP, &udp(from, to.port(), payload))
        .await;
}

async fn ends_as(before: &str, dir: &Path) {
    eventually(|| {
        let state = host_state(dir);
        if state == before {
            Ok(())
        } else {
            Err(format!("before:\n{before}\nafter:\n{state}"))
        }
    })
    .await;
}

#[test]
fn ports_of_the_node_lead_to_pods_and_go_with_them() {
    on_own_host(|| async {
        make_outside();
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        let before = host_state(dir.path());
        for egress in [true, false] {
            let mut driver = open(dir.path());
            let network = NetworkSpec {
                egress,
                ..spec("red")
            };
            driver.ensure_network(&network).await.unwrap();
            let mut pod = boot(
                &driver,
                &network,
                &[port(5353, None), port(99, Some("10.99.0.1"))],
            )
            .await;
            let mut twin = boot(&driver, &network, &[port(99, Some("127.0.0.1"))]).await;
            let other = spec("blue");
            driver.ensure_network(&other).await.unwrap();
            let taken = PodNetworkRequest {
                host_ports: vec![port(99, None)],
                ..PodNetworkRequest::default()
            };
            let refused = driver.attach(&SandboxId::random(), &other.id, &taken).await;
            assert!(
                matches!(refused, Err(NetworkError::HostPort { port: 99, .. })),
                "{refused:?}"
            );
            driver.delete_network(&other.id).await.unwrap();

            let alive = [pod.lease.sandbox.clone(), twin.lease.sandbox.clone()];
            for restart in [false, true] {
                if restart {
                    drop(driver);
                    driver = open(dir.path());
                    driver.recover(&alive).await.unwrap();
                }
                let outside = inside("outside", || UdpSocket::bind("10.99.0.2:0").unwrap());
                let node = UdpSocket::bind("0.0.0.0:0").unwrap();
                for (socket, to, client) in [
                    (&outside, "10.99.0.1:5353", Some("10.99.0.2")),
                    (&outside, "10.99.0.1:99", Some("10.99.0.2")),
                    (&node, "127.0.0.1:5353", None),
                    (&node, "10.99.0.1:5353", Some("10.99.0.1")),
                ] {
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.send_to(b"ask", to).unwrap();
                    let (from, said) = take(&mut pod, 53).await;
                    assert_eq!(said, b"ask");
                    // The pod sees who its client is.
                    assert!(
                        client.is_none_or(|client| from.ip().to_string() == client),
                        "{to} {from}"
                    );
                    answer(&pod, from, 53, b"well").await;
                    let mut buffer = [0; 64];
                    let (length, source) = socket.recv_from(&mut buffer).unwrap();
                    assert_eq!(
                        (&buffer[..length], source.to_string()),
                        (&b"well"[..], to.to_owned())
                    );
                }
                node.send_to(b"twin", "127.0.0.1:99").unwrap();
                assert_eq!(take(&mut twin, 53).await.1, b"twin");
            }
            let sandbox = pod.lease.sandbox.clone();
            drop(pod);
            driver.detach(&sandbox).await.unwrap();
            let listed = sh("nft list ruleset; ip netns exec hn-t2-* nft list ruleset || true");
            assert!(!listed.contains("5353"), "{listed}");
            let sandbox = twin.lease.sandbox.clone();
            drop(twin);
            driver.detach(&sandbox).await.unwrap();
            driver.delete_network(&network.id).await.unwrap();
            ends_as(&before, dir.path()).await;
        }
    });
}

/// Asks a service by `to`, and lets `pod` answer.
async fn ask(socket: &UdpSocket, to: &str, pod: &mut Guest) -> SocketAddr {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(b"ask", to).unwrap();
    let (from, said) = take(pod, 9).await;
    assert_eq!(said, b"ask");
    answer(pod, from, 9, b"well").await;
    let mut buffer = [0; 64];
    let (length, source) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(
        (&buffer[..length], source.to_string()),
        (&b"well"[..], to.to_owned())
    );
    from
}

#[test]
fn ports_of_the_node_lead_to_services() {
    on_own_host(|| async {
        make_outside();
        let dir = tempfile::tempdir().unwrap();
        let mut driver = open(dir.path());
        let before = host_state(dir.path());
        let (red, blue) = (spec("red"), spec("blue"));
        for network in [&red, &blue] {
            driver.ensure_network(network).await.unwrap();
        }
        let mut one = boot(&driver, &red, &[]).await;
        let mut two = boot(&driver, &blue, &[]).await;
        let at = |port: Option<u16>, endpoints: &[&Guest]| {
            let mut services = services(None, endpoints);
            services.ports[0].node_port = port;
            services
        };
        let outside = || inside("outside", || UdpSocket::bind("10.99.0.2:0").unwrap());
        let node = || UdpSocket::bind("0.0.0.0:0").unwrap();
        let listed = || sh("nft list ruleset; ip netns exec hn-t2-* nft list ruleset || true");

        driver
            .set_services(&red.id, at(Some(30_053), &[&one]))
            .await
            .unwrap();
        // A second network's claim to it has to wait.
        driver
            .set_services(&blue.id, at(Some(30_053), &[&two]))
            .await
            .unwrap();
        let alive = [one.lease.sandbox.clone(), two.lease.sandbox.clone()];
        for restart in [false, true] {
            if restart {
                drop(driver);
                driver = open(dir.path());
                driver.recover(&alive).await.unwrap();
            }
            // blue comes before red.
            let from = ask(&outside(), "10.99.0.1:30053", &mut two).await;
            assert_eq!(from.ip().to_string(), "10.99.0.2");
            ask(&node(), "127.0.0.1:30053", &mut two).await;
            ask(&node(), "10.99.0.1:30053", &mut two).await;
        }
        driver
            .set_services(&blue.id, at(None, &[&two]))
            .await
            .unwrap();
        ask(&outside(), "10.99.0.1:30053", &mut one).await;

        // Without an endpoint the node itself answers: nobody is there.
        driver
            .set_services(&red.id, at(Some(30_053), &[]))
            .await
            .unwrap();
        let client = node();
        client.connect("127.0.0.1:30053").unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send(b"ask").unwrap();
        let refused = client.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(!listed().contains("30053"), "{}", listed());

        // A pod's own port comes first.
        driver
            .set_services(&red.id, at(Some(30_054), &[&one]))
            .await
            .unwrap();
        let mut own = boot(&driver, &blue, &[port(30_054, None)]).await;
        let client = node();
        client.send_to(b"own", "127.0.0.1:30054").unwrap();
        assert_eq!(take(&mut own, 53).await.1, b"own");
        let sandbox = own.lease.sandbox.clone();
        drop(own);
        driver.detach(&sandbox).await.unwrap();
        ask(&node(), "127.0.0.1:30054", &mut one).await;

        for pod in [one, two] {
            let sandbox = pod.lease.sandbox.clone();
            drop(pod);
            driver.detach(&sandbox).await.unwrap();
        }
        // With its services.
        for network in [&red, &blue] {
            driver.delete_network(&network.id).await.unwrap();
        }
        assert!(!listed().contains("30054"), "{}", listed());
        ends_as(&before, dir.path()).await;
    });
}

#[test]
fn services_lead_to_pods_of_the_own_network() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = open(dir.path());
        let before = host_state(dir.path());
        let (red, blue) = (spec("red"), spec("blue"));
        driver.ensure_network(&red).await.unwrap();
        driver.ensure_network(&blue).await.unwrap();
        let mut client = boot(&driver, &red, &[]).await;
        let mut one = boot(&driver, &red, &[]).await;
        let mut two = boot(&driver, &red, &[]).await;
        let mut foreign = boot(&driver, &blue, &[]).await;
        // The same address and the same endpoints in both networks.
        driver
            .set_services(&red.id, services(None, &[&one]))
            .await
            .unwrap();
        driver
            .set_services(&blue.id, services(None, &[&foreign]))
            .await
            .unwrap();

        client
            .send_ip(CLUSTER_IP, UDP, &udp(1000, 80, b"ask"))
            .await;
        let (from, said) = take(&mut one, 9).await;
        assert_eq!(
            (from.to_string(), said),
            (format!("{}:1000", client.address()), b"ask".to_vec())
        );
        answer(&one, from, 9, b"well").await;
        let (from, said) = take(&mut client, 1000).await;
        assert_eq!(
            (from.to_string(), said),
            (format!("{CLUSTER_IP}:80"), b"well".to_vec())
        );

        // To itself, by the service's address.
        foreign
            .send_ip(CLUSTER_IP, UDP, &udp(1001, 80, b"self"))
            .await;
        let (from, said) = take(&mut foreign, 9).await;
        assert_eq!((from.ip(), said), (foreign.lease.gateway, b"self".to_vec()));
        answer(&foreign, from, 9, b"well").await;
        let (from, _) = take(&mut foreign, 1001).await;
        assert_eq!(from.to_string(), format!("{CLUSTER_IP}:80"));

        // What no service has is refused at once.
        for (to, port) in [(CLUSTER_IP, 81_u16), (Ipv4Addr::new(10, 96, 1, 1), 80)] {
            client.send_ip(to, UDP, &udp(1002, port, b"no")).await;
            client
                .receive(|frame| {
                    frame[12..14] == [8, 0] && frame[23] == ICMP && frame[34..36] == [3, 3]
                })
                .await;
        }

        // Another endpoint comes: the flow goes on to the one it has.
        driver
            .set_services(&red.id, services(None, &[&one, &two]))
            .await
            .unwrap();
        for round in 0..8_u8 {
            client
                .send_ip(CLUSTER_IP, UDP, &udp(1000, 80, &[round]))
                .await;
            assert_eq!(take(&mut one, 9).await.1, [round]);
        }
        // New flows go to both.
        for port in 2000..2064 {
            client
                .send_ip(CLUSTER_IP, UDP, &udp(port, 80, b"new"))
                .await;
        }
        take(&mut two, 9).await;
        take(&mut one, 9).await;

        // A restart of the daemon is not seen.
        drop(driver);
        driver = open(dir.path());
        let pods = [&client, &one, &two, &foreign].map(|pod| pod.lease.sandbox.clone());
        driver.recover(&pods).await.unwrap();
        client
            .send_ip(CLUSTER_IP, UDP, &udp(1000, 80, b"again"))
            .await;
        while take(&mut one, 9).await.1 != b"again" {}

        // The endpoint goes: the same flow has to go elsewhere.
        driver
            .set_services(&red.id, services(None, &[&two]))
            .await
            .unwrap();
        client
            .send_ip(CLUSTER_IP, UDP, &udp(1000, 80, b"moved"))
            .await;
        while take(&mut two, 9).await.1 != b"moved" {}

        // With affinity all flows of a client have one endpoint, over a restart too.
        let sticky = services(Some(100), &[&one, &two]);
        driver.set_services(&red.id, sticky.clone()).await.unwrap();
        let flow = |port: u16| udp(port, 80, b"sticky");
        client.send_ip(CLUSTER_IP, UDP, &flow(3000)).await;
        let is_sticky = |frame: &[u8]| is_udp(frame) && frame.ends_with(b"sticky");
        let first = one
            .receive_within(Duration::from_millis(500), is_sticky)
            .await
            .is_some();
        if !first {
            two.receive(is_sticky).await;
        }
        let (chosen, spared) = if first {
            (&mut one, &mut two)
        } else {
            (&mut two, &mut one)
        };
        for port in 3001..3032 {
            if port == 3016 {
                drop(driver);
                driver = open(dir.path());
                driver.recover(&pods).await.unwrap();
            }
            client.send_ip(CLUSTER_IP, UDP, &flow(port)).await;
            chosen.receive(is_sticky).await;
        }
        let strays = spared.frames_until_ping(client.address()).await;
        assert!(!strays.iter().any(|frame| is_sticky(frame)));

        // Nothing of it came to the other network.
        let strays = foreign
            .frames_until_ping(match foreign.lease.gateway {
                std::net::IpAddr::V4(gateway) => gateway,
                std::net::IpAddr::V6(_) => panic!("IPv4"),
            })
            .await;
        assert!(!strays.iter().any(|frame| is_udp(frame)), "{strays:?}");

        driver
            .set_services(&red.id, NetworkServices::default())
            .await
            .unwrap();
        let name = Names::new("t2", &red.id).namespace;
        let left = sh(&format!("ip netns exec {name} nft list table ip services"));
        assert!(
            !left.contains("svc-") && !left.contains("ep-") && !left.contains("af-"),
            "{left}"
        );
        for pod in [client, one, two, foreign] {
            let sandbox = pod.lease.sandbox.clone();
            drop(pod);
            driver.detach(&sandbox).await.unwrap();
        }
        driver.delete_network(&red.id).await.unwrap();
        driver.delete_network(&blue.id).await.unwrap();
        ends_as(&before, dir.path()).await;
    });
}

#[test]
fn one_of_a_thousand_services_changes_quickly() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let driver = open(dir.path());
        let red = spec("red");
        driver.ensure_network(&red).await.unwrap();
        let mut all = NetworkServices {
            range: Some("10.96.0.0/16".parse().unwrap()),
            ..NetworkServices::default()
        };
        for index in 0..1000_u16 {
            let [high, low] = (index + 10).to_be_bytes();
            all.ports.push(ServicePort {
                address: Ipv4Addr::new(10, 96, high, low).into(),
                protocol: Protocol::Tcp,
                port: 80,
                affinity: None,
                backends: Backends::Endpoints(vec![
                    "10.77.0.2:80".parse().unwrap(),
                    "10.77.0.3:80".parse().unwrap(),
                ]),
                node_port: Some(30_000 + index),
            });
        }
        driver.set_services(&red.id, all.clone()).await.unwrap();
        let name = Names::new("t2", &red.id).namespace;
        let handles = || {
            let text = sh(&format!(
                "ip netns exec {name} nft -a list table ip services"
            ));
            let rules = text.lines().filter(|line| line.contains("dnat to"));
            rules
                .map(str::to_owned)
                .collect::<std::collections::BTreeSet<_>>()
        };
        let before = handles();
        assert_eq!(before.len(), 2000);
        all.ports[500].backends = Backends::Endpoints(vec!["10.77.0.4:80".parse().unwrap()]);
        let start = tokio::time::Instant::now();
        driver.set_services(&red.id, all).await.unwrap();
        let took = start.elapsed();
        println!("one of 1000 services changed in {took:?}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        let after = handles();
        assert_eq!(before.difference(&after).count(), 2, "only its own rules");
        assert_eq!(after.difference(&before).count(), 1);
        driver.delete_network(&red.id).await.unwrap();
    });
}

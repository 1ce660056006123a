//! The built-in driver on a real kernel, with pods made of frames.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is a test module"
)]

mod world;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use hypernetes_network::{
    BuiltinConfig, BuiltinDriver, NameRecord, NetworkDriver, NetworkSpec, PodNetworkRequest,
    conformance::{self, spec},
    plan::{Names, host_table},
};
use hypernetes_types::{NetworkId, SandboxId};
use world::{
    Guest, PATIENCE, UDP, arp, counter, ethernet, eventually, host_state, inside, ip, make_outside,
    on_own_host, sh, udp,
};

const GUARD: &str = "netdev pods";
const ROUTER: &str = "inet pods";
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

fn config(dir: &Path) -> BuiltinConfig {
    BuiltinConfig {
        instance: "t1".to_owned(),
        upstream_dns: vec![],
        ..BuiltinConfig::new(dir)
    }
}

fn open(dir: &Path) -> BuiltinDriver {
    BuiltinDriver::open(config(dir)).unwrap()
}

fn namespace(id: &NetworkId) -> String {
    Names::new("t1", id).namespace
}

async fn boot(driver: &BuiltinDriver, network: &NetworkSpec, address: &str) -> Guest {
    let request = PodNetworkRequest {
        address: Some(address.parse().unwrap()),
        ..PodNetworkRequest::default()
    };
    let attachment = driver
        .attach(&SandboxId::random(), &network.id, &request)
        .await
        .unwrap();
    Guest::boot(attachment).await
}

async fn is_as(before: &str, dir: &Path) {
    // The kernel ends namespaces in its own time.
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
fn builtin_conforms_and_leaves_the_host_as_it_was() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let driver = open(dir.path());
        let before = host_state(dir.path());
        assert!(before.contains("\n0\n"), "forwarding is off: {before}");
        conformance::check(&driver).await;
        is_as(&before, dir.path()).await;
        conformance::check(&driver).await;
        is_as(&before, dir.path()).await;
    });
}

#[test]
fn pods_of_one_network_meet_and_of_two_never() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let driver = open(dir.path());
        let (red, blue) = (spec("red"), spec("blue"));
        driver.ensure_network(&red).await.unwrap();
        driver.ensure_network(&blue).await.unwrap();
        let mut red2 = boot(&driver, &red, "10.77.0.2").await;
        let mut red3 = boot(&driver, &red, "10.77.0.3").await;
        let mut blue2 = boot(&driver, &blue, "10.77.0.2").await;
        let mut blue4 = boot(&driver, &blue, "10.77.0.4").await;
        assert!(red2.ping(red3.address()).await);
        assert!(red3.ping(red2.address()).await);
        assert!(blue2.ping(blue4.address()).await);
        assert!(
            red2.ping("10.77.0.1".parse().unwrap()).await,
            "the gateway answers"
        );

        // What red has not, is nowhere: red is told so, and blue hears nothing of it.
        let transit = sh("ip -o -4 addr | grep hnt1 | grep -o '100.64[0-9.]*'");
        let mut targets = vec![blue4.address()];
        for host_end in transit.lines() {
            let host_end: Ipv4Addr = host_end.parse().unwrap();
            targets.extend([host_end, Ipv4Addr::from(u32::from(host_end) + 1)]);
        }
        assert_eq!(targets.len(), 5);
        for target in &targets {
            for _again in 0..3 {
                red2.send_ip(*target, UDP, &udp(9, 9, b"from red")).await;
            }
            assert!(!has(
                &red2.frames_until_ping(red3.address()).await,
                b"from blue"
            ));
        }
        assert!(!has(
            &blue2.frames_until_ping(blue4.address()).await,
            b"from red"
        ));
        assert!(!has(
            &blue4.frames_until_ping(blue2.address()).await,
            b"from red"
        ));
        // The own end of the transit link is input of the namespace, the other three are destinations.
        assert_eq!(
            counter(&namespace(&red.id), ROUTER, "refused_destination"),
            9
        );
        assert_eq!(counter(&namespace(&red.id), ROUTER, "refused_input"), 3);

        // And if red's own rules were gone, the host would still keep them apart.
        sh(&format!(
            "ip netns exec {} nft delete table inet pods",
            namespace(&red.id)
        ));
        let blue_end = sh(&format!(
            "ip -n {} -o -4 addr show uplink | grep -o '100.64[0-9.]*'",
            namespace(&blue.id)
        ));
        let red_name = namespace(&red.id);
        sh(&format!(
            "ip netns exec {red_name} bash -c 'echo x > /dev/udp/{}/9'",
            blue_end.trim()
        ));
        let table = format!("inet {}", host_table("t1"));
        eventually(|| match counter("", &table, "cross_refused") {
            0 => Err("the host let it through".to_owned()),
            _ => Ok(()),
        })
        .await;
    });
}

fn has(frames: &[Vec<u8>], text: &[u8]) -> bool {
    frames
        .iter()
        .any(|frame| frame.windows(text.len()).any(|window| window == text))
}

#[test]
fn forged_frames_are_dropped_and_counted() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let driver = open(dir.path());
        let red = spec("red");
        driver.ensure_network(&red).await.unwrap();
        let mut evil = boot(&driver, &red, "10.77.0.2").await;
        let mut victim = boot(&driver, &red, "10.77.0.3").await;
        let name = namespace(&red.id);
        let (mac, router, own, peer) = (evil.mac, evil.router, evil.address(), victim.address());
        let gateway = "10.77.0.1".parse().unwrap();
        let packet = udp(9, 9, b"forged");
        let honest = ip(mac, router, own, peer, UDP, &packet);
        let tagged = |tag: u16, inner: &[u8]| {
            let mut payload = tag.to_be_bytes().to_vec();
            payload.extend(&inner[12..]);
            payload
        };
        let single = ethernet(mac, router, 0x8100, &tagged(5, &honest));
        let zero = ethernet(mac, router, 0x8100, &tagged(0, &honest));
        let double = ethernet(mac, router, 0x88a8, &tagged(5, &single));
        let cases = [
            (
                "another MAC",
                ip(victim.mac, router, own, peer, UDP, &packet),
                "spoofed_ip",
            ),
            (
                "another address",
                ip(
                    mac,
                    router,
                    "10.77.0.4".parse().unwrap(),
                    peer,
                    UDP,
                    &packet,
                ),
                "spoofed_ip",
            ),
            (
                "the gateway's address",
                ip(mac, router, gateway, peer, UDP, &packet),
                "spoofed_ip",
            ),
            (
                "the peer's address",
                ip(mac, router, peer, peer, UDP, &packet),
                "spoofed_ip",
            ),
            (
                "no address",
                ip(
                    mac,
                    router,
                    Ipv4Addr::UNSPECIFIED,
                    Ipv4Addr::BROADCAST,
                    UDP,
                    &udp(68, 67, b"forged"),
                ),
                "spoofed_ip",
            ),
            (
                "ARP for the peer's address",
                arp(mac, peer, gateway),
                "spoofed_arp",
            ),
            (
                "gratuitous ARP of the gateway",
                arp(mac, gateway, gateway),
                "spoofed_arp",
            ),
            (
                "ARP with the peer's MAC",
                arp(victim.mac, own, gateway),
                "spoofed_arp",
            ),
            (
                "ARP with two MACs",
                [
                    &arp(mac, own, gateway)[..22],
                    &arp(victim.mac, own, gateway)[22..],
                ]
                .concat(),
                "spoofed_arp",
            ),
            (
                "IPv6",
                ethernet(mac, [0x33, 0x33, 0, 0, 0, 1], 0x86dd, &[0x60; 60]),
                "refused_ipv6",
            ),
            ("VLAN", single, "refused_vlan"),
            ("VLAN 0", zero, "refused_vlan"),
            ("two VLANs", double, "refused_vlan"),
            (
                "LLDP",
                ethernet(mac, [1, 0x80, 0xc2, 0, 0, 14], 0x88cc, &[0; 60]),
                "refused_ethertype",
            ),
        ];
        for (what, frame, name_of_counter) in cases {
            let before = counter(&name, GUARD, name_of_counter);
            evil.send(&frame).await;
            // A ping after it overtakes nothing.
            assert!(evil.ping(peer).await, "{what}");
            assert_eq!(counter(&name, GUARD, name_of_counter), before + 1, "{what}");
        }
        let seen = victim.frames_until_ping(own).await;
        assert!(!has(&seen, b"forged"));
        assert!(
            seen.iter().all(|frame| frame[6..12] == victim.router),
            "only the router speaks"
        );

        // What is honest but not for a pod to send anywhere.
        for target in [
            "224.0.0.251",
            "255.255.255.255",
            "10.77.0.7",
            "127.0.0.1",
            "169.254.169.254",
        ] {
            evil.send_ip(target.parse().unwrap(), UDP, &udp(9, 9, b"forged"))
                .await;
            assert!(evil.ping(peer).await, "{target}");
        }
        assert!(!has(&victim.frames_until_ping(own).await, b"forged"));

        // One's own MAC in ARP is answered, with the gateway's only.
        evil.send(&arp(mac, own, peer)).await;
        let seen = evil.frames_until_ping(peer).await;
        assert!(
            seen.iter().all(|frame| frame[12..14] != [8, 6]),
            "no proxy ARP"
        );
    });
}

#[test]
fn egress_is_translated_and_reaches_neither_host_nor_metadata() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        make_outside();
        let driver = open(dir.path());
        let before = host_state(dir.path());
        let mut red = spec("red");
        driver.ensure_network(&red).await.unwrap();
        let mut pod = boot(&driver, &red, "10.77.0.2").await;
        let name = namespace(&red.id);
        let server = inside("outside", || UdpSocket::bind("0.0.0.0:7").unwrap());
        let on_host = UdpSocket::bind("0.0.0.0:7").unwrap();
        for socket in [&server, &on_host] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        let mut buffer = [0; 64];

        pod.send_ip(OUTSIDE, UDP, &udp(4000, 7, b"hello")).await;
        let (length, source) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello");
        assert_eq!(source.ip().to_string(), "10.99.0.1", "the node's address");
        server.send_to(b"welcome", source).unwrap();
        let reply = pod
            .receive(|frame| has(&[frame.to_vec()], b"welcome"))
            .await;
        assert_eq!(reply[26..30], OUTSIDE.octets());
        assert_eq!(reply[36..38], 4000_u16.to_be_bytes());

        // Not the host by any of its addresses, nor the cloud's metadata.
        let host_end = sh("ip -o -4 addr | grep hnt1 | grep -o '100.64[0-9.]*'");
        for target in ["10.99.0.1", host_end.trim(), "169.254.169.254", "127.0.0.1"] {
            pod.send_ip(target.parse().unwrap(), UDP, &udp(4000, 7, b"stray"))
                .await;
        }
        pod.send_ip(OUTSIDE, UDP, &udp(4000, 7, b"after")).await;
        let (length, _) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"after", "metadata is not outside");
        on_host.set_nonblocking(true).unwrap();
        assert!(
            on_host.recv_from(&mut buffer).is_err(),
            "the host heard a pod"
        );
        assert_eq!(
            counter("", &format!("inet {}", host_table("t1")), "host_refused"),
            1
        );
        assert_eq!(counter(&name, ROUTER, "refused_destination"), 2);

        // Nobody outside opens a connection to a pod or a namespace.
        sh(&format!("ip -n outside route add 100.64.0.0/16 via 10.99.0.1
            ip -n outside route add 10.77.0.0/29 via 10.99.0.1
            ip route add 10.77.0.0/29 via $((ip -n {name} -o -4 addr show uplink) | grep -o '100.64[0-9.]*')"));
        let inside_end = sh(&format!(
            "ip -n {name} -o -4 addr show uplink | grep -o '100.64[0-9.]*'"
        ));
        for target in [inside_end.trim(), "10.77.0.2"] {
            server.send_to(b"intruder", (target, 53)).unwrap();
        }
        let table = format!("inet {}", host_table("t1"));
        eventually(|| match counter("", &table, "unsolicited_refused") {
            2 => Ok(()),
            other => Err(format!("{other} refused")),
        })
        .await;
        sh("ip route del 10.77.0.0/29");

        // Without egress nothing new goes out, and what was open ends.
        red.egress = false;
        driver.ensure_network(&red).await.unwrap();
        for port in [4000, 5000] {
            pod.send_ip(OUTSIDE, UDP, &udp(port, 7, b"closed")).await;
        }
        eventually(|| match counter(&name, ROUTER, "refused_forward") {
            2 => Ok(()),
            other => Err(format!("{other} refused")),
        })
        .await;
        server.set_nonblocking(true).unwrap();
        assert!(server.recv_from(&mut buffer).is_err());

        let sandbox = pod.lease.sandbox.clone();
        drop(pod);
        driver.detach(&sandbox).await.unwrap();
        driver.delete_network(&red.id).await.unwrap();
        is_as(&before, dir.path()).await;
    });
}

#[test]
fn the_node_reaches_pods_and_they_do_not_reach_it() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let driver = open(dir.path());
        let before = host_state(dir.path());
        for egress in [true, false] {
            let network = NetworkSpec {
                egress,
                node_access: true,
                ..spec("red")
            };
            driver.ensure_network(&network).await.unwrap();
            let mut pod = boot(&driver, &network, "10.77.0.2").await;
            let host = UdpSocket::bind("0.0.0.0:0").unwrap();
            host.set_read_timeout(Some(PATIENCE)).unwrap();
            host.send_to(b"probe", "10.77.0.2:9").unwrap();
            let asked = pod.receive(|frame| has(&[frame.to_vec()], b"probe")).await;
            let node: [u8; 4] = asked[26..30].try_into().unwrap();
            let port = u16::from_be_bytes([asked[34], asked[35]]);
            pod.send_ip(node.into(), UDP, &udp(9, port, b"well")).await;
            let mut buffer = [0; 64];
            let (length, source) = host.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"well");
            assert_eq!(source.to_string(), "10.77.0.2:9");

            // What the node did not ask for is not heard: from another port of the pod's, at another
            // of the node's.
            let other = UdpSocket::bind("0.0.0.0:0").unwrap();
            let other_port = other.local_addr().unwrap().port();
            pod.send_ip(node.into(), UDP, &udp(8, port, b"stray")).await;
            pod.send_ip(node.into(), UDP, &udp(9, other_port, b"stray"))
                .await;
            let name = namespace(&network.id);
            eventually(|| match counter(&name, ROUTER, "refused_destination") {
                2 => Ok(()),
                other => Err(format!("{other} refused")),
            })
            .await;
            for socket in [&host, &other] {
                socket.set_nonblocking(true).unwrap();
                assert!(socket.recv_from(&mut buffer).is_err(), "the node heard it");
            }
            let sandbox = pod.lease.sandbox.clone();
            drop(pod);
            driver.detach(&sandbox).await.unwrap();
            driver.delete_network(&network.id).await.unwrap();
        }
        is_as(&before, dir.path()).await;
    });
}

fn query(name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

fn parse(bytes: &[u8]) -> (ResponseCode, Vec<String>) {
    let message = Message::from_vec(bytes).unwrap();
    let data = message
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect();
    (message.metadata.response_code, data)
}

/// An upstream server that gives every name the address 192.0.2.1, and how many have asked.
async fn upstream() -> (SocketAddr, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&asked);
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (length, source) = socket.recv_from(&mut buffer).await.unwrap();
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
            answer.add_queries(query.queries.clone());
            answer.add_answer(Record::from_rdata(
                query.queries[0].name.clone(),
                60,
                RData::A(A(Ipv4Addr::new(192, 0, 2, 1))),
            ));
            // A forged answer first: another id.
            let mut forged = answer.clone();
            forged.metadata.id = answer.metadata.id.wrapping_add(1);
            socket
                .send_to(&forged.to_vec().unwrap(), source)
                .await
                .unwrap();
            socket
                .send_to(&answer.to_vec().unwrap(), source)
                .await
                .unwrap();
        }
    });
    (address, asked)
}

#[test]
fn names_are_those_of_the_own_network() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let (server, asked) = upstream().await;
        let driver = BuiltinDriver::open(BuiltinConfig {
            upstream_dns: vec![server],
            ..config(dir.path())
        })
        .unwrap();
        let (mut red, blue) = (spec("red"), spec("blue"));
        for (network, address) in [(&red, "10.77.0.3"), (&blue, "10.77.0.4")] {
            driver.ensure_network(network).await.unwrap();
            let name = format!("web.{}.svc.cluster.local", network.id);
            let record = NameRecord {
                name,
                address: address.parse().unwrap(),
            };
            driver.set_names(&network.id, vec![record]).await.unwrap();
        }
        let mut pod = boot(&driver, &red, "10.77.0.2").await;
        let mut other = boot(&driver, &blue, "10.77.0.2").await;
        let ok = |address: &str| (ResponseCode::NoError, vec![address.to_owned()]);
        let none = (ResponseCode::NXDomain, vec![]);
        assert_eq!(
            parse(&pod.dns(&query("web.red.svc.cluster.local.")).await),
            ok("10.77.0.3")
        );
        assert_eq!(
            parse(&pod.dns(&query("web.blue.svc.cluster.local.")).await),
            none
        );
        assert_eq!(
            parse(&other.dns(&query("web.blue.svc.cluster.local.")).await),
            ok("10.77.0.4")
        );
        assert_eq!(
            parse(&other.dns(&query("web.red.svc.cluster.local.")).await),
            none
        );
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 0);
        assert_eq!(
            parse(&pod.dns(&query("debian.org.")).await),
            ok("192.0.2.1")
        );
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);

        // Over TCP, from the namespace itself.
        let answer = inside(&namespace(&red.id), || {
            let mut stream = TcpStream::connect("10.77.0.1:53").unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let query = query("web.red.svc.cluster.local.");
            stream
                .write_all(&u16::try_from(query.len()).unwrap().to_be_bytes())
                .unwrap();
            stream.write_all(&query).unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut answer).unwrap();
            answer
        });
        assert_eq!(parse(&answer), ok("10.77.0.3"));

        // Without egress not even questions leave.
        red.egress = false;
        driver.ensure_network(&red).await.unwrap();
        assert_eq!(
            parse(&pod.dns(&query("debian.org.")).await),
            (ResponseCode::Refused, vec![])
        );
        assert_eq!(
            parse(&pod.dns(&query("web.red.svc.cluster.local.")).await),
            ok("10.77.0.3")
        );
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);

        // Garbage does not stop it.
        for garbage in [&b""[..], &[0xff; 3], &[0; 12], &[0x00; 500]] {
            pod.send_ip("10.77.0.1".parse().unwrap(), UDP, &udp(999, 53, garbage))
                .await;
        }
        assert_eq!(
            parse(&pod.dns(&query("web.red.svc.cluster.local.")).await),
            ok("10.77.0.3")
        );
    });
}

#[test]
fn pods_outlive_the_driver_and_the_dead_are_swept() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let before = {
            drop(open(dir.path()));
            host_state(dir.path())
        };
        let driver = open(dir.path());
        let (red, blue) = (spec("red"), spec("blue"));
        for network in [&red, &blue] {
            driver.ensure_network(network).await.unwrap();
        }
        let web = NameRecord {
            name: "web.cluster.local".to_owned(),
            address: red.gateway,
        };
        driver.set_names(&red.id, vec![web]).await.unwrap();
        let mut one = boot(&driver, &red, "10.77.0.2").await;
        let two = boot(&driver, &red, "10.77.0.3").await;
        let dead = boot(&driver, &red, "10.77.0.4").await.lease.clone();
        drop(driver);
        assert!(one.ping(two.address()).await, "without a driver");

        // What crashes at bad moments and strangers leave.
        sh("ip link add hnt1deadbeef type veth peer name stray; ip netns add hn-t1-deadbeef; touch /run/netns/hn-t1-0badf00d
            ip netns add hn-t2-deadbeef");
        sh(&format!("ip netns del {}", namespace(&blue.id)));
        let driver = open(dir.path());
        let alive = [&one, &two].map(|guest| guest.lease.sandbox.clone());
        driver.recover(&alive).await.unwrap();
        assert_eq!(
            driver.lease(&alive[0]).await.unwrap().as_ref(),
            Some(&one.lease)
        );
        assert_eq!(driver.lease(&dead.sandbox).await.unwrap(), None);
        assert!(one.ping(two.address()).await, "after recovery");
        let (code, _) = parse(&one.dns(&query("web.cluster.local.")).await);
        assert_eq!(code, ResponseCode::NoError, "names are remembered");
        let namespaces = sh("ip netns");
        assert!(
            !namespaces.contains("hn-t1-deadbeef") && !namespaces.contains("0badf00d"),
            "{namespaces}"
        );
        assert!(
            namespaces.contains("hn-t2-deadbeef"),
            "another daemon's is left alone"
        );
        assert!(!sh("ip link").contains("hnt1deadbeef"));
        assert!(!sh(&format!("ip -n {} link", namespace(&red.id))).contains(&dead.device));
        let mut three = boot(&driver, &blue, "10.77.0.2").await;
        assert!(
            three.ping(blue.gateway.to_string().parse().unwrap()).await,
            "made again"
        );

        // A tap of a living VMM is neither taken over nor deleted.
        assert!(
            driver
                .attach(&alive[0], &red.id, &PodNetworkRequest::default())
                .await
                .is_err()
        );
        assert!(one.ping(two.address()).await);

        let sandboxes = [&one, &two, &three].map(|guest| guest.lease.sandbox.clone());
        // Killed in the middle of everything, with all VMs gone.
        drop((one, two, three, driver));
        let driver = open(dir.path());
        driver.recover(&[]).await.unwrap();
        for sandbox in &sandboxes {
            assert_eq!(driver.lease(sandbox).await.unwrap(), None);
        }
        for network in [&red, &blue] {
            driver.delete_network(&network.id).await.unwrap();
        }
        sh("ip netns del hn-t2-deadbeef; umount /run/netns; rmdir /run/netns");
        is_as(&before, dir.path()).await;
    });
}

#[test]
fn a_deletion_that_was_interrupted_is_finished() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        let before = host_state(dir.path());
        let driver = open(dir.path());
        driver.ensure_network(&spec("red")).await.unwrap();
        drop(driver);
        let hash = Names::new("t1", &spec("red").id).hash;
        let file = dir.path().join(format!("networks/{hash}.json"));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(
            &file,
            text.replace("\"deleting\":false", "\"deleting\":true"),
        )
        .unwrap();
        let driver = open(dir.path());
        assert_eq!(driver.list_networks().await.unwrap(), []);
        driver.recover(&[]).await.unwrap();
        is_as(&before, dir.path()).await;
    });
}

#[test]
fn calls_at_the_same_time_get_different_addresses() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let driver = open(dir.path());
        let before = host_state(dir.path());
        let networks = ["red", "blue", "green"].map(|id| NetworkSpec {
            cidr: "10.77.0.0/24".parse().unwrap(),
            ..spec(id)
        });
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..24 {
            let (driver, network) = (driver.clone(), networks[index % 3].clone());
            tasks.spawn(async move {
                // Everyone makes the network that they need.
                driver.ensure_network(&network).await.unwrap();
                driver
                    .attach(
                        &SandboxId::random(),
                        &network.id,
                        &PodNetworkRequest::default(),
                    )
                    .await
                    .unwrap()
                    .lease
            });
        }
        let leases = tasks.join_all().await;
        let distinct = leases
            .iter()
            .map(|lease| (lease.network.clone(), lease.address))
            .collect::<std::collections::BTreeSet<_>>();
        assert_eq!(distinct.len(), 24);
        let mut tasks = tokio::task::JoinSet::new();
        for lease in leases {
            let driver = driver.clone();
            tasks.spawn(async move {
                driver.detach(&lease.sandbox).await.unwrap();
                // The last one turns off the light.
                let _in_use = driver.delete_network(&lease.network).await;
            });
        }
        tasks.join_all().await;
        assert_eq!(driver.list_networks().await.unwrap(), []);
        is_as(&before, dir.path()).await;
    });
}

const CHURN: &str = "HYPERNETES_NETWORK_TEST_CHURN";

/// Not a test but the process that `killed_at_any_moment` kills.
#[test]
fn churn() {
    let Ok(dir) = std::env::var(CHURN) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let driver = open(Path::new(&dir));
        driver.recover(&[]).await.unwrap();
        println!("ready");
        loop {
            for id in ["red", "blue"] {
                let network = spec(id);
                driver.ensure_network(&network).await.unwrap();
                let pods = [SandboxId::random(), SandboxId::random()];
                for pod in &pods {
                    drop(
                        driver
                            .attach(pod, &network.id, &PodNetworkRequest::default())
                            .await
                            .unwrap(),
                    );
                }
                for pod in &pods {
                    driver.detach(pod).await.unwrap();
                }
                driver.delete_network(&network.id).await.unwrap();
            }
        }
    });
}

#[test]
fn killed_at_any_moment() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        let before = host_state(dir.path());
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(2);
        for _round in 0..30 {
            let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "churn", "--nocapture"])
                .env(CHURN, dir.path())
                .stdout(std::process::Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            let mut output = tokio::io::BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            while !line.contains("ready") {
                line.clear();
                let length = tokio::io::AsyncBufReadExt::read_line(&mut output, &mut line).await;
                assert_ne!(length.unwrap(), 0, "recovery failed");
            }
            // The moment is the point here, not a wait for something.
            let moment = Duration::from_micros(rand::Rng::random_range(&mut rng, 0..120_000));
            tokio::time::sleep(moment).await;
            child.kill().await.unwrap();
        }
        let driver = open(dir.path());
        driver.recover(&[]).await.unwrap();
        for network in driver.list_networks().await.unwrap() {
            driver.delete_network(&network.id).await.unwrap();
        }
        is_as(&before, dir.path()).await;
    });
}

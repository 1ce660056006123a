//! Limits of what pods receive and send, by both drivers, on a real kernel.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "an integration test is a test module"
)]

mod world;

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use hypernetes_network::{
    Attachment, BuiltinConfig, BuiltinDriver, NetworkDriver, PodNetworkRequest,
    cni::{CniConfig, CniDriver},
    conformance::spec,
    plan::Names,
};
use hypernetes_types::{Bandwidth, SandboxId};
use serde_json::json;
use world::{
    Guest, PATIENCE, UDP, counter, ethernet, eventually, host_state, inside, ip, make_outside,
    on_own_host, sh, udp,
};

const PLUGINS: &str = "/usr/lib/cni";
const EGRESS: u64 = 20_000_000;
const INGRESS: u64 = 10_000_000;
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const PORT: u16 = 9000;
const PAYLOAD: [u8; 1200] = [7; 1200];
/// Ethernet, IPv4 and UDP.
const HEADERS: usize = 14 + 20 + 8;

fn limited() -> PodNetworkRequest {
    PodNetworkRequest {
        bandwidth: Bandwidth {
            ingress_bps: Some(INGRESS),
            egress_bps: Some(EGRESS),
        },
        ..PodNetworkRequest::default()
    }
}

/// What comes of a flood, in bits per second, without the burst that a limit lets through first.
async fn rate(mut next: impl AsyncFnMut() -> usize, limit: u64) -> f64 {
    let second = usize::try_from(limit / 8).unwrap();
    let mut through = 0;
    while through < second / 2 {
        through += next().await;
    }
    let (begin, mut counted) = (Instant::now(), 0);
    while counted < second {
        counted += next().await;
    }
    counted as f64 * 8.0 / begin.elapsed().as_secs_f64()
}

/// A busy machine sends less than it may, never more.
fn assert_limit(direction: &str, limit: u64, found: f64) {
    let of_limit = found / limit as f64;
    assert!(
        (0.8..1.1).contains(&of_limit),
        "{direction}: {found} of {limit} bits per second"
    );
}

/// Has `from` send to `to` more than any limit until `work` is done.
async fn flooded<T>(from: &Guest, to: Ipv4Addr, work: impl Future<Output = T>) -> T {
    let done = Arc::new(AtomicBool::new(false));
    let frame = ip(
        from.mac,
        from.router,
        from.address(),
        to,
        UDP,
        &udp(1, PORT, &PAYLOAD),
    );
    let flood = from.flood(frame, Arc::clone(&done));
    let result = work.await;
    done.store(true, Ordering::SeqCst);
    flood.join().unwrap();
    result
}

/// What the guest sends to `listener` at `to`.
async fn egress_rate(guest: &Guest, to: Ipv4Addr, listener: UdpSocket) -> f64 {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::UdpSocket::from_std(listener).unwrap();
    let mut buffer = [0; 2000];
    let next = async || {
        let received = tokio::time::timeout(PATIENCE, listener.recv(&mut buffer));
        received.await.unwrap().unwrap() + HEADERS
    };
    flooded(guest, to, rate(next, EGRESS)).await
}

/// What the guest receives of all that `peer` sends.
async fn ingress_rate(guest: &mut Guest, peer: &Guest) -> f64 {
    let to = guest.address();
    let next = async || {
        let frame = guest
            .receive(|frame| frame.len() > PAYLOAD.len() && frame[23] == UDP)
            .await;
        frame.len()
    };
    flooded(peer, to, rate(next, INGRESS)).await
}

#[test]
fn a_pod_of_a_network_of_the_node() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        make_outside();
        let open = || {
            BuiltinDriver::open(BuiltinConfig {
                instance: "t3".to_owned(),
                upstream_dns: vec![],
                ..BuiltinConfig::new(dir.path())
            })
            .unwrap()
        };
        let driver = open();
        let before = host_state(dir.path());
        let red = spec("red");
        let namespace = Names::new("t3", &red.id).namespace;
        driver.ensure_network(&red).await.unwrap();
        let (slow, fast) = (SandboxId::random(), SandboxId::random());
        let attach = async |driver: &BuiltinDriver, sandbox: &SandboxId, request| -> Attachment {
            driver.attach(sandbox, &red.id, &request).await.unwrap()
        };
        let mut one = Guest::boot(attach(&driver, &slow, limited()).await).await;
        let free = PodNetworkRequest::default();
        let mut two = Guest::boot(attach(&driver, &fast, free).await).await;

        let listen = || inside("outside", || UdpSocket::bind((OUTSIDE, PORT)).unwrap());
        let sent = egress_rate(&one, OUTSIDE, listen()).await;
        assert_limit("egress", EGRESS, sent);
        let received = ingress_rate(&mut one, &two).await;
        assert_limit("ingress", INGRESS, received);
        let more = egress_rate(&two, OUTSIDE, listen()).await;
        assert!(more > EGRESS as f64 * 1.5, "{more}: the other has no limit");

        // What waits in between passes no rules any more, so nothing forged may get there.
        let to = two.address();
        let forged = |mac, from, text: &[u8]| ip(mac, one.router, from, to, UDP, &udp(1, 2, text));
        let spoofed = counter(&namespace, "netdev pods", "spoofed_ip");
        one.send(&forged(one.mac, two.address(), b"forged IP"))
            .await;
        one.send(&forged(two.mac, one.address(), b"forged MAC"))
            .await;
        let tagged = &forged(one.mac, one.address(), b"forged VLAN")[12..];
        let vlan = [&[0, 1], tagged].concat();
        one.send(&ethernet(one.mac, one.router, 0x8100, &vlan))
            .await;
        one.send(&forged(one.mac, one.address(), b"honest")).await;
        let came = two
            .receive(|frame| {
                let text = |word: &[u8]| frame.windows(word.len()).any(|part| part == word);
                text(b"forged") || text(b"honest")
            })
            .await;
        assert!(came.ends_with(b"honest"), "{came:?}");
        let refused = counter(&namespace, "netdev pods", "spoofed_ip") - spoofed;
        assert_eq!(refused, 2);

        // A new daemon finds the limits, and makes what is missing of them.
        let lease = one.lease.clone();
        drop((one, two, driver));
        sh(&format!(
            "ip -n {namespace} link delete ifb{}",
            slow.short()
        ));
        let driver = open();
        driver.recover(&[slow.clone(), fast.clone()]).await.unwrap();
        let again = attach(&driver, &slow, limited()).await;
        assert_eq!(again.lease, lease);
        let one = Guest::boot(again).await;
        let sent = egress_rate(&one, OUTSIDE, listen()).await;
        assert_limit("egress", EGRESS, sent);

        // The limits of a pod go with it, and all of what a dead daemon's pods had.
        driver.detach(&slow).await.unwrap();
        let links = sh(&format!("ip -n {namespace} -o link"));
        assert!(!links.contains("ifb") && links.contains("tap"), "{links}");
        drop(one);
        drop(attach(&driver, &slow, limited()).await);
        drop(driver);
        let driver = open();
        driver.recover(&[]).await.unwrap();
        driver.delete_network(&red.id).await.unwrap();
        eventually(|| {
            let after = host_state(dir.path());
            (after == before).then_some(()).ok_or(after)
        })
        .await;
    });
}

fn put_list(dir: &Path, with_bandwidth: bool) {
    let bridge = json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": dir.join("ipam"),
            "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    });
    let bandwidth = json!({"type": "bandwidth", "capabilities": {"bandwidth": with_bandwidth}});
    let list = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, bandwidth]});
    fs::create_dir_all(dir.join("net.d")).unwrap();
    fs::write(dir.join("net.d/10-pods.conflist"), list.to_string()).unwrap();
}

#[test]
fn a_pod_on_a_bridge() {
    if !Path::new(PLUGINS).join("bandwidth").exists() {
        println!("SKIP: needs the package containernetworking-plugins");
        return;
    }
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let driver = CniDriver::open(CniConfig {
            state_dir: dir.join("state"),
            instance: "t4".to_owned(),
            network: "cni".parse().unwrap(),
            conf_dir: dir.join("net.d"),
            bin_dirs: vec![PLUGINS.into()],
            anti_spoofing: true,
            collect_garbage: false,
        })
        .unwrap();
        put_list(dir, false);
        let (slow, fast) = (SandboxId::random(), SandboxId::random());
        let refused = driver.attach(&slow, &limited()).await.unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.contains("kubernetes.io/egress-bandwidth")
                && refused.contains("capability bandwidth"),
            "{refused}"
        );

        put_list(dir, true);
        let mut one = Guest::boot(driver.attach(&slow, &limited()).await.unwrap()).await;
        let free = PodNetworkRequest::default();
        let two = Guest::boot(driver.attach(&fast, &free).await.unwrap()).await;
        let gateway = Ipv4Addr::new(10, 88, 0, 1);
        let sent = egress_rate(&one, gateway, UdpSocket::bind((gateway, PORT)).unwrap()).await;
        assert_limit("egress", EGRESS, sent);
        // A neighbour: not by the gateway.
        let mut peer = two;
        peer.router = one.mac;
        let received = ingress_rate(&mut one, &peer).await;
        assert_limit("ingress", INGRESS, received);

        drop((one, peer));
        driver.detach(&slow).await.unwrap();
        driver.detach(&fast).await.unwrap();
        eventually(|| {
            let links = sh("ip -o link show type ifb; ip -o link show type veth; ip netns");
            links.is_empty().then_some(()).ok_or(links)
        })
        .await;
    });
}

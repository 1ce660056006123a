//! The CNI driver with Debian's plugins on a real kernel, and with plugins of the test's own.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is a test module"
)]

mod world;

use std::{fs, net::UdpSocket, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use hypernetes_network::{
    HostPort, NetworkError, PodName, PodNetworkRequest, Protocol,
    cni::{CniConfig, CniDriver},
};
use hypernetes_types::SandboxId;
use serde_json::{Value, json};
use world::{
    Guest, PATIENCE, UDP, arp, ethernet, eventually, inside, ip, make_outside, on_own_host, sh, udp,
};

const PLUGINS: &str = "/usr/lib/cni";

fn config(dir: &Path, bin: &Path) -> CniConfig {
    CniConfig {
        state_dir: dir.join("state"),
        instance: "t2".to_owned(),
        network: "cni".parse().unwrap(),
        conf_dir: dir.join("net.d"),
        bin_dirs: vec![bin.to_owned()],
        anti_spoofing: true,
        collect_garbage: true,
    }
}

fn put_list(dir: &Path, version: &str, plugins: &Value) {
    fs::create_dir_all(dir.join("net.d")).unwrap();
    let list = json!({"cniVersion": version, "name": "pods", "plugins": plugins});
    fs::write(dir.join("net.d/10-pods.conflist"), list.to_string()).unwrap();
}

/// A bridge whose addresses are kept below `dir`.
fn bridge(dir: &Path) -> Value {
    json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1400,
        "ipam": {
            "type": "host-local", "dataDir": dir.join("ipam"),
            "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    })
}

fn port(host_port: u16, container_port: u16) -> PodNetworkRequest {
    PodNetworkRequest {
        pod: PodName {
            namespace: "acme".to_owned(),
            name: "web".to_owned(),
            uid: "u-1".to_owned(),
        },
        host_ports: vec![HostPort {
            protocol: Protocol::Udp,
            host_port,
            container_port,
            host_ip: None,
        }],
        ..PodNetworkRequest::default()
    }
}

/// What plugins and driver leave behind that is a pod's.
fn traces(dir: &Path) -> String {
    sh(&format!(
        "ip netns; ip -o link show type veth; iptables-save -t nat | grep -- '--dport' || true
         cd {}; find state/pods ipam/pods -name '*.json' -o -name '10.*' 2>/dev/null || true",
        dir.display()
    ))
}

#[test]
fn pods_on_a_bridge() {
    if !Path::new(PLUGINS).join("portmap").exists() {
        println!("SKIP: needs the package containernetworking-plugins");
        return;
    }
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        make_outside();
        sh("ip -n outside route add default via 10.99.0.1");
        put_list(
            dir,
            "1.0.0",
            &json!([bridge(dir), {"type": "portmap", "capabilities": {"portMappings": true}}]),
        );
        let open = || CniDriver::open(config(dir, Path::new(PLUGINS))).unwrap();
        let driver = open();
        driver.ready().await.unwrap();
        assert_eq!(
            traces(dir)
                .lines()
                .filter(|line| !line.starts_with("outside"))
                .count(),
            1
        );
        let (red, blue) = (SandboxId::random(), SandboxId::random());
        let mut one = Guest::boot(driver.attach(&red, &port(5353, 53)).await.unwrap()).await;
        let none = PodNetworkRequest::default();
        let mut two = Guest::boot(driver.attach(&blue, &none).await.unwrap()).await;
        assert_eq!((one.lease.mtu, one.lease.prefixes.len()), (1400, 1));
        assert_eq!(one.lease.prefixes[0].prefix_len(), 24);

        // The node, the outside, and each other.
        assert!(one.ping("10.88.0.1".parse().unwrap()).await);
        assert!(two.ping("10.99.0.2".parse().unwrap()).await);
        let address = one.address();
        sh(&format!("busybox ping -c1 -W5 {address}"));

        // A host port, from outside of the node.
        inside("outside", || {
            let socket = UdpSocket::bind("10.99.0.2:7000").unwrap();
            socket.send_to(b"hello", "10.99.0.1:5353").unwrap();
        });
        let frame = one
            .receive(|frame| frame[23] == UDP && frame.ends_with(b"hello"))
            .await;
        assert_eq!(frame[36..38], 53_u16.to_be_bytes());

        // A guest cannot be another, on the wire or above it.
        let listener = UdpSocket::bind("10.88.0.1:9000").unwrap();
        listener.set_read_timeout(Some(PATIENCE)).unwrap();
        let gateway = "10.88.0.1".parse().unwrap();
        let packet =
            |mac, from, text: &[u8]| ip(mac, two.router, from, gateway, UDP, &udp(1, 9000, text));
        two.send(&packet(two.mac, one.address(), b"their IP")).await;
        two.send(&packet(one.mac, two.address(), b"their MAC"))
            .await;
        two.send(&arp(two.mac, one.address(), gateway)).await;
        two.send(&ethernet(two.mac, two.router, 0x88cc, &[0; 46]))
            .await;
        two.send(&packet(two.mac, two.address(), b"honest")).await;
        let mut buffer = [0; 64];
        let (length, from) = listener.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..length], from.ip()),
            (&b"honest"[..], two.address().into())
        );
        let neighbours = sh(&format!("ip neigh show {}", one.address()));
        let mac = two.lease.mac.clone();
        assert!(!neighbours.contains(&mac), "{neighbours} of {mac}");
        assert!(
            two.receive_within(Duration::from_millis(1), |frame| frame[12..14] == [8, 6]
                && frame[21] == 2)
                .await
                .is_none()
        );

        // A new daemon knows the pod, and gives the same place to a VM that is started again.
        let lease = one.lease.clone();
        drop((one, driver));
        let driver = open();
        driver.recover(std::slice::from_ref(&red)).await.unwrap();
        assert_eq!(driver.lease(&blue), None);
        let again = driver.attach(&red, &port(5353, 53)).await.unwrap();
        assert_eq!(again.lease, lease);
        let mut one = Guest::boot(again).await;
        assert!(one.ping(gateway).await);
        drop((one, two));

        // A pod without a VM has the namespace for itself.
        let plain = SandboxId::random();
        let place = driver.join(&plain, &none).await.unwrap();
        let name = place.namespace.file_name().unwrap().to_str().unwrap();
        sh(&format!(
            "ip netns exec {name} busybox ping -c1 -W5 10.99.0.2; ip netns exec {name} busybox ping -c1 -W5 127.0.0.1"
        ));

        for _again in 0..2 {
            driver.detach(&plain).await.unwrap();
            driver.detach(&red).await.unwrap();
        }
        eventually(|| {
            let left = traces(dir);
            let left: Vec<_> = left.lines().filter(|line| !line.contains("eth0")).collect();
            // The test's own namespace.
            if left.len() == 1 {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
        .await;
    });
}

/// A plugin that writes down what it is asked.
fn spy(dir: &Path, name: &str, script: &str) {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin).unwrap();
    let text = format!(
        "#!/bin/bash\ninput=$(cat)\nprev=$(jq -c '.prevResult.dns.domain // empty' <<< \"$input\")\n\
         echo \"{name} $CNI_COMMAND ${{CNI_IFNAME:-}} ${{CNI_NETNS:+ns}} $prev\" >> {}/log\n\
         echo \"$CNI_ARGS\" > {}/arguments\necho \"$input\" > {}/input.{name}.$CNI_COMMAND\n{script}\n",
        dir.display(),
        dir.display(),
        dir.display(),
    );
    let path = bin.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

const MAKE: &str = r#"if [ "$CNI_COMMAND" = ADD ]; then
    ip netns exec "${CNI_NETNS##*/}" bash -ec 'ip link add eth0 type veth peer name peer0; ip addr add 10.5.0.2/32 dev eth0
        ip addr add fd00::2/64 dev eth0 nodad; ip link set eth0 up; ip link set peer0 up
        ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1; ip route add fd01::/64 via fd00::1'
    echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.5.0.2/32"}], "dns": {"domain": "first", "nameservers": ["10.5.0.53"], "search": ["acme.example"]}}'
fi"#;
const PASS: &str = r#"[ "$CNI_COMMAND" != ADD ] || jq -c .prevResult <<< "$input""#;

#[test]
fn plugins_are_asked_as_the_specification_says() {
    on_own_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        sh("echo 0 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        spy(dir, "make", MAKE);
        spy(dir, "pass", PASS);
        put_list(
            dir,
            "1.1.0",
            &json!([{"type": "make"}, {"type": "pass", "capabilities": {"portMappings": true}}]),
        );
        let open = || CniDriver::open(config(dir, &dir.join("bin"))).unwrap();
        let driver = open();
        let log = || {
            let text = fs::read_to_string(dir.join("log")).unwrap_or_default();
            drop(fs::remove_file(dir.join("log")));
            text.lines()
                .map(|line| line.trim_end().to_owned())
                .collect::<Vec<_>>()
        };
        driver.ready().await.unwrap();
        assert_eq!(log(), ["make STATUS", "pass STATUS"]);

        let sandbox = SandboxId::random();
        let lease = driver
            .attach(&sandbox, &port(80, 8080))
            .await
            .unwrap()
            .lease;
        assert_eq!(log(), ["make ADD eth0 ns", "pass ADD eth0 ns \"first\""]);
        let input = fs::read_to_string(dir.join("input.pass.ADD")).unwrap();
        let input: Value = serde_json::from_str(&input).unwrap();
        assert_eq!(
            input["runtimeConfig"],
            json!({"portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "udp"}]})
        );
        let arguments = fs::read_to_string(dir.join("arguments")).unwrap();
        assert!(
            arguments.contains("K8S_POD_NAMESPACE=acme;K8S_POD_NAME=web;")
                && arguments.trim_end().ends_with("K8S_POD_UID=u-1"),
            "{arguments}"
        );
        let prefixes: Vec<_> = lease.prefixes.iter().map(ToString::to_string).collect();
        assert_eq!(prefixes, ["10.5.0.2/32", "fd00::2/64"]);
        let routes: Vec<_> = lease
            .routes
            .iter()
            .map(|route| {
                (
                    route.destination.to_string(),
                    route.gateway.map(|to| to.to_string()),
                )
            })
            .collect();
        for route in [
            ("0.0.0.0/0", Some("169.254.1.1")),
            ("169.254.1.1/32", None),
            ("fd01::/64", Some("fd00::1")),
        ] {
            let route = (route.0.to_owned(), route.1.map(str::to_owned));
            assert!(routes.contains(&route), "{routes:?}");
        }
        assert_eq!(lease.gateway.to_string(), "169.254.1.1");
        assert_eq!(lease.dns[0].to_string(), "10.5.0.53");
        assert_eq!(lease.search, ["acme.example"]);

        // By the configuration that they were added by, in the other order.
        put_list(dir, "1.0.0", &json!([{"type": "pass"}]));
        drop(driver);
        let driver = open();
        driver
            .recover(std::slice::from_ref(&sandbox))
            .await
            .unwrap();
        assert_eq!(
            log(),
            [
                "make CHECK eth0 ns \"first\"",
                "pass CHECK eth0 ns \"first\""
            ]
        );
        sh("for name in $(ip netns list | cut -d' ' -f1); do ip netns delete $name; done");
        driver.detach(&sandbox).await.unwrap();
        assert_eq!(
            log(),
            ["pass DEL eth0  \"first\"", "make DEL eth0  \"first\""]
        );
        let error = driver.attach(&sandbox, &port(80, 80)).await.unwrap_err();
        assert!(error.to_string().contains("portMappings"), "{error}");

        // What the second refuses, both take back.
        put_list(dir, "1.1.0", &json!([{"type": "make"}, {"type": "refuse"}]));
        spy(
            dir,
            "refuse",
            r#"[ "$CNI_COMMAND" != ADD ] || { echo '{"code": 11, "msg": "try later", "details": "no more"}'; exit 1; }"#,
        );
        let none = PodNetworkRequest::default();
        let error = driver.attach(&sandbox, &none).await.unwrap_err();
        assert!(
            matches!(&error, NetworkError::Plugin { plugin, command: "ADD", message } if plugin == "refuse" && message == "try later; no more (code 11)"),
            "{error}"
        );
        let asked = log();
        assert_eq!(asked[2..], ["refuse DEL eth0 ns", "make DEL eth0 ns"]);
        assert_eq!(sh("ip netns"), "");
        assert!(!Path::new("/run/netns").exists());

        // What cannot be taken back stays on the list until it can.
        spy(
            dir,
            "refuse",
            r#"[ "$CNI_COMMAND" != DEL ] || exit 3; [ "$CNI_COMMAND" != ADD ] || jq -c .prevResult <<< "$input""#,
        );
        drop(driver.attach(&sandbox, &none).await.unwrap());
        assert!(driver.detach(&sandbox).await.is_err());
        drop(driver);
        let driver = open();
        assert!(driver.recover(&[]).await.is_err());
        spy(dir, "refuse", "");
        log();
        driver.recover(&[]).await.unwrap();
        assert_eq!(log()[2..], ["make GC", "refuse GC"]);
        let input = fs::read_to_string(dir.join("input.make.GC")).unwrap();
        assert!(
            input.contains(r#""cni.dev/valid-attachments":[]"#),
            "{input}"
        );
        assert!(!Path::new("/run/netns").exists());

        fs::remove_file(dir.join("bin/make")).unwrap();
        let missing = driver.ready().await.unwrap_err().to_string();
        assert!(
            missing.contains("plugin make: no such program"),
            "{missing}"
        );
    });
}

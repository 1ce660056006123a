//! Ports of the node that lead to pods of the built-in network.

use std::{process::Command, time::Duration};

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods, eventually};

use crate::{
    client::{Client, PATIENCE, sandbox, shell},
    cni::Host,
};

fn mapping(host_port: i32, container_port: i32, protocol: v1::Protocol) -> v1::PortMapping {
    v1::PortMapping {
        protocol: protocol.into(),
        container_port,
        host_port,
        host_ip: String::new(),
    }
}

/// What the node itself gets.
fn from_node(host: &Host, script: &str) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", host.name))
        .args(["bash", "-c", script])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn host_ports_of_the_built_in_network() {
    if !can_run_pods() {
        return;
    }
    let host = Host::new();
    let registry = Registry::start_in(Some(&host.name));
    let settings = "templates: 1\nnetwork:\n  cidr: 10.89.9.0/24\n  tenants:\n  \
                    - {name: acme, namespaces: [acme], cidr: 10.98.0.0/24}\n";
    let mut node = Node::start_in(Some(&host.name), "", settings);
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("web:1")).await;
    let mut config = sandbox(&node, "web");
    config.port_mappings = vec![
        mapping(8088, 8080, v1::Protocol::Tcp),
        mapping(8053, 53, v1::Protocol::Udp),
    ];
    let pod = client.run(&config).await;
    let mut web = shell("main", &image, "");
    web.command.clear();
    let id = client.create(&pod, &config, &web).await;
    client.start(&id).await;
    let net = client.pull(&registry.image("net:1")).await;
    let echo = shell("echo", &net, "exec netprobe udp-echo 53 pong");
    let echo = client.create(&pod, &config, &echo).await;
    client.start(&echo).await;

    let served = || {
        eventually("the pod serves its host port", PATIENCE, || {
            host.fetch("http://192.0.2.1:8088/")
        })
    };
    let page = served();
    assert!(page.contains("web:1"), "{page}");
    for address in ["127.0.0.1", "192.0.2.1"] {
        let script = format!("curl -s --noproxy '*' --max-time 5 http://{address}:8088/");
        assert_eq!(from_node(&host, &script), page, "{address}");
    }
    eventually("the pod answers by UDP", PATIENCE, || {
        let script = "exec 3<>/dev/udp/127.0.0.1/8053; echo ping >&3; timeout 2 head -n 1 <&3";
        match from_node(&host, script).trim() {
            "pong ping" => Ok(()),
            other => Err(other.to_owned()),
        }
    });

    // A port is one pod's, and a tenant has none.
    let mut second = sandbox(&node, "second");
    second.port_mappings = vec![mapping(8088, 80, v1::Protocol::Tcp)];
    let refused = client.try_run(&second).await.unwrap_err();
    assert!(
        refused
            .message()
            .contains("host port 8088/tcp cannot be had"),
        "{refused}"
    );
    second.metadata.as_mut().unwrap().namespace = "acme".into();
    second.port_mappings = vec![mapping(8089, 80, v1::Protocol::Tcp)];
    let refused = client.try_run(&second).await.unwrap_err();
    assert!(refused.message().contains("hostPorts"), "{refused}");

    // The daemon dies: the port goes on, and is the new daemon's to close.
    node.kill();
    assert_eq!(host.fetch("http://192.0.2.1:8088/"), Ok(page.clone()));
    node.spawn();
    let mut client = Client::of(&node).await;
    assert_eq!(served(), page);
    client.stop(&pod).await;
    client.remove(&pod).await;
    assert!(host.fetch("http://192.0.2.1:8088/").is_err());
    node.stop();
    eventually("nothing is left", Duration::from_secs(10), || {
        let picture = node.host_picture();
        picture
            .is_clean()
            .then_some(())
            .ok_or(format!("{picture:?}"))
    });
}

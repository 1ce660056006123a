//! Pods on a cluster's network, by Debian's CNI plugins.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods, eventually, skip, stdout};
use serde_json::json;

use crate::client::{Client, PATIENCE, sandbox, shell};

/// A network namespace that is this test's host, with an outside.
pub(crate) struct Host {
    pub(crate) name: String,
}

fn ip(arguments: &str) {
    hypernetes_testkit::run(Command::new("ip").args(arguments.split_whitespace()));
}

impl Host {
    pub(crate) fn new() -> Self {
        static HOSTS: AtomicUsize = AtomicUsize::new(0);
        let number = HOSTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("hncni-{}-{number}", std::process::id());
        let host = Self { name };
        let name = &host.name;
        for arguments in [
            format!("netns add {name}"),
            format!("netns add {name}-out"),
            format!("-n {name} link set lo up"),
            format!("-n {name} link add out0 type veth peer name eth0 netns {name}-out"),
            format!("-n {name} addr add 192.0.2.1/24 dev out0"),
            format!("-n {name} link set out0 up"),
            format!("-n {name} route add default via 192.0.2.2"),
            format!("-n {name}-out addr add 192.0.2.2/24 dev eth0"),
            format!("-n {name}-out link set eth0 up"),
        ] {
            ip(&arguments);
        }
        host
    }

    /// What the outside gets at the node's address.
    pub(crate) fn fetch(&self, url: &str) -> Result<String, String> {
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}-out", self.name))
            .args([
                "curl",
                "--silent",
                "--show-error",
                "--noproxy",
                "*",
                "--max-time",
                "5",
                url,
            ])
            .output()
            .unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in [&self.name, &format!("{}-out", self.name)] {
            // It may not have come to be.
            Command::new("ip")
                .args(["netns", "delete", name])
                .status()
                .ok();
        }
    }
}

async fn network_condition(client: &mut Client) -> v1::RuntimeCondition {
    let answer = client
        .runtime
        .status(v1::StatusRequest::default())
        .await
        .unwrap();
    let conditions = answer.into_inner().status.unwrap().conditions;
    conditions
        .into_iter()
        .find(|one| one.r#type == "NetworkReady")
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_cluster_s_network() {
    if !can_run_pods() {
        return;
    }
    if !Path::new("/usr/lib/cni/portmap").exists() {
        skip("needs the package containernetworking-plugins");
        return;
    }
    let host = Host::new();
    let registry = Registry::start_in(Some(&host.name));
    let conf = tempfile::tempdir().unwrap();
    let settings = format!(
        "templates: 1\nnetwork:\n  driver: cni\n  cni: {{confDir: {0}, binDirs: [/usr/lib/cni]}}\n  \
         tenants:\n  - {{name: acme, namespaces: [acme], cidr: 10.98.0.0/24}}\n",
        conf.path().display()
    );
    let mut node = Node::start_in(Some(&host.name), "", &settings);
    let mut client = Client::of(&node).await;
    let condition = network_condition(&mut client).await;
    assert!(
        !condition.status && condition.reason == "NetworkPluginNotReady",
        "{condition:?}"
    );
    assert!(
        condition.message.contains("no network configuration"),
        "{condition:?}"
    );
    let image = client.pull(&registry.image("web:1")).await;
    let mut config = sandbox(&node, "web");
    let refused = client.try_run(&config).await.unwrap_err();
    assert!(
        refused.message().contains("no network configuration"),
        "{refused}"
    );

    let list = json!({
        "cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
             "ipam": {"type": "host-local", "dataDir": conf.path().join("ipam"),
                      "ranges": [[{"subnet": "10.97.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}},
        ],
    });
    fs::write(conf.path().join("10-pods.conflist"), list.to_string()).unwrap();
    let condition = network_condition(&mut client).await;
    assert!(condition.status, "{condition:?}");

    config.port_mappings = vec![v1::PortMapping {
        protocol: v1::Protocol::Tcp.into(),
        container_port: 8080,
        host_port: 8088,
        host_ip: String::new(),
    }];
    let pod = client.run(&config).await;
    let mut web = shell("main", &image, "");
    web.command.clear();
    let id = client.create(&pod, &config, &web).await;
    client.start(&id).await;
    let address = client.sandbox_status(&pod).await.network.unwrap().ip;
    assert!(address.starts_with("10.97.0."), "{address}");
    let served = || {
        eventually("the pod serves its host port", PATIENCE, || {
            host.fetch("http://192.0.2.1:8088/")
        })
    };
    let page = served();
    assert!(page.contains("web:1"), "{page}");
    let (route, _) = client.exec(&id, "ip route; ip addr show eth0").await;
    assert!(
        route.contains("default via 10.97.0.1") && route.contains(&format!("{address}/24")),
        "{route}"
    );

    // The pod keeps its place over a crash of the daemon, and leaves nothing.
    node.kill();
    node.spawn();
    let mut client = Client::of(&node).await;
    assert_eq!(served(), page);

    // Another namespace's pods are on a network of their own: the two do not reach each other.
    let mut other = sandbox(&node, "other");
    other.metadata.as_mut().unwrap().namespace = "acme".into();
    other.port_mappings = config.port_mappings.clone();
    let refused = client.try_run(&other).await.unwrap_err();
    assert!(refused.message().contains("host port 8088"), "{refused}");
    other.port_mappings.clear();
    let apart = client.run(&other).await;
    let reach = client
        .create(&apart, &other, &shell("main", &image, "sleep 100000"))
        .await;
    client.start(&reach).await;
    let own = client.sandbox_status(&apart).await.network.unwrap().ip;
    assert!(own.starts_with("10.98.0."), "{own}");
    let (text, code) = client
        .exec(
            &reach,
            &format!("wget -q -T 2 -O - http://{address}:8080/ 2>/dev/null"),
        )
        .await;
    assert!(code != 0 && text.is_empty(), "{code}: {text}");

    for pod in [&pod, &apart] {
        client.stop(pod).await;
        client.remove(pod).await;
    }
    assert!(host.fetch("http://192.0.2.1:8088/").is_err());
    node.stop();
    eventually("nothing is left", Duration::from_secs(10), || {
        let picture = node.host_picture();
        let links = stdout(
            Command::new("ip").args(["-n", &host.name, "-o", "link", "show", "type", "veth"]),
        );
        let addresses = fs::read_dir(conf.path().join("ipam/pods"))
            .unwrap()
            .flatten();
        let leased = addresses
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("10."))
            .count();
        (picture.is_clean() && links.lines().count() == 1 && leased == 0)
            .then_some(())
            .ok_or(format!("{picture:?} {links} {leased} addresses"))
    });
}

//! Pods on a cluster's network that find a VM waiting for them, with limits of their traffic.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hypernetes_testkit::{Node, Registry, can_run_pods, eventually, skip, stdout};
use serde_json::json;

use crate::{
    client::{Client, PATIENCE, sandbox, shell},
    cni::Host,
};

/// Where the node's metrics are, on the test's host.
const METRICS: &str = "127.0.0.1:9464";
/// Bits per second, far less than an emulated guest can.
const LIMIT: f64 = 10_000_000.0;
/// What a limit lets through at first, and what is measured after it.
const SKIPPED: u64 = 500_000;
const COUNTED: u64 = 2_500_000;

fn vmms(node: &Node) -> BTreeSet<u32> {
    node.vmm_processes().into_iter().collect()
}

/// Waits until a VM waits for a pod.
fn await_pool(node: &Node, host: &Host) -> BTreeSet<u32> {
    eventually("a VM waits for a pod", PATIENCE, || {
        let metrics = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", host.name))
            .args(["curl", "-s", "--noproxy", "*", "--max-time", "5"])
            .arg(format!("http://{METRICS}/metrics"))
            .output()
            .unwrap();
        let metrics = String::from_utf8(metrics.stdout).unwrap();
        let full = metrics
            .lines()
            .any(|line| line == "hypernetes_node_pool_vms 1");
        full.then(|| vmms(node)).ok_or(metrics)
    })
}

/// Starts of VMs that the log tells of, by whether they came from the pool.
fn starts(node: &Node, from_pool: bool) -> usize {
    let log = fs::read_to_string(node.dir().join("node.log")).unwrap();
    let word = format!("from_pool={from_pool}");
    let ready = log.lines().filter(|line| line.contains("sandbox is ready"));
    ready.filter(|line| line.contains(&word)).count()
}

/// The one that has gone from the pool: the pod's.
fn assert_taken(before: &BTreeSet<u32>, after: &BTreeSet<u32>) {
    let group = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let pods: Vec<_> = after
        .iter()
        .filter(|pid| group(pid).contains("poduid-"))
        .collect();
    assert!(
        pods.iter().any(|pid| before.contains(pid)),
        "{before:?} {pods:?} of {after:?}"
    );
}

/// `nc` on the test's host, as the server of one connection. It ends with its input.
fn serve(host: &Host, port: u16, input: Stdio) -> Child {
    Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", host.name))
        .args(["busybox", "nc", "-l", "-p", &port.to_string()])
        .stdin(input)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[expect(clippy::cast_precision_loss, reason = "few bytes")]
fn assert_limit(what: &str, took: f64) {
    let of_limit = COUNTED as f64 * 8.0 / took / LIMIT;
    // Headers are counted too, and a busy machine sends less than it may, never more.
    assert!((0.75..1.1).contains(&of_limit), "{what}: {of_limit}");
}

/// What the host gets of a pod's container that sends more than it may.
async fn egress(client: &mut Client, container: &str, host: &Host) {
    let mut server = serve(host, 9001, Stdio::piped());
    let mut output = server.stdout.take().unwrap();
    let reader = tokio::task::spawn_blocking(move || {
        let mut read = |count: u64| {
            let mut part = output.by_ref().take(count);
            std::io::copy(&mut part, &mut std::io::sink()).unwrap()
        };
        read(SKIPPED);
        let begin = Instant::now();
        assert_eq!(read(COUNTED), COUNTED);
        let took = begin.elapsed();
        read(u64::MAX);
        took
    });
    let bytes = SKIPPED + COUNTED + 1_000_000;
    let send = format!(
        "for try in $(seq 500); do head -c {bytes} /dev/zero | nc 10.97.0.1 9001 2>/dev/null && break; done"
    );
    client.exec(container, &send).await;
    let took = reader.await.unwrap();
    server.wait().unwrap();
    assert_limit("egress", took.as_secs_f64());
}

/// What a pod's container gets of the host that sends more than it may. `nc` ends with its input too.
async fn ingress(client: &mut Client, container: &str, host: &Host) {
    let zeros = fs::File::open("/dev/zero").unwrap();
    let mut server = serve(host, 9002, zeros.into());
    let pull = format!(
        "mkfifo /hold; for try in $(seq 500); do nc 10.97.0.1 9002 0<>/hold 2>/dev/null | {{ \
         head -c {SKIPPED} >/dev/null; read begin x </proc/uptime; \
         [ $(head -c {COUNTED} | wc -c) = {COUNTED} ] || exit 1; \
         read end x </proc/uptime; echo $begin $end; }} && break; done"
    );
    let (text, _) = client.exec(container, &pull).await;
    server.kill().unwrap();
    server.wait().unwrap();
    let times: Vec<f64> = text
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    assert_limit("ingress", times[1] - times[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_the_pool_on_the_cluster_s_network() {
    if !can_run_pods() {
        return;
    }
    if !Path::new("/usr/lib/cni/bandwidth").exists() {
        skip("needs the package containernetworking-plugins");
        return;
    }
    let host = Host::new();
    let registry = Registry::start_in(Some(&host.name));
    let conf = tempfile::tempdir().unwrap();
    let list = json!({
        "cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true,
             "ipam": {"type": "host-local", "dataDir": conf.path().join("ipam"),
                      "ranges": [[{"subnet": "10.97.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}},
        ],
    });
    fs::write(conf.path().join("10-pods.conflist"), list.to_string()).unwrap();
    let settings = format!(
        "templates: 1\npool: 1\nmetricsAddress: {METRICS}\nnetwork:\n  driver: cni\n  cni: {{confDir: {0}, binDirs: [/usr/lib/cni]}}\n",
        conf.path().display()
    );
    let mut node = Node::start_in(Some(&host.name), "", &settings);
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let waiting = await_pool(&node, &host);

    let mut config = sandbox(&node, "one");
    let annotation = |direction: &str| format!("kubernetes.io/{direction}-bandwidth");
    config.annotations.insert(annotation("ingress"), "1".into());
    let refused = client.try_run(&config).await.unwrap_err();
    assert!(
        refused
            .message()
            .contains("config.annotations[kubernetes.io/ingress-bandwidth]"),
        "{refused}"
    );
    for direction in ["ingress", "egress"] {
        config
            .annotations
            .insert(annotation(direction), "10M".into());
    }
    let one = client.run(&config).await;
    assert_eq!((starts(&node, true), starts(&node, false)), (1, 0));
    let refilled = await_pool(&node, &host);
    assert_taken(&waiting, &refilled);
    let main = client
        .create(&one, &config, &shell("main", &image, "sleep 100000"))
        .await;
    client.start(&main).await;
    let address = client.sandbox_status(&one).await.network.unwrap().ip;
    assert!(address.starts_with("10.97.0."), "{address}");
    let (own, _) = client.exec(&main, "ip addr show eth0; ip route").await;
    assert!(
        own.contains(&format!("{address}/24")) && own.contains("default via 10.97.0.1"),
        "{own}"
    );
    egress(&mut client, &main, &host).await;
    ingress(&mut client, &main, &host).await;

    // What waits when the daemon is killed is nobody's; what a pod has stays its.
    let waiting: BTreeSet<_> = refilled.difference(&waiting).copied().collect();
    node.kill();
    node.spawn();
    let mut client = Client::of(&node).await;
    let runs = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    assert!(!waiting.iter().any(runs), "{waiting:?}");
    let (again, _) = client
        .exec(
            &main,
            "ping -c 1 -W 30 10.97.0.1 >/dev/null; ip addr show eth0",
        )
        .await;
    assert!(again.contains(&address), "{again}");
    await_pool(&node, &host);
    let other = sandbox(&node, "two");
    let two = client.run(&other).await;
    assert_eq!((starts(&node, true), starts(&node, false)), (2, 0));
    let second = client.sandbox_status(&two).await.network.unwrap().ip;
    assert!(
        second.starts_with("10.97.0.") && second != address,
        "{second}"
    );
    let (_, code) = client
        .exec(&main, &format!("ping -c 1 -W 30 {second} >/dev/null"))
        .await;
    assert_eq!(code, 0, "taps that were moved carry packets");

    for pod in [&one, &two] {
        client.stop(pod).await;
        client.remove(pod).await;
    }
    node.stop();
    eventually("nothing is left", Duration::from_secs(30), || {
        let picture = node.host_picture();
        let links = ["veth", "ifb"].map(|kind| {
            stdout(Command::new("ip").args(["-n", &host.name, "-o", "link", "show", "type", kind]))
        });
        let addresses = fs::read_dir(conf.path().join("ipam/pods"))
            .unwrap()
            .flatten();
        let leased = addresses
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("10."))
            .count();
        let clean = picture.is_clean() && links[0].lines().count() == 1 && links[1].is_empty();
        (clean && leased == 0)
            .then_some(())
            .ok_or(format!("{picture:?} {links:?} {leased} addresses"))
    });
}

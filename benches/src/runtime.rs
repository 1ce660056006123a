//! The runtime interface beside Debian's containerd with runc: what a VM for each pod costs a kubelet. And
//! podman with crun beside them.
//!
//! The first two get the same calls by the same client, with the same image and the same CNI plugins, each in
//! a network namespace of its own. A container of theirs shares the host's kernel: it is not the
//! same thing that is compared, but what isolation costs.

use std::time::Duration;

use anyhow::{Context, Result};
use hypernetes_testkit::{Node, Registry};
use serde_json::{Value, json};

use crate::{
    containerd::{Containerd, Place, shims},
    cri::Client,
    podman,
    processes::{busy_seconds, family, pss_kib, rss_kib},
    stats::{Samples, millis},
};

/// Pods whose memory is looked at.
const PODS: usize = 10;
/// Programs run in one container.
const EXECS: usize = 50;
/// Programs that a shell in the container runs one after another, for the floor, and how often.
const SPAWNS: u32 = 100;
const LOOPS: usize = 5;
const EXEC_TARGET: f64 = 1.3;

/// What was measured of one runtime.
struct Figures {
    starts: Samples,
    cpu_seconds: f64,
    stops: Samples,
    execs: Samples,
    /// Of a shell in the container, to start a program and wait for it.
    spawn: Samples,
    /// To the container's surroundings and back.
    round_trips: Samples,
    pod_kib: u64,
    daemon_kib: u64,
}

async fn one(
    client: &mut Client,
    image: &str,
    starts: usize,
    daemon: u32,
    pod_processes: impl Fn() -> Vec<u32>,
) -> Result<Figures> {
    // What the first pod alone pays for is no pod's price.
    let first = client.pod("first", image).await?;
    client.remove(&first).await?;
    let busy = busy_seconds();
    let (mut times, mut stops) = (Vec::new(), Vec::new());
    for number in 0..starts {
        let pod = client.pod(&format!("start-{number}"), image).await?;
        times.push(pod.took);
        stops.push(client.remove(&pod).await?);
    }
    let cpu_seconds = (busy_seconds() - busy) / starts as f64;
    let mut pods = Vec::new();
    for number in 0..PODS {
        pods.push(client.pod(&format!("idle-{number}"), image).await?);
    }
    let container = pods.first().context("there are pods")?.container.clone();
    let total: u64 = pod_processes().into_iter().filter_map(pss_kib).sum();
    let floor = Floor::measure(client, &container).await?;
    let mut execs = Vec::new();
    for _ in 0..EXECS {
        execs.push(client.exec(&container, &["/bin/true"]).await?);
    }
    let figures = Figures {
        starts: Samples::millis(&times),
        cpu_seconds,
        stops: Samples::millis(&stops),
        execs: Samples::millis(&execs),
        spawn: floor.spawn,
        round_trips: floor.round_trips,
        pod_kib: total / PODS as u64,
        daemon_kib: rss_kib(daemon).context("the daemon runs")?,
    };
    for pod in &pods {
        client.remove(pod).await?;
    }
    Ok(figures)
}

/// What running a program in a container takes at least.
struct Floor {
    spawn: Samples,
    round_trips: Samples,
}

impl Floor {
    async fn measure(client: &mut Client, container: &str) -> Result<Self> {
        // The same shell, with and without the programs: what else an exec takes is in both.
        let script =
            |count: u32| format!("i=0; while [ $i -lt {count} ]; do /bin/true; i=$((i+1)); done");
        let mut spawn = Vec::new();
        for _ in 0..LOOPS {
            let empty = client.exec(container, &["sh", "-c", &script(0)]).await?;
            let full = client
                .exec(container, &["sh", "-c", &script(SPAWNS)])
                .await?;
            spawn.push(millis(full.saturating_sub(empty) / SPAWNS));
        }
        let mut round_trips: Vec<Duration> = Vec::new();
        for _ in 0..EXECS {
            round_trips.push(client.stats(container).await?);
        }
        Ok(Self {
            spawn: Samples::new(spawn),
            round_trips: Samples::millis(&round_trips),
        })
    }
}

impl Figures {
    /// How much longer an exec takes than starting a program there and asking something once.
    fn exec_ratio(&self) -> f64 {
        self.execs.median() / (self.spawn.median() + self.round_trips.median())
    }

    fn print(&self, name: &str) {
        println!("{name}:");
        println!("  run, create, start: {}", self.starts.line("ms"));
        println!("  stop and remove: {}", self.stops.line("ms"));
        println!(
            "  a pod's whole life: {:.2} CPU seconds of the machine",
            self.cpu_seconds
        );
        println!("  exec of true: {}", self.execs.line("ms"));
        println!(
            "    a program in the container {:.1} ms, a question (ContainerStats) {:.1} ms; ratio {:.2} (target {EXEC_TARGET})",
            self.spawn.median(),
            self.round_trips.median(),
            self.exec_ratio()
        );
        println!(
            "  memory: {:.1} MiB (PSS) a pod of {PODS}, daemon {:.1} MiB",
            self.pod_kib as f64 / 1024.0,
            self.daemon_kib as f64 / 1024.0
        );
    }

    fn json(&self) -> Value {
        json!({
            "start_ms": self.starts.json(), "stop_ms": self.stops.json(), "cpu_seconds_per_pod": self.cpu_seconds,
            "exec_ms": self.execs.json(), "spawn_ms": self.spawn.json(), "round_trip_ms": self.round_trips.json(),
            "exec_ratio": self.exec_ratio(), "pss_kib_per_pod": self.pod_kib, "daemon_rss_kib": self.daemon_kib,
        })
    }
}

pub(crate) async fn measure(starts: usize) -> Result<Value> {
    println!("\n== the runtime interface, beside containerd with runc");
    let ours = {
        let place = Place::new("own", "10.66.0.0/16")?;
        let registry = Registry::start_in(Some(&place.name));
        let settings = format!(
            "network:\n  driver: cni\n  cni: {{confDir: {}, binDirs: [/usr/lib/cni]}}\n",
            place.conf.path().display()
        );
        let mut node = Node::start_in(Some(&place.name), "", &settings);
        let mut client = Client::connect(node.socket()).await?;
        let image = registry.image("busybox:1");
        client.pull(&image).await?;
        let figures = one(&mut client, &image, starts, node.pid(), || {
            node.vmm_processes()
        })
        .await?;
        node.stop();
        figures
    };
    ours.print("hypernetes");
    let theirs = {
        let place = Place::new("cd", "10.67.0.0/16")?;
        let registry = Registry::start_in(Some(&place.name));
        let pause = registry.image("busybox:pause");
        let containerd = Containerd::start(&place, &pause)?;
        let mut client = Client::connect(containerd.dir.path().join("c.sock")).await?;
        let image = registry.image("busybox:1");
        client.pull(&pause).await?;
        client.pull(&image).await?;
        let dir = containerd.dir.path().to_owned();
        let daemon = containerd.child.id();
        one(&mut client, &image, starts, daemon, || family(&shims(&dir))).await?
    };
    theirs.print("containerd and runc");
    let ratio = |own: f64, other: f64| own / other;
    println!(
        "ratios: start {:.2}, CPU {:.2}, exec {:.2}, memory {:.2}",
        ratio(ours.starts.median(), theirs.starts.median()),
        ratio(ours.cpu_seconds, theirs.cpu_seconds),
        ratio(ours.execs.median(), theirs.execs.median()),
        ratio(ours.pod_kib as f64, theirs.pod_kib as f64),
    );
    let podman = tokio::task::spawn_blocking(move || podman::measure(starts)).await??;
    Ok(json!({"hypernetes": ours.json(), "containerd": theirs.json(), "podman": podman}))
}

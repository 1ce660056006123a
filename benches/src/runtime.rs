//! The runtime interface beside Debian's containerd with runc: what a VM for each pod costs a kubelet.
//!
//! Both get the same calls by the same client, with the same image and the same CNI plugins, each in
//! a network namespace of its own. A container of containerd shares the host's kernel: it is not the
//! same thing that is compared, but what isolation costs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hyper_util::rt::TokioIo;
use hypernetes_cri::v1::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use hypernetes_testkit::{Node, Registry, eventually, run};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::stats::{Samples, pss_kib, rss_kib};

/// Pods whose memory is looked at.
const PODS: usize = 10;
/// Programs run in one container.
const EXECS: usize = 50;
const PATIENCE: Duration = Duration::from_secs(60);

/// A network namespace with CNI plugins of its own; ends with the value.
struct Place {
    name: String,
    conf: tempfile::TempDir,
}

impl Place {
    fn new(kind: &str, subnet: &str) -> Result<Self> {
        let place = Self {
            name: format!("hnbench-{kind}-{}", std::process::id()),
            conf: tempfile::tempdir()?,
        };
        run(Command::new("ip").args(["netns", "add", &place.name]));
        run(Command::new("ip").args(["-n", &place.name, "link", "set", "lo", "up"]));
        let list = json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [{
            "type": "bridge", "bridge": "cni0", "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": place.conf.path().join("ipam"),
                     "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }]});
        fs::write(place.conf.path().join("10-pods.conflist"), list.to_string())?;
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ended = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
        if !ended.is_ok_and(|status| status.success()) {
            println!("network namespace {} is left", self.name);
        }
    }
}

/// Debian's containerd with directories of its own.
struct Containerd {
    dir: tempfile::TempDir,
    child: Child,
}

impl Containerd {
    fn start(place: &Place, pause: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {pause:?}\nrestrict_oom_score_adj = true\n\
             disable_apparmor = true\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = {:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            at("root"),
            at("state"),
            at("c.sock"),
            at("t.sock"),
            place.conf.path().display().to_string(),
            at("opt"),
        );
        fs::write(dir.path().join("config.toml"), config)?;
        let log = fs::File::create(dir.path().join("log"))?;
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", place.name))
            .args(["containerd", "--config"])
            .arg(dir.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd (Debian's package)")?;
        let socket = dir.path().join("c.sock");
        let containerd = Self { dir, child };
        eventually("containerd serves its socket", PATIENCE, || {
            std::os::unix::net::UnixStream::connect(&socket)
                .map(drop)
                .map_err(|error| error.to_string())
        });
        Ok(containerd)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Its pods were removed; what a failed run leaves is named.
        self.child.kill().ok();
        self.child.wait().ok();
        for pid in shims(self.dir.path()) {
            println!("a shim is left: process {pid}");
        }
    }
}

/// Processes of shims of this containerd.
fn shims(dir: &Path) -> Vec<u32> {
    let mark = dir.display().to_string();
    processes(|line| line.contains("containerd-shim") && line.contains(&mark))
}

fn processes(wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            wanted(&String::from_utf8_lossy(&line))
        })
        .collect()
}

/// A process and all that it and they started.
fn family(parents: &[u32]) -> Vec<u32> {
    let mut all = parents.to_vec();
    loop {
        let children = processes(|_| true).into_iter().filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            let parent = after_name.split_whitespace().nth(1);
            !all.contains(pid)
                && parent
                    .and_then(|pid| pid.parse().ok())
                    .is_some_and(|pid| all.contains(&pid))
        });
        let children: Vec<u32> = children.collect();
        if children.is_empty() {
            return all;
        }
        all.extend(children);
    }
}

/// Seconds that all cores of the machine have worked. On an idle machine a difference is what was
/// done meanwhile, by whichever process.
fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    // user, nice, system, irq, softirq (proc_stat(5)).
    Ok([0, 1, 2, 5, 6]
        .iter()
        .filter_map(|at| ticks.get(*at))
        .sum::<f64>()
        / 100.0)
}

struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    logs: tempfile::TempDir,
}

/// A pod with one container.
struct Pod {
    sandbox: String,
    container: String,
    /// Of RunPodSandbox, CreateContainer and StartContainer together.
    took: Duration,
}

impl Client {
    async fn connect(socket: PathBuf) -> Result<Self> {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            logs: tempfile::tempdir()?,
        })
    }

    async fn pull(&mut self, image: &str) -> Result<()> {
        let image = v1::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        };
        let request = v1::PullImageRequest {
            image: Some(image),
            ..Default::default()
        };
        self.images.pull_image(request).await?;
        Ok(())
    }

    async fn pod(&mut self, name: &str, image: &str) -> Result<Pod> {
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs.path().join(name).display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        let watch = Instant::now();
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let sandbox = self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata {
                    name: "main".to_owned(),
                    attempt: 0,
                }),
                image: Some(v1::ImageSpec {
                    image: image.to_owned(),
                    ..Default::default()
                }),
                command: vec!["sleep".to_owned(), "100000".to_owned()],
                log_path: "main.log".to_owned(),
                linux: Some(v1::LinuxContainerConfig::default()),
                ..Default::default()
            }),
            sandbox_config: Some(config),
        };
        let container = self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id;
        let request = v1::StartContainerRequest {
            container_id: container.clone(),
        };
        self.runtime.start_container(request).await?;
        Ok(Pod {
            sandbox,
            container,
            took: watch.elapsed(),
        })
    }

    async fn exec(&mut self, container: &str) -> Result<Duration> {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: vec!["true".to_owned()],
            timeout: 60,
        };
        let watch = Instant::now();
        let answer = self.runtime.exec_sync(request).await?.into_inner();
        ensure!(answer.exit_code == 0, "true failed");
        Ok(watch.elapsed())
    }

    async fn remove(&mut self, pod: &Pod) -> Result<()> {
        let pod_sandbox_id = pod.sandbox.clone();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id };
        self.runtime.stop_pod_sandbox(request).await?;
        let pod_sandbox_id = pod.sandbox.clone();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.remove_pod_sandbox(request).await?;
        Ok(())
    }
}

fn millis(times: &[Duration]) -> Samples {
    Samples::new(
        times
            .iter()
            .map(|time| time.as_secs_f64() * 1000.0)
            .collect(),
    )
}

/// What was measured of one runtime.
struct Figures {
    starts: Samples,
    cpu_seconds: f64,
    execs: Samples,
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
    let busy = busy_seconds()?;
    let mut times = Vec::new();
    for number in 0..starts {
        let pod = client.pod(&format!("start-{number}"), image).await?;
        times.push(pod.took);
        client.remove(&pod).await?;
    }
    let cpu_seconds = (busy_seconds()? - busy) / starts as f64;
    let mut pods = Vec::new();
    for number in 0..PODS {
        pods.push(client.pod(&format!("idle-{number}"), image).await?);
    }
    let container = pods.first().context("there are pods")?.container.clone();
    let mut execs = Vec::new();
    for _ in 0..EXECS {
        execs.push(client.exec(&container).await?);
    }
    let total: u64 = pod_processes().into_iter().filter_map(pss_kib).sum();
    let figures = Figures {
        starts: millis(&times),
        cpu_seconds,
        execs: millis(&execs),
        pod_kib: total / PODS as u64,
        daemon_kib: rss_kib(daemon).context("the daemon runs")?,
    };
    for pod in &pods {
        client.remove(pod).await?;
    }
    Ok(figures)
}

impl Figures {
    fn print(&self, name: &str) {
        println!("{name}:");
        println!("  run, create, start: {}", self.starts.line("ms"));
        println!(
            "  a pod's whole life: {:.2} CPU seconds of the machine",
            self.cpu_seconds
        );
        println!("  exec of true: {}", self.execs.line("ms"));
        println!(
            "  memory: {:.1} MiB (PSS) a pod of {PODS}, daemon {:.1} MiB",
            self.pod_kib as f64 / 1024.0,
            self.daemon_kib as f64 / 1024.0
        );
    }

    fn json(&self) -> Value {
        json!({
            "start_ms": self.starts.json(), "cpu_seconds_per_pod": self.cpu_seconds,
            "exec_ms": self.execs.json(), "pss_kib_per_pod": self.pod_kib, "daemon_rss_kib": self.daemon_kib,
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
    Ok(json!({"hypernetes": ours.json(), "containerd": theirs.json()}))
}

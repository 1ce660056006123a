//! Request → first byte of a container's output, beside the bare boot, in turns.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hypernetes_testkit::{Daemon, DaemonOptions, Registry, run};
use serde_json::{Value, json};

use crate::{
    bare::Bare,
    client::{Connection, Endpoint},
    stats::{Samples, cpu_seconds},
};

/// A daemon with an image in its store.
struct Node {
    daemon: Daemon,
    connection: Connection,
    image: String,
    /// Milliseconds from the request to the first byte, and of the daemon's own CPU time.
    pods: Vec<f64>,
    cpu: Vec<f64>,
}

impl Node {
    async fn new(registry: &Registry, args: &[&str]) -> Result<Self> {
        let image = registry.image("busybox:1");
        let options = DaemonOptions {
            args: args.iter().map(Into::into).collect(),
            ..DaemonOptions::default()
        };
        let name = image.clone();
        let daemon = tokio::task::spawn_blocking(move || {
            let daemon = Daemon::start(options);
            run(&mut daemon.hypernetes(&["image", "pull", "-q", &name]));
            daemon
        })
        .await?;
        let connection = Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?
            .connect()
            .await?;
        Ok(Self {
            daemon,
            connection,
            image,
            pods: Vec::new(),
            cpu: Vec::new(),
        })
    }

    async fn start_one(&mut self, number: usize) -> Result<()> {
        let before = cpu_seconds(self.daemon.pid()).unwrap_or(0.0);
        let name = format!("start-{number}");
        let took = pod(&mut self.connection, &self.daemon, &name, &self.image).await?;
        let spent = cpu_seconds(self.daemon.pid()).unwrap_or(0.0) - before;
        delete(&mut self.connection, &self.daemon, &name).await?;
        // The first two warm the page cache.
        if number >= 2 {
            self.pods.push(took.as_secs_f64() * 1e3);
            self.cpu.push(spent * 1e3);
        }
        Ok(())
    }
}

pub(crate) async fn measure(starts: usize) -> Result<Value> {
    println!(
        "\n== start of a pod: API request → first byte of its output ({starts} times, in turns with bare boots)"
    );
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut cold = Node::new(&registry, &["--templates", "0"]).await?;
    // A pod that stays: its VMM's command line is what the bare VMM gets.
    let image = cold.image.clone();
    pod(&mut cold.connection, &cold.daemon, "reference", &image).await?;
    let pid = *cold.daemon.vmm_processes().first().context("a VMM runs")?;
    let bare = Bare::prepare(pid)?;
    let mut warm = Node::new(&registry, &[]).await?;
    warm.daemon.wait_template();
    let mut boots = Vec::new();
    for number in 0..starts + 2 {
        let boot = bare.boot()?.boot.as_secs_f64() * 1e3;
        cold.start_one(number).await?;
        warm.start_one(number).await?;
        if number >= 2 {
            boots.push(boot);
        }
    }
    let boots = Samples::new(boots);
    println!("bare boot:         {}", boots.line("ms"));
    let mut result = json!({"bare_ms": boots.json(), "bare_command": bare.command_line()});
    for (name, node) in [("template", &warm), ("boot", &cold)] {
        let pods = Samples::new(node.pods.clone());
        let cpu = Samples::new(node.cpu.clone());
        let ratio = pods.median() / boots.median();
        println!("pod from {name:9} {}", pods.line("ms"));
        println!(
            "    ratio of medians: {ratio:.2} (target 1.5); CPU of the daemon for one start: median {:.0} ms",
            cpu.median()
        );
        result[name] = json!({"pod_ms": pods.json(), "daemon_cpu_ms": cpu.json(), "ratio": ratio});
    }
    tokio::task::spawn_blocking(move || drop((cold.daemon, warm.daemon, registry))).await?;
    Ok(result)
}

/// Creates a pod that writes its own name, and returns the time until that is in its log.
pub(crate) async fn pod(
    connection: &mut Connection,
    daemon: &Daemon,
    name: &str,
    image: &str,
) -> Result<Duration> {
    let body = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "c", "image": image, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", format!("echo {name}; exec sleep 100000")],
            }],
        },
    });
    let started = Instant::now();
    let answer = connection
        .request(
            "POST",
            "/api/v1/namespaces/default/pods",
            Some(body.to_string()),
        )
        .await?;
    let created: Value = serde_json::from_slice(&answer)?;
    let uid = created["metadata"]["uid"]
        .as_str()
        .context("uid")?
        .to_owned();
    let logs = daemon.state_dir().join("logs");
    loop {
        if let Some(path) = log_file(&logs, &uid)
            && fs::read_to_string(path).is_ok_and(|log| log.contains(name))
        {
            return Ok(started.elapsed());
        }
        if started.elapsed() > Duration::from_secs(120) {
            bail!("{name} wrote nothing within 120 s\n{}", daemon.log_tail());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The first log file of the pod with this uid.
fn log_file(logs: &Path, uid: &str) -> Option<PathBuf> {
    let pod = fs::read_dir(logs)
        .ok()?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().ends_with(uid))?;
    let container = fs::read_dir(pod.path()).ok()?.flatten().next()?;
    fs::read_dir(container.path())
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "log"))
}

/// Deletes a pod and waits until its VM is gone too.
pub(crate) async fn delete(connection: &mut Connection, daemon: &Daemon, name: &str) -> Result<()> {
    let before = daemon.vmm_processes().len();
    let path = format!("/api/v1/namespaces/default/pods/{name}?gracePeriodSeconds=0");
    connection.request("DELETE", &path, None).await?;
    let started = Instant::now();
    while daemon.vmm_processes().len() >= before {
        if started.elapsed() > Duration::from_secs(60) {
            bail!("the VM of {name} is still there");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

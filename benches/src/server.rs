//! A daemon with an image in its store, and pods of it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use hypernetes_testkit::{Daemon, DaemonOptions, Registry, release_dir, run, stdout};
use hypernetes_types::kinds::{SUSPENDED_ANNOTATION, SUSPENDED_CONDITION};
use serde_json::{Value, json};

use crate::{
    client::{Connection, Endpoint},
    processes::tree_cpu_seconds,
};

/// Longer takes no start and no end of a pod.
const PATIENCE: Duration = Duration::from_secs(180);
const PODS: &str = "/api/v1/namespaces/default/pods";

/// Whether the daemon can keep VMs that wait for a pod.
pub(crate) fn has_pool() -> bool {
    let mut help = std::process::Command::new(release_dir().join("hypernetes"));
    stdout(help.args(["up", "--help"])).contains("--pool ")
}

/// A running daemon.
pub(crate) struct Server {
    pub(crate) daemon: Daemon,
    endpoint: Endpoint,
    connection: Connection,
    pub(crate) image: String,
    /// What its templates take together, in KiB, if it has any.
    pub(crate) template_kib: u64,
}

impl Server {
    /// Starts a daemon that boots its pods.
    pub(crate) async fn booting(registry: &Registry) -> Result<Self> {
        Self::start(registry, &["--templates", "0"]).await
    }

    /// Starts a daemon whose pods come from a template, and waits for that.
    pub(crate) async fn with_template(registry: &Registry, args: &[&str]) -> Result<Self> {
        let mut server = Self::start(registry, args).await?;
        server.template_kib = server.daemon.wait_template();
        Ok(server)
    }

    async fn start(registry: &Registry, args: &[&str]) -> Result<Self> {
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
        let endpoint = Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?;
        let connection = endpoint.connect().await?;
        Ok(Self {
            daemon,
            endpoint,
            connection,
            image,
            template_kib: 0,
        })
    }

    async fn request(&mut self, method: &str, path: &str, body: Option<String>) -> Result<Bytes> {
        if self.connection.is_closed() {
            self.connection = self.endpoint.connect().await?;
        }
        self.connection.request(method, path, body).await
    }

    /// CPU seconds of the daemon, its VMMs and all that it ever started.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        tree_cpu_seconds(self.daemon.pid(), &self.daemon.vmm_processes())
    }

    /// Starts a pod that writes its own name, and returns the time until that is in its log.
    pub(crate) async fn pod(&mut self, name: &str) -> Result<Duration> {
        let took = self.pods(&[name.to_owned()]).await?;
        took.first().copied().context("one pod was started")
    }

    /// The same of pods at once: the times until each of them has written.
    pub(crate) async fn pods(&mut self, names: &[String]) -> Result<Vec<Duration>> {
        let started = Instant::now();
        let mut waiting = Vec::new();
        for name in names {
            let body = pod(name, &self.image, &json!({}));
            let uid = self.create(&body).await?;
            waiting.push((name.clone(), uid));
        }
        let mut times = Vec::new();
        let logs = self.daemon.state_dir().join("logs");
        while !waiting.is_empty() {
            waiting.retain(|(name, uid)| {
                let written = log_file(&logs, uid).is_some_and(|path| {
                    fs::read_to_string(path).is_ok_and(|log| log.contains(name))
                });
                if written {
                    times.push(started.elapsed());
                }
                !written
            });
            if started.elapsed() > PATIENCE {
                bail!(
                    "{waiting:?} wrote nothing within {PATIENCE:?}\n{}",
                    self.daemon.log_tail()
                );
            }
            // Looking after many takes time from them.
            let pause = u64::try_from(waiting.len()).unwrap_or(20).clamp(2, 20);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Ok(times)
    }

    /// Waits until this many VMs run and do nothing.
    pub(crate) async fn wait_idle_vms(&self, count: usize) -> Result<()> {
        const QUIET: Duration = Duration::from_millis(500);
        let started = Instant::now();
        loop {
            let (vms, before) = (self.daemon.vmm_processes().len(), self.cpu_seconds());
            tokio::time::sleep(QUIET).await;
            if vms == count && self.cpu_seconds() - before < QUIET.as_secs_f64() / 10.0 {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                bail!(
                    "{vms} VMs run, or are busy, and not {count}\n{}",
                    self.daemon.log_tail()
                );
            }
        }
    }

    /// Creates a pod and returns its uid.
    pub(crate) async fn create(&mut self, pod: &Value) -> Result<String> {
        let answer = self.request("POST", PODS, Some(pod.to_string())).await?;
        let created: Value = serde_json::from_slice(&answer)?;
        Ok(created["metadata"]["uid"]
            .as_str()
            .context("uid")?
            .to_owned())
    }

    /// Waits until a pod has some phase.
    pub(crate) async fn wait_phase(&mut self, name: &str, phase: &str) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = self.request("GET", &format!("{PODS}/{name}"), None).await?;
            let pod: Value = serde_json::from_slice(&answer)?;
            if pod["status"]["phase"] == phase {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                bail!("{name} is not {phase}: {}", pod["status"]);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Has a pod's memory go to the disk, and waits until no VM is left of it.
    pub(crate) async fn suspend(&mut self, name: &str) -> Result<()> {
        let vms = self.daemon.vmm_processes().len();
        self.set_suspended(name, true).await?;
        self.wait_suspended(name, Some("True")).await?;
        anyhow::ensure!(self.daemon.vmm_processes().len() < vms, "its VM is there");
        Ok(())
    }

    /// Has it go on, and returns the time until its processes do.
    pub(crate) async fn resume(&mut self, name: &str) -> Result<Duration> {
        let started = Instant::now();
        self.set_suspended(name, false).await?;
        self.wait_suspended(name, None).await?;
        Ok(started.elapsed())
    }

    async fn set_suspended(&mut self, name: &str, suspended: bool) -> Result<()> {
        let wish =
            json!({"metadata": {"annotations": {SUSPENDED_ANNOTATION: suspended.to_string()}}});
        let path = format!("{PODS}/{name}");
        self.request("PATCH", &path, Some(wish.to_string())).await?;
        Ok(())
    }

    /// Waits until the condition has this status, or is gone.
    async fn wait_suspended(&mut self, name: &str, status: Option<&str>) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = self.request("GET", &format!("{PODS}/{name}"), None).await?;
            let pod: Value = serde_json::from_slice(&answer)?;
            let conditions = pod["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            let found = conditions.find(|condition| condition["type"] == SUSPENDED_CONDITION);
            if found.and_then(|found| found["status"].as_str()) == status {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                bail!("{name} is not as was asked: {found:?}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Deletes pods and waits until their VMs are gone too. Returns how long it took.
    pub(crate) async fn delete(&mut self, names: &[String]) -> Result<Duration> {
        let before = self.daemon.vmm_processes();
        let started = Instant::now();
        for name in names {
            let path = format!("{PODS}/{name}?gracePeriodSeconds=0");
            self.request("DELETE", &path, None).await?;
        }
        // One that has ended but has not been waited for is nobody's CPU time yet.
        let gone = |pid: &&u32| !Path::new(&format!("/proc/{pid}")).exists();
        while before.iter().filter(gone).count() < names.len() {
            if started.elapsed() > PATIENCE {
                bail!(
                    "VMs of {names:?} are still there\n{}",
                    self.daemon.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(started.elapsed())
    }

    /// Ends the daemon and its VMs.
    pub(crate) async fn end(self) -> Result<()> {
        Ok(tokio::task::spawn_blocking(move || drop(self.daemon)).await?)
    }
}

/// A pod that writes its own name and sleeps. `resources`: of its container.
pub(crate) fn pod(name: &str, image: &str, resources: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "c", "image": image, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", format!("echo {name}; exec sleep 100000")],
                "resources": resources,
            }],
        },
    })
}

/// Names for some pods.
pub(crate) fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("{prefix}-{number}"))
        .collect()
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

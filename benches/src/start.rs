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

pub(crate) async fn measure(starts: usize) -> Result<Value> {
    println!(
        "\n== start of a pod: API request → first byte of its output ({starts} times, in turns with bare boots)"
    );
    let (registry, daemon) = tokio::task::spawn_blocking(|| {
        let registry = Registry::start();
        let daemon = Daemon::start(DaemonOptions::default());
        run(&mut daemon.hypernetes(&["image", "pull", "-q", &registry.image("busybox:1")]));
        (registry, daemon)
    })
    .await?;
    let endpoint = Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?;
    let mut connection = endpoint.connect().await?;
    let image = registry.image("busybox:1");
    // A pod that stays: its VMM's command line is what the bare VMM gets.
    pod(&mut connection, &daemon, "reference", &image).await?;
    let pid = *daemon.vmm_processes().first().context("a VMM runs")?;
    let bare = Bare::prepare(pid)?;
    let (mut pods, mut boots, mut daemon_cpu) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..starts + 2 {
        let boot = bare.boot()?.boot.as_secs_f64() * 1e3;
        let before = cpu_seconds(daemon.pid()).unwrap_or(0.0);
        let name = format!("start-{number}");
        let took = pod(&mut connection, &daemon, &name, &image)
            .await?
            .as_secs_f64()
            * 1e3;
        let spent = cpu_seconds(daemon.pid()).unwrap_or(0.0) - before;
        delete(&mut connection, &daemon, &name).await?;
        // The first two warm the page cache.
        if number >= 2 {
            boots.push(boot);
            pods.push(took);
            daemon_cpu.push(spent * 1e3);
        }
    }
    let (pods, boots, daemon_cpu) = (
        Samples::new(pods),
        Samples::new(boots),
        Samples::new(daemon_cpu),
    );
    println!("bare boot: {}", boots.line("ms"));
    println!("pod:       {}", pods.line("ms"));
    println!(
        "ratio of medians: {:.2} (target 1.5)",
        pods.median() / boots.median()
    );
    println!(
        "CPU of the daemon for one start: median {:.0} ms",
        daemon_cpu.median()
    );
    let result = json!({
        "pod_ms": pods.json(), "bare_ms": boots.json(), "daemon_cpu_ms": daemon_cpu.json(),
        "ratio": pods.median() / boots.median(), "bare_command": bare.command_line(),
    });
    tokio::task::spawn_blocking(move || drop((daemon, registry))).await?;
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

//! The API server with the objects of a large cluster: 10,000 pods, 20,000 other objects, 1,000 watchers,
//! and its start with 50,000.
//!
//! The pods wait behind a scheduling gate, so that they cost the API server what running ones do and no
//! virtual machine.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hypernetes_testkit::{Daemon, DaemonOptions};
use serde_json::{Value, json};

use crate::{
    api::{load, timed_lists},
    client::Endpoint,
    fan_out::{self, CONFIG_MAP, FanOut, LEASE, WATCHERS},
    processes::{cpu_seconds, rss_kib},
    stats::Samples,
};

const PODS: usize = 10_000;
const OTHERS: usize = 20_000;
/// With the pods and the others: 50,000.
const MORE: usize = 20_000;
/// Watches that wait, over few connections, as the informers of a program share one.
const IDLE_WATCHES: usize = 10_000;
const WATCHES_OF_A_CONNECTION: usize = 100;

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== API server with {PODS} pods and {OTHERS} other objects");
    let (daemon, empty) = tokio::task::spawn_blocking(|| -> Result<_> {
        let mut daemon = Daemon::start(DaemonOptions::default());
        daemon.stop();
        let empty = restart(&mut daemon)?;
        Ok((daemon, empty))
    })
    .await??;
    println!("start to /readyz, empty: {:.0} ms", empty * 1e3);
    let endpoint = Arc::new(Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?);
    let (pod_rate, pods) = load(&endpoint, PODS, |number| {
        (
            "POST",
            "/api/v1/namespaces/default/pods".to_owned(),
            Some(pod(number)),
        )
    })
    .await?;
    println!("creates of pods: {pod_rate:.0}/s, {}", pods.line("ms"));
    config_maps(&endpoint, "other", OTHERS).await?;
    let loaded = rss_kib(daemon.pid()).context("the daemon runs")?;
    settle(daemon.pid()).await?;
    let with_objects = rss_kib(daemon.pid()).context("the daemon runs")?;
    println!(
        "resident memory: {} MiB after the last create, {} MiB when the controllers have come to rest",
        loaded / 1024,
        with_objects / 1024
    );

    let mut connection = endpoint.connect().await?;
    let (lists, bytes) = timed_lists(&mut connection, "/api/v1/namespaces/default/pods").await?;
    settle(daemon.pid()).await?;
    let after_lists = rss_kib(daemon.pid()).context("the daemon runs")?;
    println!(
        "list of {PODS} pods, {:.1} MB: {}; {} MiB more afterwards",
        bytes as f64 / 1e6,
        lists.line("ms"),
        after_lists.saturating_sub(with_objects) / 1024
    );

    let mut heard = Vec::new();
    for watched in [&CONFIG_MAP, &LEASE] {
        let fan = fan_out::measure(&endpoint, watched, daemon.pid()).await?;
        println!(
            "from sending a write of a {} to each of {WATCHERS} watchers: {}, p99 {:.1} ms; CPU of the daemon \
             {:.1} us for each; such a write without watchers: {}",
            watched.kind,
            fan.heard.line("ms"),
            fan.heard.quantile(0.99),
            fan.cpu_us,
            fan.alone.line("ms"),
        );
        heard.push(fan);
    }
    let idle = idle_watches(&endpoint, daemon.pid()).await?;
    println!("{IDLE_WATCHES} idle watches: {} MiB", idle / 1024);

    config_maps(&endpoint, "more", MORE).await?;
    drop(connection);
    let (daemon, full) = tokio::task::spawn_blocking(move || -> Result<_> {
        let mut daemon = daemon;
        let full = (0..3)
            .map(|_| {
                daemon.stop();
                restart(&mut daemon)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok((daemon, Samples::new(full)))
    })
    .await??;
    let objects = PODS + OTHERS + MORE;
    println!(
        "start to /readyz with {objects} objects: {}",
        full.line("s")
    );
    let after_start = rss_kib(daemon.pid()).context("the daemon runs")?;
    settle(daemon.pid()).await?;
    let after_reading = rss_kib(daemon.pid()).context("the daemon runs")?;
    println!(
        "resident memory then: {} MiB, {} MiB when the controllers have read them",
        after_start / 1024,
        after_reading / 1024
    );
    tokio::task::spawn_blocking(move || drop(daemon)).await?;
    Ok(json!({
        "start_empty_seconds": empty,
        "pod_creates_per_second": pod_rate,
        "rss_kib_after_last_create": loaded,
        "rss_kib_with_objects": with_objects,
        "list_ms": lists.json(),
        "list_bytes": bytes,
        "rss_kib_after_lists": after_lists,
        "watch": heard.iter().map(FanOut::json).collect::<Vec<_>>(),
        "idle_watches_kib": idle,
        "start_seconds": full.json(),
        "rss_kib_after_start": after_start,
        "rss_kib_after_reading": after_reading,
    }))
}

/// Waits until the daemon has next to nothing to do: what a client's requests have set off is no part of what they cost.
async fn settle(pid: u32) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(120);
    let mut before = cpu_seconds(pid).context("the daemon runs")?;
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = cpu_seconds(pid).context("the daemon runs")?;
        if now - before < 0.1 {
            return Ok(());
        }
        before = now;
    }
    println!("the daemon has not come to rest within two minutes");
    Ok(())
}

/// Starts a daemon that was stopped; seconds until `/readyz` says yes.
fn restart(daemon: &mut Daemon) -> Result<f64> {
    let endpoint = Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?;
    let started = Instant::now();
    daemon.spawn();
    let ready = async {
        loop {
            if let Ok(mut connection) = endpoint.connect().await
                && connection.request("GET", "/readyz", None).await.is_ok()
            {
                return started.elapsed().as_secs_f64();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::runtime::Handle::current()
        .block_on(async { tokio::time::timeout(Duration::from_secs(120), ready).await })
        .context("the daemon is not ready after two minutes")
}

/// What a pod of a Deployment looks like, at a gate.
fn pod(number: usize) -> String {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("web-7d4b9c6f5-{number:05}"),
            "labels": {"app": "web", "pod-template-hash": "7d4b9c6f5", "tier": "front"},
            "annotations": {"example.com/config-hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"},
        },
        "spec": {
            "schedulingGates": [{"name": "example.com/bench"}],
            "containers": [{
                "name": "web", "image": "registry.example.com/team/web:1.27.3",
                "args": ["--listen=:8080", "--upstream=http://api:8080", "--log-level=info"],
                "ports": [{"containerPort": 8080, "name": "http"}],
                "env": [
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "REGION", "value": "eu-central"},
                ],
                "resources": {"requests": {"cpu": "1m", "memory": "1Ki"}, "limits": {"cpu": "500m", "memory": "128Mi"}},
                "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 5},
            }],
        },
    })
    .to_string()
}

async fn config_maps(endpoint: &Arc<Endpoint>, prefix: &'static str, count: usize) -> Result<()> {
    load(endpoint, count, move |number| {
        let body = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": format!("{prefix}-{number}")},
            "data": {"payload": "x".repeat(600)},
        });
        (
            "POST",
            "/api/v1/namespaces/default/configmaps".to_owned(),
            Some(body.to_string()),
        )
    })
    .await?;
    Ok(())
}

/// What watches that hear nothing cost the server, in KiB.
async fn idle_watches(endpoint: &Arc<Endpoint>, server: u32) -> Result<u64> {
    let before = rss_kib(server).context("the daemon runs")?;
    let version = {
        let list = endpoint
            .connect()
            .await?
            .request("GET", "/api/v1/namespaces/default/secrets", None)
            .await?;
        let list: Value = serde_json::from_slice(&list)?;
        match list["metadata"]["resourceVersion"].as_str() {
            Some(version) => version.to_owned(),
            None => bail!("a list without resourceVersion"),
        }
    };
    let path = format!(
        "/api/v1/namespaces/default/secrets?watch=true&resourceVersion={version}&timeoutSeconds=3600"
    );
    let mut open = Vec::with_capacity(IDLE_WATCHES);
    for _ in 0..IDLE_WATCHES / WATCHES_OF_A_CONNECTION {
        let connection = endpoint.connect_multiplexed().await?;
        for _ in 0..WATCHES_OF_A_CONNECTION {
            open.push(connection.watch(&path).await?);
        }
    }
    let after = rss_kib(server).context("the daemon runs")?;
    drop(open);
    Ok(after.saturating_sub(before))
}

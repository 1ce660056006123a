//! The API server under load: 64 clients over TLS, each with a connection of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hypernetes_testkit::{Daemon, DaemonOptions};
use serde_json::{Value, json};

use crate::{
    client::{Connection, Endpoint},
    processes::rss_kib,
    stats::Samples,
};

const CLIENTS: usize = 64;
const CREATES: usize = 20_000;
const GETS: usize = 40_000;
const LISTS: usize = 10;

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== API server: {CLIENTS} clients over TLS, one machine for both sides");
    let started = Instant::now();
    let daemon = tokio::task::spawn_blocking(|| Daemon::start(DaemonOptions::default())).await?;
    let ready = started.elapsed();
    let endpoint = Arc::new(Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?);
    let idle = rss_kib(daemon.pid()).context("the daemon runs")?;
    println!(
        "start of the daemon to /readyz (kubectl's start included): {:.2} s",
        ready.as_secs_f64()
    );
    println!("resident memory, idle: {} MiB", idle / 1024);

    let (create_rate, creates) = load(&endpoint, CREATES, |number| {
        let body = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": format!("bench-{number}"), "labels": {"bench": "yes"}},
            "data": {"payload": "x".repeat(600)},
        });
        (
            "POST",
            "/api/v1/namespaces/default/configmaps".to_owned(),
            Some(body.to_string()),
        )
    })
    .await?;
    println!(
        "durable creates: {create_rate:.0}/s, {}",
        creates.line("ms")
    );

    let (get_rate, gets) = load(&endpoint, GETS, |number| {
        let path = format!(
            "/api/v1/namespaces/default/configmaps/bench-{}",
            number % CREATES
        );
        ("GET", path, None)
    })
    .await?;
    println!("gets: {get_rate:.0}/s, {}", gets.line("ms"));

    let mut single = endpoint.connect().await?;
    let mut alone = Vec::new();
    for number in 0..500 {
        let path = format!("/api/v1/namespaces/default/configmaps/bench-{number}");
        let started = Instant::now();
        single.request("GET", &path, None).await?;
        alone.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let alone = Samples::new(alone);
    println!(
        "get by one client, idle server: median {:.2} ms, p99 {:.2} ms",
        alone.median(),
        alone.quantile(0.99)
    );

    let before_lists = rss_kib(daemon.pid()).context("the daemon runs")?;
    let (lists, bytes) = timed_lists(&mut single, "/api/v1/namespaces/default/configmaps").await?;
    let after_lists = rss_kib(daemon.pid()).context("the daemon runs")?;
    println!(
        "list of {CREATES} objects, {:.1} MB: {}",
        bytes as f64 / 1e6,
        lists.line("ms")
    );
    println!(
        "resident memory with {CREATES} objects: {} MiB; {} MiB after the lists",
        before_lists / 1024,
        after_lists / 1024
    );
    drop(single);
    let result = json!({
        "ready_seconds": ready.as_secs_f64(),
        "idle_rss_kib": idle,
        "creates_per_second": create_rate,
        "create_ms": creates.json(),
        "gets_per_second": get_rate,
        "get_p99_ms": gets.quantile(0.99),
        "get_alone_ms": alone.json(),
        "list_ms": lists.json(),
        "list_bytes": bytes,
        "rss_kib_with_objects": before_lists,
        "rss_kib_after_lists": after_lists,
    });
    tokio::task::spawn_blocking(move || drop(daemon)).await?;
    Ok(result)
}

/// Milliseconds of each of some lists, and the bytes of the last.
pub(crate) async fn timed_lists(
    connection: &mut Connection,
    path: &str,
) -> Result<(Samples, usize)> {
    let mut times = Vec::new();
    let mut bytes = 0;
    for _ in 0..LISTS {
        let started = Instant::now();
        bytes = connection.request("GET", path, None).await?.len();
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok((Samples::new(times), bytes))
}

/// Runs `total` requests over all clients; rate and latency of each in milliseconds.
pub(crate) async fn load(
    endpoint: &Arc<Endpoint>,
    total: usize,
    request: impl Fn(usize) -> (&'static str, String, Option<String>) + Send + Sync + 'static,
) -> Result<(f64, Samples)> {
    let next = Arc::new(AtomicUsize::new(0));
    let request = Arc::new(request);
    let mut connections = Vec::new();
    for _ in 0..CLIENTS {
        connections.push(endpoint.connect().await?);
    }
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for mut connection in connections {
        let (next, request) = (next.clone(), request.clone());
        tasks.spawn(async move {
            let mut times = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= total {
                    return Ok::<_, anyhow::Error>(times);
                }
                let (method, path, body) = request(number);
                let sent = Instant::now();
                connection.request(method, &path, body).await?;
                times.push(sent.elapsed().as_secs_f64() * 1e3);
            }
        });
    }
    let mut times = Vec::with_capacity(total);
    while let Some(result) = tasks.join_next().await {
        times.extend(result??);
    }
    let elapsed = started.elapsed().max(Duration::from_millis(1));
    Ok((total as f64 / elapsed.as_secs_f64(), Samples::new(times)))
}

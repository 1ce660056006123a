//! From a write to its arrival at each of many watchers.
//!
//! A sample is the time from the moment before the write is sent until the kernel has the event for one watcher; there
//! is one for each watcher and write. The watchers read later. Of a ConfigMap it has the commit to disk in it. A Lease
//! is committed in memory, so that its samples are an upper bound of the time from a commit to its arrival.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    client::{Connection, Endpoint},
    processes::cpu_seconds,
    stats::Samples,
    watch::Watch,
};

pub(crate) const WATCHERS: usize = 1_000;
const CHANGES: usize = 100;
/// The server is left alone for so long after a write, and again when not every watcher has it then.
const REST: Duration = Duration::from_millis(100);
/// A watcher that has heard nothing by then will not.
const PATIENCE: Duration = Duration::from_secs(30);

/// A kind of object that is watched.
pub(crate) struct Watched {
    pub(crate) kind: &'static str,
    api_version: &'static str,
    collection: &'static str,
    content: fn(usize) -> Value,
}

pub(crate) const CONFIG_MAP: Watched = Watched {
    kind: "ConfigMap",
    api_version: "v1",
    collection: "/api/v1/namespaces/default/configmaps",
    content: |number| json!({"data": {"number": number.to_string()}}),
};

pub(crate) const LEASE: Watched = Watched {
    kind: "Lease",
    api_version: "coordination.k8s.io/v1",
    collection: "/apis/coordination.k8s.io/v1/namespaces/default/leases",
    content: |number| json!({"spec": {"holderIdentity": number.to_string()}}),
};

impl Watched {
    fn body(&self, number: usize) -> String {
        let mut object = (self.content)(number);
        object["apiVersion"] = self.api_version.into();
        object["kind"] = self.kind.into();
        object["metadata"] = json!({"name": "watched"});
        object.to_string()
    }
}

pub(crate) struct FanOut {
    kind: &'static str,
    /// Milliseconds from the sending of a write to its arrival, for each watcher and write.
    pub(crate) heard: Samples,
    /// Milliseconds of such a write from its sending to its answer, when nobody watches.
    pub(crate) alone: Samples,
    /// Microseconds of the daemon's CPU time for each event that a watcher was sent, the writes' own time with it.
    pub(crate) cpu_us: f64,
}

impl FanOut {
    pub(crate) fn json(&self) -> Value {
        json!({
            "kind": self.kind,
            "heard_ms": self.heard.json(),
            "write_alone_ms": self.alone.json(),
            "daemon_cpu_us_per_event": self.cpu_us,
        })
    }
}

pub(crate) async fn measure(
    endpoint: &Arc<Endpoint>,
    watched: &Watched,
    server: u32,
) -> Result<FanOut> {
    let mut writer = endpoint.connect().await?;
    let (collection, first) = (watched.collection, watched.body(0));
    writer.request("POST", collection, Some(first)).await?;
    let target = format!("{collection}/watched");
    let alone = alone(&mut writer, watched, &target).await?;

    let path = format!(
        "{collection}?watch=true&fieldSelector=metadata.name%3Dwatched&resourceVersion=0&timeoutSeconds=3600"
    );
    let open = {
        let endpoint = endpoint.clone();
        move || {
            (0..WATCHERS)
                .map(|_| Watch::open(&endpoint, &path))
                .collect()
        }
    };
    let watches: Result<Vec<Watch>> = tokio::task::spawn_blocking(open).await?;
    let (heard, cpu_us) = rounds(&mut writer, watched, &target, watches?, server).await?;
    Ok(FanOut {
        kind: watched.kind,
        heard,
        alone,
        cpu_us,
    })
}

async fn alone(writer: &mut Connection, watched: &Watched, target: &str) -> Result<Samples> {
    let mut times = Vec::new();
    for number in 1..=CHANGES {
        let (body, sent) = (watched.body(number), Instant::now());
        writer.request("PUT", target, Some(body)).await?;
        times.push(sent.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Samples::new(times))
}

async fn rounds(
    writer: &mut Connection,
    watched: &Watched,
    target: &str,
    mut watches: Vec<Watch>,
    server: u32,
) -> Result<(Samples, f64)> {
    let before = cpu_seconds(server).context("the daemon runs")?;
    let mut times = Vec::with_capacity(CHANGES * WATCHERS);
    for number in 1..=CHANGES {
        let body = watched.body(CHANGES + number);
        let sent = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let begun = Instant::now();
        writer.request("PUT", target, Some(body)).await?;
        tokio::time::sleep(REST).await;
        for watch in &mut watches {
            let arrival = loop {
                if let Some(arrival) = watch.arrival()? {
                    break arrival;
                }
                ensure!(
                    begun.elapsed() < PATIENCE,
                    "a watcher did not hear of a change"
                );
                tokio::time::sleep(REST).await;
            };
            times.push(arrival.saturating_sub(sent).as_secs_f64() * 1e3);
        }
    }
    let used = cpu_seconds(server).context("the daemon runs")? - before;
    Ok((
        Samples::new(times),
        used * 1e6 / (CHANGES * WATCHERS) as f64,
    ))
}

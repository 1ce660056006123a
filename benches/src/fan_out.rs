//! From a write to its arrival at each of many watchers.
//!
//! The watchers are one thread of this process, which shares the cores with the daemon. A sample is the time from the
//! moment before the write is sent until one watcher has read the event; there is one for each watcher and write. Of a
//! ConfigMap it has the commit to disk in it. A Lease is committed in memory, so that its samples are an upper bound
//! of the time from a commit to its arrival.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::sync::{Notify, oneshot};

use crate::{
    client::{Connection, Endpoint, Watch},
    stats::{Samples, cpu_seconds},
};

pub(crate) const WATCHERS: usize = 1_000;
const CHANGES: usize = 100;

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

/// What the watchers have heard in a round.
struct Round {
    begun: Instant,
    /// Microseconds since `begun`, by watcher.
    arrivals: Vec<AtomicU64>,
    missing: AtomicUsize,
    complete: Notify,
}

impl Round {
    fn arrived(&self, watcher: usize) {
        let micros = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.arrivals[watcher].store(micros, Ordering::Release);
        if self.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.complete.notify_one();
        }
    }

    async fn wait(&self) -> Result<()> {
        tokio::time::timeout(Duration::from_secs(30), self.complete.notified())
            .await
            .context("a watcher did not hear of a change")
    }

    fn next(&self) {
        self.missing.store(WATCHERS, Ordering::Release);
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
    let round = Arc::new(Round {
        begun: Instant::now(),
        arrivals: (0..WATCHERS).map(|_| AtomicU64::new(0)).collect(),
        missing: AtomicUsize::new(WATCHERS),
        complete: Notify::new(),
    });
    let (stop, stopped) = oneshot::channel();
    let listeners = std::thread::spawn({
        let (endpoint, round) = (endpoint.clone(), round.clone());
        move || listen(&endpoint, &path, &round, stopped)
    });
    let outcome = rounds(&mut writer, watched, &target, &round, server).await;
    // They may have ended by themselves: the thread says why.
    let _ended = stop.send(());
    tokio::task::spawn_blocking(move || listeners.join())
        .await?
        .map_err(|_panic| anyhow::anyhow!("the watchers' thread broke"))??;
    let (heard, cpu_us) = outcome?;
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
    round: &Round,
    server: u32,
) -> Result<(Samples, f64)> {
    // What was there at the beginning.
    round.wait().await?;
    let before = cpu_seconds(server).context("the daemon runs")?;
    let mut times = Vec::with_capacity(CHANGES * WATCHERS);
    for number in 1..=CHANGES {
        round.next();
        let body = watched.body(CHANGES + number);
        let sent = round.begun.elapsed();
        writer.request("PUT", target, Some(body)).await?;
        round.wait().await?;
        for arrival in &round.arrivals {
            let arrival = Duration::from_micros(arrival.load(Ordering::Acquire));
            times.push(arrival.saturating_sub(sent).as_secs_f64() * 1e3);
        }
    }
    let used = cpu_seconds(server).context("the daemon runs")? - before;
    Ok((
        Samples::new(times),
        used * 1e6 / (CHANGES * WATCHERS) as f64,
    ))
}

fn listen(
    endpoint: &Endpoint,
    path: &str,
    round: &Arc<Round>,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..WATCHERS {
            let mut watch = Watch::open(endpoint, path).await?;
            let round = round.clone();
            tasks.spawn(async move {
                loop {
                    match watch.next().await? {
                        1 => round.arrived(number),
                        count => break ensured(count),
                    }
                }
            });
        }
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(ended) => ended?,
                None => Ok(()),
            },
            _ = stopped => Ok(()),
        }
    })
}

/// A watch neither ends nor has two events in a round.
fn ensured(count: usize) -> Result<()> {
    ensure!(count == 1, "a watcher heard {count} events at once");
    Ok(())
}

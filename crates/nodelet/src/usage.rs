//! What the node and its pods use, measured again and again for `metrics.k8s.io`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use hypernetes_apimachinery::usage::{NodeUsage, PodUsage, Usage, UsageBoard};
use hypernetes_runtime::{ContainerState, PodRuntime, SandboxState};
use hypernetes_types::ContainerId;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(10);
/// A guest that does not answer in time is left out this once.
const LIMIT: Duration = Duration::from_secs(5);
/// CPU use is not measured over less.
const LEAST_WINDOW: Duration = Duration::from_secs(1);

/// A point of a counter of CPU time.
#[derive(Debug, Clone, Copy)]
struct Point {
    unix_nanos: i64,
    cpu_nanos: u64,
}

/// CPU use between two points; `None` if they are too near.
fn rate(from: Point, to: Point) -> Option<(u64, Duration)> {
    let window = u64::try_from(to.unix_nanos.saturating_sub(from.unix_nanos)).ok()?;
    let window = Duration::from_nanos(window);
    if window < LEAST_WINDOW {
        return None;
    }
    let used = u128::from(to.cpu_nanos.saturating_sub(from.cpu_nanos));
    let cores = used.saturating_mul(1_000_000_000) / window.as_nanos();
    Some((u64::try_from(cores).unwrap_or(u64::MAX), window))
}

/// Measures until `stop`.
pub(crate) async fn run(
    runtime: Arc<dyn PodRuntime>,
    node: String,
    board: UsageBoard,
    stop: CancellationToken,
) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut known: HashMap<ContainerId, Point> = HashMap::new();
    let mut host = host_point();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        let pods = tokio::select! {
            pods = pods(runtime.as_ref(), &mut known) => pods,
            () = stop.cancelled() => return,
        };
        let now = host_point();
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let nodes = rate(host, now).map(|(cpu_nano_cores, window)| NodeUsage {
            name: node.clone(),
            at: Timestamp::now(),
            window,
            usage: Usage {
                cpu_nano_cores,
                memory_bytes: memory_in_use(&memory),
            },
        });
        if nodes.is_some() {
            host = now;
        }
        board.set(nodes.into_iter().collect(), pods);
    }
}

async fn pods(runtime: &dyn PodRuntime, known: &mut HashMap<ContainerId, Point>) -> Vec<PodUsage> {
    let sandboxes = runtime.list_sandboxes().await;
    let ready = sandboxes.iter().filter(|s| s.state == SandboxState::Ready);
    let asked = ready.map(|sandbox| async move {
        let stats = tokio::time::timeout(LIMIT, runtime.stats(&sandbox.id)).await;
        let records = runtime.list_containers(Some(&sandbox.id)).await;
        Some((sandbox, stats.ok()?.ok()?, records))
    });
    let mut found = Vec::new();
    let mut points = HashMap::new();
    for (sandbox, stats, records) in futures::future::join_all(asked).await.into_iter().flatten() {
        let mut containers = BTreeMap::new();
        let mut longest = Duration::ZERO;
        for record in records {
            if record.state != ContainerState::Running {
                continue;
            }
            let Some(of) = stats.containers.iter().find(|stats| stats.id == record.id) else {
                continue;
            };
            let now = Point {
                unix_nanos: stats.unix_nanos,
                cpu_nanos: of.cpu_usage_nanos,
            };
            // A container that is new had used nothing when it started.
            let before = known.get(&record.id).copied().unwrap_or(Point {
                unix_nanos: record.started_unix_nanos,
                cpu_nanos: 0,
            });
            let Some((cpu_nano_cores, window)) = rate(before, now) else {
                continue;
            };
            points.insert(record.id.clone(), now);
            longest = longest.max(window);
            let usage = Usage {
                cpu_nano_cores,
                memory_bytes: of.memory_working_set,
            };
            containers.insert(record.config.name.clone(), usage);
        }
        if containers.is_empty() {
            continue;
        }
        let meta = &sandbox.config.metadata;
        found.push(PodUsage {
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            uid: meta.uid.clone(),
            at: Timestamp::now(),
            window: longest,
            containers,
        });
    }
    *known = points;
    found
}

/// CPU time of the whole machine that was not idle.
fn host_point() -> Point {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let now = Timestamp::now().as_nanosecond();
    Point {
        unix_nanos: i64::try_from(now).unwrap_or(i64::MAX),
        cpu_nanos: busy_nanos(&stat),
    }
}

/// User, nice, system, irq, softirq and steal of the first line, in hundredths of a second each.
fn busy_nanos(stat: &str) -> u64 {
    let line = stat.lines().next().unwrap_or_default();
    let times: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map(|text| text.parse().unwrap_or(0))
        .collect();
    let busy: u64 = [0, 1, 2, 5, 6, 7]
        .iter()
        .filter_map(|at| times.get(*at))
        .sum();
    busy.saturating_mul(10_000_000)
}

fn memory_in_use(meminfo: &str) -> u64 {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let text = line.and_then(|line| line.split_whitespace().next());
        text.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
    };
    kib("MemTotal:").saturating_sub(kib("MemAvailable:")) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_need_time() {
        let at = |seconds: i64, cpu_nanos| Point {
            unix_nanos: seconds * 1_000_000_000,
            cpu_nanos,
        };
        let (cores, window) = rate(at(0, 0), at(10, 5_000_000_000)).unwrap();
        assert_eq!((cores, window.as_secs()), (500_000_000, 10));
        assert_eq!(rate(at(0, 0), at(0, 5)), None);
        assert_eq!(rate(at(9, 0), at(0, 5)), None);
        assert_eq!(
            rate(at(0, 9), at(2, 5)).unwrap().0,
            0,
            "a counter that began anew"
        );
    }

    #[test]
    fn the_machines_own_figures() {
        assert_eq!(
            busy_nanos("cpu  1 2 3 100 100 4 5 6 0 0\ncpu0 1 1 1"),
            21 * 10_000_000
        );
        let memory = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n";
        assert_eq!(memory_in_use(memory), 600 * 1024);
    }
}

//! What an operator's Prometheus reads of a node's pods, wherever it is served.
//!
//! | metric, after `hypernetes_node_` | |
//! | --- | --- |
//! | `sandboxes{state}` | sandboxes, by state |
//! | `containers{state}` | containers, by state |
//! | `sandbox_host_memory_bytes{namespace,pod,sandbox}` | what a pod's VM takes of the host |
//! | `vm_starts_total{origin}` | starts of VMs: `pool`, `template` or `kernel` |
//! | `vm_start_failures_total` | VMs that did not come up |
//! | `vm_start_seconds_total` | time that all starts together took |
//! | `pool_vms` | VMs that wait for a pod |
//! | `pool_hits_total`, `pool_misses_total` | sandboxes that found one waiting, and that did not |

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};

use crate::{PodRuntime, SandboxStatus};

/// Media type of [`node_metrics`].
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct State {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Pod {
    namespace: String,
    pod: String,
    sandbox: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Origin {
    origin: &'static str,
}

/// The metrics of a node's pods as they are, as OpenMetrics text that ends with `# EOF`. `more` registers what else
/// the node has, below the same prefix.
///
/// The registry is new each time: what is no more has no series in it. Names of pods are in the text.
pub async fn node_metrics(
    runtime: &dyn PodRuntime,
    more: impl FnOnce(&mut Registry) + Send,
) -> String {
    let sandboxes = runtime.list_sandboxes().await;
    let containers = runtime.list_containers(None).await;
    let figures = runtime.figures().await;
    let mut registry = Registry::with_prefix("hypernetes_node");
    registry.register(
        "sandboxes",
        "Pod sandboxes by state",
        by_state(sandboxes.iter().map(|status| format!("{:?}", status.state))),
    );
    registry.register(
        "containers",
        "Containers by state",
        by_state(
            containers
                .iter()
                .map(|status| format!("{:?}", status.state)),
        ),
    );
    let memory = Family::<Pod, Gauge>::default();
    for status in &sandboxes {
        if let Some(bytes) = figures.host_memory.get(&status.id) {
            let bytes = i64::try_from(*bytes).unwrap_or(i64::MAX);
            memory.get_or_create(&pod(status)).set(bytes);
        }
    }
    registry.register(
        "sandbox_host_memory_bytes",
        "Memory of the host that a pod's VM takes, shared pages counted in parts",
        memory,
    );
    let starts = Family::<Origin, Counter>::default();
    for (origin, count) in [
        ("pool", figures.starts.from_pool),
        ("template", figures.starts.from_template),
        ("kernel", figures.starts.booted),
    ] {
        starts.get_or_create(&Origin { origin }).inc_by(count);
    }
    registry.register("vm_starts", "Starts of VMs by what they began from", starts);
    let waiting = ConstGauge::new(i64::try_from(figures.pool.idle).unwrap_or(i64::MAX));
    registry.register("pool_vms", "VMs that wait for a pod", waiting);
    registry.register(
        "pool_hits",
        "Sandboxes that got a VM of the pool",
        ConstCounter::new(figures.pool.hits),
    );
    registry.register(
        "pool_misses",
        "Sandboxes for which no VM was in the pool",
        ConstCounter::new(figures.pool.misses),
    );
    registry.register(
        "vm_start_failures",
        "VMs that did not come up",
        ConstCounter::new(figures.starts.failed),
    );
    registry.register(
        "vm_start_seconds",
        "Time from request to ready of all VMs that came up",
        ConstCounter::new(figures.starts.took.as_secs_f64()),
    );
    more(&mut registry);
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => text,
        // Writing into a string does not fail.
        Err(_) => String::new(),
    }
}

fn by_state(states: impl Iterator<Item = String>) -> Family<State, Gauge> {
    let family = Family::<State, Gauge>::default();
    for state in states {
        let state = State {
            state: state.to_lowercase(),
        };
        family.get_or_create(&state).inc();
    }
    family
}

fn pod(status: &SandboxStatus) -> Pod {
    let metadata = &status.config.metadata;
    Pod {
        namespace: metadata.namespace.clone(),
        pod: metadata.name.clone(),
        sandbox: status.id.to_string(),
    }
}

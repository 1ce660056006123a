//! What containers and sandboxes use, in the API's words.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use hypernetes_runtime::{
    ContainerState, ContainerStats, ContainerStatus, InterfaceStats, PodRuntime, SandboxState,
    SandboxStats, SandboxStatus,
};
use hypernetes_telemetry::chain;

use crate::{filter::metadata, v1};

/// How long one guest may hold up a list.
const PATIENCE: Duration = Duration::from_secs(5);
/// Guests that are asked at a time.
const AT_ONCE: usize = 16;

fn number(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

/// One container.
pub(crate) fn of_container(
    status: &ContainerStatus,
    stats: &ContainerStats,
    timestamp: i64,
) -> v1::ContainerStats {
    let config = &status.config;
    let limit = u64::try_from(config.resources.memory_limit).unwrap_or(0);
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: status.id.to_string(),
            metadata: Some(v1::ContainerMetadata {
                name: config.name.clone(),
                attempt: config.attempt,
            }),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        cpu: Some(cpu(timestamp, stats.cpu_usage_nanos)),
        memory: Some(v1::MemoryUsage {
            timestamp,
            working_set_bytes: number(stats.memory_working_set),
            available_bytes: match limit {
                0 => None,
                limit => number(limit.saturating_sub(stats.memory_working_set)),
            },
            usage_bytes: number(stats.memory_usage),
            rss_bytes: number(stats.memory_rss),
            page_faults: number(stats.page_faults),
            major_page_faults: number(stats.major_page_faults),
            psi: None,
        }),
        writable_layer: None,
        swap: None,
        io: None,
    }
}

fn cpu(timestamp: i64, nanos: u64) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: number(nanos),
        // Two samples are needed for it: whoever asks has them.
        usage_nano_cores: None,
        psi: None,
    }
}

fn interface(stats: &InterfaceStats) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: stats.name.clone(),
        rx_bytes: number(stats.rx_bytes),
        rx_errors: number(stats.rx_errors),
        tx_bytes: number(stats.tx_bytes),
        tx_errors: number(stats.tx_errors),
    }
}

/// One sandbox with its running containers.
pub(crate) fn of_sandbox(
    status: &SandboxStatus,
    containers: &[ContainerStatus],
    stats: &SandboxStats,
) -> v1::PodSandboxStats {
    let timestamp = stats.unix_nanos;
    let running = of_containers(containers, stats);
    let sum = |of: fn(&ContainerStats) -> u64| {
        stats
            .containers
            .iter()
            .map(of)
            .fold(0u64, u64::saturating_add)
    };
    let mut interfaces: Vec<_> = stats.interfaces.iter().map(interface).collect();
    let default_interface = (!interfaces.is_empty()).then(|| interfaces.remove(0));
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: status.id.to_string(),
            metadata: Some(metadata(&status.config)),
            labels: status.config.labels.clone(),
            annotations: status.config.annotations.clone(),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(timestamp, sum(|stats| stats.cpu_usage_nanos))),
            memory: Some(v1::MemoryUsage {
                timestamp,
                working_set_bytes: number(sum(|stats| stats.memory_working_set)),
                available_bytes: number(stats.memory_available),
                usage_bytes: number(sum(|stats| stats.memory_usage)),
                rss_bytes: number(sum(|stats| stats.memory_rss)),
                page_faults: number(sum(|stats| stats.page_faults)),
                major_page_faults: number(sum(|stats| stats.major_page_faults)),
                psi: None,
            }),
            network: Some(v1::NetworkUsage {
                timestamp,
                default_interface,
                interfaces,
            }),
            process: Some(v1::ProcessUsage {
                timestamp,
                process_count: number(sum(|stats| stats.pids)),
            }),
            containers: running,
            io: None,
        }),
        windows: None,
    }
}

/// The containers that run, of those given.
pub(crate) fn of_containers(
    containers: &[ContainerStatus],
    stats: &SandboxStats,
) -> Vec<v1::ContainerStats> {
    let of = |status: &ContainerStatus| {
        let stats_of = stats
            .containers
            .iter()
            .find(|stats| stats.id == status.id)?;
        Some(of_container(status, stats_of, stats.unix_nanos))
    };
    containers
        .iter()
        .filter(|status| status.state == ContainerState::Running)
        .filter_map(of)
        .collect()
}

/// How closely guests look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// At what their kernels have summed up.
    Quick,
    /// At every process and file.
    Detailed,
}

/// The statistics of all sandboxes that are up. One whose guest does not answer is left out.
pub(crate) async fn of_node(
    runtime: &Arc<dyn PodRuntime>,
    look: Look,
) -> Vec<(SandboxStatus, SandboxStats)> {
    let sandboxes = runtime.list_sandboxes().await;
    let ready = sandboxes
        .into_iter()
        .filter(|status| status.state == SandboxState::Ready);
    stream::iter(ready)
        .map(|status| async move {
            let stats = async {
                match look {
                    Look::Quick => runtime.stats(&status.id).await,
                    Look::Detailed => runtime.detailed_stats(&status.id).await,
                }
            };
            match tokio::time::timeout(PATIENCE, stats).await {
                Ok(Ok(stats)) => Some((status, stats)),
                Ok(Err(error)) => {
                    tracing::debug!(sandbox = %status.id, error = %chain(&error), "no statistics");
                    None
                }
                Err(_late) => {
                    tracing::debug!(sandbox = %status.id, "no statistics in time");
                    None
                }
            }
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await
}

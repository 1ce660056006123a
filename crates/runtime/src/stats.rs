//! What a guest says that it uses, as far as it is believed.

use hypernetes_agent_api::v1;
use hypernetes_types::ContainerId;

use crate::{
    api::{ContainerStats, InterfaceStats, SandboxStats},
    guest::clean,
};

/// Interfaces that are taken from a guest.
const MAX_INTERFACES: usize = 16;

/// A guest's answer, about containers that are known here only.
pub(crate) fn of_guest(
    answer: v1::StatsResponse,
    unix_nanos: i64,
    known: impl Fn(&ContainerId) -> bool,
) -> SandboxStats {
    let mut containers: Vec<ContainerStats> = Vec::new();
    for stats in answer.containers {
        let Ok(id) = stats.id.parse::<ContainerId>() else {
            continue;
        };
        if !known(&id) || containers.iter().any(|other| other.id == id) {
            continue;
        }
        containers.push(ContainerStats {
            id,
            cpu_usage_nanos: stats.cpu_usage_nanos,
            memory_usage: stats.memory_usage,
            memory_working_set: stats.memory_working_set,
            memory_rss: stats.memory_rss,
            page_faults: stats.page_faults,
            major_page_faults: stats.major_page_faults,
            pids: stats.pids,
        });
    }
    let interface = |stats: v1::InterfaceStats| InterfaceStats {
        name: clean(&stats.name),
        rx_bytes: stats.rx_bytes,
        rx_errors: stats.rx_errors,
        tx_bytes: stats.tx_bytes,
        tx_errors: stats.tx_errors,
    };
    SandboxStats {
        unix_nanos,
        memory_total: answer.memory_total,
        memory_available: answer.memory_available.min(answer.memory_total),
        interfaces: answer
            .interfaces
            .into_iter()
            .take(MAX_INTERFACES)
            .map(interface)
            .collect(),
        containers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_and_repetitions_are_not_believed() {
        let (ours, other) = (ContainerId::random(), ContainerId::random());
        let of = |id: &str, pids| v1::ContainerStats {
            id: id.to_owned(),
            pids,
            ..Default::default()
        };
        let answer = v1::StatsResponse {
            memory_total: 10,
            memory_available: 20,
            containers: vec![
                of(ours.as_str(), 1),
                of(ours.as_str(), 2),
                of(other.as_str(), 3),
                of("../x", 4),
            ],
            interfaces: vec![v1::InterfaceStats::default(); 100],
        };
        let stats = of_guest(answer, 7, |id| *id == ours);
        let found: Vec<_> = stats
            .containers
            .iter()
            .map(|stats| (&stats.id, stats.pids))
            .collect();
        assert_eq!(found, [(&ours, 1)]);
        assert_eq!(stats.memory_available, 10);
        assert_eq!(stats.interfaces.len(), MAX_INTERFACES);
    }
}

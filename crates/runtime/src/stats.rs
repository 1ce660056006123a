//! What a guest says that it uses, as far as it is believed.

use hypernetes_agent_api::v1;
use hypernetes_types::ContainerId;

use crate::{
    api::{ContainerDetail, ContainerStats, DeviceStats, InterfaceStats, Pressure, SandboxStats},
    guest::clean,
};

/// Interfaces that are taken from a guest.
const MAX_INTERFACES: usize = 16;
/// Devices of a container that are taken from a guest.
const MAX_DEVICES: usize = 64;
/// Sizes of huge pages that are taken from a guest.
const MAX_PAGE_SIZES: usize = 8;

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
            detail: stats.detail.map(|detail| Box::new(self::detail(detail))),
        });
    }
    let interface = |stats: v1::InterfaceStats| InterfaceStats {
        name: clean(&stats.name),
        rx_bytes: stats.rx_bytes,
        rx_errors: stats.rx_errors,
        tx_bytes: stats.tx_bytes,
        tx_errors: stats.tx_errors,
        rx_packets: stats.rx_packets,
        rx_dropped: stats.rx_dropped,
        tx_packets: stats.tx_packets,
        tx_dropped: stats.tx_dropped,
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

fn detail(detail: v1::ContainerDetail) -> ContainerDetail {
    let pages = |pages: v1::HugePages| (clean(&pages.page_size), pages.usage, pages.peak);
    let device = |device: v1::DeviceStats| DeviceStats {
        name: clean(&device.name),
        major: device.major,
        minor: device.minor,
        reads: device.reads,
        read_bytes: device.read_bytes,
        writes: device.writes,
        write_bytes: device.write_bytes,
    };
    let pressure = |pressure: v1::Pressure| Pressure {
        cpu: (pressure.cpu_some, pressure.cpu_full),
        memory: (pressure.memory_some, pressure.memory_full),
        io: (pressure.io_some, pressure.io_full),
    };
    ContainerDetail {
        cpu_user_nanos: detail.cpu_user_nanos,
        cpu_system_nanos: detail.cpu_system_nanos,
        cfs_periods: detail.cfs_periods,
        cfs_throttled_periods: detail.cfs_throttled_periods,
        cfs_throttled_nanos: detail.cfs_throttled_nanos,
        memory_cache: detail.memory_cache,
        memory_mapped_file: detail.memory_mapped_file,
        memory_kernel: detail.memory_kernel,
        memory_swap: detail.memory_swap,
        memory_peak: detail.memory_peak,
        memory_failures: detail.memory_failures,
        oom_kills: detail.oom_kills,
        processes: detail.processes,
        threads_max: detail.threads_max,
        file_descriptors: detail.file_descriptors,
        sockets: detail.sockets,
        open_files_soft: detail.open_files_soft,
        huge_pages: detail
            .huge_pages
            .into_iter()
            .take(MAX_PAGE_SIZES)
            .map(pages)
            .collect(),
        devices: detail
            .devices
            .into_iter()
            .take(MAX_DEVICES)
            .map(device)
            .collect(),
        pressure: detail.pressure.map(pressure),
        fs_device: clean(&detail.fs_device),
        fs_limit: detail.fs_limit,
        fs_inodes: detail.fs_inodes,
        fs_inodes_free: detail.fs_inodes_free.min(detail.fs_inodes),
        fs_usage: detail.fs_usage,
        fs_inodes_used: detail.fs_inodes_used,
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
            detail: Some(v1::ContainerDetail {
                devices: vec![v1::DeviceStats::default(); 1000],
                huge_pages: vec![v1::HugePages::default(); 1000],
                fs_inodes_free: 9,
                ..Default::default()
            }),
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
        let detail = stats.containers[0].detail.as_ref().unwrap();
        assert_eq!(detail.devices.len(), MAX_DEVICES);
        assert_eq!(detail.huge_pages.len(), MAX_PAGE_SIZES);
        assert_eq!(detail.fs_inodes_free, 0);
    }
}

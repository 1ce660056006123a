//! Metrics of pods, as a kubelet passes them on (`ListPodSandboxMetrics`).
//!
//! The families are those of cAdvisor, with its names and labels, so that dashboards find what they
//! look for. Where a family is about a host's cgroup it is here about the guest's, as the guest says.
//! Values are whole numbers, as the API has them: seconds are cut off.

use hypernetes_runtime::{
    ContainerDetail, ContainerState, ContainerStats, ContainerStatus, InterfaceStats, SandboxStats,
    SandboxStatus,
};

use crate::{memo, v1};

const NANOS: u64 = 1_000_000_000;
/// Labels of all families, in this order.
const BASE: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// A family: name, what it is, its own labels, whether it only grows.
struct Family(&'static str, &'static str, &'static [&'static str], bool);

const COUNTER: bool = true;
const GAUGE: bool = false;

/// All families, sorted by name.
const FAMILIES: &[Family] = &[
    Family(
        "container_blkio_device_usage_total",
        "Bytes read from and written to a device",
        &["device", "major", "minor", "operation"],
        COUNTER,
    ),
    Family(
        "container_cpu_cfs_periods_total",
        "Periods of the CPU limit",
        &[],
        COUNTER,
    ),
    Family(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the CPU limit held the container up",
        &[],
        COUNTER,
    ),
    Family(
        "container_cpu_cfs_throttled_seconds_total",
        "Time for which the CPU limit held the container up",
        &[],
        COUNTER,
    ),
    Family(
        "container_cpu_system_seconds_total",
        "CPU time in the guest's kernel",
        &[],
        COUNTER,
    ),
    Family(
        "container_cpu_usage_seconds_total",
        "CPU time",
        &["cpu"],
        COUNTER,
    ),
    Family(
        "container_cpu_user_seconds_total",
        "CPU time in programs",
        &[],
        COUNTER,
    ),
    Family("container_file_descriptors", "Open descriptors", &[], GAUGE),
    Family(
        "container_fs_inodes_free",
        "Files that can be made still on the pod's scratch disk",
        &["device"],
        GAUGE,
    ),
    Family(
        "container_fs_inodes_total",
        "Files that can be made on the pod's scratch disk",
        &["device"],
        GAUGE,
    ),
    Family(
        "container_fs_limit_bytes",
        "Size of the pod's scratch disk",
        &["device"],
        GAUGE,
    ),
    Family(
        "container_fs_reads_bytes_total",
        "Bytes read",
        &["device"],
        COUNTER,
    ),
    Family("container_fs_reads_total", "Reads", &["device"], COUNTER),
    Family(
        "container_fs_usage_bytes",
        "Bytes of the container's writable layer",
        &["device"],
        GAUGE,
    ),
    Family(
        "container_fs_writes_bytes_total",
        "Bytes written",
        &["device"],
        COUNTER,
    ),
    Family("container_fs_writes_total", "Writes", &["device"], COUNTER),
    Family(
        "container_hugetlb_max_usage_bytes",
        "Most bytes of huge pages at a time",
        &["pagesize"],
        GAUGE,
    ),
    Family(
        "container_hugetlb_usage_bytes",
        "Bytes of huge pages",
        &["pagesize"],
        GAUGE,
    ),
    Family(
        "container_last_seen",
        "When the container was last looked at, in seconds since 1970",
        &[],
        GAUGE,
    ),
    Family(
        "container_memory_cache",
        "Bytes of files in memory",
        &[],
        GAUGE,
    ),
    Family(
        "container_memory_failcnt",
        "Times that the memory limit was hit",
        &[],
        COUNTER,
    ),
    Family(
        "container_memory_failures_total",
        "Page faults",
        &["failure_type", "scope"],
        COUNTER,
    ),
    Family(
        "container_memory_kernel_usage",
        "Bytes of the guest's kernel for the container",
        &[],
        GAUGE,
    ),
    Family(
        "container_memory_mapped_file",
        "Bytes of files that are mapped",
        &[],
        GAUGE,
    ),
    Family(
        "container_memory_max_usage_bytes",
        "Most bytes at a time",
        &[],
        GAUGE,
    ),
    Family(
        "container_memory_rss",
        "Bytes of anonymous memory",
        &[],
        GAUGE,
    ),
    Family("container_memory_swap", "Bytes swapped out", &[], GAUGE),
    Family(
        "container_memory_usage_bytes",
        "Bytes in use, whatever for",
        &[],
        GAUGE,
    ),
    Family(
        "container_memory_working_set_bytes",
        "Bytes that cannot be dropped at once",
        &[],
        GAUGE,
    ),
    Family(
        "container_network_receive_bytes_total",
        "Bytes received by the pod",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_receive_errors_total",
        "Errors of reception",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_receive_packets_dropped_total",
        "Packets dropped at reception",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_receive_packets_total",
        "Packets received",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_transmit_bytes_total",
        "Bytes sent by the pod",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_transmit_errors_total",
        "Errors of sending",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_transmit_packets_dropped_total",
        "Packets dropped at sending",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_network_transmit_packets_total",
        "Packets sent",
        &["interface"],
        COUNTER,
    ),
    Family(
        "container_oom_events_total",
        "Processes killed for want of memory",
        &[],
        COUNTER,
    ),
    Family(
        "container_pressure_cpu_stalled_seconds_total",
        "Time for which all tasks waited for a CPU",
        &[],
        COUNTER,
    ),
    Family(
        "container_pressure_cpu_waiting_seconds_total",
        "Time for which some task waited for a CPU",
        &[],
        COUNTER,
    ),
    Family(
        "container_pressure_io_stalled_seconds_total",
        "Time for which all tasks waited for a disk",
        &[],
        COUNTER,
    ),
    Family(
        "container_pressure_io_waiting_seconds_total",
        "Time for which some task waited for a disk",
        &[],
        COUNTER,
    ),
    Family(
        "container_pressure_memory_stalled_seconds_total",
        "Time for which all tasks waited for memory",
        &[],
        COUNTER,
    ),
    Family(
        "container_pressure_memory_waiting_seconds_total",
        "Time for which some task waited for memory",
        &[],
        COUNTER,
    ),
    Family("container_processes", "Processes", &[], GAUGE),
    Family("container_sockets", "Open sockets", &[], GAUGE),
    Family(
        "container_spec_cpu_period",
        "Period of the CPU limit in microseconds",
        &[],
        GAUGE,
    ),
    Family(
        "container_spec_cpu_quota",
        "CPU limit in microseconds a period",
        &[],
        GAUGE,
    ),
    Family(
        "container_spec_cpu_shares",
        "Weight among those that want a CPU",
        &[],
        GAUGE,
    ),
    Family(
        "container_spec_memory_limit_bytes",
        "Memory limit; 0 without",
        &[],
        GAUGE,
    ),
    Family(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is reserved; 0 without",
        &[],
        GAUGE,
    ),
    Family(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap; 0 without",
        &[],
        GAUGE,
    ),
    Family(
        "container_start_time_seconds",
        "When the container started, in seconds since 1970",
        &[],
        GAUGE,
    ),
    Family("container_threads", "Threads", &[], GAUGE),
    Family(
        "container_threads_max",
        "Most threads; 0 without a limit",
        &[],
        GAUGE,
    ),
    Family(
        "container_ulimits_soft",
        "Soft limits of the first process",
        &["ulimit"],
        GAUGE,
    ),
];

/// What is there, whether or not it has values.
pub(crate) fn descriptors() -> Vec<v1::MetricDescriptor> {
    let descriptor = |Family(name, help, own, _): &Family| v1::MetricDescriptor {
        name: (*name).to_owned(),
        help: (*help).to_owned(),
        label_keys: BASE.iter().chain(*own).map(|&key| key.to_owned()).collect(),
    };
    FAMILIES.iter().map(descriptor).collect()
}

/// Metrics of one pod or container.
struct Sheet {
    base: [String; 6],
    metrics: Vec<v1::Metric>,
}

impl Sheet {
    fn add(&mut self, name: &str, own: &[&str], value: u64) {
        let found = FAMILIES.binary_search_by_key(&name, |family| family.0);
        let family = found.ok().map(|index| &FAMILIES[index]);
        let Some(Family(_, _, keys, counter)) = family.filter(|family| family.2.len() == own.len())
        else {
            debug_assert!(false, "{name} is no family with {} labels", own.len());
            return;
        };
        debug_assert_eq!(keys.len(), own.len());
        self.metrics.push(v1::Metric {
            name: name.to_owned(),
            // Asked for just now.
            timestamp: 0,
            metric_type: match *counter {
                COUNTER => v1::MetricType::Counter.into(),
                GAUGE => v1::MetricType::Gauge.into(),
            },
            label_values: self
                .base
                .iter()
                .cloned()
                .chain(own.iter().map(|&value| value.to_owned()))
                .collect(),
            value: Some(v1::UInt64Value { value }),
        });
    }
}

/// A sandbox with its running containers.
pub(crate) fn of_sandbox(
    status: &SandboxStatus,
    containers: &[ContainerStatus],
    stats: &SandboxStats,
) -> v1::PodSandboxMetrics {
    let own = containers
        .iter()
        .filter(|one| one.sandbox == status.id && one.state == ContainerState::Running);
    let of = |one: &ContainerStatus| {
        let found = stats.containers.iter().find(|stats| stats.id == one.id)?;
        Some(of_container(status, one, found, stats.unix_nanos))
    };
    v1::PodSandboxMetrics {
        pod_sandbox_id: status.id.to_string(),
        metrics: network(status, &stats.interfaces),
        container_metrics: own.filter_map(of).collect(),
    }
}

/// The path that a container would have in a cluster of this node's; a VM has one cgroup there.
fn cgroup(status: &SandboxStatus, container: &str) -> String {
    let parent = status.config.cgroup_parent.as_deref().unwrap_or_default();
    format!("{}/{container}", parent.trim_end_matches('/'))
}

/// Of the pod, whose containers share one network.
fn network(status: &SandboxStatus, interfaces: &[InterfaceStats]) -> Vec<v1::Metric> {
    let metadata = &status.config.metadata;
    let mut sheet = Sheet {
        base: [
            String::new(),
            cgroup(status, status.id.as_str()),
            String::new(),
            status.id.to_string(),
            metadata.namespace.clone(),
            metadata.name.clone(),
        ],
        metrics: Vec::new(),
    };
    for stats in interfaces {
        for (what, value) in [
            ("receive_bytes", stats.rx_bytes),
            ("receive_errors", stats.rx_errors),
            ("receive_packets_dropped", stats.rx_dropped),
            ("receive_packets", stats.rx_packets),
            ("transmit_bytes", stats.tx_bytes),
            ("transmit_errors", stats.tx_errors),
            ("transmit_packets_dropped", stats.tx_dropped),
            ("transmit_packets", stats.tx_packets),
        ] {
            sheet.add(
                &format!("container_network_{what}_total"),
                &[&stats.name],
                value,
            );
        }
    }
    sheet.metrics
}

fn of_container(
    sandbox: &SandboxStatus,
    status: &ContainerStatus,
    stats: &ContainerStats,
    unix_nanos: i64,
) -> v1::ContainerMetrics {
    let metadata = &sandbox.config.metadata;
    let mut sheet = Sheet {
        base: [
            status.config.name.clone(),
            cgroup(sandbox, status.id.as_str()),
            status.image_ref.clone(),
            status.id.to_string(),
            metadata.namespace.clone(),
            metadata.name.clone(),
        ],
        metrics: Vec::new(),
    };
    let seconds = |nanos: i64| u64::try_from(nanos).unwrap_or(0) / NANOS;
    sheet.add(
        "container_cpu_usage_seconds_total",
        &["total"],
        stats.cpu_usage_nanos / NANOS,
    );
    sheet.add("container_last_seen", &[], seconds(unix_nanos));
    sheet.add(
        "container_start_time_seconds",
        &[],
        seconds(status.started_unix_nanos),
    );
    sheet.add("container_memory_rss", &[], stats.memory_rss);
    sheet.add("container_memory_usage_bytes", &[], stats.memory_usage);
    sheet.add(
        "container_memory_working_set_bytes",
        &[],
        stats.memory_working_set,
    );
    for (kind, value) in [
        ("pgfault", stats.page_faults),
        ("pgmajfault", stats.major_page_faults),
    ] {
        for scope in ["container", "hierarchy"] {
            sheet.add("container_memory_failures_total", &[kind, scope], value);
        }
    }
    sheet.add("container_threads", &[], stats.pids);
    spec(&mut sheet, status);
    if let Some(detail) = &stats.detail {
        details(&mut sheet, detail);
    }
    v1::ContainerMetrics {
        container_id: status.id.to_string(),
        metrics: sheet.metrics,
    }
}

/// What the container was given.
fn spec(sheet: &mut Sheet, status: &ContainerStatus) {
    let linux = memo::container(&status.config.memo).linux;
    let asked = linux.and_then(|linux| linux.resources).unwrap_or_default();
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    let period = match asked.cpu_period {
        // The kernel's own.
        0 => 100_000,
        period => period,
    };
    sheet.add("container_spec_cpu_period", &[], number(period));
    if asked.cpu_quota > 0 {
        sheet.add("container_spec_cpu_quota", &[], number(asked.cpu_quota));
    }
    sheet.add("container_spec_cpu_shares", &[], number(asked.cpu_shares));
    let memory = number(asked.memory_limit_in_bytes);
    sheet.add("container_spec_memory_limit_bytes", &[], memory);
    sheet.add("container_spec_memory_reservation_limit_bytes", &[], 0);
    let swap = number(asked.memory_swap_limit_in_bytes);
    sheet.add("container_spec_memory_swap_limit_bytes", &[], swap);
}

fn details(sheet: &mut Sheet, detail: &ContainerDetail) {
    for (name, value) in [
        ("container_cpu_cfs_periods_total", detail.cfs_periods),
        (
            "container_cpu_cfs_throttled_periods_total",
            detail.cfs_throttled_periods,
        ),
        (
            "container_cpu_cfs_throttled_seconds_total",
            detail.cfs_throttled_nanos / NANOS,
        ),
        (
            "container_cpu_system_seconds_total",
            detail.cpu_system_nanos / NANOS,
        ),
        (
            "container_cpu_user_seconds_total",
            detail.cpu_user_nanos / NANOS,
        ),
        ("container_file_descriptors", detail.file_descriptors),
        ("container_memory_cache", detail.memory_cache),
        ("container_memory_failcnt", detail.memory_failures),
        ("container_memory_kernel_usage", detail.memory_kernel),
        ("container_memory_mapped_file", detail.memory_mapped_file),
        ("container_memory_max_usage_bytes", detail.memory_peak),
        ("container_memory_swap", detail.memory_swap),
        ("container_oom_events_total", detail.oom_kills),
        ("container_processes", detail.processes),
        ("container_sockets", detail.sockets),
        ("container_threads_max", detail.threads_max),
    ] {
        sheet.add(name, &[], value);
    }
    sheet.add(
        "container_ulimits_soft",
        &["max_open_files"],
        detail.open_files_soft,
    );
    let device = path(&detail.fs_device);
    for (name, value) in [
        ("container_fs_inodes_free", detail.fs_inodes_free),
        ("container_fs_inodes_total", detail.fs_inodes),
        ("container_fs_limit_bytes", detail.fs_limit),
        ("container_fs_usage_bytes", detail.fs_usage),
    ] {
        sheet.add(name, &[&device], value);
    }
    for stats in &detail.devices {
        let device = path(&stats.name);
        for (name, value) in [
            ("container_fs_reads_bytes_total", stats.read_bytes),
            ("container_fs_reads_total", stats.reads),
            ("container_fs_writes_bytes_total", stats.write_bytes),
            ("container_fs_writes_total", stats.writes),
        ] {
            sheet.add(name, &[&device], value);
        }
        let (major, minor) = (stats.major.to_string(), stats.minor.to_string());
        for (operation, value) in [("Read", stats.read_bytes), ("Write", stats.write_bytes)] {
            let own = [&*device, &*major, &*minor, operation];
            sheet.add("container_blkio_device_usage_total", &own, value);
        }
    }
    for (size, usage, peak) in &detail.huge_pages {
        sheet.add("container_hugetlb_usage_bytes", &[size], *usage);
        if *peak > 0 {
            sheet.add("container_hugetlb_max_usage_bytes", &[size], *peak);
        }
    }
    if let Some(pressure) = detail.pressure {
        for (kind, (some, all)) in [
            ("cpu", pressure.cpu),
            ("io", pressure.io),
            ("memory", pressure.memory),
        ] {
            let family = |what: &str| format!("container_pressure_{kind}_{what}_seconds_total");
            sheet.add(&family("waiting"), &[], some / NANOS);
            sheet.add(&family("stalled"), &[], all / NANOS);
        }
    }
}

fn path(device: &str) -> String {
    match device {
        "" => String::new(),
        device => format!("/dev/{device}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_sorted_and_each_is_there_once() {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.0).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(names, sorted);
        assert_eq!(names.len(), 56);
        for descriptor in descriptors() {
            assert!(!descriptor.help.is_empty());
            assert_eq!(descriptor.label_keys[..6], BASE.map(str::to_owned));
        }
    }
}

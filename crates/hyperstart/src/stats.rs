//! What the VM and its containers use.

use std::fs;

use hypernetes_agent_api::v1;

use crate::{net, pod::Pod};

/// Bytes that the kernel manages.
pub(crate) fn memory_total() -> u64 {
    field(
        &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        "MemTotal:",
    )
}

pub(crate) fn collect(pod: &Pod) -> v1::StatsResponse {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let containers = pod.containers().into_iter().map(|container| {
        let usage = container.cgroup().usage();
        v1::ContainerStats {
            id: container.id().to_owned(),
            cpu_usage_nanos: usage.cpu_nanos,
            memory_usage: usage.memory,
            memory_working_set: usage.working_set,
            pids: usage.pids,
            memory_rss: usage.rss,
            page_faults: usage.page_faults,
            major_page_faults: usage.major_page_faults,
        }
    });
    v1::StatsResponse {
        memory_total: field(&memory, "MemTotal:"),
        memory_available: field(&memory, "MemAvailable:"),
        containers: containers.collect(),
        interfaces: interfaces(
            &fs::read_to_string("/proc/net/dev").unwrap_or_default(),
            |name| net::devices().join(name).join("device").exists(),
        ),
    }
}

/// Lines of /proc/net/dev of interfaces with a device, which the kernel's own (lo, dummy0) have
/// not: eight numbers of what came, eight of what went.
fn interfaces(text: &str, has_device: impl Fn(&str) -> bool) -> Vec<v1::InterfaceStats> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map(|number| number.parse().unwrap_or_default())
            .collect();
        let at = |index: usize| numbers.get(index).copied();
        Some(v1::InterfaceStats {
            name: name.trim().to_owned(),
            rx_bytes: at(0)?,
            rx_errors: at(2)?,
            tx_bytes: at(8)?,
            tx_errors: at(10)?,
        })
    };
    text.lines()
        .filter_map(line)
        .filter(|interface| has_device(&interface.name))
        .collect()
}

/// A line of /proc/meminfo, in bytes.
fn field(text: &str, name: &str) -> u64 {
    let kib = text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or_default().saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn interfaces_are_counted_in_both_directions() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs|bytes\n\
                    lo: 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n  \
                    eth0: 100 2 3 0 0 0 0 0 200 4 5 0 0 0 0 0\n";
        let found = super::interfaces(text, |name| name != "lo");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "eth0");
        assert_eq!((found[0].rx_bytes, found[0].rx_errors), (100, 3));
        assert_eq!((found[0].tx_bytes, found[0].tx_errors), (200, 5));
    }

    #[test]
    fn memory_is_in_bytes() {
        let text = "MemTotal:         110000 kB\nMemFree:   5 kB\n";
        assert_eq!(super::field(text, "MemTotal:"), 110_000 * 1024);
        assert_eq!(super::field(text, "MemAvailable:"), 0);
    }
}

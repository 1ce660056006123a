//! What the VM and its containers use.

use std::fs;

use hypernetes_agent_api::v1;

use crate::pod::Pod;

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
        }
    });
    v1::StatsResponse {
        memory_total: field(&memory, "MemTotal:"),
        memory_available: field(&memory, "MemAvailable:"),
        containers: containers.collect(),
    }
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
    fn memory_is_in_bytes() {
        let text = "MemTotal:         110000 kB\nMemFree:   5 kB\n";
        assert_eq!(super::field(text, "MemTotal:"), 110_000 * 1024);
        assert_eq!(super::field(text, "MemAvailable:"), 0);
    }
}

//! What host pods use, by the host's cgroups.

use std::{fs, io, path::Path};

use hypernetes_runtime::{RuntimeError, SandboxStats};

use crate::{
    cgroup::Hierarchies,
    namespaces::in_netns,
    records::{ContainerPhase, SandboxPhase, SandboxRecord, blocking, now_nanos, state},
    runtime::Inner,
};

/// Deepest directory that is looked into.
const MAX_DEPTH: u32 = 64;

pub(crate) async fn of_sandbox(
    inner: &Inner,
    record: &SandboxRecord,
) -> Result<SandboxStats, RuntimeError> {
    if record.phase != SandboxPhase::Ready || record.failure.is_some() {
        let phase = format!("{:?}", record.phase).to_lowercase();
        return Err(state("measure", "sandbox", &record.id, phase));
    }
    let running: Vec<_> = inner
        .containers_of(Some(&record.id))
        .iter()
        .map(|container| container.record())
        .filter(|record| record.phase == ContainerPhase::Running)
        .map(|record| (inner.bundle(&record.id), record.id, record.cgroup))
        .collect();
    let netns = record.netns();
    blocking("measure a sandbox", move || {
        let cgroups = Hierarchies::read()?;
        let memory = fs::read_to_string("/proc/meminfo")?;
        let traffic = match netns {
            // The host's traffic is nobody's own.
            None => String::new(),
            Some(netns) => in_netns(&netns, || fs::read_to_string("/proc/thread-self/net/dev"))?,
        };
        Ok(SandboxStats {
            unix_nanos: now_nanos(),
            memory_total: kibibytes(&memory, "MemTotal:"),
            memory_available: kibibytes(&memory, "MemAvailable:"),
            interfaces: interfaces(&traffic),
            containers: running
                .iter()
                .map(|(bundle, id, group)| {
                    let mut stats = cgroups.stats(id, group);
                    stats.detail = Some(Box::new(cgroups.detail(group, bundle)));
                    stats
                })
                .collect(),
        })
    })
    .await
}

fn kibibytes(table: &str, name: &str) -> u64 {
    let value = |line: &str| {
        let number = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
        number.trim().parse::<u64>().ok()
    };
    let found = table.lines().find_map(value).unwrap_or(0);
    found.saturating_mul(1024)
}

/// All but the loopback, from `/proc/net/dev`.
fn interfaces(table: &str) -> Vec<hypernetes_runtime::InterfaceStats> {
    let parse = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect();
        // Received: bytes packets errs drop fifo frame compressed multicast; sent: bytes packets errs drop.
        let [
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] = numbers[..]
        else {
            return None;
        };
        Some(hypernetes_runtime::InterfaceStats {
            name: name.trim().to_owned(),
            rx_bytes,
            rx_errors,
            tx_bytes,
            tx_errors,
            rx_packets,
            rx_dropped,
            tx_packets,
            tx_dropped,
        })
    };
    let all = table.lines().filter_map(parse);
    all.filter(|interface| interface.name != "lo").collect()
}

/// Bytes that are allocated for what containers have written, and files. Blocks.
pub(crate) fn of_tree(root: &Path) -> io::Result<(u64, u64)> {
    let (mut bytes, mut files) = (0, 0);
    let containers = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, 0)),
        other => other?,
    };
    for container in containers {
        measure(
            &container?.path().join("upper"),
            MAX_DEPTH,
            &mut bytes,
            &mut files,
        );
    }
    Ok((bytes, files))
}

fn measure(path: &Path, depth: u32, bytes: &mut u64, files: &mut u64) {
    use std::os::unix::fs::MetadataExt;
    // Containers write and are removed meanwhile: what is gone counts for nothing.
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        *bytes += metadata.blocks() * 512;
        *files += 1;
        if metadata.is_dir() && depth > 0 {
            measure(&entry.path(), depth - 1, bytes, files);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_tables_are_read() {
        assert_eq!(
            kibibytes("MemTotal:  2 kB\nMemAvailable: 1 kB\n", "MemAvailable:"),
            1024
        );
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0
  eth0: 100 2 3 0 0 0 0 0 50 1 4 0 0 0 0 0
";
        let found = interfaces(table);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (
                found[0].name.as_str(),
                found[0].rx_bytes,
                found[0].rx_errors,
                found[0].tx_bytes,
                found[0].tx_errors
            ),
            ("eth0", 100, 3, 50, 4)
        );
    }
}

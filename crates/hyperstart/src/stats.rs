//! What the VM and its containers use.

use std::{fs, sync::Arc, time::Duration};

use hypernetes_agent_api::v1;
use hypernetes_container::usage;
use rustix::fs::statvfs;
use tokio::time::{Instant, timeout};

use crate::{boot::dir, container::Container, disks::blocking, net, pod::Pod};

/// How old the measure of a writable layer may be.
const FRESH: Duration = Duration::from_secs(10);
/// How long an answer waits for a new one.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that the kernel manages.
pub(crate) fn memory_total() -> u64 {
    field(
        &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        "MemTotal:",
    )
}

pub(crate) async fn collect(pod: &Pod, detail: bool) -> v1::StatsResponse {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut containers = Vec::new();
    for container in pod.containers() {
        let usage = container.cgroup().usage();
        let detail = match detail {
            true => self::detail(&container).await,
            false => None,
        };
        containers.push(v1::ContainerStats {
            id: container.id().to_string(),
            cpu_usage_nanos: usage.cpu_nanos,
            memory_usage: usage.memory,
            memory_working_set: usage.working_set,
            pids: usage.pids,
            memory_rss: usage.rss,
            page_faults: usage.page_faults,
            major_page_faults: usage.major_page_faults,
            detail,
        });
    }
    v1::StatsResponse {
        memory_total: field(&memory, "MemTotal:"),
        memory_available: field(&memory, "MemAvailable:"),
        containers,
        interfaces: interfaces(
            &fs::read_to_string("/proc/net/dev").unwrap_or_default(),
            |name| net::devices().join(name).join("device").exists(),
        ),
    }
}

/// The size of a container's writable layer, measured now and then.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    /// When, how many bytes, how many files.
    last: Option<(Instant, u64, u64)>,
    measuring: bool,
}

/// All that is known of a container; `None` if it cannot be had.
async fn detail(container: &Arc<Container>) -> Option<v1::ContainerDetail> {
    let (cgroup, pid) = (container.cgroup().clone(), container.pid());
    let used = blocking(move || Ok(usage::of(&cgroup, pid))).await.ok()?;
    let (fs_usage, fs_inodes_used) = layer(container).await;
    let room = statvfs(dir::SCRATCH).ok();
    let of = |get: fn(&rustix::fs::StatVfs) -> u64| room.as_ref().map(get).unwrap_or_default();
    Some(v1::ContainerDetail {
        cpu_user_nanos: used.cpu_user_nanos,
        cpu_system_nanos: used.cpu_system_nanos,
        cfs_periods: used.cfs_periods,
        cfs_throttled_periods: used.cfs_throttled_periods,
        cfs_throttled_nanos: used.cfs_throttled_nanos,
        memory_cache: used.memory_cache,
        memory_mapped_file: used.memory_mapped_file,
        memory_kernel: used.memory_kernel,
        memory_swap: used.memory_swap,
        memory_peak: used.memory_peak,
        memory_failures: used.memory_failures,
        oom_kills: used.oom_kills,
        processes: used.processes,
        threads_max: used.threads_max,
        file_descriptors: used.file_descriptors,
        sockets: used.sockets,
        open_files_soft: used.open_files_soft,
        huge_pages: used.huge_pages.into_iter().map(huge_pages).collect(),
        devices: used.devices.into_iter().map(device).collect(),
        pressure: used.pressure.map(|pressure| v1::Pressure {
            cpu_some: pressure.cpu.0,
            cpu_full: pressure.cpu.1,
            memory_some: pressure.memory.0,
            memory_full: pressure.memory.1,
            io_some: pressure.io.0,
            io_full: pressure.io.1,
        }),
        fs_device: scratch_device(&fs::read_to_string("/proc/self/mounts").unwrap_or_default()),
        fs_limit: of(|room| room.f_blocks.saturating_mul(room.f_frsize)),
        fs_inodes: of(|room| room.f_files),
        fs_inodes_free: of(|room| room.f_ffree),
        fs_usage,
        fs_inodes_used,
    })
}

fn huge_pages(pages: usage::HugePages) -> v1::HugePages {
    v1::HugePages {
        page_size: pages.page_size,
        usage: pages.usage,
        peak: pages.peak,
    }
}

fn device(device: usage::Device) -> v1::DeviceStats {
    v1::DeviceStats {
        name: device.name,
        major: device.major,
        minor: device.minor,
        reads: device.reads,
        read_bytes: device.read_bytes,
        writes: device.writes,
        write_bytes: device.write_bytes,
    }
}

/// Bytes and files of the writable layer, as they were not long ago. Looking at them takes as long as
/// the container has made files: one look at a time, and nobody waits long for it.
async fn layer(container: &Arc<Container>) -> (u64, u64) {
    if container.layer().begin() {
        let (path, container) = (container.upper(), Arc::clone(container));
        let measured = tokio::spawn(async move {
            let found = blocking(move || Ok(usage::of_directory(&path))).await;
            container.layer().end(found.ok());
        });
        // Late, it is there for the next answer.
        drop(timeout(PATIENCE, measured).await);
    }
    container.layer().last()
}

impl Layer {
    /// Whether the caller is to measure.
    fn begin(&mut self) -> bool {
        let fresh = self.last.is_some_and(|(at, ..)| at.elapsed() < FRESH);
        let begin = !fresh && !self.measuring;
        self.measuring |= begin;
        begin
    }

    fn end(&mut self, found: Option<(u64, u64)>) {
        self.measuring = false;
        if let Some((bytes, files)) = found {
            self.last = Some((Instant::now(), bytes, files));
        }
    }

    fn last(&self) -> (u64, u64) {
        self.last.map_or((0, 0), |(_, bytes, files)| (bytes, files))
    }
}

/// What the scratch file system is on, without `/dev/`.
fn scratch_device(mounts: &str) -> String {
    let source = mounts.lines().find_map(|line| {
        let (source, rest) = line.split_once(' ')?;
        (rest.split(' ').next() == Some(dir::SCRATCH)).then_some(source)
    });
    let source = source.unwrap_or_default();
    source.strip_prefix("/dev/").unwrap_or(source).to_owned()
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
            rx_packets: at(1)?,
            rx_errors: at(2)?,
            rx_dropped: at(3)?,
            tx_bytes: at(8)?,
            tx_packets: at(9)?,
            tx_errors: at(10)?,
            tx_dropped: at(11)?,
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
    use super::*;

    #[test]
    fn interfaces_are_counted_in_both_directions() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs|bytes\n\
                    lo: 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n  \
                    eth0: 100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0\n";
        let found = interfaces(text, |name| name != "lo");
        assert_eq!(found.len(), 1);
        let eth = &found[0];
        assert_eq!(eth.name, "eth0");
        assert_eq!(
            (eth.rx_bytes, eth.rx_packets, eth.rx_errors, eth.rx_dropped),
            (100, 2, 3, 4)
        );
        assert_eq!(
            (eth.tx_bytes, eth.tx_packets, eth.tx_errors, eth.tx_dropped),
            (200, 5, 6, 7)
        );
    }

    #[test]
    fn memory_is_in_bytes() {
        let text = "MemTotal:         110000 kB\nMemFree:   5 kB\n";
        assert_eq!(field(text, "MemTotal:"), 110_000 * 1024);
        assert_eq!(field(text, "MemAvailable:"), 0);
    }

    #[test]
    fn a_layer_is_measured_by_one_at_a_time() {
        let mut layer = Layer::default();
        assert!(layer.begin() && !layer.begin());
        layer.end(None);
        assert!(layer.begin());
        layer.end(Some((4096, 1)));
        assert!(!layer.begin());
        assert_eq!(layer.last(), (4096, 1));
    }

    #[test]
    fn the_scratch_disk_has_a_name() {
        let mounts = "root / tmpfs rw 0 0\n/dev/sdb /scratch ext4 rw 0 0\n";
        assert_eq!(scratch_device(mounts), "sdb");
        assert_eq!(scratch_device("scratch /scratch tmpfs rw 0 0\n"), "scratch");
    }
}

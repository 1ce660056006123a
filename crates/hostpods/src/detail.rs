//! What a container of the host uses, in all the detail that the host's control groups have, on either
//! version of them.

use std::{fs, path::Path};

use hypernetes_container::usage;
use hypernetes_runtime::{ContainerDetail, DeviceStats, Pressure};

use crate::cgroup::{Hierarchies, field};

const MICRO: u64 = 1000;
/// Devices and page sizes that are told of.
const MAX_DEVICES: usize = 64;

impl Hierarchies {
    /// What a container's group uses; its writable layer is below `bundle`. Blocks.
    pub(crate) fn detail(&self, group: &str, bundle: &Path) -> ContainerDetail {
        let mut detail = ContainerDetail::default();
        self.cpu(group, &mut detail);
        self.memory(group, &mut detail);
        self.devices(group, &mut detail);
        self.huge_pages(group, &mut detail);
        let processes: Vec<i32> = self.pids(group).into_iter().collect();
        detail.processes = processes.len() as u64;
        detail.threads_max = self.number("pids", group, "pids.max", "pids.max");
        (detail.file_descriptors, detail.sockets) = usage::descriptors(&processes);
        if let Ok(pid) = fs::read_to_string(bundle.join("pid")) {
            let limits = fs::read_to_string(format!("/proc/{}/limits", pid.trim()));
            detail.open_files_soft = usage::open_files(&limits.unwrap_or_default());
        }
        layer(&bundle.join("upper"), &mut detail);
        detail
    }

    /// A file of a controller's group, and whether that is version 2.
    fn text(&self, controller: &str, group: &str, v1: &str, v2: &str) -> (String, bool) {
        let Some((directory, unified)) = self.of(controller, group) else {
            return (String::new(), false);
        };
        let file = directory.join(if unified { v2 } else { v1 });
        (fs::read_to_string(file).unwrap_or_default(), unified)
    }

    fn number(&self, controller: &str, group: &str, v1: &str, v2: &str) -> u64 {
        let (text, _) = self.text(controller, group, v1, v2);
        text.trim().parse().unwrap_or(0)
    }

    fn cpu(&self, group: &str, detail: &mut ContainerDetail) {
        let (text, unified) = self.text("cpu", group, "cpu.stat", "cpu.stat");
        detail.cfs_periods = field(&text, "nr_periods");
        detail.cfs_throttled_periods = field(&text, "nr_throttled");
        let micros = |key: &str| field(&text, key).saturating_mul(MICRO);
        if unified {
            detail.cfs_throttled_nanos = micros("throttled_usec");
            detail.cpu_user_nanos = micros("user_usec");
            detail.cpu_system_nanos = micros("system_usec");
            detail.pressure = self.pressure(group);
        } else {
            detail.cfs_throttled_nanos = field(&text, "throttled_time");
            let of = |file: &str| self.number("cpuacct", group, file, file);
            detail.cpu_user_nanos = of("cpuacct.usage_user");
            detail.cpu_system_nanos = of("cpuacct.usage_sys");
        }
    }

    fn memory(&self, group: &str, detail: &mut ContainerDetail) {
        let (text, unified) = self.text("memory", group, "memory.stat", "memory.stat");
        let keys = match unified {
            true => ["file", "file_mapped"],
            false => ["total_cache", "total_mapped_file"],
        };
        detail.memory_cache = field(&text, keys[0]);
        detail.memory_mapped_file = field(&text, keys[1]);
        detail.memory_kernel = match unified {
            true => field(&text, "kernel"),
            false => self.number("memory", group, "memory.kmem.usage_in_bytes", ""),
        };
        detail.memory_swap = match unified {
            true => self.number("memory", group, "", "memory.swap.current"),
            false => field(&text, "total_swap"),
        };
        detail.memory_peak =
            self.number("memory", group, "memory.max_usage_in_bytes", "memory.peak");
        let (events, _) = self.text("memory", group, "memory.oom_control", "memory.events");
        detail.oom_kills = field(&events, "oom_kill");
        detail.memory_failures = match unified {
            true => field(&events, "max"),
            false => self.number("memory", group, "memory.failcnt", ""),
        };
    }

    fn devices(&self, group: &str, detail: &mut ContainerDetail) {
        let mut found = if let Some((_, true)) = self.of("io", group) {
            let (text, _) = self.text("io", group, "", "io.stat");
            usage::devices(&text, usage::device_name)
        } else {
            let of = |file: &str| self.text("blkio", group, file, "").0;
            let (bytes, requests) = (
                of("blkio.throttle.io_service_bytes_recursive"),
                of("blkio.throttle.io_serviced_recursive"),
            );
            usage::devices(&joined(&bytes, &requests), usage::device_name)
        };
        found.truncate(MAX_DEVICES);
        detail.devices = found
            .into_iter()
            .map(|device| DeviceStats {
                name: device.name,
                major: device.major,
                minor: device.minor,
                reads: device.reads,
                read_bytes: device.read_bytes,
                writes: device.writes,
                write_bytes: device.write_bytes,
            })
            .collect();
    }

    fn huge_pages(&self, group: &str, detail: &mut ContainerDetail) {
        let Some((directory, unified)) = self.of("hugetlb", group) else {
            return;
        };
        let (current, peak) = match unified {
            true => (".current", ".max_usage"),
            false => (".usage_in_bytes", ".max_usage_in_bytes"),
        };
        let mut sizes: Vec<String> = fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let size = name
                    .to_str()?
                    .strip_prefix("hugetlb.")?
                    .strip_suffix(current)?;
                (!size.contains('.')).then(|| size.to_owned())
            })
            .collect();
        sizes.sort();
        sizes.truncate(MAX_DEVICES);
        let number = |size: &str, what: &str| {
            let file = directory.join(format!("hugetlb.{size}{what}"));
            let text = fs::read_to_string(file).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let pages = |size: String| {
            let (now, most) = (number(&size, current), number(&size, peak));
            (size, now, most)
        };
        detail.huge_pages = sizes.into_iter().map(pages).collect();
    }

    fn pressure(&self, group: &str) -> Option<Pressure> {
        let (directory, _) = self.of("cpu", group)?;
        let read = |kind: &str| {
            fs::read_to_string(directory.join(format!("{kind}.pressure"))).unwrap_or_default()
        };
        let found = usage::pressure(read)?;
        Some(Pressure {
            cpu: found.cpu,
            memory: found.memory,
            io: found.io,
        })
    }
}

/// The two files of version 1, with lines `8:0 Read 4096`, as the one of version 2.
fn joined(bytes: &str, requests: &str) -> String {
    let mut lines: Vec<(&str, String)> = Vec::new();
    for (text, read, write) in [(bytes, "rbytes", "wbytes"), (requests, "rios", "wios")] {
        for line in text.lines() {
            let mut words = line.split(' ');
            let (Some(device), Some(operation), Some(value)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let key = match operation {
                "Read" => read,
                "Write" => write,
                _ => continue,
            };
            let index = lines.iter().position(|(name, _)| *name == device);
            let index = index.unwrap_or_else(|| {
                lines.push((device, device.to_owned()));
                lines.len() - 1
            });
            if let Some((_, line)) = lines.get_mut(index) {
                *line += &format!(" {key}={value}");
            }
        }
    }
    let lines: Vec<String> = lines.into_iter().map(|(_, line)| line).collect();
    lines.join("\n")
}

/// The writable layer and the file system that it is on.
fn layer(upper: &Path, detail: &mut ContainerDetail) {
    if let Ok(room) = rustix::fs::statvfs(upper) {
        detail.fs_limit = room.f_blocks.saturating_mul(room.f_frsize);
        detail.fs_inodes = room.f_files;
        detail.fs_inodes_free = room.f_ffree;
    }
    if let Ok(about) = rustix::fs::stat(upper) {
        let (major, minor) = (
            rustix::fs::major(about.st_dev),
            rustix::fs::minor(about.st_dev),
        );
        detail.fs_device = usage::device_name(major, minor).unwrap_or_default();
    }
    (detail.fs_usage, detail.fs_inodes_used) = usage::of_directory(upper);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_s_counts_are_joined_by_device() {
        let bytes = "8:0 Read 4096\n8:0 Write 512\n8:0 Sync 9\n7:1 Read 1\nTotal 4608\n";
        let requests = "8:0 Read 2\n8:0 Write 1\n8:0 Total 3\n";
        assert_eq!(
            joined(bytes, requests),
            "8:0 rbytes=4096 wbytes=512 rios=2 wios=1\n7:1 rbytes=1"
        );
        assert_eq!(joined("", ""), "");
    }

    #[test]
    fn a_group_of_no_hierarchy_has_nothing() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("upper")).unwrap();
        fs::write(place.path().join("upper/file"), [1; 8192]).unwrap();
        let detail = Hierarchies::default().detail("a/b", place.path());
        assert_eq!((detail.processes, detail.cpu_user_nanos), (0, 0));
        assert!(detail.fs_usage >= 8192 && detail.fs_inodes_used == 1);
        assert!(detail.fs_limit > 0);
    }
}

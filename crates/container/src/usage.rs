//! What a container uses, in all the detail that the kernel has. Everything that a container can make
//! long is cut off at a limit.

use std::{fs, path::Path};

use crate::cgroup::{Cgroup, field};

/// Processes whose descriptors are counted,
const MAX_PROCESSES: usize = 1024;
/// and descriptors of all of them.
const MAX_DESCRIPTORS: u64 = 65_536;
/// Devices and page sizes.
const MAX_DEVICES: usize = 64;
/// Files of a writable layer that are counted.
const MAX_FILES: u64 = 200_000;
const MICRO: u64 = 1000;

/// See [`of`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Detail {
    /// Nanoseconds in the program.
    pub cpu_user_nanos: u64,
    /// Nanoseconds in the kernel.
    pub cpu_system_nanos: u64,
    /// Periods of the CPU limit.
    pub cfs_periods: u64,
    /// Periods in which the limit held it up.
    pub cfs_throttled_periods: u64,
    /// Nanoseconds for which the limit held it up.
    pub cfs_throttled_nanos: u64,
    /// Bytes of files in memory.
    pub memory_cache: u64,
    /// Bytes of files that are mapped.
    pub memory_mapped_file: u64,
    /// Bytes of the kernel's for it.
    pub memory_kernel: u64,
    /// Bytes swapped out.
    pub memory_swap: u64,
    /// Most bytes at a time.
    pub memory_peak: u64,
    /// Times that the memory limit was hit.
    pub memory_failures: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Processes.
    pub processes: u64,
    /// Most threads; 0 = no limit.
    pub threads_max: u64,
    /// Open descriptors.
    pub file_descriptors: u64,
    /// Of those, sockets.
    pub sockets: u64,
    /// Soft limit of open files of its first process.
    pub open_files_soft: u64,
    /// By page size.
    pub huge_pages: Vec<HugePages>,
    /// By device.
    pub devices: Vec<Device>,
    /// If the kernel measures it.
    pub pressure: Option<Pressure>,
}

/// Huge pages of one size.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct HugePages {
    /// `2MB`.
    pub page_size: String,
    /// Bytes.
    pub usage: u64,
    /// Most bytes at a time, 0 if it is not known.
    pub peak: u64,
}

/// What was read from and written to a device.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name in `/dev`.
    pub name: String,
    /// Number of its driver.
    pub major: u32,
    /// Number of its own.
    pub minor: u32,
    /// Requests.
    pub reads: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Requests.
    pub writes: u64,
    /// Bytes.
    pub write_bytes: u64,
}

/// Nanoseconds for which some or all tasks waited.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pressure {
    /// Some and all, for a CPU.
    pub cpu: (u64, u64),
    /// Some and all, for memory.
    pub memory: (u64, u64),
    /// Some and all, for a disk.
    pub io: (u64, u64),
}

/// What a container uses, whose first process has this pid here. Blocks.
pub fn of(cgroup: &Cgroup, first: i32) -> Detail {
    let (cpu, memory) = (cgroup.read("cpu.stat"), cgroup.read("memory.stat"));
    let events = cgroup.read("memory.events");
    let number = |file: &str| cgroup.read(file).trim().parse().unwrap_or_default();
    let of = |text: &str, key: &str| field(text, key).unwrap_or_default();
    let micros = |key: &str| of(&cpu, key).saturating_mul(MICRO);
    let processes = cgroup.processes();
    let (file_descriptors, sockets) = descriptors(&processes);
    Detail {
        cpu_user_nanos: micros("user_usec"),
        cpu_system_nanos: micros("system_usec"),
        cfs_periods: of(&cpu, "nr_periods"),
        cfs_throttled_periods: of(&cpu, "nr_throttled"),
        cfs_throttled_nanos: micros("throttled_usec"),
        memory_cache: of(&memory, "file"),
        memory_mapped_file: of(&memory, "file_mapped"),
        memory_kernel: of(&memory, "kernel"),
        memory_swap: number("memory.swap.current"),
        memory_peak: number("memory.peak"),
        memory_failures: of(&events, "max"),
        oom_kills: of(&events, "oom_kill"),
        processes: processes.len() as u64,
        threads_max: number("pids.max"),
        file_descriptors,
        sockets,
        open_files_soft: open_files(
            &fs::read_to_string(format!("/proc/{first}/limits")).unwrap_or_default(),
        ),
        huge_pages: huge_pages(cgroup),
        devices: devices(&cgroup.read("io.stat"), device_name),
        pressure: pressure(|kind| cgroup.read(&format!("{kind}.pressure"))),
    }
}

/// All descriptors of these processes, and those that are sockets.
pub fn descriptors(processes: &[i32]) -> (u64, u64) {
    let (mut all, mut sockets) = (0, 0);
    for pid in processes.iter().take(MAX_PROCESSES) {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        for entry in entries.flatten() {
            if all >= MAX_DESCRIPTORS {
                return (all, sockets);
            }
            all += 1;
            let target = fs::read_link(entry.path()).unwrap_or_default();
            sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
        }
    }
    (all, sockets)
}

/// The soft limit in /proc/PID/limits.
pub fn open_files(limits: &str) -> u64 {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    match soft {
        Some("unlimited") => u64::MAX,
        Some(number) => number.parse().unwrap_or_default(),
        None => 0,
    }
}

fn huge_pages(cgroup: &Cgroup) -> Vec<HugePages> {
    let size = |file: &String| {
        let size = file.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<String> = cgroup.files().iter().filter_map(size).collect();
    sizes.sort();
    sizes.truncate(MAX_DEVICES);
    let number = |file: &str| cgroup.read(file).trim().parse().unwrap_or_default();
    let pages = |page_size: String| HugePages {
        usage: number(&format!("hugetlb.{page_size}.current")),
        peak: 0,
        page_size,
    };
    sizes.into_iter().map(pages).collect()
}

/// Lines of io.stat: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
pub fn devices(text: &str, name: impl Fn(u32, u32) -> Option<String>) -> Vec<Device> {
    let line = |line: &str| {
        let (number, counts) = line.split_once(' ')?;
        let (major, minor) = number.split_once(':')?;
        let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
        let of = |key: &str| {
            let value = counts.split(' ').find_map(|word| {
                let (name, value) = word.split_once('=')?;
                (name == key).then_some(value)
            });
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        Some(Device {
            name: name(major, minor)?,
            major,
            minor,
            reads: of("rios"),
            read_bytes: of("rbytes"),
            writes: of("wios"),
            write_bytes: of("wbytes"),
        })
    };
    text.lines().filter_map(line).take(MAX_DEVICES).collect()
}

/// The name of a block device in `/dev`.
pub fn device_name(major: u32, minor: u32) -> Option<String> {
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// Files with lines `some avg10=0.00 … total=12`, in microseconds.
pub fn pressure(read: impl Fn(&str) -> String) -> Option<Pressure> {
    let of = |kind: &str| {
        let text = read(kind);
        let total = |who: &str| {
            let line = text.lines().find(|line| line.starts_with(who))?;
            let total = line.rsplit_once("total=")?.1.trim().parse::<u64>().ok()?;
            Some(total.saturating_mul(MICRO))
        };
        // The whole machine has no "full" for its CPUs.
        Some((total("some")?, total("full").unwrap_or_default()))
    };
    Some(Pressure {
        cpu: of("cpu")?,
        memory: of("memory")?,
        io: of("io")?,
    })
}

/// Bytes and files of a directory that belongs to a container. Follows no link. Blocks, for as long
/// as it takes to look at [`MAX_FILES`].
pub fn of_directory(path: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let (mut bytes, mut files) = (0, 0);
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if files >= MAX_FILES {
                return (bytes, files);
            }
            // Of a link the link itself.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            files += 1;
            bytes += metadata.blocks() * 512;
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    (bytes, files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names_and_counts() {
        let text = "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n\
                    7:3 rbytes=1\nnonsense\n8:x rbytes=1\n";
        let name = |major, _| (major == 8).then(|| "sda".to_owned());
        let found = devices(text, name);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].major), ("sda", 8));
        assert_eq!((found[0].reads, found[0].read_bytes), (1, 4096));
        assert_eq!((found[0].writes, found[0].write_bytes), (2, 8192));
    }

    #[test]
    fn pressure_is_there_or_not() {
        let text =
            |_: &str| "some avg10=0.00 avg60=0.00 total=12\nfull avg10=0.00 total=3\n".to_owned();
        let got = pressure(text).unwrap();
        assert_eq!((got.cpu, got.io), ((12_000, 3_000), (12_000, 3_000)));
        assert_eq!(pressure(|_| String::new()), None);
    }

    #[test]
    fn limits_are_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max open files            65536                1048576              files\n";
        assert_eq!(open_files(text), 65_536);
        assert_eq!(open_files(""), 0);
    }

    #[test]
    fn a_directory_is_measured_and_not_left() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("upper");
        fs::create_dir_all(layer.join("a/b")).unwrap();
        fs::write(layer.join("a/b/file"), vec![1; 64 * 1024]).unwrap();
        fs::write(dir.path().join("outside"), vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(dir.path(), layer.join("link")).unwrap();
        let (bytes, files) = of_directory(&layer);
        assert_eq!(files, 4);
        assert!((64 * 1024..200 * 1024).contains(&bytes), "{bytes}");
    }
}

//! Control groups on whichever hierarchies this host has: version 1 (one per controller), version
//! 2, or both beside each other. Paths of groups are relative to each hierarchy's root.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use hypernetes_runtime::{ContainerStats, RuntimeError};
use hypernetes_types::ContainerId;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::records::storage;

/// Controllers whose hierarchies a monitor joins, so that it counts for its pod.
const COUNTED: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];
/// Deepest group below a container's that is looked into.
const MAX_DEPTH: u32 = 16;

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    controllers: Vec<String>,
    unified: bool,
}

/// The host's hierarchies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hierarchies(Vec<Hierarchy>);

impl Hierarchies {
    pub(crate) fn read() -> io::Result<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let controllers = |root: &Path| {
            fs::read_to_string(root.join("cgroup.controllers"))
                .map(|list| list.split_whitespace().map(str::to_owned).collect())
                .unwrap_or_default()
        };
        Ok(parse(&table, controllers))
    }

    /// Whether everything is on version 2.
    pub(crate) fn is_unified(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|hierarchy| hierarchy.unified)
    }

    /// The controllers of version 2, where version 1 is there too.
    pub(crate) fn hybrid(&self) -> Option<String> {
        let unified = self.0.iter().find(|hierarchy| hierarchy.unified)?;
        let mixed = !self.is_unified() && !unified.controllers.is_empty();
        mixed.then(|| unified.controllers.join(", "))
    }

    /// Directory of a group in the hierarchy that has this controller, and whether that is version 2.
    pub(crate) fn of(&self, controller: &str, group: &str) -> Option<(PathBuf, bool)> {
        let group = plain(group)?;
        let has = |hierarchy: &&Hierarchy| hierarchy.controllers.iter().any(|c| c == controller);
        let found = self.0.iter().find(has)?;
        Some((found.root.join(group), found.unified))
    }

    /// Puts a process into a group of the hierarchies that count, making it as needed.
    pub(crate) fn join(&self, group: &str, pid: u32) -> io::Result<()> {
        let path = plain(group).ok_or_else(|| io::Error::other("not a plain cgroup path"))?;
        let counts = |hierarchy: &&Hierarchy| {
            let counted = |c: &String| COUNTED.contains(&c.as_str());
            hierarchy.controllers.iter().any(counted)
        };
        let mut joined = false;
        for hierarchy in self.0.iter().filter(counts) {
            make(hierarchy, path)?;
            let leaf = hierarchy.root.join(path);
            fs::write(leaf.join("cgroup.procs"), pid.to_string())
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", leaf.display())))?;
            joined = true;
        }
        match joined {
            true => Ok(()),
            false => Err(io::Error::other("no cgroup hierarchy is mounted")),
        }
    }

    /// The first part of a path that is not there yet in any hierarchy, which whoever makes the
    /// path will have made.
    pub(crate) fn first_missing(&self, group: &str) -> Option<String> {
        let path = plain(group)?;
        let mut so_far = PathBuf::new();
        for part in path.components() {
            so_far.push(part);
            let there = |hierarchy: &Hierarchy| hierarchy.root.join(&so_far).exists();
            if !self.0.iter().any(there) {
                return so_far.to_str().map(str::to_owned);
            }
        }
        None
    }

    /// Removes a group and what is below it everywhere. One that is gone is no error.
    pub(crate) fn remove(&self, group: &str) -> io::Result<()> {
        let Some(path) = plain(group) else {
            return Ok(());
        };
        let mut failure = None;
        for hierarchy in &self.0 {
            if let Err(error) = remove_tree(&hierarchy.root.join(path), MAX_DEPTH) {
                failure = Some(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Removes a group and its parents down to `top`, as far as nobody else is in them.
    pub(crate) fn remove_up_to(&self, group: &str, top: &str) {
        let (Some(path), Some(top)) = (plain(group), plain(top)) else {
            return;
        };
        for hierarchy in &self.0 {
            let mut next = Some(path);
            while let Some(path) = next.filter(|path| path.starts_with(top)) {
                match fs::remove_dir(hierarchy.root.join(path)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => break,
                    _ => next = path.parent(),
                }
            }
        }
    }

    /// Processes in a group and below it.
    pub(crate) fn pids(&self, group: &str) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        if let Some(path) = plain(group) {
            for hierarchy in &self.0 {
                collect(&hierarchy.root.join(path), MAX_DEPTH, &mut pids);
            }
        }
        pids
    }

    /// Kills all processes of a group, until none is left.
    pub(crate) async fn kill(&self, group: &str, patience: Duration) -> Result<(), RuntimeError> {
        let until = Instant::now() + patience;
        loop {
            let pids = self.pids(group);
            if pids.is_empty() {
                return Ok(());
            }
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                // It may have ended meanwhile.
                kill_process(pid, Signal::KILL).ok();
            }
            if Instant::now() > until {
                let stuck = io::Error::other(format!("processes are left in cgroup {group}"));
                return Err(storage("end the processes of a container", stuck));
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether the kernel has killed for want of memory in this group.
    pub(crate) fn oom_killed(&self, group: &str) -> bool {
        let Some((directory, unified)) = self.of("memory", group) else {
            return false;
        };
        let file = match unified {
            true => "memory.events",
            false => "memory.oom_control",
        };
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        field(&text, "oom_kill") > 0
    }

    /// Whether the host counts swap, so that a limit for it can be set.
    pub(crate) fn counts_swap(&self, parent: &str) -> bool {
        self.of("memory", parent)
            .is_some_and(|(directory, unified)| {
                let file = match unified {
                    true => "memory.swap.max",
                    false => "memory.memsw.limit_in_bytes",
                };
                // The root group of version 2 has no limits of its own.
                let mut place = Some(directory.as_path());
                while let Some(directory) = place {
                    if directory.join(file).exists() {
                        return true;
                    }
                    place = directory.parent();
                }
                false
            })
    }

    /// What a container's group uses.
    pub(crate) fn stats(&self, id: &ContainerId, group: &str) -> ContainerStats {
        let mut stats = ContainerStats {
            id: id.clone(),
            cpu_usage_nanos: 0,
            memory_usage: 0,
            memory_working_set: 0,
            memory_rss: 0,
            page_faults: 0,
            major_page_faults: 0,
            pids: 0,
            detail: None,
        };
        let read = |directory: &Path, file: &str| {
            fs::read_to_string(directory.join(file)).unwrap_or_default()
        };
        let number = |text: String| text.trim().parse::<u64>().unwrap_or(0);
        if let Some((directory, false)) = self.of("cpuacct", group) {
            stats.cpu_usage_nanos = number(read(&directory, "cpuacct.usage"));
        } else if let Some((directory, true)) = self.of("cpu", group) {
            let micros = field(&read(&directory, "cpu.stat"), "usage_usec");
            stats.cpu_usage_nanos = micros.saturating_mul(1000);
        }
        if let Some((directory, unified)) = self.of("memory", group) {
            let details = read(&directory, "memory.stat");
            let names = match unified {
                true => [
                    "memory.current",
                    "inactive_file",
                    "anon",
                    "pgfault",
                    "pgmajfault",
                ],
                false => [
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                    "total_rss",
                    "total_pgfault",
                    "total_pgmajfault",
                ],
            };
            stats.memory_usage = number(read(&directory, names[0]));
            let inactive = field(&details, names[1]);
            stats.memory_working_set = stats.memory_usage.saturating_sub(inactive);
            stats.memory_rss = field(&details, names[2]);
            stats.page_faults = field(&details, names[3]);
            stats.major_page_faults = field(&details, names[4]);
        }
        stats.pids = match self.of("pids", group) {
            Some((directory, _)) => number(read(&directory, "pids.current")),
            None => self.pids(group).len() as u64,
        };
        stats
    }
}

/// The number behind a name, one pair a line.
pub(crate) fn field(text: &str, name: &str) -> u64 {
    let value = |line: &str| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    };
    text.lines().find_map(value).unwrap_or(0)
}

/// A group's path below a root, unless it would climb or be the root.
fn plain(group: &str) -> Option<&Path> {
    let path = Path::new(group.trim_start_matches('/'));
    let normal = |part| matches!(part, Component::Normal(_));
    (path.components().all(normal) && path.components().next().is_some()).then_some(path)
}

fn make(hierarchy: &Hierarchy, group: &Path) -> io::Result<()> {
    fs::create_dir_all(hierarchy.root.join(group))?;
    if hierarchy.unified {
        // Version 2 hands controllers down level by level. A level that holds processes itself
        // leaves the group without that controller.
        let mut level = hierarchy.root.clone();
        for part in group.components() {
            for controller in ["memory", "cpu", "pids"] {
                drop(fs::write(
                    level.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                ));
            }
            level.push(part);
        }
    }
    Ok(())
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(path: &Path, depth: u32) -> io::Result<()> {
    if depth > 0 {
        for below in directories(path) {
            remove_tree(&below, depth - 1)?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn collect(path: &Path, depth: u32, pids: &mut BTreeSet<i32>) {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    if depth > 0 {
        for below in directories(path) {
            collect(&below, depth - 1, pids);
        }
    }
}

fn parse(table: &str, controllers: impl Fn(&Path) -> Vec<String>) -> Hierarchies {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in table.lines() {
        // mountinfo: id parent dev root MOUNTPOINT options … - TYPE source SUPER-OPTIONS
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(root) = left.split(' ').nth(4).map(PathBuf::from) else {
            continue;
        };
        if found.iter().any(|hierarchy| hierarchy.root == root) {
            continue;
        }
        let mut right = right.split(' ');
        let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup") => found.push(Hierarchy {
                root,
                controllers: options.split(',').map(str::to_owned).collect(),
                unified: false,
            }),
            Some("cgroup2") => found.push(Hierarchy {
                controllers: controllers(&root),
                root,
                unified: true,
            }),
            _ => {}
        }
    }
    Hierarchies(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 30 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro
26 25 0:23 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
29 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
garbage";

    #[test]
    fn each_controller_is_found_where_it_is() {
        let both = parse(HYBRID, |_| vec!["hugetlb".to_owned()]);
        assert!(!both.is_unified());
        assert_eq!(both.hybrid().as_deref(), Some("hugetlb"));
        assert_eq!(
            both.of("cpuacct", "/a/b"),
            Some(("/sys/fs/cgroup/cpu,cpuacct/a/b".into(), false))
        );
        assert_eq!(parse(HYBRID, |_| Vec::new()).hybrid(), None);
        let unified = parse(
            "29 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            |_| vec!["memory".to_owned()],
        );
        assert!(unified.is_unified() && unified.hybrid().is_none());
        assert_eq!(
            unified.of("memory", "a"),
            Some(("/sys/fs/cgroup/a".into(), true))
        );
    }

    #[test]
    fn paths_cannot_climb() {
        for bad in ["", "/", "../x", "a/../../b"] {
            assert_eq!(plain(bad), None, "{bad}");
        }
    }

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n";
        assert_eq!(field(text, "oom_kill"), 2);
        assert_eq!(field(text, "oom"), 0);
    }
}

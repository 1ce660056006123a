//! cgroup v2 of a container, from the agent's side.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Where the guest has its cgroup tree.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Below it: all containers.
const CONTAINERS: &str = "containers";
/// Deepest nesting that is looked into: a container may make cgroups of its own.
const MAX_DEPTH: u32 = 16;

/// What a container may use. Zero means no limit.
#[derive(Debug, Default, Clone)]
pub struct Limits {
    /// Bytes.
    pub memory: u64,
    /// Microseconds per period.
    pub cpu_quota: u64,
    /// Microseconds.
    pub cpu_period: u64,
    /// cgroup v1 shares, 2 to 262144.
    pub cpu_shares: u64,
    /// Processes.
    pub pids: u64,
    /// Bytes of huge pages by the size's name in the cgroup's files (`2MB`); of others none.
    pub huge_pages: BTreeMap<String, u64>,
    /// Files and what is written to them after the rest; see [`is_limit`].
    pub unified: BTreeMap<String, String>,
}

/// Whether a file of a cgroup is a limit: one of a controller, not one that moves processes.
pub fn is_limit(file: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
    let controllers = ["cpu.", "cpuset.", "hugetlb.", "io.", "memory.", "pids."];
    file.bytes().all(plain)
        && controllers
            .iter()
            .any(|controller| file.starts_with(controller))
}

/// What a container uses.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usage {
    /// CPU time in nanoseconds.
    pub cpu_nanos: u64,
    /// Bytes charged.
    pub memory: u64,
    /// Bytes that cannot be dropped at once.
    pub working_set: u64,
    /// Processes.
    pub pids: u64,
    /// Bytes of anonymous memory.
    pub rss: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that waited for a disk.
    pub major_page_faults: u64,
}

/// Enables every controller for the containers and moves the calling process out of the root.
pub fn prepare_tree() -> io::Result<()> {
    let root = Path::new(ROOT);
    fs::create_dir_all(root.join("agent"))?;
    fs::create_dir_all(root.join(CONTAINERS))?;
    fs::write(root.join("agent/cgroup.procs"), "0")?;
    for directory in [root.to_owned(), root.join(CONTAINERS)] {
        for controller in
            fs::read_to_string(directory.join("cgroup.controllers"))?.split_whitespace()
        {
            // One by one: a controller that cannot be delegated must not keep the others away.
            drop(fs::write(
                directory.join("cgroup.subtree_control"),
                format!("+{controller}"),
            ));
        }
    }
    Ok(())
}

/// A container's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of a container. `name` must be a plain file name.
    pub fn create(name: &str, limits: &Limits) -> io::Result<Self> {
        let cgroup = Self {
            path: Path::new(ROOT).join(CONTAINERS).join(name),
        };
        fs::create_dir(&cgroup.path)?;
        if let Err(error) = cgroup.set(limits) {
            drop(fs::remove_dir(&cgroup.path));
            return Err(error);
        }
        Ok(cgroup)
    }

    fn set(&self, limits: &Limits) -> io::Result<()> {
        if limits.memory > 0 {
            self.write("memory.max", &limits.memory.to_string())?;
            // The whole container, not one of its processes: half a container is of no use.
            self.write("memory.oom.group", "1")?;
            // Absent without swap.
            drop(self.write("memory.swap.max", "0"));
        }
        if limits.cpu_quota > 0 {
            let period = if limits.cpu_period == 0 {
                100_000
            } else {
                limits.cpu_period
            };
            self.write("cpu.max", &format!("{} {period}", limits.cpu_quota))?;
        }
        if limits.cpu_shares > 0 {
            self.write("cpu.weight", &weight(limits.cpu_shares).to_string())?;
        }
        if limits.pids > 0 {
            self.write("pids.max", &limits.pids.to_string())?;
        }
        self.set_huge_pages(limits)?;
        self.set_unified(limits)
    }

    /// The pool of a size is what the containers were promised: who was promised none must not take
    /// another's, by using pages or by reserving them.
    fn set_huge_pages(&self, limits: &Limits) -> io::Result<()> {
        for file in self.files() {
            let Some(size) = huge_page_size(&file) else {
                continue;
            };
            let limit = limits.huge_pages.get(size).copied().unwrap_or_default();
            self.write(&file, &limit.to_string())?;
        }
        Ok(())
    }

    fn set_unified(&self, limits: &Limits) -> io::Result<()> {
        for (file, value) in &limits.unified {
            if !is_limit(file) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.write(file, value).map_err(|error| {
                io::Error::new(error.kind(), format!("cannot write {file}: {error}"))
            })?;
        }
        Ok(())
    }

    /// Replaces the limits: what is 0 has none from then on.
    pub fn update(&self, limits: &Limits) -> io::Result<()> {
        let or_max = |limit: u64| match limit {
            0 => "max".to_owned(),
            limit => limit.to_string(),
        };
        let period = match limits.cpu_period {
            0 => 100_000,
            period => period,
        };
        self.write("memory.max", &or_max(limits.memory))?;
        if limits.memory > 0 {
            self.write("memory.oom.group", "1")?;
        }
        self.write("cpu.max", &format!("{} {period}", or_max(limits.cpu_quota)))?;
        let shares = match limits.cpu_shares {
            0 => 1024,
            shares => shares,
        };
        self.write("cpu.weight", &weight(shares).to_string())?;
        self.write("pids.max", &or_max(limits.pids))?;
        self.set_huge_pages(limits)?;
        self.set_unified(limits)
    }

    /// Moves a process in.
    pub fn add(&self, pid: i32) -> io::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Kills everything in it and below.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Has everything in it and below stand still, or go on. Standing still takes a moment: see
    /// [`Cgroup::is_frozen`].
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether everything in it and below stands still.
    pub fn is_frozen(&self) -> bool {
        self.value("cgroup.events", "frozen") == Some(1)
    }

    /// All processes in it and below.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect(&self.path, MAX_DEPTH, &mut |directory| {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        });
        pids
    }

    /// Whether any process is left.
    pub fn is_populated(&self) -> bool {
        self.value("cgroup.events", "populated") != Some(0)
    }

    /// Processes that were killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.value("memory.events", "oom_kill").unwrap_or_default()
    }

    /// What is used at present.
    pub fn usage(&self) -> Usage {
        let memory = self.number("memory.current");
        let stat = fs::read_to_string(self.path.join("memory.stat")).unwrap_or_default();
        let stat = |key| field(&stat, key).unwrap_or_default();
        Usage {
            cpu_nanos: self
                .value("cpu.stat", "usage_usec")
                .unwrap_or_default()
                .saturating_mul(1000),
            memory,
            working_set: memory.saturating_sub(stat("inactive_file")),
            pids: self.number("pids.current"),
            rss: stat("anon"),
            page_faults: stat("pgfault"),
            major_page_faults: stat("pgmajfault"),
        }
    }

    /// Removes it with everything below. Fails while processes are in it.
    pub fn remove(&self) -> io::Result<()> {
        let mut directories = Vec::new();
        collect(&self.path, MAX_DEPTH, &mut |directory| {
            directories.push(directory.to_owned());
        });
        for directory in directories.iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// A file of it; empty if there is none.
    pub(crate) fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// The files that it has, by name.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    fn value(&self, file: &str, key: &str) -> Option<u64> {
        field(&fs::read_to_string(self.path.join(file)).ok()?, key)
    }
}

/// The size of page that a file limits.
fn huge_page_size(file: &str) -> Option<&str> {
    let limit = file.strip_prefix("hugetlb.")?.strip_suffix(".max")?;
    Some(limit.strip_suffix(".rsvd").unwrap_or(limit))
}

/// Visits a cgroup and those below, parents first.
fn collect(directory: &Path, depth: u32, visit: &mut impl FnMut(&Path)) {
    visit(directory);
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth, visit);
        }
    }
}

pub(crate) fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// cgroup v1 shares (2 to 262144) to v2 weight (1 to 10000), as container runtimes convert them.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + ((shares - 2) * 9999) / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(weight),
            [1, 1, 39, 10_000, 10_000]
        );
    }

    #[test]
    fn only_limits_can_be_written() {
        for limit in [
            "memory.oom.group",
            "cpu.idle",
            "hugetlb.2MB.max",
            "pids.max",
        ] {
            assert!(is_limit(limit), "{limit}");
        }
        for other in [
            "cgroup.procs",
            "cgroup.kill",
            "memory.x/../../cgroup.procs",
            "",
        ] {
            assert!(!is_limit(other), "{other}");
        }
    }

    #[test]
    fn limits_of_huge_pages_are_found_by_their_files() {
        assert_eq!(huge_page_size("hugetlb.2MB.max"), Some("2MB"));
        assert_eq!(huge_page_size("hugetlb.1GB.rsvd.max"), Some("1GB"));
        assert_eq!(huge_page_size("hugetlb.2MB.current"), None);
        assert_eq!(huge_page_size("memory.max"), None);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom_kil"), None);
        assert_eq!(field(text, "absent"), None);
    }
}

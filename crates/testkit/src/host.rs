//! A picture of what a daemon could leave behind on the host.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use crate::stdout;

/// Links, routes, namespaces, nft rules, mounts, cgroups, sysctls, processes of one daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPicture(BTreeSet<String>);

impl HostPicture {
    /// Looks at the host. Only processes whose command line names `run_dir` count, so that tests
    /// may run beside each other; likewise only links, tables and namespaces with `instance`.
    pub fn take(instance: &str, run_dir: &Path) -> Self {
        let mut lines = BTreeSet::new();
        let mine = |text: &str| text.contains(instance);
        for link in stdout(Command::new("ip").args(["-o", "link"])).lines() {
            let name = link.split(": ").nth(1).unwrap_or(link);
            if mine(name) {
                lines.insert(format!("link {name}"));
            }
        }
        for route in stdout(Command::new("ip").args(["route"]))
            .lines()
            .filter(|line| mine(line))
        {
            lines.insert(format!("route {route}"));
        }
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if mine(&name) {
                lines.insert(format!("namespace {name}"));
            }
        }
        for table in stdout(Command::new("nft").args(["list", "tables"]))
            .lines()
            .filter(|l| mine(l))
        {
            lines.insert(format!("nft {table}"));
        }
        for mount in fs::read_to_string("/proc/self/mounts").unwrap().lines() {
            let target = mount.split(' ').nth(1).unwrap_or(mount);
            if mine(target) || target.starts_with(&*run_dir.to_string_lossy()) {
                lines.insert(format!("mount {target}"));
            }
        }
        for pid in vmm_processes(run_dir) {
            lines.insert(format!("process {pid}"));
        }
        Self(lines)
    }

    /// Nothing is there.
    pub fn is_clean(&self) -> bool {
        self.0.is_empty()
    }
}

/// Processes whose command line names the directory.
pub(crate) fn vmm_processes(run_dir: &Path) -> Vec<u32> {
    let needle = run_dir.to_string_lossy().into_owned();
    let me = std::process::id();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != me)
        .filter(|pid| {
            let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            exe.to_string_lossy().contains("qemu-system")
                && (String::from_utf8_lossy(&cmdline).contains(&needle) || cwd.starts_with(run_dir))
        })
        .collect()
}

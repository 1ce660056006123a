//! A picture of what a daemon could leave behind on the host.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use rustix::process::{Pid, Signal, kill_process};

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
            // Four hex digits alone are in many a temporary name.
            let ours = target.contains(&format!("-{instance}"));
            if ours || target.starts_with(&*run_dir.to_string_lossy()) {
                lines.insert(format!("mount {target}"));
            }
        }
        let cgroups = stdout(
            Command::new("find")
                .args(["/sys/fs/cgroup", "-type", "d", "-name"])
                .arg(format!("hypernetes-{instance}")),
        );
        for group in cgroups.lines() {
            lines.insert(format!("cgroup {group}"));
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

/// Processes of VMs whose run directories are below `run_dir`: they have records of their launch.
pub(crate) fn vmm_processes(run_dir: &Path) -> Vec<u32> {
    fs::read_dir(run_dir.join("vm"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("launch.json")).ok())
        .filter_map(|record| {
            let record: serde_json::Value = serde_json::from_str(&record).ok()?;
            u32::try_from(record["pid"].as_u64()?).ok()
        })
        .filter(|pid| {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            exe.to_string_lossy().contains("qemu")
        })
        .collect()
}

/// Ends the processes of VMs whose run directories are below `run_dir`.
pub(crate) fn kill_vmms(run_dir: &Path) {
    for pid in vmm_processes(run_dir) {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // It may have ended meanwhile.
            kill_process(pid, Signal::KILL).ok();
        }
    }
}

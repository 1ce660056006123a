//! What an operator wants to know of the whole node: starts of VMs, and what they take of the host.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hypernetes_types::SandboxId;
use hypernetes_vmm::VmRecord;

/// Figures of a node, at a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFigures {
    /// Starts since the runtime was opened.
    pub starts: StartFigures,
    /// Bytes of the host's memory that the VM of a sandbox takes: its proportional set size, so that
    /// what VMs share is counted once.
    pub host_memory: BTreeMap<SandboxId, u64>,
}

/// Starts of sandboxes' VMs since the runtime was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartFigures {
    /// Went on from a template.
    pub from_template: u64,
    /// Booted a kernel.
    pub booted: u64,
    /// Did not come up.
    pub failed: u64,
    /// Time that those took that came up, from the request to a ready sandbox.
    pub took: Duration,
}

/// Counts starts.
#[derive(Debug, Default)]
pub(crate) struct Starts(Mutex<StartFigures>);

impl Starts {
    pub(crate) fn came_up(&self, from_template: bool, took: Duration) {
        let mut figures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match from_template {
            true => figures.from_template += 1,
            false => figures.booted += 1,
        }
        figures.took += took;
    }

    pub(crate) fn failed(&self) {
        let mut figures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        figures.failed += 1;
    }

    pub(crate) fn figures(&self) -> StartFigures {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that a VMM takes; `None` if it has ended. Blocks.
pub(crate) fn host_memory(vm: &VmRecord) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", vm.pid)).ok()?;
    // Field 22, counted behind the name, which may hold anything.
    let start = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    if start.parse::<u64>().ok()? != vm.start_time {
        return None;
    }
    proportional(&fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid)).ok()?)
}

fn proportional(smaps: &str) -> Option<u64> {
    let line = smaps.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_counted_by_how_they_went() {
        let starts = Starts::default();
        starts.came_up(true, Duration::from_millis(300));
        starts.came_up(false, Duration::from_millis(700));
        starts.failed();
        let figures = starts.figures();
        assert_eq!(
            (figures.from_template, figures.booted, figures.failed),
            (1, 1, 1)
        );
        assert_eq!(figures.took, Duration::from_secs(1));
    }

    #[test]
    fn a_process_is_itself_or_gone() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        let start = fields.split_whitespace().nth(19).unwrap();
        let mut vm = VmRecord {
            driver: "fake".into(),
            sandbox: SandboxId::random(),
            pid: std::process::id(),
            start_time: start.parse().unwrap(),
            run_dir: "/".into(),
            cgroup: None,
        };
        assert!(host_memory(&vm).unwrap() > 100 * 1024);
        vm.start_time += 1;
        assert_eq!(host_memory(&vm), None);
        assert_eq!(proportional("Rss: 8 kB\nPss:      4 kB\n"), Some(4096));
    }
}

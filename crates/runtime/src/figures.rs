//! What an operator wants to know of the whole node: starts of VMs, and what they take of the host.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hypernetes_types::SandboxId;
use hypernetes_vmm::VmRecord;
use tokio::sync::watch;

use crate::{pool::PoolFigures, timing::Timing};

/// Figures of a node, at a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFigures {
    /// Starts since the runtime was opened.
    pub starts: StartFigures,
    /// VMs that wait for a sandbox.
    pub pool: PoolFigures,
    /// Bytes of the host's memory that the VM of a sandbox takes: its proportional set size, so that
    /// what VMs share is counted once.
    pub host_memory: BTreeMap<SandboxId, u64>,
}

/// Starts of sandboxes' VMs since the runtime was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartFigures {
    /// Were in the pool.
    pub from_pool: u64,
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
pub(crate) struct Starts {
    figures: Mutex<StartFigures>,
    /// How many have begun, and how many of them are under way.
    begun: watch::Sender<(u64, u64)>,
}

/// A start that is under way.
#[derive(Debug)]
pub(crate) struct UnderWay<'a>(&'a Starts);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.begun.send_modify(|(_, under_way)| *under_way -= 1);
    }
}

impl Starts {
    fn lock(&self) -> MutexGuard<'_, StartFigures> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self) -> UnderWay<'_> {
        self.begun.send_modify(|(begun, under_way)| {
            *begun += 1;
            *under_way += 1;
        });
        UnderWay(self)
    }

    pub(crate) fn begun(&self) -> u64 {
        self.begun.borrow().0
    }

    /// Waits until none is under way, and tells how many have begun.
    pub(crate) async fn settled(&self) -> u64 {
        let mut begun = self.begun.subscribe();
        let settled = begun.wait_for(|(_, under_way)| *under_way == 0).await;
        // The sender is in `self`.
        settled.map_or(0, |counts| counts.0)
    }

    pub(crate) fn came_up(&self, timing: &Timing) {
        let mut figures = self.lock();
        match (timing.from_pool, timing.from_template) {
            (true, _) => figures.from_pool += 1,
            (false, true) => figures.from_template += 1,
            (false, false) => figures.booted += 1,
        }
        figures.took += timing.total;
    }

    pub(crate) fn failed(&self) {
        self.lock().failed += 1;
    }

    pub(crate) fn figures(&self) -> StartFigures {
        *self.lock()
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
        for (from_pool, from_template, millis) in
            [(false, true, 300), (false, false, 600), (true, true, 100)]
        {
            starts.came_up(&Timing {
                from_pool,
                from_template,
                total: Duration::from_millis(millis),
                ..Timing::default()
            });
        }
        starts.failed();
        let figures = starts.figures();
        let counts = (figures.from_pool, figures.from_template, figures.booted);
        assert_eq!((counts, figures.failed), ((1, 1, 1), 1));
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

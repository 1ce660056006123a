//! What a VM that was launched for nobody gets when somebody takes it: a cgroup, and its share of the
//! host's CPUs.

use super::vm::QemuVm;
use crate::{VmmError, launcher::cgroup, process::LaunchRecord};

/// Nice value of a VMM that nobody waits for.
const BACK: i32 = 10;

impl QemuVm {
    /// Puts the VMM with all of its threads into `group`.
    pub(super) fn enter_cgroup(&self, group: &str) -> Result<(), VmmError> {
        let failed = |source| VmmError::Io {
            action: "move to a cgroup the VMM of",
            path: self.record.run_dir.clone(),
            source,
        };
        if self.cgroup.set(group.to_owned()).is_err() {
            return Err(self.control(format!("enter {group}"), "the VMM has a cgroup already"));
        }
        // First: whoever clears up after a crash in between is to find the group.
        LaunchRecord {
            pid: self.process.pid,
            start_time: self.process.start_time,
            cgroup: Some(group.to_owned()),
        }
        .write(&self.run.record())
        .map_err(failed)?;
        cgroup::join(group, self.process.pid).map_err(failed)
    }

    /// Threads have priorities of their own, and get that of the thread which makes them.
    pub(super) fn set_priority(&self, back: bool) -> Result<(), VmmError> {
        let failed = |source| VmmError::Io {
            action: "set the priority of the VMM of",
            path: self.record.run_dir.clone(),
            source,
        };
        let nice = if back { BACK } else { 0 };
        let tasks = format!("/proc/{}/task", self.process.pid);
        // Again, for those that have begun meanwhile.
        for _ in 0..2 {
            for entry in std::fs::read_dir(&tasks).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let thread = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse().ok());
                let Some(thread) = thread.and_then(rustix::process::Pid::from_raw) else {
                    continue;
                };
                match rustix::process::setpriority_process(Some(thread), nice) {
                    // It has ended.
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => return Err(failed(error.into())),
                }
            }
        }
        Ok(())
    }
}

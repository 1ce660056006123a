//! Which CPUs of the host a VM's virtual CPUs run on.
//!
//! Each virtual CPU is a thread of the VMM. What else the VMM does, it does where the host lets it.

use std::path::Path;

use hypernetes_types::CpuSet;
use rustix::{
    io::Errno,
    process::Pid,
    thread::{CpuSet as Mask, sched_getaffinity, sched_setaffinity},
};
use serde_json::json;

use super::{qmp::QmpError, vm::QemuVm};
use crate::VmmError;

impl QemuVm {
    /// Has the virtual CPUs run on these CPUs, or where the VMM itself may.
    pub(super) async fn pin(&self, cpus: Option<&CpuSet>) -> Result<(), VmmError> {
        let action = "choose the CPUs of the VM";
        let failed = |error: Errno| self.control(action.to_owned(), &error.to_string());
        let own = Pid::from_raw(i32::try_from(self.process.pid).unwrap_or_default());
        let own = own.ok_or_else(|| failed(Errno::SRCH))?;
        let mask = match cpus {
            Some(cpus) => mask(cpus).ok_or_else(|| failed(Errno::INVAL))?,
            // Its first thread is never pinned.
            None => sched_getaffinity(Some(own)).map_err(failed)?,
        };
        let answer = self.qmp.execute("query-cpus-fast", json!({})).await;
        let answer = answer.map_err(self.failed(action))?;
        let listed = answer.as_array().into_iter().flatten();
        let threads: Vec<i32> = listed
            .filter_map(|cpu| i32::try_from(cpu["thread-id"].as_i64()?).ok())
            .collect();
        if threads.is_empty() {
            let nothing = QmpError::Protocol("query-cpus-fast".to_owned());
            return Err(self.failed(action)(nothing));
        }
        for thread in threads {
            // The VMM is not trusted: what is no thread of its own is left alone.
            let place = format!("/proc/{}/task/{thread}", self.process.pid);
            let thread = Pid::from_raw(thread).filter(|_| thread > 0 && Path::new(&place).exists());
            let thread = thread.ok_or_else(|| failed(Errno::SRCH))?;
            sched_setaffinity(Some(thread), &mask).map_err(failed)?;
        }
        Ok(())
    }
}

/// `None` if a number is beyond what the call can say.
fn mask(cpus: &CpuSet) -> Option<Mask> {
    let mut mask = Mask::new();
    for cpu in cpus.iter() {
        let cpu = usize::try_from(cpu)
            .ok()
            .filter(|cpu| *cpu < Mask::MAX_CPU)?;
        mask.set(cpu);
    }
    Some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hold_what_they_can() {
        let found = mask(&"0,5".parse().unwrap()).unwrap();
        assert!(found.is_set(0) && found.is_set(5) && found.count() == 2);
        assert!(mask(&"8191".parse().unwrap()).is_none());
    }
}

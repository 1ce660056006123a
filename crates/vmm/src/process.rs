//! The VMM as a host process: found by pid and start time, watched and killed through a pidfd.
//!
//! A VMM may be our child or, after a restart of the daemon, somebody else's: everything here works
//! for both. Only the exit status is known for children alone.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

/// What the launcher writes before it becomes the VMM: enough to find the process again when the
/// daemon died before it could store a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LaunchRecord {
    pub(crate) pid: u32,
    pub(crate) start_time: u64,
    pub(crate) cgroup: Option<String>,
}

impl LaunchRecord {
    /// Reads the record at `path`; `None` if there is none or it is not one.
    pub(crate) fn read(path: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes the record so that a reader sees all of it or nothing.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let draft = path.with_extension("tmp");
        std::fs::write(&draft, serde_json::to_vec(self)?)?;
        std::fs::rename(&draft, path)
    }
}

/// State letter and start time (clock ticks since boot) of a process.
pub(crate) fn stat(pid: u32) -> io::Result<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::other("unexpected format of /proc/PID/stat"))
}

fn parse_stat(text: &str) -> Option<(char, u64)> {
    // The command name is in parentheses and may itself hold any character: fields count from the
    // last closing one. State is field 3, start time field 22 (proc_pid_stat(5)).
    let rest = text.rsplit_once(')')?.1;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// How a process ended, as far as this process may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    Code(i32),
    Signal(i32),
    /// It was not our child.
    Unknown,
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Unknown => f.write_str("exit status unknown"),
        }
    }
}

/// A process that cannot be confused with a later one of the same pid.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pidfd: Arc<OwnedFd>,
    pub(crate) pid: u32,
    pub(crate) start_time: u64,
}

impl Process {
    /// Opens the process `pid`. With `start_time`, only if it is the one that started then.
    /// `None` if it does not run (any more).
    pub(crate) fn open(pid: u32, start_time: Option<u64>) -> io::Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // The pidfd was opened first: if the start time agrees now, both name the same process.
        let (state, started) = match stat(pid) {
            Ok(found) => found,
            Err(e) if gone(&e) => return Ok(None),
            Err(e) => return Err(e),
        };
        if start_time.is_some_and(|wanted| wanted != started) {
            return Ok(None);
        }
        let process = Self {
            pidfd: Arc::new(pidfd),
            pid,
            start_time: started,
        };
        if matches!(state, 'Z' | 'X') && start_time.is_some() {
            process.reap();
            return Ok(None);
        }
        Ok(Some(process))
    }

    /// Its children, as far as they can be told.
    pub(crate) fn children(&self) -> Vec<Self> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid);
        let list = std::fs::read_to_string(path).unwrap_or_default();
        let pids = list
            .split_ascii_whitespace()
            .filter_map(|pid| pid.parse().ok());
        pids.filter_map(|pid| Self::open(pid, None).ok().flatten())
            .collect()
    }

    /// Sends SIGKILL. A process that has ended is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&*self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until the process has ended, and leaves the reaping to others. Cancel-safe.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        #[allow(
            deprecated,
            reason = "the replacement is unsafe, which this crate forbids; an OwnedFd keeps what it asks for"
        )]
        let fd = AsyncFd::with_interest(Arc::clone(&self.pidfd), Interest::READABLE)?;
        fd.readable().await.map(drop)
    }

    /// Waits until the process has ended, and reaps it if it is our child. Cancel-safe.
    pub(crate) async fn exited(&self) -> io::Result<ExitStatus> {
        #[allow(
            deprecated,
            reason = "the replacement is unsafe, which this crate forbids; an OwnedFd keeps what it asks for"
        )]
        let fd = AsyncFd::with_interest(Arc::clone(&self.pidfd), Interest::READABLE)?;
        drop(fd.readable().await?);
        Ok(self.reap())
    }

    fn reap(&self) -> ExitStatus {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(Some(status)) => status
                .exit_status()
                .map(ExitStatus::Code)
                .or_else(|| status.terminating_signal().map(ExitStatus::Signal))
                .unwrap_or(ExitStatus::Unknown),
            _ => ExitStatus::Unknown,
        }
    }
}

/// `/proc/PID` files vanish with ENOENT, or with ESRCH if the process ends while one is open.
fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
        || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_hostile_command_names() {
        let line = "42 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21";
        assert_eq!(parse_stat(line), Some(('S', 987_654)));
        assert_eq!(parse_stat("42 (x) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[tokio::test]
    async fn a_reused_pid_is_not_taken_for_the_process() {
        let me = std::process::id();
        let start = stat(me).unwrap().1;
        assert!(Process::open(me, Some(start)).unwrap().is_some());
        assert!(Process::open(me, Some(start + 1)).unwrap().is_none());
        assert!(Process::open(0, None).unwrap().is_none());
    }

    #[tokio::test]
    async fn kill_and_status_of_a_child() {
        #[allow(
            clippy::zombie_processes,
            reason = "the process is reaped by what is tested"
        )]
        let child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let process = Process::open(child.id(), None).unwrap().unwrap();
        process.kill().unwrap();
        assert_eq!(process.exited().await.unwrap(), ExitStatus::Signal(9));
        process.kill().unwrap();
        assert!(
            Process::open(child.id(), Some(process.start_time))
                .unwrap()
                .is_none()
        );
    }
}

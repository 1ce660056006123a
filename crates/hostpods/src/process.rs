//! Processes of this host that may be nobody's child here, watched through a pidfd.

use std::{fs, io, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{Interest, unix::AsyncFd};
/// A descriptor that tasks wait for.
#[allow(
    deprecated,
    reason = "the replacement is unsafe, which this crate forbids; an OwnedFd keeps what it asks for"
)]
pub(crate) fn waitable(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}

/// A process that cannot be confused with a later one of the same pid.
#[derive(Debug)]
pub(crate) struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// The process `pid` if it runs and has all these words among its arguments.
    pub(crate) fn find(pid: u32, words: &[&str]) -> io::Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Looked at after it was opened: if it is the right one now, the descriptor is its own.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let has = |word: &&str| {
            line.split(|byte| *byte == 0)
                .any(|arg| arg == word.as_bytes())
        };
        if !words.iter().all(has) {
            return Ok(None);
        }
        Ok(Some(Self(waitable(pidfd, Interest::READABLE)?)))
    }

    /// Until it has ended.
    pub(crate) async fn ended(&self) {
        // An error is the end of the reactor, and so of everything.
        drop(self.0.readable().await);
    }

    pub(crate) fn kill(&self) {
        pidfd_send_signal(self.0.get_ref(), Signal::KILL).ok();
    }
}

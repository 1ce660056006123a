//! PID 1 reaps everybody. One task waits for all children and hands exits to those who asked;
//! nothing else in this process may wait for a child.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use hypernetes_container::{PidNamespace, Spawned};
use rustix::process::WaitOptions;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::error::{Attempt, GuestError};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(u8),
    Signal(u32),
}

impl Ended {
    /// As a shell reports it.
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Code(code) => code.into(),
            Self::Signal(signal) => 128 + signal.cast_signed(),
        }
    }

    pub(crate) fn signal(self) -> u32 {
        match self {
            Self::Code(_) => 0,
            Self::Signal(signal) => signal,
        }
    }
}

/// Shares the waiters with the task.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    waiters: Arc<Mutex<HashMap<i32, oneshot::Sender<Ended>>>>,
}

impl Reaper {
    /// Starts a child and watches it. Between the two nothing can reap it: both happen without a
    /// pause on the one thread that the reaper runs on.
    pub(crate) fn spawn(
        &self,
        namespace: PidNamespace<'_>,
    ) -> Result<(Spawned, oneshot::Receiver<Ended>), GuestError> {
        let spawned = hypernetes_container::spawn(namespace).attempt("start a child process")?;
        let (tx, rx) = oneshot::channel();
        self.waiters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(spawned.pid, tx);
        Ok((spawned, rx))
    }

    /// The task. Needs the runtime to be entered.
    pub(crate) fn run(self) -> Result<impl Future<Output = ()>, GuestError> {
        let mut children = signal(SignalKind::child()).attempt("watch for ended children")?;
        Ok(async move {
            loop {
                // The signal may stand for many children, or for one that is gone already.
                while let Some((pid, ended)) = reap() {
                    let waiter = self
                        .waiters
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&pid);
                    // Whoever asked may have given up.
                    let _unheard = waiter.map(|waiter| waiter.send(ended));
                }
                if children.recv().await.is_none() {
                    return;
                }
            }
        })
    }
}

fn reap() -> Option<(i32, Ended)> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                let pid = pid.as_raw_nonzero().get();
                if let Some(code) = status.exit_status() {
                    return Some((pid, Ended::Code(u8::try_from(code).unwrap_or(u8::MAX))));
                }
                if let Some(signal) = status.terminating_signal() {
                    return Some((pid, Ended::Signal(signal.unsigned_abs())));
                }
            }
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
            Ok(None) | Err(_) => return None,
        }
    }
}

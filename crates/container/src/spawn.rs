//! Starts the child in the right pid namespace.

use std::{
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::Command,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::control::Control;

/// `argv[0]` by which the agent's binary knows that it is the child.
pub const CHILD_NAME: &str = "container-init";

/// Which pid namespace a child lives in.
#[derive(Debug, Clone, Copy)]
pub enum PidNamespace<'a> {
    /// A new one, of which it is the first process.
    New,
    /// That of the process with this pidfd.
    Of(BorrowedFd<'a>),
    /// The caller's.
    Own,
}

/// A child that waits for its job.
#[derive(Debug)]
pub struct Spawned {
    /// In the caller's pid namespace.
    pub pid: i32,
    /// The socket to it. Dropped before the gate opens, the child ends.
    pub control: Control,
}

/// Starts a child. It must be reaped by pid. Blocks only for the fork.
///
/// The calling thread's choice of pid namespace for its children changes and is restored before the
/// call returns, so no other code of that thread can run in between.
pub fn spawn(namespace: PidNamespace<'_>) -> io::Result<Spawned> {
    let own = std::fs::File::open("/proc/self/ns/pid")?;
    let (ours, theirs) = UnixStream::pair()?;
    match namespace {
        PidNamespace::New => unshare(CloneFlags::CLONE_NEWPID)?,
        PidNamespace::Of(pidfd) => setns(pidfd, CloneFlags::CLONE_NEWPID)?,
        PidNamespace::Own => {}
    }
    let spawned = Command::new("/proc/self/exe")
        .arg0(CHILD_NAME)
        .env_clear()
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .spawn();
    setns(own, CloneFlags::CLONE_NEWPID)?;
    let pid = i32::try_from(spawned?.id()).map_err(io::Error::other)?;
    Ok(Spawned {
        pid,
        control: Control::new(ours),
    })
}

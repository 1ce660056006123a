//! The first process of a process namespace that the containers of a pod share.

use std::{
    convert::Infallible,
    ffi::OsString,
    io::{self, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
};

use hypernetes_types::SandboxId;
use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
};
use rustix::process::{WaitOptions, setsid, wait};

use crate::{
    cgroup::Hierarchies,
    namespaces::{on_own_thread, pin},
    oci::PATH,
};

/// Is the first process of a process namespace: reaps what others leave, until it is killed.
///
/// It first waits for a byte on its input, and ends if there is none: a daemon that died before it
/// knew the process leaves none behind.
///
/// # Errors
/// If it is not let go, or cannot wait.
pub fn pause() -> io::Result<Infallible> {
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    child_ended.thread_block()?;
    io::stdin().read_exact(&mut [0])?;
    // Fails for the leader of a group, which then needs it not.
    setsid().ok();
    loop {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        child_ended.wait()?;
    }
}

/// Starts the program in a new process namespace and in `group`, and pins the namespace. Blocks.
pub(crate) fn start(
    program: &[OsString],
    id: &SandboxId,
    group: &str,
    pid_file: &Path,
) -> io::Result<Child> {
    let (name, args) = program
        .split_first()
        .ok_or_else(|| io::Error::other("no program is configured for it"))?;
    let mut child = on_own_thread(|| {
        // Of this thread's children from now on.
        unshare(CloneFlags::CLONE_NEWPID)?;
        Command::new(name)
            .args(args)
            .arg(id.as_str())
            .env_clear()
            .env("PATH", PATH)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    })?;
    let pid = child.id();
    let set_up = Hierarchies::read()
        .and_then(|all| all.join(group, pid))
        .and_then(|()| pin(Path::new(&format!("/proc/{pid}/ns/pid")), pid_file))
        .and_then(|()| match child.stdin.take() {
            Some(mut gate) => gate.write_all(b"1"),
            None => Err(io::Error::other("it has no input")),
        });
    if let Err(error) = set_up {
        drop(child.kill());
        drop(child.wait());
        return Err(error);
    }
    Ok(child)
}

//! Starts QEMU through the launcher, with the descriptors it is to have and no others.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::MemfdFlags;

use crate::launcher::LaunchSpec;

/// Number under which the launcher finds its specification.
const SPEC_FD: RawFd = 3;

/// How to start the launcher: a program that calls
/// [`exec_from_fd`](crate::launcher::exec_from_fd) with the descriptor number that is appended to
/// `args`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments before the descriptor number.
    pub args: Vec<OsString>,
}

impl Launcher {
    /// The running program itself, with the hidden subcommand `vmm-launch`.
    ///
    /// `/proc/self/exe` and not a path: after an upgrade the path may be another version.
    pub fn current_program() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            args: vec!["vmm-launch".into()],
        }
    }
}

/// The descriptors that a VMM inherits, and their numbers there.
#[derive(Debug, Default)]
pub(crate) struct Handover(Vec<OwnedFd>);

impl Handover {
    /// Adds a descriptor and returns its number in the VMM.
    pub(crate) fn add(&mut self, fd: OwnedFd) -> RawFd {
        self.0.push(fd);
        SPEC_FD + RawFd::try_from(self.0.len()).expect("a VM has few descriptors")
    }

    pub(crate) fn numbers(&self) -> Vec<RawFd> {
        (1..).map(|n| SPEC_FD + n).take(self.0.len()).collect()
    }
}

/// Starts the launcher. The child becomes the VMM, keeping its pid.
pub(crate) fn spawn(
    launcher: &Launcher,
    spec: &LaunchSpec,
    handover: Handover,
    stdout: Stdio,
    stderr: Stdio,
) -> io::Result<Child> {
    let numbers = handover.numbers();
    let mut memfd = File::from(rustix::fs::memfd_create("vmm-launch", MemfdFlags::CLOEXEC)?);
    memfd.write_all(&serde_json::to_vec(spec)?)?;
    let mut mappings = vec![FdMapping {
        parent_fd: memfd.into(),
        child_fd: SPEC_FD,
    }];
    for (parent_fd, child_fd) in handover.0.into_iter().zip(numbers) {
        mappings.push(FdMapping {
            parent_fd,
            child_fd,
        });
    }
    let mut command = Command::new(&launcher.program);
    command
        .args(&launcher.args)
        .arg(SPEC_FD.to_string())
        .env_clear()
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .fd_mappings(mappings)
        .map_err(io::Error::other)?;
    // Dropping the command closes our copies: when the VMM dies its sockets are then closed.
    command.spawn()
}

/// Paths that any QEMU reads: itself, its libraries and firmware, and what its libraries ask of
/// the system at start.
pub(crate) fn readable(program: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = [
        "/usr",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
        "/dev/urandom",
        "/proc/self",
        "/proc/sys/vm",
        "/proc/sys/kernel",
        "/proc/sys/crypto",
        "/proc/meminfo",
        "/proc/cpuinfo",
        "/sys/devices/system/cpu",
        "/sys/kernel/mm/transparent_hugepage",
    ]
    .map(PathBuf::from)
    .to_vec();
    // A QEMU of its own prefix: PREFIX/bin/qemu-system-x86_64 with PREFIX/share beside it.
    if let Some(prefix) = program.parent().and_then(Path::parent)
        && prefix.parent().is_some()
    {
        paths.push(prefix.to_owned());
    }
    paths
}

/// A copy of `bytes` that a child can be handed and open by number.
pub(crate) fn memfd(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    rustix::fs::fchmod(file.as_fd(), rustix::fs::Mode::from_raw_mode(0o444))?;
    Ok(file.into())
}

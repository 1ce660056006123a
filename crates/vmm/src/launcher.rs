//! Turns a process of our own program into a VMM that may do next to nothing.
//!
//! The daemon starts its own binary again with a hidden subcommand, which calls [`exec_from_fd`].
//! The steps need a process of their own, and must not run between fork and exec of a threaded
//! daemon. They are, in this order, because each later one takes away what an earlier one needs:
//!
//! 1. die with the daemon, until step 4 has made the process findable;
//! 2. a session of its own, no descriptors but the listed ones;
//! 3. join the cgroup, so that everything that follows is accounted;
//! 4. write pid and start time into the run directory;
//! 5. new, empty network, IPC and UTS namespaces;
//! 6. open what Landlock shall allow, drop limits, user, groups and new privileges;
//! 7. enforce Landlock, make holes in a template harmless, exec the VMM with an empty environment.
//!    Its own seccomp filter follows.

pub(crate) mod cgroup;
mod jail;

pub(crate) use jail::{Jail, PLACES, Place, SHARED};

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::RawFd,
        unix::process::{CommandExt, parent_id},
    },
    path::{Path, PathBuf},
    process::Command,
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    Scope, path_beneath_rules,
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use serde::{Deserialize, Serialize};

use crate::process::{LaunchRecord, stat};

/// A specification larger than this is not ours.
const MAX_SPEC: u64 = 1 << 20;

/// The newest Landlock ABI asked for; older kernels enforce what they know.
const LANDLOCK: ABI = ABI::V6;

/// What becomes of the process, handed over as JSON in a memfd.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LaunchSpec {
    /// Absolute path of the VMM.
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    /// User and group of the VMM.
    pub(crate) uid: u32,
    /// Supplementary groups: the one that may open `/dev/kvm`.
    pub(crate) groups: Vec<u32>,
    /// Process that this one must not outlive until it has left a record.
    pub(crate) parent: u32,
    /// Where to leave the record.
    pub(crate) record: Option<PathBuf>,
    pub(crate) cgroup: Option<String>,
    /// Descriptors that the VMM inherits besides the standard ones.
    pub(crate) keep: Vec<RawFd>,
    /// Paths that the VMM may read.
    pub(crate) read_only: Vec<PathBuf>,
    /// Paths that the VMM may read and write.
    pub(crate) read_write: Vec<PathBuf>,
    /// Number at which the VMM will have the memory of a template: see [`keep_holes_out_of`].
    pub(crate) keep_holes_out_of: Option<RawFd>,
    /// The VMM never outlives the parent.
    pub(crate) ephemeral: bool,
    /// The process serves host directories and is locked up otherwise than a VMM.
    pub(crate) jail: Option<Jail>,
}

/// Becomes the VMM that the specification at descriptor `spec` asks for. Returns only on failure.
///
/// To be called by a process that the driver started for this purpose, and nothing else: it gives
/// away everything the process has.
pub fn exec_from_fd(spec: RawFd) -> io::Error {
    match prepare(spec) {
        Ok(mut vmm) => step("start the VMM")(vmm.exec()),
        Err(e) => e,
    }
}

fn step(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("cannot {what}: {e}"))
}

fn prepare(fd: RawFd) -> io::Result<Command> {
    let spec = read_spec(fd).map_err(step("read the launch specification"))?;

    die_with(spec.parent)?;
    // EPERM: the process leads a group already, which serves as well.
    rustix::process::setsid().ok();
    std::env::set_current_dir("/").map_err(step("change to /"))?;
    close_others(&spec.keep).map_err(step("close descriptors"))?;

    let pid = std::process::id();
    // The record first: it says which groups there may be, should this process die while it makes them.
    if let Some(path) = &spec.record {
        let start_time = stat(pid)?.1;
        LaunchRecord {
            pid,
            start_time,
            cgroup: spec.cgroup.clone(),
        }
        .write(path)
        .map_err(step("write the launch record"))?;
    }
    if let Some(group) = &spec.cgroup {
        cgroup::join(group, pid).map_err(step("join the cgroup"))?;
    }
    if spec.record.is_some() {
        rustix::process::set_parent_process_death_signal(None)?;
    }

    if let Some(jail) = &spec.jail {
        return jail::enter(jail, &spec);
    }
    new_namespaces().map_err(step("enter new namespaces"))?;
    let rules = rules(&spec).map_err(step("prepare Landlock"))?;

    be_no_dearer_than_others().map_err(step("set the OOM score"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, 4096, 4096)?;
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);

    let groups: Vec<Gid> = spec.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.uid));
    setgroups(&groups).map_err(|e| step("set groups")(e.into()))?;
    setresgid(gid, gid, gid).map_err(|e| step("set the group")(e.into()))?;
    setresuid(uid, uid, uid).map_err(|e| step("set the user")(e.into()))?;
    rustix::thread::set_no_new_privs(true)?;
    if spec.ephemeral {
        // Once more, because a change of user takes it back.
        die_with(spec.parent)?;
    }
    rules
        .restrict_self()
        .map_err(io::Error::other)
        .map_err(step("enforce Landlock"))?;
    if let Some(fd) = spec.keep_holes_out_of {
        keep_holes_out_of(fd).map_err(step("filter system calls"))?;
    }

    let mut vmm = Command::new(&spec.program);
    vmm.args(&spec.args).env_clear().env("LC_ALL", "C");
    Ok(vmm)
}

/// Has the kernel kill this process when the thread that started it ends.
fn die_with(parent: u32) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if parent_id() != parent {
        return Err(io::Error::other(
            "the daemon that asked for this VM is gone",
        ));
    }
    Ok(())
}

fn read_spec(fd: RawFd) -> io::Result<LaunchSpec> {
    // Opened anew, because a bare number cannot be owned without unsafe code.
    let mut bytes = Vec::new();
    File::open(format!("/proc/self/fd/{fd}"))?
        .take(MAX_SPEC)
        .read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open {
        if fd > 2 && !keep.contains(&fd) {
            // EBADF: the directory handle of the listing itself.
            nix::unistd::close(fd).ok();
        }
    }
    Ok(())
}

/// A service manager protects the daemon from the host's OOM killer; a tenant's VM does not inherit
/// that (proc_pid_oom_score_adj(5)).
fn be_no_dearer_than_others() -> io::Result<()> {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let score = std::fs::read_to_string(SCORE)?;
    if score.trim_start().starts_with('-') {
        std::fs::write(SCORE, "0")?;
    }
    Ok(())
}

/// The network namespace is demanded: an empty one is what keeps a captured VMM off the host's
/// network. IPC and UTS go along.
fn new_namespaces() -> io::Result<()> {
    let network = CloneFlags::CLONE_NEWNET;
    unshare(network | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .or_else(|_| unshare(network))?;
    Ok(())
}

/// Turns the order to punch a hole into the file at `fd` into one that does nothing and succeeds.
///
/// QEMU gives back memory that its guest has freed in two steps: it punches a hole into the file
/// behind it, and tells the kernel to forget its own copy of the page. A template's file is shared
/// and sealed: the first step would fail, and QEMU would not take the second, which is all that is
/// needed. The number is known from the first VM of the template, and checked in every later one.
fn keep_holes_out_of(fd: RawFd) -> io::Result<()> {
    let failed = |e: &dyn std::fmt::Display| io::Error::other(e.to_string());
    let fd = u64::try_from(fd).map_err(|e| failed(&e))?;
    let hole = nix::libc::FALLOC_FL_PUNCH_HOLE | nix::libc::FALLOC_FL_KEEP_SIZE;
    let mode = u64::try_from(hole).map_err(|e| failed(&e))?;
    let equals = |argument, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let conditions = vec![
        equals(0, fd).map_err(|e| failed(&e))?,
        equals(1, mode).map_err(|e| failed(&e))?,
    ];
    let rule = SeccompRule::new(conditions).map_err(|e| failed(&e))?;
    let filter = SeccompFilter::new(
        [(nix::libc::SYS_fallocate, vec![rule])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(0),
        std::env::consts::ARCH
            .try_into()
            .map_err(|e: seccompiler::BackendError| failed(&e))?,
    )
    .map_err(|e| failed(&e))?;
    let program: BpfProgram = filter
        .try_into()
        .map_err(|e: seccompiler::BackendError| failed(&e))?;
    seccompiler::apply_filter(&program).map_err(|e| failed(&e))
}

fn rules(spec: &LaunchSpec) -> io::Result<RulesetCreated> {
    let read = AccessFs::from_read(LANDLOCK);
    let all = AccessFs::from_all(LANDLOCK);
    let build = || {
        Ruleset::default()
            .handle_access(all)?
            // No rule for any port follows: TCP is refused even if the namespace were not empty.
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?
            .add_rules(path_beneath_rules(existing(&spec.read_only), read))?
            .add_rules(path_beneath_rules(existing(&spec.read_write), all))
    };
    build().map_err(|e: landlock::RulesetError| io::Error::other(e))
}

fn existing(paths: &[PathBuf]) -> impl Iterator<Item = &Path> {
    paths
        .iter()
        .map(PathBuf::as_path)
        .filter(|path| path.exists())
}

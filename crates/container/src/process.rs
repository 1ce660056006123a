//! Attributes of the process that becomes the program: directory, limits, user, privileges.

use std::{fs, os::fd::OwnedFd, path::Path};

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::{
    fs::{FileType, Mode, fchown, fstat},
    process::{Resource, Rlimit, setrlimit, umask},
};

use crate::{
    capabilities::{self, Capabilities},
    child::{Because, Refusal},
    exec::{DEFAULT_PATH, Filters},
    profile, seccomp,
    spec::{ProcessSpec, RlimitSpec, SeccompSpec},
    sys,
    user::{self, Identity},
    users::{self, Door},
};

/// Open files of a process that does not say: many servers need more than the kernel's 1024.
const DEFAULT_NOFILE: (u64, u64) = (65_536, 1_048_576);

/// Everything but execve. After it the process has the program's rights, but for filters that are
/// left to be installed just before the program runs.
///
/// `streams` are the program's standard streams, already in place; their owner becomes the user. The
/// `door` leads into the user namespace that the process is to be in.
pub(crate) fn prepare(
    spec: &mut ProcessSpec,
    streams: &[OwnedFd],
    door: Option<Door>,
) -> Result<(Identity, Filters), Refusal> {
    if spec.args.is_empty() {
        return Err(Refusal::invalid("the process has no arguments"));
    }
    let database = |path: &str| {
        user::read_database(Path::new(path)).or_request(format!("cannot read the image's {path}"))
    };
    let identity = user::resolve(
        &spec.user,
        &database("/etc/passwd")?,
        &database("/etc/group")?,
    )
    .map_err(|error| Refusal::invalid(error.to_string()))?;
    let capabilities = capabilities::plan(&spec.capabilities)
        .map_err(|error| Refusal::invalid(error.to_string()))?;
    complete_environment(spec, &identity)?;
    spec.rlimits.iter().try_for_each(limit)?;
    if !spec
        .rlimits
        .iter()
        .any(|limit| limit.name == "RLIMIT_NOFILE")
    {
        let (soft, hard) = DEFAULT_NOFILE;
        limit(&RlimitSpec {
            name: "RLIMIT_NOFILE".into(),
            soft,
            hard,
        })?;
    }
    let score = spec.oom_score_adj.clamp(-1000, 1000).to_string();
    fs::write("/proc/self/oom_score_adj", score).or_machine("cannot set oom_score_adj")?;
    enter_directory(&spec.cwd)?;
    let (uid, _) = users::outside(spec.users, &identity)?;
    for stream in streams {
        give(stream, uid)?;
    }
    // What comes before takes the guest's rights, what follows those of the namespace.
    if let Some(door) = door {
        users::enter(&door)?;
    }

    if spec.no_new_privs {
        rustix::thread::set_no_new_privs(true).or_machine("cannot set no_new_privs")?;
    }
    let mut filters = filters(spec, &capabilities)?;
    if !spec.no_new_privs {
        // While there is still CAP_SYS_ADMIN, for a process that may gain privileges. One that may
        // not can do it at the very end: its filter need not allow what comes in between.
        let filters = std::mem::take(&mut filters);
        filters
            .install()
            .or_machine("cannot install the system call filter")?;
    }
    let supported = caps::runtime::thread_all_supported();
    let caps_failed = |error| Refusal::internal(format!("cannot set the capabilities: {error}"));
    capabilities.bound(&supported).map_err(caps_failed)?;
    caps::securebits::set_keepcaps(true).map_err(caps_failed)?;
    become_user(&identity)?;
    capabilities
        .apply(&supported, identity.uid == 0)
        .map_err(caps_failed)?;
    // keepcaps itself ends with execve.
    sys::reset_signals();
    sys::close_others_on_exec().or_machine("cannot close descriptors")?;
    umask(Mode::from_raw_mode(0o022));
    Ok((identity, filters))
}

/// The system call filters of a process.
fn filters(spec: &ProcessSpec, capabilities: &Capabilities) -> Result<Filters, Refusal> {
    match &spec.seccomp {
        _ if spec.capabilities.privileged => Ok(Filters::default()),
        SeccompSpec::Unconfined => Ok(Filters::default()),
        SeccompSpec::EngineDefault => {
            let filter = seccomp::filter(&capabilities.held).map_err(|error| {
                Refusal::internal(format!("cannot compile the system call filter: {error}"))
            })?;
            Ok(Filters {
                programs: vec![filter],
                flags: 0,
            })
        }
        SeccompSpec::Profile(profile) => {
            let programs = profile::filters(profile, &capabilities.held)
                .map_err(|error| Refusal::invalid(error.to_string()))?;
            let flag = |on: bool, flag| if on { flag } else { 0 };
            let flags = flag(profile.log, libc::SECCOMP_FILTER_FLAG_LOG)
                | flag(profile.spec_allow, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
            Ok(Filters { programs, flags })
        }
    }
}

fn complete_environment(spec: &mut ProcessSpec, identity: &Identity) -> Result<(), Refusal> {
    for entry in &spec.env {
        if entry.contains('\0') || entry.find('=').is_none_or(|at| at == 0) {
            return Err(Refusal::invalid("an environment entry is not NAME=value"));
        }
    }
    let mut default = |name: &str, value: &str| {
        if !spec
            .env
            .iter()
            .any(|entry| entry.split('=').next() == Some(name))
        {
            spec.env.push(format!("{name}={value}"));
        }
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", identity.home.as_deref().unwrap_or("/"));
    if spec.tty.is_some() {
        default("TERM", "xterm");
    }
    Ok(())
}

fn enter_directory(cwd: &str) -> Result<(), Refusal> {
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    if !cwd.starts_with('/') {
        return Err(Refusal::invalid("the working directory is not absolute"));
    }
    let failed = format!("cannot enter the working directory {cwd}");
    if rustix::process::chdir(cwd).is_err() {
        fs::create_dir_all(cwd).or_request(&failed)?;
        rustix::process::chdir(cwd).or_request(&failed)?;
    }
    // A directory that a leaked descriptor or /proc link led out to has no path here.
    match std::env::current_dir() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(Refusal::invalid(
            "the working directory is outside the container",
        )),
    }
}

/// Lets the user reopen its streams through /proc/self/fd, as /dev/stdout does.
fn give(stream: &OwnedFd, uid: u32) -> Result<(), Refusal> {
    let failed = "cannot hand over the standard streams";
    let stat = fstat(stream).or_machine(failed)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    // Not /dev/null, which belongs to everybody.
    if kind == FileType::CharacterDevice && rustix::fs::major(stat.st_rdev) == 1 {
        return Ok(());
    }
    let owner = Some(rustix::fs::Uid::from_raw(uid));
    fchown(stream, owner, None).or_machine(failed)
}

fn become_user(identity: &Identity) -> Result<(), Refusal> {
    let failed = "cannot become the user";
    let groups: Vec<Gid> = identity
        .groups
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setgroups(&groups).or_machine(failed)?;
    setresgid(gid, gid, gid).or_machine(failed)?;
    setresuid(uid, uid, uid).or_machine(failed)
}

fn limit(spec: &RlimitSpec) -> Result<(), Refusal> {
    let name = spec.name.strip_prefix("RLIMIT_").unwrap_or(&spec.name);
    let resource = match name {
        "AS" => Resource::As,
        "CORE" => Resource::Core,
        "CPU" => Resource::Cpu,
        "DATA" => Resource::Data,
        "FSIZE" => Resource::Fsize,
        "LOCKS" => Resource::Locks,
        "MEMLOCK" => Resource::Memlock,
        "MSGQUEUE" => Resource::Msgqueue,
        "NICE" => Resource::Nice,
        "NOFILE" => Resource::Nofile,
        "NPROC" => Resource::Nproc,
        "RSS" => Resource::Rss,
        "RTPRIO" => Resource::Rtprio,
        "RTTIME" => Resource::Rttime,
        "SIGPENDING" => Resource::Sigpending,
        "STACK" => Resource::Stack,
        _ => {
            return Err(Refusal::invalid(format!(
                "unknown resource limit {}",
                spec.name
            )));
        }
    };
    // The kernel refuses more open files than fs.nr_open.
    let most = if name == "NOFILE" {
        read_number("/proc/sys/fs/nr_open").unwrap_or(1_048_576)
    } else {
        u64::MAX
    };
    let hard = spec.hard.min(most);
    let soft = spec.soft.min(hard);
    let bound = |value| if value == u64::MAX { None } else { Some(value) };
    setrlimit(
        resource,
        Rlimit {
            current: bound(soft),
            maximum: bound(hard),
        },
    )
    .or_machine(format!("cannot set {}", spec.name))
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

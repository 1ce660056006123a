//! The child: from a job on standard input to a running program.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    process::{DumpableBehavior, WaitOptions, ioctl_tiocsctty, set_dumpable_behavior, setsid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use crate::{
    control::{Control, Reply},
    devices,
    exec::{self, Filters},
    process,
    rootfs::{self, Owner},
    spec::{InitSpec, Job, ProcessSpec},
    users::{self, Door},
};

/// Why the child cannot do its job, for [`Reply::Refused`].
#[derive(Debug)]
pub(crate) struct Refusal {
    invalid: bool,
    message: String,
}

impl Refusal {
    /// The request asks for something that cannot be.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self {
            invalid: true,
            message: message.into(),
        }
    }

    /// Something is wrong here.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self {
            invalid: false,
            message: message.into(),
        }
    }
}

/// Says what was attempted when a system call failed.
pub(crate) trait Because<T> {
    /// The machine is at fault.
    fn or_machine(self, what: impl AsRef<str>) -> Result<T, Refusal>;
    /// The request or the image is at fault.
    fn or_request(self, what: impl AsRef<str>) -> Result<T, Refusal>;
}

impl<T, E: std::fmt::Display> Because<T> for Result<T, E> {
    fn or_machine(self, what: impl AsRef<str>) -> Result<T, Refusal> {
        self.map_err(|error| Refusal::internal(format!("{}: {error}", what.as_ref())))
    }

    fn or_request(self, what: impl AsRef<str>) -> Result<T, Refusal> {
        self.map_err(|error| Refusal::invalid(format!("{}: {error}", what.as_ref())))
    }
}

/// Runs the child. The process must have been started by [`crate::spawn`].
pub fn main() -> ExitCode {
    let Some(control) = take_control() else {
        return ExitCode::FAILURE;
    };
    // Nobody in a container that this process enters may look into it.
    if set_dumpable_behavior(DumpableBehavior::NotDumpable).is_err() {
        return ExitCode::FAILURE;
    }
    let Ok((job, fds)) = control.receive_job() else {
        return ExitCode::FAILURE;
    };
    let prepared = match job {
        Job::Pause => return pause(&control),
        Job::Namespaces => return namespaces(&control),
        Job::Init(spec) => init(*spec, fds),
        Job::Exec(spec) => join(*spec, fds),
        Job::Guest(spec) => borrow_files(*spec, fds),
    };
    let (spec, filters, ready, master) = match prepared {
        Ok(prepared) => prepared,
        Err(Refusal { invalid, message }) => {
            // If the agent is gone nobody wants to know.
            drop(control.send_reply(&Reply::Refused { invalid, message }, None));
            return ExitCode::FAILURE;
        }
    };
    if control
        .send_reply(&ready, master.as_ref().map(AsFd::as_fd))
        .is_err()
    {
        return ExitCode::FAILURE;
    }
    drop(master);
    if !control.wait_gate() {
        return ExitCode::FAILURE;
    }
    let failed = exec::run(&spec.args, &spec.env, &filters);
    drop(control.send_reply(&failed, None));
    match failed {
        Reply::NotRun { code, .. } => ExitCode::from(code),
        _ => ExitCode::FAILURE,
    }
}

/// Moves the socket away from standard input, where the program's own will be.
fn take_control() -> Option<Control> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    Some(Control::new(UnixStream::from(socket)))
}

type Prepared = (ProcessSpec, Filters, Reply, Option<OwnedFd>);

fn init(mut spec: InitSpec, mut fds: Vec<OwnedFd>) -> Result<Prepared, Refusal> {
    let users = match spec.process.users {
        Some(_) if fds.is_empty() => return Err(Refusal::internal("no user namespace to enter")),
        Some(map) => Some((map, fds.remove(0))),
        None => None,
    };
    let owner = users.as_ref().map(|(map, namespace)| Owner {
        map: *map,
        namespace: namespace.as_fd(),
    });
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)
        .or_machine("cannot make the container's namespaces")?;
    rustix::process::umask(rustix::fs::Mode::empty());
    rootfs::enter(&spec, owner)?;
    let (streams, master) = attach(&spec.process, fds)?;
    if master.is_some() {
        rootfs::bind_console(&streams[0])?;
    }
    if !spec.process.cwd.is_empty() {
        // Before the root becomes read-only: `prepare` enters it.
        drop(std::fs::create_dir_all(&spec.process.cwd));
    }
    if spec.rootfs.readonly {
        rootfs::seal()?;
    }
    spec.process.capabilities.privileged |= spec.privileged;
    let door = users.map(|(_, namespace)| Door::Namespace(namespace));
    finish(spec.process, &streams, master, door)
}

fn join(spec: ProcessSpec, mut fds: Vec<OwnedFd>) -> Result<Prepared, Refusal> {
    if fds.is_empty() {
        return Err(Refusal::internal("no container to enter"));
    }
    let container = fds.remove(0);
    setns(
        &container,
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP,
    )
    .or_machine("cannot enter the container")?;
    if let Some(users) = spec.users {
        users::create_as(users.uids.first, users.gids.first)?;
    }
    let (streams, master) = attach(&spec, fds)?;
    let door = spec.users.map(|_| Door::Process(container));
    finish(spec, &streams, master, door)
}

/// Takes on the container's files and nothing else of it: what runs is the guest's own, and sees all
/// its processes.
fn borrow_files(mut spec: ProcessSpec, mut fds: Vec<OwnedFd>) -> Result<Prepared, Refusal> {
    if fds.is_empty() {
        return Err(Refusal::internal("no container to enter"));
    }
    let container = fds.remove(0);
    let failed = "cannot enter the container's files";
    setns(&container, CloneFlags::CLONE_NEWNS).or_machine(failed)?;
    // The container's own view stays as it is.
    unshare(CloneFlags::CLONE_NEWNS).or_machine(failed)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).or_machine(failed)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None).or_machine("cannot show the guest's processes")?;
    let (streams, master) = attach(&spec, fds)?;
    spec.capabilities.privileged = true;
    finish(spec, &streams, master, None)
}

fn finish(
    mut spec: ProcessSpec,
    streams: &[OwnedFd],
    master: Option<OwnedFd>,
    door: Option<Door>,
) -> Result<Prepared, Refusal> {
    let (identity, filters) = process::prepare(&mut spec, streams, door)?;
    let ready = Reply::Ready {
        uid: identity.uid,
        gid: identity.gid,
        additional_gids: identity.groups,
    };
    Ok((spec, filters, ready, master))
}

/// Makes a session and puts the standard streams in place: those that came, or a new terminal.
fn attach(
    spec: &ProcessSpec,
    fds: Vec<OwnedFd>,
) -> Result<(Vec<OwnedFd>, Option<OwnedFd>), Refusal> {
    let failed = "cannot attach the standard streams";
    setsid().or_machine(failed)?;
    let (streams, master) = match spec.tty {
        Some((columns, rows)) => {
            let (master, slave) =
                devices::open_terminal(columns, rows).or_machine("cannot open a terminal")?;
            ioctl_tiocsctty(&slave).or_machine(failed)?;
            (vec![slave], Some(master))
        }
        None if fds.len() == 3 => (fds, None),
        None => return Err(Refusal::internal("the standard streams are missing")),
    };
    let stream = |at: usize| streams.get(at).unwrap_or(&streams[0]);
    dup2_stdin(stream(0)).or_machine(failed)?;
    dup2_stdout(stream(1)).or_machine(failed)?;
    dup2_stderr(stream(2)).or_machine(failed)?;
    Ok((streams, master))
}

/// Makes a user namespace, and others that belong to it once its ids are mapped.
fn namespaces(control: &Control) -> ExitCode {
    let steps = [
        CloneFlags::CLONE_NEWUSER,
        CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS,
    ];
    for flags in steps {
        let reply = match unshare(flags) {
            Ok(()) => Reply::Ready {
                uid: 0,
                gid: 0,
                additional_gids: Vec::new(),
            },
            Err(errno) => Reply::Refused {
                invalid: false,
                message: format!("cannot make the pod's namespaces: {errno}"),
            },
        };
        if control.send_reply(&reply, None).is_err() || !control.wait_gate() {
            return ExitCode::SUCCESS;
        }
    }
    ExitCode::SUCCESS
}

/// The first process of a shared pid namespace. Children of its own it has none: what it reaps are
/// the orphans of the pod's containers.
fn pause(control: &Control) -> ExitCode {
    // The streams are the guest's console.
    let ready = Reply::Ready {
        uid: 0,
        gid: 0,
        additional_gids: Vec::new(),
    };
    if control.send_reply(&ready, None).is_err() {
        return ExitCode::FAILURE;
    }
    let Ok(signals) = nix::sys::signalfd::SignalFd::new(&nix::sys::signal::SigSet::all()) else {
        return ExitCode::FAILURE;
    };
    if nix::sys::signal::SigSet::all().thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        // Only for its wake-up: children that end before the next read are found by `wait`.
        if signals.read_signal().is_err() {
            return ExitCode::FAILURE;
        }
    }
}

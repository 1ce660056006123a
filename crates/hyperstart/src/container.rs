//! One container from its creation to its removal.
//!
//! ```text
//! create ──▶ CREATED ──start──▶ RUNNING ──▶ EXITED ──remove──▶ (forgotten)
//!   │           └──────── killed ─────────────▲
//!   └─ refused: nothing is left
//! ```
//! The first process ends the container: whatever else is in its cgroup is killed then.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hypernetes_agent_api::v1::{self, ContainerPhase};
use hypernetes_container::{
    Control, DeviceSpec, Job, Reply, Spawned,
    cgroup::{Cgroup, Limits},
    sys,
};
use tokio::{
    io::unix::AsyncFd,
    sync::{oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    boot::dir,
    console::log,
    disks::{self, blocking},
    error::{Attempt, GuestError},
    output::Output,
    pod::{PREPARE, Pod, now},
    reaper::Ended,
    request::{self, Places},
    sandbox,
    stats::Layer,
    streams::{self, Input},
};

/// What is told of a termination message (`MaxContainerTerminationMessageLength` of the kubelet).
const MAX_TERMINATION: u64 = 4096;
/// How long killed processes may take to go: one may be waiting for a disk.
const DIE: Duration = Duration::from_secs(10);

/// What the opening of the gate came to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Gate {
    Closed,
    Opening,
    Open { message: String },
}

#[derive(Debug)]
struct State {
    phase: ContainerPhase,
    /// Its processes stand still.
    paused: bool,
    exit: Option<v1::Exit>,
    started: i64,
    control: Option<Control>,
    pumps: JoinSet<()>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Container {
    /// Another one once the guest is another pod's.
    id: Mutex<Arc<str>>,
    pid: i32,
    pidfd: OwnedFd,
    slots: Vec<u32>,
    places: Places,
    cgroup: Cgroup,
    privileged: bool,
    stdin_once: bool,
    pub(crate) output: Arc<Output>,
    pub(crate) input: Input,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    state: Mutex<State>,
    /// Held by whoever has it stand still or go on.
    pub(crate) pausing: tokio::sync::Mutex<()>,
    layer: Mutex<Layer>,
    gate: watch::Sender<Gate>,
    ended: watch::Sender<bool>,
}

/// Prepares a container. On an error nothing is left.
pub(crate) async fn create(
    pod: &Pod,
    request: v1::CreateContainerRequest,
) -> Result<v1::User, GuestError> {
    let reservation = pod.reserve(&request.id)?;
    let places = Places::of(&request.id);
    let mut spec = pod.plan(&request, &places)?;
    for device in &request.devices {
        let source = disks::find(device.slot).await?;
        spec.devices.push(DeviceSpec {
            source,
            destination: device.destination.clone(),
        });
    }
    let limits = request::limits(request.resources.as_ref())?;
    let slots = request::slots(&request);
    pod.layers().acquire(&slots).await?;
    if let Err(error) = pod
        .huge_pages()
        .promise(&request.id, &limits.huge_pages)
        .await
    {
        pod.layers().release(&slots).await;
        return Err(error);
    }

    let result = async {
        for path in [&places.writable, &places.root] {
            fs::create_dir_all(path).attempt("make the container's directories")?;
        }
        if !request.termination_path.is_empty() {
            let owner = pod.users().map(|users| users.map);
            make_termination(&places.termination)
                .and_then(|()| sandbox::give(&places.termination, owner))
                .attempt("make the termination message's file")?;
        }
        let cgroup = Cgroup::create(&request.id, &limits).attempt("make the container's cgroup")?;
        let made = launch(
            pod,
            &request,
            Job::Init(Box::new(spec)),
            &cgroup,
            &places,
            &slots,
        )
        .await;
        if made.is_err() {
            clear_cgroup(&cgroup).await;
        }
        made
    }
    .await;
    match result {
        Ok((container, user)) => {
            reservation.keep(container.clone());
            pod.emit(container.state());
            Ok(user)
        }
        Err(error) => {
            clear_places(&places).await;
            pod.huge_pages().release(&request.id).await;
            pod.layers().release(&slots).await;
            Err(error)
        }
    }
}

async fn launch(
    pod: &Pod,
    request: &v1::CreateContainerRequest,
    job: Job,
    cgroup: &Cgroup,
    places: &Places,
    slots: &[u32],
) -> Result<(Arc<Container>, v1::User), GuestError> {
    let tty = request.process.as_ref().is_some_and(|process| process.tty);
    let (mut ends, theirs) = match tty {
        true => (
            streams::Ends {
                stdin: None,
                outputs: Vec::new(),
            },
            Vec::new(),
        ),
        false => streams::pipes(request.stdin)?,
    };
    let target = Some(request.pid_target.as_str()).filter(|id| !id.is_empty());
    let (Spawned { pid, control }, exit, pidfd) = pod.spawn_init(target)?;
    cgroup
        .add(pid)
        .attempt("put the container into its cgroup")?;
    let users = pod.users();
    let (control, answer, master) = blocking(move || {
        control.set_deadline(PREPARE).map_err(io::Error::other)?;
        let mut fds: Vec<_> = users.iter().map(|users| users.namespace.as_fd()).collect();
        fds.extend(streams::borrow(&theirs));
        control.send_job(&job, &fds).map_err(io::Error::other)?;
        let (answer, master) = control.answer().map_err(io::Error::other)?;
        Ok((control, answer, master))
    })
    .await
    .attempt("prepare the container")?;
    let user = match answer {
        Reply::Ready {
            uid,
            gid,
            additional_gids,
        } => v1::User {
            uid,
            gid,
            additional_gids,
            ..Default::default()
        },
        Reply::Refused {
            invalid: true,
            message,
        } => return Err(GuestError::Invalid(message)),
        Reply::Refused { message, .. } | Reply::NotRun { message, .. } => {
            return Err(GuestError::Internal(message));
        }
    };

    let terminal = match (tty, master) {
        (true, Some(master)) => Some(Arc::new(streams::watch_fd(master)?)),
        (true, None) => return Err(GuestError::Internal("the container has no terminal".into())),
        (false, _) => None,
    };
    let (outputs, input) = match &terminal {
        Some(terminal) => (
            vec![terminal.clone()],
            Some(terminal.clone()).filter(|_| request.stdin),
        ),
        None => {
            let outputs = ends
                .outputs
                .drain(..)
                .map(|fd| streams::watch_fd(fd).map(Arc::new));
            let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
            (
                outputs,
                ends.stdin
                    .take()
                    .map(streams::watch_fd)
                    .transpose()?
                    .map(Arc::new),
            )
        }
    };
    let output = Output::new(request.output_buffer, outputs.len());
    let ended = watch::channel(false).0;
    let mut pumps = JoinSet::new();
    for (index, fd) in outputs.into_iter().enumerate() {
        pumps.spawn(output.clone().pump(index, fd, ended.subscribe()));
    }
    let container = Arc::new(Container {
        id: Mutex::new(request.id.as_str().into()),
        pid,
        pidfd,
        slots: slots.to_vec(),
        places: places.clone(),
        cgroup: cgroup.clone(),
        privileged: request.privileged,
        stdin_once: request.stdin_once,
        output,
        input: Input::new(input, tty),
        terminal,
        state: Mutex::new(State {
            phase: ContainerPhase::Created,
            paused: false,
            exit: None,
            started: 0,
            control: Some(control),
            pumps,
        }),
        pausing: tokio::sync::Mutex::default(),
        layer: Mutex::default(),
        gate: watch::channel(Gate::Closed).0,
        ended,
    });
    tokio::spawn(container.clone().watch(pod.clone(), exit));
    Ok((container, user))
}

impl Container {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn id(&self) -> Arc<str> {
        self.id
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Has it be known by another id. Its files and its cgroup keep their names.
    pub(crate) fn rename(&self, id: &str) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id.into();
    }

    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// What its programs have written.
    pub(crate) fn upper(&self) -> PathBuf {
        self.places.writable.join("upper")
    }

    pub(crate) fn layer(&self) -> MutexGuard<'_, Layer> {
        self.layer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_privileged(&self) -> bool {
        self.privileged
    }

    pub(crate) fn is_running(&self) -> bool {
        self.lock().phase == ContainerPhase::Running
    }

    /// Whether standard input ends with the first call that wrote to it.
    pub(crate) fn stdin_once(&self) -> bool {
        self.stdin_once
    }

    pub(crate) fn state(&self) -> v1::ContainerState {
        let state = self.lock();
        v1::ContainerState {
            id: self.id().to_string(),
            phase: state.phase.into(),
            pid: self.pid,
            exit: state.exit.clone(),
            started_unix_nanos: state.started,
            paused: state.paused,
        }
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// Notes whether it stands still, unless it has ended meanwhile.
    pub(crate) fn note_paused(&self, paused: bool) -> bool {
        let mut state = self.lock();
        let runs = state.phase == ContainerPhase::Running;
        state.paused = paused && runs;
        runs
    }

    /// Waits until the container has ended.
    pub(crate) async fn wait(&self) {
        // The sender is in `self`: it cannot be gone.
        drop(self.ended.subscribe().wait_for(|ended| *ended).await);
    }

    /// Records the end, from the exit of the first process on.
    async fn watch(self: Arc<Self>, pod: Pod, exit: oneshot::Receiver<Ended>) {
        let Ok(ended) = exit.await else { return };
        // Why a program could not be run is known a moment after its exit.
        let message = match self
            .gate
            .subscribe()
            .wait_for(|gate| *gate != Gate::Opening)
            .await
            .as_deref()
        {
            Ok(Gate::Open { message }) => message.clone(),
            _ => String::new(),
        };
        self.kill();
        let deadline = Instant::now() + DIE;
        while self.cgroup.is_populated() && Instant::now() < deadline {
            sleep(Duration::from_millis(2)).await;
        }
        let place = self.places.termination.clone();
        let termination_message = blocking(move || read_end(&place, MAX_TERMINATION)).await;
        let termination_message = termination_message.unwrap_or_else(|error| {
            log!(
                "cannot read what container {} says of its end: {error}",
                self.id()
            );
            Vec::new()
        });
        let oom_killed = ended == Ended::Signal(9) && self.cgroup.oom_kills() > 0;
        {
            let mut state = self.lock();
            state.phase = ContainerPhase::Exited;
            state.paused = false;
            state.control = None;
            state.exit = Some(v1::Exit {
                code: ended.code(),
                signal: ended.signal(),
                oom_killed,
                message,
                finished_unix_nanos: now(),
                termination_message,
            });
        }
        self.ended.send_replace(true);
        self.input.close_now();
        pod.emit(self.state());
    }

    /// Opens the gate. Returns the time of the start.
    pub(crate) async fn start(&self, pod: &Pod) -> Result<i64, GuestError> {
        let control = {
            let mut state = self.lock();
            match (state.phase, state.control.take()) {
                (ContainerPhase::Created, Some(control)) => control,
                _ => {
                    return Err(GuestError::Precondition(format!(
                        "container {} is not created",
                        self.id()
                    )));
                }
            }
        };
        self.gate.send_replace(Gate::Opening);
        let started = now();
        let opened = blocking(move || control.open_gate().map_err(io::Error::other)).await;
        let message = match &opened {
            Ok(Some(Reply::NotRun { message, .. })) => message.clone(),
            Ok(Some(other)) => format!("{other:?}"),
            Ok(None) => String::new(),
            Err(error) => error.to_string(),
        };
        let runs = matches!(opened, Ok(None));
        let emit = {
            let mut state = self.lock();
            state.started = started;
            let alive = state.phase == ContainerPhase::Created;
            if alive && runs {
                state.phase = ContainerPhase::Running;
            }
            alive && runs
        };
        if emit {
            pod.emit(self.state());
        }
        if opened.is_err() {
            self.kill();
        }
        self.gate.send_replace(Gate::Open { message });
        Ok(started)
    }

    /// Refuses a change of a container that has ended.
    pub(crate) fn check_live(&self) -> Result<(), GuestError> {
        match self.lock().phase {
            ContainerPhase::Exited => {
                Err(GuestError::Precondition("the container has ended".into()))
            }
            _ => Ok(()),
        }
    }

    /// Replaces the limits.
    pub(crate) fn update(&self, limits: &Limits) -> Result<(), GuestError> {
        self.check_live()?;
        self.cgroup
            .update(limits)
            .attempt("change the container's limits")
    }

    /// Sends a signal to the first process, or to all.
    pub(crate) fn signal(&self, signal: u32, all: bool) -> Result<(), GuestError> {
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (1..=64).contains(number));
        let number =
            number.ok_or_else(|| GuestError::Invalid(format!("there is no signal {signal}")))?;
        let phase = self.lock().phase;
        match phase {
            ContainerPhase::Exited => Ok(()),
            _ if number == 9 && all => self.cgroup.kill().attempt("kill the container"),
            ContainerPhase::Created if number != 9 => Err(GuestError::Precondition(format!(
                "container {} is not running",
                self.id()
            ))),
            _ if all => {
                for pid in self.cgroup.processes() {
                    // It may have ended by itself. Pids are not reused this fast: the reaper of its
                    // namespace has to run first.
                    drop(sys::kill(pid, number));
                }
                Ok(())
            }
            // Not reaped yet, or the phase would be another: the pid is still its own.
            _ => match sys::kill(self.pid, number) {
                Err(error)
                    if error.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) =>
                {
                    Err(error).attempt("signal the container")
                }
                _ => Ok(()),
            },
        }
    }

    /// Kills everything in it.
    pub(crate) fn kill(&self) {
        if let Err(error) = self.cgroup.kill() {
            log!("cannot kill container {}: {error}", self.id());
        }
    }

    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), GuestError> {
        match &self.terminal {
            Some(terminal) => streams::resize(terminal.get_ref(), width, height),
            None => Err(GuestError::Precondition(format!(
                "container {} has no terminal",
                self.id()
            ))),
        }
    }
}

/// Forgets a container and takes it apart. Returns the slots whose disks nobody uses any more.
pub(crate) async fn remove(pod: &Pod, id: &str) -> Result<Vec<u32>, GuestError> {
    let container = match pod.container(id) {
        Ok(container) => container,
        Err(_) => return Ok(Vec::new()),
    };
    container.kill();
    timeout(DIE + DIE, container.wait())
        .await
        .map_err(|_late| GuestError::Internal(format!("container {id} does not end")))?;
    container.lock().pumps.abort_all();
    clear_cgroup(&container.cgroup).await;
    clear_places(&container.places).await;
    let slots = {
        let mut state = container.lock();
        // Two removals at once: the second has nothing to give back.
        if state.phase == ContainerPhase::Unknown {
            return Ok(Vec::new());
        }
        state.phase = ContainerPhase::Unknown;
        container.slots.clone()
    };
    pod.huge_pages().release(id).await;
    pod.forget(id);
    Ok(pod.layers().release(&slots).await)
}

/// An empty file that any user of the container can write.
fn make_termination(path: &Path) -> io::Result<()> {
    fs::File::create(path)?.set_permissions(fs::Permissions::from_mode(0o666))
}

/// The last bytes of a file; nothing of one that is not there.
fn read_end(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let start = file.metadata()?.len().saturating_sub(limit);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

async fn clear_cgroup(cgroup: &Cgroup) {
    drop(cgroup.kill());
    let deadline = Instant::now() + DIE;
    loop {
        match cgroup.remove() {
            Ok(()) => return,
            Err(error) if Instant::now() > deadline => {
                log!("cannot remove a cgroup: {error}");
                return;
            }
            Err(_) => sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Moves the writable layer out of the way and deletes it behind the caller's back: it may hold
/// a million files.
async fn clear_places(places: &Places) {
    drop(fs::remove_dir(&places.root));
    let Some(name) = places.writable.file_name() else {
        return;
    };
    let mut trash: PathBuf = Path::new(dir::SCRATCH).join("trash").join(name);
    trash.as_mut_os_string().push(format!(".{}", now()));
    match fs::rename(&places.writable, &trash) {
        Ok(()) => {
            tokio::task::spawn_blocking(move || {
                if let Err(error) = fs::remove_dir_all(&trash) {
                    log!("cannot delete a writable layer: {error}");
                }
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => log!("cannot remove a writable layer: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_termination_message_the_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("termination");
        assert_eq!(read_end(&path, 4).unwrap(), b"");
        make_termination(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o666
        );
        assert_eq!(read_end(&path, 4).unwrap(), b"");
        fs::write(&path, "abc").unwrap();
        assert_eq!(read_end(&path, 4).unwrap(), b"abc");
        fs::write(&path, "abcdef").unwrap();
        assert_eq!(read_end(&path, 4).unwrap(), b"cdef");
    }
}

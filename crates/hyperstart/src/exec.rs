//! One more process in a container, for as long as its call lasts.

use std::{io, os::fd::AsFd, sync::Arc};

use hypernetes_agent_api::{
    MAX_CHUNK_SIZE,
    server::{Replies, Requests},
    status::Status,
    v1::{self, exec_input, exec_output},
};
use hypernetes_container::{Job, ProcessSpec, Reply, Spawned, sys};
use tokio::{
    io::unix::AsyncFd,
    sync::{OwnedSemaphorePermit, oneshot, watch},
};

use crate::{
    container::Container,
    disks::blocking,
    error::{Attempt, GuestError},
    pod::{PREPARE, Pod, now},
    reaper::Ended,
    request,
    streams::{self, Input},
};

type Fd = Arc<AsyncFd<std::os::fd::OwnedFd>>;

/// A process that is being run. Dropped, it is killed with its process group.
#[derive(Debug)]
struct Running {
    pid: i32,
    /// Set by the task that reaps: from then on the pid may be another's.
    gone: watch::Receiver<bool>,
}

impl Running {
    fn signal(&self, pid: i32, signal: i32) {
        if !*self.gone.borrow() {
            // It may be a zombie already, or not have a group yet.
            drop(sys::kill(pid, signal));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(-self.pid, 9);
        self.signal(self.pid, 9);
    }
}

/// A process that was started, with everything that belongs to it.
#[derive(Debug)]
pub(crate) struct Exec {
    running: Running,
    outputs: Vec<Fd>,
    input: Input,
    terminal: Option<Fd>,
    exit: watch::Receiver<Option<Ended>>,
    message: String,
    _permit: OwnedSemaphorePermit,
}

/// Starts a process in a running container.
pub(crate) async fn start(
    pod: &Pod,
    container: &Container,
    start: &v1::ExecStart,
) -> Result<Exec, GuestError> {
    let permit = pod.execs().clone().try_acquire_owned();
    let permit = permit.map_err(|_none| GuestError::Exhausted("too many execs".into()))?;
    if !container.is_running() {
        return Err(GuestError::Precondition(format!(
            "container {} is not running",
            container.id()
        )));
    }
    if container.is_paused() && !start.guest {
        return Err(GuestError::Precondition(format!(
            "container {} is paused, unpause the container before exec",
            container.id()
        )));
    }
    let process = start
        .process
        .as_ref()
        .ok_or_else(|| GuestError::invalid("no process"))?;
    let mut spec: ProcessSpec = request::process(process, container.is_privileged())?;
    spec.users = pod.users().map(|users| users.map).filter(|_| !start.guest);
    let (ends, theirs) = match process.tty {
        true => (
            streams::Ends {
                stdin: None,
                outputs: Vec::new(),
            },
            Vec::new(),
        ),
        false => streams::pipes(start.stdin)?,
    };
    let pidfd = container
        .pidfd()
        .try_clone()
        .attempt("open the container")?;
    let (Spawned { pid, control }, exit) = match start.guest {
        true => pod.spawn_own()?,
        false => pod.spawn_exec(&pidfd)?,
    };
    let (running, exit) = track(pid, exit);
    let job = match start.guest {
        true => Job::Guest(Box::new(spec)),
        false => {
            container
                .cgroup()
                .add(pid)
                .attempt("put the process into the container's cgroup")?;
            Job::Exec(Box::new(spec))
        }
    };
    let (answer, master, outcome) = blocking(move || {
        let mut fds = vec![pidfd.as_fd()];
        fds.extend(streams::borrow(&theirs));
        control.set_deadline(PREPARE).map_err(io::Error::other)?;
        control.send_job(&job, &fds).map_err(io::Error::other)?;
        control.run().map_err(io::Error::other)
    })
    .await
    .attempt("start the process")?;
    match answer {
        Reply::Ready { .. } => {}
        Reply::Refused {
            invalid: true,
            message,
        } => return Err(GuestError::Invalid(message)),
        Reply::Refused { message, .. } | Reply::NotRun { message, .. } => {
            return Err(GuestError::Internal(message));
        }
    }
    let terminal = master.map(streams::watch_fd).transpose()?.map(Arc::new);
    let (outputs, input) = match &terminal {
        Some(terminal) => (
            vec![terminal.clone()],
            Some(terminal.clone()).filter(|_| start.stdin),
        ),
        None => {
            let outputs = ends
                .outputs
                .into_iter()
                .map(|fd| streams::watch_fd(fd).map(Arc::new));
            let outputs = outputs.collect::<Result<Vec<_>, _>>()?;
            (
                outputs,
                ends.stdin.map(streams::watch_fd).transpose()?.map(Arc::new),
            )
        }
    };
    let message = match outcome {
        Some(Reply::NotRun { message, .. }) => message,
        Some(other) => return Err(GuestError::Internal(format!("the child says {other:?}"))),
        None => String::new(),
    };
    let input = Input::new(input, terminal.is_some());
    Ok(Exec {
        running,
        outputs,
        input,
        terminal,
        exit,
        message,
        _permit: permit,
    })
}

/// Follows the end of a child, which is reaped whether somebody waits or not.
fn track(pid: i32, exit: oneshot::Receiver<Ended>) -> (Running, watch::Receiver<Option<Ended>>) {
    let (gone_tx, gone) = watch::channel(false);
    let (ended_tx, ended) = watch::channel(None);
    tokio::spawn(async move {
        let result = exit.await;
        gone_tx.send_replace(true);
        if let Ok(result) = result {
            ended_tx.send_replace(Some(result));
        }
    });
    (Running { pid, gone }, ended)
}

impl Exec {
    /// Carries the streams until the process and its output have ended.
    pub(crate) async fn serve(
        self,
        mut inputs: Requests<v1::ExecInput>,
        replies: Replies<v1::ExecOutput>,
    ) -> Result<(), Status> {
        if self.message.is_empty() {
            send(&replies, exec_output::Output::Started(true)).await?;
        }
        let listen = async {
            while let Ok(Some(message)) = inputs.message().await {
                if self.take(message).await.is_err() {
                    break;
                }
            }
            // The end of the inputs is the end of the call only if the node says so by dropping it.
            std::future::pending().await
        };
        tokio::select! {
            carried = self.carry(&replies) => carried,
            never = listen => never,
        }
    }

    async fn take(&self, message: v1::ExecInput) -> Result<(), GuestError> {
        match message.input {
            Some(exec_input::Input::Stdin(bytes)) => self
                .input
                .write(&bytes)
                .await
                .attempt("write to the process")?,
            Some(exec_input::Input::CloseStdin(true)) => self.input.close().await,
            Some(exec_input::Input::Resize(size)) => {
                if let Some(terminal) = &self.terminal {
                    streams::resize(terminal.get_ref(), size.width, size.height)?;
                }
            }
            Some(exec_input::Input::Signal(signal)) => {
                if let Some(signal) = i32::try_from(signal)
                    .ok()
                    .filter(|signal| (1..=64).contains(signal))
                {
                    self.running.signal(self.running.pid, signal);
                }
            }
            Some(exec_input::Input::Start(_) | exec_input::Input::CloseStdin(false)) | None => {}
        }
        Ok(())
    }

    async fn carry(&self, replies: &Replies<v1::ExecOutput>) -> Result<(), Status> {
        let (ended_tx, ended) = watch::channel(false);
        let stream = async |index: usize| {
            let Some(fd) = self.outputs.get(index) else {
                return Ok::<(), Status>(());
            };
            loop {
                let bytes = streams::read_until_exit(fd, MAX_CHUNK_SIZE, ended.clone())
                    .await
                    .unwrap_or_default();
                if bytes.is_empty() {
                    return Ok(());
                }
                let output = match index {
                    0 => exec_output::Output::Stdout(bytes),
                    _ => exec_output::Output::Stderr(bytes),
                };
                send(replies, output).await?;
            }
        };
        let exit = async {
            let mut exit = self.exit.clone();
            let ended = match exit.wait_for(Option::is_some).await {
                Ok(ended) => *ended,
                Err(_) => None,
            };
            ended_tx.send_replace(true);
            ended
        };
        let (stdout, stderr, ended) = tokio::join!(stream(0), stream(1), exit);
        stdout.and(stderr)?;
        let ended = ended.ok_or_else(|| Status::internal("the process was lost"))?;
        let exit = v1::Exit {
            code: ended.code(),
            signal: ended.signal(),
            oom_killed: false,
            message: self.message.clone(),
            finished_unix_nanos: now(),
            termination_message: Vec::new(),
        };
        send(replies, exec_output::Output::Exit(exit)).await
    }
}

async fn send(
    replies: &Replies<v1::ExecOutput>,
    output: exec_output::Output,
) -> Result<(), Status> {
    let output = Some(output);
    replies.send(&v1::ExecOutput { output }).await
}

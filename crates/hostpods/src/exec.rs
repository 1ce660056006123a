//! Processes beside a container's first one: the OCI runtime runs them and tells their exit code.
//!
//! A terminal is made here and is the controlling one of the OCI runtime, which has another one
//! made in the container and carries bytes and sizes between the two.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use hypernetes_runtime::{ExecConfig, Output, RuntimeError, Session, TtySize};
use hypernetes_types::{ContainerId, ExecId};
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    process::{Pid, Signal, kill_process, kill_process_group},
    pty::{OpenptFlags, grantpt, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    process::{Child, ChildStdin, Command},
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::{
    oci::{PATH, message},
    process::waitable,
    records::{failed, invalid, storage},
    runtime::Inner,
    update::first_process,
};

const ACTION: &str = "run a command in the container";
/// Pieces that wait for a slow client.
const QUEUE: usize = 16;
const PIECE: usize = 16 << 10;
/// How long output may be held open by what the process has left behind.
const DRAIN: Duration = Duration::from_secs(2);
/// The beginning of the error output, which says why a process was not run.
const KEPT: usize = 4096;

/// The files of one exec, removed with it.
#[derive(Debug)]
struct Files {
    process: PathBuf,
    pid: PathBuf,
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in [&self.process, &self.pid] {
            drop(fs::remove_file(path));
        }
    }
}

impl Files {
    fn write(bundle: &Path, config: &ExecConfig) -> Result<Self, RuntimeError> {
        let id = ExecId::random();
        let files = Self {
            process: bundle.join(format!("exec-{id}.json")),
            pid: bundle.join(format!("exec-{id}.pid")),
        };
        let mut process = first_process(bundle)?;
        process.set_args(Some(config.command.clone()));
        process.set_terminal(Some(config.tty));
        let has_term = |env: &Vec<String>| env.iter().any(|entry| entry.starts_with("TERM="));
        if config.tty && !process.env().as_ref().is_some_and(has_term) {
            let mut env = process.env().clone().unwrap_or_default();
            env.push("TERM=xterm".to_owned());
            process.set_env(Some(env));
        }
        let bytes = serde_json::to_vec(&process).map_err(|error| storage(ACTION, error))?;
        fs::write(&files.process, bytes).map_err(|error| storage(ACTION, error))?;
        Ok(files)
    }

    /// The process, once it runs.
    fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(&self.pid).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }
}

/// Runs a process in a running container.
pub(crate) async fn start(
    inner: &Arc<Inner>,
    id: &ContainerId,
    config: ExecConfig,
) -> Result<Session, RuntimeError> {
    if config.command.first().is_none_or(String::is_empty) {
        return Err(invalid("command", "must name a program"));
    }
    if config.command.iter().any(|arg| arg.contains('\0')) {
        return Err(invalid("command", "must not contain NUL"));
    }
    let (bundle, asked) = (inner.bundle(id), config.clone());
    let files = tokio::task::spawn_blocking(move || Files::write(&bundle, &asked));
    let files = files.await.map_err(|lost| storage(ACTION, lost))??;
    let args = |command: &mut Command| {
        command
            .arg("exec")
            .arg("--process")
            .arg(&files.process)
            .arg("--pid-file")
            .arg(&files.pid)
            .arg(id.as_str());
    };
    let failed = |error: io::Error| storage(ACTION, error);
    let (output, output_rx) = mpsc::channel(QUEUE);
    let (exit, exit_rx) = oneshot::channel();
    if config.tty {
        let (terminal, far) = terminal().map_err(failed)?;
        let copy = |fd: &OwnedFd| fd.try_clone().map(Stdio::from).map_err(failed);
        // In a session of its own, whose terminal this is.
        let mut command = Command::new("setsid");
        command
            .env_clear()
            .env("PATH", PATH)
            .current_dir("/")
            .stdin(copy(&far)?)
            .stdout(copy(&far)?)
            .stderr(copy(&far)?)
            .arg("--ctty")
            .arg(&inner.oci.program)
            .arg(inner.oci.root_option());
        args(&mut command);
        let child = command.spawn().map_err(failed)?;
        // Ours would keep it from ending.
        drop((command, far));
        let terminal =
            Arc::new(waitable(terminal, Interest::READABLE | Interest::WRITABLE).map_err(failed)?);
        let stdin = config.stdin.then(|| keys(Arc::clone(&terminal)));
        let resize = sizes(Arc::clone(&terminal));
        let reader = tokio::spawn(from_terminal(terminal, output.clone()));
        let readers = vec![reader];
        tokio::spawn(follow(child, files, readers, output, exit));
        return Ok(Session {
            stdin,
            output: output_rx,
            resize: Some(resize),
            exit: exit_rx,
        });
    }
    let mut command = inner.oci.command();
    // Killing the OCI runtime would leave the process: see `kill`.
    command
        .kill_on_drop(false)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if config.stdin {
        command.stdin(Stdio::piped());
    }
    args(&mut command);
    let mut child = command.spawn().map_err(failed)?;
    let stdin = child.stdin.take().map(input);
    let mut readers = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        readers.push(tokio::spawn(from_pipe(
            pipe,
            Output::Stdout,
            output.clone(),
        )));
    }
    if let Some(pipe) = child.stderr.take() {
        readers.push(tokio::spawn(from_pipe(
            pipe,
            Output::Stderr,
            output.clone(),
        )));
    }
    tokio::spawn(follow(child, files, readers, output, exit));
    Ok(Session {
        stdin,
        output: output_rx,
        resize: None,
        exit: exit_rx,
    })
}

/// Waits for the end of a process, or ends it when nobody waits for it any more.
async fn follow(
    mut child: Child,
    files: Files,
    readers: Vec<tokio::task::JoinHandle<Vec<u8>>>,
    output: mpsc::Sender<Output>,
    mut exit: oneshot::Sender<Result<i32, RuntimeError>>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        () = exit.closed() => {
            kill(&mut child, &files).await;
            return;
        }
    };
    drop(output);
    let mut said = Vec::new();
    for reader in readers {
        let mut reader = reader;
        match timeout(DRAIN, &mut reader).await {
            Ok(Ok(beginning)) => said = beginning,
            // Somebody that the process has left behind holds it open.
            Err(_late) => reader.abort(),
            Ok(Err(_lost)) => {}
        }
    }
    let result = match status {
        Err(error) => Err(storage(ACTION, error)),
        // The process id is written once it runs.
        Ok(_) if files.pid().is_none() => Err(failed(ACTION, message(&said))),
        Ok(status) => Ok(code(status)),
    };
    // A caller that has just gone does not want it.
    drop(exit.send(result));
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let killed = || status.signal().map_or(-1, |signal| 128 + signal);
    status.code().unwrap_or_else(killed)
}

/// Ends the process with its group, and waits for the OCI runtime to see it.
async fn kill(child: &mut Child, files: &Files) {
    let end = async {
        loop {
            // As long as its parent has not waited for it, the number is not another's.
            if let Some(pid) = files.pid() {
                kill_process_group(pid, Signal::KILL).ok();
                kill_process(pid, Signal::KILL).ok();
            }
            if timeout(Duration::from_millis(20), child.wait())
                .await
                .is_ok()
            {
                return;
            }
        }
    };
    if timeout(DRAIN * 5, end).await.is_err() {
        tracing::warn!("a command does not end; its runtime is killed");
        drop(child.kill().await);
    }
    // Its files may be written until then.
    sleep(Duration::ZERO).await;
}

fn input(mut pipe: ChildStdin) -> mpsc::Sender<Bytes> {
    let (sender, mut data) = mpsc::channel::<Bytes>(QUEUE);
    tokio::spawn(async move {
        while let Some(data) = data.recv().await {
            if pipe.write_all(&data).await.is_err() {
                return;
            }
        }
        // Dropping the pipe is the end of the input.
    });
    sender
}

async fn from_pipe(
    mut pipe: impl AsyncRead + Unpin,
    wrap: fn(Bytes) -> Output,
    output: mpsc::Sender<Output>,
) -> Vec<u8> {
    let mut beginning = Vec::new();
    let mut buffer = vec![0; PIECE];
    while let Ok(got @ 1..) = pipe.read(&mut buffer).await {
        let room = KEPT.saturating_sub(beginning.len()).min(got);
        beginning.extend_from_slice(&buffer[..room]);
        if output
            .send(wrap(Bytes::copy_from_slice(&buffer[..got])))
            .await
            .is_err()
        {
            break;
        }
    }
    beginning
}

/// A new terminal: our side, which does not block, and the other.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let far = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    fcntl_setfl(&ours, fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
    Ok((ours, far))
}

async fn from_terminal(terminal: Arc<AsyncFd<OwnedFd>>, output: mpsc::Sender<Output>) -> Vec<u8> {
    let mut beginning = Vec::new();
    let mut buffer = vec![0; PIECE];
    loop {
        let Ok(mut ready) = terminal.readable().await else {
            return beginning;
        };
        let got = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer[..])?));
        match got {
            // The other side is closed: EIO.
            Ok(Ok(0) | Err(_)) => return beginning,
            Ok(Ok(got)) => {
                let room = KEPT.saturating_sub(beginning.len()).min(got);
                beginning.extend_from_slice(&buffer[..room]);
                let piece = Output::Stdout(Bytes::copy_from_slice(&buffer[..got]));
                if output.send(piece).await.is_err() {
                    return beginning;
                }
            }
            Err(_would_block) => {}
        }
    }
}

fn keys(terminal: Arc<AsyncFd<OwnedFd>>) -> mpsc::Sender<Bytes> {
    let (sender, mut data) = mpsc::channel::<Bytes>(QUEUE);
    tokio::spawn(async move {
        while let Some(data) = data.recv().await {
            let mut rest = &data[..];
            while !rest.is_empty() {
                let Ok(mut ready) = terminal.writable().await else {
                    return;
                };
                match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), rest)?)) {
                    Ok(Ok(written)) => rest = &rest[written..],
                    Ok(Err(_closed)) => return,
                    Err(_would_block) => {}
                }
            }
        }
    });
    sender
}

fn sizes(terminal: Arc<AsyncFd<OwnedFd>>) -> mpsc::Sender<TtySize> {
    let (sender, mut sizes) = mpsc::channel::<TtySize>(QUEUE);
    tokio::spawn(async move {
        while let Some(size) = sizes.recv().await {
            let size = Winsize {
                ws_row: size.height,
                ws_col: size.width,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // The kernel tells the OCI runtime, which tells the terminal in the container.
            tcsetwinsize(terminal.get_ref(), size).ok();
        }
    });
    sender
}

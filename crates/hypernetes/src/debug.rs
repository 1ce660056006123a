//! Programs in a pod's VM itself, for an operator who looks for a fault. Off unless the configuration
//! allows it, and each use is told in the log.
//!
//! After the operator's socket has said that the program was started, frames follow: a length of four
//! bytes, a byte for what it is, the content.
//!
//! | to the daemon | to the operator |
//! | --- | --- |
//! | 0 standard input | 0 standard output, or the terminal |
//! | 1 its end | 1 standard error |
//! | 2 size of the terminal: columns and rows, two bytes each | 2 exit code, four bytes; the last one |
//! | | 3 why there is none; the last one |

use std::{io::Write, os::fd::AsFd, path::Path, process::ExitCode};

use anyhow::{Context, Result, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use hypernetes_runtime::{ContainerState, ContainerStatus, ExecConfig, Output, Session, TtySize};
use hypernetes_types::ContainerId;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    io::AsyncReadExt,
    net::{UnixStream, unix::UCred},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::{
    admin::{self, Backend, GuestExec},
    cli,
};

const STDIN: u8 = 0;
const STDIN_END: u8 = 1;
const RESIZE: u8 = 2;
const STDOUT: u8 = 0;
const STDERR: u8 = 1;
const EXIT: u8 = 2;
const FAILED: u8 = 3;
/// Largest frame.
const MAX_FRAME: usize = 1 << 20;

fn framed(stream: UnixStream) -> Framed<UnixStream, LengthDelimitedCodec> {
    let mut codec = LengthDelimitedCodec::new();
    codec.set_max_frame_length(MAX_FRAME);
    Framed::new(stream, codec)
}

fn frame(kind: u8, content: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(1 + content.len());
    frame.put_u8(kind);
    frame.put_slice(content);
    frame.freeze()
}

/// The container whose files are meant.
fn choose(containers: &[ContainerStatus], name: Option<&str>) -> Result<ContainerId> {
    let running = |status: &&ContainerStatus| status.state == ContainerState::Running;
    let named = |status: &&ContainerStatus| name.is_none_or(|name| status.config.name == name);
    let mut found: Vec<_> = containers.iter().filter(running).filter(named).collect();
    found.sort_by_key(|status| status.created_unix_nanos);
    match (found.first(), name) {
        (Some(status), _) => Ok(status.id.clone()),
        (None, Some(name)) => bail!("no container {name:?} of the pod is running"),
        (None, None) => {
            bail!("no container of the pod is running, whose files a program could have")
        }
    }
}

/// Starts the program for whoever is at the other end of the socket.
pub(crate) async fn start(backend: &Backend, wanted: &GuestExec, peer: &UCred) -> Result<Session> {
    let started = try_start(backend, wanted).await;
    let (user, process) = (peer.uid(), peer.pid().unwrap_or_default());
    let (pod, command) = (&wanted.pod, &wanted.command);
    // Refusals too: who tried is as much worth knowing as who did.
    match &started {
        Ok(_) => tracing::warn!(
            target: "audit",
            user, process, pod, ?command,
            "a program is run in a pod's VM"
        ),
        Err(error) => tracing::warn!(
            target: "audit",
            user, process, pod, ?command,
            error = format!("{error:#}"),
            "a program was not run in a pod's VM"
        ),
    }
    started
}

async fn try_start(backend: &Backend, wanted: &GuestExec) -> Result<Session> {
    if !backend.guest_exec {
        bail!(
            "programs in pods' VMs are not allowed here: the setting debug.guestExec of hypernetes node, \
             or the flag --allow-guest-exec of hypernetes up, allows them"
        );
    }
    let sandbox = admin::find(&backend.runtime.list_sandboxes().await, &wanted.pod)?;
    let containers = backend.runtime.list_containers(Some(&sandbox)).await;
    let container = choose(&containers, wanted.container.as_deref())?;
    let config = ExecConfig {
        command: wanted.command.clone(),
        tty: wanted.tty,
        stdin: wanted.stdin,
    };
    Ok(backend.runtime.exec_in_guest(&container, config).await?)
}

/// Carries the program's streams until it ends, or the operator leaves.
pub(crate) async fn carry(stream: UnixStream, session: Session) -> Result<()> {
    let (mut to_operator, mut from_operator) = framed(stream).split();
    let Session {
        mut stdin,
        mut output,
        resize,
        exit,
    } = session;
    let listen = async {
        while let Some(Ok(mut frame)) = from_operator.next().await {
            let kind = frame.try_get_u8().unwrap_or(STDIN);
            match kind {
                STDIN => {
                    if let Some(sender) = &stdin
                        && sender.send(frame.freeze()).await.is_err()
                    {
                        stdin = None;
                    }
                }
                STDIN_END => stdin = None,
                RESIZE => {
                    let size = (frame.try_get_u16(), frame.try_get_u16());
                    if let (Some(resize), (Ok(width), Ok(height))) = (&resize, size) {
                        // One size more or less.
                        resize.try_send(TtySize { width, height }).ok();
                    }
                }
                _ => {}
            }
        }
    };
    let tell = async {
        while let Some(piece) = output.recv().await {
            let frame = match &piece {
                Output::Stdout(data) => frame(STDOUT, data),
                Output::Stderr(data) => frame(STDERR, data),
            };
            to_operator.send(frame).await?;
        }
        let last = match exit.await {
            Ok(Ok(code)) => frame(EXIT, &code.to_be_bytes()),
            Ok(Err(error)) => frame(
                FAILED,
                hypernetes_telemetry::chain(&error).to_string().as_bytes(),
            ),
            Err(_lost) => frame(FAILED, b"the program was lost"),
        };
        to_operator.send(last).await
    };
    tokio::select! {
        // The operator has left: dropping the session kills the program.
        () = listen => Ok(()),
        told = tell => Ok(told?),
    }
}

/// A terminal that passes every key on. Dropped, it is as it was.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd()).context("-t needs a terminal on standard input")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may have gone.
        tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.0).ok();
    }
}

fn size_frame() -> Option<Bytes> {
    let size = tcgetwinsize(std::io::stdin().as_fd()).ok()?;
    let mut content = BytesMut::new();
    content.put_u16(size.ws_col);
    content.put_u16(size.ws_row);
    Some(frame(RESIZE, &content))
}

/// Runs the program and ends with its exit code.
pub(crate) async fn run(socket: &Path, options: cli::Debug) -> Result<ExitCode> {
    let wanted = GuestExec {
        pod: options.pod,
        container: options.container,
        command: options.command,
        stdin: options.stdin,
        tty: options.tty,
    };
    let stream = admin::guest_exec(socket, wanted).await?;
    // After the answer: an error is told on a terminal as it was.
    let raw = options.tty.then(Raw::set).transpose()?;
    let (mut to_daemon, mut from_daemon) = framed(stream).split();
    let (frames, mut queue) = mpsc::channel::<Bytes>(16);
    tokio::spawn(async move {
        while let Some(frame) = queue.recv().await {
            if to_daemon.send(frame).await.is_err() {
                return;
            }
        }
        // The end of the frames is the operator's leaving; that is for the daemon's last word to cause.
        std::future::pending::<()>().await;
    });
    if options.stdin {
        tokio::spawn(pass_stdin(frames.clone()));
    }
    if options.tty {
        tokio::spawn(follow_size(frames.clone()));
    }
    let code = hear(&mut from_daemon).await;
    drop(raw);
    code
}

async fn pass_stdin(frames: mpsc::Sender<Bytes>) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let read = stdin.read(&mut buffer).await.unwrap_or(0);
        let next = match read {
            0 => frame(STDIN_END, &[]),
            read => frame(STDIN, &buffer[..read]),
        };
        if frames.send(next).await.is_err() || read == 0 {
            return;
        }
    }
}

async fn follow_size(frames: mpsc::Sender<Bytes>) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else {
        return;
    };
    loop {
        if let Some(size) = size_frame()
            && frames.send(size).await.is_err()
        {
            return;
        }
        changes.recv().await;
    }
}

async fn hear(
    frames: &mut (impl StreamExt<Item = std::io::Result<BytesMut>> + Unpin),
) -> Result<ExitCode> {
    while let Some(frame) = frames.next().await {
        let mut frame = frame?;
        match frame.try_get_u8() {
            Ok(STDOUT) => {
                let mut out = std::io::stdout().lock();
                out.write_all(&frame)?;
                out.flush()?;
            }
            Ok(STDERR) => std::io::stderr().lock().write_all(&frame)?,
            Ok(EXIT) => {
                let code = frame.try_get_i32().unwrap_or(-1);
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
            }
            Ok(FAILED) => bail!("{}", String::from_utf8_lossy(&frame)),
            _ => {}
        }
    }
    bail!("the daemon ended before the program did")
}

//! Exec, attach and port-forward: byte streams between a caller and a guest.
//!
//! Every stream is bounded by what the other side takes: a caller that does not read holds up its
//! own process in the guest and nothing else. The tasks end with the caller, with the guest's
//! session, or with the runtime.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use hypernetes_agent_api::{AgentClient, MAX_CHUNK_SIZE, v1};
use hypernetes_types::{ContainerId, SandboxId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    api::{Output, Session, TtySize},
    error::RuntimeError,
    guest::{clean, exit_code, silent, status_error},
    logs::fanout::Subscription,
    sandbox::Phase,
    shared::{Shared, Snapshot},
};

/// Messages that may wait in each direction.
const QUEUE: usize = 8;

/// Where a session belongs.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) sandbox: SandboxId,
    pub(crate) client: AgentClient,
    pub(crate) deadline: Duration,
    /// Not the sandbox itself: a session does not keep it.
    pub(crate) snapshot: watch::Receiver<Arc<Snapshot>>,
}

/// Whether the sandbox is on its way to the disk, or there.
pub(crate) fn is_leaving(snapshot: &Snapshot) -> bool {
    snapshot.record.phase == Phase::Suspending || snapshot.record.phase.is_suspended()
}

impl Place {
    /// Why a session ended, if not by itself.
    fn suspended(&self, action: &'static str) -> Option<RuntimeError> {
        is_leaving(&self.snapshot.borrow()).then(|| RuntimeError::State {
            action,
            kind: "sandbox",
            id: self.sandbox.to_string(),
            state: "suspended".to_owned(),
        })
    }

    fn refused(&self, action: &'static str, status: &tonic::Status) -> RuntimeError {
        if let Some(error) = self.suspended(action) {
            return error;
        }
        status_error(self.sandbox.to_string(), action, status)
    }

    /// Why there was no answer in time.
    fn silent(&self, action: &'static str) -> RuntimeError {
        let stalled = self.snapshot.borrow().stalled_error(action);
        stalled.unwrap_or_else(|| silent(&self.sandbox, action, self.deadline))
    }

    pub(crate) fn broken(&self, action: &'static str, message: &str) -> RuntimeError {
        if let Some(error) = self.suspended(action) {
            return error;
        }
        RuntimeError::Guest {
            sandbox: self.sandbox.to_string(),
            action,
            message: message.to_owned(),
        }
    }
}

/// Runs work until it ends or the runtime does.
fn spawn(shared: &Shared, work: impl Future<Output = ()> + Send + 'static) {
    let closing = shared.closing.clone();
    shared.sessions.spawn(async move {
        tokio::select! {
            () = work => {}
            () = closing.cancelled() => {}
        }
    });
}

fn pieces(data: &Bytes) -> impl Iterator<Item = Vec<u8>> + '_ {
    data.chunks(MAX_CHUNK_SIZE).map(<[u8]>::to_vec)
}

/// Starts a process and returns once the guest says that it runs, or has failed to.
pub(crate) async fn exec(
    shared: &Shared,
    place: Place,
    start: v1::ExecStart,
    tty: bool,
) -> Result<Session, RuntimeError> {
    use v1::exec_input::Input;
    let action = "run a process";
    let with_stdin = start.stdin;
    let (input, inputs) = mpsc::channel(QUEUE);
    let message = |input| v1::ExecInput { input: Some(input) };
    // The queue is empty and its receiver is here.
    drop(input.try_send(message(Input::Start(start))));
    let mut client = place.client.client();
    let begin = async {
        let mut outputs = client.exec(ReceiverStream::new(inputs)).await?.into_inner();
        let first = outputs.message().await?;
        Ok::<_, tonic::Status>((outputs, first))
    };
    let (outputs, first) = timeout(place.deadline, begin)
        .await
        .map_err(|_late| place.silent(action))?
        .map_err(|status| place.refused(action, &status))?;
    let Some(first) = first.and_then(|first| first.output) else {
        return Err(place.broken(action, "the guest ended the call"));
    };
    let (output, output_rx) = mpsc::channel(QUEUE);
    let (exit, exit_rx) = oneshot::channel();
    let (stdin, stdin_rx) = mpsc::channel::<Bytes>(QUEUE);
    let (resize, resize_rx) = mpsc::channel::<TtySize>(QUEUE);
    let feed = feed_exec(
        input,
        with_stdin.then_some(stdin_rx),
        tty.then_some(resize_rx),
    );
    spawn(shared, async move {
        let deliver = deliver_exec(&place, first, outputs, &output, tty);
        let result = tokio::select! {
            result = deliver => result,
            // Never ends; gone with the call.
            () = feed => return,
            // The caller has left: the end of the call kills the process.
            () = output.closed() => return,
        };
        // All output is on its way; its end is what the caller sees next.
        drop(output);
        drop(exit.send(result));
    });
    Ok(Session {
        stdin: with_stdin.then_some(stdin),
        output: output_rx,
        resize: tty.then_some(resize),
        exit: exit_rx,
    })
}

/// Passes stdin and sizes on. Holds the call's input open until it is dropped.
async fn feed_exec(
    input: mpsc::Sender<v1::ExecInput>,
    mut stdin: Option<mpsc::Receiver<Bytes>>,
    mut resize: Option<mpsc::Receiver<TtySize>>,
) {
    use v1::exec_input::Input;
    let send = async |message| {
        // Whoever reads is gone when the call is; then this is dropped too.
        drop(
            input
                .send(v1::ExecInput {
                    input: Some(message),
                })
                .await,
        );
    };
    loop {
        tokio::select! {
            data = next(&mut stdin) => match data {
                Some(data) => {
                    for piece in pieces(&data) {
                        send(Input::Stdin(piece)).await;
                    }
                }
                None => {
                    stdin = None;
                    send(Input::CloseStdin(true)).await;
                }
            },
            size = next(&mut resize) => match size {
                Some(size) => send(Input::Resize(tty_size(size))).await,
                None => resize = None,
            },
        }
    }
}

/// The next message of a channel that may not be there.
async fn next<T>(channel: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match channel {
        Some(channel) => channel.recv().await,
        None => std::future::pending().await,
    }
}

fn tty_size(size: TtySize) -> v1::TtySize {
    v1::TtySize {
        width: size.width.into(),
        height: size.height.into(),
    }
}

async fn deliver_exec(
    place: &Place,
    first: v1::exec_output::Output,
    mut outputs: Streaming<v1::ExecOutput>,
    output: &mpsc::Sender<Output>,
    tty: bool,
) -> Result<i32, RuntimeError> {
    use v1::exec_output::Output as Message;
    let action = "run a process";
    let mut message = Some(first);
    loop {
        let piece = match message {
            Some(Message::Stdout(data)) => Some(Output::Stdout(data.into())),
            Some(Message::Stderr(data)) => Some(Output::Stderr(data.into())),
            Some(Message::Exit(exit)) => {
                if !exit.message.is_empty() {
                    let text = Bytes::from(format!("{}\n", clean(&exit.message)));
                    let text = if tty {
                        Output::Stdout(text)
                    } else {
                        Output::Stderr(text)
                    };
                    drop(output.send(text).await);
                }
                return Ok(exit_code(&exit));
            }
            Some(Message::Started(_)) | None => None,
        };
        if let Some(piece) = piece
            && output.send(piece).await.is_err()
        {
            // The caller has left; the other arm sees it too.
            return Err(place.broken(action, "the caller has left"));
        }
        message = match outputs.message().await {
            Ok(Some(next)) => next.output,
            Ok(None) => return Err(place.broken(action, "the guest ended the call")),
            Err(status) => return Err(place.refused(action, &status)),
        };
    }
}

/// Joins the first process of a container. `ended` resolves to its exit code, or to why it cannot be had.
pub(crate) fn attach(
    shared: &Shared,
    place: &Place,
    container: &ContainerId,
    subscription: Subscription,
    input: AttachInput,
    ended: impl Future<Output = Result<i32, RuntimeError>> + Send + 'static,
) -> Session {
    let (mut exit, exit_rx) = oneshot::channel();
    let (stdin, stdin_rx) = mpsc::channel::<Bytes>(QUEUE);
    let (resize, mut resize_rx) = mpsc::channel::<TtySize>(QUEUE);
    if input.stdin {
        spawn(
            shared,
            feed_stdin(place.clone(), container.clone(), stdin_rx, input.stdin_once),
        );
    }
    if input.tty {
        let (place, id) = (place.clone(), container.to_string());
        spawn(shared, async move {
            while let Some(size) = resize_rx.recv().await {
                let request = v1::ResizeTtyRequest {
                    id: id.clone(),
                    size: Some(tty_size(size)),
                };
                if let Err(error) = place.client.resize_tty(request, place.deadline).await {
                    let error = hypernetes_telemetry::chain(&error).to_string();
                    tracing::debug!(error, "cannot resize a terminal");
                }
            }
        });
    }
    let Subscription { output, cut } = subscription;
    let too_slow = place.broken("attach", "the client did not read in time");
    spawn(shared, async move {
        let result = tokio::select! {
            result = ended => result,
            () = cut.cancelled() => Err(too_slow),
            () = exit.closed() => return,
        };
        drop(exit.send(result));
    });
    Session {
        stdin: input.stdin.then_some(stdin),
        output,
        resize: input.tty.then_some(resize),
        exit: exit_rx,
    }
}

/// What a client that attaches may send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttachInput {
    pub(crate) stdin: bool,
    pub(crate) stdin_once: bool,
    pub(crate) tty: bool,
}

async fn feed_stdin(
    place: Place,
    container: ContainerId,
    mut stdin: mpsc::Receiver<Bytes>,
    once: bool,
) {
    let (chunks, stream) = mpsc::channel(QUEUE);
    let mut client = place.client.client();
    let call = client.stdin(ReceiverStream::new(stream));
    let feed = async move {
        // The id comes first, so that also a client that says nothing is heard leaving.
        let mut id = container.to_string();
        let mut send = async |data, close| {
            let chunk = v1::StdinChunk {
                id: std::mem::take(&mut id),
                data,
                close,
            };
            chunks.send(chunk).await.is_ok()
        };
        if !send(Vec::new(), false).await {
            return;
        }
        while let Some(data) = stdin.recv().await {
            for piece in pieces(&data) {
                if !send(piece, false).await {
                    return;
                }
            }
        }
        if once {
            send(Vec::new(), true).await;
        }
    };
    let (answer, ()) = tokio::join!(call, feed);
    if let Err(status) = answer {
        tracing::debug!(message = clean(status.message()), "stdin was not taken");
    }
}

/// Connects to a TCP port in the guest.
pub(crate) async fn forward(
    shared: &Shared,
    place: Place,
    port: u16,
) -> Result<DuplexStream, RuntimeError> {
    let action = "connect to a port";
    let (input, inputs) = mpsc::channel(QUEUE);
    let first = v1::ForwardChunk {
        port: port.into(),
        data: Vec::new(),
        eof: false,
    };
    // The queue is empty and its receiver is here.
    drop(input.try_send(first));
    let mut client = place.client.client();
    let outputs = timeout(place.deadline, client.forward(ReceiverStream::new(inputs)))
        .await
        .map_err(|_late| silent(&place.sandbox, action, place.deadline))?
        .map_err(|status| place.refused(action, &status))?
        .into_inner();
    let (ours, theirs) = tokio::io::duplex(MAX_CHUNK_SIZE);
    spawn(shared, async move {
        let (reader, writer) = tokio::io::split(ours);
        tokio::join!(send_forward(reader, input), take_forward(writer, outputs));
    });
    Ok(theirs)
}

async fn send_forward(
    mut reader: tokio::io::ReadHalf<DuplexStream>,
    input: mpsc::Sender<v1::ForwardChunk>,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let (data, eof) = match reader.read(&mut buffer).await {
            Ok(0) | Err(_) => (Vec::new(), true),
            Ok(count) => (buffer[..count].to_vec(), false),
        };
        if input
            .send(v1::ForwardChunk { port: 0, data, eof })
            .await
            .is_err()
            || eof
        {
            return;
        }
    }
}

async fn take_forward(
    mut writer: tokio::io::WriteHalf<DuplexStream>,
    mut outputs: Streaming<v1::ForwardChunk>,
) {
    while let Ok(Some(chunk)) = outputs.message().await {
        if writer.write_all(&chunk.data).await.is_err() {
            return;
        }
        if chunk.eof {
            break;
        }
    }
    // The guest will send no more; the caller may still.
    drop(writer.shutdown().await);
}

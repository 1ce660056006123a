//! Joins a process of the runtime's to a client's connection.

use hypernetes_runtime::{Output as RuntimeOutput, RuntimeError, Session, TtySize as RuntimeSize};
use hypernetes_streaming::{Output, ProcessRequest, ProcessSession, StreamError, TtySize};
use hypernetes_telemetry::chain;
use tokio::sync::{mpsc, oneshot};

/// Pieces that wait for a slow client.
const QUEUE: usize = 16;

/// An error of the runtime, as a client of a stream is told.
pub(crate) fn stream_error(error: &RuntimeError) -> StreamError {
    let message = chain(error).to_string();
    match error {
        RuntimeError::NotFound { .. } => StreamError::NotFound(message),
        RuntimeError::State { .. } | RuntimeError::Invalid { .. } => StreamError::Invalid(message),
        _ => StreamError::Internal(message),
    }
}

/// The client's view of a session. Its tasks end with either side; a client that goes takes an
/// exec with it.
pub(crate) fn of_runtime(session: Session, request: &ProcessRequest) -> ProcessSession {
    let (output, output_rx) = mpsc::channel(QUEUE);
    let (exit, exit_rx) = oneshot::channel();
    tokio::spawn(deliver(
        session.output,
        session.exit,
        (request.stdout, request.stderr),
        output,
        exit,
    ));
    ProcessSession {
        stdin: session.stdin,
        output: output_rx,
        resize: session.resize.map(sizes),
        exit: exit_rx,
    }
}

async fn deliver(
    mut from: mpsc::Receiver<RuntimeOutput>,
    ended: oneshot::Receiver<Result<i32, RuntimeError>>,
    (stdout, stderr): (bool, bool),
    output: mpsc::Sender<Output>,
    mut exit: oneshot::Sender<Result<i32, StreamError>>,
) {
    loop {
        let piece = tokio::select! {
            piece = from.recv() => piece,
            () = output.closed() => return,
        };
        let piece = match piece {
            Some(RuntimeOutput::Stdout(data)) if stdout => Output::Stdout(data),
            Some(RuntimeOutput::Stderr(data)) if stderr => Output::Stderr(data),
            Some(_unwanted) => continue,
            None => break,
        };
        if output.send(piece).await.is_err() {
            return;
        }
    }
    // The end of the output is what the client sees first.
    drop(output);
    let code = tokio::select! {
        code = ended => code,
        () = exit.closed() => return,
    };
    let code = match code {
        Ok(code) => code.map_err(|error| stream_error(&error)),
        Err(_dropped) => Err(StreamError::Internal("the process was lost".to_owned())),
    };
    // A client that has just gone does not want it.
    drop(exit.send(code));
}

fn sizes(to: mpsc::Sender<RuntimeSize>) -> mpsc::Sender<TtySize> {
    let (sender, mut sizes) = mpsc::channel::<TtySize>(QUEUE);
    tokio::spawn(async move {
        while let Some(size) = sizes.recv().await {
            let size = RuntimeSize {
                width: size.width,
                height: size.height,
            };
            if to.send(size).await.is_err() {
                return;
            }
        }
    });
    sender
}

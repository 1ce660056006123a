//! Exec and attach: channels of a WebSocket, or streams of a SPDY connection.
//!
//! The session runs until its output has ended and its exit status is sent, or until the client has
//! gone; then it is dropped, which ends an exec.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt, stream::SplitSink};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};
use tracing::debug;

use crate::{
    Output, ProcessRequest, ProcessSession, StreamError, TtySize, Wire,
    spdy::{self, StreamWriter},
    websocket,
};

/// How long a SPDY client may take to open all its streams (as upstream).
const STREAMS_DEADLINE: Duration = Duration::from_secs(30);

/// Serves a session on an upgraded connection, until it ends or the client goes.
pub async fn serve(
    on_upgrade: hyper::upgrade::OnUpgrade,
    wire: Wire,
    request: ProcessRequest,
    session: ProcessSession,
) {
    let io = match on_upgrade.await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => {
            debug!(%error, "the client went away before the upgrade");
            return;
        }
    };
    serve_io(io, &wire, &request, session).await;
}

/// As [`serve`], on any connection that has been switched over.
pub async fn serve_io<S>(io: S, wire: &Wire, request: &ProcessRequest, session: ProcessSession)
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    match wire {
        Wire::WebSocket { protocol, .. } => {
            let half_close = *protocol == "v5.channel.k8s.io";
            serve_websocket(io, half_close, request, session).await;
        }
        Wire::Spdy { .. } => serve_spdy(io, request, session).await,
    }
}

/// What a client does.
#[derive(Debug)]
enum Input {
    Stdin(Bytes),
    StdinEof,
    Resize(TtySize),
}

/// Where output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Stdout = 1,
    Stderr = 2,
    Error = 3,
}

/// The client has gone.
#[derive(Debug)]
struct Gone;

trait ClientSink {
    async fn write(&mut self, channel: Channel, data: Bytes) -> Result<(), Gone>;
    async fn close(&mut self) -> Result<(), Gone>;
}

/// Runs the session between `input` and `sink`; returns when it is over or the client has gone.
async fn pump(
    session: ProcessSession,
    mut input: mpsc::Receiver<Input>,
    sink: &mut impl ClientSink,
) -> Result<(), Gone> {
    let ProcessSession {
        mut stdin,
        mut output,
        resize,
        exit,
    } = session;
    let inward = async {
        while let Some(event) = input.recv().await {
            match event {
                Input::Stdin(data) => {
                    if let Some(sender) = &stdin
                        && sender.send(data).await.is_err()
                    {
                        stdin = None;
                    }
                }
                Input::StdinEof => stdin = None,
                Input::Resize(size) => {
                    if let Some(sender) = &resize
                        && sender.send(size).await.is_err()
                    {
                        debug!("resize after the end of the process");
                    }
                }
            }
        }
        Gone
    };
    let outward = async {
        while let Some(piece) = output.recv().await {
            match piece {
                Output::Stdout(data) => sink.write(Channel::Stdout, data).await?,
                Output::Stderr(data) => sink.write(Channel::Stderr, data).await?,
            }
        }
        let lost = || StreamError::Internal("the process's exit code was lost".to_owned());
        let status = status(&exit.await.unwrap_or_else(|_dropped| Err(lost())));
        sink.write(Channel::Error, Bytes::from(status.to_string()))
            .await?;
        sink.close().await
    };
    tokio::select! {
        gone = inward => Err(gone),
        result = outward => result,
    }
}

/// The `metav1.Status` that ends a session.
fn status(exit: &Result<i32, StreamError>) -> Value {
    match exit {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(error) => json!({
            "metadata": {},
            "status": "Failure",
            "message": error.to_string(),
            "reason": "InternalError",
            "details": {"causes": [{"message": error.to_string()}]},
            "code": 500,
        }),
    }
}

/// `{"Width":80,"Height":24}`.
fn parse_resize(data: &[u8]) -> Option<TtySize> {
    if data.len() > 256 {
        return None;
    }
    let value: Value = serde_json::from_slice(data).ok()?;
    let field = |name: &str| u16::try_from(value.get(name)?.as_u64()?).ok();
    Some(TtySize {
        width: field("Width")?,
        height: field("Height")?,
    })
}

// === WebSocket ===

struct WebSocketSink<S>(SplitSink<WebSocketStream<S>, Message>);

impl<S: AsyncRead + AsyncWrite + Unpin> ClientSink for WebSocketSink<S> {
    async fn write(&mut self, channel: Channel, data: Bytes) -> Result<(), Gone> {
        let mut message = Vec::with_capacity(1 + data.len());
        message.push(channel as u8);
        message.extend_from_slice(&data);
        self.0
            .send(Message::Binary(message.into()))
            .await
            .map_err(|_broken| Gone)
    }

    async fn close(&mut self) -> Result<(), Gone> {
        use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};
        let frame = CloseFrame {
            code: CloseCode::Normal,
            reason: "".into(),
        };
        self.0
            .send(Message::Close(Some(frame)))
            .await
            .map_err(|_broken| Gone)
    }
}

async fn serve_websocket<S>(
    io: S,
    half_close: bool,
    request: &ProcessRequest,
    session: ProcessSession,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (sink, mut source) = websocket::accept(io).await.split();
    let mut sink = WebSocketSink(sink);
    // An empty message on the first channel tells the client that the session stands.
    let first = if request.stdout {
        Channel::Stdout
    } else if request.stderr {
        Channel::Stderr
    } else {
        Channel::Error
    };
    if sink.write(first, Bytes::new()).await.is_err() {
        return;
    }
    let (events, input) = mpsc::channel(8);
    let reader = async {
        while let Some(Ok(message)) = source.next().await {
            let Message::Binary(data) = message else {
                if message.is_close() {
                    break;
                }
                continue;
            };
            let Some((channel, payload)) = data.split_first() else {
                continue;
            };
            let event = match (channel, payload) {
                (0, []) => continue,
                (0, _) => Input::Stdin(data.slice(1..)),
                (255, [0]) if half_close => Input::StdinEof,
                (4, payload) => match parse_resize(payload) {
                    Some(size) => Input::Resize(size),
                    None => continue,
                },
                _ => continue,
            };
            if events.send(event).await.is_err() {
                break;
            }
        }
        drop(events);
        // The session ends by `input`'s end; this future must not win over its last output.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = reader => {}
        result = pump(session, input, &mut sink) => {
            if result.is_ok() {
                // The close handshake: the client answers or goes.
                let drain = async { while let Some(Ok(_)) = source_next(&mut source).await {} };
                drop(tokio::time::timeout(Duration::from_secs(2), drain).await);
            }
        }
    }
}

async fn source_next<S: futures::Stream + Unpin>(source: &mut S) -> Option<S::Item> {
    source.next().await
}

// === SPDY ===

#[derive(Default)]
struct SpdySink {
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
    error: Option<StreamWriter>,
}

impl ClientSink for SpdySink {
    async fn write(&mut self, channel: Channel, data: Bytes) -> Result<(), Gone> {
        let writer = match channel {
            Channel::Stdout => &mut self.stdout,
            Channel::Stderr => &mut self.stderr,
            Channel::Error => &mut self.error,
        };
        match writer {
            Some(writer) => writer.write(data).await.map_err(|_ended| Gone),
            None => Ok(()),
        }
    }

    async fn close(&mut self) -> Result<(), Gone> {
        let writers = [self.stdout.take(), self.stderr.take(), self.error.take()];
        for mut writer in writers.into_iter().flatten() {
            writer.finish().await.map_err(|_ended| Gone)?;
        }
        Ok(())
    }
}

async fn serve_spdy<S>(io: S, request: &ProcessRequest, session: ProcessSession)
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (driver, streams) = spdy::connection(io);
    let work = async {
        match tokio::time::timeout(STREAMS_DEADLINE, collect(streams, request)).await {
            Ok(Some(set)) => run_streams(set, session).await,
            Ok(None) => debug!("the client left before its streams were open"),
            Err(_elapsed) => debug!("the client did not open all its streams in time"),
        }
    };
    let driver = driver.run();
    tokio::pin!(driver);
    tokio::select! {
        result = &mut driver => {
            if let Err(error) = result {
                debug!(%error, "spdy connection ended");
            }
        }
        () = work => {
            // All writers are gone: the driver flushes, says goodbye and ends.
            drop(tokio::time::timeout(Duration::from_secs(10), driver).await);
        }
    }
}

#[derive(Default)]
struct StreamSet {
    sink: SpdySink,
    stdin: Option<spdy::Stream>,
    resize: Option<spdy::Stream>,
}

/// Waits for the streams that the request promises: always `error`, the others as asked.
async fn collect(mut streams: spdy::Incoming, request: &ProcessRequest) -> Option<StreamSet> {
    let mut missing = 1
        + usize::from(request.stdin)
        + usize::from(request.stdout)
        + usize::from(request.stderr && !request.tty)
        + usize::from(request.tty);
    let mut set = StreamSet::default();
    while missing > 0 {
        let stream = streams.next().await?;
        let kind = stream
            .headers
            .get("streamtype")
            .cloned()
            .unwrap_or_default();
        match kind.as_str() {
            "error" => set.sink.error = Some(stream.writer),
            "stdout" => set.sink.stdout = Some(stream.writer),
            "stderr" => set.sink.stderr = Some(stream.writer),
            "stdin" => set.stdin = Some(stream),
            "resize" => set.resize = Some(stream),
            _ => continue,
        }
        missing -= 1;
    }
    Some(set)
}

async fn run_streams(set: StreamSet, session: ProcessSession) {
    let StreamSet {
        mut sink,
        stdin,
        resize,
    } = set;
    let (events, input) = mpsc::channel(8);
    let feed = async {
        let stdin = async {
            let Some(mut stream) = stdin else { return };
            while let Some(data) = stream.reader.next().await {
                if events.send(Input::Stdin(data)).await.is_err() {
                    return;
                }
            }
            if events.send(Input::StdinEof).await.is_ok() && stream.writer.finish().await.is_err() {
                debug!("stdin ended with the connection");
            }
        };
        let resize = async {
            let Some(mut stream) = resize else { return };
            while let Some(data) = stream.reader.next().await {
                // A client may write several objects into one frame.
                let sizes = serde_json::Deserializer::from_slice(&data).into_iter::<Value>();
                let sizes: Vec<TtySize> = sizes
                    .flatten()
                    .filter_map(|size| parse_resize(size.to_string().as_bytes()))
                    .collect();
                for size in sizes {
                    if events.send(Input::Resize(size)).await.is_err() {
                        return;
                    }
                }
            }
        };
        tokio::join!(stdin, resize);
        // The connection's driver tells when the client has gone; the end of its input does not.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = feed => {}
        result = pump(session, input, &mut sink) => {
            if result.is_err() {
                debug!("the client went away");
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! SPDY/3.1 connections, the server's side.
//!
//! What Kubernetes needs of the protocol: the client opens streams with headers, both sides write,
//! half-close and reset them. Clients of Kubernetes neither send nor honour WINDOW_UPDATE, so data is
//! sent as fast as the connection takes it and received as fast as the streams' readers take it:
//! back-pressure is the connection's, as in the upstream implementation.

mod frame;
mod headers;

use std::{
    collections::{BTreeMap, HashMap},
    io,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf},
    sync::mpsc,
};

pub use frame::{Frame, FrameError};
pub use headers::{HeaderCodec, HeaderError};

/// Streams that may be open on one connection.
const MAX_STREAMS: usize = 1024;
/// Frames that wait for a stream's reader, and for the connection.
const QUEUE: usize = 16;

/// Headers of a stream, names in lower case.
pub type Headers = BTreeMap<String, String>;

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpdyError {
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// The peer sent something that is no SPDY/3.1.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer's header block cannot be read.
    #[error(transparent)]
    Headers(#[from] HeaderError),
}

/// What the writer is told to send.
#[derive(Debug)]
enum Outgoing {
    Reply { stream: u32 },
    Data { stream: u32, data: Bytes, fin: bool },
    Reset { stream: u32, status: u32 },
    Ping(u32),
    GoAway { last: u32 },
}

/// A stream that the client opened.
#[derive(Debug)]
pub struct Stream {
    /// The client's headers.
    pub headers: Headers,
    /// Reads; ends at the client's half-close or reset.
    pub reader: StreamReader,
    /// Writes; dropping it resets the stream unless it was finished.
    pub writer: StreamWriter,
}

/// The client's bytes.
#[derive(Debug)]
pub struct StreamReader {
    data: mpsc::Receiver<Bytes>,
}

impl StreamReader {
    /// The next bytes, `None` at the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.data.recv().await
    }
}

/// Bytes for the client.
#[derive(Debug)]
pub struct StreamWriter {
    stream: u32,
    queue: mpsc::Sender<Outgoing>,
    finished: bool,
}

/// The connection has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection has ended")]
pub struct Ended;

impl StreamWriter {
    /// Sends bytes, waiting until the connection takes them.
    pub async fn write(&mut self, data: Bytes) -> Result<(), Ended> {
        let data = Outgoing::Data {
            stream: self.stream,
            data,
            fin: false,
        };
        self.queue.send(data).await.map_err(|_closed| Ended)
    }

    /// Half-closes the stream. Idempotent.
    pub async fn finish(&mut self) -> Result<(), Ended> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        let fin = Outgoing::Data {
            stream: self.stream,
            data: Bytes::new(),
            fin: true,
        };
        self.queue.send(fin).await.map_err(|_closed| Ended)
    }

    /// Ends the stream in both directions.
    pub async fn reset(mut self) {
        self.finished = true;
        // CANCEL (SPDY/3.1, 2.6.3).
        let reset = Outgoing::Reset {
            stream: self.stream,
            status: 5,
        };
        if self.queue.send(reset).await.is_err() {
            tracing::trace!("reset after the connection's end");
        }
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Without room in the queue the connection is being torn down anyway.
            let reset = Outgoing::Reset {
                stream: self.stream,
                status: 5,
            };
            if self.queue.try_send(reset).is_err() {
                tracing::trace!("stream dropped with a full queue");
            }
        }
    }
}

/// Runs a connection until its end. New streams come out of [`Incoming`].
#[derive(Debug)]
pub struct Driver<S> {
    io: S,
    accepted: mpsc::Sender<Stream>,
    queue: mpsc::WeakSender<Outgoing>,
    outgoing: mpsc::Receiver<Outgoing>,
}

/// The streams that the client opens. Keeps the connection open.
#[derive(Debug)]
pub struct Incoming {
    streams: mpsc::Receiver<Stream>,
    _queue: mpsc::Sender<Outgoing>,
}

impl Incoming {
    /// The next stream, `None` once the client has left. Cancel-safe.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

/// Splits a connection into its driver, which must be polled, and the streams that clients open.
/// The driver ends when the client leaves, or once [`Incoming`] and all writers are dropped.
pub fn connection<S: AsyncRead + AsyncWrite + Send + Unpin>(io: S) -> (Driver<S>, Incoming) {
    let (accepted, streams) = mpsc::channel(QUEUE);
    let (queue, outgoing) = mpsc::channel(QUEUE);
    let driver = Driver {
        io,
        accepted,
        queue: queue.downgrade(),
        outgoing,
    };
    (
        driver,
        Incoming {
            streams,
            _queue: queue,
        },
    )
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Driver<S> {
    /// Serves the connection. Dropping the future closes it.
    pub async fn run(self) -> Result<(), SpdyError> {
        let Self {
            io,
            accepted,
            queue,
            mut outgoing,
        } = self;
        let (read, mut write) = tokio::io::split(io);
        let reader = read_frames(read, accepted, queue);
        let writer = async {
            let mut codec = HeaderCodec::new();
            let mut last = 0;
            while let Some(message) = outgoing.recv().await {
                let frame = match message {
                    Outgoing::Reply { stream } => {
                        last = stream;
                        Frame::SynReply {
                            stream,
                            fin: false,
                            block: codec.encode(&Headers::new()),
                        }
                    }
                    Outgoing::Data { stream, data, fin } => Frame::Data { stream, fin, data },
                    Outgoing::Reset { stream, status } => Frame::RstStream { stream, status },
                    Outgoing::Ping(id) => Frame::Ping(id),
                    Outgoing::GoAway { last } => Frame::GoAway { last, status: 1 },
                };
                write
                    .write_all(&frame.encode())
                    .await
                    .map_err(SpdyError::Io)?;
                if outgoing.is_empty() {
                    write.flush().await.map_err(SpdyError::Io)?;
                }
            }
            // Everyone here is done: say goodbye.
            write
                .write_all(&Frame::GoAway { last, status: 0 }.encode())
                .await
                .map_err(SpdyError::Io)?;
            write.shutdown().await.map_err(SpdyError::Io)
        };
        tokio::pin!(reader);
        tokio::pin!(writer);
        tokio::select! {
            result = &mut reader => {
                // The client has left or misbehaves. What is queued for a client that merely
                // half-closed still goes out; a broken connection fails the writer at once.
                if result.is_ok() { writer.await } else { result }
            }
            result = &mut writer => result,
        }
    }
}

/// Receives frames and hands their content to streams.
async fn read_frames<S: AsyncRead>(
    mut read: ReadHalf<S>,
    accepted: mpsc::Sender<Stream>,
    weak: mpsc::WeakSender<Outgoing>,
) -> Result<(), SpdyError> {
    let mut codec = HeaderCodec::new();
    let mut open: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let mut last_stream = 0;
    loop {
        let mut head = [0u8; 8];
        match read.read_exact(&mut head).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(SpdyError::Io(error)),
        }
        let mut payload = vec![0; Frame::payload_length(head)?];
        read.read_exact(&mut payload).await.map_err(SpdyError::Io)?;
        match Frame::decode(head, Bytes::from(payload))? {
            Frame::SynStream { stream, fin, block } => {
                let headers = codec.decode(&block)?;
                if stream % 2 == 0 || stream <= last_stream {
                    return Err(
                        FrameError::Invalid("stream ids of a client are odd and grow").into(),
                    );
                }
                last_stream = stream;
                let Some(queue) = weak.upgrade() else {
                    return Ok(());
                };
                if open.len() >= MAX_STREAMS {
                    open.retain(|_, data| !data.is_closed());
                }
                if open.len() >= MAX_STREAMS || accepted.is_closed() {
                    // REFUSED_STREAM.
                    send(&queue, Outgoing::Reset { stream, status: 3 }).await;
                    continue;
                }
                let (data, reader) = mpsc::channel(QUEUE);
                send(&queue, Outgoing::Reply { stream }).await;
                let writer = StreamWriter {
                    stream,
                    queue,
                    finished: false,
                };
                if !fin {
                    open.insert(stream, data);
                }
                let new = Stream {
                    headers,
                    reader: StreamReader { data: reader },
                    writer,
                };
                if accepted.send(new).await.is_err() {
                    tracing::trace!("stream after the session's end");
                }
            }
            Frame::Data { stream, fin, data } => {
                if let Some(sender) = open.get(&stream)
                    && !data.is_empty()
                    && sender.send(data).await.is_err()
                {
                    // Nobody reads this stream any more: its bytes are dropped.
                    open.remove(&stream);
                }
                if fin {
                    open.remove(&stream);
                }
            }
            Frame::RstStream { stream, .. } => {
                open.remove(&stream);
            }
            Frame::Headers { block, .. } => {
                // Decoded because both sides' compression state must stay in step.
                codec.decode(&block)?;
            }
            Frame::Ping(id) => {
                if let Some(queue) = weak.upgrade() {
                    send(&queue, Outgoing::Ping(id)).await;
                }
            }
            Frame::GoAway { .. } => return Ok(()),
            Frame::SynReply { .. } => {
                if let Some(queue) = weak.upgrade() {
                    send(&queue, Outgoing::GoAway { last: last_stream }).await;
                }
                return Err(FrameError::Invalid("a reply to a stream that was not opened").into());
            }
            Frame::Other => {}
        }
    }
}

async fn send(queue: &mpsc::Sender<Outgoing>, message: Outgoing) {
    if queue.send(message).await.is_err() {
        tracing::trace!("message after the connection's end");
    }
}

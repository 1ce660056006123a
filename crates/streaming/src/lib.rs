//! Exec, attach and port-forward on the wire: WebSocket channels and SPDY/3.1.
//!
//! The serving side of Kubernetes' streaming subresources. What is streamed comes from a
//! [`PodStreams`], which the node implements; this crate knows nothing of pods' insides.
#![forbid(unsafe_code)]

#[cfg(test)]
mod fuzz;
mod images;
pub mod port_forward;
pub mod remote_command;
pub mod spdy;
mod upgrade;
mod websocket;

use std::{fmt, pin::Pin};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
};

/// Which container of which pod. The caller has been authorized for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Uid of the pod, so that a new pod of the same name is not met by accident.
    pub uid: String,
    /// Name of the container.
    pub container: String,
}

/// What a client asks to run, or to attach to (`command` empty).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProcessRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// The client sends standard input.
    pub stdin: bool,
    /// The client wants standard output.
    pub stdout: bool,
    /// The client wants standard error; never together with `tty`.
    pub stderr: bool,
    /// With a terminal.
    pub tty: bool,
}

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TtySize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A piece of a process's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Standard output, or the terminal.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
}

/// A running process, as its client sees it. Dropping it ends an exec (not an attach).
#[derive(Debug)]
pub struct ProcessSession {
    /// Standard input; dropping the sender is its end of file.
    pub stdin: Option<mpsc::Sender<Bytes>>,
    /// Output in order; ends when all of it has been delivered.
    pub output: mpsc::Receiver<Output>,
    /// Terminal size changes.
    pub resize: Option<mpsc::Sender<TtySize>>,
    /// Exit code, after `output` has ended; an error is why there is none.
    pub exit: oneshot::Receiver<Result<i32, StreamError>>,
}

/// A byte stream to a port of a pod.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

impl fmt::Debug for dyn Duplex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Duplex")
    }
}

/// Which part of a container's log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogRequest {
    /// Go on until the container ends.
    pub follow: bool,
    /// The run before the current one.
    pub previous: bool,
    /// RFC 3339 time before each line.
    pub timestamps: bool,
    /// Only so many lines from the end.
    pub tail_lines: Option<u64>,
    /// Only lines of the last so many seconds.
    pub since_seconds: Option<u64>,
    /// Only lines since then, in nanoseconds since 1970.
    pub since_unix_nanos: Option<i64>,
    /// At most so many bytes.
    pub limit_bytes: Option<u64>,
    /// Only what was written there.
    pub source: Option<LogSource>,
}

/// Where a line of a log was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Why a stream cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// No such pod or container here. 404.
    #[error("{0}")]
    NotFound(String),
    /// The request is wrong, or the container is not in the state for it. 400.
    #[error("{0}")]
    Invalid(String),
    /// Something broke. 500.
    #[error("{0}")]
    Internal(String),
}

/// A boxed, pinned byte stream of a log.
pub type LogStream = BoxStream<'static, std::io::Result<Bytes>>;

/// What a node offers to stream.
#[async_trait]
pub trait PodStreams: Send + Sync {
    /// Runs a process in a running container.
    async fn exec(
        &self,
        target: &Target,
        request: ProcessRequest,
    ) -> Result<ProcessSession, StreamError>;
    /// Joins the container's first process.
    async fn attach(
        &self,
        target: &Target,
        request: ProcessRequest,
    ) -> Result<ProcessSession, StreamError>;
    /// Connects to a TCP port on the pod's localhost. `target.container` is empty.
    async fn port_forward(
        &self,
        target: &Target,
        port: u16,
    ) -> Result<Box<dyn Duplex>, StreamError>;
    /// Reads a container's log.
    async fn logs(&self, target: &Target, request: LogRequest) -> Result<LogStream, StreamError>;
}

pub use images::{
    ArchiveBytes, ImageAllowance, ImageContent, ImageEvent, ImageEvents, ImageFailure, ImageFound,
    ImageHold, NodeImages,
};
pub use upgrade::{Rejected, Wire, negotiate_port_forward, negotiate_process};

/// A boxed future that a connection task runs.
pub type SessionFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

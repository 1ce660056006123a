//! Exec, attach and port-forward: URLs that can be used once, and the server behind them.
//!
//! A call answers with a URL whose token stands for what was asked. Whoever has the URL has the
//! stream: it is valid for a minute, for one connection, and only on the address that the node's
//! configuration names, loopback unless it says otherwise.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use hypernetes_runtime::PodRuntime;
use hypernetes_streaming::{
    Duplex, ProcessRequest, Rejected, StreamError, Wire, negotiate_port_forward, negotiate_process,
    port_forward, remote_command,
};
use hypernetes_types::{ContainerId, SandboxId};
use rand::Rng;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    session::{of_runtime, stream_error},
    status::CriError,
};

/// How long a URL can be used.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// URLs that wait to be used.
const MAX_TOKENS: usize = 1000;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take for its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// What a URL stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stream {
    Exec(ContainerId, ProcessRequest),
    Attach(ContainerId, ProcessRequest),
    PortForward(SandboxId, Vec<u16>),
}

impl Stream {
    fn verb(&self) -> &'static str {
        match self {
            Self::Exec(..) => "exec",
            Self::Attach(..) => "attach",
            Self::PortForward(..) => "portforward",
        }
    }
}

/// URLs that have been handed out.
#[derive(Debug, Default)]
struct Tokens(Mutex<HashMap<String, (Stream, Instant)>>);

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Stream, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token for a stream, or `None` when too many wait to be used.
    fn issue(&self, stream: Stream) -> Option<String> {
        let mut tokens = self.lock();
        let now = Instant::now();
        tokens.retain(|_, (_, until)| *until > now);
        if tokens.len() >= MAX_TOKENS {
            return None;
        }
        // Guessing it within its minute is the only way in: 192 bits.
        let token: [u64; 3] = rand::rng().random();
        let token: String = token.iter().map(|part| format!("{part:016x}")).collect();
        tokens.insert(token.clone(), (stream, now + TOKEN_LIFE));
        Some(token)
    }

    /// What a token stands for, once.
    fn redeem(&self, verb: &str, token: &str) -> Option<Stream> {
        let (stream, until) = self.lock().remove(token)?;
        (stream.verb() == verb && until > Instant::now()).then_some(stream)
    }
}

/// The server behind the URLs.
#[derive(Debug)]
pub(crate) struct Streams {
    runtime: Arc<dyn PodRuntime>,
    address: SocketAddr,
    tokens: Tokens,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Streams {
    pub(crate) fn new(runtime: Arc<dyn PodRuntime>, address: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            address,
            tokens: Tokens::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// A URL for a stream.
    pub(crate) fn url(&self, stream: Stream) -> Result<String, CriError> {
        let verb = stream.verb();
        let token = self.tokens.issue(stream).ok_or_else(|| CriError::State {
            what: "the streaming server".to_owned(),
            state: "waiting for too many clients".to_owned(),
        })?;
        Ok(format!("http://{}/{verb}/{token}", self.address))
    }

    /// Serves connections until `stop`, then ends all streams.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _peer)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a streaming client");
                    // Out of descriptors, most likely: others must end first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                tracing::warn!("too many streaming clients: one was turned away");
                continue;
            };
            let streams = Arc::clone(&self);
            self.tasks.spawn(async move {
                let _permit = permit;
                streams.connection(stream).await;
            });
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        // Keys of a terminal must not wait for each other.
        drop(stream.set_nodelay(true));
        let streams = Arc::clone(&self);
        let service = service_fn(move |request| {
            let streams = Arc::clone(&streams);
            async move { Ok::<_, Infallible>(streams.answer(request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_DEADLINE)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::select! {
            result = connection => if let Err(error) = result {
                tracing::debug!(%error, "a streaming client's connection ended");
            },
            () = self.stop.cancelled() => {}
        }
    }

    async fn answer(&self, mut request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "GET or POST");
        }
        let path: Vec<&str> = request.uri().path().split('/').collect();
        let stream = match path.as_slice() {
            ["", verb, token] => self.tokens.redeem(verb, token),
            _ => None,
        };
        let Some(stream) = stream else {
            return plain(
                StatusCode::NOT_FOUND,
                "this URL is unknown, was used, or is too old",
            );
        };
        let headers = request.headers();
        let wire = match &stream {
            Stream::Exec(..) | Stream::Attach(..) => negotiate_process(headers),
            Stream::PortForward(..) => negotiate_port_forward(headers),
        };
        let wire = match wire {
            Ok(wire) => wire,
            Err(error) => return rejected(&error),
        };
        let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
            return plain(StatusCode::BAD_REQUEST, "the connection allows no upgrade");
        };
        match self.open(stream, upgrade, &wire).await {
            Ok(()) => wire.response().map(|()| Full::default()),
            Err(error) => {
                let status = match &error {
                    StreamError::NotFound(_) => StatusCode::NOT_FOUND,
                    StreamError::Invalid(_) => StatusCode::BAD_REQUEST,
                    _ => StatusCode::INTERNAL_SERVER_ERROR,
                };
                plain(status, &error.to_string())
            }
        }
    }

    /// Starts what is streamed, so that an error is an answer, and serves it once the connection
    /// has been switched over.
    async fn open(
        &self,
        stream: Stream,
        upgrade: OnUpgrade,
        wire: &Wire,
    ) -> Result<(), StreamError> {
        let stop = self.stop.clone();
        let wire = wire.clone();
        let serve: hypernetes_streaming::SessionFuture = match stream {
            Stream::Exec(id, request) => {
                let config = hypernetes_runtime::ExecConfig {
                    command: request.command.clone(),
                    tty: request.tty,
                    stdin: request.stdin,
                };
                let session = self.runtime.exec(&id, config).await;
                let session = session.map_err(|error| stream_error(&error))?;
                let session = of_runtime(session, &request);
                Box::pin(remote_command::serve(upgrade, wire, request, session))
            }
            Stream::Attach(id, request) => {
                let session = self.runtime.attach(&id, request.stdin).await;
                let session = session.map_err(|error| stream_error(&error))?;
                let session = of_runtime(session, &request);
                Box::pin(remote_command::serve(upgrade, wire, request, session))
            }
            Stream::PortForward(id, ports) => {
                let runtime = Arc::clone(&self.runtime);
                let connect: port_forward::Connect = Arc::new(move |port| {
                    let (runtime, id) = (Arc::clone(&runtime), id.clone());
                    Box::pin(async move {
                        let connection = runtime.port_forward(&id, port).await;
                        connection
                            .map(|connection| Box::new(connection) as Box<dyn Duplex>)
                            .map_err(|error| stream_error(&error))
                    })
                });
                Box::pin(port_forward::serve(upgrade, wire, ports, connect))
            }
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = serve => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(())
    }
}

fn rejected(error: &Rejected) -> Response<Full<Bytes>> {
    plain(StatusCode::BAD_REQUEST, &error.to_string())
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::PortForward(SandboxId::random(), vec![80])
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_for_its_verb_and_a_minute() {
        let tokens = Tokens::default();
        let token = tokens.issue(stream()).unwrap();
        assert!(tokens.redeem("portforward", &token).is_some());
        assert!(tokens.redeem("portforward", &token).is_none(), "twice");
        let token = tokens.issue(stream()).unwrap();
        assert!(tokens.redeem("exec", &token).is_none(), "another verb");
        let token = tokens.issue(stream()).unwrap();
        tokio::time::advance(TOKEN_LIFE).await;
        assert!(tokens.redeem("portforward", &token).is_none(), "too old");
    }

    #[tokio::test(start_paused = true)]
    async fn unused_tokens_are_bounded_and_forgotten() {
        let tokens = Tokens::default();
        for _ in 0..MAX_TOKENS {
            assert!(tokens.issue(stream()).is_some());
        }
        assert!(tokens.issue(stream()).is_none());
        tokio::time::advance(TOKEN_LIFE).await;
        assert!(tokens.issue(stream()).is_some());
    }
}

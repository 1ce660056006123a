//! The sockets and tasks of a network's name server.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_proto::op::{Message, ResponseCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::{self, AbortHandle, JoinSet},
    time::{Instant, timeout},
};

use super::{
    Zone,
    bucket::Buckets,
    forward::Forwarder,
    zone::{Decision, chased, refuse, truncated, udp_limit},
};
use crate::netns::Namespace;

const PORT: u16 = 53;
/// A query of a client that means well is a tenth of that.
const MAX_QUERY: usize = 4096;
/// Forwarded queries of one network at a time.
const MAX_FORWARDED: usize = 256;
/// TCP connections of one network at a time.
const MAX_CONNECTIONS: usize = 64;
const MAX_CONNECTIONS_PER_POD: usize = 8;
/// How long a TCP client may be idle or slow.
const TCP_PATIENCE: Duration = Duration::from_secs(10);
const MAX_QUERIES_PER_CONNECTION: usize = 128;
/// How long a predecessor's sockets may still be closing.
const BIND_WAIT: Duration = Duration::from_secs(2);

/// A running name server. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct DnsServer {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

#[derive(Debug)]
struct Shared {
    zone: Mutex<Arc<Zone>>,
    buckets: Mutex<Buckets>,
    /// `None`: this network has no egress, and questions about the outside are refused.
    forwarder: Mutex<Option<Forwarder>>,
    forwarded: Semaphore,
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl DnsServer {
    /// Serves on the gateway's address in `namespace`. Must be called in a tokio runtime.
    pub(crate) fn start(
        namespace: &Namespace,
        gateway: Ipv4Addr,
        zone: Zone,
        upstream: Option<&[SocketAddr]>,
    ) -> io::Result<Self> {
        let (udp, tcp) = namespace.run(|| bind((gateway, PORT).into()))?;
        let (udp, tcp) = (UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?);
        let shared = Arc::new(Shared {
            zone: Mutex::new(Arc::new(zone)),
            buckets: Mutex::default(),
            forwarder: Mutex::new(upstream.map(Forwarder::new)),
            forwarded: Semaphore::new(MAX_FORWARDED),
        });
        let tasks = [
            tokio::spawn(Arc::clone(&shared).serve_udp(udp)).abort_handle(),
            tokio::spawn(Arc::clone(&shared).serve_tcp(tcp)).abort_handle(),
        ];
        Ok(Self { shared, tasks })
    }

    /// Replaces what it knows.
    pub(crate) fn set(&self, zone: Zone, upstream: Option<&[SocketAddr]>) {
        *lock(&self.shared.zone) = Arc::new(zone);
        *lock(&self.shared.forwarder) = upstream.map(Forwarder::new);
    }

    /// Whether its tasks run.
    pub(crate) fn is_running(&self) -> bool {
        self.tasks.iter().all(|task| !task.is_finished())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(address: SocketAddr) -> io::Result<(StdUdpSocket, StdTcpListener)> {
    let deadline = Instant::now() + BIND_WAIT;
    loop {
        match StdUdpSocket::bind(address).and_then(|udp| Ok((udp, StdTcpListener::bind(address)?)))
        {
            Ok((udp, tcp)) => {
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                return Ok((udp, tcp));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::park_timeout(Duration::from_millis(20));
            }
            Err(error) => return Err(error),
        }
    }
}

/// What to do with a query after the zone was asked.
enum Next {
    Send(Vec<u8>),
    Forward(Box<Message>),
    /// As [`Decision::Chase`].
    Chase(Box<Message>, Box<Message>),
    Nothing,
}

impl Shared {
    fn next(&self, source: SocketAddr, query: &[u8]) -> Next {
        if !lock(&self.buckets).take(source.ip(), Instant::now()) {
            return Next::Nothing;
        }
        let zone = Arc::clone(&lock(&self.zone));
        match zone.decide(query) {
            Decision::Answer(message) => message.to_vec().map_or(Next::Nothing, Next::Send),
            Decision::Forward(message) => Next::Forward(message),
            Decision::Chase { answer, query } => Next::Chase(answer, query),
            Decision::Ignore => Next::Nothing,
        }
    }

    /// Asks upstream, or says why not.
    async fn forward(&self, query: &Message, tcp: bool) -> Option<Vec<u8>> {
        let forwarder = lock(&self.forwarder).clone();
        let code = match (forwarder, self.forwarded.try_acquire()) {
            (None, _) => ResponseCode::Refused,
            (Some(_), Err(_full)) => ResponseCode::ServFail,
            (Some(forwarder), Ok(_permit)) => match forwarder.ask(query, tcp).await {
                Some(answer) => return Some(answer),
                None => ResponseCode::ServFail,
            },
        };
        match refuse(query, code) {
            Decision::Answer(message) => message.to_vec().ok(),
            Decision::Forward(_) | Decision::Chase { .. } | Decision::Ignore => None,
        }
    }

    /// Completes an answer that ends in an alias. Without an upstream the alias is all there is.
    async fn chase(&self, answer: Message, query: &Message, tcp: bool) -> Option<Vec<u8>> {
        if lock(&self.forwarder).is_none() {
            return answer.to_vec().ok();
        }
        let said = self.forward(query, tcp).await?;
        chased(answer, &said).to_vec().ok()
    }

    async fn serve_udp(self: Arc<Self>, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut forwarding = JoinSet::new();
        let mut buffer = vec![0; MAX_QUERY];
        loop {
            while forwarding.try_join_next().is_some() {}
            let (length, source) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    // An ICMP error for an earlier answer; the socket is as good as before.
                    tracing::debug!(%error, "DNS socket");
                    tokio::task::yield_now().await;
                    continue;
                }
            };
            let query = &buffer[..length];
            match self.next(source, query) {
                Next::Send(answer) => send(&socket, source, udp_limit(query), answer).await,
                Next::Forward(message) if forwarding.len() < MAX_FORWARDED => {
                    let (shared, socket) = (Arc::clone(&self), Arc::clone(&socket));
                    let limit = udp_limit(query);
                    forwarding.spawn(async move {
                        if let Some(answer) = shared.forward(&message, false).await {
                            send(&socket, source, limit, answer).await;
                        }
                    });
                }
                Next::Chase(answer, message) if forwarding.len() < MAX_FORWARDED => {
                    let (shared, socket) = (Arc::clone(&self), Arc::clone(&socket));
                    let limit = udp_limit(query);
                    forwarding.spawn(async move {
                        if let Some(answer) = shared.chase(*answer, &message, false).await {
                            send(&socket, source, limit, answer).await;
                        }
                    });
                }
                Next::Forward(_) | Next::Chase(..) | Next::Nothing => {}
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut peers = HashMap::new();
        loop {
            if connections.len() >= MAX_CONNECTIONS {
                forget(&mut peers, connections.join_next_with_id().await);
            }
            while let Some(ended) = connections.try_join_next_with_id() {
                forget(&mut peers, Some(ended));
            }
            match listener.accept().await {
                Ok((stream, source)) => {
                    if peers.values().filter(|peer| **peer == source.ip()).count()
                        >= MAX_CONNECTIONS_PER_POD
                    {
                        continue;
                    }
                    let shared = Arc::clone(&self);
                    let task = connections.spawn(async move {
                        if let Err(error) = shared.serve_connection(stream, source).await {
                            tracing::debug!(peer = %source, %error, "DNS connection");
                        }
                    });
                    peers.insert(task.id(), source.ip());
                }
                Err(error) => {
                    // Out of descriptors, most likely: others must get some time to close theirs.
                    tracing::warn!(%error, "cannot accept DNS connections");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream, source: SocketAddr) -> io::Result<()> {
        let slow = || io::Error::new(io::ErrorKind::TimedOut, "the client is slow");
        for _query in 0..MAX_QUERIES_PER_CONNECTION {
            let receive = async {
                let length = usize::from(stream.read_u16().await?);
                if length > MAX_QUERY {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the query is too long",
                    ));
                }
                let mut query = vec![0; length];
                stream.read_exact(&mut query).await?;
                Ok(query)
            };
            let query = match timeout(TCP_PATIENCE, receive).await {
                Err(_elapsed) => return Err(slow()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Ok(received) => received?,
            };
            let answer = match self.next(source, &query) {
                Next::Send(answer) => answer,
                Next::Forward(message) => match self.forward(&message, true).await {
                    Some(answer) => answer,
                    None => return Ok(()),
                },
                Next::Chase(answer, message) => match self.chase(*answer, &message, true).await {
                    Some(answer) => answer,
                    None => return Ok(()),
                },
                Next::Nothing => return Ok(()),
            };
            let Ok(length) = u16::try_from(answer.len()) else {
                return Ok(());
            };
            let mut framed = length.to_be_bytes().to_vec();
            framed.extend_from_slice(&answer);
            timeout(TCP_PATIENCE, stream.write_all(&framed))
                .await
                .map_err(|_elapsed| slow())??;
        }
        Ok(())
    }
}

fn forget(
    peers: &mut HashMap<task::Id, IpAddr>,
    ended: Option<Result<(task::Id, ()), task::JoinError>>,
) {
    match ended {
        Some(Ok((id, ()))) => peers.remove(&id),
        Some(Err(error)) => peers.remove(&error.id()),
        None => None,
    };
}

async fn send(socket: &UdpSocket, to: SocketAddr, limit: usize, mut answer: Vec<u8>) {
    if answer.len() > limit {
        match truncated(&answer, limit) {
            Some(short) => answer = short,
            None => return,
        }
    }
    if let Err(error) = socket.send_to(&answer, to).await {
        tracing::debug!(peer = %to, %error, "cannot send a DNS answer");
    }
}

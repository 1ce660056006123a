//! Asks the node's upstream servers, from the node's own namespace.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::op::{Edns, Message};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// For one server.
const PATIENCE: Duration = Duration::from_secs(3);
/// Servers that are asked one after the other.
const MAX_SERVERS: usize = 3;

/// The upstream servers.
#[derive(Debug, Clone)]
pub(crate) struct Forwarder {
    servers: Arc<[SocketAddr]>,
}

impl Forwarder {
    pub(crate) fn new(servers: &[SocketAddr]) -> Self {
        Self {
            servers: servers.iter().take(MAX_SERVERS).copied().collect(),
        }
    }

    /// The upstream's answer to the question of `query`, with the asker's id; `None` if no server
    /// gave one.
    pub(crate) async fn ask(&self, query: &Message, tcp: bool) -> Option<Vec<u8>> {
        // Only the question goes on: no byte of the pod's own choosing besides.
        let mut outgoing = Message::query();
        outgoing.metadata.recursion_desired = true;
        outgoing.metadata.checking_disabled = query.metadata.checking_disabled;
        outgoing.add_queries(query.queries.iter().cloned());
        if let Some(asked) = &query.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(1232);
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            outgoing.set_edns(edns);
        }
        let bytes = outgoing.to_vec().ok()?;
        for server in self.servers.iter() {
            let exchange = async {
                if tcp {
                    over_tcp(*server, &outgoing, &bytes).await
                } else {
                    over_udp(*server, &outgoing, &bytes).await
                }
            };
            match timeout(PATIENCE, exchange).await {
                Ok(Ok(mut answer)) => {
                    answer[..2].copy_from_slice(&query.metadata.id.to_be_bytes());
                    return Some(answer);
                }
                Ok(Err(error)) => tracing::debug!(%server, %error, "upstream DNS failed"),
                Err(_elapsed) => tracing::debug!(%server, "upstream DNS did not answer"),
            }
        }
        None
    }
}

async fn over_udp(server: SocketAddr, query: &Message, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let local: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    // A socket per query: a random port, and only this server's packets.
    let socket = UdpSocket::bind(local).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if answers(query, &buffer[..length]) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn over_tcp(server: SocketAddr, query: &Message, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if answers(query, &answer) {
        Ok(answer)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the answer is to another question",
        ))
    }
}

/// Whether `bytes` is a well-formed answer to `query`.
fn answers(query: &Message, bytes: &[u8]) -> bool {
    // The flag first: a well-formed query with our id is not an answer.
    bytes.get(2).is_some_and(|flags| flags & 0x80 != 0)
        && Message::from_vec(bytes).is_ok_and(|answer| {
            answer.metadata.id == query.metadata.id && answer.queries == query.queries
        })
}

//! Connections to ports of a pod's localhost.

use std::{io, net::SocketAddr, path::Path, time::Duration};

use hypernetes_runtime::{Connection, RuntimeError};
use tokio::net::TcpStream;

use crate::{
    namespaces::in_netns,
    records::{SandboxPhase, SandboxRecord, blocking, failed, invalid, state},
};

/// Longest wait for an answer of the pod's own loopback.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects by IPv4, or by IPv6 where nobody answers there.
pub(crate) async fn connect(record: &SandboxRecord, port: u16) -> Result<Connection, RuntimeError> {
    if port == 0 {
        return Err(invalid("port", "must be 1 to 65535"));
    }
    if record.phase != SandboxPhase::Ready || record.failure.is_some() {
        let phase = format!("{:?}", record.phase).to_lowercase();
        return Err(state("connect to a port", "sandbox", &record.id, phase));
    }
    let netns = record.netns();
    let made = blocking("connect to a port", move || {
        let made = match netns {
            None => reach(port),
            // A connection belongs to the namespace that it was made in.
            Some(netns) => within(&netns, port),
        };
        Ok(made)
    })
    .await?;
    let refused = |error: io::Error| failed("connect to the port", error.to_string());
    let stream = made.map_err(refused)?;
    Ok(Box::new(TcpStream::from_std(stream).map_err(refused)?))
}

fn within(netns: &Path, port: u16) -> io::Result<std::net::TcpStream> {
    in_netns(netns, || reach(port))
}

fn reach(port: u16) -> io::Result<std::net::TcpStream> {
    let four = SocketAddr::from(([127, 0, 0, 1], port));
    let six = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port));
    let stream = std::net::TcpStream::connect_timeout(&four, PATIENCE).or_else(|first| {
        std::net::TcpStream::connect_timeout(&six, PATIENCE).map_err(|_no_better| first)
    })?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

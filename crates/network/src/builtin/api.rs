//! The way from a network to the API server: a listener in the namespace, whose connections the
//! daemon serves itself. Nothing of the host is reached.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdTcpListener},
    sync::{Arc, Mutex},
    time::Duration,
};

use hypernetes_types::NetworkId;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::AbortHandle,
    time::Instant,
};

use super::lock;
use crate::{netns::Namespace, plan::API_PORT};

/// Connections that one pod may have open, and all of a network.
const PER_POD: usize = 64;
const PER_NETWORK: usize = 1024;
/// How long a predecessor's socket may still be closing.
const BIND_WAIT: Duration = Duration::from_secs(2);

/// A pod's connection to the API server.
#[derive(Debug)]
pub struct ApiConnection {
    /// The connection.
    pub stream: TcpStream,
    /// Network of the pod.
    pub network: NetworkId,
    /// To be kept until the connection ends: it counts.
    pub place: ApiPlace,
}

/// A connection as it counts for its pod.
#[derive(Debug)]
pub struct ApiPlace {
    source: IpAddr,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Drop for ApiPlace {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        if let Some(count) = open.get_mut(&self.source) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.remove(&self.source);
            }
        }
    }
}

/// A running listener. Dropping it ends it; its connections go on.
#[derive(Debug)]
pub(super) struct ApiListener(AbortHandle);

impl Drop for ApiListener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ApiListener {
    /// Listens on the gateway's address in `namespace`. Must be called in a tokio runtime.
    pub(super) fn start(
        namespace: &Namespace,
        gateway: Ipv4Addr,
        network: NetworkId,
        connections: Arc<mpsc::Sender<ApiConnection>>,
    ) -> io::Result<Self> {
        let listener = namespace.run(|| bind((gateway, API_PORT).into()))?;
        let listener = TcpListener::from_std(listener)?;
        let task = tokio::spawn(accept_all(listener, network, connections));
        Ok(Self(task.abort_handle()))
    }

    pub(super) fn is_running(&self) -> bool {
        !self.0.is_finished()
    }
}

fn bind(address: SocketAddr) -> io::Result<StdTcpListener> {
    let deadline = Instant::now() + BIND_WAIT;
    loop {
        match StdTcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                return Ok(listener);
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::park_timeout(Duration::from_millis(20));
            }
            Err(error) => return Err(error),
        }
    }
}

async fn accept_all(
    listener: TcpListener,
    network: NetworkId,
    connections: Arc<mpsc::Sender<ApiConnection>>,
) {
    let open = Arc::new(Mutex::new(HashMap::<IpAddr, usize>::new()));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%network, %error, "cannot accept connections to the API server");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = enter(&open, peer.ip()) else {
            continue;
        };
        let connection = ApiConnection {
            stream,
            network: network.clone(),
            place,
        };
        if connections.send(connection).await.is_err() {
            return;
        }
    }
}

fn enter(open: &Arc<Mutex<HashMap<IpAddr, usize>>>, source: IpAddr) -> Option<ApiPlace> {
    let mut counts = lock(open);
    if counts.values().sum::<usize>() >= PER_NETWORK {
        return None;
    }
    let count = counts.entry(source).or_default();
    if *count >= PER_POD {
        return None;
    }
    *count += 1;
    Some(ApiPlace {
        source,
        open: Arc::clone(open),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_so_many_connections_and_gets_them_back() {
        let open = Arc::default();
        let pod: IpAddr = "10.0.0.2".parse().unwrap();
        let mut places: Vec<_> = std::iter::from_fn(|| enter(&open, pod)).collect();
        assert_eq!(places.len(), PER_POD);
        assert!(enter(&open, "10.0.0.3".parse().unwrap()).is_some());
        places.pop();
        assert!(enter(&open, pod).is_some());
        drop(places);
        assert!(lock(&open).is_empty());
    }
}

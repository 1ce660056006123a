//! Port-forward: pairs of SPDY streams, plain or tunnelled through a WebSocket, and the older
//! channel framing of WebSockets.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{SinkExt, StreamExt, future::BoxFuture};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::tungstenite::Message;
use tracing::debug;

use crate::{Duplex, StreamError, Wire, spdy, upgrade::TUNNEL, websocket};

/// How long the second stream of a pair may take (as upstream).
const PAIR_DEADLINE: Duration = Duration::from_secs(30);
/// Connections of one client at a time.
const MAX_CONNECTIONS: usize = 256;

/// Opens a connection to a port of the pod.
pub type Connect =
    Arc<dyn Fn(u16) -> BoxFuture<'static, Result<Box<dyn Duplex>, StreamError>> + Send + Sync>;

/// Serves a port-forward on an upgraded connection. `ports` are those of the request's query, which
/// only the channel framing uses.
pub async fn serve(
    on_upgrade: hyper::upgrade::OnUpgrade,
    wire: Wire,
    ports: Vec<u16>,
    connect: Connect,
) {
    match on_upgrade.await {
        Ok(upgraded) => serve_io(TokioIo::new(upgraded), &wire, ports, connect).await,
        Err(error) => debug!(%error, "the client went away before the upgrade"),
    }
}

/// As [`serve`], on any connection that has been switched over.
pub async fn serve_io<S>(io: S, wire: &Wire, ports: Vec<u16>, connect: Connect)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    match wire {
        Wire::Spdy { .. } => serve_spdy(io, connect).await,
        Wire::WebSocket { protocol, .. } if *protocol == TUNNEL => {
            let stream = websocket::ByteStream::new(websocket::accept(io).await);
            serve_spdy(stream, connect).await;
        }
        Wire::WebSocket { .. } => serve_channels(io, ports, connect).await,
    }
}

/// The two streams of one connection.
#[derive(Default)]
struct Pair {
    data: Option<spdy::Stream>,
    error: Option<spdy::Stream>,
}

async fn serve_spdy<S>(io: S, connect: Connect)
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (driver, mut streams) = spdy::connection(io);
    // It owns the streams: the driver ends once they and all connections are gone.
    let work = async move {
        let mut pairs: HashMap<String, Pair> = HashMap::new();
        let mut connections = JoinSet::new();
        loop {
            // A half that never meets its other half is forgotten.
            let deadline = if pairs.is_empty() {
                Duration::MAX
            } else {
                PAIR_DEADLINE
            };
            let stream = tokio::select! {
                stream = streams.next() => stream,
                Some(_) = connections.join_next() => continue,
                () = tokio::time::sleep(deadline) => {
                    pairs.clear();
                    continue;
                }
            };
            let Some(stream) = stream else { break };
            if connections.len() >= MAX_CONNECTIONS || pairs.len() >= MAX_CONNECTIONS {
                stream.writer.reset().await;
                continue;
            }
            let header = |name: &str| stream.headers.get(name).cloned().unwrap_or_default();
            // Clients before Kubernetes 1.4 sent no request id; the port then tells pairs apart.
            let id = if header("requestid").is_empty() {
                header("port")
            } else {
                header("requestid")
            };
            let kind = header("streamtype");
            if !["data", "error"].contains(&kind.as_str()) {
                stream.writer.reset().await;
                continue;
            }
            let pair = pairs.entry(id.clone()).or_default();
            match kind.as_str() {
                "data" => pair.data = Some(stream),
                _ => pair.error = Some(stream),
            }
            if pair.data.is_some() && pair.error.is_some() {
                let pair = pairs.remove(&id);
                if let Some(Pair {
                    data: Some(data),
                    error: Some(error),
                }) = pair
                {
                    connections.spawn(forward(data, error, connect.clone()));
                }
            }
        }
        drop(pairs);
        // The client half-closed: connections that are under way finish.
        while connections.join_next().await.is_some() {}
    };
    let driver = driver.run();
    tokio::pin!(driver);
    tokio::select! {
        result = &mut driver => {
            if let Err(error) = result {
                debug!(%error, "spdy connection ended");
            }
        }
        () = work => drop(tokio::time::timeout(Duration::from_secs(10), driver).await),
    }
}

/// Carries one connection. Failures are told on the error stream.
async fn forward(data: spdy::Stream, mut error: spdy::Stream, connect: Connect) {
    let result = async {
        let port = data
            .headers
            .get("port")
            .map(String::as_str)
            .unwrap_or_default();
        let port: u16 = port
            .parse()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| StreamError::Invalid(format!("invalid port {port:?}")))?;
        let connection = connect(port).await?;
        copy(data, connection).await;
        Ok::<_, StreamError>(())
    }
    .await;
    if let Err(failure) = result
        && error
            .writer
            .write(Bytes::from(failure.to_string()))
            .await
            .is_err()
    {
        debug!(%failure, "nobody to tell");
    }
    if error.writer.finish().await.is_err() {
        debug!("connection ended before its error stream");
    }
}

/// Copies both ways with half-close until both directions have ended.
async fn copy(mut data: spdy::Stream, connection: Box<dyn Duplex>) {
    let (mut read, mut write) = tokio::io::split(connection);
    let inward = async {
        while let Some(bytes) = data.reader.next().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        if write.shutdown().await.is_err() {
            debug!("the pod closed first");
        }
    };
    let writer = &mut data.writer;
    let outward = async {
        let mut buffer = vec![0; 32 << 10];
        loop {
            match read.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(n) => {
                    if writer
                        .write(Bytes::copy_from_slice(&buffer[..n]))
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
            }
        }
        if writer.finish().await.is_err() {
            debug!("the client went away");
        }
    };
    tokio::pin!(inward);
    tokio::pin!(outward);
    tokio::select! {
        () = &mut inward => outward.await,
        // A server that closes ends the connection; what the client still sends goes nowhere.
        () = &mut outward => {}
    }
}

/// `v4.channel.k8s.io`: two channels for each port, data and error, each opened by the server with the
/// port number in two bytes, little-endian.
async fn serve_channels<S>(io: S, ports: Vec<u16>, connect: Connect)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sink, mut source) = websocket::accept(io).await.split();
    let (outgoing, mut queue) = mpsc::channel::<Bytes>(16);
    let mut connections = JoinSet::new();
    let mut inputs: HashMap<u8, mpsc::Sender<Bytes>> = HashMap::new();
    for (index, port) in ports.iter().enumerate().take(100) {
        let Ok(data) = u8::try_from(index * 2) else {
            break;
        };
        let announce = [data, data + 1].map(|channel| {
            let port = port.to_le_bytes();
            Bytes::copy_from_slice(&[channel, port[0], port[1]])
        });
        for message in announce {
            if sink.send(Message::Binary(message)).await.is_err() {
                return;
            }
        }
        let (input, receiver) = mpsc::channel(16);
        inputs.insert(data, input);
        connections.spawn(forward_channel(
            data,
            *port,
            receiver,
            outgoing.clone(),
            connect.clone(),
        ));
    }
    drop(outgoing);
    let write = async {
        while let Some(message) = queue.recv().await {
            if sink.send(Message::Binary(message)).await.is_err() {
                return;
            }
        }
        if sink.close().await.is_err() {
            debug!("the client went away");
        }
    };
    let read = async {
        while let Some(Ok(message)) = source.next().await {
            if let Message::Binary(data) = message
                && let Some(channel) = data.first()
                && let Some(input) = inputs.get(channel)
                && data.len() > 1
                && input.send(data.slice(1..)).await.is_err()
            {
                inputs.remove(channel);
            }
        }
    };
    tokio::select! {
        () = write => {}
        () = read => {}
    }
}

async fn forward_channel(
    channel: u8,
    port: u16,
    mut input: mpsc::Receiver<Bytes>,
    outgoing: mpsc::Sender<Bytes>,
    connect: Connect,
) {
    let message = |channel: u8, data: &[u8]| {
        let mut message = Vec::with_capacity(1 + data.len());
        message.push(channel);
        message.extend_from_slice(data);
        Bytes::from(message)
    };
    let connection = match connect(port).await {
        Ok(connection) => connection,
        Err(error) => {
            let text = message(channel + 1, error.to_string().as_bytes());
            if outgoing.send(text).await.is_err() {
                debug!("nobody to tell");
            }
            return;
        }
    };
    let (mut read, mut write) = tokio::io::split(connection);
    let inward = async {
        while let Some(bytes) = input.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let outward = async {
        let mut buffer = vec![0; 32 << 10];
        while let Ok(n @ 1..) = read.read(&mut buffer).await {
            if outgoing.send(message(channel, &buffer[..n])).await.is_err() {
                return;
            }
        }
    };
    tokio::pin!(inward);
    tokio::pin!(outward);
    tokio::select! {
        () = &mut inward => outward.await,
        () = &mut outward => {}
    }
}

#[cfg(test)]
mod tests;

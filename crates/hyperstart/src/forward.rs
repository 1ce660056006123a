//! One TCP connection from the node into the pod's network.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use hypernetes_agent_api::{
    MAX_CHUNK_SIZE,
    server::{Replies, Requests},
    status::Status,
    v1,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::error::GuestError;

/// Connects to a server on the pod's loopback, IPv4 first.
pub(crate) async fn connect(port: u32) -> Result<TcpStream, Status> {
    let number = u16::try_from(port).ok().filter(|port| *port != 0);
    let number = number
        .ok_or_else(|| Status::from(GuestError::Invalid(format!("there is no port {port}"))))?;
    let refused =
        |error: io::Error| Status::unavailable(format!("cannot connect to port {port}: {error}"));
    match TcpStream::connect((Ipv4Addr::LOCALHOST, number)).await {
        Ok(stream) => Ok(stream),
        Err(first) => TcpStream::connect((Ipv6Addr::LOCALHOST, number))
            .await
            .map_err(|_second| refused(first)),
    }
}

/// Carries both directions, each to its own end.
pub(crate) async fn serve(
    stream: TcpStream,
    first: Vec<u8>,
    mut inputs: Requests<v1::ForwardChunk>,
    replies: Replies<v1::ForwardChunk>,
) {
    let (mut reader, mut writer) = stream.into_split();
    let inward = async {
        writer.write_all(&first).await?;
        while let Ok(Some(chunk)) = inputs.message().await {
            writer.write_all(&chunk.data).await?;
            if chunk.eof {
                break;
            }
        }
        writer.shutdown().await
    };
    let outward = async {
        loop {
            let mut data = Vec::with_capacity(MAX_CHUNK_SIZE);
            // A reset ends the stream like an end does: the bytes so far are the node's.
            let count = reader.read_buf(&mut data).await.unwrap_or(0);
            let eof = count == 0;
            let chunk = v1::ForwardChunk { port: 0, data, eof };
            if replies.send(&chunk).await.is_err() || eof {
                return;
            }
        }
    };
    // A server that reads no more may still write.
    let (_written, ()) = tokio::join!(inward, outward);
}

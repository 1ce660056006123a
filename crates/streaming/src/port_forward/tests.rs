use tokio::{
    io::{DuplexStream, duplex},
    net::TcpListener,
};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

use super::*;
use crate::{remote_command::tests::SpdyClient, spdy::Frame};

/// Connects to a server on loopback whatever the port; port 1 is refused.
fn connect_to(address: std::net::SocketAddr) -> Connect {
    Arc::new(move |port| {
        Box::pin(async move {
            if port == 1 {
                return Err(StreamError::Internal("connection refused".to_owned()));
            }
            let stream = tokio::net::TcpStream::connect(address).await;
            let stream = stream.map_err(|error| StreamError::Internal(error.to_string()))?;
            Ok(Box::new(stream) as Box<dyn Duplex>)
        })
    })
}

/// Reads to the end, answers with the same bytes reversed.
async fn reverse_server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut data = Vec::new();
                stream.read_to_end(&mut data).await.unwrap();
                data.reverse();
                stream.write_all(&data).await.unwrap();
            });
        }
    });
    address
}

async fn answer(client: &mut SpdyClient, data: u32, error: u32) -> (Vec<u8>, Vec<u8>) {
    let (mut body, mut failure, mut open) = (Vec::new(), Vec::new(), 2);
    while open > 0 {
        match client.next().await.expect("the server answers") {
            Frame::Data {
                stream,
                data: bytes,
                fin,
            } => {
                if stream == data {
                    body.extend_from_slice(&bytes);
                } else if stream == error {
                    failure.extend_from_slice(&bytes);
                }
                open -= u32::from(fin);
            }
            Frame::RstStream { .. } => open -= 1,
            _ => {}
        }
    }
    (body, failure)
}

async fn two_connections(client: DuplexStream) {
    let mut client = SpdyClient::new(client);
    for id in ["0", "1"] {
        let error = client
            .open(&[("streamType", "error"), ("port", "8080"), ("requestID", id)])
            .await;
        let data = client
            .open(&[("streamType", "data"), ("port", "8080"), ("requestID", id)])
            .await;
        client.data(error, b"", true).await;
        client.data(data, b"abc", true).await;
        assert_eq!(
            answer(&mut client, data, error).await,
            (b"cba".to_vec(), Vec::new())
        );
    }
    let error = client
        .open(&[("streamType", "error"), ("port", "1"), ("requestID", "2")])
        .await;
    let data = client
        .open(&[("streamType", "data"), ("port", "1"), ("requestID", "2")])
        .await;
    let (body, failure) = answer(&mut client, data, error).await;
    assert_eq!(
        (body, failure),
        (Vec::new(), b"connection refused".to_vec())
    );
}

#[tokio::test]
async fn plain_spdy_carries_connections_and_failures() {
    let connect = connect_to(reverse_server().await);
    let (client, server) = duplex(64 << 10);
    let wire = Wire::Spdy {
        protocol: "portforward.k8s.io",
    };
    tokio::spawn(async move { serve_io(server, &wire, Vec::new(), connect).await });
    two_connections(client).await;
}

#[tokio::test]
async fn spdy_is_tunnelled_through_a_websocket() {
    let connect = connect_to(reverse_server().await);
    let (client, server) = duplex(64 << 10);
    let wire = Wire::WebSocket {
        protocol: TUNNEL,
        accept: String::new(),
    };
    tokio::spawn(async move { serve_io(server, &wire, Vec::new(), connect).await });
    let socket = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
    let mut tunnel = websocket::ByteStream::new(socket);
    let (near, mut far) = duplex(64 << 10);
    tokio::spawn(async move {
        tokio::io::copy_bidirectional(&mut tunnel, &mut far)
            .await
            .ok()
    });
    two_connections(near).await;
}

#[tokio::test]
async fn channels_announce_their_port() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = connect_to(listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut data = [0; 4];
        stream.read_exact(&mut data).await.unwrap();
        stream.write_all(&data).await.unwrap();
    });
    let (client, server) = duplex(64 << 10);
    let wire = Wire::WebSocket {
        protocol: "v4.channel.k8s.io",
        accept: String::new(),
    };
    tokio::spawn(async move { serve_io(server, &wire, vec![8080], connect).await });
    let mut client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
    let mut next = async || match client.next().await.unwrap().unwrap() {
        Message::Binary(data) => data.to_vec(),
        other => panic!("{other:?}"),
    };
    assert_eq!(next().await, [0, 0x90, 0x1f]);
    assert_eq!(next().await, [1, 0x90, 0x1f]);
    client
        .send(Message::Binary(Bytes::from_static(b"\0ping")))
        .await
        .unwrap();
    let Message::Binary(data) = client.next().await.unwrap().unwrap() else {
        panic!("no data")
    };
    assert_eq!(&data[..], b"\0ping");
}

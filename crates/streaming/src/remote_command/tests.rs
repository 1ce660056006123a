use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::{SinkExt, StreamExt};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::oneshot,
};
use tokio_tungstenite::tungstenite::protocol::Role;

use super::*;
use crate::spdy::{Frame, HeaderCodec, Headers};

/// Sets a flag when the session is dropped.
struct OnDrop(Arc<AtomicBool>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A process that copies stdin to stdout and exits with `code`.
fn echo(code: i32) -> (ProcessSession, Arc<AtomicBool>) {
    let (stdin, mut input) = mpsc::channel::<Bytes>(4);
    let (out, output) = mpsc::channel(4);
    let (resize, mut sizes) = mpsc::channel::<TtySize>(4);
    let (done, exit) = oneshot::channel();
    let dropped = Arc::new(AtomicBool::new(false));
    let flag = OnDrop(dropped.clone());
    tokio::spawn(async move {
        let _flag = flag;
        let work = async {
            loop {
                tokio::select! {
                    Some(size) = sizes.recv() => {
                        let text = format!("[{}x{}]", size.width, size.height);
                        out.send(Output::Stderr(text.into())).await.ok();
                    }
                    data = input.recv() => match data {
                        Some(data) => { out.send(Output::Stdout(data)).await.ok(); }
                        None => break,
                    }
                }
            }
        };
        tokio::select! {
            () = work => { done.send(Ok(code)).ok(); }
            () = out.closed() => {}
        }
    });
    (
        ProcessSession {
            stdin: Some(stdin),
            output,
            resize: Some(resize),
            exit,
        },
        dropped,
    )
}

fn all() -> ProcessRequest {
    ProcessRequest {
        command: vec!["cat".into()],
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    }
}

async fn websocket_client(
    protocol: &'static str,
    session: ProcessSession,
) -> WebSocketStream<DuplexStream> {
    let (client, server) = duplex(64 << 10);
    let wire = Wire::WebSocket {
        protocol,
        accept: String::new(),
    };
    tokio::spawn(async move { serve_io(server, &wire, &all(), session).await });
    WebSocketStream::from_raw_socket(client, Role::Client, None).await
}

fn message(channel: u8, data: &[u8]) -> Message {
    Message::Binary([&[channel], data].concat().into())
}

#[tokio::test]
async fn websocket_half_close_gives_all_output_then_the_exit_code() {
    let (session, _) = echo(3);
    let mut client = websocket_client("v5.channel.k8s.io", session).await;
    client
        .send(message(4, br#"{"Width":80,"Height":24}"#))
        .await
        .unwrap();
    // The resize is seen before stdin is: wait for its trace.
    let mut seen = Vec::new();
    while !seen.contains(&(2, b"[80x24]".to_vec())) {
        if let Message::Binary(data) = client.next().await.unwrap().unwrap() {
            seen.push((data[0], data[1..].to_vec()));
        }
    }
    client.send(message(0, b"hello")).await.unwrap();
    client.send(message(255, &[0])).await.unwrap();
    let mut stdout = Vec::new();
    let mut status = Value::Null;
    while let Some(Ok(message)) = client.next().await {
        let Message::Binary(data) = message else {
            break;
        };
        match data[0] {
            1 => stdout.extend_from_slice(&data[1..]),
            3 => status = serde_json::from_slice(&data[1..]).unwrap(),
            other => panic!("channel {other}"),
        }
    }
    assert_eq!(stdout, b"hello");
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0]["message"], "3");
}

#[tokio::test]
async fn a_client_that_goes_ends_the_session() {
    let (session, dropped) = echo(0);
    let client = websocket_client("v4.channel.k8s.io", session).await;
    drop(client);
    tokio::time::timeout(Duration::from_secs(5), async {
        while !dropped.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the session is dropped");
}

#[tokio::test]
async fn large_streams_arrive_whole_in_both_directions() {
    const CHUNK: usize = 32 << 10;
    const CHUNKS: usize = 1024;
    let (session, _) = echo(0);
    let (mut sink, mut source) = websocket_client("v5.channel.k8s.io", session).await.split();
    let send = async {
        let mut sum = Sha256::new();
        for number in 0..CHUNKS {
            let data = vec![u8::try_from(number % 251).unwrap(); CHUNK];
            sum.update(&data);
            sink.send(message(0, &data)).await.unwrap();
        }
        sink.send(message(255, &[0])).await.unwrap();
        sum.finalize()
    };
    let receive = async {
        let (mut sum, mut bytes) = (Sha256::new(), 0);
        while let Some(Ok(Message::Binary(data))) = source.next().await {
            match data[0] {
                1 => {
                    sum.update(&data[1..]);
                    bytes += data.len() - 1;
                }
                _ => break,
            }
        }
        assert_eq!(bytes, CHUNK * CHUNKS);
        sum.finalize()
    };
    let (sent, received) = tokio::join!(send, receive);
    assert_eq!(sent, received);
}

/// The client half of SPDY, as far as the tests need it.
pub(crate) struct SpdyClient {
    io: DuplexStream,
    codec: HeaderCodec,
    next: u32,
}

impl SpdyClient {
    pub(crate) fn new(io: DuplexStream) -> Self {
        Self {
            io,
            codec: HeaderCodec::new(),
            next: 1,
        }
    }

    pub(crate) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let headers: Headers = headers
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        let block = self.codec.encode(&headers);
        self.send(&Frame::SynStream {
            stream,
            fin: false,
            block,
        })
        .await;
        stream
    }

    pub(crate) async fn send(&mut self, frame: &Frame) {
        self.io.write_all(&frame.encode()).await.unwrap();
    }

    pub(crate) async fn data(&mut self, stream: u32, data: &'static [u8], fin: bool) {
        self.send(&Frame::Data {
            stream,
            fin,
            data: Bytes::from_static(data),
        })
        .await;
    }

    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 8];
        self.io.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; Frame::payload_length(head).unwrap()];
        self.io.read_exact(&mut payload).await.ok()?;
        Some(Frame::decode(head, payload.into()).unwrap())
    }
}

#[tokio::test]
async fn spdy_exec_with_half_close_and_exit_code() {
    let (client, server) = duplex(64 << 10);
    let (session, _) = echo(7);
    let wire = Wire::Spdy {
        protocol: "v4.channel.k8s.io",
    };
    tokio::spawn(async move { serve_io(server, &wire, &all(), session).await });
    let mut client = SpdyClient::new(client);
    let error = client.open(&[("streamType", "error")]).await;
    let stdin = client.open(&[("streamType", "stdin")]).await;
    let stdout = client.open(&[("streamType", "stdout")]).await;
    let stderr = client.open(&[("streamType", "stderr")]).await;
    client.send(&Frame::Ping(5)).await;
    client.data(stdin, b"through spdy", true).await;
    let (mut out, mut status, mut ended, mut ponged) = (Vec::new(), Vec::new(), Vec::new(), false);
    while let Some(frame) = client.next().await {
        match frame {
            Frame::Data { stream, data, fin } => {
                if stream == stdout {
                    out.extend_from_slice(&data);
                } else if stream == error {
                    status.extend_from_slice(&data);
                }
                if fin {
                    ended.push(stream);
                }
            }
            Frame::Ping(5) => ponged = true,
            Frame::GoAway { .. } => break,
            _ => {}
        }
    }
    assert_eq!(out, b"through spdy");
    let status: Value = serde_json::from_slice(&status).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "7");
    for stream in [stdout, stderr, error] {
        assert!(ended.contains(&stream), "{stream} is not closed: {ended:?}");
    }
    assert!(ponged);
}

//! Exec, attach and port-forward over the URLs that the calls return.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use hypernetes_cri::v1;
use hypernetes_runtime::Output;
use hypernetes_streaming::spdy::{Frame, HeaderCodec};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue},
};
use tonic::Code;

use crate::bed::{Bed, refused};

/// Host and path of a URL.
fn parts(url: &str) -> (String, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    (host.to_owned(), format!("/{path}"))
}

async fn websocket(url: &str, protocol: &'static str) -> WebSocketStream<TcpStream> {
    let (host, path) = parts(url);
    let mut request = format!("ws://{host}{path}").into_client_request().unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", HeaderValue::from_static(protocol));
    let stream = TcpStream::connect(&host).await.unwrap();
    let (socket, response) = client_async(request, stream).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], protocol);
    socket
}

/// Sends a request that asks for SPDY and returns the head of the answer.
async fn spdy_head(url: &str, protocol: &str) -> String {
    spdy(url, protocol).await.0
}

/// The same, with the connection behind it.
async fn spdy(url: &str, protocol: &str) -> (String, TcpStream) {
    let (host, path) = parts(url);
    let mut stream = TcpStream::connect(&host).await.unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: {protocol}\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).await.unwrap() == 0 {
            break;
        }
        head.push(byte[0]);
    }
    (String::from_utf8(head).unwrap(), stream)
}

/// The client half of SPDY, as far as the test needs it.
struct SpdyClient {
    io: TcpStream,
    codec: HeaderCodec,
    next: u32,
}

impl SpdyClient {
    async fn open(&mut self, kind: &str) -> u32 {
        let stream = self.next;
        self.next += 2;
        let headers = [("streamType".into(), kind.into())].into_iter().collect();
        let block = self.codec.encode(&headers);
        let frame = Frame::SynStream {
            stream,
            fin: false,
            block,
        };
        self.io.write_all(&frame.encode()).await.unwrap();
        stream
    }

    async fn data(&mut self, stream: u32, data: &'static [u8]) {
        let frame = Frame::Data {
            stream,
            fin: true,
            data: Bytes::from_static(data),
        };
        self.io.write_all(&frame.encode()).await.unwrap();
    }

    async fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 8];
        self.io.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; Frame::payload_length(head).unwrap()];
        self.io.read_exact(&mut payload).await.ok()?;
        Some(Frame::decode(head, payload.into()).unwrap())
    }
}

fn exec(id: &str) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: id.into(),
        cmd: vec!["cat".into()],
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    }
}

/// All of one channel until the status comes, and the status.
async fn drain(socket: &mut WebSocketStream<TcpStream>) -> (Vec<u8>, String) {
    let (mut stdout, mut status) = (Vec::new(), String::new());
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(data) => match data.split_first() {
                Some((1, rest)) => stdout.extend_from_slice(rest),
                Some((3, rest)) if !rest.is_empty() => {
                    status = String::from_utf8(rest.to_vec()).unwrap();
                }
                _ => {}
            },
            Message::Close(_) => break,
            _ => {}
        }
    }
    (stdout, status)
}

#[tokio::test]
async fn exec_runs_over_a_url_that_can_be_used_once() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    bed.runtime
        .on_exec(|_, _, stdin| (stdin.to_vec(), Vec::new(), 7));
    let url = bed.client.exec(exec(&id)).await.unwrap().into_inner().url;
    assert!(
        url.starts_with("http://127.0.0.1:") && url.contains("/exec/"),
        "{url}"
    );
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    let stdin = [b"\0hello ".as_slice(), b"\0world"];
    for message in stdin {
        socket
            .send(Message::Binary(Bytes::from_static(message)))
            .await
            .unwrap();
    }
    // The end of stdin, as v5 has it.
    socket
        .send(Message::Binary(Bytes::from_static(&[255, 0])))
        .await
        .unwrap();
    let (stdout, status) = drain(&mut socket).await;
    assert_eq!(stdout, b"hello world");
    assert!(
        status.contains("NonZeroExitCode") && status.contains("\"7\""),
        "{status}"
    );
    let head = spdy_head(&url, "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
}

/// As the kubelet does: it ends its own client's WebSocket and speaks SPDY to the runtime.
#[tokio::test]
async fn exec_runs_over_spdy_with_half_close_and_exit_code() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    bed.runtime
        .on_exec(|_, _, stdin| (stdin.to_vec(), b"warned".to_vec(), 7));
    let url = bed.client.exec(exec(&id)).await.unwrap().into_inner().url;
    let (head, io) = spdy(&url, "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    let mut client = SpdyClient {
        io,
        codec: HeaderCodec::new(),
        next: 1,
    };
    let error = client.open("error").await;
    let stdin = client.open("stdin").await;
    let stdout = client.open("stdout").await;
    let stderr = client.open("stderr").await;
    client.data(stdin, b"through spdy").await;
    let mut got: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut ended = Vec::new();
    while let Some(frame) = client.next().await {
        match frame {
            Frame::Data { stream, data, fin } => {
                got.entry(stream).or_default().extend_from_slice(&data);
                if fin {
                    ended.push(stream);
                }
            }
            Frame::GoAway { .. } => break,
            _ => {}
        }
    }
    assert_eq!(got[&stdout], b"through spdy");
    assert_eq!(got[&stderr], b"warned");
    let status = String::from_utf8(got.remove(&error).unwrap()).unwrap();
    assert!(
        status.contains("NonZeroExitCode") && status.contains("\"7\""),
        "{status}"
    );
    for stream in [error, stdout, stderr] {
        assert!(ended.contains(&stream), "{stream} is not closed: {ended:?}");
    }
}

#[tokio::test]
async fn spdy_is_spoken_and_nothing_else_is() {
    let mut bed = Bed::new().await;
    let (sandbox, id) = bed.running("a").await;
    let url = bed.client.exec(exec(&id)).await.unwrap().into_inner().url;
    let head = spdy_head(&url, "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(
        head.to_lowercase()
            .contains("x-stream-protocol-version: v4.channel.k8s.io")
    );
    let forward = v1::PortForwardRequest {
        pod_sandbox_id: sandbox,
        port: vec![80],
    };
    let url = bed
        .client
        .port_forward(forward.clone())
        .await
        .unwrap()
        .into_inner()
        .url;
    let head = spdy_head(&url, "portforward.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    let url = bed
        .client
        .port_forward(forward)
        .await
        .unwrap()
        .into_inner()
        .url;
    let head = spdy_head(&url, "v9.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    let (host, _) = parts(&url);
    let head = spdy_head(&format!("http://{host}/exec/guess"), "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
}

#[tokio::test]
async fn attach_shows_what_comes_and_port_forward_reaches_the_port() {
    let mut bed = Bed::new().await;
    let (sandbox, id) = bed.running("a").await;
    let request = v1::AttachRequest {
        container_id: id.clone(),
        stdin: false,
        tty: false,
        stdout: true,
        stderr: false,
    };
    let url = bed
        .client
        .attach(request.clone())
        .await
        .unwrap()
        .into_inner()
        .url;
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    // The first message says that the session stands.
    socket.next().await.unwrap().unwrap();
    let container = id.parse().unwrap();
    bed.runtime
        .output(&container, &Output::Stdout("live\n".into()))
        .unwrap();
    bed.runtime.exit(&container, 0);
    let (stdout, status) = drain(&mut socket).await;
    assert_eq!(stdout, b"live\n");
    assert!(status.contains("Success"), "{status}");
    refused(
        bed.client.attach(request).await,
        Code::FailedPrecondition,
        "not running",
    );

    let request = v1::PortForwardRequest {
        pod_sandbox_id: sandbox,
        port: vec![8080],
    };
    let url = bed
        .client
        .port_forward(request)
        .await
        .unwrap()
        .into_inner()
        .url;
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    socket
        .send(Message::Binary(Bytes::from_static(b"\0ping")))
        .await
        .unwrap();
    let echo = async {
        while let Some(Ok(message)) = socket.next().await {
            if matches!(&message, Message::Binary(data) if data.ends_with(b"ping")) {
                return true;
            }
        }
        false
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(30), echo)
            .await
            .unwrap()
    );
    assert!(
        bed.runtime
            .calls()
            .contains(&"port_forward 8080".to_owned())
    );
}

#[tokio::test]
async fn streams_that_cannot_be_are_refused_before_a_url_is_given() {
    let mut bed = Bed::new().await;
    let (sandbox, id) = bed.running("a").await;
    let with = |change: &dyn Fn(&mut v1::ExecRequest)| {
        let mut request = exec(&id);
        change(&mut request);
        request
    };
    for (request, code, word) in [
        (with(&|r| r.tty = true), Code::InvalidArgument, "stderr"),
        (with(&|r| r.cmd.clear()), Code::InvalidArgument, "cmd"),
        (
            with(&|r| (r.stdin, r.stdout, r.stderr) = (false, false, false)),
            Code::InvalidArgument,
            "stdout",
        ),
        (
            with(&|r| r.container_id = "none".into()),
            Code::NotFound,
            "none",
        ),
    ] {
        refused(bed.client.exec(request).await, code, word);
    }
    let attach = v1::AttachRequest {
        container_id: id,
        stdin: true,
        tty: true,
        stdout: true,
        stderr: false,
    };
    refused(
        bed.client.attach(attach).await,
        Code::InvalidArgument,
        "tty",
    );
    let forward = |port| v1::PortForwardRequest {
        pod_sandbox_id: sandbox.clone(),
        port: vec![port],
    };
    refused(
        bed.client.port_forward(forward(0)).await,
        Code::InvalidArgument,
        "port",
    );
    refused(
        bed.client.port_forward(forward(70_000)).await,
        Code::InvalidArgument,
        "port",
    );
}

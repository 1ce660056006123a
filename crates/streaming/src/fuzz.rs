//! Clients that do anything: whatever they send, and however they leave, the session ends with the
//! connection and its process is let go.
//!
//! `PROPTEST_CASES` sets how many sessions are tried.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    Duplex, Output, ProcessRequest, ProcessSession, Wire, port_forward, remote_command,
    spdy::{Frame, HeaderCodec, Headers},
};

/// Processes and connections that are held.
static HELD: AtomicUsize = AtomicUsize::new(0);
const PATIENCE: Duration = Duration::from_secs(5);

struct Held;

impl Held {
    fn new() -> Self {
        HELD.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One thing that a client does.
#[derive(Debug, Clone)]
enum Act {
    /// Opens a stream with a type, a port and a request's number; some are of a protocol's own.
    Open(usize, usize, u8, bool),
    /// Sends bytes to a stream that may not be there.
    Data(u32, Vec<u8>, bool),
    Reset(u32),
    Ping(u32),
    GoAway,
    /// A header block that does not decompress, or does not parse.
    Block(u32, Vec<u8>),
    /// Bytes that need not be a frame.
    Raw(Vec<u8>),
    /// A WebSocket message of these bytes, masked as a client's are.
    Message(u8, Vec<u8>),
}

const TYPES: [&str; 8] = [
    "error", "stdin", "stdout", "stderr", "resize", "data", "", "nonsense",
];
const PORTS: [&str; 6] = ["80", "1", "0", "65536", "-1", "http"];

fn act() -> impl Strategy<Value = Act> {
    let bytes = |most| prop::collection::vec(any::<u8>(), 0..most);
    prop_oneof![
        4 => (0..TYPES.len(), 0..PORTS.len(), 0..4_u8, any::<bool>()).prop_map(|(a, b, c, d)| Act::Open(a, b, c, d)),
        4 => (0..14_u32, bytes(3000), any::<bool>()).prop_map(|(stream, data, fin)| Act::Data(stream, data, fin)),
        1 => (0..14_u32).prop_map(Act::Reset),
        1 => any::<u32>().prop_map(Act::Ping),
        1 => Just(Act::GoAway),
        1 => (0..14_u32, bytes(200)).prop_map(|(stream, block)| Act::Block(stream, block)),
        1 => bytes(64).prop_map(Act::Raw),
        4 => (prop_oneof![0..6_u8, Just(255)], bytes(300)).prop_map(|(channel, data)| Act::Message(channel, data)),
    ]
}

/// The bytes of a script.
fn wire_bytes(script: &[Act]) -> Vec<Bytes> {
    let mut codec = HeaderCodec::new();
    let mut next = 1;
    let frame = |frame: Frame| frame.encode();
    script
        .iter()
        .map(|act| match act.clone() {
            Act::Open(kind, port, request, fin) => {
                let headers: Headers = [
                    ("streamtype", TYPES[kind].to_owned()),
                    ("port", PORTS[port].to_owned()),
                    ("requestid", request.to_string()),
                ]
                .map(|(name, value)| (name.to_owned(), value))
                .into();
                let stream = next;
                next += 2;
                frame(Frame::SynStream {
                    stream,
                    fin,
                    block: codec.encode(&headers),
                })
            }
            Act::Data(stream, data, fin) => frame(Frame::Data {
                stream,
                fin,
                data: data.into(),
            }),
            Act::Reset(stream) => frame(Frame::RstStream { stream, status: 5 }),
            Act::Ping(id) => frame(Frame::Ping(id)),
            Act::GoAway => frame(Frame::GoAway { last: 0, status: 0 }),
            Act::Block(stream, block) => frame(Frame::Headers {
                stream,
                block: block.into(),
            }),
            Act::Raw(bytes) => bytes.into(),
            Act::Message(channel, data) => {
                // RFC 6455, 5.2: one final binary frame, with a mask of zeros.
                let length = u16::try_from(data.len() + 1).unwrap().to_be_bytes();
                [
                    &[0x82, 0xfe, length[0], length[1], 0, 0, 0, 0, channel],
                    data.as_slice(),
                ]
                .concat()
                .into()
            }
        })
        .collect()
}

/// How the client behaves besides what it sends.
#[derive(Debug, Clone, Copy)]
struct Manners {
    /// It takes what the server sends.
    reads: bool,
    /// It closes its sending side and waits, instead of going at once.
    waits: bool,
}

async fn client(io: DuplexStream, pieces: Vec<Bytes>, manners: Manners) {
    let (mut read, mut write) = tokio::io::split(io);
    let take = async {
        let mut buffer = vec![0; 4096];
        while manners.reads && read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
        if !manners.reads {
            std::future::pending::<()>().await;
        }
    };
    let send = async {
        for piece in pieces {
            // One that does not read may find that nobody takes more of it.
            let sent = timeout(Duration::from_millis(200), write.write_all(&piece)).await;
            if !sent.is_ok_and(|result| result.is_ok()) {
                return;
            }
        }
        if manners.waits {
            // The server need not have anything to say to that.
            write.shutdown().await.ok();
        }
    };
    tokio::select! {
        () = send => {}
        () = take => {}
    }
}

fn echo() -> ProcessSession {
    let (stdin, mut input) = mpsc::channel::<Bytes>(4);
    let (out, output) = mpsc::channel(4);
    let (resize, mut sizes) = mpsc::channel(4);
    let (done, exit) = oneshot::channel();
    let held = Held::new();
    tokio::spawn(async move {
        let _held = held;
        let work = async {
            loop {
                tokio::select! {
                    Some(_size) = sizes.recv() => {}
                    data = input.recv() => match data {
                        Some(data) => { out.send(Output::Stdout(data)).await.ok(); }
                        None => break,
                    }
                }
            }
        };
        tokio::select! {
            () = work => { done.send(Ok(0)).ok(); }
            () = out.closed() => {}
        }
    });
    ProcessSession {
        stdin: Some(stdin),
        output,
        resize: Some(resize),
        exit,
    }
}

/// A port that sends back what it gets; port 1 is closed.
fn connect() -> port_forward::Connect {
    Arc::new(|port| {
        Box::pin(async move {
            if port == 1 {
                return Err(crate::StreamError::Internal(
                    "connection refused".to_owned(),
                ));
            }
            let (near, far) = duplex(1024);
            let held = Held::new();
            tokio::spawn(async move {
                let _held = held;
                let (mut read, mut write) = tokio::io::split(far);
                // Either side may go first.
                tokio::io::copy(&mut read, &mut write).await.ok();
            });
            Ok(Box::new(near) as Box<dyn Duplex>)
        })
    })
}

fn requests() -> [ProcessRequest; 3] {
    let all = ProcessRequest {
        command: vec!["cat".into()],
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let terminal = ProcessRequest {
        stderr: false,
        tty: true,
        ..all.clone()
    };
    let output = ProcessRequest {
        stdin: false,
        ..all.clone()
    };
    [all, terminal, output]
}

fn wires() -> [Wire; 4] {
    let websocket = |protocol| Wire::WebSocket {
        protocol,
        accept: String::new(),
    };
    [
        Wire::Spdy {
            protocol: "v4.channel.k8s.io",
        },
        websocket("v4.channel.k8s.io"),
        websocket("v5.channel.k8s.io"),
        Wire::Spdy {
            protocol: "portforward.k8s.io",
        },
    ]
}

/// Serves one client; `wire` 3 is a port-forward.
async fn session(script: Vec<Act>, wire: usize, request: usize, manners: Manners) {
    let (near, far) = duplex(8 << 10);
    let wires = wires();
    let served = {
        let wire = wires[wire].clone();
        async move {
            match &wire {
                Wire::Spdy { protocol } if protocol.starts_with("portforward") => {
                    port_forward::serve_io(far, &wire, vec![80, 1], connect()).await;
                }
                _process => {
                    remote_command::serve_io(far, &wire, &requests()[request], echo()).await;
                }
            }
        }
    };
    let served = tokio::spawn(served);
    client(near, wire_bytes(&script), manners).await;
    timeout(PATIENCE, served)
        .await
        .expect("the session ends with its client")
        .expect("no client makes the server panic");
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn every_session_ends_with_its_client(
        script in prop::collection::vec(act(), 0..24),
        wire in 0..4_usize,
        request in 0..3_usize,
        reads in any::<bool>(),
        waits in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            session(script, wire, request, Manners { reads, waits }).await;
            let released = async {
                while HELD.load(Ordering::SeqCst) > 0 {
                    tokio::task::yield_now().await;
                }
            };
            timeout(PATIENCE, released).await.expect("what the client had is let go");
        });
    }
}

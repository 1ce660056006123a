//! Clients of a container's first process, by its monitor's socket.
//!
//! Each packet from the monitor is a byte that tells the stream, and output; each to it is input.

use std::{io, os::fd::OwnedFd, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use hypernetes_runtime::{Output, RuntimeError, Session, TtySize};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    net::{
        AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
        connect, recv, send, shutdown, socket_with,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    monitor,
    process::waitable,
    records::storage,
    runtime::{Container, Inner},
};

/// Larger than any packet of the monitor's.
const PACKET: usize = 64 << 10;
/// Largest input that is sent at once: the monitor takes no more.
const INPUT: usize = 8 << 10;
/// Pieces that wait for a slow client.
const QUEUE: usize = 16;
/// How long a client may take nothing. The monitor waits for it, and the container for the monitor.
const PATIENCE: Duration = Duration::from_secs(30);
const STDOUT: u8 = 2;
const STDERR: u8 = 3;

fn open(bundle: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // By its directory: a socket's path is limited to 107 bytes.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, bundle, flags, Mode::empty())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{number}/attach"))?;
    connect(&socket, &address)?;
    waitable(socket, Interest::READABLE | Interest::WRITABLE)
}

/// Joins the first process of a running container.
pub(crate) fn start(
    inner: &Arc<Inner>,
    container: &Arc<Container>,
    stdin: bool,
) -> Result<Session, RuntimeError> {
    let record = container.record();
    let bundle = inner.bundle(&record.id);
    let socket = open(&bundle).map_err(|error| storage("attach to a container", error))?;
    let socket = Arc::new(socket);
    let (output, output_rx) = mpsc::channel(QUEUE);
    let (exit, exit_rx) = oneshot::channel();
    let input = (stdin && record.config.stdin).then(|| {
        let (input, input_rx) = mpsc::channel(QUEUE);
        tokio::spawn(write(Arc::clone(&socket), input_rx, output.downgrade()));
        input
    });
    tokio::spawn(read(socket, output));
    let ending = Arc::clone(container);
    tokio::spawn(async move {
        let mut exit = exit;
        tokio::select! {
            // A client that has just gone does not want it.
            code = ending.ended() => drop(exit.send(Ok(code))),
            () = exit.closed() => {}
        }
    });
    let resize = record.config.tty.then(|| {
        let (sizes, mut sizes_rx) = mpsc::channel::<TtySize>(QUEUE);
        tokio::spawn(async move {
            while let Some(size) = sizes_rx.recv().await {
                if let Err(error) = monitor::resize(&bundle, size) {
                    tracing::debug!(%error, "a terminal keeps its size");
                }
            }
        });
        sizes
    });
    Ok(Session {
        stdin: input,
        output: output_rx,
        resize,
        exit: exit_rx,
    })
}

async fn read(socket: Arc<AsyncFd<OwnedFd>>, output: mpsc::Sender<Output>) {
    let mut packet = vec![0; PACKET];
    loop {
        let got = tokio::select! {
            got = receive(&socket, &mut packet) => got,
            () = output.closed() => break,
        };
        let piece = match got {
            Ok(0) | Err(_) => break,
            Ok(1) => continue,
            Ok(got) => match packet[0] {
                STDOUT => Output::Stdout(Bytes::copy_from_slice(&packet[1..got])),
                STDERR => Output::Stderr(Bytes::copy_from_slice(&packet[1..got])),
                _ => continue,
            },
        };
        match timeout(PATIENCE, output.send(piece)).await {
            Ok(Ok(())) => {}
            Ok(Err(_gone)) => break,
            Err(_late) => {
                tracing::warn!("a client that takes no output was detached");
                break;
            }
        }
    }
    // To both sides: the monitor sees its client go.
    shutdown(socket.get_ref(), Shutdown::Both).ok();
}

async fn receive(socket: &AsyncFd<OwnedFd>, packet: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = socket.readable().await?;
        let got = ready.try_io(|fd| {
            let (_, got) = recv(fd.get_ref(), &mut *packet, RecvFlags::empty())?;
            Ok(got)
        });
        if let Ok(got) = got {
            return got;
        }
    }
}

async fn write(
    socket: Arc<AsyncFd<OwnedFd>>,
    mut input: mpsc::Receiver<Bytes>,
    output: mpsc::WeakSender<Output>,
) {
    while let Some(data) = input.recv().await {
        for piece in data.chunks(INPUT) {
            if transmit(&socket, piece).await.is_err() {
                return;
            }
        }
    }
    // The end of the client's input, while it still wants the output.
    if output.upgrade().is_some() {
        shutdown(socket.get_ref(), Shutdown::Write).ok();
    }
}

async fn transmit(socket: &AsyncFd<OwnedFd>, data: &[u8]) -> io::Result<()> {
    loop {
        let mut ready = socket.writable().await?;
        let sent = ready.try_io(|fd| Ok(send(fd.get_ref(), data, SendFlags::NOSIGNAL)?));
        if let Ok(sent) = sent {
            return sent.map(drop);
        }
    }
}

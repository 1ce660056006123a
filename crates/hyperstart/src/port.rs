//! The one port to the node, served for ever.
//!
//! A virtio-serial port knows whether somebody is connected on the host, but gives the guest no new
//! file for it: at the end of a session the port is closed and opened again.

use std::{
    convert::Infallible,
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hypernetes_agent_api::{
    PORT_NAME, server,
    sync::{SyncError, Unanswered, guest_sync_again},
};
use rustix::fs::OFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd},
    time::{Instant, sleep},
};

use crate::{
    console::log,
    error::{Attempt, GuestError, chain},
    pod::Pod,
    streams,
};

/// How long the port may take to appear: its driver may be a module.
const APPEAR: Duration = Duration::from_secs(10);
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Serves sessions, one after the other. Returns only if there is no port.
pub(crate) async fn serve_for_ever(pod: Pod) -> Result<Infallible, GuestError> {
    let path = find().await?;
    let mut pause = SHORTEST_PAUSE;
    let unanswered = Unanswered::default();
    loop {
        match session(&path, &pod, &unanswered).await {
            Ok(()) => pause = SHORTEST_PAUSE,
            // Nobody is connected: a look now and then costs nothing.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            // The node's bytes came before the word that it is there: answered in the next session.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => pause = SHORTEST_PAUSE,
            Err(error) => log!("cannot serve the port: {}", chain(&error)),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One session, from the preamble to the end of the stream.
async fn session(path: &Path, pod: &Pod, unanswered: &Unanswered) -> io::Result<()> {
    let stream = match guest_sync_again(Port::open(path)?, unanswered).await {
        Ok(stream) => stream,
        Err(SyncError::Closed) => {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Err(SyncError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Err(error),
        Err(error) => return Err(io::Error::other(error)),
    };
    if let Err(error) = server::serve(stream, pod.clone()).await {
        log!("the connection ended: {}", chain(&error));
    }
    Ok(())
}

async fn find() -> Result<PathBuf, GuestError> {
    let deadline = Instant::now() + APPEAR;
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        if Instant::now() > deadline {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            return Err(missing).attempt(format!("find the virtio-serial port {PORT_NAME}"));
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// The open port as a byte stream.
#[derive(Debug)]
struct Port(AsyncFd<OwnedFd>);

impl Port {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)?;
        Ok(Self(streams::register(file.into())?))
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let hung_up = ready.ready().is_read_closed();
            match ready
                .try_io(|file| Ok(rustix::io::read(file.get_ref(), buf.initialize_unfilled())?))
            {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // The host has gone, and perhaps come again: readiness of a stream that was closed
                // is never taken back, so waiting here would spin. The next session starts afresh.
                Err(_would_block) if hung_up => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            let hung_up = ready.ready().is_write_closed();
            match ready.try_io(|file| Ok(rustix::io::write(file.get_ref(), buf)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                // As for reading.
                Err(_would_block) if hung_up => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

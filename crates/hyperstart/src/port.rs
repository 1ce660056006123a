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
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
};
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
    let stream = match ticking(guest_sync_again(Port::open(path)?, unanswered)).await {
        Ok(stream) => stream,
        Err(SyncError::Closed) => {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Err(SyncError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            return Err(error);
        }
        Err(error) => return Err(io::Error::other(error)),
    };
    if let Err(error) = server::serve(stream, pod.clone()).await {
        log!("the connection ended: {}", chain(&error));
    }
    Ok(())
}

/// Waits for the node with a timer that runs.
///
/// An emulated port may be opened in a guest that is otherwise idle, while the node's bytes lie in
/// QEMU's socket already: QEMU then looks at them only when something else wakes its main loop, and
/// the guest's timers do.
async fn ticking<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut pause = SHORTEST_PAUSE;
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
        }
    }
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
///
/// The event loop never takes back that a stream was closed. A port that was opened just before
/// the node connected is such a stream and works: it is registered anew then, and only a port that
/// is without a node now has ended.
#[derive(Debug)]
struct Port(Option<AsyncFd<OwnedFd>>);

impl Port {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)?;
        Ok(Self(Some(streams::register(file.into())?)))
    }

    fn stream(&self) -> io::Result<&AsyncFd<OwnedFd>> {
        self.0
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Whether the port has a node, although it was seen without one: it can be waited for again.
    fn is_connected_again(&mut self) -> io::Result<bool> {
        let mut look = [PollFd::new(self.stream()?.get_ref(), PollFlags::empty())];
        let now = Timespec::default();
        poll(&mut look, Some(&now))?;
        if look[0].revents().contains(PollFlags::HUP) {
            return Ok(false);
        }
        if let Some(stream) = self.0.take() {
            self.0 = Some(streams::register(stream.into_inner())?);
        }
        Ok(true)
    }
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.stream()?.poll_read_ready(cx))?;
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
                Err(_would_block) if hung_up && !self.is_connected_again()? => {
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.stream()?.poll_write_ready(cx))?;
            let hung_up = ready.ready().is_write_closed();
            match ready.try_io(|file| Ok(rustix::io::write(file.get_ref(), buf)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) if hung_up && !self.is_connected_again()? => {
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

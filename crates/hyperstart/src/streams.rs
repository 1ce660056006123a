//! Pipes and terminals as the event loop sees them.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    buffer::spare_capacity,
    fs::{CWD, Mode, OFlags, fcntl_getfl, fcntl_setfl, openat},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::error::{Attempt, GuestError};

/// How long a stream may stay open without a byte after its process has ended: somebody else may
/// hold the other end, a container that got it through a shared volume's socket.
const AFTER_EXIT: Duration = Duration::from_secs(2);
/// Control-D: what ends the input of a terminal.
const END_OF_INPUT: u8 = 4;

/// The agent's ends of a process's standard streams.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) outputs: Vec<OwnedFd>,
}

/// Pipes for a process: the agent's ends, and the process's.
pub(crate) fn pipes(stdin: bool) -> Result<(Ends, Vec<OwnedFd>), GuestError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).attempt("make a pipe");
    let (stdin, theirs) = if stdin {
        let (theirs, ours) = pipe()?;
        (Some(ours), theirs)
    } else {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        (
            None,
            openat(CWD, "/dev/null", flags, Mode::empty()).attempt("open /dev/null")?,
        )
    };
    let ((stdout, their_stdout), (stderr, their_stderr)) = (pipe()?, pipe()?);
    Ok((
        Ends {
            stdin,
            outputs: vec![stdout, stderr],
        },
        vec![theirs, their_stdout, their_stderr],
    ))
}

/// A descriptor without blocking, registered with the event loop.
pub(crate) fn watch_fd(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, GuestError> {
    let flags = fcntl_getfl(&fd).attempt("inspect a stream")?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).attempt("set a stream up")?;
    register(fd).attempt("watch a stream")
}

/// Registers a descriptor that is already set up.
#[allow(
    deprecated,
    reason = "deprecated for types that may not own their descriptor; its replacement is unsafe"
)]
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// Reads what is there; empty at the end of the stream.
pub(crate) async fn read(fd: &AsyncFd<OwnedFd>, most: usize) -> io::Result<Vec<u8>> {
    loop {
        let mut ready = fd.readable().await?;
        // Taken when there is something to read, and not touched beyond that: most streams are silent.
        let mut bytes = Vec::with_capacity(most);
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), spare_capacity(&mut bytes))?)) {
            Ok(Ok(_)) => return Ok(bytes),
            // A terminal whose other side is closed.
            Ok(Err(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                return Ok(Vec::new());
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// Like [`read`], but gives a stream up that is silent after its process has ended.
pub(crate) async fn read_until_exit(
    fd: &AsyncFd<OwnedFd>,
    most: usize,
    mut ended: watch::Receiver<bool>,
) -> io::Result<Vec<u8>> {
    let given_up = async {
        // An error means that the process's record is gone: the same.
        drop(ended.wait_for(|ended| *ended).await);
        tokio::time::sleep(AFTER_EXIT).await;
    };
    tokio::select! {
        biased;
        bytes = read(fd, most) => bytes,
        () = given_up => Ok(Vec::new()),
    }
}

/// Standard input of a process. Writers share it; `close` ends it for all.
#[derive(Debug)]
pub(crate) struct Input {
    fd: Mutex<Option<std::sync::Arc<AsyncFd<OwnedFd>>>>,
    tty: bool,
}

impl Input {
    /// `tty`: the descriptor is a terminal's master, which cannot be closed in one direction.
    pub(crate) fn new(fd: Option<std::sync::Arc<AsyncFd<OwnedFd>>>, tty: bool) -> Self {
        Self {
            fd: Mutex::new(fd),
            tty,
        }
    }

    fn get(&self) -> Option<std::sync::Arc<AsyncFd<OwnedFd>>> {
        self.fd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Writes everything, as fast as the process reads. What nobody can read any more is dropped.
    pub(crate) async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(fd) = self.get() else { return Ok(()) };
        while !bytes.is_empty() {
            let mut ready = fd.writable().await?;
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Ok(count)) => bytes = &bytes[count..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    let gone = error.kind() == io::ErrorKind::BrokenPipe
                        || error.raw_os_error() == Some(Errno::IO.raw_os_error());
                    return if gone { Ok(()) } else { Err(error) };
                }
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Ends the input of a process that has ended.
    pub(crate) fn close_now(&self) {
        self.fd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Ends the input. Idempotent.
    pub(crate) async fn close(&self) {
        if self.tty && self.get().is_some() {
            // If it cannot be written, nobody reads.
            drop(self.write(&[END_OF_INPUT]).await);
        }
        self.fd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

/// Sets the size of a terminal.
pub(crate) fn resize(tty: impl AsFd, width: u32, height: u32) -> Result<(), GuestError> {
    let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size = Winsize {
        ws_col: clamp(width),
        ws_row: clamp(height),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(tty, size).attempt("resize the terminal")
}

/// Borrows many.
pub(crate) fn borrow(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

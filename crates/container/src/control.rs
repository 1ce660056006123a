//! The socket between agent and child: messages with a length in front, descriptors beside them.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::spec::Job;

/// Largest message: a job holds arguments and environment.
const MAX_MESSAGE: usize = 8 * 1024 * 1024;
/// Most descriptors beside one message.
const MAX_FDS: usize = 4;
/// What opens the gate.
const GATE: u8 = b'g';

/// What the child says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Everything is prepared; the program runs when the gate opens.
    Ready {
        /// User of the process.
        uid: u32,
        /// Primary group.
        gid: u32,
        /// All other groups.
        additional_gids: Vec<u32>,
    },
    /// It cannot be prepared. The child ends.
    Refused {
        /// Whether the request is at fault, and not the machine.
        invalid: bool,
        /// What failed, and why.
        message: String,
    },
    /// The gate has opened but the program cannot be executed. The child ends with the code.
    NotRun {
        /// 127: not found, 126: not executable.
        code: u8,
        /// Why.
        message: String,
    },
}

/// Failure of the conversation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The socket failed, or nothing came in time.
    #[error("cannot talk to the container's child process")]
    Io(#[source] io::Error),
    /// The child ended without an answer.
    #[error("the container's child process ended without an answer")]
    Ended,
    /// A message is no valid one of its kind.
    #[error("the container's child process does not speak the protocol")]
    Malformed(#[source] postcard::Error),
}

/// One end of the socket. All calls block: the agent uses it away from its event loop.
#[derive(Debug)]
pub struct Control(UnixStream);

impl Control {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Limits how long each read and write may take.
    pub fn set_deadline(&self, deadline: Duration) -> Result<(), ControlError> {
        self.0
            .set_read_timeout(Some(deadline))
            .map_err(ControlError::Io)?;
        self.0
            .set_write_timeout(Some(deadline))
            .map_err(ControlError::Io)
    }

    /// Sends the job with its descriptors: for an exec the pidfd first, then, without a terminal,
    /// standard input, output and error.
    pub fn send_job(&self, job: &Job, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        self.send(job, fds)
    }

    /// Waits for the answer to the job; with it comes the terminal's master side, if asked for.
    pub fn answer(&self) -> Result<(Reply, Option<OwnedFd>), ControlError> {
        match self.receive()? {
            Some((reply, mut fds)) => Ok((reply, fds.pop())),
            None => Err(ControlError::Ended),
        }
    }

    /// Opens the gate and waits until the program runs, `None`, or cannot, [`Reply::NotRun`].
    pub fn open_gate(&self) -> Result<Option<Reply>, ControlError> {
        self.unlock()?;
        self.outcome()
    }

    /// Has the program run as soon as it can: the gate is open before the child has come to it. Gives the answer to the
    /// job, as [`Self::answer`], and if it is [`Reply::Ready`] what came of it, as [`Self::open_gate`].
    pub fn run(&self) -> Result<(Reply, Option<OwnedFd>, Option<Reply>), ControlError> {
        let unlocked = self.unlock();
        // If the child has gone, this says why.
        let (answer, terminal) = self.answer()?;
        unlocked?;
        let outcome = match answer {
            Reply::Ready { .. } => self.outcome()?,
            Reply::Refused { .. } | Reply::NotRun { .. } => None,
        };
        Ok((answer, terminal, outcome))
    }

    fn unlock(&self) -> Result<(), ControlError> {
        (&self.0).write_all(&[GATE]).map_err(ControlError::Io)
    }

    fn outcome(&self) -> Result<Option<Reply>, ControlError> {
        Ok(self.receive()?.map(|(reply, _)| reply))
    }

    pub(crate) fn receive_job(&self) -> Result<(Job, Vec<OwnedFd>), ControlError> {
        self.receive()?.ok_or(ControlError::Ended)
    }

    pub(crate) fn send_reply(
        &self,
        reply: &Reply,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ControlError> {
        self.send(reply, fd.as_slice())
    }

    /// Waits at the gate. `false`: the agent has gone or does not want the program to run.
    pub(crate) fn wait_gate(&self) -> bool {
        let mut byte = [0];
        (&self.0).read_exact(&mut byte).is_ok() && byte == [GATE]
    }

    fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        let body = postcard::to_allocvec(message).map_err(ControlError::Malformed)?;
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ControlError::Io(io::Error::from(
                io::ErrorKind::InvalidInput,
            )));
        }
        let sent = rustix::net::sendmsg(
            &self.0,
            &[IoSlice::new(&length)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .map_err(|errno| ControlError::Io(errno.into()))?;
        (&self.0)
            .write_all(&length[sent..])
            .map_err(ControlError::Io)?;
        (&self.0).write_all(&body).map_err(ControlError::Io)
    }

    fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        let mut length = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let received = rustix::net::recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut length)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            match received {
                Ok(received) => break received.bytes,
                Err(rustix::io::Errno::INTR) => {}
                // The child was killed with unread input.
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(ControlError::Io(errno.into())),
            }
        };
        if received == 0 {
            return Ok(None);
        }
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        (&self.0)
            .read_exact(&mut length[received..])
            .map_err(ControlError::Io)?;
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(ControlError::Io(io::Error::from(
                io::ErrorKind::InvalidData,
            )));
        }
        let mut body = vec![0; length];
        (&self.0).read_exact(&mut body).map_err(ControlError::Io)?;
        let message = postcard::from_bytes(&body).map_err(ControlError::Malformed)?;
        Ok(Some((message, fds)))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_descriptors_and_answers_cross() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (Control::new(ours), Control::new(theirs));
        let child = std::thread::spawn(move || {
            let (job, fds) = theirs.receive_job().unwrap();
            assert!(matches!(job, Job::Pause));
            assert_eq!(fds.len(), 2);
            let ready = Reply::Ready {
                uid: 1,
                gid: 2,
                additional_gids: vec![3],
            };
            theirs.send_reply(&ready, Some(fds[0].as_fd())).unwrap();
            assert!(theirs.wait_gate());
        });
        let (reader, writer) = std::io::pipe().unwrap();
        ours.send_job(&Job::Pause, &[reader.as_fd(), writer.as_fd()])
            .unwrap();
        let (reply, fd) = ours.answer().unwrap();
        assert!(matches!(reply, Reply::Ready { uid: 1, gid: 2, .. }));
        assert!(fd.is_some());
        assert_eq!(ours.open_gate().unwrap(), None);
        child.join().unwrap();
    }

    #[test]
    fn a_gate_can_be_open_before_the_child_is_there() {
        let not_run = Reply::NotRun {
            code: 127,
            message: String::new(),
        };
        let refused = Reply::Refused {
            invalid: true,
            message: "no".into(),
        };
        let ready = Reply::Ready {
            uid: 0,
            gid: 0,
            additional_gids: Vec::new(),
        };
        let outcomes = [
            (ready.clone(), Some(not_run.clone()), Some(not_run)),
            (ready, None, None),
            (refused, None, None),
        ];
        for (answer, said, outcome) in outcomes {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (ours, theirs) = (Control::new(ours), Control::new(theirs));
            let (first, passes) = (answer.clone(), matches!(answer, Reply::Ready { .. }));
            let child = std::thread::spawn(move || {
                theirs.receive_job().unwrap();
                theirs.send_reply(&first, None).unwrap();
                assert!(!passes || theirs.wait_gate());
                if let Some(said) = said {
                    theirs.send_reply(&said, None).unwrap();
                }
            });
            ours.send_job(&Job::Pause, &[]).unwrap();
            let (got, terminal, came) = ours.run().unwrap();
            assert_eq!((got, terminal.is_none(), came), (answer, true, outcome));
            child.join().unwrap();
        }
    }

    #[test]
    fn a_silent_child_is_given_up() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let ours = Control::new(ours);
        ours.set_deadline(Duration::from_millis(20)).unwrap();
        assert!(matches!(ours.answer(), Err(ControlError::Io(_))));
    }
}

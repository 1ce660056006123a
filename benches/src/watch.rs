//! A watch whose events the kernel stamps when they arrive.
//!
//! Nothing has to run beside the server for that: a thousand watchers that all read at once would be measured with the
//! server, on the same cores. It is read without any HTTP library, and nothing of it is decoded but where events end.

use std::{
    io::{ErrorKind, IoSliceMut, Read, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt},
        time::TimeSpec,
    },
};
use rustls::ClientConnection;

use crate::client::Endpoint;

/// What is read at once, in bytes, and the most that a head may have.
const PART: usize = 16 * 1024;

/// A watch on a connection of its own.
pub(crate) struct Watch {
    socket: TcpStream,
    tls: ClientConnection,
    last: u8,
}

impl Watch {
    /// Opens it and waits for the head of the answer, and for what is there already.
    pub(crate) fn open(endpoint: &Endpoint, path: &str) -> Result<Self> {
        let mut socket = TcpStream::connect(endpoint.address())?;
        socket.set_nodelay(true)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        let (config, name) = endpoint.tls(b"http/1.1")?;
        let mut tls = ClientConnection::new(config, name)?;
        let mut stream = rustls::Stream::new(&mut tls, &mut socket);
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: hypernetes\r\naccept: application/json\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let (mut head, mut part) = (Vec::new(), [0; 1024]);
        let end = loop {
            if let Some(at) = head.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            ensure!(head.len() < PART, "a head without an end");
            let count = stream.read(&mut part)?;
            ensure!(count > 0, "no answer");
            head.extend_from_slice(&part[..count]);
        };
        let (head, rest) = head.split_at(end);
        ensure!(
            head.starts_with(b"HTTP/1.1 200 "),
            "watch: {}",
            String::from_utf8_lossy(head)
        );
        let mut last = b'\n';
        let mut events = count_events(rest, &mut last);
        while events == 0 {
            let count = stream.read(&mut part)?;
            ensure!(count > 0, "the watch has ended");
            events = count_events(&part[..count], &mut last);
        }
        ensure!(events == 1, "there is one object, not {events}");
        socket.set_nonblocking(true)?;
        Ok(Self { socket, tls, last })
    }

    /// When the next event was there as a whole, since the epoch by the wall clock. `None`: it is not yet.
    pub(crate) fn arrival(&mut self) -> Result<Option<Duration>> {
        let mut buffer = [0; PART];
        loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let mut control = nix::cmsg_space!(TimeSpec);
            let received = recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::empty(),
            );
            let (length, stamp) = match received {
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(error) => bail!("read a watch: {error}"),
                Ok(message) => {
                    let stamp = message.cmsgs()?.find_map(|control| match control {
                        ControlMessageOwned::ScmTimestampns(stamp) => Some(Duration::from(stamp)),
                        _ => None,
                    });
                    (message.bytes, stamp)
                }
            };
            ensure!(length > 0, "the watch has ended");
            let events = self.decrypt(&buffer[..length])?;
            ensure!(events <= 1, "a watcher heard {events} events at once");
            if events == 1 {
                return Ok(Some(stamp.context("the kernel has not stamped what came")?));
            }
        }
    }

    /// How many events end in these bytes.
    fn decrypt(&mut self, mut bytes: &[u8]) -> Result<usize> {
        let mut events = 0;
        while !bytes.is_empty() {
            self.tls.read_tls(&mut bytes)?;
            self.tls.process_new_packets()?;
            let mut part = [0; 1024];
            loop {
                match self.tls.reader().read(&mut part) {
                    Ok(0) => break,
                    Ok(count) => events += count_events(&part[..count], &mut self.last),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(events)
    }
}

/// Events end with a line feed of their own; those of HTTP's chunks follow a carriage return.
fn count_events(bytes: &[u8], last: &mut u8) -> usize {
    let mut count = 0;
    for byte in bytes {
        count += usize::from(*byte == b'\n' && *last != b'\r');
        *last = *byte;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_and_chunks_are_not() {
        let wire = b"5\r\n{\"a\"}\n\r\n1f\r\n{\"b\"}\n{\"c\"}\n\r\n";
        for cut in 0..wire.len() {
            let (first, second) = wire.split_at(cut);
            let mut last = b'\n';
            let count = count_events(first, &mut last) + count_events(second, &mut last);
            assert_eq!(count, 3, "cut at {cut}");
        }
    }
}

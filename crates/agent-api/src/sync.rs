//! One clean session out of a stream without connections.
//!
//! A virtio-serial port is one byte pipe for the life of the VM: after either side has restarted,
//! bytes of the former session may still lie in it, in both directions. So each session starts with
//! a preamble:
//!
//! ```text
//! node                                guest
//!  | -- SYNC nonce ------------------> |  discards everything up to a valid SYNC line
//!  |    (again every second)           |
//!  | <------------------ ECHO nonce -- |
//!  |  discards up to its own ECHO      |  skips further SYNC lines, answers those with a new nonce
//!  | <========== calls ==============> |
//! ```
//!
//! The echo tells what the guest speaks: [`Wire::Frames`], or HTTP/2 if it is of an earlier release.
//! The node stops sending SYNC once it has seen the echo, so SYNC lines can only precede the session's
//! first byte, which is never a line's. A SYNC line *inside* a session means that the node has restarted without the guest
//! noticing: [`Watched`] finds it, whatever frame it is swallowed by, and ends the session. A tenant
//! who sends such a line through its own pod's streams interrupts its own pod's connection, no more.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// Record separator: starts each line and occurs nowhere else in it.
const START: u8 = 0x1e;
const SYNC: &[u8; 9] = b"\x1eHNSYNC1 ";
const ECHO: &[u8; 9] = b"\x1eHNECHO2 ";
const ECHO_HTTP2: &[u8; 9] = b"\x1eHNECHO1 ";
/// Tag, 32 digits of nonce, a space, 8 digits of check, newline.
const LINE: usize = 9 + 32 + 1 + 8 + 1;
/// How often the node repeats its line until it is answered.
const REPEAT: Duration = Duration::from_secs(1);
/// Stale bytes that the node is ready to discard: more than a former session's windows can hold.
pub const MAX_STALE: usize = 4 * 1024 * 1024;

/// Failure of the preamble.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// The stream ended.
    #[error("the stream ended before the session began")]
    Closed,
    /// The stream failed.
    #[error("cannot exchange the session preamble")]
    Io(#[source] io::Error),
    /// The other side sent only garbage.
    #[error("more than {MAX_STALE} bytes without an answer to the session preamble")]
    Flooded,
}

/// What an agent speaks after the preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Frames of this crate.
    Frames,
    /// gRPC over HTTP/2, as agents did before there were frames.
    Http2,
}

/// Names one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce([u8; 16]);

impl Nonce {
    /// A random nonce.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// FNV-1a over the nonce: a line cut short or spliced from two must not pass for a valid one.
    fn check(self) -> u32 {
        self.0.iter().fold(0x811c_9dc5, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        })
    }

    fn line(self, tag: &[u8; 9]) -> [u8; LINE] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut line = [0; LINE];
        line[..9].copy_from_slice(tag);
        let check = self.check().to_be_bytes();
        for (at, byte) in self.0.iter().enumerate() {
            line[9 + 2 * at] = DIGITS[usize::from(byte >> 4)];
            line[10 + 2 * at] = DIGITS[usize::from(byte & 15)];
        }
        line[41] = b' ';
        for (at, byte) in check.iter().enumerate() {
            line[42 + 2 * at] = DIGITS[usize::from(byte >> 4)];
            line[43 + 2 * at] = DIGITS[usize::from(byte & 15)];
        }
        line[LINE - 1] = b'\n';
        line
    }
}

/// Finds lines of one kind in a stream of bytes, however the stream is cut into pieces.
#[derive(Debug)]
struct Finder {
    tag: &'static [u8; 9],
    line: [u8; LINE],
    have: usize,
}

impl Finder {
    fn new(tag: &'static [u8; 9]) -> Self {
        Self {
            tag,
            line: [0; LINE],
            have: 0,
        }
    }

    fn feed(&mut self, byte: u8) -> Option<Nonce> {
        if byte == START {
            self.line[0] = START;
            self.have = 1;
            return None;
        }
        if self.have == 0 || (self.have < self.tag.len() && byte != self.tag[self.have]) {
            self.have = 0;
            return None;
        }
        self.line[self.have] = byte;
        self.have += 1;
        if self.have < LINE {
            return None;
        }
        self.have = 0;
        let mut nonce = [0; 16];
        for (at, byte) in nonce.iter_mut().enumerate() {
            *byte = digit(self.line[9 + 2 * at])? << 4 | digit(self.line[10 + 2 * at])?;
        }
        let nonce = Nonce(nonce);
        (nonce.line(self.tag) == self.line).then_some(nonce)
    }

    /// Feeds a whole piece; the nonce and the number of bytes consumed up to the end of its line.
    fn feed_all(&mut self, bytes: &[u8]) -> Option<(Nonce, usize)> {
        // Most pieces of a session hold no start byte at all.
        if self.have == 0 && !bytes.contains(&START) {
            return None;
        }
        bytes
            .iter()
            .enumerate()
            .find_map(|(at, byte)| Some((self.feed(*byte)?, at + 1)))
    }
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

/// The node's half of the preamble. Returns the stream positioned behind the echo, and what is spoken on
/// it. Has no deadline of its own: wrap it in one.
pub async fn host_sync<S>(stream: S) -> Result<(Prefixed<S>, Wire), SyncError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let nonce = Nonce::random();
    let (mut reader, mut writer) = tokio::io::split(stream);
    // Reading and writing at once: a guest that is stuck writing a former session's bytes does not
    // read our line before we have read them.
    let ask = async {
        loop {
            writer.write_all(&nonce.line(SYNC)).await?;
            writer.flush().await?;
            tokio::time::sleep(REPEAT).await;
        }
    };
    let listen = async {
        let mut finders = [
            (Finder::new(ECHO), Wire::Frames),
            (Finder::new(ECHO_HTTP2), Wire::Http2),
        ];
        let mut piece = [0; 4096];
        let mut stale = 0;
        loop {
            let count = reader.read(&mut piece).await.map_err(SyncError::Io)?;
            if count == 0 {
                return Err(SyncError::Closed);
            }
            for (finder, wire) in &mut finders {
                let mut rest = &piece[..count];
                while let Some((found, end)) = finder.feed_all(rest) {
                    rest = &rest[end..];
                    if found == nonce {
                        return Ok((BytesMut::from(rest), *wire));
                    }
                }
            }
            stale += count;
            if stale > MAX_STALE {
                return Err(SyncError::Flooded);
            }
        }
    };
    let (prefix, wire) = tokio::select! {
        asked = ask => { let never: Result<(), io::Error> = asked; return Err(never.map_or_else(SyncError::Io, |()| SyncError::Closed)) }
        heard = listen => heard?,
    };
    let stream = reader.unsplit(writer);
    Ok((Prefixed { prefix, stream }, wire))
}

/// The node's line that the guest has read and not answered, if there is one: the stream broke in
/// between, or the line came inside a session. Kept over sessions, it spares the node to ask again.
#[derive(Debug, Clone, Default)]
pub struct Unanswered(Arc<Mutex<Option<Nonce>>>);

impl Unanswered {
    fn lock(&self) -> MutexGuard<'_, Option<Nonce>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's half of the preamble. Waits for as long as the node is silent.
pub async fn guest_sync<S>(stream: S) -> Result<Watched<S>, SyncError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    guest_sync_again(stream, &Unanswered::default()).await
}

/// [`guest_sync`] of a guest that may have read a line before.
pub async fn guest_sync_again<S>(
    mut stream: S,
    unanswered: &Unanswered,
) -> Result<Watched<S>, SyncError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut finder = Finder::new(SYNC);
    let mut piece = BytesMut::with_capacity(4096);
    let mut current = None;
    loop {
        let asked = *unanswered.lock();
        if let Some(nonce) = asked {
            stream
                .write_all(&nonce.line(ECHO))
                .await
                .map_err(SyncError::Io)?;
            stream.flush().await.map_err(SyncError::Io)?;
            unanswered.lock().take_if(|asked| *asked == nonce);
            current = Some(nonce);
        }
        while piece.has_remaining() {
            // Behind the first line only lines are expected; a byte that belongs to none is the
            // session's first.
            if current.is_some() && finder.have == 0 && piece[0] != START {
                return Ok(Watched {
                    stream: Prefixed {
                        prefix: piece,
                        stream,
                    },
                    finder: Finder::new(SYNC),
                    unanswered: unanswered.clone(),
                });
            }
            if let Some(nonce) = finder.feed(piece.get_u8())
                && current != Some(nonce)
            {
                *unanswered.lock() = Some(nonce);
                break;
            }
        }
        if piece.has_remaining() || unanswered.lock().is_some() {
            continue;
        }
        if stream.read_buf(&mut piece).await.map_err(SyncError::Io)? == 0 {
            return Err(SyncError::Closed);
        }
    }
}

/// A stream with bytes that were read too early put back in front.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: BytesMut,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..count]);
        self.prefix.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The guest's stream of one session: fails with `ConnectionReset` when the node starts another.
#[derive(Debug)]
pub struct Watched<S> {
    stream: Prefixed<S>,
    finder: Finder,
    unanswered: Unanswered,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if let Some((nonce, _)) = this.finder.feed_all(&buf.filled()[before..]) {
            *this.unanswered.lock() = Some(nonce);
            // A failed read has read nothing.
            buf.set_filled(before);
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the node started a new session",
            )));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

//! The byte stream to the agent, one at a time.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, Weak},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

/// A connection that its VM can end when the next one is opened.
#[derive(Debug)]
pub(crate) struct SocketChannel(Arc<UnixStream>);

/// The place of the current channel.
#[derive(Debug, Default)]
pub(crate) struct ChannelSlot(Mutex<Weak<UnixStream>>);

impl ChannelSlot {
    /// Ends the former channel, if somebody still holds it.
    pub(crate) fn end_former(&self) {
        let former = std::mem::take(&mut *self.0.lock().expect("no holder of this lock panics"));
        if let Some(stream) = former.upgrade() {
            // It may have ended by itself.
            rustix::net::shutdown(&*stream, rustix::net::Shutdown::Both).ok();
        }
    }

    /// Makes `stream` the channel.
    pub(crate) fn put(&self, stream: UnixStream) -> SocketChannel {
        let stream = Arc::new(stream);
        *self.0.lock().expect("no holder of this lock panics") = Arc::downgrade(&stream);
        SocketChannel(stream)
    }
}

impl AsyncRead for SocketChannel {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for SocketChannel {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Write)?;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_new_channel_ends_the_former() {
        let slot = ChannelSlot::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut first = slot.put(ours);
        first.write_all(b"hello").await.unwrap();
        let mut word = [0; 5];
        theirs.read_exact(&mut word).await.unwrap();
        theirs.write_all(b"world").await.unwrap();
        first.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"world");
        slot.end_former();
        assert_eq!(first.read(&mut word).await.unwrap(), 0);
        assert_eq!(theirs.read(&mut word).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_dropped_channel_closes_the_connection() {
        let slot = ChannelSlot::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        drop(slot.put(ours));
        assert_eq!(theirs.read(&mut [0; 1]).await.unwrap(), 0);
    }
}

//! Live output to whoever is attached.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_util::sync::CancellationToken;

use super::format::Stream;
use crate::api::Output;

/// Pieces that may wait for one client: 64 of at most 64 KiB each.
const QUEUE: usize = 64;
/// Clients of one container.
const MAX_CLIENTS: usize = 32;

/// One client's view.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// Output from now on; ends with the output, or when the client is cut off.
    pub(crate) output: mpsc::Receiver<Output>,
    /// Cancelled when the client is cut off.
    pub(crate) cut: CancellationToken,
}

#[derive(Debug)]
struct Client {
    output: mpsc::Sender<Output>,
    cut: CancellationToken,
}

/// The clients of one container's output. A client that does not read in time is cut off: it must
/// not hold up the log.
#[derive(Debug, Default)]
pub(crate) struct Fanout {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    clients: Vec<Client>,
    ended: bool,
}

impl Fanout {
    /// Adds a client. `None` when too many are attached.
    pub(crate) fn subscribe(&self) -> Option<Subscription> {
        let (sender, output) = mpsc::channel(QUEUE);
        let cut = CancellationToken::new();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clients.retain(|client| !client.output.is_closed());
        if inner.clients.len() >= MAX_CLIENTS {
            return None;
        }
        if !inner.ended {
            inner.clients.push(Client {
                output: sender,
                cut: cut.clone(),
            });
        }
        Some(Subscription { output, cut })
    }

    pub(crate) fn send(&self, stream: Stream, data: &Bytes) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clients.retain(|client| {
            let output = match stream {
                Stream::Stdout => Output::Stdout(data.clone()),
                Stream::Stderr => Output::Stderr(data.clone()),
            };
            match client.output.try_send(output) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    client.cut.cancel();
                    false
                }
                Err(TrySendError::Closed(_)) => false,
            }
        });
    }

    /// There will be no more output.
    pub(crate) fn end(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clients.clear();
        inner.ended = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_client_is_cut_off_and_the_others_are_not() {
        let fanout = Fanout::default();
        let (mut slow, mut quick) = (fanout.subscribe().unwrap(), fanout.subscribe().unwrap());
        let data = Bytes::from_static(b"x");
        for _ in 0..2 * QUEUE {
            fanout.send(Stream::Stdout, &data);
            assert!(quick.output.recv().await.is_some());
        }
        let mut got = 0;
        while slow.output.recv().await.is_some() {
            got += 1;
        }
        assert_eq!(got, QUEUE);
        fanout.end();
        assert!(quick.output.recv().await.is_none());
        assert!(slow.cut.is_cancelled() && !quick.cut.is_cancelled());
        assert!(fanout.subscribe().unwrap().output.recv().await.is_none());
    }
}

//! Live output to whoever is attached.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_util::sync::CancellationToken;

use super::format::Stream;
use crate::api::Output;

/// Pieces that may wait for one client: 64 of at most 64 KiB each.
const QUEUE: usize = 64;
/// Clients of one container.
const MAX_CLIENTS: usize = 32;
/// What a terminal says before anybody looks at it, in bytes. The newest counts: it is what a
/// screen would show.
const MAX_EARLY: usize = 64 * 1024;

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
    /// Output that waits for the first client.
    early: Option<VecDeque<u8>>,
}

impl Fanout {
    /// For a terminal: what it says before the first client comes is that client's too. Whoever
    /// starts a program and then attaches would otherwise miss its first prompt.
    pub(crate) fn with_early_output() -> Self {
        Self {
            inner: Mutex::new(Inner {
                early: Some(VecDeque::new()),
                ..Inner::default()
            }),
        }
    }

    /// Adds a client. `None` when too many are attached. `early`: it also gets what nobody has got.
    pub(crate) fn subscribe(&self, early: bool) -> Option<Subscription> {
        let (sender, output) = mpsc::channel(QUEUE);
        let cut = CancellationToken::new();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.clients.retain(|client| !client.output.is_closed());
        if inner.clients.len() >= MAX_CLIENTS {
            return None;
        }
        let unseen = inner.early.take().filter(|unseen| !unseen.is_empty());
        if let (true, Some(unseen)) = (early, unseen) {
            // The queue is new and has room.
            drop(sender.try_send(Output::Stdout(Vec::from(unseen).into())));
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
        if let Some(early) = &mut inner.early {
            early.extend(data);
            let excess = early.len().saturating_sub(MAX_EARLY);
            early.drain(..excess);
        }
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
        let (mut slow, mut quick) = (
            fanout.subscribe(true).unwrap(),
            fanout.subscribe(true).unwrap(),
        );
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
        assert!(
            fanout
                .subscribe(true)
                .unwrap()
                .output
                .recv()
                .await
                .is_none()
        );
    }

    #[tokio::test]
    async fn the_first_client_of_a_terminal_gets_what_it_said_before() {
        let fanout = Fanout::with_early_output();
        fanout.send(Stream::Stdout, &Bytes::from(vec![b'.'; MAX_EARLY]));
        fanout.send(Stream::Stdout, &Bytes::from_static(b"$ "));
        let (mut first, mut second) = (
            fanout.subscribe(true).unwrap(),
            fanout.subscribe(true).unwrap(),
        );
        fanout.send(Stream::Stdout, &Bytes::from_static(b"ls"));
        fanout.end();
        let Some(Output::Stdout(early)) = first.output.recv().await else {
            panic!("no early output");
        };
        assert_eq!(early.len(), MAX_EARLY);
        assert!(early.ends_with(b".$ "));
        let live = Output::Stdout(Bytes::from_static(b"ls"));
        assert_eq!(first.output.recv().await, Some(live.clone()));
        assert_eq!(second.output.recv().await, Some(live));
    }

    #[tokio::test]
    async fn early_output_outlives_the_program() {
        let fanout = Fanout::with_early_output();
        fanout.send(Stream::Stdout, &Bytes::from_static(b"bye"));
        fanout.end();
        let mut late = fanout.subscribe(true).unwrap();
        let said = Output::Stdout(Bytes::from_static(b"bye"));
        assert_eq!(late.output.recv().await, Some(said));
        assert_eq!(late.output.recv().await, None);
    }
}

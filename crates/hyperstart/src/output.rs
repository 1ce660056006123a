//! Output of one container: two rings between the pumps that read its streams and the one reader
//! that carries them to the node.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hypernetes_agent_api::{
    MAX_CHUNK_SIZE,
    server::{Replies, Requests},
    status::Status,
    v1,
};
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::{console::log, ring::Ring, streams::read_until_exit};

/// Bounds of a ring's size.
const CAPACITY: std::ops::RangeInclusive<u64> = 4096..=16 * 1024 * 1024;

#[derive(Debug)]
struct State {
    rings: [Ring; 2],
    /// Counts readers: an older one gives way.
    reader: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Output {
    state: Mutex<State>,
    /// Marked at each change of the state.
    changed: watch::Sender<()>,
}

impl Output {
    /// `streams`: how many there are; with a terminal there is only the first.
    pub(crate) fn new(capacity: u64, streams: usize) -> Arc<Self> {
        let capacity = match capacity {
            0 => hypernetes_agent_api::defaults::OUTPUT_BUFFER,
            other => other.clamp(*CAPACITY.start(), *CAPACITY.end()),
        };
        let capacity = usize::try_from(capacity).unwrap_or(usize::MAX);
        let mut rings = [Ring::new(capacity), Ring::new(capacity)];
        rings.iter_mut().skip(streams).for_each(Ring::finish);
        Arc::new(Self {
            state: Mutex::new(State { rings, reader: 0 }),
            changed: watch::channel(()).0,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a stream's bytes into its ring, and rests while the ring is full.
    pub(crate) async fn pump(
        self: Arc<Self>,
        index: usize,
        fd: Arc<AsyncFd<OwnedFd>>,
        ended: watch::Receiver<bool>,
    ) {
        let mut changed = self.changed.subscribe();
        loop {
            let room = self.lock().rings[index].room();
            if room == 0 {
                if changed.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let bytes = match read_until_exit(&fd, room.min(MAX_CHUNK_SIZE), ended.clone()).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    log!("cannot read a container's output: {error}");
                    Vec::new()
                }
            };
            let end = bytes.is_empty();
            {
                let ring = &mut self.lock().rings[index];
                if end {
                    ring.finish();
                } else {
                    ring.push(&bytes);
                }
            }
            self.changed.send_replace(());
            if end {
                return;
            }
        }
    }

    fn acknowledge(&self, ack: &v1::OutputAck) {
        {
            let mut state = self.lock();
            state.rings[0].acknowledge(ack.stdout);
            state.rings[1].acknowledge(ack.stderr);
        }
        self.changed.send_replace(());
    }

    /// The next chunk of either stream behind the given offsets, or whether all has been sent.
    fn next(&self, at: &mut [u64; 2], done: &mut [bool; 2]) -> Option<v1::OutputChunk> {
        let state = self.lock();
        // The stream that is behind first: a flood on one does not hide the other.
        let order = if at[0] <= at[1] { [0, 1] } else { [1, 0] };
        for index in order {
            let ring = &state.rings[index];
            if done[index] {
                continue;
            }
            let (offset, data) = ring.read(at[index], MAX_CHUNK_SIZE);
            let next = offset + data.len() as u64;
            let eof = ring.eof() && next == ring.end();
            if !data.is_empty() || eof {
                at[index] = next;
                done[index] = eof;
                let stream = if index == 0 {
                    v1::Stream::Stdout
                } else {
                    v1::Stream::Stderr
                };
                return Some(v1::OutputChunk {
                    stream: stream.into(),
                    offset,
                    data,
                    eof,
                });
            }
        }
        None
    }

    /// Carries output to the node until both streams have ended or another reader comes.
    pub(crate) async fn serve(
        self: Arc<Self>,
        first: v1::OutputAck,
        mut acks: Requests<v1::OutputAck>,
        replies: Replies<v1::OutputChunk>,
    ) -> Result<(), Status> {
        let reader = {
            let mut state = self.lock();
            state.reader += 1;
            state.reader
        };
        self.acknowledge(&first);
        let mut changed = self.changed.subscribe();
        let (mut at, mut done) = ([first.stdout, first.stderr], [false; 2]);
        // Acknowledgements must be taken while a chunk waits for the node to read it.
        let listen = async {
            while let Ok(Some(ack)) = acks.message().await {
                self.acknowledge(&ack);
            }
            std::future::pending().await
        };
        let send = async {
            while done != [true; 2] {
                if self.lock().reader != reader {
                    return Err(Status::aborted("another reader came"));
                }
                if let Some(chunk) = self.next(&mut at, &mut done) {
                    replies.send(&chunk).await?;
                } else if changed.changed().await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        tokio::select! {
            sent = send => sent,
            never = listen => never,
        }
    }
}

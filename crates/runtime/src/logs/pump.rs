//! Moves one container's output from the guest to its log.
//!
//! One task per container. It asks the guest for output from the first byte that is not in the
//! file, writes whole lines, acknowledges what is written, and hands every byte to the attached
//! clients once. When the log cannot be written it stops reading: the guest's buffer fills, and the
//! container waits. When the connection breaks it waits for the next one and goes on.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use hypernetes_agent_api::{AgentClient, MAX_CHUNK_SIZE, v1};
use hypernetes_types::ContainerId;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::WatchStream;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::{
    fanout::Fanout,
    file::LogFile,
    format::{LineCutter, Stream, now_nanos},
};
use crate::{backoff::Backoff, link::LinkState};

/// A line can cost 45 bytes more in the log than in the stream, so the buffer for lines is bounded
/// by taking a chunk in pieces.
const PIECE: usize = 16 * 1024;

/// What a pump works on.
#[derive(Debug)]
pub(crate) struct PumpSpec {
    pub(crate) container: ContainerId,
    pub(crate) log_root: PathBuf,
    pub(crate) log_path: PathBuf,
    pub(crate) checkpoint: PathBuf,
    /// The open log, or none if it could not be opened: the pump goes on trying.
    pub(crate) log: Option<LogFile>,
    pub(crate) link: watch::Receiver<LinkState>,
    pub(crate) deadline: Duration,
    pub(crate) tty: bool,
}

/// Tells a pump that its log was taken away.
#[derive(Debug, Clone)]
pub(crate) struct Reopener(mpsc::Sender<Reopened>);

type Reopened = oneshot::Sender<std::io::Result<()>>;

impl Reopener {
    /// Makes the pump go on in a new file. Without a deadline of its own: the pump may be waiting
    /// for its disk.
    pub(crate) async fn reopen(&self) -> std::io::Result<()> {
        let ended = || std::io::Error::other("the container has ended");
        let (reply, answer) = oneshot::channel();
        self.0.send(reply).await.map_err(|_ended| ended())?;
        answer.await.map_err(|_ended| ended())?
    }
}

/// A running pump; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Pump {
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) reopener: Reopener,
    drained: watch::Receiver<bool>,
    _task: AbortOnDropHandle<()>,
}

impl Pump {
    pub(crate) fn spawn(mut spec: PumpSpec) -> Self {
        let seen = spec.log.as_ref().map_or([0; 2], LogFile::offsets);
        // An adopted terminal has had its first client, as far as anybody knows.
        let fanout = Arc::new(match spec.tty && seen == [0; 2] {
            true => Fanout::with_early_output(),
            false => Fanout::default(),
        });
        let (done, drained) = watch::channel(false);
        let (reopener, reopens) = mpsc::channel(1);
        let span = tracing::info_span!(parent: None, "log", container = %spec.container);
        let log = spec.log.take();
        let worker = Worker {
            spec,
            fanout: Arc::clone(&fanout),
            cutter: LineCutter::default(),
            seen,
            log,
            ended: [false; 2],
            reopens,
        };
        let clients = Arc::clone(&fanout);
        let task = async move {
            worker.run().await;
            clients.end();
            done.send_replace(true);
        };
        let task = AbortOnDropHandle::new(tokio::spawn(task.instrument(span)));
        Self {
            fanout,
            reopener: Reopener(reopener),
            drained,
            _task: task,
        }
    }

    /// Becomes true when no more will be written: both streams have ended and stand in the log, or
    /// the VM is gone.
    pub(crate) fn drained(&self) -> watch::Receiver<bool> {
        self.drained.clone()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.fanout.end();
    }
}

enum Outcome {
    /// Both streams have ended.
    Drained,
    /// Another connection may go on.
    Broken(String),
}

struct Worker {
    spec: PumpSpec,
    fanout: Arc<Fanout>,
    cutter: LineCutter,
    /// `None` while a blocking thread has it, or before it is open.
    log: Option<LogFile>,
    /// Per stream, up to where clients have been served. Ahead of the log by the unfinished line.
    seen: [u64; 2],
    ended: [bool; 2],
    reopens: mpsc::Receiver<Reopened>,
}

impl Worker {
    async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let connected = async {
                let connected = self.spec.link.wait_for(|link| link.client.is_some()).await;
                connected.ok().and_then(|link| link.client.clone())
            };
            let client = tokio::select! {
                client = connected => client,
                Some(reply) = self.reopens.recv() => {
                    self.reopen(reply).await;
                    continue;
                }
            };
            let Some(client) = client else {
                return;
            };
            let before = self.offsets();
            let outcome = self.session(&client).await;
            // Forgets the unfinished lines: the guest sends them again.
            self.cutter.reset();
            match outcome {
                Outcome::Drained => return,
                Outcome::Broken(reason) => {
                    tracing::debug!(reason, "output was interrupted");
                    if self.offsets() != before {
                        backoff.reset();
                    }
                    // A new connection is worth a try at once; the same one is not.
                    tokio::select! {
                        () = backoff.wait() => {}
                        Some(reply) = self.reopens.recv() => self.reopen(reply).await,
                        changed = self.spec.link.changed() => if changed.is_err() { return },
                    }
                }
            }
        }
    }

    fn offsets(&self) -> [u64; 2] {
        self.log.as_ref().map_or([0; 2], LogFile::offsets)
    }

    async fn session(&mut self, client: &AgentClient) -> Outcome {
        if let Err(error) = self.open().await {
            return Outcome::Broken(format!("cannot open the log: {error}"));
        }
        let mut expected = self.offsets();
        let mut first_chunk = [true; 2];
        let ack = |id: String, [stdout, stderr]: [u64; 2]| v1::OutputAck { id, stdout, stderr };
        let (acks, ack_stream) = watch::channel(ack(self.spec.container.to_string(), expected));
        let mut client = client.client();
        let call = client.output(WatchStream::new(ack_stream));
        let mut chunks = match timeout(self.spec.deadline, call).await {
            Err(_late) => return Outcome::Broken("the guest does not answer".into()),
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => return Outcome::Drained,
            Ok(Err(status)) => return Outcome::Broken(crate::guest::clean(status.message())),
            Ok(Ok(response)) => response.into_inner(),
        };
        loop {
            let message = tokio::select! {
                message = chunks.message() => message,
                Some(reply) = self.reopens.recv() => {
                    self.reopen(reply).await;
                    continue;
                }
            };
            let chunk = match message {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Outcome::Broken("the guest ended the output".into()),
                Err(status) => return Outcome::Broken(crate::guest::clean(status.message())),
            };
            let stream = match chunk.stream {
                0 => Stream::Stdout,
                1 => Stream::Stderr,
                _ => return Outcome::Broken("the guest names an unknown stream".into()),
            };
            let index = stream.index();
            let first = std::mem::take(&mut first_chunk[index]);
            if first && chunk.offset > expected[index] {
                // The guest frees what was acknowledged only, but not every node may know it still.
                self.skip(stream, expected[index], chunk.offset).await;
                expected[index] = chunk.offset;
            }
            if chunk.offset != expected[index] || (self.ended[index] && !chunk.data.is_empty()) {
                return Outcome::Broken("the guest sends output out of order".into());
            }
            if chunk.data.len() > MAX_CHUNK_SIZE {
                return Outcome::Broken("the guest sends oversized chunks".into());
            }
            let data = Bytes::from(chunk.data);
            let Some(end) = expected[index].checked_add(data.len() as u64) else {
                return Outcome::Broken("the guest's output offset overflows".into());
            };
            // What clients have seen before the connection broke is not shown again.
            let known = self.seen[index]
                .saturating_sub(expected[index])
                .min(data.len() as u64);
            let fresh =
                usize::try_from(known).map_or_else(|_| Bytes::new(), |known| data.slice(known..));
            if !fresh.is_empty() {
                self.fanout.send(stream, &fresh);
            }
            expected[index] = end;
            self.seen[index] = self.seen[index].max(end);
            self.write(stream, &data, chunk.eof).await;
            acks.send_replace(ack(String::new(), self.offsets()));
            self.ended[index] |= chunk.eof;
            if self.ended == [true; 2] {
                // Gives the last acknowledgement a moment to leave; nothing depends on it.
                drop(timeout(Duration::from_millis(100), chunks.message()).await);
                return Outcome::Drained;
            }
        }
    }

    /// Goes on at the oldest byte that the guest has.
    async fn skip(&mut self, stream: Stream, from: u64, to: u64) {
        tracing::warn!(
            missing_bytes = to - from,
            ?stream,
            "output of a container is in no log that is known and not in its guest any more"
        );
        let Some(mut log) = self.log.take() else {
            return;
        };
        let skip = move || {
            log.skip_to(stream, to);
            log
        };
        // The closure cannot panic, and it is not cancelled while the runtime lives.
        self.log = tokio::task::spawn_blocking(skip).await.ok();
    }

    async fn open(&mut self) -> std::io::Result<()> {
        if self.log.is_some() {
            return Ok(());
        }
        let (root, path) = (self.spec.log_root.clone(), self.spec.log_path.clone());
        let checkpoint = self.spec.checkpoint.clone();
        let open = move || LogFile::open(&root, &path, checkpoint);
        let log = tokio::task::spawn_blocking(open)
            .await
            .map_err(std::io::Error::other)??;
        let offsets = log.offsets();
        for (seen, offset) in self.seen.iter_mut().zip(offsets) {
            *seen = (*seen).max(offset);
        }
        self.log = Some(log);
        Ok(())
    }

    /// Goes on in a new file. The streams' offsets go on too.
    async fn reopen(&mut self, reply: Reopened) {
        let result = match self.log.take() {
            None => self.open().await,
            Some(mut log) => {
                let (root, path) = (self.spec.log_root.clone(), self.spec.log_path.clone());
                let reopen = move || {
                    let result = log.reopen(&root, &path);
                    (log, result)
                };
                // The closure cannot panic, and it is not cancelled while the runtime lives.
                match tokio::task::spawn_blocking(reopen).await {
                    Ok((log, result)) => {
                        self.log = Some(log);
                        result
                    }
                    Err(error) => Err(std::io::Error::other(error)),
                }
            }
        };
        // Whoever asked may have gone.
        drop(reply.send(result));
    }

    async fn write(&mut self, stream: Stream, data: &Bytes, eof: bool) {
        let mut lines = Vec::new();
        for piece in data.chunks(PIECE) {
            let taken = self.cutter.feed(stream, piece, now_nanos(), &mut lines);
            lines = self.append(lines, stream, taken).await;
        }
        if eof {
            let taken = self.cutter.finish(stream, now_nanos(), &mut lines);
            self.append(lines, stream, taken).await;
        }
    }

    /// Writes until it succeeds. Returns the emptied buffer.
    async fn append(&mut self, mut lines: Vec<u8>, stream: Stream, taken: u64) -> Vec<u8> {
        if lines.is_empty() {
            return lines;
        }
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut told = false;
        while let Some(mut log) = self.log.take() {
            let write = move || {
                let result = log.append(&lines, stream, taken);
                (log, lines, result)
            };
            // The closure cannot panic, and it is not cancelled while the runtime lives.
            let Ok((log, buffer, result)) = tokio::task::spawn_blocking(write).await else {
                return Vec::new();
            };
            self.log = Some(log);
            lines = buffer;
            match result {
                Ok(()) => {
                    if told {
                        tracing::info!("the container log can be written again");
                    }
                    break;
                }
                Err(error) => {
                    if !told {
                        tracing::warn!(%error, "cannot write a container log, the container waits");
                        told = true;
                    }
                    // A log that is too large for its disk may be taken away just now.
                    tokio::select! {
                        () = sleep(backoff.next()) => {}
                        Some(reply) = self.reopens.recv() => self.reopen(reply).await,
                    }
                }
            }
        }
        lines.clear();
        lines
    }
}

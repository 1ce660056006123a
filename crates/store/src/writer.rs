//! The one thread that writes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock, atomic::AtomicBool, mpsc},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot, watch},
    time::Instant,
};

use crate::{
    Change, Compare, Durability, Entry, Op, Revision, StoreError, Value,
    disk::{Dirty, Disk, Image, RESERVE},
    history::Undo,
    hub::Hub,
    memory::Memory,
    versions::{Compressor, Held},
};

/// Most transactions in one commit.
const BATCH: usize = 1024;
/// How long a relaxed write may wait for the disk.
const RELAXED: Duration = Duration::from_millis(500);

/// What readers, watchers and the writer share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: RwLock<Memory>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) closed: Arc<AtomicBool>,
    pub(crate) published: watch::Sender<Revision>,
}

impl Shared {
    pub(crate) fn read(&self) -> std::sync::RwLockReadGuard<'_, Memory> {
        // Memory is changed only by infallible steps: a poisoned lock still guards a whole state.
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transaction that waits for the writer.
#[derive(Debug)]
pub(crate) enum Request {
    Txn {
        compares: Vec<Compare>,
        ops: Vec<Op>,
        durability: Durability,
        reply: oneshot::Sender<Result<Revision, StoreError>>,
        /// Gives the place in the queue back when the transaction is done.
        _permit: OwnedSemaphorePermit,
    },
    Flush(oneshot::Sender<Result<(), StoreError>>),
}

/// The writer's state.
#[derive(Debug)]
pub(crate) struct Writer {
    shared: Arc<Shared>,
    disk: Option<Disk>,
    /// Revision that the file promises not to give out again.
    ceiling: Revision,
    /// Relaxed writes that are visible and not yet in the file.
    unsaved: Dirty,
    unsaved_past: Vec<Undo>,
    unsaved_since: Option<Instant>,
    compressor: Compressor,
}

/// Effects of a batch before they are committed.
#[derive(Debug, Default)]
struct Batch {
    images: HashMap<String, Image>,
    changes: Vec<Arc<Change>>,
    /// What each change replaces, compressed.
    superseded: Vec<Option<Held>>,
    past: Vec<Undo>,
    revision: Revision,
}

type Reply = (
    oneshot::Sender<Result<Revision, StoreError>>,
    Result<Revision, StoreError>,
);

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, disk: Option<Disk>) -> Self {
        // After a crash relaxed writes may have used revisions up to the ceiling in the file;
        // memory starts there, and the first write raises the ceiling.
        let ceiling = shared.read().revision();
        Self {
            shared,
            disk,
            ceiling,
            unsaved: BTreeMap::new(),
            unsaved_past: Vec::new(),
            unsaved_since: None,
            compressor: Compressor::new(),
        }
    }

    /// Serves requests until all senders are gone, then saves what is unsaved.
    pub(crate) fn run(mut self, requests: &mpsc::Receiver<Request>) {
        loop {
            let first = match self.unsaved_since {
                None => requests.recv().ok(),
                Some(since) => match requests.recv_timeout(RELAXED.saturating_sub(since.elapsed()))
                {
                    Ok(request) => Some(request),
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        self.flush_or_wait();
                        continue;
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => None,
                },
            };
            let Some(first) = first else { break };
            let mut batch = vec![first];
            while batch.len() < BATCH {
                let Ok(next) = requests.try_recv() else { break };
                batch.push(next);
            }
            self.serve(batch);
            if self
                .unsaved_since
                .is_some_and(|since| since.elapsed() >= RELAXED)
            {
                self.flush_or_wait();
            }
        }
        let revision = self.shared.read().revision();
        // The exact revision: after an orderly end the order goes on without a gap.
        let suspect = self.disk.as_ref().is_some_and(Disk::is_suspect);
        if self.ceiling != revision || !self.unsaved.is_empty() || suspect {
            self.ceiling = revision;
            if let Err(error) = self.save(None) {
                tracing::error!(%error, "relaxed writes are lost");
            }
        }
        self.shared
            .closed
            .store(true, std::sync::atomic::Ordering::Release);
        self.shared.hub.lock().close();
    }

    fn serve(&mut self, requests: Vec<Request>) {
        let mut batch = Batch {
            revision: self.shared.read().revision(),
            ..Batch::default()
        };
        let before = batch.revision;
        let mut sync = !self.disk.as_ref().is_none_or(Disk::is_healthy);
        let mut replies: Vec<Reply> = Vec::with_capacity(requests.len());
        let mut flushes = Vec::new();
        let mut permits = Vec::with_capacity(requests.len());
        for request in requests {
            match request {
                Request::Txn {
                    compares,
                    ops,
                    durability,
                    reply,
                    _permit,
                } => {
                    sync |= durability == Durability::Sync;
                    replies.push((reply, self.apply(&mut batch, &compares, ops)));
                    permits.push(_permit);
                }
                Request::Flush(reply) => flushes.push(reply),
            }
        }
        let changed = batch.revision > before;
        sync |= !flushes.is_empty();
        sync |= batch.revision > self.ceiling && self.disk.is_some();
        let outcome = if sync && (changed || !flushes.is_empty()) {
            self.save(Some(&batch))
        } else {
            self.keep_unsaved(&batch);
            Ok(())
        };
        if outcome.is_ok() && changed {
            self.publish(&mut batch);
        }
        for (reply, result) in replies {
            let result = match &outcome {
                Ok(()) => result,
                // What was compared with may be of this batch: no answer of it holds.
                Err(error) => Err(error.clone()),
            };
            // The caller may have gone; the write stands.
            drop(reply.send(result));
        }
        for reply in flushes {
            drop(reply.send(outcome.clone()));
        }
    }

    /// Checks the comparisons and adds the effects to the batch.
    fn apply(
        &mut self,
        batch: &mut Batch,
        compares: &[Compare],
        ops: Vec<Op>,
    ) -> Result<Revision, StoreError> {
        let memory = self.shared.read();
        for compare in compares {
            let (key, holds) = match compare {
                Compare::Absent(key) => (key, batch.current(&memory, key).is_none()),
                Compare::ModRevision(key, revision) => {
                    let current = batch.current(&memory, key);
                    (
                        key,
                        current.is_some_and(|(_, modified, _)| modified == *revision),
                    )
                }
            };
            if !holds {
                let current = batch
                    .current(&memory, key)
                    .map(|(create, modified, value)| Entry {
                        key: key.clone(),
                        value,
                        create_revision: create,
                        mod_revision: modified,
                    });
                return Err(StoreError::Conflict {
                    key: key.clone(),
                    current,
                });
            }
        }
        let revision = batch.revision + 1;
        // The last word on a key counts: one change per key and revision.
        let mut last: BTreeMap<String, Option<Value>> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Put(key, value) => last.insert(key, Some(value)),
                Op::Delete(key) => last.insert(key, None),
            };
        }
        for (key, value) in last {
            let before = batch.current(&memory, &key);
            let value = match value {
                Some(Value::Bytes(bytes)) => Some(bytes),
                Some(Value::WithRevision(make)) => Some(make(revision)),
                None if before.is_none() => continue,
                None => None,
            };
            let create = before.as_ref().map_or(revision, |(create, ..)| *create);
            let image = value.clone().map(|value| (create, revision, value));
            batch.revision = revision;
            batch.images.insert(key.clone(), image);
            batch.past.push(Undo {
                revision,
                key: key.clone(),
                before: before.clone(),
            });
            let previous = before.map(|(.., value)| value);
            let packed =
                (previous.as_ref()).and_then(|value| Held::pack(value, &mut self.compressor));
            batch.superseded.push(packed);
            batch.changes.push(Arc::new(Change {
                revision,
                key,
                value,
                previous,
            }));
        }
        Ok(batch.revision)
    }

    /// Commits the unsaved writes and the batch.
    fn save(&mut self, batch: Option<&Batch>) -> Result<(), StoreError> {
        let Some(disk) = &mut self.disk else {
            return Ok(());
        };
        let added = batch.filter(|batch| !batch.images.is_empty());
        let mut both;
        let mut past = std::mem::take(&mut self.unsaved_past);
        let unsaved = past.len();
        let dirty = match added {
            None => &self.unsaved,
            Some(batch) => {
                past.extend(batch.past.iter().cloned());
                both = self.unsaved.clone();
                both.extend(batch.images.iter().map(|(k, v)| (k.clone(), v.clone())));
                &both
            }
        };
        let ceiling = batch.map_or(self.ceiling, |batch| batch.revision + RESERVE);
        let memory = self.shared.read();
        if let Err(error) = disk.commit(dirty, &past, ceiling, &memory) {
            past.truncate(unsaved);
            self.unsaved_past = past;
            return Err(error);
        }
        self.ceiling = ceiling;
        self.unsaved.clear();
        self.unsaved_since = None;
        Ok(())
    }

    fn keep_unsaved(&mut self, batch: &Batch) {
        if self.disk.is_none() || batch.images.is_empty() {
            return;
        }
        self.unsaved
            .extend(batch.images.iter().map(|(k, v)| (k.clone(), v.clone())));
        self.unsaved_past.extend(batch.past.iter().cloned());
        self.unsaved_since.get_or_insert_with(Instant::now);
    }

    fn flush_or_wait(&mut self) {
        if let Err(error) = self.save(None) {
            tracing::error!(%error, unsaved = self.unsaved.len(), "relaxed writes are not saved");
            // Tried again after the same time; until then every write is made durable at once.
            self.unsaved_since = Some(Instant::now());
        }
    }

    fn publish(&self, batch: &mut Batch) {
        let mut memory = self
            .shared
            .memory
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let superseded = std::mem::take(&mut batch.superseded);
        let changes = batch.changes.iter().cloned().zip(superseded);
        memory.publish(batch.revision, changes);
        // Taken before the memory is let go: a new watch sees a change either in the history or
        // in its queue.
        let mut groups = self.shared.hub.lock();
        drop(memory);
        for change in &batch.changes {
            groups.dispatch(change);
        }
        drop(groups);
        self.shared.hub.set_dispatched(batch.revision);
        self.shared.published.send_replace(batch.revision);
    }
}

impl Batch {
    fn current(&self, memory: &Memory, key: &str) -> Image {
        match self.images.get(key) {
            Some(image) => image.clone(),
            None => memory.image(key),
        }
    }
}

//! The handle that callers hold.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock, atomic::AtomicBool, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use redb::Database;
use tokio::sync::{Semaphore, oneshot, watch};

use crate::{
    Compare, Durability, Entry, ListPage, Op, Revision, StoreError, Watch,
    disk::{Disk, write_backup},
    hub::{Hub, Past, REPLAY, Scope},
    memory::{Memory, Window},
    writer::{Request, Shared, Writer},
};

/// How much is kept and how much may wait.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// How long superseded versions and changes are kept.
    pub history_age: Duration,
    /// How many changes are kept at most.
    pub history_changes: usize,
    /// How many changes are kept in the file besides, for watches and lists that go on after a crash.
    pub durable_changes: usize,
    /// How many changes may wait in one watcher's queue.
    pub watch_queue: usize,
    /// How many transactions may wait for the writer; further callers wait.
    pub write_queue: usize,
    /// Bytes of the file that are cached beside the values in memory.
    pub cache_bytes: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            history_age: Duration::from_secs(300),
            history_changes: 100_000,
            durable_changes: 10_000,
            watch_queue: 1024,
            write_queue: 4096,
            cache_bytes: 4 << 20,
        }
    }
}

/// A store; clones share it. When the last clone is dropped, what is unsaved is saved.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    queue: Mutex<Option<mpsc::Sender<Request>>>,
    places: Arc<Semaphore>,
    watch_queue: usize,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the file, or makes it. Blocks while the file is read.
    ///
    /// # Errors
    /// [`StoreError::Open`] if the file is of something else, damaged, in use or not accessible.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "a configuration is given away"
    )]
    pub fn open(path: &Path, config: StoreConfig) -> Result<Self, StoreError> {
        let cache = config.cache_bytes;
        let open = move |path: &Path| Database::builder().set_cache_size(cache).create(path);
        Self::open_with(path, config, open)
    }

    #[allow(
        clippy::needless_pass_by_value,
        reason = "a configuration is given away"
    )]
    pub(crate) fn open_with(
        path: &Path,
        config: StoreConfig,
        open: impl Fn(&Path) -> Result<Database, redb::DatabaseError> + Send + Sync + 'static,
    ) -> Result<Self, StoreError> {
        let window = config.window();
        let past = u64::try_from(config.durable_changes).unwrap_or(u64::MAX);
        let (disk, memory) = Disk::open(path, Arc::new(open), past, |revision| {
            Memory::new(window, revision)
        })?;
        Self::start(Some(disk), memory, &config)
    }

    /// A store that ends with the process.
    ///
    /// # Errors
    /// [`StoreError::Open`] if the writer thread cannot be started.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "a configuration is given away"
    )]
    pub fn in_memory(config: StoreConfig) -> Result<Self, StoreError> {
        let memory = Memory::new(config.window(), 0);
        Self::start(None, memory, &config)
    }

    fn start(disk: Option<Disk>, memory: Memory, config: &StoreConfig) -> Result<Self, StoreError> {
        let revision = memory.revision();
        let hub = Arc::new(Hub::default());
        hub.set_dispatched(revision);
        let shared = Arc::new(Shared {
            memory: RwLock::new(memory),
            hub,
            closed: Arc::new(AtomicBool::new(false)),
            published: watch::Sender::new(revision),
        });
        let (queue, requests) = mpsc::channel();
        let writer = Writer::new(Arc::clone(&shared), disk);
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(&requests))
            .map_err(|error| StoreError::Open {
                path: "store-writer".into(),
                message: error.to_string(),
            })?;
        Ok(Self(Arc::new(Inner {
            shared,
            queue: Mutex::new(Some(queue)),
            places: Arc::new(Semaphore::new(config.write_queue)),
            watch_queue: config.watch_queue,
            writer: Mutex::new(Some(thread)),
        })))
    }

    /// Applies all of `ops` or none. Returns the revision of the write; if nothing changes (only
    /// deletions of absent keys), the current one.
    ///
    /// Dropping the future does not take a transaction back that was handed over.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a comparison does not hold, [`StoreError::Write`] if the commit
    /// failed: nothing of it is visible then, and a later transaction may succeed.
    pub async fn txn(
        &self,
        compares: Vec<Compare>,
        ops: Vec<Op>,
        durability: Durability,
    ) -> Result<Revision, StoreError> {
        let permit = Arc::clone(&self.0.places)
            .acquire_owned()
            .await
            .map_err(|_closed| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Request::Txn {
            compares,
            ops,
            durability,
            reply,
            _permit: permit,
        })?;
        answer.await.map_err(|_gone| StoreError::Closed)?
    }

    /// Waits until every acknowledged write, relaxed ones too, is in the file.
    ///
    /// # Errors
    /// [`StoreError::Write`] if the commit failed.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Flush(reply))?;
        answer.await.map_err(|_gone| StoreError::Closed)?
    }

    fn send(&self, request: Request) -> Result<(), StoreError> {
        let queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queue.as_ref().ok_or(StoreError::Closed)?;
        queue.send(request).map_err(|_gone| StoreError::Closed)
    }

    /// The newest value of a key.
    pub fn get(&self, key: &str) -> Option<Entry> {
        let memory = self.0.shared.read();
        memory.get(key, memory.revision())
    }

    /// The value of a key at a revision.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] or [`StoreError::Future`].
    pub fn get_at(&self, key: &str, revision: Revision) -> Result<Option<Entry>, StoreError> {
        let memory = self.0.shared.read();
        let revision = memory.check(Some(revision))?;
        Ok(memory.get(key, revision))
    }

    /// Keys with the prefix, in order, as they were at one revision (default: now).
    ///
    /// # Errors
    /// [`StoreError::Compacted`] or [`StoreError::Future`].
    pub fn list(
        &self,
        prefix: &str,
        at: Option<Revision>,
        start_after: Option<&str>,
        limit: Option<usize>,
    ) -> Result<ListPage, StoreError> {
        let memory = self.0.shared.read();
        let at = memory.check(at)?;
        Ok(memory.list(prefix, at, start_after, limit))
    }

    /// The revision of the newest visible write.
    pub fn revision(&self) -> Revision {
        self.0.shared.read().revision()
    }

    /// The oldest revision that can be read or watched from.
    pub fn oldest_revision(&self) -> Revision {
        self.0.shared.read().floor()
    }

    /// Number of keys kept, recently deleted ones included.
    pub fn len(&self) -> usize {
        self.0.shared.read().len()
    }

    /// Whether no key is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until the store has reached a revision. Cancel-safe.
    ///
    /// # Errors
    /// [`StoreError::Closed`].
    pub async fn reached(&self, revision: Revision) -> Result<(), StoreError> {
        let mut published = self.0.shared.published.subscribe();
        published
            .wait_for(|current| *current >= revision)
            .await
            .map(|_| ())
            .map_err(|_closed| StoreError::Closed)
    }

    /// Watches keys with the prefix: every change after `from` (default: from now on), once and in
    /// order.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] or [`StoreError::Future`].
    pub fn watch(&self, prefix: &str, from: Option<Revision>) -> Result<Watch, StoreError> {
        self.watch_scope(Scope::Prefix(prefix.into()), from)
    }

    /// Watches one key, as [`Store::watch`] does many; changes of others cost its watcher nothing.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] or [`StoreError::Future`].
    pub fn watch_key(&self, key: &str, from: Option<Revision>) -> Result<Watch, StoreError> {
        self.watch_scope(Scope::Key(key.into()), from)
    }

    fn watch_scope(&self, scope: Scope, from: Option<Revision>) -> Result<Watch, StoreError> {
        let shared = &self.0.shared;
        let memory = shared.read();
        let from = memory.check(from)?;
        let until = memory.revision();
        let first = memory.changes(&scope, from, until, REPLAY)?;
        let live = shared.hub.lock().add(scope.clone(), self.0.watch_queue);
        drop(memory);
        Ok(Watch {
            past: first.after.map(|after| Past {
                scope,
                after,
                until,
            }),
            replay: first.changes,
            live,
            shared: Arc::clone(shared),
            started: from,
            delivered: 0,
        })
    }

    /// Writes a consistent copy to a new file, which [`Store::open`] takes. Blocks; the store
    /// stays usable meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Write`].
    pub fn backup(&self, path: &Path) -> Result<Revision, StoreError> {
        // Cloning the entries costs references only; the file is written without the lock.
        let (revision, entries) = {
            let memory = self.0.shared.read();
            let entries: Vec<Entry> = memory.live().collect();
            (memory.revision(), entries)
        };
        write_backup(path, revision, entries.into_iter())?;
        Ok(revision)
    }

    /// Saves what is unsaved and ends the store for all its clones. Blocks.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Inner {
    fn close(&self) {
        self.places.close();
        drop(
            self.queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let thread = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the store's writer has panicked");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

impl StoreConfig {
    fn window(&self) -> Window {
        Window {
            age: self.history_age,
            changes: self.history_changes,
        }
    }
}

#[cfg(test)]
mod tests;

//! Embedded MVCC key-value store with revisions and watch.
//!
//! etcd's data model in one process: every write transaction gets the next revision of one total
//! order; reads are from memory; a write is acknowledged when it is durable in one redb file, where
//! all waiting transactions share a commit.
//!
//! One writer thread owns the file. It takes everything that waits, checks the comparisons against
//! the newest state (earlier transactions of the same batch included), makes one commit, and only
//! then shows the result to readers and watchers. Superseded versions are kept in memory for a
//! window of time and number, so lists can be paged consistently and watches resumed; the last of
//! them are in the file too, so that both go on after a crash.
//!
//! ```
//! # async fn example() -> Result<(), hypernetes_store::StoreError> {
//! use hypernetes_store::{Compare, Durability, Op, Store, StoreConfig, Value};
//!
//! let store = Store::in_memory(StoreConfig::default())?;
//! let mut watch = store.watch("pods/", None)?;
//! let put = Op::Put("pods/a".into(), Value::Bytes("1".into()));
//! let revision = store
//!     .txn(vec![Compare::Absent("pods/a".into())], vec![put], Durability::Sync)
//!     .await?;
//! assert_eq!(watch.next().await?.revision, revision);
//! # Ok(())
//! # }
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::needless_pass_by_value,
        clippy::let_underscore_must_use,
        reason = "tests are read more than they are run"
    )
)]

mod disk;
mod history;
mod hub;
mod memory;
mod store;
mod versions;
mod writer;

use bytes::Bytes;

pub use hub::Watch;
pub use memory::ListPage;
pub use store::{Store, StoreConfig};

/// Position in the total order of writes; 1 is the first.
pub type Revision = u64;

/// A key with its value at some revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Key, `/`-separated by convention.
    pub key: String,
    /// Value.
    pub value: Bytes,
    /// Revision at which the key came to exist.
    pub create_revision: Revision,
    /// Revision of this value.
    pub mod_revision: Revision,
}

/// What must hold for a transaction to be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key's value was written at this revision.
    ModRevision(String, Revision),
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets the value. `Value::WithRevision` lets the writer put the revision into the value.
    Put(String, Value),
    /// Removes the key if there.
    Delete(String),
}

/// A value to store.
#[derive(Clone)]
pub enum Value {
    /// As it is.
    Bytes(Bytes),
    /// Made once the revision is known (an object that carries its own resourceVersion).
    WithRevision(std::sync::Arc<dyn Fn(Revision) -> Bytes + Send + Sync>),
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        matches!((self, other), (Self::Bytes(a), Self::Bytes(b)) if a == b)
    }
}

impl Eq for Value {}

impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::WithRevision(_) => f.write_str("made from the revision"),
        }
    }
}

/// When a write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// After it is on disk.
    #[default]
    Sync,
    /// At once; on disk within a second. Events, leases, heartbeats.
    Relaxed,
}

/// A change as a watcher sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Revision of the change.
    pub revision: Revision,
    /// Key.
    pub key: String,
    /// New value; `None` = deleted.
    pub value: Option<Bytes>,
    /// Value before; `None` = created.
    pub previous: Option<Bytes>,
}

/// Failure of a store operation.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A comparison did not hold; nothing was written.
    #[error("conflict on key {key}")]
    Conflict {
        /// Which key.
        key: String,
        /// Its present state.
        current: Option<Entry>,
    },
    /// The revision is no longer kept.
    #[error("revision {asked} has been compacted; the oldest kept is {oldest}")]
    Compacted {
        /// Asked for.
        asked: Revision,
        /// Oldest that can be had.
        oldest: Revision,
    },
    /// The revision is in the future.
    #[error("revision {asked} is larger than the current one {current}")]
    Future {
        /// Asked for.
        asked: Revision,
        /// Newest.
        current: Revision,
    },
    /// The file could not be written; nothing of the transaction is visible.
    #[error("cannot write the state file {path}: {message}")]
    Write {
        /// File.
        path: String,
        /// Cause.
        message: String,
    },
    /// The file cannot be opened.
    #[error("cannot open the state file {path}: {message}")]
    Open {
        /// File.
        path: String,
        /// Cause.
        message: String,
    },
    /// The watcher did not take its changes in time and has missed some.
    #[error("the watcher is too slow: changes after revision {delivered} were dropped")]
    Lagged {
        /// Last revision that was delivered.
        delivered: Revision,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

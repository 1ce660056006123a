//! The durable half: one redb file with the newest value of every key, and the recent past
//! ([`crate::history`]).
//!
//! After a failed write redb refuses all further work on the handle, so the file is opened again
//! before the next commit. A commit that failed late may still have reached the disk; the keys it
//! touched are written again from memory with the next commit, so it cannot come back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use crate::{
    Revision, StoreError,
    history::{self, Undo},
    memory::Memory,
};

const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");
pub(crate) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;
/// No revision up to this one has been given out twice or will be.
const CEILING: &str = "revision";
const HEADER: usize = 16;

/// How many revisions may be given out to relaxed writes before the next commit. After a crash
/// the order of writes goes on behind them, so that no revision is used twice.
pub(crate) const RESERVE: Revision = 1 << 16;

/// What a key shall be after the commit; `None` = absent.
pub(crate) type Image = Option<(Revision, Revision, Bytes)>;
/// Keys to write.
pub(crate) type Dirty = BTreeMap<String, Image>;

type Opener = Arc<dyn Fn(&Path) -> Result<Database, redb::DatabaseError> + Send + Sync>;

/// The file and its state.
pub(crate) struct Disk {
    path: PathBuf,
    open: Opener,
    database: Option<Database>,
    suspect: BTreeSet<String>,
    /// How many changes of the past are kept.
    past: u64,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.path)
            .field("open", &self.database.is_some())
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens or makes the file and loads it into memory.
    pub(crate) fn open(
        path: &Path,
        open: Opener,
        past: u64,
        make: impl FnOnce(Revision) -> Memory,
    ) -> Result<(Self, Memory), StoreError> {
        let failed = |error: &dyn fmt::Display| StoreError::Open {
            path: path.display().to_string(),
            message: error.to_string(),
        };
        let database = open(path).map_err(|e| failed(&e))?;
        let memory = load(&database, make).map_err(|e| failed(&e))?;
        let disk = Self {
            path: path.to_owned(),
            open,
            database: Some(database),
            suspect: BTreeSet::new(),
            past,
        };
        Ok((disk, memory))
    }

    /// Whether the file may have what was told to be not there.
    pub(crate) fn is_suspect(&self) -> bool {
        !self.suspect.is_empty()
    }

    /// Whether the last commit succeeded.
    pub(crate) fn is_healthy(&self) -> bool {
        self.database.is_some()
    }

    /// Writes and syncs. On error nothing of `dirty` will be there after a later success.
    pub(crate) fn commit(
        &mut self,
        dirty: &Dirty,
        undo: &[Undo],
        ceiling: Revision,
        memory: &Memory,
    ) -> Result<(), StoreError> {
        match self.try_commit(dirty, undo, ceiling, memory) {
            Ok(()) => {
                self.suspect.clear();
                Ok(())
            }
            Err(error) => {
                self.suspect.extend(dirty.keys().cloned());
                self.database = None;
                Err(StoreError::Write {
                    path: self.path.display().to_string(),
                    message: error.to_string(),
                })
            }
        }
    }

    fn try_commit(
        &mut self,
        dirty: &Dirty,
        undo: &[Undo],
        ceiling: Revision,
        memory: &Memory,
    ) -> Result<(), redb::Error> {
        if self.database.is_none() {
            self.database = Some((self.open)(&self.path)?);
        }
        let database = self.database.as_ref().expect("opened above");
        let mut transaction = database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        {
            let mut keys = transaction.open_table(KEYS)?;
            for key in self.suspect.iter().filter(|key| !dirty.contains_key(*key)) {
                write(&mut keys, key, &memory.image(key))?;
            }
            for (key, image) in dirty {
                write(&mut keys, key, image)?;
            }
            transaction.open_table(META)?.insert(CEILING, ceiling)?;
        }
        let failed = (!self.suspect.is_empty()).then(|| memory.revision());
        history::write(&transaction, undo, ceiling, failed, self.past)?;
        transaction.commit()?;
        Ok(())
    }
}

fn write(
    keys: &mut redb::Table<'_, &'static str, &'static [u8]>,
    key: &str,
    image: &Image,
) -> Result<(), redb::Error> {
    match image {
        Some((create, revision, value)) => {
            let mut record = Vec::with_capacity(HEADER + value.len());
            record.extend_from_slice(&create.to_le_bytes());
            record.extend_from_slice(&revision.to_le_bytes());
            record.extend_from_slice(value);
            keys.insert(key, record.as_slice())?;
        }
        None => {
            keys.remove(key)?;
        }
    }
    Ok(())
}

/// A file whose content this version does not understand.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Redb(#[from] redb::Error),
    #[error("format {0} is not known to this version")]
    Format(u64),
    #[error("the record of key {0} is damaged")]
    Record(String),
}

macro_rules! from_redb {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for LoadError {
            fn from(error: redb::$error) -> Self {
                Self::Redb(error.into())
            }
        }
    )*};
}
from_redb!(TransactionError, TableError, StorageError, CommitError);

fn load(database: &Database, make: impl FnOnce(Revision) -> Memory) -> Result<Memory, LoadError> {
    let transaction = database.begin_write()?;
    let ceiling = {
        let mut meta = transaction.open_table(META)?;
        let format = meta.get("format")?.map(|v| v.value());
        match format {
            Some(FORMAT) => {}
            Some(other) => return Err(LoadError::Format(other)),
            None => {
                meta.insert("format", FORMAT)?;
            }
        }
        transaction.open_table(KEYS)?;
        meta.get(CEILING)?.map_or(0, |v| v.value())
    };
    history::prepare(&transaction, ceiling)?;
    transaction.commit()?;

    let keys = database.begin_read()?.open_table(KEYS)?;
    let mut memory = make(ceiling);
    for row in keys.iter()? {
        let (key, record) = row?;
        let (key, record) = (key.value(), record.value());
        let number = |at: usize| {
            let bytes = record.get(at..at + 8)?;
            Some(Revision::from_le_bytes(
                bytes.try_into().expect("eight bytes"),
            ))
        };
        let (Some(create), Some(revision)) = (number(0), number(8)) else {
            return Err(LoadError::Record(key.to_owned()));
        };
        memory.load(
            key,
            create,
            revision,
            Bytes::copy_from_slice(&record[HEADER..]),
        );
    }
    if !history::load(database, &mut memory)? {
        tracing::warn!("the past in the state file does not fit: watches begin anew");
    }
    Ok(memory)
}

/// Writes a complete, synced file of its own; replaces what is at `path` only when it is whole.
pub(crate) fn write_backup(
    path: &Path,
    revision: Revision,
    entries: impl Iterator<Item = crate::Entry>,
) -> Result<(), StoreError> {
    let partial = path.with_added_extension("partial");
    let result = (|| -> Result<(), Box<dyn std::error::Error>> {
        match std::fs::remove_file(&partial) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let database = Database::create(&partial)?;
        let transaction = database.begin_write()?;
        {
            let mut keys = transaction.open_table(KEYS)?;
            for entry in entries {
                let image = Some((entry.create_revision, entry.mod_revision, entry.value));
                write(&mut keys, &entry.key, &image)?;
            }
            let mut meta = transaction.open_table(META)?;
            meta.insert("format", FORMAT)?;
            meta.insert(CEILING, revision)?;
        }
        transaction.commit()?;
        drop(database);
        std::fs::rename(&partial, path)?;
        if let Some(directory) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::File::open(directory)?.sync_all()?;
        }
        Ok(())
    })();
    result.map_err(|error| {
        // What is half written helps nobody, and its removal may fail for the same cause.
        drop(std::fs::remove_file(&partial));
        StoreError::Write {
            path: path.display().to_string(),
            message: error.to_string(),
        }
    })
}

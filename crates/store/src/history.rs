//! The recent past in the file: what each change replaced.
//!
//! The file has the newest value of each key; going back from there, change by change, gives every
//! version of the window. So watches and paged lists go on after the process has died, and a new key
//! costs no second copy of its value.

use std::collections::HashMap;

use bytes::Bytes;
use redb::{ReadableTable, ReadableTableMetadata, Table, TableDefinition, WriteTransaction};

use crate::{
    Change, Revision,
    disk::{Image, META},
    memory::{Memory, Past},
};

const HISTORY: TableDefinition<'_, (u64, &str), &[u8]> = TableDefinition::new("history");
/// The oldest revision that can be gone back to.
const FLOOR: &str = "history-floor";
/// The file's `revision` when the history was last written: another one is of a version that knows
/// no history, and what is here has a gap.
const COMPLETE: &str = "history-revision";
const HEADER: usize = 16;
/// The window is exceeded by this many changes before it is cut.
const SLACK: u64 = 1024;

/// What a change replaced.
#[derive(Debug, Clone)]
pub(crate) struct Undo {
    /// The change's revision.
    pub(crate) revision: Revision,
    pub(crate) key: String,
    /// What the key was before; `None`: absent.
    pub(crate) before: Image,
}

/// Adds to the history, keeps it at about `limit` changes, and says that it is complete up to
/// `ceiling`. With `after`, first drops what an earlier failed commit may have left behind it.
pub(crate) fn write(
    transaction: &WriteTransaction,
    undo: &[Undo],
    ceiling: Revision,
    after: Option<Revision>,
    limit: u64,
) -> Result<(), redb::Error> {
    let mut table = transaction.open_table(HISTORY)?;
    if let Some(after) = after {
        table.retain_in((after + 1, "").., |_key, _record| false)?;
    }
    for one in undo {
        let mut record = Vec::new();
        if let Some((create, revision, value)) = &one.before {
            record.reserve(HEADER + value.len());
            record.extend_from_slice(&create.to_le_bytes());
            record.extend_from_slice(&revision.to_le_bytes());
            record.extend_from_slice(value);
        }
        table.insert((one.revision, one.key.as_str()), record.as_slice())?;
    }
    let mut meta = transaction.open_table(META)?;
    if let Some(floor) = trim(&mut table, limit)? {
        meta.insert(FLOOR, floor)?;
    }
    meta.insert(COMPLETE, ceiling)?;
    Ok(())
}

/// Forgets the oldest changes, each revision as a whole; the last one that is forgotten.
fn trim(
    table: &mut Table<'_, (u64, &'static str), &'static [u8]>,
    limit: u64,
) -> Result<Option<Revision>, redb::Error> {
    let excess = table.len()?.saturating_sub(limit);
    if excess <= SLACK {
        return Ok(None);
    }
    let index = usize::try_from(excess - 1).unwrap_or(usize::MAX);
    let Some(row) = table.iter()?.nth(index) else {
        return Ok(None);
    };
    let floor = row?.0.value().0;
    table.retain_in(..(floor + 1, ""), |_key, _record| false)?;
    Ok(Some(floor))
}

/// Makes the tables fit a file whose `revision` is `ceiling`: what has a gap is forgotten.
pub(crate) fn prepare(
    transaction: &WriteTransaction,
    ceiling: Revision,
) -> Result<(), redb::Error> {
    let mut table = transaction.open_table(HISTORY)?;
    let mut meta = transaction.open_table(META)?;
    let complete = meta.get(COMPLETE)?.map(|value| value.value());
    if complete != Some(ceiling) {
        table.retain(|_key, _record| false)?;
        meta.insert(FLOOR, ceiling)?;
        meta.insert(COMPLETE, ceiling)?;
    }
    Ok(())
}

/// Gives `memory`, which has the newest values, its past. Returns whether that was possible: a
/// record that does not fit what came after it ends the attempt.
pub(crate) fn load(database: &redb::Database, memory: &mut Memory) -> Result<bool, redb::Error> {
    use redb::ReadableDatabase;

    let transaction = database.begin_read()?;
    let floor = transaction
        .open_table(META)?
        .get(FLOOR)?
        .map_or_else(|| memory.revision(), |value| value.value());
    let table = transaction.open_table(HISTORY)?;
    // What each key was after the change that is looked at.
    let mut after: HashMap<String, Image> = HashMap::new();
    let mut past = Vec::new();
    for row in table.iter()?.rev() {
        let (key, record) = row?;
        let (revision, key) = key.value();
        let Some(before) = image(record.value()) else {
            return Ok(false);
        };
        let now = match after.get(key) {
            Some(image) => image.clone(),
            None => memory.image(key),
        };
        let fits = now
            .as_ref()
            .is_none_or(|(_, modified, _)| *modified == revision);
        if !fits || revision <= floor || revision > memory.revision() {
            return Ok(false);
        }
        after.insert(key.to_owned(), before.clone());
        past.push(Past {
            change: Change {
                revision,
                key: key.to_owned(),
                value: now.as_ref().map(|(.., value)| value.clone()),
                previous: before.as_ref().map(|(.., value)| value.clone()),
            },
            create: now.map_or(revision, |(create, ..)| create),
            before,
        });
    }
    past.reverse();
    memory.restore(floor, past);
    Ok(true)
}

fn image(record: &[u8]) -> Option<Image> {
    if record.is_empty() {
        return Some(None);
    }
    let number = |at: usize| {
        let bytes = record.get(at..at + 8)?;
        Some(Revision::from_le_bytes(bytes.try_into().ok()?))
    };
    let value = Bytes::copy_from_slice(record.get(HEADER..)?);
    Some(Some((number(0)?, number(8)?, value)))
}

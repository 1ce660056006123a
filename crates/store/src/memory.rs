//! The newest state, its recent versions and the ring of recent changes.
//!
//! Readers hold the lock only to look up and clone reference-counted values. Trimming rides on
//! writes: each publication drops at most a few old changes, so there is never a long pause.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    Change, Entry, Revision, StoreError,
    disk::Image,
    hub::Scope,
    versions::{Compressor, Held, Version, Versions},
};

/// A page of a consistent list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPage {
    /// Entries in key order.
    pub entries: Vec<Entry>,
    /// Revision that the whole list shows; pass it as `at` for the next page.
    pub revision: Revision,
    /// Whether keys follow the last entry.
    pub more: bool,
    /// How many keys follow the last entry.
    pub remaining: usize,
}

/// A change of the past, with what it takes to go back over it.
#[derive(Debug)]
pub(crate) struct Past {
    pub(crate) change: Change,
    /// Revision at which the key came to exist, after the change.
    pub(crate) create: Revision,
    pub(crate) before: Image,
}

/// How much history is kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) age: Duration,
    pub(crate) changes: usize,
}

/// That a key has changed.
#[derive(Debug)]
struct Record {
    at: Instant,
    revision: Revision,
    key: Arc<str>,
}

/// Some changes of the past.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    pub(crate) changes: VecDeque<Arc<Change>>,
    /// Where the next ones begin, if there are more.
    pub(crate) after: Option<Revision>,
}

/// All that readers see.
#[derive(Debug)]
pub(crate) struct Memory {
    keys: BTreeMap<Arc<str>, Versions>,
    /// Which key changed when: what it was and became is among its versions.
    history: VecDeque<Record>,
    revision: Revision,
    floor: Revision,
    window: Window,
}

/// At most this many changes are forgotten per publication beyond the number that it adds.
const TRIM_STEP: usize = 64;

impl Memory {
    pub(crate) fn new(window: Window, revision: Revision) -> Self {
        Self {
            keys: BTreeMap::new(),
            history: VecDeque::new(),
            revision,
            floor: revision,
            window,
        }
    }

    /// Takes over an entry from the file at start.
    pub(crate) fn load(&mut self, key: &str, create: Revision, revision: Revision, value: Bytes) {
        let version = Version::new(create, revision, Some(value));
        self.keys.insert(Arc::from(key), Versions::One(version));
    }

    /// Takes over the past from the file: all changes after `floor`, in order.
    pub(crate) fn restore(&mut self, floor: Revision, past: Vec<Past>) {
        let now = Instant::now();
        let mut versions: HashMap<Arc<str>, Vec<Version>> = HashMap::new();
        for one in past {
            let key: Arc<str> = match self.keys.get_key_value(one.change.key.as_str()) {
                Some((key, _)) => Arc::clone(key),
                None => one.change.key.into(),
            };
            let of_key = versions
                .entry(Arc::clone(&key))
                .or_insert_with(|| match one.before {
                    None => Vec::new(),
                    Some((create, revision, value)) => {
                        vec![Version::new(create, revision, Some(value))]
                    }
                });
            let revision = one.change.revision;
            of_key.push(Version::new(one.create, revision, one.change.value));
            self.history.push_back(Record {
                at: now,
                revision,
                key,
            });
        }
        let mut compressor = Compressor::new();
        for (key, of_key) in versions {
            let versions = Versions::packed(of_key, &mut compressor);
            self.keys.insert(key, versions);
        }
        self.floor = floor;
    }

    /// The newest version of a key as the file has it.
    pub(crate) fn image(&self, key: &str) -> Image {
        let version = self.newest(key)?;
        Some((version.create, version.revision, version.value()?))
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// The oldest revision that can be read or watched from.
    pub(crate) fn floor(&self) -> Revision {
        self.floor
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The newest version of a key, deletions included.
    pub(crate) fn newest(&self, key: &str) -> Option<&Version> {
        self.keys.get(key).map(Versions::newest)
    }

    /// All live entries in key order.
    pub(crate) fn live(&self) -> impl Iterator<Item = Entry> {
        self.keys
            .iter()
            .filter_map(|(key, versions)| versions.newest().entry(key))
    }

    pub(crate) fn check(&self, at: Option<Revision>) -> Result<Revision, StoreError> {
        let asked = at.unwrap_or(self.revision);
        if asked > self.revision {
            Err(StoreError::Future {
                asked,
                current: self.revision,
            })
        } else if asked < self.floor {
            Err(StoreError::Compacted {
                asked,
                oldest: self.floor,
            })
        } else {
            Ok(asked)
        }
    }

    pub(crate) fn get(&self, key: &str, at: Revision) -> Option<Entry> {
        self.keys.get(key)?.at(at)?.entry(key)
    }

    pub(crate) fn list(
        &self,
        prefix: &str,
        at: Revision,
        start_after: Option<&str>,
        limit: Option<usize>,
    ) -> ListPage {
        let from = match start_after {
            Some(key) if key >= prefix => Bound::Excluded(key),
            _ => Bound::Included(prefix),
        };
        let limit = limit.unwrap_or(usize::MAX);
        let (mut entries, mut remaining) = (Vec::new(), 0);
        for (key, versions) in self
            .keys
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
        {
            let Some(version) = versions.at(at) else {
                continue;
            };
            if entries.len() < limit {
                entries.extend(version.entry(key));
            } else if version.value.is_some() {
                remaining += 1;
            }
        }
        ListPage {
            entries,
            revision: at,
            more: remaining > 0,
            remaining,
        }
    }

    /// Changes after `from` and until `until` of what is watched, in order: at most about `limit`.
    ///
    /// # Errors
    /// [`StoreError::Compacted`].
    pub(crate) fn changes(
        &self,
        scope: &Scope,
        from: Revision,
        until: Revision,
        limit: usize,
    ) -> Result<Replay, StoreError> {
        self.check(Some(from))?;
        let start = self
            .history
            .partition_point(|record| record.revision <= from);
        let mut replay = Replay::default();
        let mut last = from;
        for record in self.history.range(start..) {
            if record.revision > until {
                break;
            }
            // A revision as a whole: the next part begins after it.
            if replay.changes.len() >= limit && record.revision > last {
                replay.after = Some(last);
                break;
            }
            last = record.revision;
            if scope.has(&record.key)
                && let Some((now, before)) = (self.keys.get(&record.key))
                    .and_then(|versions| versions.change(record.revision))
            {
                replay.changes.push_back(Arc::new(Change {
                    revision: record.revision,
                    key: record.key.to_string(),
                    value: now.value(),
                    previous: before.and_then(Version::value),
                }));
            }
        }
        Ok(replay)
    }

    /// Makes the changes of a committed batch visible, each with the compressed form of what it replaces, if that
    /// has one.
    pub(crate) fn publish(
        &mut self,
        revision: Revision,
        changes: impl ExactSizeIterator<Item = (Arc<Change>, Option<Held>)>,
    ) {
        let now = Instant::now();
        let count = changes.len();
        for (change, superseded) in changes {
            let name = change.key.as_str();
            let only = (Bound::Included(name), Bound::Included(name));
            let previous = self.keys.range_mut::<str, _>(only).next();
            let create = match &previous {
                Some((_, versions)) if versions.newest().value.is_some() => {
                    versions.newest().create
                }
                _ => change.revision,
            };
            let version = Version::new(create, change.revision, change.value.clone());
            let key = match previous {
                Some((key, versions)) => {
                    versions.push(version, superseded);
                    Arc::clone(key)
                }
                None => {
                    let key: Arc<str> = Arc::from(name);
                    self.keys.insert(Arc::clone(&key), Versions::One(version));
                    key
                }
            };
            self.history.push_back(Record {
                at: now,
                revision: change.revision,
                key,
            });
        }
        self.revision = self.revision.max(revision);
        self.trim(now, count + TRIM_STEP);
    }

    /// Forgets changes that have left the window, at most about `budget` of them. Returns whether
    /// more could be forgotten.
    pub(crate) fn trim(&mut self, now: Instant, budget: usize) -> bool {
        let mut spent = 0;
        loop {
            let Some(first) = self.history.front() else {
                return false;
            };
            let old = now.saturating_duration_since(first.at) > self.window.age;
            if !old && self.history.len() <= self.window.changes {
                return false;
            }
            if spent >= budget {
                return true;
            }
            // A revision leaves as a whole: a watcher could else see half a transaction.
            let floor = first.revision;
            while let Some(record) = self.history.pop_front_if(|one| one.revision == floor) {
                spent += 1;
                let gone =
                    (self.keys.get_mut(&record.key)).is_some_and(|versions| !versions.trim(floor));
                if gone {
                    self.keys.remove(&record.key);
                }
            }
            self.floor = floor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(revision: Revision, key: &str, value: Option<&str>) -> Arc<Change> {
        let value = value.map(|v| Bytes::copy_from_slice(v.as_bytes()));
        Arc::new(Change {
            revision,
            key: key.into(),
            value,
            previous: None,
        })
    }

    fn publish(memory: &mut Memory, revision: Revision, change: Arc<Change>) {
        memory.publish(revision, std::iter::once((change, None)));
    }

    fn memory(changes: usize) -> Memory {
        Memory::new(
            Window {
                age: Duration::from_secs(300),
                changes,
            },
            0,
        )
    }

    #[test]
    fn old_versions_are_read_until_they_leave_the_window() {
        let mut memory = memory(2);
        publish(&mut memory, 1, change(1, "a", Some("1")));
        publish(&mut memory, 2, change(2, "a", Some("2")));
        assert_eq!(memory.get("a", 1).unwrap().value, "1");
        publish(&mut memory, 3, change(3, "a", Some("3")));
        publish(&mut memory, 4, change(4, "a", Some("4")));
        assert_eq!(memory.floor(), 2);
        assert!(matches!(
            memory.check(Some(1)),
            Err(StoreError::Compacted { oldest: 2, .. })
        ));
        assert_eq!(memory.get("a", 2).unwrap().value, "2");
        assert_eq!(memory.get("a", 4).unwrap().create_revision, 1);
    }

    #[test]
    fn deleted_keys_leave_memory_with_their_tombstone() {
        let mut memory = memory(1);
        publish(&mut memory, 1, change(1, "a", Some("1")));
        publish(&mut memory, 2, change(2, "a", None));
        assert_eq!(memory.len(), 1);
        publish(&mut memory, 3, change(3, "b", Some("1")));
        assert_eq!(memory.len(), 1);
        assert_eq!(memory.get("a", 3), None);
    }

    #[test]
    fn a_recreated_key_is_new() {
        let mut memory = memory(10);
        publish(&mut memory, 1, change(1, "a", Some("1")));
        publish(&mut memory, 2, change(2, "a", None));
        publish(&mut memory, 3, change(3, "a", Some("3")));
        assert_eq!(memory.get("a", 3).unwrap().create_revision, 3);
        assert_eq!(memory.get("a", 2), None);
        assert_eq!(memory.get("a", 1).unwrap().create_revision, 1);
    }
}

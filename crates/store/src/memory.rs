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

use crate::{Change, Entry, Revision, StoreError, disk::Image};

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

/// One value of a key; no value is a deletion.
#[derive(Debug, Clone)]
pub(crate) struct Version {
    pub(crate) create: Revision,
    pub(crate) revision: Revision,
    pub(crate) value: Option<Bytes>,
}

/// Versions of one key, oldest first. Nearly all keys have one.
#[derive(Debug)]
enum Versions {
    One(Version),
    Many(Vec<Version>),
}

impl Versions {
    fn as_slice(&self) -> &[Version] {
        match self {
            Self::One(version) => std::slice::from_ref(version),
            Self::Many(versions) => versions,
        }
    }

    fn newest(&self) -> &Version {
        self.as_slice()
            .last()
            .expect("a key has at least one version")
    }

    fn at(&self, revision: Revision) -> Option<&Version> {
        self.as_slice()
            .iter()
            .rev()
            .find(|version| version.revision <= revision)
    }

    fn push(&mut self, version: Version) {
        match self {
            Self::One(first) => *self = Self::Many(vec![first.clone(), version]),
            Self::Many(versions) => versions.push(version),
        }
    }

    /// Drops what nobody can ask for when `floor` is the oldest readable revision. Returns whether
    /// anything is left.
    fn trim(&mut self, floor: Revision) -> bool {
        if let Self::Many(versions) = self {
            let superseded = versions
                .iter()
                .skip(1)
                .take_while(|v| v.revision <= floor)
                .count();
            versions.drain(..superseded);
            if let [only] = versions.as_slice() {
                *self = Self::One(only.clone());
            }
        }
        !matches!(self, Self::One(only) if only.value.is_none() && only.revision <= floor)
    }
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

/// All that readers see.
#[derive(Debug)]
pub(crate) struct Memory {
    keys: BTreeMap<Arc<str>, Versions>,
    history: VecDeque<(Instant, Arc<Change>)>,
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
        let version = Version {
            create,
            revision,
            value: Some(value),
        };
        self.keys.insert(Arc::from(key), Versions::One(version));
    }

    /// Takes over the past from the file: all changes after `floor`, in order.
    pub(crate) fn restore(&mut self, floor: Revision, past: Vec<Past>) {
        let now = Instant::now();
        let mut versions: HashMap<String, Vec<Version>> = HashMap::new();
        for one in past {
            let of_key =
                versions
                    .entry(one.change.key.clone())
                    .or_insert_with(|| match one.before {
                        None => Vec::new(),
                        Some((create, revision, value)) => vec![Version {
                            create,
                            revision,
                            value: Some(value),
                        }],
                    });
            of_key.push(Version {
                create: one.create,
                revision: one.change.revision,
                value: one.change.value.clone(),
            });
            self.history.push_back((now, Arc::new(one.change)));
        }
        for (key, mut of_key) in versions {
            let versions = match of_key.len() {
                1 => Versions::One(of_key.remove(0)),
                _ => Versions::Many(of_key),
            };
            self.keys.insert(Arc::from(key), versions);
        }
        self.floor = floor;
    }

    /// The newest version of a key as the file has it.
    pub(crate) fn image(&self, key: &str) -> Image {
        let version = self.newest(key)?;
        Some((version.create, version.revision, version.value.clone()?))
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
    pub(crate) fn live(&self) -> impl Iterator<Item = (&str, &Version, &Bytes)> {
        self.keys.iter().filter_map(|(key, versions)| {
            let version = versions.newest();
            version.value.as_ref().map(|value| (&**key, version, value))
        })
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
        entry(key, self.keys.get(key)?.at(at)?)
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
                entries.extend(entry(key, version));
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

    /// Changes after `from` to keys with the prefix, in order.
    pub(crate) fn changes(&self, prefix: &str, from: Revision) -> VecDeque<Arc<Change>> {
        let start = self
            .history
            .partition_point(|(_, change)| change.revision <= from);
        self.history
            .range(start..)
            .filter(|(_, change)| change.key.starts_with(prefix))
            .map(|(_, change)| Arc::clone(change))
            .collect()
    }

    /// Makes the changes of a committed batch visible.
    pub(crate) fn publish(&mut self, revision: Revision, changes: &[Arc<Change>]) {
        let now = Instant::now();
        for change in changes {
            let previous = self.keys.get_mut(change.key.as_str());
            let create = match &previous {
                Some(versions) if versions.newest().value.is_some() => versions.newest().create,
                _ => change.revision,
            };
            let version = Version {
                create,
                revision: change.revision,
                value: change.value.clone(),
            };
            match previous {
                Some(versions) => versions.push(version),
                None => {
                    self.keys
                        .insert(Arc::from(change.key.as_str()), Versions::One(version));
                }
            }
            self.history.push_back((now, Arc::clone(change)));
        }
        self.revision = self.revision.max(revision);
        self.trim(now, changes.len() + TRIM_STEP);
    }

    /// Forgets changes that have left the window, at most about `budget` of them. Returns whether
    /// more could be forgotten.
    pub(crate) fn trim(&mut self, now: Instant, budget: usize) -> bool {
        let mut spent = 0;
        loop {
            let Some((at, change)) = self.history.front() else {
                return false;
            };
            let old = now.saturating_duration_since(*at) > self.window.age;
            if !old && self.history.len() <= self.window.changes {
                return false;
            }
            if spent >= budget {
                return true;
            }
            // A revision leaves as a whole: a watcher could else see half a transaction.
            let floor = change.revision;
            while let Some((_, change)) = self.history.pop_front_if(|(_, c)| c.revision == floor) {
                spent += 1;
                let gone = self
                    .keys
                    .get_mut(change.key.as_str())
                    .is_some_and(|versions| !versions.trim(floor));
                if gone {
                    self.keys.remove(change.key.as_str());
                }
            }
            self.floor = floor;
        }
    }
}

fn entry(key: &str, version: &Version) -> Option<Entry> {
    Some(Entry {
        key: key.to_owned(),
        value: version.value.clone()?,
        create_revision: version.create,
        mod_revision: version.revision,
    })
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
        memory.publish(1, &[change(1, "a", Some("1"))]);
        memory.publish(2, &[change(2, "a", Some("2"))]);
        assert_eq!(memory.get("a", 1).unwrap().value, "1");
        memory.publish(3, &[change(3, "a", Some("3"))]);
        memory.publish(4, &[change(4, "a", Some("4"))]);
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
        memory.publish(1, &[change(1, "a", Some("1"))]);
        memory.publish(2, &[change(2, "a", None)]);
        assert_eq!(memory.len(), 1);
        memory.publish(3, &[change(3, "b", Some("1"))]);
        assert_eq!(memory.len(), 1);
        assert_eq!(memory.get("a", 3), None);
    }

    #[test]
    fn a_recreated_key_is_new() {
        let mut memory = memory(10);
        memory.publish(1, &[change(1, "a", Some("1"))]);
        memory.publish(2, &[change(2, "a", None)]);
        memory.publish(3, &[change(3, "a", Some("3"))]);
        assert_eq!(memory.get("a", 3).unwrap().create_revision, 3);
        assert_eq!(memory.get("a", 2), None);
        assert_eq!(memory.get("a", 1).unwrap().create_revision, 1);
    }
}

//! Who watches what, and how a watcher takes its changes.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::mpsc::{self, error::TrySendError};

use crate::{Change, Revision, StoreError, writer::Shared};

type Queue = mpsc::Sender<Arc<Change>>;

/// What a watcher watches.
#[derive(Debug, Clone)]
pub(crate) enum Scope {
    Prefix(Box<str>),
    Key(Box<str>),
}

impl Scope {
    pub(crate) fn has(&self, key: &str) -> bool {
        match self {
            Self::Prefix(prefix) => key.starts_with(&**prefix),
            Self::Key(own) => key == &**own,
        }
    }
}

/// All watchers, by what they watch.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    groups: Mutex<Groups>,
    dispatched: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct Groups {
    /// Prefixes that end with `/` or are empty: found by cutting the key at each slash.
    by_directory: HashMap<Box<str>, Vec<Queue>>,
    /// Single keys: a change of another one does not wake their watchers.
    by_key: HashMap<Box<str>, Vec<Queue>>,
    /// Others: compared one by one.
    by_text: Vec<(Box<str>, Queue)>,
}

impl Hub {
    pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, Groups> {
        // A panic while a queue is pushed leaves the lists whole.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything up to this revision has been handed to the watchers' queues.
    pub(crate) fn dispatched(&self) -> Revision {
        self.dispatched.load(Ordering::Acquire)
    }

    pub(crate) fn set_dispatched(&self, revision: Revision) {
        self.dispatched.fetch_max(revision, Ordering::AcqRel);
    }
}

impl Groups {
    pub(crate) fn add(&mut self, scope: Scope, capacity: usize) -> mpsc::Receiver<Arc<Change>> {
        let (queue, receiver) = mpsc::channel(capacity);
        let (groups, name) = match scope {
            Scope::Key(key) => (&mut self.by_key, key),
            Scope::Prefix(prefix) if prefix.is_empty() || prefix.ends_with('/') => {
                (&mut self.by_directory, prefix)
            }
            Scope::Prefix(prefix) => {
                self.by_text.retain(|(_, queue)| !queue.is_closed());
                self.by_text.push((prefix, queue));
                return receiver;
            }
        };
        let group = groups.entry(name).or_default();
        group.retain(|queue| !queue.is_closed());
        group.push(queue);
        receiver
    }

    /// Hands the change to every watcher of its key; drops watchers that are gone or full.
    pub(crate) fn dispatch(&mut self, change: &Arc<Change>) {
        let key = change.key.as_str();
        let cuts = key.match_indices('/').map(|(at, _)| &key[..=at]);
        for prefix in std::iter::once("").chain(cuts) {
            hand(&mut self.by_directory, prefix, change);
        }
        hand(&mut self.by_key, key, change);
        self.by_text
            .retain(|(prefix, queue)| !key.starts_with(&**prefix) || send(queue, change));
    }

    pub(crate) fn close(&mut self) {
        self.by_directory.clear();
        self.by_key.clear();
        self.by_text.clear();
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let groups = self.by_directory.values().chain(self.by_key.values());
        groups.map(Vec::len).sum::<usize>() + self.by_text.len()
    }
}

/// Hands the change to the group of a name.
fn hand(groups: &mut HashMap<Box<str>, Vec<Queue>>, name: &str, change: &Arc<Change>) {
    if let Some(group) = groups.get_mut(name) {
        group.retain(|queue| send(queue, change));
        if group.is_empty() {
            groups.remove(name);
        }
    }
}

fn send(queue: &Queue, change: &Arc<Change>) -> bool {
    match queue.try_send(Arc::clone(change)) {
        Ok(()) => true,
        Err(TrySendError::Full(_) | TrySendError::Closed(_)) => false,
    }
}

/// Changes under a prefix, each once and in order.
///
/// Dropping it ends the watch. A watcher that leaves more changes waiting than its queue holds is
/// ended with [`StoreError::Lagged`] after those that were queued, and so is one that goes over the past so slowly
/// that the window leaves it behind.
#[derive(Debug)]
pub struct Watch {
    /// What of the past is still to be read.
    pub(crate) past: Option<Past>,
    pub(crate) replay: VecDeque<Arc<Change>>,
    pub(crate) live: mpsc::Receiver<Arc<Change>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) started: Revision,
    pub(crate) delivered: Revision,
}

/// A part of the past: it is read some changes at a time, so that it never is in memory as a whole for one watcher.
#[derive(Debug)]
pub(crate) struct Past {
    pub(crate) scope: Scope,
    pub(crate) after: Revision,
    pub(crate) until: Revision,
}

/// Changes of the past that are read at a time.
pub(crate) const REPLAY: usize = 128;

impl Watch {
    /// The next change. Cancel-safe.
    ///
    /// # Errors
    /// [`StoreError::Lagged`] if changes were dropped, [`StoreError::Closed`] at the store's end.
    pub async fn next(&mut self) -> Result<Arc<Change>, StoreError> {
        let change = match self.replayed()? {
            Some(change) => change,
            None => match self.live.recv().await {
                Some(change) => change,
                None => return Err(self.ended()),
            },
        };
        self.delivered = change.revision;
        Ok(change)
    }

    /// The next change if one waits. `Ok(None)`: none at the moment.
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub fn try_next(&mut self) -> Result<Option<Arc<Change>>, StoreError> {
        let change = match self.replayed()? {
            Some(change) => change,
            None => match self.live.try_recv() {
                Ok(change) => change,
                Err(mpsc::error::TryRecvError::Empty) => return Ok(None),
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(self.ended()),
            },
        };
        self.delivered = change.revision;
        Ok(Some(change))
    }

    /// The next change of the past.
    fn replayed(&mut self) -> Result<Option<Arc<Change>>, StoreError> {
        while self.replay.is_empty() {
            let Some(past) = &mut self.past else {
                return Ok(None);
            };
            let memory = self.shared.read();
            let Ok(some) = memory.changes(&past.scope, past.after, past.until, REPLAY) else {
                return Err(StoreError::Lagged {
                    delivered: past.after,
                });
            };
            drop(memory);
            self.replay = some.changes;
            match some.after {
                Some(after) => past.after = after,
                None => self.past = None,
            }
        }
        Ok(self.replay.pop_front())
    }

    /// The revision up to which nothing is missing: what a bookmark may promise. Never goes back.
    pub fn progress(&mut self) -> Revision {
        // Read before the queues are looked at: all changes up to it are in a queue by then.
        let dispatched = self.shared.hub.dispatched();
        let replayed = self.past.is_none() && self.replay.is_empty();
        if replayed && self.live.is_empty() && !self.live.is_closed() {
            self.started = self.started.max(dispatched);
        }
        // Changes come in order; another one of the same transaction may still wait.
        self.started = self.started.max(self.delivered.saturating_sub(1));
        self.started
    }

    fn ended(&self) -> StoreError {
        if self.shared.closed.load(Ordering::Acquire) {
            StoreError::Closed
        } else {
            StoreError::Lagged {
                delivered: self.delivered.max(self.started),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(key: &str) -> Arc<Change> {
        Arc::new(Change {
            revision: 1,
            key: key.into(),
            value: None,
            previous: None,
        })
    }

    #[test]
    fn a_change_reaches_exactly_the_prefixes_of_its_key() {
        let mut groups = Groups::default();
        let prefixes = ["", "a/", "a/b/", "a/b", "a/b/c", "b/", "a/bc/", "x"];
        let prefixes = prefixes.map(|prefix| Scope::Prefix(prefix.into()));
        let keys = ["a/b/c", "a/b/", "a/b/cc"].map(|key| Scope::Key(key.into()));
        let mut queues: Vec<_> = (prefixes.into_iter().chain(keys))
            .map(|scope| (scope.clone(), groups.add(scope, 4)))
            .collect();
        groups.dispatch(&change("a/b/c"));
        for (scope, queue) in &mut queues {
            assert_eq!(queue.try_recv().is_ok(), scope.has("a/b/c"), "{scope:?}");
        }
        assert!(Scope::Key("a/b/c".into()).has("a/b/c"));
        assert!(!Scope::Key("a/b/".into()).has("a/b/c"));
    }

    #[test]
    fn full_and_abandoned_watchers_are_dropped() {
        let mut groups = Groups::default();
        let slow = groups.add(Scope::Prefix("a/".into()), 1);
        drop(groups.add(Scope::Key("b/1".into()), 1));
        groups.dispatch(&change("a/1"));
        groups.dispatch(&change("b/1"));
        assert_eq!(groups.len(), 1);
        groups.dispatch(&change("a/2"));
        assert_eq!(groups.len(), 0);
        drop(slow);
    }
}

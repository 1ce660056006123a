//! Who watches what, and how a watcher takes its changes.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::mpsc::{self, error::TrySendError};

use crate::{Change, Revision, StoreError};

type Queue = mpsc::Sender<Arc<Change>>;

/// All watchers, by the prefix they watch.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    groups: Mutex<Groups>,
    dispatched: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct Groups {
    /// Prefixes that end with `/` or are empty: found by cutting the key at each slash.
    by_directory: HashMap<Box<str>, Vec<Queue>>,
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
    pub(crate) fn add(&mut self, prefix: &str, capacity: usize) -> mpsc::Receiver<Arc<Change>> {
        let (queue, receiver) = mpsc::channel(capacity);
        if prefix.is_empty() || prefix.ends_with('/') {
            let group = self.by_directory.entry(prefix.into()).or_default();
            group.retain(|queue| !queue.is_closed());
            group.push(queue);
        } else {
            self.by_text.retain(|(_, queue)| !queue.is_closed());
            self.by_text.push((prefix.into(), queue));
        }
        receiver
    }

    /// Hands the change to every watcher of its key; drops watchers that are gone or full.
    pub(crate) fn dispatch(&mut self, change: &Arc<Change>) {
        let key = change.key.as_str();
        let cuts = key.match_indices('/').map(|(at, _)| &key[..=at]);
        for prefix in std::iter::once("").chain(cuts) {
            if let Some(group) = self.by_directory.get_mut(prefix) {
                group.retain(|queue| send(queue, change));
                if group.is_empty() {
                    self.by_directory.remove(prefix);
                }
            }
        }
        self.by_text
            .retain(|(prefix, queue)| !key.starts_with(&**prefix) || send(queue, change));
    }

    pub(crate) fn close(&mut self) {
        self.by_directory.clear();
        self.by_text.clear();
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.by_directory.values().map(Vec::len).sum::<usize>() + self.by_text.len()
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
/// ended with [`StoreError::Lagged`] after those that were queued.
#[derive(Debug)]
pub struct Watch {
    pub(crate) replay: VecDeque<Arc<Change>>,
    pub(crate) live: mpsc::Receiver<Arc<Change>>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) closed: Arc<std::sync::atomic::AtomicBool>,
    pub(crate) started: Revision,
    pub(crate) delivered: Revision,
}

impl Watch {
    /// The next change. Cancel-safe.
    ///
    /// # Errors
    /// [`StoreError::Lagged`] if changes were dropped, [`StoreError::Closed`] at the store's end.
    pub async fn next(&mut self) -> Result<Arc<Change>, StoreError> {
        let change = match self.replay.pop_front() {
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
        let change = match self.replay.pop_front() {
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

    /// The revision up to which nothing is missing: what a bookmark may promise. Never goes back.
    pub fn progress(&mut self) -> Revision {
        // Read before the queues are looked at: all changes up to it are in a queue by then.
        let dispatched = self.hub.dispatched();
        if self.replay.is_empty() && self.live.is_empty() && !self.live.is_closed() {
            self.started = self.started.max(dispatched);
        }
        // Changes come in order; another one of the same transaction may still wait.
        self.started = self.started.max(self.delivered.saturating_sub(1));
        self.started
    }

    fn ended(&self) -> StoreError {
        if self.closed.load(Ordering::Acquire) {
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
        let mut queues: Vec<_> = prefixes.iter().map(|p| (*p, groups.add(p, 4))).collect();
        groups.dispatch(&change("a/b/c"));
        for (prefix, queue) in &mut queues {
            assert_eq!(
                queue.try_recv().is_ok(),
                "a/b/c".starts_with(*prefix),
                "{prefix:?}"
            );
        }
    }

    #[test]
    fn full_and_abandoned_watchers_are_dropped() {
        let mut groups = Groups::default();
        let slow = groups.add("a/", 1);
        drop(groups.add("b/", 1));
        groups.dispatch(&change("a/1"));
        groups.dispatch(&change("b/1"));
        assert_eq!(groups.len(), 1);
        groups.dispatch(&change("a/2"));
        assert_eq!(groups.len(), 0);
        drop(slow);
    }
}

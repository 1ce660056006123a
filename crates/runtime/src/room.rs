//! Room on the node's disk for the memory of VMs and copies of their disks.
//!
//! The records of the node lie on the same file system. A part of it stays free for them, so that one tenant's
//! memory does not keep the others' records from being stored. Whoever writes much is promised the room for it
//! first, so that those who write at the same time do not all count on the same room.
//!
//! A promise counts until it is dropped, beside what was written of it by then: what others see may be too little
//! meanwhile, and never too much. So nobody is refused for what others have been promised: one waits for them, in
//! the order of coming.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hypernetes_vmm::VmmError;
use tokio::sync::{Mutex as AsyncMutex, Notify};

use crate::{error::RuntimeError, scratch::blocking};

/// What is left to records and logs.
pub(crate) const KEPT: u64 = 64 << 20;

/// What somebody is about to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// What it is, for people.
    pub(crate) what: &'static str,
    /// Bytes without which there is no sense in beginning.
    pub(crate) least: u64,
    /// Bytes that it is sure to fit into.
    pub(crate) most: u64,
}

/// The room of a file system, and what is promised of it.
#[derive(Debug, Clone)]
pub(crate) struct Room(Arc<Ledger>);

#[derive(Debug)]
struct Ledger {
    directory: PathBuf,
    promises: Mutex<Promises>,
    given_back: Notify,
    /// Held by who waits for room: a large need is not passed by small ones for ever.
    turn: AsyncMutex<()>,
    #[cfg(test)]
    gate: crate::testing::Gate,
}

/// Bytes by the number of the promise.
#[derive(Debug, Default)]
struct Promises {
    bytes: BTreeMap<u64, u64>,
    last: u64,
}

impl Promises {
    fn sum(&self) -> u64 {
        self.bytes.values().sum()
    }
}

impl Room {
    /// That of the file system that a directory is on.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self(Arc::new(Ledger {
            directory,
            promises: Mutex::default(),
            given_back: Notify::new(),
            turn: AsyncMutex::default(),
            #[cfg(test)]
            gate: crate::testing::Gate::current(),
        }))
    }

    /// Promises all that is needed, or as much as can be had, if that is enough to begin and nobody else has been
    /// promised any. Otherwise waits until others give theirs back. Dropped, nothing is promised.
    ///
    /// # Errors
    /// [`RuntimeError::NoRoom`] if it would not be enough without the others either.
    pub(crate) async fn promise(&self, need: Need) -> Result<Promise, RuntimeError> {
        let _turn = self.0.turn.lock().await;
        loop {
            let given_back = self.0.given_back.notified();
            let ledger = Arc::clone(&self.0);
            let promised = self.0.look(move || ledger.try_promise(need)).await?;
            match promised? {
                Some(promise) => return Ok(promise),
                None => given_back.await,
            }
        }
    }
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Promises> {
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what looks at the disk where it may block.
    async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, RuntimeError> {
        blocking(format!("find room in {}", self.directory.display()), work).await
    }

    /// Bytes that may be written in all. Blocks. The promises are locked before it is asked, so that what was
    /// written of one that has gone since is not free any more.
    fn usable(&self) -> io::Result<u64> {
        let free = free(&self.directory)?;
        #[cfg(test)]
        let free = self.gate.free(self.directory.parent().unwrap(), free);
        Ok(free.saturating_sub(KEPT))
    }

    fn try_promise(
        self: Arc<Self>,
        need: Need,
    ) -> io::Result<Result<Option<Promise>, RuntimeError>> {
        let mut promises = self.lock();
        let usable = self.usable()?;
        if usable < need.least {
            return Ok(Err(no_room(need.what, need.most, usable)));
        }
        let left = usable.saturating_sub(promises.sum());
        if left < need.most && !promises.bytes.is_empty() {
            return Ok(Ok(None));
        }
        let bytes = need.most.min(left);
        promises.last += 1;
        let number = promises.last;
        promises.bytes.insert(number, bytes);
        drop(promises);
        Ok(Ok(Some(Promise {
            number,
            what: need.what,
            needed: need.most,
            bytes,
            ledger: self,
        })))
    }
}

/// Room that nobody else counts on. Dropped, it is given back: what was written of it is not free any more.
#[derive(Debug)]
pub(crate) struct Promise {
    number: u64,
    what: &'static str,
    needed: u64,
    bytes: u64,
    ledger: Arc<Ledger>,
}

impl Promise {
    /// How many bytes may be written.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Has it be so many bytes from now on, beside what has been written of it.
    ///
    /// # Errors
    /// [`RuntimeError::NoRoom`] if that would be more than there is. It waits for nobody.
    pub(crate) async fn renew(&mut self, bytes: u64) -> Result<(), RuntimeError> {
        let (ledger, number) = (Arc::clone(&self.ledger), self.number);
        let looked = self.ledger.look(move || {
            let mut promises = ledger.lock();
            let usable = ledger.usable()?;
            let sum = promises.sum();
            // None if whoever had it has given up meanwhile.
            let Some(own) = promises.bytes.get_mut(&number) else {
                return Ok(0);
            };
            let left = usable.saturating_sub(sum - *own);
            if left >= bytes {
                *own = bytes;
            }
            Ok(left)
        });
        let left = looked.await?;
        if left < bytes {
            return Err(no_room(self.what, bytes, left));
        }
        self.needed = bytes;
        self.bytes = bytes;
        self.ledger.given_back.notify_one();
        Ok(())
    }

    /// Says how much room there should have been, if that is what a file failed at.
    pub(crate) fn explain(&self, error: RuntimeError) -> RuntimeError {
        // With enough room it was something else, of which the error says more.
        if self.bytes >= self.needed || !is_full(&error) {
            return error;
        }
        no_room(self.what, self.needed, self.bytes)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.ledger.lock().bytes.remove(&self.number);
        self.ledger.given_back.notify_one();
    }
}

fn free(directory: &Path) -> io::Result<u64> {
    let room = rustix::fs::statvfs(directory)?;
    Ok(room.f_bavail.saturating_mul(room.f_frsize))
}

fn no_room(what: &'static str, needed: u64, usable: u64) -> RuntimeError {
    RuntimeError::NoRoom {
        what,
        needed_mib: needed.div_ceil(1 << 20),
        usable_mib: usable >> 20,
    }
}

/// Whether a file could not be written because there was no room.
fn is_full(error: &RuntimeError) -> bool {
    let kind = kind(error);
    let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    is_over(error) || kind.is_some_and(|kind| full.contains(&kind))
}

/// Whether a VM is larger than the limit that it was written with.
pub(crate) fn is_over(error: &RuntimeError) -> bool {
    kind(error) == Some(io::ErrorKind::FileTooLarge)
}

fn kind(error: &RuntimeError) -> Option<io::ErrorKind> {
    match error {
        RuntimeError::Vmm(VmmError::Io { source, .. }) => Some(source.kind()),
        RuntimeError::Storage { source, .. } => {
            let source = source.downcast_ref::<io::Error>();
            source.map(io::Error::kind)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;

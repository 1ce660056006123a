//! A disk in memory that loses what was not synced when its power fails.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use redb::StorageBackend;

/// What a device writes as a whole.
const SECTOR: usize = 512;

/// What was asked of the disk since the last sync, in order.
#[derive(Debug)]
enum Pending {
    Write(usize, Vec<u8>),
    Length(usize),
}

#[derive(Debug, Default)]
struct State {
    synced: Vec<u8>,
    /// As the process sees it: with everything that is pending.
    seen: Vec<u8>,
    pending: Vec<Pending>,
    /// Writes, lengths and syncs so far.
    operations: u64,
    /// The process dies in this operation.
    last: Option<u64>,
    dead: bool,
    /// Operations in which the disk is full.
    full: std::ops::Range<u64>,
}

/// The disk; clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Platter(Arc<Mutex<State>>);

impl Platter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Operations are counted from here on: where the process dies, and where the disk is full.
    pub(super) fn begin(&self, last: Option<u64>, full: std::ops::Range<u64>) {
        let mut state = self.lock();
        (state.operations, state.last, state.full) = (0, last, full);
    }

    /// Whether the process has died.
    pub(super) fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Nothing that comes later is written.
    pub(super) fn die(&self) {
        self.lock().dead = true;
    }

    /// The process has ended; with `power`, so has the machine, and any of what was not synced is lost:
    /// whole writes, or sectors of them.
    pub(super) fn restart(&self, power: bool, mut draw: impl FnMut(u64) -> u64) {
        let mut state = self.lock();
        let state = &mut *state;
        if power {
            let mut image = std::mem::take(&mut state.synced);
            for pending in state.pending.drain(..) {
                match pending {
                    Pending::Length(length) if draw(2) == 0 => image.resize(length, 0),
                    Pending::Length(_) => {}
                    Pending::Write(offset, data) => match draw(3) {
                        0 => {}
                        1 => put(&mut image, offset, &data),
                        _ => {
                            for (index, sector) in data.chunks(SECTOR).enumerate() {
                                if draw(2) == 0 {
                                    put(&mut image, offset + index * SECTOR, sector);
                                }
                            }
                        }
                    },
                }
            }
            state.seen = image;
        }
        state.pending.clear();
        state.synced.clone_from(&state.seen);
        state.dead = false;
        (state.last, state.full) = (None, 0..0);
    }

    fn change(&self, pending: Pending, partly: bool) -> Result<(), io::Error> {
        let mut state = self.lock();
        let last = state.count()?;
        if state.full.contains(&state.operations) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match &pending {
            Pending::Write(offset, data) => {
                // A process that dies in a write may have done half of it.
                let data = if last && partly {
                    &data[..data.len() / 2]
                } else {
                    data
                };
                put(&mut state.seen, *offset, data);
            }
            Pending::Length(length) => state.seen.resize(*length, 0),
        }
        state.pending.push(pending);
        Ok(())
    }
}

impl State {
    /// Whether this operation is the last one.
    fn count(&mut self) -> Result<bool, io::Error> {
        if self.dead {
            return Err(io::Error::other("the process is dead"));
        }
        self.operations += 1;
        self.dead = self.last.is_some_and(|last| self.operations > last);
        Ok(self.dead)
    }
}

fn put(image: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset..end].copy_from_slice(data);
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

impl StorageBackend for Platter {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.lock().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let state = self.lock();
        let from = state.seen.get(index(offset)..index(offset) + out.len());
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<(), io::Error> {
        self.change(Pending::Length(index(length)), false)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut state = self.lock();
        let last = state.count()?;
        if state.full.contains(&state.operations) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if last {
            // Nobody knows what it has done.
            return Err(io::Error::other("the process is dead"));
        }
        let State { synced, seen, .. } = &mut *state;
        synced.clone_from(seen);
        state.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.change(Pending::Write(index(offset), data.to_vec()), true)
    }

    fn close(&self) -> Result<(), io::Error> {
        Ok(())
    }
}

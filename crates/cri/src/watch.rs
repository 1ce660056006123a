//! Watches on directories, by inotify(7).

use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use tokio::io::unix::AsyncFd;

/// What the kubelet does when it changes a volume is a rename; the others are for what is made by
/// hand.
const EVENTS: WatchFlags = WatchFlags::MOVED_TO
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW);
/// Bytes of events that are read at once.
const BUFFER: usize = 4096;

/// Something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// In the directory of this watch.
    In(i32),
    /// The watch has ended: its directory is gone.
    Gone(i32),
    /// More than the kernel remembers.
    Anywhere,
}

/// A set of watches.
#[derive(Debug)]
pub(crate) struct Watches(AsyncFd<OwnedFd>);

impl Watches {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        #[allow(
            deprecated,
            reason = "the replacement is unsafe, which this crate forbids; an OwnedFd keeps what it asks for"
        )]
        let fd = AsyncFd::new(fd)?;
        Ok(Self(fd))
    }

    /// Watches a directory. One that is watched already has the same watch.
    pub(crate) fn add(&self, directory: &Path) -> io::Result<i32> {
        Ok(inotify::add_watch(self.0.get_ref(), directory, EVENTS)?)
    }

    /// Ends a watch, if there still is one.
    pub(crate) fn remove(&self, watch: i32) {
        if let Err(error) = inotify::remove_watch(self.0.get_ref(), watch) {
            // It ends with its directory too.
            tracing::trace!(%error, watch, "a watch had ended");
        }
    }

    /// Waits for changes, and returns so many as one read gives. Cancel-safe.
    pub(crate) async fn changes(&self) -> io::Result<Vec<Change>> {
        loop {
            let mut guard = self.0.readable().await?;
            if let Ok(changes) = guard.try_io(|fd| read(fd.get_ref())) {
                return changes;
            }
        }
    }
}

fn read(fd: &OwnedFd) -> io::Result<Vec<Change>> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut reader = Reader::new(fd, &mut buffer);
    let mut changes = Vec::new();
    loop {
        let event = reader.next()?;
        changes.push(match event.events() {
            flags if flags.contains(ReadFlags::QUEUE_OVERFLOW) => Change::Anywhere,
            flags if flags.contains(ReadFlags::IGNORED) => Change::Gone(event.wd()),
            _ => Change::In(event.wd()),
        });
        // Another read would make the caller wait for as long as there is always more.
        if reader.is_buffer_empty() {
            return Ok(changes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[tokio::test]
    async fn a_switched_link_and_the_directory_s_end_are_seen() {
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("v");
        fs::create_dir(&directory).unwrap();
        let watches = Watches::new().unwrap();
        let watch = watches.add(&directory).unwrap();
        assert_eq!(watches.add(&directory).unwrap(), watch);
        symlink("..v2", directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
        let changes = watches.changes().await.unwrap();
        assert_eq!(changes, [Change::In(watch), Change::In(watch)]);
        fs::remove_dir_all(&directory).unwrap();
        while !watches
            .changes()
            .await
            .unwrap()
            .contains(&Change::Gone(watch))
        {}
        watches.remove(watch);
        assert!(watches.add(&directory).is_err());
        let file = temp.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(watches.add(&file).is_err());
    }
}

//! Room on the node's disk for the memory of a VM.
//!
//! The records of the node lie on the same file system. Pods that are suspended leave a part of it free, so
//! that one tenant's memory does not keep the others' records from being stored.

use std::{io, path::Path};

use hypernetes_vmm::VmmError;

use crate::error::RuntimeError;

/// What is left to records and logs.
const KEPT: u64 = 64 << 20;

/// What a file may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    needed: u64,
    free: u64,
}

impl Room {
    /// Looks what is free where a file of at most `needed` bytes is to be. Blocks.
    pub(crate) fn look(directory: &Path, needed: u64) -> io::Result<Self> {
        let room = rustix::fs::statvfs(directory)?;
        Ok(Self {
            needed,
            free: room.f_bavail.saturating_mul(room.f_frsize),
        })
    }

    /// The bytes that may be written.
    ///
    /// # Errors
    /// `StorageFull` if there are none.
    pub(crate) fn limit(self) -> io::Result<u64> {
        match self.usable() {
            0 => Err(io::ErrorKind::StorageFull.into()),
            usable => Ok(self.needed.min(usable)),
        }
    }

    fn usable(self) -> u64 {
        self.free.saturating_sub(KEPT)
    }

    /// Says how much room there should have been, if that is what a file failed at.
    pub(crate) fn explain(self, error: RuntimeError) -> RuntimeError {
        let kind = match &error {
            RuntimeError::Vmm(VmmError::Io { source, .. }) => source.kind(),
            RuntimeError::Storage { source, .. } => {
                let source = source.downcast_ref::<io::Error>();
                source.map_or(io::ErrorKind::Other, io::Error::kind)
            }
            _ => return error,
        };
        let full = matches!(
            kind,
            // The last is the limit's.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        );
        // With enough room it was something else, of which the error says more.
        if !full || self.usable() >= self.needed {
            return error;
        }
        RuntimeError::NoRoom {
            needed_mib: self.needed.div_ceil(1 << 20),
            usable_mib: self.usable() >> 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(kind: io::ErrorKind) -> RuntimeError {
        let source = kind.into();
        VmmError::Io {
            action: "move",
            path: "/x".into(),
            source,
        }
        .into()
    }

    #[test]
    fn a_part_of_the_disk_stays_free() {
        let room = |free| Room {
            needed: 300 << 20,
            free,
        };
        assert_eq!(room(1 << 40).limit().unwrap(), 300 << 20);
        assert_eq!(room(KEPT + 5).limit().unwrap(), 5);
        for free in [0, 1, KEPT] {
            let error = room(free).limit().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
    }

    #[test]
    fn a_full_disk_is_named_and_other_failures_are_not() {
        let (needed, free) = ((300 << 20) - 1, KEPT + (7 << 20));
        let small = Room { needed, free };
        let text = small.explain(failed(io::ErrorKind::FileTooLarge));
        let text = text.to_string();
        assert!(text.contains("300 MiB") && text.contains("7 MiB"), "{text}");
        let no_room = |room: Room, kind| {
            let error = room.explain(failed(kind));
            matches!(error, RuntimeError::NoRoom { .. })
        };
        assert!(no_room(small, io::ErrorKind::StorageFull));
        assert!(!no_room(small, io::ErrorKind::PermissionDenied));
        let free = 1 << 40;
        assert!(!no_room(Room { needed, free }, io::ErrorKind::FileTooLarge));
    }

    #[test]
    fn a_file_system_is_looked_at() {
        let room = Room::look(Path::new("/"), 1).unwrap();
        assert!(room.free > 0);
        assert!(Room::look(Path::new("/nonexistent"), 1).is_err());
    }
}

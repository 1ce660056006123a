//! How a disk of ours looks to QEMU: a raw node on a passed descriptor, a SCSI disk on top.
//!
//! Slot, descriptor set, SCSI id and the numbers in the two names are all the same, so that one
//! look at a VM tells which disk is which.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::fs::{FileType, OFlags};
use serde_json::{Value, json};

use crate::{Disk, VmmError};

/// The bus of all disks.
pub(crate) const BUS: &str = "scsi0.0";

const NODE: &str = "disk-";

pub(crate) fn node_name(slot: u32) -> String {
    format!("{NODE}{slot}")
}

pub(crate) fn device_id(slot: u32) -> String {
    format!("scsi-{slot}")
}

/// The slot of a block node, if the node is one of ours.
pub(crate) fn slot_of_node(name: &str) -> Option<u32> {
    name.strip_prefix(NODE)?.parse().ok()
}

/// What a disk's descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A block device of the host.
    Device,
}

/// Arguments of `blockdev-add` and value of `-blockdev`.
pub(crate) fn blockdev(slot: u32, read_only: bool, kind: Kind) -> Value {
    json!({
        "driver": "raw",
        "node-name": node_name(slot),
        "read-only": read_only,
        // The host's page cache holds one copy of an image layer for all pods.
        "cache": { "direct": false, "no-flush": false },
        "discard": "unmap",
        "file": {
            "driver": match kind {
                Kind::File => "file",
                Kind::Device => "host_device",
            },
            "filename": format!("/dev/fdset/{slot}"),
            "aio": "threads",
            "discard": "unmap",
            // One writer only: QEMU's lock refuses a disk that another VM writes.
            "locking": if read_only { "off" } else { "on" },
        },
    })
}

/// Arguments of `device_add` and value of `-device`.
pub(crate) fn device(slot: u32) -> Value {
    json!({
        "driver": "scsi-hd",
        "id": device_id(slot),
        "bus": BUS,
        "channel": 0,
        "scsi-id": slot,
        "lun": 0,
        "drive": node_name(slot),
        "serial": format!("hn-{slot}"),
    })
}

/// Checks what can be checked of a disk, and makes its descriptor's access mode fit: QEMU takes a
/// descriptor from a set only if its mode is exactly the one asked for.
pub(crate) fn prepare(disk: Disk) -> Result<(u32, bool, Kind, OwnedFd), VmmError> {
    let spec = |field, rule: String| VmmError::Spec { field, rule };
    if !(1..=254).contains(&disk.slot) {
        return Err(spec(
            "disk.slot",
            format!("must be 1 to 254, not {}", disk.slot),
        ));
    }
    let wanted = if disk.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let mode = rustix::fs::fcntl_getfl(&disk.file)
        .map_err(|e| spec("disk.file", format!("must be open: {e}")))?
        & OFlags::RWMODE;
    let file = if mode == wanted {
        disk.file
    } else if disk.read_only && mode == OFlags::RDWR {
        // Opened again rather than passed as it is: a captured VMM must not get a writable
        // descriptor of a shared layer.
        let path = format!("/proc/self/fd/{}", disk.file.as_raw_fd());
        File::open(path).map_err(|source| VmmError::Io {
            action: "open read-only the disk",
            path: format!("slot {}", disk.slot).into(),
            source,
        })?
    } else {
        return Err(spec(
            "disk.file",
            "must be open for reading and writing".to_owned(),
        ));
    };
    let stat =
        rustix::fs::fstat(&file).map_err(|e| spec("disk.file", format!("must be open: {e}")))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => Kind::Device,
        _ => Kind::File,
    };
    Ok((disk.slot, disk.read_only, kind, file.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_read_only_disk_is_handed_over_read_only() {
        let file = tempfile::tempfile().unwrap();
        let (_, _, kind, fd) = prepare(Disk {
            slot: 3,
            file,
            read_only: true,
        })
        .unwrap();
        assert!(File::from(fd).write(b"x").is_err());
        assert_eq!(kind, Kind::File);
        let device = blockdev(3, false, Kind::Device);
        assert_eq!(device["file"]["driver"], "host_device");
    }

    #[test]
    fn impossible_disks_are_refused() {
        let file = || tempfile::tempfile().unwrap();
        for slot in [0, 255, u32::MAX] {
            assert!(
                prepare(Disk {
                    slot,
                    file: file(),
                    read_only: false
                })
                .is_err()
            );
        }
        let read_only = File::open("/dev/null").unwrap();
        assert!(
            prepare(Disk {
                slot: 1,
                file: read_only,
                read_only: false
            })
            .is_err()
        );
    }

    #[test]
    fn slots_are_read_from_our_nodes_only() {
        assert_eq!(slot_of_node(&node_name(17)), Some(17));
        assert_eq!(slot_of_node("#block123"), None);
        assert_eq!(slot_of_node("disk-x"), None);
    }
}

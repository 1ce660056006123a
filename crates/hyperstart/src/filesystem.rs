//! File systems that outlive the pod: mounted, grown and let go of in the guest, and nowhere else.
//!
//! Mounting replays the journal. One that cannot be mounted is an error that names the volume.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use hypernetes_container::sys;
use nix::mount::{MsFlags, umount};
use rustix::io::Errno;
use tokio::time::{Instant, sleep};

use crate::{
    boot::dir,
    console::log,
    disks,
    error::{Attempt, GuestError},
    ownership, sandbox,
};

/// Without device nodes: one that another pod has made in it would open the disks of this VM, as no
/// cgroup of devices stands before them. Programs with the set-user-ID bit run as anywhere. After an
/// error nothing more is written. What is deleted becomes a hole in the node's file, and what is a hole
/// needs no zeros.
const FLAGS: MsFlags = MsFlags::MS_NODEV;
const OPTIONS: &str = "errors=remount-ro,discard,noinit_itable";
/// How long processes that were killed may keep a file system busy.
const BUSY: Duration = Duration::from_secs(5);

/// Where the file system on a disk is mounted: once, however many volumes it is.
pub(crate) fn place(slot: u32) -> PathBuf {
    Path::new(dir::PERSISTENT).join(slot.to_string())
}

fn is_mounted(slot: u32) -> bool {
    sandbox::is_mounted(&place(slot).to_string_lossy())
}

/// A file system that a new volume is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    pub(crate) volume: String,
    pub(crate) slot: u32,
    pub(crate) read_only: bool,
    pub(crate) keep_matching_root: bool,
}

impl FileSystem {
    /// Mounts it, lets it fill its disk, and gives what is in it to a group. Idempotent.
    pub(crate) async fn mount(
        &self,
        gid: Option<u32>,
        leaving: &Arc<AtomicBool>,
    ) -> Result<(), GuestError> {
        let device = disks::find(self.slot).await?;
        let target = place(self.slot);
        if !is_mounted(self.slot) {
            let (flags, options) = match self.read_only {
                true => (FLAGS | MsFlags::MS_RDONLY, None),
                false => (FLAGS, Some(OPTIONS)),
            };
            disks::mount_disk(device.clone(), target.clone(), "ext4", flags, options)
                .await
                .map_err(|error| self.explain(error))?;
        }
        if self.read_only {
            return Ok(());
        }
        let name = &self.volume;
        let grown = target.clone();
        disks::blocking(move || fill_disk(&device, &grown))
            .await
            .attempt(format!("grow the file system of volume {name}"))?;
        let Some(gid) = gid else { return Ok(()) };
        let (leaving, keep) = (Arc::clone(leaving), self.keep_matching_root);
        disks::blocking(move || ownership::give_to_group(&target, gid, keep, &leaving))
            .await
            .attempt(format!("give volume {name} to group {gid}"))
    }

    fn explain(&self, error: GuestError) -> GuestError {
        let name = &self.volume;
        match error {
            GuestError::Io { source, .. } => {
                let code = source.raw_os_error();
                if self.read_only && code == Some(Errno::ROFS.raw_os_error()) {
                    return GuestError::Precondition(format!(
                        "volume {name} was not unmounted: a pod that can write must have it before it can be read only"
                    ));
                }
                GuestError::Io {
                    what: format!("mount volume {name} as ext4"),
                    source,
                }
            }
            other => other,
        }
    }
}

/// Waits for a disk to have its new size, and grows the file system on it if it is mounted.
pub(crate) async fn grow_disk(slot: u32, bytes: u64) -> Result<(), GuestError> {
    if !disks::SLOTS.contains(&slot) {
        return Err(GuestError::Invalid(format!("there is no slot {slot}")));
    }
    let device = disks::await_size(slot, bytes).await?;
    if !is_mounted(slot) {
        return Ok(());
    }
    let target = place(slot);
    disks::blocking(move || fill_disk(&device, &target))
        .await
        .attempt(format!("grow the file system in slot {slot}"))
}

/// Makes a mounted file system as large as its disk.
fn fill_disk(device: &Path, target: &Path) -> io::Result<()> {
    let mut disk = File::open(device)?;
    let bytes = disk.seek(SeekFrom::End(0))?;
    let mut superblock = [0; 1024];
    disk.read_exact_at(&mut superblock, 1024)?;
    let (blocks, block) = size(&superblock)?;
    let wanted = bytes / block;
    if wanted <= blocks {
        return Ok(());
    }
    sys::resize_ext4(File::open(target)?.as_fd(), wanted)
}

/// Blocks of an ext4 file system, and bytes of a block, by its superblock.
fn size(superblock: &[u8; 1024]) -> io::Result<(u64, u64)> {
    const MAGIC: u32 = 0xef53;
    const FEATURE_64BIT: u32 = 0x80;
    let word = |at: usize| {
        let bytes = [0, 1, 2, 3].map(|byte| superblock[at + byte]);
        u32::from_le_bytes(bytes)
    };
    let (low, log_block, magic) = (word(4), word(24), word(56) & 0xffff);
    let high = match word(96) & FEATURE_64BIT {
        0 => 0,
        _ => word(336),
    };
    if magic != MAGIC || log_block > 6 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((u64::from(high) << 32 | u64::from(low), 1024 << log_block))
}

/// Lets go of all of them, so that what was written is on the disks and no journal is left to replay.
pub(crate) async fn unmount_all() {
    let slots = fs::read_dir(dir::PERSISTENT)
        .into_iter()
        .flatten()
        .flatten();
    let slots = slots.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for slot in slots.filter(|slot| is_mounted(*slot)).collect::<Vec<_>>() {
        if let Err(error) = unmount(slot).await {
            log!("cannot unmount the volume in slot {slot}: {error}");
        }
    }
}

async fn unmount(slot: u32) -> io::Result<()> {
    let target = place(slot);
    let synced = target.clone();
    // Whatever becomes of the rest: what was written stays.
    disks::blocking(move || Ok(rustix::fs::syncfs(File::open(synced)?)?)).await?;
    let deadline = Instant::now() + BUSY;
    loop {
        let path = target.clone();
        match disks::blocking(move || umount(&path).map_err(io::Error::from)).await {
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
                    && Instant::now() < deadline =>
            {
                sleep(Duration::from_millis(20)).await;
            }
            result => {
                result?;
                break;
            }
        }
    }
    // A container's mount namespace may go a moment after its last process.
    if let Ok(device) = disks::find(slot).await {
        disks::wait_unused(&device).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_tells_its_size() {
        let mut bytes = [0; 1024];
        assert!(size(&bytes).is_err(), "no ext4");
        bytes[4..8].copy_from_slice(&5000u32.to_le_bytes());
        bytes[24] = 2;
        bytes[56..58].copy_from_slice(&[0x53, 0xef]);
        bytes[336] = 1;
        assert_eq!(size(&bytes).unwrap(), (5000, 4096));
        bytes[96] = 0x80;
        assert_eq!(size(&bytes).unwrap(), ((1 << 32) + 5000, 4096));
        bytes[24] = 40;
        assert!(size(&bytes).is_err(), "no such block");
    }
}

//! Disks by their place on the SCSI bus, and the image layers on them.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::mount::{MsFlags, mount, umount};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};

use crate::{
    boot::dir,
    console::log,
    error::{Attempt, GuestError},
};

/// SCSI ids of one bus.
pub(crate) const SLOTS: std::ops::RangeInclusive<u32> = 1..=254;
/// How long a plugged disk may take to appear and become ready.
const APPEAR: Duration = Duration::from_secs(10);
/// When to ask the bus again, if the kernel has missed the event.
const RESCAN: Duration = Duration::from_millis(500);
/// How long a detached file system may keep its disk.
const RELEASE: Duration = Duration::from_secs(5);

/// Device node of the disk in a slot, once it is ready.
pub(crate) async fn find(slot: u32) -> Result<PathBuf, GuestError> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    let mut rescan_at = start + RESCAN;
    loop {
        if let Some(device) = look(slot) {
            // The node is there before the disk is: open fails with ENXIO, or the size is zero.
            if is_ready(&device) {
                return Ok(device);
            }
        }
        let now = Instant::now();
        if now > start + APPEAR {
            return Err(GuestError::NoDisk {
                slot,
                seconds: APPEAR.as_secs(),
            });
        }
        if now > rescan_at {
            rescan_at = now + RESCAN * 4;
            rescan();
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn look(slot: u32) -> Option<PathBuf> {
    let address = format!(":0:{slot}:0");
    for entry in fs::read_dir("/sys/class/scsi_device").ok()?.flatten() {
        if entry.file_name().to_string_lossy().ends_with(&address) {
            let block = fs::read_dir(entry.path().join("device/block"))
                .ok()?
                .flatten()
                .next()?;
            return Some(Path::new("/dev").join(block.file_name()));
        }
    }
    None
}

/// Asks the disk in a slot for its size until that is as large as told, and returns its device node.
pub(crate) async fn await_size(slot: u32, bytes: u64) -> Result<PathBuf, GuestError> {
    let device = find(slot).await?;
    let name = device.file_name().unwrap_or_default();
    let block = Path::new("/sys/class/block").join(name);
    let deadline = Instant::now() + APPEAR;
    loop {
        let asked = block.clone();
        // The kernel may have heard of it by itself; it does no harm to ask.
        let has = blocking(move || {
            fs::write(asked.join("device/rescan"), "1")?;
            fs::read_to_string(asked.join("size"))
        });
        let sectors = has
            .await
            .attempt(format!("look at the disk in slot {slot}"))?;
        let sectors: u64 = sectors.trim().parse().unwrap_or(0);
        if sectors.saturating_mul(512) >= bytes {
            return Ok(device);
        }
        if Instant::now() > deadline {
            return Err(GuestError::Internal(format!(
                "the disk in slot {slot} has {sectors} sectors, not {bytes} bytes"
            )));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

fn is_ready(device: &Path) -> bool {
    let Some(name) = device.file_name() else {
        return false;
    };
    let size = fs::read_to_string(Path::new("/sys/class/block").join(name).join("size"));
    size.is_ok_and(|size| size.trim() != "0") && fs::File::open(device).is_ok()
}

fn rescan() {
    for entry in fs::read_dir("/sys/class/scsi_host")
        .into_iter()
        .flatten()
        .flatten()
    {
        if let Err(error) = fs::write(entry.path().join("scan"), "- - -") {
            log!("cannot rescan {}: {error}", entry.path().display());
        }
    }
}

/// Options of an ext4 on a disk that is a sparse file of the node: what is deleted becomes a hole in it, and what is a
/// hole needs no zeros (a thread of the kernel would write 160 MiB of them to a disk of 10 GiB). Bitmaps of which most
/// say that all is free are made when they are asked for, not all of them at the mount.
pub(crate) const SPARSE: &str = "discard,noinit_itable,no_prefetch_block_bitmaps";

/// Mounts a disk's file system, away from the event loop.
pub(crate) async fn mount_disk(
    device: PathBuf,
    target: PathBuf,
    kind: &'static str,
    flags: MsFlags,
    options: Option<&'static str>,
) -> Result<(), GuestError> {
    let what = format!(
        "mount {} as {kind} on {}",
        device.display(),
        target.display()
    );
    let deadline = Instant::now() + APPEAR;
    loop {
        let (device, target) = (device.clone(), target.clone());
        let mounted = blocking(move || {
            fs::create_dir_all(&target)?;
            mount(Some(&device), &target, Some(kind), flags, options).map_err(io::Error::from)
        })
        .await;
        match mounted {
            Err(error)
                if error.raw_os_error() == Some(Errno::NXIO.raw_os_error())
                    && Instant::now() < deadline =>
            {
                sleep(Duration::from_millis(20)).await;
            }
            result => return result.attempt(what),
        }
    }
}

/// Runs something that may wait for a disk on another thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

#[derive(Debug)]
struct Layer {
    users: u32,
    device: PathBuf,
}

/// Image layers that are mounted, with the number of containers that use each.
#[derive(Debug, Default)]
pub(crate) struct Layers(Mutex<HashMap<u32, Layer>>);

/// Name of a layer's directory below [`dir::LAYERS`].
pub(crate) fn layer_name(slot: u32) -> String {
    slot.to_string()
}

fn layer_path(slot: u32) -> PathBuf {
    Path::new(dir::LAYERS).join(layer_name(slot))
}

impl Layers {
    /// Mounts the layers in these slots, or none of them.
    pub(crate) async fn acquire(&self, slots: &[u32]) -> Result<(), GuestError> {
        let mut acquired = Vec::new();
        for slot in slots {
            match self.acquire_one(*slot).await {
                Ok(()) => acquired.push(*slot),
                Err(error) => {
                    self.release(&acquired).await;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn acquire_one(&self, slot: u32) -> Result<(), GuestError> {
        let mut layers = self.0.lock().await;
        if let Some(layer) = layers.get_mut(&slot) {
            layer.users += 1;
            return Ok(());
        }
        let device = find(slot).await?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
        mount_disk(device.clone(), layer_path(slot), "erofs", flags, None).await?;
        layers.insert(slot, Layer { users: 1, device });
        Ok(())
    }

    /// Gives layers back. Returns the slots whose disks nobody uses any more.
    pub(crate) async fn release(&self, slots: &[u32]) -> Vec<u32> {
        let mut layers = self.0.lock().await;
        let mut released = Vec::new();
        for slot in slots {
            let Some(layer) = layers.get_mut(slot) else {
                continue;
            };
            layer.users -= 1;
            if layer.users > 0 {
                continue;
            }
            let device = layer.device.clone();
            layers.remove(slot);
            let path = layer_path(*slot);
            if let Err(error) = blocking(move || umount(&path).map_err(io::Error::from)).await {
                log!("cannot unmount the layer in slot {slot}: {error}");
                continue;
            }
            wait_unused(&device).await;
            released.push(*slot);
        }
        released
    }
}

/// Waits until no mount holds a disk. A container's mount namespace, which has a copy of each
/// mount while it is being made, may end a moment after its last process.
pub(crate) async fn wait_unused(device: &Path) {
    let deadline = Instant::now() + RELEASE;
    loop {
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        match openat(CWD, device, flags, Mode::empty()) {
            Err(Errno::BUSY) if Instant::now() < deadline => sleep(Duration::from_millis(5)).await,
            Err(Errno::BUSY) => {
                log!("{} is still in use", device.display());
                return;
            }
            _ => return,
        }
    }
}

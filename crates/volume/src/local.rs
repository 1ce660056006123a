//! Volumes as sparse files of this machine.
//!
//! ```text
//! DIR/<volume>/volume.json   size, mode, and who has it; replaced whole
//! DIR/<volume>/disk          the bytes
//! DIR/.new-<volume>/         being made: gone at the next start
//! DIR/.old-<volume>/         being removed: gone at the next start
//! ```
//! A volume is there exactly if its directory has its plain name: it is made and removed by one
//! rename. A file system is made by this machine's mkfs in a file that no guest has seen; after that
//! the file is opened for VMMs only, and never read here.

mod files;
mod format;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;

use crate::{
    BlockDevice, Capacity, GRANULE, VolumeDriver, VolumeError, VolumeId, VolumeInfo, VolumeMode,
    error::Attempt,
};
use files::{Attachment, Files, Record};

/// Largest volume: ext4 on the node ends here.
const MOST: u64 = 16 << 40;

/// Parts and limits of [`LocalVolumes`].
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// Where the volumes are. Belongs to the driver alone.
    pub dir: PathBuf,
    /// Most that is promised in all. `None`: what is free when the driver is opened, and what volumes
    /// have of the disk already.
    pub limit_bytes: Option<u64>,
    /// Program that makes file systems.
    pub mkfs: PathBuf,
}

/// [`VolumeDriver`] on files. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LocalVolumes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: Files,
    total: u64,
    /// Held by whoever changes something, over all of it.
    turn: Mutex<()>,
    /// As on disk.
    records: Mutex<BTreeMap<VolumeId, Record>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LocalVolumes {
    /// Opens the volumes in a directory, which is made if it is not there. What an earlier process left
    /// half made or half removed goes.
    ///
    /// # Errors
    /// If the directory cannot be used, or has a volume that cannot be read.
    pub async fn open(
        dir: impl Into<PathBuf>,
        limit_bytes: Option<u64>,
    ) -> Result<Self, VolumeError> {
        Self::open_with(LocalConfig {
            dir: dir.into(),
            limit_bytes,
            mkfs: "mkfs.ext4".into(),
        })
        .await
    }

    /// [`LocalVolumes::open`] with all there is to be set.
    ///
    /// # Errors
    /// The same.
    pub async fn open_with(config: LocalConfig) -> Result<Self, VolumeError> {
        blocking(move || {
            let files = Files {
                dir: config.dir,
                mkfs: config.mkfs,
            };
            let records = files.recover()?;
            let total = match config.limit_bytes {
                Some(limit) => limit,
                None => files.free()?.saturating_add(files.used(records.keys())?),
            };
            Ok(Self(Arc::new(Inner {
                files,
                total,
                turn: Mutex::default(),
                records: Mutex::new(records),
            })))
        })
        .await
    }

    /// Does a change to its end, also if nobody waits for it any more.
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let inner = Arc::clone(&self.0);
        blocking(move || {
            let _turn = lock(&inner.turn);
            work(&inner)
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(std::io::Error::other(error)).attempt(|| "work on volumes".to_owned()),
    }
}

/// The size that a volume gets.
fn rounded(bytes: u64) -> Result<u64, VolumeError> {
    match bytes {
        1..=MOST => Ok(bytes.next_multiple_of(GRANULE)),
        _ => Err(VolumeError::Invalid {
            field: "size",
            rule: format!("must be 1 to {MOST} bytes, not {bytes}"),
        }),
    }
}

impl Inner {
    fn find(&self, id: &VolumeId) -> Result<Record, VolumeError> {
        let found = lock(&self.records).get(id).cloned();
        found.ok_or_else(|| VolumeError::NotFound { id: id.clone() })
    }

    fn capacity(&self) -> Capacity {
        let records = lock(&self.records);
        Capacity {
            total: self.total,
            allocated: records.values().map(|record| record.bytes).sum(),
        }
    }

    fn check_room(&self, bytes: u64) -> Result<(), VolumeError> {
        let free = self.capacity().free();
        match bytes <= free {
            true => Ok(()),
            false => Err(VolumeError::NoSpace { bytes, free }),
        }
    }

    /// On disk first.
    fn put(&self, id: &VolumeId, record: Record) -> Result<(), VolumeError> {
        self.files.write_record(id, &record)?;
        lock(&self.records).insert(id.clone(), record);
        Ok(())
    }

    fn create(
        &self,
        id: &VolumeId,
        bytes: u64,
        mode: VolumeMode,
    ) -> Result<VolumeInfo, VolumeError> {
        let bytes = rounded(bytes)?;
        if let Some(record) = lock(&self.records).get(id) {
            if (record.bytes, record.mode) == (bytes, mode) {
                return Ok(record.info(id));
            }
            return Err(VolumeError::Conflict {
                id: id.clone(),
                bytes: record.bytes,
                mode: record.mode,
            });
        }
        self.check_room(bytes)?;
        let record = Record::new(bytes, mode);
        self.files.create(id, &record)?;
        let info = record.info(id);
        lock(&self.records).insert(id.clone(), record);
        Ok(info)
    }

    fn delete(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let attached = match lock(&self.records).get(id) {
            Some(record) => record.pods(),
            None => return Ok(()),
        };
        if !attached.is_empty() {
            return Err(VolumeError::InUse {
                id: id.clone(),
                by: attached,
            });
        }
        self.files.retire(id)?;
        lock(&self.records).remove(id);
        // It is gone; what is left of it is cleared away now or at the next start.
        if let Err(error) = self.files.clear_retired(id) {
            tracing::warn!(volume = %id, %error, "cannot clear away a deleted volume yet");
        }
        Ok(())
    }

    fn expand(&self, id: &VolumeId, bytes: u64) -> Result<VolumeInfo, VolumeError> {
        let bytes = rounded(bytes)?;
        let mut record = self.find(id)?;
        if bytes <= record.bytes {
            return Ok(record.info(id));
        }
        self.check_room(bytes - record.bytes)?;
        // The file first: no record promises what is not there.
        self.files.extend(id, bytes)?;
        record.bytes = bytes;
        self.put(id, record.clone())?;
        Ok(record.info(id))
    }

    fn attach(
        &self,
        id: &VolumeId,
        pod: &str,
        read_only: bool,
    ) -> Result<BlockDevice, VolumeError> {
        let mut record = self.find(id)?;
        let own = record.attached.iter().position(|one| one.pod == pod);
        let others = || record.attached.iter().filter(|one| one.pod != pod);
        if others().any(|other| !read_only || !other.read_only) {
            return Err(VolumeError::InUse {
                id: id.clone(),
                by: others().map(|other| other.pod.clone()).collect(),
            });
        }
        let changed = match own.map(|at| &mut record.attached[at]) {
            // A writer's VM may write until it is detached.
            Some(known) => {
                let becomes_writer = known.read_only && !read_only;
                known.read_only &= read_only;
                becomes_writer
            }
            None => {
                record.attached.push(Attachment {
                    pod: pod.to_owned(),
                    read_only,
                });
                true
            }
        };
        // Before anything is written down: a volume that cannot be opened is nobody's.
        let file = self.files.open_disk(id, record.bytes, read_only)?;
        let bytes = record.bytes;
        if changed {
            self.put(id, record)?;
        }
        Ok(BlockDevice {
            file,
            bytes,
            read_only,
        })
    }

    fn detach(&self, id: &VolumeId, pod: &str) -> Result<(), VolumeError> {
        let Some(mut record) = lock(&self.records).get(id).cloned() else {
            return Ok(());
        };
        let before = record.attached.len();
        record.attached.retain(|one| one.pod != pod);
        if record.attached.len() == before {
            return Ok(());
        }
        self.put(id, record)
    }
}

#[async_trait]
impl VolumeDriver for LocalVolumes {
    async fn create(
        &self,
        id: &VolumeId,
        bytes: u64,
        mode: VolumeMode,
    ) -> Result<VolumeInfo, VolumeError> {
        let id = id.clone();
        self.change(move |inner| inner.create(&id, bytes, mode))
            .await
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let id = id.clone();
        self.change(move |inner| inner.delete(&id)).await
    }

    async fn expand(&self, id: &VolumeId, bytes: u64) -> Result<VolumeInfo, VolumeError> {
        let id = id.clone();
        self.change(move |inner| inner.expand(&id, bytes)).await
    }

    async fn get(&self, id: &VolumeId) -> Result<Option<VolumeInfo>, VolumeError> {
        let records = lock(&self.0.records);
        Ok(records.get(id).map(|record| record.info(id)))
    }

    async fn list(&self) -> Result<Vec<VolumeInfo>, VolumeError> {
        let records = lock(&self.0.records);
        Ok(records.iter().map(|(id, record)| record.info(id)).collect())
    }

    async fn attach(
        &self,
        id: &VolumeId,
        pod: &str,
        read_only: bool,
    ) -> Result<BlockDevice, VolumeError> {
        let (id, pod) = (id.clone(), pod.to_owned());
        self.change(move |inner| inner.attach(&id, &pod, read_only))
            .await
    }

    async fn detach(&self, id: &VolumeId, pod: &str) -> Result<(), VolumeError> {
        let (id, pod) = (id.clone(), pod.to_owned());
        self.change(move |inner| inner.detach(&id, &pod)).await
    }

    async fn capacity(&self) -> Result<Capacity, VolumeError> {
        Ok(self.0.capacity())
    }
}

//! What is on disk of local volumes, and the order in which it gets there.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::format;
use crate::{VolumeError, VolumeId, VolumeInfo, VolumeMode, error::Attempt};

const RECORD: &str = "volume.json";
const NEW_RECORD: &str = ".volume.json.new";
const DISK: &str = "disk";
/// No volume's name begins with a dot.
const NEW: &str = ".new-";
const OLD: &str = ".old-";
/// Of the record. Raised when an older driver could misread a newer one.
const VERSION: u32 = 1;

/// A volume's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) bytes: u64,
    pub(super) mode: VolumeMode,
    pub(super) attached: Vec<Attachment>,
}

/// Who has a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attachment {
    pub(super) pod: String,
    pub(super) read_only: bool,
}

impl Record {
    pub(super) fn new(bytes: u64, mode: VolumeMode) -> Self {
        Self {
            version: VERSION,
            bytes,
            mode,
            attached: Vec::new(),
        }
    }

    pub(super) fn pods(&self) -> Vec<String> {
        self.attached.iter().map(|one| one.pod.clone()).collect()
    }

    pub(super) fn info(&self, id: &VolumeId) -> VolumeInfo {
        VolumeInfo {
            id: id.clone(),
            bytes: self.bytes,
            mode: self.mode,
            attached_to: self.pods(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Files {
    pub(super) dir: PathBuf,
    pub(super) mkfs: PathBuf,
}

impl Files {
    fn place(&self, id: &VolumeId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    fn aside(&self, prefix: &str, id: &VolumeId) -> PathBuf {
        self.dir.join(format!("{prefix}{id}"))
    }

    /// Clears away what was cut short, and reads what is there.
    pub(super) fn recover(&self) -> Result<BTreeMap<VolumeId, Record>, VolumeError> {
        let dir = self.dir.display();
        make_directory(&self.dir).attempt(|| format!("make {dir}"))?;
        let mut records = BTreeMap::new();
        let entries = fs::read_dir(&self.dir).attempt(|| format!("list {dir}"))?;
        for entry in entries {
            let path = entry.attempt(|| format!("list {dir}"))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(NEW) || name.starts_with(OLD) {
                remove(&path).attempt(|| format!("clear away {}", path.display()))?;
            } else if let Ok(id) = name.parse::<VolumeId>() {
                let record = read_record(&path.join(RECORD))
                    .attempt(|| format!("read the record of volume {id}"))?;
                records.insert(id, record);
            }
        }
        Ok(records)
    }

    /// Bytes that the file system could take still.
    pub(super) fn free(&self) -> Result<u64, VolumeError> {
        let room = rustix::fs::statvfs(&self.dir)
            .attempt(|| format!("ask for the room in {}", self.dir.display()))?;
        Ok(room.f_bavail.saturating_mul(room.f_frsize))
    }

    /// Bytes of the file system that these volumes have.
    pub(super) fn used<'a>(
        &self,
        ids: impl Iterator<Item = &'a VolumeId>,
    ) -> Result<u64, VolumeError> {
        let mut used = 0;
        for id in ids {
            let disk = fs::metadata(self.place(id).join(DISK))
                .attempt(|| format!("find the disk of volume {id}"))?;
            used += disk.blocks() * 512;
        }
        Ok(used)
    }

    /// Makes a volume beside its place, and puts it there by one rename.
    pub(super) fn create(&self, id: &VolumeId, record: &Record) -> Result<(), VolumeError> {
        let fresh = self.aside(NEW, id);
        let made = self.fill(&fresh, id, record);
        if made.is_err() {
            // The first error tells; what stays is cleared away at the next start.
            drop(remove(&fresh));
        }
        made
    }

    fn fill(&self, fresh: &Path, id: &VolumeId, record: &Record) -> Result<(), VolumeError> {
        let failed = || format!("make volume {id}");
        remove(fresh).attempt(failed)?;
        make_directory(fresh).attempt(failed)?;
        let path = fresh.join(DISK);
        let disk = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .attempt(failed)?;
        disk.set_len(record.bytes).attempt(failed)?;
        if record.mode == VolumeMode::Filesystem {
            format::make_ext4(&self.mkfs, &path, record.bytes)
                .attempt(|| format!("format volume {id}"))?;
        }
        disk.sync_all().attempt(failed)?;
        write_record(fresh, record).attempt(failed)?;
        fs::rename(fresh, self.place(id)).attempt(failed)?;
        sync_directory(&self.dir).attempt(failed)
    }

    /// Takes a volume out of its place.
    pub(super) fn retire(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let failed = || format!("delete volume {id}");
        let old = self.aside(OLD, id);
        remove(&old).attempt(failed)?;
        fs::rename(self.place(id), &old).attempt(failed)?;
        sync_directory(&self.dir).attempt(failed)
    }

    pub(super) fn clear_retired(&self, id: &VolumeId) -> io::Result<()> {
        remove(&self.aside(OLD, id))
    }

    /// Makes a volume's file larger.
    pub(super) fn extend(&self, id: &VolumeId, bytes: u64) -> Result<(), VolumeError> {
        let failed = || format!("expand volume {id}");
        let disk = OpenOptions::new()
            .write(true)
            .open(self.place(id).join(DISK))
            .attempt(failed)?;
        // One that was cut short may have been larger already.
        let had = disk.metadata().attempt(failed)?.len();
        disk.set_len(had.max(bytes)).attempt(failed)?;
        disk.sync_all().attempt(failed)
    }

    pub(super) fn open_disk(
        &self,
        id: &VolumeId,
        bytes: u64,
        read_only: bool,
    ) -> Result<File, VolumeError> {
        let failed = || format!("open volume {id}");
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(self.place(id).join(DISK))
            .attempt(failed)?;
        let length = file.metadata().attempt(failed)?.len();
        if length < bytes {
            let lost = format!("its disk has {length} bytes of {bytes}");
            return Err(io::Error::other(lost)).attempt(failed);
        }
        Ok(file)
    }

    pub(super) fn write_record(&self, id: &VolumeId, record: &Record) -> Result<(), VolumeError> {
        write_record(&self.place(id), record).attempt(|| format!("store the record of volume {id}"))
    }
}

fn read_record(path: &Path) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(path)?)?;
    if record.version != VERSION {
        let version = record.version;
        return Err(io::Error::other(format!(
            "its version must be {VERSION}, not {version}: made by another release"
        )));
    }
    Ok(record)
}

/// All of it or what was there before.
fn write_record(directory: &Path, record: &Record) -> io::Result<()> {
    let fresh = directory.join(NEW_RECORD);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs::rename(fresh, directory.join(RECORD))?;
    sync_directory(directory)
}

fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

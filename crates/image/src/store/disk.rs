//! Files that are whole or not there.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::parent;
use crate::ImageError;

/// For `map_err`: what was attempted on which path.
pub(super) fn failed(action: &str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let action = format!("{action} {}", path.display());
    move |source| ImageError::Io {
        action: action.clone(),
        source,
    }
}

/// A file of ours that does not parse.
pub(super) fn broken(path: &Path, error: &serde_json::Error) -> ImageError {
    let source = io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    ImageError::Io {
        action: format!("read {}", path.display()),
        source,
    }
}

/// A file that is being written: removed unless it is kept.
///
/// Its lock tells other processes that someone is still at it.
#[derive(Debug)]
pub(super) struct Temp {
    pub(super) file: File,
    path: PathBuf,
    kept: bool,
}

impl Temp {
    pub(super) fn create(tmp: &Path) -> Result<Self, ImageError> {
        let path = tmp.join(uuid::Uuid::new_v4().simple().to_string());
        let open = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            file.lock()?;
            Ok(file)
        };
        let file = open().map_err(failed("create", &path))?;
        Ok(Self {
            file,
            path,
            kept: false,
        })
    }

    /// Where it is meanwhile.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the content durable, read-only, and moves it to its name.
    pub(super) fn keep(mut self, target: &Path) -> Result<(), ImageError> {
        let sync = || {
            let mut permissions = self.file.metadata()?.permissions();
            permissions.set_readonly(true);
            self.file.set_permissions(permissions)?;
            self.file.sync_all()?;
            fs::rename(&self.path, target)?;
            File::open(parent(target))?.sync_all()
        };
        sync().map_err(failed("write", target))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "a temporary file stays until the next start");
        }
    }
}

/// Writes a small file in one step.
pub(super) fn write(tmp: &Path, target: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let mut temp = Temp::create(tmp)?;
    temp.file
        .write_all(bytes)
        .map_err(failed("write", target))?;
    temp.keep(target)
}

/// Waits for a lock file; it is held until the file is dropped.
pub(super) fn lock(path: &Path) -> Result<File, ImageError> {
    let file = open_lock(path)?;
    file.lock().map_err(failed("lock", path))?;
    Ok(file)
}

/// Waits for a share of a lock.
pub(super) fn lock_shared(path: &Path) -> Result<File, ImageError> {
    let file = open_lock(path)?;
    file.lock_shared().map_err(failed("lock", path))?;
    Ok(file)
}

/// Takes a lock if nobody has it or a share of it.
pub(super) fn try_lock(path: &Path) -> Result<Option<File>, ImageError> {
    let file = open_lock(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(source)) => Err(failed("lock", path)(source)),
    }
}

fn open_lock(path: &Path) -> Result<File, ImageError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(failed("open", path))
}

/// Names in a directory of ours.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, ImageError> {
    let list = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    };
    list().map_err(failed("list", dir))
}

/// Removes a file that may be gone.
pub(super) fn remove(path: &Path) -> Result<bool, ImageError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(failed("remove", path)(e)),
    }
}

/// Removes temporary files that nobody is writing.
pub(super) fn clean_tmp(tmp: &Path) -> Result<(), ImageError> {
    for name in names(tmp)? {
        let path = tmp.join(name);
        let Ok(file) = File::open(&path) else {
            continue;
        };
        if file.try_lock().is_ok() {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Number of files in a directory and the bytes that the disk gives them.
pub(super) fn allocated(dir: &Path) -> Result<(u64, u64), ImageError> {
    let (mut count, mut bytes) = (0, 0);
    for name in names(dir)? {
        let path = dir.join(name);
        match fs::metadata(&path) {
            Ok(metadata) => {
                count += 1;
                bytes += metadata.blocks() * 512;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("look at", &path)(e)),
        }
    }
    Ok((count, bytes))
}

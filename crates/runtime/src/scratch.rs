//! Scratch disks: where a pod's container layers and emptyDirs live.
//!
//! A scratch disk is a sparse copy of an empty ext4 file system, made once per size. The host formats
//! that template from nothing, and copies it; a disk that a guest has had is never read again.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use hypernetes_types::SandboxId;
use rustix::fs::SeekFrom;
use tokio::{process::Command, sync::Mutex};

use crate::{error::RuntimeError, records::storage};

/// ext4 needs about 1 MiB; below this nothing useful fits.
const MIN_MIB: u64 = 8;
/// ext4's limit with 4 KiB blocks is higher; a pod's is not.
const MAX_MIB: u64 = 16 << 20;
const DISK: &str = "scratch.ext4";

/// Makes and removes scratch disks.
#[derive(Debug)]
pub(crate) struct ScratchDisks {
    templates: PathBuf,
    sandboxes: PathBuf,
    mkfs: PathBuf,
    formatting: Mutex<()>,
}

impl ScratchDisks {
    pub(crate) fn new(state_dir: &Path, mkfs: PathBuf) -> Self {
        Self {
            templates: state_dir.join("scratch-templates"),
            sandboxes: state_dir.join("sandboxes"),
            mkfs,
            formatting: Mutex::new(()),
        }
    }

    /// The directory of a sandbox's durable files.
    pub(crate) fn directory(&self, sandbox: &SandboxId) -> PathBuf {
        self.sandboxes.join(sandbox.as_str())
    }

    /// The directory of all sandboxes' durable files.
    pub(crate) fn root(&self) -> &Path {
        &self.sandboxes
    }

    /// Whether a disk can have this size.
    pub(crate) fn check(mib: u64) -> Result<(), RuntimeError> {
        if mib == 0 || (MIN_MIB..=MAX_MIB).contains(&mib) {
            return Ok(());
        }
        let rule = format!("must be 0 or {MIN_MIB} to {MAX_MIB}");
        Err(RuntimeError::Invalid {
            field: "scratch_mib".into(),
            rule,
        })
    }

    /// A fresh disk for a sandbox, open for reading and writing.
    pub(crate) async fn create(&self, sandbox: &SandboxId, mib: u64) -> Result<File, RuntimeError> {
        let template = self.template(mib).await?;
        let path = self.directory(sandbox).join(DISK);
        let failed = format!("make scratch disk {}", path.display());
        blocking(failed, move || copy_sparse(&template, &path)).await
    }

    async fn template(&self, mib: u64) -> Result<PathBuf, RuntimeError> {
        let path = self.templates.join(format!("{mib}.ext4"));
        let _one_at_a_time = self.formatting.lock().await;
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            return Ok(path);
        }
        let fresh = self.templates.join(format!("{mib}.new"));
        let (directory, file) = (self.templates.clone(), fresh.clone());
        blocking(format!("make {}", fresh.display()), move || {
            std::fs::create_dir_all(directory)?;
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(file)?;
            file.set_len(mib << 20)
        })
        .await?;
        let failed = format!("format {}", fresh.display());
        let output = Command::new(&self.mkfs)
            .args(["-q", "-F", "-O", "^has_journal,^resize_inode", "-m", "0"])
            .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
            .arg(&fresh)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| storage(failed.clone(), error))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let text = format!("{}: {}", output.status, text.trim());
            return Err(storage(failed, io::Error::other(text)));
        }
        let (from, to) = (fresh, path.clone());
        blocking(failed, move || {
            // A template that is half on disk after a power failure would break every later pod.
            File::open(&from)?.sync_all()?;
            std::fs::rename(&from, &to)
        })
        .await?;
        Ok(path)
    }

    /// Removes a sandbox's durable files. Idempotent.
    pub(crate) async fn remove(&self, sandbox: &SandboxId) -> Result<(), RuntimeError> {
        remove_directory(self.directory(sandbox)).await
    }
}

/// Removes a directory and what is in it. Idempotent.
pub(crate) async fn remove_directory(path: PathBuf) -> Result<(), RuntimeError> {
    let failed = format!("remove {}", path.display());
    blocking(failed, move || match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })
    .await
}

/// Runs file work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    action: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, RuntimeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(storage(action, error)),
        Err(error) => Err(storage(action, error)),
    }
}

fn copy_sparse(from: &Path, to: &Path) -> io::Result<File> {
    let source = File::open(from)?;
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)?;
    // Where the file system can share blocks, this is all.
    if rustix::fs::ioctl_ficlone(target.as_fd(), source.as_fd()).is_ok() {
        return Ok(target);
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; 64 * 1024];
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(&source, SeekFrom::Data(position)) {
            Err(rustix::io::Errno::NXIO) => break,
            other => other?,
        };
        let end = rustix::fs::seek(&source, SeekFrom::Hole(start))?;
        position = start;
        while position < end {
            let room = usize::try_from(end - position)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let read = source.read_at(&mut buffer[..room], position)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            target.write_all_at(&buffer[..read], position)?;
            position += read as u64;
        }
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn disks_are_sparse_formatted_and_each_fresh() {
        let temp = tempfile::tempdir().unwrap();
        let disks = ScratchDisks::new(temp.path(), "mkfs.ext4".into());
        let (a, b) = (SandboxId::random(), SandboxId::random());
        let file = match disks.create(&a, 64).await {
            Err(RuntimeError::Storage { source, .. })
                if source.to_string().contains("No such file") =>
            {
                println!("SKIP: mkfs.ext4 is not installed");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!(file.metadata().unwrap().len(), 64 << 20);
        assert!(
            file.metadata().unwrap().blocks() * 512 < 4 << 20,
            "not sparse"
        );
        let mut magic = [0; 2];
        file.read_exact_at(&mut magic, 1080).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        // What one sandbox writes is not in the next one's disk.
        file.write_all_at(b"secret", 32 << 20).unwrap();
        let other = disks.create(&b, 64).await.unwrap();
        let mut bytes = [1; 6];
        other.read_exact_at(&mut bytes, 32 << 20).unwrap();
        assert_eq!(bytes, [0; 6]);
        disks.remove(&a).await.unwrap();
        disks.remove(&a).await.unwrap();
        assert!(!disks.directory(&a).exists() && disks.directory(&b).exists());
    }

    #[tokio::test]
    async fn a_failed_format_leaves_no_template() {
        let temp = tempfile::tempdir().unwrap();
        let disks = ScratchDisks::new(temp.path(), "false".into());
        for _ in 0..2 {
            let error = disks.create(&SandboxId::random(), 64).await.unwrap_err();
            assert!(error.to_string().contains("format"), "{error}");
        }
        assert!(!temp.path().join("scratch-templates/64.ext4").exists());
    }
}

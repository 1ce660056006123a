//! Scratch disks: where a pod's container layers and emptyDirs live.
//!
//! A scratch disk is a sparse copy of an empty ext4 file system, made once per size. The host formats
//! that template from nothing, and copies it; a disk that a guest has had is never read again.
//!
//! An emptyDir with a size limit has a disk of its own. Its size is the tenant's choice, so that
//! there is no template to be kept: it is formatted where it is used.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, OpenOptions, Permissions},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use hypernetes_agent_api::SCRATCH_DIRECTORIES;
use hypernetes_types::SandboxId;
use rustix::fs::SeekFrom;
use tokio::{process::Command, sync::Mutex};

use crate::{error::RuntimeError, records::storage};

/// ext4 needs about 1 MiB; below this nothing useful fits.
const MIN_MIB: u64 = 8;
/// ext4's limit with 4 KiB blocks is higher; a pod's is not.
const MAX_MIB: u64 = 16 << 20;
const DISK: &str = "scratch.ext4";
/// In the name of a template: one of a former release, which had no such word, is not used any more.
const LAYOUT: &str = "-2";
/// No journal: what is on these disks does not outlive the VM. No checksums of metadata: they cost the start of a pod 1.3
/// million instructions; `uninit_bg` keeps what else comes with them, that empty parts of the disk need no bitmaps. No
/// reserve: all of it is the pod's.
const FEATURES: [&str; 6] = [
    "-q",
    "-F",
    "-O",
    "^has_journal,^resize_inode,^metadata_csum,uninit_bg",
    "-m",
    "0",
];
/// As much as can be left to the guest, and blocks of the host that are holes stay holes.
const EXTENDED: [&str; 2] = ["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"];

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

    /// Whether a volume can have a disk of this size.
    pub(crate) fn check_volume(limit: u64) -> Result<(), RuntimeError> {
        if limit <= MAX_MIB << 20 {
            return Ok(());
        }
        Err(RuntimeError::Invalid {
            field: "size_limit".into(),
            rule: format!("must be at most {MAX_MIB} MiB"),
        })
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

    /// The disk that a sandbox has had, open for reading and writing.
    pub(crate) async fn open(&self, sandbox: &SandboxId) -> Result<File, RuntimeError> {
        open_again(self.directory(sandbox).join(DISK)).await
    }

    /// The disk that a volume has had, open for reading and writing.
    pub(crate) async fn open_volume(
        &self,
        sandbox: &SandboxId,
        slot: u32,
    ) -> Result<File, RuntimeError> {
        open_again(self.directory(sandbox).join(volume_disk(slot))).await
    }

    /// Bytes of the host's that a sandbox's disk, or that of one of its volumes, takes.
    pub(crate) async fn allocated(
        &self,
        sandbox: &SandboxId,
        volume: Option<u32>,
    ) -> Result<u64, RuntimeError> {
        let name = volume.map_or_else(|| DISK.to_owned(), volume_disk);
        let path = self.directory(sandbox).join(name);
        let failed = format!("look at disk {}", path.display());
        blocking(failed, move || Ok(path.metadata()?.blocks() * 512)).await
    }

    /// Copies a sandbox's disk, or that of one of its volumes, into a directory. Nobody may be writing it.
    pub(crate) async fn copy(
        &self,
        sandbox: &SandboxId,
        volume: Option<u32>,
        to: &Path,
    ) -> Result<(), RuntimeError> {
        let name = volume.map_or_else(|| DISK.to_owned(), volume_disk);
        let (from, to) = (self.directory(sandbox).join(&name), to.join(&name));
        let failed = format!("copy disk {} to {}", from.display(), to.display());
        blocking(failed, move || copy_sparse(&from, &to).map(drop)).await
    }

    /// A fresh disk for a volume of at most `limit` bytes, open for reading and writing. One that was
    /// in the way is removed, never used again: a guest may have had it.
    pub(crate) async fn create_volume(
        &self,
        sandbox: &SandboxId,
        slot: u32,
        limit: u64,
    ) -> Result<File, RuntimeError> {
        let shape = Shape::of(limit);
        let path = self.directory(sandbox).join(volume_disk(slot));
        let failed = format!("make volume disk {}", path.display());
        let (target, size) = (path.clone(), shape.size());
        let file = blocking(failed, move || {
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent)?;
            }
            match std::fs::remove_file(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(target)?;
            file.set_len(size)?;
            Ok(file)
        })
        .await?;
        self.format(&path, &shape.arguments()).await?;
        Ok(file)
    }

    async fn template(&self, mib: u64) -> Result<PathBuf, RuntimeError> {
        let path = self.templates.join(format!("{mib}{LAYOUT}.ext4"));
        let _one_at_a_time = self.formatting.lock().await;
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            return Ok(path);
        }
        let fresh = self.templates.join(format!("{mib}.new"));
        let root = self.templates.join("root");
        let (directory, file) = (root.clone(), fresh.clone());
        let former = self.templates.join(format!("{mib}.ext4"));
        blocking(format!("make {}", fresh.display()), move || {
            for name in SCRATCH_DIRECTORIES {
                let path = directory.join(name);
                std::fs::create_dir_all(&path)?;
                // As HyperStart makes them, whatever the daemon's umask is.
                std::fs::set_permissions(path, Permissions::from_mode(0o755))?;
            }
            match std::fs::remove_file(former) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(file)?;
            file.set_len(mib << 20)
        })
        .await?;
        self.format(&fresh, &[OsString::from("-d"), root.into()])
            .await?;
        let failed = format!("format {}", fresh.display());
        let (from, to) = (fresh, path.clone());
        blocking(failed, move || {
            // A template that is half on disk after a power failure would break every later pod.
            File::open(&from)?.sync_all()?;
            std::fs::rename(&from, &to)
        })
        .await?;
        Ok(path)
    }

    async fn format(&self, file: &Path, shape: &[impl AsRef<OsStr>]) -> Result<(), RuntimeError> {
        let failed = format!("format {}", file.display());
        let output = Command::new(&self.mkfs)
            .args(FEATURES)
            .args(EXTENDED)
            .args(shape)
            .arg(file)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| storage(failed.clone(), error))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let text = format!("{}: {}", output.status, text.trim());
        Err(storage(failed, io::Error::other(text)))
    }

    /// Removes a sandbox's durable files. Idempotent.
    pub(crate) async fn remove(&self, sandbox: &SandboxId) -> Result<(), RuntimeError> {
        remove_directory(self.directory(sandbox)).await
    }
}

/// A file system that a volume's limit fits into. HyperStart takes the surplus away, so that this
/// errs on the large side.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    block: u64,
    blocks: u64,
    inodes: u64,
}

impl Shape {
    const INODE: u64 = 256;

    fn of(limit: u64) -> Self {
        // A volume of a few KiB is not to be a handful of blocks.
        let block = if limit < 1 << 20 { 1024 } else { 4096 };
        let data = limit.div_ceil(block);
        // Small volumes run out of blocks before they run out of inodes, whatever is put in them;
        // large ones have what mkfs gives by default.
        let inodes = (limit / 4096).min(65_536).max(limit / 16_384) + 64;
        let tables = inodes * Self::INODE / block;
        // The kernel keeps a fiftieth back, 4096 blocks at most (ext4_calculate_resv_clusters).
        let kept = (data / 32).min(8192);
        // Group descriptors, bitmaps, and the least that mkfs takes for a file system.
        let fixed = data / 256 + (128 << 10) / block;
        Self {
            block,
            blocks: data + tables + kept + fixed,
            inodes,
        }
    }

    fn size(&self) -> u64 {
        self.block * self.blocks
    }

    fn arguments(&self) -> Vec<String> {
        let inode = Self::INODE;
        format!("-b {} -I {inode} -N {}", self.block, self.inodes)
            .split(' ')
            .map(str::to_owned)
            .collect()
    }
}

fn volume_disk(slot: u32) -> String {
    format!("volume-{slot}.ext4")
}

async fn open_again(path: PathBuf) -> Result<File, RuntimeError> {
    let action = format!("open disk {}", path.display());
    blocking(action, move || {
        OpenOptions::new().read(true).write(true).open(path)
    })
    .await
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
    #[cfg(test)]
    {
        use crate::testing::{Gate, Place};
        let error = {
            let action = action.clone();
            |error| storage(action, error)
        };
        let work = run_blocking(action, work);
        Gate::current().effect(Place::Files, error, work).await
    }
    #[cfg(not(test))]
    run_blocking(action, work).await
}

async fn run_blocking<T: Send + 'static>(
    action: String,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, RuntimeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(storage(action, error)),
        Err(error) => Err(storage(action, error)),
    }
}

/// Copies a file, holes as holes, and without copying anything where the file system can. Blocks.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> io::Result<File> {
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

    /// What a fresh ext4 file system says of itself: blocks, free blocks, inodes, block size.
    fn superblock(file: &File) -> (u64, u64, u64, u64) {
        let mut bytes = [0; 32];
        file.read_exact_at(&mut bytes, 1024).unwrap();
        let word = |at: usize| u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
        (word(4), word(12), word(0), 1024 << word(24))
    }

    #[tokio::test]
    async fn a_volume_s_limit_fits_on_its_disk() {
        let temp = tempfile::tempdir().unwrap();
        let disks = ScratchDisks::new(temp.path(), "mkfs.ext4".into());
        let sandbox = SandboxId::random();
        for limit in [
            1,
            4096,
            65_536,
            (1 << 20) - 1,
            1 << 20,
            10 << 20,
            1 << 30,
            10 << 30,
            1 << 40,
        ] {
            let file = match disks.create_volume(&sandbox, 250, limit).await {
                Err(RuntimeError::Storage { source, .. })
                    if source.to_string().contains("No such file") =>
                {
                    println!("SKIP: mkfs.ext4 is not installed");
                    return;
                }
                other => other.unwrap(),
            };
            let (blocks, free, inodes, block) = superblock(&file);
            let kept = (blocks / 50).min(4096);
            let room = (free - kept) * block;
            // A block for the volume's root, one for the ballast's extents.
            assert!(room >= limit + 2 * block, "{limit}: {room}");
            // The file is not much larger than what may be in it.
            assert!(room - limit < 256 * 1024 + limit / 32, "{limit}: {room}");
            assert!(inodes >= 64, "{limit}: {inodes}");
            assert!(file.metadata().unwrap().blocks() * 512 < 32 << 20);
        }
        assert!(ScratchDisks::check_volume(16 << 40).is_ok());
        assert!(ScratchDisks::check_volume((16 << 40) + 1).is_err());
    }

    #[tokio::test]
    async fn a_volume_s_disk_is_never_used_twice() {
        let temp = tempfile::tempdir().unwrap();
        let disks = ScratchDisks::new(temp.path(), "true".into());
        let sandbox = SandboxId::random();
        let first = disks.create_volume(&sandbox, 250, 5).await.unwrap();
        first.write_all_at(b"hostile", 0).unwrap();
        let second = disks.create_volume(&sandbox, 250, 5).await.unwrap();
        let mut bytes = [1; 7];
        second.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0; 7]);
        assert_eq!(first.metadata().unwrap().nlink(), 0);
        disks.remove(&sandbox).await.unwrap();
        assert!(!disks.directory(&sandbox).exists());
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

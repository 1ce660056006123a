//! Reads what the kubelet has put into host files, so that it can travel to the guest.
//!
//! The kubelet is trusted, what a pod's owner made it write is not: nothing is followed out of the
//! directory that was named, nothing but regular files is read, and there is a limit to everything.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use hypernetes_runtime::VolumeFile;
use hypernetes_types::PageSize;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat,
};

/// The guest takes so many files in one volume,
const MAX_FILES: usize = 1024;
/// so large each,
const MAX_FILE: u64 = 1 << 20;
/// and so much together.
const MAX_TOTAL: u64 = 3 << 20;
const MAX_DEPTH: u32 = 16;
/// The link that the kubelet switches to change everything at once.
const DATA: &str = "..data";

/// Why a host path cannot be carried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("cannot read {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} {rule}", path.display())]
    Refused { path: PathBuf, rule: String },
}

fn failed(path: &Path) -> impl Fn(rustix::io::Errno) -> ReadError {
    move |errno| ReadError::Io {
        path: path.to_owned(),
        source: errno.into(),
    }
}

fn refused(path: &Path, rule: impl Into<String>) -> ReadError {
    ReadError::Refused {
        path: path.to_owned(),
        rule: rule.into(),
    }
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    /// Relative path to content.
    pub(crate) files: BTreeMap<String, VolumeFile>,
    /// The name of the only file, if the path is one.
    pub(crate) single: Option<String>,
    /// Group that the directory belongs to.
    pub(crate) gid: Option<u32>,
}

/// Reads a file or a directory. Blocks.
pub(crate) fn read(path: &Path) -> Result<Content, ReadError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = openat(CWD, path, flags, Mode::empty()).map_err(failed(path))?;
    let stat = rustix::fs::fstat(&place).map_err(failed(path))?;
    let gid = (stat.st_gid != 0).then_some(stat.st_gid);
    let mut reader = Reader::default();
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            reader.directory(&root(&place, path)?, path)?;
            Ok(Content {
                files: reader.files,
                single: None,
                gid,
            })
        }
        FileType::RegularFile => {
            // The kubelet's names may have characters that a guest's file has not.
            let name = "file".to_owned();
            let parent = path.parent().ok_or_else(|| refused(path, "is no file"))?;
            let directory = openat(
                CWD,
                parent,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(failed(parent))?;
            let base = path.file_name().unwrap_or_default();
            reader.file(&directory, base, name.clone(), path)?;
            Ok(Content {
                files: reader.files,
                single: Some(name),
                gid,
            })
        }
        _ => Err(refused(path, "is neither a regular file nor a directory")),
    }
}

/// Reads the version of a directory that the kubelet keeps in versions. `None` if there is none, or
/// no such directory any more. Blocks.
pub(crate) fn read_version(path: &Path) -> Result<Option<Content>, ReadError> {
    for part in [path, &path.join(DATA)] {
        match std::fs::symlink_metadata(part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(ReadError::Io {
                    path: part.to_owned(),
                    source,
                });
            }
            Ok(_) => {}
        }
    }
    read(path).map(Some)
}

/// The directory whose content counts: one version of it, if the kubelet keeps versions.
fn root(place: &OwnedFd, path: &Path) -> Result<OwnedFd, ReadError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match openat2(place, DATA, flags, Mode::empty(), beneath) {
        Err(rustix::io::Errno::NOENT) => {
            openat2(place, ".", flags, Mode::empty(), beneath).map_err(failed(path))
        }
        other => other.map_err(failed(&path.join(DATA))),
    }
}

#[derive(Debug, Default)]
struct Reader {
    files: BTreeMap<String, VolumeFile>,
    total: u64,
}

impl Reader {
    fn directory(&mut self, directory: &OwnedFd, path: &Path) -> Result<(), ReadError> {
        self.walk(directory, directory, "", path, MAX_DEPTH)
    }

    fn walk(
        &mut self,
        root: &OwnedFd,
        directory: &OwnedFd,
        prefix: &str,
        shown: &Path,
        depth: u32,
    ) -> Result<(), ReadError> {
        let Some(depth) = depth.checked_sub(1) else {
            return Err(refused(shown, "has directories too deep in each other"));
        };
        for entry in Dir::read_from(directory).map_err(failed(shown))? {
            let entry = entry.map_err(failed(shown))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let path = shown.join(name);
            let text = name
                .to_str()
                .ok_or_else(|| refused(&path, "has a name that is not UTF-8"))?;
            let inside = format!("{prefix}{text}");
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(&path))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                    let below = openat2(directory, name, flags, Mode::empty(), stay)
                        .map_err(failed(&path))?;
                    self.walk(root, &below, &format!("{inside}/"), &path, depth)?;
                }
                FileType::RegularFile => self.file(directory, name, inside, &path)?,
                // A link that stays inside counts as the file that it leads to.
                FileType::Symlink => self.link(root, inside, &path)?,
                _ => return Err(refused(&path, "is neither a regular file nor a directory")),
            }
        }
        Ok(())
    }

    /// Reads a link's target, which must be a file beneath the root.
    fn link(&mut self, root: &OwnedFd, inside: String, path: &Path) -> Result<(), ReadError> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match openat2(root, inside.as_str(), flags, Mode::empty(), stay) {
            Ok(file) => self.take(file.into(), inside, path),
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
                Err(refused(path, "is a link that leads out of the volume"))
            }
            Err(errno) => Err(failed(path)(errno)),
        }
    }

    fn file(
        &mut self,
        directory: impl AsFd,
        name: &OsStr,
        inside: String,
        path: &Path,
    ) -> Result<(), ReadError> {
        // A fifo put into the file's place would block the node.
        let flags =
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = openat(directory, name, flags, Mode::empty()).map_err(failed(path))?;
        self.take(file.into(), inside, path)
    }

    fn take(&mut self, file: File, inside: String, path: &Path) -> Result<(), ReadError> {
        let failed = |source| ReadError::Io {
            path: path.to_owned(),
            source,
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(refused(path, "is neither a regular file nor a directory"));
        }
        if self.files.len() >= MAX_FILES {
            let rule = format!("is one of more than {MAX_FILES} files");
            return Err(refused(path, rule));
        }
        let mut content = Vec::new();
        let mut bounded = file.take(MAX_FILE + 1);
        bounded.read_to_end(&mut content).map_err(failed)?;
        let size = content.len() as u64;
        self.total += size;
        if size > MAX_FILE || self.total > MAX_TOTAL {
            let rule = format!(
                "does not fit: {} MiB a file and {} MiB a volume are carried",
                MAX_FILE >> 20,
                MAX_TOTAL >> 20
            );
            return Err(refused(path, rule));
        }
        let file = VolumeFile {
            content: content.into(),
            mode: metadata.mode() & 0o777,
            uid: metadata.uid(),
        };
        self.files.insert(inside, file);
        Ok(())
    }
}

/// What a directory's files are on, and how many bytes fit; 0 = no limit is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    Disk,
    Memory { limit: u64 },
    HugePages { page: PageSize, limit: u64 },
}

/// What a directory's files are on.
pub(crate) fn backing(path: &Path) -> Result<Backing, ReadError> {
    let stat = rustix::fs::statfs(path).map_err(failed(path))?;
    let block = u64::try_from(stat.f_bsize).unwrap_or(0);
    let limit = stat.f_blocks.saturating_mul(block);
    // linux/magic.h: TMPFS_MAGIC, HUGETLBFS_MAGIC.
    Ok(match stat.f_type {
        0x0102_1994 => Backing::Memory { limit },
        0x9584_58f6 => match PageSize::from_bytes(block) {
            Some(page) => Backing::HugePages { page, limit },
            None => Backing::Disk,
        },
        _ => Backing::Disk,
    })
}

/// Group of a directory whose files belong to its group, as the kubelet marks it for an fsGroup.
pub(crate) fn shared_group(path: &Path) -> Result<Option<u32>, ReadError> {
    let stat = rustix::fs::stat(path).map_err(failed(path))?;
    Ok((stat.st_mode & 0o2000 != 0).then_some(stat.st_gid))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn names(content: &Content) -> Vec<&str> {
        content.files.keys().map(String::as_str).collect()
    }

    #[test]
    fn one_version_of_the_kubelet_s_layout_is_read() {
        let temp = tempfile::tempdir().unwrap();
        let version = temp.path().join("..2026_01_01");
        fs::create_dir_all(version.join("dir")).unwrap();
        fs::create_dir(temp.path().join("..2025_old")).unwrap();
        fs::write(temp.path().join("..2025_old/gone"), "x").unwrap();
        fs::write(version.join("key"), "value").unwrap();
        fs::write(version.join("dir/below"), "deep").unwrap();
        symlink("..2026_01_01", temp.path().join("..data")).unwrap();
        symlink("..data/key", temp.path().join("key")).unwrap();
        let content = read(temp.path()).unwrap();
        assert_eq!(names(&content), ["dir/below", "key"]);
        assert_eq!(content.files["key"].content, "value");
        assert_eq!(content.single, None);
    }

    #[test]
    fn a_file_is_read_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("etc-hosts");
        fs::write(&path, "127.0.0.1 localhost\n").unwrap();
        let content = read(&path).unwrap();
        let single = content.single.unwrap();
        assert_eq!(content.files[&single].content, "127.0.0.1 localhost\n");
    }

    #[test]
    fn nothing_leads_out_and_nothing_blocks() {
        let temp = tempfile::tempdir().unwrap();
        let (inside, outside) = (temp.path().join("v"), temp.path().join("secret"));
        fs::create_dir(&inside).unwrap();
        fs::write(&outside, "secret").unwrap();
        symlink(&outside, inside.join("link")).unwrap();
        let error = read(&inside).unwrap_err().to_string();
        assert!(error.ends_with("leads out of the volume"), "{error}");
        fs::remove_file(inside.join("link")).unwrap();
        symlink("../secret", inside.join("link")).unwrap();
        assert!(read(&inside).is_err());
        assert!(read(&inside.join("link")).is_err(), "the path itself");
        fs::remove_file(inside.join("link")).unwrap();
        symlink("..", inside.join("..data")).unwrap();
        assert!(read(&inside).is_err());
        fs::remove_file(inside.join("..data")).unwrap();
        let fifo = inside.join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        assert!(read(&inside).is_err() && read(&fifo).is_err());
    }

    #[test]
    fn too_much_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("big");
        fs::write(&path, vec![0; (1 << 20) + 1]).unwrap();
        let error = read(temp.path()).unwrap_err().to_string();
        assert!(error.contains("does not fit"), "{error}");
    }
}

//! Files below a directory, opened so that no link in the way leads elsewhere.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path},
};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, ResolveFlags, mkdirat, openat2, unlinkat};

const STAY: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Whether the path is relative and made of plain names only.
pub(crate) fn is_plain(path: &Path) -> bool {
    let mut parts = path.components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

fn beneath(root: impl AsFd, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    Ok(openat2(root, path, flags | OFlags::CLOEXEC, mode, STAY)?)
}

fn not_plain() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a plain relative path")
}

/// Opens `root/path` for reading and writing, making it and the directories on the way.
pub(crate) fn open_file(root: &Path, path: &Path) -> io::Result<File> {
    if !is_plain(path) {
        return Err(not_plain());
    }
    let root = directory(root)?;
    if let Some(parent) = path.parent() {
        let mut walked = std::path::PathBuf::new();
        for part in parent.components() {
            walked.push(part);
            match beneath(
                &root,
                &walked,
                OFlags::PATH | OFlags::DIRECTORY,
                Mode::empty(),
            ) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let above = walked.parent().filter(|above| *above != Path::new(""));
                    let above = match above {
                        Some(above) => beneath(
                            &root,
                            above,
                            OFlags::PATH | OFlags::DIRECTORY,
                            Mode::empty(),
                        )?,
                        None => root.try_clone()?,
                    };
                    match mkdirat(&above, part.as_os_str(), Mode::from(0o755)) {
                        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                other => drop(other?),
            }
        }
    }
    // A fifo in the log's place would block the node; a regular file does not care for NONBLOCK.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
    let file = File::from(beneath(&root, path, flags, Mode::from(0o640))?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

/// Inode number of `root/path`, or `None` if nothing is there.
pub(crate) fn inode(root: &Path, path: &Path) -> io::Result<Option<u64>> {
    if !is_plain(path) {
        return Err(not_plain());
    }
    match beneath(&directory(root)?, path, OFlags::PATH, Mode::empty()) {
        Ok(file) => Ok(Some(rustix::fs::fstat(file)?.st_ino)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens, for reading and writing, the file with this inode number that a rotation has moved from `root/path`: its name is
/// the log's and a suffix, in the same directory.
pub(crate) fn find_rotated(root: &Path, path: &Path, inode: u64) -> io::Result<Option<File>> {
    let Some(name) = path.file_name().filter(|_| is_plain(path)) else {
        return Err(not_plain());
    };
    let root = directory(root)?;
    let above = path.parent().filter(|above| *above != Path::new(""));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let directory = beneath(&root, above.unwrap_or(Path::new(".")), flags, Mode::empty())?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let other = OsStr::from_bytes(entry.file_name().to_bytes());
        let suffix = other.as_bytes().strip_prefix(name.as_bytes());
        if entry.ino() != inode || suffix.is_none_or(|suffix| !suffix.starts_with(b".")) {
            continue;
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(beneath(&directory, other.as_ref(), flags, Mode::empty())?);
        return Ok(Some(file).filter(|file| file.metadata().is_ok_and(|data| data.is_file())));
    }
    Ok(None)
}

/// Removes `root/path` and the directories on the way that are empty then, `root` not among them.
pub(crate) fn remove_file(root: &Path, path: &Path) -> io::Result<()> {
    if !is_plain(path) {
        return Err(not_plain());
    }
    let root = match directory(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mut flags = AtFlags::empty();
    for place in path.ancestors().take_while(|place| *place != Path::new("")) {
        let above = match place.parent().filter(|above| *above != Path::new("")) {
            Some(above) => {
                match beneath(
                    &root,
                    above,
                    OFlags::PATH | OFlags::DIRECTORY,
                    Mode::empty(),
                ) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    other => other?,
                }
            }
            None => root.try_clone()?,
        };
        let Some(name) = place.file_name() else {
            return Err(not_plain());
        };
        match unlinkat(&above, name, flags) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(rustix::io::Errno::NOTEMPTY) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        flags = AtFlags::REMOVEDIR;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn makes_and_removes_what_is_on_the_way() {
        let temp = tempfile::tempdir().unwrap();
        let path = Path::new("a/b/0.log");
        open_file(temp.path(), path).unwrap();
        open_file(temp.path(), Path::new("a/1.log")).unwrap();
        remove_file(temp.path(), path).unwrap();
        remove_file(temp.path(), path).unwrap();
        assert!(!temp.path().join("a/b").exists() && temp.path().join("a/1.log").exists());
        remove_file(temp.path(), Path::new("a/1.log")).unwrap();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_and_dots_lead_nowhere() {
        let temp = tempfile::tempdir().unwrap();
        let (root, outside) = (temp.path().join("root"), temp.path().join("outside"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("victim"), "x").unwrap();
        symlink(&outside, root.join("dir")).unwrap();
        symlink(outside.join("victim"), root.join("log")).unwrap();
        for path in [
            "dir/log",
            "dir/sub/log",
            "log",
            "../outside/victim",
            "/etc/x",
            "",
            "./a",
        ] {
            assert!(open_file(&root, Path::new(path)).is_err(), "{path}");
        }
        assert!(remove_file(&root, Path::new("dir/victim")).is_err());
        remove_file(&root, Path::new("log")).unwrap();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
        assert!(!root.join("log").exists());
    }
}

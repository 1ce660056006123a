//! Paths inside a directory that somebody else controls, resolved by the kernel and never by text.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, readlinkat,
        statat,
    },
    io::Errno,
};

/// Dangling symbolic links that are followed while creating a path.
const MAX_LINKS: u32 = 16;

/// What a path is to be, if it has to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
}

/// The name by which mount(2) reaches an open file.
pub(crate) fn proc_path(fd: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()).into()
}

/// Opens a directory of the guest itself, as a place and not for reading.
pub(crate) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

fn resolve(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    how: ResolveFlags,
) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    loop {
        // EAGAIN: something was renamed meanwhile and the kernel could not rule out an escape.
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Opens an existing path below `root`, as if `root` were `/`.
pub(crate) fn open_in_root(root: impl AsFd, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    resolve(root.as_fd(), Path::new(path), flags, how)
}

/// Opens an existing path below `root`; anything that leads out of it is an error.
pub fn open_beneath(root: impl AsFd, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    resolve(root.as_fd(), Path::new(path), flags, how)
}

/// Opens a path below `root` as a place to mount on, making what is missing.
pub(crate) fn ensure_in_root(root: impl AsFd, path: &str, kind: Kind) -> io::Result<OwnedFd> {
    ensure(root.as_fd(), &normal(Path::new(path)), kind, MAX_LINKS)
}

/// Opens a directory below `root`, making what is missing; nothing leads out of it.
pub(crate) fn ensure_beneath(root: impl AsFd, path: &str) -> io::Result<OwnedFd> {
    match open_beneath(&root, path, OFlags::PATH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    let mut at = open_beneath(&root, ".", OFlags::PATH | OFlags::DIRECTORY)?;
    for component in Path::new(path).components() {
        let Component::Normal(name) = component else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        match mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Stricter than for what exists: no links at all while making directories.
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        at = resolve(
            at.as_fd(),
            Path::new(name),
            OFlags::PATH | OFlags::DIRECTORY,
            how,
        )?;
    }
    Ok(at)
}

fn ensure(root: BorrowedFd<'_>, path: &Path, kind: Kind, links: u32) -> io::Result<OwnedFd> {
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match resolve(root, path, OFlags::PATH, how) {
        Ok(fd) => {
            let is_dir =
                FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) == FileType::Directory;
            return match (kind, is_dir) {
                (Kind::Directory, false) => Err(Errno::NOTDIR.into()),
                (Kind::File, true) => Err(Errno::ISDIR.into()),
                _ => Ok(fd),
            };
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NOENT.into());
    };
    let parent_fd = ensure(root, parent, Kind::Directory, links)?;
    let made = match kind {
        Kind::Directory => mkdirat(&parent_fd, name, Mode::from_raw_mode(0o755)),
        Kind::File => {
            let flags =
                OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(&parent_fd, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let stat = statat(&parent_fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                // A dangling link: make what it points to, still inside the root.
                let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
                let target = readlinkat(&parent_fd, name, Vec::new())?;
                let target = parent.join(std::ffi::OsStr::new(&*target.to_string_lossy()));
                return ensure(root, &normal(&target), kind, links);
            }
        }
        Err(errno) => return Err(errno.into()),
    }
    resolve(
        parent_fd.as_fd(),
        Path::new(name),
        OFlags::PATH | OFlags::NOFOLLOW,
        ResolveFlags::BENEATH,
    )
}

/// Relative to the root, without dots. `..` is taken by text, which cannot lead out: the kernel
/// resolves the result inside the root again.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                normal.pop();
            }
            Component::RootDir => normal.clear(),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn missing_places_are_made_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root_path = dir.path().join("root");
        fs::create_dir_all(root_path.join("etc")).unwrap();
        symlink("/../../../outside/file", root_path.join("etc/dangling")).unwrap();
        symlink("/etc", root_path.join("abs")).unwrap();
        let root = open_dir(&root_path).unwrap();
        ensure_in_root(&root, "/a/b/c", Kind::Directory).unwrap();
        ensure_in_root(&root, "/etc/dangling", Kind::File).unwrap();
        ensure_in_root(&root, "/abs/x/../y", Kind::File).unwrap();
        ensure_in_root(&root, "/../../up", Kind::Directory).unwrap();
        assert!(root_path.join("a/b/c").is_dir());
        assert!(root_path.join("outside/file").is_file());
        assert!(root_path.join("etc/y").is_file());
        assert!(root_path.join("up").is_dir());
        assert!(!dir.path().join("outside").exists());
        assert_eq!(
            ensure_in_root(&root, "/etc", Kind::File)
                .unwrap_err()
                .raw_os_error(),
            Some(libc::EISDIR)
        );
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        let root = open_dir(dir.path()).unwrap();
        assert!(ensure_in_root(&root, "/a", Kind::File).is_err());
    }

    #[test]
    fn nothing_leads_out_of_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("..data")).unwrap();
        fs::create_dir(dir.path().join("secret")).unwrap();
        fs::write(volume.join("..data/key"), "v").unwrap();
        symlink("..data/key", volume.join("key")).unwrap();
        symlink("../secret", volume.join("up")).unwrap();
        symlink("/etc", volume.join("abs")).unwrap();
        let root = open_dir(&volume).unwrap();
        open_beneath(&root, "key", OFlags::PATH).unwrap();
        ensure_beneath(&root, "new/deep").unwrap();
        for escape in [
            "up",
            "abs",
            "up/new",
            "abs/new",
            "../secret",
            "/etc",
            "new/../../secret",
        ] {
            assert!(ensure_beneath(&root, escape).is_err(), "{escape}");
        }
        assert!(!dir.path().join("secret/new").exists());
    }
}

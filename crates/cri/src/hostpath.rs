//! Paths of the host that pods may see as they are, by the node's configuration.
//!
//! A path is opened once, links and all, and what was opened is judged: it must be at or below a
//! directory that the operator has listed. The same open file is what the guest sees, so that nobody
//! can put something else into its place after the look.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use hypernetes_runtime::HostShare;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2},
    io::Errno,
};

use crate::{config::SharedPath, v1};

/// Why a path cannot be shared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Refused(String),
}

fn failed(action: &'static str, path: &Path) -> impl Fn(Errno) -> ShareError {
    move |errno| ShareError::Io {
        action,
        path: path.to_owned(),
        source: errno.into(),
    }
}

/// The entry that a path is at or below, the deepest of them.
fn entry_of<'a>(path: &Path, allowed: &'a [SharedPath]) -> Option<&'a SharedPath> {
    let at_or_below = allowed.iter().filter(|entry| {
        let real = std::fs::canonicalize(&entry.path);
        path.starts_with(&entry.path) || real.is_ok_and(|real| path.starts_with(real))
    });
    at_or_below.max_by_key(|entry| entry.path.components().count())
}

fn open(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
}

/// Where an open file is now, by its real name.
fn place_of(file: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Makes the directories that are missing, as container runtimes do: inside an entry, and through no
/// link that leads out of it.
fn make_missing(path: &Path, allowed: &[SharedPath]) -> Result<(), ShareError> {
    let Some(entry) = entry_of(path, allowed).filter(|entry| !entry.read_only) else {
        return Ok(());
    };
    let Ok(rest) = path.strip_prefix(&entry.path) else {
        return Ok(());
    };
    let mut at = open(&entry.path).map_err(failed("open", &entry.path))?;
    for part in rest.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        match mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("make", path)(errno)),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        at = openat2(&at, name, flags, Mode::empty(), inside).map_err(failed("open", path))?;
    }
    Ok(())
}

/// What a mount shows of the host, and whether the guest is to mount it read-only too. `None` if no
/// entry allows it. Blocks.
pub(crate) fn open_share(
    mount: &v1::Mount,
    allowed: &[SharedPath],
) -> Result<Option<(HostShare, bool)>, ShareError> {
    if allowed.is_empty() {
        return Ok(None);
    }
    let path = Path::new(&mount.host_path);
    let source = match open(path) {
        Err(Errno::NOENT) => {
            make_missing(path, allowed)?;
            match open(path) {
                // Not for this node to make.
                Err(Errno::NOENT) if entry_of(path, allowed).is_none() => return Ok(None),
                other => other.map_err(failed("open", path))?,
            }
        }
        Err(_) if entry_of(path, allowed).is_none() => return Ok(None),
        other => other.map_err(failed("open", path))?,
    };
    let real = place_of(&source).map_err(|source| ShareError::Io {
        action: "find",
        path: path.to_owned(),
        source,
    })?;
    let below = |entry: &&SharedPath| {
        std::fs::canonicalize(&entry.path).is_ok_and(|entry| real.starts_with(entry))
    };
    let deepest = allowed
        .iter()
        .filter(below)
        .max_by_key(|entry| entry.path.components().count());
    let Some(entry) = deepest else {
        return match entry_of(path, allowed) {
            Some(entry) => Err(ShareError::Refused(format!(
                "{} leads out of {}",
                path.display(),
                entry.path.display()
            ))),
            None => Ok(None),
        };
    };
    let stat = rustix::fs::fstat(&source).map_err(failed("inspect", path))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory | FileType::RegularFile => {}
        // A socket or a device of the host does nothing in another kernel.
        _ => {
            let rule = format!("{} is neither a directory nor a file", path.display());
            return Err(ShareError::Refused(rule));
        }
    }
    if entry.read_only && !mount.readonly {
        return Err(ShareError::Refused(format!(
            "{} can only be mounted read-only on this node",
            path.display()
        )));
    }
    let recursive = mount.recursive_read_only || entry.read_only;
    let follow_mounts = mount.propagation() == v1::MountPropagation::PropagationHostToContainer;
    if recursive && follow_mounts {
        return Err(ShareError::Refused(format!(
            "{} is read-only to the bottom, which mounts that come later would not be: only \
             PROPAGATION_PRIVATE",
            path.display()
        )));
    }
    let share = HostShare {
        source,
        read_only: mount.readonly,
        recursive: mount.readonly && recursive,
        follow_mounts,
    };
    // What is mounted below a plain read-only mount may be writable: only the server can tell.
    Ok(Some((share, mount.readonly && recursive)))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn mount(path: &Path, readonly: bool) -> v1::Mount {
        v1::Mount {
            host_path: path.to_str().unwrap().to_owned(),
            container_path: "/x".into(),
            readonly,
            ..Default::default()
        }
    }

    struct Bed {
        temp: tempfile::TempDir,
        allowed: Vec<SharedPath>,
    }

    fn bed() -> Bed {
        let temp = tempfile::tempdir().unwrap();
        for name in ["data/deep", "data/fixed", "secret"] {
            fs::create_dir_all(temp.path().join(name)).unwrap();
        }
        let entry = |name: &str, read_only| SharedPath {
            path: temp.path().join(name),
            read_only,
        };
        let allowed = vec![entry("data", false), entry("data/fixed", true)];
        Bed { temp, allowed }
    }

    impl Bed {
        fn open(
            &self,
            path: &str,
            readonly: bool,
        ) -> Result<Option<(HostShare, bool)>, ShareError> {
            open_share(
                &mount(&self.temp.path().join(path), readonly),
                &self.allowed,
            )
        }

        fn inode(&self, path: &str) -> u64 {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(self.temp.path().join(path)).unwrap().ino()
        }
    }

    #[test]
    fn only_what_is_listed_is_shared() {
        let bed = bed();
        let (share, _) = bed.open("data/deep", false).unwrap().unwrap();
        let stat = rustix::fs::fstat(&share.source).unwrap();
        assert_eq!(stat.st_ino, bed.inode("data/deep"));
        assert!(!share.read_only && !share.follow_mounts);
        for path in ["secret", "database", "data2"] {
            assert!(bed.open(path, false).unwrap().is_none(), "{path}");
        }
        assert!(
            open_share(&mount(bed.temp.path(), true), &[])
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn links_are_followed_within_what_is_listed() {
        let bed = bed();
        let path = |name: &str| bed.temp.path().join(name);
        symlink(path("data/deep"), path("data/link")).unwrap();
        symlink(path("data/deep"), path("elsewhere")).unwrap();
        symlink(path("secret"), path("data/out")).unwrap();
        symlink("/proc/self/root/etc", path("data/magic")).unwrap();
        for link in ["data/link", "elsewhere"] {
            let (share, _) = bed.open(link, false).unwrap().unwrap();
            let stat = rustix::fs::fstat(&share.source).unwrap();
            assert_eq!(stat.st_ino, bed.inode("data/deep"), "{link}");
        }
        let error = bed.open("data/out", true).unwrap_err().to_string();
        assert!(error.contains("leads out of"), "{error}");
        assert!(bed.open("data/magic", true).is_err());
        // A path that is to be made does not leave either.
        assert!(bed.open("data/out/new", false).is_err());
        assert!(!path("secret/new").exists());
    }

    #[test]
    fn a_missing_directory_is_made_where_pods_may_write() {
        let bed = bed();
        assert!(bed.open("data/a/b", false).unwrap().is_some());
        assert!(bed.temp.path().join("data/a/b").is_dir());
        assert!(bed.open("data/fixed/new", true).is_err());
        assert!(!bed.temp.path().join("data/fixed/new").exists());
        assert!(bed.open("secret/new", false).unwrap().is_none());
    }

    #[test]
    fn read_only_entries_are_so_to_the_bottom() {
        let bed = bed();
        let error = bed.open("data/fixed", false).unwrap_err().to_string();
        assert!(error.contains("only be mounted read-only"), "{error}");
        let (share, guest) = bed.open("data/fixed", true).unwrap().unwrap();
        assert!(share.read_only && share.recursive && guest);
        // Otherwise it is as the pod asks.
        let (share, guest) = bed.open("data/deep", true).unwrap().unwrap();
        assert!(share.read_only && !share.recursive && !guest);
        let follow = |path: &str, readonly| {
            let wanted = v1::Mount {
                propagation: v1::MountPropagation::PropagationHostToContainer.into(),
                ..mount(&bed.temp.path().join(path), readonly)
            };
            open_share(&wanted, &bed.allowed)
        };
        assert!(follow("data/deep", true).unwrap().unwrap().0.follow_mounts);
        assert!(follow("data/fixed", true).is_err());
    }

    #[test]
    fn sockets_and_pipes_are_refused() {
        let bed = bed();
        let path = bed.temp.path().join("data/pipe");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        assert!(bed.open("data/pipe", false).is_err());
        fs::write(bed.temp.path().join("data/file"), "x").unwrap();
        assert!(bed.open("data/file", false).unwrap().is_some());
    }
}

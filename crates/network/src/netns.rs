//! Named network namespaces as `ip netns` knows them: bind mounts below `/run/netns`.
//!
//! A thread that enters a namespace is never used for anything else: each call has its own, which
//! ends with it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    thread,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{FsType, fstatfs},
};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use serde::{Deserialize, Serialize};

/// Where namespaces have their names.
pub(crate) const NETNS_DIR: &str = "/run/netns";
/// `NSFS_MAGIC`, linux/magic.h.
const NSFS: FsType = FsType(0x6e73_6673);

/// An open network namespace.
#[derive(Debug)]
pub(crate) struct Namespace(File);

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Namespace {
    fn from(namespace: OwnedFd) -> Self {
        Self(namespace.into())
    }
}

impl From<Namespace> for OwnedFd {
    fn from(namespace: Namespace) -> Self {
        namespace.0.into()
    }
}

impl Namespace {
    /// The calling thread's.
    pub(crate) fn current() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self)
    }

    /// The namespace of that name, if there is one.
    pub(crate) fn open(name: &str) -> io::Result<Option<Self>> {
        let file = match File::open(path(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        // A plain file is what a crash between making it and mounting on it leaves.
        Ok((fstatfs(&file)?.filesystem_type() == NSFS).then_some(Self(file)))
    }

    /// Makes the namespace exist.
    pub(crate) fn ensure(name: &str) -> io::Result<Self> {
        if let Some(found) = Self::open(name)? {
            return Ok(found);
        }
        let target = path(name);
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o444)
            .open(&target)?;
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            bind("/proc/thread-self/ns/net", &target, MsFlags::MS_BIND)
        })?;
        Self::open(name)?
            .ok_or_else(|| io::Error::other(format!("{} is not mounted", target.display())))
    }

    /// Runs `work` on a thread in this namespace and waits for it.
    pub(crate) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        on_own_thread(|| {
            setns(self, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }
}

/// Where the namespace of that name is.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

fn bind(source: &str, target: &Path, flags: MsFlags) -> io::Result<()> {
    Ok(mount(
        Some(source),
        target,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("hn-netns".to_owned())
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_panic| Err(io::Error::other("the namespace's thread panicked")))
    })
}

/// Runs `work` on a thread in a new namespace without a name.
pub(crate) fn in_new<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// What [`ensure_dir`] will have to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DirBefore {
    /// There is no `/run/netns`.
    Absent,
    /// It is a plain directory.
    Plain,
    /// It is a mount already.
    Mounted,
}

/// How `/run/netns` is.
pub(crate) fn dir_state() -> io::Result<DirBefore> {
    if !Path::new(NETNS_DIR).exists() {
        return Ok(DirBefore::Absent);
    }
    // Asked of the path itself: mountinfo also lists mounts that another one hides.
    let status = statx(CWD, NETNS_DIR, AtFlags::empty(), StatxFlags::empty())?;
    let mounted = status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    Ok(if mounted {
        DirBefore::Mounted
    } else {
        DirBefore::Plain
    })
}

/// Makes `/run/netns` a shared mount of its own, as `ip netns` does: only then does a namespace's
/// name go away everywhere when it is deleted here.
pub(crate) fn ensure_dir() -> io::Result<()> {
    let dir = Path::new(NETNS_DIR);
    fs::create_dir_all(dir)?;
    if dir_state()? != DirBefore::Mounted {
        bind(NETNS_DIR, dir, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    }
    Ok(mount(
        None::<&str>,
        dir,
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )?)
}

/// Undoes [`ensure_dir`], unless somebody else has a namespace there.
pub(crate) fn restore_dir(before: DirBefore) -> io::Result<()> {
    if before == DirBefore::Mounted {
        return Ok(());
    }
    match fs::read_dir(NETNS_DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Ok(());
            }
        }
    }
    match umount2(NETNS_DIR, MntFlags::empty()) {
        Ok(()) | Err(Errno::EINVAL | Errno::EBUSY) => {}
        Err(error) => return Err(error.into()),
    }
    if before == DirBefore::Plain {
        return Ok(());
    }
    match fs::remove_dir(NETNS_DIR) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::DirectoryNotEmpty
                    | io::ErrorKind::ResourceBusy
            ) =>
        {
            Err(error)
        }
        _gone_or_in_use => Ok(()),
    }
}

/// Removes the name; the namespace ends when nothing else holds it.
pub(crate) fn delete(name: &str) -> io::Result<()> {
    let path = path(name);
    loop {
        match umount2(&path, MntFlags::MNT_DETACH) {
            // Once more: a name may have been mounted on twice.
            Ok(()) => {}
            Err(Errno::EINVAL) => break,
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Names that begin with `prefix`.
pub(crate) fn list(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(NETNS_DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            names.push(name);
        }
    }
    Ok(names)
}

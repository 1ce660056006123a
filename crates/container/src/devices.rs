//! `/dev` of a container, and its terminals.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, symlink},
    },
    path::Path,
};

use rustix::{
    fs::{
        CWD, FileType, Mode, OFlags, ResolveFlags, fstat, major, makedev, minor, mknodat, openat2,
    },
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// Name, major and minor number of the devices that every container has.
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Device numbers of /dev/pts/ptmx.
const PTMX: (u32, u32) = (5, 2);

/// Fills a new, private `/dev`.
pub(crate) fn populate(dev: &Path) -> io::Result<()> {
    for (name, major, minor) in NODES {
        make_node(
            &dev.join(name),
            FileType::CharacterDevice,
            0o666,
            makedev(major, minor),
        )?;
    }
    for (name, target) in LINKS {
        symlink(target, dev.join(name))?;
    }
    ["pts", "shm", "mqueue"]
        .iter()
        .try_for_each(|name| fs::create_dir(dev.join(name)))
}

/// Copies all device nodes of the guest: what a privileged container sees.
pub(crate) fn copy_all(from: &Path, to: &Path, depth: u32) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir()
            && depth > 0
            && !["pts", "shm", "mqueue"]
                .iter()
                .any(|name| entry.file_name() == *name)
        {
            match fs::create_dir(&target) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => copy_all(&entry.path(), &target, depth - 1)?,
            }
        } else if kind.is_char_device() || kind.is_block_device() {
            let metadata = entry.metadata()?;
            let kind = if kind.is_block_device() {
                FileType::BlockDevice
            } else {
                FileType::CharacterDevice
            };
            make_node(&target, kind, metadata.mode() & 0o777, metadata.rdev())?;
        }
    }
    Ok(())
}

fn make_node(path: &Path, kind: FileType, mode: u32, device: u64) -> io::Result<()> {
    match mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A new terminal of the container that this process is in: master and slave.
///
/// `/dev` belongs to the container, who may have put anything there: what is opened must be
/// reached without links and be the device it claims to be.
pub(crate) fn open_terminal(columns: u16, rows: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = openat2(
        CWD,
        "/dev/pts/ptmx",
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?;
    let stat = fstat(&master)?;
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || device != PTMX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "/dev/pts/ptmx is not the terminal multiplexer",
        ));
    }
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    resize(&slave, columns, rows)?;
    Ok((master, slave))
}

/// Sets a terminal's size.
pub(crate) fn resize(tty: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    tcsetwinsize(
        tty,
        Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?;
    Ok(())
}

//! A volume's content for a group (fsGroup), as the kubelet gives it: each file gets the group and its
//! rights, each directory passes the group on.
//!
//! The tree may be anybody's work: it is walked by descriptors, without following a link, to a bounded
//! depth, and until the machine is to end.

use std::{
    io,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fd::OwnedFd,
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, chmodat, chownat, fchmod, fchown,
        fstat, openat, statat,
    },
    io::Errno,
};

use crate::console::log;

/// Descriptors that are open at once.
const MAX_DEPTH: usize = 4096;
const READ_WRITE: u32 = 0o660;
const ENTER: u32 = 0o110;
const SET_GID: u32 = 0o2000;

struct Level {
    directory: OwnedFd,
    entries: Dir,
}

impl Level {
    fn open(at: impl rustix::fd::AsFd, name: impl rustix::path::Arg) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(at, name, flags, Mode::empty())?;
        let entries = Dir::read_from(&directory)?;
        Ok(Self { directory, entries })
    }
}

/// Gives all of a tree to a group; with `keep_matching_root` only if the root is not given to it yet.
/// The root is the last, so that what was cut short is seen.
pub(crate) fn give_to_group(
    root: &Path,
    gid: u32,
    keep_matching_root: bool,
    leaving: &AtomicBool,
) -> io::Result<()> {
    let top = Level::open(CWD, root)?;
    if keep_matching_root && is_given(&fstat(&top.directory)?, gid) {
        return Ok(());
    }
    let mut levels = vec![top];
    let mut refused = 0_u64;
    while let Some(level) = levels.last_mut() {
        if leaving.load(Ordering::Relaxed) {
            return Err(io::Error::other("the machine ends"));
        }
        let Some(entry) = level.entries.next() else {
            let stat = fstat(&level.directory)?;
            tolerate(give_directory(&level.directory, &stat, gid), &mut refused)?;
            levels.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(&level.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let below = Level::open(&level.directory, name)?;
                if levels.len() >= MAX_DEPTH {
                    let deep = format!("its directories are more than {MAX_DEPTH} deep");
                    return Err(io::Error::other(deep));
                }
                levels.push(below);
            }
            kind => {
                let given = give_file(&level.directory, name, kind, &stat, gid);
                tolerate(given, &mut refused)?;
            }
        }
    }
    if refused > 0 {
        log!("{refused} files of {} kept their group", root.display());
    }
    Ok(())
}

/// What may not be changed, such as an immutable file, stays as it is.
fn tolerate(given: io::Result<()>, refused: &mut u64) -> io::Result<()> {
    match given {
        Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
            *refused += 1;
            Ok(())
        }
        other => other,
    }
}

fn rights(kind: FileType) -> u32 {
    match kind {
        FileType::Directory => READ_WRITE | ENTER | SET_GID,
        _ => READ_WRITE,
    }
}

fn is_given(stat: &Stat, gid: u32) -> bool {
    let rights = rights(FileType::from_raw_mode(stat.st_mode));
    stat.st_gid == gid && stat.st_mode & rights == rights
}

fn wanted_mode(stat: &Stat) -> Mode {
    let rights = rights(FileType::from_raw_mode(stat.st_mode));
    Mode::from_raw_mode(stat.st_mode & 0o7777 | rights)
}

fn give_directory(directory: &OwnedFd, stat: &Stat, gid: u32) -> io::Result<()> {
    if is_given(stat, gid) {
        return Ok(());
    }
    fchown(directory, None, Some(Gid::from_raw(gid)))?;
    Ok(fchmod(directory, wanted_mode(stat))?)
}

fn give_file(
    directory: &OwnedFd,
    name: &std::ffi::CStr,
    kind: FileType,
    stat: &Stat,
    gid: u32,
) -> io::Result<()> {
    if is_given(stat, gid) {
        return Ok(());
    }
    let group = Some(Gid::from_raw(gid));
    chownat(directory, name, None, group, AtFlags::SYMLINK_NOFOLLOW)?;
    if kind == FileType::Symlink {
        return Ok(());
    }
    // After the owner: a change of that takes set-user-ID bits away.
    Ok(chmodat(
        directory,
        name,
        wanted_mode(stat),
        AtFlags::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    /// A group that this process may give files to.
    fn group(path: &Path) -> u32 {
        match rustix::process::geteuid().is_root() {
            true => 4711,
            false => fs::metadata(path).unwrap().gid(),
        }
    }

    #[test]
    fn a_tree_gets_the_group_and_its_rights() {
        let temp = tempfile::tempdir().unwrap();
        let (root, outside) = (temp.path().join("v"), temp.path().join("outside"));
        fs::create_dir_all(root.join("d/e")).unwrap();
        for (path, bits) in [("a", 0o4755), ("d/e/b", 0o600)] {
            fs::write(root.join(path), "").unwrap();
            fs::set_permissions(root.join(path), PermissionsExt::from_mode(bits)).unwrap();
        }
        fs::write(&outside, "").unwrap();
        fs::set_permissions(&outside, PermissionsExt::from_mode(0o600)).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        for path in ["", "d", "d/e"] {
            fs::set_permissions(root.join(path), PermissionsExt::from_mode(0o755)).unwrap();
        }
        let gid = group(&root);
        let going = AtomicBool::new(false);
        give_to_group(&root, gid, true, &going).unwrap();
        for (path, bits) in [
            ("", 0o2775),
            ("d", 0o2775),
            ("d/e", 0o2775),
            ("a", 0o4775),
            ("d/e/b", 0o660),
        ] {
            assert_eq!(mode(&root.join(path)), bits, "{path}");
            assert_eq!(fs::metadata(root.join(path)).unwrap().gid(), gid, "{path}");
        }
        assert_eq!(fs::symlink_metadata(root.join("link")).unwrap().gid(), gid);
        assert_eq!(mode(&outside), 0o600, "a link was followed");

        // A root that has it stands for all that is in it, if that is asked for.
        fs::set_permissions(root.join("d/e/b"), PermissionsExt::from_mode(0o600)).unwrap();
        give_to_group(&root, gid, true, &going).unwrap();
        assert_eq!(mode(&root.join("d/e/b")), 0o600);
        give_to_group(&root, gid, false, &going).unwrap();
        assert_eq!(mode(&root.join("d/e/b")), 0o660);
        // As the kubelet has it, a root without one of the rights is no match.
        fs::set_permissions(&root, PermissionsExt::from_mode(0o2755)).unwrap();
        fs::set_permissions(root.join("d/e/b"), PermissionsExt::from_mode(0o600)).unwrap();
        give_to_group(&root, gid, true, &going).unwrap();
        assert_eq!(mode(&root.join("d/e/b")), 0o660);
    }

    #[test]
    fn a_machine_that_ends_and_a_bottomless_tree_end_the_walk() {
        let temp = tempfile::tempdir().unwrap();
        let gid = group(temp.path());
        let leaving = AtomicBool::new(true);
        give_to_group(temp.path(), gid, false, &leaving).unwrap_err();
        let mut at = openat(CWD, temp.path(), OFlags::RDONLY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
            at = openat(&at, "d", OFlags::RDONLY, Mode::empty()).unwrap();
        }
        // Deeper than any path can name, and than this process may have files open.
        let walked = give_to_group(temp.path(), gid, false, &AtomicBool::new(false));
        match walked {
            Ok(()) => assert_eq!(fstat(&at).unwrap().st_gid, gid),
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::MFILE.raw_os_error())),
        }
        // std removes by path.
        drop(at);
        std::process::Command::new("rm")
            .arg("-rf")
            .arg(temp.path())
            .status()
            .unwrap();
    }
}

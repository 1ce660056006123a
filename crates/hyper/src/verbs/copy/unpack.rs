//! Unpacking what a container sends. It is hostile: nothing is written outside of the directory,
//! whatever names and links are in the archive.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Component, Path},
};

use rustix::fs::{self, AtFlags, Mode, OFlags};

use crate::error::{Failure, Result};

/// Writes an archive whose entries are `from` or below it, as `to` in `directory`. Bytes of files.
pub(super) fn unpack(reader: impl Read, directory: &Path, from: &str, to: &str) -> Result<u64> {
    let root = fs::open(
        directory,
        OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(io::Error::from)?;
    let mut archive = tar::Archive::new(reader);
    let mut bytes = 0;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let parts = parts(&path, from, to)?;
        bytes += write(&root, &mut entry, &parts)?;
    }
    Ok(bytes)
}

/// The path as plain names, the first of them exchanged.
fn parts(path: &Path, from: &str, to: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_string_lossy().into_owned()),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Failure::plain(format_args!(
                    "the container sent a path that leads out of the directory: {}",
                    path.display()
                )));
            }
        }
    }
    if from == "." {
        if to != "." {
            names.insert(0, to.to_owned());
        }
        return Ok(names);
    }
    match names.first_mut() {
        Some(first) if first == from => to.clone_into(first),
        _ => {
            return Err(Failure::plain(format_args!(
                "the container sent a file that was not asked for: {}",
                path.display()
            )));
        }
    }
    Ok(names)
}

/// Opens the directory that holds the last name, making it; links are not followed.
fn parent(root: &OwnedFd, parts: &[String]) -> io::Result<OwnedFd> {
    let mut dir = root.try_clone()?;
    for name in parts {
        match fs::mkdirat(&dir, name.as_str(), Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        dir = fs::openat(
            &dir,
            name.as_str(),
            OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
    }
    Ok(dir)
}

fn write(root: &OwnedFd, entry: &mut tar::Entry<'_, impl Read>, parts: &[String]) -> Result<u64> {
    let Some((name, above)) = parts.split_last() else {
        return Ok(0);
    };
    let name = name.as_str();
    let dir = parent(root, above)?;
    let mode = Mode::from_raw_mode(entry.header().mode().unwrap_or(0o644) & 0o777);
    match entry.header().entry_type() {
        tar::EntryType::Directory => {
            match fs::mkdirat(&dir, name, mode | Mode::RWXU) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            Ok(0)
        }
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            clear(&dir, name)?;
            let flags =
                OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = fs::openat(&dir, name, flags, mode).map_err(io::Error::from)?;
            Ok(io::copy(entry, &mut File::from(file))?)
        }
        tar::EntryType::Symlink => {
            let target = entry
                .link_name()?
                .ok_or_else(|| Failure::plain("the container sent a link without a target"))?;
            clear(&dir, name)?;
            fs::symlinkat(target.as_ref(), &dir, name).map_err(io::Error::from)?;
            Ok(0)
        }
        // Devices, sockets and hard links are not files of this machine.
        _ => {
            crate::terminal::note(&format!(
                "hyper: {} is no file, directory or symbolic link and is not copied",
                parts.join("/")
            ));
            Ok(0)
        }
    }
}

/// Makes room for a new file; a directory stays.
fn clear(dir: &OwnedFd, name: &str) -> io::Result<()> {
    match fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            // Names as they are: the library would refuse some.
            let raw = header.as_gnu_mut().unwrap();
            raw.name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            if *kind == tar::EntryType::Symlink {
                header.set_link_name(content).unwrap();
                header.set_size(0);
                header.set_cksum();
                builder.append(&header, io::empty()).unwrap();
            } else {
                header.set_size(content.len() as u64);
                header.set_cksum();
                builder.append(&header, content.as_bytes()).unwrap();
            }
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn files_directories_and_links_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[
            ("etc/", tar::EntryType::Directory, ""),
            ("etc/a", tar::EntryType::Regular, "hello"),
            ("etc/l", tar::EntryType::Symlink, "a"),
        ]);
        assert_eq!(unpack(&bytes[..], dir.path(), "etc", "copy").unwrap(), 5);
        assert_eq!(
            std::fs::read_to_string(dir.path().join("copy/a")).unwrap(),
            "hello"
        );
        assert_eq!(
            std::fs::read_link(dir.path().join("copy/l")).unwrap(),
            Path::new("a")
        );
        // Again, over what is there.
        unpack(&bytes[..], dir.path(), "etc", "copy").unwrap();
    }

    #[test]
    fn nothing_is_written_outside() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().to_str().unwrap();
        for entries in [
            vec![("x/../../evil", tar::EntryType::Regular, "x")],
            vec![("other/evil", tar::EntryType::Regular, "x")],
            vec![
                ("x/", tar::EntryType::Directory, ""),
                ("x/l", tar::EntryType::Symlink, target),
                ("x/l/evil", tar::EntryType::Regular, "x"),
            ],
            vec![
                ("x", tar::EntryType::Symlink, target),
                ("x/evil", tar::EntryType::Regular, "x"),
            ],
        ] {
            let bytes = archive(&entries);
            assert!(
                unpack(&bytes[..], dir.path(), "x", "x").is_err(),
                "{entries:?}"
            );
            drop(std::fs::remove_dir_all(dir.path().join("x")));
            drop(std::fs::remove_file(dir.path().join("x")));
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        // A link in the way of a file is replaced, not followed.
        let victim = outside.path().join("victim");
        std::fs::write(&victim, "keep").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("f")).unwrap();
        unpack(
            &archive(&[("f", tar::EntryType::Regular, "new")])[..],
            dir.path(),
            "f",
            "f",
        )
        .unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "keep");
    }
}

//! Archives to feed in, and file systems to compare with what came out.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "shared by several test files"
)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::Path,
    process::Command,
};

use hypernetes_image::{ImageError, Limits, erofs};
use tar::{EntryType, Header};

/// A member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) kind: EntryType,
    pub(crate) data: Vec<u8>,
    pub(crate) link: String,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

impl Member {
    pub(crate) fn new(name: &str, kind: EntryType) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            data: Vec::new(),
            link: String::new(),
            mode: if kind == EntryType::Directory {
                0o755
            } else {
                0o644
            },
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }
}

pub(crate) fn file(name: &str, data: &[u8]) -> Member {
    Member {
        data: data.to_vec(),
        ..Member::new(name, EntryType::Regular)
    }
}

pub(crate) fn dir(name: &str) -> Member {
    Member::new(name, EntryType::Directory)
}

pub(crate) fn symlink(name: &str, to: &str) -> Member {
    Member {
        link: to.to_owned(),
        ..Member::new(name, EntryType::Symlink)
    }
}

pub(crate) fn hard_link(name: &str, to: &str) -> Member {
    Member {
        link: to.to_owned(),
        ..Member::new(name, EntryType::Link)
    }
}

/// The archive of these members. Names are written as given, whatever they are.
pub(crate) fn tarball(members: &[Member]) -> Vec<u8> {
    let mut out = Vec::new();
    for member in members {
        let mut pax: Vec<(String, Vec<u8>)> = Vec::new();
        let mut header = Header::new_ustar();
        header.set_entry_type(member.kind);
        if member.name.len() < 100 {
            header.as_old_mut().name[..member.name.len()].copy_from_slice(member.name.as_bytes());
        } else {
            pax.push(("path".to_owned(), member.name.clone().into_bytes()));
        }
        if member.link.len() < 100 {
            header.as_old_mut().linkname[..member.link.len()]
                .copy_from_slice(member.link.as_bytes());
        } else {
            pax.push(("linkpath".to_owned(), member.link.clone().into_bytes()));
        }
        for (key, value) in [("uid", member.uid), ("gid", member.gid)] {
            if value > 0o777_7777 {
                pax.push((key.to_owned(), value.to_string().into_bytes()));
            } else if key == "uid" {
                header.set_uid(value);
            } else {
                header.set_gid(value);
            }
        }
        header.set_mode(member.mode);
        header.set_mtime(member.mtime);
        header.set_device_major(member.device.0).unwrap();
        header.set_device_minor(member.device.1).unwrap();
        header.set_size(member.data.len() as u64);
        header.set_cksum();
        for (name, value) in &member.xattrs {
            pax.push((format!("SCHILY.xattr.{name}"), value.clone()));
        }
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_pax_extensions(pax.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
            .unwrap();
        builder.append(&header, member.data.as_slice()).unwrap();
        let bytes = builder.into_inner().unwrap();
        out.extend_from_slice(&bytes[..bytes.len() - 1024]);
    }
    out.extend([0; 1024]);
    out
}

/// Writes the archive's disk image to a file.
pub(crate) fn write_image(tar: &[u8], path: &Path) -> Result<erofs::Written, ImageError> {
    write_image_with(tar, path, &Limits::default())
}

pub(crate) fn write_image_with(
    tar: &[u8],
    path: &Path,
    limits: &Limits,
) -> Result<erofs::Written, ImageError> {
    erofs::write_layer(tar, &mut File::create(path).unwrap(), limits)
}

/// A file as a file system shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) device: (u32, u32),
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    /// The first name, in order, of the same inode.
    pub(crate) first: String,
    pub(crate) links: u64,
}

/// Everything under a directory, by its path there; the directory itself is "".
pub(crate) fn look(root: &Path) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut firsts: BTreeMap<u64, String> = BTreeMap::new();
    let mut paths = Vec::new();
    walk(root, root, &mut paths);
    paths.sort();
    for relative in paths {
        let path = root.join(&relative);
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_file() {
            fs::read(&path).unwrap()
        } else if meta.is_symlink() {
            fs::read_link(&path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        } else {
            Vec::new()
        };
        let device = if meta.file_type().is_char_device() || meta.file_type().is_block_device() {
            (
                rustix::fs::major(meta.rdev()),
                rustix::fs::minor(meta.rdev()),
            )
        } else {
            (0, 0)
        };
        let first = firsts
            .entry(meta.ino())
            .or_insert_with(|| relative.clone())
            .clone();
        seen.insert(
            relative,
            Seen {
                mode: meta.mode(),
                uid: meta.uid(),
                gid: meta.gid(),
                mtime: meta.mtime(),
                device,
                content,
                xattrs: xattrs(&path),
                first,
                links: if meta.is_dir() { 0 } else { meta.nlink() },
            },
        );
    }
    seen
}

fn walk(root: &Path, at: &Path, out: &mut Vec<String>) {
    out.push(at.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
    for entry in fs::read_dir(at).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            walk(root, &entry.path(), out);
        } else {
            out.push(
                entry
                    .path()
                    .strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned(),
            );
        }
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let size = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    let mut found = BTreeMap::new();
    for name in names[..size]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
    {
        let name = std::str::from_utf8(name).unwrap();
        let mut value = vec![0; 64 << 10];
        let size = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value.truncate(size);
        found.insert(name.to_owned(), value);
    }
    found
}

/// An image that the kernel has mounted, until dropped.
pub(crate) struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Nothing, with the reason printed, where mounting is not possible.
    pub(crate) fn new(image: &Path) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: mounting an image needs root");
            return None;
        }
        let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let loaded = filesystems.contains("\terofs")
            || Command::new("modprobe")
                .arg("erofs")
                .status()
                .is_ok_and(|s| s.success());
        if !loaded || !Path::new("/dev/loop-control").exists() {
            eprintln!("SKIP: this kernel has no erofs or no loop devices");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .args([image, dir.path()])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Some(Self { dir })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Layers on top of each other, lowest first, as a container sees them.
    pub(crate) fn overlay(layers: &[Self]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lower: Vec<_> = layers
            .iter()
            .rev()
            .map(|l| l.path().to_str().unwrap())
            .collect();
        let output = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!("ro,lowerdir={}", lower.join(":")))
            .arg(dir.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { dir }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process that another test is just starting may still hold our descriptors.
        let ended = Command::new("umount")
            .arg("-l")
            .arg(self.dir.path())
            .status();
        assert!(
            ended.is_ok_and(|s| s.success()),
            "cannot unmount {}",
            self.dir.path().display()
        );
    }
}

/// Checks an image with erofs-utils and extracts it there; false if the tool is not installed.
pub(crate) fn fsck(image: &Path, extract: &Path) -> bool {
    // Up to version 1.5 it reads twelve bytes behind every inode, those without attributes too: behind the last
    // one there may be nothing.
    let padded = tempfile::NamedTempFile::new().unwrap();
    let size = fs::copy(image, padded.path()).unwrap();
    fs::set_permissions(padded.path(), fs::Permissions::from_mode(0o600)).unwrap();
    padded.as_file().set_len(size + 4096).unwrap();
    let output = match Command::new("fsck.erofs")
        .arg(format!("--extract={}", extract.display()))
        .arg(padded.path())
        .output()
    {
        Ok(output) => output,
        Err(_) => {
            eprintln!("SKIP: fsck.erofs is not installed");
            return false;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !text.contains("<E>"), "{text}");
    true
}

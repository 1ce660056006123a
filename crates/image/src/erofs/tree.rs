//! The file tree of a layer while its archive is read: names and metadata, no file data.
//!
//! Rules, where tar leaves them open:
//! - absolute names are relative to the layer's root, `.` is dropped, `..` refuses the layer;
//! - a directory that is only implied by a longer name is root's, mode 0755, time 0;
//! - a later entry replaces an earlier one of the same name, two directories are merged with the
//!   later metadata, and a directory that is replaced by something else takes its content with it;
//! - a file or link in the middle of a name refuses the layer: links are never followed;
//! - a hard link's target must be an earlier entry of the same layer that is not a directory;
//! - `.wh.NAME` becomes a character device 0:0 called NAME, or makes the directory NAME opaque if
//!   the layer has one; `.wh..wh..opq` makes its directory opaque; other `.wh..wh.` names are
//!   bookkeeping of aufs and are left out. overlayfs does not look at the opaque mark of a layer's
//!   root: the lower layers stay visible under it;
//! - extended attributes of name spaces that Linux does not have, and those that overlayfs would take
//!   as its own (`trusted.overlay.`), are left out.
//!
//! Device nodes and set-id bits are kept as data: containers mount images `nodev`, and the virtual
//! machine is the boundary.

use std::collections::{BTreeMap, HashMap};

use super::format::{self, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG};
use crate::{
    ImageError, Limits,
    tarball::{Entry, EntryKind, invalid, shown},
};

const MAX_COMPONENT: usize = 255;
const MAX_PATH: usize = 4096;
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

pub(crate) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What an inode holds.
#[derive(Debug)]
pub(crate) enum Content {
    Directory {
        children: BTreeMap<Box<[u8]>, u32>,
        opaque: bool,
    },
    File {
        block: u32,
        size: u64,
    },
    Symlink(Box<[u8]>),
    Device(u32),
    Fifo,
}

#[derive(Debug)]
pub(crate) struct Inode {
    /// With the type bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Option<Box<Xattrs>>,
    pub(crate) content: Content,
    whiteout: bool,
}

impl Inode {
    fn implied_directory() -> Self {
        Self {
            mode: S_IFDIR | 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: None,
            content: Content::Directory {
                children: BTreeMap::new(),
                opaque: false,
            },
            whiteout: false,
        }
    }

    pub(crate) fn children(&self) -> Option<&BTreeMap<Box<[u8]>, u32>> {
        match &self.content {
            Content::Directory { children, .. } => Some(children),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    names: u64,
    max_names: u64,
    max_xattr_size: usize,
}

pub(crate) const ROOT: u32 = 0;

impl Tree {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            inodes: vec![Inode::implied_directory()],
            names: 0,
            max_names: limits.max_entries.min(u64::from(u32::MAX - 1)),
            max_xattr_size: limits.max_xattr_size.min(usize::from(u16::MAX)),
        }
    }

    pub(crate) fn inode(&self, index: u32) -> &Inode {
        &self.inodes[index as usize]
    }

    fn inode_mut(&mut self, index: u32) -> &mut Inode {
        &mut self.inodes[index as usize]
    }

    /// Adds an entry of the archive; `block` is where a file's data begins in the image.
    pub(crate) fn add(&mut self, entry: Entry, block: u32) -> Result<(), ImageError> {
        let path = entry.path.clone();
        let mut names = components(&path)?;
        let Some(last) = names.pop() else {
            return self.root_entry(entry);
        };
        if names.iter().any(|name| name.starts_with(b".wh..wh.")) {
            return Ok(());
        }
        let parent = self.directory(&names, &path)?;
        if let Some(hidden) = last.strip_prefix(b".wh.".as_slice()) {
            return self.whiteout(parent, hidden, &entry);
        }
        if entry.kind == EntryKind::HardLink {
            return self.hard_link(parent, last, &entry);
        }
        let inode = self.new_inode(entry, block)?;
        self.place(parent, last, inode)
    }

    fn root_entry(&mut self, entry: Entry) -> Result<(), ImageError> {
        if entry.kind != EntryKind::Directory {
            return Err(invalid(
                entry.name(),
                "the root of a layer must be a directory",
            ));
        }
        let new = self.new_inode(entry, 0)?;
        let root = self.inode_mut(ROOT);
        *root = Inode {
            content: std::mem::replace(&mut root.content, Content::Fifo),
            ..new
        };
        Ok(())
    }

    fn new_inode(&self, entry: Entry, block: u32) -> Result<Inode, ImageError> {
        let name = entry.name();
        let (kind, content) = match entry.kind {
            EntryKind::File => (
                S_IFREG,
                Content::File {
                    block,
                    size: entry.size,
                },
            ),
            EntryKind::Directory => (
                S_IFDIR,
                Content::Directory {
                    children: BTreeMap::new(),
                    opaque: false,
                },
            ),
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() >= MAX_PATH || entry.link.contains(&0)
                {
                    return Err(invalid(
                        name,
                        "a symbolic link needs a target of 1 to 4095 bytes",
                    ));
                }
                (S_IFLNK, Content::Symlink(entry.link.into()))
            }
            EntryKind::Character | EntryKind::Block => {
                let (major, minor) = entry.device;
                if major > 0xfff || minor > 0xf_ffff {
                    return Err(invalid(name, format!("there is no device {major}:{minor}")));
                }
                let kind = if entry.kind == EntryKind::Block {
                    S_IFBLK
                } else {
                    S_IFCHR
                };
                (kind, Content::Device(format::device(major, minor)))
            }
            EntryKind::Fifo => (S_IFIFO, Content::Fifo),
            EntryKind::HardLink => return Err(invalid(name, "the root cannot be a hard link")),
        };
        Ok(Inode {
            mode: kind | entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: self.usable_xattrs(entry.xattrs, &name)?,
            content,
            whiteout: false,
        })
    }

    /// Attributes that an image may bring: of name spaces that Linux has, and none that overlayfs
    /// would read as its own.
    fn usable_xattrs(
        &self,
        mut xattrs: Xattrs,
        name: &str,
    ) -> Result<Option<Box<Xattrs>>, ImageError> {
        xattrs.retain(|key, _| {
            !key.starts_with(b"trusted.overlay.") && format::xattr_index(key).is_some()
        });
        let size: usize = xattrs.iter().map(|(k, v)| k.len() + v.len() + 8).sum();
        if size > self.max_xattr_size {
            let rule = format!(
                "{size} bytes of extended attributes; at most {}",
                self.max_xattr_size
            );
            return Err(invalid(name, rule));
        }
        Ok((!xattrs.is_empty()).then(|| Box::new(xattrs)))
    }

    fn count(&mut self, name: &[u8]) -> Result<(), ImageError> {
        self.names += 1;
        if self.names > self.max_names {
            let rule = format!("a layer may have at most {} entries", self.max_names);
            return Err(invalid(shown(name), rule));
        }
        Ok(())
    }

    fn push(&mut self, inode: Inode) -> u32 {
        self.inodes.push(inode);
        u32::try_from(self.inodes.len() - 1).expect("bounded by max_names")
    }

    fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        self.inode(directory).children()?.get(name).copied()
    }

    fn set_child(&mut self, directory: u32, name: &[u8], inode: u32) {
        if let Content::Directory { children, .. } = &mut self.inode_mut(directory).content {
            children.insert(name.into(), inode);
        }
    }

    fn set_opaque(&mut self, directory: u32) {
        if let Content::Directory { opaque, .. } = &mut self.inode_mut(directory).content {
            *opaque = true;
        }
    }

    /// Walks to a directory, making those that are not there yet.
    fn directory(&mut self, names: &[&[u8]], path: &[u8]) -> Result<u32, ImageError> {
        let mut at = ROOT;
        for name in names {
            at = match self.child(at, name) {
                Some(next) if self.inode(next).children().is_some() => next,
                Some(next) if !self.inode(next).whiteout => {
                    let rule = format!("{} on its way is not a directory", shown(name));
                    return Err(invalid(shown(path), rule));
                }
                found => {
                    self.count(path)?;
                    let new = self.push(Inode::implied_directory());
                    self.set_child(at, name, new);
                    if found.is_some() {
                        self.set_opaque(new);
                    }
                    new
                }
            };
        }
        Ok(at)
    }

    fn place(&mut self, parent: u32, name: &[u8], inode: Inode) -> Result<(), ImageError> {
        self.count(name)?;
        let is_directory = inode.children().is_some();
        let old = self.child(parent, name);
        if let Some(old) = old.filter(|old| is_directory && self.inode(*old).children().is_some()) {
            let old = self.inode_mut(old);
            *old = Inode {
                content: std::mem::replace(&mut old.content, Content::Fifo),
                ..inode
            };
            return Ok(());
        }
        let hides = old.is_some_and(|old| self.inode(old).whiteout);
        let new = self.push(inode);
        if is_directory && hides {
            self.set_opaque(new);
        }
        self.set_child(parent, name, new);
        Ok(())
    }

    fn whiteout(&mut self, parent: u32, hidden: &[u8], entry: &Entry) -> Result<(), ImageError> {
        if hidden == b".wh..opq" {
            self.set_opaque(parent);
            return Ok(());
        }
        if hidden.starts_with(b".wh.") {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(invalid(entry.name(), "a whiteout must name a file"));
        }
        match self.child(parent, hidden) {
            Some(old) if self.inode(old).children().is_some() => self.set_opaque(old),
            // What this layer itself brings hides the lower layers' file as well.
            Some(_) => {}
            None => {
                self.count(hidden)?;
                let new = self.push(Inode {
                    mode: S_IFCHR,
                    uid: 0,
                    gid: 0,
                    mtime: entry.mtime,
                    xattrs: None,
                    content: Content::Device(0),
                    whiteout: true,
                });
                self.set_child(parent, hidden, new);
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, parent: u32, name: &[u8], entry: &Entry) -> Result<(), ImageError> {
        let target = components(&entry.link)?
            .iter()
            .try_fold(ROOT, |at, name| self.child(at, name))
            .filter(|at| self.inode(*at).children().is_none() && !self.inode(*at).whiteout);
        let Some(target) = target else {
            let rule = format!(
                "its hard link target {} is not an earlier file of the same layer",
                shown(&entry.link)
            );
            return Err(invalid(entry.name(), rule));
        };
        self.count(name)?;
        self.set_child(parent, name, target);
        Ok(())
    }

    /// Reachable inodes, parents before children, each once, with their parent and link count.
    pub(crate) fn ordered(&self) -> Vec<Visit> {
        let mut visits: Vec<Visit> = Vec::new();
        let mut seen: HashMap<u32, usize> = HashMap::new();
        let mut stack = vec![(ROOT, ROOT)];
        while let Some((inode, parent)) = stack.pop() {
            if let Some(at) = seen.get(&inode) {
                visits[*at].links += 1;
                continue;
            }
            seen.insert(inode, visits.len());
            let mut links = 1;
            if let Some(children) = self.inode(inode).children() {
                let directories = children
                    .values()
                    .filter(|c| self.inode(**c).children().is_some())
                    .count();
                links = 2 + u32::try_from(directories).expect("bounded by max_names");
                stack.extend(children.values().rev().map(|child| (*child, inode)));
            }
            visits.push(Visit {
                inode,
                parent,
                links,
            });
        }
        visits
    }

    /// An inode's attributes as they go to disk.
    pub(crate) fn encoded_xattrs(&self, index: u32) -> Vec<u8> {
        let inode = self.inode(index);
        let opaque = matches!(inode.content, Content::Directory { opaque: true, .. });
        let own = inode.xattrs.iter().flat_map(|x| x.iter());
        format::encode_xattrs(
            own.map(|(k, v)| (k.as_slice(), v.as_slice()))
                .chain(opaque.then_some((OPAQUE, b"y".as_slice()))),
        )
    }
}

/// One step of [`Tree::ordered`].
#[derive(Debug)]
pub(crate) struct Visit {
    pub(crate) inode: u32,
    pub(crate) parent: u32,
    pub(crate) links: u32,
}

fn components(path: &[u8]) -> Result<Vec<&[u8]>, ImageError> {
    if path.len() > MAX_PATH {
        return Err(invalid(shown(path), "a path may have at most 4096 bytes"));
    }
    if path.contains(&0) {
        return Err(invalid(shown(path), "a path may not contain a zero byte"));
    }
    let mut names = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(invalid(shown(path), "a path may not contain '..'")),
            name if name.len() > MAX_COMPONENT => {
                return Err(invalid(
                    shown(path),
                    "a file name may have at most 255 bytes",
                ));
            }
            name => names.push(name),
        }
    }
    Ok(names)
}

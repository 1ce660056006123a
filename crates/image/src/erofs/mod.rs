//! Writes a layer's tar stream as one self-contained erofs image.
//!
//! ```text
//! block 0        superblock
//! block 1 ..     file data, in the archive's order, each file from a block's start
//! then           the full blocks of directories
//! meta block ..  inodes, each with its attributes and the tail of a directory or symlink
//! ```
//!
//! Data goes to the image while the archive is read; only names and metadata are kept in memory.
//! The result depends on nothing but the tar stream: same layer, same bytes.

mod format;
mod tree;

use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
};

use format::{BLOCK, Layout, RawInode, SLOT, Super};
use tree::{Content, Tree, Visit};

use crate::{
    ImageError, Limits,
    tarball::{EntryKind, Tarball, invalid},
};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Files, directories and links, hard links counted once.
    pub inodes: u64,
    /// Bytes of the image.
    pub size: u64,
}

/// Reads a tar stream to its end and writes it to `out`, an empty file, as an erofs image.
///
/// On error `out` holds an unusable piece.
pub fn write_layer(tar: impl Read, out: &mut File, limits: &Limits) -> Result<Written, ImageError> {
    let mut image = Sink {
        out: BufWriter::with_capacity(1 << 20, out),
        at: 0,
    };
    image.seek_to(BLOCK)?;
    let mut tree = Tree::new(limits);
    let mut tarball = Tarball::new(tar, limits);
    let mut data = 0_u64;
    while let Some(entry) = tarball.next()? {
        let block = image.block()?;
        if entry.kind == EntryKind::File {
            data = data.saturating_add(entry.size);
            if data > limits.max_layer_size {
                let rule = format!("a layer may have at most {} bytes", limits.max_layer_size);
                return Err(invalid(entry.name(), rule));
            }
            let start = image.at;
            let whole = [(0, entry.size)];
            for (offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
                image.seek_to(start + offset)?;
                tarball.copy_data(*length, &mut |piece| image.write(piece))?;
            }
            image.seek_to((start + entry.size).next_multiple_of(BLOCK))?;
        }
        tree.add(entry, block)?;
    }
    tarball.drain()?;
    finish(image, &tree)
}

/// Where an inode ends up.
struct Placed {
    raw: RawInode,
    /// Byte offset from the start of the metadata.
    at: u64,
    xattrs: Vec<u8>,
    /// The name's list of a directory, with `.` and `..`.
    names: Vec<(Box<[u8]>, u32)>,
}

fn finish(mut image: Sink<'_>, tree: &Tree) -> Result<Written, ImageError> {
    let visits = tree.ordered();
    let time = most_common_time(tree, &visits);
    let mut next_block = image.block()?;
    // Slot 0 stays free: programs take inode number 0 for a deleted entry.
    let mut at = 2 * SLOT;
    let mut numbers = HashMap::with_capacity(visits.len());
    let mut placed = Vec::with_capacity(visits.len());
    for visit in &visits {
        let mut inode = place(tree, visit, time, &mut next_block)?;
        inode.raw.serial = u32::try_from(placed.len() + 1).expect("inodes are bounded");
        let record = record_size(&inode, time);
        if at % BLOCK + record > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        inode.at = at;
        numbers.insert(visit.inode, at / SLOT);
        at = (at + record).next_multiple_of(SLOT);
        placed.push(inode);
    }
    let mut tails = Vec::with_capacity(placed.len());
    for (visit, inode) in visits.iter().zip(&placed) {
        let data = match &tree.inode(visit.inode).content {
            Content::Directory { .. } => {
                let entries: Vec<_> = inode
                    .names
                    .iter()
                    .map(|(name, child)| {
                        (
                            &**name,
                            numbers[child],
                            format::dirent_type(tree.inode(*child).mode),
                        )
                    })
                    .collect();
                format::encode_directory(&entries)
            }
            Content::Symlink(target) => target.to_vec(),
            _ => Vec::new(),
        };
        let inline = match inode.raw.layout {
            Layout::Inline => data.len() % 4096,
            Layout::Plain => 0,
        };
        let (blocks, tail) = data.split_at(data.len() - inline);
        if !blocks.is_empty() {
            image.seek_to(u64::from(inode.raw.place) * BLOCK)?;
            image.write(blocks)?;
        }
        tails.push(tail.to_vec());
    }
    let meta_block = next_block;
    for (inode, tail) in placed.iter().zip(&tails) {
        image.seek_to(u64::from(meta_block) * BLOCK + inode.at)?;
        image.write(&inode.raw.encode(time))?;
        image.write(&inode.xattrs)?;
        image.write(tail)?;
    }
    let size = (u64::from(meta_block) * BLOCK + at).next_multiple_of(BLOCK);
    let root = u16::try_from(numbers[&tree::ROOT]).expect("the root is the first inode");
    let inodes = placed.len() as u64;
    let superblock = Super {
        root,
        inodes,
        time,
        blocks: blocks(size)?,
        meta_block,
    };
    image.close(size, &superblock.encode())?;
    Ok(Written { inodes, size })
}

/// Decides an inode's form and takes the blocks that its data needs.
fn place(
    tree: &Tree,
    visit: &Visit,
    time: (i64, u32),
    next_block: &mut u32,
) -> Result<Placed, ImageError> {
    let inode = tree.inode(visit.inode);
    let mut names = Vec::new();
    let (size, first) = match &inode.content {
        Content::Directory { children, .. } => {
            names.extend(children.iter().map(|(name, child)| (name.clone(), *child)));
            names.push((Box::from(b".".as_slice()), visit.inode));
            names.push((Box::from(b"..".as_slice()), visit.parent));
            names.sort();
            (
                format::directory_size(names.iter().map(|(name, _)| &**name)),
                0,
            )
        }
        Content::File { block, size } => (*size, if *size == 0 { 0 } else { *block }),
        Content::Symlink(target) => (target.len() as u64, 0),
        Content::Device(number) => (0, *number),
        Content::Fifo => (0, 0),
    };
    let xattrs = tree.encoded_xattrs(visit.inode);
    let mut placed = Placed {
        raw: RawInode {
            layout: Layout::Plain,
            xattr_size: xattrs.len(),
            mode: inode.mode,
            links: visit.links,
            size,
            place: first,
            serial: 0,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
        },
        at: 0,
        xattrs,
        names,
    };
    if matches!(
        inode.content,
        Content::Directory { .. } | Content::Symlink(_)
    ) {
        let head = record_size(&placed, time);
        let mut count = size.div_ceil(BLOCK);
        // The kernel reads a tail only if it stands in its inode's block.
        if size % BLOCK != 0 && head + size % BLOCK <= BLOCK {
            placed.raw.layout = Layout::Inline;
            count -= 1;
        }
        if count > 0 {
            placed.raw.place = *next_block;
            *next_block = blocks((u64::from(*next_block) + count) * BLOCK)?;
        }
    }
    Ok(placed)
}

/// Bytes of an inode with what stands behind it.
fn record_size(inode: &Placed, time: (i64, u32)) -> u64 {
    let tail = match inode.raw.layout {
        Layout::Inline => inode.raw.size % BLOCK,
        Layout::Plain => 0,
    };
    inode.raw.core_size(time) + inode.xattrs.len() as u64 + tail
}

/// The time that lets most inodes take the short form; the earliest, if several do.
fn most_common_time(tree: &Tree, visits: &[Visit]) -> (i64, u32) {
    let mut counts: HashMap<(i64, u32), u32> = HashMap::new();
    for visit in visits {
        *counts.entry(tree.inode(visit.inode).mtime).or_default() += 1;
    }
    counts
        .into_iter()
        .max_by_key(|(time, count)| (*count, std::cmp::Reverse(*time)))
        .map_or((0, 0), |(time, _)| time)
}

fn blocks(bytes: u64) -> Result<u32, ImageError> {
    u32::try_from(bytes / BLOCK).map_err(|_too_many| invalid("layer", "more than 16 TiB"))
}

/// The image file; what is skipped stays a hole.
struct Sink<'a> {
    out: BufWriter<&'a mut File>,
    at: u64,
}

impl Sink<'_> {
    fn block(&self) -> Result<u32, ImageError> {
        blocks(self.at)
    }

    fn seek_to(&mut self, at: u64) -> Result<(), ImageError> {
        // Short gaps are cheaper written than as a flush and a seek.
        if at >= self.at && at - self.at < BLOCK {
            let gap = usize::try_from(at - self.at).expect("less than a block");
            return self.write(&[0; 4096][..gap]);
        }
        self.out.seek(SeekFrom::Start(at)).map_err(write_error)?;
        self.at = at;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes).map_err(write_error)
    }

    fn close(mut self, size: u64, first_block: &[u8]) -> Result<(), ImageError> {
        self.seek_to(0)?;
        self.write(first_block)?;
        self.out.flush().map_err(write_error)?;
        self.out.get_mut().set_len(size).map_err(write_error)
    }
}

fn write_error(source: std::io::Error) -> ImageError {
    ImageError::Io {
        action: "write a layer's disk".to_owned(),
        source,
    }
}

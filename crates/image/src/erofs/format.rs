//! The on-disk structures of erofs (Linux `fs/erofs/erofs_fs.h`), as far as this writer uses them.

pub(crate) const BLOCK: u64 = 4096;
/// Inode numbers count in slots of this size.
pub(crate) const SLOT: u64 = 32;

const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

pub(crate) const S_IFIFO: u16 = 0o010_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;
const S_IFMT: u16 = 0o170_000;

/// Where an inode's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In consecutive blocks.
    Plain = 0,
    /// In consecutive blocks, the last piece right behind the inode.
    Inline = 2,
}

/// What goes into the superblock.
#[derive(Debug)]
pub(crate) struct Super {
    pub(crate) root: u16,
    pub(crate) inodes: u64,
    /// Time of every compact inode.
    pub(crate) time: (i64, u32),
    pub(crate) blocks: u32,
    pub(crate) meta_block: u32,
}

impl Super {
    /// The first block of the image.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| {
            // The first KiB is left to boot loaders.
            let at = 1024 + at;
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[12]);
        put(14, &self.root.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(24, &self.time.0.to_le_bytes());
        put(32, &self.time.1.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        let sum = crc32c(&block[1024..]);
        block[1028..1032].copy_from_slice(&sum.to_le_bytes());
        block
    }
}

/// One inode's fields.
#[derive(Debug, Clone)]
pub(crate) struct RawInode {
    pub(crate) layout: Layout,
    pub(crate) xattr_size: usize,
    pub(crate) mode: u16,
    pub(crate) links: u32,
    pub(crate) size: u64,
    /// First block of the data, or the device number.
    pub(crate) place: u32,
    pub(crate) serial: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
}

impl RawInode {
    /// Whether the 32-byte form holds everything, given the superblock's time.
    pub(crate) fn is_compact(&self, time: (i64, u32)) -> bool {
        self.mtime == time
            && u16::try_from(self.uid).is_ok()
            && u16::try_from(self.gid).is_ok()
            && u16::try_from(self.links).is_ok()
            && u32::try_from(self.size).is_ok()
    }

    pub(crate) fn core_size(&self, time: (i64, u32)) -> u64 {
        if self.is_compact(time) { 32 } else { 64 }
    }

    pub(crate) fn encode(&self, time: (i64, u32)) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let layout = (self.layout as u16) << 1;
        let count = match self.xattr_size {
            0 => 0,
            size => u16::try_from((size - 12) / 4 + 1).expect("attributes are bounded"),
        };
        if self.is_compact(time) {
            let short = |n: u32| {
                u16::try_from(n)
                    .expect("checked by is_compact")
                    .to_le_bytes()
            };
            out.extend(layout.to_le_bytes());
            out.extend(count.to_le_bytes());
            out.extend(self.mode.to_le_bytes());
            out.extend(short(self.links));
            out.extend(
                u32::try_from(self.size)
                    .expect("checked by is_compact")
                    .to_le_bytes(),
            );
            out.extend([0; 4]);
            out.extend(self.place.to_le_bytes());
            out.extend(self.serial.to_le_bytes());
            out.extend(short(self.uid));
            out.extend(short(self.gid));
            out.extend([0; 4]);
        } else {
            out.extend((layout | 1).to_le_bytes());
            out.extend(count.to_le_bytes());
            out.extend(self.mode.to_le_bytes());
            out.extend([0; 2]);
            out.extend(self.size.to_le_bytes());
            out.extend(self.place.to_le_bytes());
            out.extend(self.serial.to_le_bytes());
            out.extend(self.uid.to_le_bytes());
            out.extend(self.gid.to_le_bytes());
            out.extend(self.mtime.0.to_le_bytes());
            out.extend(self.mtime.1.to_le_bytes());
            out.extend(self.links.to_le_bytes());
            out.extend([0; 16]);
        }
        out
    }
}

/// The file type in a directory entry.
pub(crate) fn dirent_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFLNK => 7,
        _ => 0,
    }
}

const DIRENT: usize = 12;

/// Bytes of a directory with these names (sorted): whole blocks and the used part of the last.
pub(crate) fn directory_size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut blocks, mut used) = (0, 0);
    for name in names {
        let need = DIRENT as u64 + name.len() as u64;
        if used + need > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += need;
    }
    blocks * BLOCK + used
}

/// The content of a directory: per block the fixed-size entries, then their names.
pub(crate) fn encode_directory(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let (mut count, mut used) = (0, 0);
        while let Some((name, ..)) = rest.get(count) {
            let need = DIRENT + name.len();
            if used + need > 4096 {
                break;
            }
            (count, used) = (count + 1, used + need);
        }
        let (block, later) = rest.split_at(count);
        let mut name_at = u16::try_from(count * DIRENT).expect("fits a block");
        for (name, inode, kind) in block {
            out.extend(inode.to_le_bytes());
            out.extend(name_at.to_le_bytes());
            out.extend([*kind, 0]);
            name_at += u16::try_from(name.len()).expect("names are at most 255 bytes");
        }
        for (name, ..) in block {
            out.extend_from_slice(name);
        }
        if !later.is_empty() {
            out.resize(out.len().next_multiple_of(4096), 0);
        }
        rest = later;
    }
    out
}

/// The prefix's number and the rest of an extended attribute's name, for the name spaces that
/// erofs can hold.
pub(crate) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    [
        (b"user.".as_slice(), 1),
        (b"trusted.", 4),
        (b"security.", 6),
    ]
    .into_iter()
    .find_map(|(prefix, index)| name.strip_prefix(prefix).map(|rest| (index, rest)))
    .filter(|(_, rest)| !rest.is_empty() && rest.len() <= 255)
}

/// Extended attributes as they stand behind an inode; nothing if there are none.
pub(crate) fn encode_xattrs<'a>(xattrs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in xattrs {
        let Some((index, rest)) = xattr_index(name) else {
            continue;
        };
        if out.is_empty() {
            out.resize(12, 0);
        }
        out.push(u8::try_from(rest.len()).expect("checked by xattr_index"));
        out.push(index);
        out.extend(
            u16::try_from(value.len())
                .expect("attributes are bounded")
                .to_le_bytes(),
        );
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// A device number as Linux stores it in 32 bits.
pub(crate) fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

/// CRC-32C without the final inversion, as the kernel computes it over the superblock.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0x82F6_3B78
            } else {
                crc >> 1
            };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_castagnoli() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn directories_are_as_long_as_predicted() {
        for count in [1_usize, 2, 15, 16, 300, 5000] {
            let names: Vec<Vec<u8>> = (0..count)
                .map(|i| format!("{i:0width$}", width = 5 + i % 250).into_bytes())
                .collect();
            let entries: Vec<_> = names.iter().map(|n| (n.as_slice(), 1, 1)).collect();
            let size = directory_size(names.iter().map(Vec::as_slice));
            assert_eq!(encode_directory(&entries).len() as u64, size, "{count}");
        }
    }

    #[test]
    fn device_numbers_are_split_as_linux_does() {
        assert_eq!(device(1, 3), 0x103);
        assert_eq!(device(8, 0x1234), 0x0120_0834);
    }
}

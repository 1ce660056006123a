//! A layer's tar stream, entry by entry, with bounds on everything it can ask for.
//!
//! Headers are parsed by the `tar` crate; the loop over records is our own, because the crate reads
//! extension records of any size into memory and splits PAX records at newlines, which breaks binary
//! attributes such as file capabilities. Where tar dialects leave room, the reading is that of the
//! archive reader that Docker and containerd use, so that an image means here what it means there.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use tar::{EntryType, Header};

use crate::{ImageError, Limits};

const BLOCK: u64 = 512;
const MAX_NAME: u64 = 8192;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    HardLink,
    Character,
    Block,
    Fifo,
}

/// One member of the archive; its data, if any, is read from the [`Tarball`] before the next.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    /// Bytes of the file as a reader sees it.
    pub(crate) size: u64,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Offset and length of each stretch of data, if the file has holes.
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
}

impl Entry {
    /// The name for error messages.
    pub(crate) fn name(&self) -> String {
        shown(&self.path)
    }
}

/// Bytes from an archive as text for a message: bounded, no control characters.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(256)])
        .escape_debug()
        .to_string();
    if bytes.len() > 256 {
        format!("{text}…")
    } else {
        text
    }
}

/// A rule of the tar format, or one of ours, that an archive breaks.
pub(crate) fn invalid(what: impl Into<String>, rule: impl Into<String>) -> ImageError {
    ImageError::Invalid {
        what: what.into(),
        rule: rule.into(),
    }
}

/// What reading the stream ended in: an error of our own that travelled through [`io::Error`], or a
/// broken archive.
pub(crate) fn read_error(source: io::Error) -> ImageError {
    match source.downcast::<ImageError>() {
        Ok(inner) => inner,
        Err(source) => invalid("layer", format!("cannot be read as an archive: {source}")),
    }
}

#[derive(Default)]
struct Extensions {
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

/// Reader of a tar stream.
pub(crate) struct Tarball<'a, R> {
    inner: R,
    limits: &'a Limits,
    /// Data bytes of the current entry that have not been read.
    left: u64,
    /// Zero bytes that follow them.
    padding: u64,
    records: u64,
    buffer: Box<[u8]>,
}

impl<'a, R: Read> Tarball<'a, R> {
    pub(crate) fn new(inner: R, limits: &'a Limits) -> Self {
        Self {
            inner,
            limits,
            left: 0,
            padding: 0,
            records: 0,
            buffer: vec![0; 64 << 10].into(),
        }
    }

    /// The next member, or nothing at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, ImageError> {
        let mut extensions = Extensions::default();
        loop {
            self.skip(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let Some(block) = self.header_block()? else {
                return Ok(None);
            };
            self.records += 1;
            if self.records > self.limits.max_entries.saturating_mul(4) {
                return Err(invalid(
                    "layer",
                    format!("more than {} records", self.records - 1),
                ));
            }
            let header = Header::from_byte_slice(&block);
            check_sum(&block)?;
            let size = number(&header.as_old().size)
                .and_then(|n| u64::try_from(n).ok())
                .ok_or_else(|| invalid("layer", "an entry's size is not a number"))?;
            match header.entry_type() {
                EntryType::XHeader => {
                    if !extensions.pax.is_empty() {
                        return Err(invalid("layer", "two PAX headers for one entry"));
                    }
                    let data = self.extension(size, self.limits.max_pax_size, "PAX header")?;
                    extensions.pax = parse_pax(&data)?;
                }
                EntryType::XGlobalHeader => {
                    // Applied by no container engine; skipped, but not without bound.
                    self.extension(size, self.limits.max_pax_size, "PAX header")?;
                }
                EntryType::GNULongName => {
                    extensions.long_name = Some(self.extension(size, MAX_NAME, "long name")?);
                }
                EntryType::GNULongLink => {
                    extensions.long_link =
                        Some(self.extension(size, MAX_NAME, "long link name")?);
                }
                _ => return self.entry(header, size, extensions).map(Some),
            }
        }
    }

    /// Reads all of the current entry's data that is left into `sink`, in pieces.
    pub(crate) fn copy_data(
        &mut self,
        mut length: u64,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        while length > 0 {
            let want = usize::try_from(length)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            let got = self
                .inner
                .read(&mut self.buffer[..want])
                .map_err(read_error)?;
            if got == 0 {
                return Err(invalid("layer", "the archive ends inside a file"));
            }
            self.left = self
                .left
                .checked_sub(got as u64)
                .ok_or_else(|| invalid("layer", "a file has more data than its header says"))?;
            length -= got as u64;
            sink(&self.buffer[..got])?;
        }
        Ok(())
    }

    /// What is read from; it stands at the current entry's data.
    pub(crate) fn source(&self) -> &R {
        &self.inner
    }

    /// Reads what follows the archive's end marker, so that digests cover the whole stream.
    pub(crate) fn drain(mut self) -> Result<(), ImageError> {
        io::copy(&mut self.inner, &mut io::sink())
            .map(drop)
            .map_err(read_error)
    }

    fn skip(&mut self, length: u64) -> Result<(), ImageError> {
        let got =
            io::copy(&mut (&mut self.inner).take(length), &mut io::sink()).map_err(read_error)?;
        if got == length {
            Ok(())
        } else {
            Err(invalid("layer", "the archive ends inside a file"))
        }
    }

    fn block(&mut self) -> Result<Option<[u8; 512]>, ImageError> {
        let mut block = [0; 512];
        let mut filled = 0;
        while filled < block.len() {
            match self.inner.read(&mut block[filled..]).map_err(read_error)? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(invalid("layer", "the archive ends inside a header")),
                n => filled += n,
            }
        }
        Ok(Some(block))
    }

    fn header_block(&mut self) -> Result<Option<[u8; 512]>, ImageError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block.iter().any(|b| *b != 0) {
            return Ok(Some(block));
        }
        match self.block()? {
            Some(second) if second.iter().any(|b| *b != 0) => {
                Err(invalid("layer", "a lone zero block stands between entries"))
            }
            _ => Ok(None),
        }
    }

    fn extension(&mut self, size: u64, limit: u64, what: &str) -> Result<Vec<u8>, ImageError> {
        if size > limit {
            return Err(invalid(
                "layer",
                format!("a {what} of {size} bytes; at most {limit} are taken"),
            ));
        }
        let mut data = Vec::new();
        (&mut self.inner)
            .take(size)
            .read_to_end(&mut data)
            .map_err(read_error)?;
        if data.len() as u64 != size {
            return Err(invalid(
                "layer",
                format!("the archive ends inside a {what}"),
            ));
        }
        self.padding = padding(size);
        Ok(data)
    }

    fn entry(
        &mut self,
        header: &Header,
        header_size: u64,
        extensions: Extensions,
    ) -> Result<Entry, ImageError> {
        let Extensions {
            mut pax,
            long_name,
            long_link,
        } = extensions;
        let path = pax
            .remove(b"path".as_slice())
            .or_else(|| long_name.map(until_nul))
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax
            .remove(b"linkpath".as_slice())
            .or_else(|| long_link.map(until_nul))
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        let bad = |rule: &str| invalid(shown(&path), rule);
        let mut stored = match pax.remove(b"size".as_slice()) {
            Some(text) => decimal(&text).ok_or_else(|| bad("its PAX size is not a number"))?,
            None => header_size,
        };
        let id = |pax: Option<Vec<u8>>, field: &[u8]| match pax {
            Some(text) => decimal(&text),
            None => number(field).and_then(|n| u64::try_from(n).ok()),
        };
        let old = header.as_old();
        let uid = id(pax.remove(b"uid".as_slice()), &old.uid)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| bad("its user id is not a 32-bit number"))?;
        let gid = id(pax.remove(b"gid".as_slice()), &old.gid)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| bad("its group id is not a 32-bit number"))?;
        let mtime = match pax.remove(b"mtime".as_slice()) {
            Some(text) => timestamp(&text).ok_or_else(|| bad("its PAX mtime is not a time"))?,
            None => (
                number(&old.mtime).ok_or_else(|| bad("its mtime is not a number"))?,
                0,
            ),
        };
        let mode = number(&old.mode).ok_or_else(|| bad("its mode is not a number"))? & 0o7777;
        let kind = match header.entry_type() {
            EntryType::Regular if path.ends_with(b"/") => EntryKind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => EntryKind::File,
            EntryType::Directory => EntryKind::Directory,
            EntryType::Symlink => EntryKind::Symlink,
            EntryType::Link => EntryKind::HardLink,
            EntryType::Char => EntryKind::Character,
            EntryType::Block => EntryKind::Block,
            EntryType::Fifo => EntryKind::Fifo,
            other => {
                return Err(bad(&format!(
                    "entry type {:#04x} is not known",
                    other.as_byte()
                )));
            }
        };
        if kind != EntryKind::File {
            // Only files have data, whatever their header says.
            stored = 0;
        }
        let mut device = (0, 0);
        if matches!(kind, EntryKind::Character | EntryKind::Block) {
            let part = |range: std::ops::Range<usize>| {
                number(&header.as_bytes()[range]).and_then(|n| u32::try_from(n).ok())
            };
            let (Some(major), Some(minor)) = (part(329..337), part(337..345)) else {
                return Err(bad("its device number is not a number"));
            };
            device = (major, minor);
        }
        let mut xattrs = BTreeMap::new();
        for (key, value) in pax {
            if key.starts_with(b"GNU.sparse.") {
                return Err(bad("sparse files in PAX format are not supported"));
            }
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.".as_slice()) {
                xattrs.insert(name.to_vec(), value);
            }
        }
        self.left = stored;
        self.padding = padding(stored);
        let (size, sparse) = if header.entry_type() == EntryType::GNUSparse {
            let (size, map) = self.sparse_map(header, stored, &path)?;
            (size, Some(map))
        } else {
            (stored, None)
        };
        let mode = u16::try_from(mode).expect("masked to 12 bits");
        Ok(Entry {
            path,
            link,
            kind,
            mode,
            uid,
            gid,
            mtime,
            size,
            device,
            xattrs,
            sparse,
        })
    }

    /// The map of a sparse file in the old GNU format, which may go on in further blocks.
    fn sparse_map(
        &mut self,
        header: &Header,
        stored: u64,
        path: &[u8],
    ) -> Result<(u64, Vec<(u64, u64)>), ImageError> {
        let bad = |rule: &str| invalid(shown(path), rule);
        let unsigned = |field: &[u8]| number(field).and_then(|n| u64::try_from(n).ok());
        let header = header
            .as_gnu()
            .ok_or_else(|| bad("a sparse file without a GNU header"))?;
        let size =
            unsigned(&header.realsize).ok_or_else(|| bad("its real size is not a number"))?;
        let mut fields = header.as_header().as_bytes()[386..482].to_vec();
        let mut more = header.isextended[0] != 0;
        let (mut map, mut at, mut data) = (Vec::new(), 0_u64, 0_u64);
        loop {
            for pair in fields.chunks_exact(24) {
                if pair[0] == 0 || pair[12] == 0 {
                    continue;
                }
                let (Some(offset), Some(length)) = (unsigned(&pair[..12]), unsigned(&pair[12..]))
                else {
                    return Err(bad("its sparse map is not made of numbers"));
                };
                let end = offset.checked_add(length).filter(|end| *end <= size);
                let (Some(end), true) = (end, offset >= at) else {
                    return Err(bad("its sparse map is out of order or beyond its end"));
                };
                (at, data) = (end, data + length);
                map.push((offset, length));
            }
            if !more {
                break;
            }
            if map.len() as u64 > self.limits.max_entries {
                return Err(bad("its sparse map is too long"));
            }
            let block = self
                .block()?
                .ok_or_else(|| bad("the archive ends inside its sparse map"))?;
            fields = block[..504].to_vec();
            more = block[504] != 0;
        }
        if data != stored {
            return Err(bad("its sparse map does not add up to its data"));
        }
        Ok((size, map))
    }
}

fn padding(size: u64) -> u64 {
    (BLOCK - size % BLOCK) % BLOCK
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn check_sum(block: &[u8; 512]) -> Result<(), ImageError> {
    let stated = number(&block[148..156]);
    let bytes = || block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]);
    let unsigned: i64 = bytes().map(|b| i64::from(*b)).sum();
    let signed: i64 = bytes().map(|b| i64::from(b.cast_signed())).sum();
    if stated == Some(unsigned) || stated == Some(signed) {
        Ok(())
    } else {
        Err(invalid("layer", "an entry's header has a wrong checksum"))
    }
}

/// A numeric header field: octal digits, blank for zero, or GNU's base 256.
fn number(field: &[u8]) -> Option<i64> {
    if field.first().is_some_and(|b| b & 0x80 != 0) {
        let negative = field[0] & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        for (i, byte) in field.iter().enumerate() {
            let byte = if i == 0 {
                if negative { *byte } else { byte & 0x7f }
            } else {
                *byte
            };
            value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
            if i == 0 && negative {
                value = i64::from(byte.cast_signed());
            }
        }
        return Some(value);
    }
    let text: &[u8] = field.split(|b| *b == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).ok()?.trim_matches(' ');
    if text.is_empty() {
        return Some(0);
    }
    if text.starts_with('+') {
        return None;
    }
    i64::from_str_radix(text, 8).ok()
}

fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// A PAX time: seconds, maybe negative, maybe with a fraction. Nanoseconds count upwards.
fn timestamp(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = text
        .strip_prefix('-')
        .map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds = i64::try_from(decimal(whole.as_bytes())?).ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().ok()?;
    match (negative, nanos) {
        (false, _) => Some((seconds, nanos)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((-seconds - 1, 1_000_000_000 - nanos)),
    }
}

/// Records of the form `LENGTH KEY=VALUE\n`, where the length covers the whole record.
fn parse_pax(mut data: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ImageError> {
    let bad = || invalid("layer", "a PAX header is malformed");
    let mut records = BTreeMap::new();
    while !data.is_empty() {
        let space = data
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or_else(bad)?;
        let length = decimal(&data[..space])
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(bad)?;
        if length <= space + 1 || length > data.len() || data[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &data[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key.is_empty() {
            return Err(bad());
        }
        if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
            // An empty value takes an earlier one back.
            records.remove(key);
        } else {
            records.insert(key.to_vec(), value.to_vec());
        }
        data = &data[length..];
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(tar: &[u8]) -> Result<Vec<Entry>, ImageError> {
        let limits = Limits::default();
        let mut tarball = Tarball::new(tar, &limits);
        let mut entries = Vec::new();
        while let Some(entry) = tarball.next()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    fn one_file(pax: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions(pax.iter().copied()).unwrap();
        let mut header = Header::new_ustar();
        header.set_size(3);
        header.set_mode(0o4755);
        header.set_path("a").unwrap();
        header.set_cksum();
        builder.append(&header, b"abc".as_slice()).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn binary_attributes_with_newlines_survive() {
        let value = b"\x01\n\0=\n\xff";
        let entries = read(&one_file(&[("SCHILY.xattr.security.capability", value)])).unwrap();
        assert_eq!(entries[0].xattrs[b"security.capability".as_slice()], value);
        assert_eq!(entries[0].mode, 0o4755);
    }

    #[test]
    fn pax_overrides_the_header() {
        let entries = read(&one_file(&[
            ("path", b"long/name"),
            ("uid", b"70000"),
            ("mtime", b"-1.25"),
            ("gid", b"4294967295"),
        ]))
        .unwrap();
        let entry = &entries[0];
        assert_eq!(
            (entry.path.as_slice(), entry.uid, entry.gid),
            (b"long/name".as_slice(), 70000, u32::MAX)
        );
        assert_eq!(entry.mtime, (-2, 750_000_000));
    }

    #[test]
    fn a_user_id_beyond_32_bits_is_refused() {
        let error = read(&one_file(&[("uid", b"4294967296")])).unwrap_err();
        assert!(error.to_string().contains("user id"), "{error}");
    }

    #[test]
    fn a_huge_pax_header_is_refused_before_it_is_read() {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        let error = read(header.as_bytes()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("PAX header of 1099511627776 bytes"),
            "{error}"
        );
    }

    #[test]
    fn broken_streams_are_errors() {
        let tar = one_file(&[]);
        for cut in [1, 100, 511, 513, 514] {
            assert!(read(&tar[..cut]).is_err(), "cut at {cut}");
        }
        let mut flipped = tar.clone();
        flipped[0] ^= 1;
        assert!(read(&flipped).unwrap_err().to_string().contains("checksum"));
        for pax in [
            "5 a=b\n", "99 a=b\n", "6 a=bc", "4 a\n", "x a=b\n", "6 =bc\n",
        ] {
            assert!(
                parse_pax(pax.as_bytes()).is_err() || pax == "6 a=b\n",
                "{pax}"
            );
        }
    }

    #[test]
    fn numbers_in_both_encodings() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x01\0\0\0\0"), Some(1 << 32));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(number(b"9999999\0"), None);
        assert_eq!(
            number(&[
                0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff
            ]),
            None
        );
    }

    #[test]
    fn sparse_files_are_mapped() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNUSparse);
        header.set_path("s").unwrap();
        header.set_size(512);
        {
            let gnu = header.as_gnu_mut().unwrap();
            gnu.sparse[0].set_offset(4096);
            gnu.sparse[0].set_length(512);
            gnu.set_real_size(1 << 20);
        }
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        let mut tar = header.as_bytes().to_vec();
        tar.extend([7; 512]);
        let entries = read(&tar).unwrap();
        assert_eq!(entries[0].size, 1 << 20);
        assert_eq!(entries[0].sparse, Some(vec![(4096, 512)]));
    }
}

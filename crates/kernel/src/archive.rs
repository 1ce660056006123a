//! Debian packages, read as what they may be: hostile.
//!
//! A `.deb` is an `ar` archive whose member `data.tar.*` is a compressed tar. Nothing is unpacked
//! by the names in it: the caller is shown each file's name and content, and everything that is
//! read is bounded.

use std::io::{self, Read, Write};

/// The whole of an uncompressed package: Debian's largest kernel is a fifth of this.
const MAX_TOTAL: u64 = 4 << 30;
const MAX_ENTRIES: usize = 100_000;
const MAX_NAME: usize = 4096;

const MAGIC: &[u8; 8] = b"!<arch>\n";

/// What is wrong with an archive, or reading it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    #[error("{0}")]
    Format(&'static str),
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Calls `visit` with path (relative, plain) and content of each regular file of a `.deb`.
/// Entries with other paths or kinds are passed over.
pub(crate) fn visit_deb<R: Read>(
    mut deb: R,
    mut visit: impl FnMut(&str, &mut dyn Read) -> io::Result<()>,
) -> Result<(), ArchiveError> {
    let mut magic = [0; 8];
    deb.read_exact(&mut magic)
        .map_err(|_cause| ArchiveError::Format("it is not a Debian package"))?;
    if &magic != MAGIC {
        return Err(ArchiveError::Format("it is not a Debian package"));
    }
    // A package has three members; some have a signature more.
    for _ in 0..16 {
        let mut header = [0; 60];
        deb.read_exact(&mut header)
            .map_err(|_cause| ArchiveError::Format("it has no data.tar"))?;
        if header[58..] != *b"`\n" {
            return Err(ArchiveError::Format("its archive is damaged"));
        }
        let text = |range: std::ops::Range<usize>| {
            std::str::from_utf8(&header[range])
                .map(str::trim_end)
                .unwrap_or_default()
        };
        let name = text(0..16).trim_end_matches('/').to_owned();
        let size: u64 = text(48..58)
            .parse()
            .map_err(|_cause| ArchiveError::Format("its archive is damaged"))?;
        if name.starts_with("data.tar") {
            let data = decompress(deb.take(size))?.take(MAX_TOTAL);
            return visit_tar(data, &mut visit);
        }
        // Members are padded to even sizes.
        io::copy(&mut (&mut deb).take(size + size % 2), &mut io::sink())?;
    }
    Err(ArchiveError::Format("it has no data.tar"))
}

fn visit_tar(
    data: impl Read,
    visit: &mut impl FnMut(&str, &mut dyn Read) -> io::Result<()>,
) -> Result<(), ArchiveError> {
    let mut archive = tar::Archive::new(data);
    for (count, entry) in archive.entries()?.enumerate() {
        if count >= MAX_ENTRIES {
            return Err(ArchiveError::Format("it has too many files"));
        }
        let mut entry = entry?;
        if entry.header().entry_type() != tar::EntryType::Regular {
            continue;
        }
        let name = entry.path_bytes().into_owned();
        let Some(name) = std::str::from_utf8(&name).ok().and_then(plain) else {
            continue;
        };
        visit(name, &mut entry)?;
    }
    // To the end of the compressed data, where damage shows.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(())
}

/// The path without a leading `./`, if it is relative and does not climb.
fn plain(path: &str) -> Option<&str> {
    let path = path.strip_prefix("./").unwrap_or(path);
    let ok = !path.is_empty()
        && path.len() <= MAX_NAME
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    ok.then_some(path)
}

/// Undoes gzip, xz or zstd, told by the first bytes; anything else is passed through.
pub(crate) fn decompress<'a>(mut input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::new();
    (&mut input).take(6).read_to_end(&mut start)?;
    let kind = start.clone();
    let input = io::Cursor::new(start).chain(input);
    Ok(match kind.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(input)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            // A decoder that is given a limit does not obey a header that asks for gigabytes.
            let stream = xz2::stream::Stream::new_stream_decoder(128 << 20, 0)?;
            Box::new(xz2::read::XzDecoder::new_stream(input, stream))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::Decoder::new(input)?;
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
        _ => Box::new(input),
    })
}

/// Copies at most `limit` bytes; more is an error.
pub(crate) fn copy_bounded(
    input: &mut dyn Read,
    output: &mut dyn Write,
    limit: u64,
) -> io::Result<u64> {
    let copied = io::copy(&mut input.take(limit + 1), output)?;
    if copied > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "a file in it is too large",
        ));
    }
    Ok(copied)
}

/// Reads at most `limit` bytes; more is an error.
pub(crate) fn read_bounded(input: &mut dyn Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    copy_bounded(input, &mut bytes, limit)?;
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A .deb with these files, its data compressed by `compress`.
    pub(crate) fn deb(
        files: &[(&str, &[u8])],
        suffix: &str,
        compress: fn(&[u8]) -> Vec<u8>,
    ) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            // Written raw: the builder refuses hostile names.
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        let data = compress(&builder.into_inner().unwrap());
        let mut out = MAGIC.to_vec();
        for (name, content) in [
            ("debian-binary", b"2.0\n".as_slice()),
            ("control.tar", b"odd"),
            (&format!("data.tar{suffix}"), &data),
        ] {
            out.extend_from_slice(
                format!(
                    "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
                    0,
                    0,
                    0,
                    "100644",
                    content.len()
                )
                .as_bytes(),
            );
            out.extend_from_slice(content);
            if content.len() % 2 == 1 {
                out.push(b'\n');
            }
        }
        out
    }

    pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        xz2::read::XzEncoder::new(bytes, 1)
            .read_to_end(&mut out)
            .unwrap();
        out
    }

    pub(crate) fn zst(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 1).unwrap()
    }

    pub(crate) fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        flate2::read::GzEncoder::new(bytes, flate2::Compression::fast())
            .read_to_end(&mut out)
            .unwrap();
        out
    }

    fn names(deb: &[u8]) -> Result<Vec<String>, ArchiveError> {
        let mut names = Vec::new();
        visit_deb(deb, |name, content| {
            names.push(format!("{name}={}", read_bounded(content, 1 << 20)?.len()));
            Ok(())
        })?;
        Ok(names)
    }

    #[test]
    fn every_compression_is_read() {
        let files: &[(&str, &[u8])] = &[("./boot/vmlinuz-1", b"kernel"), ("lib/x", b"")];
        for (suffix, compress) in [
            ("", <[u8]>::to_vec as fn(&[u8]) -> Vec<u8>),
            (".xz", xz),
            (".zst", zst),
            (".gz", gz),
        ] {
            let read = names(&deb(files, suffix, compress)).unwrap();
            assert_eq!(read, ["boot/vmlinuz-1=6", "lib/x=0"], "{suffix}");
        }
    }

    #[test]
    fn hostile_names_are_passed_over() {
        let files: &[(&str, &[u8])] = &[
            ("/etc/passwd", b"x"),
            ("../../etc/passwd", b"x"),
            ("a/../../b", b"x"),
            ("./fine", b""),
        ];
        assert_eq!(names(&deb(files, ".gz", gz)).unwrap(), ["fine=0"]);
    }

    #[test]
    fn damaged_archives_are_errors() {
        let good = deb(&[("a", b"b")], ".xz", xz);
        assert!(names(b"").is_err());
        assert!(names(b"#!/bin/sh\necho").is_err());
        for cut in [9, 70, 130, good.len() - 30] {
            assert!(names(&good[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn bombs_are_cut_off() {
        let bomb = vec![0; 4 << 20];
        let deb = deb(&[("bomb", &bomb)], ".xz", xz);
        assert!(deb.len() < 10_000);
        assert!(
            matches!(names(&deb), Err(ArchiveError::Read(e)) if e.kind() == io::ErrorKind::FileTooLarge)
        );
    }
}

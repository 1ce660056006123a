//! A layer's blob on its way to a disk: hash, decompress, bound, hash, write.

use std::{
    cell::Cell,
    fs::File,
    io::{self, BufReader, Read},
};

use hypernetes_types::Digest;
use sha2::{Digest as _, Sha256};

use crate::{
    ImageError, Limits, erofs,
    tarball::{invalid, read_error},
};

/// How a layer's blob is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// What these first bytes of a file say.
    pub(crate) fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// What a layer must turn out to be.
#[derive(Debug)]
pub(crate) struct Promise<'a> {
    pub(crate) blob: &'a Digest,
    pub(crate) diff_id: &'a Digest,
}

/// Reads a layer's blob to its end, writes its disk to `out` and checks both digests.
pub(crate) fn convert(
    source: impl Read,
    compression: Compression,
    promise: &Promise<'_>,
    out: &mut File,
    limits: &Limits,
) -> Result<erofs::Written, ImageError> {
    let fetched = Cell::new(0);
    let mut blob = HashRead {
        inner: source,
        hash: Sha256::new(),
        count: &fetched,
    };
    let written = {
        let packed = BufReader::with_capacity(64 << 10, &mut blob);
        let unpacked: Box<dyn Read + '_> = match compression {
            Compression::None => Box::new(packed),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
            Compression::Zstd => Box::new(
                zstd::stream::read::Decoder::with_buffer(packed).map_err(|source| {
                    ImageError::Io {
                        action: "set up zstd".to_owned(),
                        source,
                    }
                })?,
            ),
        };
        let mut tar = Guard {
            inner: unpacked,
            hash: Sha256::new(),
            count: 0,
            packed: &fetched,
            limits,
        };
        erofs::write_layer(BufReader::with_capacity(128 << 10, &mut tar), out, limits)
            .map(|written| (written, sum(tar.hash)))
    };
    if matches!(written, Err(ImageError::Io { .. })) {
        return written.map(|(written, _)| written);
    }
    // An altered blob mostly shows as a broken archive: its digest tells which it is.
    io::copy(&mut blob, &mut io::sink()).map_err(read_error)?;
    check(promise.blob, sum(blob.hash))?;
    let (written, diff_id) = written?;
    check(promise.diff_id, diff_id)?;
    Ok(written)
}

fn check(expected: &Digest, actual: Digest) -> Result<(), ImageError> {
    if *expected == actual {
        Ok(())
    } else {
        Err(ImageError::DigestMismatch {
            expected: expected.clone(),
            actual,
        })
    }
}

/// The digest of bytes in memory.
pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    sum(Sha256::new_with_prefix(bytes))
}

fn sum(hash: Sha256) -> Digest {
    Digest::from_sha256(hash.finalize().into())
}

struct HashRead<'a, R> {
    inner: R,
    hash: Sha256,
    count: &'a Cell<u64>,
}

impl<R: Read> Read for HashRead<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.count.set(self.count.get() + got as u64);
        Ok(got)
    }
}

/// Hashes the tar stream and stops what grows beyond reason.
struct Guard<'a, R> {
    inner: R,
    hash: Sha256,
    count: u64,
    packed: &'a Cell<u64>,
    limits: &'a Limits,
}

impl<R: Read> Read for Guard<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.count += got as u64;
        let limits = self.limits;
        if self.count > limits.max_layer_size {
            let rule = format!("a layer may have at most {} bytes", limits.max_layer_size);
            return Err(io::Error::other(invalid("layer", rule)));
        }
        let reason = self.packed.get().saturating_mul(limits.max_ratio);
        if self.count > limits.ratio_free_size.saturating_add(reason) {
            let rule = format!(
                "it grows more than {} times when unpacked",
                limits.max_ratio
            );
            return Err(io::Error::other(invalid("layer", rule)));
        }
        Ok(got)
    }
}

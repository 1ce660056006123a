//! A VM that stands still, as a file: a header of ours, and the VMM's own stream behind it.
//!
//! ```text
//! 0      "hypernetes-vm\n", then JSON: who made it, length and SHA-256 of the stream; zeros
//! 4096   the stream
//! ```
//! The header is written last, and what it says is on the disk by then: a file that was cut short has
//! none. The stream is the VMM's affair: nothing here reads it. The digest finds what a disk has lost; it
//! keeps nobody out, so that the file must be one that only this user can write.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const MAGIC: &[u8] = b"hypernetes-vm\n";
const HEADER: usize = 4096;
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    version: u32,
    /// Driver and version of the VMM.
    maker: String,
    /// Bytes of the stream.
    length: u64,
    sha256: [u8; 32],
}

/// Memory and devices of a VM that was suspended by [`Vm::suspend`](crate::Vm::suspend).
#[derive(Debug)]
pub struct Suspended {
    file: File,
    header: Header,
}

impl Suspended {
    /// Opens what was suspended into a file, open for reading.
    ///
    /// # Errors
    /// `InvalidData` if the file is none of these, or not all of it.
    pub fn open(file: File) -> io::Result<Self> {
        let invalid = |message: &str| io::Error::new(ErrorKind::InvalidData, message.to_owned());
        let mut block = vec![0; HEADER];
        match file.read_exact_at(&mut block, 0) {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                return Err(invalid("it is cut short"));
            }
            other => other?,
        }
        let text = block
            .strip_prefix(MAGIC)
            .and_then(|text| text.split(|byte| *byte == 0).next())
            .ok_or_else(|| invalid("it is not a suspended VM, or not all of one"))?;
        let header: Header =
            serde_json::from_slice(text).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        if header.version != VERSION {
            return Err(invalid("it was made by another release"));
        }
        if file.metadata()?.len() != HEADER as u64 + header.length {
            return Err(invalid("it has another length than it says"));
        }
        Ok(Self { file, header })
    }

    /// Driver and version of the VMM that made it, and that alone can go on with it.
    pub fn maker(&self) -> &str {
        &self.header.maker
    }

    /// The stream from its beginning.
    pub(crate) fn read(&self) -> io::Result<StateReader> {
        Ok(StateReader {
            file: self.file.try_clone()?,
            header: self.header.clone(),
            position: 0,
            hash: Sha256::new(),
        })
    }
}

/// Writes a stream, and the header when it has ended.
#[derive(Debug)]
pub(crate) struct StateWriter {
    file: File,
    hash: Sha256,
    length: u64,
    limit: u64,
}

impl StateWriter {
    /// Takes at most `limit` bytes: a VMM that its guest has taken over might never end.
    pub(crate) fn new(file: File, limit: u64) -> Self {
        Self {
            file,
            hash: Sha256::new(),
            length: 0,
            limit,
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = self.length.saturating_add(bytes.len() as u64);
        if length > self.limit {
            let message = format!("the VMM wrote more than {} bytes", self.limit);
            return Err(io::Error::new(ErrorKind::FileTooLarge, message));
        }
        self.hash.update(bytes);
        self.file.write_all_at(bytes, HEADER as u64 + self.length)?;
        self.length = length;
        Ok(())
    }

    /// Makes the file whole. It is on the disk afterwards; its name may not be.
    pub(crate) fn finish(self, maker: &str) -> io::Result<()> {
        let header = Header {
            version: VERSION,
            maker: maker.to_owned(),
            length: self.length,
            sha256: self.hash.finalize().into(),
        };
        let mut block = MAGIC.to_vec();
        block.extend(serde_json::to_vec(&header)?);
        if block.len() >= HEADER {
            return Err(ErrorKind::InvalidInput.into());
        }
        block.resize(HEADER, 0);
        // The header only behind what it speaks of.
        self.file.sync_data()?;
        self.file.write_all_at(&block, 0)?;
        self.file.sync_all()
    }
}

/// Reads a stream, and finds at its end whether it is what was written.
#[derive(Debug)]
pub(crate) struct StateReader {
    file: File,
    header: Header,
    position: u64,
    hash: Sha256,
}

impl StateReader {
    /// The next bytes; 0 at the end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.header.length - self.position;
        let room = usize::try_from(left).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let read = self
            .file
            .read_at(&mut buffer[..room], HEADER as u64 + self.position)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.hash.update(&buffer[..read]);
        self.position += read as u64;
        Ok(read)
    }

    /// Whether all of it was read and was what had been written.
    pub(crate) fn check(self) -> io::Result<()> {
        let digest: [u8; 32] = self.hash.finalize().into();
        if self.position == self.header.length && digest == self.header.sha256 {
            return Ok(());
        }
        let message = "the disk does not have what was written to it";
        Err(io::Error::new(ErrorKind::InvalidData, message))
    }
}

/// Gives back the pages of a guest's memory that hold nothing. Nobody may be writing it.
pub(crate) fn punch_empty_pages(memory: &File) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
    const PAGE: usize = 4096;
    const EMPTY: [u8; PAGE] = [0; PAGE];
    let punch = |from: u64, to: u64| match from < to {
        true => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(memory, flags, from, to - from).map_err(io::Error::from)
        }
        false => Ok(()),
    };
    let length = memory.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    while position < length {
        let start = match seek(memory, SeekFrom::Data(position)) {
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            other => other?,
        };
        let end = seek(memory, SeekFrom::Hole(start))?;
        position = start;
        // The beginning of the empty pages that lie just before `position`.
        let mut empty = position;
        while position < end {
            let room = usize::try_from(end - position).unwrap_or(usize::MAX);
            let room = room.min(buffer.len());
            memory.read_exact_at(&mut buffer[..room], position)?;
            for page in buffer[..room].chunks(PAGE) {
                let next = position + page.len() as u64;
                if *page != EMPTY[..page.len()] {
                    punch(empty, position)?;
                    empty = next;
                }
                position = next;
            }
        }
        punch(empty, position)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut writer = StateWriter::new(file.try_clone().unwrap(), 1 << 20);
        for chunk in bytes.chunks(3) {
            writer.write(chunk).unwrap();
        }
        writer.finish("fake 1").unwrap();
        file
    }

    fn read(suspended: &Suspended) -> io::Result<Vec<u8>> {
        let mut reader = suspended.read()?;
        let (mut all, mut buffer) = (Vec::new(), [0; 4]);
        loop {
            match reader.read(&mut buffer)? {
                0 => break,
                count => all.extend_from_slice(&buffer[..count]),
            }
        }
        reader.check().map(|()| all)
    }

    #[test]
    fn what_was_written_is_read() {
        let suspended = Suspended::open(written(b"state of a VM")).unwrap();
        assert_eq!(suspended.maker(), "fake 1");
        for _ in 0..2 {
            assert_eq!(read(&suspended).unwrap(), b"state of a VM");
        }
        assert_eq!(read(&Suspended::open(written(b"")).unwrap()).unwrap(), b"");
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let invalid = |file: File| {
            let error = Suspended::open(file).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        };
        invalid(tempfile::tempfile().unwrap());
        let unfinished = tempfile::tempfile().unwrap();
        let mut writer = StateWriter::new(unfinished.try_clone().unwrap(), 10);
        writer.write(b"0123456789").unwrap();
        assert_eq!(
            writer.write(b"x").unwrap_err().kind(),
            ErrorKind::FileTooLarge
        );
        invalid(unfinished);
        let short = written(b"state");
        short.set_len(HEADER as u64 + 4).unwrap();
        invalid(short);
        let long = written(b"state");
        long.set_len(HEADER as u64 + 6).unwrap();
        invalid(long);
        let torn = written(b"state");
        torn.write_all_at(b"X", HEADER as u64 + 2).unwrap();
        let error = read(&Suspended::open(torn).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn empty_pages_are_given_back_and_others_are_not() {
        let memory = File::from(crate::template::memory(4).unwrap());
        memory.write_all_at(&vec![0; 3 << 20], 1 << 19).unwrap();
        for place in [1 << 20, (2 << 20) - 1] {
            memory.write_all_at(b"x", place).unwrap();
        }
        punch_empty_pages(&memory).unwrap();
        let stat = rustix::fs::fstat(&memory).unwrap();
        assert_eq!((stat.st_size, stat.st_blocks * 512), (4 << 20, 8192));
        let mut byte = [0];
        memory.read_exact_at(&mut byte, (2 << 20) - 1).unwrap();
        assert_eq!(&byte, b"x");
        punch_empty_pages(&memory).unwrap();
    }
}

//! The log file of one container, and how far each stream has come in it.
//!
//! The file is the truth. The checkpoint beside the runtime's state only saves reading all of it
//! again: it names a place behind a whole line and the streams' offsets there.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Seek, SeekFrom},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    beneath,
    format::{HEADER, MAX_LINE, Stream, measure},
};

/// A checkpoint is written whenever the file has grown by so much.
const CHECKPOINT_EVERY: u64 = 1 << 20;
/// In a checkpoint: whatever file is there next begins at these offsets.
const NEXT: u64 = 0;
/// No line of ours is longer; newline included.
const LONGEST: u64 = (HEADER + MAX_LINE + 1) as u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Checkpoint {
    /// [`NEXT`], or the file that the rest is about.
    inode: u64,
    position: u64,
    offsets: [u64; 2],
}

/// An open log.
#[derive(Debug)]
pub(crate) struct LogFile {
    file: File,
    checkpoint_path: PathBuf,
    checkpointed: u64,
    position: u64,
    offsets: [u64; 2],
}

impl LogFile {
    /// Opens the log of a container, or makes it, and finds the end of its last whole line. A torn
    /// line behind that is cut off: its bytes were not acknowledged. Blocks.
    pub(crate) fn open(root: &Path, path: &Path, checkpoint_path: PathBuf) -> io::Result<Self> {
        let file = beneath::open_file(root, path)?;
        let metadata = file.metadata()?;
        let start = read_checkpoint(&checkpoint_path)
            .filter(|saved| {
                (saved.inode == metadata.ino() || saved.inode == NEXT)
                    && saved.position <= metadata.len()
                    && ends_with_newline(&file, saved.position)
            })
            .unwrap_or(Checkpoint {
                inode: metadata.ino(),
                position: 0,
                offsets: [0; 2],
            });
        let mut log = Self {
            file,
            checkpoint_path,
            checkpointed: start.position,
            position: start.position,
            offsets: start.offsets,
        };
        log.scan()?;
        if log.position < metadata.len() {
            log.file.set_len(log.position)?;
        }
        Ok(log)
    }

    /// Opens the log of a container that has written nothing yet. What an earlier one has left in
    /// the file stays and does not count. Blocks.
    pub(crate) fn create(root: &Path, path: &Path, checkpoint_path: PathBuf) -> io::Result<Self> {
        let mut log = Self::open(root, path, checkpoint_path)?;
        log.offsets = [0; 2];
        if log.position > 0 {
            // Only the checkpoint tells the two apart.
            log.save()?;
            log.checkpointed = log.position;
        }
        Ok(log)
    }

    /// Goes on in a new file if the one that is written is not at its path any more. On error the
    /// old one is still written. Blocks.
    pub(crate) fn reopen(&mut self, root: &Path, path: &Path) -> io::Result<()> {
        let written = self.file.metadata()?.ino();
        if beneath::inode(root, path)? == Some(written) {
            return Ok(());
        }
        // First, so that a runtime that opens the log after a crash knows what stands in the files
        // before it.
        self.write_checkpoint(NEXT, 0)?;
        let file = beneath::open_file(root, path)?;
        let metadata = file.metadata()?;
        (self.file, self.position) = (file, metadata.len());
        self.checkpointed = self.position;
        if let Err(error) = self.write_checkpoint(metadata.ino(), self.position) {
            // The one written first says the same, but for what somebody else may have put there.
            tracing::debug!(%error, "cannot write a log checkpoint");
        }
        Ok(())
    }

    fn scan(&mut self) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(64 * 1024, &self.file);
        reader.seek(SeekFrom::Start(self.position))?;
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = io::Read::take(&mut reader, LONGEST).read_until(b'\n', &mut line)? as u64;
            if line.last() != Some(&b'\n') {
                // The torn end; or a line that is longer than any of ours, which nobody but
                // somebody else can have written: all from there on is not ours either.
                return Ok(());
            }
            line.pop();
            match measure(&line) {
                Some((stream, bytes)) => self.offsets[stream.index()] += bytes,
                None => tracing::warn!(
                    position = self.position,
                    "a foreign line in a log was skipped"
                ),
            }
            self.position += read;
        }
    }

    /// How many bytes of each stream are in the file.
    pub(crate) fn offsets(&self) -> [u64; 2] {
        self.offsets
    }

    /// Appends whole lines that stand for so many bytes of a stream. On error the file is as
    /// before, or has a torn end that the next append, or [`LogFile::open`], overwrites. Blocks.
    pub(crate) fn append(&mut self, lines: &[u8], stream: Stream, taken: u64) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.write(lines) {
            // What a reader would take for a line must not stay; if this fails too, the next
            // attempt writes over it.
            drop(self.file.set_len(self.position));
            return Err(error);
        }
        self.position += lines.len() as u64;
        self.offsets[stream.index()] += taken;
        if self.position - self.checkpointed >= CHECKPOINT_EVERY {
            // Without a checkpoint a restart takes longer, nothing else.
            match self.save() {
                Ok(()) => self.checkpointed = self.position,
                Err(error) => tracing::debug!(%error, "cannot write a log checkpoint"),
            }
        }
        Ok(())
    }

    fn write(&self, lines: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        if self.checkpoint_path.with_extension("full").exists() {
            // As a full disk does: some of it, and then no more.
            std::fs::write(self.checkpoint_path.with_extension("full"), "tried")?;
            self.file
                .write_all_at(&lines[..lines.len() / 2], self.position)?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(lines, self.position)
    }

    fn save(&self) -> io::Result<()> {
        self.write_checkpoint(self.file.metadata()?.ino(), self.position)
    }

    fn write_checkpoint(&self, inode: u64, position: u64) -> io::Result<()> {
        let saved = Checkpoint {
            inode,
            position,
            offsets: self.offsets,
        };
        let fresh = self.checkpoint_path.with_extension("new");
        std::fs::write(&fresh, serde_json::to_vec(&saved)?)?;
        std::fs::rename(&fresh, &self.checkpoint_path)
    }
}

fn read_checkpoint(path: &Path) -> Option<Checkpoint> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn ends_with_newline(file: &File, position: u64) -> bool {
    let mut last = [0];
    position == 0 || (file.read_exact_at(&mut last, position - 1).is_ok() && last == [b'\n'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::format::LineCutter;

    struct Bed {
        temp: tempfile::TempDir,
    }

    impl Bed {
        fn new() -> Self {
            Self {
                temp: tempfile::tempdir().unwrap(),
            }
        }

        fn open(&self) -> LogFile {
            let checkpoint = self.temp.path().join("checkpoint");
            LogFile::open(self.temp.path(), Path::new("c/0.log"), checkpoint).unwrap()
        }

        fn log(&self) -> PathBuf {
            self.temp.path().join("c/0.log")
        }
    }

    /// Sends a stream to the log from where the log stands, as a guest does.
    fn deliver(log: &mut LogFile, stream: Stream, all: &[u8]) {
        let start = usize::try_from(log.offsets()[stream.index()]).unwrap();
        let (mut cutter, mut lines) = (LineCutter::default(), Vec::new());
        for piece in all[start..].chunks(7) {
            lines.clear();
            let taken = cutter.feed(stream, piece, 7, &mut lines);
            log.append(&lines, stream, taken).unwrap();
        }
        lines.clear();
        let taken = cutter.finish(stream, 7, &mut lines);
        log.append(&lines, stream, taken).unwrap();
    }

    #[test]
    fn a_restart_after_any_byte_neither_loses_nor_doubles() {
        let out = b"first\n\nsecond line\nlast without newline";
        let err = b"an error\nand more\n";
        let whole = Bed::new();
        let mut log = whole.open();
        deliver(&mut log, Stream::Stdout, out);
        deliver(&mut log, Stream::Stderr, err);
        assert_eq!(log.offsets(), [out.len() as u64, err.len() as u64]);
        let bytes = std::fs::read(whole.log()).unwrap();
        for cut in 0..=bytes.len() {
            let bed = Bed::new();
            std::fs::create_dir(bed.temp.path().join("c")).unwrap();
            std::fs::write(bed.log(), &bytes[..cut]).unwrap();
            let mut log = bed.open();
            deliver(&mut log, Stream::Stdout, out);
            deliver(&mut log, Stream::Stderr, err);
            assert_eq!(std::fs::read(bed.log()).unwrap(), bytes, "cut at {cut}");
        }
    }

    #[test]
    fn a_checkpoint_saves_the_scan_and_a_wrong_one_is_not_believed() {
        let bed = Bed::new();
        let line = format!("{}\n", "x".repeat(1000));
        let all = line.repeat(1500).into_bytes();
        deliver(&mut bed.open(), Stream::Stdout, &all);
        let saved = read_checkpoint(&bed.temp.path().join("checkpoint")).unwrap();
        assert!(saved.position >= CHECKPOINT_EVERY);
        let log = bed.open();
        assert_eq!(log.offsets()[0], all.len() as u64);
        assert_eq!(log.checkpointed, saved.position);

        // The file was replaced by a shorter one: read from its start.
        std::fs::write(bed.log(), "").unwrap();
        assert_eq!(bed.open().offsets(), [0, 0]);
        // A checkpoint in the middle of a line, or not even a checkpoint.
        deliver(&mut bed.open(), Stream::Stdout, b"abc\ndef\n");
        let wrong = Checkpoint {
            position: 5,
            offsets: [99; 2],
            ..saved
        };
        for text in [serde_json::to_vec(&wrong).unwrap(), b"{".to_vec()] {
            std::fs::write(bed.temp.path().join("checkpoint"), text).unwrap();
            assert_eq!(bed.open().offsets(), [8, 0]);
        }
    }

    #[test]
    fn what_was_in_the_file_before_does_not_count() {
        let bed = Bed::new();
        deliver(
            &mut bed.open(),
            Stream::Stdout,
            b"of an earlier container\n",
        );
        let checkpoint = || bed.temp.path().join("another");
        let name = Path::new("c/0.log");
        let mut log = LogFile::create(bed.temp.path(), name, checkpoint()).unwrap();
        deliver(&mut log, Stream::Stdout, b"new\n");
        let log = LogFile::open(bed.temp.path(), name, checkpoint()).unwrap();
        assert_eq!(log.offsets(), [4, 0]);
        assert_eq!(
            std::fs::read_to_string(bed.log()).unwrap().lines().count(),
            2
        );
    }

    #[test]
    fn foreign_content_does_not_move_the_offsets() {
        let bed = Bed::new();
        deliver(&mut bed.open(), Stream::Stdout, b"abc\n");
        let mut bytes = std::fs::read(bed.log()).unwrap();
        bytes.extend_from_slice(b"what is this\n");
        bytes.extend(vec![b'y'; 40_000]);
        std::fs::write(bed.log(), &bytes).unwrap();
        assert_eq!(bed.open().offsets(), [4, 0]);
    }
}

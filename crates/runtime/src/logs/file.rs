//! The log file of one container, and how far each stream has come.
//!
//! The checkpoint beside the runtime's state belongs to the container, not to the file: it names the
//! file that is written, a place behind a whole line in it, and the streams' offsets there. It is
//! written after every append, so that files may be renamed or deleted while no runtime looks. Where
//! a crash came between the two, the lines behind the checkpoint are counted: in the file that it
//! names, also under the name that a rotation has given to it.

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

/// In a checkpoint of an earlier release: whatever file is there next begins at these offsets.
const NEXT: u64 = 0;
/// No line of ours is longer; newline included.
const LONGEST: u64 = (HEADER + MAX_LINE + 1) as u64;
/// Bytes of a checkpoint. Always as many, in one page, so that one write replaces all of it.
const CHECKPOINT: usize = 160;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Checkpoint {
    /// The file that the position is about.
    inode: u64,
    position: u64,
    offsets: [u64; 2],
}

/// An open log.
#[derive(Debug)]
pub(crate) struct LogFile {
    file: File,
    inode: u64,
    checkpoint: File,
    #[cfg(test)]
    checkpoint_path: PathBuf,
    position: u64,
    offsets: [u64; 2],
}

impl LogFile {
    /// Opens the log of a container, or makes it, and finds the end of its last whole line. A torn
    /// line behind that is cut off: its bytes were not acknowledged. Blocks.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the tests' build keeps the path"
    )]
    pub(crate) fn open(root: &Path, path: &Path, checkpoint_path: PathBuf) -> io::Result<Self> {
        let saved = read_checkpoint(&checkpoint_path);
        let file = beneath::open_file(root, path)?;
        let checkpoint = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&checkpoint_path)?;
        let inode = file.metadata()?.ino();
        let mut log = Self {
            file,
            inode,
            checkpoint,
            #[cfg(test)]
            checkpoint_path,
            position: 0,
            offsets: [0; 2],
        };
        match saved {
            None => log.find_end(true)?,
            Some(saved) if saved.inode == NEXT => {
                log.offsets = saved.offsets;
                log.find_end(true)?;
            }
            Some(saved) if saved.inode == inode && is_line_end(&log.file, saved.position) => {
                (log.position, log.offsets) = (saved.position, saved.offsets);
                log.find_end(true)?;
            }
            // The file that was written is not here any more, or not as it was. What is here
            // instead, if anything, does not count.
            Some(saved) => {
                log.offsets = saved.offsets;
                let rotated = beneath::find_rotated(root, path, saved.inode)?;
                if let Some(rotated) = rotated.filter(|file| is_line_end(file, saved.position)) {
                    let end = scan(&rotated, saved.position, &mut log.offsets)?;
                    cut(&rotated, end)?;
                }
                log.find_end(false)?;
            }
        }
        // First of all: lines that come into this file must be found by the next runtime.
        log.save()?;
        Ok(log)
    }

    /// Opens the log of a container that has written nothing yet. What an earlier one has left in
    /// the file stays and does not count. Blocks.
    pub(crate) fn create(root: &Path, path: &Path, checkpoint_path: PathBuf) -> io::Result<Self> {
        let mut log = Self::open(root, path, checkpoint_path)?;
        log.offsets = [0; 2];
        log.save()?;
        Ok(log)
    }

    /// Goes on in a new file if the one that is written is not at its path any more. On error the
    /// old one is still written. Blocks.
    pub(crate) fn reopen(&mut self, root: &Path, path: &Path) -> io::Result<()> {
        if beneath::inode(root, path)? == Some(self.inode) {
            return Ok(());
        }
        let file = beneath::open_file(root, path)?;
        let metadata = file.metadata()?;
        let (inode, position) = (metadata.ino(), metadata.len());
        write_checkpoint(
            &self.checkpoint,
            Checkpoint {
                inode,
                position,
                offsets: self.offsets,
            },
        )?;
        (self.file, self.inode, self.position) = (file, inode, position);
        Ok(())
    }

    /// Goes to the end of the last whole line and cuts off what is behind it.
    fn find_end(&mut self, count: bool) -> io::Result<()> {
        let mut offsets = self.offsets;
        self.position = scan(&self.file, self.position, &mut offsets)?;
        if count {
            self.offsets = offsets;
        }
        cut(&self.file, self.position)
    }

    /// How many bytes of each stream have been taken.
    pub(crate) fn offsets(&self) -> [u64; 2] {
        self.offsets
    }

    /// Goes on behind bytes of a stream that nobody has any more. Blocks.
    pub(crate) fn skip_to(&mut self, stream: Stream, offset: u64) {
        self.offsets[stream.index()] = offset;
        self.save_or_tell();
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
        self.save_or_tell();
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
        write_checkpoint(
            &self.checkpoint,
            Checkpoint {
                inode: self.inode,
                position: self.position,
                offsets: self.offsets,
            },
        )
    }

    fn save_or_tell(&self) {
        // As long as the file stays, its lines tell the same.
        if let Err(error) = self.save() {
            tracing::debug!(%error, "cannot write a log checkpoint");
        }
    }
}

/// Adds up the lines of a file from a position on, and returns the end of the last whole one.
fn scan(file: &File, mut position: u64, offsets: &mut [u64; 2]) -> io::Result<u64> {
    let mut reader = BufReader::with_capacity(64 * 1024, file);
    reader.seek(SeekFrom::Start(position))?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = io::Read::take(&mut reader, LONGEST).read_until(b'\n', &mut line)? as u64;
        if line.last() != Some(&b'\n') {
            // The torn end; or a line that is longer than any of ours, which nobody but
            // somebody else can have written: all from there on is not ours either.
            return Ok(position);
        }
        line.pop();
        match measure(&line) {
            Some((stream, bytes)) => offsets[stream.index()] += bytes,
            None => tracing::warn!(position, "a foreign line in a log was skipped"),
        }
        position += read;
    }
}

fn cut(file: &File, end: u64) -> io::Result<()> {
    if end < file.metadata()?.len() {
        file.set_len(end)?;
    }
    Ok(())
}

fn write_checkpoint(file: &File, checkpoint: Checkpoint) -> io::Result<()> {
    let mut text = serde_json::to_vec(&checkpoint)?;
    text.resize(CHECKPOINT, b' ');
    file.write_all_at(&text, 0)
}

fn read_checkpoint(path: &Path) -> Option<Checkpoint> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Whether a whole line, or the file's beginning, is right before this place.
fn is_line_end(file: &File, position: u64) -> bool {
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

    /// Everything that is in the log and the files that it was rotated into.
    fn all(bed: &Bed) -> String {
        let read = |name: &str| std::fs::read_to_string(bed.temp.path().join(name));
        let texts = ["c/0.log.1", "c/0.log"].map(|name| read(name).unwrap_or_default());
        texts.concat()
    }

    #[test]
    fn a_rotation_while_nobody_looks_neither_loses_nor_doubles() {
        let (out, err) = (b"first\nsecond line\nlast\n", b"an error\n");
        let whole = Bed::new();
        let mut log = whole.open();
        deliver(&mut log, Stream::Stdout, out);
        let middle = std::fs::read(whole.temp.path().join("checkpoint")).unwrap();
        deliver(&mut log, Stream::Stderr, err);
        let bytes = std::fs::read(whole.log()).unwrap();
        // The crash came before the last lines' checkpoint, in the middle of them, or after all.
        let mut saved: Checkpoint = serde_json::from_slice(&middle).unwrap();
        for cut in usize::try_from(saved.position).unwrap()..=bytes.len() {
            let bed = Bed::new();
            std::fs::create_dir(bed.temp.path().join("c")).unwrap();
            let rotated = bed.temp.path().join("c/0.log.1");
            std::fs::write(&rotated, &bytes[..cut]).unwrap();
            saved.inode = std::fs::metadata(&rotated).unwrap().ino();
            let text = serde_json::to_vec(&saved).unwrap();
            std::fs::write(bed.temp.path().join("checkpoint"), text).unwrap();
            let mut log = bed.open();
            deliver(&mut log, Stream::Stdout, out);
            deliver(&mut log, Stream::Stderr, err);
            assert_eq!(log.offsets(), [out.len() as u64, err.len() as u64]);
            let text = all(&bed);
            let lines: Vec<&str> = text.lines().map(|line| &line[31..]).collect();
            let expected = [
                "stdout F first",
                "stdout F second line",
                "stdout F last",
                "stderr F an error",
            ];
            assert_eq!(lines, expected, "cut at {cut}");
        }
    }

    #[test]
    fn the_offsets_survive_the_file() {
        let bed = Bed::new();
        deliver(&mut bed.open(), Stream::Stdout, b"one\ntwo\n");
        std::fs::remove_file(bed.log()).unwrap();
        let mut log = bed.open();
        assert_eq!(log.offsets(), [8, 0]);
        deliver(&mut log, Stream::Stdout, b"one\ntwo\nthree\n");
        drop(log);
        assert_eq!(bed.open().offsets(), [14, 0]);
        assert_eq!(all(&bed).lines().count(), 1);

        // Emptied, and another's lines in its place.
        std::fs::write(bed.log(), "").unwrap();
        assert_eq!(bed.open().offsets(), [14, 0]);
        let other = Bed::new();
        deliver(
            &mut other.open(),
            Stream::Stdout,
            b"not of this container\n",
        );
        std::fs::remove_file(bed.log()).unwrap();
        std::fs::rename(other.log(), bed.log()).unwrap();
        let mut log = bed.open();
        assert_eq!(log.offsets(), [14, 0]);
        deliver(&mut log, Stream::Stdout, b"one\ntwo\nthree\nfour\n");
        drop(log);
        assert_eq!(bed.open().offsets(), [19, 0]);
        assert_eq!(all(&bed).lines().count(), 2);
    }

    #[test]
    fn a_reopened_log_that_is_put_back_is_not_counted_twice() {
        let bed = Bed::new();
        let path = Path::new("c/0.log");
        let mut log = bed.open();
        deliver(&mut log, Stream::Stdout, b"one\n");
        std::fs::rename(bed.log(), bed.temp.path().join("c/0.log.1")).unwrap();
        log.reopen(bed.temp.path(), path).unwrap();
        drop(log);
        std::fs::rename(bed.temp.path().join("c/0.log.1"), bed.log()).unwrap();
        assert_eq!(bed.open().offsets(), [4, 0]);
    }

    #[test]
    fn checkpoints_of_an_earlier_release_are_read() {
        let bed = Bed::new();
        deliver(&mut bed.open(), Stream::Stdout, b"abc\ndef\n");
        let checkpoint = bed.temp.path().join("checkpoint");
        let saved = read_checkpoint(&checkpoint).unwrap();
        assert_eq!(saved.offsets, [8, 0]);
        let early = |saved: Checkpoint| {
            std::fs::write(&checkpoint, serde_json::to_vec(&saved).unwrap()).unwrap();
            bed.open().offsets()
        };
        let begin = Checkpoint {
            position: 0,
            offsets: [0; 2],
            ..saved
        };
        assert_eq!(early(begin), [8, 0], "the rest is in the file");
        let next = Checkpoint {
            inode: NEXT,
            position: 0,
            offsets: [100, 7],
        };
        assert_eq!(early(next), [108, 7]);
        // None at all, or nothing that can be read: the file tells.
        for text in ["", "{"] {
            std::fs::write(&checkpoint, text).unwrap();
            assert_eq!(bed.open().offsets(), [8, 0]);
        }
        // In the middle of a line: the file was changed by somebody, the offsets were not.
        let wrong = Checkpoint {
            position: 5,
            ..saved
        };
        assert_eq!(early(wrong), [8, 0]);
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

//! A log file that is followed over its rotations, from a cursor on disk.

use std::{
    fs, io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

/// Most bytes of one batch. Longer than any line.
const BATCH: usize = 256 << 10;

/// How far a log was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    inode: u64,
    offset: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tail {
    path: PathBuf,
    note: PathBuf,
    follower: Option<Follower>,
}

impl Tail {
    /// Follows the file at `path`, and notes how far in another.
    pub(super) fn new(path: PathBuf, note: PathBuf) -> Self {
        Self {
            path,
            note,
            follower: None,
        }
    }

    /// Whole lines that were not accepted yet, if there are any. Asked again, the same ones.
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let (path, note) = (self.path.clone(), self.note.clone());
        let follower = self.follower.take();
        let (follower, lines) = blocking(move || {
            let mut follower = follower.unwrap_or_else(|| Follower::new(&note));
            let lines = follower.read(&path)?;
            Ok((follower, lines))
        })
        .await?;
        self.follower = Some(follower);
        Ok(Some(lines).filter(|lines| !lines.is_empty()))
    }

    /// Notes that the lines of the last batch have arrived.
    pub(super) async fn accept(&mut self) -> io::Result<()> {
        let Some(follower) = &mut self.follower else {
            return Ok(());
        };
        follower.cursor.offset += follower.read;
        follower.read = 0;
        let (note, text) = (self.note.clone(), serde_json::to_vec(&follower.cursor)?);
        blocking(move || {
            let new = note.with_extension("new");
            fs::write(&new, text)?;
            fs::rename(new, note)
        })
        .await
    }

    /// Forgets how far it was.
    pub(super) async fn forget(self) {
        let note = self.note;
        let removed = blocking(move || fs::remove_file(note)).await;
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(error = %error, "cannot remove a log's cursor");
        }
    }
}

#[derive(Debug)]
struct Follower {
    file: Option<fs::File>,
    cursor: Cursor,
    /// Bytes of the batch that is not accepted yet.
    read: u64,
}

impl Follower {
    fn new(note: &Path) -> Self {
        // A note that cannot be read is none: lines come twice then, and none is missing.
        let noted = fs::read(note).ok();
        let cursor = noted.and_then(|text| serde_json::from_slice(&text).ok());
        Self {
            file: None,
            cursor: cursor.unwrap_or_default(),
            read: 0,
        }
    }

    fn read(&mut self, path: &Path) -> io::Result<Vec<u8>> {
        self.read = 0;
        if self.file.is_none() && !self.find(path)? {
            return Ok(Vec::new());
        }
        // More than once only if the file was rotated: to its end, then to the next one.
        loop {
            let now = inode(path)?;
            let lines = self.whole_lines()?;
            if !lines.is_empty() || now.is_none_or(|(inode, _)| inode == self.cursor.inode) {
                let shorter = now.filter(|(_, length)| *length < self.cursor.offset);
                if lines.is_empty() && shorter.is_some() {
                    // Cut off in place.
                    self.cursor.offset = 0;
                    continue;
                }
                return Ok(lines);
            }
            self.file = None;
            self.cursor = Cursor::default();
            if !self.find(path)? {
                return Ok(Vec::new());
            }
        }
    }

    /// Opens the file of the cursor: the log, or what it was renamed to. Else the log from its start.
    fn find(&mut self, path: &Path) -> io::Result<bool> {
        let Some((current, _)) = inode(path)? else {
            return Ok(false);
        };
        let wanted = match self.cursor.inode {
            inode if inode == current || inode == 0 => None,
            inode => renamed(path, inode),
        };
        let moved = self.cursor.inode != current && wanted.is_none();
        let file = open(wanted.as_deref().unwrap_or(path))?;
        let inode = file.metadata()?.ino();
        if moved || inode != self.cursor.inode {
            if self.cursor.inode != 0 {
                tracing::warn!(path = %path.display(), "a log was replaced before all of it was sent on");
            }
            self.cursor = Cursor { inode, offset: 0 };
        }
        self.file = Some(file);
        Ok(true)
    }

    fn whole_lines(&mut self) -> io::Result<Vec<u8>> {
        let Some(file) = &self.file else {
            return Ok(Vec::new());
        };
        let mut lines = vec![0; BATCH];
        let mut length = 0;
        while length < lines.len() {
            let offset = self.cursor.offset + length as u64;
            match file.read_at(&mut lines[length..], offset)? {
                0 => break,
                read => length += read,
            }
        }
        let whole = lines[..length].iter().rposition(|byte| *byte == b'\n');
        lines.truncate(whole.map_or(0, |last| last + 1));
        self.read = lines.len() as u64;
        Ok(lines)
    }
}

/// Inode and length of a file, if it is there.
fn inode(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some((metadata.ino(), metadata.len()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The file beside `path`, with its name and more, that has this inode.
fn renamed(path: &Path, inode: u64) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let entries = fs::read_dir(path.parent()?).ok()?.flatten();
    let mut ours = entries.filter(|entry| {
        let other = entry.file_name();
        let other = other.to_string_lossy();
        other
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('.'))
    });
    ours.find(|entry| {
        entry
            .metadata()
            .is_ok_and(|metadata| metadata.ino() == inode)
    })
    .map(|entry| entry.path())
}

fn open(path: &Path) -> io::Result<fs::File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    fs::File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text(tail: &mut Tail) -> Option<String> {
        let lines = tail.next().await.unwrap();
        lines.map(|lines| String::from_utf8(lines).unwrap())
    }

    fn append(path: &Path, text: &str) {
        let mut file = fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn a_file_is_followed_over_rotations_and_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let (path, note) = (dir.path().join("0.log"), dir.path().join("note"));
        let new = || Tail::new(path.clone(), note.clone());
        let mut tail = new();
        assert_eq!(text(&mut tail).await, None, "no file yet");
        append(&path, "one\ntwo\nthr");
        assert_eq!(text(&mut tail).await.unwrap(), "one\ntwo\n");
        // Not accepted: again.
        assert_eq!(text(&mut new()).await.unwrap(), "one\ntwo\n");
        tail.accept().await.unwrap();
        assert_eq!(text(&mut tail).await, None, "half a line");
        append(&path, "ee\n");
        fs::rename(&path, dir.path().join("0.log.20260102")).unwrap();
        append(&path, "four\n");
        append(&dir.path().join("0.log.other"), "none of it\n");
        // With the old file open, and by a process that must find it again.
        for tail in [&mut tail, &mut new()] {
            assert_eq!(text(tail).await.unwrap(), "three\n");
        }
        tail.accept().await.unwrap();
        for tail in [&mut tail, &mut new()] {
            assert_eq!(text(tail).await.unwrap(), "four\n");
        }
        tail.accept().await.unwrap();
        assert_eq!(text(&mut tail).await, None);
        // Cut off in place, and replaced while nobody looked.
        fs::write(&path, "5\n").unwrap();
        assert_eq!(text(&mut tail).await.unwrap(), "5\n");
        tail.accept().await.unwrap();
        fs::remove_file(&path).unwrap();
        append(&dir.path().join("keeps the inode busy"), "");
        append(&path, "six\n");
        assert_eq!(text(&mut tail).await.unwrap(), "six\n");
        tail.accept().await.unwrap();
        tail.forget().await;
        assert!(!note.exists());
    }

    #[tokio::test]
    async fn a_batch_ends_with_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let line = format!("{}\n", "x".repeat(16_000));
        append(&path, &line.repeat(40));
        let mut tail = Tail::new(path, dir.path().join("note"));
        let mut all = 0;
        while let Some(lines) = tail.next().await.unwrap() {
            assert!(lines.ends_with(b"\n") && lines.len() <= BATCH);
            all += lines.len();
            tail.accept().await.unwrap();
        }
        assert_eq!(all, line.len() * 40);
    }
}

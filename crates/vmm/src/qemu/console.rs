//! The guest's serial console: read all the time, kept in bounds, watched for a panic.
//!
//! What the guest writes is in memory (the last 64 KiB) and in two files that take turns at
//! 256 KiB. Nothing of it is trusted: [`Console::tail`] shows no control characters.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use tokio::{io::AsyncReadExt, net::UnixStream, sync::watch, task::JoinSet};

const KEEP: usize = 64 * 1024;
const ROTATE: u64 = 256 * 1024;
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// How much of a panic is told.
const PANIC_TAIL: usize = 4 * 1024;

/// What is known about the reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    panicked: bool,
    ended: bool,
}

/// The console of one VM.
#[derive(Debug)]
pub(crate) struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    progress: watch::Receiver<Progress>,
    _task: JoinSet<()>,
}

impl Console {
    /// Reads `stream` until the VMM closes it.
    pub(crate) fn start(stream: UnixStream, log: PathBuf) -> Self {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (progress_out, progress) = watch::channel(Progress::default());
        let mut task = JoinSet::new();
        task.spawn(read(stream, Log::new(log), Arc::clone(&tail), progress_out));
        Self {
            tail,
            progress,
            _task: task,
        }
    }

    /// The last bytes as text that a terminal may be shown.
    pub(crate) fn tail(&self) -> String {
        printable(self.lock().make_contiguous())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<u8>> {
        self.tail.lock().expect("no holder of this lock panics")
    }

    /// Waits until the guest's kernel has said that it panicked. For ever, if it never does.
    pub(crate) fn panicked(&self) -> impl Future<Output = ()> + use<> {
        let mut progress = self.progress.clone();
        async move {
            if progress
                .wait_for(|progress| progress.panicked)
                .await
                .is_err()
            {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until everything that the guest wrote has been read.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + use<> {
        let mut progress = self.progress.clone();
        async move {
            drop(progress.wait_for(|progress| progress.ended).await);
        }
    }

    /// The console from the panic line on, if there was a panic.
    pub(crate) fn panic_tail(&self) -> Option<String> {
        let mut tail = self.lock();
        let bytes = tail.make_contiguous();
        let found = bytes
            .windows(PANIC.len())
            .rposition(|window| window == PANIC)?;
        let start = bytes[..found]
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        let end = bytes.len().min(start + PANIC_TAIL);
        Some(printable(&bytes[start..end]))
    }
}

async fn read(
    mut stream: UnixStream,
    mut log: Log,
    tail: Arc<Mutex<VecDeque<u8>>>,
    progress: watch::Sender<Progress>,
) {
    let mut chunk = vec![0; 8 * 1024];
    // The end of the last chunk, in which the panic message may have begun.
    let mut window: Vec<u8> = Vec::new();
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        let bytes = &chunk[..count];
        if let Err(e) = log.write(bytes) {
            tracing::warn!(path = %log.path.display(), error = %e, "cannot write the console log");
        }
        {
            let mut tail = tail.lock().expect("no holder of this lock panics");
            tail.extend(bytes);
            let excess = tail.len().saturating_sub(KEEP);
            tail.drain(..excess);
        }
        window.extend_from_slice(bytes);
        if window.windows(PANIC.len()).any(|w| w == PANIC) {
            progress.send_modify(|progress| progress.panicked = true);
        }
        let keep = window.len().saturating_sub(PANIC.len());
        window.drain(..keep);
    }
    progress.send_modify(|progress| progress.ended = true);
}

/// Text without anything that a terminal would act on.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|c| matches!(c, '\n' | '\t') || !c.is_control())
        .collect()
}

/// A log file and its predecessor.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: Option<(File, u64)>,
}

impl Log {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.as_ref().is_some_and(|(_, size)| *size >= ROTATE) {
            self.file = None;
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            std::fs::rename(&self.path, old)?;
        }
        let (file, size) = match &mut self.file {
            Some(open) => open,
            none => {
                let file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    .open(&self.path)?;
                let size = file.metadata()?.len();
                none.insert((file, size))
            }
        };
        file.write_all(bytes)?;
        *size += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    async fn fed(chunks: &[&[u8]]) -> (Console, tempfile::TempDir) {
        let temp = tempfile::tempdir().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let console = Console::start(ours, temp.path().join("console.log"));
        for chunk in chunks {
            theirs.write_all(chunk).await.unwrap();
        }
        drop(theirs);
        console.ended().await;
        (console, temp)
    }

    #[tokio::test]
    async fn a_flood_stays_within_bounds() {
        let line = b"all work and no play makes jack a dull boy\n".repeat(1000);
        let (console, temp) = fed(&vec![line.as_slice(); 40]).await;
        assert!(console.tail().len() <= KEEP);
        let size = |name: &str| std::fs::metadata(temp.path().join(name)).unwrap().len();
        assert!(size("console.log") <= ROTATE + 8192 && size("console.log.1") <= ROTATE + 8192);
    }

    #[tokio::test]
    async fn a_panic_is_seen_across_chunks() {
        let (console, _temp) = fed(&[
            b"boot\n[ 1.0] Kernel pan",
            b"ic - not syncing: Attempted to kill init!\nmore",
        ])
        .await;
        console.panicked().await;
        let tail = console.panic_tail().unwrap();
        assert!(
            tail.starts_with("[ 1.0] Kernel panic - not syncing: Att"),
            "{tail}"
        );
        assert!(tail.ends_with("more"));
    }

    #[tokio::test]
    async fn escape_sequences_do_not_reach_the_reader() {
        let (console, _temp) = fed(&[b"a\x1b]0;title\x07\x9bb\r\n\xff"]).await;
        assert_eq!(console.tail(), "a]0;title\u{fffd}b\n\u{fffd}");
        assert_eq!(console.panic_tail(), None);
    }
}

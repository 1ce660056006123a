//! Reading container logs: files of lines `time stream P|F content`.
//!
//! `P` is a part of a line without its end, `F` its end (or the whole). The file is the host's
//! own, but its content is the guest's: a line that is not of the form is passed over, and no line
//! is held in memory beyond [`MAX_LINE`].

use std::{io::SeekFrom, path::Path, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use hypernetes_streaming::{LogRequest, LogSource, LogStream};
use jiff::Timestamp;
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
};

/// Longest line of a log file; the writer splits at 16 KiB.
const MAX_LINE: usize = 64 * 1024;
const BLOCK: usize = 32 * 1024;
/// How long a follower waits for the file to grow; doubles while nothing comes.
const SHORTEST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_millis(250);

/// A line of the file.
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    time: &'a str,
    source: LogSource,
    partial: bool,
    content: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let source = match parts.next()? {
        b"stdout" => LogSource::Stdout,
        b"stderr" => LogSource::Stderr,
        _ => return None,
    };
    let tags = parts.next()?;
    let content = parts.next().unwrap_or_default();
    // Tags may grow with `:`; the first says whether the line goes on.
    let partial = match tags.split(|byte| *byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    (!time.is_empty()).then_some(Line {
        time,
        source,
        partial,
        content,
    })
}

/// What a client asked for, applied to one line after the other.
#[derive(Debug)]
struct Filter {
    since: Option<Timestamp>,
    timestamps: bool,
    left: Option<u64>,
    source: Option<LogSource>,
    /// The line before was partial: this one continues it.
    inside: bool,
}

impl Filter {
    fn new(request: &LogRequest, now: Timestamp) -> Self {
        let ago = request.since_seconds.and_then(|seconds| {
            let seconds = i64::try_from(seconds).ok()?;
            now.checked_sub(jiff::SignedDuration::from_secs(seconds))
                .ok()
        });
        let exact = request
            .since_unix_nanos
            .and_then(|nanos| Timestamp::from_nanosecond(i128::from(nanos)).ok());
        Self {
            since: exact.or(ago),
            timestamps: request.timestamps,
            left: request.limit_bytes,
            source: request.source,
            inside: false,
        }
    }

    fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    fn push(&mut self, line: &[u8], out: &mut BytesMut) {
        let Some(line) = parse(line) else { return };
        if self.source.is_some_and(|source| source != line.source) {
            return;
        }
        let skipped = self.since.is_some_and(|since| {
            line.time
                .parse::<Timestamp>()
                .is_ok_and(|time| time < since)
        });
        if skipped {
            return;
        }
        if self.timestamps && !self.inside {
            self.take(line.time.as_bytes(), out);
            self.take(b" ", out);
        }
        self.take(line.content, out);
        if !line.partial {
            self.take(b"\n", out);
        }
        self.inside = line.partial;
    }

    fn take(&mut self, bytes: &[u8], out: &mut BytesMut) {
        let length = match &mut self.left {
            None => bytes.len(),
            Some(left) => {
                let length = bytes
                    .len()
                    .min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= length as u64;
                length
            }
        };
        out.extend_from_slice(&bytes[..length]);
    }
}

/// Position of the `count`th line from the end.
async fn tail_start(file: &mut File, count: u64) -> std::io::Result<u64> {
    let mut position = file.seek(SeekFrom::End(0)).await?;
    if count == 0 {
        return Ok(position);
    }
    let mut block = vec![0; BLOCK];
    let mut found = 0;
    let end = position;
    while position > 0 {
        let length = usize::try_from(position.min(BLOCK as u64)).unwrap_or(BLOCK);
        position -= length as u64;
        file.seek(SeekFrom::Start(position)).await?;
        file.read_exact(&mut block[..length]).await?;
        for at in (0..length).rev() {
            let absolute = position + at as u64;
            // The newline that ends the file ends the last line, it does not begin another.
            if block[at] == b'\n' && absolute + 1 < end {
                found += 1;
                if found == count {
                    return Ok(absolute + 1);
                }
            }
        }
    }
    Ok(0)
}

/// Tells a follower whether the log can still grow.
pub(crate) type StillRuns =
    Box<dyn Fn() -> futures::future::BoxFuture<'static, bool> + Send + Sync>;

struct Reader {
    file: File,
    pending: BytesMut,
    filter: Filter,
    /// `None`: end at the end of the file.
    follow: Option<StillRuns>,
    /// The container had ended before the last read found nothing.
    last_round: bool,
    wait: Duration,
    failed: bool,
}

impl Reader {
    /// The next piece of output; `None` at the end.
    async fn next(&mut self) -> Option<std::io::Result<Bytes>> {
        if self.failed {
            return None;
        }
        loop {
            if self.filter.is_full() {
                return None;
            }
            let mut block = BytesMut::with_capacity(BLOCK);
            match self.file.read_buf(&mut block).await {
                Ok(0) => {
                    let Some(runs) = &self.follow else {
                        return None;
                    };
                    if self.last_round {
                        return None;
                    }
                    // What was written before the end is in the file when the end is known, so one
                    // more read after it takes all.
                    if (runs)().await {
                        tokio::time::sleep(self.wait).await;
                        self.wait = (self.wait * 2).min(LONGEST_WAIT);
                    } else {
                        self.last_round = true;
                    }
                }
                Ok(_) => {
                    self.wait = SHORTEST_WAIT;
                    self.last_round = false;
                    let out = self.take_lines(&block);
                    if !out.is_empty() {
                        return Some(Ok(out));
                    }
                }
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }

    fn take_lines(&mut self, block: &[u8]) -> Bytes {
        let mut out = BytesMut::new();
        self.pending.extend_from_slice(block);
        let mut from = 0;
        while let Some(length) = self.pending[from..].iter().position(|byte| *byte == b'\n') {
            self.filter
                .push(&self.pending[from..from + length], &mut out);
            from += length + 1;
        }
        drop(self.pending.split_to(from));
        if self.pending.len() > MAX_LINE {
            self.pending.clear();
        }
        out.freeze()
    }
}

/// Opens a log. With `runs`, reading goes on until it says no and all is read.
pub(crate) async fn open(
    path: &Path,
    request: &LogRequest,
    runs: Option<StillRuns>,
) -> std::io::Result<LogStream> {
    let mut file = File::open(path).await?;
    let start = match request.tail_lines {
        Some(count) => tail_start(&mut file, count).await?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start)).await?;
    let reader = Reader {
        file,
        pending: BytesMut::new(),
        filter: Filter::new(request, Timestamp::now()),
        follow: runs,
        last_round: false,
        wait: SHORTEST_WAIT,
        failed: false,
    };
    Ok(stream::unfold(reader, |mut reader| async move {
        let item = reader.next().await?;
        Some((item, reader))
    })
    .boxed())
}

/// The end of a log, as a termination message: at most 80 lines and 2 KiB.
pub(crate) async fn tail_text(path: &Path) -> std::io::Result<String> {
    const LIMIT: usize = 2048;
    let request = LogRequest {
        tail_lines: Some(80),
        ..LogRequest::default()
    };
    let mut stream = open(path, &request, None).await?;
    let mut text = BytesMut::new();
    while let Some(piece) = stream.next().await {
        text.extend_from_slice(&piece?);
        if text.len() > 4 * LIMIT {
            drop(text.split_to(text.len() - LIMIT));
        }
    }
    let start = text.len().saturating_sub(LIMIT);
    Ok(String::from_utf8_lossy(&text[start..]).into_owned())
}

#[cfg(test)]
#[path = "logs/tests.rs"]
mod tests;

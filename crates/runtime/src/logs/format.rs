//! The log format of Kubernetes' container runtime interface, both ways.
//!
//! ```text
//! 2026-01-02T03:04:05.000000006Z stdout F a whole line
//! 2026-01-02T03:04:05.000000006Z stderr P the first 16 KiB of a long line, or an unfinished last one
//! ```
//! An `F` line stands for its content and a newline, a `P` line for its content alone. So the sum
//! over a file's lines is exactly how many bytes of each stream are in it.

use jiff::{Timestamp, tz::TimeZone};

/// Longest content of one line.
pub(crate) const MAX_LINE: usize = 16 * 1024;
/// Time, stream, tag and the spaces between them.
pub(crate) const HEADER: usize = STAMP + " stdout F ".len();
const STAMP: usize = "2026-01-02T03:04:05.000000006Z".len();

/// Which of a process's two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    #[cfg(any(test, feature = "fake"))]
    pub(crate) const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    pub(crate) fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Nanoseconds since 1970, in this node's clock. A guest's clock is never looked at.
pub(crate) fn now_nanos() -> i64 {
    let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
    #[cfg(test)]
    let now = now.saturating_add(crate::testing::Gate::current().clock_ahead());
    now
}

fn stamp(nanos: i64) -> String {
    let time = Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or(Timestamp::UNIX_EPOCH);
    let time = time.to_zoned(TimeZone::UTC).datetime();
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z",
        time.year(),
        time.month(),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.subsec_nanosecond(),
    )
}

/// Cuts the two streams of one container into log lines.
///
/// What has no newline yet waits here, at most [`MAX_LINE`] bytes per stream, and counts as not
/// taken: after a restart the guest sends it again.
#[derive(Debug, Default)]
pub(crate) struct LineCutter {
    pending: [Vec<u8>; 2],
}

impl LineCutter {
    /// Takes bytes of a stream and appends the lines they complete to `lines`. Returns how many
    /// bytes of the stream those lines stand for.
    pub(crate) fn feed(
        &mut self,
        stream: Stream,
        mut data: &[u8],
        nanos: i64,
        lines: &mut Vec<u8>,
    ) -> u64 {
        let pending = &mut self.pending[stream.index()];
        let stamp = stamp(nanos);
        let mut taken = 0;
        while !data.is_empty() {
            let room = MAX_LINE - pending.len();
            let window = &data[..data.len().min(room + 1)];
            if let Some(end) = window.iter().position(|&byte| byte == b'\n') {
                pending.extend_from_slice(&data[..end]);
                data = &data[end + 1..];
                taken += line(lines, &stamp, stream, 'F', pending) + 1;
            } else if window.len() > room {
                // More than a line holds, and the byte behind it is no newline.
                pending.extend_from_slice(&data[..room]);
                data = &data[room..];
                taken += line(lines, &stamp, stream, 'P', pending);
            } else {
                pending.extend_from_slice(data);
                return taken;
            }
        }
        taken
    }

    /// The stream has ended: what waits becomes a line without a newline.
    pub(crate) fn finish(&mut self, stream: Stream, nanos: i64, lines: &mut Vec<u8>) -> u64 {
        let pending = &mut self.pending[stream.index()];
        if pending.is_empty() {
            0
        } else {
            line(lines, &stamp(nanos), stream, 'P', pending)
        }
    }

    /// Forgets what waits: it will be sent again.
    pub(crate) fn reset(&mut self) {
        self.pending.iter_mut().for_each(Vec::clear);
    }
}

fn line(lines: &mut Vec<u8>, stamp: &str, stream: Stream, tag: char, content: &mut Vec<u8>) -> u64 {
    lines.extend_from_slice(format!("{stamp} {} {tag} ", stream.name()).as_bytes());
    lines.extend_from_slice(content);
    lines.push(b'\n');
    let length = content.len() as u64;
    content.clear();
    length
}

/// What one line of a log (without its newline) stands for; `None` if it is no line of ours.
pub(crate) fn measure(line: &[u8]) -> Option<(Stream, u64)> {
    if line.len() < HEADER || line[STAMP - 1] != b'Z' {
        return None;
    }
    let content = (line.len() - HEADER) as u64;
    let stream = match &line[STAMP..HEADER - 2] {
        b" stdout " => Stream::Stdout,
        b" stderr " => Stream::Stderr,
        _ => return None,
    };
    match &line[HEADER - 2..HEADER] {
        b"F " => Some((stream, content + 1)),
        b"P " => Some((stream, content)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes of a stream that a log stands for.
    pub(crate) fn content(log: &[u8], stream: Stream) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in log.split_inclusive(|&byte| byte == b'\n') {
            let line = line.strip_suffix(b"\n").unwrap();
            if measure(line).unwrap().0 == stream {
                bytes.extend_from_slice(&line[HEADER..]);
                if line[HEADER - 2] == b'F' {
                    bytes.push(b'\n');
                }
            }
        }
        bytes
    }

    #[test]
    fn stamps_have_nine_digits_and_zulu_time() {
        assert_eq!(
            stamp(1_700_000_000_000_000_007),
            "2023-11-14T22:13:20.000000007Z"
        );
        assert_eq!(stamp(now_nanos()).len(), STAMP);
    }

    #[test]
    fn lines_and_partial_lines() {
        let mut cutter = LineCutter::default();
        let mut log = Vec::new();
        assert_eq!(cutter.feed(Stream::Stdout, b"one\ntw", 0, &mut log), 4);
        assert_eq!(cutter.feed(Stream::Stderr, b"e\n", 0, &mut log), 2);
        assert_eq!(cutter.feed(Stream::Stdout, b"o\nend", 0, &mut log), 4);
        assert_eq!(cutter.finish(Stream::Stdout, 0, &mut log), 3);
        let text = String::from_utf8(log)
            .unwrap()
            .replace("1970-01-01T00:00:00.000000000Z", "T");
        assert_eq!(
            text,
            "T stdout F one\nT stderr F e\nT stdout F two\nT stdout P end\n"
        );
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_whole() {
        let mut cutter = LineCutter::default();
        let mut log = Vec::new();
        let mut data = vec![b'x'; MAX_LINE];
        data.push(b'\n');
        assert_eq!(
            cutter.feed(Stream::Stdout, &data, 0, &mut log),
            data.len() as u64
        );
        assert_eq!(log.len(), HEADER + MAX_LINE + 1);
        assert_eq!(log[HEADER - 2], b'F');
        log.clear();
        data.insert(0, b'x');
        assert_eq!(
            cutter.feed(Stream::Stdout, &data, 0, &mut log),
            data.len() as u64
        );
        assert_eq!(content(&log, Stream::Stdout), data);
        assert_eq!(log[HEADER - 2], b'P');
    }

    proptest! {
        // Tens of kilobytes each.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_taken_is_what_the_lines_measure(
            pieces in proptest::collection::vec((any::<bool>(), proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..9000)), 0..12)
        ) {
            let mut cutter = LineCutter::default();
            let (mut log, mut taken, mut fed) = (Vec::new(), [0; 2], [Vec::new(), Vec::new()]);
            for (first, piece) in &pieces {
                let stream = if *first { Stream::Stdout } else { Stream::Stderr };
                taken[stream.index()] += cutter.feed(stream, piece, 7, &mut log);
                fed[stream.index()].extend_from_slice(piece);
            }
            for stream in Stream::BOTH {
                taken[stream.index()] += cutter.finish(stream, 7, &mut log);
                prop_assert_eq!(taken[stream.index()], fed[stream.index()].len() as u64);
                prop_assert_eq!(&content(&log, stream), &fed[stream.index()]);
            }
        }

        #[test]
        fn any_bytes_can_be_measured(line in proptest::collection::vec(any::<u8>(), 0..100)) {
            measure(&line);
        }
    }
}

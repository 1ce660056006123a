//! Reading a container's log: both streams, in the order of their times.

use std::time::Duration;

use futures::{AsyncBufRead, AsyncBufReadExt as _, StreamExt as _, stream::BoxStream};
use jiff::Timestamp;
use kube::core::Request;

use crate::{
    cluster::Cluster,
    error::{Failure, Result},
    terminal,
};

/// How long a line waits for an earlier one of the other stream.
const ORDER: Duration = Duration::from_millis(40);

/// What of a log is wanted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query {
    pub(crate) follow: bool,
    pub(crate) since: Option<Timestamp>,
    pub(crate) until: Option<Timestamp>,
    pub(crate) tail: Option<i64>,
    pub(crate) timestamps: bool,
    /// The server can read one stream alone.
    pub(crate) split: bool,
    /// Before each line.
    pub(crate) prefix: String,
}

/// A line with its time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    error: bool,
    time: Option<Timestamp>,
    stamp: Vec<u8>,
    text: Vec<u8>,
}

fn parse(error: bool, raw: Vec<u8>) -> Line {
    let at = raw
        .iter()
        .position(|byte| *byte == b' ')
        .unwrap_or(raw.len());
    let time = std::str::from_utf8(&raw[..at])
        .ok()
        .and_then(|text| text.parse().ok());
    match time {
        Some(time) => Line {
            error,
            time: Some(time),
            stamp: raw[..at].to_vec(),
            text: raw.get(at + 1..).unwrap_or_default().to_vec(),
        },
        None => Line {
            error,
            time: None,
            stamp: Vec::new(),
            text: raw,
        },
    }
}

async fn open(
    cluster: &Cluster,
    pod: &str,
    container: &str,
    query: &Query,
    source: Option<bool>,
) -> Result<BoxStream<'static, std::io::Result<Line>>> {
    let params = kube::api::LogParams {
        container: Some(container.to_owned()),
        follow: query.follow,
        since_time: query.since,
        tail_lines: query.tail,
        timestamps: true,
        ..kube::api::LogParams::default()
    };
    let path = format!("/api/v1/namespaces/{}/pods", cluster.namespace);
    let mut request = Request::new(path)
        .logs(pod, &params)
        .map_err(Failure::plain)?;
    if let Some(error) = source {
        let uri = format!(
            "{}&stream={}",
            request.uri(),
            if error { "Stderr" } else { "Stdout" }
        );
        *request.uri_mut() = uri.parse().map_err(Failure::plain)?;
    }
    let reader = cluster.client.request_stream(request).await?;
    Ok(lines(reader, source == Some(true)).boxed())
}

fn lines(
    reader: impl AsyncBufRead + Unpin + Send + 'static,
    error: bool,
) -> impl futures::Stream<Item = std::io::Result<Line>> + Send {
    futures::stream::unfold(reader, move |mut reader| async move {
        let mut raw = Vec::new();
        match reader.read_until(b'\n', &mut raw).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(parse(error, raw)), reader)),
            Err(failure) => Some((Err(failure), reader)),
        }
    })
}

/// Prints a log until it ends.
pub(crate) async fn print(
    cluster: &Cluster,
    pod: &str,
    container: &str,
    query: &Query,
) -> Result<()> {
    let empty = || futures::stream::empty().boxed();
    let (out, error) = if query.split && query.tail.is_none() {
        tokio::try_join!(
            open(cluster, pod, container, query, Some(false)),
            open(cluster, pod, container, query, Some(true))
        )?
    } else {
        (open(cluster, pod, container, query, None).await?, empty())
    };
    merge(out, error, |line| emit(line, query)).await
}

/// Gives lines of two streams in the order of their times, as far as that can be known: a line waits a
/// moment for an earlier one of the other stream, unless that has just had nothing to say.
async fn merge(
    mut out: BoxStream<'static, std::io::Result<Line>>,
    mut error: BoxStream<'static, std::io::Result<Line>>,
    mut emit: impl FnMut(&Line) -> Result<bool>,
) -> Result<()> {
    let (mut next_out, mut next_error) = (None::<Line>, None::<Line>);
    let (mut out_ended, mut error_ended) = (false, false);
    let (mut out_quiet, mut error_quiet) = (false, false);
    while !(out_ended && error_ended && next_out.is_none() && next_error.is_none()) {
        let waits = next_out.is_some() || next_error.is_some();
        let both = next_out.is_some() && next_error.is_some();
        let quiet = both
            || (next_out.is_none() || error_quiet || error_ended)
                && (next_error.is_none() || out_quiet || out_ended);
        let moment = async {
            if !quiet {
                tokio::time::sleep(ORDER).await;
            }
        };
        tokio::select! {
            biased;
            line = out.next(), if next_out.is_none() && !out_ended => {
                next_out = line.transpose()?;
                out_ended = next_out.is_none();
                out_quiet = false;
                continue;
            }
            line = error.next(), if next_error.is_none() && !error_ended => {
                next_error = line.transpose()?;
                error_ended = next_error.is_none();
                error_quiet = false;
                continue;
            }
            () = moment, if waits => {
                out_quiet |= next_out.is_none();
                error_quiet |= next_error.is_none();
            }
        }
        let error_first = match (&next_out, &next_error) {
            (Some(out), Some(error)) => error.time < out.time,
            (out, _) => out.is_none(),
        };
        let line = if error_first {
            next_error.take()
        } else {
            next_out.take()
        };
        if let Some(line) = line
            && !emit(&line)?
        {
            return Ok(());
        }
    }
    Ok(())
}

/// Prints a line. `false`: nothing more is wanted, or nobody reads.
fn emit(line: &Line, query: &Query) -> Result<bool> {
    if query
        .until
        .is_some_and(|until| line.time.is_some_and(|time| time > until))
    {
        return Ok(false);
    }
    let mut bytes = query.prefix.clone().into_bytes();
    if query.timestamps {
        bytes.extend_from_slice(&line.stamp);
        bytes.push(b' ');
    }
    bytes.extend_from_slice(&line.text);
    match terminal::bytes(line.error, &bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(error: bool, lines: &[&str]) -> BoxStream<'static, std::io::Result<Line>> {
        let lines: Vec<_> = lines
            .iter()
            .map(|line| Ok(parse(error, line.as_bytes().to_vec())))
            .collect();
        futures::stream::iter(lines).boxed()
    }

    async fn merged(
        out: BoxStream<'static, std::io::Result<Line>>,
        error: BoxStream<'static, std::io::Result<Line>>,
        most: usize,
    ) -> Vec<String> {
        let mut seen = Vec::new();
        merge(out, error, |line| {
            seen.push(String::from_utf8_lossy(&line.text).into_owned());
            Ok(seen.len() < most)
        })
        .await
        .unwrap();
        seen
    }

    #[tokio::test]
    async fn two_streams_come_in_the_order_of_their_times() {
        let out = stream(
            false,
            &["2026-01-01T00:00:01Z a\n", "2026-01-01T00:00:04Z d\n"],
        );
        let error = stream(
            true,
            &["2026-01-01T00:00:02Z b\n", "2026-01-01T00:00:03Z c\n"],
        );
        assert_eq!(merged(out, error, 99).await.concat(), "a\nb\nc\nd\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_does_not_hold_the_other_up() {
        let line = "2026-01-01T00:00:01Z x\n";
        let begun = tokio::time::Instant::now();
        let seen = merged(
            stream(false, &vec![line; 10_000]),
            futures::stream::pending().boxed(),
            10_000,
        )
        .await;
        assert_eq!(seen.len(), 10_000);
        assert!(begun.elapsed() < ORDER * 3, "{:?}", begun.elapsed());
    }

    #[test]
    fn lines_have_times_or_are_taken_as_they_are() {
        let line = parse(false, b"2026-01-02T03:04:05.5Z hello world\n".to_vec());
        assert_eq!(line.text, b"hello world\n");
        assert_eq!(line.stamp, b"2026-01-02T03:04:05.5Z");
        assert_eq!(parse(true, b"2026-01-02T03:04:05Z \n".to_vec()).text, b"\n");
        let plain = parse(true, b"no time here\n".to_vec());
        assert_eq!(
            (plain.time, plain.text.as_slice()),
            (None, b"no time here\n".as_slice())
        );
    }
}

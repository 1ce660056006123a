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
    let (mut out, mut error) = if query.split && query.tail.is_none() {
        tokio::try_join!(
            open(cluster, pod, container, query, Some(false)),
            open(cluster, pod, container, query, Some(true))
        )?
    } else {
        (open(cluster, pod, container, query, None).await?, empty())
    };
    let (mut next_out, mut next_error) = (None::<Line>, None::<Line>);
    let (mut out_ended, mut error_ended) = (false, false);
    loop {
        tokio::select! {
            biased;
            line = out.next(), if next_out.is_none() && !out_ended => match line.transpose()? {
                Some(line) => next_out = Some(line),
                None => out_ended = true,
            },
            line = error.next(), if next_error.is_none() && !error_ended => match line.transpose()? {
                Some(line) => next_error = Some(line),
                None => error_ended = true,
            },
            () = tokio::time::sleep(ORDER), if next_out.is_some() || next_error.is_some() => {
                // The other stream has nothing now.
                if !emit_one(&mut next_out, &mut next_error, query)? {
                    return Ok(());
                }
                continue;
            }
            else => {}
        }
        let complete = (next_out.is_some() || out_ended) && (next_error.is_some() || error_ended);
        if complete
            && (next_out.is_some() || next_error.is_some())
            && !emit_one(&mut next_out, &mut next_error, query)?
        {
            return Ok(());
        }
        if out_ended && error_ended && next_out.is_none() && next_error.is_none() {
            return Ok(());
        }
    }
}

/// Prints the earlier of two lines. `false`: nothing more is wanted, or nobody reads.
fn emit_one(out: &mut Option<Line>, error: &mut Option<Line>, query: &Query) -> Result<bool> {
    let take_error = match (&*out, &*error) {
        (Some(out), Some(error)) => error.time < out.time,
        (None, Some(_)) => true,
        _ => false,
    };
    let line = if take_error { error.take() } else { out.take() };
    let Some(line) = line else { return Ok(true) };
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

//! Standard streams of a process in a container, joined to this terminal.

use std::{future::Future, pin::Pin};

use futures::SinkExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{AttachedProcess, TerminalSize};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::{
    error::{Failure, Result},
    terminal,
};

/// How a session ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    /// The process, or the connection, ended; the status is an exec's.
    Ended(Option<Box<Status>>),
    /// The user left with the detach keys.
    Detached,
}

/// A key sequence such as `ctrl-p,ctrl-q`, as bytes.
pub(crate) fn detach_keys(text: &str) -> Result<Vec<u8>> {
    let invalid = || Failure::usage(format_args!("invalid detach keys ({text}) provided"));
    text.split(',')
        .filter(|key| !key.is_empty())
        .map(|key| match key.strip_prefix("ctrl-") {
            Some(letter) => match letter.as_bytes() {
                [letter @ b'a'..=b'z'] => Ok(letter - b'a' + 1),
                b"@" => Ok(0),
                b"[" => Ok(27),
                b"\\" => Ok(28),
                b"]" => Ok(29),
                b"^" => Ok(30),
                b"_" => Ok(31),
                _ => Err(invalid()),
            },
            None => match key.as_bytes() {
                [byte] if byte.is_ascii() => Ok(*byte),
                _ => Err(invalid()),
            },
        })
        .collect()
}

/// Finds a key sequence in what is typed.
#[derive(Debug)]
struct Escape {
    keys: Vec<u8>,
    matched: usize,
}

impl Escape {
    /// What to send on of `input`; `true` when the sequence is complete.
    fn take(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(input.len());
        for byte in input {
            if self.keys.is_empty() {
                out.push(*byte);
                continue;
            }
            if self.keys.get(self.matched) == Some(byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return (out, true);
                }
                continue;
            }
            out.extend_from_slice(&self.keys[..self.matched]);
            self.matched = 0;
            if self.keys.first() == Some(byte) {
                self.matched = 1;
            } else {
                out.push(*byte);
            }
        }
        (out, false)
    }
}

/// Copies a stream of the process here.
async fn copy_out(reader: Option<impl AsyncRead + Unpin>, error: bool) {
    let Some(mut reader) = reader else { return };
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(count) = reader.read(&mut buffer).await {
        if count == 0 || terminal::bytes(error, &buffer[..count]).is_err() {
            return;
        }
    }
}

/// Sends what is typed; ends at the end of input, or with `true` at the detach keys.
async fn copy_in(writer: Option<impl tokio::io::AsyncWrite + Unpin>, keys: Vec<u8>) -> bool {
    let Some(mut writer) = writer else {
        return false;
    };
    let mut escape = Escape { keys, matched: 0 };
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = match stdin.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let (out, left) = escape.take(&buffer[..count]);
        if writer.write_all(&out).await.is_err() {
            return false;
        }
        if left {
            return true;
        }
        if writer.flush().await.is_err() {
            return false;
        }
    }
    // The end of input is for the process to see; it may have gone already.
    drop(writer.shutdown().await);
    false
}

/// Which streams are joined.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
    pub(crate) detach_keys: Vec<u8>,
    /// Output comes from elsewhere: the session ends with `finished`.
    pub(crate) input_only: bool,
    /// A process that was there before is to draw its screen again.
    pub(crate) redraw: bool,
}

/// Joins a process to this terminal until it ends or the user leaves.
pub(crate) async fn join(
    mut process: AttachedProcess,
    streams: Streams,
    finished: Option<oneshot::Receiver<()>>,
) -> Result<End> {
    let _raw = (streams.tty && streams.stdin)
        .then(terminal::RawMode::enter)
        .flatten();
    let status: Pin<Box<dyn Future<Output = Option<Status>> + Send>> = match process.take_status() {
        Some(status) => Box::pin(status),
        None => Box::pin(std::future::pending()),
    };
    let resize = streams.tty.then(|| process.terminal_size()).flatten();
    let resizing = tokio::spawn(async move {
        let (Some(mut sizes), Ok(mut changes)) = (resize, signal(SignalKind::window_change()))
        else {
            return;
        };
        let mut first = streams.redraw;
        loop {
            if let Some((width, height)) = terminal::size() {
                if first {
                    // A change of size makes programs draw again.
                    let other = TerminalSize {
                        width,
                        height: height.saturating_add(1),
                    };
                    if sizes.send(other).await.is_err() {
                        return;
                    }
                    first = false;
                }
                if sizes.send(TerminalSize { width, height }).await.is_err() {
                    return;
                }
            }
            if changes.recv().await.is_none() {
                return;
            }
        }
    });
    let out = tokio::spawn(copy_out(process.stdout(), false));
    let error = tokio::spawn(copy_out(process.stderr(), true));
    let writer = streams.stdin.then(|| process.stdin()).flatten();
    let input = copy_in(writer, streams.detach_keys);
    tokio::pin!(input);
    let mut finished = finished;
    let mut typing = true;
    let output = async {
        drop(out.await);
        drop(error.await);
    };
    tokio::pin!(output);
    let end = loop {
        tokio::select! {
            left = &mut input, if typing => {
                typing = false;
                if left {
                    process.abort();
                    break End::Detached;
                }
            }
            () = &mut output, if !streams.input_only => break End::Ended(status.await.map(Box::new)),
            _ = async { match finished.as_mut() { Some(done) => drop(done.await), None => std::future::pending().await } } => break End::Ended(None),
        }
    };
    resizing.abort();
    Ok(end)
}

/// The exit code in an exec's status, or why the process did not run.
pub(crate) fn exit_of(status: Option<&Status>) -> Result<i32> {
    let Some(status) = status else {
        return Err(Failure::plain("the connection to the container was lost"));
    };
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let causes = status
        .details
        .as_ref()
        .and_then(|details| details.causes.as_ref());
    let code = causes
        .into_iter()
        .flatten()
        .find(|cause| cause.reason.as_deref() == Some("ExitCode"))
        .and_then(|cause| cause.message.as_ref()?.parse().ok());
    match code {
        Some(code) => Ok(code),
        None => Err(start_failure(status.message.as_deref().unwrap_or_default())),
    }
}

/// A process that did not start: 127 if its file is not there, 126 if it cannot be run.
pub(crate) fn start_failure(message: &str) -> Failure {
    let lower = message.to_ascii_lowercase();
    let code = if ["not found", "no such file", "enoent"]
        .iter()
        .any(|text| lower.contains(text))
    {
        crate::error::NOT_FOUND
    } else if [
        "permission denied",
        "eacces",
        "is a directory",
        "exec format error",
    ]
    .iter()
    .any(|text| lower.contains(text))
    {
        crate::error::NOT_EXECUTABLE
    } else {
        crate::error::OWN
    };
    Failure::daemon(message).with_code(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_parsed() {
        assert_eq!(detach_keys("ctrl-p,ctrl-q").unwrap(), [16, 17]);
        assert_eq!(detach_keys("a,ctrl-[").unwrap(), [b'a', 27]);
        assert_eq!(
            detach_keys("ctrl-1").unwrap_err().message,
            "hyper: invalid detach keys (ctrl-1) provided"
        );
        assert!(detach_keys("abc").is_err());
    }

    #[test]
    fn the_sequence_is_found_across_reads_and_nothing_else_is_lost() {
        let mut escape = Escape {
            keys: vec![16, 17],
            matched: 0,
        };
        assert_eq!(escape.take(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(escape.take(b"c\x10\x10"), (b"\x10c\x10".to_vec(), false));
        assert_eq!(escape.take(b"\x11rest"), (Vec::new(), true));
        let mut none = Escape {
            keys: Vec::new(),
            matched: 0,
        };
        assert_eq!(none.take(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
    }

    #[test]
    fn exit_codes_of_exec() {
        let status = |value: serde_json::Value| serde_json::from_value::<Status>(value).ok();
        assert_eq!(
            exit_of(status(serde_json::json!({"status": "Success"})).as_ref()).unwrap(),
            0
        );
        let failed = serde_json::json!({"status": "Failure", "reason": "NonZeroExitCode", "message": "command terminated with non-zero exit code",
            "details": {"causes": [{"reason": "ExitCode", "message": "7"}]}});
        assert_eq!(exit_of(status(failed).as_ref()).unwrap(), 7);
        let missing = serde_json::json!({"status": "Failure", "message": "exec: \"x\": executable file not found in $PATH"});
        assert_eq!(exit_of(status(missing).as_ref()).unwrap_err().code, 127);
        let denied = serde_json::json!({"status": "Failure", "message": "exec: \"/etc\": permission denied"});
        assert_eq!(exit_of(status(denied).as_ref()).unwrap_err().code, 126);
        assert_eq!(exit_of(None).unwrap_err().code, 1);
    }
}

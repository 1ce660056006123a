//! What is believed of a guest: bounded, cleaned, and about known containers only.

use std::time::Duration;

use hypernetes_agent_api::{AgentError, v1};
use hypernetes_types::SandboxId;

use crate::error::RuntimeError;

/// Longest text that is taken from a guest.
const MAX_TEXT: usize = 1024;
/// Longest text that is taken from a container about its end.
const MAX_TERMINATION: usize = 4096;

/// A guest's text, fit for a status or a log line.
pub(crate) fn clean(text: &str) -> String {
    bounded(text, MAX_TEXT, |c| !c.is_control())
}

/// The last `limit` bytes or so of a guest's console, with line breaks.
pub(crate) fn clean_console(text: &str, limit: usize) -> String {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    bounded(&text[start..], limit, |c| {
        matches!(c, '\n' | '\t') || !c.is_control()
    })
}

/// The first `limit` bytes or so of a guest's console, with line breaks.
pub(crate) fn clean_console_head(text: &str, limit: usize) -> String {
    bounded(text, limit, |c| matches!(c, '\n' | '\t') || !c.is_control())
}

fn bounded(text: &str, limit: usize, keep: impl Fn(char) -> bool) -> String {
    let mut result = String::new();
    for c in text.chars().filter(|c| keep(*c)) {
        if result.len() + c.len_utf8() > limit {
            break;
        }
        result.push(c);
    }
    result
}

/// What is told of a container's end: why it could not run, and what it says itself.
pub(crate) fn exit_message(exit: &v1::Exit) -> String {
    let said = &exit.termination_message[..exit.termination_message.len().min(MAX_TERMINATION)];
    let said = clean_console_head(&String::from_utf8_lossy(said), MAX_TERMINATION);
    match (clean(&exit.message), said) {
        (reason, said) if said.is_empty() => reason,
        (reason, said) if reason.is_empty() => said,
        (reason, said) => format!("{reason}: {said}"),
    }
}

/// An exit code in the range that processes have.
pub(crate) fn exit_code(exit: &v1::Exit) -> i32 {
    exit.code.clamp(0, 255)
}

/// Why a process ended, in Kubernetes' words.
pub(crate) fn exit_reason(exit: &v1::Exit) -> &'static str {
    match exit_code(exit) {
        _ if exit.oom_killed => "OOMKilled",
        126 | 127 if !exit.message.is_empty() => "ContainerCannotRun",
        0 => "Completed",
        _ => "Error",
    }
}

/// Turns a failed call into an error of this crate.
pub(crate) fn error(sandbox: &SandboxId, action: &'static str, error: &AgentError) -> RuntimeError {
    let sandbox = sandbox.to_string();
    match error {
        AgentError::Deadline { waited, .. } => RuntimeError::GuestSilent {
            sandbox,
            action,
            waited: *waited,
        },
        AgentError::Call { status, .. } => status_error(sandbox, action, status),
        other => RuntimeError::Guest {
            sandbox,
            action,
            message: clean(&hypernetes_telemetry::chain(other).to_string()),
        },
    }
}

/// The same for a call that was made without the client's help.
pub(crate) fn status_error(
    sandbox: String,
    action: &'static str,
    status: &tonic::Status,
) -> RuntimeError {
    RuntimeError::Guest {
        sandbox,
        action,
        message: clean(status.message()),
    }
}

/// No answer within a deadline.
pub(crate) fn silent(sandbox: &SandboxId, action: &'static str, waited: Duration) -> RuntimeError {
    RuntimeError::GuestSilent {
        sandbox: sandbox.to_string(),
        action,
        waited,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_bounded_and_clean() {
        assert_eq!(clean("a\u{1b}[31mb\nc\0"), "a[31mbc");
        assert_eq!(clean(&"é".repeat(10_000)).len(), MAX_TEXT);
        assert_eq!(clean_console("old\nnew\r\n", 5), "new\n");
        assert_eq!(clean_console("ééé", 3), "é");
        assert_eq!(clean_console_head("panic: x\nrest", 8), "panic: x");
    }

    #[test]
    fn a_container_s_last_words_are_bounded_and_clean() {
        let exit = |message: &str, said: &[u8]| {
            exit_message(&v1::Exit {
                message: message.into(),
                termination_message: said.to_vec(),
                ..Default::default()
            })
        };
        assert_eq!(exit("", b""), "");
        assert_eq!(exit("", b"two\nlines\0\x1b[1m\n"), "two\nlines[1m\n");
        assert_eq!(exit("no such file", b"words"), "no such file: words");
        assert_eq!(exit("", b"\xff\xfe"), "\u{fffd}\u{fffd}");
        assert_eq!(exit("", &[b'x'; 10_000]).len(), MAX_TERMINATION);
        assert!(exit("", &[0xff; 10_000]).len() <= MAX_TERMINATION);
    }

    #[test]
    fn exits_are_clamped_and_named() {
        let exit = |code, message: &str| v1::Exit {
            code,
            message: message.into(),
            ..Default::default()
        };
        assert_eq!(exit_code(&exit(i32::MAX, "")), 255);
        assert_eq!(exit_code(&exit(-1, "")), 0);
        assert_eq!(exit_reason(&exit(0, "")), "Completed");
        assert_eq!(exit_reason(&exit(3, "")), "Error");
        assert_eq!(exit_reason(&exit(127, "")), "Error");
        assert_eq!(
            exit_reason(&exit(127, "no such file")),
            "ContainerCannotRun"
        );
        let killed = v1::Exit {
            code: 137,
            oom_killed: true,
            ..Default::default()
        };
        assert_eq!(exit_reason(&killed), "OOMKilled");
    }
}

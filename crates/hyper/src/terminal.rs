//! Standard output and error, and the terminal's modes.

use std::io::{IsTerminal as _, Write as _};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Text on standard output. A reader that has gone away (`| head`) is no error.
pub(crate) fn out(text: &str) {
    let mut stream = std::io::stdout().lock();
    drop(
        stream
            .write_all(text.as_bytes())
            .and_then(|()| stream.flush()),
    );
}

/// One line on standard output.
pub(crate) fn line(text: &str) {
    out(&format!("{text}\n"));
}

/// One line on standard error: progress, advice, the last word of a failure.
pub(crate) fn note(text: &str) {
    let mut stream = std::io::stderr().lock();
    drop(writeln!(stream, "{text}"));
}

/// Bytes as they are, on standard output or error.
pub(crate) fn bytes(error: bool, bytes: &[u8]) -> std::io::Result<()> {
    if error {
        let mut stream = std::io::stderr().lock();
        stream.write_all(bytes)?;
        stream.flush()
    } else {
        let mut stream = std::io::stdout().lock();
        stream.write_all(bytes)?;
        stream.flush()
    }
}

pub(crate) fn stdin_is_terminal() -> bool {
    std::io::stdin().is_terminal()
}

pub(crate) fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether output may have colours: a terminal, and nobody has said no.
pub(crate) fn colours() -> bool {
    stdout_is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Width and height of the terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdout())
        .or_else(|_| tcgetwinsize(std::io::stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// The terminal in raw mode, until this value is dropped.
#[derive(Debug)]
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Keys go to the container as they are. `None` if standard input is no terminal.
    pub(crate) fn enter() -> Option<Self> {
        if !stdin_is_terminal() {
            return None;
        }
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may have gone; there is nothing to put back then.
        let _restored = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// What is typed is not shown, until this value is dropped.
#[derive(Debug)]
pub(crate) struct Silent {
    before: Termios,
}

impl Silent {
    /// `None` if standard input is no terminal.
    pub(crate) fn enter() -> Option<Self> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut silent = before.clone();
        silent.local_modes.remove(rustix::termios::LocalModes::ECHO);
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &silent).ok()?;
        Some(Self { before })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _restored = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}

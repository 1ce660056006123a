//! The program of a rehearsal's container: this one again, from the rehearsal's image.
//!
//! It does what programs of containers do first, so that the kernel has done it once: it is executed,
//! executes another, writes a line and ends.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

/// By which names it is called, in turn: the first is its path in the image.
const NAMES: [&str; 2] = ["/rehearsal", "rehearsed"];

/// Runs it, if that is what this process is. What goes wrong is seen by the line that is missing.
pub(crate) fn main() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    if name == NAMES[0] {
        let error = Command::new(NAMES[0]).arg0(NAMES[1]).exec();
        crate::console::log!("cannot rehearse: {error}");
        return Some(ExitCode::FAILURE);
    }
    if name != NAMES[1] {
        return None;
    }
    match writeln!(std::io::stdout(), "{}", NAMES[1]) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(_) => Some(ExitCode::FAILURE),
    }
}

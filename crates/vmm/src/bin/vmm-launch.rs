//! The launcher as a program of its own, for tests and examples of this crate. The product's
//! binary has it as a hidden subcommand instead.

use std::{io::Write, process::ExitCode};

fn main() -> ExitCode {
    let Some(fd) = std::env::args().nth(1).and_then(|text| text.parse().ok()) else {
        drop(writeln!(std::io::stderr(), "usage: vmm-launch DESCRIPTOR"));
        return ExitCode::from(64);
    };
    let error = hypernetes_vmm::launcher::exec_from_fd(fd);
    drop(writeln!(std::io::stderr(), "vmm-launch: {error}"));
    ExitCode::FAILURE
}

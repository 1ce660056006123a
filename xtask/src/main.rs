//! Developer chores: `cargo xtask <chore>`.
#![forbid(unsafe_code)]

mod definitions;
mod protobuf;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo run -p xtask -- CHORE
  definitions FILE   trim Kubernetes' OpenAPI definitions (member v1.36.0-local/_definitions.json of
                     the PyPI package kubernetes-validate) into crates/apimachinery/data
  protobuf DIR       make the protobuf table from the sources of the crate k8s-pb";

#[allow(
    clippy::print_stderr,
    reason = "a command-line tool speaks on its terminal"
)]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["definitions", file] => definitions::run(file.as_ref()),
        ["protobuf", directory] => protobuf::run(directory.as_ref()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(64);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

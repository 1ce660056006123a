//! Harness of the end-to-end tests: the real daemon, a real registry, the real kubectl.
//!
//! Everything panics with a message that a developer can act on: this is test code.
#![forbid(unsafe_code)]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "test code: failures panic, and waiting for another process means looking again"
)]

mod archive;
mod daemon;
mod host;
mod node;
mod registry;
mod scenario;
pub mod seeded;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

pub use archive::busybox_archive;
pub use daemon::{Daemon, DaemonOptions};
pub use host::HostPicture;
pub use node::Node;
pub use registry::Registry;
pub use scenario::{Scenario, ScenarioReport, must_pass_as_tenant};
pub use seeded::Seeded;

/// The two kubectl releases that everything is driven with.
pub const KUBECTL_VERSIONS: [&str; 2] = ["1.36.4", "1.37.1"];

/// Top of the checkout.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the checkout exists")
}

/// Where `make build` left the binaries.
pub fn release_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("HYPERNETES_BIN") {
        return dir.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from);
    let dir = target.join("release");
    assert!(
        dir.join("hypernetes").exists() && dir.join("kernel-path").exists(),
        "{} has no binaries: run `make build` first",
        dir.display()
    );
    dir
}

/// The real kubectl of a release, installed on first use.
pub fn kubectl(version: &str) -> PathBuf {
    let output = run(Command::new(workspace_root().join("tests/tools/kubectl")).arg(version));
    PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim())
}

/// What a script in `tests/tools` prints, a line each: paths of what it has installed.
pub fn tool(name: &str) -> Vec<PathBuf> {
    let printed = stdout(&mut Command::new(
        workspace_root().join("tests/tools").join(name),
    ));
    printed.lines().map(PathBuf::from).collect()
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Standard output of a command that must succeed, without the final newline.
pub fn stdout(command: &mut Command) -> String {
    String::from_utf8_lossy(&run(command).stdout)
        .trim_end()
        .to_owned()
}

/// Looks again until `look` gives a value; panics after `limit` with the last reason.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match look() {
            Ok(value) => return value,
            Err(reason) if Instant::now() >= end => {
                panic!("{what}: not within {limit:?}: {reason}");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Prints why a test is not run. The test runner's summary counts these lines.
pub fn skip(reason: &str) {
    eprintln!("SKIP: {reason}");
}

/// True if this process may do what a node does; otherwise says why the test is skipped.
pub fn can_run_pods() -> bool {
    if !rustix::process::geteuid().is_root() {
        skip("pods need root");
        return false;
    }
    true
}

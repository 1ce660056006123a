//! Logs and traces set-up, error chains, build information.
#![forbid(unsafe_code)]

use std::{error::Error, fmt, io::IsTerminal};

use tracing_subscriber::EnvFilter;

pub mod traces;

/// `version (commit)` of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Form of the log lines on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `filter` is a tracing directive such as `info,hypernetes=debug`.
/// A second call in one process has no effect.
pub fn init(filter: &str, format: LogFormat) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(self::filter(filter))
        .with_ansi(colours())
        .with_writer(std::io::stderr);
    let installed = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    drop(installed);
}

fn filter(text: &str) -> EnvFilter {
    EnvFilter::try_new(text).unwrap_or_else(|_| EnvFilter::new("info"))
}

/// Colours for people only: a log file keeps lines that can be searched.
fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Formats an error with all its sources: `a: b: c`.
pub fn chain(error: &dyn Error) -> Chain<'_> {
    Chain(error)
}

/// Displays an error and its sources, outermost first.
#[derive(Debug)]
pub struct Chain<'a>(&'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

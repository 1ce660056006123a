//! What can go wrong in the agent, and what the node hears of it.

use std::io;

use hypernetes_agent_api::status::{Code, Status};

/// Failure of a step.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    #[error("cannot {step}")]
    Boot {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot {what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Precondition(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    Exhausted(String),
    #[error("{0}")]
    Internal(String),
    #[error("no disk in slot {slot} after {seconds} s")]
    NoDisk { slot: u32, seconds: u64 },
}

impl GuestError {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::Invalid(text.into())
    }
}

/// Adds what was attempted to an I/O error.
pub(crate) trait Attempt<T> {
    fn attempt(self, what: impl Into<String>) -> Result<T, GuestError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, what: impl Into<String>) -> Result<T, GuestError> {
        self.map_err(|source| GuestError::Io {
            what: what.into(),
            source: source.into(),
        })
    }
}

/// An error with its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl From<GuestError> for Status {
    fn from(error: GuestError) -> Self {
        let code = match &error {
            GuestError::Boot { .. } | GuestError::Io { .. } | GuestError::Internal(_) => {
                Code::Internal
            }
            GuestError::Invalid(_) => Code::InvalidArgument,
            GuestError::Precondition(_) => Code::FailedPrecondition,
            GuestError::NotFound(_) => Code::NotFound,
            GuestError::AlreadyExists(_) => Code::AlreadyExists,
            GuestError::Exhausted(_) => Code::ResourceExhausted,
            GuestError::NoDisk { .. } => Code::DeadlineExceeded,
        };
        Self::new(code, chain(&error))
    }
}

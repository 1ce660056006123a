//! How a command fails: what is said, and the exit code.

use std::fmt;

/// hyper's own error, of docker's `125`.
pub(crate) const OWN: u8 = 125;
/// The command in the container cannot be invoked.
pub(crate) const NOT_EXECUTABLE: u8 = 126;
/// The command in the container is not there.
pub(crate) const NOT_FOUND: u8 = 127;

/// A command's end that is not success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) code: u8,
    /// What goes to standard error; empty for a container's own exit code.
    pub(crate) message: String,
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// The request was understood and cannot be done: docker's "Error response from daemon".
    pub(crate) fn daemon(message: impl fmt::Display) -> Self {
        Self {
            code: 1,
            message: format!("Error response from daemon: {message}"),
        }
    }

    /// An error of the client itself.
    pub(crate) fn plain(message: impl fmt::Display) -> Self {
        Self {
            code: 1,
            message: message.to_string(),
        }
    }

    /// A verb or flag that has no meaning here, with what to use instead.
    pub(crate) fn refused(what: impl fmt::Display, instead: impl fmt::Display) -> Self {
        Self {
            code: OWN,
            message: format!("hyper: {what} is not supported: {instead}"),
        }
    }

    /// A bad value of a flag.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self {
            code: OWN,
            message: format!("hyper: {message}"),
        }
    }

    /// The exit code of a container.
    pub(crate) fn exit(code: u8) -> Self {
        Self {
            code,
            message: String::new(),
        }
    }

    /// The same with another exit code.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::daemon(&status.message),
            other => Self::plain(format_args!(
                "Cannot connect to the cluster: {}",
                hypernetes_telemetry::chain(&other)
            )),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::plain(error)
    }
}

/// An exit code of a process as the shell has it.
pub(crate) fn exit_code(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(u8::MAX)
}

//! Failure of a volume operation.

use crate::{VolumeId, VolumeMode};

/// Why a driver could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// No such volume.
    #[error("volume {id} does not exist")]
    NotFound {
        /// Which.
        id: VolumeId,
    },
    /// There is another volume of that name.
    #[error("volume {id} exists with {bytes} bytes and mode {mode:?}")]
    Conflict {
        /// Which.
        id: VolumeId,
        /// Its size.
        bytes: u64,
        /// Its mode.
        mode: VolumeMode,
    },
    /// Somebody else has the volume.
    #[error("volume {id} is in use by {}", by.join(", "))]
    InUse {
        /// Which.
        id: VolumeId,
        /// Who has it.
        by: Vec<String>,
    },
    /// More is asked for than may be promised.
    #[error("no room for {bytes} more bytes: {free} are free")]
    NoSpace {
        /// Bytes beyond what is promised.
        bytes: u64,
        /// Bytes that may be promised still.
        free: u64,
    },
    /// The request is wrong.
    #[error("invalid {field}: {rule}")]
    Invalid {
        /// Field.
        field: &'static str,
        /// What would be right.
        rule: String,
    },
    /// State cannot be kept.
    #[error("cannot {action}")]
    Storage {
        /// What was attempted.
        action: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// Adds what was attempted to an I/O error.
pub(crate) trait Attempt<T> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, VolumeError>;
}

impl<T, E: Into<std::io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, VolumeError> {
        self.map_err(|source| VolumeError::Storage {
            action: action(),
            source: source.into(),
        })
    }
}

//! What went wrong, and the gRPC status that says it.

use std::time::Duration;

use hypernetes_image::ImageError;
use hypernetes_runtime::RuntimeError;
use hypernetes_telemetry::chain;
use tonic::{Code, Status};

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    /// The request is wrong, or asks for what this node does not do.
    #[error("{field}: {rule}")]
    Invalid { field: String, rule: String },
    #[error("{kind} {id:?} does not exist")]
    NotFound { kind: &'static str, id: String },
    #[error("{kind} {id} exists already and was asked for otherwise")]
    Exists { kind: &'static str, id: String },
    #[error("{what} is {state}")]
    State { what: String, state: String },
    #[error("the command did not end within {0:?} and was killed")]
    Timeout(Duration),
    #[error("{0}")]
    Lost(&'static str),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Network(#[from] hypernetes_network::NetworkError),
}

impl CriError {
    /// A field whose value cannot be.
    pub(crate) fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            rule: rule.into(),
        }
    }

    /// The object is not there: what asks for its end has what it wants.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. } | Self::Runtime(RuntimeError::NotFound { .. })
        )
    }
}

impl From<CriError> for Status {
    fn from(error: CriError) -> Self {
        let code = match &error {
            CriError::Invalid { .. } => Code::InvalidArgument,
            CriError::NotFound { .. } => Code::NotFound,
            CriError::Exists { .. } => Code::AlreadyExists,
            CriError::State { .. } => Code::FailedPrecondition,
            CriError::Timeout(_) => Code::DeadlineExceeded,
            CriError::Lost(_) | CriError::Network(_) => Code::Internal,
            CriError::Runtime(error) => return of_runtime(error),
        };
        if code == Code::Internal {
            tracing::warn!(error = %chain(&error), "a call failed");
        }
        Self::new(code, error.to_string())
    }
}

fn of_runtime(error: &RuntimeError) -> Status {
    let code = match error {
        RuntimeError::NotFound { .. } => Code::NotFound,
        RuntimeError::State { .. } | RuntimeError::Paused(_) => Code::FailedPrecondition,
        RuntimeError::Invalid { .. } => Code::InvalidArgument,
        RuntimeError::Image(error) => return of_image(error),
        RuntimeError::ImageVolume(_) => {
            // The kubelet looks for this word and shows it as the pod's reason.
            let message = format!("ImageVolumeMountFailed: {error}");
            return Status::new(Code::FailedPrecondition, message);
        }
        // Not the deadline of a command: that has its own code, which probes understand.
        RuntimeError::GuestSilent { .. } => Code::Unavailable,
        _ => Code::Internal,
    };
    if code == Code::Internal {
        // The causes are the operator's; the message ends up in a tenant's event.
        tracing::warn!(error = %chain(error), "a call failed");
    }
    Status::new(code, error.to_string())
}

fn of_image(error: &ImageError) -> Status {
    let (code, prefix) = match error {
        ImageError::NotFound(_) | ImageError::NoSuchImage { .. } => (Code::NotFound, ""),
        ImageError::Unauthorized { .. } => (Code::PermissionDenied, ""),
        // The kubelet looks for this word and shows it as the pod's reason.
        ImageError::Unavailable { .. } => (Code::Unavailable, "RegistryUnavailable: "),
        ImageError::InUse(_) | ImageError::PlainHttp { .. } | ImageError::NoPlatform { .. } => {
            (Code::FailedPrecondition, "")
        }
        ImageError::DigestMismatch { .. } | ImageError::Invalid { .. } => (Code::DataLoss, ""),
        _ => (Code::Internal, ""),
    };
    if code == Code::Internal {
        tracing::warn!(error = %chain(error), "an image call failed");
    }
    Status::new(code, format!("{prefix}{error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_named() {
        let status = Status::from(CriError::invalid("linux.sysctls", "must be plain"));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "linux.sysctls: must be plain");
    }

    #[test]
    fn a_registry_that_is_away_has_the_word_that_the_kubelet_looks_for() {
        let error = ImageError::Unavailable {
            registry: "r".into(),
            message: "refused".into(),
        };
        let status = Status::from(CriError::from(RuntimeError::from(error)));
        assert!(status.message().starts_with("RegistryUnavailable"));
    }

    #[test]
    fn an_image_that_cannot_be_mounted_has_the_kubelet_s_word_too() {
        let error = RuntimeError::ImageVolume("no such file".into());
        let status = Status::from(CriError::from(error));
        assert!(status.message().starts_with("ImageVolumeMountFailed"));
    }

    #[test]
    fn causes_stay_inside() {
        let error = RuntimeError::Storage {
            action: "store a record".into(),
            source: "secret detail".into(),
        };
        let status = Status::from(CriError::from(error));
        assert_eq!(status.message(), "cannot store a record");
    }
}

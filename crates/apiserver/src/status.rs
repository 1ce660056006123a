//! Errors of the rooms below → Kubernetes' Status. Inner details stay here.

use hypernetes_apimachinery::{
    Details, ResourceKind, Status, managed::ApplyError, patch::PatchError, protobuf::ProtobufError,
    strict::DecodeError,
};
use hypernetes_identity::AuthenticationError;
use hypernetes_store::StoreError;
use hypernetes_streaming::StreamError;

/// Upstream's answer to a patch that does not fit the object.
const REJECTED: &str = "the server rejected our request due to an error in our request";

/// What this server answers instead of an object.
pub(crate) type Result<T> = std::result::Result<T, Status>;

/// A store failure that is not about one object's conflict.
pub(crate) fn of_store(error: &StoreError) -> Status {
    match error {
        StoreError::Conflict { .. } => Status::failure(
            409,
            "Conflict",
            "the object has been modified; please apply your changes to the latest version and \
             try again",
        ),
        StoreError::Compacted { asked, oldest } => {
            Status::expired(format!("too old resource version: {asked} ({oldest})"))
        }
        StoreError::Future { asked, current } => {
            Status::too_large_resource_version(*asked, *current, 1)
        }
        StoreError::Write { message, .. } => {
            tracing::error!(error = %message, "the state could not be written");
            Status::insufficient_storage(
                "the change could not be written to the API server's state and was not made: no \
                 space is left on its disk, or the disk is failing",
            )
        }
        StoreError::Lagged { .. } => Status::expired("the watch could not keep up"),
        _ => Status::unavailable("the API server is shutting down"),
    }
}

pub(crate) fn of_decode(error: &DecodeError, kind: &str, api_version: &str) -> Status {
    let (_, version) = hypernetes_apimachinery::kinds::split_api_version(api_version);
    let message = match error {
        DecodeError::Strict(_) => {
            format!("{kind} in version {version:?} cannot be handled as a {kind}: {error}")
        }
        DecodeError::Type(text) => {
            format!("{kind} in version {version:?} cannot be handled as a {kind}: {text}")
        }
        DecodeError::Syntax(text) => format!(
            "the object provided is unrecognized (must be of type {kind}): couldn't get \
             version/kind; json parse error: {text}"
        ),
        _ => error.to_string(),
    };
    Status::bad_request(message)
}

pub(crate) fn of_protobuf(error: &ProtobufError) -> Status {
    Status::bad_request(error.to_string())
}

pub(crate) fn of_patch(error: &PatchError, kind: &ResourceKind, name: &str) -> Status {
    match error {
        PatchError::Malformed(text) => Status::bad_request(text.clone()),
        PatchError::Inapplicable(text) => {
            // Upstream keeps the reason to itself; the audit of a client's mistake goes to the log.
            tracing::debug!(kind = kind.kind, name, error = %text, "a patch cannot be applied");
            let mut status = Status::failure(422, "Invalid", REJECTED);
            status.details = Some(Details::default());
            status
        }
        _ => Status::bad_request(error.to_string()),
    }
}

pub(crate) fn of_authentication(error: &AuthenticationError) -> Status {
    match error {
        AuthenticationError::Unavailable => {
            Status::unavailable("the credentials cannot be checked at present")
        }
        _ => Status::unauthorized(),
    }
}

pub(crate) fn of_stream(error: &StreamError, pod: &str) -> Status {
    match error {
        StreamError::NotFound(text) => {
            let mut status = Status::not_found("", "pods", pod);
            status.message.clone_from(text);
            status
        }
        StreamError::Invalid(text) => Status::bad_request(text.clone()),
        StreamError::Internal(text) => {
            tracing::warn!(error = %text, "a stream broke");
            Status::internal(text)
        }
        _ => Status::internal("the stream broke"),
    }
}

/// A configuration that cannot be applied to anything; upstream has no reason for it.
pub(crate) fn of_malformed(
    error: &ApplyError,
    kind: &ResourceKind,
    namespace: &str,
    name: &str,
) -> Status {
    let place = if namespace.is_empty() {
        format!("/{name}")
    } else {
        format!("{namespace}/{name}")
    };
    let message = format!(
        "failed to create typed patch object ({place}; {}, Kind={}): {error}",
        kind.api_version(),
        kind.kind
    );
    Status::failure(500, "", message)
}

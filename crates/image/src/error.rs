//! What can go wrong with an image.

use hypernetes_types::{Digest, ImageReference};

/// Failure of an image operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The store does not have it.
    #[error("image {0} is not in the store")]
    NotFound(String),
    /// The registry does not have it, or does not show it to this account.
    #[error("image {reference} not found: {message}")]
    NoSuchImage {
        /// Asked for.
        reference: Box<ImageReference>,
        /// The registry's words.
        message: String,
    },
    /// The registry refused the account.
    #[error("registry {registry} refused access to {reference}: {message}")]
    Unauthorized {
        /// Host.
        registry: String,
        /// Asked for.
        reference: Box<ImageReference>,
        /// The registry's words.
        message: String,
    },
    /// The registry cannot be reached.
    #[error("registry {registry} is unavailable: {message}")]
    Unavailable {
        /// Host.
        registry: String,
        /// Why.
        message: String,
    },
    /// Content is not what its digest says.
    #[error("content of {expected} has digest {actual}")]
    DigestMismatch {
        /// Promised.
        expected: Digest,
        /// Found.
        actual: Digest,
    },
    /// No manifest for this machine.
    #[error("image {reference} has no manifest for linux/amd64; it has {available}")]
    NoPlatform {
        /// Asked for.
        reference: Box<ImageReference>,
        /// Platforms in the index.
        available: String,
    },
    /// The image breaks the specification or a limit.
    #[error("invalid image {what}: {rule}")]
    Invalid {
        /// Which part.
        what: String,
        /// What is wrong, what would be right.
        rule: String,
    },
    /// Plain http to a registry that is not on loopback.
    #[error("registry {registry} is not on loopback: plain http needs it to be listed as insecure")]
    PlainHttp {
        /// Host.
        registry: String,
    },
    /// More than may be taken in.
    #[error("the image takes more than the {limit} bytes that are left for images")]
    TooLarge {
        /// Bytes that were left.
        limit: u64,
    },
    /// The image is used by pods.
    #[error("image {0} is in use")]
    InUse(String),
    /// The store's disk.
    #[error("cannot {action}")]
    Io {
        /// What was attempted, on what.
        action: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

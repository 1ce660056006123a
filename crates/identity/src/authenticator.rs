//! Ways to find out who sent a request.

use std::sync::Arc;

use async_trait::async_trait;
use http::request::Parts;

use crate::{User, user_of_certificate};

/// The certificate that a client has shown, verified against the cluster's authority by the TLS
/// layer. Put into a request's extensions by the listener.
#[derive(Debug, Clone)]
pub struct PeerCertificate(pub Arc<[u8]>);

/// Credentials that were shown and are not good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthenticationError {
    /// They are wrong, ended or unreadable.
    #[error("the credentials are not valid")]
    Invalid,
    /// Their source cannot be asked.
    #[error("the credentials cannot be checked at present")]
    Unavailable,
}

/// Finds out who sent a request.
#[async_trait]
pub trait Authenticator: Send + Sync {
    /// The user; `None` if the request has no credentials of the kind that this one knows.
    ///
    /// # Errors
    /// [`AuthenticationError`] if it has, and they are not good: the request is refused then.
    async fn authenticate(
        &self,
        parts: &Parts,
        peer: Option<&PeerCertificate>,
    ) -> Result<Option<User>, AuthenticationError>;
}

/// Users by their client certificates.
#[derive(Debug, Clone, Copy, Default)]
pub struct CertificateAuthenticator;

#[async_trait]
impl Authenticator for CertificateAuthenticator {
    async fn authenticate(
        &self,
        _parts: &Parts,
        peer: Option<&PeerCertificate>,
    ) -> Result<Option<User>, AuthenticationError> {
        peer.map(|certificate| {
            user_of_certificate(&certificate.0).map_err(|_error| AuthenticationError::Invalid)
        })
        .transpose()
    }
}

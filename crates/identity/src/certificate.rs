//! The user that a client certificate names.

use x509_parser::prelude::{FromDer, X509Certificate};

use crate::User;

/// A certificate that names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// It cannot be parsed.
    #[error("the client certificate is not valid DER")]
    Malformed,
    /// It has no common name, or an empty one.
    #[error("the client certificate has no common name")]
    NoName,
}

/// Reads CN as the name and each O as a group. The certificate's chain and dates must have been
/// verified before: this looks at its content only.
///
/// # Errors
/// [`CertificateError`].
pub fn user_of_certificate(der: &[u8]) -> Result<User, CertificateError> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|_error| CertificateError::Malformed)?;
    let subject = certificate.subject();
    let name = subject
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok())
        .filter(|name| !name.is_empty())
        .ok_or(CertificateError::NoName)?;
    let mut groups = Vec::new();
    for group in subject.iter_organization() {
        let group = group
            .as_str()
            .map_err(|_error| CertificateError::Malformed)?;
        groups.push(group.to_owned());
    }
    Ok(User::authenticated(name, groups))
}

//! The cluster's certificate authority and what it issues.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::files::{FileError, ensure_private_dir, read_optional, write_private};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
const SERVING_LIFE: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// A serving certificate that ends sooner is replaced at start.
const SERVING_MARGIN: Duration = Duration::from_secs(60 * 24 * 60 * 60);
/// Clients' clocks may be behind.
const BACKDATE: Duration = Duration::from_secs(60 * 60);

/// Failure of the certificate authority.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file's content.
    #[error("{path} is not a PEM {what}")]
    Damaged {
        /// File.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// Making a certificate.
    #[error("cannot make a certificate for {subject}")]
    Issue {
        /// For whom.
        subject: String,
        /// Cause.
        #[source]
        source: rcgen::Error,
    },
    /// More groups than a certificate can carry.
    #[error("the certificate of {user} can carry at most {max} groups")]
    TooManyGroups {
        /// User.
        user: String,
        /// How many it can.
        max: usize,
    },
    /// A name that cannot stand in a certificate.
    #[error("{0:?} cannot be a name in a certificate")]
    BadName(String),
}

/// A certificate with its private key, as PEM.
#[derive(Clone)]
pub struct Credentials {
    /// Certificate.
    pub certificate_pem: String,
    /// Private key, PKCS#8.
    pub key_pem: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// The certificate, as rustls takes it.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`].
    pub fn certificate(&self) -> Result<CertificateDer<'static>, AuthorityError> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map_err(|_error| damaged(Path::new("certificate"), "certificate"))
    }

    /// The private key, as rustls takes it.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`].
    pub fn key(&self) -> Result<PrivateKeyDer<'static>, AuthorityError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|_error| damaged(Path::new("key"), "private key"))
    }
}

/// The key with which service account tokens are signed: ECDSA P-256, PKCS#8.
#[derive(Clone)]
pub struct SigningKey {
    /// Private key in DER.
    pub pkcs8: Vec<u8>,
    /// Public key: an uncompressed point.
    pub public: Vec<u8>,
}

impl SigningKey {
    /// A new key that is kept nowhere: what it has signed is worth nothing after a restart.
    ///
    /// # Errors
    /// If there is no randomness.
    pub fn ephemeral() -> Result<Self, AuthorityError> {
        let pair = KeyPair::generate().map_err(|e| issue("the token key", e))?;
        Ok(Self {
            pkcs8: pair.serialize_der(),
            public: pair.public_key_raw().to_vec(),
        })
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").finish_non_exhaustive()
    }
}

/// The cluster's certificate authority.
pub struct Authority {
    directory: PathBuf,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads the authority in the directory, or makes one there. Blocks.
    ///
    /// # Errors
    /// If files cannot be read or written, or are damaged: a damaged authority is never replaced,
    /// since all certificates that it issued would end with it.
    pub fn load_or_create(directory: &Path) -> Result<Self, AuthorityError> {
        ensure_private_dir(directory)?;
        let certificate_path = directory.join("ca.crt");
        let key_path = directory.join("ca.key");
        // The key is written first: a certificate therefore has its key.
        let key = match read_optional(&key_path)? {
            Some(pem) => {
                KeyPair::from_pem(&pem).map_err(|_error| damaged(&key_path, "private key"))?
            }
            None => {
                let key = KeyPair::generate().map_err(|e| issue("the key", e))?;
                write_private(&key_path, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let certificate_pem = match read_optional(&certificate_path)? {
            Some(pem) => pem,
            None => {
                let pem = authority_params()
                    .self_signed(&key)
                    .map_err(|e| issue("the certificate authority", e))?
                    .pem();
                write_private(&certificate_path, pem.as_bytes())?;
                pem
            }
        };
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(|_error| damaged(&certificate_path, "certificate"))?;
        Ok(Self {
            directory: directory.to_owned(),
            certificate_pem,
            issuer,
        })
    }

    /// The authority's certificate, as PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The authority's certificate, as rustls takes it.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`].
    pub fn certificate(&self) -> Result<CertificateDer<'static>, AuthorityError> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map_err(|_error| damaged(&self.directory.join("ca.crt"), "certificate"))
    }

    /// The API server's certificate for `localhost`, `127.0.0.1`, `::1`, the names by which pods
    /// know the API, and `names`. Kept in the directory; replaced when it ends soon or lacks a name.
    /// Blocks.
    ///
    /// # Errors
    /// If files cannot be read or written, or a name is no name.
    pub fn serving(&self, names: &[String]) -> Result<Credentials, AuthorityError> {
        let mut all: Vec<String> = [
            "localhost",
            "127.0.0.1",
            "::1",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ]
        .map(str::to_owned)
        .into();
        for name in names {
            if !all.contains(name) {
                all.push(name.clone());
            }
        }
        let certificate_path = self.directory.join("apiserver.crt");
        let key_path = self.directory.join("apiserver.key");
        if let (Some(certificate_pem), Some(key_pem)) =
            (read_optional(&certificate_path)?, read_optional(&key_path)?)
        {
            let kept = Credentials {
                certificate_pem,
                key_pem,
            };
            if self.is_still_good(&kept, &all) {
                return Ok(kept);
            }
        }
        let mut params = CertificateParams::default();
        params.subject_alt_names = all.iter().map(|n| san(n)).collect::<Result<_, _>>()?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "hypernetes-apiserver");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let made = self.sign(params, SERVING_LIFE, "the API server")?;
        write_private(&key_path, made.key_pem.as_bytes())?;
        write_private(&certificate_path, made.certificate_pem.as_bytes())?;
        Ok(made)
    }

    /// A client certificate for a user in at most two groups, from now for `life`.
    ///
    /// # Errors
    /// [`AuthorityError::BadName`] for an empty name or one with control characters,
    /// [`AuthorityError::TooManyGroups`].
    pub fn client(
        &self,
        user: &str,
        groups: &[String],
        life: Duration,
    ) -> Result<Credentials, AuthorityError> {
        for name in groups.iter().map(String::as_str).chain([user]) {
            if name.is_empty() || name.len() > 256 || name.chars().any(char::is_control) {
                return Err(AuthorityError::BadName(name.to_owned()));
            }
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        // rcgen's names hold one value of each attribute type, and know O under two spellings of
        // its type: that makes room for two groups.
        let types = [
            DnType::OrganizationName,
            DnType::CustomDnType(vec![2, 5, 4, 10]),
        ];
        if groups.len() > types.len() {
            return Err(AuthorityError::TooManyGroups {
                user: user.to_owned(),
                max: types.len(),
            });
        }
        for (kind, group) in types.into_iter().zip(groups) {
            params.distinguished_name.push(kind, group.as_str());
        }
        self.sign(params, life, user)
    }

    /// The key that signs service account tokens, made on first use. Blocks.
    ///
    /// # Errors
    /// If the file cannot be read or written, or is damaged.
    pub fn service_account_key(&self) -> Result<SigningKey, AuthorityError> {
        let path = self.directory.join("sa.key");
        let pair = match read_optional(&path)? {
            Some(pem) => KeyPair::from_pem(&pem).map_err(|_error| damaged(&path, "private key"))?,
            None => {
                let pair = KeyPair::generate().map_err(|e| issue("the token key", e))?;
                write_private(&path, pair.serialize_pem().as_bytes())?;
                pair
            }
        };
        Ok(SigningKey {
            pkcs8: pair.serialize_der(),
            public: pair.public_key_raw().to_vec(),
        })
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        life: Duration,
        subject: &str,
    ) -> Result<Credentials, AuthorityError> {
        set_validity(&mut params, life);
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(|e| issue(subject, e))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(|e| issue(subject, e))?;
        Ok(Credentials {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    fn is_still_good(&self, kept: &Credentials, names: &[String]) -> bool {
        let (Ok(der), Ok(authority)) = (kept.certificate(), self.certificate()) else {
            return false;
        };
        let Ok(key) = KeyPair::from_pem(&kept.key_pem) else {
            return false;
        };
        let (Ok((_, parsed)), Ok((_, authority))) = (
            X509Certificate::from_der(&der),
            X509Certificate::from_der(&authority),
        ) else {
            return false;
        };
        let margin = SystemTime::now() + SERVING_MARGIN;
        let end = parsed.validity().not_after.timestamp();
        let late_enough = margin
            .duration_since(SystemTime::UNIX_EPOCH)
            .is_ok_and(|at| i64::try_from(at.as_secs()).is_ok_and(|at| at < end));
        let ours = parsed
            .verify_signature(Some(authority.public_key()))
            .is_ok()
            && parsed.public_key().subject_public_key.data == key.public_key_raw();
        late_enough && ours && has_names(&parsed, names)
    }
}

fn has_names(certificate: &X509Certificate<'_>, names: &[String]) -> bool {
    let Ok(Some(present)) = certificate.subject_alternative_name() else {
        return false;
    };
    names.iter().all(|name| {
        present
            .value
            .general_names
            .iter()
            .any(|present| match present {
                GeneralName::DNSName(dns) => dns == name,
                GeneralName::IPAddress(octets) => name.parse::<IpAddr>().is_ok_and(|ip| match ip {
                    IpAddr::V4(v4) => v4.octets() == *octets,
                    IpAddr::V6(v6) => v6.octets() == *octets,
                }),
                _ => false,
            })
    })
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "hypernetes-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, AUTHORITY_LIFE);
    params
}

fn set_validity(params: &mut CertificateParams, life: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + life.min(AUTHORITY_LIFE + DAY)).into();
}

fn san(name: &str) -> Result<SanType, AuthorityError> {
    if let Ok(ip) = name.parse() {
        return Ok(SanType::IpAddress(ip));
    }
    let text = name
        .try_into()
        .map_err(|_error| AuthorityError::BadName(name.to_owned()))?;
    Ok(SanType::DnsName(text))
}

fn damaged(path: &Path, what: &'static str) -> AuthorityError {
    AuthorityError::Damaged {
        path: path.to_owned(),
        what,
    }
}

fn issue(subject: &str, source: rcgen::Error) -> AuthorityError {
    AuthorityError::Issue {
        subject: subject.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::user_of_certificate;

    #[test]
    fn the_authority_and_the_serving_certificate_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let first = Authority::load_or_create(&path).unwrap();
        let serving = first.serving(&["10.0.0.1".into()]).unwrap();
        let second = Authority::load_or_create(&path).unwrap();
        assert_eq!(first.certificate_pem(), second.certificate_pem());
        // A subset of the names is served by the certificate that is there.
        assert_eq!(
            second.serving(&[]).unwrap().certificate_pem,
            serving.certificate_pem
        );
        let more = second.serving(&["api.example".into()]).unwrap();
        assert_ne!(more.certificate_pem, serving.certificate_pem);
        let key = first.service_account_key().unwrap();
        assert_eq!(key.public, second.service_account_key().unwrap().public);
        for entry in std::fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{:?}", entry.file_name());
        }
    }

    #[test]
    fn a_foreign_serving_certificate_is_replaced() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let foreign = Authority::load_or_create(one.path())
            .unwrap()
            .serving(&[])
            .unwrap();
        let ours = Authority::load_or_create(two.path()).unwrap();
        for (file, text) in [
            ("apiserver.crt", &foreign.certificate_pem),
            ("apiserver.key", &foreign.key_pem),
        ] {
            std::fs::write(two.path().join(file), text).unwrap();
        }
        assert_ne!(
            ours.serving(&[]).unwrap().certificate_pem,
            foreign.certificate_pem
        );
    }

    #[test]
    fn a_client_certificate_carries_name_and_groups() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(dir.path()).unwrap();
        let groups = ["hypernetes:tenant:acme:admin".to_owned(), "dev".to_owned()];
        let issued = authority.client("alice", &groups, DAY).unwrap();
        let user = user_of_certificate(&issued.certificate().unwrap()).unwrap();
        assert_eq!(user.name, "alice");
        assert_eq!(
            user.groups,
            [groups[0].as_str(), "dev", "system:authenticated"]
        );
        let many = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        assert!(matches!(
            authority.client("alice", &many, DAY),
            Err(AuthorityError::TooManyGroups { max: 2, .. })
        ));
        for bad in ["", "a\nb"] {
            assert!(matches!(
                authority.client(bad, &[], DAY),
                Err(AuthorityError::BadName(_))
            ));
        }
    }

    #[test]
    fn a_damaged_authority_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        Authority::load_or_create(dir.path()).unwrap();
        std::fs::write(dir.path().join("ca.crt"), "nothing").unwrap();
        assert!(matches!(
            Authority::load_or_create(dir.path()),
            Err(AuthorityError::Damaged {
                what: "certificate",
                ..
            })
        ));
    }
}

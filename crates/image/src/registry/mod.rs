//! The registry's side of a pull: where it is, who we are there, and what it answers.
//!
//! A registry is not trusted: answers are bounded in size and time, credentials go to the host they
//! are for and to no other (redirects and mirrors get none), and plain http is spoken only on
//! loopback or with hosts that the operator has listed.

mod auth;
mod transport;
mod upload;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use hypernetes_types::{Digest, ImageReference};
use reqwest::{Response, StatusCode, Url, header};
use tokio::sync::Mutex;

use crate::{
    Credentials, ImageError, Limits,
    manifest::{ACCEPT, Descriptor, Document},
    tarball::shown,
};
pub(crate) use transport::Transport;
pub(crate) use upload::Access;

/// Where registries are and how far they are trusted.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Registry hosts (with port, if not the default) that may be spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// Per registry host: places that are asked first, in this order, `https://host[:port]`,
    /// `http://…` or a bare host, which means https. They are asked without credentials; what they
    /// answer is checked as the registry's answers are. A place without TLS must be on loopback or
    /// be listed in `insecure_registries`.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Certificate authorities besides the system's, PEM.
    pub extra_ca: Vec<Vec<u8>>,
}

/// A manifest as it came.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) digest: Digest,
    pub(crate) bytes: Vec<u8>,
    pub(crate) document: Document,
}

/// One repository at one place, for the length of a pull.
#[derive(Debug)]
pub(crate) struct Repository {
    transport: Arc<Transport>,
    reference: ImageReference,
    base: Url,
    credentials: Credentials,
    authorization: Mutex<Option<header::HeaderValue>>,
    role: Role,
    access: Access,
}

/// Why a place is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Before the registry itself; its failures do not count.
    Mirror,
    /// The registry, over TLS although plain http would be allowed: a first, quick try.
    Probe,
    /// The registry.
    Registry,
}

impl Repository {
    /// The places to ask for `reference`, in order.
    pub(crate) fn candidates(
        transport: &Arc<Transport>,
        reference: &ImageReference,
        credentials: &Credentials,
    ) -> Result<Vec<Self>, ImageError> {
        let mut found = Vec::new();
        let mut push = |base: &str, credentials: &Credentials, role: Role| {
            let url = format!("{base}/v2/{}/", reference.repository());
            let base = Url::parse(&url).map_err(|e| ImageError::Unavailable {
                registry: shown(base.as_bytes()),
                message: format!("its address is not valid: {e}"),
            })?;
            let authorization = match credentials {
                Credentials::Bearer(token) => auth::bearer(token),
                _ => None,
            };
            found.push(Self {
                transport: transport.clone(),
                reference: reference.clone(),
                base,
                credentials: credentials.clone(),
                authorization: Mutex::new(authorization),
                role,
                access: Access::Pull,
            });
            Ok::<_, ImageError>(())
        };
        let registry = reference.registry();
        for mirror in transport
            .config()
            .mirrors
            .get(registry)
            .into_iter()
            .flatten()
        {
            let mirror = mirror.trim_end_matches('/');
            if mirror.contains("://") {
                push(mirror, &Credentials::Anonymous, Role::Mirror)?;
            } else {
                push(
                    &format!("https://{mirror}"),
                    &Credentials::Anonymous,
                    Role::Mirror,
                )?;
            }
        }
        let host = if registry == "docker.io" {
            "registry-1.docker.io"
        } else {
            registry
        };
        if transport.allows_plain(registry) {
            push(&format!("https://{host}"), credentials, Role::Probe)?;
            push(&format!("http://{host}"), credentials, Role::Registry)?;
        } else {
            push(&format!("https://{host}"), credentials, Role::Registry)?;
        }
        Ok(found)
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// Scheme, host and repository: what is served there is served by one owner.
    pub(crate) fn source(&self) -> String {
        self.base.as_str().to_owned()
    }

    /// Host and port, for messages.
    pub(crate) fn place(&self) -> String {
        transport::authority(&self.base)
    }

    /// Fetches a manifest by tag or digest. A digest that was asked for is checked.
    pub(crate) async fn manifest(
        &self,
        reference: &str,
        expected: Option<&Digest>,
        limits: &Limits,
    ) -> Result<Fetched, ImageError> {
        let response = self
            .get(&format!("manifests/{reference}"), Some(ACCEPT), 0)
            .await?;
        let kind = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .map(|v| v.split(';').next().unwrap_or(v).trim().to_owned());
        let bytes = self
            .body(response, limits.max_manifest_size, "manifest")
            .await?;
        let digest = crate::layer::digest_of(&bytes);
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            return Err(ImageError::DigestMismatch {
                expected: expected.clone(),
                actual: digest,
            });
        }
        let document = Document::parse(&bytes, kind.as_deref(), limits)?;
        Ok(Fetched {
            digest,
            bytes,
            document,
        })
    }

    /// Fetches a small blob whole and checks it.
    pub(crate) async fn small_blob(
        &self,
        blob: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let response = self.blob(blob, 0).await?;
        let bytes = self.body(response, limit.min(blob.size), "blob").await?;
        let actual = crate::layer::digest_of(&bytes);
        if actual == blob.digest {
            Ok(bytes)
        } else {
            Err(ImageError::DigestMismatch {
                expected: blob.digest.clone(),
                actual,
            })
        }
    }

    /// Starts fetching a blob at an offset. The answer may begin at 0 all the same: see its status.
    pub(crate) async fn blob(
        &self,
        blob: &Descriptor,
        offset: u64,
    ) -> Result<Response, ImageError> {
        self.get(&format!("blobs/{}", blob.digest), None, offset)
            .await
    }

    pub(crate) fn unavailable(&self, message: impl Into<String>) -> ImageError {
        ImageError::Unavailable {
            registry: self.place(),
            message: message.into(),
        }
    }

    async fn get(
        &self,
        path: &str,
        accept: Option<&str>,
        offset: u64,
    ) -> Result<Response, ImageError> {
        let url = self
            .base
            .join(path)
            .map_err(|e| self.unavailable(e.to_string()))?;
        let mut asked = false;
        let mut failures = 0;
        loop {
            let authorization = self.authorization.lock().await.clone();
            let sent = self
                .transport
                .get(&url, accept, offset, authorization.as_ref())
                .await;
            let failure = match sent {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && !asked => {
                    asked = true;
                    let fresh = self.authorize(&response).await?;
                    if fresh.is_none() {
                        return Err(self.refusal(response).await);
                    }
                    *self.authorization.lock().await = fresh;
                    continue;
                }
                Ok(response) if !transport::is_transient(response.status()) => {
                    return Err(self.refusal(response).await);
                }
                Ok(response) => self.refusal(response).await,
                Err(error) if !error.transient || self.role == Role::Probe => {
                    return Err(error.error);
                }
                Err(error) => error.error,
            };
            failures += 1;
            if failures == 4 {
                return Err(failure);
            }
            tokio::time::sleep(Duration::from_millis(200 << failures)).await;
        }
    }

    async fn authorize(
        &self,
        refused: &Response,
    ) -> Result<Option<header::HeaderValue>, ImageError> {
        let challenges = auth::challenges(refused.headers());
        auth::answer(
            &self.transport,
            &self.reference,
            &self.credentials,
            &challenges,
            self.access.actions(),
        )
        .await
    }

    /// Reads a body that may have at most `limit` bytes.
    async fn body(
        &self,
        response: Response,
        limit: u64,
        what: &str,
    ) -> Result<Vec<u8>, ImageError> {
        let read = transport::read_bounded(response, limit);
        match tokio::time::timeout(Duration::from_secs(60), read).await {
            Err(_elapsed) => {
                Err(self.unavailable(format!("the {what} did not arrive within 60 s")))
            }
            Ok(Err(error)) => Err(self.unavailable(transport::chain(&error))),
            Ok(Ok(None)) => Err(ImageError::Invalid {
                what: what.to_owned(),
                rule: format!("is larger than {limit} bytes"),
            }),
            Ok(Ok(Some(bytes))) => Ok(bytes),
        }
    }

    /// The error for an answer that is not a success.
    async fn refusal(&self, response: Response) -> ImageError {
        let status = response.status();
        let message = transport::error_message(response).await;
        let reference = Box::new(self.reference.clone());
        match status {
            StatusCode::NOT_FOUND => ImageError::NoSuchImage { reference, message },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ImageError::Unauthorized {
                registry: self.place(),
                reference,
                message,
            },
            _ => self.unavailable(message),
        }
    }
}

//! HTTP as registries are spoken to: bounded, with redirects that carry no credentials away.

use std::{net::IpAddr, time::Duration};

use reqwest::{Client, Response, StatusCode, Url, header};
use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer};
use serde::Deserialize;

use super::RegistryConfig;
use crate::{ImageError, tarball::shown};

const REDIRECTS: usize = 5;

/// A request that brought no answer.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) error: ImageError,
    pub(crate) transient: bool,
}

/// The HTTP client with the rules for registries.
#[derive(Debug)]
pub(crate) struct Transport {
    http: Client,
    /// For loopback: never through a proxy that the environment names.
    direct: Client,
    config: RegistryConfig,
}

impl Transport {
    pub(crate) fn new(config: RegistryConfig) -> Result<Self, ImageError> {
        let bad = |message: String| ImageError::Invalid {
            what: "registry configuration".to_owned(),
            rule: message,
        };
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(system.certs);
        for pem in &config.extra_ca {
            use rustls::pki_types::pem::PemObject as _;
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|e| bad(format!("extra CA: {e}")))?;
                roots
                    .add(certificate)
                    .map_err(|e| bad(format!("extra CA: {e}")))?;
            }
        }
        // The provider is named here, so that nothing depends on a process-wide default.
        let tls = ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|e| bad(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let builder = || {
            Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(Duration::from_secs(10))
                .read_timeout(Duration::from_secs(30))
                .user_agent(concat!("hypernetes/", env!("CARGO_PKG_VERSION")))
        };
        let http = builder().build().map_err(|e| bad(chain(&e)))?;
        let direct = builder().no_proxy().build().map_err(|e| bad(chain(&e)))?;
        let transport = Self {
            http,
            direct,
            config,
        };
        transport.check_mirrors().map_err(bad)?;
        Ok(transport)
    }

    /// A mirror that can never be asked is told at start, not passed over at each pull.
    fn check_mirrors(&self) -> Result<(), String> {
        for (registry, mirrors) in &self.config.mirrors {
            for mirror in mirrors {
                let wrong = |rule: &str| {
                    let (registry, mirror) = (shown(registry.as_bytes()), shown(mirror.as_bytes()));
                    format!("the mirror {mirror} of {registry} {rule}")
                };
                let url = match mirror.contains("://") {
                    true => Url::parse(mirror),
                    false => Url::parse(&format!("https://{mirror}")),
                };
                let url = url.map_err(|_wrong| wrong("is no address"))?;
                if url.query().is_some() || url.fragment().is_some() {
                    return Err(wrong("must end with its host or a path"));
                }
                // It would end up in logs, and no mirror gets an account.
                if !url.username().is_empty() || url.password().is_some() {
                    return Err(format!(
                        "a mirror of {} names a user: mirrors are asked without credentials",
                        shown(registry.as_bytes())
                    ));
                }
                match url.scheme() {
                    "https" => {}
                    "http" if self.allows_plain(&authority(&url)) => {}
                    "http" => {
                        return Err(wrong(
                            "is not on loopback: plain http needs it to be listed as insecure",
                        ));
                    }
                    _ => return Err(wrong("must be https or http")),
                }
            }
        }
        Ok(())
    }

    pub(crate) fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// Whether this registry may be spoken to without TLS.
    pub(crate) fn allows_plain(&self, authority: &str) -> bool {
        let host = host_of(authority);
        is_loopback(host)
            || self
                .config
                .insecure_registries
                .iter()
                .any(|listed| listed == authority || listed == host)
    }

    /// Whether a URL that came from a registry may be followed.
    pub(crate) fn may_visit(&self, url: &Url, from: &Url) -> bool {
        match url.scheme() {
            "https" => true,
            "http" => {
                let target = authority(url);
                // A registry elsewhere has no business on this host's loopback.
                if is_loopback(host_of(&target)) {
                    return is_loopback(host_of(&authority(from)));
                }
                self.allows_plain(&target)
            }
            _ => false,
        }
    }

    /// Sends one request; a redirect is an answer.
    pub(crate) async fn send(
        &self,
        method: reqwest::Method,
        url: &Url,
        headers: &[(header::HeaderName, String)],
        body: Option<reqwest::Body>,
        authorization: Option<&header::HeaderValue>,
    ) -> Result<Response, SendError> {
        let loopback = is_loopback(host_of(&authority(url)));
        let client = if loopback { &self.direct } else { &self.http };
        let mut request = client.request(method, url.clone());
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let Some(value) = authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        if let Some(body) = body {
            request = request.body(body);
        }
        request.send().await.map_err(|e| send_error(url, &e))
    }

    /// Sends a GET, following redirects. `authorization` goes to the first host only.
    pub(crate) async fn get(
        &self,
        url: &Url,
        accept: Option<&str>,
        offset: u64,
        authorization: Option<&header::HeaderValue>,
    ) -> Result<Response, SendError> {
        let mut at = url.clone();
        for _ in 0..=REDIRECTS {
            let loopback = is_loopback(host_of(&authority(&at)));
            let client = if loopback { &self.direct } else { &self.http };
            let mut request = client.get(at.clone());
            if let Some(accept) = accept {
                request = request.header(header::ACCEPT, accept);
            }
            if offset > 0 {
                request = request.header(header::RANGE, format!("bytes={offset}-"));
            }
            if let Some(value) = authorization.filter(|_| at.origin() == url.origin()) {
                request = request.header(header::AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(|e| send_error(&at, &e))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let target = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|text| at.join(text).ok());
            let refused = |message: String| SendError {
                error: ImageError::Unavailable {
                    registry: authority(url),
                    message,
                },
                transient: false,
            };
            let Some(target) = target else {
                return Err(refused(format!(
                    "a redirect without a target ({})",
                    response.status()
                )));
            };
            if !self.may_visit(&target, url) {
                let place = shown(authority(&target).as_bytes());
                return Err(refused(format!(
                    "a redirect to {}://{place} is not followed",
                    target.scheme()
                )));
            }
            at = target;
        }
        Err(SendError {
            error: ImageError::Unavailable {
                registry: authority(url),
                message: format!("more than {REDIRECTS} redirects"),
            },
            transient: false,
        })
    }
}

fn send_error(url: &Url, error: &reqwest::Error) -> SendError {
    let registry = authority(url);
    let tls = tls_error(error);
    match tls {
        // The other side does not speak TLS at all.
        Some(rustls::Error::InvalidMessage(_)) => SendError {
            error: ImageError::PlainHttp { registry },
            transient: false,
        },
        Some(tls) => SendError {
            error: ImageError::Unavailable {
                registry,
                message: tls.to_string(),
            },
            transient: false,
        },
        None => SendError {
            error: ImageError::Unavailable {
                registry,
                message: chain(error),
            },
            transient: !error.is_builder(),
        },
    }
}

/// The TLS error under an error. An I/O error hides what it wraps from `source`.
fn tls_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = match error.downcast_ref::<std::io::Error>() {
            Some(io) => io
                .get_ref()
                .map(|inner| inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    None
}

/// Worth another try.
pub(crate) fn is_transient(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
        )
}

/// Host and, if there is one, port.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn host_of(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    authority.split(':').next().unwrap_or(authority)
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Reads a body; nothing if it is longer than `limit`.
pub(crate) async fn read_bounded(
    mut response: Response,
    limit: u64,
) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() as u64 + chunk.len() as u64 > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    code: Option<String>,
    message: Option<String>,
}

/// The registry's words for a refusal, or the bare status.
pub(crate) async fn error_message(response: Response) -> String {
    let status = response.status();
    let read = read_bounded(response, 64 << 10);
    let body = match tokio::time::timeout(Duration::from_secs(10), read).await {
        Ok(Ok(Some(body))) => body,
        _ => Vec::new(),
    };
    let entry = serde_json::from_slice::<ErrorBody>(&body)
        .ok()
        .and_then(|b| b.errors.into_iter().next());
    match entry {
        Some(ErrorEntry { code, message }) => {
            let words: Vec<String> = [code, message]
                .into_iter()
                .flatten()
                .map(|t| shown(t.as_bytes()))
                .collect();
            format!("{} ({status})", words.join(": "))
        }
        None => status.to_string(),
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transport() -> Transport {
        Transport::new(RegistryConfig {
            insecure_registries: vec!["lab.example:5000".to_owned(), "old.example".to_owned()],
            ..RegistryConfig::default()
        })
        .unwrap()
    }

    #[test]
    fn plain_http_is_for_loopback_and_listed_hosts() {
        let transport = transport();
        for yes in [
            "127.0.0.1:5000",
            "localhost",
            "[::1]:5000",
            "127.8.0.1",
            "lab.example:5000",
            "old.example:80",
        ] {
            assert!(transport.allows_plain(yes), "{yes}");
        }
        for no in [
            "lab.example",
            "lab.example:5001",
            "10.0.0.1:5000",
            "127.0.0.1.example",
            "localhost.example",
        ] {
            assert!(!transport.allows_plain(no), "{no}");
        }
    }

    #[test]
    fn mirrors_are_checked_at_start() {
        let with = |mirror: &str| {
            Transport::new(RegistryConfig {
                insecure_registries: vec!["lab.example:5000".to_owned()],
                mirrors: [("registry.example".to_owned(), vec![mirror.to_owned()])].into(),
                ..RegistryConfig::default()
            })
        };
        for good in [
            "https://mirror.example",
            "https://mirror.example:8443/prefix/",
            "mirror.example",
            "http://127.0.0.1:5000",
            "http://lab.example:5000",
        ] {
            with(good).unwrap();
        }
        for bad in [
            "http://mirror.example",
            "http://lab.example",
            "ftp://mirror.example",
            "https://",
            "https://mirror.example/?a=b",
            "",
        ] {
            with(bad).unwrap_err();
        }
        let error = with("https://user:hunter2@mirror.example").unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }

    #[test]
    fn redirects_go_to_no_hidden_place() {
        let transport = transport();
        let may = |to: &str, from: &str| {
            transport.may_visit(&Url::parse(to).unwrap(), &Url::parse(from).unwrap())
        };
        assert!(may("https://cdn.example/x", "https://registry.example/"));
        assert!(may("http://127.0.0.1:9/x", "http://127.0.0.1:8/"));
        assert!(!may("http://127.0.0.1:9/x", "https://registry.example/"));
        assert!(!may(
            "http://169.254.169.254/x",
            "https://registry.example/"
        ));
        assert!(!may("file:///etc/passwd", "https://registry.example/"));
    }
}

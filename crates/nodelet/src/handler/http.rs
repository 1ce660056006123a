//! HTTP requests to a pod.

use std::{sync::Arc, time::Duration};

use ::http::{HeaderName, HeaderValue, Request, Response, Uri, header};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::{Subject, USER_AGENT, Verdict};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 10;

/// Asks for the path and judges the answer's status.
pub(super) async fn get(
    subject: &Subject<'_>,
    get: &HTTPGetAction,
    port: u16,
    limit: Duration,
) -> Verdict {
    let tls = get.scheme.as_deref() == Some("HTTPS");
    let scheme = if tls { "https" } else { "http" };
    let path = match get.path.as_deref().unwrap_or("/") {
        path if path.starts_with('/') => path.to_owned(),
        path => format!("/{path}"),
    };
    let authority = subject.shown(port);
    let url = format!("{scheme}://{authority}{path}");
    let asked = tokio::time::timeout(limit, ask(subject, get, tls, &authority, port, &path));
    match asked.await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(message)) => Verdict::Failure(format!("Get \"{url}\": {message}")),
        Err(_late) => Verdict::Failure(format!(
            "Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        )),
    }
}

async fn ask(
    subject: &Subject<'_>,
    get: &HTTPGetAction,
    tls: bool,
    authority: &str,
    port: u16,
    path: &str,
) -> Result<Verdict, String> {
    let mut target = path.to_owned();
    for _redirect in 0..=MAX_REDIRECTS {
        let stream = subject.dial(port).await?;
        let request = request(get, authority, &target)?;
        let response = if tls {
            let address = subject.place.as_ref().map(|(_, address)| *address);
            let name = address.ok_or("the pod has no address")?;
            let connector = TlsConnector::from(client_config()?);
            let stream = connector
                .connect(ServerName::IpAddress(name.into()), stream)
                .await
                .map_err(|error| format!("tls: {error}"))?;
            send(stream, request).await?
        } else {
            send(stream, request).await?
        };
        let status = response.status();
        if status.is_redirection()
            && let Some(location) = response.headers().get(header::LOCATION)
        {
            match same_host(location, authority) {
                Some(next) => {
                    target = next;
                    continue;
                }
                // Elsewhere is not the pod; upstream takes this as well.
                None => {
                    return Ok(Verdict::Warning(
                        "Probe terminated redirects, Response body: ".to_owned(),
                    ));
                }
            }
        }
        return Ok(if status.is_success() || status.is_redirection() {
            Verdict::Success
        } else {
            Verdict::Failure(format!(
                "HTTP probe failed with statuscode: {}",
                status.as_u16()
            ))
        });
    }
    Err("stopped after 10 redirects".to_owned())
}

/// Path and query of a redirect that stays at the pod.
fn same_host(location: &HeaderValue, authority: &str) -> Option<String> {
    let uri: Uri = location.to_str().ok()?.parse().ok()?;
    if uri.authority().is_some_and(|other| other != authority) {
        return None;
    }
    let next = uri.path_and_query()?.as_str();
    next.starts_with('/').then(|| next.to_owned())
}

fn request(
    get: &HTTPGetAction,
    authority: &str,
    target: &str,
) -> Result<Request<Empty<Bytes>>, String> {
    let mut request = Request::get(target)
        .body(Empty::new())
        .map_err(|error| format!("invalid path {target:?}: {error}"))?;
    let headers = request.headers_mut();
    let value = |text: &str| {
        HeaderValue::from_str(text).map_err(|_invalid| "invalid header value".to_owned())
    };
    headers.insert(header::HOST, value(authority)?);
    headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
    headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    // The first of a name replaces ours, further ones are added.
    let mut seen = Vec::new();
    for given in get.http_headers.iter().flatten() {
        let name = HeaderName::from_bytes(given.name.as_bytes())
            .map_err(|_invalid| format!("invalid header name {:?}", given.name))?;
        if seen.contains(&name) {
            headers.append(name, value(&given.value)?);
        } else {
            seen.push(name.clone());
            headers.insert(name, value(&given.value)?);
        }
    }
    Ok(request)
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<Response<Incoming>, String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // The connection lives as long as the answer is wanted, and no longer.
    tokio::pin!(connection);
    let answer = sender.send_request(request);
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer.map_err(|error| error.to_string()),
        ended = &mut connection => match ended {
            Ok(()) => answer.await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        },
    }
}

fn client_config() -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// A probe asks whether the pod answers, not who it is.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_at_the_pod_only() {
        for (location, next) in [
            ("/x?y=1", Some("/x?y=1")),
            ("http://10.0.0.2:80/x", Some("/x")),
            ("http://10.0.0.2:81/x", None),
            ("http://169.254.169.254/latest", None),
            ("x", None),
        ] {
            let location = HeaderValue::from_str(location).unwrap();
            assert_eq!(
                same_host(&location, "10.0.0.2:80").as_deref(),
                next,
                "{location:?}"
            );
        }
    }

    #[test]
    fn headers_of_the_probe_replace_ours() {
        let get: HTTPGetAction = serde_json::from_value(serde_json::json!({
            "port": 80, "httpHeaders": [
                {"name": "Host", "value": "web.test"}, {"name": "X-A", "value": "1"},
                {"name": "x-a", "value": "2"}]}))
        .unwrap();
        let request = request(&get, "10.0.0.2:80", "/a?b").unwrap();
        assert_eq!(request.headers()[header::HOST], "web.test");
        assert_eq!(request.headers()[header::USER_AGENT], USER_AGENT);
        let all: Vec<_> = request.headers().get_all("x-a").iter().collect();
        assert_eq!(all, ["1", "2"]);
    }
}

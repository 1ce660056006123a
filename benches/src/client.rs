//! A thin HTTP/1.1 client with a client certificate, so that the client costs little.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request,
    body::Incoming,
    client::conn::{http1::SendRequest, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A server and who we are to it.
pub(crate) struct Endpoint {
    address: String,
    tls: Arc<ClientConfig>,
}

/// One connection.
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Endpoint {
    pub(crate) fn from_kubeconfig(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)?;
        // Written by our own daemon: one cluster, one user, data inline.
        let field = |name: &str| -> Result<String> {
            let value = text
                .lines()
                .find_map(|line| line.trim().trim_start_matches("- ").strip_prefix(name))
                .with_context(|| format!("the kubeconfig has no {name}"))?;
            Ok(value.trim().trim_matches('"').to_owned())
        };
        let decode = |name: &str| -> Result<Vec<u8>> {
            Ok(base64::engine::general_purpose::STANDARD.decode(field(name)?)?)
        };
        let ca = decode("certificate-authority-data:")?;
        let certificate = decode("client-certificate-data:")?;
        let key = decode("client-key-data:")?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&ca) {
            roots.add(certificate?)?;
        }
        let chain: Vec<_> =
            CertificateDer::pem_slice_iter(&certificate).collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(&key)?;
        let tls = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        let server = field("server:")?;
        let address = server
            .trim_start_matches("https://")
            .trim_end_matches('/')
            .to_owned();
        Ok(Self {
            address,
            tls: Arc::new(tls),
        })
    }

    pub(crate) async fn connect(&self) -> Result<Connection> {
        let stream = self.stream(b"http/1.1").await?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(Connection { sender })
    }

    /// A connection of HTTP/2.
    pub(crate) async fn connect_multiplexed(&self) -> Result<Multiplexed> {
        let stream = self.stream(b"h2").await?;
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(Multiplexed {
            sender,
            authority: self.address.clone(),
        })
    }

    async fn stream(&self, protocol: &[u8]) -> Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let (tls, name) = self.tls(protocol)?;
        Ok(TlsConnector::from(tls).connect(name, tcp).await?)
    }

    /// `host:port`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Who we are, and who the server must be.
    pub(crate) fn tls(&self, protocol: &[u8]) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
        let host = self
            .address
            .rsplit_once(':')
            .map_or(self.address.as_str(), |(host, _)| host);
        let name = ServerName::try_from(host.to_owned())?;
        let mut tls = ClientConfig::clone(&self.tls);
        tls.alpn_protocols = vec![protocol.to_vec()];
        Ok((Arc::new(tls), name))
    }
}

/// A connection that carries many requests at once.
pub(crate) struct Multiplexed {
    sender: http2::SendRequest<Full<Bytes>>,
    authority: String,
}

impl Multiplexed {
    /// Opens a watch; it lasts as long as what is returned.
    pub(crate) async fn watch(&self, path: &str) -> Result<Incoming> {
        let mut sender = self.sender.clone();
        sender.ready().await?;
        let request = Request::get(format!("https://{}{path}", self.authority))
            .header("accept", "application/json")
            .body(Full::default())?;
        let response = sender.send_request(request).await?;
        ensure!(
            response.status().is_success(),
            "watch: {}",
            response.status()
        );
        Ok(response.into_body())
    }
}

impl Connection {
    /// Whether the server has ended it, as it does with one that is idle.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a request that must succeed; returns the body.
    pub(crate) async fn request(
        &mut self,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> Result<Bytes> {
        let body = self.send(method, path, body).await?;
        Ok(body.collect().await?.to_bytes())
    }

    async fn send(&mut self, method: &str, path: &str, body: Option<String>) -> Result<Incoming> {
        self.sender.ready().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "hypernetes")
            .header("accept", "application/json")
            .header("content-type", media_type(method))
            .body(Full::from(body.unwrap_or_default()))?;
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body();
        if !status.is_success() {
            let body = body.collect().await?.to_bytes();
            bail!(
                "{method} {path}: {status}: {}",
                String::from_utf8_lossy(&body)
            );
        }
        Ok(body)
    }
}

/// How a body of this method is written.
fn media_type(method: &str) -> &'static str {
    match method {
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    }
}

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
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
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
        let host = self
            .address
            .rsplit_once(':')
            .map_or(self.address.as_str(), |(host, _)| host);
        let name = ServerName::try_from(host.to_owned())?;
        let mut tls = ClientConfig::clone(&self.tls);
        tls.alpn_protocols = vec![protocol.to_vec()];
        Ok(TlsConnector::from(Arc::new(tls)).connect(name, tcp).await?)
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

/// A watch on a connection of its own. It is read without any HTTP library and nothing of it is decoded but where
/// events end: a thousand of them shall cost the machine little beside the server that is measured.
pub(crate) struct Watch {
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
    /// Events that came with the head of the answer.
    early: usize,
    last: u8,
}

/// Lines and what surrounds them are read in parts of at most this many bytes.
const PART: usize = 16 * 1024;

impl Watch {
    pub(crate) async fn open(endpoint: &Endpoint, path: &str) -> Result<Self> {
        let mut stream = endpoint.stream(b"http/1.1").await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: hypernetes\r\naccept: application/json\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        let end = loop {
            if let Some(at) = head.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            ensure!(head.len() < PART, "a head without an end");
            ensure!(stream.read_buf(&mut head).await? > 0, "no answer");
        };
        let (head, rest) = head.split_at(end);
        ensure!(
            head.starts_with(b"HTTP/1.1 200 "),
            "watch: {}",
            String::from_utf8_lossy(head)
        );
        let mut last = b'\n';
        let early = count_events(rest, &mut last);
        Ok(Self {
            stream,
            buffer: vec![0; PART],
            early,
            last,
        })
    }

    /// Waits for events and returns how many have come; 0 is the end.
    pub(crate) async fn next(&mut self) -> Result<usize> {
        let mut events = std::mem::take(&mut self.early);
        while events == 0 {
            let length = self.stream.read(&mut self.buffer).await?;
            if length == 0 {
                return Ok(0);
            }
            events = count_events(&self.buffer[..length], &mut self.last);
        }
        Ok(events)
    }
}

/// Events end with a line feed of their own; those of HTTP's chunks follow a carriage return.
fn count_events(bytes: &[u8], last: &mut u8) -> usize {
    let mut count = 0;
    for byte in bytes {
        count += usize::from(*byte == b'\n' && *last != b'\r');
        *last = *byte;
    }
    count
}

impl Connection {
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
            .header("content-type", "application/json")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_and_chunks_are_not() {
        let wire = b"5\r\n{\"a\"}\n\r\n1f\r\n{\"b\"}\n{\"c\"}\n\r\n";
        for cut in 0..wire.len() {
            let (first, second) = wire.split_at(cut);
            let mut last = b'\n';
            let count = count_events(first, &mut last) + count_events(second, &mut last);
            assert_eq!(count, 3, "cut at {cut}");
        }
    }
}

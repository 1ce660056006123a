//! The TLS listener: HTTP/1.1 and HTTP/2, client certificates optional but verified.

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use hypernetes_identity::{Authority, AuthorityError, Credentials, PeerCertificate};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    server::{VerifierBuilderError, WebPkiClientVerifier},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::{server::ApiServer, service::ApiService};

/// Headers of one request, in bytes and in number.
const HEADER_BYTES: usize = 64 * 1024;
const HEADERS: usize = 100;
/// Requests that one HTTP/2 connection may have under way.
const STREAMS: u32 = 250;

/// Failure to set up TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The authority or the certificate.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The certificate and key do not fit.
    #[error("cannot use the serving certificate")]
    Certificate(#[source] rustls::Error),
    /// The authority cannot verify clients.
    #[error("cannot verify client certificates by the authority")]
    Verifier(#[source] VerifierBuilderError),
}

/// TLS for the listener: `credentials` for the server, clients' certificates by `authority`.
///
/// # Errors
/// [`TlsError`].
pub fn tls_config(
    authority: &Authority,
    credentials: &Credentials,
) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots
        .add(authority.certificate()?)
        .map_err(TlsError::Certificate)?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(TlsError::Verifier)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Certificate)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![credentials.certificate()?], credentials.key()?)
        .map_err(TlsError::Certificate)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

impl ApiServer {
    /// Serves connections until `shutdown`; then ends watches and streams, and gives the rest a
    /// moment to end.
    ///
    /// # Errors
    /// If the listener fails for good.
    pub async fn serve_tls(
        &self,
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let limits = &self.inner.engine.limits;
        let acceptor = TlsAcceptor::from(tls);
        let places = Arc::new(Semaphore::new(limits.connections));
        let connections = TaskTracker::new();
        let mut failures = 0_u32;
        loop {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place.map_err(io::Error::other)?,
                () = shutdown.cancelled() => break,
            };
            let stream = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _peer)) => stream,
                    Err(error) => {
                        // Out of descriptors, or a client that is gone already.
                        failures += 1;
                        tracing::warn!(%error, "cannot accept a connection");
                        if failures > 100 {
                            return Err(error);
                        }
                        sleep(Duration::from_millis(u64::from(failures.min(10)) * 20)).await;
                        continue;
                    }
                },
                () = shutdown.cancelled() => break,
            };
            failures = 0;
            let connection = Connection {
                service: self.service(),
                handshake: limits.handshake_timeout,
                drain: limits.drain,
                shutdown: shutdown.clone(),
            };
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let _place = place;
                connection.run(stream, acceptor).await;
            });
        }
        drop(listener);
        connections.close();
        self.shut_down().await;
        if timeout(limits.drain + Duration::from_secs(1), connections.wait())
            .await
            .is_err()
        {
            tracing::warn!("connections were still open at shutdown");
        }
        Ok(())
    }
}

/// Where a request's connection comes from, put into the request's extensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerAddress(pub(crate) SocketAddr);

impl ApiServer {
    /// Serves connections that somebody else has accepted, until `shutdown` or their end. What
    /// comes with a connection is dropped when it ends.
    pub async fn serve_streams<G: Send + 'static>(
        &self,
        streams: impl Stream<Item = (TcpStream, G)>,
        tls: Arc<ServerConfig>,
        shutdown: CancellationToken,
    ) {
        let limits = &self.inner.engine.limits;
        let acceptor = TlsAcceptor::from(tls);
        let connections = TaskTracker::new();
        let mut streams = pin!(streams);
        loop {
            let (stream, guard) = tokio::select! {
                next = streams.next() => match next {
                    Some(next) => next,
                    None => break,
                },
                () = shutdown.cancelled() => break,
            };
            let connection = Connection {
                service: self.service(),
                handshake: limits.handshake_timeout,
                drain: limits.drain,
                shutdown: shutdown.clone(),
            };
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let _guard = guard;
                connection.run(stream, acceptor).await;
            });
        }
        connections.close();
        if timeout(limits.drain + Duration::from_secs(1), connections.wait())
            .await
            .is_err()
        {
            tracing::warn!("pods' connections were still open at shutdown");
        }
    }
}

struct Connection {
    service: ApiService,
    handshake: Duration,
    drain: Duration,
    shutdown: CancellationToken,
}

impl Connection {
    async fn run(self, stream: TcpStream, acceptor: TlsAcceptor) {
        let address = stream.peer_addr().ok();
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let tls = match timeout(self.handshake, acceptor.accept(stream)).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => {
                tracing::debug!(%error, "TLS handshake failed");
                return;
            }
            Err(_elapsed) => return,
        };
        let peer = tls
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map(|certificate| PeerCertificate(Arc::from(certificate.as_ref())));
        let service = self
            .service
            .map_request(move |mut request: http::Request<_>| {
                if let Some(address) = address {
                    request.extensions_mut().insert(PeerAddress(address));
                }
                if let Some(peer) = &peer {
                    request.extensions_mut().insert(peer.clone());
                }
                request
            });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.handshake)
            .max_buf_size(HEADER_BYTES)
            .max_headers(HEADERS);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(u32::try_from(HEADER_BYTES).unwrap_or(u32::MAX))
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20));
        let connection = builder
            .serve_connection_with_upgrades(TokioIo::new(tls), TowerToHyperService::new(service));
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                match timeout(self.drain, connection).await {
                    Ok(result) => result,
                    Err(_elapsed) => return,
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(error = %error, "a connection ended early");
        }
    }
}

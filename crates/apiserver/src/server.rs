//! The server: made from a configuration, handed out as a service.

use std::sync::Arc;

use hypernetes_identity::{Authenticator, TokenKey, User};
use hypernetes_streaming::{NodeImages, PodStreams};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    audit::AuditLog,
    authorizer::Authorizer,
    bootstrap,
    config::{ApiServerConfig, VersionInfo},
    customs::Customs,
    definitions,
    engine::Engine,
    flow::Flow,
    images::Turns,
    metrics::Metrics,
    reaper,
    service::ApiService,
    service_accounts::ServiceAccounts,
};

/// Failure to start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The audit log could not be opened.
    #[error("cannot open the audit log")]
    Audit(#[source] std::io::Error),
    /// The objects that every cluster has could not be made.
    #[error("cannot make {object}: {message}")]
    Bootstrap {
        /// Which one.
        object: String,
        /// Why.
        message: String,
    },
}

/// The embedded Kubernetes-compatible API server. Clones share it.
#[derive(Debug, Clone)]
pub struct ApiServer {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) engine: Engine,
    pub(crate) authenticators: Vec<Arc<dyn Authenticator>>,
    pub(crate) service_accounts: Option<ServiceAccounts>,
    pub(crate) streams: Option<Arc<dyn PodStreams>>,
    pub(crate) images: Option<Arc<dyn NodeImages>>,
    pub(crate) turns: Turns,
    pub(crate) flow: Flow,
    pub(crate) metrics: Metrics,
    pub(crate) audit: Option<AuditLog>,
    pub(crate) version: VersionInfo,
    pub(crate) server_address: String,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Ends the background task.
        self.engine.shutdown.cancel();
    }
}

impl ApiServer {
    /// Makes a server, and in its store the objects that every cluster has.
    ///
    /// # Errors
    /// [`StartError::Bootstrap`] if these cannot be made.
    pub async fn new(config: ApiServerConfig) -> Result<Self, StartError> {
        let shutdown = CancellationToken::new();
        let audit = config
            .audit
            .map(|options| AuditLog::open(options, config.clock.clone()))
            .transpose()
            .map_err(StartError::Audit)?;
        let engine = Engine {
            authorizer: Authorizer::new(config.store.clone()),
            customs: Customs::new(config.store.clone()),
            naming: tokio::sync::Mutex::new(()),
            store: config.store,
            clock: config.clock,
            node_name: config.node_name,
            usage: config.usage,
            mount_tokens: config.mount_tokens,
            limits: config.limits,
            service_range: config.service_cidr,
            node_ports: config.node_ports,
            shutdown: shutdown.clone(),
            tasks: TaskTracker::new(),
        };
        bootstrap::ensure(&engine).await?;
        engine.tasks.spawn(reaper::run(
            engine.store.clone(),
            engine.clock.clone(),
            engine.limits.event_life,
            shutdown.clone(),
        ));
        let service_accounts = config.service_account_key.as_ref().map(|key| {
            ServiceAccounts::new(
                TokenKey::new(key),
                engine.store.clone(),
                engine.clock.clone(),
            )
        });
        let mut authenticators = config.authenticators;
        if let Some(accounts) = &service_accounts {
            authenticators.push(Arc::new(accounts.clone()));
        }
        let inner = Inner {
            engine,
            authenticators,
            service_accounts,
            streams: config.streams,
            images: config.images,
            turns: Turns::default(),
            flow: Flow::default(),
            metrics: Metrics::new(config.node_metrics),
            audit,
            version: config.version,
            server_address: config.server_address,
        };
        let inner = Arc::new(inner);
        inner.engine.tasks.spawn(definitions::run(
            Arc::downgrade(&inner),
            inner.engine.store.clone(),
            shutdown,
        ));
        Ok(Self { inner })
    }

    /// The server as a service. The caller of a request is told by the extensions
    /// [`InProcessUser`](crate::InProcessUser) and
    /// [`PeerCertificate`](hypernetes_identity::PeerCertificate), or by its headers.
    pub fn service(&self) -> ApiService {
        ApiService {
            inner: Arc::clone(&self.inner),
            user: None,
        }
    }

    /// The server as a service for one caller inside this process, for instance under a
    /// `kube::Client`.
    pub fn service_as(&self, user: User) -> ApiService {
        ApiService {
            inner: Arc::clone(&self.inner),
            user: Some(user),
        }
    }

    /// Ends watches and streams, and waits until the streams have ended. Requests are still
    /// answered; `/readyz` says no.
    pub async fn shut_down(&self) {
        self.inner.engine.shutdown.cancel();
        self.inner.engine.tasks.close();
        self.inner.engine.tasks.wait().await;
    }
}

//! What a server is made from.

use std::{fmt, net::Ipv4Addr, ops::RangeInclusive, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use hypernetes_apimachinery::usage::UsageBoard;
use hypernetes_identity::{Authenticator, CertificateAuthenticator, SigningKey};
use hypernetes_store::Store;
use hypernetes_streaming::{NodeImages, PodStreams};
use ipnet::Ipv4Net;
use jiff::Timestamp;

use crate::audit::AuditOptions;

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Reads the metrics of a node that this server stands for, in the text format of OpenMetrics.
#[derive(Clone)]
pub struct NodeMetrics {
    /// Name of the node.
    pub node: String,
    /// Reads what there is at the moment, to the closing `# EOF`.
    pub read: Arc<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>,
}

impl fmt::Debug for NodeMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeMetrics")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// What a server is made from.
#[derive(Clone)]
pub struct ApiServerConfig {
    /// Where objects are kept.
    pub store: Store,
    /// Ways to find out who calls, asked in order.
    pub authenticators: Vec<Arc<dyn Authenticator>>,
    /// Signs service account tokens; without it none are issued or accepted.
    pub service_account_key: Option<SigningKey>,
    /// Where logs, exec, attach and port-forward come from; without it they are refused.
    pub streams: Option<Arc<dyn PodStreams>>,
    /// Where contents of images are kept; without it images are not served.
    pub images: Option<Arc<dyn NodeImages>>,
    /// The node that new pods are bound to; without it they wait for a binding.
    pub node_name: Option<String>,
    /// What nodes and pods use, for `metrics.k8s.io`.
    pub usage: UsageBoard,
    /// Metrics of the node, for `/metrics` and for the node's proxy; without it there are the server's own alone.
    pub node_metrics: Option<NodeMetrics>,
    /// Give new pods the token of their service account, which must exist. Has no effect where
    /// tokens are not served.
    pub mount_tokens: bool,
    /// Address of the server as discovery shows it, `host:port`.
    pub server_address: String,
    /// What `/version` says.
    pub version: VersionInfo,
    /// Where requests are logged; without it they are not.
    pub audit: Option<AuditOptions>,
    /// Bounds.
    pub limits: Limits,
    /// Addresses of services, the same in every network.
    pub service_cidr: Ipv4Net,
    /// Ports of the node that services can have.
    pub node_ports: RangeInclusive<u16>,
    /// Tells the time.
    pub clock: Clock,
}

impl ApiServerConfig {
    /// Client certificates, a token key for the life of the process, no node, the system's clock,
    /// default bounds.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            authenticators: vec![Arc::new(CertificateAuthenticator)],
            service_account_key: SigningKey::ephemeral().ok(),
            streams: None,
            images: None,
            node_name: None,
            usage: UsageBoard::default(),
            node_metrics: None,
            mount_tokens: false,
            server_address: "127.0.0.1:6443".into(),
            version: VersionInfo::default(),
            audit: None,
            limits: Limits::default(),
            service_cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16),
            node_ports: 30_000..=32_767,
            clock: Arc::new(Timestamp::now),
        }
    }
}

impl fmt::Debug for ApiServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServerConfig")
            .field("node_name", &self.node_name)
            .field("server_address", &self.server_address)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Bounds of what clients may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Requests that one user may have under way; system components are exempt.
    pub in_flight_per_user: usize,
    /// Watches, logs, execs and the like that one user may have open.
    pub long_running_per_user: usize,
    /// How long a request may take that is none of these.
    pub request_timeout: Duration,
    /// How long a client may take for its TLS handshake, and for the headers of a request.
    pub handshake_timeout: Duration,
    /// Connections that may be open.
    pub connections: usize,
    /// How often an idle watch gets a bookmark.
    pub bookmark_interval: Duration,
    /// Bytes that the images of one namespace may take, blobs and disks together.
    pub image_bytes: u64,
    /// How long events are kept.
    pub event_life: Duration,
    /// How long connections may take to end at shutdown.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            in_flight_per_user: 200,
            long_running_per_user: 1000,
            request_timeout: Duration::from_secs(60),
            handshake_timeout: Duration::from_secs(10),
            connections: 8192,
            bookmark_interval: Duration::from_secs(60),
            image_bytes: 32 << 30,
            event_life: Duration::from_secs(60 * 60),
            drain: Duration::from_secs(5),
        }
    }
}

/// What `/version` says.
#[derive(Debug, Clone)]
pub struct VersionInfo {
    /// Kubernetes' API level and this project's version.
    pub git_version: String,
    /// Commit of this build, if known.
    pub git_commit: String,
}

impl Default for VersionInfo {
    fn default() -> Self {
        Self {
            git_version: format!("v1.36.2+hypernetes.{}", hypernetes_telemetry::VERSION),
            git_commit: String::new(),
        }
    }
}

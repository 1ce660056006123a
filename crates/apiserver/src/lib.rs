//! The embedded Kubernetes-compatible API server.
//!
//! One generic engine over JSON, driven by Kubernetes' own OpenAPI definitions and a table of
//! kinds (`hypernetes_apimachinery`): no handler per kind. Objects are kept in
//! `hypernetes_store` as canonical JSON that lists and watches send as it is.
//!
//! ```text
//! TLS listener ─┐                                        ┌▶ engine: get list watch create update
//!               ├▶ ApiService: authentication → impersonation → RBAC → flow │   patch delete deletecollection
//! kube::Client ─┘   (a tower::Service)                   ├▶ subresources of pods, reviews
//!                                                        └▶ discovery, OpenAPI, version, health, metrics
//! ```
//!
//! [`ApiServer::service_as`] is a transport for `kube::Client` without a socket; what goes over it
//! is the same HTTP. [`ApiServer::serve_tls`] serves the network.
#![forbid(unsafe_code)]
#![allow(
    clippy::result_large_err,
    reason = "a Status is made once, on the way out of a request that fails"
)]

mod api_services;
mod audit;
mod authentication;
mod authorizer;
mod autoscaling;
mod body;
mod bootstrap;
mod certificates;
mod codec;
mod config;
mod customs;
mod definitions;
mod endpoints;
mod engine;
mod events;
mod flow;
mod images;
mod keys;
mod listener;
mod metrics;
mod negotiate;
mod node_ports;
mod pods;
mod query;
mod rbac;
mod reaper;
mod request_info;
mod reviews;
mod scale;
mod server;
mod service;
mod service_accounts;
mod services;
mod status;
mod usage;
mod views;

pub use audit::AuditOptions;
pub use authentication::InProcessUser;
pub use body::{ApiBody, BoxError};
pub use config::{ApiServerConfig, Clock, Limits, NodeMetrics, VersionInfo};
pub use listener::{TlsError, tls_config};
pub use server::{ApiServer, StartError};
pub use service::ApiService;

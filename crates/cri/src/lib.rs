//! The node runtime behind the Container Runtime Interface, for a kubelet that nobody has changed.
//!
//! ```text
//! kubelet ── gRPC, unix socket ──▶ calls   ─┬─▶ sandbox, container, security, …   what is asked, as
//!    │                             images   │                                     the runtime takes it
//!    │                                      └─▶ PodRuntime
//!    └────── HTTP, one-time URL ──▶ streams ──▶ PodRuntime                        exec, attach, ports
//! ```
//!
//! What a request asks for is done, or the request is refused with the name of the field. A sandbox
//! and a container carry the request that made them as their memo: what the runtime has no use for
//! comes back to the kubelet unchanged, also after a restart of the node.
//!
//! Files that the kubelet hands over as host paths are read here and travel to the guest, again when
//! the kubelet updates them; no guest sees the host's file system.
#![forbid(unsafe_code)]

mod calls;
mod carried;
mod config;
mod container;
mod deadline;
mod devices;
mod events;
mod exec_sync;
mod exporter;
mod files;
mod filter;
mod follow;
mod host;
mod hostpath;
mod images;
mod lookup;
mod memo;
mod metrics;
mod mounts;
mod network;
mod pages;
mod resize;
mod resources;
mod sandbox;
mod seccomp;
mod security;
mod server;
mod service;
mod session;
mod signal;
mod stats;
mod status;
mod streams;
mod subpath;
mod termination;
mod traced;
mod users;
mod watch;

pub use config::{CriConfig, SharedPath, VmSizes};
pub use host::HostHandler;
pub use network::{NodeNetwork, PodNetwork, TenantNetwork};
pub use server::{CriServer, ServeError};

/// Generated from `proto/api.proto`, which is Kubernetes' own.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    deprecated,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code; the .proto file holds the documentation"
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// Name of the runtime: the prefix of container ids in pod statuses.
pub const RUNTIME_NAME: &str = "hypernetes";
/// The handler of microVMs, which is also the default.
pub const HANDLER: &str = "hyper";
/// The handler of pods on the node's own kernel.
pub const HOST_HANDLER: &str = "host";
/// Largest message in either direction, as clients take it.
pub const MAX_MESSAGE_SIZE: usize = 16 << 20;

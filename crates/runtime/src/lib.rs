//! Pods on this node: sandbox and container state machines, logs, exec, recovery after a restart.
//!
//! Joins the mechanisms (image, network, vmm, kernel, agent) and knows nothing of Kubernetes or CRI.
//! Intent is stored before every effect; at start what runs is adopted and what is half done is
//! undone.
//!
//! ```text
//! callers ──▶ NodeRuntime ──▶ one task per sandbox (actor) ──▶ records, image, network, vmm
//!                 │                │         ▲
//!                 │                │         └── link: session with the agent, events, list
//!                 │                └── one pump per container: guest ──▶ log file
//!                 └── sessions: exec, attach, port-forward
//! ```
#![forbid(unsafe_code)]

mod actor;
mod api;
mod backoff;
mod beat;
mod config;
mod container;
mod cpus;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod figures;
mod guest;
mod host;
mod identity;
mod link;
mod logs;
mod metrics;
mod node;
mod pool;
mod ports;
mod process;
mod records;
mod recovery;
mod rehearsal;
mod room;
mod sandbox;
mod scratch;
mod seccomp;
mod seccomp_file;
mod sessions;
mod shared;
mod snapshots;
mod stats;
mod templates;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod timing;
mod usage;

pub use api::*;
pub use hypernetes_vmm::{HostShare, VmExtras};
pub use hypernetes_volume::{VolumeDriver, VolumeError};

pub use config::{Deadlines, Defaults, RuntimeConfig, TemplateConfig, UidRange};
pub use error::RuntimeError;
pub use figures::{NodeFigures, StartFigures};
pub use host::*;
pub use identity::{check_sandbox, network_request};
pub use logs::ship::{LogShipping, ship_logs};
pub use metrics::{METRICS_TYPE, node_metrics};
pub use node::NodeRuntime;
pub use pool::PoolFigures;
pub use ports::{Images, Kernels};
pub use process::{FirstProcess, first_process, signal_number};
pub use recovery::RecoveryReport;
pub use seccomp::{SeccompAction, SeccompArg, SeccompOp, SeccompProfile, SeccompRule};
pub use seccomp_file::read_seccomp_profile;
pub use timing::Timing;

//! Pods on this node: sandbox and container state machines, logs, exec, recovery after a restart.
//!
//! Joins the mechanisms (image, network, vmm, kernel, agent) and knows nothing of Kubernetes or CRI.
//! Intent is stored before every effect; at start what runs is adopted and what is half done is
//! undone.
#![forbid(unsafe_code)]

mod api;
mod error;

pub use api::*;
pub use error::RuntimeError;

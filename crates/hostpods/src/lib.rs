//! Pods on the node's own kernel: plain OCI containers, for those few that must share it.
//!
//! System pods (service proxies, network agents) are about the host itself: its network, its
//! processes, its mounts. No VM can give them these. They are run by an installed OCI runtime (runc
//! or crun), each below an installed monitor (conmon), which holds the container's streams, writes
//! its log and its exit code, and lives on when the daemon does not:
//!
//! ```text
//! JointRuntime ─┬─▶ NodeRuntime (VMs)
//!               └─▶ HostRuntime ─┬─▶ records                  intent before effect
//!                                ├─▶ rootfs                   erofs layers, one mount each; overlay
//!                                ├─▶ namespaces, pause        what a pod's containers share
//!                                ├─▶ spec ─▶ config.json      what the request says, in OCI's words
//!                                └─▶ monitor ─▶ conmon ─▶ OCI runtime ─▶ program
//! ```
//!
//! Nothing comes here by itself: a [`hypernetes_runtime::SandboxConfig`] says so.
#![forbid(unsafe_code)]

mod attach;
mod cgroup;
mod config;
mod container;
mod detail;
mod devices;
mod exec;
mod forward;
mod joint;
mod monitor;
mod namespaces;
mod oci;
mod pause;
mod process;
mod records;
mod recovery;
mod rootfs;
mod runtime;
mod sandbox;
mod seccomp;
mod spec;
mod stats;
mod update;
mod user;

pub use config::{HostConfig, ProgramError, Programs};
pub use joint::JointRuntime;
pub use pause::pause;
pub use records::{has_pods, known_sandboxes};
pub use recovery::HostReport;
pub use runtime::HostRuntime;

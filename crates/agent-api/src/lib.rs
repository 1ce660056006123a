//! The protocol between the node and HyperStart, the agent inside every microVM.
//!
//! [`v1`] holds the types generated from `proto/agent.proto`, which is the contract. [`sync`] makes
//! one clean session out of a byte stream that has no connection semantics (virtio-serial). Calls on it are
//! `frames`; [`AgentClient`] is the node's end of it, [`server`] the guest's. The guest is hostile: whatever it sends, the node spends
//! bounded memory and bounded time.
#![forbid(unsafe_code)]

#[cfg(feature = "client")]
mod client;
pub mod defaults;
#[cfg(feature = "fake")]
pub mod fake;
#[cfg_attr(
    not(feature = "client"),
    allow(dead_code, reason = "the guest is one side of it")
)]
mod frames;
pub mod server;
pub mod status;
pub mod sync;

#[cfg(feature = "client")]
pub use client::{AgentClient, AgentError, ConnectOptions, Frames, Transport};
pub use frames::ConnectionError;

/// Generated from `proto/agent.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code; the .proto file holds the documentation"
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/hypernetes.agent.v1.rs"));
}

/// The newest protocol version that this build speaks.
pub const PROTOCOL_VERSION: u32 = 3;
/// Begins the message of a refused container if a mount of an image is why. The kubelet looks for the
/// same word.
pub const IMAGE_VOLUME_FAILED: &str = "ImageVolumeMountFailed";
/// The oldest protocol version that this build speaks.
pub const MIN_PROTOCOL_VERSION: u32 = 1;
/// Feature of an agent: filters of the owner's own ([`v1::Process::seccomp`]). An agent without it would
/// leave the field unread, so the node must not send it there.
pub const FEATURE_SECCOMP_PROFILE: &str = "seccomp-profile";
/// Feature of an agent: process namespaces of other containers
/// ([`v1::CreateContainerRequest::pid_target`]).
pub const FEATURE_PID_TARGET: &str = "pid-target";
/// Feature of an agent: a user namespace for the pod's containers
/// ([`v1::ConfigureSandboxRequest::user_namespace`]).
pub const FEATURE_USER_NAMESPACE: &str = "user-namespace";
/// Feature of an agent: huge pages for containers ([`v1::Resources::huge_pages`]) and as volumes
/// ([`v1::HugePagesVolume`]).
pub const FEATURE_HUGE_PAGES: &str = "huge-pages";
/// Feature of an agent: its wall clock can be asked and changed ([`v1::ClockRequest`]).
pub const FEATURE_CLOCK: &str = "clock";
/// Feature of an agent: processes of the guest itself ([`v1::ExecStart::guest`]).
pub const FEATURE_GUEST_EXEC: &str = "guest-exec";
/// Feature of an agent: containers can be frozen ([`v1::PauseRequest`]).
pub const FEATURE_PAUSE: &str = "pause";
/// Feature of an agent: ambient capabilities by name ([`v1::Capabilities::ambient`]).
pub const FEATURE_AMBIENT_CAPABILITIES: &str = "ambient-capabilities";
/// Feature of an agent: volumes that are disks which outlive the pod ([`v1::DiskVolume`],
/// [`v1::GrowDiskRequest`]).
pub const FEATURE_DISK_VOLUMES: &str = "disk-volumes";
/// Feature of an agent: it can go through the motions of a pod and forget it
/// ([`v1::ConfigureSandboxRequest::rehearsal`], [`v1::ForgetRequest`]).
pub const FEATURE_REHEARSAL: &str = "rehearsal";
/// Feature of an agent: it can become another pod's ([`v1::PersonalizeRequest`]).
pub const FEATURE_CLONE: &str = "clone";
/// All features of an agent of this build.
pub const FEATURES: &[&str] = &[
    FEATURE_SECCOMP_PROFILE,
    FEATURE_PID_TARGET,
    FEATURE_USER_NAMESPACE,
    FEATURE_HUGE_PAGES,
    FEATURE_CLOCK,
    FEATURE_GUEST_EXEC,
    FEATURE_PAUSE,
    FEATURE_AMBIENT_CAPABILITIES,
    FEATURE_DISK_VOLUMES,
    FEATURE_REHEARSAL,
    FEATURE_CLONE,
];
/// Largest encoded message in either direction.
pub const MAX_MESSAGE_SIZE: usize = 4 * 1024 * 1024;
/// Largest piece of data in one message of a byte stream.
pub const MAX_CHUNK_SIZE: usize = 64 * 1024;
/// Largest header list of an agent that speaks HTTP/2, trailers with a status message included.
pub const MAX_HEADER_LIST_SIZE: u32 = 16 * 1024;
/// Window of one call in each direction: what one stalled reader can hold up.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// Window of the connection: thirty-two stalled streams do not starve the others, and a
/// flooding guest cannot make the node buffer more than this.
pub const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// What the agent keeps in directories at the root of a pod's scratch disk. It makes those that are missing; a disk that
/// comes with them costs the guest less: ext4 puts each new one at the root into another part of the disk.
pub const SCRATCH_DIRECTORIES: [&str; 3] = ["containers", "volumes", "trash"];
/// Name of the virtio-serial port that the agent serves.
pub const PORT_NAME: &str = "agent.0";

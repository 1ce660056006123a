//! The services as a kubelet calls them: gRPC over a unix socket, on a runtime in memory.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of this program is a test"
)]

mod bed;
mod confinement;
mod containers;
mod events;
mod host;
mod images;
mod metrics;
mod sandboxes;
mod streams;
mod updates;

//! The runtime interface as a kubelet uses it, on real microVMs: under crashes, in bulk, for long.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "all of this program is a test, and waiting for another process means looking again"
)]

mod bulk;
mod client;
mod cni;
mod crashes;
mod cycles;
mod guests;
mod host_ports;
mod huge_pages;
mod pool;
mod shipping;
mod syscalls;
mod traces;

//! The QEMU driver does what every driver must do.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation,
    dead_code,
    reason = "an integration test is all tests, and uses part of the support module"
)]

mod support;

use hypernetes_vmm::conformance;
use support::Bench;

#[tokio::test]
async fn qemu_conforms() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file
    };
    conformance::all(&bench.driver, &|| bench.spec("echo"), &file).await;
}

//! docker's habits with `hyper`, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::time::Duration;

use hypernetes_testkit::{can_run_pods, eventually, must_pass_as_tenant};

#[test]
fn a_docker_user_is_at_home() {
    if !can_run_pods() {
        return;
    }
    let daemon = must_pass_as_tenant("hyper", "10.98.0.0/24", 60);
    // The last ones are on their way out, and the daemon may be making a template.
    eventually("no VM is left", Duration::from_secs(60), || {
        let left = daemon.vmm_processes();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

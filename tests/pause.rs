//! Containers that stand still, by `hyper pause` and by kubectl, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use hypernetes_testkit::{can_run_pods, must_pass_as_tenant};

#[test]
fn containers_stand_still() {
    if can_run_pods() {
        must_pass_as_tenant("pause", "10.98.0.0/24", 16);
    }
}

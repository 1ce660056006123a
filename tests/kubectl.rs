//! The first hour of a tenant, with two releases of the real kubectl.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::collections::BTreeMap;

use hypernetes_testkit::{
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, Scenario, can_run_pods, kubectl,
    workspace_root,
};

fn first_hour(version: &str) {
    if !can_run_pods() {
        return;
    }
    let scenario = Scenario::read(&workspace_root().join("tests/scenarios/first-hour.txt"));
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.88.0.0/24");
    daemon.tenant("globex", "10.88.0.0/24");
    let path = daemon.path_with(&[("kubectl", &kubectl(version))]);
    scenario.must_pass(
        40,
        &BTreeMap::from([
            ("KUBECONFIG".to_owned(), kubeconfig.display().to_string()),
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), daemon.dir().display().to_string()),
            ("WEB".to_owned(), registry.image("web:1")),
            ("BOX".to_owned(), registry.image("busybox:1")),
            ("REGISTRY".to_owned(), registry.address().to_owned()),
        ]),
    );
}

#[test]
fn first_hour_with_the_older_kubectl() {
    first_hour(KUBECTL_VERSIONS[0]);
}

#[test]
fn first_hour_with_the_newer_kubectl() {
    first_hour(KUBECTL_VERSIONS[1]);
}

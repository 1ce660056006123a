//! Containers that stand still, by `hyper pause` and by kubectl, against a real daemon and real VMs.
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
    release_dir, workspace_root,
};

#[test]
fn containers_stand_still() {
    if !can_run_pods() {
        return;
    }
    let scenario = Scenario::read(&workspace_root().join("tests/scenarios/pause.txt"));
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.98.0.0/24");
    let path = daemon.path_with(&[
        ("kubectl", &kubectl(KUBECTL_VERSIONS[0])),
        ("hyper", &release_dir().join("hyper")),
    ]);
    scenario.must_pass(
        16,
        &BTreeMap::from([
            ("KUBECONFIG".to_owned(), kubeconfig.display().to_string()),
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), daemon.dir().display().to_string()),
            ("WORK".to_owned(), daemon.dir().display().to_string()),
            ("BOX".to_owned(), registry.image("busybox:1")),
            ("NO_COLOR".to_owned(), "1".to_owned()),
        ]),
    );
}

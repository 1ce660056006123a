//! docker's habits with `hyper`, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::{collections::BTreeMap, fs, time::Duration};

use hypernetes_testkit::{
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, Scenario, can_run_pods, eventually, kubectl,
    release_dir, workspace_root,
};

#[test]
fn a_docker_user_is_at_home() {
    if !can_run_pods() {
        return;
    }
    let scenario = Scenario::read(&workspace_root().join("tests/scenarios/hyper.txt"));
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.98.0.0/24");
    let path = daemon.path_with(&[
        ("kubectl", &kubectl(KUBECTL_VERSIONS[0])),
        ("hyper", &release_dir().join("hyper")),
    ]);
    let work = daemon.dir().join("work");
    fs::create_dir(&work).unwrap();
    scenario.must_pass(
        60,
        &BTreeMap::from([
            ("KUBECONFIG".to_owned(), kubeconfig.display().to_string()),
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), daemon.dir().display().to_string()),
            ("WORK".to_owned(), work.display().to_string()),
            ("BOX".to_owned(), registry.image("busybox:1")),
            ("REGISTRY".to_owned(), registry.address().to_owned()),
            ("NO_COLOR".to_owned(), "1".to_owned()),
        ]),
    );
    // The last ones are on their way out, and the daemon may be making a template.
    eventually("no VM is left", Duration::from_secs(60), || {
        let left = daemon.vmm_processes();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

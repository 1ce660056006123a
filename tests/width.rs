//! kubectl over its whole width, with two releases: scripted commands with their answers and exit codes.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::{collections::BTreeMap, fs};

use hypernetes_testkit::{
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, Scenario, can_run_pods, kubectl,
    workspace_root,
};

/// Runs scenarios one after the other as the cluster's administrator.
fn run(version: &str, names: &[&str], least: usize) {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let path = daemon.path_with(&[("kubectl", &kubectl(version))]);
    let config = daemon.dir().join("kubeconfig");
    fs::copy(daemon.admin_kubeconfig(), &config).unwrap();
    let vars = BTreeMap::from([
        ("KUBECONFIG".to_owned(), config.display().to_string()),
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), daemon.dir().display().to_string()),
        ("SCRATCH".to_owned(), daemon.dir().display().to_string()),
        ("WEB".to_owned(), registry.image("web:1")),
        ("BOX".to_owned(), registry.image("busybox:1")),
    ]);
    let (mut passed, mut failures) = (0, Vec::new());
    for name in names {
        let file = format!("tests/scenarios/{name}.txt");
        let report = Scenario::read(&workspace_root().join(file)).run(&vars);
        passed += report.passed;
        failures.extend(report.failures);
    }
    println!("kubectl {version}: {passed} commands as expected");
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(passed >= least, "{passed} commands");
}

#[test]
fn the_width_with_the_older_kubectl() {
    run(
        KUBECTL_VERSIONS[0],
        &["objects", "generators", "reading", "custom", "endpoints"],
        200,
    );
}

#[test]
fn the_width_with_the_newer_kubectl() {
    run(
        KUBECTL_VERSIONS[1],
        &["objects", "generators", "reading", "custom", "endpoints"],
        200,
    );
}

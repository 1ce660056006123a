//! The real Helm as a tenant: a chart with a hook and a test is installed, upgraded, rolled back and taken away.
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
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, Scenario, can_run_pods, kubectl, tool,
    workspace_root,
};

#[test]
fn a_chart_of_a_tenant() {
    if !can_run_pods() {
        return;
    }
    let scenario = Scenario::read(&workspace_root().join("tests/scenarios/helm.txt"));
    let helm = tool("helm").remove(0);
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.89.0.0/24");
    let path = daemon.path_with(&[("helm", &helm), ("kubectl", &kubectl(KUBECTL_VERSIONS[0]))]);
    let dir = daemon.dir().display().to_string();
    let chart = workspace_root().join("tests/clients/helm/chart");
    scenario.must_pass(
        20,
        &BTreeMap::from([
            ("KUBECONFIG".to_owned(), kubeconfig.display().to_string()),
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), dir.clone()),
            ("HELM_CONFIG_HOME".to_owned(), format!("{dir}/helm/config")),
            ("HELM_CACHE_HOME".to_owned(), format!("{dir}/helm/cache")),
            ("HELM_DATA_HOME".to_owned(), format!("{dir}/helm/data")),
            ("CHART".to_owned(), chart.display().to_string()),
            ("WEB".to_owned(), registry.image("web:1")),
            ("BOX".to_owned(), registry.image("busybox:1")),
        ]),
    );
}

//! Two kernels on one node.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{fs, process::Command};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, run, stdout, workspace_root,
};

#[test]
fn a_pod_may_name_a_distribution_kernel() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let deb = stdout(&mut Command::new(
        workspace_root().join("kernel/fetch-cloud-kernel"),
    ));
    run(&mut daemon.hypernetes(&["kernel", "import", "debian-cloud", &deb]));
    let listed = stdout(&mut daemon.hypernetes(&["kernel", "ls"]));
    assert!(
        listed.contains("debian-cloud") && listed.contains("hyperkernel"),
        "{listed}"
    );
    let verdict = stdout(&mut daemon.hypernetes(&["kernel", "verify", "debian-cloud"]));
    assert!(
        verdict.contains("debian-cloud") && verdict.contains("boots"),
        "{verdict}"
    );

    let acme = daemon.tenant("acme", "10.66.0.0/24");
    let manifest = |name: &str, annotations: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, annotations: {{{annotations}}}}}, \
             spec: {{containers: [{{name: a, image: '{}', command: [sleep, infinity]}}]}}}}",
            registry.image("busybox:1")
        )
    };
    for (name, annotations) in [
        ("own", ""),
        ("other", "hypernetes.io/kernel: debian-cloud"),
        ("wrong", "hypernetes.io/kernel: nothing"),
    ] {
        let file = daemon.dir().join(format!("{name}.yaml"));
        fs::write(&file, manifest(name, annotations)).unwrap();
        run(daemon.kubectl_as(&acme, &["create", "-f"]).arg(&file));
    }
    let k = |args: &[&str]| stdout(&mut daemon.kubectl_as(&acme, args));
    k(&[
        "wait",
        "--for=condition=Ready",
        "pod/own",
        "pod/other",
        "--timeout=300s",
    ]);
    let own = k(&["exec", "own", "--", "uname", "-r"]);
    let other = k(&["exec", "other", "--", "uname", "-r"]);
    assert!(own.ends_with("-hyper"), "{own}");
    assert!(other.contains("cloud-amd64"), "{other}");
    // A kernel that is not there is said so on the pod.
    let events = k(&[
        "get",
        "events",
        "--field-selector",
        "involvedObject.name=wrong",
        "-o",
        "jsonpath={.items[*].message}",
    ]);
    assert!(events.contains("nothing"), "{events}");
    let in_use = daemon
        .hypernetes(&["kernel", "rm", "no-such"])
        .output()
        .unwrap();
    assert!(!in_use.status.success());
    run(&mut daemon.hypernetes(&["tenant", "delete", "acme"]));
    run(&mut daemon.hypernetes(&["kernel", "rm", "debian-cloud"]));
}

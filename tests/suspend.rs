//! Pods whose memory is on the disk, by `hyper suspend` and by kubectl, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, Scenario, can_run_pods, eventually, kubectl,
    release_dir, run, stdout, workspace_root,
};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn containers_are_suspended_and_resumed() {
    if !can_run_pods() {
        return;
    }
    let scenario = Scenario::read(&workspace_root().join("tests/scenarios/suspend.txt"));
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.98.0.0/24");
    let path = daemon.path_with(&[
        ("kubectl", &kubectl(KUBECTL_VERSIONS[0])),
        ("hyper", &release_dir().join("hyper")),
    ]);
    scenario.must_pass(
        20,
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

fn condition(daemon: &Daemon, tenant: &Path, pod: &str) -> String {
    let path = r#"jsonpath={.status.conditions[?(@.type=="hypernetes.io/Suspended")].status}{.status.conditions[?(@.type=="hypernetes.io/Suspended")].reason}"#;
    stdout(&mut daemon.kubectl_as(tenant, &["get", "pod", pod, "-o", path]))
}

fn suspend(daemon: &Daemon, tenant: &Path, pod: &str, value: &str, wanted: &str) {
    let annotation = format!("hypernetes.io/suspended={value}");
    run(&mut daemon.kubectl_as(
        tenant,
        &["annotate", "--overwrite", "pod", pod, &annotation],
    ));
    eventually("the condition", PATIENCE, || {
        let now = condition(daemon, tenant, pod);
        (now == wanted).then_some(()).ok_or(now)
    });
}

#[test]
fn a_suspended_pod_takes_no_memory_and_outlives_the_daemon() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.97.0.0/24");
    let program = "mkdir /tmp/www; echo served > /tmp/www/index.html; httpd -p 8080 -h /tmp/www; \
                   i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let pod = [
        "run",
        "web",
        "--image",
        &image,
        "--restart=Never",
        "--",
        "sh",
        "-c",
        program,
    ];
    run(&mut daemon.kubectl_as(&acme, &pod));
    let ready = ["wait", "--for=condition=Ready", "pod/web", "--timeout=240s"];
    run(&mut daemon.kubectl_as(&acme, &ready));
    let identity = |daemon: &Daemon| {
        stdout(&mut daemon.kubectl_as(&acme, &[
            "get", "pod", "web", "-o",
            "jsonpath={.metadata.uid} {.status.podIP} {.status.startTime} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].state.running.startedAt}",
        ]))
    };
    let fetch = |daemon: &Daemon| {
        let wget = [
            "exec",
            "web",
            "--",
            "wget",
            "-qO-",
            "http://127.0.0.1:8080/",
        ];
        stdout(&mut daemon.kubectl_as(&acme, &wget))
    };
    let log = |daemon: &Daemon| -> Vec<u64> {
        let text = stdout(&mut daemon.kubectl_as(&acme, &["logs", "web"]));
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    let before = identity(&daemon);
    let running = vms(&daemon);
    suspend(&daemon, &acme, "web", "true", "True");
    eventually("the VMM is gone", PATIENCE, || {
        let now = vms(&daemon);
        (now + 1 == running)
            .then_some(())
            .ok_or(format!("{now} of {running}"))
    });
    let (counted, since) = (log(&daemon).len(), Instant::now());

    daemon.kill();
    daemon.start_again();
    assert_eq!(condition(&daemon, &acme, "web"), "True");
    assert_eq!(identity(&daemon), before);
    assert_eq!(log(&daemon).len(), counted, "nothing runs");

    eventually("some seconds have passed", PATIENCE, || {
        let passed = since.elapsed();
        (passed > Duration::from_secs(5))
            .then_some(())
            .ok_or(format!("{passed:?}"))
    });
    suspend(&daemon, &acme, "web", "false", "");
    run(&mut daemon.kubectl_as(&acme, &ready));
    assert_eq!(fetch(&daemon), "served");
    // The guest's clock stood still for longer than it may be wrong.
    let date = ["exec", "web", "--", "date", "+%s"];
    let earliest = unix_seconds();
    let guest: u64 = stdout(&mut daemon.kubectl_as(&acme, &date))
        .parse()
        .unwrap();
    let latest = unix_seconds();
    let right = earliest - 1..=latest + 1;
    assert!(right.contains(&guest), "{guest} is not in {right:?}");
    eventually("it counts on", PATIENCE, || {
        let now = log(&daemon).len();
        (now > counted + 5)
            .then_some(())
            .ok_or(format!("{now} after {counted}"))
    });
    let all = log(&daemon);
    let expected: Vec<u64> = (1..).take(all.len()).collect();
    assert_eq!(all, expected, "no number is missing and none comes twice");
    assert_eq!(identity(&daemon), before);

    suspend(&daemon, &acme, "web", "true", "True");
    run(&mut daemon.kubectl_as(&acme, &["delete", "pod", "web", "--timeout=60s"]));
    eventually("nothing is left", PATIENCE, || {
        let left = daemon.pod_files();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
    assert_eq!(vms(&daemon), running - 1);
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

fn vms(daemon: &Daemon) -> usize {
    daemon.vmm_processes().len()
}

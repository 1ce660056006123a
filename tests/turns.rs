//! Many pods that start at once.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{fs, path::Path, thread, time::Duration};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};
use serde_json::{Value, json};

fn create(daemon: &Daemon, kubeconfig: &Path, image: &str, count: usize) {
    let pods: Vec<Value> = (0..count)
        .map(|number| {
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": format!("p{number}"),
                    "annotations": {"hypernetes.io/timing": "true"},
                },
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{"name": "main", "image": image, "command": ["sleep", "infinity"]}],
                },
            })
        })
        .collect();
    let file = daemon.dir().join(format!("{count}.json"));
    let list = json!({"apiVersion": "v1", "kind": "List", "items": pods});
    fs::write(&file, list.to_string()).expect("a writable directory");
    run(daemon.kubectl_as(kubeconfig, &["create", "-f"]).arg(&file));
}

/// How long the VMs of a namespace's pods waited for their turn, in milliseconds, once all are there.
fn waits(daemon: &Daemon, kubeconfig: &Path, count: usize) -> Vec<f64> {
    let what = format!("{count} pods have told their timing");
    eventually(&what, Duration::from_secs(240), || {
        let args = [
            "get",
            "events",
            "--field-selector=reason=Timing",
            "-o",
            "json",
        ];
        let events: Value =
            serde_json::from_str(&stdout(&mut daemon.kubectl_as(kubeconfig, &args)))
                .map_err(|error| error.to_string())?;
        let texts = events["items"].as_array().into_iter().flatten();
        let waits: Vec<f64> = texts
            .filter_map(|event| {
                event["message"]
                    .as_str()?
                    .strip_prefix("VM from a template")
            })
            .filter_map(|text| {
                text.split_once("turn ")?
                    .1
                    .split_once(" ms")?
                    .0
                    .parse()
                    .ok()
            })
            .collect();
        match waits.len() == count {
            true => Ok(waits),
            false => Err(events.to_string()),
        }
    })
}

#[test]
fn a_tenant_with_many_pods_does_not_keep_another_waiting() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let many = daemon.tenant("many", "10.66.0.0/24");
    let one = daemon.tenant("one", "10.67.0.0/24");
    let image = registry.image("busybox:1");
    run(&mut daemon.hypernetes(&["image", "pull", "-q", &image]));
    daemon.wait_template();
    let count = 3 * thread::available_parallelism()
        .map_or(1, usize::from)
        .max(2);
    create(&daemon, &many, &image, count);
    create(&daemon, &one, &image, 1);
    let other = waits(&daemon, &one, 1);
    let own = waits(&daemon, &many, count);
    let longest = own.iter().copied().fold(0.0, f64::max);
    assert!(longest > other[0], "{own:?} {other:?}");
    // As many as the node has CPUs are at work of each at once: those did not wait for one another.
    let at_once = own.iter().filter(|wait| **wait < longest / 2.0).count();
    assert!(at_once >= 2, "{own:?}");
    for kubeconfig in [&many, &one] {
        let args = ["delete", "pods", "--all", "--wait=true"];
        run(&mut daemon.kubectl_as(kubeconfig, &args));
    }
    daemon.stop();
}

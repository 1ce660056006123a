//! A later release takes over the state directory of an earlier one: nothing that was acknowledged is lost, nothing
//! is left of what ran, and work goes on.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of a test fail by panic"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout, workspace_root,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
/// What tells of the object's life and not of what its owner wants.
const TOLD: [&str; 3] = ["managedFields", "resourceVersion", "generation"];
/// What the daemon itself keeps as it must be, for this start.
const KEPT_UP: [&str; 6] = [
    "ConfigMap/kube-root-ca.crt",
    "Service/kubernetes",
    "ClusterRole/",
    "CustomResourceDefinition/networks.hypernetes.io",
    "CustomResourceDefinition/tenants.hypernetes.io",
    "CustomResourceDefinition/podsnapshots.hypernetes.io",
];

/// By kind, namespace and name: uid, and what is wanted or kept.
fn objects(list: &Value) -> BTreeMap<String, Value> {
    let items = list["items"].as_array().unwrap().iter();
    let named = items.map(|item| {
        let metadata = &item["metadata"];
        let part = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let kind = part(&item["kind"]);
        let name = part(&metadata["name"]);
        let key = format!("{kind}/{name} of {:?}", part(&metadata["namespace"]));
        let mut metadata = metadata.clone();
        for told in TOLD {
            metadata.as_object_mut().unwrap().remove(told);
        }
        let mut item = item.clone();
        item.as_object_mut().unwrap().remove("status");
        item["metadata"] = metadata;
        (key, item)
    });
    named.collect()
}

fn unpacked(archive: &Path, to: &Path) -> PathBuf {
    run(Command::new("tar")
        .arg("-xzf")
        .arg(archive)
        .arg("-C")
        .arg(to));
    to.join("state")
}

fn takes_over(archive: &Path) {
    let registry = Registry::start();
    let temp = tempfile::tempdir().unwrap();
    let state = unpacked(archive, temp.path());
    let recorded: Value =
        serde_json::from_slice(&fs::read(state.join("objects.json")).unwrap()).unwrap();
    let recorded = objects(&recorded);
    let daemon = Daemon::start(DaemonOptions {
        state_dir: Some(state.clone()),
        ..DaemonOptions::default()
    });
    // The tenant's own credentials of that time; the daemon listens elsewhere.
    let acme = state.join("acme.kubeconfig");
    let server = stdout(&mut daemon.kubectl(&[
        "config",
        "view",
        "-o",
        "jsonpath={.clusters[0].cluster.server}",
    ]));
    let as_acme = |args: &[&str]| {
        let mut command = daemon.kubectl_as(&acme, &["--server", &server]);
        command.args(args);
        command
    };

    let kinds: std::collections::BTreeSet<String> = recorded
        .keys()
        .map(|key| key.split('/').next().unwrap().to_owned())
        .collect();
    let kinds: Vec<String> = kinds.into_iter().collect();
    let now = stdout(&mut daemon.kubectl(&["get", &kinds.join(","), "-A", "-o", "json"]));
    let now = objects(&serde_json::from_str(&now).unwrap());
    for (key, was) in &recorded {
        let is = now.get(key);
        // A pod whose VM is gone is replaced.
        if key.starts_with("Pod/web-") && is.is_none() {
            continue;
        }
        let is = is.unwrap_or_else(|| panic!("{key} is lost"));
        assert_eq!(was["metadata"]["uid"], is["metadata"]["uid"], "{key}");
        if !KEPT_UP.iter().any(|kept| key.starts_with(kept)) {
            assert_eq!(was, is, "{key}");
        }
    }

    // What ran was in the memory of a host that is not this one.
    eventually("the pod without a VM has failed", LIMIT, || {
        let path = "jsonpath={.status.phase} {.status.reason} \
                    {.status.containerStatuses[0].state.terminated.reason}";
        let status = stdout(&mut as_acme(&["get", "pod", "alone", "-o", path]));
        let failed = status.starts_with("Failed") && status.contains("VmmDied");
        failed.then_some(()).ok_or(status)
    });
    // Nor are the files here that a snapshot and the memory of a suspended pod were in.
    if recorded.keys().any(|key| key.starts_with("PodSnapshot/")) {
        eventually("the snapshot without files is lost", LIMIT, || {
            let path = "jsonpath={.status.conditions[0].reason}";
            let reason = stdout(&mut as_acme(&["get", "podsnapshot", "kept", "-o", path]));
            (reason == "Lost").then_some(()).ok_or(reason)
        });
        eventually("the suspended pod has failed", LIMIT, || {
            let path = "jsonpath={.status.phase}";
            let phase = stdout(&mut as_acme(&["get", "pod", "asleep", "-o", path]));
            (phase == "Failed").then_some(()).ok_or(phase)
        });
        run(&mut as_acme(&["delete", "podsnapshot/kept", "pod/asleep"]));
    }
    // Work goes on, with the same volume.
    let image = format!("main={}", registry.image("busybox:1"));
    run(&mut as_acme(&["set", "image", "deployment/web", &image]));
    run(&mut as_acme(&[
        "rollout",
        "status",
        "deployment/web",
        "--timeout=180s",
    ]));
    let word = stdout(&mut as_acme(&[
        "exec",
        "deployment/web",
        "--",
        "cat",
        "/data/word",
    ]));
    assert_eq!(word.trim(), "kept");
    // And goes whole, in the order of an owner who leaves.
    run(&mut as_acme(&[
        "delete",
        "deployment/web",
        "pod/alone",
        "pvc/data",
    ]));
    run(&mut daemon.kubectl(&["delete", "boat", "mary", "--namespace", "acme"]));
    run(&mut daemon.hypernetes(&["tenant", "delete", "acme", "--timeout", "120"]));
    eventually("nothing is left", LIMIT, || {
        let sandboxes = fs::read_dir(state.join("runtime/sandboxes"))
            .unwrap()
            .count();
        let leases = fs::read_dir(state.join("network/leases")).unwrap().count();
        let volumes = fs::read_dir(state.join("volumes")).unwrap().count();
        let left = (sandboxes, leases, volumes, daemon.vmm_processes().len());
        (left == (0, 0, 0, 0))
            .then_some(())
            .ok_or(format!("{left:?}"))
    });
}

#[test]
fn state_directories_of_earlier_releases_are_taken_over() {
    if !can_run_pods() {
        return;
    }
    let recorded = workspace_root().join("tests/recorded");
    let mut archives: Vec<_> = fs::read_dir(recorded)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "gz"))
        .collect();
    archives.sort();
    assert!(!archives.is_empty());
    for archive in archives {
        eprintln!("{}", archive.display());
        takes_over(&archive);
    }
}

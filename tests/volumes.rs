//! Persistent volumes of tenants with the real kubectl and real VMs: data outlive pods, daemons and sets, belong to one
//! tenant, are bounded, grow, and go when they shall.
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
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, release_dir, run, stdout,
};

const LIMIT: Duration = Duration::from_secs(120);
const WAIT: &str = "--timeout=120s";

struct Tenant {
    kubeconfig: PathBuf,
}

impl Tenant {
    fn k(&self, daemon: &Daemon, args: &[&str]) -> String {
        stdout(&mut daemon.kubectl_as(&self.kubeconfig, args))
    }

    fn refused(&self, daemon: &Daemon, args: &[&str]) -> String {
        let output = daemon.kubectl_as(&self.kubeconfig, args).output().unwrap();
        assert!(!output.status.success(), "{args:?}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn apply(&self, daemon: &Daemon, manifest: &str) {
        run(daemon
            .kubectl_as(&self.kubeconfig, &["apply", "-f"])
            .arg(written(daemon, manifest)));
    }

    fn apply_refused(&self, daemon: &Daemon, manifest: &str) -> String {
        let file = written(daemon, manifest);
        self.refused(daemon, &["apply", "-f", file.to_str().unwrap()])
    }

    fn event(&self, daemon: &Daemon, reason: &str, words: &str) {
        eventually(words, LIMIT, || {
            let selector = format!("reason={reason}");
            let said = self.k(
                daemon,
                &["get", "events", "--field-selector", &selector, "-o", "yaml"],
            );
            // kubectl folds long lines.
            let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
            said.contains(words).then_some(()).ok_or(said)
        });
    }

    fn ready(&self, daemon: &Daemon, pod: &str) {
        self.k(
            daemon,
            &["wait", "--for=condition=Ready", WAIT, &format!("pod/{pod}")],
        );
    }

    fn sh(&self, daemon: &Daemon, pod: &str, script: &str) -> String {
        self.k(daemon, &["exec", pod, "--", "sh", "-c", script])
    }

    fn field(&self, daemon: &Daemon, what: &[&str], path: &str) -> String {
        let path = format!("jsonpath={path}");
        self.k(daemon, &[&["get"], what, &["-o", &path]].concat())
    }
}

fn written(daemon: &Daemon, manifest: &str) -> PathBuf {
    let file = daemon.dir().join("manifest.yaml");
    fs::write(&file, manifest).unwrap();
    file
}

fn claim(name: &str, size: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: {name}}}\nspec:\n  accessModes: \
         [ReadWriteOnce]\n  resources: {{requests: {{storage: {size}}}}}\n{more}"
    )
}

fn pod(name: &str, image: &str, claim: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  \
         containers:\n  - name: c\n    image: {image}\n    command: [sleep, infinity]\n    volumeMounts: \
         [{{name: v, mountPath: /data}}]\n  volumes: [{{name: v, persistentVolumeClaim: {{claimName: \
         {claim}}}}}]\n"
    )
}

/// Volumes that have files on the node.
fn on_disk(daemon: &Daemon) -> Vec<String> {
    let entries = fs::read_dir(daemon.state_dir().join("volumes")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("pvc-"))
        .collect();
    names.sort();
    names
}

#[test]
fn volumes_of_tenants() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let (acme, beta) = (
        Tenant {
            kubeconfig: daemon.tenant("acme", "10.99.0.0/24"),
        },
        Tenant {
            kubeconfig: daemon.tenant("beta", "10.99.0.0/24"),
        },
    );
    let image = registry.image("busybox:1");
    data_outlive_pods_and_daemons(&mut daemon, &acme, &image);
    a_volume_grows(&daemon, &acme);
    bounds_and_walls(&daemon, &acme, &beta);
    sets_keep_their_data(&daemon, &acme, &image);
    a_block_volume(&daemon, &beta, &image);
    docker_habits(&daemon, &beta, &image);
    everything_goes(&daemon, &acme);
}

fn data_outlive_pods_and_daemons(daemon: &mut Daemon, acme: &Tenant, image: &str) {
    acme.apply(daemon, &claim("data", "64Mi", ""));
    acme.apply(daemon, &pod("first", image, "data"));
    acme.ready(daemon, "first");
    let shown = acme.k(daemon, &["get", "pvc", "data"]);
    for word in ["Bound", "pvc-", "64Mi", "RWO", "local"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    let classes = acme.k(daemon, &["get", "storageclass"]);
    assert!(classes.contains("local (default)"), "{classes}");
    acme.sh(daemon, "first", "echo kept > /data/x; sync");
    acme.apply(daemon, &pod("second", image, "data"));
    acme.event(
        daemon,
        "FailedAttachVolume",
        "Volume is already used by pod(s) first",
    );
    daemon.kill();
    daemon.start_again();
    assert_eq!(acme.sh(daemon, "first", "cat /data/x").trim(), "kept");
    // In use: it stays until no pod has it.
    acme.k(daemon, &["delete", "pvc", "data", "--wait=false"]);
    let finalizers = acme.field(daemon, &["pvc", "data"], "{.metadata.finalizers}");
    assert!(
        finalizers.contains("kubernetes.io/pvc-protection"),
        "{finalizers}"
    );
    let status = acme.k(daemon, &["get", "pvc", "data"]);
    assert!(status.contains("Terminating"), "{status}");
    acme.k(daemon, &["delete", "pod", "first"]);
    acme.ready(daemon, "second");
    assert_eq!(acme.sh(daemon, "second", "cat /data/x").trim(), "kept");
    acme.k(daemon, &["delete", "pod", "second"]);
    eventually("the volume is gone with its data", LIMIT, || {
        let left = on_disk(daemon);
        left.is_empty().then_some(()).ok_or(left.join(" "))
    });
    // Waits for its claim; then the data of a second life.
    acme.apply(daemon, &pod("third", image, "grows"));
    eventually("the scheduler says why", LIMIT, || {
        let said = acme.field(daemon, &["pod", "third"], "{.status.conditions[*].message}");
        let words = "persistentvolumeclaim \"grows\" not found";
        said.contains(words).then_some(()).ok_or(said)
    });
    acme.apply(daemon, &claim("grows", "64Mi", ""));
    acme.ready(daemon, "third");
}

fn a_volume_grows(daemon: &Daemon, acme: &Tenant) {
    let blocks = || {
        let said = acme.sh(daemon, "third", "df -k /data | tail -1 | awk '{print $2}'");
        said.trim().parse::<u64>().unwrap()
    };
    acme.sh(daemon, "third", "echo still > /data/y");
    let before = blocks();
    let patch = r#"{"spec":{"resources":{"requests":{"storage":"192Mi"}}}}"#;
    acme.k(daemon, &["patch", "pvc", "grows", "-p", patch]);
    eventually("the claim has its new size", LIMIT, || {
        let capacity = acme.field(daemon, &["pvc", "grows"], "{.status.capacity.storage}");
        (capacity == "192Mi").then_some(()).ok_or(capacity)
    });
    let after = blocks();
    assert!(after > before + 100_000, "{before} {after}");
    assert_eq!(acme.sh(daemon, "third", "cat /data/y").trim(), "still");
    acme.event(
        daemon,
        "FileSystemResizeSuccessful",
        "MountVolume.NodeExpandVolume succeeded",
    );
    acme.k(daemon, &["delete", "pod", "third"]);
}

fn bounds_and_walls(daemon: &Daemon, acme: &Tenant, beta: &Tenant) {
    let said = acme.apply_refused(daemon, &claim("large", "11Gi", ""));
    assert!(
        said.contains("exceeded quota: storage, requested: requests.storage=11Gi"),
        "{said}"
    );
    let patch = r#"{"spec":{"resources":{"requests":{"storage":"20Gi"}}}}"#;
    let said = acme.refused(daemon, &["patch", "pvc", "grows", "-p", patch]);
    assert!(said.contains("exceeded quota: storage"), "{said}");
    // Volumes are the operator's; a claim that names another tenant's gets nothing.
    let said = beta.refused(daemon, &["get", "pv"]);
    assert!(said.contains("persistentvolumes is forbidden"), "{said}");
    let said = beta.refused(daemon, &["get", "pvc", "-n", "acme"]);
    assert!(said.contains("is forbidden"), "{said}");
    let volume = acme.field(daemon, &["pvc", "grows"], "{.spec.volumeName}");
    beta.apply(
        daemon,
        &claim(
            "thief",
            "64Mi",
            &format!("  storageClassName: local\n  volumeName: {volume}\n"),
        ),
    );
    beta.event(
        daemon,
        "FailedBinding",
        "already bound to a different claim",
    );
    let phase = beta.field(daemon, &["pvc", "thief"], "{.status.phase}");
    assert_eq!(phase, "Pending");
    beta.k(daemon, &["delete", "pvc", "thief"]);
}

fn sets_keep_their_data(daemon: &Daemon, acme: &Tenant, image: &str) {
    acme.apply(
        daemon,
        &format!(
            "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: db}}\nspec:\n  replicas: 2\n  \
             serviceName: db\n  podManagementPolicy: Parallel\n  selector: {{matchLabels: {{app: \
             db}}}}\n  template:\n    metadata: {{labels: {{app: db}}}}\n    spec:\n      \
             terminationGracePeriodSeconds: 1\n      containers:\n      - name: c\n        image: \
             {image}\n        command: [sh, -c, 'test -e /data/id || hostname > /data/id; sync; sleep \
             infinity']\n        volumeMounts: [{{name: data, mountPath: /data}}]\n  \
             volumeClaimTemplates:\n  - metadata: {{name: data}}\n    spec:\n      accessModes: \
             [ReadWriteOnce]\n      resources: {{requests: {{storage: 32Mi}}}}\n"
        ),
    );
    acme.k(daemon, &["rollout", "status", "sts/db", WAIT]);
    eventually("both have written", LIMIT, || {
        let said: Vec<String> = ["db-0", "db-1"]
            .iter()
            .map(|pod| acme.sh(daemon, pod, "cat /data/id").trim().to_owned())
            .collect();
        (said == ["db-0", "db-1"])
            .then_some(())
            .ok_or(said.join(" "))
    });
    acme.sh(daemon, "db-1", "echo more >> /data/id; sync");
    acme.k(daemon, &["scale", "sts/db", "--replicas=1"]);
    acme.k(daemon, &["wait", "--for=delete", WAIT, "pod/db-1"]);
    acme.k(daemon, &["scale", "sts/db", "--replicas=2"]);
    acme.k(daemon, &["rollout", "status", "sts/db", WAIT]);
    let kept = acme.sh(daemon, "db-1", "cat /data/id");
    assert_eq!(
        kept.split_whitespace().collect::<Vec<_>>(),
        ["db-1", "more"]
    );
}

fn a_block_volume(daemon: &Daemon, beta: &Tenant, image: &str) {
    beta.apply(daemon, &claim("raw", "32Mi", "  volumeMode: Block\n"));
    let pod = |name: &str| {
        pod(name, image, "raw").replace(
            "volumeMounts: [{name: v, mountPath: /data}]",
            "volumeDevices: [{name: v, devicePath: /dev/raw}]",
        )
    };
    beta.apply(daemon, &pod("writer"));
    beta.ready(daemon, "writer");
    beta.sh(
        daemon,
        "writer",
        "echo block | dd of=/dev/raw conv=notrunc,fsync 2>/dev/null",
    );
    beta.k(daemon, &["delete", "pod", "writer"]);
    beta.apply(daemon, &pod("reader"));
    beta.ready(daemon, "reader");
    let said = beta.sh(daemon, "reader", "test -b /dev/raw && head -c 5 /dev/raw");
    assert_eq!(said, "block");
    beta.k(daemon, &["delete", "pod", "reader"]);
    beta.k(daemon, &["delete", "pvc", "raw"]);
}

fn docker_habits(daemon: &Daemon, beta: &Tenant, image: &str) {
    let hyper = |args: &[&str]| {
        stdout(
            Command::new(release_dir().join("hyper"))
                .args(args)
                .env("KUBECONFIG", &beta.kubeconfig)
                .env("HOME", daemon.dir())
                .env("NO_COLOR", "1")
                .stdin(Stdio::null()),
        )
    };
    assert_eq!(hyper(&["volume", "create", "box"]).trim(), "box");
    let shown = hyper(&["volume", "ls"]);
    assert!(
        shown.contains("VOLUME NAME") && shown.contains("box"),
        "{shown}"
    );
    hyper(&[
        "run",
        "--rm",
        "-v",
        "box:/v",
        image,
        "sh",
        "-c",
        "echo hi > /v/f; sync",
    ]);
    let said = hyper(&["run", "--rm", "-v", "box:/v", image, "cat", "/v/f"]);
    assert_eq!(said.trim(), "hi");
    assert_eq!(hyper(&["volume", "rm", "box"]).trim(), "box");
}

fn everything_goes(daemon: &Daemon, acme: &Tenant) {
    run(daemon.kubectl(&["apply", "-f"]).arg(written(
        daemon,
        "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: keep}\nprovisioner: \
             local.hypernetes.io\nreclaimPolicy: Retain\n",
    )));
    acme.apply(daemon, &claim("kept", "32Mi", "  storageClassName: keep\n"));
    eventually("the claim is bound", LIMIT, || {
        let phase = acme.field(daemon, &["pvc", "kept"], "{.status.phase}");
        (phase == "Bound").then_some(()).ok_or(phase)
    });
    let volume = acme.field(daemon, &["pvc", "kept"], "{.spec.volumeName}");
    run(&mut daemon.hypernetes(&["tenant", "delete", "acme"]));
    eventually("only what is retained is left", LIMIT, || {
        let left = on_disk(daemon);
        (left == [volume.clone()])
            .then_some(())
            .ok_or(left.join(" "))
    });
    let phase =
        stdout(&mut daemon.kubectl(&["get", "pv", &volume, "-o", "jsonpath={.status.phase}"]));
    assert_eq!(phase, "Released");
    assert!(Path::new(&daemon.state_dir().join("volumes").join(&volume)).is_dir());
}

//! Pods that are kept and gone on from, by `hyper snapshot` and by kubectl, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

mod tenant;

use std::path::PathBuf;

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, must_pass_as_tenant, run,
};
use serde_json::{Value, json};
use tenant::{PATIENCE, Tenant};

const ANNOTATION: &str = "hypernetes.io/clone-of-snapshot";

#[test]
fn containers_are_kept_by_hyper() {
    if can_run_pods() {
        must_pass_as_tenant("snapshot", "10.89.0.0/24", 16);
    }
}

fn counting(name: &str, image: &str) -> Value {
    let program = "echo ffffffffffffffffffffffffffffffff > /etc/machine-id; \
                   i=0; while :; do i=$((i+1)); echo $i; echo $i > /data/count; sleep 0.1; done";
    json!({
    "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
    "spec": {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": image, "command": ["sh", "-c", program],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
        "volumes": [{"name": "data", "emptyDir": {"sizeLimit": "8Mi"}}],
    }})
}

fn snapshot(name: &str, pod: &str, limit: &str) -> Value {
    json!({"apiVersion": "hypernetes.io/v1alpha1", "kind": "PodSnapshot",
        "metadata": {"name": name}, "spec": {"podName": pod, "sizeLimit": limit}})
}

fn read(tenant: &Tenant<'_>, name: &str) -> Value {
    let text = tenant.get(&["get", "podsnapshot", name, "-o", "json"]);
    serde_json::from_str(&text).unwrap()
}

fn wait_ready(tenant: &Tenant<'_>, name: &str) {
    let object = format!("podsnapshot/{name}");
    tenant.get(&["wait", "--for=condition=Ready", &object, "--timeout=120s"]);
}

fn go_on(tenant: &Tenant<'_>, snapshot: &str, name: &str, change: impl Fn(&mut Value)) {
    let spec = read(tenant, snapshot)["status"]["template"]["spec"].clone();
    tenant.clone_of((ANNOTATION, snapshot), spec, name, change);
}

/// What the API says to what it refuses.
fn refused(tenant: &Tenant<'_>, object: &Value) -> String {
    let path = tenant.daemon.dir().join("refused.json");
    std::fs::write(&path, object.to_string()).unwrap();
    let path = path.display().to_string();
    let mut command = tenant
        .daemon
        .kubectl_as(tenant.kubeconfig, &["create", "-f", &path]);
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{object} was not refused");
    String::from_utf8(output.stderr).unwrap()
}

fn kept_files(daemon: &Daemon) -> Vec<PathBuf> {
    let root = daemon.state_dir().join("runtime/snapshots");
    let entries = std::fs::read_dir(root).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn nothing_is_kept(daemon: &Daemon) {
    eventually("nothing is kept", PATIENCE, || {
        let left = kept_files(daemon);
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

#[test]
fn pods_go_on_from_a_snapshot_after_its_source_and_the_daemon_are_gone() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.87.0.0/24");
    let globex = daemon.tenant("globex", "10.87.0.0/24");
    let image = registry.image("busybox:1");
    {
        let tenant = Tenant {
            daemon: &daemon,
            kubeconfig: &acme,
        };
        tenant.create(&counting("web", &image));
        tenant.ready("web");
        tenant.counts("web");
        tenant.create(&snapshot("keep", "web", "1Gi"));
        wait_ready(&tenant, "keep");
        let status = read(&tenant, "keep")["status"].clone();
        assert_eq!(status["podUID"], tenant.pod("web")["metadata"]["uid"]);
        assert!(status["sizeBytes"].as_u64().unwrap() > 1 << 20, "{status}");
        assert_eq!(tenant.counts("web"), 1, "its source goes on");
        tenant.get(&["delete", "pod", "web", "--timeout=60s"]);
    }
    daemon.kill();
    daemon.start_again();
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: &acme,
    };
    let pods = ["one", "two"];
    for pod in pods {
        go_on(&tenant, "keep", pod, |_| {});
    }
    for pod in pods {
        tenant.ready(pod);
        assert!(tenant.counts(pod) > 1, "it did not begin anew");
        assert_eq!(tenant.exec(pod, "hostname"), pod);
        // It is empty for a moment whenever it is written.
        let read = "until c=$(cat /data/count) && test -n \"$c\"; do :; done; echo $c";
        let count: u64 = tenant.exec(pod, read).parse().unwrap();
        assert!(count > 1);
    }
    for what in [
        "cat /etc/machine-id",
        "cat /sys/class/net/eth0/address",
        "ip -4 -o addr show eth0",
        "cat /etc/hosts",
        "cat /var/run/secrets/kubernetes.io/serviceaccount/token",
        "head -c 16 /dev/urandom | md5sum",
    ] {
        let [one, other] = pods.map(|pod| tenant.exec(pod, what));
        assert!(!one.is_empty() && one != other, "{what}: {one} and {other}");
    }
    go_on(&tenant, "keep", "three", |spec| {
        spec["containers"][0]["command"][2] = json!("id");
    });
    assert_eq!(
        tenant.waiting("three"),
        "spec.containers[0].command[2]: must be as in snapshot keep, which is cloned"
    );
    // Another tenant neither sees it nor has it.
    let other = Tenant {
        daemon: &daemon,
        kubeconfig: &globex,
    };
    let mut stolen = counting("stolen", &image);
    stolen["metadata"]["annotations"] = json!({ANNOTATION: "keep"});
    assert!(refused(&other, &stolen).contains("not found"));
    assert_eq!(other.get(&["get", "podsnapshots", "-o", "name"]), "");
    let looked = ["get", "podsnapshot", "keep", "-n", "acme"];
    let looked = daemon.kubectl_as(&globex, &looked).output().unwrap();
    assert!(
        String::from_utf8(looked.stderr)
            .unwrap()
            .contains("Forbidden")
    );

    tenant.get(&["delete", "podsnapshot", "keep", "--timeout=60s"]);
    nothing_is_kept(&daemon);
    for pod in pods {
        tenant.counts(pod);
    }
    tenant.get(&["delete", "pod", "one", "two", "three", "--timeout=60s"]);
    eventually("nothing is left", PATIENCE, || {
        let left = daemon.pod_files();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

#[test]
fn snapshots_are_bounded_and_go_with_their_namespace() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.86.0.0/24");
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: &acme,
    };
    tenant.create(&counting("web", &registry.image("busybox:1")));
    tenant.ready("web");
    // More than the tenant's storage, in the API; more than it says itself, on the node.
    let error = refused(&tenant, &snapshot("huge", "web", "11Gi"));
    assert!(
        error.contains("exceeded quota: storage, requested: requests.storage=11Gi"),
        "{error}"
    );
    tenant.create(&snapshot("small", "web", "1Mi"));
    let said = eventually("why it is refused", PATIENCE, || {
        let condition = read(&tenant, "small")["status"]["conditions"][0].clone();
        match condition["reason"] == "TooLarge" {
            true => Ok(condition["message"].to_string()),
            false => Err(condition.to_string()),
        }
    });
    assert!(said.contains("spec.sizeLimit: is 1048576 bytes"), "{said}");
    tenant.get(&["delete", "podsnapshot", "small", "--timeout=60s"]);
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few", "namespace": "acme"},
        "spec": {"hard": {"count/podsnapshots.hypernetes.io": "1"}}});
    let path = daemon.dir().join("quota.json");
    std::fs::write(&path, quota.to_string()).unwrap();
    run(&mut daemon.kubectl(&["create", "-f", &path.display().to_string()]));
    eventually("it is counted", PATIENCE, || {
        let quota = tenant.get(&["get", "quota", "few", "-o", "json"]);
        let quota: Value = serde_json::from_str(&quota).unwrap();
        let used = &quota["status"]["used"]["count/podsnapshots.hypernetes.io"];
        (used == "0").then_some(()).ok_or(used.to_string())
    });
    tenant.create(&snapshot("keep", "web", "1Gi"));
    wait_ready(&tenant, "keep");
    let error = refused(&tenant, &snapshot("more", "web", "1Gi"));
    assert!(error.contains("exceeded quota: few"), "{error}");
    assert_eq!(tenant.counts("web"), 1);
    assert_eq!(kept_files(&daemon).len(), 1);
    run(&mut daemon.kubectl(&["delete", "tenant", "acme", "--timeout=120s"]));
    nothing_is_kept(&daemon);
}

#[test]
fn a_daemon_that_is_killed_during_a_snapshot_takes_it_again() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.85.0.0/24");
    {
        let tenant = Tenant {
            daemon: &daemon,
            kubeconfig: &acme,
        };
        tenant.create(&counting("web", &registry.image("busybox:1")));
        tenant.ready("web");
        tenant.counts("web");
        tenant.create(&snapshot("keep", "web", "1Gi"));
        eventually("the copy has begun", PATIENCE, || begun(&daemon, 0));
    }
    daemon.kill();
    daemon.start_again();
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: &acme,
    };
    wait_ready(&tenant, "keep");
    assert_eq!(kept_files(&daemon).len(), 1);
    assert_eq!(tenant.counts("web"), 1);
    go_on(&tenant, "keep", "copy", |_| {});
    tenant.ready("copy");
    assert!(tenant.counts("copy") > 1);

    // The power fails during another, of a pod that outlives it.
    tenant.get(&["annotate", "pod", "web", "hypernetes.io/suspended=true"]);
    let is_suspended =
        r#"--for=jsonpath={.status.conditions[?(@.type=="hypernetes.io/Suspended")].status}=True"#;
    tenant.get(&["wait", is_suspended, "pod/web", "--timeout=120s"]);
    tenant.create(&snapshot("later", "web", "1Gi"));
    eventually("the copy has begun", PATIENCE, || begun(&daemon, 1));
    daemon.lose_power();
    daemon.start_again();
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: &acme,
    };
    for (snapshot, pod) in [("keep", "one"), ("later", "two")] {
        wait_ready(&tenant, snapshot);
        go_on(&tenant, snapshot, pod, |_| {});
        tenant.ready(pod);
        assert!(tenant.counts(pod) > 1);
    }
    assert_eq!(kept_files(&daemon).len(), 2);
}

/// Whether a snapshot is being made beside so many. It may have been quicker than this look at it.
fn begun(daemon: &Daemon, kept: usize) -> Result<(), String> {
    let files = daemon.pod_files();
    let copying = |path: &PathBuf| path.iter().any(|part| part == "copies");
    let begun = files.iter().any(copying) || kept_files(daemon).len() > kept;
    begun.then_some(()).ok_or(format!("{files:?}"))
}

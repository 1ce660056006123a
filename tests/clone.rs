//! Pods that go on from others, by `hyper clone` and by kubectl, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

mod tenant;

use std::time::{SystemTime, UNIX_EPOCH};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, must_pass_as_tenant, run,
};
use serde_json::{Value, json};
use tenant::{PATIENCE, Tenant};

#[test]
fn containers_are_cloned_by_hyper() {
    if can_run_pods() {
        must_pass_as_tenant("clone", "10.93.0.0/24", 14);
    }
}

fn clone_pod(tenant: &Tenant<'_>, source: &str, name: &str, change: impl Fn(&mut Value)) {
    let spec = tenant.pod(source)["spec"].clone();
    tenant.clone_of(("hypernetes.io/clone-of", source), spec, name, change);
}

#[test]
fn a_clone_has_an_identity_of_its_own_and_its_source_is_unharmed() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.95.0.0/24");
    let program = "mkdir /tmp/www; echo served > /tmp/www/index.html; httpd -p 8080 -h /tmp/www; \
                   echo ffffffffffffffffffffffffffffffff > /etc/machine-id; \
                   i=0; while :; do i=$((i+1)); echo $i; echo $i > /data/count; sleep 0.1; done";
    let web = json!({
    "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"},
    "spec": {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "initContainers": [{"name": "init", "image": registry.image("busybox:1"),
            "command": ["sh", "-c", "echo made > /data/init"],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
        "containers": [{"name": "c", "image": registry.image("busybox:1"), "command": ["sh", "-c", program],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "info", "mountPath": "/info"}]}],
        "volumes": [{"name": "data", "emptyDir": {"sizeLimit": "8Mi"}},
            {"name": "info", "downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}],
    }});
    let first;
    let before;
    {
        let tenant = Tenant {
            daemon: &daemon,
            kubeconfig: &acme,
        };
        tenant.create(&web);
        tenant.ready("web");
        before = tenant.pod("web")["status"].clone();
        // What does not fit is said by name, and the source is not touched.
        clone_pod(&tenant, "web", "other", |spec| {
            spec["containers"][0]["command"][2] = json!("id");
        });
        let said = tenant.waiting("other");
        assert_eq!(
            said,
            "spec.containers[0].command[2]: must be as in pod web, which is cloned"
        );
        tenant.get(&["delete", "pod", "other", "--timeout=60s"]);
        clone_pod(&tenant, "web", "copy", |_| {});
        tenant.ready("copy");
        first = tenant.counts("copy");
        assert!(first > 1, "it did not begin anew");
        assert_eq!(tenant.counts("web"), 1);
    }
    let pods = ["web", "copy"];
    for round in 0..2 {
        if round == 1 {
            daemon.kill();
            daemon.start_again();
        }
        let tenant = Tenant {
            daemon: &daemon,
            kubeconfig: &acme,
        };
        for pod in pods {
            assert_eq!(
                tenant.exec(pod, "wget -qO- http://127.0.0.1:8080/"),
                "served"
            );
            assert_eq!(tenant.exec(pod, "cat /data/init"), "made");
        }
        assert_eq!((tenant.counts("web"), tenant.counts("copy")), (1, first));
        for what in [
            "hostname",
            "cat /etc/machine-id",
            "cat /sys/class/net/eth0/address",
            "ip -4 -o addr show eth0",
            "cat /etc/hosts",
            "cat /info/name",
            "cat /var/run/secrets/kubernetes.io/serviceaccount/token",
            "head -c 16 /dev/urandom | md5sum",
        ] {
            let [one, other] = pods.map(|pod| tenant.exec(pod, what));
            assert!(!one.is_empty() && one != other, "{what}: {one} and {other}");
        }
        assert_eq!(tenant.exec("copy", "cat /info/name"), "copy");
        assert_eq!(tenant.exec("copy", "hostname"), "copy");
        // It is reached at its own address, and reaches its source.
        let address = tenant.pod("copy")["status"]["podIP"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            tenant
                .exec("copy", "ip -4 -o addr show eth0")
                .contains(&address)
        );
        let fetch = format!("timeout 20 wget -qO- http://{address}:8080/");
        assert_eq!(tenant.exec("web", &fetch), "served");
        let earliest = unix_seconds();
        let guest: u64 = tenant.exec("copy", "date +%s").parse().unwrap();
        let right = earliest - 1..=unix_seconds() + 1;
        assert!(right.contains(&guest), "{guest} is not in {right:?}");
        for field in ["podIP", "startTime"] {
            assert_eq!(tenant.pod("web")["status"][field], before[field]);
        }
        let container = |status: &Value| status["containerStatuses"][0].clone();
        let now = container(&tenant.pod("web")["status"]);
        for field in ["containerID", "restartCount", "state"] {
            assert_eq!(now[field], container(&before)[field]);
        }
        let cloned = tenant.pod("copy")["status"].clone();
        assert_ne!(container(&cloned)["containerID"], now["containerID"]);
        assert_eq!(
            cloned["initContainerStatuses"][0]["state"]["terminated"]["exitCode"],
            0
        );
    }
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: &acme,
    };
    tenant.get(&["delete", "pod", "web", "--timeout=60s"]);
    assert_eq!(tenant.counts("copy"), first);
    tenant.get(&["delete", "pod", "copy", "--timeout=60s"]);
    eventually("nothing is left", PATIENCE, || {
        let left = daemon.pod_files();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
    assert_eq!(daemon.vmm_processes().len(), 0);
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

#[test]
fn a_daemon_that_is_killed_during_a_clone_makes_it_again() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.94.0.0/24");
    let program = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let image = registry.image("busybox:1");
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
    {
        let tenant = Tenant {
            daemon: &daemon,
            kubeconfig: &acme,
        };
        tenant.ready("web");
        tenant.counts("web");
        clone_pod(&tenant, "web", "copy", |_| {});
        let copying = || {
            let files = daemon.pod_files();
            let begun = files
                .iter()
                .any(|path| path.iter().any(|part| part == "copies"));
            // It may have been quicker than this look at it.
            let made = || tenant.pod("copy")["status"]["phase"] == "Running";
            (begun || made()).then_some(()).ok_or(format!("{files:?}"))
        };
        eventually("the copy has begun", PATIENCE, copying);
    }
    daemon.kill();
    daemon.start_again();
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: &acme,
    };
    tenant.ready("copy");
    assert_eq!(tenant.counts("web"), 1);
    assert!(tenant.counts("copy") > 1);
    tenant.get(&["delete", "pod", "web", "copy", "--timeout=60s"]);
    eventually("nothing is left", PATIENCE, || {
        let left = daemon.pod_files();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

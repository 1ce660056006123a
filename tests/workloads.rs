//! Workloads of a tenant with the real kubectl and real VMs: roll-outs, jobs, names that stay, budgets, quotas,
//! and the tokens that pods and people use.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of a test fail by panic"
)]

use std::{path::PathBuf, time::Duration};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

const LIMIT: Duration = Duration::from_secs(120);

struct Tenant<'a> {
    daemon: &'a Daemon,
    kubeconfig: PathBuf,
}

impl Tenant<'_> {
    fn k(&self, args: &[&str]) -> String {
        stdout(&mut self.daemon.kubectl_as(&self.kubeconfig, args))
    }

    /// What kubectl says of something that is refused.
    fn refused(&self, args: &[&str]) -> String {
        let output = self
            .daemon
            .kubectl_as(&self.kubeconfig, args)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{args:?}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn apply(&self, name: &str, manifest: &str) {
        let file = self.daemon.dir().join(name);
        std::fs::write(&file, manifest).unwrap();
        run(self
            .daemon
            .kubectl_as(&self.kubeconfig, &["apply", "-f"])
            .arg(&file));
    }

    fn rolled_out(&self, what: &str) {
        let said = self.k(&["rollout", "status", what, "--timeout=180s"]);
        assert!(
            said.contains("successfully rolled out") || said.contains("complete"),
            "{said}"
        );
    }

    fn gone(&self, what: &str) {
        eventually(what, LIMIT, || {
            let found = self.k(&["get", what, "-o", "name"]);
            if found.is_empty() { Ok(()) } else { Err(found) }
        });
    }
}

fn template(image: &str, app: &str) -> String {
    format!(
        "  selector: {{matchLabels: {{app: {app}}}}}\n  template:\n    metadata: {{labels: {{app: \
         {app}}}}}\n    spec:\n      terminationGracePeriodSeconds: 1\n      containers:\n      - name: \
         main\n        image: {image}\n        command: [sleep, infinity]\n"
    )
}

#[test]
fn workloads_of_a_tenant() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: daemon.tenant("acme", "10.97.0.0/24"),
    };
    let (first, second) = (registry.image("busybox:1"), registry.image("net:1"));
    deployment(&tenant, &first, &second);
    budget(&tenant);
    jobs(&tenant, &first);
    stateful_set(&tenant, &first);
    tokens(&tenant);
    quota(&tenant, &first);
}

fn deployment(tenant: &Tenant<'_>, first: &str, second: &str) {
    let manifest = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web}}\nspec:\n  replicas: 1\n{}",
        template(first, "web")
    );
    tenant.apply("web.yaml", &manifest);
    tenant.rolled_out("deployment/web");
    let table = tenant.k(&["get", "deployment", "web", "--no-headers"]);
    assert!(table.starts_with("web   1/1   1     1 "), "{table}");

    let image = "jsonpath={.items[*].spec.containers[0].image}";
    let images = || tenant.k(&["get", "pods", "-l", "app=web", "-o", image]);
    tenant.k(&["set", "image", "deployment/web", &format!("main={second}")]);
    tenant.rolled_out("deployment/web");
    eventually("the new image alone", LIMIT, || {
        let found = images();
        if found == second { Ok(()) } else { Err(found) }
    });
    let history = tenant.k(&["rollout", "history", "deployment/web"]);
    assert!(
        history.contains("\n1 ") && history.contains("\n2 "),
        "{history}"
    );
    tenant.k(&["rollout", "undo", "deployment/web"]);
    tenant.rolled_out("deployment/web");
    eventually("the old image alone", LIMIT, || {
        let found = images();
        if found == first { Ok(()) } else { Err(found) }
    });
    tenant.k(&["scale", "deployment/web", "--replicas=2"]);
    tenant.rolled_out("deployment/web");
}

/// A drain takes what the budget allows, and no more.
fn budget(tenant: &Tenant<'_>) {
    tenant.k(&[
        "create",
        "pdb",
        "web",
        "--selector=app=web",
        "--min-available=1",
    ]);
    eventually("the budget", LIMIT, || {
        let path = "jsonpath={.status.disruptionsAllowed}";
        let allowed = tenant.k(&["get", "pdb", "web", "-o", path]);
        if allowed == "1" { Ok(()) } else { Err(allowed) }
    });
    let node = stdout(&mut tenant.daemon.kubectl(&["get", "nodes", "-o", "name"]));
    let drain = [
        "drain",
        node.as_str(),
        "--pod-selector=app=web",
        "--timeout=12s",
    ];
    let output = tenant.daemon.kubectl(&drain).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("Cannot evict pod as it would violate the pod's disruption budget."),
        "{said}"
    );
    let ready = "jsonpath={.status.readyReplicas}";
    assert_eq!(tenant.k(&["get", "deployment", "web", "-o", ready]), "1");
    run(&mut tenant.daemon.kubectl(&["uncordon", &node]));
    tenant.rolled_out("deployment/web");
    tenant.k(&["delete", "pdb", "web"]);
    tenant.k(&["delete", "deployment", "web", "--cascade=foreground"]);
    tenant.gone("replicasets");
    tenant.gone("pods");
}

fn jobs(tenant: &Tenant<'_>, image: &str) {
    let image = format!("--image={image}");
    tenant.k(&["create", "job", "hello", &image, "--", "echo", "hi"]);
    let complete = ["wait", "--for=condition=Complete", "--timeout=120s"];
    let wait = |job: &str| tenant.k(&[&complete[..], &[job]].concat());
    wait("job/hello");
    assert_eq!(tenant.k(&["logs", "job/hello"]), "hi");
    let schedule = "--schedule=0 0 1 1 *";
    tenant.k(&[
        "create", "cronjob", "tick", &image, schedule, "--", "echo", "tock",
    ]);
    tenant.k(&["create", "job", "now", "--from=cronjob/tick"]);
    wait("job/now");
    assert_eq!(tenant.k(&["logs", "job/now"]), "tock");
    // What a cron job has made goes with it.
    tenant.k(&["delete", "cronjob", "tick"]);
    tenant.k(&["delete", "job", "hello"]);
    tenant.gone("jobs");
    tenant.gone("pods");
}

fn stateful_set(tenant: &Tenant<'_>, image: &str) {
    let manifest = format!(
        "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: db}}\nspec:\n  serviceName: db\n  \
         replicas: 2\n{}",
        template(image, "db")
    );
    tenant.apply("db.yaml", &manifest);
    tenant.rolled_out("statefulset/db");
    let pods = || tenant.k(&["get", "pods", "-o", "name"]);
    assert_eq!(pods(), "pod/db-0\npod/db-1");
    assert_eq!(tenant.k(&["exec", "db-1", "--", "hostname"]), "db-1");
    tenant.k(&["scale", "statefulset/db", "--replicas=1"]);
    eventually("the first alone", LIMIT, || {
        let found = pods();
        if found == "pod/db-0" {
            Ok(())
        } else {
            Err(found)
        }
    });
}

/// People and pods are the account whose token they have, and that account in its namespace only.
fn tokens(tenant: &Tenant<'_>) {
    let token = tenant.k(&["create", "token", "default", "--duration=15m"]);
    let own = std::fs::read_to_string(&tenant.kubeconfig).unwrap();
    let lines = own.lines().filter(|line| !line.contains("client-key-data"));
    let text: Vec<String> = lines
        .map(|line| {
            if line.contains("client-certificate-data") {
                format!("    token: {token}")
            } else {
                line.to_owned()
            }
        })
        .collect();
    let account = Tenant {
        daemon: tenant.daemon,
        kubeconfig: tenant.daemon.dir().join("account.kubeconfig"),
    };
    std::fs::write(&account.kubeconfig, text.join("\n")).unwrap();
    let who = account.k(&[
        "auth",
        "whoami",
        "-o",
        "jsonpath={.status.userInfo.username}",
    ]);
    assert_eq!(who, "system:serviceaccount:acme:default");
    let said = account.refused(&["get", "pods"]);
    assert!(
        said.contains("User \"system:serviceaccount:acme:default\" cannot list resource \"pods\""),
        "{said}"
    );
    tenant.k(&[
        "create",
        "rolebinding",
        "robot",
        "--clusterrole=hypernetes-tenant-view",
        "--serviceaccount=acme:default",
    ]);
    assert_eq!(account.k(&["get", "pods", "-o", "name"]), "pod/db-0");
    for elsewhere in [
        &["get", "pods", "-n", "kube-system"][..],
        &["get", "pods", "-A"],
        &["get", "nodes"],
    ] {
        let said = account.refused(elsewhere);
        assert!(said.contains("(Forbidden)"), "{said}");
    }
}

fn quota(tenant: &Tenant<'_>, image: &str) {
    run(&mut tenant
        .daemon
        .kubectl(&["create", "quota", "small", "-n", "acme", "--hard=pods=1"]));
    eventually("the count", LIMIT, || {
        let used = tenant.k(&[
            "get",
            "quota",
            "small",
            "-o",
            "jsonpath={.status.used.pods}",
        ]);
        if used == "1" { Ok(()) } else { Err(used) }
    });
    let image = format!("--image={image}");
    let said = tenant.refused(&["run", "more", &image, "--", "sleep", "9"]);
    assert_eq!(
        said.trim(),
        "Error from server (Forbidden): pods \"more\" is forbidden: exceeded quota: small, requested: \
         pods=1, used: pods=1, limited: pods=1"
    );
    let said = tenant.refused(&["delete", "quota", "small"]);
    assert!(
        said.contains("(Forbidden)"),
        "quotas are not the tenant's: {said}"
    );
    tenant.k(&["delete", "statefulset", "db"]);
    tenant.gone("pods");
    eventually("it is given back", LIMIT, || {
        let used = tenant.k(&[
            "get",
            "quota",
            "small",
            "-o",
            "jsonpath={.status.used.pods}",
        ]);
        if used == "0" { Ok(()) } else { Err(used) }
    });
}

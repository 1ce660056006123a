//! What one tenant can do to another: nothing, by API or by packet.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{fs, path::Path, process::Command, time::Duration};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

/// Every way to ask for something of `acme`, as kubectl arguments.
const ATTEMPTS: &[&[&str]] = &[
    &["get", "pods"],
    &["get", "pods", "-o", "wide"],
    &["get", "pods", "--watch"],
    &["get", "pods", "-l", "app=web"],
    &["get", "pods", "--field-selector", "metadata.name=web"],
    &["get", "pod", "web"],
    &["get", "pod", "web", "--watch"],
    &["get", "pod", "nothing"],
    &["get", "configmaps"],
    &["get", "configmap", "settings"],
    &["get", "secrets"],
    &["get", "secret", "token"],
    &["get", "serviceaccounts"],
    &["get", "events"],
    &["get", "roles"],
    &["get", "rolebindings"],
    &["get", "leases"],
    &["get", "networks"],
    &["get", "network", "default"],
    &["get", "tenant", "acme"],
    &["get", "tenants"],
    &["get", "namespace", "acme"],
    &["get", "namespaces"],
    &["get", "nodes"],
    &["get", "pods", "--all-namespaces"],
    &["get", "secrets", "--all-namespaces"],
    &["describe", "pod", "web"],
    &["logs", "web"],
    &["logs", "web", "--follow"],
    &["logs", "nothing"],
    &["exec", "web", "--", "true"],
    &["exec", "nothing", "--", "true"],
    &["attach", "web"],
    &["port-forward", "pod/web", "0:8080"],
    &["cp", "web:/etc/passwd", "/dev/null"],
    &["run", "intruder", "--image=busybox"],
    &["create", "configmap", "mine"],
    &["create", "secret", "generic", "mine"],
    &["create", "serviceaccount", "mine"],
    &[
        "create",
        "rolebinding",
        "mine",
        "--clusterrole=hypernetes-tenant-admin",
        "--user=me",
    ],
    &[
        "create",
        "clusterrolebinding",
        "mine",
        "--clusterrole=cluster-admin",
        "--user=me",
    ],
    &["create", "namespace", "acme2"],
    &["label", "pod", "web", "x=y"],
    &["annotate", "pod", "web", "x=y"],
    &[
        "patch",
        "pod",
        "web",
        "-p",
        "{\"metadata\":{\"labels\":{\"x\":\"y\"}}}",
    ],
    &[
        "patch",
        "pod",
        "web",
        "--subresource=status",
        "--type=merge",
        "-p",
        "{\"status\":{}}",
    ],
    &[
        "patch",
        "namespace",
        "acme",
        "-p",
        "{\"metadata\":{\"labels\":{\"hypernetes.io/tenant\":\"globex\"}}}",
    ],
    &[
        "patch",
        "tenant",
        "acme",
        "--type=merge",
        "-p",
        "{\"spec\":{\"displayName\":\"mine\"}}",
    ],
    &["delete", "pod", "web", "--wait=false"],
    &["delete", "pods", "--all", "--wait=false"],
    &["delete", "configmaps", "--all", "--wait=false"],
    &["delete", "network", "default", "--wait=false"],
    &["delete", "namespace", "acme", "--wait=false"],
    &["delete", "tenant", "acme", "--wait=false"],
    &["get", "--raw", "/api/v1/namespaces/acme/pods/web/log"],
    &[
        "get",
        "--raw",
        "/api/v1/namespaces/acme/pods/web/exec?command=id&stdout=true",
    ],
    &[
        "get",
        "--raw",
        "/api/v1/namespaces/acme/pods/web/attach?stdout=true",
    ],
    &[
        "get",
        "--raw",
        "/api/v1/namespaces/acme/pods/web/portforward",
    ],
    &["get", "--raw", "/api/v1/watch/namespaces/acme/pods"],
    &["get", "--raw", "/api/v1/pods"],
    &["get", "--raw", "/metrics"],
    &["get", "pods", "--as=system:admin"],
    &["get", "pods", "--as=me", "--as-group=system:masters"],
    &[
        "get",
        "pods",
        "--as=me",
        "--as-group=hypernetes:tenant:acme:admin",
    ],
];

fn ready(daemon: &Daemon, kubeconfig: &Path, pods: &[&str]) {
    let mut args = vec!["wait", "--for=condition=Ready", "--timeout=240s", "pod"];
    args.extend(pods);
    run(&mut daemon.kubectl_as(kubeconfig, &args));
}

fn pod_ip(daemon: &Daemon, kubeconfig: &Path, pod: &str) -> String {
    stdout(&mut daemon.kubectl_as(
        kubeconfig,
        &["get", "pod", pod, "-o", "jsonpath={.status.podIP}"],
    ))
}

#[test]
fn a_tenant_meets_nothing_of_another() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.99.0.0/24");
    let globex = daemon.tenant("globex", "10.99.0.0/24");
    let (web, busybox) = (registry.image("web:1"), registry.image("busybox:1"));
    for kubeconfig in [&acme, &globex] {
        let k = |args: &[&str]| run(&mut daemon.kubectl_as(kubeconfig, args));
        k(&["run", "web", "--image", &web, "--labels=app=web"]);
        ready(&daemon, kubeconfig, &["web"]);
        k(&["run", "box", "--image", &busybox, "--", "sleep", "infinity"]);
        k(&[
            "create",
            "configmap",
            "settings",
            "--from-literal=secret-word=acme-only",
        ]);
        k(&[
            "create",
            "secret",
            "generic",
            "token",
            "--from-literal=secret-word=acme-only",
        ]);
    }
    for kubeconfig in [&acme, &globex] {
        ready(&daemon, kubeconfig, &["box"]);
    }
    run(&mut daemon.kubectl_as(&acme, &["run", "only", "--image", &web]));
    ready(&daemon, &acme, &["only"]);

    // The API: every attempt is forbidden, and says nothing of what is there.
    let before = stdout(&mut daemon.kubectl_as(
        &acme,
        &["get", "pods,configmaps,secrets,networks", "-o", "yaml"],
    ));
    let mut wrong = Vec::new();
    for attempt in ATTEMPTS {
        let namespaced = !attempt.contains(&"--raw") && !attempt.contains(&"--all-namespaces");
        let mut args = vec!["--request-timeout=10s"];
        if namespaced {
            args.extend(["-n", "acme"]);
        }
        args.extend(*attempt);
        let output = Command::new("timeout")
            .arg("20")
            .arg(daemon.kubectl(&[]).get_program())
            .arg("--kubeconfig")
            .arg(&globex)
            .args(&args)
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let forbidden = text.to_lowercase().contains("forbidden");
        let leaks = text.contains("acme-only") || text.contains("10.99.0.");
        if output.status.success() || !forbidden || leaks {
            wrong.push(format!(
                "kubectl {}: {}\n{text}",
                args.join(" "),
                output.status
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        ATTEMPTS.len(),
        wrong.join("\n")
    );
    println!(
        "{} attempts of a foreign tenant, all forbidden",
        ATTEMPTS.len()
    );
    let after = stdout(&mut daemon.kubectl_as(
        &acme,
        &["get", "pods,configmaps,secrets,networks", "-o", "yaml"],
    ));
    assert_eq!(before, after, "nothing of acme has changed");

    // Packets: both tenants use the same addresses at the same time; none crosses.
    assert_eq!(
        pod_ip(&daemon, &acme, "web"),
        pod_ip(&daemon, &globex, "web")
    );
    let only = pod_ip(&daemon, &acme, "only");
    let fetch = format!("timeout 5 wget -qO- http://{only}:8080/");
    eventually("acme reaches its own pod", Duration::from_secs(30), || {
        let got = daemon
            .kubectl_as(&acme, &["exec", "box", "--", "sh", "-c", &fetch])
            .output()
            .unwrap();
        if got.status.success() {
            Ok(())
        } else {
            Err(format!("{got:?}"))
        }
    });
    let foreign = daemon
        .kubectl_as(&globex, &["exec", "box", "--", "sh", "-c", &fetch])
        .output()
        .unwrap();
    assert!(!foreign.status.success(), "globex reached {only} of acme");
    let scan = "for i in $(seq 1 30); do ping -c1 -W1 10.99.0.$i >/dev/null 2>&1 && echo 10.99.0.$i; done; true";
    let seen = stdout(&mut daemon.kubectl_as(&globex, &["exec", "box", "--", "sh", "-c", scan]));
    let mut expected: Vec<String> = ["web", "box"]
        .iter()
        .map(|pod| pod_ip(&daemon, &globex, pod))
        .collect();
    expected.push("10.99.0.1".to_owned());
    for address in seen.lines() {
        assert!(
            expected.iter().any(|own| own == address),
            "globex sees {address}: {seen}"
        );
    }

    // The node's own API and the cloud metadata address are out of reach of pods.
    let port = stdout(&mut daemon.kubectl_as(
        &acme,
        &[
            "config",
            "view",
            "-o",
            "jsonpath={.clusters[0].cluster.server}",
        ],
    ));
    let port = port.rsplit(':').next().unwrap();
    for target in [
        format!("127.0.0.1 {port}"),
        format!("10.99.0.1 {port}"),
        "169.254.169.254 80".to_owned(),
    ] {
        let probe = format!("nc -w 3 {target} < /dev/null");
        let output = daemon
            .kubectl_as(&acme, &["exec", "box", "--", "sh", "-c", &probe])
            .output()
            .unwrap();
        assert!(!output.status.success(), "a pod reached {target}");
    }

    // Guests that lie about their address: acme's pod claims globex's and others' sources.
    let spoof = "ip addr add 10.99.0.77/32 dev eth0 2>&1; ping -I 10.99.0.77 -c 2 -W 1 10.99.0.1 >/dev/null 2>&1 && echo passed; true";
    let spoofed = stdout(&mut daemon.kubectl_as(&acme, &["exec", "box", "--", "sh", "-c", spoof]));
    assert!(
        !spoofed.contains("passed"),
        "a spoofed source address was answered"
    );
}

#[test]
fn a_tenant_cannot_leave_its_vm_or_its_role() {
    if !can_run_pods() {
        return;
    }
    let daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.98.0.0/24");
    daemon.tenant("globex", "10.98.0.0/24");
    let pod =
        |spec: &str| format!("{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {spec}}}");
    let container = "containers: [{name: a, image: busybox";
    let refused = [
        ("hostNetwork", pod(&format!("{{hostNetwork: true, {container}}}]}}"))),
        ("hostPID", pod(&format!("{{hostPID: true, {container}}}]}}"))),
        ("hostIPC", pod(&format!("{{hostIPC: true, {container}}}]}}"))),
        ("hostPath", pod(&format!("{{volumes: [{{name: h, hostPath: {{path: /}}}}], {container}}}]}}"))),
        ("hostPort", pod(&format!("{{{container}, ports: [{{containerPort: 80, hostPort: 80}}]}}]}}"))),
        ("nodeName", pod(&format!("{{nodeName: node, {container}}}]}}"))),
        ("privileged", pod(&format!("{{{container}, securityContext: {{privileged: true}}}}]}}"))),
        ("runtimeClassName", pod(&format!("{{runtimeClassName: runc, {container}}}]}}"))),
        ("livenessProbe", pod(&format!("{{{container}, livenessProbe: {{tcpSocket: {{port: 1, host: 127.0.0.1}}}}}}]}}"))),
        ("roleRef", "{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: r}, roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}, subjects: [{kind: User, name: me, apiGroup: rbac.authorization.k8s.io}]}".to_owned()),
    ];
    for (field, manifest) in refused {
        let file = daemon.dir().join("refused.yaml");
        fs::write(&file, &manifest).unwrap();
        let output = daemon
            .kubectl_as(&acme, &["create", "-f"])
            .arg(&file)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{field} was accepted");
        assert!(
            text.contains(field) && text.len() > 40,
            "{field} is not named: {text}"
        );
    }
    // The tenant's own administrator may not take the label off, nor name another tenant.
    for patch in [
        r#"{"metadata":{"labels":{"hypernetes.io/tenant":null}}}"#,
        r#"{"metadata":{"labels":{"hypernetes.io/tenant":"globex"}}}"#,
    ] {
        let output = daemon
            .kubectl_as(
                &acme,
                &["patch", "namespace", "acme", "--type=merge", "-p", patch],
            )
            .output()
            .unwrap();
        assert!(!output.status.success(), "the tenant label was changed");
    }
    // Deleting a tenant takes everything with it, and only its own.
    run(&mut daemon.kubectl_as(&acme, &["create", "configmap", "x"]));
    run(&mut daemon.hypernetes(&["tenant", "delete", "acme"]));
    eventually("acme is gone", Duration::from_secs(60), || {
        let names = stdout(&mut daemon.kubectl(&["get", "namespaces,tenants", "-o", "name"]));
        if names.contains("acme") {
            Err(names)
        } else {
            Ok(())
        }
    });
    assert!(stdout(&mut daemon.kubectl(&["get", "tenants", "-o", "name"])).contains("globex"));
}

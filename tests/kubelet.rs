//! One pod that does what pods do under a kubelet: probes, hooks, a sidecar, projected volumes, a container to
//! debug it, resizes in place, and what it uses. With the real kubectl and a real VM.
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
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

const LIMIT: Duration = Duration::from_secs(120);

/// The sidecar answers only when the main container asks it, and says when it ends, as the main container does.
const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: app, labels: {tier: first}}
spec:
  terminationGracePeriodSeconds: 20
  readinessGates: [{conditionType: hypernetes.io/checked}]
  initContainers:
  - name: proxy
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "trap 'echo proxy-ends; exit 0' TERM; while :; do sleep 1 & wait $!; done"]
    startupProbe: {exec: {command: [/bin/true]}, periodSeconds: 1}
  - name: prepare
    image: IMAGE
    command: [sh, -c, "echo prepared > /srv/made"]
    volumeMounts: [{name: srv, mountPath: /srv}]
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "trap 'echo main-ends; exit 0' TERM; touch /tmp/alive; httpd -p 8080 -h /srv; while :; do sleep 1 & wait $!; done"]
    ports: [{name: web, containerPort: 8080}]
    resources: {limits: {memory: 64Mi, cpu: 500m}}
    readinessProbe: {httpGet: {port: web, path: /ready}, periodSeconds: 1, failureThreshold: 1}
    livenessProbe: {exec: {command: [test, -e, /tmp/alive]}, initialDelaySeconds: 2, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 1}
    lifecycle:
      postStart: {exec: {command: [sh, -c, "echo hello > /srv/greeting"]}}
      preStop: {exec: {command: [sh, -c, "echo preStop > /proc/1/fd/1"]}}
    volumeMounts:
    - {name: srv, mountPath: /srv}
    - {name: all, mountPath: /all, readOnly: true}
  volumes:
  - {name: srv, emptyDir: {}}
  - name: all
    projected:
      defaultMode: 0440
      sources:
      - configMap: {name: settings, items: [{key: colour, path: conf/colour}]}
      - secret: {name: token, optional: true}
      - downwardAPI:
          items:
          - {path: labels, fieldRef: {fieldPath: metadata.labels}}
          - {path: memory, resourceFieldRef: {containerName: main, resource: limits.memory, divisor: 1Mi}}
"#;

/// What a pod may be and do: users of its own, a filter of the node's, one size for all of it. The other one
/// must not run as root, and would.
const STRICT: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: strict}
spec:
  hostUsers: false
  resources: {limits: {memory: 160Mi, cpu: 1}}
  terminationGracePeriodSeconds: 0
  containers:
  - name: a
    image: IMAGE
    command: [sleep, infinity]
    securityContext:
      procMount: Unmasked
      seccompProfile: {type: Localhost, localhostProfile: no-mkdir.json}
---
apiVersion: v1
kind: Pod
metadata: {name: rootless}
spec:
  securityContext: {runAsNonRoot: true}
  terminationGracePeriodSeconds: 0
  containers: [{name: a, image: IMAGE, command: [sleep, infinity]}]
"#;

const NO_MKDIR: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#;

struct Tenant<'a> {
    daemon: &'a Daemon,
    kubeconfig: PathBuf,
}

impl Tenant<'_> {
    fn k(&self, args: &[&str]) -> String {
        stdout(&mut self.daemon.kubectl_as(&self.kubeconfig, args))
    }

    fn create(&self, file: &Path) {
        run(self
            .daemon
            .kubectl_as(&self.kubeconfig, &["create", "-f"])
            .arg(file));
    }

    /// A field of the pod.
    fn field(&self, path: &str) -> String {
        self.k(&["get", "pod", "app", "-o", &format!("jsonpath={{{path}}}")])
    }

    fn until(&self, path: &str, wanted: &str) {
        eventually(path, LIMIT, || {
            let found = self.field(path);
            if found == wanted {
                return Ok(());
            }
            Err(format!(
                "{found:?} instead of {wanted:?}\n{}",
                self.k(&["describe", "pod", "app"])
            ))
        });
    }

    fn exec(&self, command: &[&str]) -> String {
        let mut args = vec!["exec", "app", "-c", "main", "--"];
        args.extend(command);
        self.k(&args)
    }

    fn resize(&self, memory: &str) {
        let patch = format!(
            r#"{{"spec":{{"containers":[{{"name":"main","resources":{{"limits":{{"memory":"{memory}"}},"requests":{{"memory":"{memory}"}}}}}}]}}}}"#
        );
        self.k(&[
            "patch",
            "pod",
            "app",
            "--subresource",
            "resize",
            "--patch",
            &patch,
        ]);
    }

    /// Follows the log of a container until it ends.
    fn follow(&self, container: &str) -> Child {
        self.daemon
            .kubectl_as(
                &self.kubeconfig,
                &["logs", "-f", "--timestamps", "app", "-c", container],
            )
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// The pods that ask for security.
fn strict(tenant: &Tenant<'_>) {
    tenant.k(&[
        "wait",
        "--for=condition=Ready",
        "pod/strict",
        "--timeout=120s",
    ]);
    let script =
        "cat /proc/self/uid_map /sys/fs/cgroup/memory.max; nproc; mkdir /tmp/x 2>&1 || true";
    let seen = tenant.k(&["exec", "strict", "--", "sh", "-c", script]);
    let mut lines = seen.lines();
    let map = lines.next().unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(map, ["0", "65536", "65536"]);
    assert_eq!(lines.next(), Some("167772160"));
    assert_eq!(lines.next(), Some("1"));
    assert!(seen.contains("Permission denied"), "{seen}");
    assert_eq!(
        tenant.k(&["get", "pod", "strict", "-o", "jsonpath={.status.qosClass}"]),
        "Guaranteed"
    );
    let path = "jsonpath={.status.containerStatuses[0].state.waiting}";
    let waiting = eventually("a refusal", LIMIT, || {
        let waiting = tenant.k(&["get", "pod", "rootless", "-o", path]);
        let refused = waiting.contains("CreateContainerConfigError");
        if refused { Ok(waiting) } else { Err(waiting) }
    });
    let said = "container has runAsNonRoot and image will run as root (pod: ";
    assert!(waiting.contains(said), "{waiting}");
}

/// When a line was written, by the log's own clock.
fn time_of(log: &str, text: &str) -> String {
    let line = log.lines().find(|line| line.ends_with(text));
    let line = line.unwrap_or_else(|| panic!("no {text:?} in {log:?}"));
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_pod_behaves_as_under_a_kubelet() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let profiles = tempfile::tempdir().unwrap();
    std::fs::write(profiles.path().join("no-mkdir.json"), NO_MKDIR).unwrap();
    let daemon = Daemon::start(DaemonOptions {
        args: vec!["--seccomp-profiles".into(), profiles.path().into()],
        ..DaemonOptions::default()
    });
    let tenant = Tenant {
        daemon: &daemon,
        kubeconfig: daemon.tenant("acme", "10.89.0.0/24"),
    };
    let image = registry.image("busybox:1");
    tenant.k(&[
        "create",
        "configmap",
        "settings",
        "--from-literal=colour=blue",
    ]);
    let file = daemon.dir().join("app.yaml");
    std::fs::write(&file, POD.replace("IMAGE", &image)).unwrap();
    tenant.create(&file);

    let file = daemon.dir().join("strict.yaml");
    std::fs::write(&file, STRICT.replace("IMAGE", &image)).unwrap();
    tenant.create(&file);

    // Readiness is the probe's and the gate's to say.
    tenant.until(".status.phase", "Running");
    let ready = ".status.containerStatuses[0].ready";
    assert_eq!(tenant.field(ready), "false");
    let condition = |name: &str| format!(".status.conditions[?(@.type==\"{name}\")].status");
    assert_eq!(tenant.field(&condition("Initialized")), "True");
    assert_eq!(
        tenant.exec(&["cat", "/srv/made", "/srv/greeting"]),
        "prepared\nhello"
    );
    let unhealthy = "Readiness probe failed: HTTP probe failed with statuscode: 404";
    eventually("the event", LIMIT, || {
        let events = tenant.k(&["get", "events", "--field-selector", "reason=Unhealthy"]);
        if events.contains(unhealthy) {
            Ok(())
        } else {
            Err(events)
        }
    });
    tenant.exec(&["touch", "/srv/ready"]);
    tenant.until(ready, "true");
    tenant.until(&condition("ContainersReady"), "True");
    assert_eq!(
        tenant.field(&condition("Ready")),
        "False",
        "the gate is closed"
    );
    let gate = r#"{"status":{"conditions":[{"type":"hypernetes.io/checked","status":"True"}]}}"#;
    run(&mut daemon.kubectl(&[
        "patch",
        "pod",
        "app",
        "-n",
        "acme",
        "--subresource",
        "status",
        "--patch",
        gate,
    ]));
    tenant.until(&condition("Ready"), "True");
    assert_eq!(
        tenant.field(".status.initContainerStatuses[0].ready"),
        "true"
    );

    // The pod has the token of its service account, and who it may trust.
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let identity = tenant.exec(&[
        "sh",
        "-c",
        &format!("cd {account}; cat namespace ca.crt token"),
    ]);
    assert!(
        identity.starts_with("acme-----BEGIN CERTIFICATE"),
        "{identity}"
    );
    let token = identity.lines().last().unwrap();
    assert_eq!(token.split('.').count(), 3, "{token}");

    // Projected volumes follow their sources.
    let content = ["cat", "/all/conf/colour", "/all/labels", "/all/memory"];
    assert_eq!(tenant.exec(&content), "bluetier=\"first\"64");
    let mode = tenant.exec(&["stat", "-L", "-c", "%a", "/all/conf/colour"]);
    assert_eq!(mode, "440");
    tenant.k(&[
        "patch",
        "configmap",
        "settings",
        "--patch",
        r#"{"data":{"colour":"red"}}"#,
    ]);
    tenant.k(&[
        "create",
        "secret",
        "generic",
        "token",
        "--from-literal=password=x",
    ]);
    eventually("the new content", LIMIT, || {
        let found = tenant.exec(&["sh", "-c", "cat /all/conf/colour; ls /all"]);
        let done = found.starts_with("red") && found.contains("password");
        if done { Ok(()) } else { Err(found) }
    });

    // Somebody looks into the main container from one of their own.
    let seen = tenant.k(&[
        "debug",
        "app",
        "--image",
        &image,
        "--target",
        "main",
        "--container",
        "debugger",
        "-i",
        "--quiet",
        "--",
        "sh",
        "-c",
        "tr '\\0' ' ' < /proc/1/cmdline; sleep 2",
    ]);
    assert!(seen.contains("main-ends"), "{seen}");

    // Larger and smaller, without a restart.
    let uid = tenant.field(".metadata.uid");
    let given = ".status.containerStatuses[0].resources.limits.memory";
    for (memory, bytes) in [("640Mi", "671088640"), ("96Mi", "100663296")] {
        tenant.resize(memory);
        tenant.until(given, memory);
        assert_eq!(tenant.exec(&["cat", "/sys/fs/cgroup/memory.max"]), bytes);
    }
    tenant.resize("900Gi");
    tenant.until(
        ".status.conditions[?(@.type==\"PodResizePending\")].reason",
        "Infeasible",
    );
    tenant.resize("96Mi");
    assert_eq!(tenant.field(".metadata.uid"), uid);
    assert_eq!(
        tenant.field(".status.containerStatuses[0].restartCount"),
        "0"
    );

    // What it uses.
    let top = eventually("figures", LIMIT, || {
        let mut command = daemon.kubectl_as(
            &tenant.kubeconfig,
            &[
                "top",
                "pod",
                "--containers",
                "--no-headers",
                "-l",
                "tier=first",
            ],
        );
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let both = text.contains("proxy") && text.contains("main");
        if both {
            Ok(text)
        } else {
            Err(format!("{text}{output:?}"))
        }
    });
    assert!(
        top.lines()
            .all(|line| line.contains('m') && line.contains("Mi")),
        "{top}"
    );
    let nodes = stdout(&mut daemon.kubectl(&["top", "node", "--no-headers"]));
    assert!(nodes.starts_with("node "), "{nodes}");

    // A container that is not alive is started anew.
    tenant.exec(&["rm", "/tmp/alive"]);
    tenant.until(".status.containerStatuses[0].restartCount", "1");
    tenant.until(ready, "true");
    let events = tenant.k(&["get", "events", "--field-selector", "reason=Killing"]);
    assert!(
        events.contains("Container main failed liveness probe, will be restarted"),
        "{events}"
    );

    strict(&tenant);

    // preStop, then the main container, then the sidecar.
    let (main, proxy) = (tenant.follow("main"), tenant.follow("proxy"));
    tenant.k(&["delete", "pod", "app", "--wait"]);
    let text = |child: Child| {
        let output = child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (main, proxy) = (text(main), text(proxy));
    let (hook, ended) = (time_of(&main, "preStop"), time_of(&main, "main-ends"));
    assert!(hook < ended, "{main}");
    assert!(ended < time_of(&proxy, "proxy-ends"), "{main}{proxy}");
}

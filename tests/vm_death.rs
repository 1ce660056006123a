//! A VM that dies fails its pod, with a reason, within five seconds.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::time::{Duration, Instant};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, run, stdout};

fn failed_with(daemon: &Daemon, kubeconfig: &std::path::Path, pod: &str, since: Instant) -> String {
    let look = || {
        stdout(&mut daemon.kubectl_as(kubeconfig, &[
            "get", "pod", pod, "-o",
            "jsonpath={.status.phase} {.status.reason} {.status.containerStatuses[0].state.terminated.reason} {.status.containerStatuses[0].state.terminated.message}",
        ]))
    };
    loop {
        let status = look();
        if status.starts_with("Failed") {
            return status;
        }
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "{pod} after 5 s: {status}"
        );
    }
}

#[test]
fn a_killed_vmm_and_a_panicked_kernel_fail_their_pods() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.95.0.0/24");
    let k = |args: &[&str]| run(&mut daemon.kubectl_as(&acme, args));
    let image = registry.image("busybox:1");
    k(&[
        "run",
        "killed",
        "--image",
        &image,
        "--restart=Never",
        "--",
        "sleep",
        "infinity",
    ]);
    k(&[
        "wait",
        "--for=condition=Ready",
        "pod/killed",
        "--timeout=240s",
    ]);
    let killed = daemon.vmm_processes();
    assert_eq!(killed.len(), 1);
    k(&[
        "run",
        "healthy",
        "--image",
        &image,
        "--restart=Never",
        "--",
        "sleep",
        "infinity",
    ]);
    k(&[
        "wait",
        "--for=condition=Ready",
        "pod/healthy",
        "--timeout=240s",
    ]);

    let since = Instant::now();
    let pid = rustix::process::Pid::from_raw(i32::try_from(killed[0]).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let status = failed_with(&daemon, &acme, "killed", since);
    assert!(status.contains("VmmDied"), "{status}");

    let healthy = stdout(&mut daemon.kubectl_as(&acme, &["exec", "healthy", "--", "echo", "well"]));
    assert_eq!(healthy, "well", "a neighbour is not touched");

    // A guest kernel that panics: asked for by the operator, as tenants may not be privileged.
    let admin = daemon.admin_kubeconfig();
    let pod = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: panics, namespace: default}}, \
         spec: {{restartPolicy: Never, containers: [{{name: a, image: '{image}', \
         securityContext: {{privileged: true}}, command: [sleep, infinity]}}]}}}}"
    );
    let file = daemon.dir().join("panics.yaml");
    std::fs::write(&file, pod).unwrap();
    run(daemon.kubectl(&["create", "-f"]).arg(&file));
    run(&mut daemon.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod/panics",
        "--timeout=240s",
    ]));
    let since = Instant::now();
    let trigger = [
        "exec",
        "panics",
        "--",
        "sh",
        "-c",
        "echo c > /proc/sysrq-trigger",
    ];
    // The exec dies with the guest: its outcome says nothing.
    drop(daemon.kubectl(&trigger).output().unwrap());
    let status = failed_with(&daemon, &admin, "panics", since);
    assert!(status.contains("KernelPanic"), "{status}");
}

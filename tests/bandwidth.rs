//! Limits of a pod's traffic, as its tenant asks for them, with real pods at both ends.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is one module"
)]

use std::{fs, path::Path, time::Duration};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

/// Bits per second, far less than an emulated guest can.
const LIMIT: f64 = 10_000_000.0;
/// Sends to whoever connects.
const SERVE: &str = "while true; do nc -l -p 9000 </dev/zero >/dev/null; done";

fn pod(name: &str, image: &str, annotations: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, annotations: {{{annotations}}}}}, spec: {{\
         terminationGracePeriodSeconds: 1, containers: [{{name: main, image: '{image}', \
         command: [sh, -c, '{SERVE}']}}]}}}}"
    )
}

struct Tenant<'a> {
    daemon: &'a Daemon,
    kubeconfig: &'a Path,
}

impl Tenant<'_> {
    fn create(&self, manifest: &str) -> Result<(), String> {
        let file = self.daemon.dir().join("pod.yaml");
        fs::write(&file, manifest).unwrap();
        let mut create = self.daemon.kubectl_as(self.kubeconfig, &["create", "-f"]);
        let output = create.arg(&file).output().unwrap();
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    fn address(&self, pod: &str) -> String {
        let args = ["get", "pod", pod, "-o", "jsonpath={.status.podIP}"];
        stdout(&mut self.daemon.kubectl_as(self.kubeconfig, &args))
    }

    /// What comes to pod `to` of all that `from` sends, in bits per second, without what a limit lets
    /// through at first. `nc` ends with its input, so that is a pipe that does not end.
    fn rate(&self, from: &str, to: &str) -> f64 {
        let (skipped, counted) = (500_000, 2_500_000);
        let pull = format!(
            "[ -p /hold ] || mkfifo /hold; nc {} 9000 0<>/hold | {{ head -c {skipped} >/dev/null; read begin x </proc/uptime; \
             head -c {counted} | wc -c; read end x </proc/uptime; echo $begin $end; }}",
            self.address(from)
        );
        eventually(&pull, Duration::from_secs(120), || {
            let args = ["exec", to, "--", "sh", "-c", &pull];
            let output = self.daemon.kubectl_as(self.kubeconfig, &args).output();
            let text = String::from_utf8(output.unwrap().stdout).unwrap();
            let words: Vec<f64> = text
                .split_whitespace()
                .map(|word| word.parse().unwrap())
                .collect();
            match words.as_slice() {
                [all, begin, end] if *all == f64::from(counted) => {
                    Ok(f64::from(counted) * 8.0 / (end - begin))
                }
                _ => Err(text),
            }
        })
    }

    /// A busy machine sends less than it may, never more. Headers are counted too: 4 in 100.
    fn assert_limited(&self, from: &str, to: &str) {
        let rate = self.rate(from, to);
        let of_limit = rate / LIMIT;
        assert!(
            (0.75..1.1).contains(&of_limit),
            "from {from} to {to}: {rate} bits per second"
        );
    }
}

#[test]
fn a_pod_receives_and_sends_as_much_as_it_says() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.67.0.0/24");
    let image = registry.image("busybox:1");
    let acme = Tenant {
        daemon: &daemon,
        kubeconfig: &kubeconfig,
    };
    let refused = acme
        .create(&pod(
            "tiny",
            &image,
            "kubernetes.io/egress-bandwidth: '100'",
        ))
        .unwrap_err();
    assert!(
        refused.contains("metadata.annotations[kubernetes.io/egress-bandwidth]")
            && refused.contains("unreasonably small"),
        "{refused}"
    );
    let both = "kubernetes.io/ingress-bandwidth: 10M, kubernetes.io/egress-bandwidth: 10M";
    acme.create(&pod("slow", &image, both)).unwrap();
    acme.create(&pod("fast", &image, "")).unwrap();
    let ready = [
        "wait",
        "--for=condition=Ready",
        "pod/slow",
        "pod/fast",
        "--timeout=240s",
    ];
    run(&mut daemon.kubectl_as(&kubeconfig, &ready));
    acme.assert_limited("slow", "fast");
    acme.assert_limited("fast", "slow");

    // The limits are the kernel's: they stay when the daemon is killed, and after it is back.
    daemon.kill();
    daemon.start_again();
    let acme = Tenant {
        daemon: &daemon,
        kubeconfig: &kubeconfig,
    };
    acme.assert_limited("slow", "fast");
    acme.assert_limited("fast", "slow");

    run(&mut daemon.hypernetes(&["tenant", "delete", "acme"]));
    eventually("nothing is left", Duration::from_secs(60), || {
        let picture = daemon.host_picture();
        picture
            .is_clean()
            .then_some(())
            .ok_or(format!("{picture:?}"))
    });
}

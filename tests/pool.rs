//! Pods that find a VM waiting for them.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{collections::BTreeSet, fs, time::Duration};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

const POOL: usize = 2;
/// What pods of one template must not have in common, one line each.
const IDENTITY: &str = "head -c 16 /dev/urandom | od -An -tx1; cat /sys/class/net/eth0/address; \
    hostname; exec sleep infinity";

fn vmms(daemon: &Daemon) -> BTreeSet<u32> {
    daemon.vmm_processes().into_iter().collect()
}

fn await_vmms(daemon: &Daemon, what: &str, count: usize) -> BTreeSet<u32> {
    eventually(what, Duration::from_secs(120), || {
        let found = vmms(daemon);
        match found.len() == count {
            true => Ok(found),
            false => Err(format!("{found:?}")),
        }
    })
}

/// The VMM is counted to a pod.
fn is_charged(pid: u32) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().any(|line| line.contains("/hypernetes-"))
}

/// Starts of VMs that the log tells of, by whether they came from the pool.
fn starts(daemon: &Daemon, from_pool: bool) -> usize {
    let word = format!("from_pool={from_pool}");
    let log = daemon.log_text();
    let ready = log.lines().filter(|line| line.contains("sandbox is ready"));
    ready.filter(|line| line.contains(&word)).count()
}

#[test]
fn pods_come_from_the_pool_which_is_refilled_and_leaves_nothing() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions {
        args: vec!["--pool".into(), POOL.to_string().into()],
        ..DaemonOptions::default()
    });
    let acme = daemon.tenant("acme", "10.66.0.0/24");
    let image = registry.image("busybox:1");
    run(&mut daemon.hypernetes(&["image", "pull", "-q", &image]));
    daemon.wait_template();
    let mut waiting = await_vmms(&daemon, "the pool is full", POOL);
    assert!(!waiting.iter().any(|pid| is_charged(*pid)), "nobody's");

    let (mut pods, mut seen) = (BTreeSet::new(), vec![BTreeSet::new(); 3]);
    for (at, name) in ["one", "two", "three"].into_iter().enumerate() {
        let args = ["run", name, "--image", &image, "--", "sh", "-c", IDENTITY];
        run(&mut daemon.kubectl_as(&acme, &args));
        let pod = format!("pod/{name}");
        let wait = ["wait", "--for=condition=Ready", &pod, "--timeout=240s"];
        run(&mut daemon.kubectl_as(&acme, &wait));
        assert_eq!((starts(&daemon, true), starts(&daemon, false)), (at + 1, 0));
        // The pool has its number of VMs again, one of those from before being the pod's.
        let all = await_vmms(&daemon, "the pool is refilled", POOL + at + 1);
        pods = all.iter().copied().filter(|pid| is_charged(*pid)).collect();
        assert_eq!(pods.len(), at + 1, "each VM is counted to its pod");
        assert_eq!(pods.intersection(&waiting).count(), 1, "it waited before");
        waiting = all.difference(&pods).copied().collect();

        let log = eventually("the pod's identity", Duration::from_secs(60), || {
            let log = stdout(&mut daemon.kubectl_as(&acme, &["logs", name]));
            match log.lines().count() {
                3.. => Ok(log),
                _ => Err(log),
            }
        });
        for (set, line) in seen.iter_mut().zip(log.lines()) {
            assert!(set.insert(line.to_owned()), "{name} repeats {line}");
        }
        assert_eq!(log.lines().nth(2), Some(name));
    }
    assert!(!seen[1].contains("02:00:00:00:00:00"), "the template's own");

    // The operator's Prometheus sees it, as of any node.
    let metrics = ["get", "--raw", "/api/v1/nodes/node/proxy/metrics"];
    eventually("the pool's metrics", Duration::from_secs(60), || {
        let text = stdout(&mut daemon.kubectl(&metrics));
        let has = |metric| text.contains(&format!("\nhypernetes_node_{metric}\n"));
        let metrics = ["pool_vms 2", "pool_hits_total 3", "pool_misses_total 0"];
        let all = metrics.into_iter().all(has);
        all.then_some(()).ok_or(text)
    });

    // Taps that were moved carry packets.
    let address = ["get", "pod", "one", "-o", "jsonpath={.status.podIP}"];
    let address = stdout(&mut daemon.kubectl_as(&acme, &address));
    let ping = ["exec", "two", "--", "ping", "-c", "1", "-W", "30", &address];
    run(&mut daemon.kubectl_as(&acme, &ping));
    // What the rehearsal mounted and made is gone.
    let mounts = [
        "exec",
        "one",
        "--",
        "cat",
        "/proc/mounts",
        "/proc/self/cgroup",
    ];
    let mounts = stdout(&mut daemon.kubectl_as(&acme, &mounts));
    assert!(!mounts.contains("rehearsal"), "{mounts}");

    // What waited when the daemon was killed is nobody's for ever.
    daemon.kill();
    assert_eq!(vmms(&daemon).len(), POOL + pods.len(), "they outlive it");
    daemon.start_again();
    // A process that has ended and that nobody reaps has no program any more.
    let runs = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    assert!(!waiting.iter().any(runs), "{waiting:?}");
    assert!(vmms(&daemon).is_superset(&pods), "pods run on");
    run(&mut daemon.kubectl_as(&acme, &["exec", "three", "--", "true"]));
    await_vmms(&daemon, "a new pool", POOL + pods.len());

    daemon.stop();
    assert_eq!(
        vmms(&daemon),
        pods,
        "an orderly stop leaves no VM but those of pods"
    );
}

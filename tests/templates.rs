//! Pods that start from a template are as different from each other as pods that boot.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

/// What a pod of a template must have of its own, one line each. Read as the container's first
/// act: what two guests would have in common shows best then.
const IDENTITY: &str = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; \
    cat /proc/sys/kernel/random/boot_id; cat /sys/class/net/eth0/address; hostname; date +%s; \
    exec sleep infinity";

/// Guest memory of a VMM that is in RAM, in KiB. What emulation has translated grows meanwhile and is no part of it.
fn resident_kib(pid: u32) -> Option<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut guest, mut sum) = (false, 0);
    for line in maps.lines() {
        let first = line.split_whitespace().next()?;
        if first.contains('-') && !first.ends_with(':') {
            guest = line.contains("guest-memory");
        } else if guest && first == "Rss:" {
            let rss = line.split_whitespace().nth(1)?;
            sum += rss.parse::<u64>().ok()?;
        }
    }
    Some(sum)
}

#[test]
fn pods_of_one_template_have_nothing_in_common() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.66.0.0/24");
    let globex = daemon.tenant("globex", "10.66.0.0/24");
    daemon.wait_template();
    let image = registry.image("busybox:1");
    let pods = [(&acme, "one"), (&acme, "two"), (&globex, "one")];
    for (tenant, name) in pods {
        run(&mut daemon.kubectl_as(
            tenant,
            &["run", name, "--image", &image, "--", "sh", "-c", IDENTITY],
        ));
    }
    let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); 4];
    for (tenant, name) in pods {
        let pod = format!("pod/{name}");
        let wait = ["wait", "--for=condition=Ready", &pod, "--timeout=240s"];
        run(&mut daemon.kubectl_as(tenant, &wait));
        let log = eventually("the pod's identity", Duration::from_secs(60), || {
            let log = stdout(&mut daemon.kubectl_as(tenant, &["logs", name]));
            match log.lines().count() {
                6.. => Ok(log),
                _ => Err(log),
            }
        });
        let lines: Vec<&str> = log.lines().collect();
        for (set, line) in seen.iter_mut().zip(&lines) {
            assert!(set.insert((*line).to_owned()), "{name} repeats {line}");
        }
        assert_ne!(lines[3], "02:00:00:00:00:00", "the template's own address");
        assert_eq!(lines[4], name);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let said: u64 = lines[5].parse().unwrap();
        let behind = now.as_secs().abs_diff(said);
        assert!(behind < 240, "the pod's clock says {said}, {behind} s off");
    }
    let restored = daemon.log_text();
    assert_eq!(
        restored.matches("from_template").count() - restored.matches("from_template=false").count(),
        pods.len(),
        "all of them started from the template"
    );

    // Memory that a guest has freed comes back, and the template is none the worse for it.
    let exec = |script: &str| {
        run(&mut daemon.kubectl_as(&acme, &["exec", "one", "--", "sh", "-c", script]));
    };
    let all = || -> u64 {
        daemon
            .vmm_processes()
            .into_iter()
            .filter_map(resident_kib)
            .sum()
    };
    let idle = all();
    assert!(idle > 0, "no VMM shows guest memory");
    exec("dd if=/dev/zero of=/dev/shm/ballast bs=1M count=40 2> /dev/null");
    let full = all();
    assert!(full > idle + (30 << 10), "{idle} KiB, then {full} KiB");
    exec("rm /dev/shm/ballast");
    eventually("freed memory comes back", Duration::from_secs(60), || {
        let now = all();
        match now < full - (32 << 10) {
            true => Ok(()),
            false => Err(format!("{idle} KiB, then {full} KiB, now {now} KiB")),
        }
    });
    let late = ["run", "late", "--image", &image, "--", "sleep", "infinity"];
    run(&mut daemon.kubectl_as(&acme, &late));
    let wait = [
        "wait",
        "--for=condition=Ready",
        "pod/late",
        "--timeout=240s",
    ];
    run(&mut daemon.kubectl_as(&acme, &wait));

    // They outlive the daemon like any other.
    let before = daemon.vmm_processes();
    daemon.kill();
    daemon.start_again();
    let uptime = ["exec", "one", "--", "cat", "/sys/class/net/eth0/address"];
    assert!(seen[3].contains(stdout(&mut daemon.kubectl_as(&acme, &uptime)).trim()));
    assert_eq!(daemon.vmm_processes(), before);
}

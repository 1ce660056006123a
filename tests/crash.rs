//! The daemon is killed at random moments of create and delete.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    thread,
    time::Duration,
};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

/// A small generator, so that a failure can be repeated from its printed seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn seed() -> u64 {
    match std::env::var("HYPERNETES_SEED") {
        Ok(seed) => seed.parse().expect("HYPERNETES_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish() | 1,
    }
}

fn rounds() -> u32 {
    std::env::var("HYPERNETES_CRASH_ROUNDS").map_or(50, |text| text.parse().expect("a number"))
}

#[test]
fn fifty_kills_lose_nothing_and_leave_nothing() {
    if !can_run_pods() {
        return;
    }
    let seed = seed();
    println!("HYPERNETES_SEED={seed}");
    let mut random = Random(seed);
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.97.0.0/24");
    // A witness that lives through everything: its container and its log must never be disturbed.
    run(&mut daemon.kubectl_as(
        &acme,
        &[
            "run",
            "witness",
            "--image",
            &image,
            "--restart=Never",
            "--",
            "sh",
            "-c",
            "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done",
        ],
    ));
    run(&mut daemon.kubectl_as(
        &acme,
        &[
            "wait",
            "--for=condition=Ready",
            "pod/witness",
            "--timeout=240s",
        ],
    ));
    let identity = |daemon: &Daemon| {
        stdout(&mut daemon.kubectl_as(&acme, &[
            "get", "pod", "witness", "-o",
            "jsonpath={.metadata.uid} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}",
        ]))
    };
    let witness = identity(&daemon);
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..rounds() {
        // Something is under way: a pod being made, a pod being deleted, or both.
        let victim = format!("p{round}");
        let created = daemon
            .kubectl_as(
                &acme,
                &[
                    "run",
                    &victim,
                    "--image",
                    &image,
                    "--restart=Never",
                    "--",
                    "sleep",
                    "infinity",
                ],
            )
            .output()
            .unwrap();
        if created.status.success() {
            acknowledged.push(victim.clone());
        }
        if acknowledged.len() > 1 {
            let index = usize::try_from(random.below(acknowledged.len() as u64)).unwrap();
            let gone = acknowledged.remove(index);
            run(&mut daemon.kubectl_as(
                &acme,
                &[
                    "delete",
                    "pod",
                    &gone,
                    "--wait=false",
                    "--grace-period=0",
                    "--force",
                ],
            ));
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "the random moment is the test's input"
        )]
        thread::sleep(Duration::from_millis(random.below(2500)));
        daemon.kill();
        daemon.start_again();
        for name in &acknowledged {
            let found = daemon
                .kubectl_as(&acme, &["get", "pod", name, "-o", "name"])
                .output()
                .unwrap();
            assert!(
                found.status.success(),
                "round {round}: acknowledged pod {name} is lost"
            );
        }
        assert_eq!(
            identity(&daemon),
            witness,
            "round {round}: the witness was disturbed"
        );
    }
    for name in &acknowledged {
        run(&mut daemon.kubectl_as(
            &acme,
            &[
                "wait",
                "--for=condition=Ready",
                &format!("pod/{name}"),
                "--timeout=240s",
            ],
        ));
        let said = stdout(&mut daemon.kubectl_as(&acme, &["exec", name, "--", "echo", "alive"]));
        assert_eq!(said, "alive");
    }
    let log = stdout(&mut daemon.kubectl_as(&acme, &["logs", "witness"]));
    for (number, line) in log.lines().enumerate() {
        assert_eq!(
            line,
            format!("line {number}"),
            "the witness's log has a gap or a double"
        );
    }
    println!(
        "{} rounds, {} lines of log without a gap",
        rounds(),
        log.lines().count()
    );

    // With the last pod everything on the host goes, though tenant and network go on.
    run(&mut daemon.kubectl_as(&acme, &["delete", "pods", "--all", "--grace-period=1"]));
    eventually("the host is clean", Duration::from_secs(60), || {
        let picture = daemon.host_picture();
        if picture.is_clean() {
            Ok(())
        } else {
            Err(format!("{picture:?}"))
        }
    });
    run(&mut daemon.hypernetes(&["tenant", "delete", "acme"]));
    eventually("no VM is left", Duration::from_secs(60), || {
        let left = daemon.vmm_processes();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    daemon.stop();
    let picture = daemon.host_picture();
    assert!(picture.is_clean(), "left on the host: {picture:?}");
    let files = daemon.pod_files();
    assert!(files.is_empty(), "files left: {files:?}");
}

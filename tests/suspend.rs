//! Pods whose memory is on the disk, by `hyper suspend` and by kubectl, against a real daemon and real VMs.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, must_pass_as_tenant, run,
    seeded::{Random, schedules},
    stdout,
};

const PATIENCE: Duration = Duration::from_secs(120);
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";

#[test]
fn containers_are_suspended_and_resumed() {
    if can_run_pods() {
        must_pass_as_tenant("suspend", "10.98.0.0/24", 20);
    }
}

fn condition(daemon: &Daemon, tenant: &Path, pod: &str) -> String {
    let path = r#"jsonpath={.status.conditions[?(@.type=="hypernetes.io/Suspended")].status}{.status.conditions[?(@.type=="hypernetes.io/Suspended")].reason}"#;
    stdout(&mut daemon.kubectl_as(tenant, &["get", "pod", pod, "-o", path]))
}

fn wish(daemon: &Daemon, tenant: &Path, pod: &str, value: &str) {
    let annotation = format!("hypernetes.io/suspended={value}");
    run(&mut daemon.kubectl_as(
        tenant,
        &["annotate", "--overwrite", "pod", pod, &annotation],
    ));
}

fn suspend(daemon: &Daemon, tenant: &Path, pod: &str, value: &str, wanted: &str) {
    wish(daemon, tenant, pod, value);
    eventually("the condition", PATIENCE, || {
        let now = condition(daemon, tenant, pod);
        (now == wanted).then_some(()).ok_or(now)
    });
}

/// Makes a pod of a shell's program and waits until it is ready.
fn start(
    daemon: &Daemon,
    tenant: &Path,
    name: &str,
    (image, restart): (&str, &str),
    program: &str,
) {
    let restart = format!("--restart={restart}");
    let pod = [
        "run", name, "--image", image, &restart, "--", "sh", "-c", program,
    ];
    run(&mut daemon.kubectl_as(tenant, &pod));
    await_ready(daemon, tenant, name);
}

fn await_ready(daemon: &Daemon, tenant: &Path, name: &str) {
    let pod = format!("pod/{name}");
    let ready = ["wait", "--for=condition=Ready", &pod, "--timeout=240s"];
    run(&mut daemon.kubectl_as(tenant, &ready));
}

/// What a pod that counts has said: each number, and none twice.
fn counted(daemon: &Daemon, tenant: &Path, pod: &str) -> usize {
    let text = stdout(&mut daemon.kubectl_as(tenant, &["logs", pod]));
    let numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    let expected: Vec<u64> = (1..).take(numbers.len()).collect();
    assert_eq!(
        numbers, expected,
        "no number is missing and none comes twice"
    );
    numbers.len()
}

fn counts_on(daemon: &Daemon, tenant: &Path, pod: &str, from: usize) {
    eventually("it counts on", PATIENCE, || {
        let now = counted(daemon, tenant, pod);
        (now > from + 5)
            .then_some(())
            .ok_or(format!("{now} after {from}"))
    });
}

/// What makes a pod the one that it was.
fn identity(daemon: &Daemon, tenant: &Path, pod: &str) -> String {
    stdout(&mut daemon.kubectl_as(tenant, &[
        "get", "pod", pod, "-o",
        "jsonpath={.metadata.uid} {.status.podIP} {.status.startTime} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].state.running.startedAt}",
    ]))
}

#[test]
fn a_suspended_pod_takes_no_memory_and_outlives_the_daemon() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.97.0.0/24");
    let program = format!(
        "mkdir /tmp/www; echo served > /tmp/www/index.html; httpd -p 8080 -h /tmp/www; {COUNT}"
    );
    start(&daemon, &acme, "web", (&image, "Never"), &program);
    let fetch = |daemon: &Daemon| {
        let wget = [
            "exec",
            "web",
            "--",
            "wget",
            "-qO-",
            "http://127.0.0.1:8080/",
        ];
        stdout(&mut daemon.kubectl_as(&acme, &wget))
    };
    let before = identity(&daemon, &acme, "web");
    let running = vms(&daemon);
    suspend(&daemon, &acme, "web", "true", "True");
    eventually("the VMM is gone", PATIENCE, || {
        let now = vms(&daemon);
        (now + 1 == running)
            .then_some(())
            .ok_or(format!("{now} of {running}"))
    });
    let (last, since) = (counted(&daemon, &acme, "web"), Instant::now());

    daemon.kill();
    daemon.start_again();
    assert_eq!(condition(&daemon, &acme, "web"), "True");
    assert_eq!(identity(&daemon, &acme, "web"), before);
    assert_eq!(counted(&daemon, &acme, "web"), last, "nothing runs");

    eventually("some seconds have passed", PATIENCE, || {
        let passed = since.elapsed();
        (passed > Duration::from_secs(5))
            .then_some(())
            .ok_or(format!("{passed:?}"))
    });
    suspend(&daemon, &acme, "web", "false", "");
    await_ready(&daemon, &acme, "web");
    assert_eq!(fetch(&daemon), "served");
    // The guest's clock stood still for longer than it may be wrong.
    let date = ["exec", "web", "--", "date", "+%s"];
    let earliest = unix_seconds();
    let guest: u64 = stdout(&mut daemon.kubectl_as(&acme, &date))
        .parse()
        .unwrap();
    let latest = unix_seconds();
    let right = earliest - 1..=latest + 1;
    assert!(right.contains(&guest), "{guest} is not in {right:?}");
    counts_on(&daemon, &acme, "web", last);
    assert_eq!(identity(&daemon, &acme, "web"), before);

    suspend(&daemon, &acme, "web", "true", "True");
    run(&mut daemon.kubectl_as(&acme, &["delete", "pod", "web", "--timeout=60s"]));
    eventually("nothing is left", PATIENCE, || {
        let left = daemon.pod_files();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
    assert_eq!(vms(&daemon), running - 1);
}

#[test]
fn a_suspended_pod_outlives_the_machine_s_power() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.95.0.0/24");
    // In a file of its own disk too, some of it still in the guest's memory when it is suspended.
    let program = "i=0; while :; do i=$((i+1)); echo $i; echo $i >> /tmp/count; sleep 0.1; done";
    start(&daemon, &acme, "kept", (&image, "Never"), program);
    start(&daemon, &acme, "lost", (&image, "Never"), COUNT);
    let before = identity(&daemon, &acme, "kept");
    suspend(&daemon, &acme, "kept", "true", "True");
    let last = counted(&daemon, &acme, "kept");

    daemon.lose_power();
    daemon.start_again();
    let failed = [
        "wait",
        "--for=jsonpath={.status.phase}=Failed",
        "pod/lost",
        "--timeout=60s",
    ];
    run(&mut daemon.kubectl_as(&acme, &failed));
    assert_eq!(condition(&daemon, &acme, "kept"), "True");
    suspend(&daemon, &acme, "kept", "false", "");
    await_ready(&daemon, &acme, "kept");
    assert_eq!(identity(&daemon, &acme, "kept"), before);
    counts_on(&daemon, &acme, "kept", last);
    let check = "n=$(wc -l < /tmp/count); seq $n > /tmp/all; head -n $n /tmp/count | cmp - /tmp/all && echo whole";
    let exec = ["exec", "kept", "--", "sh", "-c", check];
    assert_eq!(stdout(&mut daemon.kubectl_as(&acme, &exec)), "whole");
    // Its network was made anew: others reach it at its address.
    let address = before.split(' ').nth(1).unwrap();
    start(&daemon, &acme, "other", (&image, "Never"), COUNT);
    let ping = [
        "exec", "other", "--", "ping", "-c", "1", "-W", "30", address,
    ];
    run(&mut daemon.kubectl_as(&acme, &ping));
}

/// The file of a suspended VM, and what is being written of one.
fn memory_files(daemon: &Daemon) -> Vec<PathBuf> {
    let mut files = daemon.pod_files();
    files.retain(|path| path.file_stem().is_some_and(|stem| stem == "memory"));
    files
}

#[test]
fn power_that_fails_while_a_pod_is_suspended_leaves_it_whole_or_new() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.94.0.0/24");
    // Memory that takes a while to be written.
    let program = format!("head -c 48000000 /dev/urandom > /dev/shm/ballast; {COUNT}");
    start(&daemon, &acme, "web", (&image, "Always"), &program);
    counts_on(&daemon, &acme, "web", 0);
    let written = |daemon: &Daemon, what: &str, is: &dyn Fn(&[PathBuf]) -> bool| {
        eventually(what, PATIENCE, || {
            let files = memory_files(daemon);
            is(&files).then_some(()).ok_or(format!("{files:?}"))
        });
    };
    let begun = |files: &[PathBuf]| !files.is_empty();
    let whole = |files: &[PathBuf]| files.iter().any(|file| file.ends_with("memory.vm"));
    // How long it takes on this machine, so that power fails before and after.
    wish(&daemon, &acme, "web", "true");
    written(&daemon, "it is being written", &begun);
    let since = Instant::now();
    written(&daemon, "it is written", &whole);
    let takes = u64::try_from(since.elapsed().as_millis()).unwrap() + 100;
    suspend(&daemon, &acme, "web", "false", "");
    await_ready(&daemon, &acme, "web");

    let mut random = Random::new("moments of a power failure");
    let (mut kept, mut last) = (0, counted(&daemon, &acme, "web"));
    for round in 0..schedules(4) {
        let before = identity(&daemon, &acme, "web");
        wish(&daemon, &acme, "web", "true");
        written(&daemon, "it is being written", &begun);
        #[expect(
            clippy::disallowed_methods,
            reason = "the random moment is the test's input"
        )]
        std::thread::sleep(Duration::from_millis(random.below(takes * 2)));
        daemon.lose_power();
        let was_whole = whole(&memory_files(&daemon));
        daemon.start_again();
        // One whose VM is gone is started anew, and suspended as it is wanted to be.
        suspend(&daemon, &acme, "web", "true", "True");
        suspend(&daemon, &acme, "web", "false", "");
        await_ready(&daemon, &acme, "web");
        let same = identity(&daemon, &acme, "web") == before;
        println!("round {round}: its file was whole: {was_whole}, it is the same: {same}");
        assert_eq!(same, was_whole, "the file decides");
        kept += u64::from(was_whole);
        last = if same { last } else { 0 };
        counts_on(&daemon, &acme, "web", last);
        last = counted(&daemon, &acme, "web");
        assert_eq!(memory_files(&daemon), [""; 0].map(PathBuf::from));
    }
    println!("{kept} kept");
    run(&mut daemon.kubectl_as(&acme, &["delete", "pod", "web", "--timeout=60s"]));
    eventually("nothing is left", PATIENCE, || {
        let left = daemon.pod_files();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

fn vms(daemon: &Daemon) -> usize {
    daemon.vmm_processes().len()
}

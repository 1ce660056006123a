//! A full state directory: a clear error, and nothing acknowledged is lost.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "helpers of a test fail by panic")]

use std::{fs, os::unix::fs::symlink, path::Path, process::Command, time::Duration};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, release_dir, run, skip, stdout,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(120);

/// A small file system, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .status()
            .unwrap();
        mounted.success().then_some(Self(dir))
    }

    /// An ext4 that keeps a tenth for root.
    fn ext4(image: &Path, mib: u64) -> Option<Self> {
        fs::File::create(image).unwrap().set_len(mib << 20).unwrap();
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "10"])
            .arg(image));
        let dir = tempfile::TempDir::new().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(image).arg(dir.path());
        let mounted = mount.status().unwrap();
        mounted.success().then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status()
            .ok();
    }
}

/// Leaves so many MiB free.
fn fill(dir: &Path, left_mib: u64) {
    let room = rustix::fs::statvfs(dir).unwrap();
    let pages = (room.f_bavail * room.f_frsize / 4096).saturating_sub(left_mib * 256);
    let ballast = format!("of={}", dir.join("ballast").display());
    // It ends early where the disk is full.
    Command::new("dd")
        .args([
            "if=/dev/zero",
            "bs=4096",
            &ballast,
            &format!("count={pages}"),
        ])
        .output()
        .unwrap();
}

fn empty(dir: &Path) {
    fs::remove_file(dir.join("ballast")).unwrap();
}

#[test]
fn writes_are_refused_clearly_and_come_back_with_space() {
    if !can_run_pods() {
        return;
    }
    let Some(disk) = SmallDisk::mount("48m") else {
        skip("tmpfs cannot be mounted here");
        return;
    };
    let state = disk.0.path().join("state");
    let mut daemon = Daemon::start(DaemonOptions {
        state_dir: Some(state),
        ..DaemonOptions::default()
    });
    let create = |daemon: &Daemon, name: &str| {
        let value = format!("--from-literal=data={}", "x".repeat(100_000));
        daemon
            .kubectl(&["create", "configmap", name, &value])
            .output()
            .unwrap()
    };
    let mut acknowledged = Vec::new();
    for number in 0..5 {
        let name = format!("before-{number}");
        assert!(create(&daemon, &name).status.success());
        acknowledged.push(name);
    }
    fill(disk.0.path(), 0);
    let mut refusals = Vec::new();
    for number in 0..400 {
        let name = format!("full-{number}");
        let output = create(&daemon, &name);
        if output.status.success() {
            // The file may have free pages inside.
            acknowledged.push(name);
        } else {
            refusals.push(String::from_utf8_lossy(&output.stderr).into_owned());
            if refusals.len() == 3 {
                break;
            }
        }
    }
    assert_eq!(refusals.len(), 3, "the disk is full, and writes go on");
    for refusal in &refusals {
        assert!(
            refusal.contains("state") && refusal.to_lowercase().contains("space"),
            "the error does not say what is wrong: {refusal}"
        );
    }
    // Reads work on.
    let names = stdout(&mut daemon.kubectl(&["get", "configmaps", "-o", "name"]));
    for name in &acknowledged {
        assert!(names.contains(name.as_str()), "{name} is not readable");
    }
    empty(disk.0.path());
    assert!(
        create(&daemon, "after").status.success(),
        "space is back, writes are not"
    );
    acknowledged.push("after".to_owned());
    daemon.kill();
    daemon.start_again();
    let names = stdout(&mut daemon.kubectl(&["get", "configmaps", "-o", "name"]));
    for name in &acknowledged {
        assert!(names.contains(name.as_str()), "acknowledged {name} is lost");
    }
    run(&mut daemon.kubectl(&["delete", "configmap", "--all"]));
    drop(daemon);
}

#[test]
fn a_pod_that_does_not_fit_on_the_disk_runs_on() {
    if !can_run_pods() {
        return;
    }
    let Some(disk) = SmallDisk::mount("1g") else {
        skip("tmpfs cannot be mounted here");
        return;
    };
    let daemon = Daemon::start(DaemonOptions {
        state_dir: Some(disk.0.path().join("state")),
        ..DaemonOptions::default()
    });
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let acme = daemon.tenant("acme", "10.92.0.0/24");
    let kubectl = |args: &[&str]| stdout(&mut daemon.kubectl_as(&acme, args));
    // More of its memory is in use than will be free, and it writes to no disk: that would take the rest.
    let program = "head -c 40000000 /dev/urandom > /dev/shm/ballast; echo ready; \
                   while :; do date +%s > /dev/shm/alive; sleep 0.1; done";
    run_web(&daemon, &acme, &image, program);
    let condition = || {
        let path = r#"jsonpath={.status.conditions[?(@.type=="hypernetes.io/Suspended")]}"#;
        kubectl(&["get", "pod", "web", "-o", path])
    };
    let awaited = |what: &str| {
        eventually(what, PATIENCE, || {
            let now = condition();
            now.contains(what).then(|| now.clone()).ok_or(now)
        })
    };
    let wish = |value: &str| {
        let wish = format!("hypernetes.io/suspended={value}");
        kubectl(&["annotate", "--overwrite", "pod", "web", &wish]);
    };
    let alive = "now() { until c=$(cat /dev/shm/alive) && test -n \"$c\"; do :; done; echo $c; }; \
                 a=$(now); until test $(now) != $a; do sleep 0.1; done";
    // None at all, and some that runs out: more than is left to the node's records.
    for (left_mib, usable) in [(16, "and 0 MiB can be had"), (80, " MiB can be had")] {
        fill(disk.0.path(), left_mib);
        wish("true");
        let said = awaited("no room for the memory");
        assert!(
            said.contains(usable) && said.contains(r#""reason":"Error""#),
            "{said}"
        );
        assert!(said.contains("it may need"), "{said}");
        // It works, and nothing of it is on the disk; the node's records can be written.
        kubectl(&["exec", "web", "--", "sh", "-c", alive]);
        no_memory_stays(&daemon);
        let name = format!("written-{left_mib}");
        kubectl(&["create", "configmap", &name]);
        let events = ["get", "events", "-o", "jsonpath={.items[*].message}"];
        assert!(kubectl(&events).contains("no room for the memory"));
        empty(disk.0.path());
        wish("false");
        eventually("nothing is wanted", PATIENCE, || {
            let now = condition();
            now.is_empty().then_some(()).ok_or(now)
        });
    }
    // It is not kept beside the node's records either, until there is room.
    fill(disk.0.path(), 80);
    let keep = daemon.dir().join("keep.json");
    let object = json!({"apiVersion": "hypernetes.io/v1alpha1", "kind": "PodSnapshot",
        "metadata": {"name": "keep"}, "spec": {"podName": "web", "sizeLimit": "300Mi"}});
    fs::write(&keep, object.to_string()).unwrap();
    kubectl(&["create", "-f", &keep.display().to_string()]);
    let said = eventually("the snapshot is refused", PATIENCE, || {
        let now = kubectl(&[
            "get",
            "psnap",
            "keep",
            "-o",
            "jsonpath={.status.conditions[0]}",
        ]);
        now.contains("NoSpace").then(|| now.clone()).ok_or(now)
    });
    assert!(
        said.contains("no room for the copy: it may need 300 MiB"),
        "{said}"
    );
    kubectl(&["exec", "web", "--", "sh", "-c", alive]);
    no_memory_stays(&daemon);
    kubectl(&["create", "configmap", "written-beside-it"]);
    empty(disk.0.path());
    let ready = "--for=condition=Ready";
    kubectl(&["wait", ready, "psnap/keep", "--timeout=120s"]);
    kubectl(&["exec", "web", "--", "sh", "-c", alive]);
    kubectl(&["delete", "psnap", "keep", "--timeout=60s"]);
    // With room it goes at once.
    wish("true");
    awaited(r#""status":"True""#);
    wish("false");
    let alive = ["exec", "web", "--", "true"];
    eventually("it is back", PATIENCE, || {
        let output = daemon.kubectl_as(&acme, &alive).output().unwrap();
        output
            .status
            .success()
            .then_some(())
            .ok_or(format!("{output:?}"))
    });
    kubectl(&["delete", "pod", "web", "--grace-period=1"]);
}

#[test]
fn a_pod_without_room_for_its_writes_stands_still_and_goes_on() {
    if !can_run_pods() {
        return;
    }
    let Some(disk) = SmallDisk::mount("1g") else {
        skip("tmpfs cannot be mounted here");
        return;
    };
    let mut daemon = Daemon::start(DaemonOptions {
        state_dir: Some(disk.0.path().join("state")),
        ..DaemonOptions::default()
    });
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let acme = daemon.tenant("acme", "10.94.0.0/24");
    // What it writes is read from its disk again, not from its memory.
    let program = "echo ready; for round in 1 2; do \
                     until test -e /dev/shm/$round; do sleep 0.1; done; \
                     head -c 30000000 /dev/urandom | tee /data.$round | md5sum && sync && \
                     dd if=/data.$round bs=1M iflag=direct | md5sum && echo done $round; \
                   done 2> /dev/null; sleep 1000";
    run_web(&daemon, &acme, &image, program);
    for round in 1..=2 {
        fill(disk.0.path(), 16);
        let go = format!("touch /dev/shm/{round}");
        run(&mut daemon.kubectl_as(&acme, &["exec", "web", "--", "sh", "-c", &go]));
        eventually("it stands still", PATIENCE, || {
            match daemon.log_text().matches("stands still until").count() {
                seen if seen >= round => Ok(()),
                seen => Err(format!("seen {seen} times")),
            }
        });
        if round == 1 {
            let exec = &mut daemon.kubectl_as(&acme, &["exec", "web", "--", "true"]);
            let refused = exec.output().unwrap();
            let said = String::from_utf8_lossy(&refused.stderr);
            assert!(!refused.status.success(), "it answers");
            assert!(said.contains("until the node has room"), "{said}");
        }
        if round == 2 {
            // Nobody looks when there is room again.
            daemon.kill();
        }
        empty(disk.0.path());
        if round == 2 {
            daemon.start_again();
        }
        let done = format!("done {round}");
        let said = eventually("it goes on", PATIENCE, || {
            let said = kubectl_logs(&daemon, &acme);
            said.ends_with(&done).then(|| said.clone()).ok_or(said)
        });
        let lines: Vec<_> = said.lines().rev().collect();
        assert_eq!(lines[1], lines[2], "what was written is not what is read");
        run(&mut daemon.kubectl_as(&acme, &["wait", "--for=condition=Ready", "pod/web"]));
        if round == 1 {
            let events = ["get", "events", "-o", "jsonpath={.items[*].message}"];
            eventually("it is told", PATIENCE, || {
                let said = stdout(&mut daemon.kubectl_as(&acme, &events));
                let told = said.contains("has room again: the pod goes on");
                told.then_some(()).ok_or(said)
            });
        }
    }
    let restarts = "jsonpath={.status.containerStatuses[0].restartCount}";
    let restarts = stdout(&mut daemon.kubectl_as(&acme, &["get", "pod", "web", "-o", restarts]));
    assert_eq!(restarts, "0");
}

#[test]
fn a_pod_that_stands_still_says_so_and_is_not_probed() {
    if !can_run_pods() {
        return;
    }
    let Some(disk) = SmallDisk::mount("256m") else {
        skip("tmpfs cannot be mounted here");
        return;
    };
    // The pods' disks are on it and the node's records are not, so that what is said of a pod can be stored.
    let state = tempfile::TempDir::new().unwrap();
    let runtime = state.path().join("runtime");
    fs::create_dir(&runtime).unwrap();
    symlink(disk.0.path(), runtime.join("sandboxes")).unwrap();
    let daemon = Daemon::start(DaemonOptions {
        state_dir: Some(state.path().to_owned()),
        ..DaemonOptions::default()
    });
    let registry = Registry::start();
    let acme = daemon.tenant("acme", "10.95.0.0/24");
    let program = "until test -e /dev/shm/go; do sleep 0.1; done; \
                   head -c 30000000 /dev/urandom > /data && sync && echo done; sleep 1000";
    // Each probe that is asked leaves a byte, and one that fails restarts the container.
    let probe = |name: &str| {
        json!({"exec": {"command": ["sh", "-c", format!("printf . >> /dev/shm/{name}")]},
            "periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 1})
    };
    let image = registry.image("busybox:1");
    let pod = |name: &str, program: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": image, "command": ["sh", "-c", program],
                "livenessProbe": probe("live"), "readinessProbe": probe("ready")}]}})
    };
    let pods = json!({"apiVersion": "v1", "kind": "List",
        "items": [pod("web", program), pod("witness", "sleep 1000")]});
    let file = daemon.dir().join("pods.json");
    fs::write(&file, pods.to_string()).unwrap();
    let kubectl = |args: &[&str]| stdout(&mut daemon.kubectl_as(&acme, args));
    kubectl(&["create", "-f", &file.display().to_string()]);
    let wait = |condition: &str| {
        let condition = format!("--for=condition={condition}");
        kubectl(&["wait", &condition, "pod/web", "--timeout=120s"]);
    };
    let status = || {
        let mut hyper = Command::new(release_dir().join("hyper"));
        hyper.env("HYPER_KUBECONFIG", &acme);
        hyper.args([
            "ps",
            "--filter",
            "name=web",
            "--format",
            "{{.Names}} {{.State}} {{.Status}}",
        ]);
        stdout(&mut hyper).trim_end().to_owned()
    };
    wait("Ready");
    kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod/witness",
        "--timeout=120s",
    ]);
    fill(disk.0.path(), 4);
    kubectl(&["exec", "web", "--", "touch", "/dev/shm/go"]);
    wait("hypernetes.io/Stalled");
    wait("Ready=false");
    let condition = |field: &str| {
        let path = format!("jsonpath={{.status.conditions[?(@.type==\"{field}\")].reason}}");
        kubectl(&["get", "pod", "web", "-o", &path])
    };
    assert_eq!(condition("hypernetes.io/Stalled"), "NodeDiskFull");
    assert_eq!(condition("Ready"), "Stalled");
    let said = status();
    assert!(said.starts_with("web running Up "), "{said}");
    assert!(said.ends_with(" (Stalled)"), "{said}");
    // Longer than a probe may take, by the probes of a pod that goes on: one that was asked would have failed.
    let asked = || kubectl(&["exec", "witness", "--", "cat", "/dev/shm/live"]).len();
    let until = asked() + 15;
    eventually("another pod's probes are asked", PATIENCE, || {
        let now = asked();
        (now >= until)
            .then_some(())
            .ok_or(format!("{now} of {until}"))
    });
    assert_eq!(condition("hypernetes.io/Stalled"), "NodeDiskFull");
    empty(disk.0.path());
    wait("Ready");
    eventually("it has written", PATIENCE, || {
        match kubectl_logs(&daemon, &acme).as_str() {
            "done" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    assert_eq!(condition("hypernetes.io/Stalled"), "");
    let restarts = "jsonpath={.status.containerStatuses[0].restartCount}";
    assert_eq!(kubectl(&["get", "pod", "web", "-o", restarts]), "0");
    let events = kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    assert!(
        events.contains("Stalled") && events.contains("WentOn"),
        "{events}"
    );
    assert!(!events.contains("Unhealthy"), "{events}");
    let said = status();
    assert!(said.ends_with(" (healthy)"), "{said}");
}

#[test]
fn a_disk_that_a_guest_has_filled_keeps_room_for_the_node_s_records() {
    if !can_run_pods() {
        return;
    }
    let place = tempfile::TempDir::new().unwrap();
    let Some(disk) = SmallDisk::ext4(&place.path().join("disk"), 640) else {
        skip("a file cannot be mounted as a disk here");
        return;
    };
    let daemon = Daemon::start(DaemonOptions {
        state_dir: Some(disk.0.path().join("state")),
        ..DaemonOptions::default()
    });
    let registry = Registry::start();
    let image = registry.image("busybox:1");
    let (acme, globex) = (
        daemon.tenant("acme", "10.98.0.0/24"),
        daemon.tenant("globex", "10.99.0.0/24"),
    );
    let program = "echo ready; dd if=/dev/zero of=/data bs=1M count=2000; sleep 1000";
    run_web(&daemon, &acme, &image, program);
    let stalled = "--for=condition=hypernetes.io/Stalled";
    run(&mut daemon.kubectl_as(&acme, &["wait", stalled, "pod/web", "--timeout=300s"]));
    let room = rustix::fs::statvfs(disk.0.path()).unwrap();
    assert!(room.f_bavail * room.f_frsize < 1 << 20, "it is not full");
    // For others it is as if nothing had happened.
    let value = format!("--from-literal=data={}", "x".repeat(100_000));
    for number in 0..20 {
        let name = format!("written-{number}");
        run(&mut daemon.kubectl_as(&globex, &["create", "configmap", &name, &value]));
    }
    run(&mut daemon.kubectl_as(&acme, &["delete", "pod", "web", "--grace-period=1"]));
    let room = rustix::fs::statvfs(disk.0.path()).unwrap();
    assert!(
        room.f_bavail * room.f_frsize > 100 << 20,
        "its disk is there still"
    );
}

/// Nothing of a VM's memory stays on the disk. It may be tried again just now.
fn no_memory_stays(daemon: &Daemon) {
    eventually("nothing of its memory stays", PATIENCE, || {
        let mut files = daemon.pod_files();
        files.retain(|file| file.file_stem().is_some_and(|stem| stem == "memory"));
        files.is_empty().then_some(()).ok_or(format!("{files:?}"))
    });
}

/// Starts pod `web` and waits until its program has said `ready`.
fn run_web(daemon: &Daemon, tenant: &Path, image: &str, program: &str) {
    let arguments = ["run", "web", "--image", image, "--restart=Never", "--"];
    let arguments = [arguments.as_slice(), &["sh", "-c", program]].concat();
    run(&mut daemon.kubectl_as(tenant, &arguments));
    eventually("the pod is up", PATIENCE, || {
        match kubectl_logs(daemon, tenant).as_str() {
            "ready" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
}

fn kubectl_logs(daemon: &Daemon, tenant: &Path) -> String {
    let output = daemon
        .kubectl_as(tenant, &["logs", "web"])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

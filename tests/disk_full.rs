//! A full state directory: a clear error, and nothing acknowledged is lost.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "helpers of a test fail by panic")]

use std::{fs, path::Path, process::Command};

use hypernetes_testkit::{Daemon, DaemonOptions, can_run_pods, run, skip, stdout};

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

fn fill(dir: &Path) {
    Command::new("dd")
        .args([
            "if=/dev/zero",
            "bs=4096",
            &format!("of={}", dir.join("ballast").display()),
        ])
        .output()
        .unwrap();
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
    fill(disk.0.path());
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
    fs::remove_file(disk.0.path().join("ballast")).unwrap();
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

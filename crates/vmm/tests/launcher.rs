//! The launcher by itself: what it refuses before it becomes anything.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "an integration test is all tests"
)]

use std::{
    fs::File,
    io::Write,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

/// Starts the launcher with a specification on its standard input.
fn launch(spec: &[u8]) -> Output {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(spec).unwrap();
    Command::new(env!("CARGO_BIN_EXE_vmm-launch"))
        .arg("0")
        .stdin(Stdio::from(File::open(file.path()).unwrap()))
        .output()
        .unwrap()
}

fn spec(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut spec = json!({
        "program": "/usr/bin/id", "args": ["-u"], "uid": 61999, "groups": [],
        "parent": std::process::id(), "record": null, "cgroup": null, "keep": [],
        "read_only": ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"], "read_write": ["/dev/null"],
        "keep_holes_out_of": null, "ephemeral": false,
    });
    change(&mut spec);
    serde_json::to_vec(&spec).unwrap()
}

fn refusal(spec: &[u8]) -> String {
    let output = launch(spec);
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIP: the launcher takes root");
    }
    root
}

#[test]
fn becomes_the_program_as_another_user() {
    if !root() {
        return;
    }
    let output = launch(&spec(|_| {}));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(output.stdout, b"61999\n");
}

#[test]
fn does_not_outlive_the_daemon_unrecorded() {
    // A daemon that died between fork and here leaves a launcher with another parent.
    let text = refusal(&spec(|spec| spec["parent"] = 1.into()));
    assert!(text.contains("is gone"), "{text}");
}

#[test]
fn leaves_the_record_before_it_becomes_the_program() {
    if !root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("launch.json");
    let text = refusal(&spec(|spec| {
        spec["record"] = path.to_str().unwrap().into();
        spec["program"] = "/usr/bin/none-such".into();
    }));
    assert!(text.contains("start the VMM"), "{text}");
    let record: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(record["pid"].as_u64() > Some(1) && record["start_time"].as_u64() > Some(0));
}

#[test]
fn refuses_nonsense() {
    for bad in [b"".as_slice(), b"{}", b"\xff", &[b' '; 2 << 20]] {
        let text = refusal(bad);
        assert!(text.contains("launch specification"), "{text}");
    }
    let text = refusal(&spec(|spec| spec["cgroup"] = "../x".into()));
    assert!(text.contains("cgroup"), "{text}");
}

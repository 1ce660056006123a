//! Many clients write and watch while the daemon is killed.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use hypernetes_testkit::{Daemon, DaemonOptions, workspace_root};

const KILLS: u64 = 6;
/// Acknowledged writes between two deaths.
const WRITES: u64 = 800;

#[test]
fn no_write_and_no_event_is_lost_over_kills() {
    let seed = std::env::var("HYPERNETES_SEED")
        .unwrap_or_else(|_| (RandomState::new().build_hasher().finish() % 1_000_000).to_string());
    println!("HYPERNETES_SEED={seed}");
    let mut daemon = Daemon::start(DaemonOptions::default());
    let mut clients = Command::new("python3")
        .arg(workspace_root().join("tests/clients/python/churn.py"))
        .arg(daemon.admin_kubeconfig())
        .arg(&seed)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut kills = 0;
    let mut last = String::new();
    for line in BufReader::new(clients.stdout.take().unwrap()).lines() {
        last = line.unwrap();
        let Some(acknowledged) = last
            .strip_prefix("acks ")
            .and_then(|text| text.parse::<u64>().ok())
        else {
            continue;
        };
        if acknowledged < (kills + 1) * WRITES {
            continue;
        }
        if kills == KILLS {
            // The pipe may be closed already: it is told more than once.
            writeln!(clients.stdin.as_mut().unwrap()).ok();
            continue;
        }
        daemon.kill();
        daemon.start_again();
        kills += 1;
    }
    let output = clients.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && last.starts_with("ok"),
        "seed {seed}, {kills} kills: {errors}"
    );
    assert_eq!(kills, KILLS);
    println!("{last}, over {kills} kills");
}

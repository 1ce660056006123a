//! The process is killed in the middle of a storm of writes; nothing acknowledged may be missing.
#![allow(
    clippy::print_stdout,
    clippy::tests_outside_test_module,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::let_underscore_must_use,
    reason = "a test"
)]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use hypernetes_store::{Durability, Op, Revision, Store, StoreConfig, Value};

const CHILD: &str = "HYPERNETES_STORE_CRASH_CHILD";
const ROUNDS: u64 = 5;
const WRITERS: u64 = 16;

/// Not a test of its own: writes until it is killed, when the other test runs this binary again.
#[test]
fn child() {
    let Ok(path) = std::env::var(CHILD) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = Store::open(Path::new(&path), StoreConfig::default()).unwrap();
        println!("open {}", store.revision());
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            let store = store.clone();
            tasks.spawn(async move {
                for turn in 0u64.. {
                    // One writer is relaxed: its revisions count, its values may be lost.
                    let relaxed = writer == 0;
                    let durability = if relaxed {
                        Durability::Relaxed
                    } else {
                        Durability::Sync
                    };
                    let key = format!("w{writer}/{}", turn % 7);
                    let value = Value::WithRevision(std::sync::Arc::new(|revision| {
                        revision.to_string().into()
                    }));
                    let revision = store
                        .txn(vec![], vec![Op::Put(key.clone(), value)], durability)
                        .await
                        .unwrap();
                    let kind = if relaxed { "relaxed" } else { "sync" };
                    // One write call per line: a line is whole or absent.
                    let line = format!("{kind} {revision} {key}\n");
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                }
            });
        }
        tasks.join_all().await;
    });
}

#[test]
fn sigkill_loses_no_acknowledged_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let mut acknowledged: BTreeMap<String, Revision> = BTreeMap::new();
    let mut highest: Revision = 0;
    for round in 1..=ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut writes = 0;
        let mut line_of = |line: &str, highest: &mut Revision| {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["open", revision] => {
                    let revision: Revision = revision.parse().unwrap();
                    assert!(
                        revision >= *highest,
                        "revision went back: {revision} < {highest}"
                    );
                }
                [kind @ ("sync" | "relaxed"), revision, key] => {
                    let revision: Revision = revision.parse().unwrap();
                    *highest = revision.max(*highest);
                    if *kind == "sync" {
                        let last = acknowledged.entry((*key).to_owned()).or_default();
                        *last = revision.max(*last);
                    }
                    return true;
                }
                _ => {}
            }
            false
        };
        for line in lines.by_ref() {
            writes += u64::from(line_of(&line.unwrap(), &mut highest));
            if writes > 150 * round {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What was acknowledged before the signal and still stands in the pipe.
        for line in lines {
            line_of(&line.unwrap(), &mut highest);
        }

        let store = Store::open(&path, StoreConfig::default()).unwrap();
        assert!(
            store.revision() >= highest,
            "{} < {highest}",
            store.revision()
        );
        for (key, revision) in &acknowledged {
            let entry = store.get(key).unwrap_or_else(|| panic!("{key} is lost"));
            assert!(
                entry.mod_revision >= *revision,
                "{key} is of {} not {revision}",
                entry.mod_revision
            );
            assert_eq!(entry.value, entry.mod_revision.to_string());
        }
        highest = highest.max(store.revision());
    }
    assert!(acknowledged.len() > 50);
}

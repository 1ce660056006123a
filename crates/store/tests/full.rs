//! A state directory that is really full: a small tmpfs.
#![allow(
    clippy::print_stderr,
    clippy::tests_outside_test_module,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::let_underscore_must_use,
    reason = "a test"
)]

use std::{path::Path, process::Command};

use hypernetes_store::{Durability, Op, Store, StoreConfig, StoreError, Value};

/// A mounted tmpfs, unmounted at the end.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(directory.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_file_system_refuses_writes_and_keeps_what_it_took() {
    let Some(disk) = Tmpfs::new("4m") else {
        eprintln!("SKIP: a tmpfs cannot be mounted (needs root)");
        return;
    };
    let path = disk.path().join("state");
    let store = Store::open(&path, StoreConfig::default()).unwrap();
    let value = "x".repeat(60_000);
    let put = |index: u32| {
        vec![Op::Put(
            format!("k/{index:04}"),
            Value::Bytes(value.clone().into()),
        )]
    };
    let mut taken = Vec::new();
    let error = loop {
        let index = u32::try_from(taken.len()).unwrap();
        assert!(index < 1000, "the disk never got full");
        match store.txn(vec![], put(index), Durability::Sync).await {
            Ok(revision) => taken.push(revision),
            Err(error) => break error,
        }
    };
    let StoreError::Write { message, .. } = &error else {
        panic!("{error}")
    };
    assert!(message.to_lowercase().contains("space"), "{message}");
    assert_eq!(store.revision(), *taken.last().unwrap());
    assert_eq!(
        store.list("k/", None, None, None).unwrap().entries.len(),
        taken.len()
    );

    // Again and again: no retry makes it worse.
    for index in 2000..2005 {
        assert!(
            store
                .txn(vec![], put(index), Durability::Sync)
                .await
                .is_err()
        );
    }
    let bigger = Command::new("mount")
        .args(["-o", "remount,size=64m"])
        .arg(disk.path())
        .status()
        .unwrap();
    assert!(bigger.success());
    store
        .txn(vec![], put(3000), Durability::Sync)
        .await
        .unwrap();
    drop(store);

    let store = Store::open(&path, StoreConfig::default()).unwrap();
    let entries = store.list("k/", None, None, None).unwrap().entries;
    assert_eq!(entries.len(), taken.len() + 1);
    assert!(entries.iter().all(|entry| entry.value == value));
    drop(store);
}

//! The state directory is full: a clear error, nothing acknowledged is lost, and it goes on after.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use std::{path::Path, process::Command, time::Duration};

use common::{Cluster, config_map};
use hypernetes_apiserver::ApiServerConfig;
use hypernetes_store::{Store, StoreConfig};
use tokio::task::spawn_blocking;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

/// A file system of a few megabytes, unmounted when it is dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            println!("could not unmount {}", self.path().display());
        }
    }
}

async fn open(path: &Path) -> Cluster {
    // The lock of a store that has just been closed may go a moment later.
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    let store = loop {
        let path = path.to_owned();
        let opened = spawn_blocking(move || Store::open(&path, StoreConfig::default()));
        match opened.await.unwrap() {
            Ok(store) => break store,
            Err(error) => assert!(tokio::time::Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    Cluster::start_with(|config| *config = ApiServerConfig::new(store)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_the_disk_is_full() {
    let Some(disk) = SmallDisk::mount() else {
        println!("SKIP: tmpfs cannot be mounted here");
        return;
    };
    let file = disk.path().join("state.redb");
    let cluster = open(&file).await;
    let admin = cluster.admin();
    let mut kept = Vec::new();
    let mut refusals = 0;
    for i in 0..400 {
        let name = format!("m{i}");
        let answer = admin
            .create(MAPS, &config_map(&name, &"x".repeat(100_000)))
            .await;
        if answer.code == 201 {
            kept.push(name);
            continue;
        }
        assert_eq!(answer.code, 507, "{}", answer.text);
        let message = answer.value["message"].as_str().unwrap();
        assert!(message.contains("no space is left"), "{message}");
        assert!(
            !message.contains(disk.path().to_str().unwrap()),
            "{message}"
        );
        assert_eq!(
            admin.get(&format!("{MAPS}/{name}")).await.code,
            404,
            "refused is not stored"
        );
        refusals += 1;
        if refusals == 5 {
            break;
        }
    }
    assert_eq!(refusals, 5, "8 MB never filled");
    assert!(kept.len() > 5);
    for name in &kept {
        admin.get(&format!("{MAPS}/{name}")).await.expect(200);
    }
    // A new process on the same disk finds the same.
    let store = cluster.store.clone();
    drop((admin, cluster));
    spawn_blocking(move || store.close()).await.unwrap();
    assert!(
        Command::new("mount")
            .args(["-o", "remount,size=64m"])
            .arg(disk.path())
            .status()
            .unwrap()
            .success()
    );
    let cluster = open(&file).await;
    let admin = cluster.admin();
    let list = admin.get(MAPS).await.expect(200);
    let mut names: Vec<&str> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["metadata"]["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    kept.sort_unstable();
    assert_eq!(names, kept);
    admin
        .create(MAPS, &config_map("after", "1"))
        .await
        .expect(201);
    let store = cluster.store.clone();
    drop((admin, cluster));
    spawn_blocking(move || store.close()).await.unwrap();
}

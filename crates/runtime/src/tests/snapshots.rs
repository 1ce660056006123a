//! Snapshots of sandboxes, and sandboxes that go on from them.

use std::path::PathBuf;

use hypernetes_agent_api::fake::{Behaviour, Method};
use hypernetes_types::{SandboxId, SnapshotId};
use hypernetes_vmm::VmmError;

use super::clone::{answers, directory, goes_on, only_container};
use crate::{
    testing::{Place, Trouble, World, container_config, running},
    *,
};

fn place(world: &World) -> PathBuf {
    world.temp.path().join("state/snapshots")
}

fn wish(source: &SandboxId) -> SnapshotConfig {
    SnapshotConfig {
        id: SnapshotId::random(),
        source: source.clone(),
        size_limit: 1 << 30,
    }
}

fn of(snapshot: &SnapshotId) -> CloneConfig {
    CloneConfig {
        source: CloneSource::Snapshot(snapshot.clone()),
        containers: vec![container_config("c")],
        volumes: Vec::new(),
    }
}

/// Nothing of a snapshot is there.
async fn assert_none(world: &World, runtime: &NodeRuntime) {
    assert_eq!(runtime.list_snapshots().await, []);
    let files = std::fs::read_dir(place(world)).into_iter().flatten();
    assert_eq!(files.count(), 0);
    let records = world.store.list("/node/snapshots/", None, None, None);
    assert!(records.unwrap().entries.is_empty());
}

#[tokio::test]
async fn pods_go_on_from_a_snapshot_whose_source_is_gone() {
    let world = World::new().await;
    let mut runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    std::fs::write(directory(&world, &source).join("scratch.ext4"), "own").unwrap();
    let wish = wish(&source);
    let taken = runtime.take_snapshot(wish.clone()).await.unwrap();
    assert!(taken.ready && taken.size_bytes > 0, "{taken:?}");
    assert_eq!(taken.source, world.sandbox("a").metadata);
    assert_eq!(taken.containers[0].name, "c");
    let again = runtime.take_snapshot(wish.clone()).await.unwrap();
    assert_eq!(again, taken, "it is made once");
    goes_on(&world, &source, &container).await;
    answers(&runtime, &container).await;
    // What the source does later is not in it.
    std::fs::write(directory(&world, &source).join("scratch.ext4"), "later").unwrap();
    let images = runtime.images_in_use();
    runtime.remove_sandbox(&source).await.unwrap();
    assert_eq!(runtime.images_in_use(), images, "its images are kept");

    let mut clones = Vec::new();
    for (name, restart) in [("b", false), ("d", false), ("e", true)] {
        if restart {
            drop(runtime);
            runtime = world.open().await;
            assert_eq!(runtime.list_snapshots().await, std::slice::from_ref(&taken));
        }
        let clone = runtime.clone_sandbox(world.sandbox(name), of(&wish.id));
        let clone = clone.await.unwrap();
        let own = only_container(&runtime, &clone).await.id;
        assert_ne!(own, container);
        goes_on(&world, &clone, &own).await;
        answers(&runtime, &own).await;
        assert_eq!(world.agent(&clone).sandbox().unwrap().hostname, name);
        let disk = directory(&world, &clone).join("scratch.ext4");
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "own");
        // What one does is in none of the others.
        std::fs::write(disk, name).unwrap();
        clones.push(clone);
    }
    let macs: std::collections::BTreeSet<_> = clones
        .iter()
        .map(|clone| {
            world.agent(clone).sandbox().unwrap().interfaces[0]
                .mac
                .clone()
        })
        .collect();
    assert_eq!(macs.len(), 3);
    runtime.remove_snapshot(&wish.id).await.unwrap();
    runtime.remove_snapshot(&wish.id).await.unwrap();
    assert_none(&world, &runtime).await;
    let error = runtime
        .clone_sandbox(world.sandbox("f"), of(&wish.id))
        .await
        .unwrap_err();
    assert!(matches!(error, RuntimeError::NotFound { .. }), "{error:?}");
    for clone in &clones {
        answers(&runtime, &only_container(&runtime, clone).await.id).await;
        runtime.remove_sandbox(clone).await.unwrap();
    }
    let left = runtime.list_sandboxes().await;
    for sandbox in left {
        runtime.remove_sandbox(&sandbox.id).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn a_suspended_pod_has_snapshots_and_stays_suspended() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    runtime.suspend_sandbox(&source).await.unwrap();
    let wish = wish(&source);
    runtime.take_snapshot(wish.clone()).await.unwrap();
    assert!(runtime.sandbox(&source).await.unwrap().suspended);
    let clone = runtime.clone_sandbox(world.sandbox("b"), of(&wish.id));
    let clone = clone.await.unwrap();
    answers(&runtime, &only_container(&runtime, &clone).await.id).await;
    runtime.resume_sandbox(&source).await.unwrap();
    answers(&runtime, &container).await;
}

#[tokio::test]
async fn a_snapshot_fits_pods_of_its_namespace_and_shape_only() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, _) = running(&world, &runtime, "a").await;
    let wish = wish(&source);
    runtime.take_snapshot(wish.clone()).await.unwrap();
    type Change = fn(&mut SandboxConfig);
    let changes: [(&str, Change); 4] = [
        ("metadata.namespace", |it| {
            it.metadata.namespace = "x".into();
        }),
        ("memory_mib", |it| it.memory_mib = 256),
        ("network", |it| it.network = None),
        ("kernel", |it| it.kernel = Some("other".parse().unwrap())),
    ];
    for (field, change) in changes {
        let mut config = world.sandbox("b");
        change(&mut config);
        let refused = runtime.clone_sandbox(config, of(&wish.id)).await;
        let error = hypernetes_telemetry::chain(&refused.unwrap_err()).to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    assert_eq!(world.vmm.sandboxes(), [source]);
    assert_eq!(world.network.leases().await, 1);
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_kept_leaves_nothing_and_its_source_running() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    let scratch = directory(&world, &source).join("scratch.ext4");
    std::fs::write(scratch, vec![1; 64 << 10]).unwrap();
    let failing = || Behaviour::Fail(tonic::Code::Internal, "no".into());
    let full = Trouble::Before(std::io::ErrorKind::StorageFull);
    for step in 0..5 {
        let mut wish = wish(&source);
        let said = match step {
            0 => {
                world.vmm.refuse_suspend(VmmError::Io {
                    action: "move the state of the VM of",
                    path: "/x".into(),
                    source: std::io::ErrorKind::StorageFull.into(),
                });
                "no storage space"
            }
            1 => {
                world.agent(&source).set_behaviour(Method::Pause, failing());
                "no"
            }
            // Of the disks, and of the memory beside them.
            2 => {
                wish.size_limit = 4096;
                "size_limit"
            }
            3 => {
                wish.size_limit = 65 << 10;
                "size_limit"
            }
            _ => {
                world.gate.make_trouble(Place::Records, [full]);
                "store a snapshot record"
            }
        };
        let error = runtime.take_snapshot(wish).await.unwrap_err();
        let error = hypernetes_telemetry::chain(&error).to_string();
        assert!(error.contains(said), "{step}: {error}");
        let copies = std::fs::read_dir(directory(&world, &source).join("copies"));
        assert_eq!(copies.into_iter().flatten().count(), 0, "{step}");
        assert_none(&world, &runtime).await;
        world.calm_agents(&[Method::Pause]);
        answers(&runtime, &container).await;
    }
    let nobody = runtime.take_snapshot(wish(&SandboxId::random())).await;
    assert!(matches!(nobody, Err(RuntimeError::NotFound { .. })));
}

#[tokio::test]
async fn a_crash_anywhere_while_a_snapshot_is_made_or_removed_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (source, container) = running(&world, &runtime, "a").await;
        let wish = wish(&source);
        world.gate.close_after(steps);
        let life = async {
            runtime.take_snapshot(wish.clone()).await.unwrap();
            runtime.remove_snapshot(&wish.id).await.unwrap();
        };
        let finished = tokio::select! {
            () = life => true,
            () = world.gate.hit() => false,
        };
        drop(runtime);
        world.gate.open();
        let runtime = world.open().await;
        let report = runtime.recovery_report();
        let found = (report.lost, report.orphans, &report.failures);
        assert_eq!(found, (0, 0, &Vec::new()), "step {steps}");
        goes_on(&world, &source, &container).await;
        answers(&runtime, &container).await;
        let copies = std::fs::read_dir(directory(&world, &source).join("copies"));
        assert_eq!(copies.into_iter().flatten().count(), 0, "step {steps}");
        // Either it is whole, or nothing of it is there, and it can be made.
        match &runtime.list_snapshots().await[..] {
            [kept] => assert!(kept.ready, "step {steps}"),
            _ => assert_none(&world, &runtime).await,
        }
        runtime.take_snapshot(wish.clone()).await.unwrap();
        let clone = runtime.clone_sandbox(world.sandbox("b"), of(&wish.id));
        let clone = clone.await.unwrap();
        answers(&runtime, &only_container(&runtime, &clone).await.id).await;
        for id in [&source, &clone] {
            runtime.remove_sandbox(id).await.unwrap();
        }
        runtime.remove_snapshot(&wish.id).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(steps > 20, "only {steps} steps were seen");
            return;
        }
    }
}

/// No VM is left, nor what is in memory only, and of files that were being written not all.
fn lose_power(world: &World, source: &SandboxId, wish: &SnapshotConfig) {
    world.end_vms();
    std::fs::remove_dir_all(world.temp.path().join("run")).unwrap();
    let content = {
        let records = world.store.list("/node/snapshots/", None, None, None);
        let mut records = records.unwrap().entries.into_iter();
        records.any(|it| String::from_utf8_lossy(&it.value).contains("\"content\":{"))
    };
    let mut torn = vec![
        directory(world, source)
            .join("copies")
            .join(wish.id.as_str()),
    ];
    if !content {
        torn.push(place(world).join(wish.id.as_str()));
    }
    let files = torn
        .iter()
        .flat_map(|directory| std::fs::read_dir(directory).into_iter().flatten());
    for file in files {
        let file = std::fs::File::options()
            .write(true)
            .open(file.unwrap().path());
        let length = file.as_ref().unwrap().metadata().unwrap().len();
        file.unwrap().set_len(length / 2).unwrap();
    }
}

#[tokio::test]
async fn a_power_failure_anywhere_leaves_a_snapshot_that_is_whole_or_none() {
    for suspended in [false, true] {
        let (mut whole, mut none) = (0, 0);
        for steps in 0.. {
            let world = World::new().await;
            let runtime = world.open().await;
            let (source, container) = running(&world, &runtime, "a").await;
            std::fs::write(directory(&world, &source).join("scratch.ext4"), "own").unwrap();
            if suspended {
                runtime.suspend_sandbox(&source).await.unwrap();
            }
            let wish = wish(&source);
            let said = std::cell::Cell::new(false);
            let finished = world
                .kill_after(steps, runtime, async |runtime| {
                    runtime.take_snapshot(wish.clone()).await.unwrap();
                    said.set(true);
                    runtime.remove_snapshot(&wish.id).await.unwrap();
                })
                .await;
            lose_power(&world, &source, &wish);
            let runtime = world.open().await;
            assert_eq!(runtime.recovery_report().failures, [""; 0], "step {steps}");
            let copies = std::fs::read_dir(directory(&world, &source).join("copies"));
            assert_eq!(copies.into_iter().flatten().count(), 0, "step {steps}");
            let kept = runtime.list_snapshots().await;
            if kept.is_empty() {
                none += 1;
                assert_none(&world, &runtime).await;
                let again = runtime.take_snapshot(wish.clone()).await;
                assert_eq!(again.is_ok(), suspended, "step {steps}: {again:?}");
            } else {
                whole += u32::from(said.get());
                assert!(kept[0].ready, "step {steps}");
            }
            if suspended || !kept.is_empty() {
                let clone = runtime.clone_sandbox(world.sandbox("b"), of(&wish.id));
                let clone = clone.await.unwrap();
                answers(&runtime, &only_container(&runtime, &clone).await.id).await;
                let disk = directory(&world, &clone).join("scratch.ext4");
                assert_eq!(std::fs::read_to_string(disk).unwrap(), "own");
                runtime.remove_sandbox(&clone).await.unwrap();
            } else {
                assert_none(&world, &runtime).await;
            }
            if suspended {
                runtime.resume_sandbox(&source).await.unwrap();
                answers(&runtime, &container).await;
            }
            runtime.remove_sandbox(&source).await.unwrap();
            runtime.remove_snapshot(&wish.id).await.unwrap();
            world.assert_clean().await;
            if finished {
                assert!(whole > 0 && none > 10, "{whole} whole, {none} not there");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_snapshot_whose_files_are_gone_is_none() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, _) = running(&world, &runtime, "a").await;
    let wish = wish(&source);
    runtime.take_snapshot(wish.clone()).await.unwrap();
    drop(runtime);
    std::fs::remove_dir_all(place(&world).join(wish.id.as_str())).unwrap();
    let runtime = world.open().await;
    assert_eq!(runtime.recovery_report().failures, [""; 0]);
    assert_none(&world, &runtime).await;
    assert!(runtime.take_snapshot(wish).await.unwrap().ready);
}

#[tokio::test]
async fn a_crash_anywhere_while_a_pod_goes_on_from_a_snapshot_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (source, _) = running(&world, &runtime, "a").await;
        let wish = wish(&source);
        let taken = runtime.take_snapshot(wish.clone()).await.unwrap();
        runtime.remove_sandbox(&source).await.unwrap();
        world.gate.close_after(steps);
        let finished = tokio::select! {
            cloned = runtime.clone_sandbox(world.sandbox("b"), of(&wish.id)) => {
                cloned.unwrap();
                true
            }
            () = world.gate.hit() => false,
        };
        drop(runtime);
        world.gate.open();
        let runtime = world.open().await;
        assert_eq!(runtime.recovery_report().lost, 0, "step {steps}");
        assert_eq!(runtime.list_snapshots().await, [taken]);
        let clone = runtime.clone_sandbox(world.sandbox("b"), of(&wish.id));
        let clone = clone.await.unwrap();
        let own = only_container(&runtime, &clone).await.id;
        goes_on(&world, &clone, &own).await;
        answers(&runtime, &own).await;
        runtime.remove_sandbox(&clone).await.unwrap();
        runtime.remove_snapshot(&wish.id).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(steps > 10, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn what_no_record_names_goes() {
    let world = World::new().await;
    let orphan = place(&world).join(SnapshotId::random().as_str());
    let foreign = place(&world).join("not-ours");
    for directory in [&orphan, &foreign] {
        std::fs::create_dir_all(directory).unwrap();
    }
    let runtime = world.open().await;
    assert_eq!(runtime.recovery_report().orphans, 1);
    assert!(!orphan.exists() && foreign.exists());
}

//! Pods that are suspended, cloned and kept beside a disk that is nearly full, and beside each other.

use std::{path::PathBuf, time::Duration};

use hypernetes_types::{SandboxId, SnapshotId};

use super::clone::{answers, directory, goes_on, only_container};
use crate::{
    room::KEPT,
    testing::{Place, Trouble, World, container_config, running},
    *,
};

const MIB: u64 = 1 << 20;

fn state(world: &World) -> PathBuf {
    world.temp.path().join("state")
}

/// So many MiB can be had beside what is left to the records.
fn leave(world: &World, mib: u64) {
    world.gate.set_free(&state(world), KEPT + mib * MIB);
}

fn left(world: &World) -> u64 {
    world.gate.free(&state(world), 0)
}

/// What is written of VMs from now on is all written at the same time.
fn write_slowly(world: &World) {
    let slow = Trouble::Slow(Duration::from_millis(300));
    world.gate.make_trouble(Place::Vmm, [slow, slow, slow]);
}

fn write(world: &World, sandbox: &SandboxId, mib: usize) {
    let scratch = directory(world, sandbox).join("scratch.ext4");
    std::fs::write(scratch, vec![1; mib << 20]).unwrap();
}

fn clone_of(source: CloneSource) -> CloneConfig {
    CloneConfig {
        source,
        containers: vec![container_config("c")],
        volumes: Vec::new(),
    }
}

fn wish(source: &SandboxId, size_limit: u64) -> SnapshotConfig {
    SnapshotConfig {
        id: SnapshotId::random(),
        source: source.clone(),
        size_limit,
    }
}

fn copies(world: &World, sandbox: &SandboxId) -> usize {
    let copies = std::fs::read_dir(directory(world, sandbox).join("copies"));
    copies.into_iter().flatten().count()
}

#[track_caller]
fn assert_no_room(error: &RuntimeError, said: &str) {
    assert!(matches!(error, RuntimeError::NoRoom { .. }), "{error:?}");
    assert!(error.to_string().contains(said), "{error}");
}

#[tokio::test]
async fn suspends_at_the_same_time_do_not_count_on_the_same_room() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (one, _) = running(&world, &runtime, "a").await;
    let (other, _) = running(&world, &runtime, "b").await;
    world.vmm.set_state_bytes(8 << 20);
    leave(&world, 12);
    write_slowly(&world);
    let (first, second) = tokio::join!(
        runtime.suspend_sandbox(&one),
        runtime.suspend_sandbox(&other)
    );
    assert!(left(&world) >= KEPT, "{} are left", left(&world));
    let (runs_on, error) = match (first, second) {
        (Ok(()), Err(error)) => (&other, error),
        (Err(error), Ok(())) => (&one, error),
        both => panic!("there is room for one: {both:?}"),
    };
    assert_no_room(&error, "no room for the memory");
    assert!(!runtime.sandbox(runs_on).await.unwrap().suspended);
    let container = only_container(&runtime, runs_on).await.id;
    answers(&runtime, &container).await;
    leave(&world, 12);
    runtime.suspend_sandbox(runs_on).await.unwrap();
    for id in [&one, &other] {
        runtime.remove_sandbox(id).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn what_fits_one_after_the_other_is_not_refused_for_being_asked_at_once() {
    let world = World::new().await;
    let runtime = world.open().await;
    let mut sandboxes = Vec::new();
    for name in ["a", "b", "d"] {
        sandboxes.push(running(&world, &runtime, name).await.0);
    }
    let [one, two, source] = &sandboxes[..] else {
        unreachable!("there are three");
    };
    world.vmm.set_state_bytes(8 << 20);
    // Of what each could need there is a tenth.
    leave(&world, 30);
    write_slowly(&world);
    let clone = runtime.clone_sandbox(
        world.sandbox("e"),
        clone_of(CloneSource::Sandbox(source.clone())),
    );
    let (first, second, clone) = tokio::join!(
        runtime.suspend_sandbox(one),
        runtime.suspend_sandbox(two),
        clone
    );
    first.unwrap();
    second.unwrap();
    let clone = clone.unwrap();
    answers(&runtime, &only_container(&runtime, &clone).await.id).await;
    assert!(left(&world) >= KEPT, "{} are left", left(&world));
}

#[tokio::test]
async fn a_copy_whose_disks_do_not_fit_is_refused_and_leaves_nothing() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    write(&world, &source, 16);
    let kept = wish(&source, 40 * MIB);
    runtime.take_snapshot(kept.clone()).await.unwrap();
    let origins = || {
        let snapshot = CloneSource::Snapshot(kept.id.clone());
        [CloneSource::Sandbox(source.clone()), snapshot]
    };
    for suspended in [false, true] {
        leave(&world, 12);
        if suspended {
            runtime.suspend_sandbox(&source).await.unwrap();
        }
        for origin in origins() {
            let cloned = runtime.clone_sandbox(world.sandbox("b"), clone_of(origin));
            assert_no_room(&cloned.await.unwrap_err(), "no room for the copy");
        }
        let refused = runtime.take_snapshot(wish(&source, 40 * MIB)).await;
        assert_no_room(&refused.unwrap_err(), "no room for the copy");
        assert_eq!(runtime.list_snapshots().await.len(), 1);
        assert_eq!(copies(&world, &source), 0);
        assert_eq!(world.vmm.sandboxes().is_empty(), suspended);
        assert_eq!(world.network.leases().await, 1);
        if !suspended {
            goes_on(&world, &source, &container).await;
            answers(&runtime, &container).await;
        }
    }
    runtime.resume_sandbox(&source).await.unwrap();
    goes_on(&world, &source, &container).await;
    // With room it is as ever.
    leave(&world, 100);
    for (name, origin) in ["d", "e"].into_iter().zip(origins()) {
        let cloned = runtime.clone_sandbox(world.sandbox(name), clone_of(origin));
        cloned.await.unwrap();
    }
    runtime
        .take_snapshot(wish(&source, 40 * MIB))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_hole_needs_no_room() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, _) = running(&world, &runtime, "a").await;
    let scratch = std::fs::File::create(directory(&world, &source).join("scratch.ext4"));
    scratch.unwrap().set_len(1 << 40).unwrap();
    leave(&world, 4);
    let origin = CloneSource::Sandbox(source.clone());
    let cloned = runtime.clone_sandbox(world.sandbox("b"), clone_of(origin));
    let clone = cloned.await.unwrap();
    let disk = directory(&world, &clone).join("scratch.ext4");
    assert_eq!(std::fs::metadata(disk).unwrap().len(), 1 << 40);
}

#[tokio::test]
async fn a_size_limit_is_room_enough() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    // Far less than its memory could be.
    leave(&world, 12);
    let refused = runtime.take_snapshot(wish(&source, 1 << 30)).await;
    assert_no_room(&refused.unwrap_err(), "no room for the copy");
    world.vmm.set_state_bytes(9 << 20);
    let refused = runtime.take_snapshot(wish(&source, 8 * MIB)).await;
    let error = refused.unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Invalid { field, .. } if field == "size_limit"),
        "{error:?}"
    );
    assert_eq!(copies(&world, &source), 0);
    answers(&runtime, &container).await;
    runtime
        .take_snapshot(wish(&source, 10 * MIB))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_disk_that_grows_before_its_vm_stands_still_is_held_to_the_room_that_there_is() {
    let (mut large, mut no_room, mut taken) = (0, 0, 0);
    for step in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (source, container) = running(&world, &runtime, "a").await;
        leave(&world, 5);
        world.gate.close_after(u64::MAX);
        let scratch = directory(&world, &source).join("scratch.ext4");
        let grown = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let grows = std::sync::Arc::clone(&grown);
        world.gate.at(step, move || {
            std::fs::write(scratch, vec![1; 4 << 20]).unwrap();
            grows.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        match runtime.take_snapshot(wish(&source, 2 * MIB)).await {
            Ok(_) => taken += 1,
            Err(RuntimeError::Invalid { .. }) => large += 1,
            Err(error) => {
                assert_no_room(&error, "no room for the copy");
                // Of the disk as it is when the VM stands still, and not of what may be kept.
                no_room += u32::from(error.to_string().contains("it may need 4 MiB"));
            }
        }
        assert_eq!(copies(&world, &source), 0, "step {step}");
        answers(&runtime, &container).await;
        if !grown.load(std::sync::atomic::Ordering::SeqCst) {
            break;
        }
    }
    assert!(
        large > 0 && no_room > 3 && taken > 0,
        "{large} too large, {no_room} without room, {taken} taken"
    );
}

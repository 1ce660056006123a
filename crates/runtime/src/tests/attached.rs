//! Volumes that outlive their pods.

use std::sync::atomic::Ordering;

use hypernetes_agent_api::{
    FEATURE_DISK_VOLUMES, FEATURES, PROTOCOL_VERSION,
    fake::{Behaviour, Method},
    v1,
};
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_vmm::VmExit;
use hypernetes_volume::{VolumeDriver, VolumeMode};

use crate::{
    testing::{World, container_config},
    *,
};

const MIB: u64 = 1 << 20;

fn disk(name: &str, volume: &str, read_only: bool) -> VolumeConfig {
    VolumeConfig {
        name: name.into(),
        kind: VolumeKind::Disk {
            volume: volume.into(),
            read_only,
            group_change: GroupChange::OnRootMismatch,
        },
        gid: Some(2000),
    }
}

fn with_device(name: &str, volume: &str) -> ContainerConfig {
    let mut config = container_config(name);
    config.devices = vec![DeviceConfig {
        volume: volume.into(),
        destination: "/dev/raw".into(),
        ..Default::default()
    }];
    config
}

async fn world() -> World {
    let world = World::new().await;
    for (name, mode) in [
        ("data", VolumeMode::Filesystem),
        ("more", VolumeMode::Filesystem),
        ("raw", VolumeMode::Block),
    ] {
        let id = name.parse().unwrap();
        world.volumes.create(&id, MIB, mode).await.unwrap();
    }
    world
}

async fn attached_to(world: &World, volume: &str) -> Vec<String> {
    let info = world.volumes.get(&volume.parse().unwrap()).await.unwrap();
    info.unwrap().attached_to
}

fn in_use_by(result: Result<(), RuntimeError>, names: &[&str]) -> bool {
    matches!(result, Err(RuntimeError::VolumeInUse { by, .. }) if by == names)
}

#[tokio::test]
async fn a_volume_goes_from_one_pod_to_the_next_when_the_vm_has_ended() {
    let world = world().await;
    let runtime = world.open().await;
    let a = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let b = runtime.run_sandbox(world.sandbox("b")).await.unwrap();
    let volume = || disk("v", "data", false);
    for _ in 0..2 {
        runtime.write_volume(&a, volume()).await.unwrap();
    }
    assert_eq!(world.vmm.disks(&a).unwrap(), [1, 254]);
    let told = world.agent(&a).volumes()["v"].clone();
    let expected = v1::DiskVolume {
        slot: 254,
        read_only: false,
        keep_matching_root: true,
    };
    assert_eq!(told.kind, Some(v1::volume::Kind::Disk(expected)));
    assert_eq!(attached_to(&world, "data").await, [a.to_string()]);

    for read_only in [false, true] {
        let refused = runtime.write_volume(&b, disk("v", "data", read_only)).await;
        assert!(in_use_by(refused, &["acme/a"]));
    }
    assert_eq!(world.vmm.disks(&b).unwrap(), [1]);
    // Also after a restart of the node, and while a VM that has ended is not cleared away.
    drop(runtime);
    let runtime = world.open().await;
    runtime.write_volume(&a, volume()).await.unwrap();
    let status = "killed".to_owned();
    assert!(world.vmm.end(&a, VmExit::VmmDied { status }));
    assert!(in_use_by(
        runtime.write_volume(&b, volume()).await,
        &["acme/a"]
    ));
    runtime.stop_sandbox(&a).await.unwrap();
    assert!(attached_to(&world, "data").await.is_empty());
    runtime.write_volume(&b, volume()).await.unwrap();
    assert_eq!(attached_to(&world, "data").await, [b.to_string()]);
    for sandbox in [a, b] {
        runtime.remove_sandbox(&sandbox).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn many_pods_read_one_volume() {
    let world = world().await;
    let runtime = world.open().await;
    let mut readers = Vec::new();
    for name in ["a", "b"] {
        let sandbox = runtime.run_sandbox(world.sandbox(name)).await.unwrap();
        let volume = disk("v", "data", true);
        runtime.write_volume(&sandbox, volume).await.unwrap();
        readers.push(sandbox);
    }
    let writer = runtime.run_sandbox(world.sandbox("c")).await.unwrap();
    let refused = runtime
        .write_volume(&writer, disk("v", "data", false))
        .await;
    assert!(in_use_by(refused, &["acme/a", "acme/b"]));
    // One pod cannot have it both ways.
    let both = runtime
        .write_volume(&readers[0], disk("w", "data", false))
        .await;
    assert!(matches!(both, Err(RuntimeError::Invalid { field, .. }) if field == "volume"));
    // Twice by two names is once on the bus.
    let again = disk("w", "data", true);
    runtime.write_volume(&readers[0], again).await.unwrap();
    assert_eq!(world.vmm.disks(&readers[0]).unwrap(), [1, 254]);
    // What is only read does not grow.
    runtime.grow_volume(&readers[0], "data").await.unwrap();
    assert!(world.agent(&readers[0]).grown().is_empty());
}

#[tokio::test]
async fn a_block_volume_is_a_device_of_every_container_that_names_it() {
    let world = world().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let mut containers = Vec::new();
    for name in ["one", "two"] {
        let config = with_device(name, "raw");
        let id = runtime.create_container(&sandbox, config).await.unwrap();
        let request = world.agent(&sandbox).containers()[id.as_str()].clone();
        let device = v1::Device {
            destination: "/dev/raw".into(),
            slot: 254,
        };
        assert_eq!(request.devices, [device]);
        containers.push(id);
    }
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 2, 3, 254]);
    for id in &containers {
        runtime.remove_container(id).await.unwrap();
    }
    // It stays until the VM ends.
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
    assert_eq!(attached_to(&world, "raw").await, [sandbox.to_string()]);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_by_name_and_leaves_nothing() {
    let world = world().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    for (volume, says) in [
        ("unknown", "volume unknown does not exist"),
        ("../up", "invalid volume name"),
        ("raw", "must be Block, as volume raw is"),
    ] {
        let error = runtime
            .write_volume(&sandbox, disk("v", volume, false))
            .await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let config = with_device("c", "data");
    let error = runtime
        .create_container(&sandbox, config)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("must be Filesystem"), "{error}");
    assert!(runtime.list_containers(None).await.is_empty());

    world.refuse_plugs.store(1, Ordering::SeqCst);
    let volume = || disk("v", "data", false);
    runtime.write_volume(&sandbox, volume()).await.unwrap_err();
    assert!(attached_to(&world, "data").await.is_empty());
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1]);

    // A guest that cannot mount it keeps the disk, and is asked again.
    let agent = world.agent(&sandbox);
    let failure = Behaviour::Fail(tonic::Code::Internal, "cannot mount volume v".into());
    agent.set_behaviour(Method::WriteVolume, failure);
    let error = runtime.write_volume(&sandbox, volume()).await.unwrap_err();
    assert!(
        error.to_string().contains("cannot mount volume v"),
        "{error}"
    );
    agent.set_behaviour(Method::WriteVolume, Behaviour::Normal);
    runtime.write_volume(&sandbox, volume()).await.unwrap();
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_guest_of_an_earlier_release_is_not_given_what_it_does_not_know() {
    let world = world().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    drop(runtime);
    let old = FEATURES
        .iter()
        .filter(|name| **name != FEATURE_DISK_VOLUMES);
    world.agent(&sandbox).set_hello(v1::HelloResponse {
        version: PROTOCOL_VERSION,
        features: old.map(|name| (*name).to_owned()).collect(),
        configured: true,
        ..Default::default()
    });
    let runtime = world.open().await;
    let refused = runtime
        .write_volume(&sandbox, disk("v", "data", false))
        .await;
    assert!(matches!(refused, Err(RuntimeError::Invalid { field, .. }) if field == "volume"));
    assert!(attached_to(&world, "data").await.is_empty());
}

#[tokio::test]
async fn a_volume_grows_where_it_is_and_only_there() {
    let world = world().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    runtime.grow_volume(&sandbox, "data").await.unwrap();
    let volume = disk("v", "data", false);
    runtime.write_volume(&sandbox, volume).await.unwrap();
    let id = "data".parse().unwrap();
    world.volumes.expand(&id, 3 * MIB).await.unwrap();
    for _ in 0..2 {
        runtime.grow_volume(&sandbox, "data").await.unwrap();
    }
    assert_eq!(world.agent(&sandbox).grown(), [(254, 3 * MIB)].into());
    runtime.stop_sandbox(&sandbox).await.unwrap();
    runtime.grow_volume(&sandbox, "data").await.unwrap();
}

#[tokio::test]
async fn attachments_of_sandboxes_that_are_gone_go_at_the_start() {
    let world = world().await;
    let gone = SandboxId::random();
    let data = "data".parse().unwrap();
    let raw = "raw".parse().unwrap();
    world
        .volumes
        .attach(&data, gone.as_str(), false)
        .await
        .unwrap();
    world
        .volumes
        .attach(&raw, "not-a-sandbox", false)
        .await
        .unwrap();
    let runtime = world.open().await;
    assert!(attached_to(&world, "data").await.is_empty());
    assert_eq!(attached_to(&world, "raw").await, ["not-a-sandbox"]);
    // One that is there and has another volume does not have this one.
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let volume = disk("v", "more", false);
    runtime.write_volume(&sandbox, volume).await.unwrap();
    world
        .volumes
        .attach(&data, sandbox.as_str(), false)
        .await
        .unwrap();
    drop(runtime);
    let runtime = world.open().await;
    assert!(attached_to(&world, "data").await.is_empty());
    assert_eq!(attached_to(&world, "more").await, [sandbox.to_string()]);
    assert!(runtime.recovery_report().failures.is_empty());
}

#[tokio::test]
async fn a_stop_that_was_cut_short_is_not_a_power_failure_for_the_volumes() {
    let world = world().await;
    let runtime = world.open().await;
    let (sandbox, _) = bring_up(&world, &runtime).await;
    let agent = world.agent(&sandbox);
    // Its intent is stored, and no more.
    world.gate.close_after(1);
    tokio::select! {
        stopped = runtime.stop_sandbox(&sandbox) => panic!("{stopped:?}"),
        () = world.gate.hit() => {}
    }
    drop(runtime);
    assert!(!agent.calls().contains(&Method::Shutdown));
    world.gate.open();
    let runtime = world.open().await;
    assert_eq!(runtime.recovery_report().finished, 1);
    assert!(agent.calls().contains(&Method::Shutdown));
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

async fn bring_up(world: &World, runtime: &NodeRuntime) -> (SandboxId, ContainerId) {
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let volume = disk("v", "data", false);
    runtime.write_volume(&sandbox, volume).await.unwrap();
    let config = with_device("c", "raw");
    let container = runtime.create_container(&sandbox, config).await.unwrap();
    (sandbox, container)
}

/// Nothing is attached to anybody but sandboxes that may run.
async fn assert_attached(world: &World, runtime: &NodeRuntime, steps: u64) {
    for volume in world.volumes.list().await.unwrap() {
        for pod in volume.attached_to {
            let sandbox = runtime.sandbox(&pod.parse().unwrap()).await;
            let state = sandbox.map(|sandbox| sandbox.state);
            assert_eq!(
                state,
                Some(SandboxState::Ready),
                "step {steps}: {}",
                volume.id
            );
        }
    }
}

#[tokio::test]
async fn a_crash_anywhere_while_volumes_are_attached_is_made_good() {
    for steps in 0.. {
        let world = world().await;
        let runtime = world.open().await;
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                bring_up(&world, runtime).await;
            })
            .await;
        let runtime = world.open().await;
        assert_attached(&world, &runtime, steps).await;
        let (sandbox, _) = bring_up(&world, &runtime).await;
        for volume in ["data", "raw"] {
            assert_eq!(attached_to(&world, volume).await, [sandbox.to_string()]);
        }
        let disks = world.vmm.disks(&sandbox).unwrap();
        assert!(disks.ends_with(&[253, 254]), "step {steps}: {disks:?}");
        runtime.remove_sandbox(&sandbox).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(steps > 20, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn a_crash_anywhere_while_volumes_are_detached_is_made_good() {
    for steps in 0.. {
        let world = world().await;
        let runtime = world.open().await;
        let (sandbox, _) = bring_up(&world, &runtime).await;
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                runtime.stop_sandbox(&sandbox).await.unwrap();
                runtime.remove_sandbox(&sandbox).await.unwrap();
            })
            .await;
        // Whoever has a VM has its volumes.
        if world.vmm.sandboxes() == [sandbox.clone()] {
            assert_eq!(attached_to(&world, "data").await, [sandbox.to_string()]);
        }
        let runtime = world.open().await;
        assert_attached(&world, &runtime, steps).await;
        runtime.remove_sandbox(&sandbox).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(steps > 10, "only {steps} steps were seen");
            return;
        }
    }
}

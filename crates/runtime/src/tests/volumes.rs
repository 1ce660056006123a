//! Volumes with a size limit, and the disks that they have for themselves.

use std::sync::atomic::Ordering;

use hypernetes_agent_api::{
    fake::{Behaviour, Method},
    v1,
};
use hypernetes_types::{ContainerId, SandboxId};

use crate::{
    testing::{World, container_config, eventually},
    *,
};

fn limited(name: &str, size_limit: u64) -> VolumeConfig {
    VolumeConfig {
        name: name.into(),
        kind: VolumeKind::EmptyDir {
            memory: false,
            size_limit,
        },
        gid: None,
    }
}

#[tokio::test]
async fn a_mounted_image_is_in_use_and_shares_layers() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let image = |name: &str| MountConfig {
        image: name.into(),
        destination: format!("/{name}"),
        readonly: true,
        ..Default::default()
    };
    let mut config = container_config("c");
    config.mounts = vec![image("box"), image("gone")];
    let missing = runtime.create_container(&sandbox, config.clone()).await;
    assert!(matches!(missing, Err(RuntimeError::ImageVolume(_))));
    config.mounts.pop();
    let container = runtime.create_container(&sandbox, config).await.unwrap();
    let agent = world.agent(&sandbox);
    let request = agent.containers()[container.as_str()].clone();
    let Some(v1::mount::Source::Image(layers)) = &request.mounts[0].source else {
        panic!("{request:?}");
    };
    assert_eq!(layers.slots.len(), 2);
    assert_eq!(layers.slots[0], request.layer_slots[0], "the common layer");
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 2, 3, 4]);

    // Also after a restart of the node.
    drop(runtime);
    let runtime = world.open().await;
    let id = runtime.image("box").await.unwrap().id;
    assert!(runtime.images_in_use().contains(&id));
    assert!(runtime.remove_image("box").await.is_err());
    runtime.remove_container(&container).await.unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1]);
    assert!(!runtime.images_in_use().contains(&id));
}

#[tokio::test]
async fn a_device_goes_with_its_container() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let device = || HostDevice {
        file: std::fs::File::open("/dev/null").unwrap(),
        read_only: true,
    };
    // Nobody's disk goes when it is told to, and is nobody's in the meantime.
    let slot = runtime.attach_device(&sandbox, device()).await.unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, slot]);
    runtime.detach_unused(&sandbox).await.unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1]);
    let mut config = container_config("c");
    config.devices = vec![DeviceConfig {
        slot,
        destination: "/dev/xvda".into(),
        ..Default::default()
    }];
    let refused = runtime.create_container(&sandbox, config.clone()).await;
    assert!(matches!(refused, Err(RuntimeError::Invalid { field, .. }) if field == "devices"));

    let other = runtime
        .create_container(&sandbox, container_config("other"))
        .await
        .unwrap();
    let slot = runtime.attach_device(&sandbox, device()).await.unwrap();
    // While it waits for its container, another's end does not take it away.
    runtime.remove_container(&other).await.unwrap();
    config.devices[0].slot = slot;
    let container = runtime.create_container(&sandbox, config).await.unwrap();
    let request = world.agent(&sandbox).containers()[container.as_str()].clone();
    assert_eq!(request.devices[0].slot, slot);
    assert_eq!(request.devices[0].destination, "/dev/xvda");
    runtime.detach_unused(&sandbox).await.unwrap();
    drop(runtime);
    let runtime = world.open().await;
    let second = runtime.attach_device(&sandbox, device()).await.unwrap();
    assert_ne!(second, slot, "the first is taken, also after a restart");
    runtime.remove_container(&container).await.unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, second]);
}

fn slot_of(world: &World, sandbox: &SandboxId, volume: &str) -> u32 {
    match world.agent(sandbox).volumes()[volume].kind {
        Some(v1::volume::Kind::EmptyDir(empty)) => empty.disk_slot,
        _ => panic!("{volume} is no emptyDir"),
    }
}

fn is_refused(result: Result<(), RuntimeError>) -> bool {
    matches!(result, Err(RuntimeError::Invalid { field, .. }) if field == "size_limit")
}

#[tokio::test]
async fn a_limited_volume_has_a_disk_as_long_as_its_sandbox() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    for _ in 0..2 {
        let volume = limited("data", 1 << 20);
        runtime.write_volume(&sandbox, volume).await.unwrap();
        assert_eq!(slot_of(&world, &sandbox, "data"), 254);
    }
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
    let path = format!("state/sandboxes/{sandbox}/volume-254.ext4");
    let file = world.temp.path().join(path);
    assert!(file.metadata().unwrap().len() > 1 << 20);
    assert!(is_refused(
        runtime
            .write_volume(&sandbox, limited("data", 2 << 20))
            .await
    ));

    // What the scratch disk limits already, and what is in memory, has none.
    let memory = VolumeConfig {
        kind: VolumeKind::EmptyDir {
            memory: true,
            size_limit: 1 << 20,
        },
        ..limited("memory", 0)
    };
    for volume in [limited("free", 0), limited("large", 16 << 20), memory] {
        let name = volume.name.clone();
        runtime.write_volume(&sandbox, volume).await.unwrap();
        assert_eq!(slot_of(&world, &sandbox, &name), 0, "{name}");
    }

    // Containers come and go, the node too.
    let container = runtime
        .create_container(&sandbox, container_config("c"))
        .await
        .unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 2, 3, 254]);
    drop(runtime);
    let runtime = world.open().await;
    runtime.remove_container(&container).await.unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
    let volume = limited("data", 1 << 20);
    runtime.write_volume(&sandbox, volume).await.unwrap();
    assert_eq!(slot_of(&world, &sandbox, "data"), 254);
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
    assert!(file.exists());

    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn slots_for_limited_volumes_run_out_with_the_field_s_name() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    for number in 0..32 {
        let volume = limited(&format!("v{number}"), 4096);
        runtime.write_volume(&sandbox, volume).await.unwrap();
    }
    assert!(is_refused(
        runtime.write_volume(&sandbox, limited("more", 4096)).await
    ));
    // There is room for the layers of images still.
    runtime
        .create_container(&sandbox, container_config("c"))
        .await
        .unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap().len(), 1 + 32 + 2);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_guest_that_fails_to_mount_is_asked_again_for_the_same_disk() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let agent = world.agent(&sandbox);
    let failure = Behaviour::Fail(tonic::Code::Internal, "cannot mount".into());
    agent.set_behaviour(Method::WriteVolume, failure);
    let volume = || limited("data", 4096);
    runtime.write_volume(&sandbox, volume()).await.unwrap_err();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
    agent.set_behaviour(Method::WriteVolume, Behaviour::Normal);
    runtime.write_volume(&sandbox, volume()).await.unwrap();
    assert_eq!(slot_of(&world, &sandbox, "data"), 254);
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
}

#[tokio::test]
async fn a_disk_that_cannot_be_plugged_is_taken_back() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    world.refuse_plugs.store(1, Ordering::SeqCst);
    let volume = || limited("data", 4096);
    runtime.write_volume(&sandbox, volume()).await.unwrap_err();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1]);
    // Another limit is no contradiction: there is no such volume yet.
    let other = limited("data", 8192);
    runtime.write_volume(&sandbox, other).await.unwrap();
    assert_eq!(slot_of(&world, &sandbox, "data"), 254);
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 254]);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

async fn bring_up(runtime: &NodeRuntime, sandbox: &SandboxId) -> ContainerId {
    for name in ["one", "two"] {
        let volume = limited(name, 1 << 20);
        runtime.write_volume(sandbox, volume).await.unwrap();
    }
    runtime
        .create_container(sandbox, container_config("c"))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_crash_anywhere_while_volumes_are_made_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                bring_up(runtime, &sandbox).await;
            })
            .await;
        let runtime = world.open().await;
        let container = bring_up(&runtime, &sandbox).await;
        let slots = ["one", "two"].map(|name| slot_of(&world, &sandbox, name));
        assert_eq!(slots, [254, 253], "after a crash at step {steps}");
        let only_ours = || async { world.vmm.disks(&sandbox).unwrap() == [1, 2, 3, 253, 254] };
        eventually("only the disks in use are plugged", only_ours).await;
        runtime.remove_container(&container).await.unwrap();
        assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 253, 254]);
        runtime.remove_sandbox(&sandbox).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(steps > 10, "only {steps} steps were seen");
            return;
        }
    }
}

//! Sandboxes that go on from others.

use std::path::PathBuf;

use hypernetes_agent_api::fake::{Behaviour, Method};
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_vmm::VmmError;
use hypernetes_volume::{VolumeDriver, VolumeMode};

use crate::{
    testing::{STDOUT, World, container_config, eventually, running},
    *,
};

pub(super) fn directory(world: &World, sandbox: &SandboxId) -> PathBuf {
    let place = world.temp.path().join("state/sandboxes");
    place.join(sandbox.as_str())
}

fn of(source: &SandboxId) -> CloneConfig {
    CloneConfig {
        source: CloneSource::Sandbox(source.clone()),
        containers: vec![container_config("c")],
        volumes: Vec::new(),
    }
}

pub(super) async fn answers(runtime: &NodeRuntime, container: &ContainerId) {
    let config = ExecConfig {
        command: vec!["true".into()],
        ..Default::default()
    };
    let session = runtime.exec(container, config).await.unwrap();
    assert_eq!(session.exit.await.unwrap().unwrap(), 0);
}

pub(super) async fn only_container(runtime: &NodeRuntime, sandbox: &SandboxId) -> ContainerStatus {
    let mut all = runtime.list_containers(Some(sandbox)).await;
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

/// Its containers go on, in the guest too.
pub(super) async fn goes_on(world: &World, sandbox: &SandboxId, container: &ContainerId) {
    let agent = world.agent(sandbox);
    eventually("it goes on", || async {
        let state = agent.state(container.as_str());
        state.is_some_and(|state| !state.paused)
    })
    .await;
    assert_eq!(world.vmm.stands_still(sandbox), Some(false));
}

#[tokio::test]
async fn a_clone_goes_on_as_a_pod_of_its_own_and_its_source_as_it_was() {
    let world = World::new().await;
    let mut runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    let limited = VolumeConfig {
        name: "v".into(),
        kind: VolumeKind::EmptyDir {
            memory: false,
            size_limit: 1 << 20,
        },
        gid: None,
    };
    runtime.write_volume(&source, limited).await.unwrap();
    // One that has ended, and one that the new pod does not have.
    for (name, ends) in [("init", true), ("other", false)] {
        let config = container_config(name);
        let id = runtime.create_container(&source, config).await.unwrap();
        runtime.start_container(&id).await.unwrap();
        if ends {
            world.agent(&source).exit(id.as_str(), 0);
            testing::exited(&runtime, &id).await;
        }
    }
    for name in ["scratch.ext4", "volume-254.ext4"] {
        std::fs::write(directory(&world, &source).join(name), name).unwrap();
    }
    let agent = world.agent(&source);
    agent.output(container.as_str(), STDOUT, b"before\n");
    eventually("output", || async {
        world.log("a", "c", "stdout") == "before\n"
    })
    .await;
    let before = runtime.container(&container).await.unwrap();

    let mut config = of(&source);
    config.containers.push(container_config("init"));
    let file = VolumeFile {
        content: "own".into(),
        mode: 0o644,
        uid: 0,
    };
    config.volumes.push(VolumeConfig {
        name: "token".into(),
        kind: VolumeKind::Files {
            files: [("token".to_owned(), file)].into(),
        },
        gid: None,
    });
    let wanted = world.sandbox("b");
    let clone = runtime.clone_sandbox(wanted.clone(), config.clone()).await;
    let clone = clone.unwrap();
    assert_ne!(clone, source);
    let again = runtime.clone_sandbox(wanted, config).await.unwrap();
    assert_eq!(again, clone, "it is made once");

    let all = runtime.list_containers(Some(&clone)).await;
    let named = |name: &str| {
        all.iter()
            .find(|it| it.config.name == name)
            .unwrap()
            .clone()
    };
    let (own, init) = (named("c"), named("init"));
    assert_eq!(own.state, ContainerState::Running);
    assert_eq!((init.state, init.exit_code), (ContainerState::Exited, 0));
    assert_ne!(own.id, container);
    goes_on(&world, &clone, &own.id).await;
    goes_on(&world, &source, &container).await;
    eventually("the other is removed", || async {
        runtime.list_containers(Some(&clone)).await.len() == 2
    })
    .await;

    let twin = world.agent(&clone);
    let identity = twin.sandbox().unwrap();
    let former = agent.sandbox().unwrap();
    assert_eq!(identity.hostname, "b");
    assert_ne!(identity.seed, former.seed);
    let (nic, was) = (&identity.interfaces[0], &former.interfaces[0]);
    assert_eq!(nic.device_mac, was.mac);
    assert_ne!(nic.mac, was.mac);
    assert_ne!(nic.addresses, was.addresses);
    assert!(twin.volumes().contains_key("token"));
    assert!(!agent.volumes().contains_key("token"));
    // All of it was there before anything went on.
    let calls = twin.calls();
    let at = |method| calls.iter().position(|call| *call == method).unwrap();
    assert!(
        at(Method::Personalize) < at(Method::WriteVolume),
        "{calls:?}"
    );
    assert!(at(Method::WriteVolume) < at(Method::Pause), "{calls:?}");

    assert_eq!(world.vmm.disks(&clone), world.vmm.disks(&source));
    for name in ["scratch.ext4", "volume-254.ext4"] {
        let copy = std::fs::read_to_string(directory(&world, &clone).join(name));
        assert_eq!(copy.unwrap(), name);
    }
    assert!(!directory(&world, &clone).join("memory.vm").exists());

    for restart in [false, true] {
        if restart {
            drop(runtime);
            runtime = world.open().await;
            let report = runtime.recovery_report();
            assert_eq!((report.adopted, report.lost), (2, 0));
        }
        answers(&runtime, &container).await;
        answers(&runtime, &own.id).await;
    }
    assert_eq!(runtime.container(&container).await.unwrap(), before);
    agent.output(container.as_str(), STDOUT, b"source\n");
    twin.output(own.id.as_str(), STDOUT, b"clone\n");
    eventually("both logs", || async {
        world.log("a", "c", "stdout") == "before\nsource\n"
            && world.log("b", "c", "stdout") == "clone\n"
    })
    .await;
    assert_eq!(world.network.leases().await, 2);
    runtime.remove_sandbox(&source).await.unwrap();
    answers(&runtime, &own.id).await;
    runtime.remove_sandbox(&clone).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_paused_container_is_paused_in_the_clone_too() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    runtime.set_paused(&container, true).await.unwrap();
    let clone = runtime.clone_sandbox(world.sandbox("b"), of(&source)).await;
    let clone = clone.unwrap();
    let own = only_container(&runtime, &clone).await;
    for (sandbox, id) in [(&source, &container), (&clone, &own.id)] {
        assert!(runtime.container(id).await.unwrap().paused);
        let agent = world.agent(sandbox);
        assert!(agent.state(id.as_str()).unwrap().paused);
        runtime.set_paused(id, false).await.unwrap();
        answers(&runtime, id).await;
    }
}

#[tokio::test]
async fn a_suspended_pod_is_cloned_and_stays_suspended() {
    let world = World::new().await;
    let mut runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    std::fs::write(directory(&world, &source).join("scratch.ext4"), "own").unwrap();
    runtime.suspend_sandbox(&source).await.unwrap();
    for (name, restart) in [("b", false), ("d", true)] {
        if restart {
            drop(runtime);
            runtime = world.open().await;
        }
        let clone = runtime
            .clone_sandbox(world.sandbox(name), of(&source))
            .await;
        let clone = clone.unwrap();
        let own = only_container(&runtime, &clone).await.id;
        // Whoever asks at once waits until it goes on.
        answers(&runtime, &own).await;
        goes_on(&world, &clone, &own).await;
        let disk = directory(&world, &clone).join("scratch.ext4");
        assert_eq!(std::fs::read_to_string(disk).unwrap(), "own");
        assert!(runtime.sandbox(&source).await.unwrap().suspended);
        assert_eq!(world.vmm.sandboxes(), std::slice::from_ref(&clone));
        runtime.remove_sandbox(&clone).await.unwrap();
    }
    runtime.resume_sandbox(&source).await.unwrap();
    goes_on(&world, &source, &container).await;
    assert!(!runtime.container(&container).await.unwrap().paused);
    answers(&runtime, &container).await;
    runtime.remove_sandbox(&source).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn what_cannot_be_cloned_is_refused_and_goes_on() {
    let world = World::new().await;
    let id = "data".parse().unwrap();
    let mode = VolumeMode::Filesystem;
    world.volumes.create(&id, 1 << 20, mode).await.unwrap();
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    let refused = async |config: SandboxConfig, clone: CloneConfig| {
        let error = runtime.clone_sandbox(config, clone).await.unwrap_err();
        hypernetes_telemetry::chain(&error).to_string()
    };
    type Change = fn(&mut SandboxConfig);
    let changes: [(&str, Change); 8] = [
        ("metadata.namespace", |it| {
            it.metadata.namespace = "x".into();
        }),
        ("vcpus", |it| it.vcpus = 2),
        ("memory_mib", |it| it.memory_mib = 256),
        ("scratch_mib", |it| it.scratch_mib = 32),
        ("network", |it| it.network = None),
        ("share_process_namespace", |it| {
            it.share_process_namespace = true;
        }),
        ("sysctls", |it| {
            it.sysctls.insert("a.b".into(), "1".into());
        }),
        ("host_ports", |it| {
            it.host_ports = vec![hypernetes_network::HostPort {
                protocol: hypernetes_network::Protocol::Tcp,
                host_port: 80,
                container_port: 80,
                host_ip: None,
            }];
        }),
    ];
    for (field, change) in changes {
        let mut config = world.sandbox("b");
        change(&mut config);
        let error = refused(config, of(&source)).await;
        assert!(error.contains(field), "{field}: {error}");
    }
    let nobody = SandboxId::random();
    let error = refused(world.sandbox("b"), of(&nobody)).await;
    assert!(error.contains("does not exist"), "{error}");
    let failing = Behaviour::Fail(tonic::Code::Internal, "no".into());
    world.agent(&source).set_behaviour(Method::Pause, failing);
    runtime.suspend_sandbox(&source).await.unwrap();
    let error = refused(world.sandbox("b"), of(&source)).await;
    assert!(error.contains("did not stand still"), "{error}");
    world.calm_agents(&[Method::Pause]);
    runtime.resume_sandbox(&source).await.unwrap();
    answers(&runtime, &container).await;
    let volume = VolumeConfig {
        name: "v".into(),
        kind: VolumeKind::Disk {
            volume: "data".into(),
            read_only: false,
            group_change: GroupChange::OnRootMismatch,
        },
        gid: None,
    };
    runtime.write_volume(&source, volume).await.unwrap();
    let error = refused(world.sandbox("b"), of(&source)).await;
    assert!(error.contains("volumes"), "{error}");
    answers(&runtime, &container).await;
    assert_eq!(world.vmm.sandboxes(), [source]);
}

#[tokio::test]
async fn a_clone_that_fails_leaves_its_source_running_and_nothing_of_itself() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, container) = running(&world, &runtime, "a").await;
    let full = || VmmError::Io {
        action: "move the state of the VM of",
        path: "/x".into(),
        source: std::io::ErrorKind::StorageFull.into(),
    };
    for step in 0..4 {
        match step {
            0 => world.vmm.refuse_suspend(full()),
            1 => world.vmm.refuse_launch(full()),
            2 => {
                let failing = Behaviour::Fail(tonic::Code::Internal, "no".into());
                world.agent(&source).set_behaviour(Method::Pause, failing);
            }
            _ => {
                let failing = Behaviour::Fail(tonic::Code::Internal, "no".into());
                // The clone's agent has it from its source.
                let agent = world.agent(&source);
                agent.set_behaviour(Method::Pause, Behaviour::Normal);
                agent.set_behaviour(Method::Personalize, failing);
            }
        }
        let cloned = runtime.clone_sandbox(world.sandbox("b"), of(&source)).await;
        let error = hypernetes_telemetry::chain(&cloned.unwrap_err()).to_string();
        let said = if step < 2 { "no storage space" } else { "no" };
        assert!(error.contains(said), "{step}: {error}");
        assert_eq!(
            world.vmm.sandboxes(),
            std::slice::from_ref(&source),
            "{step}"
        );
        assert_eq!(world.network.leases().await, 1);
        assert!(!world.temp.path().join("logs/b").exists());
        let copies = std::fs::read_dir(directory(&world, &source).join("copies"));
        assert_eq!(copies.into_iter().flatten().count(), 0, "{step}");
        for sandbox in runtime.list_sandboxes().await {
            let count = usize::from(sandbox.id == source);
            let containers = runtime.list_containers(Some(&sandbox.id)).await;
            assert_eq!(containers.len(), count, "{step}: {containers:?}");
        }
        if step != 2 {
            goes_on(&world, &source, &container).await;
        }
        answers(&runtime, &container).await;
    }
    world.calm_agents(&[Method::Personalize]);
    let clone = runtime.clone_sandbox(world.sandbox("b"), of(&source)).await;
    let clone = clone.unwrap();
    answers(&runtime, &only_container(&runtime, &clone).await.id).await;
    for id in [&clone, &source] {
        runtime.remove_sandbox(id).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn a_crash_anywhere_while_a_pod_is_cloned_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (source, container) = running(&world, &runtime, "a").await;
        world.gate.close_after(steps);
        let finished = tokio::select! {
            cloned = runtime.clone_sandbox(world.sandbox("b"), of(&source)) => {
                let clone = cloned.unwrap();
                let own = only_container(&runtime, &clone).await.id;
                // Until all that comes behind it is done.
                tokio::select! {
                    () = goes_on(&world, &clone, &own) => {}
                    () = world.gate.hit() => {}
                }
                true
            }
            () = world.gate.hit() => false,
        };
        drop(runtime);
        world.gate.open();
        let runtime = world.open().await;
        let report = runtime.recovery_report();
        assert_eq!(
            (report.lost, &report.failures),
            (0, &Vec::new()),
            "step {steps}"
        );
        goes_on(&world, &source, &container).await;
        answers(&runtime, &container).await;
        let status = runtime.container(&container).await.unwrap();
        assert_eq!(
            (status.state, status.paused),
            (ContainerState::Running, false)
        );
        let copies = std::fs::read_dir(directory(&world, &source).join("copies"));
        assert_eq!(copies.into_iter().flatten().count(), 0, "step {steps}");
        // Either it is there and works, or nothing of it is and it can be made.
        let clone = runtime.clone_sandbox(world.sandbox("b"), of(&source)).await;
        let clone = clone.unwrap();
        let own = only_container(&runtime, &clone).await.id;
        goes_on(&world, &clone, &own).await;
        answers(&runtime, &own).await;
        for id in [&source, &clone] {
            runtime.remove_sandbox(id).await.unwrap();
        }
        world.assert_clean().await;
        if finished {
            assert!(steps > 20, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn a_clone_that_is_removed_while_its_source_is_copied_leaves_nothing() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (source, _) = running(&world, &runtime, "a").await;
    // Some step of the copy takes for ever.
    world.gate.close_after(9);
    tokio::select! {
        result = runtime.clone_sandbox(world.sandbox("b"), of(&source)) => panic!("{result:?}"),
        () = world.gate.hit() => {}
    }
    world.gate.open();
    let all = runtime.list_sandboxes().await;
    let clone = all.iter().find(|sandbox| sandbox.id != source).unwrap();
    runtime.remove_sandbox(&clone.id).await.unwrap();
    assert_eq!(world.vmm.sandboxes(), std::slice::from_ref(&source));
    // Its source can be removed too, ahead of the copy.
    runtime.remove_sandbox(&source).await.unwrap();
    world.assert_clean().await;
}

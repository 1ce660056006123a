//! What callers see of pods that behave.

use std::time::Duration;

use hypernetes_agent_api::{
    fake::{Behaviour, Method},
    v1,
};
use hypernetes_image::ImageConfig;
use hypernetes_vmm::{VmExit, VmmError};

use crate::{
    testing::{STDERR, STDOUT, World, container_config, eventually, exited, running},
    *,
};

#[tokio::test]
async fn a_pod_lives_and_leaves_nothing() {
    let world = World::new().await;
    let runtime = world.open().await;
    let mut events = runtime.events();
    let (sandbox, container) = running(&world, &runtime, "web").await;
    let agent = world.agent(&sandbox);

    let status = runtime.sandbox(&sandbox).await.unwrap();
    assert_eq!(status.state, SandboxState::Ready);
    assert_eq!(status.kernel_release.as_deref(), Some("6.12.0-fake"));
    let configured = agent.sandbox().unwrap();
    assert_eq!(configured.scratch_slot, 1);
    assert_eq!(
        configured.interfaces[0].addresses,
        [format!("{}/32", status.address.unwrap())]
    );
    let phases: Vec<_> = runtime
        .start_timing(&sandbox)
        .await
        .unwrap()
        .phases
        .into_iter()
        .map(|phase| phase.0)
        .collect();
    assert_eq!(
        phases,
        [
            "request",
            "network",
            "scratch",
            "kernel",
            "vmm",
            "boot",
            "configure"
        ]
    );

    let request = &agent.containers()[container.as_str()];
    let mut slots = request.layer_slots.clone();
    slots.sort_unstable();
    assert_eq!(slots, [2, 3]);
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 2, 3]);
    assert_eq!(request.process.as_ref().unwrap().args, ["/web"]);

    agent.output(container.as_str(), STDOUT, b"hello\nunfinished");
    agent.output(container.as_str(), STDERR, b"oops\n");
    eventually("the log", || async {
        world.log("web", "c", "stdout") == "hello\n"
    })
    .await;
    eventually("the acknowledgement", || async {
        agent.acked(container.as_str(), STDOUT) == Some(6)
    })
    .await;
    assert_eq!(request.termination_path, "/dev/termination-log");
    let exit = v1::Exit {
        code: 3,
        termination_message: b"because".to_vec(),
        ..Default::default()
    };
    agent.exit_with(container.as_str(), exit);
    let status = exited(&runtime, &container).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert_eq!(status.message, "because");
    // The last output is in the log when the end is told, unfinished line included.
    assert_eq!(world.log("web", "c", "stdout"), "hello\nunfinished");
    assert_eq!(world.log("web", "c", "stderr"), "oops\n");
    // The guest's clock says 2023.
    assert!(status.started_unix_nanos > 1_750_000_000_000_000_000);
    assert!(status.finished_unix_nanos >= status.started_unix_nanos);
    assert!(status.log_path.ends_with("logs/web/c/0.log"));
    assert!(status.image_ref.contains("library/web@sha256:"));

    let mut told = false;
    while let Ok(event) = events.try_recv() {
        told |= event == RuntimeEvent::Container(sandbox.clone(), container.clone());
    }
    assert!(told);

    runtime.stop_sandbox(&sandbox).await.unwrap();
    runtime.stop_sandbox(&sandbox).await.unwrap();
    let status = runtime.sandbox(&sandbox).await.unwrap();
    assert_eq!(
        (status.state, status.failure),
        (SandboxState::NotReady, None)
    );
    assert_eq!(runtime.container(&container).await.unwrap().exit_code, 3);
    assert_eq!(world.network.leases().await, 0);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    runtime.remove_sandbox(&sandbox).await.unwrap();
    assert!(
        runtime.sandbox(&sandbox).await.is_none() && runtime.container(&container).await.is_none()
    );
    world.assert_clean().await;
}

#[tokio::test]
async fn the_same_again_is_the_same() {
    let world = World::new().await;
    let runtime = world.open().await;
    // Both at once: one boots, the other waits for it.
    let (first, second) = tokio::join!(
        runtime.run_sandbox(world.sandbox("a")),
        runtime.run_sandbox(world.sandbox("a"))
    );
    let sandbox = first.unwrap();
    assert_eq!(sandbox, second.unwrap());
    assert_eq!(world.vmm.sandboxes().len(), 1);
    let create = || runtime.create_container(&sandbox, container_config("c"));
    let container = create().await.unwrap();
    assert_eq!(create().await.unwrap(), container);
    runtime.start_container(&container).await.unwrap();
    runtime.start_container(&container).await.unwrap();
    assert_eq!(create().await.unwrap(), container);
    runtime.remove_container(&container).await.unwrap();
    runtime.remove_container(&container).await.unwrap();
    runtime
        .stop_container(&container, Duration::ZERO)
        .await
        .unwrap();
    assert_ne!(create().await.unwrap(), container);
    runtime.stop_sandbox(&sandbox).await.unwrap();
    // A pod that was ready once does not come back under the same attempt.
    let error = runtime.run_sandbox(world.sandbox("a")).await.unwrap_err();
    assert!(matches!(error, RuntimeError::State { .. }), "{error:?}");
    let mut next = world.sandbox("a");
    next.metadata.attempt = 1;
    next.log_directory = world.temp.path().join("logs/next");
    assert_ne!(runtime.run_sandbox(next).await.unwrap(), sandbox);
}

#[tokio::test]
async fn layers_are_plugged_once_and_unplugged_with_the_last_user() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, first) = running(&world, &runtime, "a").await;
    let mut config = container_config("d");
    config.image = "box".into();
    let second = runtime.create_container(&sandbox, config).await.unwrap();
    let agent = world.agent(&sandbox);
    let shared = agent.containers()[first.as_str()].layer_slots[0];
    assert_eq!(agent.containers()[second.as_str()].layer_slots, [shared, 4]);
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1, 2, 3, 4]);
    runtime.remove_container(&first).await.unwrap();
    let left = world.vmm.disks(&sandbox).unwrap();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(
        agent.containers()[second.as_str()]
            .layer_slots
            .iter()
            .all(|slot| left.contains(slot))
    );
    runtime.remove_container(&second).await.unwrap();
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1]);
}

#[tokio::test]
async fn a_layer_that_is_there_twice_is_one_disk() {
    let world = World::new().await;
    world.images.add(
        "twice",
        &[7, 8, 7],
        ImageConfig {
            cmd: vec!["/x".into()],
            ..Default::default()
        },
    );
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let mut config = container_config("c");
    config.image = "twice".into();
    let id = runtime.create_container(&sandbox, config).await.unwrap();
    let slots = world.agent(&sandbox).containers()[id.as_str()]
        .layer_slots
        .clone();
    assert_eq!(slots.len(), 2);
    assert_eq!(world.vmm.disks(&sandbox).unwrap().len(), 3);
}

#[tokio::test]
async fn stopping_asks_politely_first_and_kills_after_the_grace() {
    let world = World::new().await;
    world.images.add(
        "polite",
        &[1],
        ImageConfig {
            cmd: vec!["/x".into()],
            stop_signal: "SIGQUIT".into(),
            ..Default::default()
        },
    );
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let agent = world.agent(&sandbox);
    let start = async |name: &str| {
        let mut config = container_config(name);
        config.image = "polite".into();
        let id = runtime.create_container(&sandbox, config).await.unwrap();
        runtime.start_container(&id).await.unwrap();
        id
    };
    let signals = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = signals.clone();
    agent.on_signal(move |agent, id, signal| {
        seen.lock().unwrap().push(signal);
        if signal == 3 && seen.lock().unwrap().len() == 1 {
            agent.exit(id, 0);
        } else if signal == 9 {
            agent.exit(id, 137);
        }
    });
    let willing = start("willing").await;
    runtime
        .stop_container(&willing, Duration::from_secs(20))
        .await
        .unwrap();
    assert_eq!(
        runtime.container(&willing).await.unwrap().reason,
        "Completed"
    );
    let stubborn = start("stubborn").await;
    runtime
        .stop_container(&stubborn, Duration::from_millis(50))
        .await
        .unwrap();
    assert_eq!(runtime.container(&stubborn).await.unwrap().exit_code, 137);
    let hurried = start("hurried").await;
    runtime
        .stop_container(&hurried, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(*signals.lock().unwrap(), [3, 3, 9, 9]);
}

#[tokio::test]
async fn the_end_of_a_vm_is_told_at_once() {
    let world = World::new().await;
    let runtime = world.open().await;
    for (name, exit, reason, message) in [
        (
            "a",
            VmExit::Panic {
                console_tail: format!("Kernel panic\u{7}{}", "x".repeat(9000)),
            },
            "KernelPanic",
            "Kernel panicxx",
        ),
        (
            "b",
            VmExit::VmmDied {
                status: "killed by signal 9".into(),
            },
            "VmmDied",
            "killed by signal 9",
        ),
    ] {
        let (sandbox, container) = running(&world, &runtime, name).await;
        let begun = tokio::time::Instant::now();
        assert!(world.vmm.end(&sandbox, exit));
        let status = exited(&runtime, &container).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert_eq!((status.reason.as_str(), status.exit_code), (reason, 137));
        let status = runtime.sandbox(&sandbox).await.unwrap();
        let failure = status.failure.unwrap();
        assert_eq!(
            (status.state, failure.reason.as_str()),
            (SandboxState::NotReady, reason)
        );
        assert!(
            failure.message.contains(message) && failure.message.len() <= 2048,
            "{failure:?}"
        );
        let error = runtime
            .exec(
                &container,
                ExecConfig {
                    command: vec!["x".into()],
                    ..Default::default()
                },
            )
            .await;
        assert!(error.is_err());
        runtime.remove_sandbox(&sandbox).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn a_start_that_fails_leaves_nothing_and_can_be_tried_again() {
    let world = World::new().await;
    let runtime = world.open().await;
    world.vmm.refuse_launch(VmmError::Spec {
        field: "x",
        rule: "y".into(),
    });
    let error = runtime.run_sandbox(world.sandbox("a")).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Vmm(_)), "{error:?}");
    assert_eq!(
        (world.vmm.sandboxes().len(), world.network.leases().await),
        (0, 0)
    );
    let failed = runtime.list_sandboxes().await.remove(0);
    assert_eq!(failed.failure.unwrap().reason, "VmmFailed");
    assert!(!world.temp.path().join("logs/a").exists());

    let mut config = world.sandbox("b");
    config.kernel = Some("no-such".parse().unwrap());
    let error = runtime.run_sandbox(config).await.unwrap_err();
    assert!(
        matches!(error, RuntimeError::NotFound { kind: "kernel", .. }),
        "{error:?}"
    );

    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    assert_ne!(sandbox, failed.id);
    assert!(runtime.sandbox(&failed.id).await.is_none());
    for status in runtime.list_sandboxes().await {
        runtime.remove_sandbox(&status.id).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn a_sandbox_that_is_starting_can_be_stopped() {
    let mut world = World::new().await;
    world.deadlines.boot = Duration::from_secs(600);
    world.script_agents(Method::Hello, Behaviour::Stall);
    let runtime = std::sync::Arc::new(world.open().await);
    let start = tokio::spawn({
        let (runtime, config) = (runtime.clone(), world.sandbox("a"));
        async move { runtime.run_sandbox(config).await }
    });
    eventually("a VM", || async { !world.vmm.sandboxes().is_empty() }).await;
    let id = runtime.list_sandboxes().await.remove(0).id;
    runtime.remove_sandbox(&id).await.unwrap();
    let error = start.await.unwrap().unwrap_err();
    assert!(matches!(error, RuntimeError::State { .. }), "{error:?}");
    world.assert_clean().await;
}

#[tokio::test]
async fn non_root_is_checked_with_the_user_that_the_image_resolves_to() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let mut config = container_config("c");
    config.security.run_as_non_root = true;
    let error = runtime
        .create_container(&sandbox, config)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Invalid { field, .. } if field == "run_as_non_root"),
        "{error:?}"
    );
    assert!(world.agent(&sandbox).containers().is_empty());
    assert!(runtime.list_containers(None).await.is_empty());
    assert_eq!(world.vmm.disks(&sandbox).unwrap(), [1]);
}

#[tokio::test]
async fn bad_requests_are_refused_before_anything_is_done() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let mut config = container_config("c");
    config.log_path = "../../etc/passwd".into();
    let error = runtime
        .create_container(&sandbox, config)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Invalid { field, .. } if field == "log_path"),
        "{error:?}"
    );
    let first = runtime
        .create_container(&sandbox, container_config("first"))
        .await
        .unwrap();
    let mut config = container_config("c");
    config.log_path = "first/0.log".into();
    let error = runtime
        .create_container(&sandbox, config)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Invalid { field, .. } if field == "log_path"),
        "{error:?}"
    );
    runtime.remove_container(&first).await.unwrap();
    let mut config = container_config("c");
    config.image = "missing".into();
    let error = runtime
        .create_container(&sandbox, config)
        .await
        .unwrap_err();
    assert!(matches!(error, RuntimeError::Image(_)), "{error:?}");
    assert!(world.agent(&sandbox).containers().is_empty());
    let big = VolumeKind::Files {
        files: [(
            "a".into(),
            VolumeFile {
                content: vec![0; 5 << 20].into(),
                mode: 0o644,
                uid: 0,
            },
        )]
        .into(),
    };
    let volume = VolumeConfig {
        name: "v".into(),
        kind: big,
        gid: None,
    };
    assert!(matches!(
        runtime.write_volume(&sandbox, volume).await,
        Err(RuntimeError::Invalid { .. })
    ));
}

#[tokio::test]
async fn volumes_reach_the_guest() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let files = [(
        "k".into(),
        VolumeFile {
            content: "v".into(),
            mode: 0o400,
            uid: 0,
        },
    )]
    .into();
    let volume = VolumeConfig {
        name: "config".into(),
        kind: VolumeKind::Files { files },
        gid: Some(5),
    };
    runtime.write_volume(&sandbox, volume).await.unwrap();
    let volumes = world.agent(&sandbox).volumes();
    let Some(v1::volume::Kind::Files(files)) = &volumes["config"].kind else {
        panic!("{volumes:?}")
    };
    assert_eq!((files.files[0].mode, files.gid), (0o400, Some(5)));
}

#[tokio::test]
async fn user_ids_are_one_per_vm_and_come_back() {
    let world = World::new().await;
    let runtime = world.open().await;
    let mut ids = Vec::new();
    for index in 0..8 {
        ids.push(
            runtime
                .run_sandbox(world.sandbox(&format!("p{index}")))
                .await
                .unwrap(),
        );
    }
    let error = runtime.run_sandbox(world.sandbox("p8")).await.unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Invalid { field, .. } if field == "uid_range"),
        "{error:?}"
    );
    runtime.remove_sandbox(&ids[3]).await.unwrap();
    runtime.run_sandbox(world.sandbox("p8")).await.unwrap();
}

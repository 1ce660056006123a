//! VMs that become files, and go on from them.

use std::{os::unix::fs::MetadataExt, path::PathBuf};

use bytes::Bytes;
use hypernetes_agent_api::fake::Method;
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_vmm::{HostShare, VmmError};
use hypernetes_volume::{VolumeDriver, VolumeMode};

use crate::{
    testing::{Place, STDOUT, Trouble, World, container_config, eventually, exited, running},
    *,
};

fn file(world: &World, sandbox: &SandboxId) -> PathBuf {
    let place = world.temp.path().join("state/sandboxes");
    place.join(sandbox.as_str()).join("memory.vm")
}

async fn suspended(runtime: &NodeRuntime, sandbox: &SandboxId) -> bool {
    let status = runtime.sandbox(sandbox).await.unwrap();
    assert_eq!(status.state, SandboxState::Ready);
    status.suspended
}

fn program() -> ExecConfig {
    ExecConfig {
        command: vec!["true".into()],
        ..Default::default()
    }
}

#[tokio::test]
async fn a_vmm_that_outlives_a_suspend_is_ended_before_anything_goes_on() {
    let failing = || Trouble::Before(std::io::ErrorKind::Other);
    let fine = || Trouble::Slow(std::time::Duration::ZERO);
    for restart in [true, false] {
        let world = World::new().await;
        let mut runtime = world.open().await;
        let (sandbox, container) = running(&world, &runtime, "a").await;
        // It is written; neither the kill nor what comes behind it succeeds.
        let trouble = [fine(), failing(), failing()];
        world.gate.make_trouble(Place::Vmm, trouble);
        assert!(runtime.suspend_sandbox(&sandbox).await.is_err());
        assert_eq!(world.vmm.sandboxes(), std::slice::from_ref(&sandbox));
        if restart {
            drop(runtime);
            runtime = world.open().await;
        } else {
            runtime.suspend_sandbox(&sandbox).await.unwrap();
        }
        assert!(suspended(&runtime, &sandbox).await);
        assert_eq!(world.vmm.sandboxes(), []);
        runtime.resume_sandbox(&sandbox).await.unwrap();
        answers(&runtime, &container).await;
        runtime.remove_sandbox(&sandbox).await.unwrap();
        world.assert_clean().await;
    }
}

async fn answers(runtime: &NodeRuntime, container: &ContainerId) {
    let session = runtime.exec(container, program()).await.unwrap();
    assert_eq!(session.exit.await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_pod_without_room_for_its_writes_says_so_and_is_not_given_up() {
    let mut world = World::new().await;
    world.deadlines.call = std::time::Duration::from_millis(200);
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let is = async |stalled: bool| {
        world.vmm.set_stalled(&sandbox, stalled);
        eventually("it is told", || async {
            let status = runtime.sandbox(&sandbox).await.unwrap();
            status.state == SandboxState::Ready && status.stalled == stalled
        })
        .await;
    };
    is(true).await;
    let refused = runtime.exec(&container, program()).await.unwrap_err();
    assert!(
        refused.to_string().contains("until the node has room"),
        "{refused}"
    );
    let status = runtime.container(&container).await.unwrap();
    assert_eq!(status.state, ContainerState::Running);
    is(false).await;
    answers(&runtime, &container).await;
    // It may end as it stands.
    is(true).await;
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_suspended_pod_has_no_vm_and_goes_on_with_what_it_had() {
    let world = World::new().await;
    let mut runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let limited = VolumeConfig {
        name: "v".into(),
        kind: VolumeKind::EmptyDir {
            memory: false,
            size_limit: 1 << 20,
        },
        gid: None,
    };
    runtime.write_volume(&sandbox, limited).await.unwrap();
    let disks = world.vmm.disks(&sandbox).unwrap();
    assert_eq!(disks, [1, 2, 3, 254]);
    agent.output(container.as_str(), STDOUT, b"before\nhalf ");
    let before = runtime.container(&container).await.unwrap();

    for round in 0..3 {
        runtime.suspend_sandbox(&sandbox).await.unwrap();
        runtime.suspend_sandbox(&sandbox).await.unwrap();
        assert!(suspended(&runtime, &sandbox).await);
        assert_eq!(world.vmm.sandboxes(), []);
        assert_eq!(world.network.leases().await, 1);
        let stat = std::fs::metadata(file(&world, &sandbox)).unwrap();
        assert_eq!(stat.mode() & 0o777, 0o600);
        if round > 0 {
            drop(runtime);
            runtime = world.open().await;
            assert!(suspended(&runtime, &sandbox).await);
        }
        assert_eq!(runtime.container(&container).await.unwrap(), before);
        let id = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
        assert_eq!(id, sandbox, "it is made once");
        agent.output(container.as_str(), STDOUT, b"meanwhile ");

        let clock = || {
            agent
                .calls()
                .iter()
                .filter(|call| **call == Method::Clock)
                .count()
        };
        let asked = clock();
        runtime.resume_sandbox(&sandbox).await.unwrap();
        runtime.resume_sandbox(&sandbox).await.unwrap();
        assert!(clock() > asked, "the clock is put right");
        assert!(!suspended(&runtime, &sandbox).await);
        assert_eq!(world.vmm.stands_still(&sandbox), Some(false));
        assert_eq!(world.vmm.disks(&sandbox).unwrap(), disks);
        assert!(!file(&world, &sandbox).exists());
        answers(&runtime, &container).await;
    }
    agent.exit(container.as_str(), 3);
    assert_eq!(exited(&runtime, &container).await.exit_code, 3);
    let log = world.log("a", "c", "stdout");
    assert_eq!(log, "before\nhalf meanwhile meanwhile meanwhile ");
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn what_needs_the_guest_is_refused_and_sessions_end_with_the_reason() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let mut config = container_config("c");
    config.stdin = true;
    let container = runtime.create_container(&sandbox, config).await.unwrap();
    runtime.start_container(&container).await.unwrap();
    let config = ExecConfig {
        stdin: true,
        ..program()
    };
    let mut exec = runtime.exec(&container, config).await.unwrap();
    exec.stdin
        .as_ref()
        .unwrap()
        .send(Bytes::from("x"))
        .await
        .unwrap();
    let mut attach = runtime.attach(&container, true).await.unwrap();
    runtime.suspend_sandbox(&sandbox).await.unwrap();
    for session in [&mut exec, &mut attach] {
        while session.output.recv().await.is_some() {}
        let error = (&mut session.exit).await.unwrap().unwrap_err().to_string();
        let end = format!("sandbox {sandbox} is suspended");
        assert!(error.ends_with(&end), "{error}");
    }
    let errors = [
        runtime.exec(&container, program()).await.map(drop),
        runtime.exec_in_guest(&container, program()).await.map(drop),
        runtime.attach(&container, false).await.map(drop),
        runtime.port_forward(&sandbox, 80).await.map(drop),
        runtime.stats(&sandbox).await.map(drop),
        runtime.set_paused(&container, true).await,
        runtime.remove_container(&container).await,
        runtime
            .create_container(&sandbox, container_config("d"))
            .await
            .map(drop),
    ];
    for error in errors {
        let error = error.unwrap_err().to_string();
        assert!(
            error.ends_with(&format!("{sandbox} is suspended")),
            "{error}"
        );
    }
    let unknown = SandboxId::random();
    assert!(matches!(
        runtime.suspend_sandbox(&unknown).await,
        Err(RuntimeError::NotFound { .. })
    ));
}

#[tokio::test]
async fn a_suspend_that_fails_leaves_the_pod_running() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    world.vmm.refuse_suspend(VmmError::Io {
        action: "move the state of the VM of",
        path: "/x".into(),
        source: std::io::ErrorKind::StorageFull.into(),
    });
    let error = runtime.suspend_sandbox(&sandbox).await.unwrap_err();
    let error = hypernetes_telemetry::chain(&error).to_string();
    assert!(error.contains("no storage space"), "{error}");
    assert!(!suspended(&runtime, &sandbox).await);
    assert!(!file(&world, &sandbox).with_extension("new").exists());
    answers(&runtime, &container).await;

    // The host's own devices may not be there later.
    let device = HostDevice {
        file: std::fs::File::open("/dev/null").unwrap(),
        read_only: true,
    };
    runtime.attach_device(&sandbox, device).await.unwrap();
    let error = runtime.suspend_sandbox(&sandbox).await.unwrap_err();
    assert!(error.to_string().contains("devices"), "{error}");
    runtime.detach_unused(&sandbox).await.unwrap();
    runtime.suspend_sandbox(&sandbox).await.unwrap();
    runtime.stop_sandbox(&sandbox).await.unwrap();
    assert!(!file(&world, &sandbox).exists());
    let error = runtime.resume_sandbox(&sandbox).await.unwrap_err();
    assert!(error.to_string().ends_with("is stopped"), "{error}");
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_sandbox_that_shows_the_host_s_directories_is_not_suspended() {
    let world = World::new().await;
    let runtime = world.open().await;
    let mut config = world.sandbox("a");
    config.extras.shares = true;
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    let share = HostShare {
        source: std::fs::File::open("/").unwrap().into(),
        read_only: true,
        recursive: false,
        follow_mounts: false,
    };
    runtime.share(&sandbox, share).await.unwrap();
    let error = runtime.suspend_sandbox(&sandbox).await.unwrap_err();
    assert!(error.to_string().contains("shares"), "{error}");
    assert!(!suspended(&runtime, &sandbox).await);
}

#[tokio::test]
async fn a_resume_that_fails_leaves_the_pod_suspended() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    runtime.suspend_sandbox(&sandbox).await.unwrap();
    world.vmm.refuse_launch(VmmError::Spec {
        field: "x",
        rule: "no".into(),
    });
    runtime.resume_sandbox(&sandbox).await.unwrap_err();
    assert!(suspended(&runtime, &sandbox).await);
    assert!(file(&world, &sandbox).exists());
    // What the disk has lost is noticed, and nothing goes on from it.
    let path = file(&world, &sandbox);
    let kept = std::fs::read(&path).unwrap();
    let mut torn = kept.clone();
    *torn.last_mut().unwrap() ^= 1;
    std::fs::write(&path, torn).unwrap();
    runtime.resume_sandbox(&sandbox).await.unwrap_err();
    assert!(suspended(&runtime, &sandbox).await);
    assert_eq!(world.vmm.sandboxes(), []);
    std::fs::write(&path, kept).unwrap();
    runtime.resume_sandbox(&sandbox).await.unwrap();
    answers(&runtime, &container).await;
}

#[tokio::test]
async fn a_suspended_pod_is_removed_without_going_on() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let (other, _) = running(&world, &runtime, "b").await;
    for id in [&sandbox, &other] {
        runtime.suspend_sandbox(id).await.unwrap();
    }
    runtime.stop_sandbox(&sandbox).await.unwrap();
    let status = runtime.container(&container).await.unwrap();
    assert_eq!(
        (status.state, status.exit_code),
        (ContainerState::Exited, 137)
    );
    for id in [&sandbox, &other] {
        assert!(!world.agent(id).calls().contains(&Method::Shutdown));
        runtime.remove_sandbox(id).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn volumes_that_outlive_a_suspended_pod_are_written_back() {
    let world = World::new().await;
    let id = "data".parse().unwrap();
    let mode = VolumeMode::Filesystem;
    world.volumes.create(&id, 1 << 20, mode).await.unwrap();
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let volume = VolumeConfig {
        name: "v".into(),
        kind: VolumeKind::Disk {
            volume: "data".into(),
            read_only: false,
            group_change: GroupChange::OnRootMismatch,
        },
        gid: None,
    };
    runtime.write_volume(&sandbox, volume).await.unwrap();
    let attached = async || world.volumes.get(&id).await.unwrap().unwrap().attached_to;
    runtime.suspend_sandbox(&sandbox).await.unwrap();
    assert_eq!(attached().await, [sandbox.to_string()], "it stays its own");
    drop(runtime);
    let runtime = world.open().await;
    assert_eq!(attached().await, [sandbox.to_string()]);
    runtime.resume_sandbox(&sandbox).await.unwrap();
    answers(&runtime, &container).await;
    runtime.suspend_sandbox(&sandbox).await.unwrap();
    runtime.remove_sandbox(&sandbox).await.unwrap();
    assert!(world.agent(&sandbox).calls().contains(&Method::Shutdown));
    assert_eq!(attached().await, [""; 0]);
    world.assert_clean().await;
}

async fn there_and_back(runtime: &NodeRuntime, sandbox: &SandboxId) {
    runtime.suspend_sandbox(sandbox).await.unwrap();
    runtime.resume_sandbox(sandbox).await.unwrap();
}

#[tokio::test]
async fn a_crash_anywhere_while_a_pod_is_suspended_and_resumed_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (sandbox, container) = running(&world, &runtime, "a").await;
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                there_and_back(runtime, &sandbox).await;
            })
            .await;
        let runtime = world.open().await;
        let report = runtime.recovery_report();
        assert_eq!(
            (report.lost, &report.failures),
            (0, &Vec::new()),
            "step {steps}"
        );
        // Either there is a VM that runs, or a file: never both, never neither.
        let is_file = suspended(&runtime, &sandbox).await;
        let vms = world.vmm.sandboxes();
        assert_eq!(vms.is_empty(), is_file, "step {steps}");
        assert_eq!(file(&world, &sandbox).exists(), is_file, "step {steps}");
        assert!(!file(&world, &sandbox).with_extension("new").exists());
        assert_eq!(
            world.vmm.stands_still(&sandbox),
            (!is_file).then_some(false)
        );
        let state = runtime.container(&container).await.unwrap().state;
        assert_eq!(state, ContainerState::Running);
        runtime.resume_sandbox(&sandbox).await.unwrap();
        world
            .agent(&sandbox)
            .output(container.as_str(), STDOUT, b"works\n");
        eventually("output", || async {
            world.log("a", "c", "stdout") == "works\n"
        })
        .await;
        answers(&runtime, &container).await;
        runtime.remove_sandbox(&sandbox).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(steps > 15, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn a_power_failure_anywhere_leaves_a_pod_that_is_suspended_or_has_failed() {
    let (mut kept, mut lost) = (0, 0);
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (sandbox, container) = running(&world, &runtime, "a").await;
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                there_and_back(runtime, &sandbox).await;
            })
            .await;
        // No VM is left, nor what is in memory only, and not all of what was being written.
        world.end_vms();
        std::fs::remove_dir_all(world.temp.path().join("run")).unwrap();
        let (file, draft) = (
            file(&world, &sandbox),
            file(&world, &sandbox).with_extension("new"),
        );
        if let Ok(draft) = std::fs::File::options().write(true).open(&draft) {
            draft.set_len(draft.metadata().unwrap().len() / 2).unwrap();
        }
        let whole = file.exists();
        let runtime = world.open().await;
        assert_eq!(runtime.recovery_report().failures, [""; 0], "step {steps}");
        assert!(!draft.exists(), "step {steps}");
        let status = runtime.sandbox(&sandbox).await.unwrap();
        assert_eq!(status.suspended, whole, "step {steps}");
        if whole {
            kept += 1;
            runtime.resume_sandbox(&sandbox).await.unwrap();
            assert!(!file.exists(), "it is good for one VM");
            answers(&runtime, &container).await;
        } else {
            lost += 1;
            assert_eq!(status.state, SandboxState::NotReady, "step {steps}");
            let end = exited(&runtime, &container).await;
            assert_eq!((end.exit_code, &*end.reason), (137, "VmmDied"));
            runtime.resume_sandbox(&sandbox).await.unwrap_err();
        }
        runtime.remove_sandbox(&sandbox).await.unwrap();
        world.assert_clean().await;
        if finished {
            assert!(kept > 5 && lost > 5, "{kept} kept, {lost} lost");
            return;
        }
    }
}

#[tokio::test]
async fn a_suspended_pod_whose_file_was_taken_away_has_failed() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    runtime.suspend_sandbox(&sandbox).await.unwrap();
    drop(runtime);
    std::fs::remove_file(file(&world, &sandbox)).unwrap();
    // And stays so.
    for _start in 0..2 {
        let runtime = world.open().await;
        let status = runtime.sandbox(&sandbox).await.unwrap();
        assert_eq!(status.state, SandboxState::NotReady);
        assert!(!status.suspended);
        let end = exited(&runtime, &container).await;
        assert_eq!((end.exit_code, &*end.reason), (137, "VmmDied"));
        assert!(end.message.contains("is gone"), "{}", end.message);
    }
    let runtime = world.open().await;
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_removal_comes_ahead_of_a_suspend_that_hangs() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, _) = running(&world, &runtime, "a").await;
    // The step after the records never returns.
    world.gate.close_after(6);
    let begun = tokio::select! {
        result = runtime.suspend_sandbox(&sandbox) => panic!("{result:?}"),
        () = world.gate.hit() => true,
    };
    assert!(begun);
    world.gate.open();
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

//! The runtime killed between any two effects, and started again.

use std::time::Duration;

use hypernetes_agent_api::fake::Method;
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_vmm::VmExit;

use crate::{
    testing::{Place, STDOUT, Trouble, World, container_config, eventually, exited, running},
    *,
};

async fn bring_up(world: &World, runtime: &NodeRuntime) -> (SandboxId, ContainerId) {
    running(world, runtime, "a").await
}

async fn take_down(runtime: &NodeRuntime, sandbox: &SandboxId, container: &ContainerId) {
    runtime
        .stop_container(container, Duration::ZERO)
        .await
        .unwrap();
    runtime.remove_container(container).await.unwrap();
    runtime.stop_sandbox(sandbox).await.unwrap();
    runtime.remove_sandbox(sandbox).await.unwrap();
}

/// What is on the host agrees with what the runtime says.
async fn assert_consistent(world: &World, runtime: &NodeRuntime, at: u64) {
    let sandboxes = runtime.list_sandboxes().await;
    let ready: Vec<_> = sandboxes
        .iter()
        .filter(|status| status.state == SandboxState::Ready)
        .map(|s| s.id.clone())
        .collect();
    let mut vms = world.vmm.sandboxes();
    vms.sort();
    let mut sorted = ready.clone();
    sorted.sort();
    assert_eq!(vms, sorted, "VMs after a crash at step {at}");
    assert_eq!(
        world.network.leases().await,
        ready.len(),
        "leases after a crash at step {at}"
    );
    for sandbox in &ready {
        // Half-done creations are undone and removals finished: the guest has what we show.
        let agent = world.agent(sandbox);
        let agrees = || async {
            let mut ours: Vec<_> = runtime
                .list_containers(Some(sandbox))
                .await
                .iter()
                .map(|c| c.id.to_string())
                .collect();
            ours.sort();
            let theirs: Vec<_> = agent.containers().into_keys().collect();
            let disks = world.vmm.disks(sandbox).unwrap().len();
            ours == theirs && disks == 1 + 2 * ours.len()
        };
        eventually("agreement with the guest", agrees).await;
    }
    let run_dirs = std::fs::read_dir(world.temp.path().join("run")).map_or(0, Iterator::count);
    assert_eq!(
        run_dirs,
        sandboxes.len(),
        "run directories after a crash at step {at}"
    );
}

#[tokio::test]
async fn a_crash_anywhere_while_a_pod_comes_up_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                bring_up(&world, runtime).await;
            })
            .await;
        let runtime = world.open().await;
        assert_consistent(&world, &runtime, steps).await;
        // Whoever asked asks again, and gets what it asked for.
        let (sandbox, container) = bring_up(&world, &runtime).await;
        assert_eq!(
            runtime.container(&container).await.unwrap().state,
            ContainerState::Running
        );
        assert_eq!(runtime.list_containers(None).await.len(), 1);
        world
            .agent(&sandbox)
            .output(container.as_str(), STDOUT, b"works\n");
        eventually("output", || async {
            world.log("a", "c", "stdout") == "works\n"
        })
        .await;
        take_down(&runtime, &sandbox, &container).await;
        world.assert_clean().await;
        if finished {
            assert!(steps > 15, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn a_crash_anywhere_while_a_pod_goes_down_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (sandbox, container) = bring_up(&world, &runtime).await;
        let finished = world
            .kill_after(steps, runtime, async |runtime| {
                take_down(runtime, &sandbox, &container).await;
            })
            .await;
        let runtime = world.open().await;
        assert_consistent(&world, &runtime, steps).await;
        take_down(&runtime, &sandbox, &container).await;
        world.assert_clean().await;
        if finished {
            assert!(steps > 15, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn a_crash_while_recovering_is_made_good() {
    for steps in 0.. {
        let world = World::new().await;
        let runtime = world.open().await;
        let (kept, container) = bring_up(&world, &runtime).await;
        // One that is cut short in the middle of its start.
        world.gate.close_after(8);
        tokio::select! {
            result = runtime.run_sandbox(world.sandbox("b")) => panic!("{result:?}"),
            () = world.gate.hit() => {}
        }
        drop(runtime);
        world.gate.close_after(steps);
        let finished = tokio::select! {
            runtime = world.open() => {
                assert_eq!(runtime.recovery_report().undone, 1);
                true
            }
            () = world.gate.hit() => false,
        };
        world.gate.open();
        let runtime = world.open().await;
        assert_consistent(&world, &runtime, steps).await;
        assert_eq!(
            runtime.container(&container).await.unwrap().state,
            ContainerState::Running
        );
        take_down(&runtime, &kept, &container).await;
        world.assert_clean().await;
        if finished {
            assert!(steps > 5, "only {steps} steps were seen");
            return;
        }
    }
}

#[tokio::test]
async fn a_start_that_could_not_be_stored_is_no_start() {
    let world = World::new().await;
    let runtime = world.open().await;
    // The intent and the VM are stored; that it is ready is not.
    let mut config = world.sandbox("a");
    config.metadata.attempt = 1;
    let full = Trouble::Before(std::io::ErrorKind::StorageFull);
    let ok = Trouble::Slow(Duration::ZERO);
    world.gate.make_trouble(Place::Records, [ok, ok, full]);
    let error = runtime.run_sandbox(config.clone()).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Storage { .. }), "{error:?}");
    assert_eq!(world.vmm.sandboxes(), []);
    // The next attempt is told of a sandbox that the next runtime knows too.
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    drop(runtime);
    let runtime = world.open().await;
    assert_eq!(runtime.recovery_report().adopted, 1);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_creation_that_could_not_be_undone_takes_no_other_s_log_away() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    // The intent is stored; that it is created is not, nor that it is undone.
    let full = Trouble::Before(std::io::ErrorKind::StorageFull);
    let ok = Trouble::Slow(Duration::ZERO);
    world.gate.make_trouble(Place::Records, [ok, full, full]);
    let config = container_config("c");
    let error = runtime.create_container(&sandbox, config.clone()).await;
    assert!(matches!(error, Err(RuntimeError::Storage { .. })));
    let container = runtime.create_container(&sandbox, config).await.unwrap();
    runtime.start_container(&container).await.unwrap();
    let agent = world.agent(&sandbox);
    agent.output(container.as_str(), STDOUT, b"one\n");
    let logged = async |text: &str| {
        eventually(text, || async { world.log("a", "c", "stdout") == text }).await;
    };
    logged("one\n").await;
    drop(runtime);
    let runtime = world.open().await;
    agent.output(container.as_str(), STDOUT, b"two\n");
    logged("one\ntwo\n").await;
    assert_eq!(runtime.list_containers(None).await.len(), 1);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn pods_run_on_and_logs_have_no_gap() {
    let world = World::new().await;
    let mut runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let mut expected = String::new();
    for round in 0..10 {
        let text = format!("line {round}\nhalf of {round} ");
        agent.output(container.as_str(), STDOUT, text.as_bytes());
        expected.push_str(&text);
        let written = expected.rfind('\n').unwrap() + 1;
        if round % 2 == 0 {
            eventually("the log", || async {
                world.log("a", "c", "stdout").len() >= written
            })
            .await;
        }
        drop(runtime);
        agent.output(container.as_str(), STDOUT, b"while nobody listened ");
        expected.push_str("while nobody listened ");
        runtime = world.open().await;
        assert_eq!(runtime.recovery_report().adopted, 1);
        assert_eq!(
            runtime.container(&container).await.unwrap().state,
            ContainerState::Running
        );
    }
    agent.exit(container.as_str(), 0);
    exited(&runtime, &container).await;
    assert_eq!(world.log("a", "c", "stdout"), expected);
    // Everything is in: another start reads nothing again.
    drop(runtime);
    let calls = || {
        agent
            .calls()
            .iter()
            .filter(|call| **call == Method::Output)
            .count()
    };
    let before = calls();
    let runtime = world.open().await;
    assert_eq!(runtime.container(&container).await.unwrap().exit_code, 0);
    assert_eq!(calls(), before);
    assert_eq!(world.log("a", "c", "stdout"), expected);
}

#[tokio::test]
async fn what_happened_while_nobody_looked_is_found_out() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (first, ended) = running(&world, &runtime, "a").await;
    let (second, killed) = running(&world, &runtime, "b").await;
    drop(runtime);
    world.agent(&first).exit(ended.as_str(), 7);
    world.vmm.end(
        &second,
        VmExit::VmmDied {
            status: "gone".into(),
        },
    );
    // Somebody's leftovers, ours by name.
    let orphan = world
        .temp
        .path()
        .join("run")
        .join(SandboxId::random().as_str());
    std::fs::create_dir_all(&orphan).unwrap();
    let foreign = world.temp.path().join("run/not-ours");
    std::fs::create_dir_all(&foreign).unwrap();

    let runtime = world.open().await;
    let report = runtime.recovery_report();
    assert_eq!(
        (report.adopted, report.lost, report.orphans),
        (1, 1, 1),
        "{report:?}"
    );
    assert!(!orphan.exists() && foreign.exists());
    std::fs::remove_dir(foreign).unwrap();
    assert_eq!(exited(&runtime, &ended).await.exit_code, 7);
    let status = runtime.container(&killed).await.unwrap();
    assert_eq!(
        (status.state, status.reason.as_str()),
        (ContainerState::Exited, "VmmDied")
    );
    let status = runtime.sandbox(&second).await.unwrap();
    assert_eq!(
        (status.state, status.failure.unwrap().reason.as_str()),
        (SandboxState::NotReady, "VmmDied")
    );
    // A failed sandbox keeps its address until it is stopped.
    assert_eq!(world.network.leases().await, 2);
    for sandbox in [&first, &second] {
        runtime.remove_sandbox(sandbox).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn a_guest_that_does_not_answer_does_not_hold_up_the_start() {
    let mut world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let (other, _) = running(&world, &runtime, "b").await;
    drop(runtime);
    let agent = world.agent(&sandbox);
    agent.set_behaviour(Method::Hello, hypernetes_agent_api::fake::Behaviour::Stall);
    world.deadlines.readopt = Duration::from_millis(200);
    world.deadlines.call = Duration::from_millis(300);
    world.deadlines.silent = Duration::from_millis(100);
    let begun = tokio::time::Instant::now();
    let runtime = world.open().await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    let unknown =
        || async { runtime.container(&container).await.unwrap().state == ContainerState::Unknown };
    eventually("an unknown state", unknown).await;
    assert!(
        runtime
            .create_container(&other, container_config("d"))
            .await
            .is_ok()
    );
    // It comes back by itself.
    agent.set_behaviour(Method::Hello, hypernetes_agent_api::fake::Behaviour::Normal);
    let back =
        || async { runtime.container(&container).await.unwrap().state == ContainerState::Running };
    eventually("a running container", back).await;
}

//! Guests that lie, flood, stall. Each breaks only its own pod.

use std::time::Duration;

use hypernetes_agent_api::{
    fake::{Behaviour, Method},
    v1,
};
use hypernetes_types::{ContainerId, SandboxId};

use crate::{
    testing::{STDOUT, World, container_config, eventually, exited, running},
    *,
};

/// A neighbour that must not notice anything.
async fn neighbour(world: &World, runtime: &NodeRuntime) -> (SandboxId, ContainerId) {
    running(world, runtime, "neighbour").await
}

async fn assert_unharmed(
    world: &World,
    runtime: &NodeRuntime,
    (sandbox, container): &(SandboxId, ContainerId),
) {
    let before = world.log("neighbour", "c", "stdout");
    world
        .agent(sandbox)
        .output(container.as_str(), STDOUT, b"well\n");
    eventually("the neighbour's log", || async {
        world.log("neighbour", "c", "stdout") == format!("{before}well\n")
    })
    .await;
    assert_eq!(
        runtime.container(container).await.unwrap().state,
        ContainerState::Running
    );
}

fn quick(world: &mut World) {
    world.deadlines.call = Duration::from_millis(300);
    world.deadlines.kill = Duration::from_millis(300);
    world.deadlines.shutdown = Duration::from_millis(200);
    world.deadlines.drain = Duration::from_millis(200);
    world.deadlines.readopt = Duration::from_millis(300);
}

#[tokio::test]
async fn a_guest_that_never_boots_is_given_up() {
    let mut world = World::new().await;
    world.deadlines.boot = Duration::from_millis(300);
    world.script_agents(Method::Hello, Behaviour::Stall);
    let runtime = world.open().await;
    let error = runtime.run_sandbox(world.sandbox("a")).await.unwrap_err();
    assert!(
        matches!(error, RuntimeError::GuestSilent { .. }),
        "{error:?}"
    );
    let status = runtime.list_sandboxes().await.remove(0);
    assert_eq!(status.failure.unwrap().reason, "BootTimeout");
    assert!(world.vmm.sandboxes().is_empty());
    runtime.remove_sandbox(&status.id).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_guest_that_stalls_is_killed_when_its_pod_is_stopped() {
    let mut world = World::new().await;
    quick(&mut world);
    let runtime = world.open().await;
    let other = neighbour(&world, &runtime).await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    for method in [
        Method::Signal,
        Method::StartContainer,
        Method::RemoveContainer,
        Method::Shutdown,
        Method::Exec,
        Method::CreateContainer,
    ] {
        agent.set_behaviour(method, Behaviour::Stall);
    }
    let error = runtime
        .stop_container(&container, Duration::from_millis(100))
        .await
        .unwrap_err();
    assert!(
        matches!(error, RuntimeError::GuestSilent { .. }),
        "{error:?}"
    );
    let exec = ExecConfig {
        command: vec!["x".into()],
        ..Default::default()
    };
    assert!(matches!(
        runtime.exec(&container, exec).await,
        Err(RuntimeError::GuestSilent { .. })
    ));
    assert!(
        runtime
            .create_container(&sandbox, container_config("d"))
            .await
            .is_err()
    );
    assert_unharmed(&world, &runtime, &other).await;
    let begun = tokio::time::Instant::now();
    runtime.stop_sandbox(&sandbox).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    let status = runtime.container(&container).await.unwrap();
    assert_eq!(
        (status.state, status.exit_code),
        (ContainerState::Exited, 137)
    );
    runtime.remove_sandbox(&sandbox).await.unwrap();
    assert_unharmed(&world, &runtime, &other).await;
    runtime.remove_sandbox(&other.0).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn stopping_does_not_wait_for_a_call_that_hangs() {
    let mut world = World::new().await;
    quick(&mut world);
    world.deadlines.call = Duration::from_secs(600);
    let runtime = std::sync::Arc::new(world.open().await);
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let agent = world.agent(&sandbox);
    agent.set_behaviour(Method::CreateContainer, Behaviour::Stall);
    let create = tokio::spawn({
        let (runtime, sandbox) = (runtime.clone(), sandbox.clone());
        async move {
            runtime
                .create_container(&sandbox, container_config("c"))
                .await
        }
    });
    agent
        .wait_until(|agent| agent.calls().contains(&Method::CreateContainer))
        .await;
    tokio::time::timeout(Duration::from_secs(10), runtime.stop_sandbox(&sandbox))
        .await
        .unwrap()
        .unwrap();
    assert!(create.await.unwrap().is_err());
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn lies_about_containers_change_nothing_but_their_own_pod() {
    let world = World::new().await;
    let runtime = world.open().await;
    let other = neighbour(&world, &runtime).await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let exit = |code, message: String| v1::Exit {
        code,
        message,
        finished_unix_nanos: i64::MAX,
        termination_message: b"\x1b\xff\0".repeat(100_000),
        ..Default::default()
    };
    // Of a container that is another pod's, and of ids that are nobody's.
    for id in [
        other.1.as_str(),
        "",
        "../../x",
        &"f".repeat(32),
        &"y".repeat(100_000),
    ] {
        agent.emit(v1::ContainerState {
            id: id.into(),
            phase: v1::ContainerPhase::Exited.into(),
            exit: Some(exit(1, String::new())),
            ..Default::default()
        });
    }
    // A container that nobody has started runs.
    let idle = runtime
        .create_container(&sandbox, container_config("idle"))
        .await
        .unwrap();
    agent.emit(v1::ContainerState {
        id: idle.to_string(),
        phase: v1::ContainerPhase::Running.into(),
        ..Default::default()
    });
    // A phase that does not exist; an exit code and texts without measure.
    agent.emit(v1::ContainerState {
        id: container.to_string(),
        phase: 99,
        ..Default::default()
    });
    agent.emit(v1::ContainerState {
        id: container.to_string(),
        phase: v1::ContainerPhase::Exited.into(),
        exit: Some(exit(i32::MAX, format!("\u{1b}[2J{}", "z".repeat(100_000)))),
        ..Default::default()
    });
    agent.exit(container.as_str(), 0);
    let status = exited(&runtime, &container).await;
    assert_eq!(status.exit_code, 255);
    assert!(status.message.len() <= 1024 + 2 + 4096 && !status.message.contains('\u{1b}'));
    assert!(status.finished_unix_nanos < i64::MAX);
    assert_eq!(
        runtime.container(&idle).await.unwrap().state,
        ContainerState::Created
    );
    // The dead do not rise.
    agent.emit(v1::ContainerState {
        id: container.to_string(),
        phase: v1::ContainerPhase::Running.into(),
        ..Default::default()
    });
    assert_unharmed(&world, &runtime, &other).await;
    assert_eq!(
        runtime.container(&container).await.unwrap().state,
        ContainerState::Exited
    );
}

#[tokio::test]
async fn the_end_of_a_container_that_was_just_removed_is_no_lie() {
    let world = World::new().await;
    let path = world.temp.path().join("node.log");
    let told = std::sync::Arc::new(std::fs::File::create(&path).unwrap());
    let logger = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(told)
        .finish();
    let _here = tracing::subscriber::set_default(logger);
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let ended = |id: &str| {
        agent.emit(v1::ContainerState {
            id: id.into(),
            phase: v1::ContainerPhase::Exited.into(),
            exit: Some(v1::Exit::default()),
            ..Default::default()
        });
    };
    let last = runtime
        .create_container(&sandbox, container_config("last"))
        .await
        .unwrap();
    runtime.start_container(&last).await.unwrap();
    runtime.remove_container(&container).await.unwrap();
    ended(container.as_str());
    ended(&"f".repeat(32));
    // Heard in order: when the last is known, so are those before it.
    agent.exit(last.as_str(), 0);
    exited(&runtime, &last).await;
    let log = std::fs::read_to_string(&path).unwrap();
    assert_eq!(log.matches("does not exist").count(), 1, "{log}");
}

#[tokio::test]
async fn a_guest_that_forgets_or_invents_containers_in_its_list() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    agent.set_state(
        container.as_str(),
        v1::ContainerState {
            id: "f".repeat(32),
            ..Default::default()
        },
    );
    agent.disconnect();
    let status = exited(&runtime, &container).await;
    assert!(status.message.contains("lost"), "{status:?}");
    assert_eq!(runtime.list_containers(Some(&sandbox)).await.len(), 1);
}

#[tokio::test]
async fn oversized_lists_and_broken_sessions_are_survived() {
    let mut world = World::new().await;
    world.deadlines.silent = Duration::from_millis(200);
    world.deadlines.readopt = Duration::from_millis(200);
    let runtime = world.open().await;
    let other = neighbour(&world, &runtime).await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    agent.set_behaviour(Method::ListContainers, Behaviour::Oversize);
    agent.disconnect();
    let silent =
        || async { runtime.container(&container).await.unwrap().state == ContainerState::Unknown };
    eventually("an unknown state", silent).await;
    assert_unharmed(&world, &runtime, &other).await;
    let error = runtime
        .create_container(&sandbox, container_config("d"))
        .await
        .unwrap_err();
    assert!(
        matches!(error, RuntimeError::GuestSilent { .. }),
        "{error:?}"
    );
    agent.set_behaviour(Method::ListContainers, Behaviour::Normal);
    let back =
        || async { runtime.container(&container).await.unwrap().state == ContainerState::Running };
    eventually("a running container", back).await;
}

#[tokio::test]
async fn a_guest_that_floods_events_or_output_does_not_starve_others() {
    let world = World::new().await;
    let runtime = world.open().await;
    let other = neighbour(&world, &runtime).await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let flood = tokio::spawn({
        let (agent, container) = (agent.clone(), container.to_string());
        async move {
            loop {
                for _ in 0..500 {
                    agent.emit(v1::ContainerState {
                        id: container.clone(),
                        phase: v1::ContainerPhase::Running.into(),
                        ..Default::default()
                    });
                }
                tokio::task::yield_now().await;
            }
        }
    });
    agent.output(container.as_str(), STDOUT, &vec![b'\n'; 2 << 20]);
    for _ in 0..5 {
        assert_unharmed(&world, &runtime, &other).await;
    }
    flood.abort();
    let log = world.temp.path().join("logs/a/c/0.log");
    let lines = || async { std::fs::metadata(&log).unwrap().len() >= 40 * (2 << 20) };
    eventually("the flood in the log", lines).await;
    runtime.remove_sandbox(&sandbox).await.unwrap();
    assert_unharmed(&world, &runtime, &other).await;
}

#[tokio::test]
async fn oversized_output_is_refused_and_the_log_goes_on_where_it_was() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    agent.output(container.as_str(), STDOUT, b"before\n");
    eventually("the log", || async {
        world.log("a", "c", "stdout") == "before\n"
    })
    .await;
    agent.set_behaviour(Method::Output, Behaviour::Oversize);
    agent.disconnect();
    let asked = agent.calls().len();
    agent
        .wait_until(|agent| agent.calls()[asked..].contains(&Method::Output))
        .await;
    agent.output(container.as_str(), STDOUT, b"after\n");
    agent.set_behaviour(Method::Output, Behaviour::Normal);
    eventually("the log", || async {
        world.log("a", "c", "stdout") == "before\nafter\n"
    })
    .await;
}

#[tokio::test]
async fn a_guest_that_was_reset_is_no_pod_any_more() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    // A new agent in the old VM, which knows of nothing.
    world.replace_agent(&sandbox);
    let status = exited(&runtime, &container).await;
    assert_eq!(status.reason, "VmmDied");
    assert_eq!(
        runtime.sandbox(&sandbox).await.unwrap().state,
        SandboxState::NotReady
    );
}

//! Containers that stand still.

use std::time::Duration;

use hypernetes_agent_api::{
    FEATURES, PROTOCOL_VERSION,
    fake::{Behaviour, Method},
    v1,
};

use crate::{
    testing::{World, container_config, eventually, exited, running},
    *,
};

async fn paused(runtime: &NodeRuntime, id: &hypernetes_types::ContainerId) -> bool {
    runtime.container(id).await.unwrap().paused
}

#[tokio::test]
async fn a_pause_is_known_after_a_restart_and_ends_with_the_container() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let mut events = runtime.events();
    runtime.set_paused(&container, true).await.unwrap();
    let status = runtime.container(&container).await.unwrap();
    assert_eq!(
        (status.state, status.paused),
        (ContainerState::Running, true)
    );
    let told = RuntimeEvent::Container(sandbox.clone(), container.clone());
    assert_eq!(events.try_recv(), Ok(told));
    let error = runtime.exec(&container, ExecConfig::default()).await;
    assert!(matches!(error, Err(RuntimeError::Paused(_))), "{error:?}");

    // The guest knows best: one call came through whose answer was not stored.
    drop(runtime);
    let unpaused = v1::ContainerState {
        paused: false,
        ..agent.state(container.as_str()).unwrap()
    };
    let runtime = world.open().await;
    assert!(paused(&runtime, &container).await);
    // What it says unasked changes nothing.
    agent.emit(unpaused.clone());
    runtime.set_paused(&container, true).await.unwrap();
    assert!(paused(&runtime, &container).await);
    drop(runtime);
    agent.set_state(container.as_str(), unpaused);
    let runtime = world.open().await;
    eventually("the list is believed", || async {
        !paused(&runtime, &container).await
    })
    .await;

    runtime.set_paused(&container, true).await.unwrap();
    agent.exit(container.as_str(), 0);
    assert!(!exited(&runtime, &container).await.paused);
    let error = runtime.set_paused(&container, false).await.unwrap_err();
    assert!(error.to_string().ends_with("is exited"), "{error}");
}

#[tokio::test]
async fn a_stop_lets_a_container_go_on_and_a_kill_does_not_ask() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let calls = || {
        let all = agent.calls().into_iter();
        all.filter(|call| matches!(call, Method::Pause | Method::Signal))
            .collect::<Vec<_>>()
    };
    runtime.set_paused(&container, true).await.unwrap();
    // As a frozen program does: the signal takes effect when it goes on.
    agent.on_signal(|agent, id, signal| {
        if signal == 9 || !agent.state(id).unwrap().paused {
            agent.exit(id, 128 + i32::try_from(signal).unwrap());
        }
    });
    let grace = Duration::from_millis(300);
    runtime.stop_container(&container, grace).await.unwrap();
    let wanted = [Method::Pause, Method::Signal, Method::Pause, Method::Signal];
    assert_eq!(calls(), wanted);
    let other = runtime
        .create_container(&sandbox, container_config("other"))
        .await
        .unwrap();
    runtime.start_container(&other).await.unwrap();
    runtime.set_paused(&other, true).await.unwrap();
    let before = calls().len();
    let none = Duration::ZERO;
    runtime.stop_container(&other, none).await.unwrap();
    assert_eq!(exited(&runtime, &other).await.exit_code, 137);
    assert_eq!(calls()[before..], [Method::Signal]);
}

#[tokio::test]
async fn what_cannot_be_paused_says_why() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let failure = Behaviour::Fail(tonic::Code::Internal, "a disk is slow".into());
    agent.set_behaviour(Method::Pause, failure);
    let error = runtime.set_paused(&container, true).await.unwrap_err();
    assert!(error.to_string().contains("a disk is slow"), "{error}");
    assert!(!paused(&runtime, &container).await);

    let idle = runtime
        .create_container(&sandbox, container_config("idle"))
        .await
        .unwrap();
    let error = runtime.set_paused(&idle, true).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot pause a container: container {idle} is created")
    );
    let unknown = "f".repeat(32).parse().unwrap();
    let error = runtime.set_paused(&unknown, true).await.unwrap_err();
    assert!(matches!(error, RuntimeError::NotFound { .. }), "{error}");

    // The guest of a release that has no pauses.
    drop(runtime);
    let old = FEATURES.iter().filter(|name| **name != "pause");
    agent.set_hello(v1::HelloResponse {
        version: PROTOCOL_VERSION,
        features: old.map(|name| (*name).to_owned()).collect(),
        configured: true,
        ..Default::default()
    });
    let runtime = world.open().await;
    let error = runtime.set_paused(&container, true).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid paused: is not known to the guest of an earlier release: make the pod anew"
    );
}

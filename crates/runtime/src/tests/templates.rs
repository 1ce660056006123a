//! Sandboxes that start from a template, and what becomes of them when that does not work.

use hypernetes_agent_api::fake::{Behaviour, Method};
use hypernetes_vmm::VmmError;

use crate::{
    testing::{World, eventually},
    *,
};

async fn settled(runtime: &NodeRuntime) {
    eventually("the templates", || async {
        runtime.templates_are_settled()
    })
    .await;
}

#[tokio::test]
async fn a_shape_in_use_gets_a_template() {
    let mut world = World::new().await;
    world.templates = 1;
    let runtime = world.open().await;
    let mut sandboxes = Vec::new();
    for (name, restored) in [("a", false), ("b", false), ("c", true), ("d", true)] {
        let sandbox = runtime.run_sandbox(world.sandbox(name)).await.unwrap();
        assert_eq!(world.vmm.is_restored(&sandbox), Some(restored), "{name}");
        assert_eq!(
            runtime.start_timing(&sandbox).await.unwrap().from_template,
            restored,
            "{name}"
        );
        // The guest is told which of its devices is to become the pod's.
        let interface = &world.agent(&sandbox).sandbox().unwrap().interfaces[0];
        let has = if restored { "02:00:00:00:00:00" } else { "" };
        assert_eq!(interface.device_mac, has, "{name}");
        assert_ne!(interface.mac, "02:00:00:00:00:00");
        sandboxes.push(sandbox);
        settled(&runtime).await;
    }
    // Another shape boots, and takes the only place when it comes again.
    for (name, restored) in [("e", false), ("f", false), ("g", true)] {
        let mut config = world.sandbox(name);
        config.memory_mib = 256;
        let sandbox = runtime.run_sandbox(config).await.unwrap();
        assert_eq!(world.vmm.is_restored(&sandbox), Some(restored), "{name}");
        sandboxes.push(sandbox);
        settled(&runtime).await;
    }
    let sandbox = runtime.run_sandbox(world.sandbox("h")).await.unwrap();
    assert_eq!(world.vmm.is_restored(&sandbox), Some(false));
    sandboxes.push(sandbox);
    // The template's own VMs are gone.
    assert_eq!(world.vmm.sandboxes().len(), sandboxes.len());
    for sandbox in sandboxes {
        runtime.remove_sandbox(&sandbox).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn one_is_made_ahead_and_adopted_pods_keep_running() {
    let mut world = World::new().await;
    world.templates = 4;
    let runtime = world.open().await;
    runtime
        .make_template(1, 128, VmExtras::default())
        .await
        .unwrap();
    settled(&runtime).await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    assert_eq!(world.vmm.is_restored(&sandbox), Some(true));
    drop(runtime);
    let runtime = world.open().await;
    assert_eq!(runtime.recovery_report().adopted, 1);
    assert_eq!(
        runtime.sandbox(&sandbox).await.unwrap().state,
        SandboxState::Ready
    );
    runtime.remove_sandbox(&sandbox).await.unwrap();
    world.assert_clean().await;
}

#[tokio::test]
async fn a_template_that_fails_is_no_reason_for_a_pod_to_fail() {
    let mut world = World::new().await;
    world.templates = 4;
    let runtime = world.open().await;
    runtime
        .make_template(1, 128, VmExtras::default())
        .await
        .unwrap();
    settled(&runtime).await;
    world.vmm.refuse_launch(VmmError::Spec {
        field: "x",
        rule: "y".into(),
    });
    for name in ["a", "b"] {
        let sandbox = runtime.run_sandbox(world.sandbox(name)).await.unwrap();
        assert_eq!(world.vmm.is_restored(&sandbox), Some(false), "{name}");
        runtime.remove_sandbox(&sandbox).await.unwrap();
    }
    world.assert_clean().await;
}

#[tokio::test]
async fn a_guest_that_does_not_answer_becomes_no_template() {
    let mut world = World::new().await;
    world.templates = 4;
    world.deadlines.boot = std::time::Duration::from_millis(300);
    world.script_agents(Method::Hello, Behaviour::Stall);
    let runtime = world.open().await;
    runtime
        .make_template(1, 128, VmExtras::default())
        .await
        .unwrap();
    settled(&runtime).await;
    world.assert_clean().await;
}

#[tokio::test]
async fn a_guest_that_cannot_rehearse_becomes_a_template_all_the_same() {
    let mut world = World::new().await;
    world.templates = 1;
    world.pool = 1;
    let failure = Behaviour::Fail(tonic::Code::Internal, "still busy".into());
    world.script_agents(Method::Forget, failure);
    let runtime = world.open().await;
    runtime
        .make_template(1, 128, VmExtras::default())
        .await
        .unwrap();
    eventually("a full pool", || async { runtime.pool_is_full() }).await;
    let [waiting] = world.vmm.sandboxes().try_into().unwrap();
    assert!(!world.agent(&waiting).calls().contains(&Method::Forget));
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    assert_eq!(sandbox, waiting);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    runtime.drain().await;
    world.assert_clean().await;
}

//! How containers end, and how they stand still.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use hypernetes_runtime::PodRuntime;
use k8s_openapi::api::core::v1::Event;
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::{World, kubelet::container, uid};

#[tokio::test(flavor = "multi_thread")]
async fn a_pre_stop_hook_runs_once_though_a_deletion_comes_upon_a_kill() {
    let world = World::start().await;
    let hooks = Arc::new(AtomicUsize::new(0));
    let (begun, (go, wait)) = (hooks.clone(), std::sync::mpsc::channel::<()>());
    let wait = std::sync::Mutex::new(wait);
    world.runtime.on_exec(move |_, config, _| {
        if config.command == ["alive"] {
            return (Vec::new(), Vec::new(), 1);
        }
        begun.fetch_add(1, Ordering::SeqCst);
        // It ends when the test says so.
        let _released = wait.lock().unwrap().recv();
        (Vec::new(), Vec::new(), 0)
    });
    let spec = json!({"terminationGracePeriodSeconds": 60, "containers": [container(&json!({
        "livenessProbe": {"exec": {"command": ["alive"]}, "failureThreshold": 1},
        "lifecycle": {"preStop": {"exec": {"command": ["bye"]}}}}))]});
    world.create("web", spec).await;
    let count = || hooks.load(Ordering::SeqCst);
    world.runtime.wait_until(|_| count() == 1).await;
    let deleted = world.pods().delete("web", &DeleteParams::default()).await;
    deleted.unwrap();
    // The deletion's stop has begun: it says so, and waits for the hook that runs.
    let api = Api::<Event>::namespaced(world.client.clone(), "work");
    world
        .eventually("the stop", || async {
            let events = api.list(&ListParams::default()).await.unwrap();
            let mut said = events
                .items
                .iter()
                .filter_map(|event| event.message.as_deref());
            said.any(|message| message == "Stopping container c")
        })
        .await;
    go.send(()).unwrap();
    world.gone("web").await;
    assert_eq!(count(), 1);
    world.end().await;
}

#[tokio::test]
async fn a_stop_without_grace_is_a_kill() {
    let world = World::start().await;
    let pod = world.create("web", json!({})).await;
    world.running("web").await;
    let id = world.runtime.find(uid(&pod), "c").unwrap();
    let change = json!({"metadata": {"annotations": {"hypernetes.io/stop-grace-seconds": "0"}},
        "spec": {"activeDeadlineSeconds": 1}});
    let (params, change) = (PatchParams::default(), Patch::Merge(&change));
    world.pods().patch("web", &params, &change).await.unwrap();
    world
        .until("web", "ended", |status| status["phase"] == "Failed")
        .await;
    // The fake's containers end with 143 on a stop signal.
    world
        .runtime
        .wait_until(|runtime| runtime.calls().contains(&format!("stop_container {id}")))
        .await;
    let ended = world
        .until("web", "killed", |status| {
            status["containerStatuses"][0]["state"]["terminated"].is_object()
        })
        .await;
    assert_eq!(
        ended["containerStatuses"][0]["state"]["terminated"]["exitCode"],
        137
    );
    world.end().await;
}

fn condition(status: &Value, kind: &str) -> Value {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.into_iter().find(|c| c["type"] == kind);
    found.unwrap_or_default()
}

#[tokio::test]
async fn a_pod_is_suspended_while_its_annotation_says_so() {
    let world = World::start().await;
    let pod = world.create("web", json!({})).await;
    world.running("web").await;
    let id = world.runtime.find(uid(&pod), "c").unwrap();
    let sandbox = world.runtime.container(&id).await.unwrap().sandbox;
    let annotate = async |value: Value| {
        let change = json!({"metadata": {"annotations": {"hypernetes.io/suspended": value}}});
        let (params, change) = (PatchParams::default(), Patch::Merge(&change));
        world.pods().patch("web", &params, &change).await.unwrap();
    };
    let suspended = async || {
        let is = |status: &Value| condition(status, "hypernetes.io/Suspended")["status"] == "True";
        world.until("web", "suspended", is).await
    };
    annotate(json!("true")).await;
    let status = suspended().await;
    assert_eq!(condition(&status, "Ready")["reason"], "Suspended");
    assert_eq!(status["phase"], "Running");
    assert!(world.runtime.sandbox(&sandbox).await.unwrap().suspended);
    world.event("Suspended").await;
    annotate(json!("false")).await;
    let status = world
        .until("web", "resumed", |status| {
            condition(status, "hypernetes.io/Suspended").is_null()
        })
        .await;
    assert_eq!(condition(&status, "Ready")["status"], "True");
    world.event("Resumed").await;
    // A deletion takes it as it is: no container is asked to stop.
    annotate(json!("true")).await;
    suspended().await;
    let deleted = world.pods().delete("web", &DeleteParams::default()).await;
    deleted.unwrap();
    world.gone("web").await;
    let calls = world.runtime.calls();
    let resumes = format!("resume_sandbox {sandbox}");
    assert_eq!(calls.iter().filter(|call| **call == resumes).count(), 1);
    assert!(
        !calls.contains(&format!("stop_container {id}")),
        "{calls:?}"
    );
    world.end().await;
}

#[tokio::test]
async fn a_pod_stands_still_while_its_annotation_says_so() {
    let world = World::start().await;
    let pod = world.create("web", json!({})).await;
    world.running("web").await;
    let id = world.runtime.find(uid(&pod), "c").unwrap();
    let annotate = async |value: Value| {
        let change = json!({"metadata": {"annotations": {"hypernetes.io/paused": value}}});
        let (params, change) = (PatchParams::default(), Patch::Merge(&change));
        world.pods().patch("web", &params, &change).await.unwrap();
    };
    annotate(json!("true")).await;
    let status = world
        .until("web", "paused", |status| {
            condition(status, "hypernetes.io/Paused")["status"] == "True"
        })
        .await;
    assert_eq!(condition(&status, "Ready")["reason"], "Paused");
    assert!(world.runtime.container(&id).await.unwrap().paused);
    let event = world.event("Paused").await;
    assert_eq!(event.message.as_deref(), Some("Paused container c"));
    annotate(json!(null)).await;
    let status = world
        .until("web", "unpaused", |status| {
            condition(status, "hypernetes.io/Paused").is_null()
        })
        .await;
    assert_eq!(condition(&status, "Ready")["status"], "True");
    // A deletion lets it go on first.
    annotate(json!("true")).await;
    world
        .until("web", "paused again", |status| {
            condition(status, "hypernetes.io/Paused")["status"] == "True"
        })
        .await;
    let deleted = world.pods().delete("web", &DeleteParams::default()).await;
    deleted.unwrap();
    world.gone("web").await;
    let calls = world.runtime.calls();
    let last = calls
        .iter()
        .rposition(|call| *call == format!("unpause {id}"));
    let stop = calls
        .iter()
        .position(|call| *call == format!("stop_container {id}"));
    assert!(last.is_some() && last < stop, "{calls:?}");
    world.end().await;
}

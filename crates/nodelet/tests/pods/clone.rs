//! Pods that go on from others.

use hypernetes_runtime::PodRuntime as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use serde_json::{Value, json};

use crate::{World, uid};

async fn clone_of(world: &World, source: &str, name: &str, change: impl Fn(&mut Value)) -> Pod {
    let pod = world.pods().get(source).await;
    let mut spec = pod.map_or_else(
        |_missing| json!({"containers": [{"name": "c", "image": "busybox"}]}),
        |pod| serde_json::to_value(pod.spec).unwrap(),
    );
    spec.as_object_mut().unwrap().remove("nodeName");
    change(&mut spec);
    let meta = json!({"name": name, "annotations": {"hypernetes.io/clone-of": source}});
    let pod = json!({"metadata": meta, "spec": spec});
    let pod: Pod = serde_json::from_value(pod).unwrap();
    let created = world.pods().create(&PostParams::default(), &pod).await;
    created.unwrap()
}

fn waiting(status: &Value) -> &Value {
    &status["containerStatuses"][0]["state"]["waiting"]
}

#[tokio::test]
async fn a_pod_goes_on_from_the_one_that_its_annotation_names() {
    let world = World::start().await;
    let source = world.create("web", json!({})).await;
    let before = world.running("web").await;
    let id = world.runtime.find(uid(&source), "c").unwrap();
    let copy = clone_of(&world, "web", "copy", |_| {}).await;
    let after = world.running("copy").await;
    let container = |status: &Value| status["containerStatuses"][0]["containerID"].clone();
    assert_ne!(container(&after), container(&before));
    let own = world.runtime.find(uid(&copy), "c").unwrap();
    assert_ne!(own, id);
    let event = world.event("Cloned").await;
    assert_eq!(event.involved_object.name.as_deref(), Some("copy"));
    let calls = world.runtime.calls();
    let clones = calls
        .iter()
        .filter(|call| call.starts_with("clone_sandbox"));
    assert_eq!(clones.count(), 1, "{calls:?}");
    let status = serde_json::to_value(world.pods().get("web").await.unwrap().status).unwrap();
    assert_eq!(status["containerStatuses"], before["containerStatuses"]);

    // Once its VM has ended it starts as any.
    let sandbox = world.runtime.container(&own).await.unwrap().sandbox;
    world.runtime.fail_sandbox(&sandbox, "VmmDied", "gone");
    world
        .until("copy", "started again", |status| {
            status["containerStatuses"][0]["restartCount"] == 1
                && status["containerStatuses"][0]["state"]["running"].is_object()
        })
        .await;
    let calls = world.runtime.calls();
    let clones = calls
        .iter()
        .filter(|call| call.starts_with("clone_sandbox"));
    assert_eq!(clones.count(), 1, "{calls:?}");
    world.end().await;
}

#[tokio::test]
async fn a_clone_that_cannot_be_says_why_until_it_can() {
    let world = World::start().await;
    clone_of(&world, "web", "copy", |_| {}).await;
    let failed = |status: &Value| waiting(status)["reason"] == "CloneError";
    let status = world.until("copy", "waiting", failed).await;
    assert_eq!(waiting(&status)["message"], "pods \"web\" not found");
    let event = world.event("FailedClone").await;
    let said = "Failed to clone pod web: pods \"web\" not found";
    assert_eq!(event.message.as_deref(), Some(said));
    // It is there now, and the clone asks for what it has.
    let container = json!({"name": "c", "image": "busybox"});
    world
        .create("web", json!({"containers": [container]}))
        .await;
    world.running("web").await;
    world.running("copy").await;
    clone_of(&world, "web", "other", |spec| {
        spec["containers"][0]["args"] = json!(["x"]);
    })
    .await;
    let status = world.until("other", "waiting", failed).await;
    let said = "spec.containers[0].args: must be as in pod web, which is cloned";
    assert_eq!(waiting(&status)["message"], said);
    world.end().await;
}

//! Pods that are kept, and pods that go on from what was kept.

use hypernetes_runtime::{PodRuntime as _, RuntimeError};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, PostParams},
    runtime::wait::await_condition,
};
use serde_json::{Value, json};

use crate::{LIMIT, World, uid};

fn snapshots(world: &World, namespace: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("hypernetes.io", "v1alpha1", "PodSnapshot");
    Api::namespaced_with(
        world.client.clone(),
        namespace,
        &ApiResource::from_gvk(&gvk),
    )
}

async fn keep(world: &World, name: &str, spec: Value) {
    keep_in(world, "work", name, spec).await;
}

async fn keep_in(world: &World, namespace: &str, name: &str, spec: Value) {
    let object = json!({"apiVersion": "hypernetes.io/v1alpha1", "kind": "PodSnapshot",
        "metadata": {"name": name}, "spec": spec});
    let object: DynamicObject = serde_json::from_value(object).unwrap();
    let (api, params) = (snapshots(world, namespace), PostParams::default());
    api.create(&params, &object).await.unwrap();
}

/// Waits until the snapshot's condition is so, and returns the status.
async fn until(world: &World, name: &str, reason: &str) -> Value {
    until_in(world, "work", name, reason).await
}

async fn until_in(world: &World, namespace: &str, name: &str, reason: &str) -> Value {
    let condition = await_condition(
        snapshots(world, namespace),
        name,
        |object: Option<&DynamicObject>| {
            object.is_some_and(|it| it.data["status"]["conditions"][0]["reason"] == reason)
        },
    );
    let found = tokio::time::timeout(LIMIT, condition).await;
    found.expect(reason).unwrap().unwrap().data["status"].take()
}

async fn go_on(world: &World, name: &str, snapshot: &str, spec: Value) -> Pod {
    let meta = json!({"name": name, "annotations": {"hypernetes.io/clone-of-snapshot": snapshot}});
    let pod = json!({"metadata": meta, "spec": spec});
    let pod: Pod = serde_json::from_value(pod).unwrap();
    let created = world.pods().create(&PostParams::default(), &pod).await;
    created.unwrap()
}

#[tokio::test]
async fn pods_go_on_from_a_snapshot_of_a_pod_that_is_gone() {
    let world = World::start().await;
    let source = world
        .create("web", json!({"terminationGracePeriodSeconds": 1}))
        .await;
    world.running("web").await;
    keep(&world, "warm", json!({"podName": "web"})).await;
    let status = until(&world, "warm", "Taken").await;
    assert_eq!(status["conditions"][0]["status"], "True");
    assert_eq!(status["podUID"], uid(&source));
    assert_eq!(status["sizeBytes"], 4096);
    assert!(status["creationTime"].is_string(), "{status}");
    let event = world.event("SnapshotTaken").await;
    assert_eq!(event.involved_object.name.as_deref(), Some("web"));
    let gone = world.pods().delete("web", &DeleteParams::default()).await;
    gone.unwrap();
    world.gone("web").await;

    let template = &status["template"];
    assert_eq!(template["metadata"]["labels"], json!({"app": "web"}));
    let mut spec = template["spec"].clone();
    spec.as_object_mut().unwrap().remove("nodeName");
    for name in ["one", "two"] {
        let pod = go_on(&world, name, "warm", spec.clone()).await;
        world.running(name).await;
        assert!(world.runtime.find(uid(&pod), "c").is_some());
    }
    let calls = world.runtime.calls();
    let cloned = calls.iter().filter(|it| it.starts_with("clone_sandbox"));
    assert_eq!(cloned.count(), 2, "{calls:?}");
    spec["containers"][0]["args"] = json!(["x"]);
    go_on(&world, "other", "warm", spec).await;
    let waits = world.until("other", "waiting", |status| {
        status["containerStatuses"][0]["state"]["waiting"]["reason"] == "CloneError"
    });
    let waits = waits.await;
    assert_eq!(
        waits["containerStatuses"][0]["state"]["waiting"]["message"],
        "spec.containers[0].args: must be as in snapshot warm, which is cloned"
    );

    let (api, params) = (snapshots(&world, "work"), DeleteParams::default());
    api.delete("warm", &params).await.unwrap();
    let kept = || async { world.runtime.list_snapshots().await.is_empty() };
    world.eventually("its data are removed", kept).await;
    world.end().await;
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_says_why_and_is_tried_again_where_that_helps() {
    let world = World::start().await;
    keep(&world, "early", json!({"podName": "web"})).await;
    let status = until(&world, "early", "PodNotFound").await;
    assert_eq!(status["conditions"][0]["message"], "pods \"web\" not found");
    world.create("web", json!({})).await;
    world.running("web").await;
    until(&world, "early", "Taken").await;

    let large = || RuntimeError::Invalid {
        field: "size_limit".to_owned(),
        rule: "is 1 byte".to_owned(),
    };
    world.runtime.fail_next("take_snapshot", large());
    let small = json!({"podName": "web", "sizeLimit": "1"});
    keep(&world, "small", small).await;
    let status = until(&world, "small", "TooLarge").await;
    assert_eq!(status["conditions"][0]["status"], "False");
    let message = &status["conditions"][0]["message"];
    assert_eq!(message, "invalid spec.sizeLimit: is 1 byte");

    let port = json!({"containers": [{"name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent",
        "ports": [{"containerPort": 80, "hostPort": 8080}]}]});
    world.create("host", port).await;
    keep(&world, "host", json!({"podName": "host"})).await;
    let status = until(&world, "host", "Unsupported").await;
    let message = "spec.containers[0].ports[0].hostPort: cannot be kept with pod host";
    assert_eq!(status["conditions"][0]["message"], message);
    // Each was asked for once, but for the one that could become possible.
    let calls = world.runtime.calls();
    let taken = calls.iter().filter(|it| it.starts_with("take_snapshot"));
    assert_eq!(taken.count(), 2, "{calls:?}");
    world.end().await;
}

#[tokio::test]
async fn a_guest_that_takes_its_time_does_not_keep_another_namespace_waiting() {
    let world = World::start().await;
    let slow = world.create("slow", json!({})).await;
    world.running("slow").await;
    let container = json!({"name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent"});
    let pod = json!({"metadata": {"name": "web"}, "spec": {"containers": [container]}});
    world.elsewhere("other", pod).await;
    world.runtime.hold_snapshots(uid(&slow), true);
    for name in ["first", "second"] {
        keep(&world, name, json!({"podName": "slow"})).await;
    }
    let begun = || async {
        let calls = world.runtime.calls();
        calls.iter().any(|it| it.starts_with("take_snapshot"))
    };
    world.eventually("its pod is being copied", begun).await;
    keep_in(&world, "other", "mine", json!({"podName": "web"})).await;
    until_in(&world, "other", "mine", "Taken").await;
    // Of one namespace there is one after the other.
    let calls = world.runtime.calls();
    let taken = calls.iter().filter(|it| it.starts_with("take_snapshot"));
    assert_eq!(taken.count(), 2, "{calls:?}");
    assert_eq!(world.runtime.list_snapshots().await.len(), 1);
    world.runtime.hold_snapshots(uid(&slow), false);
    for name in ["first", "second"] {
        until(&world, name, "Taken").await;
    }
    world.end().await;
}

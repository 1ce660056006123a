//! Which pods come to the node, and why others do not.

use super::*;

fn condition(status: &Value) -> Value {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let mut found = conditions.filter(|condition| condition["type"] == "PodScheduled");
    found.next().cloned().unwrap_or_default()
}

#[tokio::test]
async fn a_pod_waits_until_the_node_has_what_it_selects() {
    let world = World::start().await;
    world
        .create("picky", json!({"nodeSelector": {"disk": "fast"}}))
        .await;
    let status = world
        .until("picky", "unschedulable", |status| {
            condition(status)["reason"] == "Unschedulable"
                && condition(status)["message"]
                    .as_str()
                    .unwrap()
                    .contains("didn't match")
        })
        .await;
    assert_eq!(status["phase"], "Pending");
    assert_eq!(
        condition(&status)["message"],
        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. no new \
         claims to deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for \
         scheduling."
    );
    let event = world.event("FailedScheduling").await;
    assert_eq!(
        event.source.unwrap().component.as_deref(),
        Some("default-scheduler")
    );
    assert!(world.runtime.list_sandboxes().await.is_empty());
    let label = Patch::Merge(json!({"metadata": {"labels": {"disk": "fast"}}}));
    Api::<Node>::all(world.client.clone())
        .patch(NODE, &PatchParams::default(), &label)
        .await
        .unwrap();
    let status = world.running("picky").await;
    assert_eq!(condition(&status)["status"], "True");
    world.end().await;
}

#[tokio::test]
async fn gates_hold_a_pod_back_until_they_are_taken_away() {
    let world = World::start().await;
    world
        .create("gated", json!({"schedulingGates": [{"name": "x.io/hold"}]}))
        .await;
    let status = world
        .until("gated", "gated", |s| {
            condition(s)["reason"] == "SchedulingGated"
        })
        .await;
    assert_eq!(
        condition(&status)["message"],
        "Scheduling is blocked due to non-empty scheduling gates"
    );
    let open = Patch::Merge(json!({"spec": {"schedulingGates": null}}));
    world
        .pods()
        .patch("gated", &PatchParams::default(), &open)
        .await
        .unwrap();
    world.running("gated").await;
    world.end().await;
}

#[tokio::test]
async fn what_does_not_fit_waits_for_others_to_go() {
    let world = World::start().await;
    world
        .eventually("a node", || async {
            let nodes = Api::<Node>::all(world.client.clone());
            let node = nodes.get_opt(NODE).await.unwrap();
            node.is_some_and(|node| node.status.is_some())
        })
        .await;
    let node = Api::<Node>::all(world.client.clone())
        .get(NODE)
        .await
        .unwrap();
    let cpus = node.status.unwrap().allocatable.unwrap()["cpu"].0.clone();
    let all = json!({"terminationGracePeriodSeconds": 0, "containers": [{"name": "c",
        "image": "busybox", "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": {"cpu": cpus}}}]});
    world.create("first", all.clone()).await;
    world.running("first").await;
    world.create("second", all).await;
    world
        .until("second", "unschedulable", |status| {
            condition(status)["message"]
                .as_str()
                .is_some_and(|message| message.contains("1 Insufficient cpu"))
        })
        .await;
    world
        .pods()
        .delete("first", &DeleteParams::default())
        .await
        .unwrap();
    world.running("second").await;
    world.end().await;
}

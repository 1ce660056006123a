//! Scheduling gates hold a pod back from the only node.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "helpers of a test fail by panic")]

mod common;

use common::Cluster;
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";

fn gated(gates: &[&str]) -> Value {
    let gates: Vec<Value> = gates.iter().map(|name| json!({"name": name})).collect();
    json!({"metadata": {"name": "p"}, "spec": {"schedulingGates": gates, "containers": [{"name": "c", "image": "i"}]}})
}

#[tokio::test]
async fn a_gated_pod_is_bound_when_the_last_gate_goes() {
    let cluster = Cluster::start_with(|config| config.node_name = Some("node-1".into())).await;
    let admin = cluster.admin();
    let path = format!("{PODS}/p");
    let made = admin
        .create(PODS, &gated(&["a.io/x", "a.io/y"]))
        .await
        .expect(201);
    assert_eq!(made["spec"].get("nodeName"), None);
    assert_eq!(made["status"]["phase"], "Pending");
    assert_eq!(made["status"]["conditions"][0]["reason"], "SchedulingGated");

    let mut more = made.clone();
    more["spec"]["schedulingGates"] = json!([{"name": "a.io/x"}, {"name": "a.io/z"}]);
    let refused = admin.put(&path, &more).await;
    assert_eq!(refused.code, 422);
    assert!(
        refused
            .text
            .contains("only deletion is allowed, but found new scheduling gate 'a.io/z'"),
        "{}",
        refused.text
    );

    let mut fewer = made.clone();
    fewer["spec"]["schedulingGates"] = json!([{"name": "a.io/y"}]);
    let fewer = admin.put(&path, &fewer).await.expect(200);
    assert_eq!(fewer["spec"].get("nodeName"), None, "one gate is left");

    let mut none = fewer.clone();
    none["spec"]
        .as_object_mut()
        .unwrap()
        .remove("schedulingGates");
    let bound = admin.put(&path, &none).await.expect(200);
    assert_eq!(bound["spec"]["nodeName"], "node-1");
    let conditions = bound["status"]["conditions"].as_array().unwrap();
    assert!(
        conditions
            .iter()
            .all(|condition| condition["reason"] != "SchedulingGated")
    );
}

#[tokio::test]
async fn gates_have_names_and_no_node() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    for (pod, said) in [
        (gated(&["no good"]), "spec.schedulingGates[0]"),
        (
            gated(&["a.io/x", "a.io/x"]),
            "spec.schedulingGates[1]: Duplicate value",
        ),
        (
            {
                let mut pod = gated(&["a.io/x"]);
                pod["spec"]["nodeName"] = "n".into();
                pod
            },
            "spec.nodeName: Forbidden: cannot be set until all schedulingGates have been cleared",
        ),
    ] {
        let refused = admin.create(PODS, &pod).await;
        assert_eq!(refused.code, 422, "{said}");
        assert!(refused.text.contains(said), "{said}: {}", refused.text);
    }
}

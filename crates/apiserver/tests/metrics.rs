//! Metrics of the server and of its node, and who may read them.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use common::Cluster;
use hypernetes_apiserver::NodeMetrics;
use hypernetes_identity::User;
use serde_json::json;

const NODE: &str = "/api/v1/nodes/n1/proxy/metrics";

async fn with_node() -> Cluster {
    let reads = AtomicU64::new(0);
    let read = move || {
        let reads = reads.fetch_add(1, Ordering::Relaxed) + 1;
        let text = format!("# TYPE pool gauge\npool {reads}\n# EOF\n");
        let text: futures::future::BoxFuture<'static, String> = Box::pin(async { text });
        text
    };
    let node = NodeMetrics {
        node: "n1".into(),
        read: Arc::new(read),
    };
    Cluster::start_with(|config| config.node_metrics = Some(node)).await
}

#[tokio::test]
async fn the_node_s_metrics_are_beside_the_server_s_and_behind_its_proxy() {
    let cluster = with_node().await;
    let admin = cluster.admin();
    // A request is counted when it has been answered.
    admin.get("/version").await;
    for read in 1..3 {
        let all = admin.get("/metrics").await;
        let kind = all.headers["content-type"].to_str().unwrap();
        assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
        assert!(all.text.contains("hypernetes_apiserver_requests_total"));
        let end = format!("pool {read}\n# EOF\n");
        assert!(all.text.ends_with(&end), "{}", all.text);
        assert_eq!(all.text.matches("# EOF").count(), 1);
    }
    let node = admin.get(NODE).await;
    assert_eq!(node.code, 200);
    assert_eq!(node.text, "# TYPE pool gauge\npool 3\n# EOF\n");

    let refused = "the server could not find the requested resource";
    for path in ["", "/", "/pods", "/metrics/cadvisor"] {
        let path = format!("/api/v1/nodes/n1/proxy{path}");
        let answer = admin.get(&path).await;
        assert_eq!(answer.code, 404, "{path}");
        assert!(answer.text.contains(refused), "{}", answer.text);
    }
    let other = "/api/v1/nodes/n2/proxy/metrics";
    let missing = "nodes \"n2\" not found";
    admin.get(other).await.refused(404, "NotFound", missing);
    assert_eq!(admin.create(NODE, &json!({})).await.code, 405);
}

#[tokio::test]
async fn a_server_without_a_node_has_its_own_alone() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let text = admin.get("/metrics").await.text;
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    let missing = "nodes \"n1\" not found";
    admin.get(NODE).await.refused(404, "NotFound", missing);
}

#[tokio::test]
async fn only_who_has_the_right_reads_a_node_s_metrics() {
    let cluster = with_node().await;
    cluster.tenant("acme").await;
    let monitor = cluster.client(User::authenticated("prometheus", []));
    for client in [&cluster.member("acme", "admin"), &monitor] {
        assert_eq!(client.get("/metrics").await.code, 403);
        assert_eq!(client.get(NODE).await.code, 403);
    }
    assert_eq!(cluster.nobody().get(NODE).await.code, 403);
    // As Prometheus is given it in a cluster.
    let admin = cluster.admin();
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let role = json!({
        "metadata": {"name": "prometheus"},
        "rules": [{"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get"]}],
    });
    let roles = format!("{rbac}/clusterroles");
    admin.create(&roles, &role).await.expect(201);
    let binding = json!({
        "metadata": {"name": "prometheus"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "prometheus"},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "prometheus"}],
    });
    let bindings = format!("{rbac}/clusterrolebindings");
    admin.create(&bindings, &binding).await.expect(201);
    assert_eq!(monitor.get(NODE).await.code, 200);
    assert_eq!(monitor.get("/metrics").await.code, 403);
}

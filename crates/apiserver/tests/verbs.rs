//! Every verb over HTTP, with the answers and the wording that clients rely on.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use common::{Cluster, config_map, pod};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PODS: &str = "/api/v1/namespaces/default/pods";

#[tokio::test]
async fn a_created_object_carries_what_the_server_sets() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut sent = config_map("a", "1");
    sent["metadata"]["uid"] = "mine".into();
    sent["metadata"]["creationTimestamp"] = "1999-01-01T00:00:00Z".into();
    sent["metadata"]["deletionTimestamp"] = "1999-01-01T00:00:00Z".into();
    let made = admin.create(MAPS, &sent).await.expect(201);
    let metadata = &made["metadata"];
    assert_eq!(metadata["namespace"], "default");
    assert_ne!(metadata["uid"], "mine");
    assert!(
        metadata["creationTimestamp"]
            .as_str()
            .unwrap()
            .starts_with("20")
    );
    assert!(metadata.get("deletionTimestamp").is_none());
    assert!(
        metadata["resourceVersion"]
            .as_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0
    );
    assert_eq!(admin.get(&format!("{MAPS}/a")).await.expect(200), made);
}

#[tokio::test]
async fn refusals_of_create() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    admin.create(MAPS, &config_map("a", "2")).await.refused(
        409,
        "AlreadyExists",
        "configmaps \"a\" already exists",
    );
    admin
        .create(
            "/api/v1/namespaces/nowhere/configmaps",
            &config_map("a", "1"),
        )
        .await
        .refused(404, "NotFound", "namespaces \"nowhere\" not found");
    let mut elsewhere = config_map("b", "1");
    elsewhere["metadata"]["namespace"] = "other".into();
    admin.create(MAPS, &elsewhere).await.refused(
        400,
        "BadRequest",
        "the namespace of the provided object does not match the namespace sent on the request",
    );
    let mut secret = config_map("b", "1");
    secret["kind"] = "Secret".into();
    assert_eq!(admin.create(MAPS, &secret).await.code, 400);
    let mut versioned = config_map("b", "1");
    versioned["metadata"]["resourceVersion"] = "1".into();
    admin.create(MAPS, &versioned).await.refused(
        400,
        "BadRequest",
        "resourceVersion should not be set on objects to be created",
    );
    let invalid = admin.create(MAPS, &config_map("Not_A_Name", "1")).await;
    assert_eq!(
        (invalid.code, invalid.value["reason"].as_str()),
        (422, Some("Invalid"))
    );
    assert_eq!(
        invalid.value["details"]["causes"][0]["field"],
        "metadata.name"
    );
    let nameless = admin.create(MAPS, &json!({"metadata": {}})).await;
    assert_eq!(nameless.code, 422, "{}", nameless.text);
    assert_eq!(
        admin
            .create("/api/v1/configmaps", &config_map("b", "1"))
            .await
            .code,
        405
    );
    assert_eq!(
        admin
            .create(&format!("{MAPS}/b"), &config_map("b", "1"))
            .await
            .code,
        405
    );
    assert_eq!(admin.create(MAPS, &json!("text")).await.code, 400);
    let cbor = admin
        .ask("POST", MAPS, &[("content-type", "application/cbor")], "x")
        .await;
    assert_eq!(
        (cbor.code, cbor.value["reason"].as_str()),
        (415, Some("UnsupportedMediaType"))
    );
    let refused = admin
        .ask(
            "POST",
            MAPS,
            &[("accept", "application/cbor")],
            config_map("b", "1").to_string(),
        )
        .await;
    assert_eq!(refused.code, 406);
    assert_eq!(
        admin.get(&format!("{MAPS}/b")).await.code,
        404,
        "nothing was made"
    );
    let large = config_map("b", &"x".repeat(4 << 20));
    assert_eq!(admin.create(MAPS, &large).await.code, 413);
}

#[tokio::test]
async fn names_are_generated() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let object = json!({"metadata": {"generateName": "x-"}});
    let names: std::collections::BTreeSet<String> = {
        let mut names = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let made = admin.create(MAPS, &object).await.expect(201);
            names.insert(made["metadata"]["name"].as_str().unwrap().to_owned());
        }
        names
    };
    assert_eq!(names.len(), 20);
    assert!(
        names
            .iter()
            .all(|name| name.starts_with("x-") && name.len() == 7)
    );
}

#[tokio::test]
async fn unknown_fields_are_refused_warned_of_or_ignored() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let odd = |name: &str| {
        format!(r#"{{"metadata":{{"name":"{name}"}},"date":1,"data":{{"a":"1","a":"2"}}}}"#)
    };
    let strict = admin
        .ask(
            "POST",
            &format!("{MAPS}?fieldValidation=Strict"),
            &[],
            odd("s"),
        )
        .await;
    assert_eq!(strict.code, 400);
    let message = strict.value["message"].as_str().unwrap();
    assert!(message.contains("strict decoding error"), "{message}");
    assert!(message.contains(r#"unknown field "date""#), "{message}");
    assert!(message.contains(r#"duplicate field "data.a""#), "{message}");
    let warned = admin.ask("POST", MAPS, &[], odd("w")).await;
    assert_eq!(warned.code, 201, "{}", warned.text);
    assert!(warned.value.get("date").is_none());
    assert_eq!(warned.value["data"]["a"], "2");
    let warnings: Vec<&str> = warned
        .headers
        .get_all("warning")
        .iter()
        .map(|v| v.to_str().unwrap())
        .collect();
    assert!(
        warnings.contains(&r#"299 - "unknown field \"date\"""#),
        "{warnings:?}"
    );
    let ignored = admin
        .ask(
            "POST",
            &format!("{MAPS}?fieldValidation=Ignore"),
            &[],
            odd("i"),
        )
        .await;
    assert_eq!(ignored.code, 201);
    assert!(!ignored.headers.contains_key("warning"));
    assert_eq!(
        admin
            .create(
                &format!("{MAPS}?fieldValidation=Maybe"),
                &config_map("x", "")
            )
            .await
            .code,
        400
    );
}

#[tokio::test]
async fn bodies_may_be_yaml() {
    let cluster = Cluster::start().await;
    let yaml = "metadata:\n  name: y\ndata:\n  k: v\n";
    let made = cluster
        .admin()
        .ask("POST", MAPS, &[("content-type", "application/yaml")], yaml)
        .await;
    assert_eq!(made.expect(201)["data"]["k"], "v");
}

#[tokio::test]
async fn a_dry_run_does_all_but_store() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let made = admin
        .create(&format!("{MAPS}?dryRun=All"), &config_map("a", "1"))
        .await
        .expect(201);
    assert!(made["metadata"]["uid"].is_string());
    assert_eq!(admin.get(&format!("{MAPS}/a")).await.code, 404);
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    assert_eq!(
        admin
            .create(&format!("{MAPS}?dryRun=All"), &config_map("a", "1"))
            .await
            .code,
        409
    );
    let patched = admin
        .patch(
            &format!("{MAPS}/a?dryRun=All"),
            "merge",
            &json!({"data": {"k": "2"}}),
        )
        .await
        .expect(200);
    assert_eq!(patched["data"]["k"], "2");
    admin
        .delete(&format!("{MAPS}/a?dryRun=All"))
        .await
        .expect(200);
    assert_eq!(
        admin.get(&format!("{MAPS}/a")).await.expect(200)["data"]["k"],
        "1"
    );
    assert_eq!(
        admin
            .create(&format!("{MAPS}?dryRun=Some"), &config_map("b", "1"))
            .await
            .code,
        400
    );
}

#[tokio::test]
async fn an_update_needs_the_newest_version() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let path = format!("{MAPS}/a");
    let first = admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let mut second = first.clone();
    second["data"]["k"] = "2".into();
    let second = admin.put(&path, &second).await.expect(200);
    assert_ne!(
        second["metadata"]["resourceVersion"],
        first["metadata"]["resourceVersion"]
    );
    admin.put(&path, &first).await.refused(
        409,
        "Conflict",
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please \
         apply your changes to the latest version and try again",
    );
    let unconditional = admin.put(&path, &config_map("a", "3")).await.expect(200);
    assert_eq!(unconditional["metadata"]["uid"], first["metadata"]["uid"]);
    let same = admin.put(&path, &unconditional).await.expect(200);
    assert_eq!(same, unconditional, "nothing changes: no new version");
    admin.put(&path, &config_map("b", "3")).await.refused(
        400,
        "BadRequest",
        "the name of the object (b) does not match the name on the URL (a)",
    );
    let mut other = config_map("a", "4");
    other["metadata"]["uid"] = "other".into();
    assert_eq!(admin.put(&path, &other).await.code, 409);
    admin
        .put(&format!("{MAPS}/c"), &config_map("c", "1"))
        .await
        .refused(404, "NotFound", "configmaps \"c\" not found");
    let lease = json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "me"}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
    admin.put(&format!("{leases}/l"), &lease).await.expect(201);
}

#[tokio::test]
async fn three_patches() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let path = format!("{MAPS}/a");
    let merged = admin
        .patch(&path, "merge", &json!({"data": {"k": null, "m": "1"}}))
        .await
        .expect(200);
    assert_eq!(merged["data"], json!({"m": "1"}));
    let patch = json!([{"op": "test", "path": "/data/m", "value": "1"}, {"op": "add", "path": "/data/j", "value": "2"}]);
    let patched = admin.patch(&path, "json", &patch).await.expect(200);
    assert_eq!(patched["data"], json!({"m": "1", "j": "2"}));
    let failing = json!([{"op": "test", "path": "/data/m", "value": "x"}]);
    let failed = admin.patch(&path, "json", &failing).await;
    assert_eq!(
        (failed.code, failed.value["reason"].as_str()),
        (422, Some("Invalid"))
    );
    let strategic = json!({"metadata": {"finalizers": ["a.b/c"]}, "data": {"s": "3"}});
    let patched = admin
        .patch(&path, "strategic-merge", &strategic)
        .await
        .expect(200);
    assert_eq!(patched["data"]["s"], "3");
    let more = json!({"metadata": {"finalizers": ["a.b/d"]}});
    let patched = admin
        .patch(&path, "strategic-merge", &more)
        .await
        .expect(200);
    let finalizers = patched["metadata"]["finalizers"].as_array().unwrap();
    assert_eq!(
        finalizers.len(),
        2,
        "a list of the merge strategy is merged: {finalizers:?}"
    );
    let stale = json!({"metadata": {"resourceVersion": "1"}, "data": {"s": "4"}});
    assert_eq!(admin.patch(&path, "merge", &stale).await.code, 409);
    let apply = admin.patch(&path, "apply", &config_map("a", "1")).await;
    assert_eq!(
        (apply.code, apply.value["reason"].as_str()),
        (422, Some("Invalid"))
    );
    assert_eq!(
        admin
            .patch(&format!("{MAPS}/b"), "merge", &json!({}))
            .await
            .code,
        404
    );
    let wrong = admin
        .patch(&path, "merge", &json!({"data": {"k": 5}}))
        .await;
    assert!(matches!(wrong.code, 400 | 422), "{}", wrong.text);
    let renamed = admin
        .patch(&path, "merge", &json!({"metadata": {"name": "z"}}))
        .await;
    assert_eq!(renamed.code, 400, "{}", renamed.text);
}

#[tokio::test]
async fn patches_of_many_clients_are_all_applied() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let path = format!("{MAPS}/a");
    let patches = (0..30).map(|i| {
        let (admin, path) = (admin.clone(), path.clone());
        tokio::spawn(async move {
            let patch = json!({"data": {format!("k{i}"): "x"}});
            admin.patch(&path, "merge", &patch).await.expect(200);
        })
    });
    for patch in patches.collect::<Vec<_>>() {
        patch.await.unwrap();
    }
    let object = admin.get(&path).await.expect(200);
    assert_eq!(object["data"].as_object().unwrap().len(), 31);
}

#[tokio::test]
async fn the_status_is_written_apart() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut sent = pod("p");
    sent["status"] = json!({"phase": "Running"});
    let made = admin.create(PODS, &sent).await.expect(201);
    assert_eq!(made["status"]["phase"], "Pending");
    assert_eq!(made["metadata"]["generation"], 1);
    let path = format!("{PODS}/p");
    let status = json!({"status": {"phase": "Running"}, "spec": {"priority": 7}});
    let patched = admin
        .patch(&format!("{path}/status"), "merge", &status)
        .await
        .expect(200);
    assert_eq!(patched["status"]["phase"], "Running");
    assert_eq!(patched["spec"]["priority"], 0);
    let patched = admin
        .patch(
            &path,
            "merge",
            &json!({"status": {"phase": "Failed"}, "metadata": {"labels": {"a": "b"}}}),
        )
        .await
        .expect(200);
    assert_eq!(patched["status"]["phase"], "Running");
    assert_eq!(patched["metadata"]["generation"], 1);
    let image = json!({"spec": {"containers": [{"name": "a", "image": "example.org/a:2"}]}});
    let patched = admin
        .patch(&path, "strategic-merge", &image)
        .await
        .expect(200);
    assert_eq!(patched["metadata"]["generation"], 2);
    assert_eq!(
        admin.get(&format!("{path}/status")).await.expect(200),
        patched
    );
}

#[tokio::test]
async fn deletion_waits_for_finalizers() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let path = format!("{MAPS}/a");
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let gone = admin.delete(&path).await.expect(200);
    assert_eq!(gone["kind"], "Status");
    assert_eq!(gone["status"], "Success");
    assert_eq!(gone["details"]["kind"], "configmaps");
    admin
        .delete(&path)
        .await
        .refused(404, "NotFound", "configmaps \"a\" not found");

    let mut held = config_map("a", "1");
    held["metadata"]["finalizers"] = json!(["example.org/hold"]);
    admin.create(MAPS, &held).await.expect(201);
    let lives = admin.delete(&path).await.expect(200);
    assert!(lives["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(admin.get(&path).await.code, 200);
    admin.delete(&path).await.expect(200);
    admin
        .patch(&path, "merge", &json!({"metadata": {"finalizers": null}}))
        .await
        .expect(200);
    assert_eq!(admin.get(&path).await.code, 404);
}

#[tokio::test]
async fn preconditions_of_deletion() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let made = admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let path = format!("{MAPS}/a");
    let ask = |options: Value| {
        let (admin, path) = (admin.clone(), path.clone());
        async move { admin.ask("DELETE", &path, &[], options.to_string()).await }
    };
    let wrong = ask(json!({"preconditions": {"uid": "x"}})).await;
    let message = wrong.value["message"].as_str().unwrap().to_owned();
    assert_eq!(wrong.code, 409);
    assert!(
        message.contains("Precondition failed: UID in precondition: x, UID in object meta: "),
        "{message}"
    );
    assert_eq!(
        ask(json!({"preconditions": {"resourceVersion": "1"}}))
            .await
            .code,
        409
    );
    assert_eq!(
        ask(json!({"propagationPolicy": "Sideways"})).await.code,
        400
    );
    assert_eq!(ask(json!({"gracePeriodSeconds": -1})).await.code, 400);
    let options = json!({"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background",
        "preconditions": {"uid": made["metadata"]["uid"]}});
    assert_eq!(ask(options).await.code, 200);
}

#[tokio::test]
async fn pods_are_deleted_gracefully() {
    let cluster = Cluster::start_with(|config| config.node_name = Some("node-1".into())).await;
    let admin = cluster.admin();
    let path = format!("{PODS}/p");
    let made = admin.create(PODS, &pod("p")).await.expect(201);
    assert_eq!(made["spec"]["nodeName"], "node-1");
    assert_eq!(made["status"]["qosClass"], "BestEffort");
    let deleting = admin.delete(&path).await.expect(200);
    assert_eq!(deleting["metadata"]["deletionGracePeriodSeconds"], 30);
    assert!(deleting["metadata"]["deletionTimestamp"].is_string());
    let again = admin.delete(&path).await.expect(200);
    assert_eq!(
        again["metadata"]["resourceVersion"],
        deleting["metadata"]["resourceVersion"]
    );
    let shorter = admin
        .delete(&format!("{path}?gracePeriodSeconds=5"))
        .await
        .expect(200);
    assert_eq!(shorter["metadata"]["deletionGracePeriodSeconds"], 5);
    let gone = admin
        .delete(&format!("{path}?gracePeriodSeconds=0"))
        .await
        .expect(200);
    assert_eq!(gone["kind"], "Pod");
    assert_eq!(admin.get(&path).await.code, 404);

    admin.create(PODS, &pod("done")).await.expect(201);
    let failed = json!({"status": {"phase": "Failed"}});
    admin
        .patch(&format!("{PODS}/done/status"), "merge", &failed)
        .await
        .expect(200);
    admin.delete(&format!("{PODS}/done")).await.expect(200);
    assert_eq!(admin.get(&format!("{PODS}/done")).await.code, 404);
}

#[tokio::test]
async fn a_pod_without_a_node_is_bound_once_and_deleted_at_once() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(PODS, &pod("p")).await.expect(201);
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n"}});
    admin
        .create(&format!("{PODS}/p/binding"), &binding)
        .await
        .expect(201);
    let bound = admin.get(&format!("{PODS}/p")).await.expect(200);
    assert_eq!(bound["spec"]["nodeName"], "n");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    assert_eq!(
        admin
            .create(&format!("{PODS}/p/binding"), &binding)
            .await
            .code,
        409
    );
    admin.create(PODS, &pod("q")).await.expect(201);
    admin.delete(&format!("{PODS}/q")).await.expect(200);
    assert_eq!(admin.get(&format!("{PODS}/q")).await.code, 404);
    let eviction = json!({"metadata": {"name": "p"}});
    admin
        .create(&format!("{PODS}/p/eviction"), &eviction)
        .await
        .expect(201);
    let evicted = admin.get(&format!("{PODS}/p")).await.expect(200);
    assert!(evicted["metadata"]["deletionTimestamp"].is_string());
}

#[tokio::test]
async fn collections_are_deleted_by_selection() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    for (name, label) in [("a", "x"), ("b", "x"), ("c", "y")] {
        let mut map = config_map(name, "1");
        map["metadata"]["labels"] = json!({"l": label});
        admin.create(MAPS, &map).await.expect(201);
    }
    let deleted = admin
        .delete(&format!("{MAPS}?labelSelector=l%3Dx"))
        .await
        .expect(200);
    assert_eq!(deleted["items"].as_array().unwrap().len(), 2);
    let left = admin.get(MAPS).await.expect(200);
    assert_eq!(left["items"].as_array().unwrap().len(), 1);
    assert_eq!(admin.delete("/api/v1/namespaces").await.code, 405);
}

#[tokio::test]
async fn namespaces_end_in_two_steps() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let made = admin
        .create("/api/v1/namespaces", &json!({"metadata": {"name": "n"}}))
        .await
        .expect(201);
    assert_eq!(made["status"]["phase"], "Active");
    assert_eq!(
        made["metadata"]["labels"]["kubernetes.io/metadata.name"],
        "n"
    );
    let ending = admin.delete("/api/v1/namespaces/n").await.expect(200);
    assert_eq!(ending["status"]["phase"], "Terminating");
    let refused = admin
        .create("/api/v1/namespaces/n/configmaps", &config_map("a", "1"))
        .await;
    assert_eq!(
        refused.value["details"]["causes"][0]["reason"],
        "NamespaceTerminating"
    );
    refused.refused(
        403,
        "Forbidden",
        "configmaps \"a\" is forbidden: unable to create new content in namespace n because it is \
         being terminated",
    );
    let mut done = admin.get("/api/v1/namespaces/n").await.expect(200);
    done["spec"]["finalizers"] = json!([]);
    // Only the subresource takes finalizers away.
    let kept = admin.put("/api/v1/namespaces/n", &done).await.expect(200);
    assert_eq!(kept["spec"]["finalizers"], json!(["kubernetes"]));
    admin
        .put("/api/v1/namespaces/n/finalize", &done)
        .await
        .expect(200);
    assert_eq!(admin.get("/api/v1/namespaces/n").await.code, 404);
    admin.delete("/api/v1/namespaces/default").await.refused(
        403,
        "Forbidden",
        "namespaces \"default\" is forbidden: this namespace may not be deleted",
    );
}

#[tokio::test]
async fn both_views_of_events() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let event = json!({"metadata": {"name": "e"}, "eventTime": "2026-01-01T00:00:00.000000Z",
        "regarding": {"kind": "Pod", "name": "p", "namespace": "default"}, "reason": "Started",
        "note": "it runs", "type": "Normal", "action": "Start",
        "reportingController": "hypernetes.io/nodelet", "reportingInstance": "n"});
    let events = "/apis/events.k8s.io/v1/namespaces/default/events";
    let made = admin.create(events, &event).await.expect(201);
    assert_eq!(
        (made["note"].as_str(), made["apiVersion"].as_str()),
        (Some("it runs"), Some("events.k8s.io/v1"))
    );
    let core = admin
        .get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Dp,reason%3DStarted")
        .await
        .expect(200);
    assert_eq!(core["items"][0]["message"], "it runs");
    assert_eq!(core["items"][0]["kind"], "Event");
    let regarding = format!("{events}?fieldSelector=regarding.name%3Dp");
    let found = admin.get(&regarding).await.expect(200);
    assert_eq!(found["items"][0]["note"], "it runs");
    let patched = admin
        .patch(&format!("{events}/e"), "merge", &json!({"note": "still"}))
        .await
        .expect(200);
    assert_eq!(patched["note"], "still");
    let stored = admin
        .get("/api/v1/namespaces/default/events/e")
        .await
        .expect(200);
    assert_eq!(
        (stored["message"].as_str(), stored["apiVersion"].as_str()),
        (Some("still"), Some("v1"))
    );
}

#[tokio::test]
async fn secrets_take_plain_text() {
    let cluster = Cluster::start().await;
    let secrets = "/api/v1/namespaces/default/secrets";
    let made = cluster
        .admin()
        .create(
            secrets,
            &json!({"metadata": {"name": "s"}, "stringData": {"p": "x"}}),
        )
        .await
        .expect(201);
    assert_eq!(made["data"], json!({"p": "eA=="}));
    assert_eq!(made["type"], "Opaque");
}

#[tokio::test]
async fn what_does_not_exist_is_said_so() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let missing = "the server could not find the requested resource";
    for path in [
        "/api/v2/pods",
        "/apis/apps/v2/deployments",
        "/api/v1/namespaces/default/nothings",
        "/api/v1/namespaces/default/pods/p/nothing",
        "/api/v1/namespaces/default/nodes",
        "/api/v1/pods/p",
        "/nothing",
        "/apis/extensions",
        "/openapi/v1",
    ] {
        admin.get(path).await.refused(404, "NotFound", missing);
    }
    let refused = "the server does not allow this method on the requested resource";
    for (method, path) in [
        ("PUT", "/api/v1/namespaces/default/pods"),
        ("DELETE", "/api/v1/namespaces"),
        (
            "GET",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        ),
        ("POST", "/version"),
        ("DELETE", "/api/v1/namespaces/default/pods/p/log"),
    ] {
        admin
            .ask(method, path, &[], "")
            .await
            .refused(405, "MethodNotAllowed", refused);
    }
    admin
        .get("/api/v1/namespaces/default/pods/p")
        .await
        .refused(404, "NotFound", "pods \"p\" not found");
}

#[tokio::test]
async fn tables_and_metadata() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let table = [(
        "accept",
        "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
    )];
    for path in [MAPS.to_owned(), format!("{MAPS}/a")] {
        let shown = admin.ask("GET", &path, &table, "").await.expect(200);
        assert_eq!(shown["kind"], "Table");
        assert_eq!(shown["columnDefinitions"][0]["name"], "Name");
        assert_eq!(shown["rows"][0]["cells"][0], "a");
    }
    let metadata = [(
        "accept",
        "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io",
    )];
    let shown = admin.ask("GET", MAPS, &metadata, "").await.expect(200);
    assert_eq!(shown["kind"], "PartialObjectMetadataList");
    assert!(shown["items"][0].get("data").is_none());
    let metadata = [(
        "accept",
        "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io",
    )];
    let shown = admin
        .ask("GET", &format!("{MAPS}/a"), &metadata, "")
        .await
        .expect(200);
    assert_eq!(
        (shown["kind"].as_str(), shown["metadata"]["name"].as_str()),
        (Some("PartialObjectMetadata"), Some("a"))
    );
}

#[tokio::test]
async fn lists_in_pages_show_one_moment() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    for i in 0..10 {
        let mut map = config_map(&format!("m{i}"), "1");
        map["metadata"]["labels"] = json!({"even": (i % 2 == 0).to_string()});
        admin.create(MAPS, &map).await.expect(201);
    }
    let first = admin.get(&format!("{MAPS}?limit=4")).await.expect(200);
    assert_eq!(first["items"].as_array().unwrap().len(), 4);
    assert_eq!(first["metadata"]["remainingItemCount"], 6);
    // What happens between two pages is not seen.
    admin.delete(&format!("{MAPS}/m5")).await.expect(200);
    admin
        .create(MAPS, &config_map("m99", "1"))
        .await
        .expect(201);
    let mut names = Vec::new();
    let mut page = first.clone();
    loop {
        let items = page["items"].as_array().unwrap();
        names.extend(
            items
                .iter()
                .map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()),
        );
        assert_eq!(
            page["metadata"]["resourceVersion"],
            first["metadata"]["resourceVersion"]
        );
        let Some(token) = page["metadata"]["continue"]
            .as_str()
            .filter(|t| !t.is_empty())
        else {
            break;
        };
        page = admin
            .get(&format!("{MAPS}?limit=4&continue={token}"))
            .await
            .expect(200);
    }
    let expected: Vec<String> = (0..10).map(|i| format!("m{i}")).collect();
    assert_eq!(names, expected);
    let selected = admin
        .get(&format!("{MAPS}?labelSelector=even%3Dtrue&limit=3"))
        .await
        .expect(200);
    assert_eq!(selected["items"].as_array().unwrap().len(), 3);
    let token = selected["metadata"]["continue"].as_str().unwrap();
    let rest = admin
        .get(&format!(
            "{MAPS}?labelSelector=even%3Dtrue&limit=3&continue={token}"
        ))
        .await
        .expect(200);
    assert_eq!(rest["items"].as_array().unwrap().len(), 2);
    assert!(rest["metadata"].get("continue").is_none());
    let revision = first["metadata"]["resourceVersion"].as_str().unwrap();
    let exact = format!("{MAPS}?resourceVersion={revision}&resourceVersionMatch=Exact");
    assert_eq!(
        admin.get(&exact).await.expect(200)["items"]
            .as_array()
            .unwrap()
            .len(),
        10
    );
    assert_eq!(
        admin
            .get(&format!("{MAPS}?fieldSelector=data.k%3D1"))
            .await
            .code,
        400
    );
    assert_eq!(
        admin
            .get(&format!("{MAPS}?labelSelector=%21%21"))
            .await
            .code,
        400
    );
    let all = admin
        .get("/api/v1/configmaps?fieldSelector=metadata.namespace%3Ddefault")
        .await
        .expect(200);
    assert_eq!(all["items"].as_array().unwrap().len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_revision_of_the_future_is_waited_for_and_then_refused() {
    let cluster = Cluster::start().await;
    let answer = cluster
        .admin()
        .get(&format!("{MAPS}?resourceVersion=100000"))
        .await;
    assert_eq!(
        (answer.code, answer.value["reason"].as_str()),
        (504, Some("Timeout"))
    );
    assert_eq!(
        answer.value["details"]["causes"][0]["message"],
        "Too large resource version"
    );
}

//! Watches over HTTP.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use std::time::Duration;

use common::{Cluster, config_map};
use hypernetes_apiserver::ApiServerConfig;
use hypernetes_store::{Store, StoreConfig};
use serde_json::json;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn a_watch_shows_what_there_is_and_what_happens() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let mut events = admin.watch(&format!("{MAPS}?watch=true")).await;
    assert_eq!(events.next_name().await, ("ADDED".into(), "a".into()));
    admin.create(MAPS, &config_map("b", "1")).await.expect(201);
    admin
        .put(&format!("{MAPS}/b"), &config_map("b", "2"))
        .await
        .expect(200);
    admin.delete(&format!("{MAPS}/b")).await.expect(200);
    admin
        .create(
            "/api/v1/namespaces/kube-public/configmaps",
            &config_map("x", "1"),
        )
        .await
        .expect(201);
    admin.create(MAPS, &config_map("c", "1")).await.expect(201);
    let added = events.next().await;
    let modified = events.next().await;
    let deleted = events.next().await;
    assert_eq!(
        (added["type"].as_str(), modified["type"].as_str()),
        (Some("ADDED"), Some("MODIFIED"))
    );
    assert_eq!(deleted["type"], "DELETED");
    assert_eq!(deleted["object"]["data"]["k"], "2");
    let revisions: Vec<u64> = [&added, &modified, &deleted]
        .map(|e| {
            e["object"]["metadata"]["resourceVersion"]
                .as_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .into();
    assert!(
        revisions[0] < revisions[1] && revisions[1] < revisions[2],
        "{revisions:?}"
    );
    assert_eq!(events.next_name().await, ("ADDED".into(), "c".into()));
}

#[tokio::test]
async fn a_watch_goes_on_where_a_list_ended() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let list = admin.get(MAPS).await.expect(200);
    let revision = list["metadata"]["resourceVersion"]
        .as_str()
        .unwrap()
        .to_owned();
    admin.create(MAPS, &config_map("b", "1")).await.expect(201);
    let mut events = admin
        .watch(&format!("{MAPS}?watch=1&resourceVersion={revision}"))
        .await;
    assert_eq!(events.next_name().await, ("ADDED".into(), "b".into()));
    let mut one = admin
        .watch(&format!("{MAPS}?watch=1&fieldSelector=metadata.name%3Db"))
        .await;
    assert_eq!(one.next_name().await, ("ADDED".into(), "b".into()));
    let mut prefixed = admin
        .watch("/api/v1/watch/namespaces/default/configmaps/a")
        .await;
    assert_eq!(prefixed.next_name().await, ("ADDED".into(), "a".into()));
}

#[tokio::test]
async fn objects_come_into_a_selection_and_leave_it() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let mut events = admin
        .watch(&format!("{MAPS}?watch=true&labelSelector=in%3Dyes"))
        .await;
    let path = format!("{MAPS}/a");
    let label = |value: serde_json::Value| json!({"metadata": {"labels": {"in": value}}});
    admin
        .patch(&path, "merge", &label("yes".into()))
        .await
        .expect(200);
    assert_eq!(events.next_name().await, ("ADDED".into(), "a".into()));
    admin
        .patch(&path, "merge", &json!({"data": {"k": "2"}}))
        .await
        .expect(200);
    assert_eq!(events.next_name().await, ("MODIFIED".into(), "a".into()));
    let out = admin
        .patch(&path, "merge", &label("no".into()))
        .await
        .expect(200);
    let left = events.next().await;
    assert_eq!(left["type"], "DELETED");
    assert_eq!(
        left["object"]["metadata"]["resourceVersion"],
        out["metadata"]["resourceVersion"]
    );
    assert_eq!(left["object"]["metadata"]["labels"]["in"], "yes");
}

#[tokio::test]
async fn a_watch_list_marks_the_end_of_what_there_was() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    let query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut events = admin.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(events.next_name().await, ("ADDED".into(), "a".into()));
    let mark = events.next().await;
    assert_eq!(mark["type"], "BOOKMARK");
    assert_eq!(mark["object"]["kind"], "ConfigMap");
    assert_eq!(
        mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"],
        "true"
    );
    let revision: u64 = mark["object"]["metadata"]["resourceVersion"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(revision > 0);
    admin.create(MAPS, &config_map("b", "1")).await.expect(201);
    assert_eq!(events.next_name().await, ("ADDED".into(), "b".into()));
}

#[tokio::test]
async fn tables_are_watched_with_their_columns_once() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    admin.create(MAPS, &config_map("a", "1")).await.expect(201);
    admin.create(MAPS, &config_map("b", "1")).await.expect(201);
    let accept = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
    let mut events = admin.watch_as(&format!("{MAPS}?watch=true"), &accept).await;
    let (first, second) = (events.next().await, events.next().await);
    assert_eq!(first["object"]["kind"], "Table");
    assert!(
        !first["object"]["columnDefinitions"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert!(
        second["object"]["columnDefinitions"]
            .as_array()
            .is_none_or(Vec::is_empty)
    );
    assert_eq!(second["object"]["rows"][0]["cells"][0], "b");
}

#[tokio::test]
async fn a_watch_from_a_forgotten_revision_says_so() {
    let store = StoreConfig {
        history_changes: 5,
        ..StoreConfig::default()
    };
    let store = Store::in_memory(store).unwrap();
    let cluster = Cluster::start_with(|config| *config = ApiServerConfig::new(store)).await;
    let admin = cluster.admin();
    for i in 0..200 {
        admin
            .create(MAPS, &config_map(&format!("m{i}"), "1"))
            .await
            .expect(201);
    }
    let mut events = admin
        .watch(&format!("{MAPS}?watch=true&resourceVersion=1"))
        .await;
    let event = events.next().await;
    assert_eq!(event["type"], "ERROR");
    assert_eq!(
        (
            event["object"]["code"].as_i64(),
            event["object"]["reason"].as_str()
        ),
        (Some(410), Some("Expired"))
    );
    assert_eq!(events.next_or_end().await, None);
    let old = admin
        .get(&format!(
            "{MAPS}?resourceVersion=1&resourceVersionMatch=Exact"
        ))
        .await;
    assert_eq!(
        (old.code, old.value["reason"].as_str()),
        (410, Some("Expired"))
    );
    // A page that is too late is refused with a token to go on from what is newest.
    let first = admin.get(&format!("{MAPS}?limit=2")).await.expect(200);
    let token = first["metadata"]["continue"].as_str().unwrap().to_owned();
    for i in 0..200 {
        admin.delete(&format!("{MAPS}/m{i}")).await.expect(200);
    }
    admin.create(MAPS, &config_map("z", "1")).await.expect(201);
    let late = admin.get(&format!("{MAPS}?limit=2&continue={token}")).await;
    assert_eq!(late.code, 410, "{}", late.text);
    let token = late.value["metadata"]["continue"]
        .as_str()
        .unwrap()
        .to_owned();
    let rest = admin
        .get(&format!("{MAPS}?limit=2&continue={token}"))
        .await
        .expect(200);
    assert_eq!(rest["items"][0]["metadata"]["name"], "z");
}

#[tokio::test(start_paused = true)]
async fn idle_watches_get_bookmarks_and_end_in_time() {
    let cluster = Cluster::start_with(|config| {
        config.limits.bookmark_interval = Duration::from_secs(5);
    })
    .await;
    let admin = cluster.admin();
    let mut events = admin
        .watch(&format!(
            "{MAPS}?watch=true&allowWatchBookmarks=true&timeoutSeconds=12"
        ))
        .await;
    for _ in 0..2 {
        let event = events.next().await;
        assert_eq!(event["type"], "BOOKMARK");
        let revision = event["object"]["metadata"]["resourceVersion"]
            .as_str()
            .unwrap();
        assert_eq!(revision, cluster.store.revision().to_string());
    }
    assert_eq!(events.next_or_end().await, None);
    let mut quiet = admin
        .watch(&format!("{MAPS}?watch=true&timeoutSeconds=12"))
        .await;
    assert_eq!(quiet.next_or_end().await, None);
}

#[tokio::test]
async fn watches_end_at_shutdown() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut events = admin.watch(&format!("{MAPS}?watch=true")).await;
    cluster.server.shut_down().await;
    assert_eq!(events.next_or_end().await, None);
    assert_eq!(admin.get("/readyz").await.code, 503);
}

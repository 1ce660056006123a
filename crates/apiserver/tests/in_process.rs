//! `kube::Client` on the server itself: no socket, the same HTTP.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use std::{collections::BTreeMap, time::Duration};

use common::Cluster;
use futures::{StreamExt, TryStreamExt};
use hypernetes_identity::User;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{
        DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, WatchEvent,
        WatchParams,
    },
    runtime::{
        events::{Event, EventType, Recorder, Reporter},
        watcher,
    },
};
use serde_json::json;

fn client(cluster: &Cluster) -> Client {
    Client::new(
        cluster
            .server
            .service_as(User::system("system:hypernetes:test")),
        "default",
    )
}

fn map(name: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.into()),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([("k".into(), "1".into())])),
        ..ConfigMap::default()
    }
}

#[tokio::test]
async fn a_typed_client_does_everything() {
    let cluster = Cluster::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client(&cluster));
    let post = PostParams::default();
    let made = api.create(&post, &map("a")).await.unwrap();
    assert!(made.uid().is_some());
    let taken = api.create(&post, &map("a")).await.unwrap_err();
    assert!(
        matches!(&taken, kube::Error::Api(status) if status.is_already_exists()),
        "{taken}"
    );
    let patch = Patch::Merge(json!({"data": {"k": "2"}}));
    let patched = api
        .patch("a", &PatchParams::default(), &patch)
        .await
        .unwrap();
    assert_eq!(patched.data.unwrap()["k"], "2");
    let mut newest = api.get("a").await.unwrap();
    newest.data.as_mut().unwrap().insert("j".into(), "3".into());
    api.replace("a", &post, &newest).await.unwrap();
    let stale = api.replace("a", &post, &newest).await.unwrap_err();
    assert!(
        matches!(&stale, kube::Error::Api(status) if status.is_conflict()),
        "{stale}"
    );
    assert_eq!(
        api.list(&ListParams::default()).await.unwrap().items.len(),
        1
    );
    assert_eq!(
        api.list_metadata(&ListParams::default())
            .await
            .unwrap()
            .items
            .len(),
        1
    );
    assert!(
        api.delete("a", &DeleteParams::default())
            .await
            .unwrap()
            .is_right()
    );
    assert!(api.get_opt("a").await.unwrap().is_none());
    let namespaces: Api<Namespace> = Api::all(client(&cluster));
    assert_eq!(
        namespaces
            .list(&ListParams::default().limit(2))
            .await
            .unwrap()
            .items
            .len(),
        2
    );
}

#[tokio::test]
async fn watchers_of_both_kinds_follow() {
    let cluster = Cluster::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client(&cluster));
    api.create(&PostParams::default(), &map("a")).await.unwrap();
    let mut plain = api
        .watch(&WatchParams::default(), "0")
        .await
        .unwrap()
        .boxed();
    let first = plain.try_next().await.unwrap().unwrap();
    assert!(matches!(first, WatchEvent::Added(_)), "{first:?}");
    for config in [
        watcher::Config::default(),
        watcher::Config::default().streaming_lists(),
    ] {
        let name = format!("b-{}", config == watcher::Config::default());
        let mut events = watcher(api.clone(), config).boxed();
        let mut seen = Vec::new();
        let following = async {
            loop {
                match events.try_next().await.unwrap().unwrap() {
                    watcher::Event::InitApply(object) => seen.push(object.name_any()),
                    watcher::Event::InitDone => {
                        api.create(&PostParams::default(), &map(&name))
                            .await
                            .unwrap();
                    }
                    watcher::Event::Apply(object) => {
                        assert_eq!(object.name_any(), name);
                        break;
                    }
                    watcher::Event::Init => {}
                    watcher::Event::Delete(_) => panic!("nothing was deleted"),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), following)
            .await
            .expect("events come");
        assert!(seen.contains(&"a".to_owned()));
    }
}

#[tokio::test]
async fn recorded_events_are_found_by_their_object() {
    let cluster = Cluster::start().await;
    let client = client(&cluster);
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let pod: Pod = serde_json::from_value(common::pod("p")).unwrap();
    let pod = pods.create(&PostParams::default(), &pod).await.unwrap();
    let recorder = Recorder::new(client.clone(), Reporter::from("hypernetes.io/test"));
    let reference = kube::Resource::object_ref(&pod, &());
    for _ in 0..2 {
        // The second is the first in a series.
        let event = Event {
            type_: EventType::Normal,
            reason: "Started".into(),
            note: Some("it runs".into()),
            action: "Start".into(),
            secondary: None,
        };
        recorder.publish(&event, &reference).await.unwrap();
    }
    let events: Api<k8s_openapi::api::core::v1::Event> = Api::default_namespaced(client);
    let selector = ListParams::default().fields("involvedObject.name=p,reason=Started");
    let found = events.list(&selector).await.unwrap();
    assert_eq!(found.items.len(), 1);
    assert_eq!(found.items[0].message.as_deref(), Some("it runs"));
}

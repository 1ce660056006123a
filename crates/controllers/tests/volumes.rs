//! Persistent volumes against a server in memory and a driver on disk.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "helpers of a test fail by panic")]
#![allow(clippy::panic, reason = "helpers of a test fail by panic")]
#![allow(dead_code, reason = "the common part serves other tests too")]

mod common;

use common::{Cluster, name};
use hypernetes_volume::VolumeDriver;
use serde_json::{Value, json};

const CLAIMS: &str = "/api/v1/namespaces/default/persistentvolumeclaims";
const VOLUMES: &str = "/api/v1/persistentvolumes";
const CLASSES: &str = "/apis/storage.k8s.io/v1/storageclasses";

fn claim(name: &str, size: &str, more: &Value) -> Value {
    let mut spec =
        json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}});
    for (field, value) in more.as_object().unwrap() {
        spec[field] = value.clone();
    }
    json!({"metadata": {"name": name}, "spec": spec})
}

fn is_bound(object: &Value) -> bool {
    object["status"]["phase"] == "Bound"
}

async fn start() -> Cluster {
    let cluster = Cluster::start().await;
    cluster
        .wait(&format!("{CLASSES}/local"), |class| class.is_object())
        .await;
    cluster
}

async fn handles(cluster: &Cluster) -> Vec<String> {
    let all = cluster.driver.list().await.unwrap();
    all.iter().map(|volume| volume.id.to_string()).collect()
}

async fn event(cluster: &Cluster, reason: &'static str, words: &'static str) {
    cluster
        .wait("/api/v1/namespaces/default/events", move |list| {
            list["items"].as_array().is_some_and(|all| {
                all.iter().any(|event| {
                    let said = event["message"].as_str().unwrap_or_default();
                    event["reason"] == reason && said.contains(words)
                })
            })
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_gets_a_volume_that_goes_with_it() {
    let cluster = start().await;
    cluster
        .create(CLAIMS, &claim("a", "10Mi", &json!({})))
        .await;
    // Wherever the controllers are cut short, the next ones go on.
    cluster.restart().await;
    let path = format!("{CLAIMS}/a");
    let bound = cluster.wait(&path, is_bound).await;
    let own = format!("pvc-{}", bound["metadata"]["uid"].as_str().unwrap());
    assert_eq!(bound["spec"]["volumeName"], own.as_str());
    assert_eq!(bound["spec"]["storageClassName"], "local");
    assert_eq!(bound["status"]["capacity"]["storage"], "10Mi");
    let volume = cluster.wait(&format!("{VOLUMES}/{own}"), is_bound).await;
    assert_eq!(volume["spec"]["csi"]["volumeHandle"], own.as_str());
    assert_eq!(handles(&cluster).await, std::slice::from_ref(&own));
    event(
        &cluster,
        "ProvisioningSucceeded",
        "Successfully provisioned volume",
    )
    .await;
    cluster.delete(&path).await;
    cluster.restart().await;
    cluster.wait(&path, Value::is_null).await;
    cluster
        .wait(&format!("{VOLUMES}/{own}"), Value::is_null)
        .await;
    assert!(handles(&cluster).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_had_leaves_nothing() {
    let cluster = start().await;
    cluster
        .create(CLAIMS, &claim("large", "2Gi", &json!({})))
        .await;
    event(
        &cluster,
        "ProvisioningFailed",
        "no room for a volume of 2Gi",
    )
    .await;
    let many = json!({"accessModes": ["ReadWriteMany"]});
    cluster.create(CLAIMS, &claim("many", "1Mi", &many)).await;
    event(
        &cluster,
        "ProvisioningFailed",
        "ReadWriteMany is not supported",
    )
    .await;
    let unknown = json!({"storageClassName": "none"});
    cluster
        .create(CLAIMS, &claim("unknown", "1Mi", &unknown))
        .await;
    event(
        &cluster,
        "ProvisioningFailed",
        "storageclass.storage.k8s.io \"none\" not found",
    )
    .await;
    let nothing = json!({"storageClassName": ""});
    cluster
        .create(CLAIMS, &claim("nothing", "1Mi", &nothing))
        .await;
    event(&cluster, "FailedBinding", "no storage class is set").await;
    cluster.wait_count(VOLUMES, 0).await;
    assert!(handles(&cluster).await.is_empty());
    // The first consumer is what it waits for.
    let late = json!({"metadata": {"name": "late"}, "provisioner": "local.hypernetes.io",
        "volumeBindingMode": "WaitForFirstConsumer"});
    cluster.create(CLASSES, &late).await;
    let waits = json!({"storageClassName": "late"});
    cluster.create(CLAIMS, &claim("late", "1Mi", &waits)).await;
    event(
        &cluster,
        "WaitForFirstConsumer",
        "waiting for first consumer",
    )
    .await;
    let selected =
        json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "n1"}}});
    cluster.patch(&format!("{CLAIMS}/late"), &selected).await;
    cluster.wait(&format!("{CLAIMS}/late"), is_bound).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retained_volume_is_nobody_elses_until_an_operator_says_so() {
    let cluster = start().await;
    let keep = json!({"metadata": {"name": "keep"}, "provisioner": "local.hypernetes.io",
        "reclaimPolicy": "Retain"});
    cluster.create(CLASSES, &keep).await;
    let kept = json!({"storageClassName": "keep"});
    let path = format!("{CLAIMS}/a");
    cluster.create(CLAIMS, &claim("a", "10Mi", &kept)).await;
    let first = cluster.wait(&path, is_bound).await;
    let own = first["spec"]["volumeName"].as_str().unwrap().to_owned();
    cluster.delete(&path).await;
    let volume = format!("{VOLUMES}/{own}");
    let released = |volume: &Value| volume["status"]["phase"] == "Released";
    cluster.wait(&volume, released).await;
    // Another claim of the same name gets data of its own, and one that names the volume gets none.
    cluster.create(CLAIMS, &claim("a", "10Mi", &kept)).await;
    let second = cluster.wait(&path, is_bound).await;
    assert_ne!(second["spec"]["volumeName"], own.as_str());
    let named = json!({"storageClassName": "keep", "volumeName": own});
    cluster.create(CLAIMS, &claim("thief", "1Mi", &named)).await;
    event(
        &cluster,
        "FailedBinding",
        "already bound to a different claim",
    )
    .await;
    cluster.delete(&format!("{CLAIMS}/thief")).await;
    cluster
        .wait(&format!("{CLAIMS}/thief"), Value::is_null)
        .await;
    // The operator promises it to a claim that is to come.
    let promise = json!({"spec": {"claimRef": {"uid": null, "resourceVersion": null,
        "name": "b", "namespace": "default"}}});
    cluster.patch(&volume, &promise).await;
    let available = |volume: &Value| volume["status"]["phase"] == "Available";
    cluster.wait(&volume, available).await;
    cluster.create(CLAIMS, &claim("b", "5Mi", &kept)).await;
    let bound = cluster.wait(&format!("{CLAIMS}/b"), is_bound).await;
    assert_eq!(bound["spec"]["volumeName"], own.as_str());
    assert_eq!(bound["status"]["capacity"]["storage"], "10Mi");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_grows_and_is_told_when_its_data_are_lost() {
    let cluster = start().await;
    let path = format!("{CLAIMS}/a");
    cluster
        .create(CLAIMS, &claim("a", "10Mi", &json!({})))
        .await;
    let bound = cluster.wait(&path, is_bound).await;
    let own = bound["spec"]["volumeName"].as_str().unwrap().to_owned();
    let grow = |size: &str| json!({"spec": {"resources": {"requests": {"storage": size}}}});
    cluster.patch(&path, &grow("20Mi")).await;
    let pending = cluster
        .wait(&path, |claim| {
            claim["status"]["conditions"][0]["type"] == "FileSystemResizePending"
        })
        .await;
    assert_eq!(pending["status"]["capacity"]["storage"], "10Mi");
    let volume = cluster.get(&format!("{VOLUMES}/{own}")).await;
    assert_eq!(volume["spec"]["capacity"]["storage"], "20Mi");
    let id = own.parse().unwrap();
    let info = cluster.driver.get(&id).await.unwrap().unwrap();
    assert_eq!(info.bytes, 20 << 20);
    cluster.patch(&path, &grow("3Gi")).await;
    event(&cluster, "VolumeResizeFailed", "no room for").await;
    cluster.driver.delete(&id).await.unwrap();
    // It is looked at again at the next change, or start.
    cluster.restart().await;
    cluster
        .wait(&format!("{VOLUMES}/{own}"), |volume| {
            volume["status"]["phase"] == "Failed"
        })
        .await;
    cluster
        .wait(&path, |claim| claim["status"]["phase"] == "Lost")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_of_sets_and_pods_follow_them() {
    let cluster = start().await;
    let set = json!({"metadata": {"name": "db"}, "spec": {"replicas": 2, "serviceName": "db",
        "persistentVolumeClaimRetentionPolicy": {"whenScaled": "Delete", "whenDeleted": "Retain"},
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c",
            "image": "i", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}]}},
        "volumeClaimTemplates": [claim("data", "1Mi", &json!({}))]}});
    let sets = "/apis/apps/v1/namespaces/default/statefulsets";
    cluster.create(sets, &set).await;
    for own in ["data-db-0", "data-db-1"] {
        cluster.wait(&format!("{CLAIMS}/{own}"), is_bound).await;
    }
    let one = json!({"spec": {"replicas": 1}});
    cluster.patch(&format!("{sets}/db"), &one).await;
    cluster
        .wait(&format!("{CLAIMS}/data-db-1"), Value::is_null)
        .await;
    cluster.delete(&format!("{sets}/db")).await;
    cluster
        .wait_count("/api/v1/namespaces/default/pods", 0)
        .await;
    assert!(is_bound(&cluster.get(&format!("{CLAIMS}/data-db-0")).await));
    let pod = json!({"metadata": {"name": "p"}, "spec": {
        "containers": [{"name": "c", "image": "i"}],
        "volumes": [{"name": "e", "ephemeral": {"volumeClaimTemplate":
            {"spec": claim("x", "1Mi", &json!({}))["spec"]}}}]}});
    let pods = "/api/v1/namespaces/default/pods";
    let made = cluster.create(pods, &pod).await;
    let own = cluster.wait(&format!("{CLAIMS}/p-e"), is_bound).await;
    assert_eq!(
        own["metadata"]["ownerReferences"][0]["uid"],
        made["metadata"]["uid"]
    );
    // Protected while the pod has it.
    cluster.delete(&format!("{CLAIMS}/p-e")).await;
    let held = cluster.get(&format!("{CLAIMS}/p-e")).await;
    assert_eq!(name(&held), "p-e");
    cluster.delete(&format!("{pods}/p")).await;
    cluster.wait(&format!("{CLAIMS}/p-e"), Value::is_null).await;
    cluster.wait_count(VOLUMES, 1).await;
}

//! Claims that pods bring themselves: each goes with its pod.

use std::sync::Arc;

use hypernetes_apimachinery::meta;
use hypernetes_telemetry::chain;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Context, claims};
use crate::{
    error::ReconcileError,
    seen::SeenPod,
    workloads::{
        cluster::{Cluster, name, namespace, pods, uid},
        queue::{Queue, queue_pods},
    },
};

/// Pods that are looked at at a time.
const WORKERS: usize = 4;

/// Makes them until `stop`. Of pods that bring none, nothing is kept.
pub(super) async fn run(context: &Arc<Context>, stop: &CancellationToken) {
    let queue = Queue::default();
    let workers = (0..WORKERS).map(|_| work(&context.cluster, &queue, stop));
    let brings_volumes = |pod: &SeenPod| {
        let mut volumes = pod.spec.volumes.iter();
        volumes.any(|volume| volume["ephemeral"].is_object())
    };
    tokio::join!(
        queue_pods(&context.cluster, &queue, stop, brings_volumes),
        futures::future::join_all(workers)
    );
}

async fn work(cluster: &Cluster, queue: &Queue, stop: &CancellationToken) {
    loop {
        let key = tokio::select! {
            () = stop.cancelled() => return,
            key = queue.next() => key,
        };
        let outcome = reconcile(cluster, &key).await;
        if let Err(error) = &outcome {
            tracing::warn!(pod = key, error = %chain(error), "cannot make the claims of a pod; again");
        }
        queue.done(key, outcome.is_err());
    }
}

/// Makes the claims of a new pod.
async fn reconcile(cluster: &Cluster, key: &str) -> Result<(), ReconcileError> {
    let Some((place, own)) = key.split_once('/') else {
        return Ok(());
    };
    let Some(pod) = cluster.get(&pods(), place, own).await? else {
        return Ok(());
    };
    let ended = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    if ended || meta::is_deleting(&pod) {
        return Ok(());
    }
    for volume in pod["spec"]["volumes"].as_array().into_iter().flatten() {
        let template = &volume["ephemeral"]["volumeClaimTemplate"];
        if !template.is_object() {
            continue;
        }
        let own = format!(
            "{}-{}",
            name(&pod),
            volume["name"].as_str().unwrap_or_default()
        );
        if cluster
            .get(&claims(), namespace(&pod), &own)
            .await?
            .is_some()
        {
            continue;
        }
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {
                "name": own, "namespace": namespace(&pod),
                "labels": template["metadata"]["labels"],
                "annotations": template["metadata"]["annotations"],
                "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": name(&pod),
                    "uid": uid(&pod), "controller": true, "blockOwnerDeletion": true}],
            },
            "spec": template["spec"],
        });
        match cluster.create(&claims(), namespace(&pod), &claim).await {
            Ok(_) => {}
            Err(error) if error.is_already_exists() => {}
            Err(error) => {
                let said = format!("ephemeral volume controller: {}", error.said());
                cluster.event(&pod, "Warning", "FailedCreate", &said).await;
                return Err(error);
            }
        }
    }
    Ok(())
}

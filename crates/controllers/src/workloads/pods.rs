//! Pods that nobody else looks after: of nodes that are gone, and of jobs that are gone.

use std::{sync::Arc, time::Duration};

use hypernetes_apimachinery::meta;
use hypernetes_telemetry::chain;
use kube::ResourceExt;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{Cluster, jobs, namespace, nodes, pods, uid},
    job::{TRACKING, is_finished, release},
    owned::phase,
    queue::{Queue, queue_pods},
};
use crate::{error::ReconcileError, seen::Seen};

/// For how long a node may be away before its pods are given up.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Pods that have ended and are kept to be looked at, in the whole cluster.
const KEPT: usize = 12_500;

pub(super) async fn run(cluster: &Arc<Cluster>, stop: &CancellationToken) {
    let queue = Queue::default();
    // Those that wait to be counted by a job.
    let tracked = |pod: &Seen| pod.finalizers().iter().any(|own| own == TRACKING);
    tokio::join!(
        Box::pin(queue_pods(cluster, &queue, stop, tracked)),
        Box::pin(work(cluster, &queue, stop)),
        Box::pin(sweep(cluster, stop))
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
            tracing::debug!(pod = key, error = %chain(error), "a pod is not let go yet; again");
        }
        queue.done(key, outcome.is_err());
    }
}

/// A pod that waits to be counted by a job that is no more, or that has ended, waits for nobody.
async fn reconcile(cluster: &Cluster, key: &str) -> Result<(), ReconcileError> {
    let Some((home, name)) = key.split_once('/') else {
        return Ok(());
    };
    let Some(pod) = cluster.get(&pods(), home, name).await? else {
        return Ok(());
    };
    if !meta::finalizers(&pod).any(|finalizer| finalizer == TRACKING) {
        return Ok(());
    }
    let owner = meta::controller(&pod).filter(|owner| owner["kind"] == "Job");
    let job = match owner {
        Some(owner) => {
            let name = owner["name"].as_str().unwrap_or_default();
            let job = cluster.get(&jobs(), namespace(&pod), name).await?;
            job.filter(|job| owner["uid"] == uid(job))
        }
        None => None,
    };
    if job.is_none_or(|job| is_finished(&job)) {
        release(cluster, &pod).await?;
    }
    Ok(())
}

/// Looks at all pods now and then.
async fn sweep(cluster: &Cluster, stop: &CancellationToken) {
    let mut away: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(QUARANTINE) => {}
        }
        match collect(cluster, &away).await {
            Ok(missing) => away = missing,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "pods are not swept");
            }
        }
    }
}

/// Deletes pods of nodes that were away before and are still; which are away now.
async fn collect(cluster: &Cluster, before: &[String]) -> Result<Vec<String>, ReconcileError> {
    let nodes = cluster.list(&nodes(), "").await?;
    let mut ended = Vec::new();
    let lost = |pod: &Value| {
        if matches!(phase(pod), "Succeeded" | "Failed") && !meta::is_deleting(pod) {
            ended.push((meta::creation_timestamp(pod), identity(pod)));
        }
        match node_of(pod) {
            // A pod that ends before it has a node has nobody who lets it go.
            "" => meta::is_deleting(pod),
            node => !nodes.iter().any(|own| meta::name(own) == Some(node)),
        }
    };
    let lost = cluster.list_kept(&pods(), "", lost).await?;
    let mut away = Vec::new();
    for pod in &lost {
        let node = node_of(pod);
        if node.is_empty() {
            remove(cluster, pod).await?;
            continue;
        }
        if before.iter().any(|own| own == node) {
            remove(cluster, pod).await?;
        }
        if !away.iter().any(|own| own == node) {
            away.push(node.to_owned());
        }
    }
    ended.sort_by_key(|(created, _)| *created);
    let surplus = ended.len().saturating_sub(KEPT);
    for (_, pod) in ended.iter().take(surplus) {
        cluster.delete(&super::cluster::pods(), pod, None).await?;
    }
    Ok(away)
}

fn node_of(pod: &Value) -> &str {
    pod["spec"]["nodeName"].as_str().unwrap_or_default()
}

/// As much of a pod as its deletion needs.
fn identity(pod: &Value) -> Value {
    let metadata = &pod["metadata"];
    json!({"metadata": {"namespace": metadata["namespace"], "name": metadata["name"], "uid": metadata["uid"]}})
}

async fn remove(cluster: &Cluster, pod: &Value) -> Result<(), ReconcileError> {
    if !matches!(phase(pod), "Succeeded" | "Failed") {
        let patch = json!({"status": {"phase": "Failed"}});
        let at = (namespace(pod), meta::name(pod).unwrap_or_default());
        cluster.patch(&pods(), at, "status", &patch).await?;
    }
    cluster.delete_now(&pods(), pod).await
}

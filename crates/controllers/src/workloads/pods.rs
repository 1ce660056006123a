//! Pods that nobody else looks after: of nodes that are gone, and of jobs that are gone.

use std::{sync::Arc, time::Duration};

use hypernetes_apimachinery::meta;
use kube::runtime::controller::Action;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{Cluster, jobs, namespace, nodes, pods, uid},
    control,
    job::{TRACKING, is_finished, release},
    owned::phase,
};
use crate::error::ReconcileError;

/// For how long a node may be away before its pods are given up.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Pods that have ended and are kept to be looked at, in the whole cluster.
const KEPT: usize = 12_500;

pub(super) async fn run(cluster: &Arc<Cluster>, stop: &CancellationToken) {
    let pods = control(
        cluster,
        pods(),
        &[],
        |cluster, pod| Box::pin(async move { reconcile(&cluster, pod).await }),
        stop,
    );
    tokio::join!(Box::pin(pods), Box::pin(sweep(cluster, stop)));
}

/// A pod that waits to be counted by a job that is no more, or that has ended, waits for nobody.
async fn reconcile(cluster: &Cluster, pod: Value) -> Result<Action, ReconcileError> {
    if !meta::finalizers(&pod).any(|finalizer| finalizer == TRACKING) {
        return Ok(Action::await_change());
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
    Ok(Action::await_change())
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
                tracing::debug!(error = %hypernetes_telemetry::chain(&error), "pods are not swept");
            }
        }
    }
}

/// Deletes pods of nodes that were away before and are still; which are away now.
async fn collect(cluster: &Cluster, before: &[String]) -> Result<Vec<String>, ReconcileError> {
    let all = cluster.list(&pods(), "").await?;
    let nodes = cluster.list(&nodes(), "").await?;
    let mut away = Vec::new();
    for pod in &all {
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        let there = nodes.iter().any(|own| meta::name(own) == Some(node));
        if node.is_empty() || there {
            // A pod that ends before it has a node has nobody who lets it go.
            if node.is_empty() && meta::is_deleting(pod) {
                remove(cluster, pod).await?;
            }
            continue;
        }
        if before.iter().any(|own| own == node) {
            remove(cluster, pod).await?;
        }
        if !away.iter().any(|own| own == node) {
            away.push(node.to_owned());
        }
    }
    let mut ended: Vec<&Value> = all
        .iter()
        .filter(|pod| matches!(phase(pod), "Succeeded" | "Failed") && !meta::is_deleting(pod))
        .collect();
    ended.sort_by_key(|pod| meta::creation_timestamp(pod));
    for pod in ended.iter().take(ended.len().saturating_sub(KEPT)) {
        cluster.delete(&super::cluster::pods(), pod, None).await?;
    }
    Ok(away)
}

async fn remove(cluster: &Cluster, pod: &Value) -> Result<(), ReconcileError> {
    if !matches!(phase(pod), "Succeeded" | "Failed") {
        let patch = serde_json::json!({"status": {"phase": "Failed"}});
        let at = (namespace(pod), meta::name(pod).unwrap_or_default());
        cluster.patch(&pods(), at, "status", &patch).await?;
    }
    cluster.delete_now(&pods(), pod).await
}

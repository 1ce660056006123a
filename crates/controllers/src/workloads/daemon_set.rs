//! DaemonSet: one pod on each node.
//!
//! Pods are bound to the node by the API server, which has one; where there are more, each pod
//! names its own.

use std::sync::Arc;

use hypernetes_apimachinery::meta;
use jiff::Timestamp;
use kube::{
    Api,
    api::DynamicObject,
    runtime::{controller::Action, reflector::ObjectRef},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{Cluster, daemon_sets, name, nodes, pods},
    controller,
    owned::{
        amount, available, claim, count, create_pods, delete_pods, is_active, is_ready, number,
        phase, pod_of,
    },
    replica_set::until,
    revisions::{self, REVISION_LABEL},
    serve,
};
use crate::{error::ReconcileError, seen::watching};

pub(super) async fn run(cluster: &Arc<Cluster>, stop: &CancellationToken) {
    let kind = daemon_sets();
    let controller = controller(cluster, &kind, &[pods()]);
    let (store, resource) = (controller.store(), kind.resource());
    let api: Api<DynamicObject> = Api::all_with(cluster.client(), &nodes().resource());
    // A node that comes or goes concerns every set.
    let controller = controller.watches_with(api, nodes().resource(), watching(), move |_node| {
        let sets = store.state();
        let resource = resource.clone();
        sets.into_iter()
            .map(move |set| ObjectRef::from_obj_with(set.as_ref(), resource.clone()))
            .collect::<Vec<_>>()
    });
    serve(
        cluster,
        kind,
        controller,
        |cluster, set| Box::pin(async move { reconcile(&cluster, set).await }),
        stop,
    )
    .await;
}

async fn reconcile(cluster: &Cluster, set: Value) -> Result<Action, ReconcileError> {
    if meta::is_deleting(&set) {
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    let claimed = claim(cluster, &set, &pods()).await?;
    let all = revisions::ensure(cluster, &set).await?;
    let hash = all
        .last()
        .map(revisions::hash_of)
        .unwrap_or_default()
        .to_owned();
    let every = cluster.list(&nodes(), "").await?;
    let fitting: Vec<&str> = every
        .iter()
        .filter(|node| fits(&set, node))
        .map(name)
        .collect();
    let only = match every.as_slice() {
        [only] => Some(name(only)),
        _ => None,
    };
    let mut unwanted = Vec::new();
    let mut missing = Vec::new();
    let mut serving: Vec<&Value> = Vec::new();
    for node in &fitting {
        let mut here: Vec<&Value> = claimed
            .iter()
            .filter(|pod| node_of(pod, only) == *node)
            .collect();
        // What has ended makes room for another.
        unwanted.extend(
            here.iter().copied().filter(|pod| {
                matches!(phase(pod), "Failed" | "Succeeded") && !meta::is_deleting(pod)
            }),
        );
        let ending = here.iter().any(|pod| !is_active(pod));
        here.retain(|pod| is_active(pod));
        here.sort_by_key(|pod| meta::creation_timestamp(pod));
        match here.split_first() {
            None if ending => {}
            None => missing.push(pod(&set, &hash, only.is_none().then_some(*node))),
            Some((first, more)) => {
                serving.push(*first);
                unwanted.extend(more);
            }
        }
    }
    unwanted.extend(claimed.iter().filter(|pod| {
        is_active(pod) && !node_of(pod, only).is_empty() && !fitting.contains(&node_of(pod, only))
    }));
    let (_, failure) = create_pods(cluster, &set, &missing).await;
    if set["spec"]["updateStrategy"]["type"] != "OnDelete" {
        unwanted.extend(outdated(&set, &serving, &hash, fitting.len(), now));
    }
    delete_pods(cluster, &set, &unwanted).await?;
    let in_use: Vec<&str> = claimed
        .iter()
        .filter_map(|pod| meta::label(pod, REVISION_LABEL))
        .collect();
    revisions::clean_up(cluster, &set, &all, &in_use).await?;
    let (status, next) = status(&set, &serving, &hash, fitting.len(), now);
    cluster.update_status(&daemon_sets(), &set, status).await?;
    match (failure, next) {
        (Some(error), _) => Err(error),
        (None, Some(at)) => Ok(Action::requeue(until(at, now))),
        (None, None) => Ok(Action::await_change()),
    }
}

/// The node that a pod is on or is meant for: one that waits for a place waits for the only node.
fn node_of<'a>(pod: &'a Value, only: Option<&'a str>) -> &'a str {
    match pod["spec"]["nodeName"].as_str() {
        Some(node) if !node.is_empty() => node,
        _ => only.unwrap_or_default(),
    }
}

/// Whether the set wants a pod on the node. A node that is not ready or cordoned still has one.
fn fits(set: &Value, node: &Value) -> bool {
    let labels = meta::labels(node);
    let template = &set["spec"]["template"]["spec"];
    let selected = template["nodeSelector"].as_object().into_iter().flatten();
    selected
        .into_iter()
        .all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// Pods of a former template that may go now.
fn outdated<'a>(
    set: &Value,
    serving: &[&'a Value],
    hash: &str,
    nodes: usize,
    now: Timestamp,
) -> Vec<&'a Value> {
    let seconds = number(&set["spec"]["minReadySeconds"]);
    let is_available = |pod: &Value| available(pod, seconds, now).is_ok();
    let old = serving
        .iter()
        .copied()
        .filter(|pod| meta::label(pod, REVISION_LABEL) != Some(hash));
    let (mut out, mut good): (Vec<&Value>, Vec<&Value>) = (Vec::new(), Vec::new());
    for pod in old {
        if is_available(pod) {
            good.push(pod);
        } else {
            // It does not serve: nothing is lost.
            out.push(pod);
        }
    }
    let rolling = &set["spec"]["updateStrategy"]["rollingUpdate"];
    let most = amount(&rolling["maxUnavailable"], count(nodes), true).max(1);
    let missing = count(nodes) - count(serving.iter().filter(|pod| is_available(pod)).count());
    let many = usize::try_from(most - missing).unwrap_or_default();
    out.extend(good.into_iter().take(many));
    out
}

fn pod(set: &Value, hash: &str, node: Option<&str>) -> Value {
    let mut pod = pod_of(&set["spec"]["template"], set);
    meta::set_label(&mut pod, REVISION_LABEL, hash);
    if let Some(node) = node {
        pod["spec"]["nodeName"] = node.into();
    }
    if let Some(spec) = pod["spec"].as_object_mut() {
        // The set has chosen the node by it.
        spec.remove("nodeSelector");
    }
    let tolerations: Vec<Value> = [
        ("node.kubernetes.io/not-ready", "NoExecute"),
        ("node.kubernetes.io/unreachable", "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        ("node.kubernetes.io/unschedulable", "NoSchedule"),
    ]
    .into_iter()
    .map(|(key, effect)| json!({"key": key, "operator": "Exists", "effect": effect}))
    .collect();
    match pod["spec"]["tolerations"].as_array_mut() {
        Some(own) => own.extend(tolerations),
        None => pod["spec"]["tolerations"] = tolerations.into(),
    }
    pod
}

fn status(
    set: &Value,
    serving: &[&Value],
    hash: &str,
    nodes: usize,
    now: Timestamp,
) -> (Value, Option<Timestamp>) {
    let seconds = number(&set["spec"]["minReadySeconds"]);
    let states: Vec<_> = serving
        .iter()
        .map(|pod| available(pod, seconds, now))
        .collect();
    let good = count(states.iter().filter(|state| state.is_ok()).count());
    let next = states
        .iter()
        .filter_map(|state| state.err().flatten())
        .min();
    let ready = count(serving.iter().filter(|pod| is_ready(pod)).count());
    let updated = serving
        .iter()
        .filter(|pod| meta::label(pod, REVISION_LABEL) == Some(hash));
    let mut status = json!({
        "observedGeneration": meta::generation(set),
        "desiredNumberScheduled": count(nodes),
        "currentNumberScheduled": count(serving.len()),
        "numberMisscheduled": 0,
        "numberReady": ready,
    });
    for (field, value) in [
        ("updatedNumberScheduled", count(updated.count())),
        ("numberAvailable", good),
        ("numberUnavailable", count(nodes) - good),
    ] {
        if value != 0 {
            status[field] = value.into();
        }
    }
    (status, next)
}

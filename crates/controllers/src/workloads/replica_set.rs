//! ReplicaSet and ReplicationController: as many pods as they say.

use std::time::Duration;

use hypernetes_apimachinery::meta;
use jiff::Timestamp;
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Kind, pods},
    owned::{
        available, claim, count, create_pods, delete_pods, is_active, is_ready, is_terminating,
        number, pod_of, remove_condition, set_condition, sort_for_deletion,
    },
};
use crate::error::ReconcileError;

/// More are made at the next turn.
const BURST: usize = 500;

pub(super) async fn reconcile(
    cluster: &Cluster,
    kind: &Kind,
    set: Value,
) -> Result<Action, ReconcileError> {
    let claimed = claim(cluster, &set, &pods()).await?;
    let active: Vec<&Value> = claimed.iter().filter(|pod| is_active(pod)).collect();
    let wanted = usize::try_from(number(&set["spec"]["replicas"])).unwrap_or_default();
    let mut failure = None;
    if !meta::is_deleting(&set) {
        if active.len() < wanted {
            let missing = (wanted - active.len()).min(BURST);
            let pod = pod_of(&set["spec"]["template"], &set);
            let (_, error) = create_pods(cluster, &set, &vec![pod; missing]).await;
            failure = error;
        } else if active.len() > wanted {
            let mut order = active.clone();
            sort_for_deletion(&mut order);
            let many = (active.len() - wanted).min(BURST);
            delete_pods(cluster, &set, &order[..many]).await?;
        }
    }
    let now = Timestamp::now();
    let ending = claimed.iter().filter(|pod| is_terminating(pod)).count();
    let (mut status, next) = status(&set, &active, failure.as_ref(), now);
    if kind.group == "apps" {
        // A deployment that recreates waits for this to be zero.
        status["terminatingReplicas"] = count(ending).into();
    }
    cluster.update_status(kind, &set, status).await?;
    match (failure, next) {
        (Some(error), _) => Err(error),
        (None, Some(at)) => Ok(Action::requeue(until(at, now))),
        (None, None) => Ok(Action::await_change()),
    }
}

/// How long it is until then, and at least a moment.
pub(super) fn until(at: Timestamp, now: Timestamp) -> Duration {
    let wait = Duration::try_from(at.duration_since(now)).unwrap_or_default();
    wait.max(Duration::from_millis(50))
}

/// The status, and when another pod will be available.
fn status(
    set: &Value,
    active: &[&Value],
    failure: Option<&ReconcileError>,
    now: Timestamp,
) -> (Value, Option<Timestamp>) {
    let template = set["spec"]["template"]["metadata"]["labels"].as_object();
    let labelled = active.iter().filter(|pod| {
        let labels = meta::labels(pod);
        template
            .into_iter()
            .flatten()
            .all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    });
    let seconds = number(&set["spec"]["minReadySeconds"]);
    let states: Vec<_> = active
        .iter()
        .map(|pod| available(pod, seconds, now))
        .collect();
    let next = states
        .iter()
        .filter_map(|state| state.err().flatten())
        .min();
    let ready = count(active.iter().filter(|pod| is_ready(pod)).count());
    let available = count(states.iter().filter(|state| state.is_ok()).count());
    let mut status = json!({
        "replicas": count(active.len()),
        "observedGeneration": meta::generation(set),
    });
    // Upstream leaves zeros out.
    for (field, value) in [
        ("fullyLabeledReplicas", count(labelled.count())),
        ("readyReplicas", ready),
        ("availableReplicas", available),
    ] {
        if value != 0 {
            status[field] = value.into();
        }
    }
    if set["status"]["conditions"].is_array() {
        status["conditions"] = set["status"]["conditions"].clone();
    }
    match failure {
        Some(error) => set_condition(
            &mut status,
            "ReplicaFailure",
            true,
            "FailedCreate",
            &error.said(),
            now,
        ),
        None => remove_condition(&mut status, "ReplicaFailure"),
    }
    (status, next)
}

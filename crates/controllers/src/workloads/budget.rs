//! PodDisruptionBudget: how many of its pods may be evicted now.

use std::sync::Arc;

use hypernetes_apimachinery::{meta, selector::LabelSelector};
use jiff::{SignedDuration, Timestamp};
use kube::{Api, ResourceExt, runtime::controller::Action};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{
        Cluster, budgets, deployments, namespace, pods, replica_sets, replication_controllers,
        stateful_sets,
    },
    controller, of_namespace,
    owned::{amount, count, is_ready, number, phase, set_condition},
    replica_set::until,
    serve,
};
use crate::{
    error::ReconcileError,
    seen::{Seen, watching},
};

/// For how long an eviction that was allowed is believed to come.
const BELIEF: SignedDuration = SignedDuration::from_secs(120);

pub(super) async fn run(cluster: &Arc<Cluster>, stop: &CancellationToken) {
    let kind = budgets();
    let controller = controller(cluster, &kind, &[]);
    let (store, own) = (controller.store(), kind.clone());
    let api: Api<Seen> = Api::all_with(cluster.client(), &pods().resource());
    let controller = controller.watches_with(api, pods().resource(), watching(), move |pod| {
        of_namespace(&store, &pod.namespace().unwrap_or_default(), &own)
    });
    serve(
        cluster,
        kind,
        controller,
        |cluster, budget| Box::pin(async move { reconcile(&cluster, budget).await }),
        stop,
    )
    .await;
}

async fn reconcile(cluster: &Cluster, budget: Value) -> Result<Action, ReconcileError> {
    let selector = LabelSelector::from_json(&budget["spec"]["selector"]).map_err(|error| {
        ReconcileError::Invalid {
            field: "spec.selector",
            rule: error.to_string(),
        }
    })?;
    let now = Timestamp::now();
    let all: Vec<Value> = cluster
        .list_kept(&pods(), namespace(&budget), |pod| selector.matches(pod))
        .await?;
    let expected = match expected(cluster, &budget, &all).await? {
        Ok(expected) => Some(expected),
        Err(why) => {
            cluster
                .event(&budget, "Warning", "CalculateExpectedPodCountFailed", &why)
                .await;
            None
        }
    };
    let (status, next) = status(&budget, &all, expected, now);
    cluster.update_status(&budgets(), &budget, status).await?;
    Ok(next.map_or_else(Action::await_change, |at| Action::requeue(until(at, now))))
}

/// How many pods there shall be, and how many of them healthy; or why that cannot be told.
async fn expected(
    cluster: &Cluster,
    budget: &Value,
    all: &[Value],
) -> Result<Result<(i64, i64), String>, ReconcileError> {
    let spec = &budget["spec"];
    let (least, most) = (&spec["minAvailable"], &spec["maxUnavailable"]);
    if least.is_i64() || (least.is_null() && most.is_null()) {
        return Ok(Ok((count(all.len()), number(least))));
    }
    let mut total = 0;
    let mut seen: Vec<Value> = Vec::new();
    for pod in all {
        // Where a share is asked for, the whole must be known.
        let Some(owner) = meta::controller(pod) else {
            let name = meta::name(pod).unwrap_or_default();
            return Ok(Err(format!("found no controller ref for pod {name:?}")));
        };
        let Some((id, replicas)) = scale_of(cluster, namespace(pod), owner).await? else {
            let kind = owner["kind"].as_str().unwrap_or_default();
            return Ok(Err(format!(
                "{kind} does not implement the scale subresource"
            )));
        };
        if !seen.contains(&id) {
            seen.push(id);
            total += replicas;
        }
    }
    let healthy = if most.is_null() {
        amount(least, total, true)
    } else {
        (total - amount(most, total, true)).max(0)
    };
    Ok(Ok((total, healthy)))
}

/// Id and size of what controls pods: a deployment rather than its set.
async fn scale_of(
    cluster: &Cluster,
    namespace: &str,
    owner: &Value,
) -> Result<Option<(Value, i64)>, ReconcileError> {
    let owner_name = owner["name"].as_str().unwrap_or_default();
    let kind = match owner["kind"].as_str() {
        Some("ReplicaSet") => replica_sets(),
        Some("StatefulSet") => stateful_sets(),
        Some("ReplicationController") => replication_controllers(),
        _ => return Ok(None),
    };
    let Some(set) = cluster.get(&kind, namespace, owner_name).await? else {
        return Ok(None);
    };
    if let Some(above) = meta::controller(&set)
        && above["kind"] == "Deployment"
    {
        let name = above["name"].as_str().unwrap_or_default();
        if let Some(deployment) = cluster.get(&deployments(), namespace, name).await? {
            return Ok(Some(sized(&deployment)));
        }
    }
    Ok(Some(sized(&set)))
}

fn sized(object: &Value) -> (Value, i64) {
    (
        object["metadata"]["uid"].clone(),
        number(&object["spec"]["replicas"]),
    )
}

fn status(
    budget: &Value,
    all: &[Value],
    expected: Option<(i64, i64)>,
    now: Timestamp,
) -> (Value, Option<Timestamp>) {
    let mut next: Option<Timestamp> = None;
    // Evictions that were allowed and that the pods do not show yet.
    let mut disrupted = Map::new();
    for (name, since) in budget["status"]["disruptedPods"]
        .as_object()
        .into_iter()
        .flatten()
    {
        let pod = all.iter().find(|pod| meta::name(pod) == Some(name));
        let end = since
            .as_str()
            .and_then(|text| text.parse::<Timestamp>().ok())
            .and_then(|since| since.checked_add(BELIEF).ok());
        if let (Some(pod), Some(end)) = (pod, end)
            && !meta::is_deleting(pod)
            && end > now
        {
            disrupted.insert(name.clone(), since.clone());
            next = Some(next.map_or(end, |next| next.min(end)));
        }
    }
    let healthy = all
        .iter()
        .filter(|pod| {
            let name = meta::name(pod).unwrap_or_default();
            phase(pod) != "Failed"
                && !meta::is_deleting(pod)
                && !disrupted.contains_key(name)
                && is_ready(pod)
        })
        .count();
    let (total, desired) = expected.unwrap_or_default();
    let allowed = match expected {
        Some(_) if total > 0 => (count(healthy) - desired).max(0),
        _ => 0,
    };
    let mut status = json!({
        "observedGeneration": meta::generation(budget),
        "currentHealthy": count(healthy),
        "desiredHealthy": desired,
        "expectedPods": total,
        "disruptionsAllowed": allowed,
    });
    if !disrupted.is_empty() {
        status["disruptedPods"] = disrupted.into();
    }
    if budget["status"]["conditions"].is_array() {
        status["conditions"] = budget["status"]["conditions"].clone();
    }
    let reason = match (expected, allowed) {
        (None, _) => "SyncFailed",
        (Some(_), 0) => "InsufficientPods",
        _ => "SufficientPods",
    };
    set_condition(
        &mut status,
        "DisruptionAllowed",
        allowed > 0,
        reason,
        "",
        now,
    );
    if let Some(list) = status["conditions"].as_array_mut() {
        for condition in list.iter_mut().filter(|c| c["type"] == "DisruptionAllowed") {
            condition["observedGeneration"] = meta::generation(budget).into();
        }
    }
    (status, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ready: bool) -> Value {
        json!({"metadata": {"name": name}, "status": {"phase": "Running",
            "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}})
    }

    #[test]
    fn what_is_healthy_beyond_the_least_may_go() {
        let budget = json!({"metadata": {"generation": 1}, "status": {}});
        let pods = [pod("a", true), pod("b", true), pod("c", false)];
        let at = Timestamp::from_second(1000).unwrap();
        let (status, _) = status(&budget, &pods, Some((3, 1)), at);
        assert_eq!(
            (&status["currentHealthy"], &status["disruptionsAllowed"]),
            (&json!(2), &json!(1))
        );
        let gone =
            json!({"metadata": {}, "status": {"disruptedPods": {"a": "1970-01-01T00:16:30Z"}}});
        let (status, next) = super::status(&gone, &pods, Some((3, 1)), at);
        assert_eq!(status["disruptionsAllowed"], 0);
        assert_eq!(next, Some(Timestamp::from_second(1110).unwrap()));
        // It did not come: it is not believed any more.
        let (status, _) = super::status(
            &gone,
            &pods,
            Some((3, 1)),
            Timestamp::from_second(1110).unwrap(),
        );
        assert_eq!(status["disruptionsAllowed"], 1);
        assert!(status.get("disruptedPods").is_none());
    }
}

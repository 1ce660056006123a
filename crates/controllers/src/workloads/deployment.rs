//! Deployment: a ReplicaSet for each version of its template, and the way from one to the next.

use hypernetes_apimachinery::meta;
use jiff::{SignedDuration, Timestamp};
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Propagation, deployments, name, namespace, pods, replica_sets},
    owned::{
        amount, claim, condition, controller_reference, controls, hash, number, phase,
        remove_condition, set_condition,
    },
    replica_set::until,
};
use crate::error::ReconcileError;

mod rollout;
mod status;

pub(super) const HASH_LABEL: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";
const HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
/// What a deployment does not hand on to its sets.
const OWN_ANNOTATIONS: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    HISTORY,
    DESIRED,
    MAXIMUM,
    "deprecated.deployment.rollback.to",
];

/// A deployment's sets: that of the present template, if it is there, and the others, oldest first.
struct Sets {
    new: Option<Value>,
    old: Vec<Value>,
}

impl Sets {
    fn of(deployment: &Value, mut all: Vec<Value>) -> Self {
        all.sort_by_key(|set| (meta::creation_timestamp(set), name(set).to_owned()));
        let template = plain(&deployment["spec"]["template"]);
        let at = all
            .iter()
            .position(|set| plain(&set["spec"]["template"]) == template);
        let new = at.map(|at| all.remove(at));
        Self { new, old: all }
    }

    fn all(&self) -> impl Iterator<Item = &Value> {
        self.new.iter().chain(&self.old)
    }
}

/// A template without the label that names its set.
fn plain(template: &Value) -> Value {
    let mut template = template.clone();
    if let Some(labels) = template["metadata"]["labels"].as_object_mut() {
        labels.remove(HASH_LABEL);
    }
    template
}

fn replicas(set: &Value) -> i64 {
    number(&set["spec"]["replicas"])
}

fn revision(object: &Value) -> i64 {
    meta::annotation(object, REVISION)
        .and_then(|text| text.parse().ok())
        .unwrap_or_default()
}

/// How many pods there may be too many, and too few.
fn room(deployment: &Value) -> (i64, i64) {
    let spec = &deployment["spec"];
    if spec["strategy"]["type"] != "RollingUpdate" {
        return (0, 0);
    }
    let (rolling, total) = (
        &spec["strategy"]["rollingUpdate"],
        number(&spec["replicas"]),
    );
    let surge = amount(&rolling["maxSurge"], total, true);
    let unavailable = amount(&rolling["maxUnavailable"], total, false).min(total);
    match (surge, unavailable) {
        // Percentages of a small number can both be nothing: it must go on all the same.
        (0, 0) => (0, 1),
        room => room,
    }
}

pub(super) async fn reconcile(
    cluster: &Cluster,
    deployment: Value,
) -> Result<Action, ReconcileError> {
    let all = claim(cluster, &deployment, &replica_sets()).await?;
    let mut sets = Sets::of(&deployment, all);
    let now = Timestamp::now();
    if meta::is_deleting(&deployment) {
        return Ok(Action::await_change());
    }
    let paused = deployment["spec"]["paused"] == true;
    let mut deployment = deployment;
    if paused {
        rollout::scale(cluster, &deployment, &mut sets).await?;
    } else if deployment["spec"]["strategy"]["type"] == "Recreate" {
        let mut waiting = false;
        for set in sets.old.iter_mut().filter(|set| replicas(set) > 0) {
            *set = resize(cluster, &deployment, set, 0).await?;
            waiting = true;
        }
        if !waiting && !old_pods_run(cluster, &sets).await? {
            let to = replicas(&deployment);
            deployment = ensure_new(cluster, deployment, &mut sets, to).await?;
        } else if sets.new.is_some() {
            deployment = annotate(cluster, deployment, &mut sets).await?;
        }
    } else {
        let start = rollout::replicas_of_new(&deployment, &sets);
        deployment = ensure_new(cluster, deployment, &mut sets, start).await?;
        rollout::roll(cluster, &deployment, &mut sets).await?;
    }
    if !paused {
        clean_up(cluster, &deployment, &sets).await?;
    }
    let (status, next) = status::status(&deployment, &sets, now);
    cluster
        .update_status(&deployments(), &deployment, status)
        .await?;
    Ok(next.map_or_else(Action::await_change, |at| Action::requeue(until(at, now))))
}

/// Whether pods of former templates have not ended yet.
async fn old_pods_run(cluster: &Cluster, sets: &Sets) -> Result<bool, ReconcileError> {
    let Some(first) = sets.old.first() else {
        return Ok(false);
    };
    let mut any = false;
    let look = |pod: &Value| {
        any |= !matches!(phase(pod), "Succeeded" | "Failed")
            && sets.old.iter().any(|set| controls(set, pod));
        false
    };
    cluster.list_kept(&pods(), namespace(first), look).await?;
    Ok(any)
}

/// Makes the set of the present template if it is not there, and writes down its revision.
async fn ensure_new(
    cluster: &Cluster,
    deployment: Value,
    sets: &mut Sets,
    start: i64,
) -> Result<Value, ReconcileError> {
    if let Some(set) = &sets.new {
        // In a roll-out the size is found out step by step.
        if deployment["spec"]["strategy"]["type"] == "Recreate" && replicas(set) != start {
            sets.new = Some(resize(cluster, &deployment, set, start).await?);
        }
        return annotate(cluster, deployment, sets).await;
    }
    let salt = number(&deployment["status"]["collisionCount"]);
    let template = &deployment["spec"]["template"];
    let hash = hash(&plain(template), salt);
    let mut template = template.clone();
    meta::set_label(&mut template, HASH_LABEL, &hash);
    let mut selector = deployment["spec"]["selector"].clone();
    selector["matchLabels"][HASH_LABEL] = hash.as_str().into();
    let mut set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {
            "name": format!("{}-{hash}", name(&deployment)),
            "namespace": namespace(&deployment),
            "labels": template["metadata"]["labels"],
            "ownerReferences": [controller_reference(&deployment)],
        },
        "spec": {
            "replicas": start,
            "minReadySeconds": number(&deployment["spec"]["minReadySeconds"]),
            "selector": selector,
            "template": template,
        },
    });
    set_annotations(&deployment, &mut set, next_revision(sets));
    match cluster
        .create(&replica_sets(), namespace(&deployment), &set)
        .await
    {
        Ok(made) => {
            let message = format!("Scaled up replica set {} from 0 to {start}", name(&made));
            if start > 0 {
                cluster
                    .event(&deployment, "Normal", "ScalingReplicaSet", &message)
                    .await;
            }
            sets.new = Some(made);
            annotate(cluster, deployment, sets).await
        }
        Err(error) if error.is_already_exists() => {
            // Another template with this name: the next name is another.
            let mut status = deployment["status"].clone();
            status["collisionCount"] = (salt + 1).into();
            cluster
                .update_status(&deployments(), &deployment, status)
                .await?;
            Err(error)
        }
        Err(error) => {
            let message = format!(
                "Failed to create new replica set {:?}: {}",
                name(&set),
                error.said()
            );
            cluster
                .event(&deployment, "Warning", "ReplicaSetCreateError", &message)
                .await;
            Err(error)
        }
    }
}

fn next_revision(sets: &Sets) -> i64 {
    sets.old.iter().map(revision).max().unwrap_or_default() + 1
}

/// Annotations that a set has from its deployment; whether that was a change.
fn set_annotations(deployment: &Value, set: &mut Value, wanted: i64) -> bool {
    let before = set["metadata"]["annotations"].clone();
    for (key, value) in meta::annotations(deployment).into_iter().flatten() {
        if !OWN_ANNOTATIONS.contains(&key.as_str()) {
            meta::set_annotation(set, key, value.as_str().unwrap_or_default());
        }
    }
    let old = revision(set);
    if old < wanted {
        if old > 0 {
            let history = match meta::annotation(set, HISTORY) {
                Some(history) if !history.is_empty() => format!("{history},{old}"),
                _ => old.to_string(),
            };
            meta::set_annotation(set, HISTORY, &history);
        }
        meta::set_annotation(set, REVISION, &wanted.to_string());
    }
    set_sizes(deployment, set);
    set["metadata"]["annotations"] != before
}

fn set_sizes(deployment: &Value, set: &mut Value) {
    let total = replicas(deployment);
    meta::set_annotation(set, DESIRED, &total.to_string());
    meta::set_annotation(set, MAXIMUM, &(total + room(deployment).0).to_string());
}

/// Brings the revision of the newest set to set and deployment.
async fn annotate(
    cluster: &Cluster,
    mut deployment: Value,
    sets: &mut Sets,
) -> Result<Value, ReconcileError> {
    let wanted = next_revision(sets);
    let Some(new) = &mut sets.new else {
        return Ok(deployment);
    };
    let mut changed = set_annotations(&deployment, new, wanted);
    let seconds = number(&deployment["spec"]["minReadySeconds"]);
    if number(&new["spec"]["minReadySeconds"]) != seconds {
        new["spec"]["minReadySeconds"] = seconds.into();
        changed = true;
    }
    if changed {
        *new = cluster.update(&replica_sets(), new).await?;
    }
    let shown = revision(new);
    if revision(&deployment) != shown {
        meta::set_annotation(&mut deployment, REVISION, &shown.to_string());
        deployment = cluster.update(&deployments(), &deployment).await?;
    }
    Ok(deployment)
}

/// Changes the number of a set's replicas.
async fn resize(
    cluster: &Cluster,
    deployment: &Value,
    set: &Value,
    to: i64,
) -> Result<Value, ReconcileError> {
    let from = replicas(set);
    let mut changed = set.clone();
    changed["spec"]["replicas"] = to.into();
    set_sizes(deployment, &mut changed);
    if changed == *set {
        return Ok(changed);
    }
    let changed = cluster.update(&replica_sets(), &changed).await?;
    if from != to {
        let word = if to > from { "up" } else { "down" };
        let message = format!(
            "Scaled {word} replica set {} from {from} to {to}",
            name(set)
        );
        cluster
            .event(deployment, "Normal", "ScalingReplicaSet", &message)
            .await;
    }
    Ok(changed)
}

/// Deletes sets beyond what is kept to go back to.
async fn clean_up(
    cluster: &Cluster,
    deployment: &Value,
    sets: &Sets,
) -> Result<(), ReconcileError> {
    let Some(limit) = deployment["spec"]["revisionHistoryLimit"].as_i64() else {
        return Ok(());
    };
    let mut idle: Vec<&Value> = sets
        .old
        .iter()
        .filter(|set| {
            replicas(set) == 0
                && number(&set["status"]["replicas"]) == 0
                && meta::generation(set) <= number(&set["status"]["observedGeneration"])
                && !meta::is_deleting(set)
        })
        .collect();
    idle.sort_by_key(|set| revision(set));
    let old = i64::try_from(sets.old.len()).unwrap_or(i64::MAX);
    let many = usize::try_from(old - limit).unwrap_or_default();
    for set in idle.into_iter().take(many) {
        cluster
            .delete(&replica_sets(), set, Some(Propagation::Background))
            .await?;
    }
    Ok(())
}

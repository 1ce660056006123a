//! Job: pods until enough of them have succeeded.
//!
//! A finished pod is kept by a finalizer until it has been counted: its id is written to the status
//! first, then the finalizer goes, then the id becomes one more in the count. So no pod is counted
//! twice or not at all, whatever happens in between.

mod count;
mod failure;
mod indexes;
mod success;

use hypernetes_apimachinery::meta;
use jiff::{SignedDuration, Timestamp};
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Propagation, jobs, name, namespace, pods},
    owned::{
        claim, count as number_of, create_pods, delete_pods, is_active, is_ready, is_true, number,
        phase, pod_of, set_condition, sort_for_deletion,
    },
    replica_set::until,
};
use crate::error::ReconcileError;
use count::Count;
use indexes::Indexes;

pub(super) const TRACKING: &str = "batch.kubernetes.io/job-tracking";
const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Wait after the first failure; it doubles with each.
const FIRST_WAIT: i64 = 10;
const LONGEST_WAIT: i64 = 600;

pub(super) fn is_finished(job: &Value) -> bool {
    is_true(&job["status"], "Complete") || is_true(&job["status"], "Failed")
}

fn is_indexed(job: &Value) -> bool {
    job["spec"]["completionMode"] == "Indexed"
}

pub(super) async fn reconcile(cluster: &Cluster, job: Value) -> Result<Action, ReconcileError> {
    let now = Timestamp::now();
    if job["spec"]["managedBy"]
        .as_str()
        .is_some_and(|by| !by.is_empty() && by != "kubernetes.io/job-controller")
    {
        return Ok(Action::await_change());
    }
    let all = claim(cluster, &job, &pods()).await?;
    if is_finished(&job) || meta::is_deleting(&job) {
        for pod in &all {
            release(cluster, pod).await?;
        }
        return expire(cluster, &job, now).await;
    }
    let mut count = Count::of(&job, &all);
    let mut status = job["status"].clone();
    if !status.is_object() {
        status = json!({});
    }
    let active: Vec<&Value> = all.iter().filter(|pod| is_active(pod)).collect();
    let ending = all
        .iter()
        .filter(|pod| meta::is_deleting(pod) && !matches!(phase(pod), "Succeeded" | "Failed"))
        .count();

    let mut next = None;
    let mut failure = None;
    let mut running = 0;
    if let Some((reason, message)) = failure::of(&job, &all, &count, now) {
        set_condition(&mut status, "FailureTarget", true, reason, &message, now);
    } else if let Some(message) = success::met(&job, count.completed())
        && !is_true(&status, "FailureTarget")
    {
        set_condition(
            &mut status,
            "SuccessCriteriaMet",
            true,
            "SuccessPolicy",
            &message,
            now,
        );
    } else if count.is_enough(&job, active.len()) {
        let message = "Reached expected number of succeeded pods";
        set_condition(
            &mut status,
            "SuccessCriteriaMet",
            true,
            "CompletionsReached",
            message,
            now,
        );
    }
    let over = is_true(&status, "FailureTarget") || is_true(&status, "SuccessCriteriaMet");
    if over {
        delete_pods(cluster, &job, &active).await?;
        if active.is_empty() && ending == 0 && count.is_settled() {
            finish(cluster, &job, &mut status, now).await;
        }
    } else if job["spec"]["suspend"] == true {
        delete_pods(cluster, &job, &active).await?;
        if !is_true(&status, "Suspended") {
            set_condition(
                &mut status,
                "Suspended",
                true,
                "JobSuspended",
                "Job suspended",
                now,
            );
            cluster
                .event(&job, "Normal", "Suspended", "Job suspended")
                .await;
        }
        if let Some(status) = status.as_object_mut() {
            status.remove("startTime");
        }
    } else {
        if is_true(&status, "Suspended") {
            set_condition(
                &mut status,
                "Suspended",
                false,
                "JobResumed",
                "Job resumed",
                now,
            );
            cluster
                .event(&job, "Normal", "Resumed", "Job resumed")
                .await;
        }
        if status["startTime"].is_null() {
            status["startTime"] = meta::format_time(now).into();
        }
        next = failure::deadline(&job, &status);
        let change = manage(cluster, &job, &all, &active, ending, &count, now).await;
        running = change.running;
        next = [next, change.next].into_iter().flatten().min();
        failure = change.error;
    }
    let ready = active.iter().filter(|pod| is_ready(pod)).count();
    count.write(&job, &mut status);
    for (field, value) in [
        ("active", running),
        ("ready", ready),
        ("terminating", ending),
    ] {
        status[field] = number_of(value).into();
    }
    if running == 0
        && let Some(status) = status.as_object_mut()
    {
        status.remove("active");
    }
    cluster.update_status(&jobs(), &job, status).await?;
    // The status holds what they were: now they may go.
    for pod in count.counted(&all) {
        release(cluster, pod).await?;
    }
    match (failure, next) {
        (Some(error), _) => Err(error),
        (None, Some(at)) => Ok(Action::requeue(until(at, now))),
        (None, None) => Ok(Action::await_change()),
    }
}

/// Takes off the finalizer that keeps a pod until it is counted.
pub(super) async fn release(cluster: &Cluster, pod: &Value) -> Result<(), ReconcileError> {
    if !meta::finalizers(pod).any(|finalizer| finalizer == TRACKING) {
        return Ok(());
    }
    let left: Vec<&str> = meta::finalizers(pod)
        .filter(|finalizer| *finalizer != TRACKING)
        .collect();
    let patch = json!({"metadata": {"uid": meta::uid(pod),
        "resourceVersion": meta::resource_version(pod), "finalizers": left}});
    cluster
        .patch(&pods(), (namespace(pod), name(pod)), "", &patch)
        .await
        .map(|_| ())
}

async fn finish(cluster: &Cluster, job: &Value, status: &mut Value, now: Timestamp) {
    if is_true(status, "FailureTarget") {
        let target = super::owned::condition(status, "FailureTarget");
        let text = |field: &str| {
            let value = target.and_then(|target| target[field].as_str());
            value.unwrap_or_default().to_owned()
        };
        let (reason, message) = (text("reason"), text("message"));
        set_condition(status, "Failed", true, &reason, &message, now);
        cluster.event(job, "Warning", &reason, &message).await;
    } else {
        // For the reason for which the rest of its pods were stopped.
        let met = super::owned::condition(status, "SuccessCriteriaMet");
        let text = |field: &str, otherwise: &str| {
            let value = met.and_then(|met| met[field].as_str());
            value.unwrap_or(otherwise).to_owned()
        };
        let reason = text("reason", "CompletionsReached");
        let message = text("message", "Reached expected number of succeeded pods");
        set_condition(status, "Complete", true, &reason, &message, now);
        status["completionTime"] = meta::format_time(now).into();
        cluster
            .event(job, "Normal", "Completed", "Job completed")
            .await;
    }
}

/// Deletes a finished job when its time is over.
async fn expire(cluster: &Cluster, job: &Value, now: Timestamp) -> Result<Action, ReconcileError> {
    let Some(seconds) = job["spec"]["ttlSecondsAfterFinished"].as_i64() else {
        return Ok(Action::await_change());
    };
    let finished = job["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| {
            (condition["type"] == "Complete" || condition["type"] == "Failed")
                && condition["status"] == "True"
        })
        .and_then(|condition| condition["lastTransitionTime"].as_str()?.parse().ok());
    let Some(finished): Option<Timestamp> = finished else {
        return Ok(Action::await_change());
    };
    if meta::is_deleting(job) {
        return Ok(Action::await_change());
    }
    match finished.checked_add(SignedDuration::from_secs(seconds)) {
        Ok(end) if end > now => Ok(Action::requeue(until(end, now))),
        Ok(_) => {
            cluster
                .delete(&jobs(), job, Some(Propagation::Foreground))
                .await?;
            Ok(Action::await_change())
        }
        Err(_never) => Ok(Action::await_change()),
    }
}

/// What became of a job's pods.
struct Change {
    running: usize,
    next: Option<Timestamp>,
    error: Option<ReconcileError>,
}

/// Makes and deletes pods so that as many run as shall.
async fn manage(
    cluster: &Cluster,
    job: &Value,
    all: &[Value],
    active: &[&Value],
    ending: usize,
    count: &Count,
    now: Timestamp,
) -> Change {
    let spec = &job["spec"];
    let parallelism = usize::try_from(number(&spec["parallelism"])).unwrap_or_default();
    let succeeded = count.succeeded();
    let wanted = match spec["completions"].as_u64() {
        None if succeeded > 0 => active.len().min(parallelism),
        None => parallelism,
        Some(completions) => {
            let completions = usize::try_from(completions).unwrap_or(usize::MAX);
            let left = completions.saturating_sub(succeeded + count.failed_indexes().len());
            parallelism.min(left)
        }
    };
    let mut change = Change {
        running: active.len(),
        next: None,
        error: None,
    };
    if active.len() > wanted {
        let mut order = active.to_vec();
        sort_for_deletion(&mut order);
        let surplus = &order[..active.len() - wanted];
        change.running = wanted;
        change.error = delete_pods(cluster, job, surplus).await.err();
        return change;
    }
    let mut occupied = active.len();
    if spec["podReplacementPolicy"] == "Failed" {
        occupied += ending;
    }
    let missing = wanted.saturating_sub(occupied);
    if missing == 0 {
        return change;
    }
    if let Some(at) = retry_at(all, now) {
        change.next = Some(at);
        return change;
    }
    let wanted: Vec<Value> = if is_indexed(job) {
        let free = count.free_indexes(job, active, missing);
        free.into_iter()
            .map(|index| indexed_pod(job, index))
            .collect()
    } else {
        vec![tracked_pod(job); missing]
    };
    let (made, error) = create_pods(cluster, job, &wanted).await;
    change.running += made;
    change.error = error;
    change
}

/// When the next pod may be tried, if pods have failed since the last one that succeeded.
fn retry_at(all: &[Value], now: Timestamp) -> Option<Timestamp> {
    let success = all
        .iter()
        .filter(|pod| phase(pod) == "Succeeded")
        .filter_map(failure::finished_at)
        .max();
    let mut failures: Vec<Timestamp> = all
        .iter()
        .filter(|pod| phase(pod) == "Failed")
        .filter_map(failure::finished_at)
        .filter(|at| success.is_none_or(|success| *at > success))
        .collect();
    failures.sort();
    let last = failures.last()?;
    let doublings = u32::try_from(failures.len() - 1)
        .unwrap_or(u32::MAX)
        .min(10);
    let wait = (FIRST_WAIT * 2_i64.pow(doublings)).min(LONGEST_WAIT);
    let at = last.checked_add(SignedDuration::from_secs(wait)).ok()?;
    (at > now).then_some(at)
}

fn tracked_pod(job: &Value) -> Value {
    let mut pod = pod_of(&job["spec"]["template"], job);
    meta::add_finalizer(&mut pod, TRACKING);
    pod
}

/// A pod that knows which of many it is.
fn indexed_pod(job: &Value, index: u64) -> Value {
    let mut pod = tracked_pod(job);
    let text = index.to_string();
    meta::set_annotation(&mut pod, INDEX, &text);
    meta::set_label(&mut pod, INDEX, &text);
    meta::set(&mut pod, "generateName", format!("{}-{index}-", name(job)));
    pod["spec"]["hostname"] = format!("{}-{index}", name(job)).into();
    for list in ["containers", "initContainers"] {
        for container in pod["spec"][list].as_array_mut().into_iter().flatten() {
            let variable = json!({"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": {
                "apiVersion": "v1",
                "fieldPath": format!("metadata.annotations['{INDEX}']"),
            }}});
            match container["env"].as_array_mut() {
                Some(env) => {
                    if !env.iter().any(|own| own["name"] == variable["name"]) {
                        env.push(variable);
                    }
                }
                None => container["env"] = json!([variable]),
            }
        }
    }
    pod
}

fn index_of(pod: &Value) -> Option<u64> {
    meta::annotation(pod, INDEX)?.parse().ok()
}

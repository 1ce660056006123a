//! CronJob: a job at each of its times.

use hypernetes_apimachinery::{meta, schedule::Schedule};
use jiff::{SignedDuration, Timestamp};
use kube::runtime::controller::Action;
use serde_json::{Map, Value, json};

use super::{
    cluster::{Cluster, Propagation, cron_jobs, jobs, name, namespace, uid},
    job::is_finished,
    owned::{controller_reference, controls, is_true, number},
    replica_set::until,
};
use crate::error::ReconcileError;

/// More times that were missed than this are a mistake of clock or schedule.
const TOO_MANY: usize = 100;
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";

pub(super) async fn reconcile(cluster: &Cluster, cron: Value) -> Result<Action, ReconcileError> {
    if meta::is_deleting(&cron) {
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    let all = cluster
        .list_kept(&jobs(), namespace(&cron), |job| controls(&cron, job))
        .await?;
    let own: Vec<&Value> = all.iter().collect();
    clean_up(cluster, &cron, &own).await?;
    let mut status = cron["status"].clone();
    if !status.is_object() {
        status = json!({});
    }
    let mut active: Vec<&Value> = own
        .iter()
        .copied()
        .filter(|job| !is_finished(job) && !meta::is_deleting(job))
        .collect();
    let succeeded = own
        .iter()
        .filter_map(|job| job["status"]["completionTime"].as_str())
        .max();
    if let Some(last) = succeeded
        && status["lastSuccessfulTime"]
            .as_str()
            .is_none_or(|known| known < last)
    {
        status["lastSuccessfulTime"] = last.into();
    }
    let spec = &cron["spec"];
    let text = |field: &str| spec[field].as_str();
    let schedule = match Schedule::parse(text("schedule").unwrap_or_default(), text("timeZone")) {
        Ok(schedule) => schedule,
        Err(error) => {
            let message = format!("Cannot determine if job needs to be started: {error}");
            cluster
                .event(&cron, "Warning", "UnparseableSchedule", &message)
                .await;
            write(cluster, &cron, status, &active).await?;
            return Ok(Action::await_change());
        }
    };
    let (due, missed) = due(&cron, &status, &schedule, now);
    if missed > TOO_MANY {
        let message = format!(
            "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check \
             clock skew: {missed}"
        );
        cluster
            .event(&cron, "Warning", "TooManyMissedTimes", &message)
            .await;
    }
    let next = schedule.next_after(now);
    let wait = next.map_or_else(Action::await_change, |at| Action::requeue(until(at, now)));
    let Some(due) = due.filter(|_| spec["suspend"] != true) else {
        write(cluster, &cron, status, &active).await?;
        return Ok(wait);
    };
    if spec["concurrencyPolicy"] == "Forbid" && !active.is_empty() {
        let message =
            "Not starting job because prior execution is running and concurrency policy is Forbid";
        cluster
            .event(&cron, "Normal", "JobAlreadyActive", message)
            .await;
        write(cluster, &cron, status, &active).await?;
        // The end of that job comes back here.
        return Ok(wait);
    }
    if spec["concurrencyPolicy"] == "Replace" {
        for job in active.drain(..) {
            cluster
                .delete(&jobs(), job, Some(Propagation::Background))
                .await?;
            let message = format!("Deleted job {}", name(job));
            cluster
                .event(&cron, "Normal", "SuccessfulDelete", &message)
                .await;
        }
    }
    let made = start(cluster, &cron, due).await?;
    status["lastScheduleTime"] = meta::format_time(due).into();
    let mut running = active.clone();
    if let Some(made) = &made
        && controls(&cron, made)
        && !running.iter().any(|job| uid(job) == uid(made))
    {
        running.push(made);
    }
    write(cluster, &cron, status, &running).await?;
    Ok(wait)
}

/// The latest time that has come since the last one was served, and how many have come.
fn due(
    cron: &Value,
    status: &Value,
    schedule: &Schedule,
    now: Timestamp,
) -> (Option<Timestamp>, usize) {
    let last = status["lastScheduleTime"]
        .as_str()
        .and_then(|text| text.parse().ok());
    let mut since = last
        .or_else(|| meta::creation_timestamp(cron))
        .unwrap_or(now);
    if let Some(seconds) = cron["spec"]["startingDeadlineSeconds"].as_i64()
        && let Ok(earliest) = now.checked_sub(SignedDuration::from_secs(seconds))
    {
        since = since.max(earliest);
    }
    let (mut due, mut missed) = (None, 0);
    let mut at = since;
    while let Some(next) = schedule.next_after(at) {
        if next > now {
            break;
        }
        missed += 1;
        due = Some(next);
        at = next;
        if missed > TOO_MANY {
            // Not one by one any more: from a little before now.
            let step = schedule
                .next_after(next)
                .map_or(SignedDuration::from_secs(60), |after| {
                    after.duration_since(next)
                });
            if let Ok(near) = now.checked_sub(step * 2)
                && near > at
            {
                at = near;
            }
        }
        if missed > TOO_MANY * 10 {
            break;
        }
    }
    (due, missed)
}

/// Makes the job of a time. Its name says which: it is made once.
async fn start(
    cluster: &Cluster,
    cron: &Value,
    at: Timestamp,
) -> Result<Option<Value>, ReconcileError> {
    let template = &cron["spec"]["jobTemplate"];
    let job_name = format!("{}-{}", name(cron), at.as_second() / 60);
    let mut metadata = Map::new();
    for field in ["labels", "annotations"] {
        if let Some(value) = template["metadata"].get(field) {
            metadata.insert(field.into(), value.clone());
        }
    }
    metadata.insert("name".into(), job_name.as_str().into());
    metadata.insert("namespace".into(), namespace(cron).into());
    metadata.insert(
        "ownerReferences".into(),
        json!([controller_reference(cron)]),
    );
    let mut job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata,
        "spec": template["spec"]});
    meta::set_annotation(&mut job, SCHEDULED_AT, &meta::format_time(at));
    match cluster.create(&jobs(), namespace(cron), &job).await {
        Ok(made) => {
            let message = format!("Created job {job_name}");
            cluster
                .event(cron, "Normal", "SuccessfulCreate", &message)
                .await;
            Ok(Some(made))
        }
        // Made before a restart.
        Err(error) if error.is_already_exists() => {
            cluster.get(&jobs(), namespace(cron), &job_name).await
        }
        Err(error) => {
            let message = format!("Error creating job: {}", error.said());
            cluster
                .event(cron, "Warning", "FailedCreate", &message)
                .await;
            Err(error)
        }
    }
}

/// Deletes finished jobs beyond what is kept to be looked at.
async fn clean_up(cluster: &Cluster, cron: &Value, own: &[&Value]) -> Result<(), ReconcileError> {
    for (condition, field) in [
        ("Complete", "successfulJobsHistoryLimit"),
        ("Failed", "failedJobsHistoryLimit"),
    ] {
        let Some(limit) = cron["spec"][field].as_i64() else {
            continue;
        };
        let mut finished: Vec<&&Value> = own
            .iter()
            .filter(|job| is_true(&job["status"], condition) && !meta::is_deleting(job))
            .collect();
        finished.sort_by_key(|job| {
            let start = job["status"]["startTime"].as_str().unwrap_or_default();
            (start.to_owned(), name(job).to_owned())
        });
        let keep = usize::try_from(limit).unwrap_or_default();
        let many = finished.len().saturating_sub(keep);
        for job in finished.into_iter().take(many) {
            cluster
                .delete(&jobs(), job, Some(Propagation::Background))
                .await?;
        }
    }
    Ok(())
}

async fn write(
    cluster: &Cluster,
    cron: &Value,
    mut status: Value,
    active: &[&Value],
) -> Result<(), ReconcileError> {
    let references: Vec<Value> = active
        .iter()
        .map(|job| {
            json!({"apiVersion": "batch/v1", "kind": "Job", "namespace": namespace(job),
                "name": name(job), "uid": uid(job), "resourceVersion": meta::resource_version(job)})
        })
        .collect();
    let before = cron["status"]["active"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let ids =
        |list: &[Value]| -> Vec<Value> { list.iter().map(|job| job["uid"].clone()).collect() };
    if references.is_empty() {
        if let Some(status) = status.as_object_mut() {
            status.remove("active");
        }
    } else if ids(&before) != ids(&references) {
        // The versions of jobs that go on are no reason to write.
        status["active"] = references.into();
    }
    if cron["status"].is_null() && number(&status["active"]) == 0 && status == json!({}) {
        return Ok(());
    }
    cluster.update_status(&cron_jobs(), cron, status).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_time_is_due() {
        let cron = |deadline: Value| {
            json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:30Z"},
            "spec": {"startingDeadlineSeconds": deadline}})
        };
        let schedule = Schedule::parse("* * * * *", None).unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let none = cron(Value::Null);
        assert_eq!(
            due(&none, &json!({}), &schedule, at("2026-01-01T00:00:59Z")),
            (None, 0)
        );
        assert_eq!(
            due(&none, &json!({}), &schedule, at("2026-01-01T00:02:10Z")),
            (Some(at("2026-01-01T00:02:00Z")), 2)
        );
        let served = json!({"lastScheduleTime": "2026-01-01T00:02:00Z"});
        assert_eq!(
            due(&none, &served, &schedule, at("2026-01-01T00:02:10Z")),
            (None, 0)
        );
        // Too late for it: ten seconds were given.
        assert_eq!(
            due(
                &cron(json!(10)),
                &json!({}),
                &schedule,
                at("2026-01-01T00:02:30Z")
            ),
            (None, 0)
        );
        // A year away: the latest is found all the same.
        let (latest, missed) = due(&none, &json!({}), &schedule, at("2027-01-01T00:00:10Z"));
        assert_eq!(latest, Some(at("2027-01-01T00:00:00Z")));
        assert!(missed > TOO_MANY);
    }
}

//! The status of a deployment, and the conditions that `kubectl rollout status` reads.

use super::*;

const AVAILABLE: &str = "Available";
const PROGRESSING: &str = "Progressing";

/// The status, and when the deadline for progress is.
pub(super) fn status(
    deployment: &Value,
    sets: &Sets,
    now: Timestamp,
) -> (Value, Option<Timestamp>) {
    let before = &deployment["status"];
    let sum = |field: &str| -> i64 { sets.all().map(|set| number(&set["status"][field])).sum() };
    let total = sum("replicas");
    let available = sum("availableReplicas");
    let updated = sets
        .new
        .as_ref()
        .map_or(0, |set| number(&set["status"]["replicas"]));
    let unavailable = (sets.all().map(replicas).sum::<i64>() - available).max(0);
    let mut status = json!({"observedGeneration": meta::generation(deployment)});
    for (field, value) in [
        ("replicas", total),
        ("updatedReplicas", updated),
        ("readyReplicas", sum("readyReplicas")),
        ("availableReplicas", available),
        ("unavailableReplicas", unavailable),
    ] {
        if value != 0 {
            status[field] = value.into();
        }
    }
    // Known as soon as every set has said it.
    if sets
        .all()
        .all(|set| set["status"]["terminatingReplicas"].is_number())
    {
        status["terminatingReplicas"] = sum("terminatingReplicas").into();
    }
    for field in ["collisionCount", "conditions"] {
        if !before[field].is_null() {
            status[field] = before[field].clone();
        }
    }
    let enough = available >= replicas(deployment) - room(deployment).1;
    let (reason, message) = if enough {
        (
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.",
        )
    } else {
        (
            "MinimumReplicasUnavailable",
            "Deployment does not have minimum availability.",
        )
    };
    set_condition(&mut status, AVAILABLE, enough, reason, message, now);
    stamp(&mut status, before, AVAILABLE, now, false);
    let failure = sets
        .all()
        .find_map(|set| condition(&set["status"], "ReplicaFailure"));
    match failure {
        Some(failure) => {
            let text = |field: &str| failure[field].as_str().unwrap_or_default();
            let (reason, message) = (text("reason"), text("message"));
            set_condition(&mut status, "ReplicaFailure", true, reason, message, now);
            stamp(&mut status, before, "ReplicaFailure", now, false);
        }
        None => remove_condition(&mut status, "ReplicaFailure"),
    }
    let next = progress(deployment, sets, &mut status, now);
    (status, next)
}

/// `lastUpdateTime`: kept while the condition says the same, unless something has moved on.
fn stamp(status: &mut Value, before: &Value, kind: &str, now: Timestamp, moved: bool) {
    let old = condition(before, kind).cloned().unwrap_or_default();
    let Some(list) = status["conditions"].as_array_mut() else {
        return;
    };
    let Some(new) = list.iter_mut().find(|condition| condition["type"] == kind) else {
        return;
    };
    let same = ["status", "reason", "message"]
        .iter()
        .all(|field| new[*field] == old[*field]);
    new["lastUpdateTime"] = if same && !moved && old["lastUpdateTime"].is_string() {
        old["lastUpdateTime"].clone()
    } else {
        meta::format_time(now).into()
    };
}

fn progress(
    deployment: &Value,
    sets: &Sets,
    status: &mut Value,
    now: Timestamp,
) -> Option<Timestamp> {
    let before = &deployment["status"];
    let Some(deadline) = deployment["spec"]["progressDeadlineSeconds"].as_i64() else {
        remove_condition(status, PROGRESSING);
        return None;
    };
    let old = condition(before, PROGRESSING);
    let old_reason = old.map_or("", |old| old["reason"].as_str().unwrap_or_default());
    if deployment["spec"]["paused"] == true {
        if old_reason != "DeploymentPaused" {
            set_condition_unknown(status, "DeploymentPaused", "Deployment is paused", now);
        }
        stamp(status, before, PROGRESSING, now, false);
        return None;
    }
    let wanted = replicas(deployment);
    let count = |status: &Value, field: &str| number(&status[field]);
    let complete = count(status, "updatedReplicas") == wanted
        && count(status, "replicas") == wanted
        && count(status, "availableReplicas") == wanted
        && sets.new.is_some();
    let set = sets.new.as_ref().map(name).unwrap_or_default();
    if complete {
        let message = format!("ReplicaSet {set:?} has successfully progressed.");
        set_condition(
            status,
            PROGRESSING,
            true,
            "NewReplicaSetAvailable",
            &message,
            now,
        );
        stamp(status, before, PROGRESSING, now, false);
        return None;
    }
    let others = |status: &Value| count(status, "replicas") - count(status, "updatedReplicas");
    let moved = count(status, "updatedReplicas") > count(before, "updatedReplicas")
        || others(status) < others(before)
        || count(status, "readyReplicas") > count(before, "readyReplicas")
        || count(status, "availableReplicas") > count(before, "availableReplicas");
    let another_template = !old.is_some_and(|old| {
        old["message"]
            .as_str()
            .unwrap_or_default()
            .contains(&format!("{set:?}"))
    });
    if moved || another_template || matches!(old_reason, "" | "DeploymentPaused") {
        let (reason, message) = if another_template && number(&before["updatedReplicas"]) == 0 {
            (
                "NewReplicaSetCreated",
                format!("Created new replica set {set:?}"),
            )
        } else {
            (
                "ReplicaSetUpdated",
                format!("ReplicaSet {set:?} is progressing."),
            )
        };
        set_condition(status, PROGRESSING, true, reason, &message, now);
        stamp(status, before, PROGRESSING, now, true);
        return end(now, deadline);
    }
    if old_reason == "ProgressDeadlineExceeded" {
        stamp(status, before, PROGRESSING, now, false);
        return None;
    }
    let since = old
        .and_then(|old| old["lastUpdateTime"].as_str())
        .and_then(|text| text.parse().ok())
        .unwrap_or(now);
    // A complete one that has become less is not rolling out: it has no deadline.
    if old_reason == "NewReplicaSetAvailable" {
        stamp(status, before, PROGRESSING, now, false);
        return None;
    }
    let end = end(since, deadline);
    if end.is_some_and(|end| end <= now) {
        let message = format!("ReplicaSet {set:?} has timed out progressing.");
        set_condition(
            status,
            PROGRESSING,
            false,
            "ProgressDeadlineExceeded",
            &message,
            now,
        );
        stamp(status, before, PROGRESSING, now, false);
        return None;
    }
    stamp(status, before, PROGRESSING, now, false);
    end
}

fn end(since: Timestamp, seconds: i64) -> Option<Timestamp> {
    since.checked_add(SignedDuration::from_secs(seconds)).ok()
}

fn set_condition_unknown(status: &mut Value, reason: &str, message: &str, now: Timestamp) {
    set_condition(status, PROGRESSING, false, reason, message, now);
    if let Some(list) = status["conditions"].as_array_mut() {
        for condition in list.iter_mut().filter(|c| c["type"] == PROGRESSING) {
            condition["status"] = "Unknown".into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(status: &Value) -> Value {
        json!({"metadata": {"generation": 1}, "status": status, "spec": {"replicas": 2,
            "progressDeadlineSeconds": 60, "strategy": {"type": "Recreate"}}})
    }

    fn sets(updated: i64, available: i64) -> Sets {
        let new = json!({"metadata": {"name": "d-1"}, "spec": {"replicas": 2},
            "status": {"replicas": updated, "readyReplicas": available, "availableReplicas": available}});
        Sets {
            new: Some(new),
            old: Vec::new(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn progress_has_a_deadline_that_progress_moves() {
        let (first, next) = status(&deployment(&json!({})), &sets(2, 0), at(0));
        let reason = |status: &Value| condition(status, PROGRESSING).unwrap()["reason"].clone();
        assert_eq!(reason(&first), "NewReplicaSetCreated");
        assert_eq!(next, Some(at(60)));
        let (second, next) = status(&deployment(&first), &sets(2, 1), at(30));
        assert_eq!(next, Some(at(90)), "one more is ready");
        let (same, next) = status(&deployment(&second), &sets(2, 1), at(89));
        assert_eq!((same, next), (second.clone(), Some(at(90))));
        let (late, next) = status(&deployment(&second), &sets(2, 1), at(90));
        assert_eq!(
            (reason(&late), next),
            (json!("ProgressDeadlineExceeded"), None)
        );
        let (done, next) = status(&deployment(&second), &sets(2, 2), at(40));
        assert_eq!(
            (reason(&done), next),
            (json!("NewReplicaSetAvailable"), None)
        );
        assert_eq!(condition(&done, AVAILABLE).unwrap()["status"], "True");
        let (again, _) = status(&deployment(&done), &sets(2, 2), at(400));
        assert_eq!(again, done, "nothing is written where nothing has changed");
    }
}

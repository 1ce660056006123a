//! When a job is given up.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{Count, name, namespace, number};
use crate::workloads::owned::{is_active, is_true, phase};

/// Why the job fails, if it does: reason and message.
pub(super) fn of(
    job: &Value,
    pods: &[Value],
    count: &Count,
    now: Timestamp,
) -> Option<(&'static str, String)> {
    if is_true(&job["status"], "FailureTarget") {
        return None;
    }
    for pod in pods.iter().filter(|pod| phase(pod) == "Failed") {
        if let Some((_, "FailJob", why)) = rule(job, pod) {
            return Some(("PodFailurePolicy", why));
        }
    }
    let spec = &job["spec"];
    let limit = usize::try_from(number(&spec["backoffLimit"])).unwrap_or(usize::MAX);
    if count.failed() > limit || restarted_too_often(job, pods, limit) {
        let message = "Job has reached the specified backoff limit".to_owned();
        return Some(("BackoffLimitExceeded", message));
    }
    let given_up = count.failed_indexes().len();
    if let Some(most) = spec["maxFailedIndexes"].as_u64()
        && given_up > usize::try_from(most).unwrap_or(usize::MAX)
    {
        let message = "Job has exceeded the specified maximal number of failed indexes".to_owned();
        return Some(("MaxFailedIndexesExceeded", message));
    }
    let completions = usize::try_from(number(&spec["completions"])).unwrap_or_default();
    if given_up > 0 && given_up + count.succeeded() >= completions {
        return Some(("FailedIndexes", "Job has failed indexes".to_owned()));
    }
    if spec["suspend"] != true && deadline(job, &job["status"]).is_some_and(|end| end <= now) {
        let message = "Job was active longer than specified deadline".to_owned();
        return Some(("DeadlineExceeded", message));
    }
    None
}

/// When the job must have ended.
pub(super) fn deadline(job: &Value, status: &Value) -> Option<Timestamp> {
    let seconds = job["spec"]["activeDeadlineSeconds"].as_i64()?;
    let start: Timestamp = status["startTime"].as_str()?.parse().ok()?;
    start.checked_add(SignedDuration::from_secs(seconds)).ok()
}

/// Containers that are started anew in their pods count as failures too.
fn restarted_too_often(job: &Value, pods: &[Value], limit: usize) -> bool {
    if job["spec"]["template"]["spec"]["restartPolicy"] != "OnFailure" {
        return false;
    }
    let restarts: i64 = pods
        .iter()
        .filter(|pod| is_active(pod))
        .flat_map(|pod| {
            ["initContainerStatuses", "containerStatuses"]
                .into_iter()
                .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
        })
        .map(|status| number(&status["restartCount"]))
        .sum();
    let restarts = usize::try_from(restarts).unwrap_or_default();
    restarts > 0 && restarts >= limit
}

/// When a pod's last container ended.
pub(super) fn finished_at(pod: &Value) -> Option<Timestamp> {
    let ends = pod["status"]["containerStatuses"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|status| {
            let end = status["state"]["terminated"]["finishedAt"].as_str()?;
            end.parse().ok()
        });
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let changed = conditions
        .filter(|condition| condition["type"] == "Ready")
        .filter_map(|condition| condition["lastTransitionTime"].as_str()?.parse().ok());
    ends.max().or_else(|| changed.max())
}

pub(super) fn is_ignored(job: &Value, pod: &Value) -> bool {
    rule(job, pod).is_some_and(|(_, action, _)| action == "Ignore")
}

pub(super) fn fails_index(job: &Value, pod: &Value) -> bool {
    rule(job, pod).is_some_and(|(_, action, _)| action == "FailIndex")
}

/// The first rule of the job's policy that the pod's failure meets: its number, what it says to do,
/// and in which words.
fn rule<'a>(job: &'a Value, pod: &Value) -> Option<(usize, &'a str, String)> {
    let rules = job["spec"]["podFailurePolicy"]["rules"].as_array()?;
    for (index, rule) in rules.iter().enumerate() {
        let action = rule["action"].as_str().unwrap_or_default();
        let whose = format!("{}/{}", namespace(pod), name(pod));
        if let Some((container, code)) = exit_code(&rule["onExitCodes"], pod) {
            let why = format!(
                "Container {container} for pod {whose} failed with exit code {code} matching \
                 {action} rule at index {index}"
            );
            return Some((index, action, why));
        }
        if let Some(kind) = condition(&rule["onPodConditions"], pod) {
            let why =
                format!("Pod {whose} has condition {kind} matching {action} rule at index {index}");
            return Some((index, action, why));
        }
    }
    None
}

fn exit_code(requirement: &Value, pod: &Value) -> Option<(String, i64)> {
    let values = requirement["values"].as_array()?;
    let within = requirement["operator"] == "In";
    let only = requirement["containerName"].as_str();
    ["containerStatuses", "initContainerStatuses"]
        .into_iter()
        .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
        .find_map(|status| {
            let container = status["name"].as_str()?;
            let code = status["state"]["terminated"]["exitCode"].as_i64()?;
            let meant = only.is_none_or(|only| only == container);
            let listed = values.iter().any(|value| value.as_i64() == Some(code));
            (meant && code != 0 && listed == within).then(|| (container.to_owned(), code))
        })
}

fn condition<'a>(patterns: &'a Value, pod: &Value) -> Option<&'a str> {
    let conditions = pod["status"]["conditions"].as_array()?;
    patterns.as_array()?.iter().find_map(|pattern| {
        let wanted = pattern["status"].as_str().unwrap_or("True");
        let met = conditions
            .iter()
            .any(|condition| condition["type"] == pattern["type"] && condition["status"] == wanted);
        met.then(|| pattern["type"].as_str())?
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_policy_says_what_a_failure_means() {
        let job = json!({"spec": {"backoffLimit": 6, "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        ]}}});
        let mut pod = json!({"metadata": {"name": "p", "namespace": "n"}, "status": {"phase": "Failed",
            "containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 42}}}]}});
        let (reason, message) = of(
            &job,
            std::slice::from_ref(&pod),
            &Count::default(),
            Timestamp::now(),
        )
        .unwrap();
        assert_eq!(reason, "PodFailurePolicy");
        assert_eq!(
            message,
            "Container c for pod n/p failed with exit code 42 matching FailJob rule at index 0"
        );
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = 1.into();
        assert!(!is_ignored(&job, &pod));
        pod["status"]["conditions"] = json!([{"type": "DisruptionTarget", "status": "True"}]);
        assert!(is_ignored(&job, &pod));
    }

    #[test]
    fn time_and_restarts_are_bounded() {
        let job = json!({"spec": {"backoffLimit": 2, "activeDeadlineSeconds": 10,
            "template": {"spec": {"restartPolicy": "OnFailure"}}}, "status": {"startTime": "1970-01-01T00:00:00Z"}});
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(of(&job, &[], &Count::default(), at(9)), None);
        assert_eq!(
            of(&job, &[], &Count::default(), at(10)).unwrap().0,
            "DeadlineExceeded"
        );
        let pod =
            json!({"status": {"phase": "Running", "containerStatuses": [{"restartCount": 2}]}});
        assert_eq!(
            of(&job, &[pod], &Count::default(), at(1)).unwrap().0,
            "BackoffLimitExceeded"
        );
    }
}

//! Defaults of workloads and of what bounds them.

use serde_json::{Map, Value, json};

use crate::kinds::ResourceKind;

use super::{fill, fill_number, object_in, objects_in, pod, storage};

type Fields = Map<String, Value>;

pub(super) fn apply(kind: &ResourceKind, object: &mut Value) {
    if kind.kind == "PriorityClass" {
        if let Some(class) = object.as_object_mut() {
            fill(class, "preemptionPolicy", "PreemptLowerPriority");
            fill(class, "value", 0);
        }
        return;
    }
    let Some(object) = object.as_object_mut() else {
        return;
    };
    // Upstream shows an empty spec where none was given.
    if matches!(kind.kind, "ResourceQuota" | "PodDisruptionBudget") {
        fill(object, "spec", json!({}));
    }
    let Some(spec) = object_in(object, "spec") else {
        return;
    };
    match kind.kind {
        "Deployment" => deployment(spec),
        "ReplicaSet" => {
            fill(spec, "replicas", 1);
            template(spec);
        }
        "StatefulSet" => stateful_set(spec),
        "DaemonSet" => daemon_set(spec),
        "Job" => job(spec),
        "CronJob" => cron_job(spec),
        "HorizontalPodAutoscaler" => autoscaler(spec),
        "LimitRange" => objects_in(spec, "limits").for_each(limit),
        _ => {}
    }
}

/// The pod template's own spec.
pub(super) fn template(spec: &mut Fields) {
    if let Some(template) = object_in(spec, "template")
        && let Some(spec) = object_in(template, "spec")
    {
        pod::apply(spec);
    }
}

fn child<'a>(object: &'a mut Fields, field: &str) -> Option<&'a mut Fields> {
    fill(object, field, json!({}));
    object_in(object, field)
}

fn is(object: &Fields, field: &str, value: &str) -> bool {
    object.get(field).and_then(Value::as_str) == Some(value)
}

fn deployment(spec: &mut Fields) {
    fill(spec, "replicas", 1);
    if let Some(strategy) = child(spec, "strategy") {
        fill(strategy, "type", "RollingUpdate");
        if is(strategy, "type", "RollingUpdate")
            && let Some(rolling) = child(strategy, "rollingUpdate")
        {
            fill(rolling, "maxUnavailable", "25%");
            fill(rolling, "maxSurge", "25%");
        }
    }
    fill(spec, "revisionHistoryLimit", 10);
    fill(spec, "progressDeadlineSeconds", 600);
    template(spec);
}

fn daemon_set(spec: &mut Fields) {
    if let Some(strategy) = child(spec, "updateStrategy") {
        fill(strategy, "type", "RollingUpdate");
        if is(strategy, "type", "RollingUpdate")
            && let Some(rolling) = child(strategy, "rollingUpdate")
        {
            fill(rolling, "maxUnavailable", 1);
            fill(rolling, "maxSurge", 0);
        }
    }
    fill(spec, "revisionHistoryLimit", 10);
    template(spec);
}

fn stateful_set(spec: &mut Fields) {
    fill(spec, "podManagementPolicy", "OrderedReady");
    if let Some(strategy) = child(spec, "updateStrategy") {
        fill(strategy, "type", "RollingUpdate");
        if is(strategy, "type", "RollingUpdate")
            && let Some(rolling) = child(strategy, "rollingUpdate")
        {
            fill(rolling, "partition", 0);
        }
    }
    if let Some(policy) = child(spec, "persistentVolumeClaimRetentionPolicy") {
        fill(policy, "whenDeleted", "Retain");
        fill(policy, "whenScaled", "Retain");
    }
    for claim in objects_in(spec, "volumeClaimTemplates") {
        fill(claim, "apiVersion", "v1");
        fill(claim, "kind", "PersistentVolumeClaim");
        if let Some(spec) = object_in(claim, "spec") {
            storage::claim(spec);
        }
        fill(claim, "status", json!({"phase": "Pending"}));
    }
    fill(spec, "replicas", 1);
    fill(spec, "revisionHistoryLimit", 10);
    template(spec);
}

fn job(spec: &mut Fields) {
    let absent = |spec: &Fields, field: &str| spec.get(field).is_none_or(Value::is_null);
    // One pod that succeeds, if nothing else is said.
    if absent(spec, "completions") && absent(spec, "parallelism") {
        fill(spec, "completions", 1);
    }
    fill(spec, "parallelism", 1);
    let backoff = if absent(spec, "backoffLimitPerIndex") {
        6
    } else {
        i64::from(i32::MAX)
    };
    fill(spec, "backoffLimit", backoff);
    fill(spec, "completionMode", "NonIndexed");
    fill(spec, "suspend", false);
    fill(spec, "manualSelector", false);
    let replacement = if absent(spec, "podFailurePolicy") {
        "TerminatingOrFailed"
    } else {
        "Failed"
    };
    fill(spec, "podReplacementPolicy", replacement);
    template(spec);
}

fn cron_job(spec: &mut Fields) {
    fill(spec, "concurrencyPolicy", "Allow");
    fill(spec, "suspend", false);
    fill(spec, "successfulJobsHistoryLimit", 3);
    fill(spec, "failedJobsHistoryLimit", 1);
    if let Some(job) = object_in(spec, "jobTemplate")
        && let Some(spec) = object_in(job, "spec")
    {
        template(spec);
    }
}

fn autoscaler(spec: &mut Fields) {
    fill_number(spec, "minReplicas", 1);
    if spec
        .get("metrics")
        .and_then(Value::as_array)
        .is_none_or(Vec::is_empty)
    {
        let cpu =
            json!({"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}});
        spec.insert(
            "metrics".into(),
            json!([{"type": "Resource", "resource": cpu}]),
        );
    }
    let Some(behavior) = object_in(spec, "behavior") else {
        return;
    };
    if let Some(up) = child(behavior, "scaleUp") {
        fill(up, "stabilizationWindowSeconds", 0);
        fill(up, "selectPolicy", "Max");
        if up.get("policies").is_none_or(Value::is_null) {
            up.insert(
                "policies".into(),
                json!([
                    {"type": "Pods", "value": 4, "periodSeconds": 15},
                    {"type": "Percent", "value": 100, "periodSeconds": 15},
                ]),
            );
        }
    }
    if let Some(down) = child(behavior, "scaleDown") {
        fill(down, "selectPolicy", "Max");
        if down.get("policies").is_none_or(Value::is_null) {
            down.insert(
                "policies".into(),
                json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]),
            );
        }
    }
}

/// A container's bounds follow from each other: max → default → defaultRequest ← min.
fn limit(item: &mut Fields) {
    if !is(item, "type", "Container") {
        return;
    }
    for (from, to) in [
        ("max", "default"),
        ("default", "defaultRequest"),
        ("min", "defaultRequest"),
    ] {
        let Some(Value::Object(source)) = item.get(from).cloned() else {
            continue;
        };
        if let Some(target) = child(item, to) {
            for (name, quantity) in source {
                fill(target, &name, quantity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_api_version;

    fn defaulted(api_version: &str, kind: &str, spec: Value) -> Value {
        let kind = by_api_version(api_version, kind).unwrap();
        let mut object = json!({"spec": spec});
        crate::defaults::apply(kind, &mut object);
        let mut twice = object.clone();
        crate::defaults::apply(kind, &mut twice);
        assert_eq!(object, twice);
        object["spec"].take()
    }

    #[test]
    fn a_deployment_rolls_by_quarters() {
        let spec = defaulted("apps/v1", "Deployment", json!({"template": {"spec": {}}}));
        assert_eq!(
            spec["strategy"],
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}})
        );
        assert_eq!(spec["replicas"], 1);
        assert_eq!(spec["revisionHistoryLimit"], 10);
        assert_eq!(spec["progressDeadlineSeconds"], 600);
        assert_eq!(spec["template"]["spec"]["restartPolicy"], "Always");
        let spec = defaulted(
            "apps/v1",
            "Deployment",
            json!({"replicas": 0, "strategy": {"type": "Recreate"}}),
        );
        assert_eq!(spec["strategy"], json!({"type": "Recreate"}));
        assert_eq!(spec["replicas"], 0);
    }

    #[test]
    fn a_job_runs_once() {
        let spec = defaulted("batch/v1", "Job", json!({}));
        assert_eq!(
            (&spec["completions"], &spec["parallelism"]),
            (&json!(1), &json!(1))
        );
        assert_eq!(spec["backoffLimit"], 6);
        assert_eq!(spec["podReplacementPolicy"], "TerminatingOrFailed");
        let spec = defaulted("batch/v1", "Job", json!({"parallelism": 3}));
        assert!(spec.get("completions").is_none(), "a work queue");
    }

    #[test]
    fn other_sets_have_their_strategies() {
        let spec = defaulted("apps/v1", "StatefulSet", json!({}));
        assert_eq!(spec["updateStrategy"]["rollingUpdate"]["partition"], 0);
        assert_eq!(spec["podManagementPolicy"], "OrderedReady");
        let spec = defaulted("apps/v1", "DaemonSet", json!({}));
        assert_eq!(spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 1);
        let spec = defaulted("batch/v1", "CronJob", json!({}));
        assert_eq!(spec["failedJobsHistoryLimit"], 1);
    }

    #[test]
    fn a_containers_bounds_follow_from_each_other() {
        let limits = json!([{"type": "Container", "max": {"cpu": "2"}, "min": {"memory": "1Mi"}}]);
        let spec = defaulted("v1", "LimitRange", json!({"limits": limits}));
        let item = &spec["limits"][0];
        assert_eq!(item["default"], json!({"cpu": "2"}));
        assert_eq!(item["defaultRequest"], json!({"cpu": "2", "memory": "1Mi"}));
    }

    #[test]
    fn an_autoscaler_looks_at_the_processor() {
        let spec = defaulted(
            "autoscaling/v2",
            "HorizontalPodAutoscaler",
            json!({"maxReplicas": 3, "behavior": {}}),
        );
        assert_eq!(spec["minReplicas"], 1);
        assert_eq!(
            spec["metrics"][0]["resource"]["target"]["averageUtilization"],
            80
        );
        assert_eq!(spec["behavior"]["scaleDown"]["policies"][0]["value"], 100);
    }
}

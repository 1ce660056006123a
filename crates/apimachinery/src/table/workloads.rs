//! Columns of workloads and of what bounds them.

use jiff::Timestamp;
use serde_json::Value;

use crate::{kinds::ResourceKind, meta, selector::LabelSelector};

use super::{
    Column,
    age::{human_duration, since},
    columns::{AGE, NAME, column, string, wide},
    or, text,
};

/// The columns of a kind, if it is one of these.
pub(super) fn of(kind: &ResourceKind) -> Option<&'static [Column]> {
    let columns: &'static [Column] = match (kind.group, kind.kind) {
        ("apps", "Deployment") => DEPLOYMENTS,
        ("apps", "ReplicaSet") | ("", "ReplicationController") => REPLICA_SETS,
        ("apps", "StatefulSet") => STATEFUL_SETS,
        ("apps", "DaemonSet") => DAEMON_SETS,
        ("apps", "ControllerRevision") => REVISIONS,
        ("batch", "Job") => JOBS,
        ("batch", "CronJob") => CRON_JOBS,
        ("autoscaling", "HorizontalPodAutoscaler") => AUTOSCALERS,
        ("policy", "PodDisruptionBudget") => BUDGETS,
        ("scheduling.k8s.io", "PriorityClass") => PRIORITY_CLASSES,
        ("", "LimitRange") => LIMIT_RANGES,
        ("", "ResourceQuota") => QUOTAS,
        _ => return None,
    };
    Some(columns)
}

const fn integer(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    column(name, "integer", 0, cell)
}

fn number(object: &Value, path: &[&str]) -> i64 {
    path.iter()
        .try_fold(object, |value, key| value.get(key))
        .and_then(Value::as_i64)
        .unwrap_or_default()
}

fn status(object: &Value, field: &str) -> i64 {
    number(object, &["status", field])
}

/// A field of every container of the template, separated by commas.
fn of_template(object: &Value, field: &str) -> Value {
    let template = match &object["spec"]["jobTemplate"] {
        Value::Null => &object["spec"]["template"],
        job => &job["spec"]["template"],
    };
    let texts: Vec<&str> = template["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|container| container[field].as_str())
        .collect();
    texts.join(",").into()
}

fn selector(object: &Value) -> Value {
    let (selector, read) = match &object["spec"]["jobTemplate"] {
        Value::Null => (&object["spec"]["selector"], LabelSelector::of_owner(object)),
        job => {
            let selector = &job["spec"]["selector"];
            (selector, LabelSelector::from_json(selector))
        }
    };
    match read {
        Ok(_) if selector.is_null() => "<none>".into(),
        Ok(selector) => or(&selector.to_string(), "<none>").into(),
        Err(_invalid) => "<error>".into(),
    }
}

const CONTAINERS: Column = wide("Containers", |object, _| of_template(object, "name"));
const IMAGES: Column = wide("Images", |object, _| of_template(object, "image"));
const SELECTOR: Column = wide("Selector", |object, _| selector(object));

fn ready(object: &Value) -> Value {
    format!(
        "{}/{}",
        status(object, "readyReplicas"),
        number(object, &["spec", "replicas"])
    )
    .into()
}

static DEPLOYMENTS: &[Column] = &[
    NAME,
    string("Ready", |object, _| ready(object)),
    string("Up-to-date", |object, _| {
        status(object, "updatedReplicas").to_string().into()
    }),
    string("Available", |object, _| {
        status(object, "availableReplicas").to_string().into()
    }),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

static REPLICA_SETS: &[Column] = &[
    NAME,
    integer("Desired", |object, _| {
        number(object, &["spec", "replicas"]).into()
    }),
    integer("Current", |object, _| status(object, "replicas").into()),
    integer("Ready", |object, _| status(object, "readyReplicas").into()),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

static STATEFUL_SETS: &[Column] = &[
    NAME,
    string("Ready", |object, _| ready(object)),
    AGE,
    CONTAINERS,
    IMAGES,
];

static DAEMON_SETS: &[Column] = &[
    NAME,
    integer("Desired", |object, _| {
        status(object, "desiredNumberScheduled").into()
    }),
    integer("Current", |object, _| {
        status(object, "currentNumberScheduled").into()
    }),
    integer("Ready", |object, _| status(object, "numberReady").into()),
    integer("Up-to-date", |object, _| {
        status(object, "updatedNumberScheduled").into()
    }),
    integer("Available", |object, _| {
        status(object, "numberAvailable").into()
    }),
    string("Node Selector", |object, _| {
        let labels = object["spec"]["template"]["spec"]["nodeSelector"].as_object();
        let texts: Vec<String> = labels
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        or(&texts.join(","), "<none>").into()
    }),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

static REVISIONS: &[Column] = &[
    NAME,
    string("Controller", |object, _| {
        let Some(owner) = meta::controller(object) else {
            return "<none>".into();
        };
        let (group, _version) = match text(owner, &["apiVersion"]).split_once('/') {
            Some((group, version)) => (group, version),
            None => ("", ""),
        };
        let kind = text(owner, &["kind"]).to_lowercase();
        let dot = if group.is_empty() { "" } else { "." };
        format!("{kind}{dot}{group}/{}", text(owner, &["name"])).into()
    }),
    integer("Revision", |object, _| number(object, &["revision"]).into()),
    AGE,
];

fn condition(object: &Value, kind: &str) -> bool {
    object["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == kind && condition["status"] == "True")
}

fn job_status(job: &Value) -> &'static str {
    for (kind, word) in [("Complete", "Complete"), ("Failed", "Failed")] {
        if condition(job, kind) {
            return word;
        }
    }
    if meta::is_deleting(job) {
        return "Terminating";
    }
    for kind in ["Suspended", "FailureTarget", "SuccessCriteriaMet"] {
        if condition(job, kind) {
            return kind;
        }
    }
    "Running"
}

fn job_completions(job: &Value) -> String {
    let done = status(job, "succeeded");
    match job["spec"]["completions"].as_i64() {
        Some(wanted) => format!("{done}/{wanted}"),
        None => match number(job, &["spec", "parallelism"]) {
            most @ 2.. => format!("{done}/1 of {most}"),
            _ => format!("{done}/1"),
        },
    }
}

fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

static JOBS: &[Column] = &[
    NAME,
    string("Status", |job, _| job_status(job).into()),
    string("Completions", |job, _| job_completions(job).into()),
    string("Duration", |job, now| {
        let Some(start) = time(&job["status"]["startTime"]) else {
            return "".into();
        };
        let end = time(&job["status"]["completionTime"]).unwrap_or(now);
        human_duration(end.as_second() - start.as_second()).into()
    }),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

static CRON_JOBS: &[Column] = &[
    NAME,
    string("Schedule", |cron, _| {
        text(cron, &["spec", "schedule"]).into()
    }),
    string("Timezone", |cron, _| {
        or(text(cron, &["spec", "timeZone"]), "<none>").into()
    }),
    string("Suspend", |cron, _| {
        match cron["spec"]["suspend"].as_bool() {
            Some(true) => "True",
            Some(false) => "False",
            None => "<unset>",
        }
        .into()
    }),
    integer("Active", |cron, _| {
        cron["status"]["active"]
            .as_array()
            .map_or(0, Vec::len)
            .into()
    }),
    string("Last Schedule", |cron, now| {
        time(&cron["status"]["lastScheduleTime"])
            .map_or_else(|| "<none>".to_owned(), |last| since(last, now))
            .into()
    }),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// What one metric is at and should be at.
fn target(spec: &Value, current: &Value) -> String {
    let kind = text(spec, &["type"]);
    let field = match kind {
        "ContainerResource" => "containerResource",
        "External" => "external",
        "Object" => "object",
        "Pods" => "pods",
        _ => "resource",
    };
    let (wanted, is) = (&spec[field], &current[field]["current"]);
    let name = match kind {
        "Resource" | "ContainerResource" => format!("{}: ", text(wanted, &["name"])),
        _ => String::new(),
    };
    let goal = &wanted["target"];
    if let Some(percent) = goal["averageUtilization"].as_i64() {
        let at = is["averageUtilization"]
            .as_i64()
            .map_or_else(|| "<unknown>".to_owned(), |at| format!("{at}%"));
        return format!("{name}{at}/{percent}%");
    }
    for (field, suffix) in [("averageValue", " (avg)"), ("value", "")] {
        let value = text(goal, &[field]);
        if !value.is_empty() {
            let at = or(text(is, &[field]), "<unknown>");
            let suffix = if kind == "External" || kind == "Object" {
                suffix
            } else {
                ""
            };
            return format!("{name}{at}/{value}{suffix}");
        }
    }
    "<auto>".to_owned()
}

static AUTOSCALERS: &[Column] = &[
    NAME,
    string("Reference", |scaler, _| {
        let target = &scaler["spec"]["scaleTargetRef"];
        format!("{}/{}", text(target, &["kind"]), text(target, &["name"])).into()
    }),
    string("Targets", |scaler, _| {
        if let Some(wanted) = scaler["spec"]["targetCPUUtilizationPercentage"].as_i64() {
            // The form of version 1.
            let current = &scaler["status"]["currentCPUUtilizationPercentage"];
            let current = match current.as_i64() {
                Some(percent) => format!("{percent}%"),
                None => "<unknown>".to_owned(),
            };
            return format!("cpu: {current}/{wanted}%").into();
        }
        let metrics = scaler["spec"]["metrics"].as_array();
        let texts: Vec<String> = metrics
            .into_iter()
            .flatten()
            .enumerate()
            .map(|(index, spec)| target(spec, &scaler["status"]["currentMetrics"][index]))
            .collect();
        match texts.as_slice() {
            [] => "<none>".to_owned(),
            [first, second] => format!("{first}, {second}"),
            [first, second, rest @ ..] => format!("{first}, {second} + {} more...", rest.len()),
            [only] => only.clone(),
        }
        .into()
    }),
    string("MinPods", |scaler, _| {
        match scaler["spec"]["minReplicas"].as_i64() {
            Some(least) => least.to_string().into(),
            None => "<unset>".into(),
        }
    }),
    integer("MaxPods", |scaler, _| {
        number(scaler, &["spec", "maxReplicas"]).into()
    }),
    integer("Replicas", |scaler, _| {
        status(scaler, "currentReplicas").into()
    }),
    AGE,
];

fn amount(value: &Value) -> Value {
    match value {
        Value::Null => "N/A".into(),
        Value::String(text) => text.as_str().into(),
        other => other.to_string().into(),
    }
}

static BUDGETS: &[Column] = &[
    NAME,
    string("Min Available", |budget, _| {
        amount(&budget["spec"]["minAvailable"])
    }),
    string("Max Unavailable", |budget, _| {
        amount(&budget["spec"]["maxUnavailable"])
    }),
    integer("Allowed Disruptions", |budget, _| {
        status(budget, "disruptionsAllowed").into()
    }),
    AGE,
];

static PRIORITY_CLASSES: &[Column] = &[
    NAME,
    integer("Value", |class, _| number(class, &["value"]).into()),
    column("Global-Default", "boolean", 0, |class, _| {
        class["globalDefault"].as_bool().unwrap_or_default().into()
    }),
    AGE,
    column("PreemptionPolicy", "string", 0, |class, _| {
        text(class, &["preemptionPolicy"]).into()
    }),
];

static LIMIT_RANGES: &[Column] = &[
    NAME,
    string("Created At", |object, _| {
        text(object, &["metadata", "creationTimestamp"]).into()
    }),
];

/// `NAME: USED/HARD, …`, of limits or of everything else.
fn used(quota: &Value, limits: bool) -> Value {
    let quantity = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "0".to_owned(),
        other => other.to_string(),
    };
    let texts: Vec<String> = quota["status"]["hard"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| name.starts_with("limits") == limits)
        .map(|(name, hard)| {
            let used = quantity(&quota["status"]["used"][name]);
            format!("{name}: {used}/{}", quantity(hard))
        })
        .collect();
    texts.join(", ").into()
}

static QUOTAS: &[Column] = &[
    NAME,
    string("Request", |quota, _| used(quota, false)),
    string("Limit", |quota, _| used(quota, true)),
    AGE,
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kinds::by_api_version;

    fn cells(api_version: &str, kind: &str, mut object: Value) -> Vec<String> {
        object["metadata"] = json!({"name": "x", "creationTimestamp": "2026-01-01T00:00:00Z"});
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let kind = by_api_version(api_version, kind).unwrap();
        let columns = of(kind).unwrap();
        columns
            .iter()
            .map(|column| match (column.cell)(&object, now) {
                Value::String(text) => text,
                other => other.to_string(),
            })
            .collect()
    }

    #[test]
    fn cells_read_as_upstream() {
        let template = json!({"spec": {"containers": [{"name": "a", "image": "i:1"}, {"name": "b", "image": "j"}]}});
        let selector = json!({"matchLabels": {"app": "x"}});
        let deployment = json!({
            "spec": {"replicas": 3, "template": template, "selector": selector},
            "status": {"readyReplicas": 2, "updatedReplicas": 1, "availableReplicas": 2},
        });
        assert_eq!(
            cells("apps/v1", "Deployment", deployment),
            ["x", "2/3", "1", "2", "60s", "a,b", "i:1,j", "app=x"]
        );
        let job = json!({
            "spec": {"completions": 2, "template": template, "selector": selector},
            "status": {"succeeded": 2, "startTime": "2026-01-01T00:00:10Z", "completionTime": "2026-01-01T00:00:15Z",
                "conditions": [{"type": "Complete", "status": "True"}]},
        });
        assert_eq!(
            cells("batch/v1", "Job", job)[..5],
            ["x", "Complete", "2/2", "5s", "60s"]
        );
        let cron = json!({"spec": {"schedule": "* * * * *", "suspend": false, "jobTemplate": {"spec": {"template": template}}}});
        assert_eq!(
            cells("batch/v1", "CronJob", cron)[..9],
            [
                "x",
                "* * * * *",
                "<none>",
                "False",
                "0",
                "<none>",
                "60s",
                "a,b",
                "i:1,j"
            ]
        );
        let quota = json!({"status": {"hard": {"limits.cpu": "2", "pods": "2"}, "used": {"limits.cpu": "1", "pods": "1"}}});
        assert_eq!(
            cells("v1", "ResourceQuota", quota),
            ["x", "pods: 1/2", "limits.cpu: 1/2", "60s"]
        );
        let scaler = json!({"spec": {"minReplicas": 1, "maxReplicas": 3, "scaleTargetRef": {"kind": "Deployment", "name": "d"},
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilization": 50}}}]}});
        assert_eq!(
            cells("autoscaling/v2", "HorizontalPodAutoscaler", scaler),
            [
                "x",
                "Deployment/d",
                "cpu: <unknown>/50%",
                "1",
                "3",
                "0",
                "60s"
            ]
        );
    }
}

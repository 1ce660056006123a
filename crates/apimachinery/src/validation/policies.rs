//! Rules of quotas, limits, priorities, disruption budgets and autoscalers.

use serde_json::Value;

use crate::{Quantity, kinds::ResourceKind, meta::rules};

use super::{
    Found, Path, items, meta, text,
    workloads::{amount_of_pods, selector},
};

/// More than this is for the system's own classes.
const HIGHEST_USER_PRIORITY: i64 = 1_000_000_000;
/// The system's own classes.
pub const SYSTEM_PRIORITIES: [(&str, i64); 2] = [
    ("system-cluster-critical", 2_000_000_000),
    ("system-node-critical", 2_000_001_000),
];

pub(super) fn validate(kind: &ResourceKind, object: &Value, found: &mut Found) {
    let (spec, path) = (&object["spec"], Path::root("spec"));
    match kind.kind {
        "PriorityClass" => priority_class(object, found),
        "PodDisruptionBudget" => budget(spec, &path, found),
        "LimitRange" => limits(spec, &path, found),
        "ResourceQuota" => quota(spec, &path, found),
        "HorizontalPodAutoscaler" => autoscaler(spec, &path, found),
        _ => {}
    }
}

pub(super) fn validate_update(kind: &ResourceKind, new: &Value, old: &Value, found: &mut Found) {
    match kind.kind {
        "PriorityClass" => {
            if new["value"] != old["value"] {
                found.forbidden(&Path::root("value"), "may not be changed in an update.");
            }
            let at = Path::root("preemptionPolicy");
            found.immutable(&at, &new["preemptionPolicy"], &old["preemptionPolicy"]);
        }
        "ResourceQuota" => {
            for field in ["scopes", "scopeSelector"] {
                let at = Path::root("spec").field(field);
                found.immutable(&at, &new["spec"][field], &old["spec"][field]);
            }
        }
        _ => {}
    }
}

fn priority_class(class: &Value, found: &mut Found) {
    let name = text(&class["metadata"], "name");
    let value = class["value"].as_i64().unwrap_or_default();
    if name.starts_with("system-") {
        if !SYSTEM_PRIORITIES.contains(&(name, value)) {
            found.forbidden(
                &Path::root("metadata.name"),
                "priority class names with 'system-' prefix are reserved for system use only. \
                 error: priority class is not a known system priority class",
            );
        }
    } else if value > HIGHEST_USER_PRIORITY {
        found.forbidden(
            &Path::root("value"),
            format!("maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}"),
        );
    }
    let policies = ["PreemptLowerPriority", "Never"];
    let at = Path::root("preemptionPolicy");
    found.one_of(&at, &class["preemptionPolicy"], &policies);
}

fn budget(spec: &Value, path: &Path, found: &mut Found) {
    if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
        found.invalid(
            path,
            spec,
            "minAvailable and maxUnavailable cannot be both set",
        );
    }
    for field in ["minAvailable", "maxUnavailable"] {
        amount_of_pods(&spec[field], &path.field(field), true, found);
    }
    if spec["selector"].is_object() {
        selector(&spec["selector"], &path.field("selector"), found);
    }
    let at = path.field("unhealthyPodEvictionPolicy");
    let policies = ["AlwaysAllow", "IfHealthyBudget"];
    let policy = text(spec, "unhealthyPodEvictionPolicy");
    if !policy.is_empty() && !policies.contains(&policy) {
        found.not_supported(&at, &spec["unhealthyPodEvictionPolicy"], &policies);
    }
}

fn quantity(value: &Value) -> Option<Quantity> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

fn limits(spec: &Value, path: &Path, found: &mut Found) {
    let mut seen: Vec<&str> = Vec::new();
    for (item, at) in items(&spec["limits"], &path.field("limits")) {
        let kind = text(item, "type");
        if kind.is_empty() {
            found.required(&at.field("type"), "");
        }
        if seen.contains(&kind) {
            found.duplicate(&at.field("type"), &item["type"]);
        }
        seen.push(kind);
        for field in ["max", "min", "default", "defaultRequest"] {
            meta::quantity_map(&item[field], &at.field(field), found);
        }
        if kind == "Pod" {
            for field in ["default", "defaultRequest"] {
                if item[field].as_object().is_some_and(|map| !map.is_empty()) {
                    found.forbidden(
                        &at.field(field),
                        "may not be specified when `type` is 'Pod'",
                    );
                }
            }
        }
        for (small, large) in [
            ("min", "max"),
            ("min", "defaultRequest"),
            ("defaultRequest", "max"),
            ("defaultRequest", "default"),
            ("min", "default"),
            ("default", "max"),
        ] {
            ordered(item, &at, small, large, found);
        }
    }
}

/// One bound is not above the other.
fn ordered(item: &Value, path: &Path, small: &str, large: &str, found: &mut Found) {
    let word = |field: &str| match field {
        "defaultRequest" => "default request".to_owned(),
        other => other.to_owned(),
    };
    for (name, value) in item[small].as_object().into_iter().flatten() {
        let (Some(low), Some(high)) = (quantity(value), quantity(&item[large][name])) else {
            continue;
        };
        if low > high {
            found.invalid(
                &path.field(small).key(name),
                value,
                format!(
                    "{} value {low} is greater than {} value {high}",
                    word(small),
                    word(large)
                ),
            );
        }
    }
}

fn quota(spec: &Value, path: &Path, found: &mut Found) {
    meta::quantity_map(&spec["hard"], &path.field("hard"), found);
    let known = [
        "BestEffort",
        "CrossNamespacePodAffinity",
        "NotBestEffort",
        "NotTerminating",
        "PriorityClass",
        "Terminating",
        "VolumeAttributesClass",
    ];
    for (scope, at) in items(&spec["scopes"], &path.field("scopes")) {
        if !known.contains(&scope.as_str().unwrap_or_default()) {
            found.invalid(&at, scope, "unsupported scope");
        }
    }
}

fn autoscaler(spec: &Value, path: &Path, found: &mut Found) {
    let (least, most) = (spec["minReplicas"].as_i64(), spec["maxReplicas"].as_i64());
    if least.is_some_and(|least| least < 1) {
        found.invalid(
            &path.field("minReplicas"),
            &spec["minReplicas"],
            "must be greater than or equal to 1",
        );
    }
    let at = path.field("maxReplicas");
    if most.unwrap_or_default() < 1 {
        found.invalid(&at, &spec["maxReplicas"], "must be greater than 0");
    } else if most < least {
        found.invalid(
            &at,
            &spec["maxReplicas"],
            "must be greater than or equal to `minReplicas`",
        );
    }
    let (target, at) = (&spec["scaleTargetRef"], path.field("scaleTargetRef"));
    for field in ["kind", "name"] {
        let value = text(target, field);
        if value.is_empty() {
            found.required(&at.field(field), "");
        } else {
            let details = rules::path_segment(value);
            found.all_invalid(&at.field(field), value, details);
        }
    }
    for (metric, at) in items(&spec["metrics"], &path.field("metrics")) {
        let kinds = [
            "ContainerResource",
            "External",
            "Object",
            "Pods",
            "Resource",
        ];
        found.one_of(&at.field("type"), &metric["type"], &kinds);
        if metric["type"] == "Resource" && text(&metric["resource"], "name").is_empty() {
            found.required(&at.field("resource.name"), "must specify a resource name");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{defaults, kinds::by_api_version};

    fn errors(api_version: &str, kind: &str, mut object: Value) -> Vec<String> {
        let kind = by_api_version(api_version, kind).unwrap();
        object["metadata"]["name"] = match &object["metadata"]["name"] {
            Value::Null => "x".into(),
            name => name.clone(),
        };
        if kind.namespaced {
            object["metadata"]["namespace"] = "d".into();
        }
        defaults::apply(kind, &mut object);
        let errors = super::super::validate_create(kind, &object);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn findings_are_in_upstreams_words() {
        let cases = [
            (
                "policy/v1",
                "PodDisruptionBudget",
                json!({"spec": {"minAvailable": 1, "maxUnavailable": 1}}),
                "spec: Invalid value: {\"maxUnavailable\":1,\"minAvailable\":1}: minAvailable and maxUnavailable cannot be both set",
            ),
            (
                "policy/v1",
                "PodDisruptionBudget",
                json!({"spec": {"maxUnavailable": "101%"}}),
                "spec.maxUnavailable: Invalid value: \"101%\": must not be greater than 100%",
            ),
            (
                "scheduling.k8s.io/v1",
                "PriorityClass",
                json!({"value": 1_000_000_001}),
                "value: Forbidden: maximum allowed value of a user defined priority is 1000000000",
            ),
            (
                "v1",
                "LimitRange",
                json!({"spec": {"limits": [{"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "1"}, "default": {"cpu": "2"}, "defaultRequest": {"cpu": "2"}}]}}),
                "spec.limits[0].min[cpu]: Invalid value: \"2\": min value 2 is greater than max value 1",
            ),
            (
                "autoscaling/v2",
                "HorizontalPodAutoscaler",
                json!({"spec": {"minReplicas": 3, "maxReplicas": 2, "scaleTargetRef": {"kind": "Deployment", "name": "a"}}}),
                "spec.maxReplicas: Invalid value: 2: must be greater than or equal to `minReplicas`",
            ),
            (
                "v1",
                "ResourceQuota",
                json!({"spec": {"hard": {"pods": "-1"}}}),
                "spec.hard[pods]: Invalid value: \"-1\": must be greater than or equal to 0",
            ),
        ];
        for (api_version, kind, object, expected) in cases {
            let errors = errors(api_version, kind, object);
            assert!(errors.iter().any(|e| e == expected), "{kind}: {errors:?}");
        }
    }

    #[test]
    fn what_is_right_is_taken() {
        for (name, value) in SYSTEM_PRIORITIES {
            let class = json!({"metadata": {"name": name}, "value": value});
            assert!(errors("scheduling.k8s.io/v1", "PriorityClass", class).is_empty());
        }
        let class = json!({"metadata": {"name": "system-mine"}, "value": 1});
        assert_eq!(
            errors("scheduling.k8s.io/v1", "PriorityClass", class).len(),
            1
        );
        let quota = json!({"spec": {"hard": {"pods": "2", "requests.cpu": "1500m"}}});
        assert_eq!(errors("v1", "ResourceQuota", quota), Vec::<String>::new());
    }
}

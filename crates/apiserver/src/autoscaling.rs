//! The two versions of HorizontalPodAutoscaler: `autoscaling/v2` is stored, `autoscaling/v1` is made from it.
//!
//! Version 1 has one field for the use of the CPU. What else an autoscaler has is kept in annotations,
//! as upstream keeps it, so that an object comes back whole from a client of version 1.

use hypernetes_apimachinery::{ResourceKind, meta};
use serde_json::{Map, Value, json};

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const CURRENT: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const TARGET: &str = "targetCPUUtilizationPercentage";
const USE: &str = "currentCPUUtilizationPercentage";

/// Names of a metric's values: where they are in version 2, and what they are called in version 1.
const VALUES: [(&str, &str, &str); 3] = [
    (
        "averageUtilization",
        "targetAverageUtilization",
        "currentAverageUtilization",
    ),
    ("averageValue", "targetAverageValue", "currentAverageValue"),
    ("value", "targetValue", "currentValue"),
];

/// Whether objects of the kind are stored in another form.
pub(crate) fn is_view(kind: &ResourceKind) -> bool {
    kind.group == "autoscaling" && kind.version == "v1"
}

/// From what clients of version 1 send to what is stored.
pub(crate) fn to_stored(mut object: Value) -> Value {
    object["apiVersion"] = "autoscaling/v2".into();
    let metrics = taken(&mut object, METRICS);
    let behavior = taken(&mut object, BEHAVIOR);
    let conditions = taken(&mut object, CONDITIONS);
    let current = taken(&mut object, CURRENT);
    if let Some(spec) = object["spec"].as_object_mut() {
        let target = spec.remove(TARGET).filter(|value| !value.is_null());
        let mut all: Vec<Value> = metrics
            .as_ref()
            .map(|list| metrics_of(list, true))
            .unwrap_or_default();
        all.extend(target.map(|percent| {
            json!({"type": "Resource", "resource": {"name": "cpu",
                "target": {"type": "Utilization", "averageUtilization": percent}}})
        }));
        if !all.is_empty() {
            spec.insert("metrics".into(), all.into());
        }
        if let Some(behavior) = behavior {
            spec.insert("behavior".into(), behavior);
        }
    }
    if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
        let used = status.remove(USE).filter(|value| !value.is_null());
        let mut all: Vec<Value> = current
            .as_ref()
            .map(|list| metrics_of(list, false))
            .unwrap_or_default();
        all.extend(used.map(|percent| {
            json!({"type": "Resource", "resource": {"name": "cpu",
                "current": {"averageUtilization": percent}}})
        }));
        if !all.is_empty() {
            status.insert("currentMetrics".into(), all.into());
        }
        if let Some(conditions) = conditions {
            status.insert("conditions".into(), conditions);
        }
    }
    object
}

/// From what is stored to what clients of version 1 see.
pub(crate) fn to_view(mut object: Value) -> Value {
    object["apiVersion"] = "autoscaling/v1".into();
    object["kind"] = "HorizontalPodAutoscaler".into();
    let mut notes: Vec<(&str, Value)> = Vec::new();
    if let Some(spec) = object["spec"].as_object_mut() {
        let (percent, others) = split(spec.remove("metrics"), "target");
        if let Some(percent) = percent {
            spec.insert(TARGET.into(), percent);
        }
        if !others.is_empty() {
            notes.push((METRICS, flat(&others, true).into()));
        }
        if let Some(behavior) = spec.remove("behavior").filter(|value| !value.is_null()) {
            notes.push((BEHAVIOR, behavior));
        }
    }
    if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
        let (percent, others) = split(status.remove("currentMetrics"), "current");
        if let Some(percent) = percent {
            status.insert(USE.into(), percent);
        }
        if !others.is_empty() {
            notes.push((CURRENT, flat(&others, false).into()));
        }
        if let Some(conditions) = status.remove("conditions").filter(|value| !value.is_null()) {
            notes.push((CONDITIONS, conditions));
        }
        // Version 1 requires them.
        for field in ["currentReplicas", "desiredReplicas"] {
            status.entry(field).or_insert_with(|| 0.into());
        }
    }
    for (name, value) in notes {
        meta::set_annotation(&mut object, name, &value.to_string());
    }
    object
}

/// The JSON in an annotation, which goes.
fn taken(object: &mut Value, name: &str) -> Option<Value> {
    let notes = object["metadata"].get_mut("annotations")?.as_object_mut()?;
    let text = notes.remove(name)?;
    if notes.is_empty()
        && let Some(metadata) = object["metadata"].as_object_mut()
    {
        metadata.remove("annotations");
    }
    serde_json::from_str(text.as_str()?).ok()
}

/// The use of the CPU, which version 1 has a field for, and the other metrics.
fn split(metrics: Option<Value>, part: &str) -> (Option<Value>, Vec<Value>) {
    let Some(Value::Array(metrics)) = metrics else {
        return (None, Vec::new());
    };
    let (mut percent, mut others) = (None, Vec::new());
    for metric in metrics {
        let resource = &metric["resource"];
        let used = &resource[part]["averageUtilization"];
        if percent.is_none()
            && metric["type"] == "Resource"
            && resource["name"] == "cpu"
            && used.is_i64()
        {
            percent = Some(used.clone());
        } else {
            others.push(metric);
        }
    }
    (percent, others)
}

/// The field in which a metric of a type is described.
fn source(metric: &Value) -> Option<&'static str> {
    Some(match metric["type"].as_str()? {
        "Resource" => "resource",
        "ContainerResource" => "containerResource",
        "Pods" => "pods",
        "Object" => "object",
        "External" => "external",
        _ => return None,
    })
}

/// Metrics in the form of version 1: values are fields of the metric itself.
fn flat(metrics: &[Value], spec: bool) -> Vec<Value> {
    let part = if spec { "target" } else { "current" };
    let one = |metric: &Value| -> Option<Value> {
        let field = source(metric)?;
        let mut out = metric[field].as_object()?.clone();
        let values = out.remove(part).unwrap_or_default();
        for (name, target, current) in VALUES {
            if let Some(value) = values.get(name) {
                let name = if spec { target } else { current };
                out.insert(renamed(field, name).into(), value.clone());
            }
        }
        if let Some(Value::Object(named)) = out.remove("metric") {
            for (from, to) in [("name", "metricName"), ("selector", selector_name(field))] {
                if let Some(value) = named.get(from) {
                    out.insert(to.into(), value.clone());
                }
            }
        }
        if let Some(described) = out.remove("describedObject") {
            out.insert("target".into(), described);
        }
        Some(json!({"type": metric["type"], field: out}))
    };
    metrics.iter().filter_map(one).collect()
}

/// Objects call an average otherwise than the other metrics do.
fn renamed<'a>(field: &str, name: &'a str) -> &'a str {
    match (field, name) {
        ("object", "targetAverageValue" | "currentAverageValue") => "averageValue",
        (_, name) => name,
    }
}

fn selector_name(field: &str) -> &'static str {
    if field == "external" {
        "metricSelector"
    } else {
        "selector"
    }
}

/// Metrics in the form of version 2.
fn metrics_of(list: &Value, spec: bool) -> Vec<Value> {
    let part = if spec { "target" } else { "current" };
    let one = |metric: &Value| -> Option<Value> {
        let field = source(metric)?;
        let mut out = metric[field].as_object()?.clone();
        let mut named = Map::new();
        for (from, to) in [("metricName", "name"), (selector_name(field), "selector")] {
            if let Some(value) = out.remove(from) {
                named.insert(to.into(), value);
            }
        }
        if let Some(described) = out.remove("target") {
            out.insert("describedObject".into(), described);
        }
        if !named.is_empty() {
            out.insert("metric".into(), named.into());
        }
        let mut values = Map::new();
        for (name, target, current) in VALUES {
            let old = renamed(field, if spec { target } else { current });
            if let Some(value) = out.remove(old) {
                values.insert(name.into(), value);
            }
        }
        if spec {
            let kind = match values.keys().next().map(String::as_str) {
                Some("averageUtilization") => "Utilization",
                Some("averageValue") => "AverageValue",
                _ => "Value",
            };
            values.insert("type".into(), kind.into());
        }
        out.insert(part.into(), values.into());
        Some(json!({"type": metric["type"], field: out}))
    };
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(one)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_autoscaler_survives_the_way_there_and_back() {
        let stored = json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "a", "annotations": {"mine": "1"}},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
                "minReplicas": 1, "maxReplicas": 3,
                "metrics": [
                    {"type": "Resource", "resource": {"name": "memory",
                        "target": {"type": "AverageValue", "averageValue": "64Mi"}}},
                    {"type": "Pods", "pods": {"metric": {"name": "requests", "selector": {"matchLabels": {"a": "b"}}},
                        "target": {"type": "AverageValue", "averageValue": "10"}}},
                    {"type": "Object", "object": {"metric": {"name": "queue"},
                        "describedObject": {"kind": "Service", "name": "q"},
                        "target": {"type": "Value", "value": "5"}}},
                    {"type": "External", "external": {"metric": {"name": "e", "selector": {"matchLabels": {"c": "d"}}},
                        "target": {"type": "AverageValue", "averageValue": "7"}}},
                    {"type": "Resource", "resource": {"name": "cpu",
                        "target": {"type": "Utilization", "averageUtilization": 50}}},
                ],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}},
            },
            "status": {
                "currentReplicas": 1, "desiredReplicas": 2,
                "conditions": [{"type": "AbleToScale", "status": "True"}],
                "currentMetrics": [{"type": "Resource", "resource": {"name": "cpu",
                    "current": {"averageUtilization": 70, "averageValue": "70m"}}}],
            },
        });
        let view = to_view(stored.clone());
        assert_eq!(view["apiVersion"], "autoscaling/v1");
        assert_eq!(view["spec"][TARGET], 50);
        assert_eq!(view["status"][USE], 70);
        assert!(view["spec"].get("metrics").is_none());
        let notes = view["metadata"]["annotations"].as_object().unwrap();
        assert_eq!(notes.len(), 4, "{notes:?}");
        let mut expected = stored;
        // What version 1 has a field for is a number there and nothing else.
        expected["status"]["currentMetrics"][0]["resource"]["current"] =
            json!({"averageUtilization": 70});
        assert_eq!(to_stored(view), expected);
    }

    #[test]
    fn what_a_client_of_version_1_makes_has_one_metric() {
        let view = json!({"metadata": {"name": "a"}, "spec": {"maxReplicas": 3, (TARGET): 80}});
        let stored = to_stored(view);
        assert_eq!(stored["spec"]["metrics"].as_array().map(Vec::len), Some(1));
        assert!(stored["spec"].get(TARGET).is_none());
        assert!(stored.get("status").is_none());
    }
}

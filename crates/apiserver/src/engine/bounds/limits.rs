//! Limit ranges: what containers get if they name nothing, and what they may name.

use hypernetes_apimachinery::{
    Quantity, meta,
    quota::{amounts, of_pod, quantity, show},
};
use serde_json::{Map, Value, json};

const ANNOTATION: &str = "kubernetes.io/limit-ranger";

fn items<'a>(ranges: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    ranges
        .iter()
        .flat_map(|range| range["spec"]["limits"].as_array().into_iter().flatten())
        .filter(move |item| item["type"] == kind)
}

/// Gives containers what the ranges say for those that say nothing.
pub(super) fn complete(ranges: &[Value], pod: &mut Value) {
    let (mut limits, mut requests) = (Map::new(), Map::new());
    for item in items(ranges, "Container") {
        for (field, defaults) in [("default", &mut limits), ("defaultRequest", &mut requests)] {
            for (name, value) in item[field].as_object().into_iter().flatten() {
                defaults.insert(name.clone(), value.clone());
            }
        }
    }
    if limits.is_empty() && requests.is_empty() {
        return;
    }
    let mut notes = Vec::new();
    for (list, word) in [
        ("containers", "container"),
        ("initContainers", "init container"),
    ] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers {
            let owner = format!("{word} {}", container["name"].as_str().unwrap_or_default());
            for (field, word, defaults) in [
                ("requests", "request", &requests),
                ("limits", "limit", &limits),
            ] {
                let given = fill(&mut container["resources"], field, defaults);
                if !given.is_empty() {
                    notes.push(format!("{} {word} for {owner}", given.join(", ")));
                }
            }
        }
    }
    if !notes.is_empty() {
        let note = format!("LimitRanger plugin set: {}", notes.join("; "));
        meta::set_annotation(pod, ANNOTATION, &note);
    }
}

/// Sets what is absent; which names these were.
fn fill(resources: &mut Value, field: &str, defaults: &Map<String, Value>) -> Vec<String> {
    let mut given = Vec::new();
    if defaults.is_empty() {
        return given;
    }
    if !resources.is_object() {
        *resources = json!({});
    }
    if !resources[field].is_object() {
        resources[field] = json!({});
    }
    for (name, value) in defaults {
        if resources[field].get(name).is_none() {
            resources[field][name] = value.clone();
            given.push(name.clone());
        }
    }
    given
}

/// Everything that breaks a bound, as upstream puts it.
pub(super) fn check(ranges: &[Value], pod: &Value) -> Result<(), String> {
    let mut errors = Vec::new();
    for item in items(ranges, "Container") {
        for list in ["containers", "initContainers"] {
            for container in pod["spec"][list].as_array().into_iter().flatten() {
                let resources = &container["resources"];
                one(
                    item,
                    &resources["requests"],
                    &resources["limits"],
                    &mut errors,
                );
            }
        }
    }
    for item in items(ranges, "Pod") {
        let whole =
            |field: &str| hypernetes_apimachinery::quota::to_value(&of_pod(&pod["spec"], field));
        one(item, &whole("requests"), &whole("limits"), &mut errors);
    }
    match errors.as_slice() {
        [] => Ok(()),
        [only] => Err(only.clone()),
        all => Err(format!("[{}]", all.join(", "))),
    }
}

fn one(item: &Value, requests: &Value, limits: &Value, errors: &mut Vec<String>) {
    let kind = item["type"].as_str().unwrap_or_default();
    let get = |map: &Value, name: &str| -> Option<Quantity> { quantity(map.get(name)?) };
    for (name, least) in amounts(&item["min"]) {
        let head = format!("minimum {name} usage per {kind} is {}", show(&name, least));
        match (get(requests, &name), get(limits, &name)) {
            (None, _) => errors.push(format!("{head}. No request is specified")),
            (Some(request), _) if request < least => {
                errors.push(format!("{head}, but request is {}", show(&name, request)));
            }
            (_, Some(limit)) if limit < least => {
                errors.push(format!("{head}, but limit is {}", show(&name, limit)));
            }
            _ => {}
        }
    }
    for (name, most) in amounts(&item["max"]) {
        let head = format!("maximum {name} usage per {kind} is {}", show(&name, most));
        match (get(requests, &name), get(limits, &name)) {
            (_, None) => errors.push(format!("{head}. No limit is specified")),
            (_, Some(limit)) if limit > most => {
                errors.push(format!("{head}, but limit is {}", show(&name, limit)));
            }
            (Some(request), _) if request > most => {
                errors.push(format!("{head}, but request is {}", show(&name, request)));
            }
            _ => {}
        }
    }
    for (name, ratio) in amounts(&item["maxLimitRequestRatio"]) {
        let head = format!("{name} max limit to request ratio per {kind} is {ratio}");
        let zero = Quantity::default();
        match (get(requests, &name), get(limits, &name)) {
            (Some(request), Some(limit)) if request > zero && limit > zero => {
                // Thousandths: a ratio is a small number.
                let is = i128::from(limit.milli_value()) * 1000 / i128::from(request.milli_value());
                if is > i128::from(ratio.milli_value()) {
                    let (whole, part) = (is / 1000, is % 1000);
                    errors.push(format!(
                        "{head}, but provided ratio is {whole}.{part:03}000"
                    ));
                }
            }
            (None, _) => errors.push(format!(
                "{head}, but no request is specified or request is 0"
            )),
            _ => errors.push(format!("{head}, but no limit is specified or limit is 0")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(item: &Value) -> Vec<Value> {
        vec![json!({"spec": {"limits": [item]}})]
    }

    fn pod(resources: &Value) -> Value {
        json!({"metadata": {}, "spec": {"containers": [{"name": "a", "resources": resources}]}})
    }

    #[test]
    fn containers_get_what_they_do_not_name() {
        let ranges = range(
            &json!({"type": "Container", "default": {"cpu": "1"}, "defaultRequest": {"cpu": "100m"}}),
        );
        let mut empty = pod(&json!({}));
        complete(&ranges, &mut empty);
        assert_eq!(
            empty["spec"]["containers"][0]["resources"],
            json!({"limits": {"cpu": "1"}, "requests": {"cpu": "100m"}})
        );
        assert_eq!(
            empty["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu request for container a; cpu limit for container a"
        );
        let own = pod(&json!({"limits": {"cpu": "2"}, "requests": {"cpu": "2"}}));
        let mut same = own.clone();
        complete(&ranges, &mut same);
        assert_eq!(own, same);
    }

    #[test]
    fn bounds_are_refused_in_upstreams_words() {
        let cases = [
            (
                json!({"max": {"cpu": "1"}}),
                json!({"limits": {"cpu": "2"}}),
                "maximum cpu usage per Container is 1, but limit is 2",
            ),
            (
                json!({"max": {"cpu": "1"}}),
                json!({}),
                "maximum cpu usage per Container is 1. No limit is specified",
            ),
            (
                json!({"min": {"cpu": "1"}}),
                json!({"requests": {"cpu": "500m"}}),
                "minimum cpu usage per Container is 1, but request is 500m",
            ),
            (
                json!({"max": {"cpu": "1", "memory": "1Gi"}}),
                json!({"limits": {"cpu": "2", "memory": "2Gi"}}),
                "[maximum cpu usage per Container is 1, but limit is 2, maximum memory usage per Container is 1Gi, but limit is 2Gi]",
            ),
            (
                json!({"maxLimitRequestRatio": {"cpu": "2"}}),
                json!({"limits": {"cpu": "3"}, "requests": {"cpu": "1"}}),
                "cpu max limit to request ratio per Container is 2, but provided ratio is 3.000000",
            ),
        ];
        for (mut item, resources, expected) in cases {
            item["type"] = "Container".into();
            let error = check(&range(&item), &pod(&resources)).unwrap_err();
            assert_eq!(error, expected);
        }
        let whole = range(&json!({"type": "Pod", "max": {"cpu": "1"}}));
        let two = json!({"spec": {"containers": [{"resources": {"limits": {"cpu": "600m"}}}, {"resources": {"limits": {"cpu": "600m"}}}]}});
        assert_eq!(
            check(&whole, &two).unwrap_err(),
            "maximum cpu usage per Pod is 1, but limit is 1200m"
        );
    }
}

//! Rules of the parts of a pod that have a subresource of their own: ephemeral containers and the
//! resources of running ones.

use std::collections::HashSet;

use serde_json::Value;

use crate::Quantity;

use super::{ErrorKind, Found, Path, container, items, text};

/// Fields that mean nothing to a container that is added to look around.
const NOT_EPHEMERAL: [&str; 9] = [
    "ports",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
    "resources",
    "resizePolicy",
    "restartPolicy",
    "restartPolicyRules",
];

/// Rules of a pod's ephemeral containers.
pub(super) fn ephemeral(spec: &Value, path: &Path, volumes: &HashSet<String>, found: &mut Found) {
    let names = |field: &str| {
        let list = spec[field].as_array().into_iter().flatten();
        list.map(|container| text(container, "name").to_owned())
            .collect::<HashSet<_>>()
    };
    let (main, init) = (names("containers"), names("initContainers"));
    let mut seen = HashSet::new();
    let list = items(
        &spec["ephemeralContainers"],
        &path.field("ephemeralContainers"),
    );
    for (given, at) in list {
        let mut plain = given.clone();
        if let Some(fields) = plain.as_object_mut() {
            for field in NOT_EPHEMERAL {
                let set = fields.remove(field).is_some_and(|value| match value {
                    Value::Null => false,
                    Value::Array(list) => !list.is_empty(),
                    Value::Object(map) => !map.is_empty(),
                    _ => true,
                });
                if set {
                    found.forbidden(&at.field(field), "cannot be set for an Ephemeral Container");
                }
            }
        }
        container::validate(&plain, &at, volumes, false, found);
        let name = text(given, "name");
        let taken = main.contains(name) || init.contains(name);
        if !name.is_empty() && (taken || !seen.insert(name)) {
            found.duplicate(&at.field("name"), &given["name"]);
        }
        let target = text(given, "targetContainerName");
        if !target.is_empty() && !main.contains(target) && !init.contains(target) {
            found.add(
                ErrorKind::NotFound,
                &at.field("targetContainerName"),
                &given["targetContainerName"],
                "",
            );
        }
        for (mount, at) in items(&given["volumeMounts"], &at.field("volumeMounts")) {
            for field in ["subPath", "subPathExpr"] {
                if !text(mount, field).is_empty() {
                    found.forbidden(&at.field(field), "cannot be set for an Ephemeral Container");
                }
            }
        }
    }
}

/// Ephemeral containers are only ever added.
pub(super) fn ephemeral_update(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("spec").field("ephemeralContainers");
    let empty = Vec::new();
    let list = |pod: &Value| {
        pod["spec"]["ephemeralContainers"]
            .as_array()
            .unwrap_or(&empty)
            .clone()
    };
    let now = list(new);
    for before in list(old) {
        let name = text(&before, "name").to_owned();
        match now.iter().find(|container| text(container, "name") == name) {
            None => found.forbidden(
                &path,
                format!("existing ephemeral containers {name:?} may not be removed\n"),
            ),
            Some(container) if *container != before => found.forbidden(
                &path,
                format!("existing ephemeral containers {name:?} may not be changed\n"),
            ),
            Some(_) => {}
        }
    }
}

/// Rules of the resources of a whole pod.
pub(super) fn pod_resources(spec: &Value, path: &Path, found: &mut Found) {
    if !spec["resources"].is_object() {
        return;
    }
    let at = path.field("resources");
    container::resources(&spec["resources"], &at, found);
    for name in ["cpu", "memory"] {
        let limit = amount(spec, "limits", name);
        let request = amount(spec, "requests", name);
        let mut sum = 0i64;
        for field in ["containers", "initContainers"] {
            for (container, at) in items(&spec[field], &path.field(field)) {
                let own = amount(container, "limits", name);
                if let (Some(own), Some(limit)) = (own, limit)
                    && own > limit
                {
                    found.invalid(
                        &at.field("resources").field("limits"),
                        &container["resources"]["limits"][name],
                        format!(
                            "must be less than or equal to pod limits of {}",
                            shown(&spec["resources"]["limits"][name])
                        ),
                    );
                }
                let lasts = field == "containers" || text(container, "restartPolicy") == "Always";
                if let (Some(own), true) = (amount(container, "requests", name), lasts) {
                    sum = sum.saturating_add(own.milli_value());
                }
            }
        }
        if let Some(request) = request
            && request.milli_value() < sum
        {
            found.invalid(
                &at.field("requests").key(name),
                &spec["resources"]["requests"][name],
                format!("must be greater than or equal to aggregate container requests of {sum}m"),
            );
        }
    }
}

fn shown(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn amount(container: &Value, list: &str, name: &str) -> Option<Quantity> {
    match &container["resources"][list][name] {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

/// Rules of a resize: amounts may change, what they are of may not, and neither may the quality of service.
pub(super) fn resize_update(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("spec");
    if new["spec"]["resources"] != old["spec"]["resources"] {
        found.forbidden(
            &path.field("resources"),
            "the resources of a whole pod cannot be resized on this node",
        );
    }
    for field in ["containers", "initContainers"] {
        for (container, at) in items(&new["spec"][field], &path.field(field)) {
            let before = old["spec"][field]
                .as_array()
                .into_iter()
                .flatten()
                .find(|before| before["name"] == container["name"]);
            let Some(before) = before else {
                found.forbidden(&at, "containers may not be added by a resize");
                continue;
            };
            let at = at.field("resources");
            if before["resources"] == container["resources"] {
                continue;
            }
            let sidecar = text(container, "restartPolicy") == "Always";
            if field == "initContainers" && !sidecar {
                found.forbidden(
                    &at,
                    "cannot be set for non-restartable init containers by a resize",
                );
                continue;
            }
            for list in ["limits", "requests"] {
                for name in ["cpu", "memory"] {
                    let was = amount(before, list, name);
                    let is = amount(container, list, name);
                    if was.is_some() && is.is_none() {
                        let list = list.trim_end_matches('s');
                        found.forbidden(
                            &at.field(&format!("{list}s")),
                            format!("resource {list}s cannot be removed"),
                        );
                    }
                }
                let others = |container: &Value| {
                    let mut map = container["resources"][list].as_object().cloned();
                    if let Some(map) = &mut map {
                        map.remove("cpu");
                        map.remove("memory");
                    }
                    map.unwrap_or_default()
                };
                if others(before) != others(container) {
                    found.forbidden(&at.field(list), "only cpu and memory resources are mutable");
                }
            }
        }
    }
    let class = |pod: &Value| quality_of_service(&pod["spec"]);
    if class(new) != class(old) {
        found.invalid(
            &path,
            &class(new).into(),
            "Pod QOS Class may not change as a result of resizing",
        );
    }
}

/// A pod's quality of service, from the resources of its containers.
pub fn quality_of_service(spec: &Value) -> &'static str {
    let containers = ["containers", "initContainers"]
        .into_iter()
        .flat_map(|field| spec[field].as_array().into_iter().flatten());
    // What is said of the whole pod is what counts.
    let whole = spec["resources"]
        .as_object()
        .is_some_and(|fields| fields.values().any(|list| !list.is_null()));
    let containers: Vec<&Value> = match whole {
        true => vec![spec],
        false => containers.collect(),
    };
    let (mut any, mut all) = (false, true);
    for container in containers {
        for name in ["cpu", "memory"] {
            let request = amount(container, "requests", name);
            let limit = amount(container, "limits", name);
            any |= request.is_some() || limit.is_some();
            all &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "json! makes values")]
mod tests {
    use serde_json::json;

    use super::*;

    fn details(check: impl FnOnce(&mut Found)) -> Vec<String> {
        let mut found = Found::default();
        check(&mut found);
        let errors = found.errors.iter();
        errors
            .map(|error| format!("{}: {}", error.field, error.detail))
            .collect()
    }

    #[test]
    fn ephemeral_containers_are_checked_and_only_added() {
        let pod = |list: Value| json!({"spec": {"containers": [{"name": "c"}], "ephemeralContainers": list}});
        let debug = json!({"name": "d", "image": "busybox", "imagePullPolicy": "Always",
            "terminationMessagePolicy": "File", "targetContainerName": "c", "resources": {}});
        let check = |list: Value| {
            let pod = pod(list);
            details(|found| ephemeral(&pod["spec"], &Path::root("spec"), &HashSet::new(), found))
        };
        assert_eq!(check(json!([debug])), Vec::<String>::new());
        let mut bad = debug.clone();
        bad["name"] = "c".into();
        bad["targetContainerName"] = "x".into();
        bad["livenessProbe"] = json!({"exec": {"command": ["a"]}});
        let found = check(json!([bad]));
        for part in [
            "[0].livenessProbe: cannot",
            "[0].name: ",
            "[0].targetContainerName: ",
        ] {
            assert!(
                found.iter().any(|line| line.contains(part)),
                "{part}: {found:?}"
            );
        }
        let update = |new: Value, old: Value| {
            details(|found| ephemeral_update(&pod(new), &pod(old), found)).len()
        };
        assert_eq!(update(json!([debug]), json!([])), 0);
        assert_eq!(update(json!([]), json!([debug])), 1);
        let mut changed = debug.clone();
        changed["image"] = "other".into();
        assert_eq!(update(json!([changed]), json!([debug])), 1);
    }

    #[test]
    fn a_whole_pods_resources_hold_those_of_its_containers() {
        let spec = |limits: Value, requests: Value| {
            json!({"resources": {"limits": limits, "requests": requests}, "containers": [
                {"name": "a", "resources": {"limits": {"memory": "64Mi"}, "requests": {"cpu": "100m"}}},
                {"name": "b", "resources": {"requests": {"cpu": "200m"}}}]})
        };
        let check = |spec: &Value| details(|found| pod_resources(spec, &Path::root("spec"), found));
        let good = spec(json!({"cpu": "1", "memory": "1Gi"}), json!({"cpu": "300m"}));
        assert_eq!(check(&good), Vec::<String>::new());
        assert_eq!(quality_of_service(&good), "Burstable");
        let small = check(&spec(json!({"memory": "32Mi"}), json!({})));
        assert_eq!(
            small,
            [
                "spec.containers[0].resources.limits: must be less than or equal to pod limits of 32Mi"
            ]
        );
        let little = check(&spec(json!({}), json!({"cpu": "250m"})));
        assert_eq!(
            little,
            [
                "spec.resources.requests[cpu]: must be greater than or equal to aggregate container \
              requests of 300m"
            ]
        );
        let both = json!({"cpu": "1", "memory": "1Gi"});
        assert_eq!(quality_of_service(&spec(both.clone(), both)), "Guaranteed");
    }

    #[test]
    fn a_resize_changes_amounts_only() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"name": "c", "resources": resources}]}});
        let old = pod(json!({"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}}));
        for (resources, finding) in [
            (
                json!({"requests": {"cpu": "200m"}, "limits": {"memory": "32Mi"}}),
                None,
            ),
            (
                json!({"requests": {"cpu": "200m"}}),
                Some("spec.containers[0].resources.limits: resource limits cannot be removed"),
            ),
            (
                json!({"requests": {"cpu": "100m"},
                    "limits": {"memory": "64Mi", "ephemeral-storage": "1Gi"}}),
                Some("spec.containers[0].resources.limits: only cpu and memory"),
            ),
            (
                json!({"requests": {"cpu": "1", "memory": "64Mi"},
                    "limits": {"cpu": "1", "memory": "64Mi"}}),
                Some("spec: Pod QOS Class may not change"),
            ),
        ] {
            let new = pod(resources);
            let found = details(|found| resize_update(&new, &old, found));
            match finding {
                None => assert_eq!(found, Vec::<String>::new()),
                Some(text) => assert!(found[0].starts_with(text), "{found:?}"),
            }
        }
    }
}

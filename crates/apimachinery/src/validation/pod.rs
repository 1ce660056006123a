//! Rules of pods.

use std::collections::HashSet;

use serde_json::Value;

use crate::meta::rules;

use super::{ErrorKind, Found, Path, container, items, meta, parts, storage, text, volume};

pub(super) fn validate(pod: &Value, found: &mut Found) {
    validate_spec(&pod["spec"], &Path::root("spec"), found);
}

/// The spec of a pod, or of a template for pods.
pub(super) fn validate_spec(spec: &Value, path: &Path, found: &mut Found) {
    if !spec.is_object() {
        found.required(&path.field("containers"), "");
        return;
    }
    let volumes = volume::validate(&spec["volumes"], &path.field("volumes"), found);
    containers(spec, path, &volumes, found);
    storage::devices(spec, path, &volumes, found);
    parts::ephemeral(spec, path, &volumes, found);
    parts::pod_resources(spec, path, found);
    gates(spec, path, found);

    found.one_of(
        &path.field("restartPolicy"),
        &spec["restartPolicy"],
        &["Always", "OnFailure", "Never"],
    );
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    found.one_of(&path.field("dnsPolicy"), &spec["dnsPolicy"], &policies);
    dns_config(spec, path, found);
    found.not_negative(
        &path.field("terminationGracePeriodSeconds"),
        &spec["terminationGracePeriodSeconds"],
    );
    if let Some(deadline) = spec["activeDeadlineSeconds"].as_i64()
        && !(1..=i64::from(i32::MAX)).contains(&deadline)
    {
        found.invalid(
            &path.field("activeDeadlineSeconds"),
            &spec["activeDeadlineSeconds"],
            "must be between 1 and 2147483647, inclusive",
        );
    }
    meta::labels(&spec["nodeSelector"], &path.field("nodeSelector"), found);
    for field in [
        "nodeName",
        "serviceAccountName",
        "runtimeClassName",
        "priorityClassName",
    ] {
        let name = text(spec, field);
        if !name.is_empty() {
            found.all_invalid(&path.field(field), name, rules::subdomain(name));
        }
    }
    for field in ["hostname", "subdomain"] {
        let name = text(spec, field);
        if !name.is_empty() {
            found.all_invalid(&path.field(field), name, rules::label(name));
        }
    }
    let context = path.field("securityContext");
    container::ids(&spec["securityContext"], &context, found);
    for (group, at) in items(
        &spec["securityContext"]["supplementalGroups"],
        &context.field("supplementalGroups"),
    ) {
        container::id(group, &at, found);
    }
    tolerations(&spec["tolerations"], &path.field("tolerations"), found);
    for (secret, at) in items(&spec["imagePullSecrets"], &path.field("imagePullSecrets")) {
        if text(secret, "name").is_empty() {
            found.required(&at.field("name"), "");
        }
    }
    for (alias, at) in items(&spec["hostAliases"], &path.field("hostAliases")) {
        if text(alias, "ip").parse::<std::net::IpAddr>().is_err() {
            found.invalid(
                &at.field("ip"),
                &alias["ip"],
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            );
        }
        for (name, at) in items(&alias["hostnames"], &at.field("hostnames")) {
            let name = name.as_str().unwrap_or_default();
            found.all_invalid(&at, name, rules::subdomain(name));
        }
    }
}

fn containers(spec: &Value, path: &Path, volumes: &HashSet<String>, found: &mut Found) {
    let mut names: HashSet<&str> = HashSet::new();
    let host_network = spec["hostNetwork"] == true;
    let ordinary = path.field("containers");
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        found.required(&ordinary, "");
    }
    let all = items(&spec["containers"], &ordinary)
        .map(|(container, at)| (container, at, false))
        .chain(
            items(&spec["initContainers"], &path.field("initContainers"))
                .map(|(container, at)| (container, at, true)),
        );
    for (container, at, init) in all {
        container::validate(container, &at, volumes, host_network, found);
        if init {
            container::init(container, &at, found);
        }
        let name = text(container, "name");
        if !name.is_empty() && !names.insert(name) {
            found.duplicate(&at.field("name"), &container["name"]);
        }
    }
}

fn gates(spec: &Value, path: &Path, found: &mut Found) {
    for (gate, at) in items(&spec["readinessGates"], &path.field("readinessGates")) {
        let name = text(gate, "conditionType");
        found.all_invalid(
            &at.field("conditionType"),
            name,
            rules::qualified_name(name),
        );
    }
    let mut names = HashSet::new();
    for (gate, at) in items(&spec["schedulingGates"], &path.field("schedulingGates")) {
        let name = text(gate, "name");
        found.all_invalid(&at.field("name"), name, rules::qualified_name(name));
        if !names.insert(name) {
            found.duplicate(&at.field("name"), &gate["name"]);
        }
    }
    if !names.is_empty() && !text(spec, "nodeName").is_empty() {
        found.forbidden(
            &path.field("nodeName"),
            "cannot be set until all schedulingGates have been cleared",
        );
    }
}

fn dns_config(spec: &Value, path: &Path, found: &mut Found) {
    let at = path.field("dnsConfig");
    let config = &spec["dnsConfig"];
    let servers = config["nameservers"].as_array().map_or(0, Vec::len);
    if text(spec, "dnsPolicy") == "None" && servers == 0 {
        found.required(
            &at.field("nameservers"),
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        );
    }
    if servers > 3 {
        found.invalid(
            &at.field("nameservers"),
            &config["nameservers"],
            "must not have more than 3 nameservers",
        );
    }
    for (server, at) in items(&config["nameservers"], &at.field("nameservers")) {
        if server
            .as_str()
            .unwrap_or_default()
            .parse::<std::net::IpAddr>()
            .is_err()
        {
            found.invalid(
                &at,
                server,
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            );
        }
    }
    for (option, at) in items(&config["options"], &at.field("options")) {
        if text(option, "name").is_empty() {
            found.required(&at.field("name"), "");
        }
    }
}

fn tolerations(list: &Value, path: &Path, found: &mut Found) {
    for (toleration, at) in items(list, path) {
        let (key, operator, effect) = (
            text(toleration, "key"),
            text(toleration, "operator"),
            text(toleration, "effect"),
        );
        if !key.is_empty() {
            found.all_invalid(&at.field("key"), key, rules::qualified_name(key));
        } else if operator != "Exists" {
            found.invalid(
                &at.field("operator"),
                &operator.into(),
                "operator must be Exists when `key` is empty, which means \"match all values and \
                 all keys\"",
            );
        }
        if toleration["tolerationSeconds"].is_i64() && effect != "NoExecute" {
            found.invalid(
                &at.field("effect"),
                &effect.into(),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
        match operator {
            "" | "Equal" => {
                let value = text(toleration, "value");
                found.all_invalid(&at.field("operator"), value, rules::label_value(value));
            }
            "Exists" => {
                if !text(toleration, "value").is_empty() {
                    found.invalid(
                        &at.field("operator"),
                        toleration,
                        "value must be empty when `operator` is 'Exists'",
                    );
                }
            }
            _ => found.not_supported(
                &at.field("operator"),
                &toleration["operator"],
                &["Equal", "Exists"],
            ),
        }
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        if !effect.is_empty() && !effects.contains(&effect) {
            found.not_supported(&at.field("effect"), &toleration["effect"], &effects);
        }
    }
}

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,\
    `spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),\
    `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub(super) fn validate_update(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("spec");
    for field in ["containers", "initContainers"] {
        let count = |pod: &Value| pod["spec"][field].as_array().map_or(0, Vec::len);
        if count(new) != count(old) {
            found.forbidden(
                &path.field(field),
                "pod updates may not add or remove containers",
            );
            return;
        }
        for (container, at) in items(&new["spec"][field], &path.field(field)) {
            if text(container, "image").is_empty() {
                found.required(&at.field("image"), "");
            }
        }
    }
    deadline(new, old, &path, found);
    // What may change is taken from the old one; the rest must be the same.
    let mut masked = new["spec"].clone();
    for field in ["containers", "initContainers"] {
        let Some(list) = masked.get_mut(field).and_then(Value::as_array_mut) else {
            continue;
        };
        for (index, container) in list.iter_mut().enumerate() {
            if let Some(image) = old["spec"][field][index].get("image") {
                container["image"] = image.clone();
            }
        }
    }
    let mut restore = |field: &str| {
        if let Some(spec) = masked.as_object_mut() {
            match old["spec"].get(field) {
                Some(value) => spec.insert(field.to_owned(), value.clone()),
                None => spec.remove(field),
            };
        }
    };
    restore("activeDeadlineSeconds");
    let gates = |pod: &Value| pod["spec"]["schedulingGates"].as_array().cloned();
    let (now, before) = (
        gates(new).unwrap_or_default(),
        gates(old).unwrap_or_default(),
    );
    if now.iter().all(|gate| before.contains(gate)) {
        restore("schedulingGates");
    } else {
        found.forbidden(
            &path.field("schedulingGates"),
            "only deletion is allowed, but found new scheduling gate",
        );
    }
    let only_added = {
        let list = |pod: &Value| {
            pod["spec"]["tolerations"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        };
        let now = list(new);
        list(old).iter().all(|toleration| now.contains(toleration))
    };
    if only_added {
        restore("tolerations");
    }
    let grace = |pod: &Value| pod["spec"]["terminationGracePeriodSeconds"].as_i64();
    if grace(old).is_some_and(|n| n < 0) && grace(new) == Some(1) {
        restore("terminationGracePeriodSeconds");
    }
    if masked != old["spec"] {
        let differ: Vec<&str> = masked
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| old["spec"].get(key.as_str()) != Some(*value))
            .map(|(key, _)| key.as_str())
            .chain(
                old["spec"]
                    .as_object()
                    .into_iter()
                    .flatten()
                    .filter(|(key, _)| masked.get(key.as_str()).is_none())
                    .map(|(key, _)| key.as_str()),
            )
            .collect();
        found.forbidden(
            &path,
            format!(
                "pod updates may not change fields other than {UPDATABLE}\nchanged: {}",
                differ.join(", ")
            ),
        );
    }
}

fn deadline(new: &Value, old: &Value, path: &Path, found: &mut Found) {
    let at = path.field("activeDeadlineSeconds");
    let was = old["spec"]["activeDeadlineSeconds"].as_i64();
    let is = &new["spec"]["activeDeadlineSeconds"];
    match (was, is.as_i64()) {
        (Some(was), Some(now)) if now > was => {
            found.invalid(
                &at,
                is,
                format!("must be less than or equal to previous value: {was}"),
            );
        }
        (Some(_), None) => {
            found.invalid(
                &at,
                is,
                "must not update from a positive integer to nil value",
            );
        }
        _ => {}
    }
}

pub(super) fn validate_status(pod: &Value, found: &mut Found) {
    let path = Path::root("status");
    let status = &pod["status"];
    for (condition, at) in items(&status["conditions"], &path.field("conditions")) {
        if text(condition, "type").is_empty() {
            found.required(&at.field("type"), "");
        }
    }
    for (ip, at) in items(&status["podIPs"], &path.field("podIPs")) {
        if text(ip, "ip").parse::<std::net::IpAddr>().is_err() {
            found.add(
                ErrorKind::Invalid,
                &at,
                &ip["ip"],
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            );
        }
    }
}

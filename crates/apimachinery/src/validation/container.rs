//! Rules of a pod's containers.

use std::collections::HashSet;

use serde_json::Value;

use crate::{Quantity, meta::rules};

use super::{ErrorKind, Found, Path, items, meta, text, volume};

pub(super) fn validate(
    container: &Value,
    path: &Path,
    volumes: &HashSet<String>,
    host_network: bool,
    found: &mut Found,
) {
    let name = text(container, "name");
    if name.is_empty() {
        found.required(&path.field("name"), "");
    } else {
        found.all_invalid(&path.field("name"), name, rules::label(name));
    }
    let image = text(container, "image");
    if image.is_empty() {
        found.required(&path.field("image"), "");
    } else if image.trim() != image {
        let at = path.field("image");
        found.invalid(
            &at,
            &container["image"],
            "must not have leading or trailing whitespace",
        );
    }
    found.one_of(
        &path.field("imagePullPolicy"),
        &container["imagePullPolicy"],
        &["Always", "IfNotPresent", "Never"],
    );
    found.one_of(
        &path.field("terminationMessagePolicy"),
        &container["terminationMessagePolicy"],
        &["File", "FallbackToLogsOnError"],
    );
    ports(
        &container["ports"],
        &path.field("ports"),
        host_network,
        found,
    );
    env(container, path, found);
    mounts(
        &container["volumeMounts"],
        &path.field("volumeMounts"),
        volumes,
        found,
    );
    resources(&container["resources"], &path.field("resources"), found);
    for field in ["livenessProbe", "readinessProbe", "startupProbe"] {
        probe(
            &container[field],
            &path.field(field),
            field == "readinessProbe",
            found,
        );
    }
    restart_rules(container, path, found);
    for field in ["postStart", "preStop"] {
        let hook = &container["lifecycle"][field];
        if !hook.is_null() {
            handler(hook, &path.field("lifecycle").field(field), found);
        }
    }
    ids(
        &container["securityContext"],
        &path.field("securityContext"),
        found,
    );
    let context = &container["securityContext"];
    if context["privileged"] == true && context["allowPrivilegeEscalation"] == false {
        found.invalid(
            &path.field("securityContext"),
            context,
            "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
        );
    }
}

fn restart_rules(container: &Value, path: &Path, found: &mut Found) {
    let policy = text(container, "restartPolicy");
    if !policy.is_empty() {
        found.one_of(
            &path.field("restartPolicy"),
            &container["restartPolicy"],
            &["Always", "OnFailure", "Never"],
        );
    }
    let rules = path.field("restartPolicyRules");
    if policy.is_empty() && container["restartPolicyRules"].is_array() {
        found.required(
            &path.field("restartPolicy"),
            "must specify restartPolicy when restart rules are used",
        );
    }
    for (rule, at) in items(&container["restartPolicyRules"], &rules) {
        let codes = &rule["exitCodes"];
        let at = at.field("exitCodes");
        if !codes.is_object() {
            found.required(&at, "must be specified");
            continue;
        }
        found.one_of(&at.field("operator"), &codes["operator"], &["In", "NotIn"]);
    }
}

/// Rules of init containers beside those of all containers.
pub(super) fn init(container: &Value, path: &Path, found: &mut Found) {
    let policy = text(container, "restartPolicy");
    if policy == "Always" {
        return;
    }
    for field in [
        "lifecycle",
        "livenessProbe",
        "readinessProbe",
        "startupProbe",
    ] {
        if !container[field].is_null() {
            found.forbidden(
                &path.field(field),
                "may not be set for init containers without restartPolicy=Always",
            );
        }
    }
}

/// User and group of a security context.
pub(super) fn ids(context: &Value, path: &Path, found: &mut Found) {
    for field in ["runAsUser", "runAsGroup", "fsGroup"] {
        id(&context[field], &path.field(field), found);
    }
}

pub(super) fn id(value: &Value, path: &Path, found: &mut Found) {
    if value
        .as_i64()
        .is_some_and(|id| !(0..=i64::from(i32::MAX)).contains(&id))
    {
        found.invalid(path, value, "must be between 0 and 2147483647, inclusive");
    }
}

fn ports(ports: &Value, path: &Path, host_network: bool, found: &mut Found) {
    let mut names = HashSet::new();
    for (port, at) in items(ports, path) {
        let name = text(port, "name");
        if !name.is_empty() {
            let problems = rules::port_name(name);
            if problems.is_empty() && !names.insert(name) {
                found.duplicate(&at.field("name"), &port["name"]);
            }
            found.all_invalid(&at.field("name"), name, problems);
        }
        let number = port["containerPort"].as_i64().unwrap_or_default();
        if number == 0 {
            found.required(&at.field("containerPort"), "");
        } else {
            for problem in rules::port_number(number) {
                found.invalid(&at.field("containerPort"), &port["containerPort"], problem);
            }
        }
        if let Some(host) = port["hostPort"].as_i64().filter(|port| *port != 0) {
            for problem in rules::port_number(host) {
                found.invalid(&at.field("hostPort"), &port["hostPort"], problem);
            }
            if host_network && host != number {
                found.invalid(
                    &at.field("containerPort"),
                    &port["containerPort"],
                    "must match `hostPort` when `hostNetwork` is true",
                );
            }
        }
        found.one_of(
            &at.field("protocol"),
            &port["protocol"],
            &["TCP", "UDP", "SCTP"],
        );
    }
}

fn env(container: &Value, path: &Path, found: &mut Found) {
    for (variable, at) in items(&container["env"], &path.field("env")) {
        let name = text(variable, "name");
        if name.is_empty() {
            found.required(&at.field("name"), "");
        } else {
            found.all_invalid(&at.field("name"), name, rules::env_name(name));
        }
        let from = &variable["valueFrom"];
        if from.is_null() {
            continue;
        }
        let at = at.field("valueFrom");
        let sources = [
            "fieldRef",
            "resourceFieldRef",
            "configMapKeyRef",
            "secretKeyRef",
            "fileKeyRef",
        ];
        match sources
            .iter()
            .filter(|source| !from[**source].is_null())
            .count()
        {
            0 => found.invalid(
                &at,
                &"".into(),
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, \
                 `secretKeyRef` or `fileKeyRef`",
            ),
            1 => {}
            _ => found.invalid(
                &at,
                &"".into(),
                "may not have more than one field specified at a time",
            ),
        }
        if !text(variable, "value").is_empty() {
            found.invalid(
                &at,
                &"".into(),
                "may not be specified when `value` is not empty",
            );
        }
        for source in ["configMapKeyRef", "secretKeyRef"] {
            let reference = &from[source];
            if reference.is_null() {
                continue;
            }
            let at = at.field(source);
            if text(reference, "name").is_empty() {
                found.required(&at.field("name"), "");
            }
            let key = text(reference, "key");
            if key.is_empty() {
                found.required(&at.field("key"), "");
            } else {
                found.all_invalid(&at.field("key"), key, rules::config_key(key));
            }
        }
        if !from["fieldRef"].is_null() {
            field_ref(&from["fieldRef"], &at.field("fieldRef"), ENV_FIELDS, found);
        }
        if !from["resourceFieldRef"].is_null() {
            resource_ref(
                &from["resourceFieldRef"],
                &at.field("resourceFieldRef"),
                found,
            );
        }
    }
    for (source, at) in items(&container["envFrom"], &path.field("envFrom")) {
        let prefix = text(source, "prefix");
        if !prefix.is_empty() {
            found.all_invalid(&at.field("prefix"), prefix, rules::env_name(prefix));
        }
        let kinds = ["configMapRef", "secretRef"];
        match kinds
            .iter()
            .filter(|kind| !source[**kind].is_null())
            .count()
        {
            0 => found.invalid(
                &at,
                &"".into(),
                "must specify one of: `configMapRef` or `secretRef`",
            ),
            1 => {}
            _ => found.invalid(
                &at,
                &"".into(),
                "may not have more than one field specified at a time",
            ),
        }
        for kind in kinds {
            if source[kind].is_object() && text(&source[kind], "name").is_empty() {
                found.required(&at.field(kind).field("name"), "");
            }
        }
    }
}

const ENV_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// A reference to a field of the pod itself.
pub(super) fn field_ref(reference: &Value, path: &Path, allowed: &[&str], found: &mut Found) {
    let field = text(reference, "fieldPath");
    if text(reference, "apiVersion").is_empty() {
        found.required(&path.field("apiVersion"), "");
    }
    if field.is_empty() {
        found.required(&path.field("fieldPath"), "");
        return;
    }
    let subscript = field
        .strip_suffix("']")
        .and_then(|rest| rest.split_once("['"))
        .filter(|(base, _)| matches!(*base, "metadata.labels" | "metadata.annotations"));
    if let Some((_, key)) = subscript {
        found.all_invalid(
            &path.field("fieldPath"),
            key,
            rules::qualified_name(&key.to_lowercase()),
        );
    } else if !allowed.contains(&field) {
        found.not_supported(&path.field("fieldPath"), &reference["fieldPath"], allowed);
    }
}

pub(super) fn resource_ref(reference: &Value, path: &Path, found: &mut Found) {
    let resource = text(reference, "resource");
    let allowed = [
        "limits.cpu",
        "limits.ephemeral-storage",
        "limits.memory",
        "requests.cpu",
        "requests.ephemeral-storage",
        "requests.memory",
    ];
    if resource.is_empty() {
        found.required(&path.field("resource"), "");
    } else if !allowed.contains(&resource) && !resource.contains("hugepages-") {
        found.not_supported(&path.field("resource"), &reference["resource"], &allowed);
    }
}

fn mounts(mounts: &Value, path: &Path, volumes: &HashSet<String>, found: &mut Found) {
    let mut points = HashSet::new();
    for (mount, at) in items(mounts, path) {
        let name = text(mount, "name");
        if name.is_empty() {
            found.required(&at.field("name"), "");
        } else if !volumes.contains(name) {
            found.add(ErrorKind::NotFound, &at.field("name"), &mount["name"], "");
        }
        let point = text(mount, "mountPath");
        if point.is_empty() {
            found.required(&at.field("mountPath"), "");
        } else if !points.insert(point) {
            found.invalid(
                &at.field("mountPath"),
                &mount["mountPath"],
                "must be unique",
            );
        }
        for field in ["subPath", "subPathExpr"] {
            let sub = text(mount, field);
            if !sub.is_empty() {
                volume::relative_path(sub, &at.field(field), found);
            }
        }
        if !text(mount, "subPath").is_empty() && !text(mount, "subPathExpr").is_empty() {
            found.invalid(
                &at.field("subPathExpr"),
                &mount["subPathExpr"],
                "subPathExpr and subPath are mutually exclusive",
            );
        }
        let propagation = text(mount, "mountPropagation");
        let known = ["Bidirectional", "HostToContainer", "None"];
        if !propagation.is_empty() && !known.contains(&propagation) {
            found.not_supported(
                &at.field("mountPropagation"),
                &mount["mountPropagation"],
                &known,
            );
        }
    }
}

pub(super) fn resources(resources: &Value, path: &Path, found: &mut Found) {
    let limits = meta::quantity_map(&resources["limits"], &path.field("limits"), found);
    let requests = meta::quantity_map(&resources["requests"], &path.field("requests"), found);
    for (part, names) in [("limits", &limits), ("requests", &requests)] {
        for name in names.iter().flat_map(serde_json::Map::keys) {
            let standard = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage")
                || name.starts_with("hugepages-");
            if !standard && !name.contains('/') {
                let at = path.field(part).key(name);
                found.invalid(
                    &at,
                    &name.as_str().into(),
                    "must be a standard resource for containers",
                );
            }
        }
    }
    let (limits, requests) = (limits.unwrap_or_default(), requests.unwrap_or_default());
    huge_pages(&limits, &requests, path, found);
    let parsed = |value: &Value| {
        value
            .as_str()
            .and_then(|text| text.parse::<Quantity>().ok())
    };
    for (name, request) in &requests {
        let limit = limits.get(name);
        let shown = limit.and_then(Value::as_str).unwrap_or_default();
        // What cannot be promised twice is asked for and limited to the same.
        let overcommits = !name.starts_with(HUGE_PAGES) && !name.contains('/');
        if !overcommits && limit.is_none() {
            let detail = "Limit must be set for non overcommitable resources";
            found.required(&path.field("limits"), detail);
        } else if !overcommits && parsed(request) != limit.and_then(parsed) {
            let detail = format!("must be equal to {name} limit of {shown}");
            found.invalid(&path.field("requests"), request, detail);
        } else if let (Some(request_value), Some(limit_value)) =
            (parsed(request), limit.and_then(parsed))
            && request_value > limit_value
        {
            found.invalid(
                &path.field("requests"),
                request,
                format!("must be less than or equal to {name} limit of {shown}"),
            );
        }
    }
}

const HUGE_PAGES: &str = "hugepages-";

/// Huge pages come whole, and not without CPU or memory.
fn huge_pages(
    limits: &serde_json::Map<String, Value>,
    requests: &serde_json::Map<String, Value>,
    path: &Path,
    found: &mut Found,
) {
    for (part, list) in [("limits", limits), ("requests", requests)] {
        for (name, value) in list {
            let Some(size) = name.strip_prefix(HUGE_PAGES) else {
                continue;
            };
            let bytes = |text: &str| Some(text.parse::<Quantity>().ok()?.value());
            let size = bytes(size).filter(|size| *size > 0);
            let amount = value.as_str().and_then(bytes);
            let whole = size.zip(amount).is_some_and(|(size, all)| all % size == 0);
            if !whole {
                let shown = value.as_str().unwrap_or_default();
                let detail = format!("{shown} is not positive integer multiple of {name}");
                found.invalid(&path.field(part).key(name), value, detail);
            }
        }
    }
    let names = || limits.keys().chain(requests.keys());
    let huge = names().any(|name| name.starts_with(HUGE_PAGES));
    if huge && !names().any(|name| matches!(name.as_str(), "cpu" | "memory")) {
        found.forbidden(path, "HugePages require cpu or memory");
    }
}

fn probe(probe: &Value, path: &Path, readiness: bool, found: &mut Found) {
    if probe.is_null() {
        return;
    }
    handler(probe, path, found);
    for field in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        found.not_negative(&path.field(field), &probe[field]);
    }
    if !readiness && probe["successThreshold"].as_i64().is_some_and(|n| n != 1) {
        found.invalid(
            &path.field("successThreshold"),
            &probe["successThreshold"],
            "must be 1",
        );
    }
    if let Some(grace) = probe["terminationGracePeriodSeconds"].as_i64() {
        let at = path.field("terminationGracePeriodSeconds");
        if readiness {
            found.invalid(
                &at,
                &probe["terminationGracePeriodSeconds"],
                "must not be set for readinessProbes",
            );
        } else if grace <= 0 {
            found.invalid(
                &at,
                &probe["terminationGracePeriodSeconds"],
                "must be greater than 0",
            );
        }
    }
}

fn handler(handler: &Value, path: &Path, found: &mut Found) {
    let kinds = ["exec", "httpGet", "tcpSocket", "grpc", "sleep"];
    let set: Vec<&str> = kinds
        .into_iter()
        .filter(|kind| !handler[*kind].is_null())
        .collect();
    for extra in set.iter().skip(1) {
        found.forbidden(
            &path.field(extra),
            "may not specify more than 1 handler type",
        );
    }
    let Some(kind) = set.first() else {
        found.required(path, "must specify a handler type");
        return;
    };
    let (action, at) = (&handler[*kind], path.field(kind));
    match *kind {
        "exec" if action["command"].as_array().is_none_or(Vec::is_empty) => {
            found.required(&at.field("command"), "");
        }
        "httpGet" => {
            if text(action, "path").is_empty() {
                found.required(&at.field("path"), "");
            }
            port(&action["port"], &at.field("port"), found);
            found.one_of(&at.field("scheme"), &action["scheme"], &["HTTP", "HTTPS"]);
        }
        "tcpSocket" | "grpc" => port(&action["port"], &at.field("port"), found),
        "sleep" => found.not_negative(&at.field("seconds"), &action["seconds"]),
        _ => {}
    }
}

fn port(port: &Value, path: &Path, found: &mut Found) {
    let problems = match port {
        Value::String(name) => rules::port_name(name),
        other => rules::port_number(other.as_i64().unwrap_or_default()),
    };
    for problem in problems {
        found.invalid(path, port, problem);
    }
}

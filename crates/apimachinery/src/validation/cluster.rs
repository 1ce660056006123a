//! ConfigMap, Secret, Lease, RuntimeClass and access control.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::{
    kinds::ResourceKind,
    meta::{check_name, rules},
};

use super::{Found, Path, items, meta, text};

/// Data of one ConfigMap or Secret.
const MAX_DATA: usize = 1 << 20;

pub(super) fn config_map(object: &Value, found: &mut Found) {
    let mut size = 0;
    let binary = object["binaryData"].as_object();
    for (key, value) in object["data"].as_object().into_iter().flatten() {
        let at = Path::root("data").key(key);
        found.all_invalid(&at, key, rules::config_key(key));
        if binary.is_some_and(|binary| binary.contains_key(key)) {
            found.invalid(
                &at,
                &key.as_str().into(),
                "duplicate of key present in binaryData",
            );
        }
        size += value.as_str().map_or(0, str::len);
    }
    for (key, value) in binary.into_iter().flatten() {
        let at = Path::root("binaryData").key(key);
        found.all_invalid(&at, key, rules::config_key(key));
        size += decoded_length(value);
    }
    if size > MAX_DATA {
        found.too_long(&Path::root(""), MAX_DATA);
    }
}

fn decoded_length(value: &Value) -> usize {
    value.as_str().map_or(0, |text| text.len() / 4 * 3)
}

pub(super) fn secret(object: &Value, found: &mut Found) {
    let data = &object["data"];
    let mut size = 0;
    for (key, value) in data.as_object().into_iter().flatten() {
        found.all_invalid(&Path::root("data").key(key), key, rules::config_key(key));
        size += decoded_length(value);
    }
    if size > MAX_DATA {
        found.too_long(&Path::root("data"), MAX_DATA);
    }
    let mut need = |keys: &[&str]| {
        for key in keys.iter().filter(|key| data.get(**key).is_none()) {
            found.required(&Path::root("data").key(key), "");
        }
    };
    match text(object, "type") {
        "kubernetes.io/tls" => need(&["tls.crt", "tls.key"]),
        "kubernetes.io/ssh-auth" => need(&["ssh-privatekey"]),
        "kubernetes.io/dockercfg" => need(&[".dockercfg"]),
        "kubernetes.io/dockerconfigjson" => {
            need(&[".dockerconfigjson"]);
            let config = data.get(".dockerconfigjson").and_then(Value::as_str);
            if let Some(config) = config {
                let parsed = STANDARD
                    .decode(config)
                    .ok()
                    .and_then(|config| serde_json::from_slice::<Value>(&config).ok());
                if parsed.is_none() {
                    found.invalid(
                        &Path::root("data").key(".dockerconfigjson"),
                        &"<secret contents redacted>".into(),
                        "invalid character: the content is not JSON",
                    );
                }
            }
        }
        "kubernetes.io/basic-auth"
            if data.get("username").is_none() && data.get("password").is_none() =>
        {
            found.required(&Path::root("data[username]"), "");
            found.required(&Path::root("data[password]"), "");
        }
        "kubernetes.io/service-account-token"
            if text(
                &object["metadata"]["annotations"],
                "kubernetes.io/service-account.name",
            )
            .is_empty() =>
        {
            found.required(
                &Path::root("metadata.annotations").key("kubernetes.io/service-account.name"),
                "",
            );
        }
        _ => {}
    }
}

pub(super) fn data_update(kind: &ResourceKind, new: &Value, old: &Value, found: &mut Found) {
    if kind.kind == "Secret" {
        found.immutable(&Path::root("type"), &new["type"], &old["type"]);
    }
    if old["immutable"] == true {
        if new["immutable"] != true {
            found.forbidden(
                &Path::root("immutable"),
                "field is immutable when `immutable` is set",
            );
        }
        for field in ["data", "binaryData"] {
            if new[field] != old[field] {
                found.forbidden(
                    &Path::root(field),
                    "field is immutable when `immutable` is set",
                );
            }
        }
    }
}

pub(super) fn lease(object: &Value, found: &mut Found) {
    let path = Path::root("spec");
    let spec = &object["spec"];
    if spec["leaseDurationSeconds"]
        .as_i64()
        .is_some_and(|n| n <= 0)
    {
        found.invalid(
            &path.field("leaseDurationSeconds"),
            &spec["leaseDurationSeconds"],
            "must be greater than 0",
        );
    }
    found.not_negative(&path.field("leaseTransitions"), &spec["leaseTransitions"]);
}

pub(super) fn runtime_class(object: &Value, found: &mut Found) {
    let handler = text(object, "handler");
    found.all_invalid(&Path::root("handler"), handler, rules::label(handler));
    let path = Path::root("overhead.podFixed");
    meta::quantity_map(&object["overhead"]["podFixed"], &path, found);
}

pub(super) fn role(object: &Value, namespaced: bool, found: &mut Found) {
    for (rule, at) in items(&object["rules"], &Path::root("rules")) {
        let filled = |field: &str| rule[field].as_array().is_some_and(|list| !list.is_empty());
        if !filled("verbs") {
            found.required(&at.field("verbs"), "verbs must contain at least one value");
        }
        if filled("nonResourceURLs") {
            let urls = &rule["nonResourceURLs"];
            if namespaced {
                found.invalid(
                    &at.field("nonResourceURLs"),
                    urls,
                    "namespaced rules cannot apply to non-resource URLs",
                );
            }
            if ["apiGroups", "resources", "resourceNames"]
                .iter()
                .any(|field| filled(field))
            {
                found.invalid(
                    &at.field("nonResourceURLs"),
                    urls,
                    "rules cannot apply to both regular resources and non-resource URLs",
                );
            }
            continue;
        }
        if !filled("apiGroups") {
            found.required(
                &at.field("apiGroups"),
                "resource rules must supply at least one api group",
            );
        }
        if !filled("resources") {
            found.required(
                &at.field("resources"),
                "resource rules must supply at least one resource",
            );
        }
    }
}

pub(super) fn binding(object: &Value, namespaced: bool, found: &mut Found) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    let path = Path::root("roleRef");
    let role = &object["roleRef"];
    if text(role, "apiGroup") != GROUP {
        found.not_supported(&path.field("apiGroup"), &role["apiGroup"], &[GROUP]);
    }
    let kinds: &[&str] = if namespaced {
        &["Role", "ClusterRole"]
    } else {
        &["ClusterRole"]
    };
    if !kinds.contains(&text(role, "kind")) {
        found.not_supported(&path.field("kind"), &role["kind"], kinds);
    }
    let name = text(role, "name");
    if name.is_empty() {
        found.required(&path.field("name"), "");
    } else {
        let problems = check_name(crate::kinds::NameRule::PathSegment, name);
        found.all_invalid(&path.field("name"), name, problems);
    }
    for (subject, at) in items(&object["subjects"], &Path::root("subjects")) {
        let name = text(subject, "name");
        if name.is_empty() {
            found.required(&at.field("name"), "");
        }
        match text(subject, "kind") {
            "ServiceAccount" => {
                if !name.is_empty() {
                    found.all_invalid(&at.field("name"), name, rules::subdomain(name));
                }
                if !text(subject, "apiGroup").is_empty() {
                    found.not_supported(&at.field("apiGroup"), &subject["apiGroup"], &[""]);
                }
                if text(subject, "namespace").is_empty() {
                    found.required(&at.field("namespace"), "");
                }
            }
            "User" | "Group" => {
                if text(subject, "apiGroup") != GROUP {
                    found.not_supported(&at.field("apiGroup"), &subject["apiGroup"], &[GROUP]);
                }
            }
            _ => found.not_supported(
                &at.field("kind"),
                &subject["kind"],
                &["ServiceAccount", "User", "Group"],
            ),
        }
    }
}

pub(super) fn binding_update(new: &Value, old: &Value, found: &mut Found) {
    if new["roleRef"] != old["roleRef"] {
        found.invalid(
            &Path::root("roleRef"),
            &new["roleRef"],
            "cannot change roleRef",
        );
    }
}

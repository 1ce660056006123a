//! Rules of a pod's volumes.

use std::collections::HashSet;

use serde_json::Value;

use crate::{Quantity, meta::rules};

use super::{Found, Path, container, items, storage, text};

/// Checks the volumes and returns the names that containers may mount.
pub(super) fn validate(volumes: &Value, path: &Path, found: &mut Found) -> HashSet<String> {
    let mut names = HashSet::new();
    for (volume, at) in items(volumes, path) {
        let name = text(volume, "name");
        if name.is_empty() {
            found.required(&at.field("name"), "");
        } else {
            let problems = rules::label(name);
            if problems.is_empty() && !names.insert(name.to_owned()) {
                found.duplicate(&at.field("name"), &volume["name"]);
            }
            found.all_invalid(&at.field("name"), name, problems);
        }
        let sources: Vec<&String> = volume
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| *key != "name" && !value.is_null())
            .map(|(key, _)| key)
            .collect();
        if sources.is_empty() {
            found.required(&at, "must specify a volume type");
        }
        for extra in sources.iter().skip(1) {
            found.forbidden(&at.field(extra), "may not specify more than 1 volume type");
        }
        for kind in sources {
            source(kind, &volume[kind.as_str()], &at.field(kind), found);
        }
    }
    names
}

fn source(kind: &str, source: &Value, path: &Path, found: &mut Found) {
    let mut required = |field: &str| {
        if text(source, field).is_empty() {
            found.required(&path.field(field), "");
        }
    };
    match kind {
        "secret" => required("secretName"),
        "configMap" => required("name"),
        "hostPath" => required("path"),
        "persistentVolumeClaim" => required("claimName"),
        _ => {}
    }
    mode(&source["defaultMode"], &path.field("defaultMode"), found);
    match kind {
        "emptyDir" => {
            let limit = text(source, "sizeLimit").parse::<Quantity>();
            if limit.is_ok_and(|limit| limit < Quantity::default()) {
                found.forbidden(
                    &path.field("sizeLimit"),
                    "SizeLimit field must be a valid resource quantity",
                );
            }
        }
        "ephemeral" => storage::ephemeral(source, path, found),
        "secret" | "configMap" => keys(&source["items"], &path.field("items"), found),
        "hostPath" if text(source, "path").split('/').any(|part| part == "..") => {
            found.invalid(
                &path.field("path"),
                &source["path"],
                "must not contain '..'",
            );
        }
        "downwardAPI" => downward(&source["items"], &path.field("items"), found),
        "projected" => projected(source, path, found),
        _ => {}
    }
}

fn mode(mode: &Value, path: &Path, found: &mut Found) {
    if mode
        .as_i64()
        .is_some_and(|mode| !(0..=0o777).contains(&mode))
    {
        found.invalid(
            path,
            mode,
            "must be a number between 0 and 0777 (octal), both inclusive",
        );
    }
}

fn keys(list: &Value, path: &Path, found: &mut Found) {
    for (item, at) in items(list, path) {
        if text(item, "key").is_empty() {
            found.required(&at.field("key"), "");
        }
        local_path(item, &at, found);
    }
}

fn local_path(item: &Value, at: &Path, found: &mut Found) {
    let path = text(item, "path");
    if path.is_empty() {
        found.required(&at.field("path"), "");
    } else {
        relative_path(path, &at.field("path"), found);
        if path.starts_with("..") && !path.split('/').any(|part| part == "..") {
            found.invalid(&at.field("path"), &item["path"], "must not start with '..'");
        }
    }
    mode(&item["mode"], &at.field("mode"), found);
}

/// A path that stays below where it starts.
pub(super) fn relative_path(text: &str, path: &Path, found: &mut Found) {
    if text.starts_with('/') {
        found.invalid(path, &text.into(), "must be a relative path");
    }
    if text.split('/').any(|part| part == "..") {
        found.invalid(path, &text.into(), "must not contain '..'");
    }
}

const DOWNWARD_FIELDS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
];

fn downward(list: &Value, path: &Path, found: &mut Found) {
    for (item, at) in items(list, path) {
        local_path(item, &at, found);
        match (
            item["fieldRef"].is_object(),
            item["resourceFieldRef"].is_object(),
        ) {
            (true, true) => found.invalid(
                &at,
                &"resource".into(),
                "fieldRef and resourceFieldRef can not be specified simultaneously",
            ),
            (true, false) => container::field_ref(
                &item["fieldRef"],
                &at.field("fieldRef"),
                DOWNWARD_FIELDS,
                found,
            ),
            (false, true) => {
                let at = at.field("resourceFieldRef");
                if text(&item["resourceFieldRef"], "containerName").is_empty() {
                    found.required(&at.field("containerName"), "");
                }
                container::resource_ref(&item["resourceFieldRef"], &at, found);
            }
            (false, false) => {
                found.required(&at, "one of fieldRef and resourceFieldRef is required");
            }
        }
    }
}

fn projected(source: &Value, path: &Path, found: &mut Found) {
    for (part, at) in items(&source["sources"], &path.field("sources")) {
        let set = part
            .as_object()
            .map_or(0, |p| p.values().filter(|v| !v.is_null()).count());
        if set > 1 {
            found.forbidden(&at, "may not specify more than 1 volume type");
        }
        for kind in ["secret", "configMap"] {
            if part[kind].is_object() {
                let at = at.field(kind);
                if text(&part[kind], "name").is_empty() {
                    found.required(&at.field("name"), "");
                }
                keys(&part[kind]["items"], &at.field("items"), found);
            }
        }
        if part["downwardAPI"].is_object() {
            downward(
                &part["downwardAPI"]["items"],
                &at.field("downwardAPI.items"),
                found,
            );
        }
        let token = &part["serviceAccountToken"];
        if token.is_object() {
            let at = at.field("serviceAccountToken");
            if text(token, "path").is_empty() {
                found.required(&at.field("path"), "");
            } else {
                relative_path(text(token, "path"), &at.field("path"), found);
            }
            if token["expirationSeconds"]
                .as_i64()
                .is_some_and(|seconds| seconds < 600)
            {
                found.invalid(
                    &at.field("expirationSeconds"),
                    &token["expirationSeconds"],
                    "may not specify a duration less than 10 minutes",
                );
            }
        }
    }
}

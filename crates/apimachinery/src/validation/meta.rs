//! Rules of `metadata`, common to all kinds.

use serde_json::{Map, Value};

use crate::{
    kinds::ResourceKind,
    meta::{self, check_name, rules},
};

use super::{ErrorKind, Found, Path, items, text};

/// All annotations of an object together.
const MAX_ANNOTATIONS: usize = 256 << 10;

pub(super) fn validate(kind: &ResourceKind, object: &Value, found: &mut Found) {
    let path = Path::root("metadata");
    let metadata = &object["metadata"];
    let base = text(metadata, "generateName");
    if !base.is_empty() {
        // What is generated is the base and five letters: a trailing dash is fine.
        let trimmed = base.strip_suffix('-').unwrap_or(base);
        let at = path.field("generateName");
        found.all_invalid(&at, base, check_name(kind.name_rule, trimmed));
    }
    let name = text(metadata, "name");
    if name.is_empty() {
        found.required(&path.field("name"), "name or generateName is required");
    } else {
        found.all_invalid(&path.field("name"), name, check_name(kind.name_rule, name));
    }
    let namespace = text(metadata, "namespace");
    if kind.namespaced {
        if namespace.is_empty() {
            found.required(&path.field("namespace"), "");
        } else {
            found.all_invalid(&path.field("namespace"), namespace, rules::label(namespace));
        }
    } else if !namespace.is_empty() {
        found.forbidden(&path.field("namespace"), "not allowed on this type");
    }
    found.not_negative(&path.field("generation"), &metadata["generation"]);
    labels(&metadata["labels"], &path.field("labels"), found);
    annotations(&metadata["annotations"], &path.field("annotations"), found);
    finalizers(metadata, &path, found);
    owners(metadata, &path, found);
}

pub(super) fn labels(labels: &Value, path: &Path, found: &mut Found) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        found.all_invalid(path, key, rules::qualified_name(key));
        let value = value.as_str().unwrap_or_default();
        found.all_invalid(path, value, rules::label_value(value));
    }
}

fn annotations(annotations: &Value, path: &Path, found: &mut Found) {
    let mut size = 0;
    for (key, value) in annotations.as_object().into_iter().flatten() {
        found.all_invalid(path, key, rules::qualified_name(&key.to_lowercase()));
        size += key.len() + value.as_str().map_or(0, str::len);
    }
    if size > MAX_ANNOTATIONS {
        found.too_long(path, MAX_ANNOTATIONS);
    }
}

fn finalizers(metadata: &Value, path: &Path, found: &mut Found) {
    let path = path.field("finalizers");
    let mut policies = Vec::new();
    for (finalizer, _) in items(&metadata["finalizers"], &path) {
        let name = finalizer.as_str().unwrap_or_default();
        let problems = rules::qualified_name(name);
        if problems.is_empty() && !name.contains('/') {
            if matches!(name, "orphan" | "foregroundDeletion" | "kubernetes") {
                policies.push(name);
            } else {
                found.invalid(
                    &path,
                    finalizer,
                    "name is neither a standard finalizer name nor is it fully qualified",
                );
            }
        }
        found.all_invalid(&path, name, problems);
    }
    if policies.contains(&"orphan") && policies.contains(&"foregroundDeletion") {
        found.invalid(
            &path,
            &metadata["finalizers"],
            "finalizers \"orphan\" and \"foregroundDeletion\" can not both be set",
        );
    }
}

fn owners(metadata: &Value, path: &Path, found: &mut Found) {
    let path = path.field("ownerReferences");
    let mut controller: Option<&str> = None;
    for (owner, at) in items(&metadata["ownerReferences"], &path) {
        let api_version = text(owner, "apiVersion");
        if api_version.is_empty() || api_version.matches('/').count() > 1 {
            found.invalid(
                &at.field("apiVersion"),
                &owner["apiVersion"],
                "version must not be empty",
            );
        }
        for field in ["kind", "name", "uid"] {
            if text(owner, field).is_empty() {
                found.invalid(
                    &at.field(field),
                    &"".into(),
                    format!("{field} must not be empty"),
                );
            }
        }
        if owner["controller"] == true {
            if let Some(first) = controller {
                found.invalid(
                    &path,
                    &metadata["ownerReferences"],
                    format!(
                        "Only one reference can have Controller set to true. Found \"true\" in \
                         references for {first} and {}",
                        text(owner, "name")
                    ),
                );
            }
            controller = Some(text(owner, "name"));
        }
    }
}

pub(super) fn validate_update(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("metadata");
    let (was, is) = (&old["metadata"], &new["metadata"]);
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        found.immutable(&path.field(field), &is[field], &was[field]);
    }
    if meta::generation(new) < meta::generation(old) {
        found.invalid(
            &path.field("generation"),
            &is["generation"],
            "must not be decremented",
        );
    }
    if meta::is_deleting(old) {
        let added: Vec<&str> = meta::finalizers(new)
            .filter(|f| !meta::finalizers(old).any(|o| o == *f))
            .collect();
        if !added.is_empty() {
            found.forbidden(
                &path.field("finalizers"),
                format!(
                    "no new finalizers can be added if the object is being deleted, found new \
                     finalizers {added:?}"
                ),
            );
        }
    }
}

/// A map of names to whole numbers or quantities, checked by the caller.
pub(super) fn quantity_map(
    map: &Value,
    path: &Path,
    found: &mut Found,
) -> Option<Map<String, Value>> {
    let map = map.as_object()?;
    for (name, value) in map {
        let at = path.key(name);
        found.all_invalid(&at, name, rules::qualified_name(name));
        match value
            .as_str()
            .unwrap_or_default()
            .parse::<crate::Quantity>()
        {
            Ok(quantity) if quantity < crate::Quantity::default() => {
                found.invalid(&at, value, "must be greater than or equal to 0");
            }
            Ok(_) => {}
            Err(_) => found.add(ErrorKind::Invalid, &at, value, "must be a quantity"),
        }
    }
    Some(map.clone())
}

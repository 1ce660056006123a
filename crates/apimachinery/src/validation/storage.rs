//! Rules of claims, volumes and classes, and of the pods that use them as devices.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::{Quantity, kinds::ResourceKind, meta::rules, quota::quantity};

use super::{ErrorKind, Found, Path, items, meta, text, workloads::selector};

const ACCESS_MODES: [&str; 4] = [
    "ReadOnlyMany",
    "ReadWriteMany",
    "ReadWriteOnce",
    "ReadWriteOncePod",
];
const VOLUME_MODES: [&str; 2] = ["Block", "Filesystem"];
/// Fields of a volume's spec that say what it is, not where it lies.
const NO_SOURCES: [&str; 9] = [
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeAttributesClassName",
    "volumeMode",
];

pub(super) fn validate(kind: &ResourceKind, object: &Value, found: &mut Found) {
    let (spec, path) = (&object["spec"], Path::root("spec"));
    match kind.kind {
        "PersistentVolumeClaim" => claim(spec, &path, found),
        "PersistentVolume" => volume(spec, &path, found),
        "StorageClass" => class(object, found),
        "CSIDriver" => {
            let at = path.field("fsGroupPolicy");
            let policies = ["ReadWriteOnceWithFSType", "File", "None"];
            found.one_of(&at, &spec["fsGroupPolicy"], &policies);
        }
        "VolumeAttachment" => {
            for field in ["attacher", "nodeName"] {
                if text(spec, field).is_empty() {
                    found.required(&path.field(field), "");
                }
            }
        }
        "CSIStorageCapacity" => {
            let at = Path::root("storageClassName");
            let name = text(object, "storageClassName");
            found.all_invalid(&at, name, rules::subdomain(name));
        }
        _ => {}
    }
}

pub(super) fn validate_update(kind: &ResourceKind, new: &Value, old: &Value, found: &mut Found) {
    match kind.kind {
        "PersistentVolumeClaim" => claim_update(new, old, found),
        "PersistentVolume" => volume_update(&new["spec"], &old["spec"], found),
        "StorageClass" => {
            for field in ["parameters", "provisioner", "reclaimPolicy"] {
                if new[field] != old[field] {
                    found.forbidden(
                        &Path::root(field),
                        format!("updates to {field} are forbidden."),
                    );
                }
            }
            let field = "volumeBindingMode";
            found.immutable(&Path::root(field), &new[field], &old[field]);
        }
        "VolumeAttachment" => found.immutable(&Path::root("spec"), &new["spec"], &old["spec"]),
        _ => {}
    }
}

/// The spec of a claim, or of a template of one.
pub(super) fn claim(spec: &Value, path: &Path, found: &mut Found) {
    let at = path.field("accessModes");
    if spec["accessModes"].as_array().is_none_or(Vec::is_empty) {
        found.required(&at, "at least 1 access mode is required");
    }
    if spec["selector"].is_object() {
        selector(&spec["selector"], &path.field("selector"), found);
    }
    access_modes(&spec["accessModes"], &at, found);
    let (size, at) = (
        &spec["resources"]["requests"]["storage"],
        path.field("resources").key("storage"),
    );
    if size.is_null() {
        found.required(&at, "");
    } else {
        positive(size, &at, found);
    }
    class_name(spec, path, found);
    let at = path.field("volumeMode");
    found.one_of(&at, &spec["volumeMode"], &VOLUME_MODES);
    for field in ["dataSource", "dataSourceRef"] {
        if !spec[field].is_null() {
            found.forbidden(
                &path.field(field),
                "snapshots, clones and populators of volumes are not served",
            );
        }
    }
    if !text(spec, "volumeAttributesClassName").is_empty() {
        found.forbidden(
            &path.field("volumeAttributesClassName"),
            "classes of volume attributes are not served",
        );
    }
}

fn access_modes(modes: &Value, path: &Path, found: &mut Found) {
    let mut alone = false;
    for (mode, at) in items(modes, path) {
        if !ACCESS_MODES.contains(&mode.as_str().unwrap_or_default()) {
            found.not_supported(&at, mode, &ACCESS_MODES);
        }
        alone |= mode == "ReadWriteOncePod";
    }
    if alone && modes.as_array().is_some_and(|modes| modes.len() > 1) {
        found.forbidden(path, "may not use ReadWriteOncePod with other access modes");
    }
}

fn positive(value: &Value, path: &Path, found: &mut Found) {
    match quantity(value) {
        Some(size) if size > Quantity::default() => {}
        Some(_) => found.invalid(path, value, "must be greater than zero"),
        None => found.add(ErrorKind::Invalid, path, value, "must be a quantity"),
    }
}

fn class_name(spec: &Value, path: &Path, found: &mut Found) {
    let name = text(spec, "storageClassName");
    if !name.is_empty() {
        let at = path.field("storageClassName");
        found.all_invalid(&at, name, rules::subdomain(name));
    }
}

fn size_of(claim: &Value) -> Quantity {
    quantity(&claim["spec"]["resources"]["requests"]["storage"]).unwrap_or_default()
}

/// What a claim asks for is fixed, so that quotas and limits cannot be got around; once it is bound it may
/// ask for more.
fn claim_update(new: &Value, old: &Value, found: &mut Found) {
    let (mut masked, was) = (new["spec"].clone(), &old["spec"]);
    let mut take = |field: &str| {
        if let Some(spec) = masked.as_object_mut() {
            match was.get(field) {
                Some(value) => spec.insert(field.to_owned(), value.clone()),
                None => spec.remove(field),
            };
        }
    };
    if text(was, "volumeName").is_empty() {
        take("volumeName");
    }
    // A claim made before there was a default class gets it.
    if was["storageClassName"].is_null() {
        take("storageClassName");
    }
    let bound = new["status"]["phase"] == "Bound";
    if bound && masked["resources"]["requests"].is_object() {
        masked["resources"]["requests"]["storage"] =
            was["resources"]["requests"]["storage"].clone();
    }
    if masked != *was {
        found.forbidden(
            &Path::root("spec"),
            "spec is immutable after creation except resources.requests and \
             volumeAttributesClassName for bound claims",
        );
    }
    let capacity = quantity(&old["status"]["capacity"]["storage"]).unwrap_or_default();
    if size_of(new) < size_of(old) && size_of(new) <= capacity {
        found.forbidden(
            &Path::root("spec.resources.requests.storage"),
            "field can not be less than status.capacity",
        );
    }
}

fn volume(spec: &Value, path: &Path, found: &mut Found) {
    let at = path.field("accessModes");
    if spec["accessModes"].as_array().is_none_or(Vec::is_empty) {
        found.required(&at, "");
    }
    access_modes(&spec["accessModes"], &at, found);
    let (capacity, at) = (&spec["capacity"], path.field("capacity"));
    let map = capacity.as_object();
    if map.is_none_or(serde_json::Map::is_empty) {
        found.required(&at, "");
    } else if capacity["storage"].is_null() || map.is_some_and(|map| map.len() > 1) {
        found.not_supported(&at, capacity, &["storage"]);
    } else {
        positive(&capacity["storage"], &at.key("storage"), found);
    }
    found.one_of(
        &path.field("persistentVolumeReclaimPolicy"),
        &spec["persistentVolumeReclaimPolicy"],
        &["Delete", "Recycle", "Retain"],
    );
    sources(spec, path, found);
    class_name(spec, path, found);
    let at = path.field("volumeMode");
    found.one_of(&at, &spec["volumeMode"], &VOLUME_MODES);
    let reference = &spec["claimRef"];
    if reference.is_object() && text(reference, "name").is_empty() {
        found.required(&path.field("claimRef.name"), "");
    }
}

fn sources(spec: &Value, path: &Path, found: &mut Found) {
    let all: Vec<&String> = spec
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(field, value)| !NO_SOURCES.contains(&field.as_str()) && !value.is_null())
        .map(|(field, _)| field)
        .collect();
    if all.is_empty() {
        found.required(path, "must specify a volume type");
    }
    for extra in all.iter().skip(1) {
        found.forbidden(
            &path.field(extra),
            "may not specify more than 1 volume type",
        );
    }
    let (csi, at) = (&spec["csi"], path.field("csi"));
    if csi.is_object() {
        for field in ["driver", "volumeHandle"] {
            if text(csi, field).is_empty() {
                found.required(&at.field(field), "");
            }
        }
    }
}

fn volume_update(new: &Value, old: &Value, found: &mut Found) {
    let source = |spec: &Value| {
        let mut fields = spec.as_object().cloned().unwrap_or_default();
        fields.retain(|field, value| !NO_SOURCES.contains(&field.as_str()) && !value.is_null());
        fields
    };
    if source(new) != source(old) {
        found.forbidden(
            &Path::root("spec.persistentvolumesource"),
            "spec.persistentvolumesource is immutable after creation",
        );
    }
    let path = Path::root("spec");
    found.immutable(
        &path.field("volumeMode"),
        &new["volumeMode"],
        &old["volumeMode"],
    );
}

fn class(object: &Value, found: &mut Found) {
    let provisioner = text(object, "provisioner");
    let at = Path::root("provisioner");
    if provisioner.is_empty() {
        found.required(&at, "");
    } else {
        let problems = rules::qualified_name(&provisioner.to_lowercase());
        found.all_invalid(&at, provisioner, problems);
    }
    found.one_of(
        &Path::root("reclaimPolicy"),
        &object["reclaimPolicy"],
        &["Delete", "Retain"],
    );
    found.one_of(
        &Path::root("volumeBindingMode"),
        &object["volumeBindingMode"],
        &["Immediate", "WaitForFirstConsumer"],
    );
    for (name, _) in object["parameters"].as_object().into_iter().flatten() {
        if name.is_empty() {
            found.invalid(
                &Path::root("parameters"),
                &name.as_str().into(),
                "field can not be empty.",
            );
        }
    }
}

/// A set's spec whose template has the volumes that its pods get by their claims.
pub(super) fn with_claims(spec: &Value) -> Value {
    let mut spec = spec.clone();
    let claims = spec["volumeClaimTemplates"].as_array().cloned();
    let template = &mut spec["template"]["spec"];
    for claim in claims.unwrap_or_default() {
        let name = &claim["metadata"]["name"];
        if !template.is_object() || !name.is_string() {
            continue;
        }
        let volume = json!({"name": name, "persistentVolumeClaim": {"claimName": name}});
        match template["volumes"].as_array_mut() {
            Some(volumes) => {
                volumes.retain(|own| own["name"] != *name);
                volumes.push(volume);
            }
            None => template["volumes"] = json!([volume]),
        }
    }
    spec
}

/// A claim that a pod brings itself.
pub(super) fn ephemeral(source: &Value, path: &Path, found: &mut Found) {
    let (template, at) = (
        &source["volumeClaimTemplate"],
        path.field("volumeClaimTemplate"),
    );
    if !template.is_object() {
        found.required(&at, "");
        return;
    }
    meta::labels(
        &template["metadata"]["labels"],
        &at.field("metadata.labels"),
        found,
    );
    claim(&template["spec"], &at.field("spec"), found);
}

/// Devices of a pod's containers: each is a claim, and is not mounted too.
pub(super) fn devices(spec: &Value, path: &Path, volumes: &HashSet<String>, found: &mut Found) {
    let claims: HashSet<&str> = spec["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|volume| {
            ["persistentVolumeClaim", "ephemeral"]
                .iter()
                .any(|kind| volume[*kind].is_object())
        })
        .map(|volume| text(volume, "name"))
        .collect();
    for list in ["initContainers", "containers"] {
        for (container, at) in items(&spec[list], &path.field(list)) {
            let at = at.field("volumeDevices");
            of_container(container, &at, volumes, &claims, found);
        }
    }
}

fn of_container(
    container: &Value,
    path: &Path,
    volumes: &HashSet<String>,
    claims: &HashSet<&str>,
    found: &mut Found,
) {
    let mounts = |field: &str| -> HashSet<&str> {
        let list = container["volumeMounts"].as_array().into_iter().flatten();
        list.map(|mount| mount[field].as_str().unwrap_or_default())
            .collect()
    };
    let (mounted, at_paths) = (mounts("name"), mounts("mountPath"));
    let (mut names, mut paths) = (HashSet::new(), HashSet::new());
    for (device, at) in items(&container["volumeDevices"], path) {
        let (name, target) = (text(device, "name"), text(device, "devicePath"));
        let (name_at, target_at) = (at.field("name"), at.field("devicePath"));
        if name.is_empty() {
            found.required(&name_at, "");
        } else if !names.insert(name) {
            found.invalid(&name_at, &device["name"], "must be unique");
        } else if !volumes.contains(name) {
            found.add(ErrorKind::NotFound, &name_at, &device["name"], "");
        } else if !claims.contains(name) {
            found.invalid(
                &name_at,
                &device["name"],
                "can only use volume source type of PersistentVolumeClaim or Ephemeral for block \
                 mode",
            );
        }
        if mounted.contains(name) {
            found.invalid(
                &name_at,
                &device["name"],
                "must not already exist in volumeMounts",
            );
        }
        if target.is_empty() {
            found.required(&target_at, "");
        } else if !paths.insert(target) {
            found.invalid(&target_at, &device["devicePath"], "must be unique");
        } else if at_paths.contains(target) {
            found.invalid(
                &target_at,
                &device["devicePath"],
                "must not already exist as a path in volumeMounts",
            );
        }
        if target.split('/').any(|part| part == "..") {
            found.invalid(
                &target_at,
                &device["devicePath"],
                "can not contain backsteps ('..')",
            );
        }
    }
}

#[cfg(test)]
mod tests;

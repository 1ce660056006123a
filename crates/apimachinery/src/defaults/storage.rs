//! Defaults of claims, volumes and classes.

use serde_json::{Map, Value, json};

use crate::kinds::ResourceKind;

use super::{fill, object_in};

pub(super) fn apply(kind: &ResourceKind, object: &mut Value) {
    let Some(object) = object.as_object_mut() else {
        return;
    };
    match kind.kind {
        "PersistentVolumeClaim" => {
            if let Some(spec) = object_in(object, "spec") {
                claim(spec);
            }
            phase(object);
        }
        "PersistentVolume" => {
            if let Some(spec) = object_in(object, "spec") {
                fill(spec, "persistentVolumeReclaimPolicy", "Retain");
                fill(spec, "volumeMode", "Filesystem");
                if let Some(path) = object_in(spec, "hostPath") {
                    fill(path, "type", "");
                }
            }
            phase(object);
        }
        "StorageClass" => {
            fill(object, "reclaimPolicy", "Delete");
            fill(object, "volumeBindingMode", "Immediate");
        }
        "CSIDriver" => {
            if let Some(spec) = object_in(object, "spec") {
                for (field, value) in [
                    ("attachRequired", true),
                    ("podInfoOnMount", false),
                    ("requiresRepublish", false),
                    ("storageCapacity", false),
                    ("seLinuxMount", false),
                ] {
                    fill(spec, field, value);
                }
                fill(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
                if spec.get("volumeLifecycleModes").is_none_or(Value::is_null) {
                    spec.insert("volumeLifecycleModes".into(), json!(["Persistent"]));
                }
            }
        }
        _ => {}
    }
}

/// Of a claim, and of a template of one.
pub(super) fn claim(spec: &mut Map<String, Value>) {
    fill(spec, "volumeMode", "Filesystem");
}

fn phase(object: &mut Map<String, Value>) {
    fill(object, "status", json!({}));
    if let Some(status) = object_in(object, "status") {
        fill(status, "phase", "Pending");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_api_version;

    #[test]
    fn claims_volumes_and_classes_are_completed() {
        for (api_version, kind, given, expected) in [
            (
                "v1",
                "PersistentVolumeClaim",
                json!({"spec": {}}),
                json!({"spec": {"volumeMode": "Filesystem"}, "status": {"phase": "Pending"}}),
            ),
            (
                "v1",
                "PersistentVolume",
                json!({"spec": {"volumeMode": "Block"}}),
                json!({"spec": {"volumeMode": "Block", "persistentVolumeReclaimPolicy": "Retain"},
                    "status": {"phase": "Pending"}}),
            ),
            (
                "storage.k8s.io/v1",
                "StorageClass",
                json!({"provisioner": "p"}),
                json!({"provisioner": "p", "reclaimPolicy": "Delete", "volumeBindingMode": "Immediate"}),
            ),
        ] {
            let kind = by_api_version(api_version, kind).unwrap();
            let mut object = given;
            crate::defaults::apply(kind, &mut object);
            assert_eq!(object, expected);
            crate::defaults::apply(kind, &mut object);
            assert_eq!(object, expected);
        }
    }
}

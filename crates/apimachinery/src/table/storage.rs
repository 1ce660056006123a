//! Columns of claims, volumes, classes and drivers.

use serde_json::Value;

use super::{
    Column,
    columns::{AGE, NAME, string, wide},
    or, text,
};
use crate::kinds::ResourceKind;

/// The columns of a kind, if it is one of these.
pub(super) fn of(kind: &ResourceKind) -> Option<&'static [Column]> {
    let columns: &'static [Column] = match (kind.group, kind.kind) {
        ("", "PersistentVolumeClaim") => CLAIMS,
        ("", "PersistentVolume") => VOLUMES,
        ("storage.k8s.io", "StorageClass") => CLASSES,
        ("storage.k8s.io", "CSIDriver") => DRIVERS,
        ("storage.k8s.io", "CSINode") => DRIVERS_OF_NODES,
        ("storage.k8s.io", "VolumeAttachment") => ATTACHMENTS,
        ("storage.k8s.io", "CSIStorageCapacity") => CAPACITIES,
        _ => return None,
    };
    Some(columns)
}

/// The usual short forms of access modes, each once, in upstream's order.
fn access_modes(modes: &Value) -> String {
    let has = |mode: &str| {
        modes
            .as_array()
            .is_some_and(|all| all.iter().any(|m| m == mode))
    };
    let short: Vec<&str> = [
        ("ReadWriteOnce", "RWO"),
        ("ReadOnlyMany", "ROX"),
        ("ReadWriteMany", "RWX"),
        ("ReadWriteOncePod", "RWOP"),
    ]
    .into_iter()
    .filter(|(mode, _)| has(mode))
    .map(|(_, short)| short)
    .collect();
    short.join(",")
}

fn size(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    }
}

fn status(object: &Value, field: &[&str]) -> Value {
    if object["metadata"]["deletionTimestamp"].is_string() {
        return "Terminating".into();
    }
    text(object, field).into()
}

fn class(object: &Value) -> Value {
    let beta = "volume.beta.kubernetes.io/storage-class";
    let old = text(object, &["metadata", "annotations", beta]);
    or(old, text(object, &["spec", "storageClassName"])).into()
}

fn attributes(object: &Value) -> Value {
    or(
        text(object, &["spec", "volumeAttributesClassName"]),
        "<unset>",
    )
    .into()
}

const MODE: Column = wide("VolumeMode", |object, _| {
    or(text(object, &["spec", "volumeMode"]), "<unset>").into()
});
const ATTRIBUTES: Column = string("VolumeAttributesClass", |object, _| attributes(object));

static CLAIMS: &[Column] = &[
    NAME,
    string("Status", |claim, _| status(claim, &["status", "phase"])),
    string("Volume", |claim, _| {
        text(claim, &["spec", "volumeName"]).into()
    }),
    string("Capacity", |claim, _| {
        match claim["spec"]["volumeName"].as_str() {
            None | Some("") => "".into(),
            Some(_) => size(&claim["status"]["capacity"]["storage"]).into(),
        }
    }),
    string(
        "Access Modes",
        |claim, _| match claim["spec"]["volumeName"].as_str() {
            None | Some("") => "".into(),
            Some(_) => access_modes(&claim["status"]["accessModes"]).into(),
        },
    ),
    string("StorageClass", |claim, _| class(claim)),
    ATTRIBUTES,
    AGE,
    MODE,
];

static VOLUMES: &[Column] = &[
    NAME,
    string("Capacity", |volume, _| {
        size(&volume["spec"]["capacity"]["storage"]).into()
    }),
    string("Access Modes", |volume, _| {
        access_modes(&volume["spec"]["accessModes"]).into()
    }),
    string("Reclaim Policy", |volume, _| {
        text(volume, &["spec", "persistentVolumeReclaimPolicy"]).into()
    }),
    string("Status", |volume, _| status(volume, &["status", "phase"])),
    string("Claim", |volume, _| match &volume["spec"]["claimRef"] {
        Value::Null => "".into(),
        claim => format!("{}/{}", text(claim, &["namespace"]), text(claim, &["name"])).into(),
    }),
    string("StorageClass", |volume, _| class(volume)),
    ATTRIBUTES,
    string("Reason", |volume, _| {
        text(volume, &["status", "reason"]).into()
    }),
    AGE,
    MODE,
];

/// Whether a class is what claims get that name none.
fn is_default(class: &Value) -> bool {
    [
        "storageclass.kubernetes.io/is-default-class",
        "storageclass.beta.kubernetes.io/is-default-class",
    ]
    .iter()
    .any(|name| text(class, &["metadata", "annotations", name]) == "true")
}

static CLASSES: &[Column] = &[
    Column {
        cell: |class, _| {
            let name = text(class, &["metadata", "name"]);
            match is_default(class) {
                true => format!("{name} (default)").into(),
                false => name.into(),
            }
        },
        ..NAME
    },
    string("Provisioner", |class, _| {
        text(class, &["provisioner"]).into()
    }),
    string("ReclaimPolicy", |class, _| {
        or(text(class, &["reclaimPolicy"]), "Delete").into()
    }),
    string("VolumeBindingMode", |class, _| {
        or(text(class, &["volumeBindingMode"]), "Immediate").into()
    }),
    string("AllowVolumeExpansion", |class, _| {
        (class["allowVolumeExpansion"] == true).to_string().into()
    }),
    AGE,
];

fn list(value: &Value) -> String {
    let texts: Vec<&str> = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    or(&texts.join(","), "<unset>").to_owned()
}

static DRIVERS: &[Column] = &[
    NAME,
    string("AttachRequired", |driver, _| {
        (driver["spec"]["attachRequired"] != false)
            .to_string()
            .into()
    }),
    string("PodInfoOnMount", |driver, _| {
        (driver["spec"]["podInfoOnMount"] == true)
            .to_string()
            .into()
    }),
    string("StorageCapacity", |driver, _| {
        (driver["spec"]["storageCapacity"] == true)
            .to_string()
            .into()
    }),
    string("TokenRequests", |driver, _| {
        let requests = driver["spec"]["tokenRequests"].as_array();
        let audiences = requests.into_iter().flatten();
        let all: Value = audiences
            .map(|request| request["audience"].clone())
            .collect();
        list(&all).into()
    }),
    string("RequiresRepublish", |driver, _| {
        (driver["spec"]["requiresRepublish"] == true)
            .to_string()
            .into()
    }),
    string("Modes", |driver, _| {
        list(&driver["spec"]["volumeLifecycleModes"]).into()
    }),
    AGE,
];

static DRIVERS_OF_NODES: &[Column] = &[
    NAME,
    super::columns::column("Drivers", "integer", 0, |node, _| {
        node["spec"]["drivers"]
            .as_array()
            .map_or(0, Vec::len)
            .into()
    }),
    AGE,
];

static ATTACHMENTS: &[Column] = &[
    NAME,
    string("Attacher", |object, _| {
        text(object, &["spec", "attacher"]).into()
    }),
    string("PV", |object, _| {
        text(object, &["spec", "source", "persistentVolumeName"]).into()
    }),
    string("Node", |object, _| {
        text(object, &["spec", "nodeName"]).into()
    }),
    string("Attached", |object, _| {
        (object["status"]["attached"] == true).to_string().into()
    }),
    AGE,
];

static CAPACITIES: &[Column] = &[
    NAME,
    string("StorageClassName", |object, _| {
        text(object, &["storageClassName"]).into()
    }),
    string("Capacity", |object, _| size(&object["capacity"]).into()),
    AGE,
];

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;

    use crate::{
        kinds::by_api_version,
        table::{IncludeObject, row},
    };

    #[test]
    fn rows_are_what_kubectl_shows() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let made = "2026-01-01T00:00:00Z";
        for (api_version, kind, object, cells) in [
            (
                "v1",
                "PersistentVolumeClaim",
                json!({"metadata": {"name": "c", "creationTimestamp": made},
                    "spec": {"storageClassName": "local", "volumeName": "pvc-1", "volumeMode": "Block"},
                    "status": {"phase": "Bound", "capacity": {"storage": "1Gi"},
                        "accessModes": ["ReadWriteMany", "ReadWriteOnce"]}}),
                json!([
                    "c", "Bound", "pvc-1", "1Gi", "RWO,RWX", "local", "<unset>", "60s", "Block"
                ]),
            ),
            (
                "v1",
                "PersistentVolume",
                json!({"metadata": {"name": "pvc-1", "creationTimestamp": made},
                    "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOncePod"],
                        "persistentVolumeReclaimPolicy": "Delete", "storageClassName": "local",
                        "volumeMode": "Filesystem", "claimRef": {"namespace": "n", "name": "c"}},
                    "status": {"phase": "Bound"}}),
                json!([
                    "pvc-1",
                    "1Gi",
                    "RWOP",
                    "Delete",
                    "Bound",
                    "n/c",
                    "local",
                    "<unset>",
                    "",
                    "60s",
                    "Filesystem"
                ]),
            ),
            (
                "storage.k8s.io/v1",
                "StorageClass",
                json!({"metadata": {"name": "local", "creationTimestamp": made, "annotations":
                        {"storageclass.kubernetes.io/is-default-class": "true"}},
                    "provisioner": "p", "reclaimPolicy": "Delete", "volumeBindingMode": "Immediate",
                    "allowVolumeExpansion": true}),
                json!(["local (default)", "p", "Delete", "Immediate", "true", "60s"]),
            ),
        ] {
            let kind = by_api_version(api_version, kind).unwrap();
            assert_eq!(row(kind, &object, IncludeObject::None, now)["cells"], cells);
        }
    }
}

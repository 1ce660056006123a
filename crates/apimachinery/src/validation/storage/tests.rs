use serde_json::{Value, json};

use crate::{
    defaults,
    kinds::by_api_version,
    validation::{validate_create, validate_update},
};

fn object(kind: &str, body: &Value) -> Value {
    let mut object = json!({"metadata": {"name": "x"}});
    if kind == "PersistentVolumeClaim" {
        object["metadata"]["namespace"] = "d".into();
    }
    for (field, value) in body.as_object().unwrap() {
        object[field] = value.clone();
    }
    let kind = by_api_version(api(kind), kind).unwrap();
    defaults::apply(kind, &mut object);
    object
}

fn api(kind: &str) -> &'static str {
    match kind {
        "StorageClass" => "storage.k8s.io/v1",
        _ => "v1",
    }
}

fn made(kind: &str, body: &Value) -> Vec<String> {
    let object = object(kind, body);
    let kind = by_api_version(api(kind), kind).unwrap();
    let errors = validate_create(kind, &object);
    errors.iter().map(ToString::to_string).collect()
}

fn changed(kind: &str, old: &Value, new: &Value) -> Vec<String> {
    let (old, new) = (object(kind, old), object(kind, new));
    let kind = by_api_version(api(kind), kind).unwrap();
    let errors = validate_update(kind, &new, &old);
    errors.iter().map(ToString::to_string).collect()
}

fn claim(more: &Value) -> Value {
    let mut spec =
        json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}});
    for (field, value) in more.as_object().unwrap() {
        spec[field] = value.clone();
    }
    json!({"spec": spec})
}

#[test]
fn claims_are_refused_in_upstreams_words() {
    for (more, expected) in [
        (json!({}), vec![]),
        (
            json!({"accessModes": []}),
            vec!["spec.accessModes: Required value: at least 1 access mode is required"],
        ),
        (
            json!({"accessModes": ["ReadWriteOncePod", "ReadWriteOnce"]}),
            vec![
                "spec.accessModes: Forbidden: may not use ReadWriteOncePod with other access modes",
            ],
        ),
        (
            json!({"accessModes": ["Some"]}),
            vec![
                "spec.accessModes[0]: Unsupported value: \"Some\": supported values: \
                 \"ReadOnlyMany\", \"ReadWriteMany\", \"ReadWriteOnce\", \"ReadWriteOncePod\"",
            ],
        ),
        (
            json!({"resources": {}}),
            vec!["spec.resources[storage]: Required value"],
        ),
        (
            json!({"resources": {"requests": {"storage": "0"}}}),
            vec!["spec.resources[storage]: Invalid value: \"0\": must be greater than zero"],
        ),
        (
            json!({"volumeMode": "Tape"}),
            vec![
                "spec.volumeMode: Unsupported value: \"Tape\": supported values: \"Block\", \
                 \"Filesystem\"",
            ],
        ),
        (
            json!({"dataSource": {"kind": "PersistentVolumeClaim", "name": "y"}}),
            vec![
                "spec.dataSource: Forbidden: snapshots, clones and populators of volumes are not \
                 served",
            ],
        ),
    ] {
        assert_eq!(made("PersistentVolumeClaim", &claim(&more)), expected);
    }
}

#[test]
fn a_bound_claim_may_only_ask_for_more() {
    const FIXED: &str = "spec: Forbidden: spec is immutable after creation except \
        resources.requests and volumeAttributesClassName for bound claims";
    let bound = |size: &str, more: Value| {
        let mut object = claim(&json!({"resources": {"requests": {"storage": size}},
            "storageClassName": "local", "volumeName": "v"}));
        for (field, value) in more.as_object().unwrap() {
            object["spec"][field] = value.clone();
        }
        object["status"] = json!({"phase": "Bound", "capacity": {"storage": "1Gi"}});
        object
    };
    let check = |new: &Value| changed("PersistentVolumeClaim", &bound("1Gi", json!({})), new);
    assert_eq!(check(&bound("2Gi", json!({}))), Vec::<String>::new());
    assert_eq!(
        check(&bound("512Mi", json!({}))),
        ["spec.resources.requests.storage: Forbidden: field can not be less than status.capacity"]
    );
    for more in [
        json!({"accessModes": ["ReadWriteMany"]}),
        json!({"volumeName": "w"}),
        json!({"storageClassName": "other"}),
        json!({"volumeMode": "Block"}),
    ] {
        assert_eq!(check(&bound("1Gi", more)), [FIXED]);
    }
    // One that waits gets its volume's name and its class, once, and no other size.
    let waiting = claim(&json!({}));
    let named = claim(&json!({"volumeName": "v", "storageClassName": "local"}));
    assert!(changed("PersistentVolumeClaim", &waiting, &named).is_empty());
    let larger = claim(&json!({"resources": {"requests": {"storage": "2Gi"}}}));
    assert_eq!(changed("PersistentVolumeClaim", &waiting, &larger), [FIXED]);
}

#[test]
fn volumes_have_one_source_that_stays() {
    let volume = |more: Value| {
        let mut spec = json!({"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
            "csi": {"driver": "d", "volumeHandle": "h"}});
        for (field, value) in more.as_object().unwrap() {
            spec[field] = value.clone();
        }
        json!({"spec": spec})
    };
    for (more, expected) in [
        (json!({}), vec![]),
        (
            json!({"csi": null}),
            vec!["spec: Required value: must specify a volume type"],
        ),
        (
            json!({"nfs": {"server": "s", "path": "/"}}),
            vec!["spec.nfs: Forbidden: may not specify more than 1 volume type"],
        ),
        (
            json!({"csi": {"driver": "d"}}),
            vec!["spec.csi.volumeHandle: Required value"],
        ),
        (
            json!({"capacity": {}}),
            vec!["spec.capacity: Required value"],
        ),
        (
            json!({"persistentVolumeReclaimPolicy": "Burn"}),
            vec![
                "spec.persistentVolumeReclaimPolicy: Unsupported value: \"Burn\": supported \
                 values: \"Delete\", \"Recycle\", \"Retain\"",
            ],
        ),
    ] {
        assert_eq!(made("PersistentVolume", &volume(more)), expected);
    }
    let old = volume(json!({}));
    let more = json!({"persistentVolumeReclaimPolicy": "Delete", "capacity": {"storage": "2Gi"}});
    assert!(changed("PersistentVolume", &old, &volume(more)).is_empty());
    let moved = volume(json!({"csi": {"driver": "d", "volumeHandle": "other"}}));
    assert_eq!(
        changed("PersistentVolume", &old, &moved),
        [
            "spec.persistentvolumesource: Forbidden: spec.persistentvolumesource is immutable after \
             creation"
        ]
    );
}

#[test]
fn classes_stay_what_they_are() {
    let class = json!({"provisioner": "a.b/c"});
    assert!(made("StorageClass", &class).is_empty());
    assert_eq!(
        made("StorageClass", &json!({})),
        ["provisioner: Required value"]
    );
    let other =
        json!({"provisioner": "a.b/c", "reclaimPolicy": "Retain", "allowVolumeExpansion": true});
    assert_eq!(
        changed("StorageClass", &class, &other),
        ["reclaimPolicy: Forbidden: updates to reclaimPolicy are forbidden."]
    );
}

#[test]
fn devices_are_claims_that_are_not_mounted() {
    let pod = |device: Value| {
        let mut object = json!({"metadata": {"name": "x", "namespace": "d"}, "spec": {
            "volumes": [{"name": "c", "persistentVolumeClaim": {"claimName": "c"}},
                {"name": "m", "persistentVolumeClaim": {"claimName": "m"}}, {"name": "e"}],
            "containers": [{"name": "c", "image": "i",
                "volumeMounts": [{"name": "m", "mountPath": "/m"}], "volumeDevices": [device]}]}});
        let kind = by_api_version("v1", "Pod").unwrap();
        defaults::apply(kind, &mut object);
        let errors = validate_create(kind, &object);
        errors
            .iter()
            .map(|error| {
                error
                    .to_string()
                    .replace("spec.containers[0].volumeDevices[0].", "")
            })
            .collect::<Vec<_>>()
    };
    for (device, expected) in [
        (json!({"name": "c", "devicePath": "/dev/x"}), vec![]),
        (
            json!({"name": "n", "devicePath": "/dev/x"}),
            vec!["name: Not found: \"n\""],
        ),
        (
            json!({"name": "e", "devicePath": "/dev/x"}),
            vec![
                "name: Invalid value: \"e\": can only use volume source type of \
                 PersistentVolumeClaim or Ephemeral for block mode",
            ],
        ),
        (
            json!({"name": "m", "devicePath": "/dev/x"}),
            vec!["name: Invalid value: \"m\": must not already exist in volumeMounts"],
        ),
        (
            json!({"name": "c", "devicePath": "/dev/../x"}),
            vec!["devicePath: Invalid value: \"/dev/../x\": can not contain backsteps ('..')"],
        ),
    ] {
        assert_eq!(pod(device), expected);
    }
}

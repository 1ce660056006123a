//! What is special about a kind when it is written.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hypernetes_apimachinery::{ResourceKind, kinds, meta, validation::quality_of_service};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::workloads;
use crate::{certificates, services};

pub(crate) use crate::views::stored_kind;

/// Fields of metadata that only the server sets.
const SYSTEM_FIELDS: [&str; 5] = [
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
];

/// Which part of an object a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The object without its status.
    Main,
    /// The status.
    Status,
    /// The decision about a request for a certificate.
    Approval,
    /// A namespace's finalizers.
    Finalize,
    /// A pod's ephemeral containers.
    Ephemeral,
    /// The resources of a pod's containers.
    Resize,
}

/// Whether the kind's objects have a status that only its subresource writes.
pub(crate) fn has_status(kind: &ResourceKind) -> bool {
    kind.subresource("status").is_some()
}

fn has_generation(kind: &ResourceKind) -> bool {
    kinds::is_custom(kind)
        || has_status(kind)
            && !matches!(
                kind.kind,
                "Namespace"
                    | "Node"
                    | "ResourceQuota"
                    | "HorizontalPodAutoscaler"
                    | "Service"
                    | "CertificateSigningRequest"
                    | "PersistentVolume"
                    | "PersistentVolumeClaim"
                    | "VolumeAttachment"
            )
}

/// Whether `PUT` makes an object that is not there.
pub(crate) fn creates_on_update(kind: &ResourceKind) -> bool {
    matches!(
        kind.kind,
        "Lease" | "Event" | "Role" | "ClusterRole" | "RoleBinding" | "ClusterRoleBinding"
    )
}

/// Sets what the server sets in a new object.
pub(crate) fn prepare_create(kind: &ResourceKind, object: &mut Value, now: Timestamp) {
    for field in SYSTEM_FIELDS
        .into_iter()
        .chain(["resourceVersion", "selfLink"])
    {
        meta::remove(object, field);
    }
    meta::set(object, "uid", uuid::Uuid::new_v4().to_string());
    meta::set(object, "creationTimestamp", meta::format_time(now));
    if has_generation(kind) {
        meta::set(object, "generation", 1);
    }
    match kind.kind {
        "Namespace" => {
            let name = meta::name(object).unwrap_or_default().to_owned();
            meta::set_label(object, "kubernetes.io/metadata.name", &name);
            object["spec"] = json!({"finalizers": ["kubernetes"]});
            object["status"] = json!({"phase": "Active"});
        }
        "Pod" => {
            object["status"] = json!({"phase": "Pending"});
        }
        // Nodes register with their status.
        "Node" => {}
        _ if has_status(kind) => {
            if let Some(fields) = object.as_object_mut() {
                fields.remove("status");
            }
        }
        _ => {}
    }
    take_string_data(kind, object);
}

/// What follows from an object's defaulted fields.
pub(crate) fn finish_create(kind: &ResourceKind, object: &mut Value) {
    workloads::finish_create(kind, object);
    if kind.kind == "Pod" {
        object["status"]["qosClass"] = quality_of_service(&object["spec"]).into();
        let gates = object["spec"]["schedulingGates"].as_array();
        if gates.is_some_and(|gates| !gates.is_empty()) {
            // Said here and not by a scheduler, which has nothing to do with the pod before it is let go.
            object["status"]["conditions"] = json!([{
                "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
                "message": "Scheduling is blocked due to non-empty scheduling gates",
            }]);
        }
    }
}

/// Takes over from the old object what the write may not change.
pub(crate) fn prepare_update(
    kind: &ResourceKind,
    part: Part,
    new: &mut Value,
    old: &Value,
    now: Timestamp,
) {
    match part {
        Part::Main => {
            for field in SYSTEM_FIELDS {
                restore(new, old, field);
            }
            meta::remove(new, "selfLink");
            if has_status(kind) {
                restore_field(new, old, "status");
            }
            if certificates::is_request(kind) {
                restore_field(new, old, "spec");
            }
            if kind.kind == "Namespace" {
                restore_field(new, old, "spec");
                let name = meta::name(old).unwrap_or_default().to_owned();
                meta::set_label(new, "kubernetes.io/metadata.name", &name);
            }
            take_string_data(kind, new);
            if services::is_service(kind) {
                services::prepare_update(new, old);
            }
            if has_generation(kind) && differs_in_spec(kind, new, old) {
                meta::set(new, "generation", meta::generation(old) + 1);
            }
        }
        Part::Status | Part::Approval => {
            keep_only(new, old, &["status"]);
            if certificates::is_request(kind) {
                certificates::prepare_status(new, old, part == Part::Approval, now);
            }
        }
        Part::Finalize => keep_only(new, old, &["spec"]),
        Part::Ephemeral => {
            let list = new["spec"]["ephemeralContainers"].take();
            keep_only(new, old, &[]);
            if !list.is_null() {
                new["spec"]["ephemeralContainers"] = list;
            }
            count(kind, new, old);
        }
        Part::Resize => {
            let asked = new["spec"].take();
            keep_only(new, old, &[]);
            for field in ["containers", "initContainers"] {
                take_resources(&mut new["spec"][field], &asked[field]);
            }
            if !asked["resources"].is_null() {
                new["spec"]["resources"] = asked["resources"].clone();
            }
            count(kind, new, old);
        }
    }
}

/// A changed spec is a new generation.
fn count(kind: &ResourceKind, new: &mut Value, old: &Value) {
    if differs_in_spec(kind, new, old) {
        meta::set(new, "generation", meta::generation(old) + 1);
    }
}

/// Takes over of each container what a resize is about, by name.
fn take_resources(containers: &mut Value, asked: &Value) {
    for container in containers.as_array_mut().into_iter().flatten() {
        let name = container["name"].clone();
        let asked = asked.as_array().into_iter().flatten();
        let Some(asked) = asked.into_iter().find(|asked| asked["name"] == name) else {
            continue;
        };
        for field in ["resources", "resizePolicy"] {
            if let (Some(to), Some(value)) = (container.as_object_mut(), asked.get(field)) {
                to.insert(field.to_owned(), value.clone());
            }
        }
    }
}

/// Makes `new` the old object but for some fields.
fn keep_only(new: &mut Value, old: &Value, fields: &[&str]) {
    let mut out = old.clone();
    for field in fields {
        match new.get_mut(*field) {
            Some(value) => out[*field] = value.take(),
            None => {
                if let Some(out) = out.as_object_mut() {
                    out.remove(*field);
                }
            }
        }
    }
    *new = out;
}

fn restore(new: &mut Value, old: &Value, field: &str) {
    match old["metadata"].get(field) {
        Some(value) => meta::set(new, field, value.clone()),
        None => {
            meta::remove(new, field);
        }
    }
}

fn restore_field(new: &mut Value, old: &Value, field: &str) {
    if let Some(fields) = new.as_object_mut() {
        match old.get(field) {
            Some(value) => fields.insert(field.to_owned(), value.clone()),
            None => fields.remove(field),
        };
    }
}

/// Whether anything but type, metadata and status differs
/// (of a kind without a status subresource: anything but type and metadata).
fn differs_in_spec(kind: &ResourceKind, new: &Value, old: &Value) -> bool {
    let empty = Map::new();
    let rest = |value: &Value| {
        let mut fields = value.as_object().unwrap_or(&empty).clone();
        for field in ["apiVersion", "kind", "metadata"] {
            fields.remove(field);
        }
        if has_status(kind) {
            fields.remove("status");
        }
        fields
    };
    rest(new) != rest(old)
}

/// A Secret's `stringData` goes into its `data`.
fn take_string_data(kind: &ResourceKind, object: &mut Value) {
    if kind.kind != "Secret" {
        return;
    }
    let Some(fields) = object.as_object_mut() else {
        return;
    };
    let Some(Value::Object(strings)) = fields.remove("stringData") else {
        return;
    };
    let data = fields.entry("data").or_insert_with(|| json!({}));
    if data.is_null() {
        *data = json!({});
    }
    for (key, value) in strings {
        if let (Some(data), Some(text)) = (data.as_object_mut(), value.as_str()) {
            data.insert(key, STANDARD.encode(text).into());
        }
    }
}

/// Whether an object that is being deleted is to be removed.
pub(crate) fn is_finished(kind: &ResourceKind, object: &Value) -> bool {
    if !meta::is_deleting(object) || meta::finalizers(object).next().is_some() {
        return false;
    }
    if kind.kind == "Namespace" {
        return object["spec"]["finalizers"]
            .as_array()
            .is_none_or(Vec::is_empty);
    }
    meta::deletion_grace_seconds(object).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(plural: &str) -> &'static ResourceKind {
        kinds::by_resource("", "v1", plural).unwrap()
    }

    fn qos(resources: &[Value]) -> &'static str {
        let containers: Vec<Value> = resources.iter().map(|r| json!({"resources": r})).collect();
        quality_of_service(&json!({"containers": containers}))
    }

    #[test]
    fn quality_of_service_follows_the_resources() {
        let full = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}});
        assert_eq!(qos(&[json!({})]), "BestEffort");
        assert_eq!(qos(std::slice::from_ref(&full)), "Guaranteed");
        assert_eq!(qos(&[full, json!({})]), "Burstable");
        assert_eq!(qos(&[json!({"requests": {"cpu": "1"}})]), "Burstable");
    }

    #[test]
    fn a_new_pod_at_a_gate_says_so() {
        let conditions = |gates: Value| {
            let mut pod =
                json!({"metadata": {}, "spec": {"containers": [], "schedulingGates": gates}});
            prepare_create(kind("pods"), &mut pod, Timestamp::UNIX_EPOCH);
            finish_create(kind("pods"), &mut pod);
            pod["status"]["conditions"].take()
        };
        assert_eq!(conditions(Value::Null), Value::Null);
        assert_eq!(conditions(json!([])), Value::Null);
        let gated = conditions(json!([{"name": "example.com/hold"}]));
        assert_eq!(gated[0]["type"], "PodScheduled");
        assert_eq!(gated[0]["reason"], "SchedulingGated");
    }

    #[test]
    fn an_update_cannot_change_what_the_server_sets() {
        let old = json!({"metadata": {"name": "a", "uid": "1", "generation": 3}, "spec": {"x": 1},
            "status": {"phase": "Running"}});
        let mut new = json!({"metadata": {"name": "a", "uid": "2", "deletionTimestamp": "now"},
            "spec": {"x": 2}, "status": {"phase": "Failed"}});
        let now = Timestamp::UNIX_EPOCH;
        prepare_update(kind("pods"), Part::Main, &mut new, &old, now);
        assert_eq!(
            new["metadata"],
            json!({"name": "a", "uid": "1", "generation": 4})
        );
        assert_eq!(new["status"]["phase"], "Running");
        let mut new =
            json!({"metadata": {"name": "a"}, "spec": {"x": 2}, "status": {"phase": "Failed"}});
        prepare_update(kind("pods"), Part::Status, &mut new, &old, now);
        assert_eq!(new["spec"]["x"], 1);
        assert_eq!(new["metadata"]["generation"], 3);
        assert_eq!(new["status"]["phase"], "Failed");
    }

    #[test]
    fn string_data_is_encoded() {
        let mut secret = json!({"metadata": {"name": "a"}, "stringData": {"p": "x"}});
        prepare_create(kind("secrets"), &mut secret, Timestamp::UNIX_EPOCH);
        assert_eq!(secret["data"], json!({"p": "eA=="}));
        assert!(secret.get("stringData").is_none());
    }

    #[test]
    fn an_object_is_gone_when_nobody_holds_it() {
        let mut pod =
            json!({"metadata": {"deletionTimestamp": "x", "deletionGracePeriodSeconds": 30}});
        assert!(!is_finished(kind("pods"), &pod));
        pod["metadata"]["deletionGracePeriodSeconds"] = 0.into();
        assert!(is_finished(kind("pods"), &pod));
        pod["metadata"]["finalizers"] = json!(["a/b"]);
        assert!(!is_finished(kind("pods"), &pod));
        let namespace =
            json!({"metadata": {"deletionTimestamp": "x"}, "spec": {"finalizers": ["kubernetes"]}});
        assert!(!is_finished(kind("namespaces"), &namespace));
    }
}

//! Defaults of ReplicationControllers and Endpoints.

use serde_json::{Value, json};

use super::{fill, object_in, objects_in, workloads::template};

/// Selector and labels are those of the template, unless they are given.
pub(super) fn replication_controller(object: &mut Value) {
    let labels = object["spec"]["template"]["metadata"]["labels"].clone();
    let Some(controller) = object.as_object_mut() else {
        return;
    };
    let empty = |value: Option<&Value>| {
        value
            .and_then(Value::as_object)
            .is_none_or(serde_json::Map::is_empty)
    };
    if labels.is_object() {
        let metadata = controller.entry("metadata").or_insert_with(|| json!({}));
        if empty(metadata.get("labels")) {
            metadata["labels"] = labels.clone();
        }
    }
    let Some(spec) = object_in(controller, "spec") else {
        return;
    };
    if labels.is_object() && empty(spec.get("selector")) {
        spec.insert("selector".into(), labels);
    }
    fill(spec, "replicas", 1);
    template(spec);
}

pub(super) fn endpoints(object: &mut Value) {
    let Some(endpoints) = object.as_object_mut() else {
        return;
    };
    for subset in objects_in(endpoints, "subsets") {
        for port in objects_in(subset, "ports") {
            fill(port, "protocol", "TCP");
        }
    }
}

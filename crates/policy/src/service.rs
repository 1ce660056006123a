//! Services: what this node cannot do for anyone, and what a tenant may not.

use serde_json::Value;

use crate::{AdmissionRequest, FieldError};

pub(crate) fn check(request: &AdmissionRequest<'_>, object: &Value, causes: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let old = request.old_object.map(|old| &old["spec"]);
    let is_new = |field: &str| old.is_none_or(|old| old[field] != spec[field]);
    if spec["type"] == "NodePort" && is_new("type") {
        causes.push(FieldError::new(
            "spec.type",
            "NodePort is not supported: ports of the node are given to pods by hostPort only",
        ));
    }
    let external = spec["externalIPs"].as_array();
    if external.is_some_and(|ips| !ips.is_empty()) && is_new("externalIPs") {
        causes.push(FieldError::new(
            "spec.externalIPs",
            "is not supported: a service has no addresses of others",
        ));
    }
    for (index, port) in spec["ports"].as_array().into_iter().flatten().enumerate() {
        if port["nodePort"].as_i64().is_some_and(|port| port != 0) {
            causes.push(FieldError::new(
                format!("spec.ports[{index}].nodePort"),
                "is not supported: ports of the node are given to pods by hostPort only",
            ));
        }
    }
}

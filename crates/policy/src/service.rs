//! Services: what this node cannot do for anyone, and what a tenant may not.

use serde_json::Value;

use crate::{AdmissionRequest, FieldError, NODE_PORTS_ANNOTATION, meta};

pub(crate) fn check(request: &AdmissionRequest<'_>, object: &Value, causes: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let old = request.old_object.map(|old| &old["spec"]);
    let is_new = |field: &str| old.is_none_or(|old| old[field] != spec[field]);
    if spec["type"] == "NodePort" && is_new("type") && !may_have_node_ports(request) {
        causes.push(FieldError::new(
            "spec.type",
            "NodePort: the tenant may not have ports of the node; its object says how many: \
             spec.nodePorts",
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
        if spec["type"] == "LoadBalancer" && port["nodePort"].as_i64().is_some_and(|port| port != 0)
        {
            causes.push(FieldError::new(
                format!("spec.ports[{index}].nodePort"),
                "is not supported for type LoadBalancer: use type NodePort",
            ));
        }
    }
}

/// Tenants only as far as their object says; how many is a matter of quota.
fn may_have_node_ports(request: &AdmissionRequest<'_>) -> bool {
    request.tenant().is_none()
        || request
            .namespace_object
            .and_then(|namespace| meta::annotation(namespace, NODE_PORTS_ANNOTATION))
            .and_then(|count| count.parse::<u16>().ok())
            .is_some_and(|count| count > 0)
}

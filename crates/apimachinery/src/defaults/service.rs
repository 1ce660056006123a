//! What a Service and an EndpointSlice leave out.

use serde_json::{Map, Value, json};

use super::{fill, objects_in};

/// Seconds for which a client stays with its endpoint, if it is not said.
const AFFINITY_SECONDS: i64 = 3 * 60 * 60;

pub(super) fn service(object: &mut Value) {
    let Some(service) = object.as_object_mut() else {
        return;
    };
    let spec = service.entry("spec").or_insert_with(|| json!({}));
    let Some(spec) = spec.as_object_mut() else {
        return;
    };
    fill(spec, "sessionAffinity", "None");
    fill(spec, "type", "ClusterIP");
    match text(spec, "sessionAffinity") {
        "None" => {
            spec.remove("sessionAffinityConfig");
        }
        "ClientIP" => {
            let config = filled(spec, "sessionAffinityConfig");
            if let Some(client) = config.map(|config| filled(config, "clientIP")) {
                let set = |client: &mut Map<String, Value>| {
                    if client.get("timeoutSeconds").is_none_or(Value::is_null) {
                        client.insert("timeoutSeconds".into(), AFFINITY_SECONDS.into());
                    }
                };
                client.map(set).unwrap_or_default();
            }
        }
        _ => {}
    }
    for port in objects_in(spec, "ports") {
        fill(port, "protocol", "TCP");
        let open = match port.get("targetPort") {
            None | Some(Value::Null) => true,
            Some(Value::String(name)) => name.is_empty(),
            Some(number) => number.as_i64() == Some(0),
        };
        if open && let Some(number) = port.get("port").cloned() {
            port.insert("targetPort".into(), number);
        }
    }
    let kind = text(spec, "type").to_owned();
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        fill(spec, "externalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
        fill(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer"
        && spec
            .get("allocateLoadBalancerNodePorts")
            .is_none_or(Value::is_null)
    {
        spec.insert("allocateLoadBalancerNodePorts".into(), true.into());
    }
    // One of the two says it for both.
    let ips = spec.get("clusterIPs").and_then(Value::as_array);
    match (text(spec, "clusterIP"), ips.and_then(|ips| ips.first())) {
        ("", Some(first)) => {
            let first = first.clone();
            spec.insert("clusterIP".into(), first);
        }
        (one, None) if !one.is_empty() => {
            let one = one.to_owned();
            spec.insert("clusterIPs".into(), json!([one]));
        }
        _ => {}
    }
    let status = service.entry("status").or_insert_with(|| json!({}));
    if let Some(status) = status.as_object_mut() {
        status.entry("loadBalancer").or_insert_with(|| json!({}));
    }
}

pub(super) fn endpoint_slice(object: &mut Value) {
    let Some(slice) = object.as_object_mut() else {
        return;
    };
    for port in objects_in(slice, "ports") {
        port.entry("name").or_insert_with(|| "".into());
        fill(port, "protocol", "TCP");
    }
}

fn text<'a>(object: &'a Map<String, Value>, field: &str) -> &'a str {
    object
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The object in a field, made if it is absent or null.
fn filled<'a>(
    object: &'a mut Map<String, Value>,
    field: &str,
) -> Option<&'a mut Map<String, Value>> {
    let value = object.entry(field).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_a_cluster_ip_by_default() {
        let mut object = json!({"spec": {"ports": [{"port": 80}, {"port": 53, "targetPort": "dns", "protocol": "UDP"}]}});
        service(&mut object);
        assert_eq!(
            object,
            json!({
                "spec": {
                    "type": "ClusterIP",
                    "sessionAffinity": "None",
                    "internalTrafficPolicy": "Cluster",
                    "ports": [
                        {"port": 80, "protocol": "TCP", "targetPort": 80},
                        {"port": 53, "protocol": "UDP", "targetPort": "dns"},
                    ],
                },
                "status": {"loadBalancer": {}},
            })
        );
    }

    #[test]
    fn affinity_has_a_timeout_and_addresses_are_said_twice() {
        let mut object = json!({"spec": {"sessionAffinity": "ClientIP", "clusterIP": "None"}});
        service(&mut object);
        assert_eq!(
            object["spec"]["sessionAffinityConfig"],
            json!({"clientIP": {"timeoutSeconds": 10800}})
        );
        assert_eq!(object["spec"]["clusterIPs"], json!(["None"]));
        let mut object = json!({"spec": {"type": "LoadBalancer", "sessionAffinityConfig": {}}});
        service(&mut object);
        assert_eq!(object["spec"]["externalTrafficPolicy"], "Cluster");
        assert_eq!(object["spec"]["allocateLoadBalancerNodePorts"], true);
        assert!(object["spec"].get("sessionAffinityConfig").is_none());
        let mut object = json!({"spec": {"type": "ExternalName"}});
        service(&mut object);
        assert!(object["spec"].get("internalTrafficPolicy").is_none());
    }
}

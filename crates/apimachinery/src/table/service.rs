//! Cells of Services and EndpointSlices.

use serde_json::Value;

use super::{or, text};

fn joined(list: &Value) -> String {
    let texts: Vec<&str> = list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    texts.join(",")
}

pub(super) fn cluster_ip(service: &Value) -> String {
    let spec = &service["spec"];
    let first = spec["clusterIPs"][0].as_str();
    or(
        first.unwrap_or_else(|| text(spec, &["clusterIP"])),
        "<none>",
    )
    .to_owned()
}

pub(super) fn external_ip(service: &Value) -> String {
    let spec = &service["spec"];
    let own = joined(&spec["externalIPs"]);
    match text(spec, &["type"]) {
        "ExternalName" => text(spec, &["externalName"]).to_owned(),
        "LoadBalancer" => {
            let mut all: Vec<String> = service["status"]["loadBalancer"]["ingress"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| or(text(one, &["ip"]), text(one, &["hostname"])).to_owned())
                .filter(|one| !one.is_empty())
                .collect();
            if !own.is_empty() {
                all.push(own);
            }
            or(&all.join(","), "<pending>").to_owned()
        }
        _ => or(&own, "<none>").to_owned(),
    }
}

pub(super) fn ports(service: &Value) -> String {
    let ports: Vec<String> = service["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            let number = port["port"].as_i64().unwrap_or_default();
            let protocol = text(port, &["protocol"]);
            match port["nodePort"].as_i64().unwrap_or_default() {
                0 => format!("{number}/{protocol}"),
                node => format!("{number}:{node}/{protocol}"),
            }
        })
        .collect();
    or(&ports.join(","), "<none>").to_owned()
}

pub(super) fn selector(service: &Value) -> String {
    let pairs: Vec<String> = service["spec"]["selector"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    or(&pairs.join(","), "<none>").to_owned()
}

/// How many items of a slice are shown.
const SHOWN: usize = 3;

fn shortened(all: &[String]) -> String {
    if all.is_empty() {
        return "<unset>".to_owned();
    }
    let shown = all[..all.len().min(SHOWN)].join(",");
    match all.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} + {more} more..."),
    }
}

pub(super) fn slice_ports(slice: &Value) -> String {
    let ports: Vec<String> = slice["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| {
            port["port"]
                .as_i64()
                .map_or_else(|| "*".to_owned(), |number| number.to_string())
        })
        .collect();
    shortened(&ports)
}

pub(super) fn slice_endpoints(slice: &Value) -> String {
    let addresses: Vec<String> = slice["endpoints"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|endpoint| endpoint["addresses"].as_array().into_iter().flatten())
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect();
    shortened(&addresses)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn services_show_what_clients_connect_to() {
        let service = json!({"spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.5",
            "clusterIPs": ["10.96.0.5"], "selector": {"app": "web", "tier": "a"},
            "ports": [{"port": 80, "protocol": "TCP"},
                {"port": 53, "protocol": "UDP", "nodePort": 30053}]}});
        assert_eq!(cluster_ip(&service), "10.96.0.5");
        assert_eq!(external_ip(&service), "<pending>");
        assert_eq!(ports(&service), "80/TCP,53:30053/UDP");
        assert_eq!(selector(&service), "app=web,tier=a");
        let named = json!({"spec": {"type": "ExternalName", "externalName": "x.org"}});
        assert_eq!(
            [
                cluster_ip(&named),
                external_ip(&named),
                ports(&named),
                selector(&named)
            ],
            ["<none>", "x.org", "<none>", "<none>"]
        );
    }

    #[test]
    fn slices_show_three_of_each() {
        let slice = json!({"ports": [{"port": 80}, {}],
            "endpoints": [{"addresses": ["a"]}, {"addresses": ["b"]}, {"addresses": ["c"]},
                {"addresses": ["d"]}]});
        assert_eq!(slice_ports(&slice), "80,*");
        assert_eq!(slice_endpoints(&slice), "a,b,c + 1 more...");
        assert_eq!(slice_endpoints(&json!({})), "<unset>");
    }
}

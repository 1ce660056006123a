//! Variables by which containers find services, as Docker's links had them.

use std::{net::Ipv4Addr, sync::Arc};

use k8s_openapi::api::core::v1::Service;

/// Those of the API server, and with `all` those of `services`.
pub(super) fn variables(
    services: &[Arc<Service>],
    all: bool,
    api: Ipv4Addr,
) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    let https = [Port {
        name: "https",
        number: 443,
        protocol: "TCP",
    }];
    push(&mut variables, "kubernetes", &api.to_string(), &https);
    if !all {
        return variables;
    }
    let mut services: Vec<_> = services.iter().collect();
    services.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    for service in services {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let Some(spec) = &service.spec else { continue };
        let address = spec.cluster_ip.as_deref().unwrap_or_default();
        let external = spec.type_.as_deref() == Some("ExternalName");
        if name == "kubernetes" || external || matches!(address, "" | "None") {
            continue;
        }
        let ports: Vec<Port<'_>> = spec
            .ports
            .iter()
            .flatten()
            .map(|port| Port {
                name: port.name.as_deref().unwrap_or_default(),
                number: port.port,
                protocol: port.protocol.as_deref().unwrap_or("TCP"),
            })
            .collect();
        push(&mut variables, name, address, &ports);
    }
    variables
}

struct Port<'a> {
    name: &'a str,
    number: i32,
    protocol: &'a str,
}

fn upper(name: &str) -> String {
    name.to_ascii_uppercase().replace('-', "_")
}

fn push(variables: &mut Vec<(String, String)>, name: &str, address: &str, ports: &[Port<'_>]) {
    let name = upper(name);
    let Some(first) = ports.first() else { return };
    let mut add = |suffix: String, value: String| {
        variables.push((format!("{name}_{suffix}"), value));
    };
    add("SERVICE_HOST".to_owned(), address.to_owned());
    add("SERVICE_PORT".to_owned(), first.number.to_string());
    for port in ports.iter().filter(|port| !port.name.is_empty()) {
        let suffix = format!("SERVICE_PORT_{}", upper(port.name));
        add(suffix, port.number.to_string());
    }
    let url = |port: &Port<'_>| {
        let protocol = port.protocol.to_ascii_lowercase();
        format!("{protocol}://{address}:{}", port.number)
    };
    add("PORT".to_owned(), url(first));
    for port in ports {
        let base = format!(
            "PORT_{}_{}",
            port.number,
            port.protocol.to_ascii_uppercase()
        );
        add(base.clone(), url(port));
        add(format!("{base}_PROTO"), port.protocol.to_ascii_lowercase());
        add(format!("{base}_PORT"), port.number.to_string());
        add(format!("{base}_ADDR"), address.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(name: &str, spec: &Value) -> Arc<Service> {
        let service = json!({"metadata": {"name": name, "namespace": "acme"}, "spec": spec});
        Arc::new(serde_json::from_value(service).unwrap())
    }

    #[test]
    fn services_with_an_address_are_in_the_environment() {
        let services = [
            service(
                "headless",
                &json!({"clusterIP": "None", "ports": [{"port": 1}]}),
            ),
            service(
                "my-db",
                &json!({"clusterIP": "10.96.0.7", "ports": [
                {"name": "sql", "port": 5432, "protocol": "TCP"},
                {"name": "dns", "port": 53, "protocol": "UDP"}]}),
            ),
        ];
        let api = Ipv4Addr::new(10, 96, 0, 1);
        let all = variables(&services, true, api);
        let text: Vec<String> = all
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        for expected in [
            "KUBERNETES_SERVICE_HOST=10.96.0.1",
            "KUBERNETES_SERVICE_PORT=443",
            "KUBERNETES_SERVICE_PORT_HTTPS=443",
            "KUBERNETES_PORT_443_TCP_ADDR=10.96.0.1",
            "MY_DB_SERVICE_HOST=10.96.0.7",
            "MY_DB_SERVICE_PORT=5432",
            "MY_DB_SERVICE_PORT_DNS=53",
            "MY_DB_PORT=tcp://10.96.0.7:5432",
            "MY_DB_PORT_53_UDP=udp://10.96.0.7:53",
            "MY_DB_PORT_53_UDP_PROTO=udp",
        ] {
            assert!(
                text.iter().any(|line| line == expected),
                "{expected}: {text:?}"
            );
        }
        assert!(!text.iter().any(|line| line.starts_with("HEADLESS")));
        let few = variables(&services, false, api);
        assert!(few.iter().all(|(name, _)| name.starts_with("KUBERNETES_")));
    }
}

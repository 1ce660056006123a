//! The services of one network, from the objects of the API. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hypernetes_network::{Backends, NameData, NetworkServices, Protocol, ServiceName, ServicePort};
use hypernetes_types::{
    NetworkId,
    kinds::{NETWORK_LABEL, TENANT_LABEL},
};
use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    discovery::v1::{Endpoint, EndpointSlice},
};
use kube::api::DynamicObject;

use super::Settings;
use crate::network::network_id;

/// Label with the service's name.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Seconds for which a client stays with its endpoint if the service does not say.
const AFFINITY_SECONDS: u32 = 10_800;

/// All objects.
pub(super) struct State {
    pub(super) services: Vec<Arc<Service>>,
    pub(super) slices: Vec<Arc<EndpointSlice>>,
    pub(super) namespaces: Vec<Arc<Namespace>>,
    pub(super) networks: Vec<Arc<DynamicObject>>,
}

type Slices<'a> = BTreeMap<(&'a str, &'a str), Vec<&'a EndpointSlice>>;

/// What `network` shall have.
pub(super) fn services(settings: &Settings, state: &State, network: &NetworkId) -> NetworkServices {
    let homes = homes(state, network);
    let mut slices = Slices::new();
    for slice in &state.slices {
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        let labels = slice.metadata.labels.as_ref();
        let service = labels.and_then(|labels| labels.get(SERVICE_NAME));
        if let Some(service) = service.filter(|_service| homes.contains(namespace)) {
            slices.entry((namespace, service)).or_default().push(slice);
        }
    }
    let mut out = NetworkServices {
        range: Some(IpNet::V4(settings.range)),
        ports: Vec::new(),
        names: Vec::new(),
    };
    api(settings, &mut out);
    let mut services: Vec<_> = state.services.iter().collect();
    services.sort_by_key(|service| (&service.metadata.namespace, &service.metadata.name));
    for service in services {
        let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
        let name = service.metadata.name.as_deref().unwrap_or_default();
        if !homes.contains(namespace) || (namespace, name) == ("default", "kubernetes") {
            continue;
        }
        let mut slices = slices.remove(&(namespace, name)).unwrap_or_default();
        slices.sort_by_key(|slice| &slice.metadata.name);
        let fqdn = format!("{name}.{namespace}.svc.{}", settings.domain);
        one(service, &slices, &fqdn, &mut out);
    }
    out
}

/// The namespaces whose services are on the network.
fn homes<'a>(state: &'a State, network: &NetworkId) -> BTreeSet<&'a str> {
    let with_network: BTreeSet<&str> = state
        .networks
        .iter()
        .filter(|object| object.metadata.name.as_deref() == Some("default"))
        .filter_map(|object| object.metadata.namespace.as_deref())
        .collect();
    state
        .namespaces
        .iter()
        .filter_map(|object| {
            let name = object.metadata.name.as_deref()?;
            let label = |key: &str| object.metadata.labels.as_ref()?.get(key);
            let own = match label(NETWORK_LABEL) {
                Some(own) => network_id(name, own)?,
                None if label(TENANT_LABEL).is_some() || with_network.contains(name) => {
                    network_id(name, "default")?
                }
                None => "default".parse().ok()?,
            };
            (own == *network).then_some(name)
        })
        .collect()
}

/// The API server is in every network.
fn api(settings: &Settings, out: &mut NetworkServices) {
    let address = settings.api().into();
    let fqdn = format!("kubernetes.default.svc.{}", settings.domain);
    out.ports.push(ServicePort {
        address,
        protocol: Protocol::Tcp,
        port: 443,
        affinity: None,
        backends: Backends::Api,
        node_port: None,
    });
    names_of_address(&fqdn, address, [("https", "TCP", 443)].into_iter(), out);
}

fn names_of_address<'a>(
    fqdn: &str,
    address: IpAddr,
    ports: impl Iterator<Item = (&'a str, &'a str, u16)>,
    out: &mut NetworkServices,
) {
    out.names.push(ServiceName {
        name: fqdn.to_owned(),
        data: NameData::Address {
            address,
            reverse: true,
        },
    });
    for (name, protocol, port) in ports {
        service_records(fqdn, name, protocol, port, fqdn, out);
    }
}

/// The SRV records of a port at a target.
fn service_records(
    fqdn: &str,
    name: &str,
    protocol: &str,
    port: u16,
    target: &str,
    out: &mut NetworkServices,
) {
    let mut owners = vec![fqdn.to_owned()];
    if !name.is_empty() {
        owners.push(format!("_{name}._{}.{fqdn}", protocol.to_ascii_lowercase()));
    }
    for owner in owners {
        out.names.push(ServiceName {
            name: owner,
            data: NameData::Service {
                port,
                target: target.to_owned(),
            },
        });
    }
}

fn one(service: &Service, slices: &[&EndpointSlice], fqdn: &str, out: &mut NetworkServices) {
    let Some(spec) = &service.spec else { return };
    if spec.type_.as_deref() == Some("ExternalName") {
        let target = spec.external_name.clone().unwrap_or_default();
        out.names.push(ServiceName {
            name: fqdn.to_owned(),
            data: NameData::Alias(target.trim_end_matches('.').to_owned()),
        });
        return;
    }
    let ports = || {
        spec.ports.iter().flatten().filter_map(|port| {
            Some((
                port.name.as_deref().unwrap_or_default(),
                port.protocol.as_deref().unwrap_or("TCP"),
                u16::try_from(port.port).ok()?,
                port.node_port.and_then(|port| u16::try_from(port).ok()),
            ))
        })
    };
    match spec.cluster_ip.as_deref() {
        Some("None") => headless(slices, fqdn, out),
        Some(text) => {
            let Ok(address) = text.parse::<IpAddr>() else {
                return;
            };
            let named = ports().map(|(name, protocol, port, _node)| (name, protocol, port));
            names_of_address(fqdn, address, named, out);
            let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
                spec.session_affinity_config
                    .as_ref()
                    .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
                    .and_then(|seconds| u32::try_from(seconds).ok())
                    .unwrap_or(AFFINITY_SECONDS)
            });
            for (name, text, port, node_port) in ports() {
                let Some(protocol) = protocol(text) else {
                    continue;
                };
                out.ports.push(ServicePort {
                    address,
                    protocol,
                    port,
                    affinity,
                    backends: Backends::Endpoints(backends(slices, name, text)),
                    node_port: node_port.filter(|port| *port != 0),
                });
            }
        }
        None => {}
    }
}

fn protocol(text: &str) -> Option<Protocol> {
    match text {
        "TCP" => Some(Protocol::Tcp),
        "UDP" => Some(Protocol::Udp),
        "SCTP" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// Whether connections may go to an endpoint; `last` for those that are about to end.
fn takes(endpoint: &Endpoint, last: bool) -> bool {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    if last {
        conditions.serving == Some(true) && conditions.terminating == Some(true)
    } else {
        conditions.ready != Some(false)
    }
}

fn endpoints<'a>(
    slices: &'a [&EndpointSlice],
) -> impl Iterator<Item = (&'a EndpointSlice, &'a Endpoint)> {
    slices
        .iter()
        .filter(|slice| slice.address_type == "IPv4")
        .flat_map(|slice| {
            slice
                .endpoints
                .iter()
                .flatten()
                .map(move |one| (*slice, one))
        })
}

/// Where connections to a port go: to what is ready, or else to what still serves while it ends.
fn backends(slices: &[&EndpointSlice], name: &str, protocol: &str) -> Vec<SocketAddr> {
    let of = |last: bool| -> BTreeSet<SocketAddr> {
        endpoints(slices)
            .filter(|(_slice, endpoint)| takes(endpoint, last))
            .filter_map(|(slice, endpoint)| {
                let port = slice.ports.iter().flatten().find(|port| {
                    port.name.as_deref().unwrap_or_default() == name
                        && port.protocol.as_deref().unwrap_or("TCP") == protocol
                })?;
                let number = u16::try_from(port.port?).ok()?;
                let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
                Some(SocketAddr::new(address, number))
            })
            .collect()
    };
    let ready = of(false);
    let chosen = if ready.is_empty() { of(true) } else { ready };
    chosen.into_iter().collect()
}

/// A service without an address is its endpoints, each with a name of its own.
fn headless(slices: &[&EndpointSlice], fqdn: &str, out: &mut NetworkServices) {
    for (slice, endpoint) in endpoints(slices).filter(|(_slice, one)| takes(one, false)) {
        let Some(address) = endpoint
            .addresses
            .first()
            .and_then(|text| text.parse::<IpAddr>().ok())
        else {
            continue;
        };
        let host = match endpoint.hostname.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => name.to_ascii_lowercase(),
            None => address.to_string().replace(['.', ':'], "-"),
        };
        let target = format!("{host}.{fqdn}");
        for (name, reverse) in [
            (fqdn.to_owned(), false),
            (target.clone(), endpoint.hostname.is_some()),
        ] {
            out.names.push(ServiceName {
                name,
                data: NameData::Address { address, reverse },
            });
        }
        for port in slice.ports.iter().flatten() {
            let number = port.port.and_then(|port| u16::try_from(port).ok());
            let (name, protocol) = (
                port.name.as_deref().unwrap_or_default(),
                port.protocol.as_deref().unwrap_or("TCP"),
            );
            if let Some(number) = number {
                service_records(fqdn, name, protocol, number, &target, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;

    fn object<K: DeserializeOwned>(value: Value) -> Arc<K> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn settings() -> Settings {
        Settings {
            range: "10.96.0.0/16".parse().unwrap(),
            domain: "cluster.local".to_owned(),
        }
    }

    fn state(spec: &Value, endpoints: &Value) -> State {
        let namespace = |name: &str, labels: &Value| {
            object(json!({"metadata": {"name": name, "labels": labels}}))
        };
        let tenant = |name: &str| json!({TENANT_LABEL: name});
        let service = |home: &str| {
            object(json!({"metadata": {"name": "web", "namespace": home}, "spec": spec}))
        };
        State {
            services: vec![service("acme"), service("globex"), service("default")],
            slices: vec![object(json!({
                "metadata": {"name": "web-x", "namespace": "acme",
                    "labels": {SERVICE_NAME: "web"}},
                "addressType": "IPv4",
                "endpoints": endpoints,
                "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            }))],
            namespaces: vec![
                namespace("acme", &tenant("acme")),
                namespace("globex", &tenant("globex")),
                namespace("default", &json!({})),
            ],
            networks: Vec::new(),
        }
    }

    fn planned(spec: &Value, endpoints: &Value) -> NetworkServices {
        let network = "acme.default".parse().unwrap();
        services(&settings(), &state(spec, endpoints), &network)
    }

    fn endpoint(address: &str, ready: bool, serving: bool, terminating: bool) -> Value {
        json!({"addresses": [address], "conditions": {"ready": ready, "serving": serving,
            "terminating": terminating}})
    }

    #[test]
    fn a_network_has_its_namespaces_services_and_the_api_server() {
        let spec = json!({"type": "ClusterIP", "clusterIP": "10.96.0.5",
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"},
                {"name": "none", "port": 81, "protocol": "TCP"}]});
        let planned = planned(
            &spec,
            &json!([
                endpoint("10.0.0.2", true, true, false),
                endpoint("10.0.0.3", false, true, true),
                endpoint("10.0.0.4", false, false, false),
            ]),
        );
        let [api, http, none] = planned.ports.as_slice() else {
            panic!("{:?}", planned.ports);
        };
        assert_eq!((api.backends.clone(), api.port), (Backends::Api, 443));
        assert_eq!(http.affinity, Some(60));
        assert_eq!(
            http.backends,
            Backends::Endpoints(vec!["10.0.0.2:8080".parse().unwrap()])
        );
        assert_eq!(none.backends, Backends::Endpoints(Vec::new()));
        assert!(
            planned
                .names
                .iter()
                .all(|name| !name.name.contains("globex") && !name.name.contains("web.default")),
            "{:?}",
            planned.names
        );
        assert!(planned.names.contains(&ServiceName {
            name: "_http._tcp.web.acme.svc.cluster.local".to_owned(),
            data: NameData::Service {
                port: 80,
                target: "web.acme.svc.cluster.local".to_owned(),
            },
        }));
    }

    #[test]
    fn what_ends_serves_on_while_nothing_else_does() {
        let spec = json!({"clusterIP": "10.96.0.5",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]});
        let ending = json!([endpoint("10.0.0.3", false, true, true)]);
        assert_eq!(
            planned(&spec, &ending).ports[1].backends,
            Backends::Endpoints(vec!["10.0.0.3:8080".parse().unwrap()])
        );
    }

    #[test]
    fn headless_services_are_their_endpoints() {
        let spec = json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]});
        let mut named = endpoint("10.0.0.2", true, true, false);
        named["hostname"] = "db-0".into();
        let planned = planned(
            &spec,
            &json!([named, endpoint("10.0.0.3", true, true, false)]),
        );
        assert_eq!(planned.ports.len(), 1, "the API server's alone");
        let addresses = |name: &str| {
            planned
                .names
                .iter()
                .filter(|one| one.name == format!("{name}.acme.svc.cluster.local"))
                .filter(|one| matches!(one.data, NameData::Address { .. }))
                .count()
        };
        assert_eq!(addresses("web"), 2);
        assert_eq!(addresses("db-0.web"), 1);
        assert_eq!(addresses("10-0-0-3.web"), 1);
        let targets: Vec<_> = planned
            .names
            .iter()
            .filter(|one| one.name == "_http._tcp.web.acme.svc.cluster.local")
            .collect();
        assert_eq!(targets.len(), 2);
    }

    #[test]
    fn an_external_name_is_an_alias() {
        let planned = planned(
            &json!({"type": "ExternalName", "externalName": "debian.org."}),
            &json!([]),
        );
        assert!(planned.names.contains(&ServiceName {
            name: "web.acme.svc.cluster.local".to_owned(),
            data: NameData::Alias("debian.org".to_owned()),
        }));
    }
}

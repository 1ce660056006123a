//! Endpoints: of a service that selects pods, what older clients read of its slices; of one that does
//! not, what its slices are made from.

use k8s_openapi::api::{
    core::v1::{
        EndpointAddress, EndpointPort as Port, EndpointSubset, Endpoints, ObjectReference, Service,
    },
    discovery::v1::{Endpoint, EndpointConditions},
};
use kube::api::ObjectMeta;

use super::plan::Groups;

/// Says whose the object is: others are not touched.
pub(super) const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
pub(super) const MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Says that there are more endpoints than are shown.
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// As many addresses as one object has; of each subset as many are taken over.
const MOST: usize = 1000;
/// Says that an object is not to be taken over.
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Such objects are locks.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";

/// Whether the object is written here.
pub(super) fn is_ours(object: &Endpoints) -> bool {
    let labels = object.metadata.labels.as_ref();
    labels.is_some_and(|labels| labels.get(MANAGED_BY).is_some_and(|by| by == MANAGER))
}

/// The endpoints that somebody has written for a service; `None`: they are not to be taken over.
pub(super) fn written(object: &Endpoints) -> Option<Groups> {
    let meta = &object.metadata;
    let skipped = (meta.labels.as_ref())
        .is_some_and(|labels| labels.get(SKIP).is_some_and(|skip| skip == "true"));
    let lock = (meta.annotations.as_ref()).is_some_and(|notes| notes.contains_key(LEADER));
    if is_ours(object) || skipped || lock || meta.deletion_timestamp.is_some() {
        return None;
    }
    let mut groups = Groups::new();
    for subset in object.subsets.iter().flatten() {
        let ports = subset.ports.iter().flatten().map(key).collect();
        let of = |list: &Option<Vec<EndpointAddress>>, ready| -> Vec<Endpoint> {
            let addresses = list.iter().flatten();
            addresses.map(|address| endpoint(address, ready)).collect()
        };
        let all = of(&subset.addresses, true)
            .into_iter()
            .chain(of(&subset.not_ready_addresses, false));
        groups.entry(ports).or_default().extend(all.take(MOST));
    }
    Some(groups)
}

fn key(port: &Port) -> super::plan::PortKey {
    (
        port.name.clone().unwrap_or_default(),
        port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
        port.port,
        port.app_protocol.clone(),
    )
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            ..EndpointConditions::default()
        }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

/// The object that shall be.
pub(super) fn wanted(service: &Service, groups: &Groups) -> Endpoints {
    let meta = &service.metadata;
    let mut labels = meta.labels.clone().unwrap_or_default();
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    let spec = service.spec.as_ref();
    if spec.is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None")) {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    let mut left = MOST;
    let mut cut = false;
    let mut subsets = Vec::new();
    for (ports, endpoints) in groups {
        let mut subset = EndpointSubset {
            ports: Some(ports.iter().map(port).collect())
                .filter(|ports: &Vec<_>| !ports.is_empty()),
            ..EndpointSubset::default()
        };
        for endpoint in endpoints {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let ready = conditions.ready != Some(false);
            if !ready && conditions.terminating == Some(true) {
                continue;
            }
            if left == 0 {
                cut = true;
                break;
            }
            left -= 1;
            let list = if ready {
                &mut subset.addresses
            } else {
                &mut subset.not_ready_addresses
            };
            list.get_or_insert_default().push(address(endpoint));
        }
        if subset.addresses.is_some() || subset.not_ready_addresses.is_some() {
            subsets.push(subset);
        }
    }
    let note = cut.then(|| [(OVER_CAPACITY.to_owned(), "truncated".to_owned())].into());
    Endpoints {
        metadata: ObjectMeta {
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            labels: Some(labels),
            annotations: note,
            ..ObjectMeta::default()
        },
        subsets: Some(subsets).filter(|subsets| !subsets.is_empty()),
    }
}

/// Whether the object says already what shall be said.
pub(super) fn is_same(old: &Endpoints, new: &Endpoints) -> bool {
    old.subsets == new.subsets
        && old.metadata.labels == new.metadata.labels
        && old.metadata.annotations == new.metadata.annotations
}

fn port((name, protocol, number, app_protocol): &super::plan::PortKey) -> Port {
    Port {
        name: Some(name.clone()).filter(|name| !name.is_empty()),
        protocol: Some(protocol.clone()),
        port: *number,
        app_protocol: app_protocol.clone(),
    }
}

fn address(endpoint: &Endpoint) -> EndpointAddress {
    EndpointAddress {
        ip: endpoint.addresses.first().cloned().unwrap_or_default(),
        hostname: endpoint.hostname.clone(),
        node_name: endpoint.node_name.clone(),
        target_ref: endpoint
            .target_ref
            .clone()
            .map(|reference| ObjectReference {
                kind: reference.kind,
                name: reference.name,
                namespace: reference.namespace,
                uid: reference.uid,
                ..ObjectReference::default()
            }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_somebody_has_written_is_taken_over_unless_it_says_no() {
        let made = |metadata: serde_json::Value| -> Endpoints {
            serde_json::from_value(json!({"metadata": metadata, "subsets": [{
                "addresses": [{"ip": "10.0.0.1", "hostname": "db"}], "notReadyAddresses": [{"ip": "10.0.0.2"}],
                "ports": [{"port": 5432, "name": "sql"}]}]}))
            .unwrap()
        };
        let groups = written(&made(json!({"name": "db"}))).unwrap();
        let key = vec![("sql".to_owned(), "TCP".to_owned(), 5432, None)];
        let ready: Vec<(&str, Option<bool>)> = groups[&key]
            .iter()
            .map(|one| {
                (
                    one.addresses[0].as_str(),
                    one.conditions.as_ref().unwrap().ready,
                )
            })
            .collect();
        assert_eq!(ready, [("10.0.0.1", Some(true)), ("10.0.0.2", Some(false))]);
        for other in [
            json!({"labels": {(SKIP): "true"}}),
            json!({"labels": {(MANAGED_BY): MANAGER}}),
            json!({"annotations": {(LEADER): "{}"}}),
        ] {
            assert!(written(&made(other)).is_none());
        }
    }

    #[test]
    fn ready_and_other_addresses_are_told_apart() {
        let service: Service = serde_json::from_value(
            json!({"metadata": {"name": "web", "labels": {"app": "web"}}, "spec": {"clusterIP": "None"}}),
        )
        .unwrap();
        let endpoint = |ip: &str, ready: bool, terminating: bool| -> Endpoint {
            serde_json::from_value(json!({"addresses": [ip],
                "conditions": {"ready": ready, "serving": ready, "terminating": terminating}}))
            .unwrap()
        };
        let key = vec![(String::new(), "TCP".to_owned(), 80, None)];
        let groups = Groups::from([(
            key,
            vec![
                endpoint("10.0.0.1", true, false),
                endpoint("10.0.0.2", false, false),
                endpoint("10.0.0.3", false, true),
            ],
        )]);
        let made = serde_json::to_value(wanted(&service, &groups)).unwrap();
        assert_eq!(
            made["subsets"],
            json!([{"addresses": [{"ip": "10.0.0.1"}], "notReadyAddresses": [{"ip": "10.0.0.2"}],
                "ports": [{"port": 80, "protocol": "TCP"}]}])
        );
        let labels = &made["metadata"]["labels"];
        assert_eq!(
            labels,
            &json!({"app": "web", (MANAGED_BY): MANAGER, (HEADLESS): ""})
        );
        let none = wanted(&service, &Groups::new());
        assert!(none.subsets.is_none());
    }
}

//! The Endpoints of a service, from which older clients read what its slices say.

use k8s_openapi::api::{
    core::v1::{
        EndpointAddress, EndpointPort as Port, EndpointSubset, Endpoints, ObjectReference, Service,
    },
    discovery::v1::Endpoint,
};
use kube::api::ObjectMeta;

use super::plan::Groups;

/// Says whose the object is: others are not touched.
pub(super) const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
pub(super) const MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Says that there are more endpoints than are shown.
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// As many addresses as one object has.
const MOST: usize = 1000;

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

//! What the slices of a service shall be, and the steps there. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{ObjectReference, Pod, Service, ServicePort, ServiceSpec},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};

/// Label with the service's name.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label with who writes a slice.
pub(super) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub(super) const MANAGER: &str = "endpointslice-controller.k8s.io";
/// Who writes slices from the Endpoints of services that select no pods.
pub(super) const MIRRORING: &str = "endpointslicemirroring-controller.k8s.io";
/// Label of slices of services without an address.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Annotation of a pod that is on another network than its namespace.
pub(super) const POD_NETWORK: &str = "hypernetes.io/network";
/// Endpoints in one slice.
const PER_SLICE: usize = 100;

/// Name, protocol, number and application protocol of a port of pods.
pub(super) type PortKey = (String, String, i32, Option<String>);
/// Endpoints by the ports that they have.
pub(super) type Groups = BTreeMap<Vec<PortKey>, Vec<Endpoint>>;

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    Create(EndpointSlice),
    Replace(String, EndpointSlice),
    Delete(String),
}

impl Step {
    pub(super) fn delete(slice: &EndpointSlice) -> Self {
        Self::Delete(slice.metadata.name.clone().unwrap_or_default())
    }
}

/// Whether the service says itself which pods it has.
pub(super) fn selects(service: &Service) -> bool {
    let selector = |spec: &ServiceSpec| spec.selector.as_ref().is_some_and(|map| !map.is_empty());
    service.spec.as_ref().is_some_and(selector)
}

/// Whether the service is another name alone.
pub(super) fn is_external(service: &Service) -> bool {
    let of = |spec: &ServiceSpec| spec.type_.as_deref() == Some("ExternalName");
    service.spec.as_ref().is_some_and(of)
}

/// The endpoints of a service; `None` if it has no selector: they are somebody else's to write.
pub(super) fn endpoints(service: &Service, pods: &[Arc<Pod>]) -> Option<Groups> {
    let spec = service.spec.as_ref()?;
    if is_external(service) || !selects(service) {
        return None;
    }
    let mut groups = Groups::new();
    for pod in pods {
        let Some(endpoint) = endpoint(service, pod) else {
            continue;
        };
        let ports: Vec<PortKey> = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|port| port_of(port, pod))
            .collect();
        groups.entry(ports).or_default().push(endpoint);
    }
    for endpoints in groups.values_mut() {
        endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    }
    Some(groups)
}

/// The pod's port that a service's port means; a name that the pod does not know means none.
fn port_of(port: &ServicePort, pod: &Pod) -> Option<PortKey> {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            let spec = pod.spec.as_ref()?;
            let sidecars = spec
                .init_containers
                .iter()
                .flatten()
                .filter(|container| container.restart_policy.as_deref() == Some("Always"));
            spec.containers
                .iter()
                .chain(sidecars)
                .flat_map(|container| container.ports.iter().flatten())
                .find(|one| {
                    one.name.as_deref() == Some(name)
                        && one.protocol.as_deref().unwrap_or("TCP") == protocol
                })?
                .container_port
        }
    };
    let name = port.name.clone().unwrap_or_default();
    Some((name, protocol, number, port.app_protocol.clone()))
}

fn endpoint(service: &Service, pod: &Pod) -> Option<Endpoint> {
    let (meta, spec, status) = (&pod.metadata, pod.spec.as_ref()?, pod.status.as_ref()?);
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let address = status
        .pod_ip
        .clone()
        .filter(|address| !address.is_empty())?;
    let serving = status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let terminating = meta.deletion_timestamp.is_some();
    let always = service
        .spec
        .as_ref()
        .is_some_and(|spec| spec.publish_not_ready_addresses == Some(true));
    let in_domain = spec.subdomain.is_some() && spec.subdomain == service.metadata.name;
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(always || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: spec
            .hostname
            .clone()
            .filter(|name| in_domain && !name.is_empty()),
        node_name: spec.node_name.clone(),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    })
}

/// The steps from `existing` to slices with the endpoints of `groups`. Endpoints stay in their
/// slices, gaps are filled, and as few slices as possible are written.
pub(super) fn steps(
    service: &Service,
    groups: &Groups,
    existing: &[Arc<EndpointSlice>],
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut unused: Vec<&Arc<EndpointSlice>> = existing.iter().collect();
    let empty = Groups::from([(Vec::new(), Vec::new())]);
    // A service without endpoints has an empty slice: one can see that it was looked at.
    let groups = if groups.is_empty() { &empty } else { groups };
    for (ports, wanted) in groups {
        let ports = slice_ports(ports);
        let (ours, others): (Vec<_>, Vec<_>) = unused
            .into_iter()
            .partition(|slice| slice.ports.clone().unwrap_or_default() == ports);
        unused = others;
        let mut left: BTreeMap<String, &Endpoint> =
            wanted.iter().map(|one| (id(one), one)).collect();
        let mut filled: Vec<(&Arc<EndpointSlice>, Vec<Endpoint>)> = Vec::new();
        for slice in ours {
            let kept = slice
                .endpoints
                .iter()
                .flatten()
                .filter_map(|old| left.remove(&id(old)).cloned())
                .collect();
            filled.push((slice, kept));
        }
        let mut rest: Vec<Endpoint> = left.into_values().cloned().collect();
        for (_slice, kept) in &mut filled {
            let room = PER_SLICE.saturating_sub(kept.len()).min(rest.len());
            kept.extend(rest.drain(..room));
        }
        let mut need_one = wanted.is_empty();
        for (slice, endpoints) in filled {
            if endpoints.is_empty() && !std::mem::take(&mut need_one) {
                steps.push(Step::delete(slice));
                continue;
            }
            let next = slice_of(service, Some(slice), &ports, endpoints);
            if next != **slice {
                let name = slice.metadata.name.clone().unwrap_or_default();
                steps.push(Step::Replace(name, next));
            }
        }
        if need_one {
            steps.push(Step::Create(slice_of(service, None, &ports, Vec::new())));
        }
        for some in rest.chunks(PER_SLICE) {
            let slice = slice_of(service, None, &ports, some.to_vec());
            steps.push(Step::Create(slice));
        }
    }
    steps.extend(unused.into_iter().map(|slice| Step::delete(slice)));
    steps
}

/// An endpoint is the same while it is the same pod at the same address.
fn id(endpoint: &Endpoint) -> String {
    let uid = endpoint
        .target_ref
        .as_ref()
        .and_then(|one| one.uid.as_deref());
    format!(
        "{}/{}",
        endpoint.addresses.join(","),
        uid.unwrap_or_default()
    )
}

fn slice_ports(ports: &[PortKey]) -> Vec<EndpointPort> {
    // A name is a port's once.
    let mut names = BTreeSet::new();
    ports
        .iter()
        .filter(|(name, ..)| names.insert(name.clone()))
        .map(|(name, protocol, number, application)| EndpointPort {
            name: Some(name.clone()),
            protocol: Some(protocol.clone()),
            port: Some(*number),
            app_protocol: application.clone(),
        })
        .collect()
}

fn slice_of(
    service: &Service,
    old: Option<&EndpointSlice>,
    ports: &[EndpointPort],
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let mut metadata = old.map_or_else(ObjectMeta::default, |old| old.metadata.clone());
    let name = service.metadata.name.clone().unwrap_or_default();
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.to_owned(), name.clone());
    let manager = if selects(service) { MANAGER } else { MIRRORING };
    labels.insert(MANAGED_BY.to_owned(), manager.to_owned());
    let address = service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref());
    if address == Some("None") {
        labels.insert(HEADLESS.to_owned(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    // Reserved ones are the service's own business.
    labels.retain(|key, _value| !key.starts_with("hypernetes.io/"));
    metadata.labels = Some(labels);
    if old.is_none() {
        metadata.generate_name = Some(format!("{name}-"));
        metadata.namespace = service.metadata.namespace.clone();
        metadata.owner_references = Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Service".to_owned(),
            name,
            uid: service.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]);
    }
    EndpointSlice {
        metadata,
        address_type: "IPv4".to_owned(),
        ports: (!ports.is_empty()).then(|| ports.to_vec()),
        endpoints: Some(endpoints),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: &Value) -> Service {
        let mut all = json!({"selector": {"app": "web"}, "clusterIP": "10.96.0.5",
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": "http"}]});
        for (field, value) in spec.as_object().unwrap() {
            all[field] = value.clone();
        }
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "acme", "uid": "s"}, "spec": all}))
        .unwrap()
    }

    fn pod(number: usize, ready: bool, port: u16) -> Arc<Pod> {
        let ready = if ready { "True" } else { "False" };
        let pod = json!({
            "metadata": {"name": format!("p{number}"), "namespace": "acme",
                "uid": format!("u{number}"), "labels": {"app": "web"}},
            "spec": {"nodeName": "n", "hostname": format!("h{number}"), "subdomain": "web",
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port,
                    "protocol": "TCP"}]}]},
            "status": {"phase": "Running",
                "podIP": format!("10.0.{}.{}", number / 250, number % 250),
                "conditions": [{"type": "Ready", "status": ready}]},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn planned(service: &Service, pods: &[Arc<Pod>], old: &[Arc<EndpointSlice>]) -> Vec<Step> {
        steps(service, &endpoints(service, pods).unwrap(), old)
    }

    /// The slices after the steps, each with a name.
    fn taken(steps: Vec<Step>, old: &[Arc<EndpointSlice>]) -> Vec<Arc<EndpointSlice>> {
        let mut all = old.to_vec();
        for (index, step) in steps.into_iter().enumerate() {
            let at = |all: &[Arc<EndpointSlice>], name: &str| {
                all.iter()
                    .position(|slice| slice.metadata.name.as_deref() == Some(name))
                    .unwrap()
            };
            match step {
                Step::Create(mut slice) => {
                    slice.metadata.name = Some(format!("web-{}-{index}", all.len()));
                    all.push(Arc::new(slice));
                }
                Step::Replace(name, slice) => {
                    let index = at(&all, &name);
                    all[index] = Arc::new(slice);
                }
                Step::Delete(name) => {
                    let index = at(&all, &name);
                    all.remove(index);
                }
            }
        }
        all
    }

    #[test]
    fn endpoints_say_what_their_pods_are() {
        let service = service(&json!({}));
        let slices = taken(
            planned(&service, &[pod(1, true, 8080), pod(2, false, 8080)], &[]),
            &[],
        );
        assert_eq!(slices.len(), 1);
        let slice = &slices[0];
        assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
        let ready: Vec<_> = slice
            .endpoints
            .iter()
            .flatten()
            .map(|one| one.conditions.as_ref().unwrap().ready)
            .collect();
        assert_eq!(ready, [Some(true), Some(false)]);
        assert_eq!(
            slice.endpoints.as_ref().unwrap()[0].hostname.as_deref(),
            Some("h1")
        );
        assert_eq!(
            slice.metadata.owner_references.as_ref().unwrap()[0].uid,
            "s"
        );

        let mut leaving = (*pod(1, true, 8080)).clone();
        leaving.metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let leaving = Arc::new(leaving);
        for (always, ready) in [(false, false), (true, true)] {
            let service = self::service(&json!({"publishNotReadyAddresses": always}));
            let groups = endpoints(&service, std::slice::from_ref(&leaving)).unwrap();
            let conditions = groups.values().next().unwrap()[0]
                .conditions
                .clone()
                .unwrap();
            assert_eq!(conditions.ready, Some(ready));
            assert_eq!(
                (conditions.serving, conditions.terminating),
                (Some(true), Some(true))
            );
        }
    }

    #[test]
    fn who_has_no_selector_writes_slices_himself() {
        let own = service(&json!({"selector": null}));
        assert!(endpoints(&own, &[pod(1, true, 80)]).is_none());
        let named = service(&json!({"type": "ExternalName"}));
        assert!(endpoints(&named, &[pod(1, true, 80)]).is_none());
    }

    #[test]
    fn a_slice_has_a_hundred_and_changes_touch_few() {
        let service = service(&json!({}));
        let mut pods: Vec<_> = (1..=250).map(|number| pod(number, true, 80)).collect();
        let slices = taken(planned(&service, &pods, &[]), &[]);
        let sizes: Vec<_> = slices
            .iter()
            .map(|slice| slice.endpoints.iter().flatten().count())
            .collect();
        assert_eq!(sizes, [100, 100, 50]);
        assert!(
            planned(&service, &pods, &slices).is_empty(),
            "nothing to do"
        );
        // One is not ready, one goes: each touches its slice only.
        pods[5] = pod(6, false, 80);
        assert_eq!(planned(&service, &pods, &slices).len(), 1);
        pods.remove(120);
        let steps = planned(&service, &pods, &slices);
        assert!(steps.len() <= 2, "{}", steps.len());
        let slices = taken(steps, &slices);
        // A new one fills a gap.
        pods.push(pod(251, true, 80));
        let steps = planned(&service, &pods, &slices);
        assert!(matches!(steps.as_slice(), [Step::Replace(..)]), "{steps:?}");
        // None is left: one empty slice remains.
        let steps = planned(&service, &[], &slices);
        let slices = taken(steps, &slices);
        assert_eq!(slices.len(), 1);
        assert_eq!(slices[0].endpoints, Some(Vec::new()));
        assert!(planned(&service, &[], &slices).is_empty());
    }

    #[test]
    fn a_name_can_be_another_port_in_another_pod() {
        let service = service(&json!({}));
        let pods = [pod(1, true, 80), pod(2, true, 8080)];
        let slices = taken(planned(&service, &pods, &[]), &[]);
        let ports: BTreeSet<_> = slices
            .iter()
            .map(|slice| slice.ports.as_ref().unwrap()[0].port)
            .collect();
        assert_eq!(ports, BTreeSet::from([Some(80), Some(8080)]));
    }
}

//! Which network a pod joins, and the names that pods of a network can resolve.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use hypernetes_network::{NameRecord, NetworkDriver, NetworkSpec};
use hypernetes_telemetry::chain;
use hypernetes_types::{
    NetworkId,
    kinds::{GROUP, NETWORK_LABEL, TENANT_LABEL, VERSION},
};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::Value;
use tokio::sync::{RwLock, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{config::NodeletConfig, sandbox};

/// The network of namespaces that have none and belong to no tenant.
const NODE_NETWORK: &str = "default";

/// Why a pod's network is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("cannot read {what}")]
    Api {
        what: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("network \"{name}\" does not exist yet in namespace \"{namespace}\"")]
    Missing { namespace: String, name: String },
    #[error("network \"{name}\" is being deleted")]
    Deleting { name: String },
    #[error("network \"{name}\": {field}: {rule}")]
    Invalid {
        name: String,
        field: &'static str,
        rule: &'static str,
    },
}

/// The kind `Network` as kube takes it.
pub(crate) fn network_resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, VERSION, "Network"))
}

/// The pod's network: its own annotation, its namespace's label, or `default`.
pub(crate) async fn lookup(
    client: &Client,
    config: &NodeletConfig,
    pod: &Pod,
) -> Result<NetworkSpec, LookupError> {
    let namespace_name = pod.metadata.namespace.clone().unwrap_or_default();
    let failed = |what: String| {
        move |source| LookupError::Api {
            what,
            source: Box::new(source),
        }
    };
    let namespace = Api::<Namespace>::all(client.clone())
        .get(&namespace_name)
        .await
        .map_err(failed(format!("namespace {namespace_name}")))?;
    let label = |key: &str| {
        namespace
            .metadata
            .labels
            .as_ref()
            .and_then(|map| map.get(key))
    };
    let chosen = pod
        .metadata
        .annotations
        .as_ref()
        .and_then(|map| map.get(hypernetes_policy::POD_NETWORK_ANNOTATION))
        .or_else(|| label(NETWORK_LABEL));
    let name = chosen.map_or("default", String::as_str);
    let networks: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), &namespace_name, &network_resource());
    let found = networks
        .get_opt(name)
        .await
        .map_err(failed(format!("network {namespace_name}/{name}")))?;
    match found {
        Some(network) if network.metadata.deletion_timestamp.is_some() => {
            Err(LookupError::Deleting {
                name: name.to_owned(),
            })
        }
        Some(network) => spec_of(&namespace_name, name, &network.data["spec"], config),
        None if chosen.is_none() && label(TENANT_LABEL).is_none() => Ok(node_network(config)),
        None => Err(LookupError::Missing {
            namespace: namespace_name,
            name: name.to_owned(),
        }),
    }
}

fn node_network(config: &NodeletConfig) -> NetworkSpec {
    NetworkSpec {
        id: NODE_NETWORK.parse().expect("a constant that is a valid id"),
        cidr: config.default_cidr,
        gateway: first_host(config.default_cidr),
        egress: config.default_egress,
        node_access: false,
        mtu: config.mtu,
        domain: config.cluster_domain.clone(),
    }
}

fn first_host(cidr: IpNet) -> IpAddr {
    cidr.hosts().next().unwrap_or_else(|| cidr.addr())
}

/// Name of a Network object's network on the node.
pub(crate) fn network_id(namespace: &str, name: &str) -> Option<NetworkId> {
    format!("{namespace}.{name}").parse().ok()
}

fn spec_of(
    namespace: &str,
    name: &str,
    spec: &Value,
    config: &NodeletConfig,
) -> Result<NetworkSpec, LookupError> {
    let invalid = |field, rule| LookupError::Invalid {
        name: name.to_owned(),
        field,
        rule,
    };
    let id = network_id(namespace, name)
        .ok_or_else(|| invalid("metadata.name", "namespace and name are too long together"))?;
    let subnet = &spec["subnets"][0];
    let cidr: IpNet = subnet["cidr"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| invalid("spec.subnets[0].cidr", "must be a CIDR"))?;
    let gateway = match subnet["gateway"].as_str() {
        Some(text) => text
            .parse()
            .ok()
            .filter(|address| cidr.contains(address))
            .ok_or_else(|| invalid("spec.subnets[0].gateway", "must be inside the CIDR"))?,
        None => first_host(cidr),
    };
    Ok(NetworkSpec {
        id,
        cidr,
        gateway,
        egress: spec["external"]["snat"]
            .as_bool()
            .unwrap_or(spec["external"].is_object()),
        node_access: false,
        mtu: spec["mtu"]
            .as_u64()
            .and_then(|mtu| u32::try_from(mtu).ok())
            .unwrap_or(config.mtu),
        domain: config.cluster_domain.clone(),
    })
}

/// Keeps a network on the node while a pod is on its way to it: who brings a pod holds the gate for
/// reading, who takes the network away for writing.
#[derive(Debug, Default)]
pub(crate) struct Gates(Mutex<HashMap<NetworkId, Arc<RwLock<()>>>>);

impl Gates {
    /// The gate of one network.
    pub(crate) fn of(&self, id: &NetworkId) -> Arc<RwLock<()>> {
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Gates that nobody holds are made anew when they are needed.
        gates.retain(|other, gate| other == id || Arc::strong_count(gate) > 1);
        gates.entry(id.clone()).or_default().clone()
    }
}

/// Names under which others of the network find a pod.
pub(crate) fn names(pod: &Pod, address: IpAddr, domain: &str) -> Vec<NameRecord> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let dashed = address.to_string().replace(['.', ':'], "-");
    let mut names = vec![format!("{dashed}.{namespace}.pod.{domain}")];
    let subdomain = pod.spec.as_ref().and_then(|spec| spec.subdomain.as_deref());
    if let Some(subdomain) = subdomain.filter(|name| !name.is_empty()) {
        names.push(format!(
            "{}.{subdomain}.{namespace}.svc.{domain}",
            sandbox::hostname(pod)
        ));
    }
    names
        .into_iter()
        .map(|name| NameRecord {
            name: name.to_ascii_lowercase(),
            address,
        })
        .collect()
}

/// Tells a network's driver the names of its pods.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    changes: mpsc::Sender<Change>,
}

#[derive(Debug)]
struct Change {
    uid: String,
    place: Option<(NetworkId, Vec<NameRecord>)>,
}

const CHANGES: usize = 256;

impl Names {
    /// The publisher and its task.
    pub(crate) fn new(
        driver: Arc<dyn NetworkDriver>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (changes, receiver) = mpsc::channel(CHANGES);
        (Self { changes }, publish_all(driver, receiver, stop))
    }

    /// The pod's names, or that it has none any more.
    pub(crate) async fn set(&self, uid: &str, place: Option<(NetworkId, Vec<NameRecord>)>) {
        let change = Change {
            uid: uid.to_owned(),
            place,
        };
        if self.changes.send(change).await.is_err() {
            tracing::debug!("names are not published: the node stops");
        }
    }
}

async fn publish_all(
    driver: Arc<dyn NetworkDriver>,
    mut changes: mpsc::Receiver<Change>,
    stop: CancellationToken,
) {
    let mut of_pod: HashMap<String, NetworkId> = HashMap::new();
    let mut networks: BTreeMap<NetworkId, BTreeMap<String, Vec<NameRecord>>> = BTreeMap::new();
    loop {
        let first = tokio::select! {
            change = changes.recv() => change,
            () = stop.cancelled() => None,
        };
        let Some(first) = first else { return };
        let mut touched = Vec::new();
        let mut next = Some(first);
        while let Some(change) = next {
            if let Some(network) = of_pod.remove(&change.uid) {
                networks
                    .entry(network.clone())
                    .or_default()
                    .remove(&change.uid);
                touched.push(network);
            }
            if let Some((network, records)) = change.place {
                of_pod.insert(change.uid.clone(), network.clone());
                networks
                    .entry(network.clone())
                    .or_default()
                    .insert(change.uid, records);
                touched.push(network);
            }
            next = changes.try_recv().ok();
        }
        touched.sort();
        touched.dedup();
        for network in touched {
            let records: Vec<_> = networks
                .get(&network)
                .into_iter()
                .flat_map(|map| map.values().flatten().cloned())
                .collect();
            if records.is_empty() {
                networks.remove(&network);
            }
            match driver.set_names(&network, records).await {
                // The network went with its last pod.
                Ok(()) | Err(hypernetes_network::NetworkError::NoNetwork(_)) => {}
                Err(error) => {
                    tracing::warn!(%network, error = %chain(&error), "cannot publish pod names");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> NodeletConfig {
        NodeletConfig::new(
            "n",
            "127.0.0.1".parse().unwrap(),
            "/s".into(),
            "10.42.0.0/16".parse().unwrap(),
        )
    }

    #[test]
    fn specification_of_a_network_object() {
        let spec = json!({"subnets": [{"cidr": "10.244.0.0/16"}], "external": {"snat": true}});
        let network = spec_of("acme", "default", &spec, &config()).unwrap();
        assert_eq!(network.id.as_str(), "acme.default");
        assert_eq!(network.gateway.to_string(), "10.244.0.1");
        assert!(network.egress);
        let isolated = json!({"subnets": [{"cidr": "10.0.0.0/24", "gateway": "10.0.0.254"}]});
        let network = spec_of("acme", "default", &isolated, &config()).unwrap();
        assert!(!network.egress);
        assert_eq!(network.gateway.to_string(), "10.0.0.254");
        let outside = json!({"subnets": [{"cidr": "10.0.0.0/24", "gateway": "10.0.1.1"}]});
        assert!(spec_of("acme", "default", &outside, &config()).is_err());
        assert!(spec_of("acme", "default", &json!({}), &config()).is_err());
    }

    #[test]
    fn pods_have_names_by_address_and_by_subdomain() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "Web", "namespace": "acme"},
            "spec": {"containers": [], "hostname": "db-0", "subdomain": "db"}}))
        .unwrap();
        let names = names(&pod, "10.244.0.7".parse().unwrap(), "cluster.local");
        let names: Vec<_> = names.iter().map(|record| record.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "10-244-0-7.acme.pod.cluster.local",
                "db-0.db.acme.svc.cluster.local"
            ]
        );
    }
}

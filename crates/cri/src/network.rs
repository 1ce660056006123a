//! The networks that sandboxes of the node join.

use std::sync::{Arc, Mutex, PoisonError};

use hypernetes_network::{HostPort, NetworkDriver, NetworkError, NetworkSpec};
use hypernetes_telemetry::chain;
use hypernetes_types::NetworkId;
use serde_json::{Value, json};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use crate::status::CriError;

/// What sandboxes of a namespace join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodNetwork {
    /// One of this node's own. It is on the host only while a sandbox is on it: brought up for the
    /// first, taken down with the last.
    Own(NetworkSpec),
    /// The cluster's, by CNI plugins.
    Cni(NetworkId),
}

/// Networks of some namespaces' sandboxes, and that of all others.
#[derive(Debug)]
pub struct NodeNetwork {
    driver: Arc<dyn NetworkDriver>,
    usual: PodNetwork,
    tenants: Vec<TenantNetwork>,
    /// Held shared while a sandbox joins, so that its network is not taken away under it.
    gate: Arc<RwLock<()>>,
    /// As the kubelet last told it.
    pod_cidr: Mutex<Option<String>>,
}

/// A network of its own for the sandboxes of some namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantNetwork {
    /// Kubernetes namespaces; no other's sandboxes join it.
    pub namespaces: Vec<String>,
    /// The network.
    pub spec: NetworkSpec,
    /// Its sandboxes may have ports of the node.
    pub host_ports: bool,
}

impl PodNetwork {
    pub(crate) fn id(&self) -> &NetworkId {
        match self {
            Self::Own(spec) => &spec.id,
            Self::Cni(id) => id,
        }
    }
}

impl NodeNetwork {
    /// `usual` for the sandboxes of all namespaces that none of `tenants` names. Nothing is made
    /// yet.
    pub fn new(
        driver: Arc<dyn NetworkDriver>,
        usual: PodNetwork,
        tenants: Vec<TenantNetwork>,
    ) -> Self {
        Self {
            driver,
            usual,
            tenants,
            gate: Arc::default(),
            pod_cidr: Mutex::new(None),
        }
    }

    /// What the sandboxes of a namespace join.
    pub(crate) fn of(&self, namespace: &str) -> PodNetwork {
        let is_named =
            |tenant: &&TenantNetwork| tenant.namespaces.iter().any(|name| name == namespace);
        match self.tenants.iter().find(is_named) {
            Some(tenant) => PodNetwork::Own(tenant.spec.clone()),
            None => self.usual.clone(),
        }
    }

    /// Refuses a sandbox of a tenant that wants ports of the node and may have none.
    pub(crate) fn check_host_ports(
        &self,
        namespace: &str,
        ports: &[HostPort],
    ) -> Result<(), CriError> {
        let is_named =
            |tenant: &&TenantNetwork| tenant.namespaces.iter().any(|name| name == namespace);
        match (self.tenants.iter().find(is_named), ports.first()) {
            (Some(tenant), Some(port)) if !tenant.host_ports => Err(CriError::invalid(
                "config.port_mappings",
                format!(
                    "host port {} cannot be had: network {} of namespace {namespace} has none; \
                     hostPorts of the node's configuration allows them",
                    port.host_port, tenant.spec.id
                ),
            )),
            _ => Ok(()),
        }
    }

    fn own(&self) -> impl Iterator<Item = &NetworkSpec> {
        let usual = match &self.usual {
            PodNetwork::Own(spec) => Some(spec),
            PodNetwork::Cni(_) => None,
        };
        usual
            .into_iter()
            .chain(self.tenants.iter().map(|tenant| &tenant.spec))
    }

    /// Makes this node's own networks once and takes them away again: a configuration that cannot
    /// work is told at the start.
    pub(crate) async fn try_out(&self) -> Result<(), NetworkError> {
        for spec in self.own() {
            drop(self.join(&PodNetwork::Own(spec.clone())).await?);
        }
        self.leave().await;
        Ok(())
    }

    /// Why sandboxes cannot join the network that most do, if they cannot.
    pub(crate) async fn ready(&self) -> Result<(), NetworkError> {
        self.driver.ready(self.usual.id()).await
    }

    /// Makes sure that a sandbox can join the network, for as long as the value is held and a
    /// sandbox is on it.
    pub(crate) async fn join(
        &self,
        network: &PodNetwork,
    ) -> Result<OwnedRwLockReadGuard<()>, NetworkError> {
        let guard = Arc::clone(&self.gate).read_owned().await;
        if let PodNetwork::Own(spec) = network {
            self.driver.ensure_network(spec).await?;
        }
        Ok(guard)
    }

    /// Takes networks from the host that no sandbox is on.
    pub(crate) async fn leave(&self) {
        // Whoever is joining keeps them, or leaves them in turn.
        let Ok(_alone) = self.gate.try_write() else {
            return;
        };
        for spec in self.own() {
            match self.driver.delete_network(&spec.id).await {
                Ok(()) | Err(NetworkError::InUse { .. } | NetworkError::NoNetwork(_)) => {}
                Err(error) => {
                    tracing::warn!(network = %spec.id, error = %chain(&error), "cannot take the network down");
                }
            }
        }
    }

    /// Notes the range that the cluster has for this node's pods. The node's own configuration, or
    /// that of the plugins, decides; a difference is worth a word.
    pub(crate) fn note_pod_cidr(&self, cidr: &str) {
        let mut noted = self.pod_cidr.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.as_deref() == Some(cidr) {
            return;
        }
        if let PodNetwork::Own(spec) = &self.usual {
            let ours = spec.cidr.to_string();
            if !cidr.split(',').any(|range| range.trim() == ours) {
                tracing::warn!(
                    cluster = cidr,
                    node = ours,
                    "pods get addresses of the node's configuration, not of the cluster's range"
                );
            }
        }
        *noted = Some(cidr.to_owned());
    }

    /// For whoever debugs.
    pub(crate) fn info(&self) -> Value {
        let noted = self
            .pod_cidr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let tenants: Vec<_> = self
            .tenants
            .iter()
            .map(|tenant| {
                json!({
                    "name": tenant.spec.id.as_str(),
                    "namespaces": tenant.namespaces,
                    "cidr": tenant.spec.cidr.to_string(),
                })
            })
            .collect();
        let (driver, cidr) = match &self.usual {
            PodNetwork::Own(spec) => ("builtin", Some(spec.cidr.to_string())),
            PodNetwork::Cni(_) => ("cni", None),
        };
        json!({"driver": driver, "cidr": cidr, "clusterPodCIDR": noted, "tenants": tenants})
    }
}

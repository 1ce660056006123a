//! The network that all sandboxes of the node join.

use std::sync::{Arc, Mutex, PoisonError};

use hypernetes_network::{NetworkDriver, NetworkError, NetworkSpec};
use hypernetes_telemetry::chain;
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

/// One network of the built-in driver. It is on the host only while a sandbox is on it: brought up
/// for the first, taken down with the last.
#[derive(Debug)]
pub struct NodeNetwork {
    driver: Arc<dyn NetworkDriver>,
    spec: NetworkSpec,
    /// Held shared while a sandbox joins, so that the network is not taken away under it.
    gate: Arc<RwLock<()>>,
    /// As the kubelet last told it.
    pod_cidr: Mutex<Option<String>>,
}

impl NodeNetwork {
    /// A network that is not there yet.
    pub fn new(driver: Arc<dyn NetworkDriver>, spec: NetworkSpec) -> Self {
        Self {
            driver,
            spec,
            gate: Arc::default(),
            pod_cidr: Mutex::new(None),
        }
    }

    /// What it is.
    pub fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// Makes sure that a sandbox can join it, for as long as the value is held and a sandbox is on
    /// it.
    pub(crate) async fn join(&self) -> Result<OwnedRwLockReadGuard<()>, NetworkError> {
        let guard = Arc::clone(&self.gate).read_owned().await;
        self.driver.ensure_network(&self.spec).await?;
        Ok(guard)
    }

    /// Takes it from the host if no sandbox is on it.
    pub(crate) async fn leave(&self) {
        // Whoever is joining keeps it, or leaves it in turn.
        let Ok(_alone) = self.gate.try_write() else {
            return;
        };
        match self.driver.delete_network(&self.spec.id).await {
            Ok(()) | Err(NetworkError::InUse { .. } | NetworkError::NoNetwork(_)) => {}
            Err(error) => {
                tracing::warn!(error = %chain(&error), "cannot take the node's network down");
            }
        }
    }

    /// Notes the range that the cluster has for this node's pods. The node's own configuration
    /// decides; a difference is worth a word.
    pub(crate) fn note_pod_cidr(&self, cidr: &str) {
        let mut noted = self.pod_cidr.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.as_deref() == Some(cidr) {
            return;
        }
        let ours = self.spec.cidr.to_string();
        if !cidr.split(',').any(|range| range.trim() == ours) {
            tracing::warn!(
                cluster = cidr,
                node = ours,
                "pods get addresses of the node's configuration, not of the cluster's range"
            );
        }
        *noted = Some(cidr.to_owned());
    }

    /// The range that was noted.
    pub(crate) fn pod_cidr(&self) -> Option<String> {
        self.pod_cidr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

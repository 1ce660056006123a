//! One network by CNI plugins, all others by another driver.

use std::{net::SocketAddr, sync::Arc};

use async_trait::async_trait;
use hypernetes_types::{NetworkId, SandboxId};

use crate::{
    Attachment, Lease, NameRecord, NamespacePlace, NetworkDriver, NetworkError, NetworkServices,
    NetworkSpec, Parked, ParkedPlace, PodNetworkRequest, cni::CniDriver,
};

/// Joins a [`CniDriver`] with the driver of this node's own networks.
#[derive(Debug)]
pub struct RoutedDriver {
    cni: CniDriver,
    own: Arc<dyn NetworkDriver>,
}

impl RoutedDriver {
    /// `cni` serves its network, `own` all others.
    pub fn new(cni: CniDriver, own: Arc<dyn NetworkDriver>) -> Self {
        Self { cni, own }
    }

    fn is_cni(&self, network: &NetworkId) -> bool {
        network == self.cni.network()
    }
}

#[async_trait]
impl NetworkDriver for RoutedDriver {
    async fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetworkError> {
        if self.is_cni(&spec.id) {
            return Err(NetworkError::Spec {
                network: spec.id.clone(),
                field: "id",
                rule: "must not be that of the network by CNI plugins".to_owned(),
            });
        }
        self.own.ensure_network(spec).await
    }

    async fn delete_network(&self, id: &NetworkId) -> Result<(), NetworkError> {
        self.own.delete_network(id).await
    }

    async fn list_networks(&self) -> Result<Vec<NetworkSpec>, NetworkError> {
        self.own.list_networks().await
    }

    async fn attach(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError> {
        if self.is_cni(network) {
            self.cni.attach(sandbox, request).await
        } else {
            self.own.attach(sandbox, network, request).await
        }
    }

    async fn join(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<NamespacePlace, NetworkError> {
        if self.is_cni(network) {
            self.cni.join(sandbox, request).await
        } else {
            self.own.join(sandbox, network, request).await
        }
    }

    async fn ready(&self, network: &NetworkId) -> Result<(), NetworkError> {
        if self.is_cni(network) {
            self.cni.ready().await
        } else {
            self.own.ready(network).await
        }
    }

    async fn lease(&self, sandbox: &SandboxId) -> Result<Option<Lease>, NetworkError> {
        match self.cni.lease(sandbox) {
            Some(lease) => Ok(Some(lease)),
            None => self.own.lease(sandbox).await,
        }
    }

    async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        self.cni.detach(sandbox).await?;
        self.own.detach(sandbox).await
    }

    async fn park(&self) -> Result<Parked, NetworkError> {
        self.own.park().await
    }

    async fn attach_parked(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
        place: ParkedPlace,
    ) -> Result<Lease, NetworkError> {
        if self.is_cni(network) {
            return self.cni.attach_parked(sandbox, request, place).await;
        }
        self.own
            .attach_parked(sandbox, network, request, place)
            .await
    }

    async fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError> {
        self.own.set_names(id, names).await
    }

    async fn set_services(
        &self,
        id: &NetworkId,
        services: NetworkServices,
    ) -> Result<(), NetworkError> {
        self.own.set_services(id, services).await
    }

    async fn dial(
        &self,
        network: &NetworkId,
        address: SocketAddr,
    ) -> Result<tokio::net::TcpStream, NetworkError> {
        if self.is_cni(network) {
            return Err(NetworkError::NoGateway(network.clone()));
        }
        self.own.dial(network, address).await
    }

    async fn recover(&self, alive: &[SandboxId]) -> Result<(), NetworkError> {
        let by_plugins = self.cni.recover(alive).await;
        self.own.recover(alive).await?;
        by_plugins
    }
}

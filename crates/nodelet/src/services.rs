//! Services: what each network of the node is told, and what containers find in their environment.
//!
//! Three kinds are mirrored. Whenever one of them changes, the services of each network that is on
//! the node are computed anew; the driver sees what differs. A network that comes for a pod has its
//! services before the pod starts.

mod env;
mod plan;

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use futures::{StreamExt as _, future::BoxFuture, stream};
use hypernetes_network::{NetworkDriver, NetworkError};
use hypernetes_telemetry::chain;
use hypernetes_types::NetworkId;
use ipnet::Ipv4Net;
use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::DynamicObject,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, Store},
        watcher::{Config, watcher},
    },
};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::network::network_resource;

/// How long after a change others may come that are told together.
const GATHER: Duration = Duration::from_millis(20);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a pod waits for the first lists.
const PATIENCE: Duration = Duration::from_secs(30);

/// Settings of services.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Their addresses.
    pub(crate) range: Ipv4Net,
    /// Domain of the cluster's names.
    pub(crate) domain: String,
}

impl Settings {
    /// The address of the API server in every network.
    fn api(&self) -> Ipv4Addr {
        self.range
            .hosts()
            .next()
            .unwrap_or_else(|| self.range.addr())
    }
}

/// The mirrored kinds.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    settings: Settings,
    driver: Arc<dyn NetworkDriver>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    namespaces: Store<Namespace>,
    networks: Store<DynamicObject>,
    /// Held while a network is told: what is newer is told later.
    telling: Arc<Mutex<()>>,
}

impl Services {
    /// The mirror, and the task that fills it and tells the driver.
    pub(crate) fn new(
        settings: Settings,
        client: &Client,
        driver: Arc<dyn NetworkDriver>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let any = Config::default;
        let (services, service_writer) = reflector::store();
        let (slices, slice_writer) = reflector::store();
        let (namespaces, namespace_writer) = reflector::store();
        let network_kind = network_resource();
        let network_writer = reflector::store::Writer::new(network_kind.clone());
        let this = Self {
            settings,
            driver,
            services,
            slices,
            namespaces,
            networks: network_writer.as_reader(),
            telling: Arc::default(),
        };
        let changes = stream::select_all([
            watcher(Api::<Service>::all(client.clone()), any())
                .default_backoff()
                .reflect(service_writer)
                .map(|event| event.map(drop))
                .boxed(),
            watcher(Api::<EndpointSlice>::all(client.clone()), any())
                .default_backoff()
                .reflect(slice_writer)
                .map(|event| event.map(drop))
                .boxed(),
            watcher(Api::<Namespace>::all(client.clone()), any())
                .default_backoff()
                .reflect(namespace_writer)
                .map(|event| event.map(drop))
                .boxed(),
            watcher(
                Api::<DynamicObject>::all_with(client.clone(), &network_kind),
                any(),
            )
            .default_backoff()
            .reflect(network_writer)
            .map(|event| event.map(drop))
            .boxed(),
        ]);
        (this.clone(), this.follow(changes, stop))
    }

    async fn follow(
        self,
        mut changes: impl futures::Stream<Item = Result<(), kube::runtime::watcher::Error>> + Unpin,
        stop: CancellationToken,
    ) {
        let mut due = None;
        loop {
            let at = due.unwrap_or_else(tokio::time::Instant::now);
            tokio::select! {
                () = stop.cancelled() => return,
                change = changes.next() => match change {
                    None => return,
                    Some(Err(error)) => {
                        tracing::warn!(error = %chain(&error), "cannot watch services");
                    }
                    Some(Ok(())) => {
                        due.get_or_insert(tokio::time::Instant::now() + GATHER);
                    }
                },
                () = tokio::time::sleep_until(at), if due.is_some() => {
                    due = None;
                    if self.is_complete() && !self.tell_all().await {
                        due = Some(tokio::time::Instant::now() + AGAIN);
                    }
                }
            }
        }
    }

    /// Whether everything has been seen once: what is not known must not be taken away.
    fn is_complete(&self) -> bool {
        use futures::FutureExt as _;
        self.wait().now_or_never().is_some()
    }

    fn wait(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // They fail only when the task that fills them is gone.
            for result in [
                self.services.wait_until_ready().await,
                self.slices.wait_until_ready().await,
                self.namespaces.wait_until_ready().await,
                self.networks.wait_until_ready().await,
            ] {
                if result.is_err() {
                    tracing::debug!("services are not watched: the node stops");
                }
            }
        })
    }

    /// Tells every network on the node its services; false if one could not be told.
    async fn tell_all(&self) -> bool {
        let networks = match self.driver.list_networks().await {
            Ok(networks) => networks,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "cannot list the node's networks");
                return false;
            }
        };
        let mut all = true;
        for network in networks {
            match self.tell_now(&network.id).await {
                Ok(()) | Err(NetworkError::NoNetwork(_)) => {}
                // Its addresses and those of services are in each other's way, for good.
                Err(error @ NetworkError::Spec { .. }) => {
                    tracing::warn!(network = %network.id, error = %chain(&error), "a network has no services");
                }
                Err(error) => {
                    tracing::warn!(network = %network.id, error = %chain(&error), "cannot set services; again");
                    all = false;
                }
            }
        }
        all
    }

    async fn tell_now(&self, network: &NetworkId) -> Result<(), NetworkError> {
        let _in_turn = self.telling.lock().await;
        let services = plan::services(&self.settings, &self.state(), network);
        self.driver.set_services(network, services).await
    }

    /// Tells a network that a pod is on its way to.
    pub(crate) async fn tell(&self, network: &NetworkId) -> Result<(), String> {
        if tokio::time::timeout(PATIENCE, self.wait()).await.is_err() {
            return Err("services are not known yet".to_owned());
        }
        match self.tell_now(network).await {
            // The pod can do without.
            Err(error @ NetworkError::Spec { .. }) => {
                tracing::warn!(%network, error = %chain(&error), "a network has no services");
                Ok(())
            }
            other => other.map_err(|error| chain(&error).to_string()),
        }
    }

    fn state(&self) -> plan::State {
        plan::State {
            services: self.services.state(),
            slices: self.slices.state(),
            namespaces: self.namespaces.state(),
            networks: self.networks.state(),
        }
    }

    /// What containers of a pod find in their environment.
    pub(crate) fn environment(&self, namespace: &str, all: bool) -> Vec<(String, String)> {
        let mut services = self.services.state();
        services.retain(|service| service.metadata.namespace.as_deref() == Some(namespace));
        env::variables(&services, all, self.settings.api())
    }
}

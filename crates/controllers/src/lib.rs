//! Reconcilers on `kube::Client`: tenants, networks, namespaces.
//!
//! Each looks at what is, does the next step towards what shall be, and says in the object's status
//! where it stands. Every step may be repeated. Nothing here knows in which process the API server
//! runs.
//!
//! - **Tenant** → its namespace, the network `default` in it, role bindings for its members, and
//!   sight of the tenant itself. Deletion goes the other way and waits for each stage.
//! - **Network**: kept until no pod is on it, then removed from the node.
//! - **Workloads** (only where the cluster does not bring their controllers itself): ReplicaSets, Deployments,
//!   StatefulSets, DaemonSets, Jobs, CronJobs, disruption budgets, quotas, and the garbage collector.
//! - **Namespace**: gets the service account `default` and the authority's certificate; a deleted one is
//!   emptied, pods first and networks last, before it goes.
//! - **PersistentVolumeClaim** → a volume of this node's driver, where there is one; **PersistentVolume**: reclaimed
//!   when its claim is gone.
//! - **Service** → its EndpointSlices, from its pods.
#![forbid(unsafe_code)]

mod auto_remove;
mod conditions;
mod endpoints;
mod error;
mod mirror;
mod namespace;
mod network;
mod objects;
mod seen;
mod tenant;
mod volumes;
mod workloads;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, future::BoxFuture};
use hypernetes_network::NetworkDriver;
use hypernetes_telemetry::chain;
use hypernetes_types::kinds::TENANT_LABEL;
use hypernetes_volume::VolumeDriver;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::DynamicObject,
    runtime::{
        controller::{Action, Controller},
        reflector::ObjectRef,
    },
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub use error::ReconcileError;

use seen::{Seen, watching};

/// What the controllers work with.
#[derive(Clone)]
pub struct ControllersConfig {
    /// The API server.
    pub client: Client,
    /// Networks of the node in whose process this runs; `None` where nodes clean up themselves.
    pub networks: Option<Arc<dyn NetworkDriver>>,
    /// The API server for the controllers of workloads, which write what tenants have asked for: its user
    /// is in [`hypernetes_identity::WORKLOAD_CONTROLLERS`], to which the rules for tenants hold. `None` where the
    /// cluster brings such controllers itself.
    pub workloads: Option<Client>,
    /// Volumes of the node in whose process this runs; `None` where the cluster has drivers of its own.
    pub volumes: Option<Arc<dyn VolumeDriver>>,
    /// Certificate of the authority, for pods that speak to the API.
    pub ca_pem: String,
}

impl std::fmt::Debug for ControllersConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControllersConfig")
            .field("networks", &self.networks)
            .finish_non_exhaustive()
    }
}

/// Runs all controllers until `stop`; what is under way then is finished.
pub async fn run(config: ControllersConfig, stop: CancellationToken) {
    let context = Arc::new(config);
    let workloads = async {
        if let Some(client) = context.workloads.clone() {
            Box::pin(workloads::run(client, &stop)).await;
        }
    };
    let volumes = async {
        if let Some(driver) = context.volumes.clone() {
            Box::pin(volumes::run(context.client.clone(), driver, &stop)).await;
        }
    };
    tokio::join!(
        workloads,
        volumes,
        tenants(context.clone(), &stop),
        networks(context.clone(), &stop),
        namespaces(context.clone(), &stop),
        auto_removal(context.clone(), &stop),
        endpoints::run(context.client.clone(), &stop),
    );
}

fn stopped(stop: &CancellationToken) -> impl Future<Output = ()> + Send + Sync + 'static {
    let stop = stop.clone();
    async move { stop.cancelled().await }
}

async fn tenants(context: Arc<ControllersConfig>, stop: &CancellationToken) {
    let kind = objects::tenant_resource();
    let network_kind = objects::network_resource();
    let tenants: Api<DynamicObject> = Api::all_with(context.client.clone(), &kind);
    let namespaces: Api<Namespace> = Api::all(context.client.clone());
    let networks: Api<DynamicObject> = Api::all_with(context.client.clone(), &network_kind);
    let of_namespace = {
        let kind = kind.clone();
        move |namespace: Namespace| {
            let tenant = namespace.labels().get(TENANT_LABEL).cloned();
            tenant.map(|name| ObjectRef::new_with(&name, kind.clone()))
        }
    };
    let of_network = {
        let kind = kind.clone();
        // The tenant's first namespace has its name.
        move |network: DynamicObject| {
            network
                .namespace()
                .map(|name| ObjectRef::new_with(&name, kind.clone()))
        }
    };
    Controller::new_with(tenants, watching(), kind)
        .watches(namespaces, watching().labels(TENANT_LABEL), of_namespace)
        .watches_with(networks, network_kind, watching(), of_network)
        .graceful_shutdown_on(stopped(stop))
        .run(
            |tenant, context| boxed(async move { tenant::reconcile(&tenant, &context).await }),
            |object, error, _| retry("tenant", &object.name_any(), error),
            context,
        )
        .for_each(|_| async {})
        .await;
}

async fn networks(context: Arc<ControllersConfig>, stop: &CancellationToken) {
    let kind = objects::network_resource();
    let networks: Api<DynamicObject> = Api::all_with(context.client.clone(), &kind);
    Controller::new_with(networks, watching(), kind)
        .graceful_shutdown_on(stopped(stop))
        .run(
            |network, context| boxed(async move { network::reconcile(&network, &context).await }),
            |object, error, _| retry("network", &object.name_any(), error),
            context,
        )
        .for_each(|_| async {})
        .await;
}

async fn namespaces(context: Arc<ControllersConfig>, stop: &CancellationToken) {
    let namespaces: Api<Namespace> = Api::all(context.client.clone());
    let kind = workloads::cluster::pods().resource();
    let pods: Api<Seen> = Api::all_with(context.client.clone(), &kind);
    // The end of a namespace's last pod is what its deletion mostly waits for.
    let of_pod = |pod: Seen| {
        let leaving = pod.metadata.deletion_timestamp.is_some();
        pod.namespace()
            .filter(|_| leaving)
            .map(|name| ObjectRef::new(&name))
    };
    Controller::new(namespaces, watching())
        .watches_with(pods, kind, watching(), of_pod)
        .graceful_shutdown_on(stopped(stop))
        .run(
            |namespace, context| {
                boxed(async move { namespace::reconcile(&namespace, &context).await })
            },
            |object, error, _| retry("namespace", &object.name_any(), error),
            context,
        )
        .for_each(|_| async {})
        .await;
}

async fn auto_removal(context: Arc<ControllersConfig>, stop: &CancellationToken) {
    let pods: Api<Pod> = Api::all(context.client.clone());
    Controller::new(pods, watching().labels(auto_remove::NAME))
        .graceful_shutdown_on(stopped(stop))
        .run(
            |pod, context| {
                boxed(async move { auto_remove::reconcile(&pod, &context.client).await })
            },
            |object, error, _| retry("pod", &object.name_any(), error),
            context,
        )
        .for_each(|_| async {})
        .await;
}

type Reconciled = Result<Action, ReconcileError>;

fn boxed(
    work: impl Future<Output = Reconciled> + Send + 'static,
) -> BoxFuture<'static, Reconciled> {
    Box::pin(work)
}

/// How long to wait after a failure. Conflicts are everyday: someone else wrote first.
fn retry(kind: &'static str, name: &str, error: &ReconcileError) -> Action {
    if error.is_conflict() {
        debug!(kind, name, error = %chain(error), "reconciled against an old state; again");
        return Action::requeue(Duration::from_millis(50));
    }
    warn!(kind, name, error = %chain(error), "cannot reconcile; again");
    Action::requeue(Duration::from_secs(2))
}

//! Controllers of workloads, which an upstream cluster brings itself: they run in embedded mode only.
//!
//! Each reads the state of what it is about afresh from the API server, does the next step, and is
//! called again when something changes: so that a restart at any point, a lost event or a write
//! of somebody else leads to the same end.

mod autoscaler;
mod budget;
pub(crate) mod cluster;
mod collector;
mod cron_job;
mod daemon_set;
mod deployment;
mod job;
mod owned;
mod pods;
pub(crate) mod queue;
mod quota;
mod recorder;
mod replica_set;
mod revisions;
mod set_claims;
mod stateful_set;

use std::{
    collections::HashMap,
    future::ready,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{StreamExt, future::BoxFuture};
use hypernetes_telemetry::chain;
use kube::{
    Api, Client, ResourceExt,
    api::DynamicObject,
    runtime::{
        controller::{self, Action, Controller},
        reflector::{ObjectRef, Store},
    },
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::cluster::{Cluster, Kind};
use crate::{
    error::ReconcileError,
    seen::{Seen, watching},
    stopped,
};

type Reconciled = Result<Action, ReconcileError>;

/// Reconciliations of one kind that run at a time.
const CONCURRENCY: u16 = 4;

/// Runs all of them until `stop`.
pub(crate) async fn run(client: Client, stop: &CancellationToken) {
    let cluster = Arc::new(Cluster::new(client));
    let pods = cluster::pods();
    let simple = |kind: Kind, owned: Vec<Kind>, reconcile: Reconcile| {
        let cluster = cluster.clone();
        Box::pin(async move { control(&cluster, kind, &owned, reconcile, stop).await })
    };
    tokio::join!(
        collector::run(cluster.clone(), stop.clone()),
        simple(
            cluster::replica_sets(),
            vec![pods.clone()],
            |cluster, set| {
                Box::pin(async move {
                    replica_set::reconcile(&cluster, &cluster::replica_sets(), set).await
                })
            }
        ),
        simple(
            cluster::replication_controllers(),
            vec![pods.clone()],
            |cluster, set| {
                Box::pin(async move {
                    let kind = cluster::replication_controllers();
                    replica_set::reconcile(&cluster, &kind, set).await
                })
            }
        ),
        simple(
            cluster::deployments(),
            vec![cluster::replica_sets()],
            |cluster, deployment| {
                Box::pin(async move { deployment::reconcile(&cluster, deployment).await })
            },
        ),
        simple(
            cluster::stateful_sets(),
            vec![pods.clone()],
            |cluster, set| Box::pin(async move { stateful_set::reconcile(&cluster, set).await }),
        ),
        simple(cluster::jobs(), vec![pods.clone()], |cluster, job| {
            Box::pin(async move { job::reconcile(&cluster, job).await })
        }),
        simple(
            cluster::cron_jobs(),
            vec![cluster::jobs()],
            |cluster, cron| Box::pin(async move { cron_job::reconcile(&cluster, cron).await }),
        ),
        simple(cluster::autoscalers(), Vec::new(), |cluster, scaler| {
            Box::pin(async move { autoscaler::reconcile(&cluster, scaler).await })
        }),
        Box::pin(daemon_set::run(&cluster, stop)),
        Box::pin(budget::run(&cluster, stop)),
        Box::pin(quota::run(&cluster, stop)),
        Box::pin(pods::run(&cluster, stop)),
    );
}

/// What brings one object further.
type Reconcile = fn(Arc<Cluster>, Value) -> BoxFuture<'static, Reconciled>;

/// A controller of a kind and of what its objects own.
fn controller(cluster: &Cluster, kind: &Kind, owned: &[Kind]) -> Controller<DynamicObject> {
    let resource = kind.resource();
    let api = Api::all_with(cluster.client(), &resource);
    let config = controller::Config::default().concurrency(CONCURRENCY);
    let mut controller = Controller::new_with(api, watching(), resource).with_config(config);
    for child in owned {
        let resource = child.resource();
        // Whose they are is in their metadata; nothing else of them is decoded.
        let api: Api<Seen> = Api::all_with(cluster.client(), &resource);
        controller = controller.owns_with(api, resource, watching());
    }
    controller
}

async fn control(
    cluster: &Arc<Cluster>,
    kind: Kind,
    owned: &[Kind],
    reconcile: Reconcile,
    stop: &CancellationToken,
) {
    let controller = controller(cluster, &kind, owned);
    serve(cluster, kind, controller, reconcile, stop).await;
}

/// What a controller keeps between calls.
struct Context {
    cluster: Arc<Cluster>,
    kind: Kind,
    reconcile: Reconcile,
    /// Failures in a row, by object.
    failures: Mutex<HashMap<String, u32>>,
}

impl Context {
    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(object: &DynamicObject) -> String {
    format!(
        "{}/{}",
        object.namespace().unwrap_or_default(),
        object.name_any()
    )
}

async fn serve(
    cluster: &Arc<Cluster>,
    kind: Kind,
    controller: Controller<DynamicObject>,
    reconcile: Reconcile,
    stop: &CancellationToken,
) {
    let context = Arc::new(Context {
        cluster: cluster.clone(),
        kind,
        reconcile,
        failures: Mutex::default(),
    });
    controller
        .graceful_shutdown_on(stopped(stop))
        .run(
            |object, context: Arc<Context>| {
                let boxed: BoxFuture<'static, Reconciled> =
                    Box::pin(async move { step(&object, &context).await });
                boxed
            },
            |object, error, context| {
                let mut failures = context.failures();
                let failures = failures.entry(key(&object)).or_default();
                *failures += 1;
                let wait = queue::backoff(*failures);
                let (kind, name) = (&context.kind.plural, key(&object));
                if error.is_conflict() {
                    debug!(kind, name, error = %chain(error), "an old state; again");
                } else {
                    info!(kind, name, error = %chain(error), ?wait, "cannot reconcile; again");
                }
                Action::requeue(wait)
            },
            context,
        )
        .for_each(|_| ready(()))
        .await;
}

/// Reads the object afresh and brings it further.
async fn step(object: &DynamicObject, context: &Context) -> Reconciled {
    let namespace = object.namespace().unwrap_or_default();
    let fresh = context
        .cluster
        .get(&context.kind, &namespace, &object.name_any())
        .await?;
    let Some(fresh) = fresh else {
        context.failures().remove(&key(object));
        return Ok(Action::await_change());
    };
    let action = (context.reconcile)(context.cluster.clone(), fresh).await?;
    context.failures().remove(&key(object));
    Ok(action)
}

/// The objects of a store that are in the namespace.
fn of_namespace(
    store: &Store<DynamicObject>,
    namespace: &str,
    kind: &Kind,
) -> Vec<ObjectRef<DynamicObject>> {
    store
        .state()
        .iter()
        .filter(|object| object.namespace().as_deref() == Some(namespace))
        .map(|object| ObjectRef::from_obj_with(object.as_ref(), kind.resource()))
        .collect()
}

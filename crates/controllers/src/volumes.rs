//! Persistent volumes: claims get volumes of this machine's driver, and volumes go when nobody claims them.
//!
//! What is to be made is written down first: a PersistentVolume is there, bound to its claim and `Pending`, before
//! its data are, and goes after them. So a step that was broken off is found again by its object and repeated, and
//! there are no data without an object but those that an operator has taken the object from (`Retain`).
//! One step runs at a time: no two claims ever get one volume.

mod claim;
mod ephemeral;
mod expand;
mod matching;
mod provision;
mod volume;

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use hypernetes_volume::VolumeDriver;
use kube::{
    Api, Client, ResourceExt,
    api::DynamicObject,
    runtime::{
        controller::{Action, Controller},
        reflector::{ObjectRef, Store},
    },
};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    ReconcileError, Reconciled, boxed, retry,
    seen::{SeenPod, watching},
    stopped,
    workloads::cluster::{Cluster, Kind, pods},
};

/// Name of the driver of this machine's volumes.
pub(crate) const DRIVER: &str = "local.hypernetes.io";
/// Name of its class, which is the default.
const CLASS: &str = "local";
/// When to look again at what nobody tells about.
const AGAIN: Duration = Duration::from_secs(5);

pub(crate) fn claims() -> Kind {
    Kind::new("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
}

fn volumes() -> Kind {
    cluster_wide("", "PersistentVolume", "persistentvolumes")
}

fn classes() -> Kind {
    cluster_wide("storage.k8s.io", "StorageClass", "storageclasses")
}

fn cluster_wide(group: &str, kind: &str, plural: &str) -> Kind {
    Kind {
        namespaced: false,
        ..Kind::new(group, "v1", kind, plural)
    }
}

/// What the controllers of volumes work with.
struct Context {
    cluster: Cluster,
    driver: Arc<dyn VolumeDriver>,
    /// Held over each step.
    turn: Mutex<()>,
}

/// Runs them until `stop`.
pub(crate) async fn run(client: Client, driver: Arc<dyn VolumeDriver>, stop: &CancellationToken) {
    let context = Arc::new(Context {
        cluster: Cluster::new(client),
        driver,
        turn: Mutex::default(),
    });
    tokio::select! {
        () = ensure_class(&context.cluster) => {}
        () = stop.cancelled() => return,
    }
    tokio::join!(
        run_claims(context.clone(), stop),
        run_volumes(context.clone(), stop),
        ephemeral::run(&context, stop),
    );
}

/// Makes the class and says which driver there is. An operator may change either.
async fn ensure_class(cluster: &Cluster) {
    let class = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
        "metadata": {"name": CLASS, "annotations":
            {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": DRIVER,
        "reclaimPolicy": "Delete",
        // There is one node: nothing is known later that is not known at once, and who makes a claim sees
        // whether there is room.
        "volumeBindingMode": "Immediate",
        "allowVolumeExpansion": true,
    });
    let driver = json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver",
        "metadata": {"name": DRIVER},
        "spec": {"attachRequired": false, "fsGroupPolicy": "File"},
    });
    let drivers = cluster_wide("storage.k8s.io", "CSIDriver", "csidrivers");
    for (kind, object) in [(classes(), class), (drivers, driver)] {
        loop {
            match cluster.create(&kind, "", &object).await {
                Ok(_) => break,
                Err(error) if error.is_already_exists() => break,
                Err(error) => {
                    tracing::warn!(kind = kind.kind, error = %hypernetes_telemetry::chain(&error), "cannot make an object; again");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
}

fn api(context: &Context, kind: &Kind) -> Api<DynamicObject> {
    Api::all_with(context.cluster.client(), &kind.resource())
}

/// Claims of a store that have no volume yet.
fn waiting(store: &Store<DynamicObject>) -> Vec<ObjectRef<DynamicObject>> {
    let waits = |claim: &DynamicObject| claim.data["status"]["phase"] != "Bound";
    store
        .state()
        .iter()
        .filter(|claim| waits(claim))
        .map(|claim| ObjectRef::from_obj_with(claim.as_ref(), claims().resource()))
        .collect()
}

fn claim_ref(namespace: &str, name: &str) -> ObjectRef<DynamicObject> {
    ObjectRef::new_with(name, claims().resource()).within(namespace)
}

async fn run_claims(context: Arc<Context>, stop: &CancellationToken) {
    let any = watching;
    let controller = Controller::new_with(api(&context, &claims()), any(), claims().resource());
    let (of_volumes, of_classes) = (controller.store(), controller.store());
    controller
        .watches_with(
            api(&context, &volumes()),
            volumes().resource(),
            any(),
            move |volume| match &volume.data["spec"]["claimRef"] {
                Value::Null => waiting(&of_volumes),
                claim => vec![claim_ref(
                    claim["namespace"].as_str().unwrap_or_default(),
                    claim["name"].as_str().unwrap_or_default(),
                )],
            },
        )
        .watches_with(
            api(&context, &classes()),
            classes().resource(),
            any(),
            move |_class| waiting(&of_classes),
        )
        .watches_with(
            Api::<SeenPod>::all_with(context.cluster.client(), &pods().resource()),
            pods().resource(),
            any(),
            |pod: SeenPod| {
                let namespace = pod.namespace().unwrap_or_default();
                let name = pod.name_any();
                claim::named_by(&name, &pod.spec.volumes)
                    .map(|name| claim_ref(&namespace, &name))
                    .collect::<Vec<_>>()
            },
        )
        .graceful_shutdown_on(stopped(stop))
        .run(
            |claim, context| {
                boxed(async move {
                    let _turn = context.turn.lock().await;
                    claim::reconcile(&context, &claim).await
                })
            },
            |claim, error, _| retry("claim", &claim.name_any(), error),
            context,
        )
        .for_each(|_| async {})
        .await;
}

async fn run_volumes(context: Arc<Context>, stop: &CancellationToken) {
    let any = watching;
    Controller::new_with(api(&context, &volumes()), any(), volumes().resource())
        .watches_with(
            api(&context, &claims()),
            claims().resource(),
            any(),
            |claim: DynamicObject| {
                let named = claim.data["spec"]["volumeName"].as_str().map(str::to_owned);
                let own = claim.uid().map(|uid| provision::name_for(&uid));
                named
                    .into_iter()
                    .chain(own)
                    .map(|name| ObjectRef::new_with(&name, volumes().resource()))
                    .collect::<Vec<_>>()
            },
        )
        .graceful_shutdown_on(stopped(stop))
        .run(
            |volume, context| {
                boxed(async move {
                    let _turn = context.turn.lock().await;
                    volume::reconcile(&context, &volume.name_any()).await
                })
            },
            |volume, error, _| retry("volume", &volume.name_any(), error),
            context,
        )
        .for_each(|_| async {})
        .await;
}

/// The driver that a volume is of, and its name there, if it is this machine's.
fn handle(volume: &Value) -> Option<&str> {
    let csi = &volume["spec"]["csi"];
    match csi["driver"] == DRIVER {
        true => csi["volumeHandle"].as_str(),
        false => None,
    }
}

impl Context {
    fn failed(volume: &str) -> impl FnOnce(hypernetes_volume::VolumeError) -> ReconcileError {
        let volume = volume.to_owned();
        move |source| ReconcileError::Volume {
            volume,
            source: Box::new(source),
        }
    }
}

/// The class that a claim names: none is `None`.
fn class_of(claim: &Value) -> Option<&str> {
    hypernetes_apimachinery::meta::annotation(claim, "volume.beta.kubernetes.io/storage-class")
        .or_else(|| claim["spec"]["storageClassName"].as_str())
        .filter(|name| !name.is_empty())
}

fn wait() -> Reconciled {
    Ok(Action::await_change())
}

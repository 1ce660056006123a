//! ResourceQuota: what is used, counted anew. The API server adds what is made; this takes away
//! what has gone.

use std::{sync::Arc, time::Duration};

use hypernetes_apimachinery::{
    crd::own_kinds,
    kinds,
    quota::{self, Amounts},
};
use kube::{Api, ResourceExt, runtime::controller::Action};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{Cluster, Kind, namespace, pods, quotas},
    controller, of_namespace, serve,
};
use crate::{
    error::ReconcileError,
    seen::{Seen, watching},
    volumes::claims,
};

/// How often what is not watched is counted.
const RECOUNT: Duration = Duration::from_secs(10);

pub(super) async fn run(cluster: &Arc<Cluster>, stop: &CancellationToken) {
    let kind = quotas();
    let controller = controller(cluster, &kind, &[]);
    let (store, own) = (controller.store(), kind.clone());
    let api: Api<Seen> = Api::all_with(cluster.client(), &pods().resource());
    let (claims_store, claims_own) = (controller.store(), kind.clone());
    let claims_api: Api<Seen> = Api::all_with(cluster.client(), &claims().resource());
    let (kept_store, kept_own) = (controller.store(), kind.clone());
    let kept_api: Api<Seen> = Api::all_with(cluster.client(), &snapshots().resource());
    let controller = controller
        .watches_with(api, pods().resource(), watching(), move |pod| {
            of_namespace(&store, &pod.namespace().unwrap_or_default(), &own)
        })
        .watches_with(claims_api, claims().resource(), watching(), move |claim| {
            let namespace = claim.namespace().unwrap_or_default();
            of_namespace(&claims_store, &namespace, &claims_own)
        })
        .watches_with(kept_api, snapshots().resource(), watching(), move |kept| {
            let namespace = kept.namespace().unwrap_or_default();
            of_namespace(&kept_store, &namespace, &kept_own)
        });
    serve(
        cluster,
        kind,
        controller,
        |cluster, quota| Box::pin(async move { reconcile(&cluster, quota).await }),
        stop,
    )
    .await;
}

fn snapshots() -> Kind {
    use hypernetes_types::kinds::{GROUP, VERSION};
    Kind::new(GROUP, VERSION, "PodSnapshot", "podsnapshots")
}

async fn reconcile(cluster: &Cluster, quota: Value) -> Result<Action, ReconcileError> {
    let hard = quota::amounts(&quota["spec"]["hard"]);
    let mut used = Amounts::new();
    for name in hard.keys() {
        used.insert(name.clone(), hypernetes_apimachinery::Quantity::default());
    }
    let mut unwatched = false;
    let own = own_kinds().iter().map(|custom| custom.kind);
    for kind in kinds::all().iter().chain(own) {
        // Only kinds that the quota bounds are counted.
        let counted = quota::bounds_kind(&hard, kind);
        if !kind.namespaced || !kind.is_stored() || !counted {
            continue;
        }
        let is_pods = kind.group.is_empty() && kind.plural == "pods";
        unwatched |= !is_pods;
        let read = Kind::new(kind.group, kind.version, kind.kind, kind.plural);
        let count = |object: &Value| {
            if quota::counts(&quota, kind, object) {
                let bounded = quota::bounded(&quota::usage(kind, object), &hard);
                quota::add(&mut used, &bounded);
            }
            false
        };
        cluster.list_kept(&read, namespace(&quota), count).await?;
    }
    let mut status = quota["status"].clone();
    if !status.is_object() {
        status = serde_json::json!({});
    }
    status["hard"] = quota["spec"]["hard"].clone();
    if status["hard"].is_null() {
        status["hard"] = serde_json::json!({});
    }
    status["used"] = quota::to_value(&used);
    cluster.update_status(&quotas(), &quota, status).await?;
    Ok(if unwatched {
        Action::requeue(RECOUNT)
    } else {
        Action::await_change()
    })
}

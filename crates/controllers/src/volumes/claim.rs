//! A claim: gets a volume, keeps it while pods use it, and asks for more room.

use hypernetes_apimachinery::meta;
use kube::{ResourceExt, api::DynamicObject, runtime::controller::Action};
use serde_json::{Value, json};

use super::{
    AGAIN, Context, DRIVER, claims, class_of, classes, expand, handle, matching,
    provision::{self, Provisioned},
    volumes, wait,
};
use crate::{
    ReconcileError, Reconciled,
    workloads::cluster::{name, namespace, pods},
};

const PROTECTION: &str = "kubernetes.io/pvc-protection";
const PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";

/// Names of the claims that a pod uses, those of its own making too.
pub(super) fn named_by(pod: &str, volumes: &[Value]) -> impl Iterator<Item = String> {
    volumes.iter().filter_map(move |volume| {
        if volume["ephemeral"].is_object() {
            return Some(format!("{pod}-{}", volume["name"].as_str()?));
        }
        let claim = volume["persistentVolumeClaim"]["claimName"].as_str()?;
        Some(claim.to_owned())
    })
}

pub(super) async fn reconcile(context: &Context, seen: &DynamicObject) -> Reconciled {
    let place = seen.namespace().unwrap_or_default();
    let fresh = context
        .cluster
        .get(&claims(), &place, &seen.name_any())
        .await?;
    let Some(claim) = fresh else { return wait() };
    if meta::is_deleting(&claim) {
        return release(context, claim).await;
    }
    match claim["spec"]["volumeName"].as_str() {
        None | Some("") => find(context, claim).await,
        Some(volume) => {
            let found = context.cluster.get(&volumes(), "", volume).await?;
            settle(context, claim, found).await
        }
    }
}

/// Lets a claim go that no pod uses.
async fn release(context: &Context, mut claim: Value) -> Reconciled {
    if !meta::finalizers(&claim).any(|own| own == PROTECTION) {
        return wait();
    }
    let uses = |pod: &Value| is_used_by(name(&claim), pod);
    let users = (context.cluster)
        .list_kept(&pods(), namespace(&claim), uses)
        .await?;
    let used = !users.is_empty();
    if !used {
        meta::remove_finalizer(&mut claim, PROTECTION);
        context.cluster.update(&claims(), &claim).await?;
    }
    wait()
}

/// Whether a pod that is on a node, and has not ended, has the claim.
fn is_used_by(claim: &str, pod: &Value) -> bool {
    let ended = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    let placed = !pod["spec"]["nodeName"]
        .as_str()
        .unwrap_or_default()
        .is_empty();
    let volumes = pod["spec"]["volumes"].as_array();
    let volumes = volumes.map(Vec::as_slice).unwrap_or_default();
    placed && !ended && named_by(name(pod), volumes).any(|used| used == claim)
}

/// Looks for a volume, or makes one.
async fn find(context: &Context, claim: Value) -> Reconciled {
    let cluster = &context.cluster;
    let all = cluster.list(&volumes(), "").await?;
    if let Some(volume) = matching::best(&all, &claim) {
        return bind(context, claim, volume.clone()).await;
    }
    let Some(wanted) = class_of(&claim).map(str::to_owned) else {
        let said = "no persistent volumes available for this claim and no storage class is set";
        cluster.event(&claim, "Normal", "FailedBinding", said).await;
        return wait();
    };
    let Some(class) = cluster.get(&classes(), "", &wanted).await? else {
        let said = format!("storageclass.storage.k8s.io \"{wanted}\" not found");
        cluster
            .event(&claim, "Warning", "ProvisioningFailed", &said)
            .await;
        return wait();
    };
    let first_consumer = class["volumeBindingMode"] == "WaitForFirstConsumer";
    if first_consumer && meta::annotation(&claim, SELECTED_NODE).is_none() {
        let said = "waiting for first consumer to be created before binding";
        cluster
            .event(&claim, "Normal", "WaitForFirstConsumer", said)
            .await;
        return wait();
    }
    let provisioner = class["provisioner"].as_str().unwrap_or_default();
    let claim = annotated(context, claim, PROVISIONER, provisioner).await?;
    if provisioner != DRIVER {
        let said = format!(
            "Waiting for a volume to be created either by the external provisioner \
             '{provisioner}' or manually by the system administrator. If volume creation is \
             delayed, please verify that the provisioner is running and correctly registered."
        );
        cluster
            .event(&claim, "Normal", "ExternalProvisioning", &said)
            .await;
        return wait();
    }
    match provision::volume(context, &class, &claim).await? {
        Provisioned::Made(volume) => {
            let said = format!("Successfully provisioned volume {}", name(&volume));
            cluster
                .event(&claim, "Normal", "ProvisioningSucceeded", &said)
                .await;
            bind(context, claim, volume).await
        }
        Provisioned::Failed { why, again } => {
            let said = format!("failed to provision volume with StorageClass \"{wanted}\": {why}");
            cluster
                .event(&claim, "Warning", "ProvisioningFailed", &said)
                .await;
            match again {
                true => Ok(Action::requeue(AGAIN)),
                false => wait(),
            }
        }
    }
}

async fn annotated(
    context: &Context,
    mut claim: Value,
    key: &str,
    value: &str,
) -> Result<Value, ReconcileError> {
    if meta::annotation(&claim, key) == Some(value) {
        return Ok(claim);
    }
    meta::set_annotation(&mut claim, key, value);
    context.cluster.update(&claims(), &claim).await
}

/// Gives a volume to a claim: first the volume says so, then the claim.
async fn bind(context: &Context, mut claim: Value, mut volume: Value) -> Reconciled {
    if volume["spec"]["claimRef"]["uid"] != claim["metadata"]["uid"] {
        volume["spec"]["claimRef"] = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "name": name(&claim), "namespace": namespace(&claim),
            "uid": claim["metadata"]["uid"],
            "resourceVersion": claim["metadata"]["resourceVersion"]});
        meta::set_annotation(&mut volume, BOUND_BY_CONTROLLER, "yes");
        volume = context.cluster.update(&volumes(), &volume).await?;
    }
    if claim["spec"]["volumeName"] != volume["metadata"]["name"] {
        claim["spec"]["volumeName"] = volume["metadata"]["name"].clone();
        meta::set_annotation(&mut claim, BOUND_BY_CONTROLLER, "yes");
    }
    meta::set_annotation(&mut claim, BIND_COMPLETED, "yes");
    context.cluster.update(&claims(), &claim).await?;
    // Its own change calls again.
    wait()
}

/// Brings the status of a claim that names a volume, and the volume's, to what holds.
async fn settle(context: &Context, claim: Value, volume: Option<Value>) -> Reconciled {
    let cluster = &context.cluster;
    let was_bound = claim["status"]["phase"] == "Bound";
    let Some(volume) = volume else {
        if was_bound {
            let said = "Bound claim has lost its PersistentVolume. Data on the volume is lost!";
            return lose(context, &claim, "ClaimLost", said).await;
        }
        return wait();
    };
    if matching::is_free(&volume) {
        if let Some(why) = matching::misfit(&volume, &claim) {
            let said = format!(
                "Cannot bind to requested volume \"{}\": {why}",
                name(&volume)
            );
            cluster
                .event(&claim, "Warning", "VolumeMismatch", &said)
                .await;
            return wait();
        }
        return bind(context, claim, volume).await;
    }
    if !matching::is_for(&volume, &claim) {
        if was_bound {
            let said = "Two claims are bound to the same volume, this one is bound incorrectly";
            return lose(context, &claim, "ClaimMisbound", said).await;
        }
        let said = format!(
            "volume \"{}\" already bound to a different claim.",
            name(&volume)
        );
        cluster
            .event(&claim, "Warning", "FailedBinding", &said)
            .await;
        return wait();
    }
    if volume["spec"]["claimRef"]["uid"] != claim["metadata"]["uid"] {
        return bind(context, claim, volume).await;
    }
    if volume["status"]["phase"] == "Failed" {
        let said = "Bound claim has lost its volume. Data on the volume is lost!";
        return lose(context, &claim, "ClaimLost", said).await;
    }
    cluster
        .update_status(&volumes(), &volume, json!({"phase": "Bound"}))
        .await?;
    let mut status = claim["status"].clone();
    status["phase"] = "Bound".into();
    status["accessModes"] = volume["spec"]["accessModes"].clone();
    if status["capacity"].is_null() {
        status["capacity"] = json!({"storage": volume["spec"]["capacity"]["storage"]});
    }
    if claim["status"] != status {
        cluster.update_status(&claims(), &claim, status).await?;
        // Its own change calls again.
        return wait();
    }
    if handle(&volume).is_some() && matching::requested(&claim) > matching::capacity(&volume) {
        return expand::volume(context, claim, volume).await;
    }
    expand::mark(context, &claim, &volume).await
}

async fn lose(context: &Context, claim: &Value, reason: &str, said: &str) -> Reconciled {
    let mut status = claim["status"].clone();
    status["phase"] = "Lost".into();
    if claim["status"] != status {
        context.cluster.event(claim, "Warning", reason, said).await;
        context
            .cluster
            .update_status(&claims(), claim, status)
            .await?;
    }
    wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_used_by_pods_that_are_placed_and_have_not_ended() {
        let pod = |node: &str, phase: &str| {
            json!({"metadata": {"name": "p"}, "status": {"phase": phase}, "spec": {"nodeName": node,
                "volumes": [{"name": "a", "persistentVolumeClaim": {"claimName": "c"}},
                    {"name": "e", "ephemeral": {}}]}})
        };
        for (claim, node, phase, expected) in [
            ("c", "n", "Running", true),
            ("p-e", "n", "Pending", true),
            ("a", "n", "Running", false),
            ("c", "", "Pending", false),
            ("c", "n", "Succeeded", false),
        ] {
            assert_eq!(
                is_used_by(claim, &pod(node, phase)),
                expected,
                "{claim} {phase}"
            );
        }
    }
}

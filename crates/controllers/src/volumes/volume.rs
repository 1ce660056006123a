//! A volume: available, bound, released, and gone with its data.

use hypernetes_apimachinery::meta;
use hypernetes_telemetry::chain;
use hypernetes_volume::{VolumeError, VolumeId};
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{
    AGAIN, Context, DRIVER, claims, handle, matching, provision::PROVISIONED_BY, volumes, wait,
};
use crate::{ReconcileError, Reconciled, workloads::cluster::name};

const PROTECTION: &str = "kubernetes.io/pv-protection";

pub(super) async fn reconcile(context: &Context, volume: &str) -> Reconciled {
    let Some(volume) = context.cluster.get(&volumes(), "", volume).await? else {
        return wait();
    };
    let reference = &volume["spec"]["claimRef"];
    let text = |field: &str| reference[field].as_str().unwrap_or_default();
    let claim = match reference {
        Value::Null => None,
        _ => {
            let cluster = &context.cluster;
            cluster
                .get(&claims(), text("namespace"), text("name"))
                .await?
        }
    };
    let claim = claim.filter(|claim| matching::is_for(&volume, claim));
    match (claim, text("uid").is_empty()) {
        // It is its claim's; what becomes of it is the claim's matter.
        (Some(claim), _) if claim["spec"]["volumeName"] == volume["metadata"]["name"] => {
            check(context, &volume).await
        }
        // Being bound.
        (Some(claim), _)
            if claim["spec"]["volumeName"]
                .as_str()
                .unwrap_or_default()
                .is_empty() =>
        {
            wait()
        }
        // Nobody's, or promised to a claim that is to come.
        (_, true) => free(context, volume).await,
        // Its claim is gone, or has another volume.
        (_, false) => reclaim(context, volume).await,
    }
}

/// A bound volume must have its data.
async fn check(context: &Context, volume: &Value) -> Reconciled {
    let Some(handle) = handle(volume) else {
        return wait();
    };
    if volume["status"]["phase"] != "Bound" {
        return wait();
    }
    let found = match handle.parse::<VolumeId>() {
        Ok(id) => context
            .driver
            .get(&id)
            .await
            .map_err(Context::failed(handle))?,
        Err(_no_name) => None,
    };
    if found.is_some() {
        return wait();
    }
    let message = format!("volume {handle} does not exist on this node");
    fail(context, volume, "VolumeLost", &message).await
}

async fn fail(context: &Context, volume: &Value, reason: &str, message: &str) -> Reconciled {
    let status = json!({"phase": "Failed", "reason": reason, "message": message});
    if volume["status"] != status {
        let cluster = &context.cluster;
        cluster.event(volume, "Warning", reason, message).await;
        cluster.update_status(&volumes(), volume, status).await?;
    }
    wait()
}

async fn free(context: &Context, volume: Value) -> Reconciled {
    if meta::is_deleting(&volume) {
        if was_provisioned(&volume) && volume["spec"]["persistentVolumeReclaimPolicy"] == "Delete" {
            return remove(context, volume).await;
        }
        return let_go(context, volume).await;
    }
    context
        .cluster
        .update_status(&volumes(), &volume, json!({"phase": "Available"}))
        .await?;
    wait()
}

/// Whether the data were made for a claim, by this machine's driver.
fn was_provisioned(volume: &Value) -> bool {
    handle(volume).is_some() && meta::annotation(volume, PROVISIONED_BY) == Some(DRIVER)
}

async fn reclaim(context: &Context, volume: Value) -> Reconciled {
    let policy = volume["spec"]["persistentVolumeReclaimPolicy"].as_str();
    if policy == Some("Delete") && was_provisioned(&volume) {
        return remove(context, volume).await;
    }
    if meta::is_deleting(&volume) {
        return let_go(context, volume).await;
    }
    match policy {
        Some("Retain") => {
            context
                .cluster
                .update_status(&volumes(), &volume, json!({"phase": "Released"}))
                .await?;
            wait()
        }
        policy => {
            let message = format!(
                "{} is not supported for volumes that were not made for a claim",
                policy.unwrap_or_default()
            );
            fail(context, &volume, "VolumeFailedDelete", &message).await
        }
    }
}

/// Removes the data, and then the object.
async fn remove(context: &Context, volume: Value) -> Reconciled {
    let cluster = &context.cluster;
    if volume["status"]["phase"] != "Released" && !meta::is_deleting(&volume) {
        cluster
            .update_status(&volumes(), &volume, json!({"phase": "Released"}))
            .await?;
        // Its own change calls again.
        return wait();
    }
    let own = handle(&volume).unwrap_or_default();
    let id: VolumeId = own.parse().map_err(Context::failed(own))?;
    match context.driver.delete(&id).await {
        Ok(()) => {}
        // Its pod's VM is on its way down.
        Err(VolumeError::InUse { .. }) => {
            return Ok(Action::requeue(std::time::Duration::from_secs(1)));
        }
        Err(error) => {
            let said = chain(&error).to_string();
            cluster
                .event(&volume, "Warning", "VolumeFailedDelete", &said)
                .await;
            return Ok(Action::requeue(AGAIN));
        }
    }
    cluster.delete(&volumes(), &volume, None).await?;
    match cluster.get(&volumes(), "", name(&volume)).await? {
        Some(volume) => let_go(context, volume).await,
        None => wait(),
    }
}

async fn let_go(context: &Context, mut volume: Value) -> Result<Action, ReconcileError> {
    if meta::finalizers(&volume).any(|own| own == PROTECTION) {
        meta::remove_finalizer(&mut volume, PROTECTION);
        context.cluster.update(&volumes(), &volume).await?;
    }
    wait()
}

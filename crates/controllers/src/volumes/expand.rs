//! More room for a claim: the driver gives it, the node shows it to the guest.

use std::time::Duration;

use hypernetes_apimachinery::meta;
use hypernetes_telemetry::chain;
use hypernetes_volume::{VolumeError, VolumeId};
use jiff::Timestamp;
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{Context, DRIVER, claims, handle, matching, provision::shown, volumes, wait};
use crate::{Reconciled, workloads::cluster::name};

const PENDING: &str = "FileSystemResizePending";
/// When to try again where there is no room.
const AGAIN: Duration = Duration::from_secs(30);

/// Makes the volume as large as its claim asks.
pub(super) async fn volume(context: &Context, claim: Value, mut volume: Value) -> Reconciled {
    let cluster = &context.cluster;
    let Some(handle) = handle(&volume).map(str::to_owned) else {
        return wait();
    };
    let id: VolumeId = handle.parse().map_err(Context::failed(&handle))?;
    let bytes = u64::try_from(matching::requested(&claim).value()).unwrap_or_default();
    let said = format!("External resizer is resizing volume {}", name(&volume));
    cluster.event(&claim, "Normal", "Resizing", &said).await;
    match context.driver.expand(&id, bytes).await {
        Ok(info) => {
            volume["spec"]["capacity"]["storage"] = shown(info.bytes).into();
            volume = cluster.update(&volumes(), &volume).await?;
            mark(context, &claim, &volume).await
        }
        Err(error) => {
            let why = match &error {
                VolumeError::NoSpace { bytes, free } => format!(
                    "no room for {} more: {} of this node can be promised still",
                    shown(*bytes),
                    shown(*free)
                ),
                other => chain(other).to_string(),
            };
            let said = format!(
                "resize volume \"{}\" by resizer \"{DRIVER}\" failed: {why}",
                name(&volume)
            );
            cluster
                .event(&claim, "Warning", "VolumeResizeFailed", &said)
                .await;
            Ok(Action::requeue(AGAIN))
        }
    }
}

/// Says of a claim whose volume is larger than what pods see of it that the node has something to do.
pub(super) async fn mark(context: &Context, claim: &Value, volume: &Value) -> Reconciled {
    let seen = hypernetes_apimachinery::quota::quantity(&claim["status"]["capacity"]["storage"]);
    let waits = seen.unwrap_or_default() < matching::capacity(volume);
    let marked = claim["status"]["conditions"]
        .as_array()
        .is_some_and(|all| all.iter().any(|condition| condition["type"] == PENDING));
    if !waits || marked {
        return wait();
    }
    let now = meta::format_time(Timestamp::now());
    let mut status = claim["status"].clone();
    let condition = json!({"type": PENDING, "status": "True", "lastProbeTime": null,
        "lastTransitionTime": now, "message": "Waiting for user to (re-)start a pod to finish \
        file system resize of volume on node."});
    match status["conditions"].as_array_mut() {
        Some(conditions) => conditions.push(condition),
        None => status["conditions"] = json!([condition]),
    }
    status["allocatedResources"] = json!({"storage": volume["spec"]["capacity"]["storage"]});
    context
        .cluster
        .update_status(&claims(), claim, status)
        .await?;
    let said = "Require file system resize of volume on node";
    context
        .cluster
        .event(claim, "Normal", "FileSystemResizeRequired", said)
        .await;
    wait()
}

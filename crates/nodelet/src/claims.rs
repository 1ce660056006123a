//! Claims that pods use: from a claim's name to the volume's name at the node's driver, and what is left to do
//! on the node when a volume has grown.
//!
//! A pod names claims of its own namespace only, and a claim has a volume only if the volume says so too, by the
//! claim's id. So no pod gets a volume of another namespace, whatever it names.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, future::join_all, stream::BoxStream};
use hypernetes_runtime::{GroupChange, SandboxState, VolumeKind};
use hypernetes_telemetry::chain;
use k8s_openapi::api::core::v1::{
    Container, PersistentVolume, PersistentVolumeClaim, Pod, PodSpec, Volume,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{Config, Event, watcher},
    },
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{events::Level, steps::Node};

/// Name of the driver of the node's own volumes.
const DRIVER: &str = "local.hypernetes.io";
const RESIZE_PENDING: &str = "FileSystemResizePending";
/// How often pods are looked for that have a volume that has grown.
const LOOK: Duration = Duration::from_secs(2);

/// Why a claim cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    #[error("persistentvolumeclaim \"{0}\" not found")]
    NotFound(String),
    #[error("PersistentVolumeClaim is not bound: \"{0}\"")]
    Unbound(String),
    #[error("PVC {namespace}/{claim} was not created for pod {namespace}/{pod} (pod is not owner)")]
    NotOwner {
        namespace: String,
        claim: String,
        pod: String,
    },
    #[error("PersistentVolume \"{0}\" is bound to a different claim")]
    Misbound(String),
    #[error("PersistentVolume \"{0}\" has lost its data")]
    Lost(String),
    #[error("PersistentVolume \"{0}\" is not of driver {DRIVER}, the only one of this node")]
    Driver(String),
    #[error("volume {volume} has volumeMode {mode}, but is specified in {field}")]
    Mode {
        volume: String,
        mode: &'static str,
        field: &'static str,
    },
    #[error("cannot read {kind} {name}")]
    Api {
        kind: &'static str,
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
}

/// A claim's volume, as a pod uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claimed {
    /// Its name at the driver.
    pub(crate) handle: String,
    pub(crate) read_only: bool,
    block: bool,
}

/// Name of the claim of a pod's volume, if it has one.
pub(crate) fn name_of(pod: &str, volume: &Volume) -> Option<String> {
    if volume.ephemeral.is_some() {
        return Some(format!("{pod}-{}", volume.name));
    }
    let source = volume.persistent_volume_claim.as_ref()?;
    Some(source.claim_name.clone())
}

fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
}

/// Finds the volume behind a pod's claim.
pub(crate) async fn resolve(
    client: &Client,
    pod: &Pod,
    volume: &Volume,
) -> Result<Claimed, ClaimError> {
    let namespace = pod.namespace().unwrap_or_default();
    let name = name_of(&pod.name_any(), volume).unwrap_or_default();
    let failed = |kind: &'static str, name: &str| {
        let name = name.to_owned();
        move |source| ClaimError::Api {
            kind,
            name,
            source: Box::new(source),
        }
    };
    let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), &namespace);
    let claim = claims.get_opt(&name).await;
    let claim = claim
        .map_err(failed("persistentvolumeclaim", &name))?
        .ok_or_else(|| ClaimError::NotFound(name.clone()))?;
    let owned = || {
        let mut owners = claim.owner_references().iter();
        owners.any(|owner| Some(&owner.uid) == pod.metadata.uid.as_ref())
    };
    if volume.ephemeral.is_some() && !owned() {
        return Err(ClaimError::NotOwner {
            namespace,
            claim: name,
            pod: pod.name_any(),
        });
    }
    let phase = claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let spec = claim.spec.clone().unwrap_or_default();
    let Some(bound) = spec.volume_name.filter(|_| phase == Some("Bound")) else {
        return Err(ClaimError::Unbound(format!("{namespace}/{name}")));
    };
    let volumes = Api::<PersistentVolume>::all(client.clone());
    let persistent = volumes.get_opt(&bound).await;
    let persistent = persistent
        .map_err(failed("persistentvolume", &bound))?
        .ok_or_else(|| ClaimError::Lost(bound.clone()))?;
    let is_read = volume
        .persistent_volume_claim
        .as_ref()
        .and_then(|source| source.read_only)
        .unwrap_or(false);
    claimed(&claim, &persistent, is_read)
}

/// What a volume is to its claim, which it must be bound to.
fn claimed(
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
    is_read: bool,
) -> Result<Claimed, ClaimError> {
    let name = volume.name_any();
    let spec = volume.spec.clone().unwrap_or_default();
    let reference = spec.claim_ref.unwrap_or_default();
    if reference.uid.is_none() || reference.uid != claim.metadata.uid {
        return Err(ClaimError::Misbound(name));
    }
    let phase = volume.status.as_ref().and_then(|s| s.phase.as_deref());
    if phase == Some("Failed") {
        return Err(ClaimError::Lost(name));
    }
    let csi = spec.csi.filter(|csi| csi.driver == DRIVER);
    let csi = csi.ok_or(ClaimError::Driver(name))?;
    let modes = claim
        .spec
        .as_ref()
        .and_then(|spec| spec.access_modes.as_ref());
    let only_read = modes.is_some_and(|modes| modes.iter().all(|mode| mode == "ReadOnlyMany"));
    Ok(Claimed {
        handle: csi.volume_handle,
        read_only: is_read || only_read || csi.read_only == Some(true),
        block: spec.volume_mode.as_deref() == Some("Block"),
    })
}

/// A claim as a volume of the VM: `None` if no container mounts it.
pub(crate) async fn mounted(
    client: &Client,
    pod: &Pod,
    spec: &PodSpec,
    volume: &Volume,
) -> Result<Option<VolumeKind>, ClaimError> {
    let uses = |container: &Container| {
        let mut mounts = container.volume_mounts.iter().flatten();
        mounts.any(|mount| mount.name == volume.name)
    };
    if !containers(spec).any(uses) {
        return Ok(None);
    }
    let claimed = resolve(client, pod, volume).await?;
    if claimed.block {
        return Err(ClaimError::Mode {
            volume: volume.name.clone(),
            mode: "Block",
            field: "volumeMounts",
        });
    }
    let policy = spec
        .security_context
        .as_ref()
        .and_then(|context| context.fs_group_change_policy.as_deref());
    Ok(Some(VolumeKind::Disk {
        volume: claimed.handle,
        read_only: claimed.read_only,
        group_change: match policy {
            Some("OnRootMismatch") => GroupChange::OnRootMismatch,
            _ => GroupChange::Always,
        },
    }))
}

/// The block volumes of a container, by the pod's name for them.
pub(crate) async fn devices(
    client: &Client,
    pod: &Pod,
    container: &Container,
) -> Result<BTreeMap<String, Claimed>, ClaimError> {
    let mut found = BTreeMap::new();
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    for volume in volumes {
        let mut devices = container.volume_devices.iter().flatten();
        if !devices.any(|device| device.name == volume.name) {
            continue;
        }
        let claimed = resolve(client, pod, volume).await?;
        if !claimed.block {
            return Err(ClaimError::Mode {
                volume: volume.name.clone(),
                mode: "Filesystem",
                field: "volumeDevices",
            });
        }
        found.insert(volume.name.clone(), claimed);
    }
    Ok(found)
}

/// An attachment that another pod is in the way of, in a kubelet's words. Pods of other namespaces are counted
/// only.
pub(crate) fn multi_attach(namespace: &str, volume: &str, by: &[String]) -> String {
    let own: Vec<&str> = by
        .iter()
        .filter_map(|pod| pod.strip_prefix(namespace)?.strip_prefix('/'))
        .collect();
    let others = by.len() - own.len();
    let who = match (own.is_empty(), others) {
        (false, 0) => format!("pod(s) {}", own.join(", ")),
        (false, _) => format!(
            "pod(s) {} and {others} pod(s) in different namespaces",
            own.join(", ")
        ),
        (true, _) => format!("{others} pod(s) in different namespaces"),
    };
    format!("Multi-Attach error for volume \"{volume}\" Volume is already used by {who}")
}

fn waits_for_node(claim: &PersistentVolumeClaim) -> bool {
    let conditions = claim.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == RESIZE_PENDING)
}

/// Lets guests see volumes that have grown, until `stop`.
pub(crate) async fn grow(node: Arc<Node>, stop: CancellationToken) {
    let mut claims: BoxStream<'static, _> = watcher(
        Api::<PersistentVolumeClaim>::all(node.client.clone()),
        Config::default(),
    )
    .default_backoff()
    .boxed();
    let mut waiting: BTreeMap<(String, String), PersistentVolumeClaim> = BTreeMap::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(event) = claims.next() => match event {
                Ok(Event::Apply(claim) | Event::InitApply(claim)) => {
                    let key = (claim.namespace().unwrap_or_default(), claim.name_any());
                    match waits_for_node(&claim) {
                        true => waiting.insert(key, claim),
                        false => waiting.remove(&key),
                    };
                    if !waits_for_node_any(&waiting) {
                        continue;
                    }
                }
                Ok(Event::Delete(claim)) => {
                    waiting.remove(&(claim.namespace().unwrap_or_default(), claim.name_any()));
                    continue;
                }
                Ok(Event::Init) => {
                    waiting.clear();
                    continue;
                }
                Ok(Event::InitDone) => continue,
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "cannot watch claims");
                    continue;
                }
            },
            () = tokio::time::sleep(LOOK), if !waiting.is_empty() => {}
        }
        // All at once: a guest that does not answer has the others wait for one call of its, not for each of them.
        let grown = waiting.iter().map(|(key, claim)| async {
            let grown = grow_one(&node, claim, key).await;
            let done = grown.unwrap_or_else(|error| {
                tracing::debug!(claim = key.1, error = %chain(&error), "cannot finish a volume's growth yet");
                false
            });
            done.then(|| key.clone())
        });
        for key in join_all(grown).await.into_iter().flatten() {
            waiting.remove(&key);
        }
    }
}

fn waits_for_node_any(waiting: &BTreeMap<(String, String), PersistentVolumeClaim>) -> bool {
    !waiting.is_empty()
}

/// Grows a claim's volume in the pods that have it. Whether that is done, which it is once there is one that runs.
async fn grow_one(
    node: &Node,
    claim: &PersistentVolumeClaim,
    (namespace, name): &(String, String),
) -> Result<bool, kube::Error> {
    let bound = claim
        .spec
        .as_ref()
        .and_then(|spec| spec.volume_name.clone())
        .unwrap_or_default();
    let volumes = Api::<PersistentVolume>::all(node.client.clone());
    let Some(volume) = volumes.get_opt(&bound).await? else {
        return Ok(false);
    };
    let Ok(claimed) = claimed(claim, &volume, false) else {
        return Ok(false);
    };
    let pods = Api::<Pod>::namespaced(node.client.clone(), namespace);
    let pods = pods.list(&ListParams::default()).await?;
    let sandboxes = node.runtime.list_sandboxes().await;
    for pod in pods {
        let spec = pod.spec.iter();
        let mut volumes = spec.flat_map(|spec| spec.volumes.iter().flatten());
        let uses = volumes.any(|v| name_of(&pod.name_any(), v).as_ref() == Some(name));
        let sandbox = sandboxes.iter().find(|sandbox| {
            Some(&sandbox.config.metadata.uid) == pod.metadata.uid.as_ref()
                && sandbox.state == SandboxState::Ready
        });
        let (true, Some(sandbox)) = (uses, sandbox) else {
            continue;
        };
        if let Err(error) = node.runtime.grow_volume(&sandbox.id, &claimed.handle).await {
            let message = format!(
                "NodeExpandVolume.NodeExpandVolume failed for volume \"{bound}\" : {}",
                chain(&error)
            );
            node.events
                .pod(&pod, None, Level::Warning, "VolumeResizeFailed", message);
            return Ok(false);
        }
        let message = format!(
            "MountVolume.NodeExpandVolume succeeded for volume \"{bound}\" {}",
            node.config.node_name
        );
        node.events.pod(
            &pod,
            None,
            Level::Normal,
            "FileSystemResizeSuccessful",
            message,
        );
        finish(node, claim, &volume).await?;
        return Ok(true);
    }
    Ok(false)
}

async fn finish(
    node: &Node,
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
) -> Result<(), kube::Error> {
    let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.clone());
    let left: Vec<_> = claim
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .filter(|condition| condition.type_ != RESIZE_PENDING)
        .collect();
    let patch = json!({
        "metadata": {"resourceVersion": claim.metadata.resource_version},
        "status": {"capacity": capacity, "allocatedResources": null,
            "conditions": (!left.is_empty()).then_some(left)},
    });
    let namespace = claim.namespace().unwrap_or_default();
    let claims = Api::<PersistentVolumeClaim>::namespaced(node.client.clone(), &namespace);
    claims
        .patch_status(
            &claim.name_any(),
            &PatchParams::default(),
            &Patch::Merge(&patch),
        )
        .await
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(
        claim_uid: &str,
        ref_uid: &str,
        driver: &str,
        modes: &[&str],
    ) -> (PersistentVolumeClaim, PersistentVolume) {
        let claim = serde_json::from_value(json!({"metadata": {"name": "c", "uid": claim_uid},
            "spec": {"accessModes": modes}}));
        let volume = serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": {
            "claimRef": {"name": "c", "uid": ref_uid}, "volumeMode": "Filesystem",
            "csi": {"driver": driver, "volumeHandle": "h"}}}));
        (claim.unwrap(), volume.unwrap())
    }

    #[test]
    fn a_claim_has_the_volume_that_says_so() {
        for (ids, driver, modes, is_read, expected) in [
            (("u", "u"), DRIVER, "ReadWriteOnce", false, Some(false)),
            (("u", "u"), DRIVER, "ReadWriteOnce", true, Some(true)),
            (("u", "u"), DRIVER, "ReadOnlyMany", false, Some(true)),
            (("u", "other"), DRIVER, "ReadWriteOnce", false, None),
            (("u", "u"), "x", "ReadWriteOnce", false, None),
        ] {
            let (claim, volume) = pair(ids.0, ids.1, driver, &[modes]);
            let found = claimed(&claim, &volume, is_read).ok();
            assert_eq!(
                found.map(|claimed| claimed.read_only),
                expected,
                "{ids:?} {driver}"
            );
        }
    }

    #[test]
    fn who_has_a_volume_is_said_of_ones_own_namespace_only() {
        let by = |list: &[&str]| list.iter().map(|pod| (*pod).to_owned()).collect::<Vec<_>>();
        for (pods, words) in [
            (by(&["n/a", "n/b"]), "pod(s) a, b"),
            (
                by(&["n/a", "nn/b"]),
                "pod(s) a and 1 pod(s) in different namespaces",
            ),
            (by(&["m/a"]), "1 pod(s) in different namespaces"),
        ] {
            let said = multi_attach("n", "v", &pods);
            assert_eq!(
                said,
                format!("Multi-Attach error for volume \"v\" Volume is already used by {words}")
            );
        }
    }
}

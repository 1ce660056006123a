//! A volume for a claim, made by this machine's driver.

use hypernetes_apimachinery::{Quantity, meta, quota};
use hypernetes_telemetry::chain;
use hypernetes_volume::{VolumeError, VolumeId, VolumeMode};
use serde_json::{Value, json};

use super::{Context, DRIVER, matching, volumes};
use crate::{
    ReconcileError,
    workloads::cluster::{name, namespace, uid},
};

/// Annotation of a volume that was made for a claim: by whom.
pub(super) const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

/// The name of a claim's volume.
pub(super) fn name_for(uid: &str) -> String {
    format!("pvc-{uid}")
}

/// What came of it.
pub(super) enum Provisioned {
    /// There is a volume; this is its object.
    Made(Value),
    /// There is none; this is why, and whether it may be otherwise later without a change.
    Failed { why: String, again: bool },
}

/// What a claim asks for that the driver does not do.
fn unsupported(class: &Value, claim: &Value) -> Option<String> {
    if !claim["spec"]["selector"].is_null() {
        return Some("claim Selector is not supported".to_owned());
    }
    for field in ["parameters", "mountOptions"] {
        let set = match &class[field] {
            Value::Object(map) => !map.is_empty(),
            Value::Array(list) => !list.is_empty(),
            _ => false,
        };
        if set {
            return Some(format!("{field} of the class are not supported"));
        }
    }
    let modes = claim["spec"]["accessModes"].as_array();
    let has = |mode: &str| modes.is_some_and(|modes| modes.iter().any(|given| given == mode));
    if has("ReadWriteMany") {
        return Some(
            "accessModes: ReadWriteMany is not supported, a volume is one VM's at a time; use \
             ReadWriteOnce"
                .to_owned(),
        );
    }
    // It would stay empty.
    (!has("ReadWriteOnce") && !has("ReadWriteOncePod")).then(|| {
        "accessModes: a new volume must be writable: ReadWriteOnce or ReadWriteOncePod".to_owned()
    })
}

/// Bytes as an object has them.
pub(super) fn shown(bytes: u64) -> String {
    let units = i64::try_from(bytes).unwrap_or(i64::MAX);
    quota::show("storage", Quantity::from_units(units))
}

pub(super) fn mode_of(object: &Value) -> VolumeMode {
    match object["spec"]["volumeMode"].as_str() {
        Some("Block") => VolumeMode::Block,
        _ => VolumeMode::Filesystem,
    }
}

fn object(class: &Value, claim: &Value, volume: &str) -> Value {
    let mut csi = json!({"driver": DRIVER, "volumeHandle": volume});
    if mode_of(claim) == VolumeMode::Filesystem {
        csi["fsType"] = "ext4".into();
    }
    json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {"name": volume, "annotations": {PROVISIONED_BY: DRIVER}},
        "spec": {
            "capacity": {"storage": claim["spec"]["resources"]["requests"]["storage"]},
            "accessModes": claim["spec"]["accessModes"],
            "persistentVolumeReclaimPolicy": class["reclaimPolicy"],
            "storageClassName": name(class),
            "volumeMode": claim["spec"]["volumeMode"],
            "csi": csi,
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": name(claim),
                "namespace": namespace(claim), "uid": uid(claim),
                "resourceVersion": claim["metadata"]["resourceVersion"]},
        },
    })
}

/// Makes the volume of a claim, or finds the one that was begun.
pub(super) async fn volume(
    context: &Context,
    class: &Value,
    claim: &Value,
) -> Result<Provisioned, ReconcileError> {
    if let Some(why) = unsupported(class, claim) {
        return Ok(Provisioned::Failed { why, again: false });
    }
    let own = name_for(uid(claim));
    let id: VolumeId = own.parse().map_err(Context::failed(&own))?;
    let bytes = u64::try_from(matching::requested(claim).value()).unwrap_or_default();
    let cluster = &context.cluster;
    // The object is there before its data, so that these are never nobody's.
    let before = cluster.get(&volumes(), "", &own).await?;
    let mut volume = match before {
        Some(volume) => volume,
        None => {
            let object = object(class, claim, &own);
            cluster.create(&volumes(), "", &object).await?
        }
    };
    match context.driver.create(&id, bytes, mode_of(claim)).await {
        Ok(info) => {
            let size = shown(info.bytes);
            if volume["spec"]["capacity"]["storage"] != size.as_str() {
                volume["spec"]["capacity"]["storage"] = size.into();
                volume = cluster.update(&volumes(), &volume).await?;
            }
            Ok(Provisioned::Made(volume))
        }
        Err(error) => {
            let again = !matches!(error, VolumeError::Invalid { .. });
            let why = match &error {
                VolumeError::NoSpace { bytes, free } => format!(
                    "no room for a volume of {}: {} of this node can be promised still",
                    shown(*bytes),
                    shown(*free)
                ),
                other => chain(other).to_string(),
            };
            discard(context, volume, &id).await?;
            Ok(Provisioned::Failed { why, again })
        }
    }
}

/// Takes back what a failed creation has left.
async fn discard(
    context: &Context,
    mut volume: Value,
    id: &VolumeId,
) -> Result<(), ReconcileError> {
    let deleted = context.driver.delete(id).await;
    deleted.map_err(Context::failed(id.as_str()))?;
    context.cluster.delete(&volumes(), &volume, None).await?;
    if let Some(rest) = context.cluster.get(&volumes(), "", id.as_str()).await? {
        volume = rest;
        meta::remove(&mut volume, "finalizers");
        context.cluster.update(&volumes(), &volume).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_does_not_do_is_named() {
        let claim = |modes: &[&str]| json!({"spec": {"accessModes": modes}});
        let plain = json!({"parameters": {}});
        for (class, claim, words) in [
            (&plain, claim(&["ReadWriteOnce"]), None),
            (&plain, claim(&["ReadWriteOnce", "ReadOnlyMany"]), None),
            (&plain, claim(&["ReadWriteMany"]), Some("ReadWriteMany")),
            (&plain, claim(&["ReadOnlyMany"]), Some("must be writable")),
            (
                &json!({"parameters": {"type": "fast"}}),
                claim(&["ReadWriteOnce"]),
                Some("parameters"),
            ),
            (
                &plain,
                json!({"spec": {"accessModes": ["ReadWriteOnce"], "selector": {}}}),
                Some("Selector"),
            ),
        ] {
            let found = unsupported(class, &claim);
            match words {
                None => assert_eq!(found, None),
                Some(words) => assert!(found.unwrap().contains(words)),
            }
        }
    }
}

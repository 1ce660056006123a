//! Pods wait for their claims: pure, in the scheduler's words.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt as _;

use super::fit::is_finished;
use crate::claims;

/// Claims by namespace and name.
pub(super) type Claims = HashMap<(String, String), PersistentVolumeClaim>;

/// Names of a pod's claims, and whether the pod brings each itself.
pub(super) fn of_pod(pod: &Pod) -> impl Iterator<Item = (String, bool)> {
    let volumes = pod.spec.iter();
    let volumes = volumes.flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| {
        let name = claims::name_of(&pod.name_any(), volume)?;
        Some((name, volume.ephemeral.is_some()))
    })
}

fn phase(claim: &PersistentVolumeClaim) -> &str {
    let status = claim.status.as_ref();
    status.and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

fn is_alone(claim: &PersistentVolumeClaim) -> bool {
    let modes = claim
        .spec
        .as_ref()
        .and_then(|spec| spec.access_modes.as_ref());
    modes.is_some_and(|modes| modes.iter().any(|mode| mode == "ReadWriteOncePod"))
}

/// Why a pod cannot be placed because of its claims.
pub(super) fn obstacle(pod: &Pod, all: &Claims, others: &[&Pod]) -> Option<String> {
    let namespace = pod.namespace().unwrap_or_default();
    let mut unbound = false;
    for (name, own) in of_pod(pod) {
        let Some(claim) = all.get(&(namespace.clone(), name.clone())) else {
            return Some(match own {
                true => format!(
                    "waiting for ephemeral volume controller to create the persistentvolumeclaim \
                     \"{name}\""
                ),
                false => format!("persistentvolumeclaim \"{name}\" not found"),
            });
        };
        if claim.metadata.deletion_timestamp.is_some() {
            return Some(format!("persistentvolumeclaim \"{name}\" is being deleted"));
        }
        if phase(claim) == "Lost" {
            let volume = claim
                .spec
                .as_ref()
                .and_then(|spec| spec.volume_name.clone())
                .unwrap_or_default();
            return Some(format!(
                "persistentvolumeclaim \"{name}\" bound to non-existent persistentvolume \
                 \"{volume}\""
            ));
        }
        unbound |= phase(claim) != "Bound";
        let taken = || {
            others.iter().any(|other| {
                let placed = other.spec.as_ref().is_some_and(|s| s.node_name.is_some());
                placed
                    && !is_finished(other)
                    && other.namespace().as_deref() == Some(namespace.as_str())
                    && of_pod(other).any(|(used, _)| used == name)
            })
        };
        if is_alone(claim) && taken() {
            return Some(
                "1 node has pod using PersistentVolumeClaim with the same name and \
                 ReadWriteOncePod access mode"
                    .to_owned(),
            );
        }
    }
    unbound.then(|| "pod has unbound immediate PersistentVolumeClaims".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[allow(clippy::needless_pass_by_value, reason = "json! makes values")]
    fn pod(name: &str, node: Value, source: Value) -> Pod {
        let mut volume = source;
        volume["name"] = "v".into();
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "n"},
            "spec": {"nodeName": node, "containers": [], "volumes": [volume]}}))
        .unwrap()
    }

    fn named() -> Value {
        json!({"persistentVolumeClaim": {"claimName": "c"}})
    }

    #[test]
    fn a_pod_waits_in_the_schedulers_words() {
        let claim = |phase: &str, mode: &str, deleted: Value| {
            let claim: PersistentVolumeClaim = serde_json::from_value(json!({
                "metadata": {"name": "c", "namespace": "n", "deletionTimestamp": deleted},
                "spec": {"accessModes": [mode], "volumeName": "v"}, "status": {"phase": phase}}))
            .unwrap();
            Some(claim)
        };
        let other = pod("other", "node".into(), named());
        let own = pod("p", Value::Null, json!({"ephemeral": {}}));
        let plain = pod("p", Value::Null, named());
        let once = "ReadWriteOnce";
        for (pod, claim, words) in [
            (&plain, claim("Bound", once, Value::Null), None),
            (
                &plain,
                claim("Pending", once, Value::Null),
                Some("pod has unbound immediate"),
            ),
            (
                &plain,
                claim("Lost", once, Value::Null),
                Some("bound to non-existent"),
            ),
            (
                &plain,
                claim("Bound", once, "2026-01-01T00:00:00Z".into()),
                Some("is being deleted"),
            ),
            (
                &plain,
                claim("Bound", "ReadWriteOncePod", Value::Null),
                Some("with the same name"),
            ),
            (&plain, None, Some("persistentvolumeclaim \"c\" not found")),
            (&own, None, Some("persistentvolumeclaim \"p-v\"")),
        ] {
            let all: Claims = claim
                .map(|claim| (("n".to_owned(), "c".to_owned()), claim))
                .into_iter()
                .collect();
            let found = obstacle(pod, &all, &[&other]);
            match words {
                None => assert_eq!(found, None),
                Some(words) => assert!(
                    found.as_ref().is_some_and(|f| f.contains(words)),
                    "{found:?}"
                ),
            }
        }
    }
}

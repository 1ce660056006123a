//! Claims of a StatefulSet's pods: made before a pod, kept when it goes, and deleted where the set's retention
//! policy says so.
//!
//! As upstream: the policy is written as owners of the claims, and the garbage collector does the rest. A claim that
//! goes with the set is owned by the set, one that goes when the set shrinks by its pod once that pod is one too many.

use hypernetes_apimachinery::meta;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, name, namespace, stateful_sets, uid},
    owned::number,
};
use crate::{error::ReconcileError, volumes::claims};

/// The set's templates of claims.
pub(super) fn templates(set: &Value) -> impl Iterator<Item = &Value> {
    set["spec"]["volumeClaimTemplates"]
        .as_array()
        .into_iter()
        .flatten()
}

/// Name of a pod's claim of a template.
pub(super) fn claim_name(template: &Value, set: &Value, ordinal: i64) -> String {
    format!("{}-{}-{ordinal}", name(template), name(set))
}

fn claim(template: &Value, set: &Value, ordinal: i64) -> Value {
    let mut claim = template.clone();
    claim["apiVersion"] = "v1".into();
    claim["kind"] = "PersistentVolumeClaim".into();
    if let Some(fields) = claim.as_object_mut() {
        fields.remove("status");
    }
    meta::set(&mut claim, "name", claim_name(template, set, ordinal));
    meta::set(&mut claim, "namespace", namespace(set));
    // The set's pods find their claims by what they are selected by.
    for (key, value) in set["spec"]["selector"]["matchLabels"]
        .as_object()
        .into_iter()
        .flatten()
    {
        meta::set_label(&mut claim, key, value.as_str().unwrap_or_default());
    }
    let owners = owners(set, ordinal, None);
    if !owners.is_empty() {
        meta::set(&mut claim, "ownerReferences", owners);
    }
    claim
}

/// Makes the claims of a pod that are not there.
pub(super) async fn ensure(
    cluster: &Cluster,
    set: &Value,
    ordinal: i64,
) -> Result<(), ReconcileError> {
    for template in templates(set) {
        let wanted = claim(template, set, ordinal);
        let own = name(&wanted).to_owned();
        if let Some(found) = cluster.get(&claims(), namespace(set), &own).await? {
            if meta::is_deleting(&found) {
                // A pod on a claim that is going would never start: wait until it has gone.
                return Err(ReconcileError::Invalid {
                    field: "spec.volumeClaimTemplates",
                    rule: format!("pvc {own} is being deleted"),
                });
            }
            continue;
        }
        match cluster.create(&claims(), namespace(set), &wanted).await {
            Ok(_) => {
                let said = format!(
                    "create Claim {own} Pod {0}-{ordinal} in StatefulSet {0} success",
                    name(set)
                );
                cluster
                    .event(set, "Normal", "SuccessfulCreate", &said)
                    .await;
            }
            Err(error) if error.is_already_exists() => {}
            Err(error) => {
                let said = format!(
                    "create Claim {own} for Pod {0}-{ordinal} in StatefulSet {0} failed error: {1}",
                    name(set),
                    error.said()
                );
                cluster.event(set, "Warning", "FailedCreate", &said).await;
                return Err(error);
            }
        }
    }
    Ok(())
}

fn deletes(set: &Value, when: &str) -> bool {
    set["spec"]["persistentVolumeClaimRetentionPolicy"][when] == "Delete"
}

fn is_surplus(set: &Value, ordinal: i64) -> bool {
    let start = number(&set["spec"]["ordinals"]["start"]);
    !(start..start + number(&set["spec"]["replicas"])).contains(&ordinal)
}

/// Who owns a claim: the set, its pod, or nobody.
fn owners(set: &Value, ordinal: i64, pod: Option<&Value>) -> Vec<Value> {
    let surplus = deletes(set, "whenScaled") && is_surplus(set, ordinal);
    if surplus && let Some(pod) = pod {
        return vec![
            json!({"apiVersion": "v1", "kind": "Pod", "name": name(pod), "uid": uid(pod)}),
        ];
    }
    if deletes(set, "whenDeleted") {
        return vec![
            json!({"apiVersion": "apps/v1", "kind": stateful_sets().kind,
            "name": name(set), "uid": uid(set), "controller": true, "blockOwnerDeletion": true}),
        ];
    }
    Vec::new()
}

/// Whether an owner is one that this controller sets.
fn is_ours(owner: &Value, set: &Value, ordinal: i64) -> bool {
    let pod = format!("{}-{ordinal}", name(set));
    (owner["kind"] == "StatefulSet" && owner["name"] == name(set))
        || (owner["kind"] == "Pod" && owner["name"] == pod.as_str())
}

/// Brings the owners of the set's claims to what its policy says.
pub(super) async fn own<'a>(
    cluster: &Cluster,
    set: &Value,
    pod_of: impl Fn(i64) -> Option<&'a Value>,
) -> Result<(), ReconcileError> {
    if templates(set).next().is_none() {
        return Ok(());
    }
    for found in cluster.list(&claims(), namespace(set)).await? {
        let ordinal = templates(set).find_map(|template| {
            let prefix = format!("{}-{}-", name(template), name(set));
            let rest = name(&found).strip_prefix(&prefix)?;
            let plain = !rest.is_empty() && rest.chars().all(|c| c.is_ascii_digit());
            rest.parse::<i64>().ok().filter(|_| plain)
        });
        let Some(ordinal) = ordinal else { continue };
        if meta::is_deleting(&found) {
            continue;
        }
        let now = found["metadata"]["ownerReferences"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let mut wanted: Vec<Value> = now
            .iter()
            .filter(|owner| !is_ours(owner, set, ordinal))
            .cloned()
            .collect();
        // Somebody else's claim stays so.
        if wanted.iter().any(|owner| owner["controller"] == true) {
            continue;
        }
        let pod = pod_of(ordinal);
        let scaled = deletes(set, "whenScaled") && is_surplus(set, ordinal);
        if scaled && pod.is_none() && now.iter().any(|owner| owner["kind"] == "Pod") {
            // Its pod has gone: the collector is about to take it.
            continue;
        }
        wanted.extend(owners(set, ordinal, pod));
        if wanted != now {
            let mut changed = found;
            meta::set(&mut changed, "ownerReferences", wanted);
            cluster.update(&claims(), &changed).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(deleted: &str, scaled: &str) -> Value {
        json!({"metadata": {"name": "web", "namespace": "n", "uid": "s"}, "spec": {"replicas": 1,
            "selector": {"matchLabels": {"a": "b"}},
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": deleted, "whenScaled": scaled},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "status": {"phase": "Pending"},
                "spec": {"accessModes": ["ReadWriteOnce"]}}]}})
    }

    #[test]
    fn a_claim_is_named_and_labelled_after_its_pod() {
        let set = set("Retain", "Retain");
        let claim = claim(templates(&set).next().unwrap(), &set, 2);
        assert_eq!(name(&claim), "data-web-2");
        assert_eq!(claim["metadata"]["labels"]["a"], "b");
        assert!(claim["status"].is_null() && claim["metadata"]["ownerReferences"].is_null());
    }

    #[test]
    fn the_policy_says_who_owns_a_claim() {
        let pod = json!({"metadata": {"name": "web-1", "uid": "p"}});
        for (deleted, scaled, ordinal, expected) in [
            ("Retain", "Retain", 0, None),
            ("Retain", "Retain", 1, None),
            ("Delete", "Retain", 1, Some("s")),
            ("Retain", "Delete", 0, None),
            ("Retain", "Delete", 1, Some("p")),
            ("Delete", "Delete", 0, Some("s")),
            ("Delete", "Delete", 1, Some("p")),
        ] {
            let owners = owners(&set(deleted, scaled), ordinal, Some(&pod));
            let uids: Vec<&str> = owners.iter().map(uid_of).collect();
            assert_eq!(
                uids,
                expected.into_iter().collect::<Vec<_>>(),
                "{deleted} {scaled} {ordinal}"
            );
        }
    }

    fn uid_of(owner: &Value) -> &str {
        owner["uid"].as_str().unwrap()
    }
}

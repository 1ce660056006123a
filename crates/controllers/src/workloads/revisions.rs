//! ControllerRevisions: the templates that a set has had, to be found by pods and to be gone back to.

use hypernetes_apimachinery::meta;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, name, namespace, revisions},
    owned::{controller_reference, controls, hash, number},
};
use crate::error::ReconcileError;

/// Label of pods: the name of their revision.
pub(super) const REVISION_LABEL: &str = "controller-revision-hash";

/// All revisions of a set, oldest first, the last of them that of its present template.
pub(super) async fn ensure(cluster: &Cluster, set: &Value) -> Result<Vec<Value>, ReconcileError> {
    let mut all: Vec<Value> = cluster
        .list_kept(&revisions(), namespace(set), |revision| {
            controls(set, revision)
        })
        .await?;
    all.sort_by_key(|revision| number(&revision["revision"]));
    // What a patch sets the template back with; `kubectl rollout undo` sends it as it is.
    let mut template = set["spec"]["template"].clone();
    template["$patch"] = "replace".into();
    let data = json!({"spec": {"template": template}});
    let next = all.last().map_or(0, |last| number(&last["revision"])) + 1;
    if let Some(at) = all.iter().position(|revision| revision["data"] == data) {
        let mut found = all.remove(at);
        if at != all.len() {
            // An old template is present again: its revision becomes the newest.
            found["revision"] = next.into();
            found = cluster.update(&revisions(), &found).await?;
        }
        all.push(found);
        return Ok(all);
    }
    let salt = number(&set["status"]["collisionCount"]);
    let hash = hash(&data, salt);
    let mut labels = set["spec"]["template"]["metadata"]["labels"].clone();
    labels[REVISION_LABEL] = hash.as_str().into();
    let revision = json!({
        "apiVersion": "apps/v1", "kind": "ControllerRevision",
        "metadata": {
            "name": format!("{}-{hash}", name(set)), "namespace": namespace(set),
            "labels": labels, "annotations": set["metadata"]["annotations"],
            "ownerReferences": [controller_reference(set)],
        },
        "data": data, "revision": next,
    });
    all.push(
        cluster
            .create(&revisions(), namespace(set), &revision)
            .await?,
    );
    Ok(all)
}

/// Deletes revisions that no pod has and that are too many to be kept.
pub(super) async fn clean_up(
    cluster: &Cluster,
    set: &Value,
    all: &[Value],
    in_use: &[&str],
) -> Result<(), ReconcileError> {
    let limit = usize::try_from(number(&set["spec"]["revisionHistoryLimit"])).unwrap_or_default();
    let old: Vec<&Value> = all
        .iter()
        .take(all.len().saturating_sub(1))
        .filter(|revision| {
            !in_use.contains(&name(revision)) && !in_use.contains(&hash_of(revision))
        })
        .collect();
    for revision in old.iter().take(old.len().saturating_sub(limit)) {
        cluster.delete(&revisions(), revision, None).await?;
    }
    Ok(())
}

/// The part of a revision's name that stands for its template.
pub(super) fn hash_of(revision: &Value) -> &str {
    meta::label(revision, REVISION_LABEL).unwrap_or_default()
}

/// The revision's name.
pub(super) fn name_of(revision: &Value) -> &str {
    name(revision)
}

//! What is next for an object that has owners, or that waits for its dependents.

use std::sync::Arc;

use hypernetes_apimachinery::meta;
use serde_json::{Value, json};

use super::{
    graph::{Node, Shared, lock},
    kinds,
};
use crate::{
    error::ReconcileError,
    workloads::cluster::{Cluster, Kind, Propagation, name, namespace, uid},
};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// Does what is next for one object. True: it is to be looked at again, as an owner of it is not watched yet.
pub(super) async fn process(
    cluster: &Cluster,
    graph: &Shared,
    id: &str,
) -> Result<bool, ReconcileError> {
    let Some(node) = lock(graph).nodes.get(id).cloned() else {
        return Ok(false);
    };
    let object = cluster.get(&node.kind, &node.namespace, &node.name).await?;
    let Some(object) = object.filter(|object| uid(object) == id) else {
        return Ok(false);
    };
    if meta::is_deleting(&object) {
        let has = |wanted: &str| meta::finalizers(&object).any(|finalizer| finalizer == wanted);
        if has(ORPHAN) {
            return orphan(cluster, id, &node, &object).await.map(|()| false);
        }
        if has(FOREGROUND) {
            return foreground(cluster, graph, id, &node, &object)
                .await
                .map(|()| false);
        }
        return Ok(false);
    }
    if meta::owner_references(&object).is_empty() {
        return Ok(false);
    }
    let owners = owners(cluster, graph, &object).await?;
    if !owners.solid.is_empty() {
        if owners.absent.is_empty() && owners.waiting.is_empty() {
            return Ok(owners.unwatched);
        }
        // Some stay: the others are no reason to wait any more.
        let gone: Vec<&str> = owners
            .absent
            .iter()
            .chain(&owners.waiting)
            .map(String::as_str)
            .collect();
        return drop_owners(cluster, &node.kind, &object, &gone)
            .await
            .map(|()| false);
    }
    let propagation = if owners.waiting.is_empty() {
        match meta::finalizers(&object).next() {
            // The object's own wish holds.
            Some(FOREGROUND) => Some(Propagation::Foreground),
            Some(ORPHAN) => None,
            _ => Some(Propagation::Background),
        }
    } else {
        // Its owner waits for it: it waits for its own in turn.
        Some(Propagation::Foreground)
    };
    cluster
        .delete(&node.kind, &object, propagation)
        .await
        .map(|()| false)
}

#[derive(Default)]
struct Owners {
    /// There, and staying.
    solid: Vec<String>,
    /// Gone.
    absent: Vec<String>,
    /// Going, and waiting for this object.
    waiting: Vec<String>,
    /// One that is there has not been seen by the watch of its kind, which may be new: its end would not be either.
    unwatched: bool,
}

async fn owners(
    cluster: &Cluster,
    graph: &Shared,
    object: &Value,
) -> Result<Owners, ReconcileError> {
    let mut found = Owners::default();
    for reference in meta::owner_references(object) {
        let text = |field: &str| reference[field].as_str().unwrap_or_default();
        let id = text("uid").to_owned();
        let known = lock(graph).nodes.get(&id).map(|node| node.kind.clone());
        let watched = known.is_some();
        let kind = match known {
            Some(kind) => kind,
            // Never seen: it may be new, or of a kind that is not served.
            None => match kind_of(cluster, text("apiVersion"), text("kind")).await? {
                Some(kind) => Arc::new(kind),
                None => {
                    found.solid.push(id);
                    continue;
                }
            },
        };
        let home = if kind.namespaced {
            namespace(object)
        } else {
            ""
        };
        if kind.namespaced && home.is_empty() {
            // A cluster-wide object cannot be owned by one in a namespace: upstream leaves it alone.
            found.solid.push(id);
            continue;
        }
        let owner = cluster.get(&kind, home, text("name")).await?;
        match owner.filter(|owner| uid(owner) == id) {
            None => found.absent.push(id),
            Some(owner)
                if meta::is_deleting(&owner)
                    && meta::finalizers(&owner).any(|finalizer| finalizer == FOREGROUND) =>
            {
                found.waiting.push(id);
            }
            Some(_) => {
                found.unwatched |= !watched;
                found.solid.push(id);
            }
        }
    }
    Ok(found)
}

async fn kind_of(
    cluster: &Cluster,
    api_version: &str,
    kind: &str,
) -> Result<Option<Kind>, ReconcileError> {
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let found = kinds(cluster).await?;
    Ok(found
        .into_iter()
        .find(|found| found.group == group && found.kind == kind))
}

async fn drop_owners(
    cluster: &Cluster,
    kind: &Kind,
    object: &Value,
    gone: &[&str],
) -> Result<(), ReconcileError> {
    let left: Vec<&Value> = meta::owner_references(object)
        .iter()
        .filter(|reference| !gone.contains(&reference["uid"].as_str().unwrap_or_default()))
        .collect();
    let patch = json!({"metadata": {"uid": uid(object),
        "resourceVersion": meta::resource_version(object), "ownerReferences": left}});
    cluster
        .patch(kind, (namespace(object), name(object)), "", &patch)
        .await
        .map(|_| ())
}

/// The object's dependents, as they are now.
async fn dependents(
    cluster: &Cluster,
    graph: &Shared,
    id: &str,
) -> Result<Vec<(Arc<Kind>, Value)>, ReconcileError> {
    let nodes: Vec<(String, Node)> = {
        let graph = lock(graph);
        graph
            .dependents(id)
            .filter_map(|id| Some((id.clone(), graph.nodes.get(id)?.clone())))
            .collect()
    };
    let mut out = Vec::new();
    for (own, node) in nodes {
        let object = cluster.get(&node.kind, &node.namespace, &node.name).await?;
        if let Some(object) = object.filter(|object| uid(object) == own) {
            out.push((node.kind, object));
        }
    }
    Ok(out)
}

async fn orphan(
    cluster: &Cluster,
    id: &str,
    node: &Node,
    object: &Value,
) -> Result<(), ReconcileError> {
    // What is missed here would be deleted later: everything is looked at, not the graph alone.
    for kind in kinds(cluster).await? {
        let owned = |dependent: &Value| {
            let mut owners = meta::owner_references(dependent).iter();
            owners.any(|reference| reference["uid"] == id)
        };
        for dependent in cluster.list_kept(&kind, namespace(object), owned).await? {
            drop_owners(cluster, &kind, &dependent, &[id]).await?;
        }
    }
    remove_finalizer(cluster, &node.kind, object, ORPHAN).await
}

async fn foreground(
    cluster: &Cluster,
    graph: &Shared,
    id: &str,
    node: &Node,
    object: &Value,
) -> Result<(), ReconcileError> {
    let mut blocked = false;
    for (kind, dependent) in dependents(cluster, graph, id).await? {
        let blocks = meta::owner_references(&dependent)
            .iter()
            .any(|reference| reference["uid"] == id && reference["blockOwnerDeletion"] == true);
        blocked |= blocks;
        if !meta::is_deleting(&dependent) {
            let owners = owners(cluster, graph, &dependent).await?;
            if owners.solid.is_empty() {
                cluster
                    .delete(&kind, &dependent, Some(Propagation::Foreground))
                    .await?;
            } else {
                drop_owners(cluster, &kind, &dependent, &[id]).await?;
            }
        }
    }
    if blocked {
        // The end of the last of them comes back here.
        return Ok(());
    }
    remove_finalizer(cluster, &node.kind, object, FOREGROUND).await
}

async fn remove_finalizer(
    cluster: &Cluster,
    kind: &Kind,
    object: &Value,
    finalizer: &str,
) -> Result<(), ReconcileError> {
    let left: Vec<&str> = meta::finalizers(object)
        .filter(|own| *own != finalizer)
        .collect();
    let patch = json!({"metadata": {"uid": uid(object),
        "resourceVersion": meta::resource_version(object), "finalizers": left}});
    cluster
        .patch(kind, (namespace(object), name(object)), "", &patch)
        .await
        .map(|_| ())
}

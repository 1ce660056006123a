//! The garbage collector: what has owners goes when they go.
//!
//! Every kind that is served and can be deleted is watched, by its metadata alone; kinds that come
//! later are found. A graph of who owns whom says what an event may concern; before anything is
//! deleted, objects and owners are read afresh.
//!
//! - **Background**: an object whose owners are all gone is deleted.
//! - **Foreground**: an object with the finalizer `foregroundDeletion` waits for its dependents, which are
//!   deleted first; those that do not block its deletion it does not wait for.
//! - **Orphan**: with the finalizer `orphan` its dependents lose their owner before it goes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use hypernetes_apimachinery::meta;
use hypernetes_telemetry::chain;
use kube::{
    Api, Resource, ResourceExt,
    api::{DynamicObject, PartialObjectMeta},
    discovery::{Discovery, Scope, verbs},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{Cluster, Kind, Propagation, name, namespace, uid},
    queue::Queue,
};
use crate::error::ReconcileError;

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
/// How often kinds that have come or gone are looked for.
const DISCOVERY: Duration = Duration::from_secs(5);
const WORKERS: usize = 2;
/// Kinds that own nothing, are owned by nothing and change all the time.
const IGNORED: [(&str, &str); 2] = [("", "events"), ("events.k8s.io", "events")];

/// What is known of an object.
#[derive(Debug, Clone)]
struct Node {
    kind: Arc<Kind>,
    namespace: String,
    name: String,
    owners: Vec<String>,
    deleting: bool,
    finalizers: Vec<String>,
}

enum Change {
    Seen(String, Box<Node>),
    Gone(String),
    /// All objects of a kind that there are; others have gone unseen.
    All(Arc<Kind>, HashSet<String>),
}

/// Objects by id, and who is owned by whom.
#[derive(Default)]
struct Graph {
    nodes: HashMap<String, Node>,
    dependents: HashMap<String, HashSet<String>>,
}

impl Graph {
    fn insert(&mut self, id: &str, node: Node) {
        self.forget_owners(id);
        for owner in &node.owners {
            self.dependents
                .entry(owner.clone())
                .or_default()
                .insert(id.to_owned());
        }
        self.nodes.insert(id.to_owned(), node);
    }

    fn remove(&mut self, id: &str) -> Option<Node> {
        self.forget_owners(id);
        self.nodes.remove(id)
    }

    fn forget_owners(&mut self, id: &str) {
        let Some(node) = self.nodes.get(id) else {
            return;
        };
        for owner in &node.owners {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(id);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
    }

    fn dependents(&self, id: &str) -> impl Iterator<Item = &String> {
        self.dependents.get(id).into_iter().flatten()
    }

    /// Takes over a change; the objects that it concerns.
    fn apply(&mut self, change: Change) -> Vec<String> {
        match change {
            Change::Seen(id, node) => {
                let mut concerned = Vec::new();
                if !node.owners.is_empty() || (node.deleting && !node.finalizers.is_empty()) {
                    concerned.push(id.clone());
                }
                // An owner that waits for its dependents may see one of them let go.
                concerned.extend(self.waiting(&node.owners));
                self.insert(&id, *node);
                concerned
            }
            Change::Gone(id) => {
                let owners = self.remove(&id).map(|node| node.owners).unwrap_or_default();
                let mut concerned: Vec<String> = self.dependents(&id).cloned().collect();
                concerned.extend(self.waiting(&owners));
                concerned
            }
            Change::All(kind, there) => {
                let of_kind = |node: &Node| *node.kind == *kind;
                let gone: Vec<String> = self
                    .nodes
                    .iter()
                    .filter(|(id, node)| of_kind(node) && !there.contains(*id))
                    .map(|(id, _)| id.clone())
                    .collect();
                gone.into_iter()
                    .flat_map(|id| self.apply(Change::Gone(id)))
                    .collect()
            }
        }
    }

    fn waiting(&self, owners: &[String]) -> Vec<String> {
        let waits = |id: &&String| self.nodes.get(*id).is_some_and(|node| node.deleting);
        owners.iter().filter(waits).cloned().collect()
    }
}

/// Runs until `stop`.
pub(super) async fn run(cluster: Arc<Cluster>, stop: CancellationToken) {
    let (changes, mut changed) = mpsc::channel(1024);
    let graph = Arc::new(std::sync::Mutex::new(Graph::default()));
    let queue = Arc::new(Queue::default());
    let mut tasks = JoinSet::new();
    // Nothing is collected before everything that there is has been seen once.
    let mut unseen = loop {
        match kinds(&cluster).await {
            Ok(kinds) => break kinds,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "cannot find out which kinds there are");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(DISCOVERY) => {}
                }
            }
        }
    };
    tasks.spawn(watch_all(cluster.clone(), changes, stop.clone()));
    loop {
        let change = tokio::select! {
            () = stop.cancelled() => break,
            change = changed.recv() => change,
        };
        let Some(change) = change else { break };
        let seen = match &change {
            Change::All(kind, _) => unseen.remove(kind.as_ref()) && unseen.is_empty(),
            _ => false,
        };
        for id in lock(&graph).apply(change) {
            queue.add(id);
        }
        if seen {
            for _ in 0..WORKERS {
                let (cluster, graph) = (cluster.clone(), graph.clone());
                tasks.spawn(work(cluster, graph, queue.clone(), stop.clone()));
            }
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn work(
    cluster: Arc<Cluster>,
    graph: Arc<Shared>,
    queue: Arc<Queue>,
    stop: CancellationToken,
) {
    loop {
        let id = tokio::select! {
            () = stop.cancelled() => return,
            id = queue.next() => id,
        };
        let outcome = process(&cluster, &graph, &id).await;
        if let Err(error) = &outcome
            && !error.is_conflict()
        {
            tracing::debug!(error = %chain(error), "cannot collect yet; again");
        }
        queue.done(id, outcome.is_err());
    }
}

fn lock(graph: &std::sync::Mutex<Graph>) -> std::sync::MutexGuard<'_, Graph> {
    graph
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Keeps a watch for every kind that there is.
async fn watch_all(cluster: Arc<Cluster>, changes: mpsc::Sender<Change>, stop: CancellationToken) {
    let mut watches: HashMap<Kind, CancellationToken> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        match kinds(&cluster).await {
            Ok(found) => {
                watches.retain(|kind, token| {
                    let stays = found.contains(kind);
                    if !stays {
                        token.cancel();
                    }
                    stays
                });
                for kind in found {
                    watches.entry(kind.clone()).or_insert_with(|| {
                        let token = stop.child_token();
                        let (cluster, changes) = (cluster.clone(), changes.clone());
                        tasks.spawn(watch(cluster, Arc::new(kind), changes, token.clone()));
                        token
                    });
                }
            }
            Err(error) => {
                tracing::debug!(error = %chain(&error), "cannot find out which kinds there are");
            }
        }
        while tasks.try_join_next().is_some() {}
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(DISCOVERY) => {}
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// Kinds that can be watched and deleted, each once.
pub(super) async fn kinds(cluster: &Cluster) -> Result<HashSet<Kind>, ReconcileError> {
    let discovery = Discovery::new(cluster.client())
        .run_aggregated()
        .await
        .map_err(ReconcileError::api("find out which kinds there are"))?;
    let mut kinds = HashSet::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let able = [verbs::LIST, verbs::WATCH, verbs::DELETE]
                .iter()
                .all(|verb| capabilities.supports_operation(verb));
            let ignored = IGNORED.contains(&(resource.group.as_str(), resource.plural.as_str()));
            if able && !ignored {
                kinds.insert(Kind {
                    group: resource.group,
                    version: resource.version,
                    kind: resource.kind,
                    plural: resource.plural,
                    namespaced: capabilities.scope == Scope::Namespaced,
                });
            }
        }
    }
    Ok(kinds)
}

async fn watch(
    cluster: Arc<Cluster>,
    kind: Arc<Kind>,
    changes: mpsc::Sender<Change>,
    stop: CancellationToken,
) {
    let api: Api<PartialObjectMeta<DynamicObject>> =
        Api::all_with(cluster.client(), &kind.resource());
    let events = watcher(api, watcher::Config::default()).default_backoff();
    let mut events = std::pin::pin!(events.take_until(stop.cancelled_owned()));
    let mut there = HashSet::new();
    while let Some(event) = events.next().await {
        let change = match event {
            Ok(watcher::Event::Init) => {
                there.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                let Some((id, node)) = node(&kind, &object) else {
                    continue;
                };
                there.insert(id.clone());
                Change::Seen(id, Box::new(node))
            }
            Ok(watcher::Event::InitDone) => Change::All(kind.clone(), std::mem::take(&mut there)),
            Ok(watcher::Event::Apply(object)) => match node(&kind, &object) {
                Some((id, node)) => Change::Seen(id, Box::new(node)),
                None => continue,
            },
            Ok(watcher::Event::Delete(object)) => match object.uid() {
                Some(id) => Change::Gone(id),
                None => continue,
            },
            Err(error) => {
                tracing::debug!(kind = kind.plural, %error, "a watch is begun anew");
                continue;
            }
        };
        if changes.send(change).await.is_err() {
            return;
        }
    }
    // The kind is no more, and with it its objects.
    let all = Change::All(kind, HashSet::new());
    if changes.send(all).await.is_err() {
        tracing::trace!("the collector has ended");
    }
}

fn node(kind: &Arc<Kind>, object: &PartialObjectMeta<DynamicObject>) -> Option<(String, Node)> {
    let metadata = object.meta();
    let owners = metadata.owner_references.iter().flatten();
    let node = Node {
        kind: kind.clone(),
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone()?,
        owners: owners.map(|owner| owner.uid.clone()).collect(),
        deleting: metadata.deletion_timestamp.is_some(),
        finalizers: metadata.finalizers.clone().unwrap_or_default(),
    };
    Some((metadata.uid.clone()?, node))
}

type Shared = std::sync::Mutex<Graph>;

/// Does what is next for one object.
async fn process(cluster: &Cluster, graph: &Shared, id: &str) -> Result<(), ReconcileError> {
    let Some(node) = lock(graph).nodes.get(id).cloned() else {
        return Ok(());
    };
    let object = cluster.get(&node.kind, &node.namespace, &node.name).await?;
    let Some(object) = object.filter(|object| uid(object) == id) else {
        return Ok(());
    };
    if meta::is_deleting(&object) {
        let has = |wanted: &str| meta::finalizers(&object).any(|finalizer| finalizer == wanted);
        if has(ORPHAN) {
            return orphan(cluster, id, &node, &object).await;
        }
        if has(FOREGROUND) {
            return foreground(cluster, graph, id, &node, &object).await;
        }
        return Ok(());
    }
    if meta::owner_references(&object).is_empty() {
        return Ok(());
    }
    let owners = owners(cluster, graph, &object).await?;
    if !owners.solid.is_empty() {
        if owners.absent.is_empty() && owners.waiting.is_empty() {
            return Ok(());
        }
        // Some stay: the others are no reason to wait any more.
        let gone: Vec<&str> = owners
            .absent
            .iter()
            .chain(&owners.waiting)
            .map(String::as_str)
            .collect();
        return drop_owners(cluster, &node.kind, &object, &gone).await;
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
    cluster.delete(&node.kind, &object, propagation).await
}

#[derive(Default)]
struct Owners {
    /// There, and staying.
    solid: Vec<String>,
    /// Gone.
    absent: Vec<String>,
    /// Going, and waiting for this object.
    waiting: Vec<String>,
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
            Some(_) => found.solid.push(id),
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
        for dependent in cluster.list(&kind, namespace(object)).await? {
            let owned = meta::owner_references(&dependent)
                .iter()
                .any(|reference| reference["uid"] == id);
            if owned {
                drop_owners(cluster, &kind, &dependent, &[id]).await?;
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: &str, owners: &[&str]) -> Change {
        let node = Node {
            kind: Arc::new(Kind::new("", "v1", "ConfigMap", "configmaps")),
            namespace: "n".into(),
            name: id.into(),
            owners: owners.iter().map(ToString::to_string).collect(),
            deleting: false,
            finalizers: Vec::new(),
        };
        Change::Seen(id.into(), Box::new(node))
    }

    #[test]
    fn a_change_concerns_dependents_of_what_goes() {
        let mut graph = Graph::default();
        assert!(graph.apply(seen("a", &[])).is_empty());
        assert_eq!(graph.apply(seen("b", &["a"])), ["b"]);
        assert_eq!(graph.apply(Change::Gone("a".into())), ["b"]);
        // It has another owner now.
        assert_eq!(graph.apply(seen("b", &["c"])), ["b"]);
        assert!(graph.apply(Change::Gone("a".into())).is_empty());
        let kind = Arc::new(Kind::new("", "v1", "ConfigMap", "configmaps"));
        graph.apply(seen("c", &[]));
        let there = ["b".to_owned()].into_iter().collect();
        assert_eq!(graph.apply(Change::All(kind, there)), ["b"]);
    }
}

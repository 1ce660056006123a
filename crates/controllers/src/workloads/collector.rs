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

mod graph;
mod steps;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use hypernetes_telemetry::chain;
use kube::{
    Api, ResourceExt,
    discovery::{Discovery, Scope, verbs},
    runtime::{WatchStreamExt, watcher},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use graph::{Change, Node, Shared, lock};

use super::{
    cluster::{Cluster, Kind},
    queue::Queue,
};
use crate::{
    error::ReconcileError,
    seen::{Seen, watching},
};

/// How often kinds that have come or gone are looked for.
const DISCOVERY: Duration = Duration::from_secs(5);
const WORKERS: usize = 2;
/// Kinds that own nothing, are owned by nothing and change all the time.
const IGNORED: [(&str, &str); 2] = [("", "events"), ("events.k8s.io", "events")];

/// Runs until `stop`.
pub(super) async fn run(cluster: Arc<Cluster>, stop: CancellationToken) {
    let (changes, mut changed) = mpsc::channel(1024);
    let graph = Arc::new(Shared::default());
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
        let outcome = steps::process(&cluster, &graph, &id).await;
        if let Err(error) = &outcome
            && !error.is_conflict()
        {
            tracing::debug!(error = %chain(error), "cannot collect yet; again");
        }
        queue.done(id, outcome.unwrap_or(true));
    }
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
    let api: Api<Seen> = Api::all_with(cluster.client(), &kind.resource());
    let events = watcher(api, watching()).default_backoff();
    let mut events = std::pin::pin!(events.take_until(stop.cancelled_owned()));
    let mut there = HashSet::new();
    while let Some(event) = events.next().await {
        let change = match event {
            Ok(watcher::Event::Init) => {
                there.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                let Some((id, node)) = Node::of(&kind, &object) else {
                    continue;
                };
                there.insert(id.clone());
                Change::Seen(id, Box::new(node))
            }
            Ok(watcher::Event::InitDone) => Change::All(kind.clone(), std::mem::take(&mut there)),
            Ok(watcher::Event::Apply(object)) => match Node::of(&kind, &object) {
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

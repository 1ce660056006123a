//! All pods of the node: who exists, who is told what.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures::{StreamExt as _, stream::BoxStream};
use hypernetes_runtime::{RuntimeEvent, SandboxState};
use hypernetes_telemetry::chain;
use hypernetes_types::SandboxId;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret};
use kube::{
    Api, ResourceExt as _,
    api::DynamicObject,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Config, Event, watcher},
    },
};
use tokio::{
    sync::{broadcast, watch},
    task::{Id, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::{
    network::network_resource,
    sources::{SourceName, referenced},
    steps::Node,
    worker::{Bell, Board, Seen, Worker},
};

struct Entry {
    seen: watch::Sender<Seen>,
    bell: Arc<Bell>,
    namespace: String,
    sources: Vec<SourceName>,
}

struct Pods {
    node: Arc<Node>,
    board: Board,
    stop: CancellationToken,
    entries: HashMap<String, Entry>,
    workers: JoinSet<()>,
    uids: HashMap<Id, String>,
    orphans: JoinSet<()>,
    /// Pods met since the list began anew.
    listed: HashSet<String>,
    complete: bool,
}

type Watch<K> = BoxStream<'static, Result<Event<K>, watcher::Error>>;

/// Runs the node's pods until `stop`.
pub(crate) async fn run(node: Arc<Node>, board: Board, stop: CancellationToken) {
    let client = node.client.clone();
    let mine = Config::default().fields(&format!("spec.nodeName={}", node.config.node_name));
    let mut pods: Watch<Pod> = watcher(Api::all(client.clone()), mine)
        .default_backoff()
        .boxed();
    // One after the other: the pages of a list would be in memory as a whole.
    let any = Config::default().streaming_lists();
    let mut maps: Watch<ConfigMap> = watcher(Api::all(client.clone()), any.clone())
        .default_backoff()
        .boxed();
    let mut secrets: Watch<Secret> = watcher(Api::all(client.clone()), any.clone())
        .default_backoff()
        .boxed();
    let mut claims: Watch<PersistentVolumeClaim> = watcher(Api::all(client.clone()), any.clone())
        .default_backoff()
        .boxed();
    let networks = Api::<DynamicObject>::all_with(client, &network_resource());
    let mut networks: Watch<DynamicObject> = watcher(networks, any).default_backoff().boxed();
    let mut events = node.runtime.events();
    let mut this = Pods {
        node,
        board,
        stop: stop.clone(),
        entries: HashMap::new(),
        workers: JoinSet::new(),
        uids: HashMap::new(),
        orphans: JoinSet::new(),
        listed: HashSet::new(),
        complete: false,
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(event) = pods.next() => match event {
                Ok(event) => this.pod_event(event).await,
                Err(error) => tracing::warn!(error = %chain(&error), "cannot watch pods"),
            },
            Some(Ok(event)) = maps.next() => {
                if let Event::Apply(map) | Event::InitApply(map) = event {
                    this.source_changed(&map.namespace().unwrap_or_default(),
                        &SourceName::ConfigMap(map.name_any()));
                }
            }
            Some(Ok(event)) = secrets.next() => {
                if let Event::Apply(secret) | Event::InitApply(secret) = event {
                    this.source_changed(&secret.namespace().unwrap_or_default(),
                        &SourceName::Secret(secret.name_any()));
                }
            }
            Some(Ok(event)) = claims.next() => {
                if let Event::Apply(claim) | Event::InitApply(claim) = event {
                    this.source_changed(&claim.namespace().unwrap_or_default(),
                        &SourceName::Claim(claim.name_any()));
                }
            }
            Some(Ok(event)) = networks.next() => {
                if let Event::Apply(network) | Event::InitApply(network) = event {
                    let namespace = network.namespace().unwrap_or_default();
                    this.network_changed(&namespace);
                }
            }
            event = events.recv() => match event {
                Ok(event) => this.runtime_event(event).await,
                Err(broadcast::error::RecvError::Lagged(_)) => this.ring_all(),
                Err(broadcast::error::RecvError::Closed) => break,
            },
            Some(ended) = this.workers.join_next_with_id() => this.worker_ended(ended),
            Some(_done) = this.orphans.join_next() => {}
        }
    }
    // Every task sees the same token; VMs are left as they are.
    while this.workers.join_next().await.is_some() {}
    this.orphans.shutdown().await;
}

impl Pods {
    async fn pod_event(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(pod) => {
                self.listed.extend(pod.uid());
                self.apply(pod);
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let lost: Vec<_> = self
                    .entries
                    .keys()
                    .filter(|uid| !listed.contains(*uid))
                    .cloned()
                    .collect();
                for uid in lost {
                    self.gone(&uid);
                }
                if !self.complete {
                    self.complete = true;
                    self.remove_orphans().await;
                }
            }
            Event::Apply(pod) => self.apply(pod),
            Event::Delete(pod) => {
                if let Some(uid) = pod.uid() {
                    self.gone(&uid);
                }
            }
        }
    }

    fn apply(&mut self, pod: Pod) {
        let Some(uid) = pod.uid() else { return };
        if pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref())
            != Some(self.node.config.node_name.as_str())
        {
            return;
        }
        let sources = referenced(&pod);
        let seen = Seen {
            pod: Arc::new(pod),
            gone: false,
        };
        if let Some(entry) = self.entries.get_mut(&uid) {
            entry.sources = sources;
            let before = entry.seen.borrow().pod.clone();
            // Labels and annotations can be content of a downward API volume.
            if before.metadata.labels != seen.pod.metadata.labels
                || before.metadata.annotations != seen.pod.metadata.annotations
            {
                entry.bell.sources_changed();
            }
            entry.seen.send_replace(seen);
            return;
        }
        let namespace = seen.pod.namespace().unwrap_or_default();
        let (sender, receiver) = watch::channel(seen);
        let bell = Arc::new(Bell::default());
        let worker = Worker::new(
            self.node.clone(),
            uid.clone(),
            receiver,
            bell.clone(),
            self.board.clone(),
        );
        let handle = self.workers.spawn(worker.run(self.stop.clone()));
        self.uids.insert(handle.id(), uid.clone());
        self.entries.insert(
            uid,
            Entry {
                seen: sender,
                bell,
                namespace,
                sources,
            },
        );
    }

    fn gone(&mut self, uid: &str) {
        if let Some(entry) = self.entries.get(uid) {
            entry.seen.send_modify(|seen| seen.gone = true);
        }
    }

    /// A worker ends when nothing of its pod is left, or when it broke: then its pod starts over.
    fn worker_ended(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let (id, error) = match ended {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let Some(uid) = self.uids.remove(&id) else {
            return;
        };
        let Some(entry) = self.entries.remove(&uid) else {
            return;
        };
        if let Some(error) = error {
            tracing::error!(pod = uid, %error, "a pod's task broke; it starts over");
            let Seen { pod, gone } = entry.seen.borrow().clone();
            self.apply(Arc::unwrap_or_clone(pod));
            if gone {
                self.gone(&uid);
            }
        }
    }

    fn source_changed(&self, namespace: &str, name: &SourceName) {
        for entry in self.entries.values() {
            if entry.namespace == namespace && entry.sources.contains(name) {
                entry.bell.sources_changed();
            }
        }
    }

    /// A sandbox has ended: pods that wait for a volume may have it now.
    fn volumes_freed(&self) {
        for entry in self.entries.values() {
            let claims = |name: &SourceName| matches!(name, SourceName::Claim(_));
            if entry.sources.iter().any(claims) {
                entry.bell.sources_changed();
            }
        }
    }

    fn network_changed(&self, namespace: &str) {
        for entry in self
            .entries
            .values()
            .filter(|entry| entry.namespace == namespace)
        {
            entry.bell.sources_changed();
        }
    }

    fn ring_all(&self) {
        for entry in self.entries.values() {
            entry.bell.ring();
        }
    }

    async fn runtime_event(&mut self, event: RuntimeEvent) {
        let (RuntimeEvent::Sandbox(id) | RuntimeEvent::Container(id, _)) = event;
        let Some(sandbox) = self.node.runtime.sandbox(&id).await else {
            // It has gone: whose it was is not known any more.
            self.ring_all();
            self.volumes_freed();
            return;
        };
        if sandbox.state != SandboxState::Ready {
            self.volumes_freed();
        }
        match self.entries.get(&sandbox.config.metadata.uid) {
            Some(entry) => entry.bell.ring(),
            // A boot that was broken off came up all the same.
            None if self.complete => self.remove_orphan(id),
            None => {}
        }
    }

    async fn remove_orphans(&mut self) {
        for sandbox in self.node.runtime.list_sandboxes().await {
            if !self.entries.contains_key(&sandbox.config.metadata.uid) {
                self.remove_orphan(sandbox.id);
            }
        }
    }

    fn remove_orphan(&mut self, id: SandboxId) {
        let node = self.node.clone();
        self.orphans
            .spawn(async move { node.remove_orphan(&id).await });
    }
}

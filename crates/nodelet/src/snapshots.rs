//! PodSnapshots: objects that say which pods are to be kept, and copies of pods in the runtime.
//!
//! An object is there before what it names is, and goes before it: what the runtime keeps that no object names is
//! removed. So a node that was killed in between knows what to do, and a namespace that goes takes its snapshots along.
//!
//! What may change by itself (the pod does not run yet, the disk is full) is tried again, ever more rarely. A pod that
//! cannot be kept, or not in so little room, is refused once and for all: every attempt has it stand still.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _};
use hypernetes_apimachinery::quota::quantity;
use hypernetes_runtime::{RuntimeError, SnapshotConfig, SnapshotStatus};
use hypernetes_telemetry::chain;
use hypernetes_types::{
    SnapshotId,
    kinds::{GROUP, VERSION},
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{Config, watcher},
    },
};
use serde_json::{Value, json};
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{clone, events::Level, status::seconds, steps::Node, wishes::CloneOf};

/// How often it is looked whether anything is to be done, besides when an object changes.
const LOOK: Duration = Duration::from_secs(60);
/// Until a snapshot that failed is tried again, at first and at most.
const RETRY: Duration = Duration::from_secs(2);
const MAX_RETRY: Duration = Duration::from_secs(120);
/// Reasons of failures that no later attempt would change.
const FINAL: [&str; 3] = ["TooLarge", "Unsupported", "Lost"];

/// Why there is no snapshot.
#[derive(Debug, PartialEq, Eq)]
struct Trouble {
    reason: &'static str,
    message: String,
}

fn trouble(reason: &'static str, message: impl Into<String>) -> Trouble {
    let message = message.into();
    Trouble { reason, message }
}

/// When a snapshot is tried again.
#[derive(Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

fn resource() -> ApiResource {
    ApiResource {
        group: GROUP.to_owned(),
        version: VERSION.to_owned(),
        api_version: format!("{GROUP}/{VERSION}"),
        kind: "PodSnapshot".to_owned(),
        plural: "podsnapshots".to_owned(),
    }
}

/// The id that an object's snapshot has in the runtime: the digits of its uid.
fn id_of(object: &DynamicObject) -> Option<SnapshotId> {
    let uid = object.metadata.uid.as_ref()?;
    uid.replace('-', "").parse().ok()
}

fn ready(object: &DynamicObject) -> Option<&Value> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|it| it["type"] == "Ready")
}

fn is_ready(object: &DynamicObject) -> bool {
    ready(object).is_some_and(|it| it["status"] == "True")
}

fn is_refused(object: &DynamicObject) -> bool {
    let reason = ready(object).and_then(|it| it["reason"].as_str());
    reason.is_some_and(|reason| FINAL.contains(&reason))
}

/// Has the runtime keep what objects name and nothing else, until `stop`.
pub(crate) async fn run(node: Arc<Node>, stop: CancellationToken) {
    let api = Api::<DynamicObject>::all_with(node.client.clone(), &resource());
    let mut changes = watcher(api.clone(), Config::default())
        .default_backoff()
        .boxed();
    let mut keeper = Keeper {
        node,
        api,
        retries: HashMap::new(),
        works: JoinSet::new(),
        busy: HashMap::new(),
    };
    loop {
        let again = match keeper.look().await {
            Ok(()) => keeper.next_retry(),
            Err(message) => {
                tracing::warn!(error = message, "cannot see to the snapshots of pods");
                Some(Instant::now() + RETRY)
            }
        };
        let latest = Instant::now() + LOOK;
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep_until(again.map_or(latest, |at| at.min(latest))) => {}
            Some(ended) = keeper.works.join_next_with_id() => keeper.ended(ended),
            _ = changes.next() => {
                // One look is for all that has changed by now.
                while changes.next().now_or_never().is_some() {}
            }
        }
    }
    // A pod that is being copied stands still.
    while keeper.works.join_next().await.is_some() {}
}

/// What is being done, and what is to be tried again.
struct Keeper {
    node: Arc<Node>,
    api: Api<DynamicObject>,
    retries: HashMap<SnapshotId, Retry>,
    /// Each says whether nothing is left to do.
    works: JoinSet<bool>,
    busy: HashMap<Id, Work>,
}

/// What a task is about.
struct Work {
    snapshot: SnapshotId,
    /// One pod of a namespace is copied at a time, whatever others do: a guest can take its time.
    namespace: Option<String>,
}

impl Keeper {
    /// Begins what is to be done.
    async fn look(&mut self) -> Result<(), String> {
        // Before the objects: of what is there now, none is made for an object that the list does not have.
        let kept = self.node.runtime.list_snapshots().await;
        let objects = self.api.list(&ListParams::default()).await;
        let objects = objects.map_err(|error| chain(&error).to_string())?.items;
        let named: HashSet<SnapshotId> = objects.iter().filter_map(id_of).collect();
        let is_kept = |id: &SnapshotId| kept.iter().any(|it| it.id == *id);
        self.retries
            .retain(|id, _| named.contains(id) || is_kept(id));
        for snapshot in kept.iter().filter(|it| !named.contains(&it.id)) {
            let (node, id) = (self.node.clone(), snapshot.id.clone());
            self.begin(snapshot.id.clone(), None, async move {
                let removed = node.runtime.remove_snapshot(&id).await;
                if let Err(error) = &removed {
                    let error = chain(error).to_string();
                    tracing::warn!(snapshot = %id, error, "cannot remove a snapshot");
                }
                removed.is_ok()
            });
        }
        for object in objects {
            let Some(id) = id_of(&object) else { continue };
            let whole = kept.iter().find(|it| it.id == id && it.ready).cloned();
            let done = whole.is_some() && is_ready(&object);
            let going = is_refused(&object) || object.metadata.deletion_timestamp.is_some();
            if done || going {
                continue;
            }
            let (node, namespace) = (self.node.clone(), object.namespace());
            self.begin(id.clone(), namespace, async move {
                node.keep_snapshot(&object, id, whole).await
            });
        }
        Ok(())
    }

    /// Begins work at a snapshot, unless there is some already, or it is to be tried later.
    fn begin(
        &mut self,
        snapshot: SnapshotId,
        namespace: Option<String>,
        work: impl Future<Output = bool> + Send + 'static,
    ) {
        let later = self.retries.get(&snapshot);
        let later = later.is_some_and(|retry| retry.at > Instant::now());
        let is_in_the_way = |other: &Work| {
            other.snapshot == snapshot || (namespace.is_some() && other.namespace == namespace)
        };
        if later || self.busy.values().any(is_in_the_way) {
            return;
        }
        let task = self.works.spawn(work);
        let work = Work {
            snapshot,
            namespace,
        };
        self.busy.insert(task.id(), work);
    }

    fn ended(&mut self, ended: Result<(Id, bool), JoinError>) {
        let (task, done) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, "work at a snapshot broke");
                (error.id(), false)
            }
        };
        let Some(Work { snapshot, .. }) = self.busy.remove(&task) else {
            return;
        };
        if done {
            self.retries.remove(&snapshot);
            return;
        }
        let before = self.retries.get(&snapshot).map(|retry| retry.pause);
        let pause = before.map_or(RETRY, |pause| (pause * 2).min(MAX_RETRY));
        let at = Instant::now() + pause;
        self.retries.insert(snapshot, Retry { at, pause });
    }

    /// When something is to be tried again that nobody is at.
    fn next_retry(&self) -> Option<Instant> {
        let busy = |id: &SnapshotId| self.busy.values().any(|work| work.snapshot == *id);
        let idle = self.retries.iter().filter(|(id, _)| !busy(id));
        idle.map(|(_, retry)| retry.at).min()
    }
}

impl Node {
    /// Has the runtime keep what an object names, and the object say how that went. Whether nothing is left to do.
    async fn keep_snapshot(
        &self,
        object: &DynamicObject,
        id: SnapshotId,
        whole: Option<SnapshotStatus>,
    ) -> bool {
        let made = match whole {
            None if is_ready(object) => {
                Err(trouble("Lost", "its data are not on this node any more"))
            }
            // Nobody was told of it yet.
            Some(kept) if object.data["status"]["podUID"] == *kept.source.uid => Ok(kept),
            _ => self.take_snapshot(object, id).await,
        };
        let done = made.is_ok();
        let told = match made {
            Ok(kept) => self.tell(object, figures(&kept), true, "Taken", "").await,
            Err(Trouble { reason, message }) => {
                self.tell(object, json!({}), false, reason, &message).await
            }
        };
        done && told.is_ok()
    }

    /// Has a pod copied, once its object says of which pod.
    async fn take_snapshot(
        &self,
        object: &DynamicObject,
        id: SnapshotId,
    ) -> Result<SnapshotStatus, Trouble> {
        let name = object.data["spec"]["podName"].as_str().unwrap_or_default();
        let namespace = object.namespace().unwrap_or_default();
        let pods = Api::<Pod>::namespaced(self.client.clone(), &namespace);
        let found = pods.get_opt(name).await;
        let found = found.map_err(|error| trouble("PodUnknown", chain(&error).to_string()))?;
        let missing = || trouble("PodNotFound", format!("pods \"{name}\" not found"));
        let pod = found.ok_or_else(missing)?;
        if pod.metadata.deletion_timestamp.is_some() {
            let why = format!("pod {name} is being deleted");
            return Err(trouble("PodNotReady", why));
        }
        let spec = pod.spec.as_ref().map(clone::value).unwrap_or_default();
        if let Some(path) = clone::only_once(&spec) {
            let why = format!("{path}: cannot be kept with pod {name}");
            return Err(trouble("Unsupported", why));
        }
        let running = self.running(&pod).await;
        let (source, _) = running.map_err(|why| trouble("PodNotReady", why))?;
        let meta = &pod.metadata;
        let template = json!({
            "podUID": meta.uid,
            "template": {
                "metadata": {
                    "labels": meta.labels,
                    "annotations": meta.annotations,
                    "ownerReferences": meta.owner_references,
                },
                "spec": spec,
            },
        });
        self.tell(object, template, false, "Taking", "").await?;
        let limit = quantity(&object.data["spec"]["sizeLimit"]).map(|limit| limit.value());
        let limit = limit.and_then(|limit| u64::try_from(limit).ok());
        let wish = SnapshotConfig {
            id,
            source,
            size_limit: limit.unwrap_or_default(),
        };
        let take = self.runtime.take_snapshot(wish);
        let taken = self.boots.take(&namespace, take).await;
        let taken = taken.map_err(|error| refusal(&error))?;
        let said = format!("Took snapshot {}", object.name_any());
        self.events
            .pod(&pod, None, Level::Normal, "SnapshotTaken", said);
        Ok(taken)
    }

    /// Writes into an object how its snapshot stands.
    async fn tell(
        &self,
        object: &DynamicObject,
        mut status: Value,
        is_ready: bool,
        reason: &str,
        message: &str,
    ) -> Result<(), Trouble> {
        let state = if is_ready { "True" } else { "False" };
        let since = ready(object).filter(|it| it["status"] == state);
        let since = since.map(|it| it["lastTransitionTime"].clone());
        status["conditions"] = json!([{
            "type": "Ready", "status": state, "reason": reason, "message": message,
            "lastTransitionTime": since.unwrap_or_else(|| json!(seconds(Timestamp::now()))),
            "observedGeneration": object.metadata.generation,
        }]);
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let client = self.client.clone();
        let api = Api::<DynamicObject>::namespaced_with(client, &namespace, &resource());
        // Not into another object of the same name.
        let patch = json!({"metadata": {"uid": object.metadata.uid}, "status": status});
        let params = PatchParams::default();
        let told = api
            .patch_status(&name, &params, &Patch::Merge(&patch))
            .await;
        told.map(drop).map_err(|error| {
            let error = chain(&error).to_string();
            tracing::warn!(namespace, name, error, "cannot say how a snapshot stands");
            trouble("Failed", "the API did not take how it stands")
        })
    }

    /// The snapshot that a pod goes on from.
    pub(crate) async fn snapshot(&self, pod: &Pod, name: &str) -> Result<SnapshotStatus, String> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let client = self.client.clone();
        let api = Api::<DynamicObject>::namespaced_with(client, &namespace, &resource());
        let found = api.get_opt(name).await;
        let found = found.map_err(|e| format!("cannot read snapshot {name}: {}", chain(&e)))?;
        let missing = || format!("podsnapshots \"{name}\" not found");
        let object = found.ok_or_else(missing)?;
        // Whether its author may have it was asked of the one that there was then.
        if object.metadata.creation_timestamp > pod.metadata.creation_timestamp {
            return Err(format!("snapshot {name} was made later than the pod"));
        }
        if !is_ready(&object) {
            let why = ready(&object).and_then(|it| it["message"].as_str());
            let why = why.unwrap_or("it has not been taken yet");
            return Err(format!("snapshot {name} is not ready: {why}"));
        }
        let of = CloneOf::Snapshot(name);
        clone::check_same(pod, of, &object.data["status"]["template"]["spec"])?;
        let kept = self.runtime.list_snapshots().await;
        let id = id_of(&object);
        let mut kept = kept.into_iter().filter(|it| it.ready);
        kept.find(|it| Some(&it.id) == id.as_ref())
            .ok_or_else(|| format!("snapshot {name} is not on this node"))
    }
}

/// What a snapshot is, beside the pod that it is of.
fn figures(kept: &SnapshotStatus) -> Value {
    let time = Timestamp::from_nanosecond(kept.taken_unix_nanos.into()).unwrap_or_default();
    json!({"creationTime": seconds(time), "sizeBytes": kept.size_bytes})
}

/// What an object is to say of a failure. Paths of this machine are not for tenants.
fn refusal(error: &RuntimeError) -> Trouble {
    let reason = match error {
        RuntimeError::Invalid { field, .. } if field == "size_limit" => {
            let message = chain(error).to_string();
            return trouble("TooLarge", message.replace("size_limit", "spec.sizeLimit"));
        }
        RuntimeError::Invalid { .. } => "Unsupported",
        RuntimeError::State { .. } | RuntimeError::NotFound { .. } => "PodNotReady",
        RuntimeError::NoRoom { .. } => "NoSpace",
        _ if is_full(error) => {
            return trouble("NoSpace", "the node's disk has no room for it");
        }
        RuntimeError::Guest { .. } | RuntimeError::GuestSilent { .. } => "GuestFailed",
        error => {
            let error = chain(error).to_string();
            tracing::warn!(error, "cannot take a snapshot");
            return trouble("Failed", "the node could not keep it");
        }
    };
    trouble(reason, chain(error).to_string())
}

/// Whether an error is about a disk that is full.
fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| io.kind() == std::io::ErrorKind::StorageFull) {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_later_attempt_changes_is_told_from_what_may() {
        let invalid = |field: &str| RuntimeError::Invalid {
            field: field.to_owned(),
            rule: "is wrong".to_owned(),
        };
        let storage = |kind: std::io::ErrorKind| RuntimeError::Storage {
            action: "keep it in /secret/place".to_owned(),
            source: Box::new(std::io::Error::from(kind)),
        };
        let full = refusal(&storage(std::io::ErrorKind::StorageFull));
        assert_eq!(
            (full.reason, full.message.contains("secret")),
            ("NoSpace", false)
        );
        let small = refusal(&RuntimeError::NoRoom {
            what: "the copy",
            needed_mib: 300,
            usable_mib: 7,
        });
        assert_eq!(small.reason, "NoSpace");
        assert!(small.message.contains("the copy: it may need 300 MiB"));
        let large = refusal(&invalid("size_limit"));
        assert_eq!(large.reason, "TooLarge");
        assert_eq!(large.message, "invalid spec.sizeLimit: is wrong");
        assert_eq!(refusal(&invalid("volumes")).reason, "Unsupported");
        let other = refusal(&storage(std::io::ErrorKind::PermissionDenied));
        assert!(!FINAL.contains(&other.reason));
        assert!(FINAL.contains(&large.reason));
    }
}

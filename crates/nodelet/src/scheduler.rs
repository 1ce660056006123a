//! Which pods come to this node: the scheduler of a cluster of one node.
//!
//! Pods without a node are looked at whenever a pod or the node changes, those of higher priority first. A pod
//! that fits is bound; of one that does not its `PodScheduled` condition and an event say why. Where pods of lower
//! priority are in the way, they are asked to go.

mod claims;
mod fit;

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt as _;
use hypernetes_telemetry::chain;
use jiff::Timestamp;
use k8s_openapi::api::{
    core::v1::{
        Binding, Container, Node as NodeObject, ObjectReference, PersistentVolumeClaim, Pod,
        PodCondition,
    },
    storage::v1::StorageClass,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions},
    runtime::{
        WatchStreamExt as _,
        watcher::{Config, Event, watcher},
    },
};
use serde_json::json;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    events::{Level, Recorder},
    status::seconds,
};
use claims::Claims;
use fit::{Misfit, is_finished, is_on, priority};

const NAME: &str = "default-scheduler";
const GATED: &str = "SchedulingGated";
/// Others that come within this after a change are looked at with it at most.
const GATHER: Duration = Duration::from_millis(100);
/// Annotation of a claim whose volume is made when its first pod is placed: where.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// Places pods until `stop`.
pub(crate) async fn run(client: Client, node: String, events: Recorder, stop: CancellationToken) {
    let mut this = Scheduler {
        client: client.clone(),
        node_name: node.clone(),
        events,
        node: None,
        pods: HashMap::new(),
        listing: None,
        claims: Claims::new(),
        claims_known: false,
    };
    // One after the other: the pages of a list would be in memory as a whole.
    let any = Config::default().streaming_lists();
    let mut claims = watcher(
        Api::<PersistentVolumeClaim>::all(client.clone()),
        any.clone(),
    )
    .default_backoff()
    .boxed();
    let mut pods = watcher(Api::<Pod>::all(client.clone()), any)
        .default_backoff()
        .boxed();
    let mine = Config::default().fields(&format!("metadata.name={node}"));
    let mut nodes = watcher(Api::<NodeObject>::all(client), mine)
        .default_backoff()
        .boxed();
    // When what has changed is looked at.
    let mut due: Option<Instant> = None;
    // As long as a look takes, changes are gathered for the next: at once where there are few pods.
    let mut took = Duration::ZERO;
    loop {
        let at = due.filter(|_| this.listing.is_none());
        let changed = tokio::select! {
            () = stop.cancelled() => return,
            () = sleep_until(at.unwrap_or_else(Instant::now)), if at.is_some() => {
                due = None;
                let started = Instant::now();
                this.pass().await;
                took = started.elapsed().min(GATHER);
                false
            }
            Some(event) = pods.next() => match event {
                Ok(event) => this.pod_event(event),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "cannot watch pods to place");
                    false
                }
            },
            Some(event) = claims.next() => match event {
                Ok(event) => this.claim_event(event),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "cannot watch claims of pods to place");
                    false
                }
            },
            Some(Ok(event)) = nodes.next() => match event {
                Event::Apply(node) | Event::InitApply(node) => {
                    this.node = Some(node);
                    true
                }
                Event::Delete(_) => {
                    this.node = None;
                    false
                }
                Event::Init | Event::InitDone => false,
            },
        };
        if changed {
            due.get_or_insert_with(|| Instant::now() + took);
        }
    }
}

struct Scheduler {
    client: Client,
    node_name: String,
    events: Recorder,
    node: Option<NodeObject>,
    pods: HashMap<String, Arc<Pod>>,
    /// Pods of a list that is still coming.
    listing: Option<HashMap<String, Arc<Pod>>>,
    claims: Claims,
    /// Whether all of them are known: until then pods with claims wait.
    claims_known: bool,
}

impl Scheduler {
    /// Takes news in; whether they can change anything.
    fn pod_event(&mut self, event: Event<Pod>) -> bool {
        match event {
            Event::Init => {
                self.listing = Some(HashMap::new());
                false
            }
            Event::InitApply(pod) => {
                if let (Some(uid), Some(list)) = (pod.uid(), &mut self.listing)
                    && matters(&pod)
                {
                    list.insert(uid, Arc::new(placing(pod)));
                }
                false
            }
            Event::InitDone => {
                self.pods = self.listing.take().unwrap_or_default();
                true
            }
            Event::Apply(pod) => self.keep(pod),
            Event::Delete(pod) => pod
                .uid()
                .is_some_and(|uid| self.pods.remove(&uid).is_some()),
        }
    }

    /// Keeps a pod as it is now, if it matters; whether that can change anything.
    fn keep(&mut self, pod: Pod) -> bool {
        let Some(uid) = pod.uid() else { return false };
        if matters(&pod) {
            self.pods.insert(uid, Arc::new(placing(pod)));
            return true;
        }
        self.pods.remove(&uid).is_some()
    }

    fn claim_event(&mut self, event: Event<PersistentVolumeClaim>) -> bool {
        let key = |claim: &PersistentVolumeClaim| {
            (claim.namespace().unwrap_or_default(), claim.name_any())
        };
        match event {
            Event::Init => {
                self.claims.clear();
                self.claims_known = false;
            }
            Event::InitApply(claim) => {
                self.claims.insert(key(&claim), claim);
            }
            Event::InitDone => self.claims_known = true,
            Event::Apply(claim) => {
                self.claims.insert(key(&claim), claim);
            }
            Event::Delete(claim) => {
                self.claims.remove(&key(&claim));
            }
        }
        self.claims_known
    }

    /// Whether a pod can be placed as to its claims; says why not.
    async fn has_claims(&mut self, pod: &Arc<Pod>, others: &[&Pod]) -> bool {
        if claims::of_pod(pod).next().is_none() {
            return true;
        }
        if !self.claims_known {
            return false;
        }
        let Some(why) = claims::obstacle(pod, &self.claims, others) else {
            return true;
        };
        self.select_node(pod).await;
        let message = format!(
            "0/1 nodes are available: {why}. no new claims to deallocate, preemption: 0/1 nodes are \
             available: 1 Preemption is not helpful for scheduling."
        );
        self.refuse(pod, message).await;
        false
    }

    /// Lets volumes be made for claims that wait for their first pod.
    async fn select_node(&self, pod: &Pod) {
        let namespace = pod.namespace().unwrap_or_default();
        for (name, _) in claims::of_pod(pod) {
            let claim = self.claims.get(&(namespace.clone(), name.clone()));
            let Some(claim) = claim.filter(|c| !c.annotations().contains_key(SELECTED_NODE)) else {
                continue;
            };
            let spec = claim.spec.clone().unwrap_or_default();
            let (None, Some(class)) = (spec.volume_name, spec.storage_class_name) else {
                continue;
            };
            let classes = Api::<StorageClass>::all(self.client.clone());
            let Ok(Some(class)) = classes.get_opt(&class).await else {
                continue;
            };
            if class.volume_binding_mode.as_deref() != Some("WaitForFirstConsumer") {
                continue;
            }
            let patch = json!({"metadata": {"annotations": {SELECTED_NODE: self.node_name}}});
            let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), &namespace);
            let written = claims
                .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await;
            if let Err(error) = written {
                tracing::debug!(claim = name, error = %chain(&error), "cannot select a claim's node");
            }
        }
    }

    /// Places what waits.
    async fn pass(&mut self) {
        let waits = |pod: &&Arc<Pod>| waits(pod);
        let mut waiting: Vec<Arc<Pod>> = self.pods.values().filter(waits).cloned().collect();
        waiting.sort_by_cached_key(|pod| {
            let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
            (std::cmp::Reverse(priority(pod)), created, pod.name_any())
        });
        for pod in waiting {
            if is_gated(&pod) {
                let message = "Scheduling is blocked due to non-empty scheduling gates";
                self.note(&pod, GATED, message.to_owned()).await;
                continue;
            }
            let Some(node) = self.node.clone() else {
                let message = "no nodes available to schedule pods".to_owned();
                self.refuse(&pod, message).await;
                continue;
            };
            let others: Vec<Arc<Pod>> = self
                .pods
                .values()
                .filter(|other| other.metadata.uid != pod.metadata.uid)
                .cloned()
                .collect();
            let others: Vec<&Pod> = others.iter().map(AsRef::as_ref).collect();
            if !self.has_claims(&pod, &others).await {
                continue;
            }
            match fit::check(&pod, &node, &others) {
                Ok(()) => self.bind(&pod).await,
                Err(misfit) => {
                    let helped =
                        misfit.preemption_helps && self.make_room(&pod, &node, &others).await;
                    self.refuse(&pod, words(&misfit, helped)).await;
                }
            }
        }
    }

    async fn bind(&mut self, pod: &Arc<Pod>) {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                uid: pod.metadata.uid.clone(),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(self.node_name.clone()),
                ..ObjectReference::default()
            },
        };
        let api = Api::<Pod>::namespaced(self.client.clone(), &namespace);
        let bound: Result<serde_json::Value, _> = api
            .create_subresource("binding", &name, &PostParams::default(), &binding)
            .await;
        match bound {
            Ok(_) => {
                let message = format!(
                    "Successfully assigned {namespace}/{name} to {}",
                    self.node_name
                );
                self.events
                    .scheduler(pod, Level::Normal, "Scheduled", message);
                // What comes next counts with it at once.
                let mut placed = Pod::clone(pod);
                if let (Some(spec), Some(uid)) = (&mut placed.spec, pod.uid()) {
                    spec.node_name = Some(self.node_name.clone());
                    self.pods.insert(uid, Arc::new(placed));
                }
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => {
                tracing::warn!(namespace, pod = name, error = %chain(&error), "cannot bind a pod");
            }
        }
    }

    async fn refuse(&mut self, pod: &Arc<Pod>, message: String) {
        if self.note(pod, "Unschedulable", message.clone()).await {
            self.events
                .scheduler(pod, Level::Warning, "FailedScheduling", message);
        }
    }

    /// Writes why a pod waits, if that is new.
    async fn note(&mut self, pod: &Arc<Pod>, reason: &str, message: String) -> bool {
        let status = pod.status.clone().unwrap_or_default();
        let mut conditions = status.conditions.clone().unwrap_or_default();
        let known = conditions.iter().find(|c| c.type_ == "PodScheduled");
        let same = known.is_some_and(|known| {
            known.reason.as_deref() == Some(reason) && known.message.as_deref() == Some(&message)
        });
        if same {
            return false;
        }
        let since = known
            .filter(|known| known.status == "False")
            .and_then(|known| known.last_transition_time.clone());
        conditions.retain(|condition| condition.type_ != "PodScheduled");
        conditions.push(PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "False".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_transition_time: since.or_else(|| Some(seconds(Timestamp::now()))),
            observed_generation: pod.metadata.generation,
            ..PodCondition::default()
        });
        let patch = json!({
            "metadata": {"uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let api = Api::<Pod>::namespaced(self.client.clone(), &namespace);
        match api
            .patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Ok(written) => {
                self.keep(written);
                true
            }
            // It has changed or gone: its news come by the watch.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => false,
            Err(error) => {
                tracing::warn!(namespace, pod = name, error = %chain(&error), "cannot note why a pod waits");
                false
            }
        }
    }

    /// Asks pods of lower priority to go, as few and as low as will do. Whether there are such.
    async fn make_room(&mut self, pod: &Arc<Pod>, node: &NodeObject, others: &[&Pod]) -> bool {
        let spec = pod.spec.as_ref();
        if spec.and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never") {
            return false;
        }
        let own = priority(pod);
        let is_victim = |other: &Pod| {
            is_on(other, &self.node_name) && !is_finished(other) && priority(other) < own
        };
        let mut victims: Vec<&Pod> = others.iter().copied().filter(|o| is_victim(o)).collect();
        // The lowest and youngest go first.
        victims.sort_by_key(|victim| {
            let created = victim.metadata.creation_timestamp.as_ref().map(|t| t.0);
            (priority(victim), std::cmp::Reverse(created))
        });
        let fits_without = |gone: &[&Pod]| {
            let rest: Vec<&Pod> = others
                .iter()
                .copied()
                .filter(|other| !gone.iter().any(|g| g.metadata.uid == other.metadata.uid))
                .collect();
            fit::check(pod, node, &rest).is_ok()
        };
        // Those on their way out are waited for before more are asked.
        let leaving = |victim: &&&Pod| victim.metadata.deletion_timestamp.is_some();
        let mut gone: Vec<&Pod> = victims.iter().filter(leaving).copied().collect();
        if fits_without(&gone) {
            return true;
        }
        let mut asked = Vec::new();
        for victim in victims.iter().filter(|victim| !leaving(victim)) {
            gone.push(victim);
            asked.push(*victim);
            if fits_without(&gone) {
                break;
            }
        }
        if !fits_without(&gone) {
            return false;
        }
        for victim in asked {
            let message = format!(
                "Preempted by pod {} on node {}",
                pod.uid().unwrap_or_default(),
                self.node_name
            );
            self.events
                .scheduler(victim, Level::Normal, "Preempted", message);
            let namespace = victim.namespace().unwrap_or_default();
            let api = Api::<Pod>::namespaced(self.client.clone(), &namespace);
            let params = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: victim.metadata.uid.clone(),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            if let Err(error) = api.delete(&victim.name_any(), &params).await {
                tracing::warn!(pod = victim.name_any(), error = %chain(&error), "cannot preempt a pod");
            }
        }
        true
    }
}

/// Whether placing a pod, or others beside it, can depend on it. One that has ended does not, nor one at a gate
/// when that has been noted: its next change brings the whole of it again.
fn matters(pod: &Pod) -> bool {
    !(is_finished(pod) || is_gated(pod) && is_noted(pod))
}

/// A pod without what is of no use for placing it.
fn placing(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    if let Some(spec) = &mut pod.spec {
        spec.ephemeral_containers = None;
        let init = spec.init_containers.iter_mut().flatten();
        for container in spec.containers.iter_mut().chain(init) {
            *container = Container {
                name: std::mem::take(&mut container.name),
                ports: container.ports.take(),
                resources: container.resources.take(),
                restart_policy: container.restart_policy.take(),
                ..Container::default()
            };
        }
    }
    if let Some(status) = &mut pod.status {
        status.container_statuses = None;
        status.init_container_statuses = None;
        status.ephemeral_container_statuses = None;
    }
    pod
}

/// Somebody keeps the pod from being placed.
fn is_gated(pod: &Pod) -> bool {
    let gates = (pod.spec.as_ref()).and_then(|spec| spec.scheduling_gates.as_ref());
    gates.is_some_and(|gates| !gates.is_empty())
}

/// It has been said that somebody does.
fn is_noted(pod: &Pod) -> bool {
    let conditions = (pod.status.as_ref()).and_then(|status| status.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|one| one.type_ == "PodScheduled" && one.reason.as_deref() == Some(GATED))
}

/// The pod is for this scheduler and has no node yet.
fn waits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    pod.metadata.deletion_timestamp.is_none()
        && spec.node_name.as_deref().unwrap_or_default().is_empty()
        && spec.scheduler_name.as_deref().unwrap_or(NAME) == NAME
        && !is_finished(pod)
}

fn words(misfit: &Misfit, helped: bool) -> String {
    let reasons: Vec<String> = misfit.reasons.iter().map(|r| format!("1 {r}")).collect();
    let preemption = if helped || misfit.preemption_helps {
        "1 No preemption victims found for incoming pod."
    } else {
        "1 Preemption is not helpful for scheduling."
    };
    let preemption = if helped {
        String::new()
    } else {
        format!(" no new claims to deallocate, preemption: 0/1 nodes are available: {preemption}")
    };
    format!(
        "0/1 nodes are available: {}.{preemption}",
        reasons.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedulers_words() {
        let misfit = |preemption_helps| Misfit {
            reasons: vec!["Insufficient cpu".into(), "Insufficient memory".into()],
            preemption_helps,
        };
        assert_eq!(
            words(&misfit(true), false),
            "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory. no new claims to \
             deallocate, preemption: 0/1 nodes are available: 1 No preemption victims found for \
             incoming pod."
        );
        assert!(
            words(&misfit(false), false).ends_with("1 Preemption is not helpful for scheduling.")
        );
        assert_eq!(
            words(&misfit(true), true),
            "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory."
        );
    }
}

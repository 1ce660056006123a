//! How containers end: preStop hook, turn, stop signal, all within one grace period. Without any grace
//! they are killed at once.
//!
//! A container's preStop hook runs once, whoever ends it: a deletion that comes upon a kill by a probe
//! waits for the hook that runs already, for as long as its own grace allows.
//!
//! The containers of a pod end side by side, but sidecars: each waits, as long as there is time, until the
//! main containers and the sidecars after it have ended.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, NetworkId};
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    events::Level,
    handler::Subject,
    roles::{self, Role},
    steps::{Node, Outcome},
    worker::lock,
};

/// A container gets this time at least to end by itself.
const MIN_GRACE: Duration = Duration::from_secs(2);

type Said = Option<Result<(), String>>;

/// A preStop hook that has been begun.
#[derive(Debug)]
struct Begun {
    said: watch::Receiver<Said>,
    task: AbortHandle,
}

/// The preStop hooks that have been begun, by pod and container.
#[derive(Debug, Default)]
pub(crate) struct Hooks(Mutex<HashMap<String, HashMap<ContainerId, Begun>>>);

impl Hooks {
    /// Forgets those of a pod.
    pub(crate) fn forget(&self, uid: &str) {
        lock(&self.0).remove(uid);
    }

    fn forget_one(&self, uid: &str, id: &ContainerId) {
        if let Some(hooks) = lock(&self.0).get_mut(uid) {
            hooks.remove(id);
        }
    }

    /// The hook of a container, begun now if it is not yet.
    fn begin(
        &self,
        uid: &str,
        id: &ContainerId,
        hook: impl Future<Output = Result<(), String>> + Send + 'static,
    ) -> (watch::Receiver<Said>, AbortHandle) {
        let mut all = lock(&self.0);
        let begun = all
            .entry(uid.to_owned())
            .or_default()
            .entry(id.clone())
            .or_insert_with(|| {
                let (say, said) = watch::channel(None);
                let task = tokio::spawn(async move { drop(say.send(Some(hook.await))) });
                Begun {
                    said,
                    task: task.abort_handle(),
                }
            });
        (begun.said.clone(), begun.task.clone())
    }
}

/// A running container that shall end.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    pub(crate) name: String,
    pub(crate) id: ContainerId,
    pub(crate) place: Option<(NetworkId, IpAddr)>,
}

impl Node {
    /// Ends one container; `message` says why.
    pub(crate) async fn kill_container(
        self: &Arc<Self>,
        pod: &Pod,
        ending: Ending,
        message: String,
        grace: i64,
    ) -> Outcome {
        let found = roles::find(pod, &ending.name).map(|(container, _)| container);
        self.say_killing(pod, &ending.name, message);
        self.end(pod, &ending, found.as_ref(), grace, &[]).await;
        Outcome::Done
    }

    /// Ends all containers of the pod.
    pub(crate) async fn stop_containers(
        self: &Arc<Self>,
        pod: &Pod,
        running: Vec<Ending>,
        grace: i64,
    ) -> Outcome {
        let all = pod.spec.as_ref().map(roles::all).unwrap_or_default();
        let ended: Vec<_> = running.iter().map(|_| CancellationToken::new()).collect();
        let rank = |name: &str| {
            let at = all.iter().position(|(container, _)| container.name == name);
            at.map(|at| (at, all[at].1))
        };
        let stops = running.iter().enumerate().map(|(index, ending)| {
            let mut before = Vec::new();
            if let Some((own, Role::Sidecar)) = rank(&ending.name) {
                for (other, token) in running.iter().zip(&ended) {
                    match rank(&other.name) {
                        Some((at, Role::Main | Role::Sidecar)) if at > own => {
                            before.push(token.clone());
                        }
                        _ => {}
                    }
                }
            }
            let (done, container) = (&ended[index], rank(&ending.name).map(|(at, _)| &all[at].0));
            async move {
                // Whoever waits for this one is not held up if it is given up.
                let _done = done.clone().drop_guard();
                self.say_killing(
                    pod,
                    &ending.name,
                    format!("Stopping container {}", ending.name),
                );
                self.end(pod, ending, container, grace, &before).await;
            }
        });
        futures::future::join_all(stops).await;
        Outcome::Stopped
    }

    fn say_killing(&self, pod: &Pod, name: &str, message: String) {
        self.events
            .pod(pod, Some(name), Level::Normal, "Killing", message);
    }

    async fn end(
        self: &Arc<Self>,
        pod: &Pod,
        ending: &Ending,
        container: Option<&Container>,
        grace: i64,
        before: &[CancellationToken],
    ) {
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let deadline = Instant::now() + grace;
        let hook = container.and_then(|container| container.lifecycle.as_ref()?.pre_stop.as_ref());
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if !grace.is_zero() {
            self.thaw(pod, &ending.id).await;
        }
        if let (Some(hook), Some(container), false) = (hook, container, grace.is_zero()) {
            let (node, owned) = (Arc::clone(self), ending.clone());
            let (hook, container) = (hook.clone(), container.clone());
            let work = async move {
                let subject = Subject {
                    node: &node,
                    container: &container,
                    id: &owned.id,
                    place: owned.place.clone(),
                };
                subject.hook(&hook, grace).await
            };
            let (mut said, task) = self.hooks.begin(uid, &ending.id, work);
            let done = tokio::time::timeout_at(deadline, said.wait_for(Option::is_some)).await;
            let failed = match done {
                Ok(Ok(said)) => said.clone().and_then(Result::err),
                Ok(Err(_lost)) => Some("it was broken off".to_owned()),
                Err(_late) => {
                    task.abort();
                    Some("it did not end within the grace period".to_owned())
                }
            };
            if let Some(message) = failed {
                tracing::debug!(container = %ending.id, message, "a preStop hook failed");
                let said = "PreStopHook failed".to_owned();
                let name = Some(ending.name.as_str());
                self.events
                    .pod(pod, name, Level::Warning, "FailedPreStopHook", said);
            }
        }
        let turn = futures::future::join_all(before.iter().map(CancellationToken::cancelled));
        // Its turn is now, whether or not the others have ended.
        drop(tokio::time::timeout_at(deadline, turn).await);
        let left = deadline.saturating_duration_since(Instant::now());
        let left = match grace.is_zero() {
            true => Duration::ZERO,
            false => left.max(MIN_GRACE),
        };
        if let Err(error) = self.runtime.stop_container(&ending.id, left).await {
            tracing::warn!(container = %ending.id, error = %chain(&error), "cannot stop a container");
        }
        self.hooks.forget_one(uid, &ending.id);
    }
}

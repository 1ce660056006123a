//! How containers end: preStop hook, turn, stop signal, all within one grace period.
//!
//! The containers of a pod end side by side, but sidecars: each waits, as long as there is time, until the
//! main containers and the sidecars after it have ended.

use std::{net::IpAddr, time::Duration};

use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, NetworkId};
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    events::Level,
    handler::Subject,
    roles::{self, Role},
    steps::{Node, Outcome},
};

/// A container gets this time at least to end by itself.
const MIN_GRACE: Duration = Duration::from_secs(2);

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
        &self,
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
        &self,
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
        &self,
        pod: &Pod,
        ending: &Ending,
        container: Option<&Container>,
        grace: i64,
        before: &[CancellationToken],
    ) {
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let deadline = Instant::now() + grace;
        let hook = container.and_then(|container| container.lifecycle.as_ref()?.pre_stop.as_ref());
        if let (Some(hook), Some(container), false) = (hook, container, grace.is_zero()) {
            let subject = Subject {
                node: self,
                container,
                id: &ending.id,
                place: ending.place.clone(),
            };
            let done = tokio::time::timeout_at(deadline, subject.hook(hook, grace)).await;
            let failed = match done {
                Ok(Ok(())) => None,
                Ok(Err(message)) => Some(message),
                Err(_late) => Some("it did not end within the grace period".to_owned()),
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
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(MIN_GRACE);
        if let Err(error) = self.runtime.stop_container(&ending.id, left).await {
            tracing::warn!(container = %ending.id, error = %chain(&error), "cannot stop a container");
        }
    }
}

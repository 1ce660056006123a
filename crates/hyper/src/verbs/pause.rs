//! `pause` and `suspend`, `unpause` and `resume`: an annotation of the pod, and the condition by which its
//! node says that it is so.

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::{each, watch};
use crate::{
    cli::Names,
    cluster::Cluster,
    error::{Failure, Result},
    meta,
    model::{self, Container, State},
};

/// Scheme of the ids of containers on nodes that know pauses.
const NODE_SCHEME: &str = "hypernetes://";

/// A way to have a container not go on.
#[derive(Debug)]
struct Stillness {
    annotation: &'static str,
    condition: &'static str,
    state: State,
    /// The verbs, and what a container is after the first.
    begin: &'static str,
    end: &'static str,
    done: &'static str,
    /// What several containers of one pod do together.
    together: &'static str,
}

const PAUSE: Stillness = Stillness {
    annotation: meta::PAUSED,
    condition: meta::PAUSED_CONDITION,
    state: State::Paused,
    begin: "pause",
    end: "unpause",
    done: "paused",
    together: "stand still together",
};

const SUSPEND: Stillness = Stillness {
    annotation: meta::SUSPENDED,
    condition: meta::SUSPENDED_CONDITION,
    state: State::Suspended,
    begin: "suspend",
    end: "resume",
    done: "suspended",
    together: "are in one virtual machine",
};

impl Stillness {
    fn condition<'a>(&self, pod: &'a Pod) -> Option<&'a PodCondition> {
        model::condition(pod, self.condition)
    }

    async fn begin(&self, cluster: &Cluster, options: &Names) -> Result<()> {
        each(&options.containers, |name| async move {
            let container = cluster.find(&name).await?;
            match container.state() {
                // What stands still can be put away; the other way round nobody is there to do it.
                State::Paused if self.state == State::Suspended => {
                    self.set(cluster, &container, true).await?;
                }
                State::Running => self.set(cluster, &container, true).await?,
                state @ (State::Paused | State::Suspended) => {
                    return Err(Failure::daemon(format_args!(
                        "Container {} is already {}",
                        container.id,
                        state.as_str()
                    )));
                }
                State::Restarting => {
                    return Err(Failure::daemon(format_args!(
                        "Container {} is restarting, wait until the container is running",
                        container.id
                    )));
                }
                State::Created | State::Removing | State::Exited | State::Dead => {
                    return Err(Failure::daemon(format_args!(
                        "container {} is not running",
                        container.id
                    )));
                }
            }
            Ok(Some(name))
        })
        .await
    }

    async fn end(&self, cluster: &Cluster, options: &Names) -> Result<()> {
        each(&options.containers, |name| async move {
            let container = cluster.find(&name).await?;
            if container.state() != self.state {
                return Err(Failure::daemon(format_args!(
                    "Container {} is not {}",
                    container.id, self.done
                )));
            }
            self.set(cluster, &container, false).await?;
            Ok(Some(name))
        })
        .await
    }

    /// Has a container be so, or not any more, and waits until it is.
    async fn set(&self, cluster: &Cluster, container: &Container, on: bool) -> Result<()> {
        let verb = if on { self.begin } else { self.end };
        let failed = |why: &str| {
            Failure::daemon(format_args!(
                "Cannot {verb} container {}: {why}",
                container.id
            ))
        };
        if container.name.contains('/') {
            return Err(failed(&format!(
                "it is one of several containers of a pod, which {}: set the pod's annotation {}",
                self.together, self.annotation
            )));
        }
        let id = container
            .status()
            .and_then(|status| status.container_id.clone());
        if !id.is_some_and(|id| id.starts_with(NODE_SCHEME)) {
            return Err(Failure::refused(
                verb,
                "the container's node cannot do it; `hyper stop` keeps the container and its log, `hyper start` runs it again",
            ));
        }
        self.annotate(cluster, container, on).await?;
        let settled = watch::until(cluster, container, |now| {
            let Some(now) = now.filter(|now| !now.state().is_over()) else {
                return Some(Err(failed("it has ended")));
            };
            let settled = settled(self.condition(&now.pod), on);
            settled.map(|result| result.map_err(|why| failed(&why)))
        })
        .await?;
        if settled.is_err() {
            // What failed is not tried again behind the user's back, and at once when it is asked for again.
            // That it may fail too is no news beside the first failure.
            drop(self.annotate(cluster, container, !on).await);
        }
        settled
    }

    async fn annotate(&self, cluster: &Cluster, container: &Container, on: bool) -> Result<()> {
        let value = if on { json!("true") } else { json!(null) };
        let change = json!({"metadata": {"annotations": {self.annotation: value}}});
        cluster
            .pods()
            .patch(
                container.pod_name(),
                &PatchParams::default(),
                &Patch::Merge(&change),
            )
            .await?;
        Ok(())
    }
}

/// `pause`.
pub(crate) async fn pause(cluster: &Cluster, options: &Names) -> Result<()> {
    PAUSE.begin(cluster, options).await
}

/// `unpause`.
pub(crate) async fn unpause(cluster: &Cluster, options: &Names) -> Result<()> {
    PAUSE.end(cluster, options).await
}

/// `suspend`.
pub(crate) async fn suspend(cluster: &Cluster, options: &Names) -> Result<()> {
    SUSPEND.begin(cluster, options).await
}

/// `resume`.
pub(crate) async fn resume(cluster: &Cluster, options: &Names) -> Result<()> {
    SUSPEND.end(cluster, options).await
}

/// Has a container that runs stand still, or go on, and waits until it is so.
pub(crate) async fn set(cluster: &Cluster, container: &Container, paused: bool) -> Result<()> {
    PAUSE.set(cluster, container, paused).await
}

/// Has a container's memory go to the disk, or come back, and waits until it is so.
pub(crate) async fn set_suspended(
    cluster: &Cluster,
    container: &Container,
    suspended: bool,
) -> Result<()> {
    SUSPEND.set(cluster, container, suspended).await
}

/// What the node says of what was asked for, or of its end. `None`: it is still at it.
fn settled(condition: Option<&PodCondition>, on: bool) -> Option<Result<(), String>> {
    let reason = condition.and_then(|condition| condition.reason.as_deref());
    match (condition, reason) {
        (Some(condition), Some("Error")) => {
            Some(Err(condition.message.clone().unwrap_or_default()))
        }
        (Some(condition), None) => (on && condition.status == "True").then_some(Ok(())),
        (Some(_), Some(_)) => None,
        (None, _) => (!on).then_some(Ok(())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_s_condition_tells_how_it_went() {
        for way in [PAUSE, SUSPEND] {
            let pod = |conditions: serde_json::Value| -> Pod {
                let pod = json!({"metadata": {}, "status": {"conditions": conditions}});
                serde_json::from_value(pod).unwrap()
            };
            let one = |status: &str, reason: Option<&str>| {
                pod(
                    json!([{"type": way.condition, "status": status, "reason": reason, "message": "no"}]),
                )
            };
            let error = Some(Err("no".to_owned()));
            for (seen, begin, end) in [
                (pod(json!([])), None, Some(Ok(()))),
                (one("False", Some("Pausing")), None, None),
                (one("True", None), Some(Ok(())), None),
                (one("True", Some("Unpausing")), None, None),
                (one("False", Some("Error")), error.clone(), error),
            ] {
                assert_eq!(settled(way.condition(&seen), true), begin, "{seen:?}");
                assert_eq!(settled(way.condition(&seen), false), end, "{seen:?}");
            }
        }
    }
}

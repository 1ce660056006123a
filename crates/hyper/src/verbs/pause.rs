//! `pause` and `unpause`: the pod's annotation, and the condition by which its node says that it is so.

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::{each, watch};
use crate::{
    cli::Names,
    cluster::Cluster,
    error::{Failure, Result},
    meta,
    model::{Container, State},
};

/// Scheme of the ids of containers on nodes that know pauses.
const NODE_SCHEME: &str = "hypernetes://";

fn condition(pod: &Pod) -> Option<&PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .find(|one| one.type_ == meta::PAUSED_CONDITION)
}

/// Whether the pod's containers stand still.
pub(crate) fn is_paused(pod: &Pod) -> bool {
    condition(pod).is_some_and(|condition| condition.status == "True")
}

/// `pause`.
pub(crate) async fn pause(cluster: &Cluster, options: &Names) -> Result<()> {
    each(&options.containers, |name| async move {
        let container = cluster.find(&name).await?;
        match container.state() {
            State::Running => set(cluster, &container, true).await?,
            State::Paused => {
                return Err(Failure::daemon(format_args!(
                    "Container {} is already paused",
                    container.id
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

/// `unpause`.
pub(crate) async fn unpause(cluster: &Cluster, options: &Names) -> Result<()> {
    each(&options.containers, |name| async move {
        let container = cluster.find(&name).await?;
        if container.state() != State::Paused {
            return Err(Failure::daemon(format_args!(
                "Container {} is not paused",
                container.id
            )));
        }
        set(cluster, &container, false).await?;
        Ok(Some(name))
    })
    .await
}

/// Has a container that runs stand still, or go on, and waits until it is so.
pub(crate) async fn set(cluster: &Cluster, container: &Container, paused: bool) -> Result<()> {
    let verb = if paused { "pause" } else { "unpause" };
    let failed = |why: &str| {
        Failure::daemon(format_args!(
            "Cannot {verb} container {}: {why}",
            container.id
        ))
    };
    if container.name.contains('/') {
        return Err(failed(
            "it is one of several containers of a pod, which stand still together: set the pod's annotation hypernetes.io/paused",
        ));
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
    annotate(cluster, container, paused).await?;
    let settled = watch::until(cluster, container, |now| {
        let Some(now) = now.filter(|now| !now.state().is_over()) else {
            return Some(Err(failed("it has ended")));
        };
        settled(&now.pod, paused).map(|result| result.map_err(|why| failed(&why)))
    })
    .await?;
    if settled.is_err() && paused {
        annotate(cluster, container, false).await?;
    }
    settled
}

async fn annotate(cluster: &Cluster, container: &Container, paused: bool) -> Result<()> {
    let value = if paused { json!("true") } else { json!(null) };
    let change = json!({"metadata": {"annotations": {meta::PAUSED: value}}});
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

/// What the node says of a pause that was asked for, or of its end. `None`: it is still at it.
fn settled(pod: &Pod, paused: bool) -> Option<Result<(), String>> {
    let condition = condition(pod);
    let reason = condition.and_then(|condition| condition.reason.as_deref());
    match (condition, reason) {
        (Some(condition), Some("Error")) => {
            Some(Err(condition.message.clone().unwrap_or_default()))
        }
        (Some(condition), None) => (paused && condition.status == "True").then_some(Ok(())),
        (Some(_), Some(_)) => None,
        (None, _) => (!paused).then_some(Ok(())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_s_condition_tells_how_it_went() {
        let pod = |conditions: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"metadata": {}, "status": {"conditions": conditions}}))
                .unwrap()
        };
        let one = |status: &str, reason: Option<&str>| {
            pod(
                json!([{"type": meta::PAUSED_CONDITION, "status": status, "reason": reason, "message": "no"}]),
            )
        };
        let error = Some(Err("no".to_owned()));
        for (seen, pause, unpause) in [
            (pod(json!([])), None, Some(Ok(()))),
            (one("False", Some("Pausing")), None, None),
            (one("True", None), Some(Ok(())), None),
            (one("True", Some("Unpausing")), None, None),
            (one("False", Some("Error")), error.clone(), error),
        ] {
            assert_eq!(settled(&seen, true), pause, "{seen:?}");
            assert_eq!(settled(&seen, false), unpause, "{seen:?}");
        }
    }
}

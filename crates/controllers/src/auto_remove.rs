//! Containers that are to be removed when they have ended (`hyper run --rm`): their pods are deleted,
//! whether or not somebody waits for them.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Preconditions},
    runtime::controller::Action,
};

use crate::error::{ReconcileError, code};

/// Annotation of such pods.
pub(crate) const AUTO_REMOVE: &str = "hyper.hypernetes.io/auto-remove";
/// Label of pods that are containers of `hyper`.
pub(crate) const NAME: &str = "hyper.hypernetes.io/name";
/// How long a container stays after its end: who waits for it may still read its log and exit code.
const STAYS: i64 = 10;

/// Seconds until the pod is to go; nothing if it is to stay as it is.
fn due(pod: &Pod, now: Timestamp) -> Option<i64> {
    if pod.metadata.deletion_timestamp.is_some() || !pod.annotations().contains_key(AUTO_REMOVE) {
        return None;
    }
    let status = pod.status.as_ref()?;
    if !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let ended = status
        .container_statuses
        .iter()
        .flatten()
        .filter_map(|container| container.state.as_ref()?.terminated.as_ref())
        .filter_map(|ended| ended.finished_at.as_ref())
        .map(|time| time.0.as_second())
        .max();
    // What never ran has nothing to be read.
    Some(ended.map_or(0, |ended| (ended + STAYS - now.as_second()).max(0)))
}

/// Does what is next for one pod.
pub(crate) async fn reconcile(pod: &Pod, client: &Client) -> Result<Action, ReconcileError> {
    match due(pod, Timestamp::now()) {
        None => Ok(Action::await_change()),
        Some(seconds) if seconds > 0 => {
            Ok(Action::requeue(Duration::from_secs(seconds.unsigned_abs())))
        }
        Some(_) => {
            let namespace = pod.namespace().unwrap_or_default();
            let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(Preconditions {
                    uid: pod.uid(),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            match pods.delete(&pod.name_any(), &params).await {
                Ok(_) => Ok(Action::await_change()),
                // Gone, or another pod of that name.
                Err(error) if matches!(code(&error), Some(404 | 409)) => Ok(Action::await_change()),
                Err(source) => Err(ReconcileError::Api {
                    action: format!("remove pod {namespace}/{}", pod.name_any()),
                    source: Box::new(source),
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(annotated: bool, phase: &str, finished: Option<&str>) -> Pod {
        let mut pod = json!({"metadata": {"name": "x"}, "status": {"phase": phase,
            "containerStatuses": [{"name": "x", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": 0, "finishedAt": finished}}}]}});
        if annotated {
            pod["metadata"]["annotations"] = json!({AUTO_REMOVE: "true"});
        }
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn ended_containers_go_after_a_while() {
        let now: Timestamp = "2026-01-02T03:00:10Z".parse().unwrap();
        let at = |second: &str| format!("2026-01-02T03:00:{second}Z");
        for (annotated, phase, finished, seconds) in [
            (true, "Succeeded", Some(at("00")), Some(0)),
            (true, "Failed", Some(at("05")), Some(5)),
            (true, "Failed", None, Some(0)),
            (true, "Running", Some(at("00")), None),
            (false, "Succeeded", Some(at("00")), None),
        ] {
            let pod = pod(annotated, phase, finished.as_deref());
            assert_eq!(due(&pod, now), seconds, "{phase} {finished:?}");
        }
    }
}

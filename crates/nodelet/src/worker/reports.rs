//! What the API is told of the pod: its status, its events, its name.

use std::{net::IpAddr, time::Duration};

use hypernetes_runtime::{ContainerState, ContainerStatus};
use hypernetes_telemetry::chain;
use hypernetes_types::NetworkId;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;

use super::{Worker, lock};
use crate::{events::Level, logs, network, plan::Plan, pull::NoImage, roles, stall, status};

impl Worker {
    /// The API's copy of the status is older than what was written last.
    pub(super) fn keep_written_status(&self, pod: &mut Pod) {
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        if !matches!(phase, Some("Failed" | "Succeeded"))
            && let Some(written) = &self.written
        {
            let theirs = pod.status.take().unwrap_or_default();
            let mut status = written.clone();
            status::take_foreign(&mut status, &theirs);
            pod.status = Some(status);
        }
    }

    pub(super) async fn read_log_tails(&mut self, pod: &Pod, containers: &[ContainerStatus]) {
        let wants = |name: &str| {
            roles::find(pod, name).is_some_and(|(container, _)| {
                container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
            })
        };
        for record in containers {
            let failed = record.state == ContainerState::Exited && record.exit_code != 0;
            if failed
                && wants(&record.config.name)
                && !self.memory.log_tails.contains_key(&record.id)
                && let Ok(text) = logs::tail_text(&record.log_path).await
            {
                self.memory.log_tails.insert(record.id.clone(), text);
            }
        }
        self.memory
            .log_tails
            .retain(|id, _| containers.iter().any(|record| record.id == *id));
    }

    pub(super) async fn publish_names(&mut self, pod: &Pod, place: Option<(IpAddr, NetworkId)>) {
        let address = place.as_ref().map(|(address, _)| *address);
        if address == self.named {
            return;
        }
        self.named = address;
        let domain = &self.node.config.cluster_domain;
        let place = place.map(|(address, network)| (network, network::names(pod, address, domain)));
        self.node.names.set(&self.uid, place).await;
    }

    pub(super) async fn write_status(&mut self, pod: &Pod, next: PodStatus) {
        lock(&self.board).insert(self.uid.clone(), next.clone());
        if pod.status.as_ref() == Some(&next) {
            return;
        }
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let name = pod.metadata.name.clone().unwrap_or_default();
        let api = Api::<Pod>::namespaced(self.node.client.clone(), &namespace);
        let gated = pod.spec.as_ref().is_some_and(|spec| {
            spec.readiness_gates
                .as_ref()
                .is_some_and(|gates| !gates.is_empty())
        });
        let mut next = next;
        for _try in 0..5 {
            // The uid keeps the status off a new pod of the same name.
            let mut patch = json!({"metadata": {"uid": pod.metadata.uid}});
            if gated && let Ok(Some(now)) = api.get_opt(&name).await {
                // The gates are somebody else's conditions in the same list.
                status::take_foreign(&mut next, &now.status.unwrap_or_default());
                patch["metadata"]["resourceVersion"] = json!(now.metadata.resource_version);
            }
            patch["status"] = json!(next);
            match api
                .patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
            {
                Ok(_) => {
                    self.written = Some(next);
                    return;
                }
                Err(kube::Error::Api(status)) if status.code == 404 => return,
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    match api.get_opt(&name).await {
                        Ok(Some(other)) if other.metadata.uid == pod.metadata.uid => {}
                        _ => return,
                    }
                }
                Err(error) => {
                    tracing::warn!(namespace, pod = name, error = %chain(&error), "cannot write a pod's status");
                    break;
                }
            }
        }
        self.retry_in(Duration::from_secs(1));
    }

    /// Events for what containers newly wait for, and for a VM that stands still or goes on. One that is not up any
    /// more does neither.
    pub(super) fn say(&self, pod: &Pod, plan: &Plan, up: bool) {
        if up && plan.stalled != self.said.stalled {
            stall::say(&self.node.events, pod, plan.stalled);
        }
        for (name, waiting) in &plan.waiting {
            let before = self.said.waiting.get(name).map(|before| &before.reason);
            if before == Some(&waiting.reason) {
                continue;
            }
            let events = &self.node.events;
            if waiting.reason == "CrashLoopBackOff" {
                let meta = &pod.metadata;
                let message = format!(
                    "Back-off restarting failed container {name} in pod {}_{}({})",
                    meta.name.as_deref().unwrap_or_default(),
                    meta.namespace.as_deref().unwrap_or_default(),
                    self.uid,
                );
                events.pod(pod, Some(name), Level::Warning, "BackOff", message);
            } else if NoImage::is_pull(waiting) {
                let image = waiting
                    .message
                    .split(": ErrImagePull")
                    .next()
                    .unwrap_or_default();
                events.pod(pod, Some(name), Level::Normal, "BackOff", image.to_owned());
                let message = "Error: ImagePullBackOff".to_owned();
                events.pod(pod, Some(name), Level::Warning, "Failed", message);
            }
        }
    }
}

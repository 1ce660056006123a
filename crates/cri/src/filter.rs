//! What a list is narrowed to. All conditions must hold.

use std::collections::BTreeMap;

use hypernetes_runtime::{
    ContainerState, ContainerStatus, SandboxConfig, SandboxState, SandboxStatus,
};

use crate::v1;

/// Whether labels have all that is wanted.
pub(crate) fn labels_match(
    labels: &BTreeMap<String, String>,
    wanted: &BTreeMap<String, String>,
) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a sandbox can be seen: one that is on its way has an id that nobody knows yet, and a
/// kubelet that finds it would make another.
pub(crate) fn is_visible(status: &SandboxStatus) -> bool {
    status.state != SandboxState::Starting
}

/// The state of a sandbox in the API's words.
pub(crate) fn sandbox_state(state: SandboxState) -> v1::PodSandboxState {
    match state {
        SandboxState::Ready => v1::PodSandboxState::SandboxReady,
        SandboxState::Starting | SandboxState::NotReady | SandboxState::Removing => {
            v1::PodSandboxState::SandboxNotready
        }
    }
}

/// The state of a container in the API's words.
pub(crate) fn container_state(state: ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running => v1::ContainerState::ContainerRunning,
        ContainerState::Exited => v1::ContainerState::ContainerExited,
        ContainerState::Unknown => v1::ContainerState::ContainerUnknown,
    }
}

/// Whether a sandbox is asked for.
pub(crate) fn sandbox_matches(status: &SandboxStatus, filter: &v1::PodSandboxFilter) -> bool {
    let state = filter.state.as_ref();
    status.id.as_str().starts_with(&filter.id)
        && state.is_none_or(|wanted| wanted.state() == sandbox_state(status.state))
        && labels_match(&status.config.labels, &filter.label_selector)
}

/// Whether a container is asked for.
pub(crate) fn container_matches(status: &ContainerStatus, filter: &v1::ContainerFilter) -> bool {
    let state = filter.state.as_ref();
    status.id.as_str().starts_with(&filter.id)
        && status.sandbox.as_str().starts_with(&filter.pod_sandbox_id)
        && state.is_none_or(|wanted| wanted.state() == container_state(status.state))
        && labels_match(&status.config.labels, &filter.label_selector)
}

/// Whether a container's statistics are asked for.
pub(crate) fn stats_match(status: &ContainerStatus, filter: &v1::ContainerStatsFilter) -> bool {
    status.id.as_str().starts_with(&filter.id)
        && status.sandbox.as_str().starts_with(&filter.pod_sandbox_id)
        && labels_match(&status.config.labels, &filter.label_selector)
}

/// A sandbox's name as the API has it.
pub(crate) fn metadata(config: &SandboxConfig) -> v1::PodSandboxMetadata {
    let metadata = &config.metadata;
    v1::PodSandboxMetadata {
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        attempt: metadata.attempt,
    }
}

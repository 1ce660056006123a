//! What part a container plays in its pod.

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

/// The part of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// Starts in the order of the init containers, and then runs beside the others.
    Sidecar,
    /// What the pod is for.
    Main,
    /// Was added to a running pod to look into it.
    Ephemeral,
}

/// Part of an init container.
pub(crate) fn of_init(container: &Container) -> Role {
    match container.restart_policy.as_deref() {
        Some("Always") => Role::Sidecar,
        _ => Role::Init,
    }
}

/// An ephemeral container as any other: it has the same fields but for its target.
pub(crate) fn of_ephemeral(container: &EphemeralContainer) -> Container {
    Container {
        name: container.name.clone(),
        image: container.image.clone(),
        command: container.command.clone(),
        args: container.args.clone(),
        working_dir: container.working_dir.clone(),
        env: container.env.clone(),
        env_from: container.env_from.clone(),
        volume_mounts: container.volume_mounts.clone(),
        image_pull_policy: container.image_pull_policy.clone(),
        security_context: container.security_context.clone(),
        stdin: container.stdin,
        stdin_once: container.stdin_once,
        tty: container.tty,
        termination_message_path: container.termination_message_path.clone(),
        termination_message_policy: container.termination_message_policy.clone(),
        ..Container::default()
    }
}

/// All containers of a pod, in the order in which they begin.
pub(crate) fn all(spec: &PodSpec) -> Vec<(Container, Role)> {
    let init = spec.init_containers.iter().flatten();
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    init.map(|container| (container.clone(), of_init(container)))
        .chain(spec.containers.iter().map(|c| (c.clone(), Role::Main)))
        .chain(ephemeral.map(|c| (of_ephemeral(c), Role::Ephemeral)))
        .collect()
}

/// The container of that name.
pub(crate) fn find(pod: &Pod, name: &str) -> Option<(Container, Role)> {
    let spec = pod.spec.as_ref()?;
    all(spec)
        .into_iter()
        .find(|(container, _)| container.name == name)
}

/// Name of the container that an ephemeral one looks into.
pub(crate) fn target<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let ephemeral = pod.spec.as_ref()?.ephemeral_containers.iter().flatten();
    ephemeral
        .filter(|container| container.name == name)
        .find_map(|container| container.target_container_name.as_deref())
        .filter(|target| !target.is_empty())
}

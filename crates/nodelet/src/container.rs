//! A container of a pod as the runtime takes it.

use std::{collections::BTreeMap, path::PathBuf};

use hypernetes_runtime::{ContainerConfig, MountConfig, SecurityConfig};
use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext, SecurityContext};

use crate::{env, resources};

/// Annotation of a container in the runtime: the image as the pod names it.
pub(crate) const IMAGE_ANNOTATION: &str = "hypernetes.io/image";

/// A field whose value cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value} is out of range")]
pub(crate) struct RangeError {
    field: &'static str,
    value: i64,
}

/// What the runtime shall create.
pub(crate) fn config(
    pod: &Pod,
    container: &Container,
    attempt: u32,
    image_id: String,
    environment: Vec<(String, String)>,
) -> Result<ContainerConfig, RangeError> {
    let pod_context = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.security_context.as_ref());
    let flag = |value: Option<bool>| value.unwrap_or(false);
    Ok(ContainerConfig {
        name: container.name.clone(),
        attempt,
        image: image_id,
        command: env::expand_all(container.command.as_ref(), &environment),
        args: env::expand_all(container.args.as_ref(), &environment),
        env: environment,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        mounts: mounts(container),
        devices: Vec::new(),
        tty: flag(container.tty),
        stdin: flag(container.stdin),
        stdin_once: flag(container.stdin_once),
        pid_target: None,
        security: security(pod_context, container.security_context.as_ref())?,
        resources: resources::container_resources(container),
        stop_signal: None,
        termination_path: container
            .termination_message_path
            .clone()
            .filter(|path| !path.is_empty())
            .unwrap_or_else(|| "/dev/termination-log".to_owned()),
        log_path: PathBuf::from(&container.name).join(format!("{attempt}.log")),
        labels: BTreeMap::from([("hypernetes.io/container".to_owned(), container.name.clone())]),
        annotations: BTreeMap::from([(
            IMAGE_ANNOTATION.to_owned(),
            container.image.clone().unwrap_or_default(),
        )]),
        memo: String::new(),
        host: None,
    })
}

fn mounts(container: &Container) -> Vec<MountConfig> {
    container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| MountConfig {
            volume: mount.name.clone(),
            image: String::new(),
            destination: mount.mount_path.clone(),
            sub_path: mount.sub_path.clone().unwrap_or_default(),
            readonly: mount.read_only.unwrap_or(false),
        })
        .collect()
}

fn id(field: &'static str, value: Option<i64>) -> Result<Option<u32>, RangeError> {
    value
        .map(|value| u32::try_from(value).map_err(|_range| RangeError { field, value }))
        .transpose()
}

/// The container's own settings before the pod's.
fn security(
    pod: Option<&PodSecurityContext>,
    container: Option<&SecurityContext>,
) -> Result<SecurityConfig, RangeError> {
    let own = container.cloned().unwrap_or_default();
    let pod = pod.cloned().unwrap_or_default();
    let privileged = own.privileged.unwrap_or(false);
    let capabilities = own.capabilities.unwrap_or_default();
    let mut groups = Vec::new();
    for group in pod
        .supplemental_groups
        .into_iter()
        .flatten()
        .chain(pod.fs_group)
    {
        groups.extend(id("securityContext.supplementalGroups", Some(group))?);
    }
    let profile = own.seccomp_profile.or(pod.seccomp_profile);
    Ok(SecurityConfig {
        run_as_user: id(
            "securityContext.runAsUser",
            own.run_as_user.or(pod.run_as_user),
        )?,
        run_as_group: id(
            "securityContext.runAsGroup",
            own.run_as_group.or(pod.run_as_group),
        )?,
        run_as_non_root: own.run_as_non_root.or(pod.run_as_non_root).unwrap_or(false),
        supplemental_groups: groups,
        add_capabilities: capabilities.add.unwrap_or_default(),
        drop_capabilities: capabilities.drop.unwrap_or_default(),
        privileged,
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        no_new_privs: own.allow_privilege_escalation == Some(false) && !privileged,
        seccomp_default: profile.is_some_and(|profile| profile.type_ == "RuntimeDefault"),
        ..SecurityConfig::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn build(pod: serde_json::Value) -> Result<ContainerConfig, RangeError> {
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        config(
            &pod,
            &container,
            2,
            "sha256:1".into(),
            vec![("A".into(), "x".into())],
        )
    }

    #[test]
    fn the_container_speaks_before_the_pod() {
        let config = build(json!({"metadata": {}, "spec": {
            "securityContext": {"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3,
                "supplementalGroups": [4], "runAsNonRoot": true,
                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "image": "i", "command": ["run", "$(A)"],
                "securityContext": {"runAsUser": 9, "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true},
                "volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "s", "readOnly": true}]}]}}))
        .unwrap();
        assert_eq!(config.security.run_as_user, Some(9));
        assert_eq!(config.security.run_as_group, Some(2));
        assert_eq!(config.security.supplemental_groups, [4, 3]);
        assert!(config.security.run_as_non_root && config.security.no_new_privs);
        assert!(config.security.seccomp_default && config.security.readonly_rootfs);
        assert_eq!(config.command, ["run", "x"]);
        assert_eq!(config.log_path, PathBuf::from("c/2.log"));
        assert_eq!(config.termination_path, "/dev/termination-log");
        assert_eq!(config.mounts[0].sub_path, "s");
        assert!(config.mounts[0].readonly);
    }

    #[test]
    fn an_impossible_user_is_refused() {
        let error = build(json!({"metadata": {}, "spec": {"containers": [
            {"name": "c", "securityContext": {"runAsUser": -1}}]}}))
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "securityContext.runAsUser: -1 is out of range"
        );
    }
}

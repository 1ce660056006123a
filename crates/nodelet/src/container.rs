//! A container of a pod as the runtime takes it.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use hypernetes_runtime::{
    ContainerConfig, DeviceConfig, MountConfig, SeccompProfile, SecurityConfig,
};
use hypernetes_types::ContainerId;
use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext, SecurityContext};

use crate::{claims::Claimed, env, resize, resources};

/// Annotation of a container in the runtime: the image as the pod names it.
pub(crate) const IMAGE_ANNOTATION: &str = "hypernetes.io/image";

/// A field whose value cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("{field}: {value} is out of range")]
    Range { field: &'static str, value: i64 },
    #[error("failed to expand subPathExpr {0:?}: a variable of it is not set")]
    SubPath(String),
    #[error("subPathExpr: {0:?} must be a relative path without ..")]
    Outside(String),
}

/// What a container is made of beside its specification.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parts {
    pub(crate) attempt: u32,
    pub(crate) image_id: String,
    pub(crate) environment: Vec<(String, String)>,
    /// Images that are volumes, by the volume's name.
    pub(crate) images: BTreeMap<String, String>,
    /// Block volumes, by the pod's name for them.
    pub(crate) devices: BTreeMap<String, Claimed>,
    /// Whose processes it sees.
    pub(crate) target: Option<ContainerId>,
    /// The system call filter of the node's that it names.
    pub(crate) seccomp: Option<SeccompProfile>,
}

/// What the runtime shall create.
pub(crate) fn config(
    pod: &Pod,
    container: &Container,
    parts: Parts,
) -> Result<ContainerConfig, ConfigError> {
    let pod_context = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.security_context.as_ref());
    let flag = |value: Option<bool>| value.unwrap_or(false);
    let Parts {
        attempt,
        environment,
        ..
    } = &parts;
    let stop_signal = container
        .lifecycle
        .as_ref()
        .and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    Ok(ContainerConfig {
        name: container.name.clone(),
        attempt: *attempt,
        image: parts.image_id.clone(),
        command: env::expand_all(container.command.as_ref(), environment),
        args: env::expand_all(container.args.as_ref(), environment),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        mounts: mounts(container, &parts)?,
        devices: devices(container, &parts),
        tty: flag(container.tty),
        stdin: flag(container.stdin),
        stdin_once: flag(container.stdin_once),
        security: SecurityConfig {
            seccomp: parts.seccomp.clone(),
            ..security(pod_context, container.security_context.as_ref())?
        },
        resources: resources::container_resources(container, pod.spec.as_ref()),
        stop_signal: stop_signal.and_then(signal_number),
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
        memo: resize::memo(container),
        host: None,
        env: parts.environment,
        pid_target: parts.target,
    })
}

/// The number of a signal; the runtime knows each by one name.
fn signal_number(name: &str) -> Option<u32> {
    hypernetes_runtime::signal_number(match name {
        "SIGCLD" => "SIGCHLD",
        "SIGIOT" => "SIGABRT",
        "SIGPOLL" => "SIGIO",
        name => name,
    })
}

fn mounts(container: &Container, parts: &Parts) -> Result<Vec<MountConfig>, ConfigError> {
    let mounts = container.volume_mounts.iter().flatten();
    mounts
        .map(|mount| {
            let image = parts.images.get(&mount.name);
            let sub_path = match mount
                .sub_path_expr
                .as_deref()
                .filter(|text| !text.is_empty())
            {
                Some(expression) => sub_path(expression, &parts.environment)?,
                None => mount.sub_path.clone().unwrap_or_default(),
            };
            Ok(MountConfig {
                volume: match image {
                    Some(_) => String::new(),
                    None => mount.name.clone(),
                },
                image: image.cloned().unwrap_or_default(),
                destination: mount.mount_path.clone(),
                sub_path,
                readonly: image.is_some() || mount.read_only.unwrap_or(false),
            })
        })
        .collect()
}

fn devices(container: &Container, parts: &Parts) -> Vec<DeviceConfig> {
    let wanted = container.volume_devices.iter().flatten();
    let found = wanted.filter_map(|device| {
        let claimed = parts.devices.get(&device.name)?;
        Some(DeviceConfig {
            volume: claimed.handle.clone(),
            read_only: claimed.read_only,
            destination: device.device_path.clone(),
            ..DeviceConfig::default()
        })
    });
    found.collect()
}

/// A path with the container's variables in it, which must all be there, and must not lead out.
fn sub_path(expression: &str, environment: &[(String, String)]) -> Result<String, ConfigError> {
    let known: BTreeMap<String, String> = environment.iter().cloned().collect();
    let path = env::expand(expression, &known);
    let outside = path.starts_with('/') || path.split('/').any(|part| part == "..");
    if path.contains("$(") {
        return Err(ConfigError::SubPath(expression.to_owned()));
    }
    if outside {
        return Err(ConfigError::Outside(path));
    }
    Ok(path)
}

/// The file of a system call filter that a container names, if it does. A privileged one has none.
pub(crate) fn seccomp_file(
    pod: &Pod,
    container: &Container,
    root: Option<&Path>,
) -> Result<Option<PathBuf>, String> {
    let own = container.security_context.as_ref();
    if own.and_then(|context| context.privileged) == Some(true) {
        return Ok(None);
    }
    let of_pod = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.security_context.as_ref());
    let profile = own
        .and_then(|context| context.seccomp_profile.as_ref())
        .or(of_pod.and_then(|context| context.seccomp_profile.as_ref()));
    let Some(profile) = profile.filter(|profile| profile.type_ == "Localhost") else {
        return Ok(None);
    };
    let root = root.ok_or(
        "securityContext.seccompProfile.type: Localhost needs a node with a directory of profiles",
    )?;
    let name = Path::new(profile.localhost_profile.as_deref().unwrap_or_default());
    let mut parts = name.components().peekable();
    let inside = parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)));
    if !inside {
        return Err(
            "securityContext.seccompProfile.localhostProfile: must be a relative path without .."
                .to_owned(),
        );
    }
    Ok(Some(root.join(name)))
}

/// Refuses a container that must not run as root and would, in a kubelet's words.
pub(crate) fn check_non_root(
    pod: &Pod,
    container: &Container,
    image_user: &str,
) -> Result<(), String> {
    let of_pod = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.security_context.as_ref());
    let own = container.security_context.as_ref();
    let wanted = own
        .and_then(|context| context.run_as_non_root)
        .or(of_pod.and_then(|context| context.run_as_non_root));
    if wanted != Some(true) {
        return Ok(());
    }
    let meta = &pod.metadata;
    let whose = format!(
        "(pod: \"{}_{}({})\", container: {})",
        meta.name.as_deref().unwrap_or_default(),
        meta.namespace.as_deref().unwrap_or_default(),
        meta.uid.as_deref().unwrap_or_default(),
        container.name
    );
    let user = own
        .and_then(|context| context.run_as_user)
        .or(of_pod.and_then(|context| context.run_as_user));
    match user {
        Some(0) => {
            return Err(format!(
                "container's runAsUser breaks non-root policy {whose}"
            ));
        }
        Some(_) => return Ok(()),
        None => {}
    }
    let name = image_user.split(':').next().unwrap_or_default();
    match name.parse::<i64>() {
        Ok(0) => {}
        Ok(_) => return Ok(()),
        Err(_name) if !name.is_empty() => {
            return Err(format!(
                "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root {whose}"
            ));
        }
        Err(_empty) => {}
    }
    Err(format!(
        "container has runAsNonRoot and image will run as root {whose}"
    ))
}

fn id(field: &'static str, value: Option<i64>) -> Result<Option<u32>, ConfigError> {
    value
        .map(|value| u32::try_from(value).map_err(|_range| ConfigError::Range { field, value }))
        .transpose()
}

/// The container's own settings before the pod's.
fn security(
    pod: Option<&PodSecurityContext>,
    container: Option<&SecurityContext>,
) -> Result<SecurityConfig, ConfigError> {
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
    let unmasked = own.proc_mount.as_deref() == Some("Unmasked");
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
        only_supplemental_groups: pod.supplemental_groups_policy.as_deref() == Some("Strict"),
        masked_paths: unmasked.then(Vec::new),
        readonly_paths: unmasked.then(Vec::new),
        ..SecurityConfig::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn build(pod: serde_json::Value) -> Result<ContainerConfig, ConfigError> {
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        let parts = Parts {
            attempt: 2,
            image_id: "sha256:1".into(),
            environment: vec![("A".into(), "x".into()), ("UP".into(), "../x".into())],
            ..Parts::default()
        };
        config(&pod, &container, parts)
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
    fn paths_with_variables_stay_inside() {
        let mounted = |expression: &str| {
            build(json!({"metadata": {}, "spec": {"containers": [{"name": "c",
                "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": expression}]}]}}))
            .map(|config| config.mounts[0].sub_path.clone())
        };
        assert_eq!(mounted("d/$(A)").as_deref(), Ok("d/x"));
        for bad in ["$(NONE)", "$(UP)", "/$(A)"] {
            assert!(mounted(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn filters_of_the_node_stay_in_their_directory() {
        let of = |profile: serde_json::Value, own: serde_json::Value| {
            let pod: Pod = serde_json::from_value(json!({"metadata": {}, "spec": {
                "securityContext": {"seccompProfile": profile},
                "containers": [{"name": "c", "securityContext": own}]}}))
            .unwrap();
            let container = pod.spec.as_ref().unwrap().containers[0].clone();
            seccomp_file(&pod, &container, Some(Path::new("/profiles")))
        };
        let named = |name: &str| json!({"type": "Localhost", "localhostProfile": name});
        let found = of(named("a/b.json"), json!({}));
        assert_eq!(found, Ok(Some("/profiles/a/b.json".into())));
        assert_eq!(of(named("a"), json!({"privileged": true})), Ok(None));
        let plain = json!({"seccompProfile": {"type": "Unconfined"}});
        assert_eq!(of(named("a"), plain), Ok(None));
        assert_eq!(of(json!({"type": "RuntimeDefault"}), json!({})), Ok(None));
        for bad in ["", "/etc/passwd", "../x", "a/../../x"] {
            assert!(of(named(bad), json!({})).is_err(), "{bad}");
        }
    }

    #[test]
    fn root_is_refused_where_it_must_not_be() {
        for (pod, own, image, refusal) in [
            (json!({}), json!({}), "", None),
            (json!({"runAsNonRoot": true}), json!({}), "1000:1", None),
            (
                json!({"runAsNonRoot": true}),
                json!({}),
                "",
                Some("image will run as root"),
            ),
            (
                json!({"runAsNonRoot": true}),
                json!({}),
                "0",
                Some("image will run as root"),
            ),
            (
                json!({"runAsNonRoot": true}),
                json!({}),
                "app",
                Some("non-numeric user (app)"),
            ),
            (
                json!({"runAsNonRoot": true}),
                json!({"runAsUser": 5}),
                "",
                None,
            ),
            (
                json!({"runAsNonRoot": true}),
                json!({"runAsNonRoot": false}),
                "",
                None,
            ),
            (
                json!({"runAsUser": 0}),
                json!({"runAsNonRoot": true}),
                "",
                Some("runAsUser breaks non-root policy"),
            ),
        ] {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": {"name": "p", "namespace": "n", "uid": "u"},
                "spec": {"securityContext": pod,
                    "containers": [{"name": "c", "securityContext": own}]}}))
            .unwrap();
            let container = &pod.spec.as_ref().unwrap().containers[0];
            let found = check_non_root(&pod, container, image);
            match refusal {
                None => assert_eq!(found, Ok(()), "{image}"),
                Some(text) => {
                    let found = found.unwrap_err();
                    assert!(found.contains(text), "{found}");
                    assert!(
                        found.ends_with("(pod: \"p_n(u)\", container: c)"),
                        "{found}"
                    );
                }
            }
        }
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

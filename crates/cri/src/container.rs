//! A container: from the request to the runtime, and back to what is shown of it.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use hypernetes_runtime::{
    ContainerConfig, ContainerStatus, ContainerUser, SandboxStatus, SeccompProfile, SecurityConfig,
};
use hypernetes_types::ContainerId;
use serde_json::json;

use crate::{
    filter, host, memo,
    mounts::{self, Owner},
    resources, security, signal,
    status::CriError,
    users, v1,
};

/// Where a request has who the container runs as.
const SECURITY: &str = "config.linux.security_context";
/// Where a container's limits are in a request.
pub(crate) const RESOURCES: &str = "config.linux.resources";

/// The parts of a request that must be there.
pub(crate) struct Asked<'a> {
    pub(crate) config: &'a v1::ContainerConfig,
    pub(crate) metadata: &'a v1::ContainerMetadata,
    pub(crate) image: &'a v1::ImageSpec,
}

impl<'a> Asked<'a> {
    pub(crate) fn of(request: &'a v1::CreateContainerRequest) -> Result<Self, CriError> {
        let required = |field: &str| CriError::invalid(field, "must be given");
        let config = request.config.as_ref().ok_or_else(|| required("config"))?;
        let metadata = config
            .metadata
            .as_ref()
            .filter(|metadata| !metadata.name.is_empty())
            .ok_or_else(|| required("config.metadata.name"))?;
        if metadata.name.contains(['/', '\0']) || metadata.name.len() > 253 {
            return Err(CriError::invalid(
                "config.metadata.name",
                "must be 1 to 253 characters without '/'",
            ));
        }
        let image = config
            .image
            .as_ref()
            .filter(|image| !image.image.is_empty())
            .ok_or_else(|| required("config.image.image"))?;
        Ok(Self {
            config,
            metadata,
            image,
        })
    }
}

/// What confines a container and is not in the request itself.
#[derive(Debug, Default)]
pub(crate) struct Confinement {
    /// The content of a file that the request names.
    pub(crate) seccomp: Option<SeccompProfile>,
    /// The container whose processes it sees.
    pub(crate) pid_target: Option<ContainerId>,
}

/// What the runtime shall create, with its mounts.
pub(crate) fn plan(
    asked: &Asked<'_>,
    sandbox: &SandboxStatus,
    mounts: &mounts::Plan,
    confinement: Confinement,
) -> Result<ContainerConfig, CriError> {
    let config = asked.config;
    if !config.cdi_devices.is_empty() {
        let rule = "no device of the host is in a microVM";
        return Err(CriError::invalid("config.CDI_devices", rule));
    }
    if config.windows.is_some() {
        return Err(CriError::invalid("config.windows", "this node runs Linux"));
    }
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    check_namespaces(context.namespace_options.as_ref(), sandbox)?;
    users::check_container(SECURITY, config, sandbox)?;
    Ok(ContainerConfig {
        name: asked.metadata.name.clone(),
        attempt: asked.metadata.attempt,
        image: asked.image.image.clone(),
        command: config.command.clone(),
        args: config.args.clone(),
        env: environment(&config.envs)?,
        working_dir: config.working_dir.clone(),
        mounts: mounts.mounts.clone(),
        devices: mounts.devices.clone(),
        tty: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        pid_target: confinement.pid_target,
        security: SecurityConfig {
            seccomp: confinement.seccomp,
            ..security::of_container(SECURITY, &context)?
        },
        resources: resources::of_container(RESOURCES, &linux.resources.unwrap_or_default())?,
        stop_signal: signal::number(config.stop_signal)?,
        termination_path: mounts.termination_path.clone(),
        log_path: log_path(&config.log_path, asked.metadata)?,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        memo: memo::of_container(config),
        host: None,
    })
}

/// The file of the system call filter that is asked for, with the field that names it.
pub(crate) fn seccomp_file<'a>(asked: &Asked<'a>) -> Result<Option<(String, &'a Path)>, CriError> {
    let context = asked.config.linux.as_ref();
    match context.and_then(|linux| linux.security_context.as_ref()) {
        Some(context) => security::seccomp_file(SECURITY, context),
        None => Ok(None),
    }
}

/// Whether huge pages are promised to it.
pub(crate) fn has_huge_pages(asked: &Asked<'_>) -> bool {
    let linux = asked.config.linux.as_ref();
    let resources = linux.and_then(|linux| linux.resources.as_ref());
    resources.is_some_and(|limits| limits.hugepage_limits.iter().any(|huge| huge.limit > 0))
}

/// The container whose processes it shall see, with the field that names it.
pub(crate) fn pid_target(asked: &Asked<'_>) -> Option<(String, String)> {
    let context = asked.config.linux.as_ref()?.security_context.as_ref()?;
    let options = context.namespace_options.as_ref()?;
    (options.pid() == v1::NamespaceMode::Target).then(|| {
        let field = format!("{SECURITY}.namespace_options.target_id");
        (field, options.target_id.clone())
    })
}

/// Who the mounts belong to.
pub(crate) fn owner<'a>(asked: &Asked<'a>, sandbox: &'a SandboxStatus) -> Owner<'a> {
    Owner {
        pod_uid: &sandbox.config.metadata.uid,
        container: &asked.metadata.name,
    }
}

/// All containers of a sandbox see each other's processes, or none does.
fn check_namespaces(
    options: Option<&v1::NamespaceOption>,
    sandbox: &SandboxStatus,
) -> Result<(), CriError> {
    let base = SECURITY;
    security::check_namespaces(base, options)?;
    let shared = sandbox.config.share_process_namespace;
    match options.map(v1::NamespaceOption::pid) {
        Some(v1::NamespaceMode::Pod) if !shared => Err(CriError::invalid(
            format!("{base}.namespace_options.pid"),
            "POD needs a sandbox with POD",
        )),
        Some(v1::NamespaceMode::Container) if shared => Err(CriError::invalid(
            format!("{base}.namespace_options.pid"),
            "CONTAINER needs a sandbox with CONTAINER",
        )),
        _ => Ok(()),
    }
}

fn environment(envs: &[v1::KeyValue]) -> Result<Vec<(String, String)>, CriError> {
    let variable = |(index, env): (usize, &v1::KeyValue)| {
        let value = String::from_utf8(env.value.clone()).map_err(|_not_utf8| {
            CriError::invalid(format!("config.envs[{index}].value"), "must be UTF-8")
        })?;
        Ok((env.key.clone(), value))
    };
    envs.iter().enumerate().map(variable).collect()
}

/// As asked; a container that is to have no log has one of a name of its own, out of sight.
fn log_path(asked: &str, metadata: &v1::ContainerMetadata) -> Result<PathBuf, CriError> {
    if asked.is_empty() {
        return Ok(format!(".{}_{}.log", metadata.name, metadata.attempt).into());
    }
    let path = Path::new(asked);
    if !path
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        let rule = "must be relative and made of plain names";
        return Err(CriError::invalid("config.log_path", rule));
    }
    Ok(path.to_owned())
}

fn metadata(status: &ContainerStatus) -> v1::ContainerMetadata {
    v1::ContainerMetadata {
        name: status.config.name.clone(),
        attempt: status.config.attempt,
    }
}

/// The image as it was asked for.
fn image(asked: &v1::ContainerConfig, status: &ContainerStatus) -> v1::ImageSpec {
    let mut image = asked.image.clone().unwrap_or_default();
    let named = [&image.user_specified_image, &image.image, &status.image_ref];
    let named = named.into_iter().find(|name| !name.is_empty()).cloned();
    image.image = named.unwrap_or_default();
    image
}

/// A container in a list.
pub(crate) fn item(status: &ContainerStatus) -> v1::Container {
    v1::Container {
        id: status.id.to_string(),
        pod_sandbox_id: status.sandbox.to_string(),
        metadata: Some(metadata(status)),
        image: Some(image(&memo::container(&status.config.memo), status)),
        image_ref: status.image_ref.clone(),
        state: filter::container_state(status.state).into(),
        created_at: status.created_unix_nanos,
        labels: status.config.labels.clone(),
        annotations: status.config.annotations.clone(),
        image_id: status.image_id.clone(),
    }
}

/// All groups of a user. The primary one is among them, as other runtimes have it.
fn groups(user: &ContainerUser) -> Vec<i64> {
    let primary = Some(&user.gid).filter(|gid| !user.groups.contains(gid));
    let mut groups: Vec<i64> = primary
        .into_iter()
        .chain(&user.groups)
        .map(|group| (*group).into())
        .collect();
    groups.sort_unstable();
    groups
}

/// As asked, with the ids of images that are mounted.
fn mounts(mut mounts: Vec<v1::Mount>, status: &ContainerStatus) -> Vec<v1::Mount> {
    for mount in &mut mounts {
        let path = &mount.container_path;
        let Some(image) = &mut mount.image else {
            continue;
        };
        let mut made = status.config.mounts.iter();
        if let Some(made) = made.find(|made| made.destination == *path && !made.image.is_empty()) {
            image.image_ref.clone_from(&made.image);
        } else if let Some(made) = host::image_at(status, path) {
            image.image_ref = made;
        }
    }
    mounts
}

/// All that is shown of a container.
pub(crate) fn full(status: &ContainerStatus) -> v1::ContainerStatus {
    let asked = memo::container(&status.config.memo);
    let user = status.user.as_ref().map(|user| v1::ContainerUser {
        linux: Some(v1::LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: groups(user),
        }),
    });
    let log_path = match asked.log_path.is_empty() {
        true => String::new(),
        false => status.log_path.to_string_lossy().into_owned(),
    };
    v1::ContainerStatus {
        id: status.id.to_string(),
        metadata: Some(metadata(status)),
        state: filter::container_state(status.state).into(),
        created_at: status.created_unix_nanos,
        started_at: status.started_unix_nanos,
        finished_at: status.finished_unix_nanos,
        exit_code: status.exit_code,
        image: Some(image(&asked, status)),
        image_ref: status.image_ref.clone(),
        reason: status.reason.clone(),
        message: status.message.clone(),
        labels: status.config.labels.clone(),
        annotations: status.config.annotations.clone(),
        resources: Some(v1::ContainerResources {
            linux: Some(
                asked
                    .linux
                    .and_then(|linux| linux.resources)
                    .unwrap_or_default(),
            ),
            windows: None,
        }),
        mounts: mounts(asked.mounts, status),
        log_path,
        image_id: status.image_id.clone(),
        user,
        stop_signal: asked.stop_signal,
    }
}

/// For whoever debugs.
pub(crate) fn info(status: &ContainerStatus) -> BTreeMap<String, String> {
    let info = json!({
        "sandboxID": status.sandbox.to_string(),
        "state": format!("{:?}", status.state),
        "imageID": status.image_id,
        "command": status.config.command,
        "args": status.config.args,
        "privileged": status.config.security.privileged,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

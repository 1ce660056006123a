//! The handler of pods on the node's own kernel: who may use it, and what a request becomes there.
//!
//! A pod gets there in two ways only: it names the handler and its namespace may, or the operator
//! has said for its namespace that pods which name no handler and ask for the host's namespaces go
//! there. Everything else is a VM's, or refused.

use std::path::PathBuf;

use hypernetes_runtime::{
    ContainerConfig, ContainerStatus, ContainerUpdate, HostContainer, HostLimits, HostMount,
    HostMountSource, HostPod, HostPodDevice, PidNamespace, Propagation, SandboxConfig,
    SandboxStatus, Seccomp,
};

use crate::{
    HANDLER, HOST_HANDLER,
    config::CriConfig,
    container::{self, Asked, Confinement},
    lookup::shown,
    memo, mounts,
    network::PodNetwork,
    resources, sandbox,
    service::Service,
    status::CriError,
    v1::{self, NamespaceMode, security_profile::ProfileType},
};

/// Name of the setting that lets a namespace use the handler.
const SETTING: &str = "hostHandler.namespaces";
const SANDBOX: &str = "config.linux.security_context";

/// Who may have pods on the node's own kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostHandler {
    /// Kubernetes namespaces, each a name or the beginning of names and `*`. None: there is no such
    /// handler.
    pub namespaces: Vec<String>,
    /// Namespaces, of those, whose pods go there without naming the handler if they ask for a
    /// namespace of the host.
    pub default_for: Vec<String>,
}

fn names(patterns: &[String], namespace: &str) -> bool {
    patterns
        .iter()
        .any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => namespace.starts_with(beginning),
            None => pattern == namespace,
        })
}

impl HostHandler {
    /// Whether there is such a handler.
    pub fn is_on(&self) -> bool {
        !self.namespaces.is_empty()
    }

    /// Whether pods of a namespace may use it.
    pub fn allows(&self, namespace: &str) -> bool {
        names(&self.namespaces, namespace)
    }
}

/// The namespaces that a sandbox asks for.
fn options_of(request: &v1::RunPodSandboxRequest) -> v1::NamespaceOption {
    let linux = request
        .config
        .as_ref()
        .and_then(|config| config.linux.as_ref());
    let context = linux.and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    options.cloned().unwrap_or_default()
}

/// Whether a request is for the node's own kernel; refused if it may not be.
pub(crate) fn is_asked(
    request: &v1::RunPodSandboxRequest,
    node: &CriConfig,
) -> Result<bool, CriError> {
    let (host, namespace) = (&node.host, sandbox::namespace(request));
    match request.runtime_handler.as_str() {
        HOST_HANDLER if !host.is_on() => Err(CriError::invalid(
            "runtime_handler",
            format!(
                "{HOST_HANDLER:?} is off: the node's setting {SETTING} names no namespace; this node has {HANDLER:?}"
            ),
        )),
        HOST_HANDLER if !host.allows(namespace) => Err(CriError::invalid(
            "runtime_handler",
            format!(
                "pods of namespace {:?} may not run on the node's own kernel: the node's setting {SETTING} does not name it",
                shown(namespace)
            ),
        )),
        HOST_HANDLER => Ok(true),
        "" => {
            let options = options_of(request);
            let node =
                [options.network(), options.pid(), options.ipc()].contains(&NamespaceMode::Node);
            Ok(node && names(&host.default_for, namespace) && host.allows(namespace))
        }
        _ => Ok(false),
    }
}

/// What the runtime shall make of a sandbox.
pub(crate) fn plan_sandbox(
    request: &v1::RunPodSandboxRequest,
    node: &CriConfig,
    network: &PodNetwork,
) -> Result<SandboxConfig, CriError> {
    let options = options_of(request);
    let refused = |field: &str, rule: String| {
        Err(CriError::invalid(
            format!("{SANDBOX}.namespace_options.{field}"),
            rule,
        ))
    };
    check_users(SANDBOX, &options)?;
    let host_network = match options.network() {
        NamespaceMode::Node => true,
        NamespaceMode::Pod => false,
        _ => return refused("network", "must be POD or NODE".to_owned()),
    };
    if let (false, PodNetwork::Own(spec)) = (host_network, network) {
        return refused(
            "network",
            format!(
                "a pod of handler {HOST_HANDLER:?} cannot join network {}, which has places for VMs only: \
                 it needs hostNetwork, or CNI plugins (network.driver: cni)",
                spec.id
            ),
        );
    }
    if options.pid() == NamespaceMode::Target {
        return refused("pid", "TARGET is for containers".to_owned());
    }
    if !matches!(options.ipc(), NamespaceMode::Pod | NamespaceMode::Node) {
        return refused("ipc", "must be POD or NODE".to_owned());
    }
    // The rest is as for a VM, which has no host namespaces.
    let mut plain = request.clone();
    plain.runtime_handler = String::new();
    if let Some(config) = &mut plain.config {
        if host_network {
            // Its ports are the host's own.
            config.port_mappings.clear();
        }
        if let Some(linux) = &mut config.linux {
            linux.security_context = None;
        }
    }
    let plain = sandbox::plan(&plain, node, network)?;
    if host_network && plain.bandwidth.is_limited() {
        return Err(CriError::invalid(
            "config.annotations",
            "the bandwidth of a pod in the host's network cannot be limited",
        ));
    }
    Ok(SandboxConfig {
        network: (!host_network).then(|| network.id().clone()),
        share_process_namespace: options.pid() == NamespaceMode::Pod,
        memo: memo::of_sandbox(request),
        host: Some(HostPod {
            host_ipc: options.ipc() == NamespaceMode::Node,
        }),
        ..plain
    })
}

fn check_users(base: &str, options: &v1::NamespaceOption) -> Result<(), CriError> {
    match &options.userns_options {
        Some(users) if users.mode() != NamespaceMode::Node => Err(CriError::invalid(
            format!("{base}.namespace_options.userns_options"),
            format!("user namespaces are not served by handler {HOST_HANDLER:?}"),
        )),
        _ => Ok(()),
    }
}

/// What the runtime shall create.
pub(crate) fn plan_container(
    asked: &Asked<'_>,
    sandbox: &SandboxStatus,
) -> Result<ContainerConfig, CriError> {
    let config = asked.config;
    if !config.cdi_devices.is_empty() {
        let rule = format!("CDI devices are not served by handler {HOST_HANDLER:?}");
        return Err(CriError::invalid("config.CDI_devices", rule));
    }
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let resources = linux.resources.unwrap_or_default();
    let host = HostContainer {
        pid: pid(&context, sandbox)?,
        mounts: config
            .mounts
            .iter()
            .enumerate()
            .map(|(index, mount)| mount_of(index, mount))
            .collect::<Result<_, _>>()?,
        devices: config.devices.iter().map(device).collect(),
        seccomp: seccomp(&context)?,
        apparmor: apparmor(&context)?,
        ambient_capabilities: context
            .capabilities
            .as_ref()
            .map(|capabilities| capabilities.add_ambient_capabilities.clone())
            .unwrap_or_default(),
        limits: limits(&resources)?,
    };
    // The rest is as for a VM, without what only the host has.
    let mut plain = config.clone();
    plain.devices.clear();
    if let Some(linux) = &mut plain.linux {
        if let Some(context) = &mut linux.security_context {
            strip(context);
        }
        linux.resources = Some(guest_limits(&resources));
    }
    let plain = Asked {
        config: &plain,
        ..*asked
    };
    let mut guest = sandbox.clone();
    guest.config.share_process_namespace = false;
    Ok(ContainerConfig {
        memo: memo::of_container(config),
        host: Some(host),
        ..container::plan(
            &plain,
            &guest,
            &mounts::Plan::default(),
            Confinement::default(),
        )?
    })
}

/// Takes away what a VM would refuse and the host part tells.
fn strip(context: &mut v1::LinuxContainerSecurityContext) {
    context.namespace_options = None;
    context.seccomp = None;
    context.apparmor = None;
    #[allow(deprecated, reason = "older clients send them")]
    {
        context.seccomp_profile_path.clear();
        context.apparmor_profile.clear();
    }
    if let Some(capabilities) = &mut context.capabilities {
        capabilities.add_ambient_capabilities.clear();
    }
}

/// Those limits that a VM has too.
fn guest_limits(resources: &v1::LinuxContainerResources) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpuset_cpus: String::new(),
        cpuset_mems: String::new(),
        hugepage_limits: Vec::new(),
        ..resources.clone()
    }
}

fn pid(
    context: &v1::LinuxContainerSecurityContext,
    sandbox: &SandboxStatus,
) -> Result<PidNamespace, CriError> {
    let options = context.namespace_options.clone().unwrap_or_default();
    check_users(SANDBOX, &options)?;
    let field = |name: &str| format!("{SANDBOX}.namespace_options.{name}");
    let differs = |name: &str| {
        Err(CriError::invalid(
            field(name),
            "must be as the sandbox has it",
        ))
    };
    if context.namespace_options.is_some() {
        let node = NamespaceMode::Node;
        if (options.network() == node) != sandbox.config.network.is_none() {
            return differs("network");
        }
        let host = sandbox.config.host.unwrap_or_default();
        if (options.ipc() == node) != host.host_ipc {
            return differs("ipc");
        }
    }
    let shared = sandbox.config.share_process_namespace;
    match options.pid() {
        // Without options: as the sandbox, which is POD too where nothing is said.
        NamespaceMode::Pod if shared || context.namespace_options.is_none() => Ok(match shared {
            true => PidNamespace::Pod,
            false => PidNamespace::Own,
        }),
        NamespaceMode::Pod => Err(CriError::invalid(
            field("pid"),
            "POD needs a sandbox with POD",
        )),
        NamespaceMode::Container => Ok(PidNamespace::Own),
        NamespaceMode::Node => Ok(PidNamespace::Host),
        NamespaceMode::Target => {
            let target = options.target_id.parse();
            let rule = "must be the id of a running container of the pod";
            let target = target.map_err(|_bad| CriError::invalid(field("target_id"), rule))?;
            Ok(PidNamespace::Container(target))
        }
    }
}

fn mount_of(index: usize, mount: &v1::Mount) -> Result<HostMount, CriError> {
    let invalid =
        |name: &str, rule: &str| CriError::invalid(format!("config.mounts[{index}].{name}"), rule);
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        let rule = "user namespaces are not served by handler \"host\"";
        return Err(invalid("uidMappings", rule));
    }
    let source = match &mount.image {
        Some(_) if !mount.readonly => {
            return Err(invalid(
                "readonly",
                "an image can only be mounted read-only",
            ));
        }
        Some(image) => HostMountSource::Image {
            image: image.image.clone(),
            sub_path: mount.image_sub_path.clone(),
        },
        None => HostMountSource::Path(PathBuf::from(&mount.host_path)),
    };
    let propagation = match mount.propagation() {
        v1::MountPropagation::PropagationPrivate => Propagation::Private,
        v1::MountPropagation::PropagationHostToContainer => Propagation::FromHost,
        v1::MountPropagation::PropagationBidirectional => Propagation::Both,
    };
    if mount.recursive_read_only && (!mount.readonly || propagation != Propagation::Private) {
        let rule = "needs readonly and PROPAGATION_PRIVATE beside it";
        return Err(invalid("recursive_read_only", rule));
    }
    Ok(HostMount {
        source,
        destination: mount.container_path.clone(),
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_read_only,
        propagation,
    })
}

/// The images that a container mounts, as they are named.
pub(crate) fn images(host: &mut HostContainer) -> impl Iterator<Item = &mut String> {
    host.mounts
        .iter_mut()
        .filter_map(|mount| match &mut mount.source {
            HostMountSource::Image { image, .. } => Some(image),
            HostMountSource::Path(_) => None,
        })
}

/// The image that a container on the host has at a path.
pub(crate) fn image_at(status: &ContainerStatus, path: &str) -> Option<String> {
    let mounts = &status.config.host.as_ref()?.mounts;
    mounts.iter().find_map(|mount| match &mount.source {
        HostMountSource::Image { image, .. } if mount.destination == path => Some(image.clone()),
        _ => None,
    })
}

fn device(device: &v1::Device) -> HostPodDevice {
    HostPodDevice {
        host: PathBuf::from(&device.host_path),
        container: PathBuf::from(&device.container_path),
        permissions: device.permissions.clone(),
    }
}

fn seccomp(context: &v1::LinuxContainerSecurityContext) -> Result<Seccomp, CriError> {
    if context.privileged {
        return Ok(Seccomp::Unconfined);
    }
    #[allow(deprecated, reason = "older clients send it")]
    let path = context.seccomp_profile_path.as_str();
    match (&context.seccomp, path) {
        (Some(profile), _) => Ok(match profile.profile_type() {
            ProfileType::RuntimeDefault => Seccomp::RuntimeDefault,
            ProfileType::Unconfined => Seccomp::Unconfined,
            ProfileType::Localhost => Seccomp::Localhost(local(&profile.localhost_ref)),
        }),
        (None, "runtime/default" | "docker/default") => Ok(Seccomp::RuntimeDefault),
        (None, "" | "unconfined") => Ok(Seccomp::Unconfined),
        (None, path) if path.starts_with("localhost/") => Ok(Seccomp::Localhost(local(path))),
        (None, _) => Err(CriError::invalid(
            format!("{SANDBOX}.seccomp_profile_path"),
            "must be runtime/default, unconfined or localhost/PATH",
        )),
    }
}

fn local(reference: &str) -> PathBuf {
    let path = reference.strip_prefix("localhost/").unwrap_or(reference);
    PathBuf::from(path)
}

fn apparmor(context: &v1::LinuxContainerSecurityContext) -> Result<Option<String>, CriError> {
    if context.privileged {
        return Ok(None);
    }
    #[allow(deprecated, reason = "older clients send it")]
    let old = context.apparmor_profile.as_str();
    let profile = match (&context.apparmor, old) {
        (Some(profile), _) => match profile.profile_type() {
            ProfileType::Unconfined => return Ok(None),
            ProfileType::RuntimeDefault => None,
            ProfileType::Localhost => Some(profile.localhost_ref.as_str()),
        },
        (None, "" | "unconfined") => return Ok(None),
        (None, "runtime/default") => None,
        (None, old) => Some(old),
    };
    let invalid = |rule: &str| CriError::invalid(format!("{SANDBOX}.apparmor"), rule);
    let on = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !on.is_ok_and(|text| text.starts_with('Y')) {
        return Err(invalid(
            "the node's kernel has no AppArmor: only Unconfined can be had",
        ));
    }
    let name = profile.ok_or_else(|| {
        invalid("this node has no default profile: Localhost with a loaded one, or Unconfined")
    })?;
    Ok(Some(name.trim_start_matches("localhost/").to_owned()))
}

/// Limits as the host's cgroups take them.
fn limits(resources: &v1::LinuxContainerResources) -> Result<HostLimits, CriError> {
    for (field, value) in [
        ("cpu_period", resources.cpu_period),
        ("cpu_shares", resources.cpu_shares),
        ("memory_limit_in_bytes", resources.memory_limit_in_bytes),
    ] {
        if value < 0 {
            let field = format!("config.linux.resources.{field}");
            return Err(CriError::invalid(field, "must not be negative"));
        }
    }
    Ok(HostLimits {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory: resources.memory_limit_in_bytes,
        memory_swap: resources.memory_swap_limit_in_bytes,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepages: resources
            .hugepage_limits
            .iter()
            .map(|limit| (limit.page_size.clone(), limit.limit))
            .collect(),
        unified: resources.unified.clone().into_iter().collect(),
    })
}

impl Service {
    /// New limits of a container on the host, in its cgroups.
    pub(crate) async fn update_on_host(
        &self,
        status: &ContainerStatus,
        update: &v1::LinuxContainerResources,
    ) -> Result<(), CriError> {
        let mut asked = memo::container(&status.config.memo);
        let linux = asked.linux.get_or_insert_default();
        let old = linux.resources.take().unwrap_or_default();
        let merged = resources::merged(&old, update);
        let config = resources::of_container("linux", &guest_limits(&merged))?;
        let limits = limits(&merged)?;
        linux.resources = Some(merged);
        let update = ContainerUpdate {
            resources: config,
            memo: memo::of_container(&asked),
            host: Some(limits),
        };
        Ok(self.runtime.update_container(&status.id, update).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(namespaces: &[&str], default_for: &[&str]) -> CriConfig {
        let all = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut node = CriConfig::new(PathBuf::from("/state"));
        node.host = HostHandler {
            namespaces: all(namespaces),
            default_for: all(default_for),
        };
        node
    }

    fn request(
        handler: &str,
        namespace: &str,
        options: v1::NamespaceOption,
    ) -> v1::RunPodSandboxRequest {
        v1::RunPodSandboxRequest {
            runtime_handler: handler.into(),
            config: Some(v1::PodSandboxConfig {
                metadata: Some(v1::PodSandboxMetadata {
                    name: "p".into(),
                    namespace: namespace.into(),
                    uid: "u".into(),
                    attempt: 0,
                }),
                linux: Some(v1::LinuxPodSandboxConfig {
                    security_context: Some(v1::LinuxSandboxSecurityContext {
                        namespace_options: Some(options),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }
    }

    fn on_host() -> v1::NamespaceOption {
        v1::NamespaceOption {
            network: NamespaceMode::Node.into(),
            pid: NamespaceMode::Node.into(),
            ipc: NamespaceMode::Node.into(),
            ..Default::default()
        }
    }

    #[test]
    fn only_named_namespaces_get_to_the_node_s_kernel() {
        let on = node(&["kube-system", "agents-*"], &[]);
        let asked = |handler: &str, namespace: &str, node: &CriConfig| {
            is_asked(&request(handler, namespace, on_host()), node)
        };
        assert!(asked("host", "kube-system", &on).unwrap());
        assert!(asked("host", "agents-net", &on).unwrap());
        let refused = asked("host", "kube-systemx", &on).unwrap_err().to_string();
        assert!(
            refused.contains("kube-systemx") && refused.contains(SETTING),
            "{refused}"
        );
        let off = asked("host", "kube-system", &node(&[], &[]))
            .unwrap_err()
            .to_string();
        assert!(off.contains("is off") && off.contains(SETTING), "{off}");
        for handler in ["", "hyper"] {
            assert!(
                !asked(handler, "kube-system", &on).unwrap(),
                "not in silence"
            );
        }
    }

    #[test]
    fn a_default_needs_the_setting_the_namespace_and_the_wish() {
        let on = node(&["kube-system"], &["kube-system", "other"]);
        let asked = |handler: &str, namespace: &str, options| {
            is_asked(&request(handler, namespace, options), &on).unwrap()
        };
        assert!(asked("", "kube-system", on_host()));
        assert!(
            !asked("", "kube-system", v1::NamespaceOption::default()),
            "no wish"
        );
        assert!(!asked("hyper", "kube-system", on_host()), "another handler");
        assert!(!asked("", "other", on_host()), "may not use it");
    }

    #[test]
    fn a_sandbox_keeps_its_request_and_says_what_it_is() {
        let node = node(&["kube-system"], &[]);
        let network = PodNetwork::Cni("cluster".parse().unwrap());
        let mut asked = request("host", "kube-system", on_host());
        if let Some(config) = &mut asked.config {
            config.port_mappings.push(v1::PortMapping {
                host_port: 80,
                container_port: 80,
                ..Default::default()
            });
        }
        let config = plan_sandbox(&asked, &node, &network).unwrap();
        assert_eq!(config.network, None);
        assert!(config.host.unwrap().host_ipc && !config.share_process_namespace);
        assert_eq!(memo::sandbox(&config.memo).runtime_handler, "host");
        if let Some(config) = &mut asked.config {
            let limit = ("kubernetes.io/egress-bandwidth".into(), "1M".into());
            config.annotations.extend([limit]);
        }
        assert!(
            plan_sandbox(&asked, &node, &network).is_err(),
            "the host's own traffic"
        );
        let pod = request("host", "kube-system", v1::NamespaceOption::default());
        let config = plan_sandbox(&pod, &node, &network).unwrap();
        assert_eq!(config.network.as_ref(), Some(network.id()));
        assert!(config.share_process_namespace);
    }
}

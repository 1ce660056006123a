//! A pod sandbox: from the request to the runtime, and back to what is shown of it.

use std::{collections::BTreeMap, path::PathBuf};

use hypernetes_network::{HostPort, Protocol};
use hypernetes_runtime::{DnsConfig, SandboxConfig, SandboxMetadata, SandboxState, SandboxStatus};
use hypernetes_types::{Bandwidth, KernelName, kinds::KERNEL_ANNOTATION};
use serde_json::json;

use crate::{
    HANDLER, HOST_HANDLER,
    config::CriConfig,
    filter::{self, metadata},
    lookup::shown,
    memo,
    network::PodNetwork,
    resources, security,
    status::CriError,
    users, v1,
};

/// Longest host name that Linux takes, less one that Kubernetes leaves.
const MAX_HOSTNAME: usize = 63;

/// The namespace of a request's pod; empty without one.
pub(crate) fn namespace(request: &v1::RunPodSandboxRequest) -> &str {
    let metadata = request
        .config
        .as_ref()
        .and_then(|config| config.metadata.as_ref());
    metadata.map_or("", |name| &name.namespace)
}

/// What the runtime shall boot.
pub(crate) fn plan(
    request: &v1::RunPodSandboxRequest,
    node: &CriConfig,
    network: &PodNetwork,
) -> Result<SandboxConfig, CriError> {
    check_handler(&request.runtime_handler)?;
    let required = |field: &str| CriError::invalid(field, "must be given");
    let config = request.config.as_ref().ok_or_else(|| required("config"))?;
    let name = config
        .metadata
        .as_ref()
        .ok_or_else(|| required("config.metadata"))?;
    for (field, value) in [
        ("name", &name.name),
        ("namespace", &name.namespace),
        ("uid", &name.uid),
    ] {
        let plain = !value.is_empty() && !value.contains(['/', '\0']) && !value.starts_with('.');
        if !plain || value.len() > 253 {
            return Err(CriError::invalid(
                format!("config.metadata.{field}"),
                "must be 1 to 253 characters without '/'",
            ));
        }
    }
    if config.windows.is_some() {
        return Err(CriError::invalid("config.windows", "this node runs Linux"));
    }
    let host_ports = host_ports(&config.port_mappings)?;
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    security::check_sandbox("config.linux.security_context", &context)?;
    let options = context.namespace_options.as_ref();
    let user_namespace = users::of("config.linux.security_context", options)?;
    let namespaces = context.namespace_options.unwrap_or_default();
    let size = resources::vm_size(&linux, &node.vm);
    Ok(SandboxConfig {
        metadata: SandboxMetadata {
            name: name.name.clone(),
            namespace: name.namespace.clone(),
            uid: name.uid.clone(),
            attempt: name.attempt,
        },
        hostname: hostname(&config.hostname, &name.name),
        network: Some(network.id().clone()),
        requested_address: None,
        host_ports,
        bandwidth: bandwidth(&config.annotations)?,
        kernel: kernel(&config.annotations)?,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        extras: resources::vm_extras(size, node),
        scratch_mib: node.vm.scratch_mib,
        dns: config
            .dns_config
            .clone()
            .map_or_else(DnsConfig::default, |dns| DnsConfig {
                servers: dns.servers,
                searches: dns.searches,
                options: dns.options,
            }),
        // The kubelet mounts its own /etc/hosts.
        hosts: Vec::new(),
        sysctls: sysctls(&linux.sysctls),
        share_process_namespace: namespaces.pid() == v1::NamespaceMode::Pod,
        user_namespace,
        log_directory: log_directory(config, name, node)?,
        cgroup_parent: Some(cgroup_parent(&linux.cgroup_parent, name, node)?),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        memo: memo::of_sandbox(request),
        host: None,
    })
}

/// Mappings that ask for a port of the node.
fn host_ports(mappings: &[v1::PortMapping]) -> Result<Vec<HostPort>, CriError> {
    let mut ports = Vec::new();
    for (at, mapping) in mappings.iter().enumerate() {
        if mapping.host_port == 0 {
            continue;
        }
        let field = |name: &str| format!("config.port_mappings[{at}].{name}");
        let port = |name: &str, value: i32| {
            u16::try_from(value)
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| CriError::invalid(field(name), "must be 1 to 65535"))
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(
                text.parse::<std::net::IpAddr>()
                    .map_err(|_bad| CriError::invalid(field("host_ip"), "must be an IP address"))?,
            ),
        };
        ports.push(HostPort {
            protocol: match v1::Protocol::try_from(mapping.protocol) {
                Ok(v1::Protocol::Tcp) => Protocol::Tcp,
                Ok(v1::Protocol::Udp) => Protocol::Udp,
                Ok(v1::Protocol::Sctp) => Protocol::Sctp,
                Err(_unknown) => {
                    return Err(CriError::invalid(
                        field("protocol"),
                        "must be TCP, UDP or SCTP",
                    ));
                }
            },
            host_port: port("host_port", mapping.host_port)?,
            container_port: port("container_port", mapping.container_port)?,
            host_ip: host_ip.filter(|address| !address.is_unspecified()),
        });
    }
    Ok(ports)
}

/// Refuses handlers that this node has not.
fn check_handler(handler: &str) -> Result<(), CriError> {
    match handler {
        "" | HANDLER => Ok(()),
        other => Err(CriError::invalid(
            "runtime_handler",
            format!("{:?} is not known; this node has {HANDLER:?}", shown(other)),
        )),
    }
}

fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Bandwidth, CriError> {
    Bandwidth::read(|key| annotations.get(key).map(String::as_str)).map_err(|error| {
        let field = format!("config.annotations[{}]", error.annotation);
        CriError::invalid(field, error.to_string())
    })
}

fn kernel(annotations: &BTreeMap<String, String>) -> Result<Option<KernelName>, CriError> {
    let named = annotations.get(KERNEL_ANNOTATION);
    named
        .map(|name| {
            name.parse().map_err(|error: hypernetes_types::IdError| {
                let field = format!("config.annotations[{KERNEL_ANNOTATION}]");
                CriError::invalid(field, error.to_string())
            })
        })
        .transpose()
}

/// As asked, or the pod's name as far as it can be one.
fn hostname(asked: &str, pod: &str) -> String {
    if !asked.is_empty() {
        return asked.to_owned();
    }
    let plain = |c: char| match c {
        c if c.is_ascii_alphanumeric() || c == '-' => c,
        _ => '-',
    };
    let name: String = pod.chars().map(plain).take(MAX_HOSTNAME).collect();
    match name.trim_matches('-') {
        "" => "pod".to_owned(),
        name => name.to_owned(),
    }
}

/// Kubernetes allows slashes for dots.
fn sysctls(asked: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let dotted = |(name, value): (&String, &String)| (name.replace('/', "."), value.clone());
    asked.iter().map(dotted).collect()
}

fn log_directory(
    config: &v1::PodSandboxConfig,
    name: &v1::PodSandboxMetadata,
    node: &CriConfig,
) -> Result<PathBuf, CriError> {
    if config.log_directory.is_empty() {
        let own = format!(
            "{}_{}_{}_{}",
            name.namespace, name.name, name.uid, name.attempt
        );
        return Ok(node.log_dir.join(own));
    }
    let path = PathBuf::from(&config.log_directory);
    let climbs = path
        .components()
        .any(|part| part == std::path::Component::ParentDir);
    if !path.is_absolute() || climbs {
        return Err(CriError::invalid(
            "config.log_directory",
            "must be an absolute path without ..",
        ));
    }
    Ok(path)
}

/// As asked: a path of the cgroupfs driver. Or one of the node's own.
fn cgroup_parent(
    asked: &str,
    name: &v1::PodSandboxMetadata,
    node: &CriConfig,
) -> Result<String, CriError> {
    if asked.is_empty() {
        return Ok(format!("{}/pod{}", node.cgroup_root, name.uid));
    }
    let plain = |part: std::path::Component<'_>| {
        matches!(
            part,
            std::path::Component::RootDir | std::path::Component::Normal(_)
        )
    };
    let path = std::path::Path::new(asked);
    if asked.contains('\0') || !path.components().all(plain) || path.components().count() < 2 {
        return Err(CriError::invalid(
            "config.linux.cgroup_parent",
            "must be a path below the root of the hierarchies (cgroup driver cgroupfs)",
        ));
    }
    Ok(asked.to_owned())
}

/// A sandbox in a list.
pub(crate) fn item(status: &SandboxStatus) -> v1::PodSandbox {
    v1::PodSandbox {
        id: status.id.to_string(),
        metadata: Some(metadata(&status.config)),
        state: filter::sandbox_state(status.state).into(),
        created_at: status.created_unix_nanos,
        labels: status.config.labels.clone(),
        annotations: status.config.annotations.clone(),
        runtime_handler: memo::sandbox(&status.config.memo).runtime_handler,
    }
}

/// All that is shown of a sandbox.
pub(crate) fn full(status: &SandboxStatus) -> v1::PodSandboxStatus {
    let request = memo::sandbox(&status.config.memo);
    let options = request
        .config
        .and_then(|config| config.linux)
        .and_then(|linux| linux.security_context)
        .and_then(|context| context.namespace_options)
        .unwrap_or_default();
    let address = status
        .address
        .filter(|_| status.state == SandboxState::Ready)
        .map(|address| address.to_string());
    v1::PodSandboxStatus {
        id: status.id.to_string(),
        metadata: Some(metadata(&status.config)),
        state: filter::sandbox_state(status.state).into(),
        created_at: status.created_unix_nanos,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: address.unwrap_or_default(),
            additional_ips: match status.state {
                SandboxState::Ready => more_addresses(status),
                _ => Vec::new(),
            },
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(options),
            }),
        }),
        labels: status.config.labels.clone(),
        annotations: status.config.annotations.clone(),
        runtime_handler: request.runtime_handler,
    }
}

fn more_addresses(status: &SandboxStatus) -> Vec<v1::PodIp> {
    let more = status.more_addresses.iter();
    more.map(|address| v1::PodIp {
        ip: address.to_string(),
    })
    .collect()
}

/// For whoever debugs.
pub(crate) fn info(status: &SandboxStatus) -> BTreeMap<String, String> {
    let info = json!({
        "handler": match status.config.host {
            Some(_) => HOST_HANDLER,
            None => HANDLER,
        },
        "kernelRelease": status.kernel_release,
        "vcpus": status.config.vcpus,
        "memoryMiB": status.config.memory_mib,
        "scratchMiB": status.config.scratch_mib,
        "cgroupParent": status.config.cgroup_parent,
        "failure": status.failure.as_ref().map(|failure| json!({
            "reason": failure.reason,
            "message": failure.message,
        })),
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

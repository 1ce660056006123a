//! A pod as the runtime takes it.

use std::{collections::BTreeMap, net::IpAddr};

use hypernetes_network::{HostPort, NetworkSpec, Protocol};
use hypernetes_runtime::{
    DnsConfig, HostAlias, IdMapping, SandboxConfig, SandboxMetadata, UserNamespace,
};
use hypernetes_types::{Bandwidth, BandwidthError, IdError, KernelName, kinds::KERNEL_ANNOTATION};
use k8s_openapi::api::core::v1::{Pod, PodSpec};

use crate::{
    config::NodeletConfig,
    resize,
    resources::{self, Capacity},
};

/// Users and groups of a pod with a user namespace. They are the guest's: which ones they are matters
/// to nobody outside of the VM.
const USERS: UserNamespace = {
    let ids = IdMapping {
        first: 65_536,
        count: 65_536,
    };
    UserNamespace {
        uids: ids,
        gids: ids,
    }
};

/// A pod that cannot become a sandbox.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("the pod has no spec")]
    NoSpec,
    #[error("annotation {KERNEL_ANNOTATION}")]
    Kernel(#[source] IdError),
    #[error("annotation {}", .0.annotation)]
    Bandwidth(#[source] BandwidthError),
    #[error("spec.hostAliases: {0:?} is not an address")]
    HostAlias(String),
    #[error("hostPort {port} of container {container}: hostIP {address:?} is not an address")]
    HostIp {
        container: String,
        port: i32,
        address: String,
    },
}

/// What the runtime shall boot.
pub(crate) fn config(
    pod: &Pod,
    attempt: u32,
    network: &NetworkSpec,
    node: &NodeletConfig,
    capacity: Capacity,
) -> Result<SandboxConfig, SandboxError> {
    let spec = pod.spec.as_ref().ok_or(SandboxError::NoSpec)?;
    let meta = &pod.metadata;
    let name = meta.name.clone().unwrap_or_default();
    let namespace = meta.namespace.clone().unwrap_or_default();
    let uid = meta.uid.clone().unwrap_or_default();
    let kernel = meta
        .annotations
        .as_ref()
        .and_then(|map| map.get(KERNEL_ANNOTATION))
        .map(|kernel| kernel.parse::<KernelName>().map_err(SandboxError::Kernel))
        .transpose()?;
    let bandwidth = Bandwidth::read(|key| {
        let annotations = meta.annotations.as_ref();
        annotations.and_then(|map| map.get(key)).map(String::as_str)
    })
    .map_err(SandboxError::Bandwidth)?;
    let mut hosts = Vec::new();
    for alias in spec.host_aliases.iter().flatten() {
        hosts.push(HostAlias {
            address: alias
                .ip
                .parse()
                .map_err(|_invalid| SandboxError::HostAlias(alias.ip.chars().take(64).collect()))?,
            names: alias.hostnames.clone().unwrap_or_default(),
        });
    }
    let sysctls = spec
        .security_context
        .iter()
        .flat_map(|context| context.sysctls.iter().flatten())
        .map(|sysctl| (sysctl.name.replace('/', "."), sysctl.value.clone()))
        .collect();
    let size = resources::vm_size(spec, node, capacity);
    Ok(SandboxConfig {
        hostname: hostname(pod),
        network: Some(network.id.clone()),
        requested_address: None,
        host_ports: host_ports(spec)?,
        bandwidth,
        kernel,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        extras: resize::room(spec, size, capacity),
        scratch_mib: node.scratch_mib,
        dns: dns(pod, network, &node.cluster_domain),
        hosts,
        sysctls,
        share_process_namespace: spec.share_process_namespace.unwrap_or(false),
        user_namespace: (spec.host_users == Some(false)).then_some(USERS),
        log_directory: node.log_directory(&namespace, &name, &uid),
        cgroup_parent: Some(format!("{}/pod{uid}", node.cgroup_root)),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        memo: String::new(),
        host: None,
        metadata: SandboxMetadata {
            name,
            namespace,
            uid,
            attempt,
        },
    })
}

/// Ports of the node that the pod's containers ask for.
fn host_ports(spec: &PodSpec) -> Result<Vec<HostPort>, SandboxError> {
    let mut ports = Vec::new();
    for container in spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
    {
        for port in container.ports.iter().flatten() {
            let number = |value: i32| u16::try_from(value).ok().filter(|port| *port > 0);
            let (Some(host_port), Some(container_port)) =
                (port.host_port.and_then(number), number(port.container_port))
            else {
                continue;
            };
            let host_ip = match port.host_ip.as_deref() {
                None | Some("") => None,
                Some(text) => {
                    let address: IpAddr = text.parse().map_err(|_bad| SandboxError::HostIp {
                        container: container.name.clone(),
                        port: port.container_port,
                        address: text.chars().take(64).collect(),
                    })?;
                    Some(address).filter(|address| !address.is_unspecified())
                }
            };
            ports.push(HostPort {
                protocol: match port.protocol.as_deref() {
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    _ => Protocol::Tcp,
                },
                host_port,
                container_port,
                host_ip,
            });
        }
    }
    Ok(ports)
}

/// `spec.hostname`, or the pod's name, shortened to what the kernel takes.
pub(crate) fn hostname(pod: &Pod) -> String {
    let wanted = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.hostname.as_deref())
        .filter(|name| !name.is_empty())
        .or(pod.metadata.name.as_deref())
        .unwrap_or("pod");
    let short: String = wanted.chars().take(63).collect();
    short.trim_end_matches(['-', '.']).to_owned()
}

/// resolv.conf by `dnsPolicy` and `dnsConfig`. `Default` means the node's resolver, which pods
/// reach through their network's own server; they only lose the cluster's search list.
fn dns(pod: &Pod, network: &NetworkSpec, domain: &str) -> DnsConfig {
    let Some(spec) = &pod.spec else {
        return DnsConfig::default();
    };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut dns = match spec.dns_policy.as_deref() {
        Some("None") => DnsConfig::default(),
        Some("Default") => DnsConfig {
            servers: vec![network.gateway.to_string()],
            ..DnsConfig::default()
        },
        _ => DnsConfig {
            servers: vec![network.gateway.to_string()],
            searches: vec![
                format!("{namespace}.svc.{domain}"),
                format!("svc.{domain}"),
                domain.to_owned(),
            ],
            options: vec!["ndots:5".to_owned()],
        },
    };
    if let Some(extra) = &spec.dns_config {
        dns.servers
            .extend(extra.nameservers.iter().flatten().cloned());
        dns.searches
            .extend(extra.searches.iter().flatten().cloned());
        for option in extra.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            let prefix = format!("{name}:");
            dns.options
                .retain(|old| old != name && !old.starts_with(&prefix));
            dns.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.clone(),
            });
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn build(pod: Value) -> Result<SandboxConfig, SandboxError> {
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let node = NodeletConfig::new(
            "n",
            "127.0.0.1".parse().unwrap(),
            "/state".into(),
            "10.42.0.0/16".parse().unwrap(),
        );
        let network = NetworkSpec {
            id: "acme.default".parse().unwrap(),
            cidr: "10.244.0.0/16".parse().unwrap(),
            gateway: "10.244.0.1".parse().unwrap(),
            egress: true,
            node_access: false,
            mtu: 1500,
            domain: "cluster.local".into(),
        };
        let capacity = Capacity {
            cpus: 2,
            memory_bytes: 1 << 33,
            storage_bytes: 1 << 33,
        };
        config(&pod, 1, &network, &node, capacity)
    }

    fn pod(spec: Value) -> Value {
        let mut spec = spec;
        spec["containers"] = json!([{"name": "c"}]);
        json!({"metadata": {"name": "web", "namespace": "acme", "uid": "u1"}, "spec": spec})
    }

    #[test]
    fn ports_of_the_node_are_asked_for() {
        let config = build(json!({
            "metadata": {"name": "p", "namespace": "default", "uid": "u"},
            "spec": {"containers": [{"name": "c", "ports": [
                {"containerPort": 80},
                {"containerPort": 53, "hostPort": 5353, "protocol": "UDP", "hostIP": "127.0.0.1"},
                {"containerPort": 81, "hostPort": 81, "hostIP": "0.0.0.0"},
            ]}]},
        }))
        .unwrap();
        let port = |protocol, host_port, container_port, host_ip: Option<&str>| HostPort {
            protocol,
            host_port,
            container_port,
            host_ip: host_ip.map(|text| text.parse().unwrap()),
        };
        assert_eq!(
            config.host_ports,
            [
                port(Protocol::Udp, 5353, 53, Some("127.0.0.1")),
                port(Protocol::Tcp, 81, 81, None),
            ]
        );
    }

    #[test]
    fn a_plain_pod() {
        let config = build(pod(json!({}))).unwrap();
        assert_eq!(config.hostname, "web");
        assert_eq!((config.vcpus, config.memory_mib), (1, 192));
        assert_eq!(config.metadata.attempt, 1);
        assert_eq!(
            config.log_directory.to_str(),
            Some("/state/logs/acme_web_u1")
        );
        assert_eq!(config.dns.servers, ["10.244.0.1"]);
        assert_eq!(
            config.dns.searches,
            [
                "acme.svc.cluster.local",
                "svc.cluster.local",
                "cluster.local"
            ]
        );
        assert_eq!(config.kernel, None);
    }

    #[test]
    fn dns_policies() {
        let none = build(pod(json!({"dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["192.0.2.1"], "searches": ["x"]}})))
        .unwrap();
        assert_eq!(
            (none.dns.servers, none.dns.searches),
            (vec!["192.0.2.1".into()], vec!["x".into()])
        );
        let merged = build(pod(json!({
            "dnsConfig": {"options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}})))
        .unwrap();
        assert_eq!(merged.dns.options, ["ndots:2", "edns0"]);
    }

    #[test]
    fn kernel_limits_and_hosts_are_checked() {
        let mut with_kernel = pod(json!({}));
        with_kernel["metadata"]["annotations"] = json!({"hypernetes.io/kernel": "debian"});
        assert_eq!(
            build(with_kernel).unwrap().kernel,
            Some("debian".parse().unwrap())
        );
        let mut limited = pod(json!({}));
        limited["metadata"]["annotations"] = json!({"kubernetes.io/egress-bandwidth": "10M"});
        let bandwidth = build(limited.clone()).unwrap().bandwidth;
        assert_eq!(
            (bandwidth.ingress_bps, bandwidth.egress_bps),
            (None, Some(10_000_000))
        );
        limited["metadata"]["annotations"] = json!({"kubernetes.io/ingress-bandwidth": "1"});
        let bad = build(limited);
        assert!(matches!(bad, Err(SandboxError::Bandwidth(_))));
        let bad = build(pod(
            json!({"hostAliases": [{"ip": "x", "hostnames": ["y"]}]}),
        ));
        assert!(matches!(bad, Err(SandboxError::HostAlias(_))));
    }
}

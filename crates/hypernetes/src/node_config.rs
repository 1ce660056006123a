//! The configuration file of `hypernetes node`.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, ensure};
use hypernetes_cri::{CriConfig, VmSizes};
use hypernetes_network::NetworkSpec;
use hypernetes_runtime::TemplateConfig;
use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;

use crate::parts::PartsOptions;

/// All settings with their defaults and what they mean.
pub(crate) const DEFAULT: &str = include_str!("node.yaml");

/// Name of the node's network.
const NETWORK: &str = "default";

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct NodeConfig {
    pub(crate) socket: PathBuf,
    stream_address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    kubelet_dir: PathBuf,
    host_paths: HostPaths,
    network: Network,
    vm: Vm,
    registries: Registries,
    run_dir: PathBuf,
    uid_base: u32,
    templates: usize,
    hyperstart: PathBuf,
    kernel_dir: PathBuf,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct HostPaths {
    copied: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Network {
    cidr: Ipv4Net,
    egress: bool,
    mtu: u32,
    domain: String,
    #[serde(rename = "upstreamDNS")]
    upstream_dns: Vec<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Vm {
    #[serde(rename = "memoryMiB")]
    memory_mib: u32,
    #[serde(rename = "overheadMiB")]
    overhead_mib: u32,
    vcpus: u32,
    #[serde(rename = "maxVCPUs")]
    max_vcpus: u32,
    #[serde(rename = "scratchMiB")]
    scratch_mib: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Registries {
    insecure: Vec<String>,
    mirrors: BTreeMap<String, Vec<String>>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        let cri = CriConfig::new(PathBuf::new());
        Self {
            socket: "/run/hypernetes/cri.sock".into(),
            stream_address: cri.stream_address,
            metrics_address: cri.metrics_address,
            kubelet_dir: cri.kubelet_dir,
            host_paths: HostPaths::default(),
            network: Network::default(),
            vm: Vm::default(),
            registries: Registries::default(),
            run_dir: crate::parts::RUN_DIR.into(),
            uid_base: 0x7000_0000,
            templates: TemplateConfig::default().most,
            hyperstart: PathBuf::new(),
            kernel_dir: PathBuf::new(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            cidr: Ipv4Net::new_assert([10, 88, 0, 0].into(), 16),
            egress: true,
            mtu: 1500,
            domain: "cluster.local".to_owned(),
            upstream_dns: Vec::new(),
        }
    }
}

impl Default for Vm {
    fn default() -> Self {
        let sizes = VmSizes::default();
        Self {
            memory_mib: sizes.memory_mib,
            overhead_mib: sizes.overhead_mib,
            vcpus: sizes.vcpus,
            max_vcpus: 0,
            scratch_mib: sizes.scratch_mib,
        }
    }
}

fn some(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

impl NodeConfig {
    /// Reads a file, or gives the defaults without one.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("configuration {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        // A file of comments only is a file without settings.
        let lines = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        let config: Self = match text.lines().any(lines) {
            true => serde_saphyr::from_str(text)?,
            false => Self::default(),
        };
        for path in [&config.socket, &config.kubelet_dir, &config.run_dir]
            .into_iter()
            .chain(&config.host_paths.copied)
        {
            ensure!(
                path.is_absolute(),
                "{} must be an absolute path",
                path.display()
            );
        }
        ensure!(
            config.network.cidr.prefix_len() <= 30,
            "network.cidr must have room for pods"
        );
        Ok(config)
    }

    /// For the parts below the interface.
    pub(crate) fn parts(&self) -> PartsOptions {
        PartsOptions {
            insecure_registries: self.registries.insecure.clone(),
            mirrors: self.registries.mirrors.clone(),
            upstream_dns: self.network.upstream_dns.clone(),
            hyperstart: some(&self.hyperstart),
            kernel_dir: some(&self.kernel_dir),
            run_dir: Some(self.run_dir.clone()),
            uid_base: self.uid_base,
            templates: self.templates,
            usual_vm: (
                self.vm.vcpus,
                self.vm.memory_mib.saturating_add(self.vm.overhead_mib),
            ),
        }
    }

    /// For the interface.
    pub(crate) fn cri(&self, state_dir: PathBuf, instance: &str) -> CriConfig {
        let cpus = thread::available_parallelism().map_or(1, |count| count.get());
        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        CriConfig {
            stream_address: self.stream_address,
            metrics_address: self.metrics_address,
            kubelet_dir: self.kubelet_dir.clone(),
            copied_paths: self.host_paths.copied.clone(),
            log_dir: state_dir.join("logs"),
            cgroup_root: format!("hypernetes-{instance}"),
            state_dir,
            vm: VmSizes {
                memory_mib: self.vm.memory_mib,
                overhead_mib: self.vm.overhead_mib,
                vcpus: self.vm.vcpus,
                max_vcpus: match self.vm.max_vcpus {
                    0 => cpus,
                    most => most,
                },
                scratch_mib: self.vm.scratch_mib,
            },
        }
    }

    /// The network of this node's pods.
    pub(crate) fn network(&self) -> Result<NetworkSpec> {
        let network = &self.network;
        let gateway = network.cidr.hosts().next();
        Ok(NetworkSpec {
            id: NETWORK.parse()?,
            cidr: IpNet::V4(network.cidr.trunc()),
            gateway: gateway.context("network.cidr has no addresses")?.into(),
            egress: network.egress,
            // The kubelet's probes come from there.
            node_access: true,
            mtu: network.mtu,
            domain: network.domain.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_default_is_the_default() {
        assert_eq!(NodeConfig::parse(DEFAULT).unwrap(), NodeConfig::default());
        assert_eq!(
            NodeConfig::parse("# nothing\n").unwrap(),
            NodeConfig::default()
        );
    }

    #[test]
    fn what_is_not_known_or_cannot_be_is_refused() {
        for bad in [
            "sockett: /x",
            "socket: relative",
            "network: {cidr: 10.0.0.0/32}",
            "hostPaths: {copied: [etc]}",
            "vm: {memory: 1}",
        ] {
            assert!(NodeConfig::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mirrors_are_named_per_registry_in_their_order() {
        let text =
            "registries:\n  mirrors:\n    docker.io: [https://a.example, http://127.0.0.1:5000]\n";
        let parts = NodeConfig::parse(text).unwrap().parts();
        assert_eq!(
            parts.mirrors["docker.io"],
            ["https://a.example", "http://127.0.0.1:5000"]
        );
    }

    #[test]
    fn one_setting_leaves_the_others() {
        let config = NodeConfig::parse("vm:\n  memoryMiB: 512\n").unwrap();
        assert_eq!(config.vm.memory_mib, 512);
        assert_eq!(config.vm.overhead_mib, Vm::default().overhead_mib);
        let network = config.network().unwrap();
        assert_eq!(network.gateway.to_string(), "10.88.0.1");
    }
}

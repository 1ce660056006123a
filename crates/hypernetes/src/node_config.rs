//! The configuration file of `hypernetes node`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, ensure};
use hypernetes_cri::{CriConfig, HostHandler, PodNetwork, SharedPath, TenantNetwork, VmSizes};
use hypernetes_network::NetworkSpec;
use hypernetes_runtime::TemplateConfig;
use hypernetes_types::NetworkId;
use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;

use crate::{
    cli::MAX_POOL,
    logs::LogOptions,
    parts::{CNI_NETWORK, CniOptions, HostPodsOptions, PartsOptions},
};

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
    pool: usize,
    host_handler: Host,
    pub(crate) logs: LogOptions,
    debug: Debug,
    hyperstart: PathBuf,
    kernel_dir: PathBuf,
}

/// What an operator may do to find faults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Debug {
    guest_exec: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Host {
    namespaces: Vec<String>,
    default_for: Vec<String>,
    runtime: PathBuf,
    conmon: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        let options = HostPodsOptions::default();
        Self {
            namespaces: Vec::new(),
            default_for: Vec::new(),
            runtime: options.runtime,
            conmon: options.conmon,
        }
    }
}

impl Host {
    fn check(&self) -> Result<()> {
        for (setting, patterns) in [
            ("namespaces", &self.namespaces),
            ("defaultFor", &self.default_for),
        ] {
            for pattern in patterns {
                let name = pattern.strip_suffix('*').unwrap_or(pattern);
                let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
                ensure!(
                    name.bytes().all(plain) && (1..=63).contains(&name.len()),
                    "hostHandler.{setting}: {pattern:?} must be the name of a namespace, or the beginning of names and *"
                );
            }
        }
        let named = |pattern: &&String| self.namespaces.contains(pattern);
        let known = self.handler();
        let unknown = self
            .default_for
            .iter()
            .find(|pattern| !named(pattern) && (pattern.ends_with('*') || !known.allows(pattern)));
        ensure!(
            unknown.is_none(),
            "hostHandler.defaultFor: {unknown:?} must be among hostHandler.namespaces"
        );
        for (setting, program) in [("runtime", &self.runtime), ("conmon", &self.conmon)] {
            ensure!(
                program.is_absolute() || program.components().count() == 1,
                "hostHandler.{setting}: {} must be the name of a program or an absolute path",
                program.display()
            );
        }
        Ok(())
    }

    fn handler(&self) -> HostHandler {
        HostHandler {
            namespaces: self.namespaces.clone(),
            default_for: self.default_for.clone(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct HostPaths {
    copied: Vec<PathBuf>,
    shared: Vec<Shared>,
    volumes: bool,
    devices: Vec<PathBuf>,
    virtiofsd: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Shared {
    path: PathBuf,
    #[serde(default)]
    read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Network {
    driver: Driver,
    cni: CniOptions,
    tenants: Vec<Tenant>,
    cidr: Ipv4Net,
    egress: bool,
    mtu: u32,
    domain: String,
    #[serde(rename = "upstreamDNS")]
    upstream_dns: Vec<SocketAddr>,
}

/// Where the usual pod's network comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Driver {
    #[default]
    Builtin,
    Cni,
}

/// A network of the built-in driver for the pods of some namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Tenant {
    name: String,
    namespaces: Vec<String>,
    cidr: Ipv4Net,
    #[serde(default = "yes")]
    egress: bool,
    #[serde(default)]
    host_ports: bool,
}

fn yes() -> bool {
    true
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
    #[serde(rename = "resizeVCPUs")]
    resize_vcpus: u32,
    #[serde(rename = "resizeMemoryMiB")]
    resize_memory_mib: u32,
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
            pool: TemplateConfig::default().pool,
            host_handler: Host::default(),
            logs: LogOptions::default(),
            debug: Debug::default(),
            hyperstart: PathBuf::new(),
            kernel_dir: PathBuf::new(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            driver: Driver::default(),
            cni: CniOptions::default(),
            tenants: Vec::new(),
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
            resize_vcpus: sizes.resize_vcpus,
            resize_memory_mib: sizes.resize_memory_mib,
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
        config.logs.check()?;
        ensure!(config.pool <= MAX_POOL, "pool must be 0 to {MAX_POOL}");
        ensure!(
            config.pool == 0 || config.templates > 0,
            "pool: its VMs come from templates, which must not be 0"
        );
        for path in [&config.socket, &config.kubelet_dir, &config.run_dir]
            .into_iter()
            .chain(&config.host_paths.copied)
            .chain([&config.network.cni.conf_dir])
            .chain(&config.network.cni.bin_dirs)
            .chain(&config.host_paths.devices)
            .chain(config.host_paths.shared.iter().map(|shared| &shared.path))
            .chain(some(&config.host_paths.virtiofsd).as_ref())
        {
            config.host_handler.check()?;
            ensure!(
                path.is_absolute(),
                "{} must be an absolute path",
                path.display()
            );
        }
        ensure!(
            !config
                .host_paths
                .shared
                .iter()
                .any(|shared| shared.path.parent().is_none()),
            "hostPaths.shared must not be the whole host"
        );
        ensure!(
            config.vm.resize_vcpus <= 64,
            "vm.resizeVCPUs must be at most 64"
        );
        ensure!(
            config.vm.resize_memory_mib <= 1 << 20,
            "vm.resizeMemoryMiB must be at most 1048576"
        );
        ensure!(
            config.network.cidr.prefix_len() <= 30,
            "network.cidr must have room for pods"
        );
        let mut namespaces = BTreeSet::new();
        for (at, tenant) in config.network.tenants.iter().enumerate() {
            let field = |name: &str| format!("network.tenants[{at}].{name}");
            let taken = [NETWORK, CNI_NETWORK].contains(&tenant.name.as_str());
            let before = &config.network.tenants[..at];
            let twice = before.iter().any(|other| other.name == tenant.name);
            ensure!(
                !taken && !twice && tenant.name.parse::<NetworkId>().is_ok(),
                "{} {:?} must be the name of no other network, in lower case",
                field("name"),
                tenant.name
            );
            ensure!(
                !tenant.namespaces.is_empty(),
                "{} must name the namespaces whose pods join it",
                field("namespaces")
            );
            for namespace in &tenant.namespaces {
                ensure!(
                    namespaces.insert(namespace),
                    "{}: {namespace:?} has a network already",
                    field("namespaces")
                );
            }
            ensure!(
                tenant.cidr.prefix_len() <= 30,
                "{} must have room for pods",
                field("cidr")
            );
        }
        Ok(config)
    }

    /// For the parts below the interface.
    pub(crate) fn parts(&self) -> PartsOptions {
        PartsOptions {
            insecure_registries: self.registries.insecure.clone(),
            mirrors: self.registries.mirrors.clone(),
            upstream_dns: self.network.upstream_dns.clone(),
            // Services of a cluster are kube-proxy's.
            node_ports: 30_000..=32_767,
            cni: (self.network.driver == Driver::Cni).then(|| self.network.cni.clone()),
            hyperstart: some(&self.hyperstart),
            kernel_dir: some(&self.kernel_dir),
            run_dir: Some(self.run_dir.clone()),
            uid_base: self.uid_base,
            templates: self.templates,
            pool: self.pool,
            host_pods: self.host_pods(),
            virtiofsd: some(&self.host_paths.virtiofsd),
            volumes: false,
            usual_vm: self.cri(PathBuf::new(), "").usual_vm(),
        }
    }

    /// For pods on the node's own kernel.
    /// Whether programs may be run in pods' VMs.
    pub(crate) fn guest_exec(&self) -> bool {
        self.debug.guest_exec
    }

    pub(crate) fn host_pods(&self) -> HostPodsOptions {
        HostPodsOptions {
            on: self.host_handler.handler().is_on(),
            runtime: self.host_handler.runtime.clone(),
            conmon: self.host_handler.conmon.clone(),
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
            shared_paths: self
                .host_paths
                .shared
                .iter()
                .map(|shared| SharedPath {
                    path: shared.path.clone(),
                    read_only: shared.read_only,
                })
                .collect(),
            devices: self.host_paths.devices.clone(),
            share_volumes: self.host_paths.volumes,
            log_dir: state_dir.join("logs"),
            cgroup_root: format!("hypernetes-{instance}"),
            state_dir,
            host: self.host_handler.handler(),
            vm: VmSizes {
                memory_mib: self.vm.memory_mib,
                overhead_mib: self.vm.overhead_mib,
                vcpus: self.vm.vcpus,
                max_vcpus: match self.vm.max_vcpus {
                    0 => cpus,
                    most => most,
                },
                resize_vcpus: self.vm.resize_vcpus,
                resize_memory_mib: self.vm.resize_memory_mib,
                scratch_mib: self.vm.scratch_mib,
            },
        }
    }

    /// What pods join, and the exceptions.
    pub(crate) fn networks(&self) -> Result<(PodNetwork, Vec<TenantNetwork>)> {
        let network = &self.network;
        let usual = match network.driver {
            Driver::Builtin => {
                PodNetwork::Own(self.network(NETWORK, network.cidr, network.egress)?)
            }
            Driver::Cni => PodNetwork::Cni(CNI_NETWORK.parse()?),
        };
        let tenants = network.tenants.iter().map(|tenant| {
            Ok(TenantNetwork {
                namespaces: tenant.namespaces.clone(),
                spec: self.network(&tenant.name, tenant.cidr, tenant.egress)?,
                host_ports: tenant.host_ports,
            })
        });
        Ok((usual, tenants.collect::<Result<_>>()?))
    }

    /// A network of the built-in driver.
    fn network(&self, name: &str, cidr: Ipv4Net, egress: bool) -> Result<NetworkSpec> {
        let network = &self.network;
        let gateway = cidr.hosts().next();
        Ok(NetworkSpec {
            id: name.parse()?,
            cidr: IpNet::V4(cidr.trunc()),
            gateway: gateway.context("the network has no addresses")?.into(),
            egress,
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
    fn the_printed_default_has_every_setting() {
        // A name that is not known is refused with the names that are, in each part.
        for part in [
            "",
            "hostPaths",
            "network",
            "network.cni",
            "vm",
            "registries",
            "hostHandler",
            "logs",
            "debug",
        ] {
            let parts = part.split('.').filter(|name| !name.is_empty());
            let mut printed: serde_json::Value = serde_saphyr::from_str(DEFAULT).unwrap();
            let mut wrong = "nothing: 0".to_owned();
            for name in parts.clone() {
                printed = printed[name].clone();
            }
            for name in parts.rev() {
                wrong = format!("{name}: {{{wrong}}}");
            }
            let refused = NodeConfig::parse(&wrong).unwrap_err();
            let refused = hypernetes_telemetry::chain(&*refused).to_string();
            let line = refused.lines().next().unwrap();
            let (_, names) = line.split_once("expected ").expect(&refused);
            let names = names.trim_start_matches("one of ").split(", ");
            for name in names.flat_map(|names| names.split(" or ")) {
                assert!(printed.get(name).is_some(), "{part}: {name}: {refused}");
            }
        }
    }

    #[test]
    fn what_is_not_known_or_cannot_be_is_refused() {
        for bad in [
            "sockett: /x",
            "socket: relative",
            "network: {cidr: 10.0.0.0/32}",
            "hostPaths: {copied: [etc]}",
            "hostPaths: {shared: [/srv]}",
            "hostPaths: {shared: [{path: srv}]}",
            "hostPaths: {shared: [{path: /}]}",
            "vm: {resizeVCPUs: 65}",
            "vm: {memory: 1}",
            "hostHandler: {namespaces: ['*']}",
            "hostHandler: {namespaces: [Kube]}",
            "hostHandler: {namespaces: [a], defaultFor: [b]}",
            "hostHandler: {namespaces: [a], defaultFor: ['a*']}",
            "hostHandler: {namespaces: [a], runtime: bin/runc}",
            "network: {driver: flannel}",
            "network: {cni: {confDir: net.d}}",
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
        let (PodNetwork::Own(network), tenants) = config.networks().unwrap() else {
            panic!("the built-in driver is the default");
        };
        assert_eq!(network.gateway.to_string(), "10.88.0.1");
        assert_eq!(tenants, []);
    }

    #[test]
    fn some_namespaces_have_networks_of_their_own() {
        let text = "network:\n  driver: cni\n  tenants:\n  - {name: acme, namespaces: [acme, acme-dev], cidr: 10.9.0.0/16}\n";
        let config = NodeConfig::parse(text).unwrap();
        let (usual, tenants) = config.networks().unwrap();
        assert_eq!(usual, PodNetwork::Cni("cni".parse().unwrap()));
        assert_eq!(tenants[0].spec.gateway.to_string(), "10.9.0.1");
        assert!(tenants[0].spec.egress && !tenants[0].host_ports);
        for bad in [
            "{name: cni, namespaces: [a], cidr: 10.9.0.0/16}",
            "{name: default, namespaces: [a], cidr: 10.9.0.0/16}",
            "{name: A/b, namespaces: [a], cidr: 10.9.0.0/16}",
            "{name: acme, namespaces: [], cidr: 10.9.0.0/16}",
            "{name: acme, namespaces: [a, a], cidr: 10.9.0.0/16}",
            "{name: acme, namespaces: [a], cidr: 10.9.0.0/31}",
            "{name: acme, namespaces: [a]}",
        ] {
            let text = format!("network:\n  tenants:\n  - {bad}\n");
            assert!(NodeConfig::parse(&text).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_host_handler_is_off_until_namespaces_are_named() {
        assert!(!NodeConfig::default().host_pods().on);
        let text = "hostHandler: {namespaces: [kube-system, 'net-*'], defaultFor: [net-a], runtime: /opt/crun}";
        let config = NodeConfig::parse(text).unwrap();
        assert!(config.host_pods().on);
        assert_eq!(config.host_pods().runtime, Path::new("/opt/crun"));
        let handler = config.cri("/state".into(), "x").host;
        assert!(handler.allows("net-b") && !handler.allows("default"));
    }
}

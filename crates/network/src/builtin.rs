//! The driver that needs nothing but this node's kernel.
//!
//! State is in three places: records on disk ([`crate::record`]), objects in the kernel, and tables
//! in memory which are rebuilt from the records. A record is written before its effects and removed
//! after them, so that whatever a crash leaves is either repeated or removed by
//! [`NetworkDriver::recover`].
//!
//! Calls run on blocking threads and are not interrupted when the caller goes away. Lock order:
//! a network's gate, the host's gate, tables.

mod api;
mod dial;
mod host;
mod network;
mod ports;
mod services;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use hypernetes_types::{NetworkId, SandboxId};
use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::{
    Attachment, HeldPort, Lease, NameRecord, NetworkDriver, NetworkError, NetworkServices,
    NetworkSpec, Parked, ParkedPlace, PodNetworkRequest,
    netns::{self, Namespace},
    plan::{Names, NetworkPlan, PodPlan, hex, namespace_prefix, service_table},
    record::{NetworkRecord, Records},
    tap,
};
pub use api::{ApiConnection, ApiPlace};
use network::Live;

/// Settings of [`BuiltinDriver`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltinConfig {
    /// The driver's own directory.
    pub state_dir: PathBuf,
    /// One to four characters of `a-z0-9` in the name of each object on the host, so that two
    /// daemons on one host do not meet.
    pub instance: String,
    /// Pool of the links between networks and the host; no network may overlap it.
    pub transit: Ipv4Net,
    /// Servers that resolve names for networks with egress, asked from the host.
    pub upstream_dns: Vec<SocketAddr>,
    /// Ports of the node that services can have ([`crate::ServicePort::node_port`]).
    pub node_ports: RangeInclusive<u16>,
}

impl BuiltinConfig {
    /// The settings for a daemon with that directory: the instance is derived from its path, the
    /// upstream servers are the host's.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        let state_dir = state_dir.into();
        let instance = hex(&Sha256::digest(state_dir.as_os_str().as_encoded_bytes())[..2]);
        let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        Self {
            state_dir,
            instance,
            transit: Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 16),
            upstream_dns: nameservers(&resolv_conf),
            node_ports: 30_000..=32_767,
        }
    }
}

/// The name servers of a resolv.conf(5).
fn nameservers(resolv_conf: &str) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, 53))
        .collect()
}

/// Networks as namespaces of this node; IPv4.
#[derive(Debug, Clone)]
pub struct BuiltinDriver {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: BuiltinConfig,
    records: Records,
    /// The namespace in which the daemon runs.
    host: Namespace,
    host_gate: Mutex<host::HostState>,
    tables: Mutex<Tables>,
    /// Who serves pods' connections to the API server.
    api: Mutex<Option<Arc<mpsc::Sender<ApiConnection>>>>,
}

#[derive(Debug, Default)]
struct Tables {
    networks: HashMap<NetworkId, Arc<Network>>,
    leases: BTreeMap<SandboxId, Lease>,
    /// What services have of the node's ports.
    node_ports: BTreeMap<NetworkId, BTreeSet<ports::NodePort>>,
}

/// A network and the lock that its operations hold.
#[derive(Debug)]
struct Network {
    names: Names,
    transit: Ipv4Net,
    gate: Mutex<Live>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic left half done is what a crash leaves: each operation can be repeated on it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let action = action.into();
    move |source| NetworkError::System {
        action,
        source: Box::new(source),
    }
}

impl BuiltinDriver {
    /// Opens the driver's state. Has no effect on the system; call [`NetworkDriver::recover`] next.
    /// The calling thread's network namespace is taken for the host's.
    pub fn open(config: BuiltinConfig) -> Result<Self, NetworkError> {
        let instance = &config.instance;
        if !(1..=4).contains(&instance.len())
            || !instance
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        {
            return Err(system(format!("use instance {instance:?}"))(
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "must be 1 to 4 characters of a-z and 0-9",
                ),
            ));
        }
        if config.transit.prefix_len() > 31 {
            return Err(system(format!("use transit pool {}", config.transit))(
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "must have room for two addresses",
                ),
            ));
        }
        let in_dir = |source| {
            system(format!(
                "open network state in {}",
                config.state_dir.display()
            ))(source)
        };
        let records = Records::open(&config.state_dir).map_err(in_dir)?;
        let mut tables = Tables::default();
        for lease in records.leases().map_err(in_dir)? {
            tables.leases.insert(lease.sandbox.clone(), lease);
        }
        for record in records.networks().map_err(in_dir)? {
            let last = tables.taken(&record.spec.id).last().copied();
            let id = record.spec.id.clone();
            if let Ok(plan) = NetworkPlan::new(&record.spec, config.transit, record.transit) {
                let services = service_table(&plan, &record.services.ports);
                let ports = ports::node_ports(&services);
                tables.node_ports.insert(id.clone(), ports);
            }
            let network = Network::new(&config.instance, Live::recorded(record, last));
            tables.networks.insert(id, Arc::new(network));
        }
        let host = Namespace::current().map_err(system("open the host's network namespace"))?;
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                records,
                host,
                host_gate: Mutex::default(),
                tables: Mutex::new(tables),
                api: Mutex::default(),
            }),
        })
    }

    /// Connections that pods make to the API server: to service ports with
    /// [`crate::Backends::Api`]. Whoever asked last gets them. Without it they are refused.
    pub fn api_connections(&self) -> mpsc::Receiver<ApiConnection> {
        self.inner.api_connections()
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let inner = Arc::clone(&self.inner);
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || span.in_scope(|| work(&inner)))
            .await
            .unwrap_or_else(|error| {
                Err(system("finish a network operation")(io::Error::other(
                    error,
                )))
            })
    }
}

#[async_trait]
impl NetworkDriver for BuiltinDriver {
    async fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetworkError> {
        let spec = spec.clone();
        self.run(move |inner| inner.ensure_network(&spec)).await
    }

    async fn delete_network(&self, id: &NetworkId) -> Result<(), NetworkError> {
        let id = id.clone();
        self.run(move |inner| inner.delete_network(&id)).await
    }

    async fn list_networks(&self) -> Result<Vec<NetworkSpec>, NetworkError> {
        self.run(|inner| Ok(inner.list_networks())).await
    }

    async fn attach(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError> {
        let (sandbox, network) = (sandbox.clone(), network.clone());
        let request = request.clone();
        self.run(move |inner| inner.attach(&sandbox, &network, &request))
            .await
    }

    async fn ready(&self, _network: &NetworkId) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn lease(&self, sandbox: &SandboxId) -> Result<Option<Lease>, NetworkError> {
        Ok(lock(&self.inner.tables).leases.get(sandbox).cloned())
    }

    async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let sandbox = sandbox.clone();
        self.run(move |inner| inner.detach(&sandbox)).await
    }

    async fn park(&self) -> Result<Parked, NetworkError> {
        self.run(|_| tap::park().map_err(system("park a tap")))
            .await
    }

    async fn attach_parked(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
        place: ParkedPlace,
    ) -> Result<Lease, NetworkError> {
        let (sandbox, network) = (sandbox.clone(), network.clone());
        let request = request.clone();
        self.run(move |inner| inner.attach_parked(&sandbox, &network, &request, place))
            .await
    }

    async fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError> {
        let id = id.clone();
        self.run(move |inner| inner.set_names(&id, names)).await
    }

    async fn set_services(
        &self,
        id: &NetworkId,
        services: NetworkServices,
    ) -> Result<(), NetworkError> {
        let id = id.clone();
        self.run(move |inner| inner.set_services(&id, services))
            .await
    }

    async fn dial(
        &self,
        network: &NetworkId,
        address: SocketAddr,
    ) -> Result<tokio::net::TcpStream, NetworkError> {
        let id = network.clone();
        let socket = self
            .run(move |inner| inner.gateway_socket(&id, address.ip()))
            .await?;
        socket
            .connect(address)
            .await
            .map_err(system(format!("connect to {address}")))
    }

    async fn recover(&self, alive: &[SandboxId]) -> Result<(), NetworkError> {
        let alive = alive.iter().cloned().collect();
        self.run(move |inner| inner.recover(&alive)).await
    }
}

impl Tables {
    /// The addresses of a network that are leased.
    fn taken(&self, network: &NetworkId) -> BTreeSet<Ipv4Addr> {
        self.of(network)
            .filter_map(|lease| match lease.address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            })
            .collect()
    }

    fn of(&self, network: &NetworkId) -> impl Iterator<Item = &Lease> {
        self.leases
            .values()
            .filter(move |lease| lease.network == *network)
    }

    fn pods(&self, network: &NetworkId) -> Vec<PodPlan> {
        self.of(network).filter_map(PodPlan::new).collect()
    }

    /// Ports of the node that lead to pods of the network, with the pods' addresses.
    fn held(&self, network: &NetworkId) -> Vec<(Ipv4Addr, HeldPort)> {
        self.of(network)
            .filter_map(|lease| match lease.address {
                IpAddr::V4(address) => Some((address, lease)),
                IpAddr::V6(_) => None,
            })
            .flat_map(|(address, lease)| {
                lease
                    .host_ports
                    .iter()
                    .map(move |held| (address, held.clone()))
            })
            .collect()
    }
}

impl Network {
    fn new(instance: &str, live: Live) -> Self {
        let record = live.record();
        let names = Names::new(instance, &record.spec.id);
        Self {
            names,
            transit: record.transit,
            gate: Mutex::new(live),
        }
    }
}

impl Inner {
    fn network(&self, id: &NetworkId) -> Option<Arc<Network>> {
        lock(&self.tables).networks.get(id).cloned()
    }

    fn list_networks(&self) -> Vec<NetworkSpec> {
        let networks = lock(&self.tables)
            .networks
            .values()
            .cloned()
            .collect::<Vec<_>>();
        let mut specs = networks
            .iter()
            .filter_map(|network| lock(&network.gate).existing_spec())
            .collect::<Vec<_>>();
        specs.sort_by(|a, b| a.id.cmp(&b.id));
        specs
    }

    fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetworkError> {
        // Refused before anything is remembered of it.
        let pool = self.config.transit;
        NetworkPlan::new(spec, pool, Ipv4Net::new_assert(pool.network(), 31))?;
        loop {
            let network = match self.network(&spec.id) {
                Some(network) => network,
                None => self.insert_network(spec)?,
            };
            let mut live = lock(&network.gate);
            // Deleted while we waited for it.
            if live.is_gone() {
                continue;
            }
            return self.ensure_live(&network, &mut live, spec);
        }
    }

    /// Gives a new network its transit link.
    fn insert_network(&self, spec: &NetworkSpec) -> Result<Arc<Network>, NetworkError> {
        let in_use = self.host_addresses()?;
        let mut tables = lock(&self.tables);
        if let Some(network) = tables.networks.get(&spec.id) {
            return Ok(Arc::clone(network));
        }
        let names = Names::new(&self.config.instance, &spec.id);
        if tables
            .networks
            .values()
            .any(|network| network.names == names)
        {
            return Err(NetworkError::Spec {
                network: spec.id.clone(),
                field: "id",
                rule: "must not have the hash of another network's id".to_owned(),
            });
        }
        let transit = {
            let taken = tables
                .networks
                .values()
                .map(|network| network.transit)
                .collect();
            host::choose_transit(self.config.transit, &self.config.instance, &taken, &in_use)
        }
        .ok_or_else(|| NetworkError::System {
            action: format!("join network {} to the host", spec.id),
            source: format!("no link of {} is free", self.config.transit).into(),
        })?;
        let record = NetworkRecord {
            spec: spec.clone(),
            transit,
            deleting: false,
            names: Vec::new(),
            services: NetworkServices::default(),
        };
        let network = Arc::new(Network::new(&self.config.instance, Live::new(record)));
        tables
            .networks
            .insert(spec.id.clone(), Arc::clone(&network));
        Ok(network)
    }

    fn delete_network(&self, id: &NetworkId) -> Result<(), NetworkError> {
        let Some(network) = self.network(id) else {
            return Ok(());
        };
        let mut live = lock(&network.gate);
        if live.is_gone() {
            return Ok(());
        }
        let pods = lock(&self.tables).of(id).count();
        if pods > 0 {
            return Err(NetworkError::InUse {
                network: id.clone(),
                pods,
            });
        }
        self.remove_live(&network, &mut live)
    }

    fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError> {
        let network = self
            .network(id)
            .ok_or_else(|| NetworkError::NoNetwork(id.clone()))?;
        let mut live = lock(&network.gate);
        live.check_exists(id)?;
        self.set_live_names(&network, &mut live, names)
    }

    fn recover(&self, alive: &BTreeSet<SandboxId>) -> Result<(), NetworkError> {
        let mut failures = Vec::new();
        let dead = {
            let tables = lock(&self.tables);
            tables
                .leases
                .keys()
                .filter(|id| !alive.contains(*id))
                .cloned()
                .collect::<Vec<_>>()
        };
        for sandbox in dead {
            failures.extend(self.detach(&sandbox).err());
        }
        let networks = lock(&self.tables)
            .networks
            .values()
            .cloned()
            .collect::<Vec<_>>();
        for network in networks {
            let mut live = lock(&network.gate);
            if live.is_gone() {
                continue;
            }
            let result = if live.is_deleting() {
                self.remove_live(&network, &mut live)
            } else {
                self.repair_live(&network, &mut live)
            };
            failures.extend(result.err());
        }
        failures.extend(self.sweep_host().err());
        for failure in failures.iter().skip(1) {
            tracing::warn!(error = %failure, cause = ?failure, "network recovery");
        }
        failures.into_iter().next().map_or(Ok(()), Err)
    }

    /// Removes what carries this instance's names and belongs to no known network.
    fn sweep_host(&self) -> Result<(), NetworkError> {
        let known = {
            let tables = lock(&self.tables);
            let names = tables
                .networks
                .values()
                .map(|network| network.names.clone());
            names.collect::<Vec<_>>()
        };
        self.sweep_links(&known.iter().map(|names| names.host_link.as_str()).collect())?;
        let prefix = namespace_prefix(&self.config.instance);
        for name in netns::list(&prefix).map_err(system("list network namespaces"))? {
            if !known.iter().any(|names| names.namespace == name) {
                tracing::info!(namespace = name, "removing an unknown network namespace");
                netns::delete(&name).map_err(system(format!("delete network namespace {name}")))?;
            }
        }
        self.release_host()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_of_a_resolv_conf() {
        let text =
            "# x\nnameserver 10.0.0.53\nsearch a\n nameserver\tfd00::1 # y\nnameserver bad\n";
        assert_eq!(
            nameservers(text),
            [
                "10.0.0.53:53".parse().unwrap(),
                "[fd00::1]:53".parse().unwrap()
            ]
        );
    }

    #[test]
    fn instance_is_checked_and_depends_on_the_directory() {
        let one = BuiltinConfig::new("/var/lib/a");
        assert_eq!(one.instance.len(), 4);
        assert_ne!(one.instance, BuiltinConfig::new("/var/lib/b").instance);
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "abcde", "a-b", "A", "a*"] {
            let mut config = BuiltinConfig::new(dir.path());
            config.instance = bad.to_owned();
            assert!(BuiltinDriver::open(config).is_err(), "{bad}");
        }
    }
}

//! Pods on the cluster's network, by CNI plugins (specification 0.3 to 1.1).
//!
//! Each pod has a network namespace of its own, in which the administrator's plugins make an
//! interface as for any container. A VM gets that interface's MAC address, addresses and routes,
//! and is joined with it by tc redirects ([`place`]); the processes of a pod that is no VM run in
//! the namespace.
//!
//! What was asked of the plugins is recorded before they run, with the configuration that they ran
//! by, so that they can be asked to take it back after a crash or a change of the configuration.

mod conflist;
mod place;
mod plugin;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hypernetes_types::{Bandwidth, NetworkId, SandboxId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Attachment, Lease, NamespacePlace, NetworkError, ParkedPlace, PodNetworkRequest,
    netns::{self, DirBefore, Namespace},
    plan::{Bucket, hex},
    record, tap,
};
use conflist::ConfList;
use place::{INTERFACE, Interface};
use plugin::Call;

/// The first version with `CHECK`, and the first with `GC` and `STATUS`.
const WITH_CHECK: &str = "0.4.0";
const WITH_GC: &str = "1.1.0";

/// Settings of [`CniDriver`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// The driver's own directory.
    pub state_dir: PathBuf,
    /// In the name of each namespace, so that two daemons on one host do not meet.
    pub instance: String,
    /// The network that it serves.
    pub network: NetworkId,
    /// Where administrators put configurations: `/etc/cni/net.d`. The first file counts.
    pub conf_dir: PathBuf,
    /// Where plugins are: `/opt/cni/bin`, `/usr/lib/cni`.
    pub bin_dirs: Vec<PathBuf>,
    /// Guests may send with the MAC and IP addresses of their interface only.
    pub anti_spoofing: bool,
    /// At the start, tells plugins of which pods are there, so that they release what others have
    /// (`GC`). Only for networks that no other runtime of this node uses.
    pub collect_garbage: bool,
}

/// Pods' places by CNI plugins. Clones are the same.
#[derive(Debug, Clone)]
pub struct CniDriver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: CniConfig,
    records: PathBuf,
    pods: Mutex<BTreeMap<SandboxId, Record>>,
    /// Held by whatever is done about one sandbox.
    gates: Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>>,
    /// Held while the first pod comes or the last goes.
    host: tokio::sync::Mutex<()>,
}

/// A pod that plugins were asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    sandbox: SandboxId,
    /// Name of its network namespace.
    namespace: String,
    /// The configuration that was in force.
    list: Value,
    request: PodNetworkRequest,
    /// What the last plugin answered; `None` before that.
    result: Option<Value>,
    lease: Option<Lease>,
}

/// What `/run/netns` was like before the first pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HostRecord {
    netns_dir: DirBefore,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let action = action.into();
    move |source| NetworkError::System {
        action,
        source: Box::new(source),
    }
}

async fn blocking<T: Send + 'static>(
    action: impl Into<String>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, NetworkError> {
    let result = tokio::task::spawn_blocking(work).await;
    let action = action.into();
    result
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
        .map_err(system(action))
}

impl Record {
    fn list(&self) -> Result<ConfList, NetworkError> {
        ConfList::parse(self.list.clone()).map_err(|why| {
            NetworkError::NotReady(format!("the recorded configuration of a pod: {why}"))
        })
    }

    /// `CNI_ARGS`, as Kubernetes' runtimes give them.
    fn arguments(&self) -> String {
        let pod = &self.request.pod;
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            pod.namespace, pod.name, self.sandbox, pod.uid
        )
    }

    /// What plugins get that declare the capability.
    fn runtime_config(&self) -> Map<String, Value> {
        let ports = &self.request.host_ports;
        let mut config = Map::new();
        if !ports.is_empty() {
            let mapping = |port: &crate::HostPort| {
                let mut mapping = json!({
                    "hostPort": port.host_port,
                    "containerPort": port.container_port,
                    "protocol": port.protocol.to_string(),
                });
                if let Some(address) = port.host_ip {
                    mapping["hostIP"] = address.to_string().into();
                }
                mapping
            };
            config.insert("portMappings".into(), ports.iter().map(mapping).collect());
        }
        let Bandwidth {
            ingress_bps,
            egress_bps,
        } = self.request.bandwidth;
        let mut limits = Map::new();
        for (direction, bps) in [("ingress", ingress_bps), ("egress", egress_bps)] {
            if let Some(bps) = bps {
                limits.insert(format!("{direction}Rate"), bps.into());
                limits.insert(
                    format!("{direction}Burst"),
                    Bucket::new(bps).burst_bits().into(),
                );
            }
        }
        if !limits.is_empty() {
            config.insert("bandwidth".into(), limits.into());
        }
        config
    }
}

impl CniDriver {
    /// Opens the driver's state. Call [`CniDriver::recover`] next.
    ///
    /// # Errors
    /// If the records cannot be read.
    pub fn open(config: CniConfig) -> Result<Self, NetworkError> {
        let records = config.state_dir.join("pods");
        let failed = || system(format!("open CNI state in {}", config.state_dir.display()));
        record::open_dir(&records).map_err(failed())?;
        let pods = record::list::<Record>(&records).map_err(failed())?;
        let pods = pods
            .into_iter()
            .map(|record| (record.sandbox.clone(), record))
            .collect();
        Ok(Self(Arc::new(Inner {
            config,
            records,
            pods: Mutex::new(pods),
            gates: Mutex::default(),
            host: tokio::sync::Mutex::default(),
        })))
    }

    /// The network that it serves.
    pub fn network(&self) -> &NetworkId {
        &self.0.config.network
    }

    /// A VM's place; see [`crate::NetworkDriver::attach`].
    ///
    /// # Errors
    /// If plugins or the system refuse. What was begun is taken back, or will be by
    /// [`CniDriver::detach`].
    pub async fn attach(
        &self,
        sandbox: &SandboxId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError> {
        let open = |namespace: &Namespace, name: &str| tap::open(namespace, name);
        let (tap, lease) = self.attach_with(sandbox, request, open).await?;
        Ok(Attachment { tap, lease })
    }

    /// The place of a VM that has a parked tap; see [`crate::NetworkDriver::attach_parked`].
    ///
    /// # Errors
    /// As [`CniDriver::attach`].
    pub async fn attach_parked(
        &self,
        sandbox: &SandboxId,
        request: &PodNetworkRequest,
        place: ParkedPlace,
    ) -> Result<Lease, NetworkError> {
        let unpark = |namespace: &Namespace, name: &str| tap::unpark(place, namespace, name);
        let ((), lease) = self.attach_with(sandbox, request, unpark).await?;
        Ok(lease)
    }

    /// A VM's place with the tap that `provide` makes be there.
    async fn attach_with<T: Send + 'static>(
        &self,
        sandbox: &SandboxId,
        request: &PodNetworkRequest,
        provide: impl FnOnce(&Namespace, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<(T, Lease), NetworkError> {
        let (sandbox, request) = (sandbox.clone(), request.clone());
        self.whole(async move |inner| {
            let (record, lease) = inner.place(&sandbox, &request).await?;
            match inner.connect(&record, provide).await {
                Ok(tap) => Ok((tap, lease)),
                Err(error) => {
                    inner.undo(&record, &error).await;
                    Err(error)
                }
            }
        })
        .await
    }

    /// A place in a namespace; see [`crate::NetworkDriver::join`].
    ///
    /// # Errors
    /// As [`CniDriver::attach`].
    pub async fn join(
        &self,
        sandbox: &SandboxId,
        request: &PodNetworkRequest,
    ) -> Result<NamespacePlace, NetworkError> {
        let (sandbox, request) = (sandbox.clone(), request.clone());
        self.whole(async move |inner| {
            let (record, lease) = inner.place(&sandbox, &request).await?;
            Ok(NamespacePlace {
                namespace: netns::path(&record.namespace),
                lease,
            })
        })
        .await
    }

    /// The address of a sandbox, if it has one.
    pub fn lease(&self, sandbox: &SandboxId) -> Option<Lease> {
        lock(&self.0.pods).get(sandbox)?.lease.clone()
    }

    /// Has the plugins take back what they made, and removes the namespace.
    ///
    /// # Errors
    /// If a plugin refuses; repeat it.
    pub async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        if !lock(&self.0.pods).contains_key(sandbox) {
            return Ok(());
        }
        let sandbox = sandbox.clone();
        self.whole(async move |inner| {
            let gate = inner.gate(&sandbox);
            let _alone = gate.lock().await;
            let record = lock(&inner.pods).get(&sandbox).cloned();
            let result = match record {
                Some(record) => inner.remove(&record).await,
                None => Ok(()),
            };
            if result.is_ok() {
                lock(&inner.gates).remove(&sandbox);
            }
            result
        })
        .await
    }

    /// Whether there is a configuration whose plugins are there and, if they can say so, ready.
    ///
    /// # Errors
    /// What is missing.
    pub async fn ready(&self) -> Result<(), NetworkError> {
        let inner = &self.0;
        let list = inner.load().await?;
        if list.version.as_str() < WITH_GC {
            return Ok(());
        }
        let call = inner.call("STATUS", None);
        for (at, plugin) in list.types().enumerate() {
            let input = list.input(at, &Map::new(), None, None);
            call.run(plugin, input).await?;
        }
        Ok(())
    }

    /// After a restart: takes back what sandboxes have that are not in `alive`, and looks after the
    /// others.
    ///
    /// # Errors
    /// If something cannot be taken back; all the rest is.
    pub async fn recover(&self, alive: &[SandboxId]) -> Result<(), NetworkError> {
        let inner = &self.0;
        let records: Vec<_> = lock(&inner.pods).values().cloned().collect();
        let mut failure = None;
        for record in records {
            let lives = alive.contains(&record.sandbox) && record.lease.is_some();
            let result = if lives {
                if let Err(error) = inner.check(&record).await {
                    tracing::warn!(%error, sandbox = %record.sandbox, "the pod's network is not as it was made");
                }
                Ok(())
            } else {
                self.detach(&record.sandbox).await
            };
            if let Err(error) = result {
                tracing::warn!(%error, sandbox = %record.sandbox, "cannot release a pod's network");
                failure.get_or_insert(error);
            }
        }
        inner.sweep().await?;
        if inner.config.collect_garbage
            && let Err(error) = inner.collect_garbage().await
        {
            tracing::warn!(%error, "CNI garbage collection");
        }
        failure.map_or(Ok(()), Err)
    }

    /// Runs to its end whatever becomes of the caller.
    async fn whole<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetworkError>> + Send + 'static,
    {
        let span = tracing::Span::current();
        let work = tracing::Instrument::instrument(work(Arc::clone(&self.0)), span);
        tokio::spawn(work).await.unwrap_or_else(|panic| {
            Err(system("finish a network operation")(io::Error::other(
                panic,
            )))
        })
    }
}

impl Inner {
    fn gate(&self, sandbox: &SandboxId) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(lock(&self.gates).entry(sandbox.clone()).or_default())
    }

    fn prefix(&self) -> String {
        format!("hc-{}-", self.config.instance)
    }

    fn call<'a>(
        &'a self,
        command: &'static str,
        attachment: Option<plugin::Attachment<'a>>,
    ) -> Call<'a> {
        Call {
            command,
            path: &self.config.bin_dirs,
            attachment,
        }
    }

    /// The configuration in force, with all plugins there.
    async fn load(&self) -> Result<ConfList, NetworkError> {
        let (conf, bins) = (self.config.conf_dir.clone(), self.config.bin_dirs.clone());
        let load = move || {
            let list = ConfList::load(&conf)?;
            plugin::check_programs(&bins, list.types())?;
            Ok(list)
        };
        tokio::task::spawn_blocking(load)
            .await
            .unwrap_or_else(|panic| {
                Err(system("read the CNI configuration")(io::Error::other(
                    panic,
                )))
            })
    }

    async fn put(&self, record: &Record) -> Result<(), NetworkError> {
        let (dir, written) = (self.records.clone(), record.clone());
        blocking(
            format!("record the network of {}", record.sandbox),
            move || record::put(&dir, written.sandbox.as_str(), &written),
        )
        .await?;
        lock(&self.pods).insert(record.sandbox.clone(), record.clone());
        Ok(())
    }

    /// The sandbox's place: the one that it has, or a new one.
    async fn place(
        &self,
        sandbox: &SandboxId,
        request: &PodNetworkRequest,
    ) -> Result<(Record, Lease), NetworkError> {
        let gate = self.gate(sandbox);
        let _alone = gate.lock().await;
        let known = lock(&self.pods).get(sandbox).cloned();
        if let Some(record) = known {
            let there = matches!(Namespace::open(&record.namespace), Ok(Some(_)));
            if let (Some(lease), true) = (record.lease.clone(), there) {
                return Ok((record, lease));
            }
            // Begun by a daemon that was killed.
            self.remove(&record).await?;
        }
        if let Some(address) = request.address {
            return Err(NetworkError::Address {
                address,
                network: self.config.network.clone(),
                reason: "addresses are given by the CNI plugins",
            });
        }
        let list = self.load().await?;
        list.check_capabilities(request)?;
        let mut record = Record {
            sandbox: sandbox.clone(),
            namespace: format!("{}{sandbox}", self.prefix()),
            list: list.to_value(),
            request: request.clone(),
            result: None,
            lease: None,
        };
        {
            let _host = self.host.lock().await;
            self.ensure_host().await?;
            self.put(&record).await?;
        }
        match self.add(&list, &mut record).await {
            Ok(lease) => Ok((record, lease)),
            Err(error) => {
                if let Err(cleanup) = self.remove(&record).await {
                    tracing::warn!(%error, %cleanup, %sandbox, "cannot undo a failed attachment");
                }
                Err(error)
            }
        }
    }

    /// Has the plugins make the interface.
    async fn add(&self, list: &ConfList, record: &mut Record) -> Result<Lease, NetworkError> {
        let name = record.namespace.clone();
        let namespace = blocking(format!("make network namespace {name}"), move || {
            place::make(&name)
        })
        .await?;
        let (path, arguments) = (self.namespace_path(record), record.arguments());
        let call = self.call("ADD", Some(attachment(record, &path, &arguments)));
        let runtime = record.runtime_config();
        let mut result = None;
        for (at, plugin) in list.types().enumerate() {
            let input = list.input(at, &runtime, result.as_ref(), None);
            let answer = call.run(plugin, input).await?;
            result = Some(answer.ok_or_else(|| NetworkError::Plugin {
                plugin: plugin.to_owned(),
                command: "ADD",
                message: "it answers nothing".to_owned(),
            })?);
        }
        let interface = blocking(format!("read {INTERFACE} of the pod"), move || {
            place::read(&namespace)
        })
        .await?;
        let result = result.unwrap_or_default();
        let lease = self.lease_of(record, &interface, &result)?;
        record.result = Some(result);
        record.lease = Some(lease.clone());
        self.put(record).await?;
        Ok(lease)
    }

    fn lease_of(
        &self,
        record: &Record,
        interface: &Interface,
        result: &Value,
    ) -> Result<Lease, NetworkError> {
        let address = interface.prefixes.first().map(ipnet::IpNet::addr);
        let address = address.ok_or_else(|| {
            NetworkError::NotReady(format!("the plugins gave {INTERFACE} no address"))
        })?;
        let by_default = interface.routes.iter().find(|route| {
            route.destination.prefix_len() == 0
                && route.destination.addr().is_ipv4() == address.is_ipv4()
        });
        let dns = result.get("dns");
        let words = |field: &str| -> Vec<String> {
            let list = dns.and_then(|dns| dns.get(field)).and_then(Value::as_array);
            list.into_iter()
                .flatten()
                .filter_map(|word| Some(word.as_str()?.to_owned()))
                .collect()
        };
        Ok(Lease {
            sandbox: record.sandbox.clone(),
            network: self.config.network.clone(),
            address,
            gateway: by_default
                .and_then(|route| route.gateway)
                .unwrap_or(address),
            mac: interface.mac.map(|byte| hex(&[byte])).join(":"),
            device: INTERFACE.to_owned(),
            mtu: interface.mtu,
            dns: words("nameservers")
                .iter()
                .filter_map(|server| server.parse::<IpAddr>().ok())
                .collect(),
            search: words("search"),
            prefixes: interface.prefixes.clone(),
            routes: interface.routes.clone(),
            // The plugins hold them, and limit.
            host_ports: Vec::new(),
            bandwidth: Bandwidth::default(),
        })
    }

    async fn connect<T: Send + 'static>(
        &self,
        record: &Record,
        provide: impl FnOnce(&Namespace, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let (name, only_own) = (record.namespace.clone(), self.config.anti_spoofing);
        blocking("join the pod's interface with its VM", move || {
            let namespace = Namespace::open(&name)?
                .ok_or_else(|| io::Error::other("the network namespace is gone"))?;
            let interface = place::read(&namespace)?;
            place::connect(&namespace, &interface, only_own, provide)
        })
        .await
    }

    async fn undo(&self, record: &Record, error: &NetworkError) {
        let gate = self.gate(&record.sandbox);
        let _alone = gate.lock().await;
        if let Err(cleanup) = self.remove(record).await {
            tracing::warn!(%error, %cleanup, sandbox = %record.sandbox, "cannot undo a failed attachment");
        }
    }

    /// Empty when the namespace is gone: plugins then release what is outside of it.
    fn namespace_path(&self, record: &Record) -> String {
        match Namespace::open(&record.namespace) {
            Ok(Some(_)) => netns::path(&record.namespace).display().to_string(),
            _gone => String::new(),
        }
    }

    /// Has the plugins take back what they made, in the other order. The record goes last.
    async fn remove(&self, record: &Record) -> Result<(), NetworkError> {
        let list = record.list()?;
        let (path, arguments) = (self.namespace_path(record), record.arguments());
        let call = self.call("DEL", Some(attachment(record, &path, &arguments)));
        let runtime = record.runtime_config();
        let plugins: Vec<_> = list.types().enumerate().collect();
        for (at, plugin) in plugins.into_iter().rev() {
            let input = list.input(at, &runtime, record.result.as_ref(), None);
            call.run(plugin, input).await?;
        }
        let (dir, sandbox, name) = (
            self.records.clone(),
            record.sandbox.clone(),
            record.namespace.clone(),
        );
        blocking(format!("release the network of {sandbox}"), move || {
            netns::delete(&name)?;
            record::remove(&dir, sandbox.as_str())
        })
        .await?;
        lock(&self.pods).remove(&record.sandbox);
        self.release_host().await
    }

    /// Asks the plugins whether everything is as they made it.
    async fn check(&self, record: &Record) -> Result<(), NetworkError> {
        let list = record.list()?;
        if list.version.as_str() < WITH_CHECK || list.disable_check {
            return Ok(());
        }
        let (path, arguments) = (self.namespace_path(record), record.arguments());
        let call = self.call("CHECK", Some(attachment(record, &path, &arguments)));
        let runtime = record.runtime_config();
        for (at, plugin) in list.types().enumerate() {
            let input = list.input(at, &runtime, record.result.as_ref(), None);
            call.run(plugin, input).await?;
        }
        Ok(())
    }

    async fn collect_garbage(&self) -> Result<(), NetworkError> {
        let list = self.load().await?;
        if list.version.as_str() < WITH_GC || list.disable_gc {
            return Ok(());
        }
        let valid: Value = lock(&self.pods)
            .keys()
            .map(|sandbox| json!({"containerID": sandbox.as_str(), "ifname": INTERFACE}))
            .collect();
        let call = self.call("GC", None);
        for (at, plugin) in list.types().enumerate() {
            let more = ("cni.dev/valid-attachments", valid.clone());
            call.run(plugin, list.input(at, &Map::new(), None, Some(more)))
                .await?;
        }
        Ok(())
    }

    /// Removes namespaces with this driver's names that no record knows.
    async fn sweep(&self) -> Result<(), NetworkError> {
        let known: Vec<_> = {
            let pods = lock(&self.pods);
            pods.values()
                .map(|record| record.namespace.clone())
                .collect()
        };
        let prefix = self.prefix();
        blocking("remove unknown network namespaces", move || {
            for name in netns::list(&prefix)? {
                if !known.contains(&name) {
                    netns::delete(&name)?;
                }
            }
            Ok(())
        })
        .await?;
        self.release_host().await
    }

    async fn ensure_host(&self) -> Result<(), NetworkError> {
        let dir = self.config.state_dir.clone();
        blocking("prepare /run/netns", move || {
            if record::list::<HostRecord>(&dir)?.is_empty() {
                let before = HostRecord {
                    netns_dir: netns::dir_state()?,
                };
                record::put(&dir, "host", &before)?;
            }
            netns::ensure_dir()
        })
        .await
    }

    /// Leaves the host as before the first pod, after the last.
    async fn release_host(&self) -> Result<(), NetworkError> {
        let _host = self.host.lock().await;
        if !lock(&self.pods).is_empty() {
            return Ok(());
        }
        let dir = self.config.state_dir.clone();
        blocking("restore /run/netns", move || {
            for before in record::list::<HostRecord>(&dir)? {
                netns::restore_dir(before.netns_dir)?;
            }
            record::remove(&dir, "host")
        })
        .await
    }
}

fn attachment<'a>(
    record: &'a Record,
    namespace: &'a str,
    arguments: &'a str,
) -> plugin::Attachment<'a> {
    plugin::Attachment {
        container: record.sandbox.as_str(),
        namespace,
        interface: INTERFACE,
        arguments,
    }
}

//! A node without a host, for this crate's own tests: what outlives a runtime lives here.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use hypernetes_agent_api::{
    fake::{Behaviour, FakeAgent, Method},
    v1,
};
use hypernetes_image::{Credentials, Image, ImageConfig, ImageError, Layer};
use hypernetes_network::{
    Attachment, FakeDriver, Lease, NameRecord, NetworkDriver, NetworkError, NetworkServices,
    NetworkSpec, Parked, ParkedPlace, PodNetworkRequest,
};
use hypernetes_store::{Op, Store, StoreConfig};
use hypernetes_types::{
    ContainerId, CpuSet, Digest, ImageReference, KernelName, NetworkId, SandboxId,
};
use hypernetes_vmm::{
    Channel, Disk, GuestKernel, HostShare, Machine, Origin, Vm, VmEvent, VmExit, VmExtras,
    VmRecord, VmSpec, Vmm, VmmError, fake::FakeVmm,
};
use hypernetes_volume::{
    BlockDevice, Capacity, LocalConfig, LocalVolumes, VolumeDriver, VolumeError, VolumeId,
    VolumeInfo, VolumeMode,
};
use tokio::io::{DuplexStream, copy_bidirectional};

use crate::{
    ContainerConfig, ContainerState, ContainerStatus, Deadlines, Defaults, DnsConfig,
    FilesystemUsage, Images, Kernels, NodeRuntime, PodRuntime, PullProgress, ResourceConfig,
    RuntimeConfig, RuntimeError, SandboxConfig, SandboxMetadata, SecurityConfig, TemplateConfig,
    UidRange,
};

mod gate;

pub(crate) use gate::{Gate, Place, Trouble};

/// The edge before a write of records, and the trouble that waits there.
pub(crate) async fn before_records(
    gate: &Gate,
    action: &'static str,
    ops: Vec<Op>,
) -> Result<Vec<Op>, RuntimeError> {
    gate.step().await;
    let kind = match gate.trouble(Place::Records) {
        Some(Trouble::Before(kind)) => kind,
        Some(Trouble::After(kind)) => {
            gate.leave_in_limbo(ops);
            kind
        }
        trouble => {
            if let Some(Trouble::Slow(time)) = trouble {
                tokio::time::sleep(time).await;
            }
            drop(gate.take_limbo());
            return Ok(ops);
        }
    };
    Err(crate::records::storage(action, std::io::Error::from(kind)))
}

pub(crate) fn sandbox_config(name: &str) -> SandboxConfig {
    SandboxConfig {
        metadata: SandboxMetadata {
            name: name.into(),
            namespace: "acme".into(),
            uid: format!("uid-{name}"),
            attempt: 0,
        },
        hostname: name.into(),
        network: Some("acme.default".parse().unwrap()),
        requested_address: None,
        host_ports: Vec::new(),
        bandwidth: hypernetes_types::Bandwidth::default(),
        kernel: None,
        vcpus: 1,
        memory_mib: 128,
        extras: VmExtras::default(),
        scratch_mib: 16,
        dns: DnsConfig::default(),
        hosts: Vec::new(),
        sysctls: BTreeMap::new(),
        share_process_namespace: false,
        user_namespace: None,
        log_directory: format!("/nonexistent/{name}").into(),
        cgroup_parent: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        memo: String::new(),
        host: None,
    }
}

pub(crate) fn container_config(name: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.into(),
        attempt: 0,
        image: "web".into(),
        command: Vec::new(),
        args: Vec::new(),
        env: Vec::new(),
        working_dir: String::new(),
        mounts: Vec::new(),
        devices: Vec::new(),
        tty: false,
        stdin: false,
        stdin_once: false,
        pid_target: None,
        security: SecurityConfig::default(),
        resources: ResourceConfig::default(),
        stop_signal: None,
        log_path: format!("{name}/0.log").into(),
        termination_path: "/dev/termination-log".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        memo: String::new(),
        host: None,
    }
}

pub(crate) fn lease() -> Lease {
    Lease {
        sandbox: SandboxId::random(),
        network: "acme.default".parse().unwrap(),
        address: [10, 1, 0, 5].into(),
        gateway: [10, 1, 0, 1].into(),
        mac: "02:00:00:00:00:01".into(),
        device: "t0".into(),
        mtu: 1450,
        dns: vec![[10, 1, 0, 1].into()],
        search: vec!["cluster.local".into()],
        prefixes: Vec::new(),
        routes: Vec::new(),
        host_ports: Vec::new(),
        bandwidth: hypernetes_types::Bandwidth::default(),
    }
}

/// The agents of this world's VMs, and how new ones behave.
#[derive(Debug, Default)]
pub(crate) struct AgentTable {
    agents: Mutex<HashMap<SandboxId, FakeAgent>>,
    /// As the VM was that was written to a file last.
    written: Mutex<Option<FakeAgent>>,
    script: Mutex<Vec<(Method, Behaviour)>>,
}

impl AgentTable {
    fn get(&self, sandbox: &SandboxId) -> FakeAgent {
        let new = || {
            let agent = FakeAgent::new();
            for (method, behaviour) in self.script.lock().unwrap().iter() {
                agent.set_behaviour(*method, behaviour.clone());
            }
            agent
        };
        let mut agents = self.agents.lock().unwrap();
        agents.entry(sandbox.clone()).or_insert_with(new).clone()
    }

    fn write(&self, sandbox: &SandboxId) {
        *self.written.lock().unwrap() = Some(self.get(sandbox).fork());
    }

    /// A VM begins where another was.
    fn restore(&self, sandbox: &SandboxId) {
        let mut agents = self.agents.lock().unwrap();
        if let Some(agent) = self.written.lock().unwrap().as_ref() {
            agents
                .entry(sandbox.clone())
                .or_insert_with(|| agent.fork());
        }
    }
}

type Agents = Arc<AgentTable>;

/// Everything that survives the runtime.
pub(crate) struct World {
    pub(crate) temp: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) network: Arc<GatedNetwork>,
    pub(crate) volumes: Arc<GatedVolumes>,
    pub(crate) vmm: FakeVmm,
    pub(crate) gate: Gate,
    pub(crate) images: Arc<FakeImages>,
    pub(crate) deadlines: Deadlines,
    /// How many templates a runtime keeps; a test of something else has none.
    pub(crate) templates: usize,
    /// How many VMs wait for a sandbox, for each template.
    pub(crate) pool: usize,
    /// How many plugs fail from here on.
    pub(crate) refuse_plugs: Arc<AtomicU64>,
    /// How often in a row the VM of a sandbox was told to go on in vain.
    pub(crate) stuck: Arc<Mutex<BTreeMap<SandboxId, u32>>>,
    agents: Agents,
}

impl World {
    pub(crate) async fn new() -> Self {
        let gate = Gate::default();
        gate.enter();
        let network = Arc::new(GatedNetwork {
            inner: FakeDriver::new(),
            gate: gate.clone(),
        });
        let spec = NetworkSpec {
            id: "acme.default".parse().unwrap(),
            cidr: "10.1.0.0/24".parse().unwrap(),
            gateway: [10, 1, 0, 1].into(),
            egress: true,
            node_access: false,
            mtu: 1450,
            domain: "cluster.local".into(),
        };
        network.inner.ensure_network(&spec).await.unwrap();
        let agents = Agents::default();
        let vmm = {
            let agents = Arc::clone(&agents);
            FakeVmm::new(move |sandbox, stream| guest(&agents, sandbox, stream))
        };
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("hyperstart"), "a program").unwrap();
        let volumes = LocalVolumes::open_with(LocalConfig {
            dir: temp.path().join("volumes"),
            limit_bytes: Some(64 << 20),
            mkfs: "true".into(),
        });
        let volumes = Arc::new(GatedVolumes {
            inner: volumes.await.unwrap(),
            gate: gate.clone(),
        });
        Self {
            temp,
            volumes,
            store: Store::in_memory(StoreConfig::default()).unwrap(),
            network,
            vmm,
            gate,
            images: Arc::new(FakeImages::new()),
            deadlines: Deadlines {
                boot: Duration::from_secs(20),
                call: Duration::from_secs(10),
                kill: Duration::from_secs(5),
                drain: Duration::from_secs(5),
                shutdown: Duration::from_secs(5),
                flush: Duration::from_secs(5),
                beat: Duration::from_secs(30),
                silent: Duration::from_secs(30),
                readopt: Duration::from_secs(10),
            },
            templates: 0,
            pool: 0,
            refuse_plugs: Arc::default(),
            stuck: Arc::default(),
            agents,
        }
    }

    pub(crate) async fn open(&self) -> NodeRuntime {
        NodeRuntime::open(self.config()).await.unwrap()
    }

    pub(crate) fn config(&self) -> RuntimeConfig {
        RuntimeConfig {
            state_dir: self.temp.path().join("state"),
            run_dir: self.temp.path().join("run"),
            store: self.store.clone(),
            images: self.images.clone(),
            network: self.network.clone(),
            vmm: Arc::new(GatedVmm {
                inner: self.vmm.clone(),
                agents: self.agents.clone(),
                gate: self.gate.clone(),
                refuse_plugs: self.refuse_plugs.clone(),
                stuck: self.stuck.clone(),
            }),
            volumes: Some(self.volumes.clone()),
            kernels: Arc::new(FakeKernels::new(self.temp.path())),
            hyperstart: self.temp.path().join("hyperstart"),
            uid_range: UidRange {
                first: 1000,
                count: 8,
            },
            // Formats nothing, successfully: no guest of these tests looks at its disk.
            defaults: Defaults {
                mkfs: "true".into(),
                ..Defaults::default()
            },
            deadlines: self.deadlines.clone(),
            templates: TemplateConfig {
                most: self.templates,
                pool: self.pool,
            },
            others: Vec::new(),
        }
    }

    pub(crate) fn sandbox(&self, name: &str) -> SandboxConfig {
        SandboxConfig {
            log_directory: self.temp.path().join("logs").join(name),
            ..sandbox_config(name)
        }
    }

    /// The agent in a sandbox's VM.
    pub(crate) fn agent(&self, sandbox: &SandboxId) -> FakeAgent {
        self.agents.get(sandbox)
    }

    /// How agents of VMs yet to come answer a call.
    pub(crate) fn script_agents(&self, method: Method, behaviour: Behaviour) {
        self.agents.script.lock().unwrap().push((method, behaviour));
    }

    /// The VM's agent starts anew, knowing nothing.
    pub(crate) fn replace_agent(&self, sandbox: &SandboxId) {
        let former = self
            .agents
            .agents
            .lock()
            .unwrap()
            .insert(sandbox.clone(), FakeAgent::new());
        if let Some(former) = former {
            former.disconnect();
        }
    }

    /// All agents answer as the protocol says.
    pub(crate) fn calm_agents(&self, methods: &[Method]) {
        for agent in self.agents.agents.lock().unwrap().values() {
            for method in methods {
                agent.set_behaviour(*method, Behaviour::Normal);
            }
        }
    }

    /// What a container has written to its log, by stream name.
    pub(crate) fn log(&self, sandbox: &str, container: &str, stream: &str) -> String {
        let path = self
            .temp
            .path()
            .join("logs")
            .join(sandbox)
            .join(container)
            .join("0.log");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut content = String::new();
        for line in text.lines() {
            let mut parts = line.splitn(4, ' ').skip(1);
            if parts.next() == Some(stream) {
                let tag = parts.next();
                content.push_str(parts.next().unwrap());
                if tag == Some("F") {
                    content.push('\n');
                }
            }
        }
        content
    }

    /// Ends a runtime that does something after so many steps, as a kill would. True if it was done by then.
    pub(crate) async fn kill_after(
        &self,
        steps: u64,
        runtime: NodeRuntime,
        work: impl AsyncFnOnce(&NodeRuntime),
    ) -> bool {
        self.gate.close_after(steps);
        let finished = tokio::select! {
            () = work(&runtime) => true,
            () = self.gate.hit() => false,
        };
        drop(runtime);
        self.gate.open();
        finished
    }

    /// Every VM ends, as when the power fails.
    pub(crate) fn end_vms(&self) {
        for sandbox in self.vmm.sandboxes() {
            let status = "the power failed".into();
            self.vmm.end(&sandbox, VmExit::VmmDied { status });
        }
    }

    /// Nothing of any sandbox is left anywhere.
    pub(crate) async fn assert_clean(&self) {
        assert_eq!(self.vmm.sandboxes(), []);
        assert_eq!(self.network.leases().await, 0);
        for volume in self.volumes.inner.list().await.unwrap() {
            assert!(volume.attached_to.is_empty(), "{volume:?}");
        }
        let left: Vec<_> = self.store.list("/node/", None, None, None).unwrap().entries;
        assert!(left.is_empty(), "{left:?}");
        for directory in ["run", "state/sandboxes", "state/snapshots", "logs"] {
            let entries = std::fs::read_dir(self.temp.path().join(directory));
            let left: Vec<_> = entries
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// A sandbox with one running container.
pub(crate) async fn running(
    world: &World,
    runtime: &NodeRuntime,
    name: &str,
) -> (SandboxId, ContainerId) {
    let sandbox = runtime.run_sandbox(world.sandbox(name)).await.unwrap();
    let container = runtime
        .create_container(&sandbox, container_config("c"))
        .await
        .unwrap();
    runtime.start_container(&container).await.unwrap();
    (sandbox, container)
}

/// Waits until a condition holds; a test that waits too long fails at this line.
#[track_caller]
pub(crate) fn eventually<'a, F>(
    what: &'a str,
    condition: impl Fn() -> F + 'a,
) -> impl Future<Output = ()> + 'a
where
    F: Future<Output = bool>,
{
    let place = std::panic::Location::caller();
    async move {
        let wait = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(waited.is_ok(), "{what} did not come true, at {place}");
    }
}

pub(crate) async fn exited(runtime: &NodeRuntime, id: &ContainerId) -> ContainerStatus {
    let ended = || async {
        runtime
            .container(id)
            .await
            .is_some_and(|status| status.state == ContainerState::Exited)
    };
    eventually("the container's end", ended).await;
    runtime.container(id).await.unwrap()
}

fn guest(agents: &Agents, sandbox: &SandboxId, mut stream: DuplexStream) {
    let agent = agents.get(sandbox);
    let rehearsing = agent.clone();
    tokio::spawn(async move {
        // HyperStart's own container: it writes a line and ends.
        let runs = |agent: &FakeAgent| {
            let state = agent.state("rehearsal");
            state.is_some_and(|state| state.phase() == v1::ContainerPhase::Running)
        };
        rehearsing.wait_until(runs).await;
        rehearsing.output("rehearsal", STDOUT, b"rehearsed\n");
        rehearsing.exit("rehearsal", 0);
    });
    tokio::spawn(async move {
        let mut session = agent.connect();
        drop(copy_bidirectional(&mut session, &mut stream).await);
    });
}

/// An image with a layer of its own and one that all share.
#[derive(Debug)]
pub(crate) struct FakeImages {
    pub(crate) images: Mutex<HashMap<String, Image>>,
}

impl FakeImages {
    fn new() -> Self {
        let images = Self {
            images: Mutex::default(),
        };
        images.add(
            "web",
            &[1, 2],
            ImageConfig {
                entrypoint: vec!["/web".into()],
                ..Default::default()
            },
        );
        images.add(
            "box",
            &[1, 3],
            ImageConfig {
                cmd: vec!["/box".into()],
                ..Default::default()
            },
        );
        images
    }

    pub(crate) fn add(&self, name: &str, layers: &[u8], config: ImageConfig) {
        let digest = |n: u8| Digest::from_sha256([n; 32]);
        let layer = |&n: &u8| Layer {
            diff_id: digest(n),
            blob: digest(n),
            disk: "/dev/null".into(),
            disk_size: 0,
        };
        // Not one of a layer's, which are small, and not another image's.
        let sum = name
            .bytes()
            .fold(0_u8, |sum, byte| sum.wrapping_mul(3).wrapping_add(byte));
        let id = Digest::from_sha256([sum | 0x80; 32]);
        let reference: ImageReference = name.parse().unwrap();
        let image = Image {
            id: id.clone(),
            manifest: id.clone(),
            tags: vec![reference.clone()],
            digests: vec![reference.with_digest(id)],
            config,
            layers: layers.iter().map(layer).collect(),
            size: 0,
            created: None,
            architecture: "amd64".into(),
        };
        self.images.lock().unwrap().insert(name.into(), image);
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn pull(
        &self,
        reference: &ImageReference,
        _: Credentials,
        _: Option<PullProgress>,
    ) -> Result<Image, ImageError> {
        self.get(
            reference
                .repository()
                .rsplit('/')
                .next()
                .unwrap_or_default(),
        )
        .await
    }

    async fn get(&self, name: &str) -> Result<Image, ImageError> {
        let images = self.images.lock().unwrap();
        let by_id = || images.values().find(|image| image.id.to_string() == name);
        let found = images.get(name).or_else(by_id).cloned();
        found.ok_or_else(|| ImageError::NotFound(name.into()))
    }

    async fn open_layers(&self, image: &Image) -> Result<Vec<File>, ImageError> {
        Ok(image
            .layers
            .iter()
            .map(|_| File::open("/dev/null").unwrap())
            .collect())
    }

    async fn list(&self) -> Result<Vec<Image>, ImageError> {
        Ok(self.images.lock().unwrap().values().cloned().collect())
    }

    async fn remove(&self, id: &Digest, in_use: &HashSet<Digest>) -> Result<(), ImageError> {
        if in_use.contains(id) {
            return Err(ImageError::InUse(id.to_string()));
        }
        self.images
            .lock()
            .unwrap()
            .retain(|_, image| image.id != *id);
        Ok(())
    }

    async fn usage(&self) -> Result<FilesystemUsage, ImageError> {
        Ok(FilesystemUsage {
            path: "/nonexistent".into(),
            used_bytes: 0,
            files: 0,
        })
    }
}

/// One kernel, whose files are empty.
#[derive(Debug)]
struct FakeKernels {
    directory: std::path::PathBuf,
}

impl FakeKernels {
    fn new(directory: &Path) -> Self {
        for name in ["vmlinux", "initrd"] {
            std::fs::write(directory.join(name), "").unwrap();
        }
        Self {
            directory: directory.to_owned(),
        }
    }
}

#[async_trait]
impl Kernels for FakeKernels {
    async fn prepare(
        &self,
        kernel: Option<&KernelName>,
        _: &Path,
    ) -> Result<GuestKernel, RuntimeError> {
        if let Some(name) = kernel {
            return Err(RuntimeError::NotFound {
                kind: "kernel",
                id: name.to_string(),
            });
        }
        Ok(GuestKernel {
            kernel: self.directory.join("vmlinux"),
            initrd: self.directory.join("initrd"),
            machine: Machine::Microvm,
            extra_cmdline: String::new(),
        })
    }
}

/// The fake network with gates around its effects.
#[derive(Debug)]
pub(crate) struct GatedNetwork {
    inner: FakeDriver,
    gate: Gate,
}

impl GatedNetwork {
    pub(crate) async fn leases(&self) -> usize {
        // A network with pods refuses to go, and says how many there are.
        let id = "acme.default".parse().unwrap();
        let spec = self.inner.list_networks().await.unwrap().remove(0);
        match self.inner.delete_network(&id).await {
            Err(NetworkError::InUse { pods, .. }) => pods,
            other => {
                other.unwrap();
                self.inner.ensure_network(&spec).await.unwrap();
                0
            }
        }
    }
}

/// Volumes with a step before and after each change.
#[derive(Debug)]
pub(crate) struct GatedVolumes {
    pub(crate) inner: LocalVolumes,
    gate: Gate,
}

#[async_trait]
impl VolumeDriver for GatedVolumes {
    async fn create(
        &self,
        id: &VolumeId,
        bytes: u64,
        mode: VolumeMode,
    ) -> Result<VolumeInfo, VolumeError> {
        self.inner.create(id, bytes, mode).await
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumeError> {
        self.inner.delete(id).await
    }

    async fn expand(&self, id: &VolumeId, bytes: u64) -> Result<VolumeInfo, VolumeError> {
        self.inner.expand(id, bytes).await
    }

    async fn get(&self, id: &VolumeId) -> Result<Option<VolumeInfo>, VolumeError> {
        self.inner.get(id).await
    }

    async fn list(&self) -> Result<Vec<VolumeInfo>, VolumeError> {
        self.inner.list().await
    }

    async fn attach(
        &self,
        id: &VolumeId,
        pod: &str,
        read_only: bool,
    ) -> Result<BlockDevice, VolumeError> {
        let work = self.inner.attach(id, pod, read_only);
        self.gate.effect(Place::Volumes, volume_trouble, work).await
    }

    async fn detach(&self, id: &VolumeId, pod: &str) -> Result<(), VolumeError> {
        let work = self.inner.detach(id, pod);
        self.gate.effect(Place::Volumes, volume_trouble, work).await
    }

    async fn capacity(&self) -> Result<Capacity, VolumeError> {
        self.inner.capacity().await
    }
}

#[async_trait]
impl NetworkDriver for GatedNetwork {
    async fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetworkError> {
        self.inner.ensure_network(spec).await
    }

    async fn delete_network(&self, id: &NetworkId) -> Result<(), NetworkError> {
        self.inner.delete_network(id).await
    }

    async fn list_networks(&self) -> Result<Vec<NetworkSpec>, NetworkError> {
        self.inner.list_networks().await
    }

    async fn attach(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError> {
        let work = self.inner.attach(sandbox, network, request);
        self.gate
            .effect(Place::Network, network_trouble, work)
            .await
    }

    async fn ready(&self, network: &NetworkId) -> Result<(), NetworkError> {
        self.inner.ready(network).await
    }

    async fn lease(&self, sandbox: &SandboxId) -> Result<Option<Lease>, NetworkError> {
        self.inner.lease(sandbox).await
    }

    async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let work = self.inner.detach(sandbox);
        self.gate
            .effect(Place::Network, network_trouble, work)
            .await
    }

    async fn park(&self) -> Result<Parked, NetworkError> {
        self.inner.park().await
    }

    async fn attach_parked(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
        place: ParkedPlace,
    ) -> Result<Lease, NetworkError> {
        let work = self.inner.attach_parked(sandbox, network, request, place);
        self.gate
            .effect(Place::Network, network_trouble, work)
            .await
    }

    async fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError> {
        self.inner.set_names(id, names).await
    }

    async fn set_services(
        &self,
        id: &NetworkId,
        services: NetworkServices,
    ) -> Result<(), NetworkError> {
        self.inner.set_services(id, services).await
    }

    async fn recover(&self, alive: &[SandboxId]) -> Result<(), NetworkError> {
        let work = self.inner.recover(alive);
        self.gate
            .effect(Place::Network, network_trouble, work)
            .await
    }
}

/// The fake driver with gates around its effects, and guests that power off when told to.
#[derive(Debug)]
struct GatedVmm {
    inner: FakeVmm,
    agents: Agents,
    gate: Gate,
    refuse_plugs: Arc<AtomicU64>,
    stuck: Arc<Mutex<BTreeMap<SandboxId, u32>>>,
}

impl GatedVmm {
    fn wrap(&self, inner: Box<dyn Vm>) -> Box<dyn Vm> {
        let sandbox = inner.record().sandbox;
        let agent = self.agents.get(&sandbox);
        let vmm = self.inner.clone();
        tokio::spawn(async move {
            agent
                .wait_until(|agent| agent.calls().contains(&Method::Shutdown))
                .await;
            vmm.end(&sandbox, VmExit::Shutdown);
        });
        Box::new(GatedVm {
            inner,
            agents: self.agents.clone(),
            gate: self.gate.clone(),
            refuse_plugs: self.refuse_plugs.clone(),
            stuck: self.stuck.clone(),
        })
    }
}

#[async_trait]
impl Vmm for GatedVmm {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, VmmError> {
        let failed = vmm_trouble(&spec.run_dir);
        // On error nothing is left running: that is promised.
        if let Some(Trouble::Before(kind) | Trouble::After(kind)) = self.gate.trouble(Place::Vmm) {
            return Err(failed(kind.into()));
        }
        self.gate.step().await;
        if matches!(spec.origin, Origin::Suspended(_)) {
            self.agents.restore(&spec.sandbox);
        }
        let result = self.inner.launch(spec).await;
        self.gate.step().await;
        result.map(|vm| self.wrap(vm))
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError> {
        self.inner.adopt(record).await.map(|vm| self.wrap(vm))
    }

    async fn destroy(&self, run_dir: &Path) -> Result<(), VmmError> {
        let work = self.inner.destroy(run_dir);
        self.gate
            .effect(Place::Vmm, vmm_trouble(run_dir), work)
            .await
    }
}

#[derive(Debug)]
struct GatedVm {
    inner: Box<dyn Vm>,
    agents: Agents,
    gate: Gate,
    refuse_plugs: Arc<AtomicU64>,
    stuck: Arc<Mutex<BTreeMap<SandboxId, u32>>>,
}

impl GatedVm {
    fn trouble(&self) -> impl FnOnce(std::io::Error) -> VmmError + use<> {
        vmm_trouble(&self.inner.record().run_dir)
    }
}

fn vmm_trouble(run_dir: &Path) -> impl FnOnce(std::io::Error) -> VmmError + use<> {
    let path = run_dir.to_owned();
    |source| VmmError::Io {
        action: "use",
        path,
        source,
    }
}

fn volume_trouble(source: std::io::Error) -> VolumeError {
    VolumeError::Storage {
        action: "use a volume".into(),
        source,
    }
}

fn network_trouble(source: std::io::Error) -> NetworkError {
    NetworkError::System {
        action: "use the network".into(),
        source: Box::new(source),
    }
}

#[async_trait]
impl Vm for GatedVm {
    fn record(&self) -> VmRecord {
        self.inner.record()
    }

    async fn plug_disk(&self, disk: Disk) -> Result<(), VmmError> {
        self.gate.step().await;
        let less_one = |left: u64| left.checked_sub(1);
        if self
            .refuse_plugs
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less_one)
            .is_ok()
        {
            return Err(VmmError::Control {
                action: format!("plug disk {}", disk.slot),
                sandbox: self.record().sandbox,
                message: "refused by the test".into(),
            });
        }
        let work = self.inner.plug_disk(disk);
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }

    async fn share(&self, share: HostShare) -> Result<String, VmmError> {
        self.inner.share(share).await
    }

    async fn set_extra_memory(&self, mib: u32) -> Result<u32, VmmError> {
        let work = self.inner.set_extra_memory(mib);
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }

    async fn set_cpus(&self, cpus: Option<&CpuSet>) -> Result<(), VmmError> {
        self.inner.set_cpus(cpus).await
    }

    async fn unplug_disk(&self, slot: u32) -> Result<(), VmmError> {
        let work = self.inner.unplug_disk(slot);
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }

    async fn resize_disk(&self, slot: u32, bytes: u64) -> Result<(), VmmError> {
        let work = self.inner.resize_disk(slot, bytes);
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }

    async fn list_disks(&self) -> Result<Vec<u32>, VmmError> {
        self.inner.list_disks().await
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, VmmError> {
        self.inner.open_channel().await
    }

    fn events(&self) -> tokio::sync::broadcast::Receiver<VmEvent> {
        self.inner.events()
    }

    fn exit(&self) -> Option<VmExit> {
        self.inner.exit()
    }

    async fn wait(&self) -> VmExit {
        self.inner.wait().await
    }

    fn stalled(&self) -> tokio::sync::watch::Receiver<bool> {
        self.inner.stalled()
    }

    fn console_tail(&self) -> String {
        self.inner.console_tail()
    }

    async fn save(&self) -> Result<hypernetes_vmm::Template, VmmError> {
        self.inner.save().await
    }

    async fn suspend(&self, to: File, limit: u64) -> Result<(), VmmError> {
        let work = async {
            let sandbox = self.inner.record().sandbox;
            self.inner.suspend(to, limit).await?;
            self.agents.write(&sandbox);
            Ok(())
        };
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        let work = self.inner.resume();
        let resumed = self.gate.effect(Place::Vmm, self.trouble(), work).await;
        let mut stuck = self.stuck.lock().unwrap();
        match &resumed {
            Ok(()) => drop(stuck.remove(&self.record().sandbox)),
            Err(_) => *stuck.entry(self.record().sandbox).or_default() += 1,
        }
        drop(stuck);
        resumed
    }

    async fn join_cgroup(&self, cgroup: &str) -> Result<(), VmmError> {
        let work = self.inner.join_cgroup(cgroup);
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }

    async fn stand_back(&self, back: bool) -> Result<(), VmmError> {
        self.inner.stand_back(back).await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        let work = self.inner.kill();
        self.gate.effect(Place::Vmm, self.trouble(), work).await
    }
}

pub(crate) const STDOUT: v1::Stream = v1::Stream::Stdout;
pub(crate) const STDERR: v1::Stream = v1::Stream::Stderr;

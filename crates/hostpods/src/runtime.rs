//! The runtime of host pods: what there is, and the calls.

use std::{
    collections::{BTreeMap, HashSet},
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use hypernetes_image::{Credentials, Image};
use hypernetes_runtime::{
    Connection, ContainerConfig, ContainerStatus, ContainerUpdate, DiskUsage, ExecConfig,
    FilesystemUsage, HostDevice, NodeFigures, PodRuntime, PullProgress, RuntimeError, RuntimeEvent,
    SandboxConfig, SandboxStats, SandboxStatus, SandboxUpdate, Session, VolumeConfig,
};
use hypernetes_types::{ContainerId, Digest, ImageReference, SandboxId};
use hypernetes_vmm::HostShare;
use tokio::sync::{Mutex as AsyncMutex, broadcast, watch};

use crate::{
    attach,
    config::HostConfig,
    container, exec, forward, monitor,
    oci::Oci,
    records::{
        ContainerPhase, ContainerRecord, Records, SandboxPhase, SandboxRecord, blocking, not_found,
        state, storage,
    },
    recovery::{self, HostReport},
    rootfs::Layers,
    sandbox, stats, update,
};

/// Changes that a slow listener may fall behind.
const EVENTS: usize = 1024;

/// Pods on this host's own kernel.
///
/// Dropping it leaves their containers running, each with its monitor: the next
/// [`HostRuntime::open`] on the same state finds them.
#[derive(Debug)]
pub struct HostRuntime {
    pub(crate) inner: Arc<Inner>,
    report: HostReport,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: HostConfig,
    pub(crate) records: Records,
    pub(crate) oci: Oci,
    /// Held while layers are mounted or unmounted.
    pub(crate) layers: AsyncMutex<Layers>,
    pub(crate) sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    pub(crate) containers: Mutex<BTreeMap<ContainerId, Arc<Container>>>,
    pub(crate) events: broadcast::Sender<RuntimeEvent>,
    /// Identity of the host's present boot.
    pub(crate) boot: String,
}

/// A sandbox in memory.
#[derive(Debug)]
pub(crate) struct Sandbox {
    /// Held by whoever changes it or the set of its containers.
    pub(crate) work: Arc<AsyncMutex<()>>,
    record: Mutex<SandboxRecord>,
}

/// A container in memory.
#[derive(Debug)]
pub(crate) struct Container {
    /// Held while its record is written.
    write: AsyncMutex<()>,
    record: watch::Sender<ContainerRecord>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sandbox {
    pub(crate) fn new(record: SandboxRecord) -> Arc<Self> {
        Arc::new(Self {
            work: Arc::default(),
            record: Mutex::new(record),
        })
    }

    pub(crate) fn record(&self) -> SandboxRecord {
        lock(&self.record).clone()
    }
}

impl Container {
    pub(crate) fn new(record: ContainerRecord) -> Arc<Self> {
        Arc::new(Self {
            write: AsyncMutex::default(),
            record: watch::Sender::new(record),
        })
    }

    pub(crate) fn record(&self) -> ContainerRecord {
        self.record.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<ContainerRecord> {
        self.record.subscribe()
    }

    /// Until its program does not run. Returns its exit code.
    pub(crate) async fn ended(&self) -> i32 {
        let mut watch = self.watch();
        let end = watch.wait_for(|record| !record.phase.is_live()).await;
        end.map_or(container::KILLED, |record| record.exit_code)
    }
}

impl Inner {
    pub(crate) fn sandbox(&self, id: &SandboxId) -> Result<Arc<Sandbox>, RuntimeError> {
        let found = lock(&self.sandboxes).get(id).cloned();
        found.ok_or_else(|| not_found("sandbox", id))
    }

    pub(crate) fn container(&self, id: &ContainerId) -> Result<Arc<Container>, RuntimeError> {
        let found = lock(&self.containers).get(id).cloned();
        found.ok_or_else(|| not_found("container", id))
    }

    pub(crate) fn all_sandboxes(&self) -> Vec<Arc<Sandbox>> {
        lock(&self.sandboxes).values().cloned().collect()
    }

    pub(crate) fn containers_of(&self, sandbox: Option<&SandboxId>) -> Vec<Arc<Container>> {
        let all = lock(&self.containers);
        let of = |container: &&Arc<Container>| {
            sandbox.is_none_or(|id| container.record.borrow().sandbox == *id)
        };
        all.values().filter(of).cloned().collect()
    }

    pub(crate) fn insert_container(&self, container: &Arc<Container>) {
        let id = container.record.borrow().id.clone();
        lock(&self.containers).insert(id, Arc::clone(container));
    }

    pub(crate) fn forget_container(&self, record: &ContainerRecord) {
        lock(&self.containers).remove(&record.id);
        self.tell(RuntimeEvent::Container(
            record.sandbox.clone(),
            record.id.clone(),
        ));
    }

    pub(crate) fn forget_sandbox(&self, id: &SandboxId) {
        lock(&self.sandboxes).remove(id);
        self.tell(RuntimeEvent::Sandbox(id.clone()));
    }

    fn tell(&self, event: RuntimeEvent) {
        // Nobody may be listening.
        drop(self.events.send(event));
    }

    /// Changes a sandbox's record, on the disk first. Call with its work lock.
    pub(crate) async fn change_sandbox(
        &self,
        sandbox: &Sandbox,
        change: impl FnOnce(&mut SandboxRecord),
    ) -> Result<SandboxRecord, RuntimeError> {
        let mut record = sandbox.record();
        change(&mut record);
        self.records.put_sandbox(&record).await?;
        *lock(&sandbox.record) = record.clone();
        self.tell(RuntimeEvent::Sandbox(record.id.clone()));
        Ok(record)
    }

    /// Changes a container's record, on the disk first.
    pub(crate) async fn change_container(
        &self,
        container: &Container,
        change: impl FnOnce(&mut ContainerRecord),
    ) -> Result<ContainerRecord, RuntimeError> {
        let _alone = container.write.lock().await;
        let mut record = container.record();
        change(&mut record);
        self.records.put_container(&record).await?;
        container.record.send_replace(record.clone());
        self.tell(RuntimeEvent::Container(
            record.sandbox.clone(),
            record.id.clone(),
        ));
        Ok(record)
    }

    /// Directory of a container: bundle, what it writes, its exit code.
    pub(crate) fn bundle(&self, id: &ContainerId) -> PathBuf {
        self.config.state_dir.join("c").join(id.as_str())
    }

    /// Directory of what a sandbox's containers share.
    pub(crate) fn sandbox_dir(&self, id: &SandboxId) -> PathBuf {
        self.config.run_dir.join("s").join(id.as_str())
    }
}

/// To its end, even if the caller goes.
async fn to_the_end<T: Send + 'static>(
    action: &'static str,
    work: impl Future<Output = Result<T, RuntimeError>> + Send + 'static,
) -> Result<T, RuntimeError> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(lost) => Err(storage(action, lost)),
    }
}

impl HostRuntime {
    /// Opens the runtime and recovers what an earlier one left: finds the containers that run,
    /// finishes or undoes what was half done, and clears away what belongs to nobody.
    ///
    /// # Errors
    /// If records cannot be read or directories cannot be made. A single pod that cannot be
    /// recovered is no error.
    pub async fn open(config: HostConfig) -> Result<Self, RuntimeError> {
        let oci = Oci {
            program: config.programs.oci.clone(),
            root: config.run_dir.join("oci"),
            patience: config.patience,
        };
        let directories = config.clone();
        let boot = blocking("open the directories of host pods", move || {
            recovery::make_directories(&directories)?;
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
            Ok(boot.trim().to_owned())
        })
        .await?;
        let inner = Arc::new(Inner {
            records: Records::new(config.store.clone()),
            oci,
            layers: AsyncMutex::default(),
            sandboxes: Mutex::default(),
            containers: Mutex::default(),
            events: broadcast::channel(EVENTS).0,
            boot,
            config,
        });
        let report = recovery::recover(&inner).await?;
        tracing::info!(?report, "host pods are open");
        Ok(Self { inner, report })
    }

    /// What the recovery at the start found and did.
    pub fn recovery_report(&self) -> &HostReport {
        &self.report
    }

    /// Images that containers here are made of or mount: they must not be removed.
    pub fn images_in_use(&self) -> HashSet<Digest> {
        let mut ids = HashSet::new();
        for container in self.inner.containers_of(None) {
            let record = container.record.borrow();
            let volumes = record.volumes.iter().map(|volume| &volume.id);
            let all = volumes.chain([&record.image_id]);
            ids.extend(all.filter_map(|id| id.parse().ok()));
        }
        ids
    }

    fn running(
        &self,
        id: &ContainerId,
        action: &'static str,
    ) -> Result<Arc<Container>, RuntimeError> {
        let container = self.inner.container(id)?;
        let phase = container.record.borrow().phase;
        match phase {
            ContainerPhase::Running => Ok(container),
            phase => {
                let phase = format!("{phase:?}").to_lowercase();
                Err(state(action, "container", id, phase))
            }
        }
    }
}

#[async_trait]
impl PodRuntime for HostRuntime {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxId, RuntimeError> {
        let inner = Arc::clone(&self.inner);
        to_the_end("run the sandbox", async move {
            sandbox::run(&inner, config).await
        })
        .await
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        let Ok(sandbox) = self.inner.sandbox(id) else {
            return Ok(());
        };
        let inner = Arc::clone(&self.inner);
        to_the_end("stop the sandbox", async move {
            let _work = sandbox.work.lock().await;
            sandbox::stop(&inner, &sandbox).await
        })
        .await
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        let Ok(sandbox) = self.inner.sandbox(id) else {
            return Ok(());
        };
        let inner = Arc::clone(&self.inner);
        to_the_end("remove the sandbox", async move {
            let _work = sandbox.work.lock().await;
            sandbox::remove(&inner, &sandbox).await
        })
        .await
    }

    async fn sandbox(&self, id: &SandboxId) -> Option<SandboxStatus> {
        Some(self.inner.sandbox(id).ok()?.record().status())
    }

    async fn list_sandboxes(&self) -> Vec<SandboxStatus> {
        let all = self.inner.all_sandboxes();
        all.iter()
            .map(|sandbox| sandbox.record().status())
            .collect()
    }

    async fn write_volume(&self, id: &SandboxId, _: VolumeConfig) -> Result<(), RuntimeError> {
        self.inner.sandbox(id)?;
        let has = "on the host, whose own files its containers mount";
        Err(state("carry a volume", "sandbox", id, has))
    }

    async fn share(&self, id: &SandboxId, _: HostShare) -> Result<String, RuntimeError> {
        self.inner.sandbox(id)?;
        let has = "on the host, whose own files its containers mount";
        Err(state("share a path", "sandbox", id, has))
    }

    async fn attach_device(&self, id: &SandboxId, _: HostDevice) -> Result<u32, RuntimeError> {
        self.inner.sandbox(id)?;
        let has = "on the host, whose devices its containers have themselves";
        Err(state("attach a device", "sandbox", id, has))
    }

    async fn detach_unused(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.inner.sandbox(id)?;
        Ok(())
    }

    async fn resize_sandbox(&self, id: &SandboxId, _: SandboxUpdate) -> Result<(), RuntimeError> {
        self.inner.sandbox(id)?;
        Err(state("resize", "sandbox", id, "on the host and has no VM"))
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId, RuntimeError> {
        let sandbox = self.inner.sandbox(sandbox)?;
        let inner = Arc::clone(&self.inner);
        to_the_end("create the container", async move {
            let _work = sandbox.work.lock().await;
            container::create(&inner, &sandbox, config).await
        })
        .await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let container = self.inner.container(id)?;
        let sandbox = self.inner.sandbox(&container.record().sandbox)?;
        let inner = Arc::clone(&self.inner);
        to_the_end("start the container", async move {
            let _work = sandbox.work.lock().await;
            let phase = sandbox.record().phase;
            if phase != SandboxPhase::Ready {
                let phase = format!("{phase:?}").to_lowercase();
                return Err(state(
                    "start a container",
                    "sandbox",
                    &sandbox.record().id,
                    phase,
                ));
            }
            container::start(&inner, &container).await
        })
        .await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        let Ok(container) = self.inner.container(id) else {
            return Ok(());
        };
        if let Ok(sandbox) = self.inner.sandbox(&container.record().sandbox) {
            // A start that is under way comes first.
            drop(sandbox.work.lock().await);
        }
        let inner = Arc::clone(&self.inner);
        container::stop(&inner, &container, grace).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let Ok(container) = self.inner.container(id) else {
            return Ok(());
        };
        let Ok(sandbox) = self.inner.sandbox(&container.record().sandbox) else {
            return Ok(());
        };
        let inner = Arc::clone(&self.inner);
        to_the_end("remove the container", async move {
            let _work = sandbox.work.lock().await;
            container::remove(&inner, &container).await
        })
        .await
    }

    async fn update_container(
        &self,
        id: &ContainerId,
        update: ContainerUpdate,
    ) -> Result<(), RuntimeError> {
        let container = self.inner.container(id)?;
        let sandbox = self.inner.sandbox(&container.record().sandbox)?;
        let inner = Arc::clone(&self.inner);
        to_the_end("change the container's limits", async move {
            let _work = sandbox.work.lock().await;
            update::apply(&inner, &container, update).await
        })
        .await
    }

    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let container = self.running(id, "reopen the log")?;
        let record = container.record();
        let pid = record
            .monitor
            .ok_or_else(|| state("reopen the log", "container", id, "without a monitor"))?;
        let bundle = self.inner.bundle(id);
        monitor::reopen_log(pid, &bundle, &record.log_path, self.inner.config.patience).await
    }

    async fn container(&self, id: &ContainerId) -> Option<ContainerStatus> {
        let record = self.inner.container(id).ok()?.record();
        (record.phase != ContainerPhase::Creating).then(|| record.status())
    }

    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus> {
        let all = self.inner.containers_of(sandbox);
        let records = all.iter().map(|container| container.record());
        records
            .filter(|record| record.phase != ContainerPhase::Creating)
            .map(|record| record.status())
            .collect()
    }

    /// Without details: what is on the host is measured by the kubelet itself.
    async fn detailed_stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        self.stats(id).await
    }

    async fn figures(&self) -> NodeFigures {
        NodeFigures::default()
    }

    async fn stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        let sandbox = self.inner.sandbox(id)?;
        stats::of_sandbox(&self.inner, &sandbox.record()).await
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.inner.events.subscribe()
    }

    async fn exec(&self, id: &ContainerId, config: ExecConfig) -> Result<Session, RuntimeError> {
        self.running(id, "run a command in a container")?;
        exec::start(&self.inner, id, config).await
    }

    async fn exec_in_guest(
        &self,
        id: &ContainerId,
        _config: ExecConfig,
    ) -> Result<Session, RuntimeError> {
        self.running(id, "run a command in a VM")?;
        let rule = "is on the host's kernel: there is no VM around it";
        Err(crate::records::invalid("container", rule))
    }

    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        let container = self.running(id, "attach to a container")?;
        attach::start(&self.inner, &container, stdin)
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Connection, RuntimeError> {
        let record = self.inner.sandbox(id)?.record();
        forward::connect(&record, port).await
    }

    async fn pull_image(
        &self,
        reference: &ImageReference,
        credentials: Credentials,
        progress: Option<PullProgress>,
    ) -> Result<Image, RuntimeError> {
        let images = &self.inner.config.images;
        Ok(images.pull(reference, credentials, progress).await?)
    }

    async fn image(&self, reference: &str) -> Option<Image> {
        self.inner.config.images.get(reference).await.ok()
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        Ok(self.inner.config.images.list().await?)
    }

    async fn remove_image(&self, reference: &str) -> Result<(), RuntimeError> {
        let images = &self.inner.config.images;
        let id = images.get(reference).await?.id;
        Ok(images.remove(&id, &self.images_in_use()).await?)
    }

    async fn disk_usage(&self) -> Result<DiskUsage, RuntimeError> {
        let images = self.inner.config.images.usage().await?;
        let path = self.inner.config.state_dir.join("c");
        let action = "measure what host containers have written";
        let containers = blocking(action, move || {
            let (used_bytes, files) = stats::of_tree(&path)?;
            Ok(FilesystemUsage {
                path,
                used_bytes,
                files,
            })
        })
        .await?;
        Ok(DiskUsage { images, containers })
    }
}

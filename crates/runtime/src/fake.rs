//! A runtime in memory, for the tests of whoever drives one.
//!
//! [`FakeRuntime`] keeps pods as [`crate::NodeRuntime`] does, without running anything: a test makes
//! containers write ([`FakeRuntime::output`]) and end ([`FakeRuntime::exit`]), and calls fail
//! ([`FakeRuntime::fail_next`]). Logs are real files in the real format.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::OpenOptions,
    io::Write,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use hypernetes_image::{Credentials, Image, ImageConfig, ImageError};
use hypernetes_types::{ContainerId, Digest, ImageReference, SandboxId, SnapshotId};
use hypernetes_vmm::HostShare;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::{
    CloneConfig, CloneSource, Connection, ContainerConfig, ContainerDetail, ContainerState,
    ContainerStats, ContainerStatus, ContainerUpdate, ContainerUser, DeviceStats, DiskUsage,
    ExecConfig, Failure, FilesystemUsage, HostDevice, InterfaceStats, NodeFigures, Output,
    PodRuntime, Pressure, PullProgress, RuntimeError, RuntimeEvent, SandboxConfig, SandboxState,
    SandboxStats, SandboxStatus, SandboxUpdate, Session, SnapshotConfig, SnapshotStatus,
    StartFigures, VolumeConfig,
    actor::not_found,
    logs::{
        fanout::Fanout,
        format::{LineCutter, Stream, now_nanos},
    },
    records::storage,
};

/// What an exec answers: standard output, standard error, exit code.
pub type ExecResult = (Vec<u8>, Vec<u8>, i32);
type ExecHook = Arc<dyn Fn(&ContainerId, &ExecConfig, &[u8]) -> ExecResult + Send + Sync>;

/// See the module.
#[derive(Clone)]
pub struct FakeRuntime {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<RuntimeEvent>,
    changed: watch::Sender<u64>,
}

struct State {
    sandboxes: BTreeMap<SandboxId, FakeSandbox>,
    containers: BTreeMap<ContainerId, FakeContainer>,
    /// With the names of the containers that had exited.
    snapshots: BTreeMap<SnapshotId, (SnapshotStatus, Vec<String>)>,
    images: HashMap<String, Image>,
    pulls: HashMap<String, Image>,
    failures: HashMap<&'static str, Vec<RuntimeError>>,
    calls: Vec<String>,
    exec: ExecHook,
    /// Containers end on their stop signal, as most do.
    obedient: bool,
    /// Uids of pods that are not copied yet.
    uncopied: HashSet<String>,
}

struct FakeSandbox {
    status: SandboxStatus,
    volumes: BTreeMap<String, VolumeConfig>,
    shares: Vec<HostShare>,
    /// Its start failed: only a record is left.
    never_ready: bool,
}

struct FakeContainer {
    status: ContainerStatus,
    cutter: LineCutter,
    fanout: Arc<Fanout>,
    stdin: Vec<u8>,
}

impl std::fmt::Debug for FakeRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeRuntime")
            .field("sandboxes", &self.lock().sandboxes.len())
            .finish_non_exhaustive()
    }
}

impl Default for FakeRuntime {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeRuntime {
    /// A node without pods and images. Stopped containers end at once, exec echoes stdin.
    pub fn new() -> Self {
        let state = State {
            sandboxes: BTreeMap::new(),
            containers: BTreeMap::new(),
            images: HashMap::new(),
            pulls: HashMap::new(),
            failures: HashMap::new(),
            calls: Vec::new(),
            exec: Arc::new(|_, _, stdin| (stdin.to_vec(), Vec::new(), 0)),
            snapshots: BTreeMap::new(),
            obedient: true,
            uncopied: HashSet::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            events: broadcast::channel(1024).0,
            changed: watch::channel(0).0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emit(&self, event: RuntimeEvent) {
        // Nobody may be listening.
        drop(self.events.send(event));
        self.touch();
    }

    fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Notes a call and takes the failure that was scripted for it, if any.
    fn enter(&self, call: &'static str, of: &str) -> Result<(), RuntimeError> {
        let mut state = self.lock();
        state.calls.push(format!("{call} {of}"));
        let failures = state.failures.entry(call).or_default();
        let failure = if failures.is_empty() {
            None
        } else {
            Some(failures.remove(0))
        };
        drop(state);
        self.touch();
        failure.map_or(Ok(()), Err)
    }

    /// Makes an image be in the store.
    pub fn add_image(&self, reference: &str, config: ImageConfig) -> Image {
        let image = image(reference, config);
        self.lock()
            .images
            .insert(reference.to_owned(), image.clone());
        image
    }

    /// Makes an image be pullable.
    pub fn add_remote_image(&self, reference: &str, config: ImageConfig) -> Image {
        let image = image(reference, config);
        self.lock()
            .pulls
            .insert(reference.to_owned(), image.clone());
        image
    }

    /// Makes the next call of a method of [`PodRuntime`], by its name, fail. Repeated: the ones after it too.
    pub fn fail_next(&self, method: &'static str, error: RuntimeError) {
        self.lock().failures.entry(method).or_default().push(error);
    }

    /// Has snapshots of a pod take as long as its guest likes, or no longer.
    pub fn hold_snapshots(&self, pod_uid: &str, held: bool) {
        let mut state = self.lock();
        match held {
            true => state.uncopied.insert(pod_uid.to_owned()),
            false => state.uncopied.remove(pod_uid),
        };
        drop(state);
        self.touch();
    }

    /// Whether containers end on their stop signal, or only on SIGKILL after the grace.
    pub fn set_obedient(&self, obedient: bool) {
        self.lock().obedient = obedient;
    }

    /// Scripts exec: from container, request and all of stdin to the result.
    pub fn on_exec(
        &self,
        hook: impl Fn(&ContainerId, &ExecConfig, &[u8]) -> ExecResult + Send + Sync + 'static,
    ) {
        self.lock().exec = Arc::new(hook);
    }

    /// Calls so far, as `method subject`.
    pub fn calls(&self) -> Vec<String> {
        self.lock().calls.clone()
    }

    /// The volumes of a sandbox.
    pub fn volumes(&self, id: &SandboxId) -> BTreeMap<String, VolumeConfig> {
        self.lock()
            .sandboxes
            .get(id)
            .map(|sandbox| sandbox.volumes.clone())
            .unwrap_or_default()
    }

    /// What a container got on stdin.
    pub fn stdin(&self, id: &ContainerId) -> Vec<u8> {
        self.lock()
            .containers
            .get(id)
            .map(|container| container.stdin.clone())
            .unwrap_or_default()
    }

    /// The newest container of this name of the pod with this uid.
    pub fn find(&self, pod_uid: &str, container: &str) -> Option<ContainerId> {
        let state = self.lock();
        let of_pod = |status: &ContainerStatus| {
            let sandbox = state.sandboxes.get(&status.sandbox);
            sandbox.is_some_and(|sandbox| sandbox.status.config.metadata.uid == pod_uid)
        };
        let statuses = state.containers.values().map(|container| &container.status);
        let named = statuses.filter(|status| status.config.name == container && of_pod(status));
        named
            .max_by_key(|status| (status.config.attempt, status.created_unix_nanos))
            .map(|status| status.id.clone())
    }

    /// Makes a container write: to its log and to whoever is attached. Unknown ids are ignored.
    pub fn output(&self, id: &ContainerId, output: &Output) -> std::io::Result<()> {
        let (stream, data) = match output {
            Output::Stdout(data) => (Stream::Stdout, data),
            Output::Stderr(data) => (Stream::Stderr, data),
        };
        let mut state = self.lock();
        let Some(container) = state.containers.get_mut(id) else {
            return Ok(());
        };
        let mut lines = Vec::new();
        container.cutter.feed(stream, data, now_nanos(), &mut lines);
        append(&container.status, &lines)?;
        container.fanout.send(stream, data);
        Ok(())
    }

    /// Ends a running container.
    pub fn exit(&self, id: &ContainerId, code: i32) {
        self.end(id, code, if code == 0 { "Completed" } else { "Error" }, "");
    }

    /// Ends a container with a reason, such as `OOMKilled`.
    pub fn end(&self, id: &ContainerId, code: i32, reason: &str, message: &str) {
        let mut state = self.lock();
        let Some(container) = state.containers.get_mut(id) else {
            return;
        };
        if container.status.state == ContainerState::Exited {
            return;
        }
        let mut lines = Vec::new();
        for stream in Stream::BOTH {
            container.cutter.finish(stream, now_nanos(), &mut lines);
        }
        // The test that cares about the log has made its directory.
        drop(append(&container.status, &lines));
        container.fanout.end();
        let status = &mut container.status;
        status.state = ContainerState::Exited;
        status.paused = false;
        status.exit_code = code;
        status.finished_unix_nanos = now_nanos();
        reason.clone_into(&mut status.reason);
        message.clone_into(&mut status.message);
        let sandbox = status.sandbox.clone();
        drop(state);
        self.emit(RuntimeEvent::Container(sandbox, id.clone()));
    }

    /// Ends a sandbox's VM, and all in it.
    pub fn fail_sandbox(&self, id: &SandboxId, reason: &str, message: &str) {
        for container in self.containers_of(id) {
            self.end(&container, 137, reason, message);
        }
        if let Some(sandbox) = self.lock().sandboxes.get_mut(id) {
            sandbox.status.state = SandboxState::NotReady;
            sandbox.status.failure = Some(Failure {
                reason: reason.into(),
                message: message.into(),
            });
        }
        self.emit(RuntimeEvent::Sandbox(id.clone()));
    }

    fn set_suspended(&self, id: &SandboxId, suspended: bool) -> Result<(), RuntimeError> {
        self.ready(id, "suspend")?;
        if let Some(sandbox) = self.lock().sandboxes.get_mut(id) {
            sandbox.status.suspended = suspended;
        }
        self.emit(RuntimeEvent::Sandbox(id.clone()));
        Ok(())
    }

    /// Waits until a condition holds. Without a deadline of its own.
    pub async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !condition(self) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    fn containers_of(&self, sandbox: &SandboxId) -> Vec<ContainerId> {
        let state = self.lock();
        let of = |container: &&FakeContainer| container.status.sandbox == *sandbox;
        state
            .containers
            .values()
            .filter(of)
            .map(|container| container.status.id.clone())
            .collect()
    }

    /// Names of the sandbox's containers that have exited.
    fn had_exited(&self, sandbox: &SandboxId) -> Vec<String> {
        let state = self.lock();
        let all = state.containers.values().map(|it| &it.status);
        all.filter(|it| it.sandbox == *sandbox && it.state == ContainerState::Exited)
            .map(|it| it.config.name.clone())
            .collect()
    }

    fn running(&self, id: &ContainerId, action: &'static str) -> Result<Arc<Fanout>, RuntimeError> {
        let state = self.lock();
        let container = state
            .containers
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        if container.status.state == ContainerState::Running {
            return Ok(Arc::clone(&container.fanout));
        }
        let state = format!("{:?}", container.status.state).to_lowercase();
        Err(RuntimeError::State {
            action,
            kind: "container",
            id: id.to_string(),
            state,
        })
    }

    fn ready(&self, id: &SandboxId, action: &'static str) -> Result<(), RuntimeError> {
        let state = self.lock();
        let sandbox = state
            .sandboxes
            .get(id)
            .ok_or_else(|| not_found("sandbox", id))?;
        if sandbox.status.state == SandboxState::Ready {
            return Ok(());
        }
        let state = format!("{:?}", sandbox.status.state).to_lowercase();
        Err(RuntimeError::State {
            action,
            kind: "sandbox",
            id: id.to_string(),
            state,
        })
    }
}

fn append(status: &ContainerStatus, lines: &[u8]) -> std::io::Result<()> {
    if let Some(directory) = status.log_path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(&status.log_path)?
        .write_all(lines)
}

fn image(reference: &str, config: ImageConfig) -> Image {
    // Any digest will do that differs from image to image.
    let mut sum = [0; 32];
    for (index, byte) in reference.bytes().enumerate() {
        sum[index % 32] = sum[index % 32] ^ byte ^ u8::try_from(index % 251).unwrap_or_default();
    }
    let id = Digest::from_sha256(sum);
    let tags: Vec<ImageReference> = reference.parse().into_iter().collect();
    Image {
        manifest: id.clone(),
        digests: tags
            .iter()
            .map(|tag: &ImageReference| tag.with_digest(id.clone()))
            .collect(),
        id,
        tags,
        config,
        layers: Vec::new(),
        size: 1,
        created: None,
        architecture: "amd64".into(),
    }
}

#[async_trait]
impl PodRuntime for FakeRuntime {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxId, RuntimeError> {
        let failed = self.enter("run_sandbox", &config.metadata.name).err();
        let mut state = self.lock();
        // As the real one: a sandbox that never came up is cleared away by the next attempt.
        state.sandboxes.retain(|_, sandbox| {
            let metadata = &sandbox.status.config.metadata;
            !(sandbox.never_ready && *metadata == config.metadata)
        });
        let same = |sandbox: &&FakeSandbox| {
            let metadata = &sandbox.status.config.metadata;
            metadata.uid == config.metadata.uid && metadata.attempt == config.metadata.attempt
        };
        if let Some(known) = state.sandboxes.values().find(same) {
            let id = known.status.id.clone();
            drop(state);
            return self.ready(&id, "run").map(|()| id);
        }
        let id = SandboxId::random();
        let host = u8::try_from(2 + state.sandboxes.len() % 250).unwrap_or(2);
        let address = config
            .requested_address
            .unwrap_or(IpAddr::from([10, 0, 0, host]));
        let status = SandboxStatus {
            id: id.clone(),
            address: config.network.is_some().then_some(address),
            more_addresses: Vec::new(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            config,
            state: match failed {
                Some(_) => SandboxState::NotReady,
                None => SandboxState::Ready,
            },
            suspended: false,
            stalled: false,
            created_unix_nanos: now_nanos(),
            kernel_release: Some("6.12.0-fake".into()),
            failure: failed.as_ref().map(|error| Failure {
                reason: "StartFailed".into(),
                message: error.to_string(),
            }),
        };
        state.sandboxes.insert(
            id.clone(),
            FakeSandbox {
                status,
                volumes: BTreeMap::new(),
                shares: Vec::new(),
                never_ready: failed.is_some(),
            },
        );
        drop(state);
        self.emit(RuntimeEvent::Sandbox(id.clone()));
        failed.map_or(Ok(id), Err)
    }

    async fn clone_sandbox(
        &self,
        config: SandboxConfig,
        clone: CloneConfig,
    ) -> Result<SandboxId, RuntimeError> {
        self.enter("clone_sandbox", &clone.source.to_string())?;
        let had = match &clone.source {
            CloneSource::Sandbox(source) => {
                self.ready(source, "clone")?;
                self.had_exited(source)
            }
            CloneSource::Snapshot(source) => {
                let state = self.lock();
                let kept = state.snapshots.get(source);
                kept.ok_or_else(|| not_found("snapshot", source))?.1.clone()
            }
        };
        let id = self.run_sandbox(config).await?;
        for config in clone.containers {
            let name = config.name.clone();
            let container = self.create_container(&id, config).await?;
            match had.contains(&name) {
                true => self.exit(&container, 0),
                false => self.start_container(&container).await?,
            }
        }
        for volume in clone.volumes {
            self.write_volume(&id, volume).await?;
        }
        Ok(id)
    }

    async fn take_snapshot(&self, config: SnapshotConfig) -> Result<SnapshotStatus, RuntimeError> {
        self.enter("take_snapshot", config.id.as_str())?;
        self.ready(&config.source, "take a snapshot")?;
        self.wait_until(|fake| {
            let state = fake.lock();
            let source = state.sandboxes.get(&config.source);
            source.is_none_or(|it| !state.uncopied.contains(&it.status.config.metadata.uid))
        })
        .await;
        let exited = self.had_exited(&config.source);
        let mut state = self.lock();
        let sandbox = state.sandboxes.get(&config.source);
        let sandbox = sandbox.ok_or_else(|| not_found("sandbox", &config.source))?;
        let all = state.containers.values().map(|it| &it.status);
        let own = all.filter(|it| it.sandbox == config.source);
        let status = SnapshotStatus {
            id: config.id.clone(),
            source: sandbox.status.config.metadata.clone(),
            ready: true,
            size_bytes: 4096,
            taken_unix_nanos: now_nanos(),
            containers: own.clone().map(|it| it.config.clone()).collect(),
            image_ids: own.map(|it| it.image_id.clone()).collect(),
        };
        state.snapshots.insert(config.id, (status.clone(), exited));
        Ok(status)
    }

    async fn list_snapshots(&self) -> Vec<SnapshotStatus> {
        let state = self.lock();
        state.snapshots.values().map(|it| it.0.clone()).collect()
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        self.enter("remove_snapshot", id.as_str())?;
        self.lock().snapshots.remove(id);
        Ok(())
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.enter("stop_sandbox", id.as_str())?;
        for container in self.containers_of(id) {
            self.end(&container, 137, "Error", "the sandbox was stopped");
        }
        if let Some(sandbox) = self.lock().sandboxes.get_mut(id) {
            sandbox.status.state = SandboxState::NotReady;
        }
        self.emit(RuntimeEvent::Sandbox(id.clone()));
        Ok(())
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.enter("remove_sandbox", id.as_str())?;
        for container in self.containers_of(id) {
            self.end(&container, 137, "Error", "the sandbox was removed");
        }
        let mut state = self.lock();
        state
            .containers
            .retain(|_, container| container.status.sandbox != *id);
        state.sandboxes.remove(id);
        drop(state);
        self.emit(RuntimeEvent::Sandbox(id.clone()));
        Ok(())
    }

    async fn sandbox(&self, id: &SandboxId) -> Option<SandboxStatus> {
        self.lock()
            .sandboxes
            .get(id)
            .map(|sandbox| sandbox.status.clone())
    }

    async fn list_sandboxes(&self) -> Vec<SandboxStatus> {
        self.lock()
            .sandboxes
            .values()
            .map(|sandbox| sandbox.status.clone())
            .collect()
    }

    async fn write_volume(&self, id: &SandboxId, volume: VolumeConfig) -> Result<(), RuntimeError> {
        self.enter("write_volume", &volume.name)?;
        self.ready(id, "write a volume")?;
        if let Some(sandbox) = self.lock().sandboxes.get_mut(id) {
            sandbox.volumes.insert(volume.name.clone(), volume);
        }
        self.touch();
        Ok(())
    }

    async fn share(&self, id: &SandboxId, share: HostShare) -> Result<String, RuntimeError> {
        self.enter("share", id.as_str())?;
        self.ready(id, "share a host path")?;
        let mut state = self.lock();
        let sandbox = state
            .sandboxes
            .get_mut(id)
            .ok_or_else(|| not_found("sandbox", id))?;
        sandbox.shares.push(share);
        Ok(format!("d{:02}", sandbox.shares.len() - 1))
    }

    async fn attach_device(
        &self,
        id: &SandboxId,
        _device: HostDevice,
    ) -> Result<u32, RuntimeError> {
        self.enter("attach_device", id.as_str())?;
        self.ready(id, "attach a device")?;
        Ok(222)
    }

    async fn grow_volume(&self, id: &SandboxId, volume: &str) -> Result<(), RuntimeError> {
        self.enter("grow_volume", &format!("{id}/{volume}"))
    }

    async fn detach_unused(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.enter("detach_unused", id.as_str())
    }

    async fn resize_sandbox(
        &self,
        id: &SandboxId,
        update: SandboxUpdate,
    ) -> Result<(), RuntimeError> {
        self.enter("resize_sandbox", id.as_str())?;
        self.ready(id, "resize the sandbox")?;
        if let Some(sandbox) = self.lock().sandboxes.get_mut(id) {
            let status = &mut sandbox.status;
            (status.vcpus, status.memory_mib) = (update.vcpus, update.memory_mib);
            if let Some(memo) = update.memo {
                status.config.memo = memo;
            }
        }
        self.emit(RuntimeEvent::Sandbox(id.clone()));
        Ok(())
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId, RuntimeError> {
        self.enter("create_container", &config.name)?;
        self.ready(sandbox, "create a container")?;
        let image = self.image(&config.image).await;
        let image = image.ok_or_else(|| ImageError::NotFound(config.image.clone()))?;
        for mount in config.mounts.iter().filter(|mount| !mount.image.is_empty()) {
            if self.image(&mount.image).await.is_none() {
                let missing = format!("{} does not exist", mount.image);
                return Err(RuntimeError::ImageVolume(missing));
            }
        }
        let mut state = self.lock();
        let same = |container: &&FakeContainer| {
            let status = &container.status;
            status.sandbox == *sandbox
                && status.config.name == config.name
                && status.config.attempt == config.attempt
        };
        if let Some(known) = state.containers.values().find(same) {
            return Ok(known.status.id.clone());
        }
        let directory = state
            .sandboxes
            .get(sandbox)
            .map(|sandbox| sandbox.status.config.log_directory.clone());
        let id = ContainerId::random();
        let status = ContainerStatus {
            id: id.clone(),
            sandbox: sandbox.clone(),
            log_path: directory.unwrap_or_default().join(&config.log_path),
            state: ContainerState::Created,
            paused: false,
            image_id: image.id.to_string(),
            user: Some(ContainerUser {
                uid: config.security.run_as_user.unwrap_or(0),
                gid: config.security.run_as_group.unwrap_or(0),
                groups: config.security.supplemental_groups.clone(),
            }),
            image_ref: image
                .digests
                .first()
                .map_or_else(|| image.id.to_string(), ToString::to_string),
            created_unix_nanos: now_nanos(),
            started_unix_nanos: 0,
            finished_unix_nanos: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            config,
        };
        let container = FakeContainer {
            status,
            cutter: LineCutter::default(),
            fanout: Arc::default(),
            stdin: Vec::new(),
        };
        state.containers.insert(id.clone(), container);
        drop(state);
        self.emit(RuntimeEvent::Container(sandbox.clone(), id.clone()));
        Ok(id)
    }

    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.enter("start_container", id.as_str())?;
        let sandbox = {
            let mut state = self.lock();
            let container = state
                .containers
                .get_mut(id)
                .ok_or_else(|| not_found("container", id))?;
            match container.status.state {
                ContainerState::Running => return Ok(()),
                ContainerState::Created => {}
                other => {
                    let state = format!("{other:?}").to_lowercase();
                    let id = id.to_string();
                    return Err(RuntimeError::State {
                        action: "start",
                        kind: "container",
                        id,
                        state,
                    });
                }
            }
            container.status.state = ContainerState::Running;
            container.status.started_unix_nanos = now_nanos();
            container.status.sandbox.clone()
        };
        self.emit(RuntimeEvent::Container(sandbox, id.clone()));
        Ok(())
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        self.enter("stop_container", id.as_str())?;
        if self.running(id, "stop").is_err() {
            return Ok(());
        }
        let obedient = self.lock().obedient;
        if obedient && !grace.is_zero() {
            self.exit(id, 143);
            return Ok(());
        }
        let ended = self.wait_until(|runtime| runtime.running(id, "stop").is_err());
        if tokio::time::timeout(grace, ended).await.is_err() {
            self.exit(id, 137);
        }
        Ok(())
    }

    async fn set_paused(&self, id: &ContainerId, paused: bool) -> Result<(), RuntimeError> {
        self.enter(if paused { "pause" } else { "unpause" }, id.as_str())?;
        self.running(id, "pause a container")?;
        let mut state = self.lock();
        let Some(container) = state.containers.get_mut(id) else {
            return Ok(());
        };
        container.status.paused = paused;
        let sandbox = container.status.sandbox.clone();
        drop(state);
        self.emit(RuntimeEvent::Container(sandbox, id.clone()));
        Ok(())
    }

    async fn suspend_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.enter("suspend_sandbox", id.as_str())?;
        self.set_suspended(id, true)
    }

    async fn resume_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.enter("resume_sandbox", id.as_str())?;
        self.set_suspended(id, false)
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.enter("remove_container", id.as_str())?;
        self.exit(id, 137);
        let removed = self.lock().containers.remove(id);
        if let Some(container) = removed {
            // There may be none.
            drop(std::fs::remove_file(&container.status.log_path));
            self.emit(RuntimeEvent::Container(
                container.status.sandbox,
                id.clone(),
            ));
        }
        Ok(())
    }

    async fn update_container(
        &self,
        id: &ContainerId,
        update: ContainerUpdate,
    ) -> Result<(), RuntimeError> {
        self.enter("update_container", id.as_str())?;
        let mut state = self.lock();
        let container = state
            .containers
            .get_mut(id)
            .ok_or_else(|| not_found("container", id))?;
        if container.status.state == ContainerState::Exited {
            return Err(RuntimeError::State {
                action: "update",
                kind: "container",
                id: id.to_string(),
                state: "exited".into(),
            });
        }
        container.status.config.resources = update.resources;
        container.status.config.memo = update.memo;
        Ok(())
    }

    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.enter("reopen_log", id.as_str())?;
        self.running(id, "reopen the log of")?;
        let status = self.container(id).await;
        let status = status.ok_or_else(|| not_found("container", id))?;
        append(&status, &[]).map_err(|error| storage("reopen a container log", error))
    }

    async fn container(&self, id: &ContainerId) -> Option<ContainerStatus> {
        self.lock()
            .containers
            .get(id)
            .map(|container| container.status.clone())
    }

    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus> {
        let state = self.lock();
        let statuses = state.containers.values().map(|container| &container.status);
        statuses
            .filter(|status| sandbox.is_none_or(|id| status.sandbox == *id))
            .cloned()
            .collect()
    }

    /// Every running container has used one second and 1 MiB.
    async fn stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        self.enter("stats", id.as_str())?;
        self.ready(id, "read statistics")?;
        let containers = self.list_containers(Some(id)).await;
        let running = containers
            .iter()
            .filter(|container| container.state == ContainerState::Running);
        let stats = |container: &ContainerStatus| ContainerStats {
            id: container.id.clone(),
            cpu_usage_nanos: 1_000_000_000,
            memory_usage: 1 << 20,
            memory_working_set: 1 << 20,
            memory_rss: 1 << 19,
            page_faults: 7,
            major_page_faults: 1,
            pids: 1,
            detail: None,
        };
        Ok(SandboxStats {
            unix_nanos: now_nanos(),
            memory_total: 128 << 20,
            memory_available: 64 << 20,
            interfaces: vec![InterfaceStats {
                name: "eth0".into(),
                rx_bytes: 100,
                tx_bytes: 200,
                ..InterfaceStats::default()
            }],
            containers: running.map(stats).collect(),
        })
    }

    async fn detailed_stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        let mut stats = self.stats(id).await?;
        for container in &mut stats.containers {
            container.detail = Some(Box::new(ContainerDetail {
                cpu_user_nanos: 600_000_000,
                cpu_system_nanos: 400_000_000,
                processes: 1,
                threads_max: 100,
                file_descriptors: 3,
                sockets: 1,
                open_files_soft: 1024,
                huge_pages: vec![("2MB".into(), 0, 0)],
                devices: vec![DeviceStats {
                    name: "sdb".into(),
                    major: 8,
                    minor: 16,
                    reads: 1,
                    read_bytes: 4096,
                    writes: 2,
                    write_bytes: 8192,
                }],
                pressure: Some(Pressure::default()),
                fs_device: "sda".into(),
                fs_limit: 1 << 30,
                fs_inodes: 1000,
                fs_inodes_free: 900,
                fs_usage: 12_288,
                fs_inodes_used: 2,
                ..ContainerDetail::default()
            }));
        }
        Ok(stats)
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.events.subscribe()
    }

    async fn exec_in_guest(
        &self,
        id: &ContainerId,
        config: ExecConfig,
    ) -> Result<Session, RuntimeError> {
        self.enter("exec_in_guest", id.as_str())?;
        self.exec(id, config).await
    }

    async fn exec(&self, id: &ContainerId, config: ExecConfig) -> Result<Session, RuntimeError> {
        self.enter("exec", id.as_str())?;
        self.running(id, "run a process")?;
        let paused = self.lock().containers.get(id).map(|c| c.status.paused);
        if paused == Some(true) {
            return Err(RuntimeError::Paused(id.to_string()));
        }
        let hook = Arc::clone(&self.lock().exec);
        let (stdin, mut input) = mpsc::channel::<Bytes>(8);
        let (output, output_rx) = mpsc::channel(8);
        let (resize, _sizes) = mpsc::channel(8);
        let (exit, exit_rx) = oneshot::channel();
        let (with_stdin, tty, id) = (config.stdin, config.tty, id.clone());
        tokio::spawn(async move {
            let mut all = Vec::new();
            while let (true, Some(data)) = (with_stdin, input.recv().await) {
                all.extend_from_slice(&data);
            }
            // A hook may wait for its test.
            let run = tokio::task::spawn_blocking(move || hook(&id, &config, &all));
            let Ok((stdout, stderr, code)) = run.await else {
                return;
            };
            for piece in [Output::Stdout(stdout.into()), Output::Stderr(stderr.into())] {
                let (Output::Stdout(data) | Output::Stderr(data)) = &piece;
                if !data.is_empty() && output.send(piece).await.is_err() {
                    return;
                }
            }
            drop(output);
            drop(exit.send(Ok(code)));
        });
        Ok(Session {
            stdin: with_stdin.then_some(stdin),
            output: output_rx,
            resize: tty.then_some(resize),
            exit: exit_rx,
        })
    }

    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        self.enter("attach", id.as_str())?;
        let fanout = self.running(id, "attach")?;
        let Some(subscription) = fanout.subscribe(false) else {
            return Err(not_found("container", id));
        };
        let (stdin_tx, mut input) = mpsc::channel::<Bytes>(8);
        let (resize, _sizes) = mpsc::channel(8);
        let (exit, exit_rx) = oneshot::channel();
        let (runtime, container) = (self.clone(), id.clone());
        tokio::spawn(async move {
            while let Some(data) = input.recv().await {
                if let Some(container) = runtime.lock().containers.get_mut(&container) {
                    container.stdin.extend_from_slice(&data);
                }
                runtime.touch();
            }
        });
        let (runtime, container) = (self.clone(), id.clone());
        tokio::spawn(async move {
            runtime
                .wait_until(|runtime| runtime.running(&container, "attach").is_err())
                .await;
            let status = runtime.container(&container).await;
            drop(exit.send(Ok(status.map_or(137, |status| status.exit_code))));
        });
        let tty = self
            .container(id)
            .await
            .is_some_and(|status| status.config.tty);
        Ok(Session {
            stdin: stdin.then_some(stdin_tx),
            output: subscription.output,
            resize: tty.then_some(resize),
            exit: exit_rx,
        })
    }

    /// An echo server on every port.
    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Connection, RuntimeError> {
        self.enter("port_forward", &port.to_string())?;
        self.ready(id, "connect to a port")?;
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(ours);
            drop(tokio::io::copy(&mut reader, &mut writer).await);
            drop(tokio::io::AsyncWriteExt::shutdown(&mut writer).await);
        });
        Ok(Box::new(theirs))
    }

    async fn pull_image(
        &self,
        reference: &ImageReference,
        _credentials: Credentials,
        _progress: Option<PullProgress>,
    ) -> Result<Image, RuntimeError> {
        let name = reference.to_string();
        self.enter("pull_image", &name)?;
        let mut state = self.lock();
        let known = |images: &HashMap<String, Image>| {
            images
                .values()
                .find(|image| image.tags.contains(reference) || image.digests.contains(reference))
                .cloned()
        };
        let Some(image) = known(&state.pulls).or_else(|| known(&state.images)) else {
            let message = "not in this registry".to_owned();
            return Err(ImageError::NoSuchImage {
                reference: Box::new(reference.clone()),
                message,
            }
            .into());
        };
        state.images.insert(name, image.clone());
        Ok(image)
    }

    async fn image(&self, reference: &str) -> Option<Image> {
        let state = self.lock();
        let normal = reference.parse::<ImageReference>().ok();
        let named = |image: &&Image| {
            image.id.as_str() == reference
                || normal
                    .as_ref()
                    .is_some_and(|name| image.tags.contains(name) || image.digests.contains(name))
        };
        state
            .images
            .get(reference)
            .or_else(|| state.images.values().find(named))
            .cloned()
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        self.enter("list_images", "")?;
        let mut images: Vec<Image> = Vec::new();
        for image in self.lock().images.values() {
            if !images.iter().any(|other| other.id == image.id) {
                images.push(image.clone());
            }
        }
        Ok(images)
    }

    async fn remove_image(&self, reference: &str) -> Result<(), RuntimeError> {
        self.enter("remove_image", reference)?;
        let found = self.image(reference).await;
        let image = found.ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
        let mut state = self.lock();
        let id = image.id.to_string();
        let mut statuses = state.containers.values().map(|container| &container.status);
        if statuses.any(|status| status.image_id == id) {
            return Err(ImageError::InUse(reference.to_owned()).into());
        }
        state.images.retain(|_, other| other.id != image.id);
        Ok(())
    }

    async fn figures(&self) -> NodeFigures {
        let state = self.lock();
        let ready = state
            .sandboxes
            .iter()
            .filter(|(_, sandbox)| sandbox.status.state == SandboxState::Ready);
        let host_memory: BTreeMap<_, _> = ready.map(|(id, _)| (id.clone(), 64 << 20)).collect();
        NodeFigures {
            starts: StartFigures {
                from_template: host_memory.len() as u64,
                ..StartFigures::default()
            },
            host_memory,
            ..NodeFigures::default()
        }
    }

    async fn disk_usage(&self) -> Result<DiskUsage, RuntimeError> {
        self.enter("disk_usage", "")?;
        let usage = |path: &str| FilesystemUsage {
            path: path.into(),
            used_bytes: 1 << 20,
            files: 3,
        };
        Ok(DiskUsage {
            images: usage("/var/tmp"),
            containers: usage("/tmp"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{container_config, sandbox_config};

    #[tokio::test]
    async fn the_fake_behaves_like_a_runtime() {
        let temp = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::new();
        runtime.add_remote_image("web", ImageConfig::default());
        let config = SandboxConfig {
            log_directory: temp.path().into(),
            ..sandbox_config("a")
        };
        let sandbox = runtime.run_sandbox(config.clone()).await.unwrap();
        assert_eq!(runtime.run_sandbox(config).await.unwrap(), sandbox);
        let create = || runtime.create_container(&sandbox, container_config("c"));
        assert!(matches!(create().await, Err(RuntimeError::Image(_))));
        runtime
            .pull_image(&"web".parse().unwrap(), Credentials::Anonymous, None)
            .await
            .unwrap();
        let container = create().await.unwrap();
        assert_eq!(create().await.unwrap(), container);
        assert_eq!(runtime.find("uid-a", "c"), Some(container.clone()));
        runtime.start_container(&container).await.unwrap();
        let mut session = runtime.attach(&container, false).await.unwrap();
        runtime
            .output(&container, &Output::Stdout("hi\nthere".into()))
            .unwrap();
        assert_eq!(
            session.output.recv().await,
            Some(Output::Stdout("hi\nthere".into()))
        );
        runtime
            .stop_container(&container, Duration::from_secs(1))
            .await
            .unwrap();
        assert_eq!(session.exit.await.unwrap().unwrap(), 143);
        let status = runtime.container(&container).await.unwrap();
        let log = std::fs::read_to_string(&status.log_path).unwrap();
        assert!(
            log.contains(" stdout F hi\n") && log.contains(" stdout P there\n"),
            "{log}"
        );
        runtime.fail_next("stop_sandbox", not_found("sandbox", "x"));
        assert!(runtime.stop_sandbox(&sandbox).await.is_err());
        runtime.remove_sandbox(&sandbox).await.unwrap();
        assert!(runtime.list_containers(None).await.is_empty());
    }
}

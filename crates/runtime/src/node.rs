//! The runtime of a node: finds sandboxes, starts their tasks, and answers callers.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use hypernetes_agent_api::{AgentClient, FEATURE_GUEST_EXEC, v1};
use hypernetes_types::{ContainerId, Digest, ImageReference, SandboxId, SnapshotId};
use hypernetes_vmm::{HostShare, VmExtras, VmRecord};
use tokio::{
    sync::{broadcast, oneshot},
    time::timeout,
};

use crate::{
    actor::{self, CloneFrom, ClonePlan, Handle, Request, Start, not_found},
    api::{
        CloneConfig, CloneSource, Connection, ContainerConfig, ContainerStatus, ContainerUpdate,
        DiskUsage, ExecConfig, HostDevice, PodRuntime, PullProgress, RuntimeEvent, SandboxConfig,
        SandboxState, SandboxStats, SandboxStatus, SandboxUpdate, Session, SnapshotConfig,
        SnapshotStatus, VolumeConfig,
    },
    config::RuntimeConfig,
    container,
    error::RuntimeError,
    figures::{self, NodeFigures},
    identity,
    logs::format::now_nanos,
    pool::{self, Pooled},
    process::{exec_process, guest_process},
    records::{SandboxRecord, storage},
    recovery::RecoveryReport,
    sandbox,
    scratch::blocking,
    sessions::{self, AttachInput, Place},
    shared::{Shared, Snapshot},
    stats,
    templates::{self, Wish},
    timing::{Stopwatch, Timing},
    usage,
};

/// Most that is read of a file, and shown.
const MAX_CONSOLE: u64 = 512 << 10;
const CONSOLE_TEXT: usize = 512 << 10;

/// [`PodRuntime`] on VMs.
///
/// Dropping it stops looking after the sandboxes and leaves their VMs running: the next
/// [`NodeRuntime::open`] on the same state adopts them.
#[derive(Debug)]
pub struct NodeRuntime {
    shared: Arc<Shared>,
    sandboxes: Mutex<HashMap<SandboxId, Handle>>,
    report: RecoveryReport,
}

impl Drop for NodeRuntime {
    fn drop(&mut self) {
        self.shared.closing.cancel();
    }
}

impl NodeRuntime {
    /// Opens the runtime and recovers what an earlier one left: adopts the VMs that run, finishes
    /// or undoes what was half done, and clears away what belongs to nobody.
    ///
    /// # Errors
    /// If records cannot be read or the network cannot be recovered. A single sandbox that cannot
    /// be recovered is no error: it is shown as failed.
    pub async fn open(config: RuntimeConfig) -> Result<Self, RuntimeError> {
        let shared = Arc::new(Shared::new(config));
        let (sandboxes, report) = crate::recovery::recover(&shared).await?;
        tracing::info!(?report, "the runtime is open");
        templates::spawn_maker(&shared);
        pool::spawn_filler(&shared);
        Ok(Self {
            shared,
            sandboxes: Mutex::new(sandboxes),
            report,
        })
    }

    /// What the recovery at the start found and did.
    pub fn recovery_report(&self) -> &RecoveryReport {
        &self.report
    }

    /// Has a template made in the background, from which sandboxes with the default kernel and
    /// these numbers start instead of booting. Templates for other kernels and numbers are made
    /// when they are in use.
    ///
    /// # Errors
    /// If there is no default kernel. A template that cannot be made is logged.
    pub async fn make_template(
        &self,
        vcpus: u32,
        memory_mib: u32,
        extras: VmExtras,
    ) -> Result<(), RuntimeError> {
        let config = &self.shared.config;
        let kernel = config.kernels.prepare(None, &config.hyperstart).await?;
        self.shared.templates.make_ahead(Wish {
            kernel,
            vcpus,
            memory_mib,
            nic: true,
            extras,
        });
        Ok(())
    }

    /// Whether every template that was asked for is made, or has failed.
    #[cfg(test)]
    pub(crate) fn templates_are_settled(&self) -> bool {
        self.shared.templates.is_settled()
    }

    /// Whether there is a template and all of them have their VMs in the pool.
    #[cfg(test)]
    pub(crate) fn pool_is_full(&self) -> bool {
        let templates = self.shared.templates.ready().len();
        templates > 0 && self.shared.pool.is_full(templates)
    }

    /// How many more sandboxes can have a user id of their own.
    #[cfg(test)]
    pub(crate) fn free_uids(&self) -> usize {
        let mut taken = Vec::new();
        while let Ok(uid) = self.shared.take_uid() {
            taken.push(uid);
        }
        for uid in &taken {
            self.shared.free_uid(*uid);
        }
        taken.len()
    }

    /// Images that containers on this node are made of: they must not be removed.
    pub fn images_in_use(&self) -> HashSet<Digest> {
        let mut ids = HashSet::new();
        for handle in self.handles() {
            let snapshot = handle.snapshot.borrow();
            ids.extend(
                snapshot
                    .containers
                    .values()
                    .flat_map(|record| record.image_ids())
                    .filter_map(|id| id.parse::<Digest>().ok()),
            );
        }
        let kept = self.shared.snapshots.list();
        let kept = kept.iter().flat_map(|snapshot| &snapshot.image_ids);
        ids.extend(kept.filter_map(|id| id.parse::<Digest>().ok()));
        ids
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Handle>> {
        self.sandboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> Vec<Handle> {
        self.lock().values().cloned().collect()
    }

    fn handle(&self, id: &SandboxId) -> Result<Handle, RuntimeError> {
        self.lock()
            .get(id)
            .cloned()
            .ok_or_else(|| not_found("sandbox", id))
    }

    fn handle_of(&self, container: &ContainerId) -> Result<Handle, RuntimeError> {
        let sandbox = self
            .shared
            .sandbox_of(container)
            .ok_or_else(|| not_found("container", container))?;
        self.handle(&sandbox)
            .map_err(|_gone| not_found("container", container))
    }

    /// The sandbox with this uid and attempt, made if there is none. The receiver is there for the
    /// one that was made.
    fn find_or_spawn(
        &self,
        config: &SandboxConfig,
        pooled: Option<Pooled>,
        clone: Option<&CloneConfig>,
        asked: Stopwatch,
    ) -> Result<(Handle, Option<Boot>), RuntimeError> {
        let mut sandboxes = self.lock();
        let found = sandboxes.values().find(|handle| handle.is_of(config));
        if let Some(handle) = found {
            if let Some(pooled) = pooled {
                self.shared.pool.put_back(pooled);
            }
            return Ok((handle.clone(), None));
        }
        let find = |clone: &CloneConfig| {
            let from = match &clone.source {
                CloneSource::Sandbox(id) => {
                    let source = sandboxes.get(id).cloned();
                    let source = source.ok_or_else(|| not_found("sandbox", id))?;
                    // One that is still starting might be waiting for this one.
                    actor::check_source("clone", &source)?;
                    CloneFrom::Sandbox(source)
                }
                CloneSource::Snapshot(id) => CloneFrom::Snapshot(id.clone()),
            };
            Ok::<_, RuntimeError>(ClonePlan {
                from,
                config: clone.clone(),
            })
        };
        let plan = clone.map(find).transpose()?;
        let (id, uid) = match &pooled {
            Some(pooled) => (pooled.id.clone(), pooled.uid),
            None => (SandboxId::random(), self.shared.take_uid()?),
        };
        let source = match (pooled, plan) {
            (_, Some(plan)) => actor::Source::Clone(Box::new(plan)),
            (Some(pooled), None) => actor::Source::Pool(Box::new(pooled)),
            (None, None) => actor::Source::New,
        };
        let record = SandboxRecord::new(id, config.clone(), uid, now_nanos());
        let (reply, booted) = oneshot::channel();
        let start = Start::Boot(asked, source, reply);
        let handle = actor::spawn(&self.shared, record, Vec::new(), start);
        sandboxes.insert(handle.id.clone(), handle.clone());
        Ok((handle, Some(booted)))
    }

    /// A VM that waits for a sandbox like this one.
    async fn take_pooled(&self, config: &SandboxConfig) -> Option<Pooled> {
        let pool = &self.shared.pool;
        if !pool.is_on() || self.lock().values().any(|handle| handle.is_of(config)) {
            return None;
        }
        let shared = &self.shared;
        let kernels = &shared.config.kernels;
        let kernel = kernels.prepare(config.kernel.as_ref(), &shared.config.hyperstart);
        // What is wrong with the kernel is told by the start.
        let kernel = kernel.await.ok()?;
        let size = shared.first_size(config);
        let wish = Wish {
            kernel,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            nic: config.network.is_some(),
            extras: config.extras,
        };
        let key = wish.key().ok()?;
        let taken = pool.take(&key);
        if taken.is_some() {
            shared.templates.touch(&key);
        }
        taken
    }

    /// See [`PodRuntime::run_sandbox`] and [`PodRuntime::clone_sandbox`].
    async fn bring_up(
        &self,
        config: SandboxConfig,
        clone: Option<CloneConfig>,
    ) -> Result<SandboxId, RuntimeError> {
        identity::check(&config)?;
        loop {
            let asked = Stopwatch::start();
            let pooled = match clone {
                Some(_) => None,
                None => self.take_pooled(&config).await,
            };
            let (handle, boot) = self.find_or_spawn(&config, pooled, clone.as_ref(), asked)?;
            if let Some(boot) = boot {
                let gone = |_gone| not_found("sandbox", &handle.id);
                return boot.await.map_err(gone)?.map(|()| handle.id.clone());
            }
            let mut watch = handle.snapshot.clone();
            let settled =
                watch.wait_for(|snapshot| snapshot.record.phase != sandbox::Phase::Starting);
            let Ok(snapshot) = settled.await.map(|snapshot| snapshot.clone()) else {
                return Err(not_found("sandbox", &handle.id));
            };
            if snapshot.record.phase.state() == SandboxState::Ready {
                return Ok(handle.id.clone());
            }
            if snapshot.record.was_ready
                || !matches!(
                    snapshot.record.phase,
                    sandbox::Phase::Stopping | sandbox::Phase::Stopped
                )
            {
                let failure = snapshot.record.failure.as_ref();
                let state = failure.map_or_else(
                    || format!("{:?}", snapshot.record.phase).to_lowercase(),
                    |failure| format!("not running: {}: {}", failure.reason, failure.message),
                );
                let id = handle.id.to_string();
                return Err(RuntimeError::State {
                    action: "run",
                    kind: "sandbox",
                    id,
                    state,
                });
            }
            // An earlier attempt never came up: nothing is lost by clearing it away.
            drop(snapshot);
            self.remove_sandbox(&handle.id).await?;
        }
    }

    fn forget(&self, id: &SandboxId) {
        self.lock().remove(id);
    }

    fn deadline(&self) -> Duration {
        self.shared.config.deadlines.call
    }

    /// The agent of a sandbox that is up, waiting a moment for a session that is being renewed.
    async fn client(
        &self,
        handle: &Handle,
        action: &'static str,
    ) -> Result<AgentClient, RuntimeError> {
        let patience = self.shared.config.deadlines.readopt;
        let mut watch = handle.snapshot.clone();
        // While its VM is copied nobody talks to the guest; in a moment somebody does again.
        let talks = |now: &Arc<Snapshot>| {
            let copied = now.record.frozen.is_some() && now.record.phase == sandbox::Phase::Ready;
            now.link.is_some() || !copied
        };
        let copying = self.shared.config.deadlines.boot;
        let snapshot = match timeout(copying, watch.wait_for(talks)).await {
            Ok(Ok(now)) => now.clone(),
            Ok(Err(_)) | Err(_) => handle.snapshot.borrow().clone(),
        };
        let refused = || RuntimeError::State {
            action,
            kind: "sandbox",
            id: handle.id.to_string(),
            state: format!("{:?}", snapshot.record.phase).to_lowercase(),
        };
        if let Some(error) = snapshot.stalled_error(action) {
            return Err(error);
        }
        let mut link = snapshot.link.clone().ok_or_else(refused)?;
        let client = match timeout(patience, link.wait_for(|link| link.client.is_some())).await {
            Ok(Ok(link)) => link.client.clone(),
            Ok(Err(_ended)) => None,
            Err(_late) => {
                let stalled = handle.snapshot.borrow().stalled_error(action);
                let silent = || crate::guest::silent(&handle.id, action, patience);
                return Err(stalled.unwrap_or_else(silent));
            }
        };
        client.ok_or_else(refused)
    }

    /// Waits while a container stands still only because its VM is copied, or goes on from a copy; not longer than a
    /// boot may take.
    async fn until_thawed(&self, handle: &Handle, id: &ContainerId) {
        let mut watch = handle.snapshot.clone();
        let goes_on = |now: &Arc<Snapshot>| {
            let frozen = now.record.frozen.as_ref();
            now.record.phase != sandbox::Phase::Ready || !frozen.is_some_and(|ids| ids.contains(id))
        };
        drop(timeout(self.shared.config.deadlines.boot, watch.wait_for(goes_on)).await);
    }

    fn place(&self, handle: &Handle, client: AgentClient) -> Place {
        Place {
            sandbox: handle.id.clone(),
            client,
            deadline: self.deadline(),
            snapshot: handle.snapshot.clone(),
        }
    }

    async fn read_stats(&self, id: &SandboxId, detail: bool) -> Result<SandboxStats, RuntimeError> {
        let action = "read statistics";
        let handle = self.handle(id)?;
        let client = self.client(&handle, action).await?;
        let unix_nanos = now_nanos();
        let answer = client
            .stats(v1::StatsRequest { detail }, self.deadline())
            .await
            .map_err(|error| crate::guest::error(&handle.id, action, &error))?;
        let snapshot = handle.snapshot.borrow();
        let known = |id: &ContainerId| snapshot.containers.contains_key(id);
        Ok(stats::of_guest(answer, unix_nanos, known))
    }

    /// Waits until a container has ended, or its sandbox with it.
    async fn ended(handle: &Handle, id: &ContainerId) {
        let mut snapshot = handle.snapshot.clone();
        let ended = |snapshot: &Arc<Snapshot>| {
            snapshot.gone
                || snapshot
                    .containers
                    .get(id)
                    .is_none_or(|record| !record.phase.is_live())
        };
        // An error is the end of the sandbox's task, and so of everything in it.
        drop(snapshot.wait_for(ended).await);
    }
}

type Boot = oneshot::Receiver<Result<(), RuntimeError>>;

impl NodeRuntime {
    /// Joins the first process of a container.
    async fn join(
        &self,
        id: &ContainerId,
        stdin: bool,
        early: bool,
    ) -> Result<Session, RuntimeError> {
        let handle = self.handle_of(id)?;
        let client = self.client(&handle, "attach").await?;
        let subscription = handle
            .ask(|reply| Request::Subscribe(id.clone(), early, reply))
            .await?;
        let record = handle.snapshot.borrow().containers.get(id).cloned();
        let record = record.ok_or_else(|| not_found("container", id))?;
        let input = AttachInput {
            stdin: stdin && record.config.stdin,
            stdin_once: record.config.stdin_once,
            tty: record.config.tty,
        };
        let place = self.place(&handle, client);
        // Not the handle: a session must not keep the sandbox's task alive.
        let (snapshot, container) = (handle.snapshot.clone(), id.clone());
        let leaving = place.clone();
        let ended = async move {
            let mut snapshot = snapshot;
            let code = |snapshot: &Arc<Snapshot>| match snapshot.containers.get(&container) {
                _ if sessions::is_leaving(snapshot) => Some(Err(())),
                Some(record) if record.phase.is_live() && !snapshot.gone => None,
                Some(record) => Some(Ok(record.exit_code)),
                None => Some(Ok(actor::KILLED)),
            };
            let end = snapshot.wait_for(|snapshot| code(snapshot).is_some()).await;
            let code = end.ok().and_then(|snapshot| code(&snapshot));
            code.unwrap_or(Ok(actor::KILLED))
                .map_err(|()| leaving.broken("attach", "the session has ended"))
        };
        Ok(sessions::attach(
            &self.shared,
            &place,
            id,
            subscription,
            input,
            ended,
        ))
    }

    async fn start_exec(
        &self,
        id: &ContainerId,
        config: ExecConfig,
        guest: bool,
    ) -> Result<Session, RuntimeError> {
        let action = "run a process";
        let handle = self.handle_of(id)?;
        let record = handle.snapshot.borrow().containers.get(id).cloned();
        let record = record.ok_or_else(|| not_found("container", id))?;
        if record.phase != container::Phase::Running {
            let state = format!("{:?}", record.phase).to_lowercase();
            return Err(RuntimeError::State {
                action,
                kind: "container",
                id: id.to_string(),
                state,
            });
        }
        if record.paused && !guest {
            return Err(RuntimeError::Paused(id.to_string()));
        }
        if !guest {
            self.until_thawed(&handle, id).await;
        }
        let client = self.client(&handle, action).await?;
        if guest && !client.has(FEATURE_GUEST_EXEC) {
            return Err(crate::actor::unknown_to_guest("guest"));
        }
        let process = match guest {
            true => guest_process(&record, &config)?,
            false => exec_process(&record, &config)?,
        };
        let start = v1::ExecStart {
            container_id: id.to_string(),
            process: Some(process),
            stdin: config.stdin,
            guest,
        };
        let place = self.place(&handle, client);
        sessions::exec(&self.shared, place, start, config.tty).await
    }
}

#[async_trait]
impl PodRuntime for NodeRuntime {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxId, RuntimeError> {
        self.bring_up(config, None).await
    }

    async fn clone_sandbox(
        &self,
        config: SandboxConfig,
        clone: CloneConfig,
    ) -> Result<SandboxId, RuntimeError> {
        self.bring_up(config, Some(clone)).await
    }

    async fn take_snapshot(&self, config: SnapshotConfig) -> Result<SnapshotStatus, RuntimeError> {
        let source = self.handle(&config.source)?;
        actor::check_source("take a snapshot", &source)?;
        self.shared.snapshots.take(&source, &config).await
    }

    async fn list_snapshots(&self) -> Vec<SnapshotStatus> {
        self.shared.snapshots.list()
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        self.shared.snapshots.remove(id).await
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        match self.handle(id) {
            Ok(handle) => handle.stop().await,
            Err(_unknown) => Ok(()),
        }
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        let Ok(handle) = self.handle(id) else {
            return Ok(());
        };
        match handle.remove().await {
            // Somebody else's removal came first.
            Ok(()) | Err(RuntimeError::NotFound { .. }) => {
                self.forget(id);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn sandbox(&self, id: &SandboxId) -> Option<SandboxStatus> {
        let handle = self.handle(id).ok()?;
        let snapshot = handle.snapshot.borrow();
        (!snapshot.gone).then(|| snapshot.status())
    }

    async fn list_sandboxes(&self) -> Vec<SandboxStatus> {
        let handles = self.handles();
        let snapshots = handles
            .iter()
            .map(|handle| handle.snapshot.borrow().clone());
        snapshots
            .filter(|snapshot| !snapshot.gone)
            .map(|snapshot| snapshot.status())
            .collect()
    }

    async fn write_volume(&self, id: &SandboxId, volume: VolumeConfig) -> Result<(), RuntimeError> {
        let handle = self.handle(id)?;
        handle
            .ask(|reply| Request::WriteVolume(Box::new(volume), reply))
            .await
    }

    async fn share(&self, id: &SandboxId, share: HostShare) -> Result<String, RuntimeError> {
        let handle = self.handle(id)?;
        handle.ask(|reply| Request::Share(share, reply)).await
    }

    async fn attach_device(&self, id: &SandboxId, device: HostDevice) -> Result<u32, RuntimeError> {
        let handle = self.handle(id)?;
        handle.ask(|reply| Request::Attach(device, reply)).await
    }

    async fn grow_volume(&self, id: &SandboxId, volume: &str) -> Result<(), RuntimeError> {
        let handle = self.handle(id)?;
        let volume = volume.to_owned();
        handle.ask(|reply| Request::GrowVolume(volume, reply)).await
    }

    async fn detach_unused(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        let handle = self.handle(id)?;
        handle.ask(Request::DetachUnused).await
    }

    async fn resize_sandbox(
        &self,
        id: &SandboxId,
        update: SandboxUpdate,
    ) -> Result<(), RuntimeError> {
        let handle = self.handle(id)?;
        handle.ask(|reply| Request::Resize(update, reply)).await
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId, RuntimeError> {
        let handle = self.handle(sandbox)?;
        handle
            .ask(|reply| Request::Create(Box::new(config), reply))
            .await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let handle = self.handle_of(id)?;
        handle.ask(|reply| Request::Start(id.clone(), reply)).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        let Ok(handle) = self.handle_of(id) else {
            return Ok(());
        };
        let record = handle.snapshot.borrow().containers.get(id).cloned();
        let Some(record) = record else { return Ok(()) };
        if !matches!(
            record.phase,
            container::Phase::Starting | container::Phase::Running
        ) {
            return Ok(());
        }
        let signal = |signal, all| {
            handle.ask(move |reply| Request::Signal {
                id: id.clone(),
                signal,
                all,
                reply,
            })
        };
        if !grace.is_zero() {
            let polite = async {
                signal(record.stop_signal, false).await?;
                // It takes the signal when it goes on. A kill needs no such thing.
                let paused = |snapshot: &Snapshot| {
                    let record = snapshot.containers.get(id);
                    record.is_some_and(|record| record.paused)
                };
                if paused(&handle.snapshot.borrow().clone()) {
                    handle
                        .ask(|reply| Request::SetPaused(id.clone(), false, reply))
                        .await?;
                }
                Self::ended(&handle, id).await;
                Ok::<_, RuntimeError>(())
            };
            match timeout(grace, polite).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    let error = hypernetes_telemetry::chain(&error).to_string();
                    tracing::warn!(container = %id, error, "cannot ask a container to end");
                }
                Err(_late) => {}
            }
        }
        let waited = self.shared.config.deadlines.kill;
        let kill = async {
            signal(9, true).await?;
            Self::ended(&handle, id).await;
            Ok(())
        };
        timeout(waited, kill).await.unwrap_or_else(|_late| {
            Err(crate::guest::silent(&handle.id, "end a container", waited))
        })
    }

    async fn set_paused(&self, id: &ContainerId, paused: bool) -> Result<(), RuntimeError> {
        let handle = self.handle_of(id)?;
        handle
            .ask(|reply| Request::SetPaused(id.clone(), paused, reply))
            .await
    }

    async fn suspend_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.handle(id)?.ask(Request::Suspend).await
    }

    async fn resume_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.handle(id)?.ask(Request::Resume).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let Ok(handle) = self.handle_of(id) else {
            return Ok(());
        };
        handle
            .ask(|reply| Request::RemoveContainer(id.clone(), reply))
            .await
    }

    async fn update_container(
        &self,
        id: &ContainerId,
        update: ContainerUpdate,
    ) -> Result<(), RuntimeError> {
        let handle = self.handle_of(id)?;
        handle
            .ask(|reply| Request::Update(id.clone(), Box::new(update), reply))
            .await
    }

    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let handle = self.handle_of(id)?;
        let reopener = handle
            .ask(|reply| Request::Reopener(id.clone(), reply))
            .await?;
        // Not in the sandbox's task: a log that cannot be written must not hold it up.
        let waited = self.deadline();
        match timeout(waited, reopener.reopen()).await {
            Ok(result) => result.map_err(|error| storage("reopen a container log", error)),
            Err(late) => Err(storage("reopen a container log", late)),
        }
    }

    async fn container(&self, id: &ContainerId) -> Option<ContainerStatus> {
        let handle = self.handle_of(id).ok()?;
        let snapshot = handle.snapshot.borrow();
        snapshot.container(id, self.shared.config.deadlines.silent)
    }

    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus> {
        let silent = self.shared.config.deadlines.silent;
        let handles = match sandbox {
            Some(sandbox) => self.handle(sandbox).into_iter().collect(),
            None => self.handles(),
        };
        let mut containers = Vec::new();
        for handle in handles {
            let snapshot = handle.snapshot.borrow();
            let ids = snapshot.containers.keys();
            containers.extend(ids.filter_map(|id| snapshot.container(id, silent)));
        }
        containers
    }

    async fn stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        self.read_stats(id, false).await
    }

    async fn detailed_stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        self.read_stats(id, true).await
    }

    async fn console(&self, id: &SandboxId) -> Result<String, RuntimeError> {
        let dir = self.shared.run_dir(&self.handle(id)?.id);
        let action = format!("read the console's files in {}", dir.display());
        let text = blocking(action, move || {
            let mut bytes = Vec::new();
            for path in hypernetes_vmm::console_logs(&dir) {
                match std::fs::File::open(path) {
                    Ok(file) => drop(file.take(MAX_CONSOLE).read_to_end(&mut bytes)?),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(bytes)
        });
        let text = String::from_utf8_lossy(&text.await?).into_owned();
        Ok(crate::guest::clean_console(&text, CONSOLE_TEXT))
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.shared.events.subscribe()
    }

    async fn exec(&self, id: &ContainerId, config: ExecConfig) -> Result<Session, RuntimeError> {
        self.start_exec(id, config, false).await
    }

    async fn exec_in_guest(
        &self,
        id: &ContainerId,
        config: ExecConfig,
    ) -> Result<Session, RuntimeError> {
        self.start_exec(id, config, true).await
    }

    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        self.join(id, stdin, false).await
    }

    async fn start_timing(&self, id: &SandboxId) -> Option<Timing> {
        let timing = self.handle(id).ok()?.snapshot.borrow().timing.clone();
        (!timing.total.is_zero()).then_some(timing)
    }

    async fn attach_first(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        self.join(id, stdin, true).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Connection, RuntimeError> {
        if port == 0 {
            return Err(RuntimeError::Invalid {
                field: "port".into(),
                rule: "must be 1 to 65535".into(),
            });
        }
        let action = "connect to a port";
        let handle = self.handle(id)?;
        let client = self.client(&handle, action).await?;
        let place = self.place(&handle, client);
        Ok(Box::new(
            sessions::forward(&self.shared, place, port).await?,
        ))
    }

    async fn pull_image(
        &self,
        reference: &ImageReference,
        credentials: hypernetes_image::Credentials,
        progress: Option<PullProgress>,
    ) -> Result<hypernetes_image::Image, RuntimeError> {
        Ok(self
            .shared
            .config
            .images
            .pull(reference, credentials, progress)
            .await?)
    }

    async fn image(&self, reference: &str) -> Option<hypernetes_image::Image> {
        self.shared.config.images.get(reference).await.ok()
    }

    async fn list_images(&self) -> Result<Vec<hypernetes_image::Image>, RuntimeError> {
        Ok(self.shared.config.images.list().await?)
    }

    async fn remove_image(&self, reference: &str) -> Result<(), RuntimeError> {
        let images = &self.shared.config.images;
        let id = images.get(reference).await?.id;
        Ok(images.remove(&id, &self.images_in_use()).await?)
    }

    async fn drain(&self) {
        self.shared.pool.drain().await;
    }

    async fn figures(&self) -> NodeFigures {
        let vm = |handle: &Handle| handle.snapshot.borrow().record.vm.clone();
        let vms: Vec<_> = self.handles().iter().filter_map(vm).collect();
        let memory = |vm: VmRecord| Some((vm.sandbox.clone(), figures::host_memory(&vm)?));
        let measure = move || vms.into_iter().filter_map(memory).collect();
        NodeFigures {
            starts: self.shared.starts.figures(),
            pool: self.shared.pool.figures(),
            // Only a panic keeps it away.
            host_memory: tokio::task::spawn_blocking(measure)
                .await
                .unwrap_or_default(),
        }
    }

    async fn disk_usage(&self) -> Result<DiskUsage, RuntimeError> {
        let images = self.shared.config.images.usage().await?;
        let mut containers = usage::of_tree(self.shared.scratch.root().to_owned()).await?;
        let kept = usage::of_tree(self.shared.snapshots.root().to_owned()).await?;
        containers.used_bytes += kept.used_bytes;
        containers.files += kept.files;
        Ok(DiskUsage { images, containers })
    }
}

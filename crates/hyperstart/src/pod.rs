//! What the VM is: its configuration, volumes and containers. Survives connections.

mod personalize;

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hypernetes_agent_api::v1;
use hypernetes_container::{FileBind, Job, PidNamespace, Reply, Spawned, UserMap};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::{Semaphore, broadcast, oneshot};

use crate::{
    console::log,
    container::Container,
    disks::{Layers, blocking},
    error::{Attempt, GuestError},
    filesystem,
    hugepages::HugePages,
    reaper::{Ended, Reaper},
    request, sandbox,
    users::{self, Users},
    volume::Volumes,
};

const MAX_CONTAINERS: usize = 64;
const MAX_EXECS: usize = 512;
/// Events that a slow reader may be behind.
const EVENTS: usize = 256;
/// How long a child may take to prepare a container: it mounts disks.
pub(crate) const PREPARE: Duration = Duration::from_secs(60);

/// A container, or the name of one that is being made.
#[derive(Debug)]
enum Slot {
    Reserved,
    There(Arc<Container>),
}

#[derive(Debug, Default)]
struct State {
    configured: Option<v1::ConfigureSandboxRequest>,
    files: Vec<FileBind>,
    volumes: Volumes,
    containers: HashMap<String, Slot>,
    /// First process of the shared pid namespace, if the pod has one.
    pause: Option<Arc<OwnedFd>>,
    /// The user namespace of the containers, if they have one of their own.
    users: Option<Arc<Users>>,
}

#[derive(Debug)]
struct Inner {
    reaper: Reaper,
    layers: Layers,
    huge_pages: HugePages,
    state: Mutex<State>,
    configuring: tokio::sync::Mutex<()>,
    writing: tokio::sync::Mutex<()>,
    /// The machine ends: nothing long is to go on.
    leaving: Arc<AtomicBool>,
    events: broadcast::Sender<v1::ContainerState>,
    execs: Arc<Semaphore>,
}

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Pod(Arc<Inner>);

/// Wall clock.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Pod {
    pub(crate) fn new(reaper: Reaper) -> Self {
        Self(Arc::new(Inner {
            reaper,
            layers: Layers::default(),
            huge_pages: HugePages::default(),
            state: Mutex::default(),
            configuring: tokio::sync::Mutex::default(),
            writing: tokio::sync::Mutex::default(),
            leaving: Arc::default(),
            events: broadcast::channel(EVENTS).0,
            execs: Arc::new(Semaphore::new(MAX_EXECS)),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn layers(&self) -> &Layers {
        &self.0.layers
    }

    pub(crate) fn huge_pages(&self) -> &HugePages {
        &self.0.huge_pages
    }

    pub(crate) fn execs(&self) -> &Arc<Semaphore> {
        &self.0.execs
    }

    pub(crate) fn is_configured(&self) -> bool {
        self.lock().configured.is_some()
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<v1::ContainerState> {
        self.0.events.subscribe()
    }

    pub(crate) fn emit(&self, state: v1::ContainerState) {
        // Nobody may be listening.
        drop(self.0.events.send(state));
    }

    /// Makes the VM a pod. Repeated with equal content it sets the clock and stirs the entropy again.
    pub(crate) async fn configure(
        &self,
        request: v1::ConfigureSandboxRequest,
    ) -> Result<(), GuestError> {
        let _one_at_a_time = self.0.configuring.lock().await;
        sandbox::set_clock(request.unix_nanos)?;
        sandbox::add_entropy(&request.seed)?;
        let identity = v1::ConfigureSandboxRequest {
            unix_nanos: 0,
            seed: Vec::new(),
            ..request
        };
        if let Some(known) = &self.lock().configured {
            return match *known == identity {
                true => Ok(()),
                false => Err(GuestError::AlreadyExists(
                    "the sandbox is configured otherwise".into(),
                )),
            };
        }
        if identity.rehearsal
            && (identity.share_process_namespace
                || identity.user_namespace.is_some()
                || !identity.interfaces.is_empty())
        {
            return Err(GuestError::invalid(
                "a rehearsal has neither interfaces nor namespaces",
            ));
        }
        if let Some(asked) = &identity.user_namespace {
            let map = users::map(asked)?;
            self.ensure_users(map, &identity.interfaces).await?;
        }
        let owner = self.users().map(|users| users.map);
        let files = sandbox::configure(&identity, owner).await?;
        let pause = match identity.share_process_namespace {
            true => Some(Arc::new(self.start_pause().await?)),
            false => None,
        };
        let mut state = self.lock();
        state.files = files;
        state.pause = pause;
        state.configured = Some(identity);
        Ok(())
    }

    /// Has a rehearsal be forgotten: what it mounted and wrote goes, and the VM is nobody's again.
    pub(crate) async fn forget_rehearsal(&self) -> Result<(), GuestError> {
        let _one_at_a_time = self.0.configuring.lock().await;
        let _nothing_written = self.0.writing.lock().await;
        {
            let state = self.lock();
            let rehearsed = state.configured.as_ref().is_some_and(|it| it.rehearsal);
            if !rehearsed || !state.containers.is_empty() {
                return Err(GuestError::Precondition(
                    "the sandbox is no rehearsal, or not at its end".into(),
                ));
            }
        }
        sandbox::forget().await?;
        *self.lock() = State::default();
        Ok(())
    }

    /// Makes the containers' user namespace, unless an earlier configuration that failed has.
    async fn ensure_users(
        &self,
        map: UserMap,
        interfaces: &[v1::Interface],
    ) -> Result<(), GuestError> {
        match self.users() {
            Some(users) if users.map == map => Ok(()),
            Some(_) => Err(GuestError::AlreadyExists(
                "the pod has another user namespace".into(),
            )),
            None => {
                let users = users::move_in(&self.0.reaper, map, interfaces).await?;
                self.lock().users = Some(Arc::new(users));
                Ok(())
            }
        }
    }

    pub(crate) fn users(&self) -> Option<Arc<Users>> {
        self.lock().users.clone()
    }

    async fn start_pause(&self) -> Result<OwnedFd, GuestError> {
        let (Spawned { pid, control }, ended) = self.0.reaper.spawn(PidNamespace::New)?;
        let pidfd = open_pid(pid)?;
        let answer = blocking(move || {
            control
                .set_deadline(PREPARE)
                .map_err(std::io::Error::other)?;
            control
                .send_job(&Job::Pause, &[])
                .map_err(std::io::Error::other)?;
            control.answer().map_err(std::io::Error::other)
        });
        match answer.await.attempt("start the pod's first process")? {
            (Reply::Ready { .. }, _) => {}
            (other, _) => {
                return Err(GuestError::Internal(format!(
                    "the pod's first process says {other:?}"
                )));
            }
        }
        tokio::spawn(async move {
            if let Ok(ended) = ended.await {
                log!("the pod's first process ended: {ended:?}");
            }
        });
        Ok(pidfd)
    }

    /// Starts a child in a running container's pid namespace, in the one that the pod shares, or in
    /// a new one.
    pub(crate) fn spawn_init(
        &self,
        target: Option<&str>,
    ) -> Result<(Spawned, oneshot::Receiver<Ended>, OwnedFd), GuestError> {
        let pause = self.lock().pause.clone();
        let target = target.map(|id| self.container(id)).transpose()?;
        if let Some(target) = target.as_ref().filter(|target| !target.is_running()) {
            return Err(GuestError::Precondition(format!(
                "container {} is not running: its processes cannot be joined",
                target.id()
            )));
        }
        let namespace = match (&target, &pause) {
            (Some(target), _) => PidNamespace::Of(target.pidfd().as_fd()),
            (None, Some(pause)) => PidNamespace::Of(pause.as_fd()),
            (None, None) => PidNamespace::New,
        };
        let (spawned, ended) = self.0.reaper.spawn(namespace)?;
        let pidfd = open_pid(spawned.pid)?;
        Ok((spawned, ended, pidfd))
    }

    /// Starts a child in a container's pid namespace.
    pub(crate) fn spawn_exec(
        &self,
        container: &OwnedFd,
    ) -> Result<(Spawned, oneshot::Receiver<Ended>), GuestError> {
        self.0.reaper.spawn(PidNamespace::Of(container.as_fd()))
    }

    /// Starts a child in the guest's own pid namespace.
    pub(crate) fn spawn_own(&self) -> Result<(Spawned, oneshot::Receiver<Ended>), GuestError> {
        self.0.reaper.spawn(PidNamespace::Own)
    }

    pub(crate) async fn write_volume(
        &self,
        volume: v1::Volume,
        gid: Option<u32>,
    ) -> Result<(), GuestError> {
        let _one_at_a_time = self.0.writing.lock().await;
        if !self.is_configured() {
            return Err(not_configured());
        }
        let disk = self.lock().volumes.new_disk(&volume)?;
        if let Some(disk) = disk {
            disk.mount().await?;
        }
        let file_system = self.lock().volumes.new_file_system(&volume)?;
        if let Some(file_system) = file_system {
            file_system.mount(gid, &self.0.leaving).await?;
        }
        let share = self.lock().volumes.new_share(&volume)?;
        if let Some(share) = share {
            share.mount().await?;
        }
        self.lock().volumes.write(volume, gid)
    }

    /// Takes notice of a disk that has become larger, and grows the file system on it.
    pub(crate) async fn grow_disk(&self, slot: u32, bytes: u64) -> Result<(), GuestError> {
        let _one_at_a_time = self.0.writing.lock().await;
        filesystem::grow_disk(slot, bytes).await
    }

    /// The child's job for a container, from the pod's volumes and files.
    pub(crate) fn plan(
        &self,
        request: &v1::CreateContainerRequest,
        places: &request::Places,
    ) -> Result<hypernetes_container::InitSpec, GuestError> {
        let state = self.lock();
        let mut spec = request::init(request, places, &state.volumes, &state.files)?;
        spec.process.users = state.users.as_ref().map(|users| users.map);
        Ok(spec)
    }

    /// Takes an id for a container that is to be made.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation, GuestError> {
        if !request::is_plain_name(id) {
            return Err(GuestError::Invalid(format!("{id:?} is no container id")));
        }
        let mut state = self.lock();
        if state.configured.is_none() {
            return Err(not_configured());
        }
        if state.containers.contains_key(id) {
            return Err(GuestError::AlreadyExists(format!("container {id} exists")));
        }
        if state.containers.len() >= MAX_CONTAINERS {
            return Err(GuestError::Exhausted(format!(
                "more than {MAX_CONTAINERS} containers"
            )));
        }
        state.containers.insert(id.to_owned(), Slot::Reserved);
        Ok(Reservation {
            pod: self.clone(),
            id: id.to_owned(),
            kept: false,
        })
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, GuestError> {
        match self.lock().containers.get(id) {
            Some(Slot::There(container)) => Ok(container.clone()),
            Some(Slot::Reserved) | None => {
                Err(GuestError::NotFound(format!("there is no container {id}")))
            }
        }
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        let state = self.lock();
        state
            .containers
            .values()
            .filter_map(|slot| match slot {
                Slot::There(container) => Some(container.clone()),
                Slot::Reserved => None,
            })
            .collect()
    }

    /// Forgets a container that has been removed.
    pub(crate) fn forget(&self, id: &str) {
        self.lock().containers.remove(id);
    }

    /// Kills everything and powers the VM off.
    pub(crate) async fn shut_down(&self) {
        self.0.leaving.store(true, Ordering::Relaxed);
        let containers = self.containers();
        for container in &containers {
            container.kill();
        }
        for container in &containers {
            if tokio::time::timeout(Duration::from_secs(2), container.wait())
                .await
                .is_err()
            {
                log!("container {} does not end", container.id());
            }
        }
        filesystem::unmount_all().await;
        sandbox::unmount_scratch().await;
        sandbox::power_off();
    }
}

fn not_configured() -> GuestError {
    GuestError::Precondition("the sandbox is not configured".into())
}

pub(crate) fn open_pid(pid: i32) -> Result<OwnedFd, GuestError> {
    let pid =
        Pid::from_raw(pid).ok_or_else(|| GuestError::Internal("a child without a pid".into()))?;
    pidfd_open(pid, PidfdFlags::empty()).attempt("open a child process")
}

/// An id that is taken until the container is there, or given back.
#[derive(Debug)]
pub(crate) struct Reservation {
    pod: Pod,
    id: String,
    kept: bool,
}

impl Reservation {
    pub(crate) fn keep(mut self, container: Arc<Container>) {
        self.kept = true;
        self.pod
            .lock()
            .containers
            .insert(self.id.clone(), Slot::There(container));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            self.pod.lock().containers.remove(&self.id);
        }
    }
}

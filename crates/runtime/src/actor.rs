//! The task that owns one sandbox.
//!
//! Everything that changes a sandbox or its containers happens here, one thing after the other:
//! requests, words of the guest, the end of the VM. What others may see is published as a
//! [`Snapshot`]. Long waits are not done here: whoever stops a container waits at the snapshot.
//!
//! Each step writes its intent first. A failed write means that the step is not done; for what the
//! guest did by itself, which cannot be undone, it means that a restarted node learns it again.

mod attached;
mod boot;
mod clone;
mod containers;
mod copy;
mod cpus;
mod extras;
mod guest;
mod pause;
mod pooled;
mod release;
mod suspend;
mod volumes;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use hypernetes_agent_api::AgentClient;
use hypernetes_types::{ContainerId, CpuSet, SandboxId};
use hypernetes_vmm::{HostShare, Vm, VmExit};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{Instrument, Span};

use crate::{
    api::{
        ContainerConfig, ContainerUpdate, HostDevice, RuntimeEvent, SandboxConfig, SandboxUpdate,
        VolumeConfig,
    },
    container,
    error::RuntimeError,
    link::{GuestEvent, Link},
    logs::{
        fanout::Subscription,
        pump::{Pump, Reopener},
    },
    pool::Pooled,
    records::{ContainerRecord, SandboxRecord},
    sandbox::{self, Phase},
    shared::{Shared, Snapshot},
    timing::{Stopwatch, Timing},
};

/// Requests that may wait for one sandbox.
const QUEUE: usize = 64;

pub(crate) use clone::{CloneFrom, ClonePlan};
pub(crate) use containers::unknown_to_guest;
pub(crate) use copy::{Copied, CopyDirectory, CopyPlan, MEMORY, check_same};
pub(crate) use release::KILLED;
#[cfg(test)]
pub(crate) use suspend::GO_ON_ATTEMPTS;
pub(crate) use suspend::{draft, let_go_on, sync_parent};

pub(crate) type Reply<T> = oneshot::Sender<Result<T, RuntimeError>>;

/// What is asked of a sandbox's task.
#[derive(Debug)]
pub(crate) enum Request {
    Stop(Reply<()>),
    Remove(Reply<()>),
    WriteVolume(Box<VolumeConfig>, Reply<()>),
    Share(HostShare, Reply<String>),
    Resize(SandboxUpdate, Reply<()>),
    Attach(HostDevice, Reply<u32>),
    GrowVolume(String, Reply<()>),
    DetachUnused(Reply<()>),
    Create(Box<ContainerConfig>, Reply<ContainerId>),
    Start(ContainerId, Reply<()>),
    Signal {
        id: ContainerId,
        signal: u32,
        all: bool,
        reply: Reply<()>,
    },
    SetPaused(ContainerId, bool, Reply<()>),
    /// Copies the VM for another sandbox or a snapshot.
    CopyFor(CopyPlan, Reply<Copied>),
    Suspend(Reply<()>),
    Resume(Reply<()>),
    RemoveContainer(ContainerId, Reply<()>),
    Update(ContainerId, Box<ContainerUpdate>, Reply<()>),
    Reopener(ContainerId, Reply<Reopener>),
    Subscribe(ContainerId, bool, Reply<Subscription>),
}

/// How others reach a sandbox's task. The task ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(crate) id: SandboxId,
    pub(crate) requests: mpsc::Sender<(Span, Request)>,
    pub(crate) snapshot: watch::Receiver<Arc<Snapshot>>,
    /// Cancelled as soon as somebody wants the sandbox stopped: ends what waits for the guest.
    stopping: CancellationToken,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl Handle {
    /// Asks and waits for the answer. Dropped, what was asked is still done.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, RuntimeError> {
        let (reply, answer) = oneshot::channel();
        let gone = || RuntimeError::NotFound {
            kind: "sandbox",
            id: self.id.to_string(),
        };
        self.requests
            .send((Span::current(), request(reply)))
            .await
            .map_err(|_gone| gone())?;
        answer.await.map_err(|_gone| gone())?
    }

    /// Whether it is the sandbox of this uid and attempt.
    pub(crate) fn is_of(&self, config: &SandboxConfig) -> bool {
        let snapshot = self.snapshot.borrow();
        let (has, wanted) = (&snapshot.record.config.metadata, &config.metadata);
        !snapshot.gone && has.uid == wanted.uid && has.attempt == wanted.attempt
    }

    /// Stops the sandbox, ahead of whatever its task is waiting for.
    pub(crate) async fn stop(&self) -> Result<(), RuntimeError> {
        self.stopping.cancel();
        self.ask(Request::Stop).await
    }

    /// Removes the sandbox, ahead of whatever its task is waiting for.
    pub(crate) async fn remove(&self) -> Result<(), RuntimeError> {
        self.stopping.cancel();
        self.ask(Request::Remove).await
    }
}

/// Where a sandbox's VM comes from.
pub(crate) enum Source {
    /// It boots, or goes on from a template.
    New,
    /// It waits in the pool.
    Pool(Box<Pooled>),
    /// It goes on from another sandbox.
    Clone(Box<ClonePlan>),
}

/// How a sandbox's task begins.
pub(crate) enum Start {
    /// With a VM to come up; the answer goes to whoever asked first.
    Boot(Stopwatch, Source, Reply<()>),
    /// With a VM that survived a restart.
    Adopted(Arc<dyn Vm>),
    /// Without a VM.
    Rest,
}

/// A container in memory.
#[derive(Debug)]
struct Member {
    record: ContainerRecord,
    pump: Option<Pump>,
    /// Since when the guest is known to have it.
    live_since: Instant,
    /// Its end is known and waits for the last output.
    ending: bool,
}

impl Member {
    fn new(record: ContainerRecord) -> Self {
        Self {
            record,
            pump: None,
            live_since: Instant::now(),
            ending: false,
        }
    }
}

/// What comes later than the word of the guest.
#[derive(Debug)]
enum Late {
    Ended(ContainerId, guest::Ending),
    Drained(ContainerId),
}

struct Actor {
    shared: Arc<Shared>,
    record: SandboxRecord,
    members: BTreeMap<ContainerId, Member>,
    /// Those that were removed last: what the guest said of their end may still be on its way.
    removed: VecDeque<ContainerId>,
    vm: Option<Arc<dyn Vm>>,
    link: Option<Link>,
    /// The CPUs that the VM was told to run on, if that is known.
    pinned: Option<Option<CpuSet>>,
    /// Slots that the VM has disks in.
    plugged: BTreeSet<u32>,
    /// Those of devices that wait for their container.
    pending: BTreeSet<u32>,
    /// When containers last went on that stood still for a copy of the VM.
    thawed: Option<Instant>,
    late: JoinSet<Late>,
    /// With the span of whoever asks: what is done for it is part of its trace.
    requests: mpsc::Receiver<(Span, Request)>,
    published: watch::Sender<Arc<Snapshot>>,
    stopping: CancellationToken,
    timing: Timing,
    /// Words about containers that do not exist, and other nonsense.
    anomalies: u64,
    /// The VM stood still when last heard of, for want of room for what its guest writes.
    stalled: bool,
    gone: bool,
}

enum Wake {
    Vm(VmExit),
    Stalled(bool),
    Guest(Option<GuestEvent>),
    Late(Late),
    Request(Option<(Span, Request)>),
}

/// Starts the task of a sandbox.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    record: SandboxRecord,
    containers: Vec<ContainerRecord>,
    start: Start,
) -> Handle {
    let id = record.id.clone();
    let (requests_tx, requests) = mpsc::channel(QUEUE);
    let members: BTreeMap<_, _> = containers
        .into_iter()
        .map(|record| (record.id.clone(), Member::new(record)))
        .collect();
    for container in members.keys() {
        shared.add_container(container, &id);
    }
    let timing = Timing::default();
    let snapshot = Arc::new(snapshot(&record, &members, &timing, None, false));
    let (published, snapshot) = watch::channel(snapshot);
    let stopping = CancellationToken::new();
    // The task outlives the call that began it: only the start is part of the caller's trace.
    let start_span = span_of(&record);
    let of = &record.config.metadata;
    let span = tracing::info_span!(parent: None, "task", sandbox = %id, pod = of.name, namespace = of.namespace);
    let actor = Actor {
        shared: Arc::clone(shared),
        record,
        members,
        removed: VecDeque::new(),
        vm: None,
        link: None,
        // A VM that begins runs anywhere; of another the adoption says it.
        pinned: Some(None),
        plugged: BTreeSet::new(),
        pending: BTreeSet::new(),
        thawed: None,
        late: JoinSet::new(),
        requests,
        published,
        stopping: stopping.clone(),
        timing,
        anomalies: 0,
        stalled: false,
        gone: false,
    };
    let task = AbortOnDropHandle::new(tokio::spawn(actor.run(start, start_span).instrument(span)));
    Handle {
        id,
        requests: requests_tx,
        snapshot,
        stopping,
        _task: Arc::new(task),
    }
}

fn span_of(record: &SandboxRecord) -> Span {
    let of = &record.config.metadata;
    tracing::info_span!("sandbox", sandbox = %record.id, pod = of.name, namespace = of.namespace)
}

fn snapshot(
    record: &SandboxRecord,
    members: &BTreeMap<ContainerId, Member>,
    timing: &Timing,
    link: Option<&Link>,
    gone: bool,
) -> Snapshot {
    let containers = members
        .iter()
        .map(|(id, member)| (id.clone(), Arc::new(member.record.clone())))
        .collect();
    Snapshot {
        record: record.clone(),
        containers,
        timing: timing.clone(),
        link: link.map(|link| link.state.clone()),
        stalled: false,
        gone,
    }
}

impl Actor {
    async fn run(mut self, start: Start, span: Span) {
        match start {
            Start::Boot(asked, source, reply) => {
                let result = self.start(asked, source).instrument(span).await;
                // Whoever asked may have gone.
                drop(reply.send(result));
            }
            Start::Adopted(vm) => self.adopted(vm).instrument(span).await,
            Start::Rest => drop(span),
        }
        while !self.gone {
            match self.wake().await {
                Wake::Vm(exit) => self.vm_exited(&exit).await,
                Wake::Stalled(stalled) => {
                    self.stalled = stalled;
                    self.publish_sandbox();
                }
                Wake::Guest(Some(event)) => self.guest_event(event).await,
                // The link ends when the VM has; the VM's end is heard of separately.
                Wake::Guest(None) => self.link = None,
                Wake::Late(Late::Ended(id, ending)) => self.container_ended(&id, ending).await,
                Wake::Late(Late::Drained(id)) => self.container_drained(&id).await,
                Wake::Request(Some((caller, request))) => {
                    let span = caller.in_scope(|| span_of(&self.record));
                    self.handle(request).instrument(span).await;
                }
                Wake::Request(None) => return,
            }
        }
    }

    async fn wake(&mut self) -> Wake {
        let Self {
            vm,
            link,
            late,
            requests,
            stalled,
            ..
        } = self;
        let vm = vm.as_ref();
        let vm_end = async {
            match vm {
                Some(vm) => vm.wait().await,
                None => std::future::pending().await,
            }
        };
        let stall = async {
            if let Some(vm) = vm {
                let mut now = vm.stalled();
                if let Ok(changed) = now.wait_for(|now| now != stalled).await {
                    return *changed;
                }
            }
            std::future::pending().await
        };
        let guest = async {
            match link {
                Some(link) => link.events.recv().await,
                None => std::future::pending().await,
            }
        };
        let later = async {
            loop {
                match late.join_next().await {
                    Some(Ok(late)) => return late,
                    // Only a panic ends such a task without a result; the next event brings it up.
                    Some(Err(_)) => {}
                    None => std::future::pending().await,
                }
            }
        };
        tokio::select! {
            exit = vm_end => Wake::Vm(exit),
            stalled = stall => Wake::Stalled(stalled),
            event = guest => Wake::Guest(event),
            late = later => Wake::Late(late),
            request = requests.recv() => Wake::Request(request),
        }
    }

    async fn handle(&mut self, request: Request) {
        // A caller that has gone gets no answer; what it asked for is done all the same.
        match request {
            Request::Stop(reply) => drop(reply.send(self.stop().await)),
            Request::Remove(reply) => drop(reply.send(self.remove().await)),
            Request::WriteVolume(volume, reply) => {
                drop(reply.send(self.write_volume(*volume).await));
            }
            Request::Share(share, reply) => {
                drop(reply.send(Box::pin(self.share(share)).await));
            }
            Request::Attach(device, reply) => {
                drop(reply.send(Box::pin(self.attach_device(device)).await));
            }
            Request::GrowVolume(volume, reply) => {
                drop(reply.send(Box::pin(self.grow_volume(&volume)).await));
            }
            Request::DetachUnused(reply) => {
                self.pending.clear();
                drop(reply.send(self.unplug_unused().await));
            }
            Request::Resize(update, reply) => {
                drop(reply.send(Box::pin(self.resize(update)).await));
            }
            Request::Create(config, reply) => {
                drop(reply.send(Box::pin(self.create(*config)).await));
            }
            Request::Start(id, reply) => drop(reply.send(self.start_container(&id).await)),
            Request::Signal {
                id,
                signal,
                all,
                reply,
            } => {
                drop(reply.send(self.signal(&id, signal, all).await));
            }
            Request::SetPaused(id, paused, reply) => {
                drop(reply.send(self.set_paused(&id, paused).await));
            }
            Request::CopyFor(plan, reply) => {
                // What nobody takes, because whoever asked has gone, goes with the answer.
                drop(reply.send(Box::pin(self.copy_for(&plan)).await));
            }
            Request::Suspend(reply) => drop(reply.send(Box::pin(self.suspend()).await)),
            Request::Resume(reply) => drop(reply.send(Box::pin(self.resume()).await)),
            Request::RemoveContainer(id, reply) => {
                drop(reply.send(self.remove_container(&id).await));
            }
            Request::Update(id, update, reply) => {
                drop(reply.send(self.update_container(&id, *update).await));
            }
            Request::Reopener(id, reply) => drop(reply.send(self.reopener(&id))),
            Request::Subscribe(id, early, reply) => drop(reply.send(self.subscribe(&id, early))),
        }
    }

    /// Shows the present state to everybody.
    fn publish(&self) {
        let link = self.link.as_ref();
        let snapshot = Snapshot {
            stalled: self.stalled && self.vm.is_some(),
            ..snapshot(&self.record, &self.members, &self.timing, link, self.gone)
        };
        self.published.send_replace(Arc::new(snapshot));
    }

    fn publish_sandbox(&self) {
        self.publish();
        self.shared
            .emit(RuntimeEvent::Sandbox(self.record.id.clone()));
    }

    fn publish_container(&self, id: &ContainerId) {
        self.publish();
        self.shared
            .emit(RuntimeEvent::Container(self.record.id.clone(), id.clone()));
    }

    /// Moves the sandbox to its next phase in memory.
    fn advance(&mut self, action: &'static str, event: sandbox::Event) -> Result<(), RuntimeError> {
        let refused = |_refused| self.refused(action);
        self.record.phase = self.record.phase.next(event).map_err(refused)?;
        Ok(())
    }

    /// Stores the sandbox's record.
    async fn save(&self) -> Result<(), RuntimeError> {
        self.shared.records.put_sandbox(&self.record).await
    }

    fn refused(&self, action: &'static str) -> RuntimeError {
        let state = match (&self.record.failure, self.record.phase) {
            (Some(failure), _) => format!("not running: {}: {}", failure.reason, failure.message),
            (None, phase) => format!("{phase:?}").to_lowercase(),
        };
        RuntimeError::State {
            action,
            kind: "sandbox",
            id: self.record.id.to_string(),
            state,
        }
    }

    fn refused_container(
        &self,
        action: &'static str,
        id: &ContainerId,
        phase: container::Phase,
    ) -> RuntimeError {
        let state = format!("{phase:?}").to_lowercase();
        RuntimeError::State {
            action,
            kind: "container",
            id: id.to_string(),
            state,
        }
    }

    /// The VM, if the sandbox is up.
    fn ready_vm(&self, action: &'static str) -> Result<Arc<dyn Vm>, RuntimeError> {
        match (&self.vm, self.record.phase) {
            (Some(vm), Phase::Ready) if !self.stopping.is_cancelled() => Ok(Arc::clone(vm)),
            _ => Err(self.refused(action)),
        }
    }

    /// The agent, waiting a moment for a session that is being renewed.
    async fn client(&self, action: &'static str) -> Result<AgentClient, RuntimeError> {
        let link = self.link.as_ref().ok_or_else(|| self.refused(action))?;
        let mut state = link.state.clone();
        let patience = self.shared.config.deadlines.readopt;
        let connected = async {
            let state = state.wait_for(|state| state.client.is_some()).await.ok()?;
            state.client.clone()
        };
        tokio::select! {
            () = self.stopping.cancelled() => Err(self.refused(action)),
            client = tokio::time::timeout(patience, connected) => match client {
                Ok(Some(client)) => Ok(client),
                Ok(None) => Err(self.refused(action)),
                Err(_late) => Err(crate::guest::silent(&self.record.id, action, patience)),
            },
        }
    }

    /// Waits for work in the VM, but not beyond the VM's end or somebody's wish to stop it.
    async fn with_vm<T>(
        &self,
        action: &'static str,
        vm: &Arc<dyn Vm>,
        work: impl Future<Output = Result<T, RuntimeError>>,
    ) -> Result<T, RuntimeError> {
        tokio::select! {
            result = work => result,
            () = self.stopping.cancelled() => Err(self.refused(action)),
            _ = vm.wait() => {
                let message = "the VM has ended".to_owned();
                Err(RuntimeError::Guest { sandbox: self.record.id.to_string(), action, message })
            }
        }
    }

    fn subscribe(&self, id: &ContainerId, early: bool) -> Result<Subscription, RuntimeError> {
        let member = self
            .members
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        let refused = || self.refused_container("attach", id, member.record.phase);
        if member.record.phase != container::Phase::Running {
            return Err(refused());
        }
        member
            .pump
            .as_ref()
            .and_then(|pump| pump.fanout.subscribe(early))
            .ok_or_else(refused)
    }
}

pub(crate) fn not_found(kind: &'static str, id: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::NotFound {
        kind,
        id: id.to_string(),
    }
}

/// Refuses a sandbox that cannot be copied, or not now.
pub(crate) fn check_source(action: &'static str, source: &Handle) -> Result<(), RuntimeError> {
    let snapshot = source.snapshot.borrow();
    match snapshot.record.phase {
        Phase::Ready | Phase::Suspended if !snapshot.gone => Ok(()),
        phase => Err(RuntimeError::State {
            action,
            kind: "sandbox",
            id: source.id.to_string(),
            state: format!("{phase:?}").to_lowercase(),
        }),
    }
}

//! One pod's task: looks, plans, writes the status, starts the steps, waits for news.

mod acts;
mod reports;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hypernetes_runtime::{ContainerState, ContainerStatus, SandboxStatus};
use hypernetes_types::ContainerId;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::Value;
use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, Id, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    events::Level,
    plan::{self, Action, Memory, Plan, Slot, View, instant},
    prober::{self, Health, Prober},
    resize, roles, status,
    steps::{Node, Outcome},
    stop::Ending,
    volumes::Built,
    wishes,
};

/// The pod as the API has it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) pod: Arc<Pod>,
    pub(crate) gone: bool,
}

/// Ways to wake a pod's task.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    notify: Notify,
    sources: AtomicBool,
}

impl Bell {
    /// The runtime has news.
    pub(crate) fn ring(&self) {
        self.notify.notify_one();
    }

    /// A ConfigMap, Secret or Network that the pod may wait for has changed.
    pub(crate) fn sources_changed(&self) {
        self.sources.store(true, Ordering::Release);
        self.notify.notify_one();
    }
}

/// The statuses as last computed, for those who ask why a container does not run.
pub(crate) type Board = Arc<Mutex<HashMap<String, PodStatus>>>;

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(crate) struct Worker {
    node: Arc<Node>,
    uid: String,
    seen: watch::Receiver<Seen>,
    bell: Arc<Bell>,
    board: Board,
    memory: Memory,
    busy: BTreeSet<Slot>,
    steps: JoinSet<Outcome>,
    slots: HashMap<Id, (Slot, AbortHandle)>,
    /// The status that the API has from us.
    written: Option<PodStatus>,
    /// Volumes as they are in the guest.
    volumes: Built,
    /// What probes have found, and who asks.
    health: prober::Board,
    probers: HashMap<ContainerId, AbortOnDrop>,
    ending: CancellationToken,
    refresh: bool,
    /// Waiting reasons of the round before, so that each is said once.
    said: Plan,
    /// Grace of the stop that is under way.
    grace: Option<i64>,
    named: Option<std::net::IpAddr>,
    /// Something failed that nobody will tell about: look again then.
    retry_at: Option<Timestamp>,
    checked: bool,
}

impl Worker {
    pub(crate) fn new(
        node: Arc<Node>,
        uid: String,
        seen: watch::Receiver<Seen>,
        bell: Arc<Bell>,
        board: Board,
    ) -> Self {
        let mut memory = Memory::default();
        let status = seen.borrow().pod.status.clone().unwrap_or_default();
        let before = status
            .container_statuses
            .iter()
            .chain(&status.init_container_statuses)
            .chain(&status.ephemeral_container_statuses);
        for container in before.flatten() {
            let next = u32::try_from(container.restart_count).unwrap_or(0)
                + u32::from(container.container_id.is_some());
            memory.container(&container.name).first_attempt = next;
        }
        Self {
            node,
            uid,
            seen,
            bell,
            board,
            memory,
            busy: BTreeSet::new(),
            steps: JoinSet::new(),
            slots: HashMap::new(),
            written: None,
            volumes: Built::default(),
            health: prober::Board::default(),
            probers: HashMap::new(),
            ending: CancellationToken::new(),
            refresh: true,
            said: Plan::default(),
            grace: None,
            named: None,
            retry_at: None,
            checked: false,
        }
    }

    /// Runs until nothing of the pod is left, or the node stops. VMs run on then.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let wake = tokio::select! {
                wake = self.round() => wake,
                () = stop.cancelled() => return,
            };
            let Some(wake) = wake else { break };
            let delay = wake.map(|at| until(at, Timestamp::now()));
            tokio::select! {
                () = stop.cancelled() => return,
                changed = self.seen.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = self.bell.notify.notified() => {}
                Some(ended) = self.steps.join_next_with_id() => self.ended(ended),
                () = tokio::time::sleep(delay.unwrap_or(Duration::MAX)), if delay.is_some() => {}
            }
            while let Some(ended) = self.steps.try_join_next_with_id() {
                self.ended(ended);
            }
        }
        self.node.names.set(&self.uid, None).await;
        self.node.tokens.forget(&self.uid);
        self.node.hooks.forget(&self.uid);
        lock(&self.board).remove(&self.uid);
    }

    /// One look at everything. The time to look again, or `None` at the end of the pod.
    async fn round(&mut self) -> Option<Option<Timestamp>> {
        let Seen { pod, gone } = self.seen.borrow_and_update().clone();
        let (sandboxes, containers) = self.node.records(&self.uid).await;
        let now = Timestamp::now();
        if self.bell.sources.swap(false, Ordering::AcqRel) {
            self.refresh = true;
            self.forgive(now);
        }
        if !self.checked {
            self.checked = true;
            if sandboxes.is_empty() {
                self.check_support(&pod);
            }
        }
        self.read_log_tails(&pod, &containers).await;
        let mut pod = Arc::unwrap_or_clone(pod);
        self.keep_written_status(&mut pod);
        self.interrupt(&pod, gone);
        self.look_after(&pod, &sandboxes, &containers);
        if self.volumes.renew_at.is_some_and(|at| at <= now) {
            self.refresh = true;
        }
        self.memory.forget_trouble(&pod);
        let view = View {
            pod: &pod,
            gone,
            sandboxes: &sandboxes,
            containers: &containers,
            memory: &self.memory,
            busy: &self.busy,
            now,
        };
        let plan = plan::plan(&view);
        if plan.finished {
            return None;
        }
        let removed = sandboxes.is_empty() && pod.metadata.deletion_timestamp.is_some();
        let next =
            (!removed && !gone).then(|| status::build(&view, &plan, self.node.config.address));
        let address = view
            .ready()
            .and_then(|sandbox| Some((sandbox.address?, sandbox.config.network.clone()?)));
        let running = endings(&sandboxes, &containers);
        let ready = view.ready().map(|sandbox| sandbox.id.clone());
        // What is to be refreshed is when it goes on.
        let suspended = view.is_suspended();
        let used = containers
            .iter()
            .any(|record| Some(&record.sandbox) == ready.as_ref());
        self.publish_names(&pod, address).await;
        if let Some(next) = next {
            self.write_status(&pod, next).await;
        }
        self.say(&pod, &plan, ready.is_some());
        let mut wake = plan.wake;
        let shared = Arc::new(pod);
        for action in &plan.actions {
            self.start(action, &shared, &sandboxes, &containers, &running, now);
        }
        let still = suspended || self.busy.contains(&Slot::Suspend);
        if let (Some(sandbox), true, true, false) = (
            ready,
            self.refresh,
            used,
            still || self.busy.contains(&Slot::Sandbox),
        ) {
            self.refresh = false;
            let (node, pod, written) = (self.node.clone(), shared, self.volumes.volumes.clone());
            if pod
                .spec
                .iter()
                .any(|spec| spec.volumes.iter().flatten().next().is_some())
            {
                self.spawn(Slot::Sandbox, async move {
                    node.refresh_volumes(&pod, sandbox, written).await
                });
            }
        }
        let due = self.volumes.renew_at.filter(|at| *at > now);
        for at in due
            .into_iter()
            .chain(resize::retry_at(self.memory.resize.as_ref()))
        {
            wake = Some(wake.map_or(at, |wake| wake.min(at)));
        }
        if let Some(at) = self.retry_at.take_if(|at| *at > now) {
            self.retry_at = Some(at);
            wake = Some(wake.map_or(at, |wake| wake.min(at)));
        }
        self.said = Plan {
            waiting: plan.waiting,
            stalled: plan.stalled,
            ..Plan::default()
        };
        // A failure that was just decided changes the plan at once.
        if plan
            .actions
            .iter()
            .any(|action| matches!(action, Action::Fail { .. }))
        {
            wake = Some(now);
        }
        Some(wake)
    }

    /// Begins probing what has come to run, ends it for what has not, and notes what was found.
    fn look_after(
        &mut self,
        pod: &Pod,
        sandboxes: &[SandboxStatus],
        containers: &[ContainerStatus],
    ) {
        if pod.metadata.deletion_timestamp.is_some() || self.memory.failed.is_some() {
            self.ending.cancel();
        }
        let running: Vec<_> = containers
            .iter()
            .filter(|record| record.state == ContainerState::Running)
            .collect();
        let runs = |id: &ContainerId| running.iter().any(|record| record.id == *id);
        let last = sandboxes.last();
        let answers = last.is_none_or(|sandbox| !sandbox.suspended && !sandbox.stalled);
        let still = wishes::is_paused(pod) || wishes::is_suspended(pod) || !answers;
        let asked = |record: &ContainerStatus| !still && !record.paused;
        self.probers.retain(|id, _| {
            let record = running.iter().find(|record| record.id == *id);
            record.is_some_and(|record| asked(record))
        });
        self.memory
            .killed
            .retain(|id| containers.iter().any(|record| record.id == *id));
        lock(&self.health).retain(|id, _| runs(id));
        for record in &running {
            if self.probers.contains_key(&record.id) {
                continue;
            }
            let Some((container, _)) = roles::find(pod, &record.config.name) else {
                continue;
            };
            let starting = self.memory.starting.contains(&container.name);
            if !prober::is_probed(&container) || starting {
                continue;
            }
            lock(&self.health)
                .entry(record.id.clone())
                .or_insert_with(|| known_health(pod, record, &container));
            if !asked(record) {
                continue;
            }
            let prober = Prober {
                node: self.node.clone(),
                pod: Arc::new(pod.clone()),
                container,
                id: record.id.clone(),
                place: place(sandboxes, record),
                started_at: instant(record.started_unix_nanos),
                board: self.health.clone(),
                bell: self.bell.clone(),
                ending: self.ending.clone(),
            };
            let task = AbortOnDrop(tokio::spawn(prober.run()));
            self.probers.insert(record.id.clone(), task);
        }
        self.memory.health = lock(&self.health).clone();
    }

    /// A changed source may be what was missing: no need to wait any longer.
    fn forgive(&mut self, now: Timestamp) {
        if self
            .memory
            .sandbox_failed
            .is_some_and(|failed| failed <= now)
        {
            self.memory.sandbox_failed = None;
        }
        for container in self.memory.containers.values_mut() {
            if container
                .trouble
                .as_ref()
                .is_some_and(|trouble| trouble.reason == "CreateContainerConfigError")
            {
                container.retry = Backoff::default();
            }
        }
    }

    /// Refuses what the node does not do before anything is made.
    fn check_support(&mut self, pod: &Pod) {
        let value = serde_json::to_value(pod).unwrap_or(Value::Null);
        let errors = hypernetes_policy::unsupported(&value);
        if errors.is_empty() {
            return;
        }
        let list: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let message = list.join("; ");
        self.node.events.pod(
            pod,
            None,
            Level::Warning,
            "UnsupportedField",
            message.clone(),
        );
        self.memory.failed = Some(("UnsupportedField".to_owned(), message));
    }

    fn retry_in(&mut self, delay: Duration) {
        let delay = jiff::SignedDuration::try_from(delay).unwrap_or(jiff::SignedDuration::ZERO);
        self.retry_at = Timestamp::now().checked_add(delay).ok();
    }
}

fn place(
    sandboxes: &[SandboxStatus],
    record: &ContainerStatus,
) -> Option<(hypernetes_types::NetworkId, std::net::IpAddr)> {
    let sandbox = sandboxes.iter().find(|s| s.id == record.sandbox)?;
    Some((sandbox.config.network.clone()?, sandbox.address?))
}

/// What runs, as it can be ended.
fn endings(sandboxes: &[SandboxStatus], containers: &[ContainerStatus]) -> Vec<Ending> {
    containers
        .iter()
        .filter(|record| record.state == ContainerState::Running)
        .map(|record| Ending {
            name: record.config.name.clone(),
            id: record.id.clone(),
            place: place(sandboxes, record),
        })
        .collect()
}

/// Health as the pod's status has it: a restart of the node makes no pod unready.
fn known_health(
    pod: &Pod,
    record: &ContainerStatus,
    container: &k8s_openapi::api::core::v1::Container,
) -> Health {
    let id = format!("{}{}", status::ID_SCHEME, record.id);
    let first = prober::at_first(container);
    let statuses = pod.status.iter().flat_map(|status| {
        let init = status.init_container_statuses.iter();
        init.chain(&status.container_statuses).flatten()
    });
    statuses
        .filter(|status| status.container_id.as_ref() == Some(&id))
        .map(|status| Health {
            started: first.started || status.started == Some(true),
            ready: first.ready || status.ready,
            failed: None,
        })
        .next()
        .unwrap_or(first)
}

fn until(at: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO)
}

/// The board is only ever locked for a moment, and a panic cannot leave it half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

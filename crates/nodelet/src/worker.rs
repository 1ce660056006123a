//! One pod's task: looks, plans, writes the status, starts the steps, waits for news.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hypernetes_runtime::{ContainerState, ContainerStatus, SandboxStatus};
use hypernetes_telemetry::chain;
use hypernetes_types::ContainerId;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, Id, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::{
    events::Level,
    logs, network,
    plan::{self, Action, Memory, Plan, Slot, Trouble, View, instant},
    prober::{self, Health, Prober},
    pull::NoImage,
    resize, roles, stall, status,
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

    /// Ends the containers that take their new resources only with a new start.
    fn restart_for_resize(&mut self, restarts: Vec<(String, ContainerId)>) {
        let pod = self.seen.borrow().pod.clone();
        for (name, id) in restarts {
            let node = self.node.clone();
            let (pod, slot) = (pod.clone(), Slot::Container(name.clone()));
            if self.busy.contains(&slot) {
                continue;
            }
            self.memory.killed.insert(id.clone());
            self.spawn(slot, async move {
                let grace = pod
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.termination_grace_period_seconds);
                let message = format!("Container {name} resize requires restart");
                let place = match node.runtime.container(&id).await {
                    Some(record) => node.place_of(&record.sandbox).await,
                    None => None,
                };
                let ending = Ending { name, id, place };
                node.kill_container(&pod, ending, message, grace.unwrap_or(30))
                    .await
            });
        }
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
                container.retry = crate::backoff::Backoff::default();
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

    /// The API's copy of the status is older than what was written last.
    fn keep_written_status(&self, pod: &mut Pod) {
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        if !matches!(phase, Some("Failed" | "Succeeded"))
            && let Some(written) = &self.written
        {
            let theirs = pod.status.take().unwrap_or_default();
            let mut status = written.clone();
            status::take_foreign(&mut status, &theirs);
            pod.status = Some(status);
        }
    }

    /// Deletion does not wait for a pull or a boot, and a shorter grace not for a longer one.
    fn interrupt(&mut self, pod: &Pod, gone: bool) {
        if !gone && pod.metadata.deletion_timestamp.is_none() {
            return;
        }
        let wanted = if gone {
            0
        } else {
            pod.metadata.deletion_grace_period_seconds.unwrap_or(30)
        };
        let hurry = self.grace.is_some_and(|grace| wanted < grace);
        for (slot, step) in self.slots.values() {
            if *slot != Slot::Teardown || hurry {
                step.abort();
            }
        }
        if hurry {
            self.grace = None;
        }
    }

    async fn read_log_tails(
        &mut self,
        pod: &Pod,
        containers: &[hypernetes_runtime::ContainerStatus],
    ) {
        let wants = |name: &str| {
            roles::find(pod, name).is_some_and(|(container, _)| {
                container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
            })
        };
        for record in containers {
            let failed = record.state == ContainerState::Exited && record.exit_code != 0;
            if failed
                && wants(&record.config.name)
                && !self.memory.log_tails.contains_key(&record.id)
                && let Ok(text) = logs::tail_text(&record.log_path).await
            {
                self.memory.log_tails.insert(record.id.clone(), text);
            }
        }
        self.memory
            .log_tails
            .retain(|id, _| containers.iter().any(|record| record.id == *id));
    }

    async fn publish_names(
        &mut self,
        pod: &Pod,
        place: Option<(std::net::IpAddr, hypernetes_types::NetworkId)>,
    ) {
        let address = place.as_ref().map(|(address, _)| *address);
        if address == self.named {
            return;
        }
        self.named = address;
        let domain = &self.node.config.cluster_domain;
        let place = place.map(|(address, network)| (network, network::names(pod, address, domain)));
        self.node.names.set(&self.uid, place).await;
    }

    async fn write_status(&mut self, pod: &Pod, next: PodStatus) {
        lock(&self.board).insert(self.uid.clone(), next.clone());
        if pod.status.as_ref() == Some(&next) {
            return;
        }
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let name = pod.metadata.name.clone().unwrap_or_default();
        let api = Api::<Pod>::namespaced(self.node.client.clone(), &namespace);
        let gated = pod.spec.as_ref().is_some_and(|spec| {
            spec.readiness_gates
                .as_ref()
                .is_some_and(|gates| !gates.is_empty())
        });
        let mut next = next;
        for _try in 0..5 {
            // The uid keeps the status off a new pod of the same name.
            let mut patch = json!({"metadata": {"uid": pod.metadata.uid}});
            if gated && let Ok(Some(now)) = api.get_opt(&name).await {
                // The gates are somebody else's conditions in the same list.
                status::take_foreign(&mut next, &now.status.unwrap_or_default());
                patch["metadata"]["resourceVersion"] = json!(now.metadata.resource_version);
            }
            patch["status"] = json!(next);
            match api
                .patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
            {
                Ok(_) => {
                    self.written = Some(next);
                    return;
                }
                Err(kube::Error::Api(status)) if status.code == 404 => return,
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    match api.get_opt(&name).await {
                        Ok(Some(other)) if other.metadata.uid == pod.metadata.uid => {}
                        _ => return,
                    }
                }
                Err(error) => {
                    tracing::warn!(namespace, pod = name, error = %chain(&error), "cannot write a pod's status");
                    break;
                }
            }
        }
        self.retry_in(Duration::from_secs(1));
    }

    fn retry_in(&mut self, delay: Duration) {
        let delay = jiff::SignedDuration::try_from(delay).unwrap_or(jiff::SignedDuration::ZERO);
        self.retry_at = Timestamp::now().checked_add(delay).ok();
    }

    /// Events for what containers newly wait for, and for a VM that stands still or goes on. One that is not up any
    /// more does neither.
    fn say(&self, pod: &Pod, plan: &Plan, up: bool) {
        if up && plan.stalled != self.said.stalled {
            stall::say(&self.node.events, pod, plan.stalled);
        }
        for (name, waiting) in &plan.waiting {
            let before = self.said.waiting.get(name).map(|before| &before.reason);
            if before == Some(&waiting.reason) {
                continue;
            }
            let events = &self.node.events;
            if waiting.reason == "CrashLoopBackOff" {
                let meta = &pod.metadata;
                let message = format!(
                    "Back-off restarting failed container {name} in pod {}_{}({})",
                    meta.name.as_deref().unwrap_or_default(),
                    meta.namespace.as_deref().unwrap_or_default(),
                    self.uid,
                );
                events.pod(pod, Some(name), Level::Warning, "BackOff", message);
            } else if NoImage::is_pull(waiting) {
                let image = waiting
                    .message
                    .split(": ErrImagePull")
                    .next()
                    .unwrap_or_default();
                events.pod(pod, Some(name), Level::Normal, "BackOff", image.to_owned());
                let message = "Error: ImagePullBackOff".to_owned();
                events.pod(pod, Some(name), Level::Warning, "Failed", message);
            }
        }
    }

    fn start(
        &mut self,
        action: &Action,
        pod: &Arc<Pod>,
        sandboxes: &[hypernetes_runtime::SandboxStatus],
        containers: &[hypernetes_runtime::ContainerStatus],
        running: &[Ending],
        now: Timestamp,
    ) {
        let (node, pod) = (self.node.clone(), pod.clone());
        match action.clone() {
            Action::Fail { reason, message } => {
                let name = if reason == "DeadlineExceeded" {
                    "DeadlineExceeded"
                } else {
                    "Failed"
                };
                node.events
                    .pod(&pod, None, Level::Warning, name, message.clone());
                self.memory.failed = Some((reason, message));
            }
            Action::RunSandbox { attempt } => {
                if attempt > 0 {
                    let said = "Pod sandbox changed, it will be killed and re-created.";
                    node.events
                        .pod(&pod, None, Level::Normal, "SandboxChanged", said.to_owned());
                }
                let before = sandboxes
                    .iter()
                    .filter(|sandbox| sandbox.config.metadata.attempt != attempt)
                    .map(|sandbox| sandbox.id.clone())
                    .collect();
                self.spawn(Slot::Sandbox, async move {
                    node.run_sandbox(&pod, attempt, before).await
                });
            }
            Action::FillVolumes { sandbox } => {
                self.spawn(Slot::Sandbox, async move {
                    node.fill_volumes(&pod, sandbox).await
                });
            }
            Action::Run {
                container,
                sandbox,
                attempt,
            } => {
                let Some((found, _)) = roles::find(&pod, &container) else {
                    return;
                };
                // A resize that cannot be leaves the container what it had.
                let kept = self.memory.resize.as_ref().and_then(|_| {
                    let records = containers.iter().filter(|r| r.config.name == container);
                    let newest = records.max_by_key(|record| record.created_unix_nanos)?;
                    resize::allocated(newest)
                });
                // The newest record that ended is what this start follows.
                let ended = containers
                    .iter()
                    .filter(|r| r.config.name == container && r.state == ContainerState::Exited)
                    .map(|record| record.finished_unix_nanos)
                    .max();
                let memory = self.memory.container(&container);
                let again = memory.trouble.is_some();
                self.memory.starting.insert(container.clone());
                let memory = self.memory.container(&container);
                if let (Some(ended), false) = (ended, again) {
                    memory.restart.next(instant(ended), now);
                }
                self.spawn(Slot::Container(container), async move {
                    node.run_container(&pod, &found, sandbox, attempt, kept)
                        .await
                });
            }
            Action::Kill {
                container,
                id,
                message,
                grace,
                restarts,
            } => {
                if restarts {
                    self.memory.killed.insert(id.clone());
                }
                let Some(ending) = running.iter().find(|ending| ending.id == id).cloned() else {
                    return;
                };
                self.spawn(Slot::Container(container), async move {
                    node.kill_container(&pod, ending, message, grace).await
                });
            }
            Action::Resize { sandbox } => {
                self.spawn(
                    Slot::Resize,
                    async move { node.resize(&pod, sandbox).await },
                );
            }
            Action::SetPaused { containers, paused } => {
                self.spawn(Slot::Pause, async move {
                    node.set_paused(&pod, containers, paused).await
                });
            }
            Action::SetSuspended { sandbox, suspended } => {
                self.spawn(Slot::Suspend, async move {
                    node.set_suspended(&pod, sandbox, suspended).await
                });
            }
            Action::RemoveContainer(id) => {
                let slot = Slot::Container(format!("/{id}"));
                if !self.busy.contains(&slot) {
                    self.spawn(slot, async move {
                        if let Err(error) = node.runtime.remove_container(&id).await {
                            tracing::warn!(container = %id, error = %chain(&error), "cannot remove a container");
                        }
                        Outcome::Done
                    });
                }
            }
            Action::RemoveSandbox(id) => {
                let slot = Slot::Container(format!("/{id}"));
                if !self.busy.contains(&slot) {
                    self.spawn(slot, async move {
                        node.remove_sandboxes(&pod, vec![id], false).await
                    });
                }
            }
            Action::StopContainers { grace_seconds } => {
                self.grace = Some(grace_seconds);
                let running = running.to_vec();
                self.spawn(Slot::Teardown, async move {
                    node.stop_containers(&pod, running, grace_seconds).await
                });
            }
            Action::StopSandbox(id) => {
                self.spawn(
                    Slot::Teardown,
                    async move { node.stop_sandbox(&pod, id).await },
                );
            }
            Action::RemoveSandboxes => {
                let ids = sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
                self.spawn(Slot::Teardown, async move {
                    node.remove_sandboxes(&pod, ids, true).await
                });
            }
            Action::DeleteObject => {
                self.spawn(
                    Slot::Teardown,
                    async move { node.delete_object(&pod).await },
                );
            }
        }
    }

    fn spawn(&mut self, slot: Slot, step: impl Future<Output = Outcome> + Send + 'static) {
        self.busy.insert(slot.clone());
        let handle = self.steps.spawn(step);
        self.slots.insert(handle.id(), (slot, handle));
    }

    fn ended(&mut self, ended: Result<(Id, Outcome), tokio::task::JoinError>) {
        let now = Timestamp::now();
        let (id, outcome) = match ended {
            Ok((id, outcome)) => (id, Some(outcome)),
            Err(error) => {
                if !error.is_cancelled() {
                    tracing::error!(pod = self.uid, %error, "a step of a pod broke");
                    self.retry_in(Duration::from_secs(1));
                }
                (error.id(), None)
            }
        };
        let slot = self.slots.remove(&id).map(|(slot, _handle)| slot);
        if let Some(slot) = &slot {
            self.busy.remove(slot);
            if let Slot::Container(name) = slot {
                self.memory.starting.remove(name);
            }
        }
        match outcome {
            None | Some(Outcome::Done) => {
                // The object's end comes by the watch; if it does not, ask again.
                if slot == Some(Slot::Teardown) {
                    self.retry_in(Duration::from_secs(5));
                }
            }
            Some(Outcome::Stopped) => {
                self.memory.stopped = true;
                self.grace = None;
            }
            Some(Outcome::SandboxUp { sandbox, volumes }) => {
                self.memory.sandbox_failed = None;
                self.memory.clone_trouble = None;
                self.memory.volumes = Some(sandbox);
                self.volumes = volumes;
                self.refresh = false;
            }
            Some(Outcome::CloneFailed(message)) => {
                self.memory.clone_trouble = Some(message);
                self.memory.sandbox.next(now, now);
                self.memory.sandbox_failed = Some(now);
                self.retry_in(Duration::from_secs(2));
            }
            Some(Outcome::SandboxFailed) => {
                self.memory.sandbox.next(now, now);
                self.memory.sandbox_failed = Some(now);
                self.retry_in(Duration::from_secs(2));
            }
            Some(Outcome::Refreshed(volumes)) => self.volumes = volumes,
            Some(Outcome::Resized(Ok(restarts))) => {
                self.memory.resize = None;
                self.restart_for_resize(restarts);
            }
            Some(Outcome::Resized(Err(state))) => self.memory.resize = Some(state),
            Some(Outcome::Paused(result)) => self.memory.pause = result.err(),
            Some(Outcome::Suspended(result)) => self.memory.suspend = result.err(),
            Some(Outcome::Started(name)) => {
                let memory = self.memory.container(&name);
                memory.trouble = None;
                memory.retry = crate::backoff::Backoff::default();
            }
            Some(Outcome::Trouble {
                container,
                reason,
                message,
            }) => {
                let memory = self.memory.container(&container);
                memory.retry.next(now, now);
                memory.trouble = Some(Trouble {
                    reason,
                    message,
                    since: now,
                });
            }
        }
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

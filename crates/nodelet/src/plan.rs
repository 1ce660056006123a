//! What to do next for one pod: a pure function of its object, the runtime's state and the clock.
//!
//! ```text
//!            unsupported field, deadline
//!   new ───────────────────────────────────────▶ failed ──▶ containers stopped ──▶ VM stopped
//!    │                                              ▲
//!    ▼ RunSandbox          FillVolumes              │ restartPolicy Never and the VM died
//!   no sandbox ──▶ sandbox ready ──▶ init containers in order ──▶ containers ──▶ all ended ──▶ VM stopped
//!    ▲                                              │
//!    └── VM ended and something shall run again ◀───┘
//!
//!   any ── deletionTimestamp, or gone from the API ──▶ StopContainers ──▶ RemoveSandboxes ──▶ DeleteObject
//! ```
//! Steps that take long run in a [`Slot`]; a busy slot gets nothing new.

mod view;

use std::collections::{BTreeMap, BTreeSet};

use hypernetes_runtime::{ContainerState, SandboxState, SandboxStatus};
use hypernetes_types::{ContainerId, SandboxId};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};

use crate::{
    backoff::Backoff,
    clone, pause,
    prober::Health,
    resize::ResizeState,
    roles::{self, Role},
    suspend,
    wishes::{self, Unfulfilled},
};
pub(crate) use view::View;
use view::succeeded;

/// How long `ErrImagePull` stands before it reads `ImagePullBackOff`.
const FRESH_ERROR: SignedDuration = SignedDuration::from_secs(2);

/// A place where one long step runs at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Slot {
    Sandbox,
    Container(String),
    Resize,
    Pause,
    Suspend,
    Teardown,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// The pod has failed for good.
    Fail { reason: String, message: String },
    /// Boot a VM; stop the one before it first.
    RunSandbox { attempt: u32 },
    /// Write all volumes into a sandbox that has no containers yet.
    FillVolumes { sandbox: SandboxId },
    /// Have the image, create, start.
    Run {
        container: String,
        sandbox: SandboxId,
        attempt: u32,
    },
    /// End a container, because of what `message` says; one that `restarts` runs again whatever its
    /// exit code is.
    Kill {
        container: String,
        id: ContainerId,
        message: String,
        grace: i64,
        restarts: bool,
    },
    /// Give the containers the resources that the pod asks for now.
    Resize { sandbox: SandboxId },
    /// Have containers, by name, stand still or go on.
    SetPaused {
        containers: Vec<(String, ContainerId)>,
        paused: bool,
    },
    /// Have the VM go to the disk, or come back from it.
    SetSuspended { sandbox: SandboxId, suspended: bool },
    /// Forget an old container.
    RemoveContainer(ContainerId),
    /// Forget an old sandbox.
    RemoveSandbox(SandboxId),
    /// Stop what runs, all at once.
    StopContainers { grace_seconds: i64 },
    /// Power the VM off; statuses and logs stay.
    StopSandbox(SandboxId),
    /// Remove everything of the pod from this node.
    RemoveSandboxes,
    /// Take the object out of the API.
    DeleteObject,
}

/// Why a container does not run yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Waiting {
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// A failed try to run a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) since: Timestamp,
}

/// What is remembered of a container beside the runtime's records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ContainerMemory {
    /// Delays of restarts.
    pub(crate) restart: Backoff,
    /// Delays of new tries after trouble.
    pub(crate) retry: Backoff,
    pub(crate) trouble: Option<Trouble>,
    /// Attempt that comes next if the runtime has no record, from the pod's status.
    pub(crate) first_attempt: u32,
}

/// What is remembered of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) containers: BTreeMap<String, ContainerMemory>,
    pub(crate) sandbox: Backoff,
    pub(crate) sandbox_failed: Option<Timestamp>,
    /// Reason and message of a pod that failed as a whole.
    pub(crate) failed: Option<(String, String)>,
    /// Sandbox whose volumes have been written.
    pub(crate) volumes: Option<SandboxId>,
    /// Containers were told to stop.
    pub(crate) stopped: bool,
    /// Ends of logs that stand for a termination message.
    pub(crate) log_tails: BTreeMap<ContainerId, String>,
    /// What probes have found of the containers that run.
    pub(crate) health: BTreeMap<ContainerId, Health>,
    /// Containers whose start is under way: one with a postStart hook does not run before it is done.
    pub(crate) starting: BTreeSet<String>,
    /// Containers that were ended so that they run again.
    pub(crate) killed: BTreeSet<ContainerId>,
    /// What came of the last resize.
    pub(crate) resize: Option<ResizeState>,
    /// Why the last pause, or its end, did not come about.
    pub(crate) pause: Option<Unfulfilled>,
    /// Why the last suspend, or the last resume, did not come about.
    pub(crate) suspend: Option<Unfulfilled>,
    /// Why the pod could not be cloned that this one is a clone of.
    pub(crate) clone_trouble: Option<String>,
}

impl Memory {
    pub(crate) fn container(&mut self, name: &str) -> &mut ContainerMemory {
        self.containers.entry(name.to_owned()).or_default()
    }

    /// Trouble with what nobody asks for any more does not hold up what is asked for next.
    pub(crate) fn forget_trouble(&mut self, pod: &Pod) {
        let (paused, suspended) = (wishes::is_paused(pod), wishes::is_suspended(pod));
        self.pause.take_if(|trouble| trouble.wanted != paused);
        self.suspend.take_if(|trouble| trouble.wanted != suspended);
    }
}

/// What to do now, and when to look again if nothing happens.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) actions: Vec<Action>,
    pub(crate) wake: Option<Timestamp>,
    pub(crate) waiting: BTreeMap<String, Waiting>,
    /// The VM stands still for want of room on the node's disk.
    pub(crate) stalled: bool,
    /// Nothing is left of the pod: its task can end.
    pub(crate) finished: bool,
}

impl Plan {
    pub(crate) fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// Where one container stands.
enum Need {
    Running,
    Done { ok: bool },
    Start { attempt: u32 },
    Later,
}

/// A time of the runtime.
pub(crate) fn instant(unix_nanos: i64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(unix_nanos)).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Plans the next steps.
pub(crate) fn plan(view: &View<'_>) -> Plan {
    let mut plan = Plan {
        stalled: view.is_stalled(),
        ..Plan::default()
    };
    if view.gone || view.pod.metadata.deletion_timestamp.is_some() {
        plan_teardown(view, &mut plan);
        return plan;
    }
    if view.is_terminal() || view.is_finished() {
        plan_rest(view, &mut plan);
        return plan;
    }
    if let Some(deadline) = deadline(view) {
        if deadline <= view.now {
            plan.actions.push(Action::Fail {
                reason: "DeadlineExceeded".to_owned(),
                message: "Pod was active on the node longer than the specified deadline".to_owned(),
            });
            return plan;
        }
        plan.wake_at(deadline);
    }
    if !view.is_suspended() {
        plan_garbage(view, &mut plan);
    }
    let wanted = wanted(view, &mut plan);
    match view.ready() {
        Some(sandbox) => plan_containers(view, sandbox, wanted, &mut plan),
        None => plan_sandbox(view, &wanted, &mut plan),
    }
    plan
}

fn deadline(view: &View<'_>) -> Option<Timestamp> {
    let seconds = view.spec()?.active_deadline_seconds?;
    let start = view.pod.status.as_ref()?.start_time.as_ref()?.0;
    start.checked_add(SignedDuration::from_secs(seconds)).ok()
}

fn plan_teardown(view: &View<'_>, plan: &mut Plan) {
    if view.is_busy(&Slot::Teardown) {
        return;
    }
    let running = view
        .containers
        .iter()
        .any(|record| record.state == ContainerState::Running);
    // A suspended pod ends as it is: hooks and signals would need its memory back.
    if running && view.ready().is_some() && !view.is_suspended() && !view.memory.stopped {
        plan.actions.push(Action::StopContainers {
            grace_seconds: view.grace_seconds(),
        });
    } else if !view.sandboxes.is_empty() {
        plan.actions.push(Action::RemoveSandboxes);
    } else if view.gone {
        plan.finished = true;
    } else {
        plan.actions.push(Action::DeleteObject);
    }
}

/// The pod has ended: nothing of it needs a VM.
fn plan_rest(view: &View<'_>, plan: &mut Plan) {
    if view.is_busy(&Slot::Teardown) || view.is_busy(&Slot::Sandbox) {
        return;
    }
    let Some(sandbox) = view.sandbox() else {
        return;
    };
    if matches!(
        sandbox.state,
        SandboxState::NotReady | SandboxState::Removing
    ) {
        return;
    }
    let running = view
        .containers
        .iter()
        .any(|record| record.state == ContainerState::Running);
    plan.actions
        .push(if running && !view.is_suspended() && !view.memory.stopped {
            Action::StopContainers {
                grace_seconds: view.grace_seconds(),
            }
        } else {
            Action::StopSandbox(sandbox.id.clone())
        });
}

/// Keeps of each container the newest record and the one before it, of sandboxes the same.
fn plan_garbage(view: &View<'_>, plan: &mut Plan) {
    let names = view
        .containers()
        .iter()
        .chain(view.init_containers())
        .map(|c| c.name.as_str());
    for name in names {
        for record in view.records(name).into_iter().skip(2) {
            if record.state == ContainerState::Exited {
                plan.actions
                    .push(Action::RemoveContainer(record.id.clone()));
            }
        }
    }
    let old = view.sandboxes.len().saturating_sub(2);
    for sandbox in &view.sandboxes[..old] {
        plan.actions.push(Action::RemoveSandbox(sandbox.id.clone()));
    }
}

/// Containers that shall start now, with their attempts; fills in why others wait.
fn wanted(view: &View<'_>, plan: &mut Plan) -> Vec<(String, u32)> {
    let mut wanted = Vec::new();
    let initialized = view.is_initialized();
    for container in view.init_containers() {
        let role = roles::of_init(container);
        if initialized && role == Role::Init {
            continue;
        }
        match need(view, container, role, plan) {
            Need::Start { attempt } => {
                wanted.push((container.name.clone(), attempt));
                if !initialized {
                    return wanted;
                }
            }
            Need::Done { ok: true } => {}
            Need::Running if role == Role::Sidecar && view.has_passed(container) => {}
            _ if initialized => {}
            Need::Running | Need::Later | Need::Done { ok: false } => return wanted,
        }
    }
    for container in view.containers() {
        if let Need::Start { attempt } = need(view, container, Role::Main, plan) {
            wanted.push((container.name.clone(), attempt));
        }
    }
    let ephemeral = view
        .spec()
        .and_then(|spec| spec.ephemeral_containers.as_deref())
        .unwrap_or_default();
    // They come to a VM that runs; none is booted for them.
    for container in ephemeral.iter().filter(|_| view.ready().is_some()) {
        let container = roles::of_ephemeral(container);
        if let Need::Start { attempt } = need(view, &container, Role::Ephemeral, plan) {
            wanted.push((container.name.clone(), attempt));
        }
    }
    wanted
}

fn need(view: &View<'_>, container: &Container, role: Role, plan: &mut Plan) -> Need {
    let name = &container.name;
    let memory = view
        .memory
        .containers
        .get(name)
        .cloned()
        .unwrap_or_default();
    let records = view.records(name);
    let record = records.first().copied();
    let attempt = match record {
        None if role == Role::Ephemeral && memory.first_attempt > 0 => {
            return Need::Done { ok: true };
        }
        None => memory.first_attempt,
        Some(record) => {
            let current = view.is_current(record);
            match record.state {
                ContainerState::Running | ContainerState::Unknown if current => {
                    return Need::Running;
                }
                ContainerState::Created => record.config.attempt,
                _ if role == Role::Ephemeral => return Need::Done { ok: true },
                ContainerState::Exited if current && role == Role::Init && succeeded(record) => {
                    return Need::Done { ok: true };
                }
                // After a new boot the init containers run again, whatever they did before.
                ContainerState::Exited if role == Role::Init && succeeded(record) => {
                    record.config.attempt + 1
                }
                ContainerState::Exited
                    if !view.memory.killed.contains(&record.id)
                        && !view.restarts(
                            container,
                            role,
                            record.config.attempt,
                            record.exit_code,
                        ) =>
                {
                    return Need::Done {
                        ok: record.exit_code == 0,
                    };
                }
                ContainerState::Exited => {
                    let ended = instant(record.finished_unix_nanos);
                    if let Some(until) = memory.restart.until(ended, view.now) {
                        plan.wake_at(until);
                        plan.waiting
                            .insert(name.clone(), crash_loop(view, name, &memory.restart));
                        return Need::Later;
                    }
                    record.config.attempt + 1
                }
                ContainerState::Running | ContainerState::Unknown => record.config.attempt + 1,
            }
        }
    };
    if let Some(trouble) = &memory.trouble {
        let fresh = trouble.since.checked_add(FRESH_ERROR).unwrap_or(view.now);
        let waits = memory.retry.until(trouble.since, view.now);
        if trouble.reason == "ErrImagePull" && fresh > view.now && waits.is_some() {
            plan.wake_at(fresh);
        }
        plan.waiting.insert(
            name.clone(),
            trouble_waiting(container, trouble, fresh <= view.now),
        );
        if let Some(until) = waits {
            plan.wake_at(until);
            return Need::Later;
        }
    }
    Need::Start { attempt }
}

fn trouble_waiting(container: &Container, trouble: &Trouble, stale: bool) -> Waiting {
    if trouble.reason == "ErrImagePull" && stale {
        let image = container.image.as_deref().unwrap_or_default();
        return Waiting {
            reason: "ImagePullBackOff".to_owned(),
            message: format!(
                "Back-off pulling image \"{image}\": ErrImagePull: {}",
                trouble.message
            ),
        };
    }
    Waiting {
        reason: trouble.reason.to_owned(),
        message: trouble.message.clone(),
    }
}

fn crash_loop(view: &View<'_>, container: &str, backoff: &Backoff) -> Waiting {
    let meta = &view.pod.metadata;
    let delay = match backoff.seconds() {
        seconds if seconds % 60 == 0 => format!("{}m0s", seconds / 60),
        seconds if seconds > 60 => format!("{}m{}s", seconds / 60, seconds % 60),
        seconds => format!("{seconds}s"),
    };
    Waiting {
        reason: "CrashLoopBackOff".to_owned(),
        message: format!(
            "back-off {delay} restarting failed container={container} pod={}_{}({})",
            meta.name.as_deref().unwrap_or_default(),
            meta.namespace.as_deref().unwrap_or_default(),
            meta.uid.as_deref().unwrap_or_default(),
        ),
    }
}

/// Nothing runs: boot a VM, if a container wants one.
fn plan_sandbox(view: &View<'_>, wanted: &[(String, u32)], plan: &mut Plan) {
    clone::tell(view, plan);
    if wanted.is_empty() || view.is_busy(&Slot::Sandbox) {
        return;
    }
    let attempt = match view.sandbox() {
        None => 0,
        Some(sandbox) if sandbox.state == SandboxState::Starting => sandbox.config.metadata.attempt,
        Some(sandbox) => {
            // A pod that must not restart does not outlive its VM.
            if view.restart_policy() == "Never" && !view.containers.is_empty() {
                let (reason, message) = sandbox.failure.as_ref().map_or_else(
                    || {
                        (
                            "VmmDied".to_owned(),
                            "The pod's virtual machine has ended".to_owned(),
                        )
                    },
                    |failure| (failure.reason.clone(), failure.message.clone()),
                );
                plan.actions.push(Action::Fail { reason, message });
                return;
            }
            sandbox.config.metadata.attempt + 1
        }
    };
    if let Some(failed) = view.memory.sandbox_failed
        && let Some(until) = view.memory.sandbox.until(failed, view.now)
    {
        plan.wake_at(until);
        return;
    }
    plan.actions.push(Action::RunSandbox { attempt });
}

fn plan_containers(
    view: &View<'_>,
    sandbox: &SandboxStatus,
    wanted: Vec<(String, u32)>,
    plan: &mut Plan,
) {
    if view.is_busy(&Slot::Sandbox) {
        return;
    }
    let used = view
        .containers
        .iter()
        .any(|record| record.sandbox == sandbox.id);
    let filled = view.memory.volumes.as_ref() == Some(&sandbox.id);
    if !used && !filled && !sandbox.suspended {
        let waits = view
            .memory
            .sandbox_failed
            .and_then(|failed| view.memory.sandbox.until(failed, view.now));
        match waits {
            Some(until) => plan.wake_at(until),
            None => plan.actions.push(Action::FillVolumes {
                sandbox: sandbox.id.clone(),
            }),
        }
        return;
    }
    if suspend::plan(view, sandbox, plan) {
        for (container, _attempt) in wanted {
            let waiting = plan.waiting.entry(container);
            waiting.or_insert_with(suspend::waiting);
        }
        return;
    }
    let paused = wishes::is_paused(view.pod);
    pause::plan(view, plan);
    if !paused {
        plan_kills(view, plan);
    }
    if crate::resize::is_wanted(view) {
        plan.actions.push(Action::Resize {
            sandbox: sandbox.id.clone(),
        });
    }
    for (container, attempt) in wanted {
        if paused {
            plan.waiting.entry(container).or_insert_with(pause::waiting);
        } else if !view.is_busy(&Slot::Container(container.clone())) {
            plan.actions.push(Action::Run {
                container,
                sandbox: sandbox.id.clone(),
                attempt,
            });
        }
    }
}

/// Ends containers whose probe failed or whose definition changed.
fn plan_kills(view: &View<'_>, plan: &mut Plan) {
    let init = view.init_containers().iter();
    let init = init.map(|container| (container, roles::of_init(container)));
    let main = view.containers().iter().map(|c| (c, Role::Main));
    for (container, role) in init.chain(main) {
        let records = view.records(&container.name);
        let Some(record) = records.first() else {
            continue;
        };
        if record.state != ContainerState::Running
            || !view.is_current(record)
            || role == Role::Init
            || view.is_busy(&Slot::Container(container.name.clone()))
        {
            continue;
        }
        let name = &container.name;
        // What it exits with does not matter: it is ended from outside.
        let restarts = view.restarts(container, role, record.config.attempt, -1);
        let image = record
            .config
            .annotations
            .get(crate::container::IMAGE_ANNOTATION);
        let (message, grace) = if let Some(kind) = view.health(container, record).failed {
            let message = format!("Container {name} failed {} probe", kind.name());
            (message, view.probe_grace(container, kind))
        } else if restarts && image != container.image.as_ref() {
            let message = format!("Container {name} definition changed");
            (message, view.own_grace())
        } else {
            continue;
        };
        plan.actions.push(Action::Kill {
            container: name.clone(),
            id: record.id.clone(),
            message: match restarts {
                true => format!("{message}, will be restarted"),
                false => message,
            },
            grace,
            restarts,
        });
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
pub(crate) mod tests;

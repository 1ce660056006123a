//! A pod's status as a kubelet writes it: a pure function of the planner's view.

use std::net::IpAddr;

use hypernetes_runtime::{ContainerState as State, ContainerStatus as Record};
use hypernetes_types::kinds::{PAUSED_CONDITION, STALLED_CONDITION, SUSPENDED_CONDITION};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
        ContainerStateWaiting, ContainerStatus, ContainerUser, HostIP, LinuxContainerUser,
        PodCondition, PodIP, PodStatus, VolumeMountStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use crate::{
    container::IMAGE_ANNOTATION,
    pause,
    plan::{Plan, Slot, View, instant},
    resize, resources,
    roles::{self, Role},
    stall, suspend,
};

/// Scheme of container ids in statuses.
pub(crate) const ID_SCHEME: &str = "hypernetes://";

/// Times in statuses have whole seconds.
pub(crate) fn seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

/// The status to write; what another writer owns is kept from the present one.
pub(crate) fn build(view: &View<'_>, plan: &Plan, host: IpAddr) -> PodStatus {
    let old = view.pod.status.clone().unwrap_or_default();
    let mut status = PodStatus {
        host_ip: Some(host.to_string()),
        host_ips: Some(vec![HostIP {
            ip: host.to_string(),
        }]),
        start_time: old.start_time.clone().or_else(|| Some(seconds(view.now))),
        qos_class: view
            .spec()
            .map(|spec| resources::qos_class(spec).to_owned()),
        observed_generation: view.pod.metadata.generation,
        ..old.clone()
    };
    let whole = view.spec().and_then(|spec| spec.resources.clone());
    if let (Some(whole), true) = (whole, view.ready().is_some()) {
        status.allocated_resources.clone_from(&whole.requests);
        status.resources = Some(whole);
    }
    if let Some((reason, message)) = &view.memory.failed {
        status.reason = Some(reason.clone());
        status.message = Some(message.clone());
    }
    if let Some(address) = view.ready().and_then(|sandbox| sandbox.address) {
        status.pod_ip = Some(address.to_string());
        status.pod_ips = Some(vec![PodIP {
            ip: address.to_string(),
        }]);
    }
    if view.memory.failed.is_some() && view.sandboxes.is_empty() && old.container_statuses.is_none()
    {
        // Refused before anything was made: the reason is all there is to say.
        status.phase = Some("Failed".to_owned());
        return status;
    }
    let initialized = view.is_initialized();
    let statuses = |containers: Vec<(Container, Role)>, old: Option<&Vec<ContainerStatus>>| {
        let list: Vec<_> = containers
            .iter()
            .map(|(container, role)| {
                let before = old
                    .into_iter()
                    .flatten()
                    .find(|old| old.name == container.name);
                container_status(view, plan, container, *role, initialized, before)
            })
            .collect();
        (!list.is_empty()).then_some(list)
    };
    let of = |wanted: &[Role]| {
        let all = view.spec().map(roles::all).unwrap_or_default();
        all.into_iter()
            .filter(|(_, role)| wanted.contains(role))
            .collect()
    };
    status.init_container_statuses = statuses(
        of(&[Role::Init, Role::Sidecar]),
        old.init_container_statuses.as_ref(),
    );
    status.container_statuses = statuses(of(&[Role::Main]), old.container_statuses.as_ref());
    status.ephemeral_container_statuses = statuses(
        of(&[Role::Ephemeral]),
        old.ephemeral_container_statuses.as_ref(),
    );
    let phase = phase(view, &status, old.phase.as_deref());
    status.conditions = Some(conditions(view, &status, &old, phase));
    status.phase = Some(phase.to_owned());
    status
}

fn container_status(
    view: &View<'_>,
    plan: &Plan,
    container: &Container,
    role: Role,
    initialized: bool,
    before: Option<&ContainerStatus>,
) -> ContainerStatus {
    let records = view.records(&container.name);
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: (role != Role::Ephemeral).then_some(false),
        ..ContainerStatus::default()
    };
    let waiting = || {
        let waiting = plan
            .waiting
            .get(&container.name)
            .cloned()
            .unwrap_or_else(|| {
                let init = matches!(role, Role::Init | Role::Sidecar);
                let next = init && is_next_init(view, &container.name);
                let reason = if initialized || next || role == Role::Ephemeral {
                    "ContainerCreating"
                } else {
                    "PodInitializing"
                };
                crate::plan::Waiting {
                    reason: reason.to_owned(),
                    message: String::new(),
                }
            });
        ContainerState {
            waiting: Some(ContainerStateWaiting {
                message: Some(waiting.message).filter(|message| !message.is_empty()),
                reason: Some(waiting.reason),
            }),
            ..ContainerState::default()
        }
    };
    let Some(record) = records.first() else {
        if let Some(before) = before {
            status.restart_count = before.restart_count;
            status.last_state = ended(before).or_else(|| before.last_state.clone());
        }
        status.state = Some(waiting());
        return status;
    };
    let id = format!("{ID_SCHEME}{}", record.id);
    status.restart_count = i32::try_from(record.config.attempt).unwrap_or(i32::MAX);
    if let Some(image) = record.config.annotations.get(IMAGE_ANNOTATION) {
        status.image.clone_from(image);
    }
    status.image_id = record.image_ref.clone();
    status.container_id = Some(id.clone());
    details(&mut status, container, record);
    status.last_state = match (records.get(1), before) {
        (Some(previous), _) if previous.state == State::Exited => Some(terminated(view, previous)),
        (_, Some(before)) if before.container_id.as_ref() != Some(&id) => {
            ended(before).or_else(|| before.last_state.clone())
        }
        (_, Some(before)) => before.last_state.clone(),
        _ => None,
    };
    match record.state {
        State::Running if view.is_hooked(container) => status.state = Some(waiting()),
        State::Running | State::Unknown => {
            let health = view.health(container, record);
            status.ready = match role {
                Role::Main | Role::Sidecar => health.ready,
                Role::Init | Role::Ephemeral => false,
            };
            status.started = (role != Role::Ephemeral).then_some(health.started);
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: Some(seconds(instant(record.started_unix_nanos))),
                }),
                ..ContainerState::default()
            });
        }
        State::Created => status.state = Some(waiting()),
        State::Exited => {
            let end = terminated(view, record);
            if role == Role::Ephemeral {
                status.started = None;
            }
            if plan.waiting.contains_key(&container.name) {
                status.state = Some(waiting());
                status.last_state = Some(end);
            } else {
                status.ready = role == Role::Init && record.exit_code == 0;
                status.state = Some(end);
            }
        }
    }
    status
}

/// What a running container has been given.
fn details(status: &mut ContainerStatus, container: &Container, record: &Record) {
    if matches!(record.state, State::Running | State::Unknown) {
        let given = resize::allocated(record);
        status.allocated_resources = given.as_ref().and_then(|given| given.requests.clone());
        status.resources = given;
    }
    status.user = record.user.as_ref().map(|user| ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: i64::from(user.uid),
            gid: i64::from(user.gid),
            supplemental_groups: Some(user.groups.iter().map(|id| i64::from(*id)).collect()),
        }),
    });
    let mounts: Vec<_> = container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: mount.read_only,
            // Nothing is mounted below a volume of a guest, so all that is asked for holds.
            recursive_read_only: mount.recursive_read_only.clone().map(|asked| match asked {
                asked if asked == "IfPossible" => "Enabled".to_owned(),
                asked => asked,
            }),
            ..VolumeMountStatus::default()
        })
        .collect();
    status.volume_mounts = (!mounts.is_empty()).then_some(mounts);
}

/// The first init container that has not passed.
fn is_next_init(view: &View<'_>, name: &str) -> bool {
    view.init_containers()
        .iter()
        .find(|container| !view.has_passed(container))
        .is_some_and(|container| container.name == name)
}

fn ended(before: &ContainerStatus) -> Option<ContainerState> {
    before
        .state
        .clone()
        .filter(|state| state.terminated.is_some())
}

fn terminated(view: &View<'_>, record: &Record) -> ContainerState {
    let reason = match record.reason.as_str() {
        "" if record.exit_code == 0 => "Completed",
        "" => "Error",
        reason => reason,
    };
    let message = Some(record.message.clone())
        .filter(|message| !message.is_empty())
        .or_else(|| view.memory.log_tails.get(&record.id).cloned());
    let started = Some(record.started_unix_nanos).filter(|nanos| *nanos > 0);
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(format!("{ID_SCHEME}{}", record.id)),
            exit_code: record.exit_code,
            finished_at: Some(seconds(instant(record.finished_unix_nanos))),
            message,
            reason: Some(reason.to_owned()),
            signal: None,
            started_at: Some(seconds(instant(
                started.unwrap_or(record.finished_unix_nanos),
            ))),
        }),
        ..ContainerState::default()
    }
}

/// The phase, by upstream's rules. A terminal phase is for ever.
fn phase(view: &View<'_>, status: &PodStatus, old: Option<&str>) -> &'static str {
    match old {
        Some("Succeeded") => return "Succeeded",
        Some("Failed") => return "Failed",
        _ if view.memory.failed.is_some() => return "Failed",
        _ => {}
    }
    let state = |status: &ContainerStatus| status.state.clone().unwrap_or_default();
    if view.has_init_failed() {
        return "Failed";
    }
    if !view.is_initialized() {
        return "Pending";
    }
    let restarts = |status: &ContainerStatus, code: i32| {
        let found = view.containers().iter().find(|c| c.name == status.name);
        let attempt = u32::try_from(status.restart_count).unwrap_or(0);
        found.is_some_and(|container| view.restarts(container, Role::Main, attempt, code))
    };
    let (mut again, mut failed) = (false, false);
    let (mut running, mut waiting, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for status in status.container_statuses.iter().flatten() {
        let state = state(status);
        if state.running.is_some() {
            running += 1;
        } else if let Some(end) = state.terminated {
            stopped += 1;
            succeeded += i32::from(end.exit_code == 0);
            again |= restarts(status, end.exit_code);
            failed |= end.exit_code != 0;
        } else if status
            .last_state
            .as_ref()
            .is_some_and(|last| last.terminated.is_some())
        {
            stopped += 1;
        } else {
            waiting += 1;
        }
    }
    let deleted = view.pod.metadata.deletion_timestamp.is_some();
    match (waiting, running, stopped) {
        (waiting, _, _) if waiting > 0 => "Pending",
        (_, running, _) if running > 0 => "Running",
        (_, _, stopped) if stopped > 0 => {
            if !deleted && again {
                "Running"
            } else if stopped == succeeded {
                "Succeeded"
            } else if failed {
                "Failed"
            } else {
                "Running"
            }
        }
        _ => "Pending",
    }
}

fn conditions(
    view: &View<'_>,
    status: &PodStatus,
    old: &PodStatus,
    phase: &str,
) -> Vec<PodCondition> {
    let unready = |list: &Option<Vec<ContainerStatus>>| {
        let names: Vec<_> = list
            .iter()
            .flatten()
            .filter(|status| !status.ready)
            .map(|status| status.name.as_str())
            .collect();
        names.join(" ")
    };
    let completed = phase == "Succeeded";
    let initialized = view.is_initialized() || completed;
    let not_initialized = unready(&status.init_container_statuses);
    let mut not_ready = Vec::new();
    for (list, init) in [
        (&status.init_container_statuses, true),
        (&status.container_statuses, false),
    ] {
        for container in list.iter().flatten().filter(|status| !status.ready) {
            let sidecar = roles::find(view.pod, &container.name)
                .is_some_and(|(_, role)| role == Role::Sidecar);
            if !init || sidecar {
                not_ready.push(container.name.as_str());
            }
        }
    }
    let not_ready = not_ready.join(" ");
    let networked = view
        .ready()
        .is_some_and(|sandbox| sandbox.address.is_some() || sandbox.config.network.is_none());
    let containers_ready = if completed {
        (false, "PodCompleted", String::new())
    } else if phase == "Failed" {
        (false, "PodFailed", String::new())
    } else if not_ready.is_empty() {
        (true, "", String::new())
    } else {
        (
            false,
            "ContainersNotReady",
            format!("containers with unready status: [{not_ready}]"),
        )
    };
    let gates = closed_gates(view, old);
    let paused = pause::condition(view);
    let suspended = suspend::condition(view);
    let stalled = stall::condition(view);
    let readiness = if containers_ready.0 && suspended.is_some() {
        (false, "Suspended", "the pod is suspended".to_owned())
    } else if containers_ready.0 && stalled.is_some() {
        (false, "Stalled", stall::MESSAGE.to_owned())
    } else if containers_ready.0 && paused.is_some() {
        (false, "Paused", "the pod is paused".to_owned())
    } else if containers_ready.0 && !gates.is_empty() {
        (false, "ReadinessGatesNotReady", gates)
    } else {
        containers_ready.clone()
    };
    let initialized = match (initialized, completed) {
        (true, true) => (true, "PodCompleted", String::new()),
        (true, false) => (true, "", String::new()),
        (false, _) => (
            false,
            "ContainersNotInitialized",
            format!("containers with incomplete status: [{not_initialized}]"),
        ),
    };
    let own = [
        ("PodReadyToStartContainers", (networked, "", String::new())),
        ("Initialized", initialized),
        ("Ready", readiness),
        ("ContainersReady", containers_ready),
        ("PodScheduled", (true, "", String::new())),
    ];
    let own: Vec<_> = own
        .into_iter()
        .chain(resizing(view))
        .chain(paused)
        .chain(suspended)
        .chain(stalled)
        .collect();
    let before = old.conditions.as_deref().unwrap_or_default();
    let mut conditions: Vec<_> = before
        .iter()
        .filter(|condition| own.iter().all(|(name, _)| *name != condition.type_))
        .filter(|condition| !PASSING_CONDITIONS.contains(&condition.type_.as_str()))
        .cloned()
        .collect();
    for (name, (is_true, reason, message)) in own {
        let value = if is_true { "True" } else { "False" };
        let same = before
            .iter()
            .find(|old| old.type_ == name && old.status == value);
        conditions.push(PodCondition {
            type_: name.to_owned(),
            status: value.to_owned(),
            reason: Some(reason.to_owned()).filter(|reason| !reason.is_empty()),
            message: Some(message).filter(|message| !message.is_empty()),
            last_transition_time: same
                .and_then(|same| same.last_transition_time.clone())
                .or_else(|| Some(seconds(view.now))),
            last_probe_time: None,
            observed_generation: view.pod.metadata.generation,
        });
    }
    conditions
}

/// Conditions that this node writes; all others are somebody else's.
const OWN_CONDITIONS: [&str; 10] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    "PodResizePending",
    "PodResizeInProgress",
    PAUSED_CONDITION,
    SUSPENDED_CONDITION,
    STALLED_CONDITION,
];

/// Takes over what others have written into a pod's status: conditions of their own.
pub(crate) fn take_foreign(status: &mut PodStatus, theirs: &PodStatus) {
    let is_own = |condition: &PodCondition| OWN_CONDITIONS.contains(&condition.type_.as_str());
    let foreign = theirs.conditions.iter().flatten();
    let foreign: Vec<_> = foreign.filter(|c| !is_own(c)).cloned().collect();
    let own = status.conditions.take().unwrap_or_default();
    let all: Vec<_> = foreign
        .into_iter()
        .chain(own.into_iter().filter(is_own))
        .collect();
    status.conditions = (!all.is_empty()).then_some(all);
}

/// Conditions that are there only while a resize, a pause or a suspension is.
const PASSING_CONDITIONS: [&str; 5] = [
    "PodResizePending",
    "PodResizeInProgress",
    PAUSED_CONDITION,
    SUSPENDED_CONDITION,
    STALLED_CONDITION,
];

fn resizing(view: &View<'_>) -> Option<(&'static str, (bool, &'static str, String))> {
    let state = view.memory.resize.as_ref();
    let state = state.filter(|state| state.generation == view.pod.metadata.generation);
    match state {
        Some(state) if state.reason == "Infeasible" => Some((
            "PodResizePending",
            (true, state.reason, state.message.clone()),
        )),
        Some(state) => Some((
            "PodResizeInProgress",
            (true, state.reason, state.message.clone()),
        )),
        None if view.busy.contains(&Slot::Resize) || resize::is_wanted(view) => {
            Some(("PodResizeInProgress", (true, "", String::new())))
        }
        None => None,
    }
}

/// Why the pod's readiness gates keep it from being ready; empty if they do not.
fn closed_gates(view: &View<'_>, status: &PodStatus) -> String {
    let gates = view
        .spec()
        .into_iter()
        .flat_map(|spec| spec.readiness_gates.iter().flatten());
    let mut closed = Vec::new();
    for gate in gates {
        let name = &gate.condition_type;
        let conditions = status.conditions.as_deref().unwrap_or_default();
        match conditions.iter().find(|condition| condition.type_ == *name) {
            None => closed.push(format!(
                "corresponding condition of pod readiness gate \"{name}\" does not exist."
            )),
            Some(condition) if condition.status != "True" => closed.push(format!(
                "the status of pod readiness gate \"{name}\" is not \"True\", but {}",
                condition.status
            )),
            Some(_) => {}
        }
    }
    closed.join(", ")
}

#[cfg(test)]
#[path = "status/tests.rs"]
mod tests;

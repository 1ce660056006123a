//! A pod's status as a kubelet writes it: a pure function of the planner's view.

use std::net::IpAddr;

use hypernetes_runtime::{ContainerState as State, ContainerStatus as Record};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
        ContainerStateWaiting, ContainerStatus, HostIP, PodCondition, PodIP, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use crate::{
    container::IMAGE_ANNOTATION,
    plan::{Plan, View, instant},
    resources,
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
    let statuses = |containers: &[Container], init: bool, old: Option<&Vec<ContainerStatus>>| {
        let list: Vec<_> = containers
            .iter()
            .map(|container| {
                let before = old
                    .into_iter()
                    .flatten()
                    .find(|old| old.name == container.name);
                container_status(view, plan, container, init, initialized, before)
            })
            .collect();
        (!list.is_empty()).then_some(list)
    };
    status.init_container_statuses = statuses(
        view.init_containers(),
        true,
        old.init_container_statuses.as_ref(),
    );
    status.container_statuses = statuses(view.containers(), false, old.container_statuses.as_ref());
    let phase = phase(view, &status, old.phase.as_deref());
    status.conditions = Some(conditions(view, &status, &old, phase));
    status.phase = Some(phase.to_owned());
    status
}

fn container_status(
    view: &View<'_>,
    plan: &Plan,
    container: &Container,
    init: bool,
    initialized: bool,
    before: Option<&ContainerStatus>,
) -> ContainerStatus {
    let records = view.records(&container.name);
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
        ..ContainerStatus::default()
    };
    let waiting = || {
        let waiting = plan
            .waiting
            .get(&container.name)
            .cloned()
            .unwrap_or_else(|| {
                let reason = if initialized || (init && is_next_init(view, &container.name)) {
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
    status.last_state = match (records.get(1), before) {
        (Some(previous), _) if previous.state == State::Exited => Some(terminated(view, previous)),
        (_, Some(before)) if before.container_id.as_ref() != Some(&id) => {
            ended(before).or_else(|| before.last_state.clone())
        }
        (_, Some(before)) => before.last_state.clone(),
        _ => None,
    };
    match record.state {
        State::Running | State::Unknown => {
            status.ready = !init;
            status.started = Some(true);
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
            if plan.waiting.contains_key(&container.name) {
                status.state = Some(waiting());
                status.last_state = Some(end);
            } else {
                status.ready = init && record.exit_code == 0;
                status.state = Some(end);
            }
        }
    }
    status
}

/// The first init container that has not succeeded.
fn is_next_init(view: &View<'_>, name: &str) -> bool {
    view.init_containers()
        .iter()
        .find(|container| {
            view.records(&container.name)
                .first()
                .is_none_or(|record| record.state != State::Exited || record.exit_code != 0)
        })
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
    let never = view.restart_policy() == "Never";
    if !view.is_initialized() {
        let failed = status
            .init_container_statuses
            .iter()
            .flatten()
            .any(|status| {
                state(status)
                    .terminated
                    .is_some_and(|end| end.exit_code != 0)
            });
        return if failed && never { "Failed" } else { "Pending" };
    }
    let (mut running, mut waiting, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for status in status.container_statuses.iter().flatten() {
        let state = state(status);
        if state.running.is_some() {
            running += 1;
        } else if let Some(end) = state.terminated {
            stopped += 1;
            succeeded += i32::from(end.exit_code == 0);
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
            if deleted || view.restart_policy() != "Always" {
                if stopped == succeeded {
                    "Succeeded"
                } else if never || deleted {
                    "Failed"
                } else {
                    "Running"
                }
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
    let not_ready = unready(&status.container_statuses);
    let networked = view
        .ready()
        .is_some_and(|sandbox| sandbox.address.is_some() || sandbox.config.network.is_none());
    let readiness = if completed {
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
        ("Ready", readiness.clone()),
        ("ContainersReady", readiness),
        ("PodScheduled", (true, "", String::new())),
    ];
    let before = old.conditions.as_deref().unwrap_or_default();
    let mut conditions: Vec<_> = before
        .iter()
        .filter(|condition| own.iter().all(|(name, _)| *name != condition.type_))
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

#[cfg(test)]
#[path = "status/tests.rs"]
mod tests;

//! What is told of a pod by its object, the runtime's records and what its task remembers.

use std::collections::BTreeSet;

use hypernetes_runtime::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::{Memory, Slot};
use crate::{
    prober::{self, Health, ProbeKind},
    roles::{self, Role},
    wishes,
};

/// Grace of a pod that was deleted by force: enough for a clean end, not for a wait.
const FORCED_GRACE: i64 = 2;
/// No grace is longer than a day.
const MAX_GRACE: i64 = 86_400;

/// Everything the planner looks at.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) pod: &'a Pod,
    /// The object is no longer in the API.
    pub(crate) gone: bool,
    /// The pod's sandboxes, by attempt.
    pub(crate) sandboxes: &'a [SandboxStatus],
    /// Containers of all of them.
    pub(crate) containers: &'a [ContainerStatus],
    pub(crate) memory: &'a Memory,
    pub(crate) busy: &'a BTreeSet<Slot>,
    pub(crate) now: Timestamp,
}

impl View<'_> {
    pub(super) fn is_busy(&self, slot: &Slot) -> bool {
        self.busy.contains(slot)
    }

    /// The newest sandbox.
    pub(crate) fn sandbox(&self) -> Option<&SandboxStatus> {
        self.sandboxes.last()
    }

    /// The newest sandbox, if its VM runs.
    pub(crate) fn ready(&self) -> Option<&SandboxStatus> {
        self.sandbox()
            .filter(|sandbox| sandbox.state == SandboxState::Ready)
    }

    /// The VM is on the disk: nothing in it can be asked for anything.
    pub(crate) fn is_suspended(&self) -> bool {
        self.ready().is_some_and(|sandbox| sandbox.suspended)
    }

    /// The VM stands still for want of room on the node's disk.
    pub(crate) fn is_stalled(&self) -> bool {
        self.ready().is_some_and(|sandbox| sandbox.stalled)
    }

    /// Records of a container, newest first.
    pub(crate) fn records(&self, name: &str) -> Vec<&ContainerStatus> {
        let rank = |status: &ContainerStatus| {
            let sandbox = self.sandboxes.iter().position(|s| s.id == status.sandbox);
            (sandbox, status.config.attempt, status.created_unix_nanos)
        };
        let mut records: Vec<_> = self
            .containers
            .iter()
            .filter(|status| status.config.name == name)
            .collect();
        records.sort_by_key(|status| std::cmp::Reverse(rank(status)));
        records
    }

    /// The record is of the VM that runs.
    pub(super) fn is_current(&self, record: &ContainerStatus) -> bool {
        self.ready()
            .is_some_and(|sandbox| sandbox.id == record.sandbox)
    }

    pub(crate) fn spec(&self) -> Option<&PodSpec> {
        self.pod.spec.as_ref()
    }

    pub(crate) fn init_containers(&self) -> &[Container] {
        self.spec()
            .and_then(|spec| spec.init_containers.as_deref())
            .unwrap_or_default()
    }

    pub(crate) fn containers(&self) -> &[Container] {
        self.spec()
            .map(|spec| spec.containers.as_slice())
            .unwrap_or_default()
    }

    pub(crate) fn restart_policy(&self) -> &str {
        self.spec()
            .and_then(|spec| spec.restart_policy.as_deref())
            .unwrap_or("Always")
    }

    /// Grace of all containers when the pod ends; 0 = they are killed.
    pub(crate) fn grace_seconds(&self) -> i64 {
        let meta = &self.pod.metadata;
        let deleted = self.gone
            || meta.deletion_timestamp.is_some()
            || meta.deletion_grace_period_seconds.is_some();
        match wishes::stop_grace(self.pod) {
            Some(wish) if !deleted => wish.min(MAX_GRACE),
            _ => self.own_grace(),
        }
    }

    /// Grace of a container that is ended while the pod lives on, or goes. As with a kubelet it has a
    /// moment at least.
    pub(super) fn own_grace(&self) -> i64 {
        if self.gone {
            return FORCED_GRACE;
        }
        let deletion = self.pod.metadata.deletion_grace_period_seconds;
        let spec = || self.spec()?.termination_grace_period_seconds;
        deletion.or_else(spec).unwrap_or(30).clamp(1, MAX_GRACE)
    }

    pub(crate) fn is_terminal(&self) -> bool {
        let phase = self
            .pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        self.memory.failed.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// Whether an ended container of the pod runs again: by its own rules and policy before the pod's.
    pub(crate) fn restarts(
        &self,
        container: &Container,
        role: Role,
        attempt: u32,
        exit_code: i32,
    ) -> bool {
        if wishes::max_restarts(self.pod).is_some_and(|most| attempt >= most) {
            return false;
        }
        match role {
            Role::Sidecar => return true,
            Role::Ephemeral => return false,
            Role::Init | Role::Main => {}
        }
        for rule in container.restart_policy_rules.iter().flatten() {
            let Some(codes) = &rule.exit_codes else {
                continue;
            };
            let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
            if listed == (codes.operator == "In") && rule.action == "Restart" {
                return true;
            }
        }
        let own = container.restart_policy.as_deref();
        match own.unwrap_or_else(|| self.restart_policy()) {
            "Never" => false,
            "Always" if role == Role::Main => true,
            _ => exit_code != 0,
        }
    }

    /// The container's program runs, but its postStart hook has not ended.
    pub(crate) fn is_hooked(&self, container: &Container) -> bool {
        self.memory.starting.contains(&container.name)
            && container
                .lifecycle
                .as_ref()
                .is_some_and(|lifecycle| lifecycle.post_start.is_some())
    }

    /// What is known of a running container.
    pub(crate) fn health(&self, container: &Container, record: &ContainerStatus) -> Health {
        let known = self.memory.health.get(&record.id).copied();
        known.unwrap_or_else(|| prober::at_first(container))
    }

    /// An init container that is behind the pod's start: it has succeeded, or it runs and has started.
    pub(crate) fn has_passed(&self, container: &Container) -> bool {
        let records = self.records(&container.name);
        records.first().is_some_and(|record| {
            self.is_current(record)
                && match roles::of_init(container) {
                    Role::Sidecar => {
                        record.state == ContainerState::Running
                            && self.health(container, record).started
                            && !self.is_busy(&Slot::Container(container.name.clone()))
                    }
                    _ => succeeded(record),
                }
        })
    }

    /// An init container has failed for good.
    pub(crate) fn has_init_failed(&self) -> bool {
        self.init_containers().iter().any(|container| {
            let role = roles::of_init(container);
            role == Role::Init
                && self.records(&container.name).first().is_some_and(|record| {
                    record.state == ContainerState::Exited
                        && record.exit_code != 0
                        && !self.restarts(container, role, record.config.attempt, record.exit_code)
                })
        })
    }

    /// Grace of a container that is ended because of a probe.
    pub(super) fn probe_grace(&self, container: &Container, kind: ProbeKind) -> i64 {
        let own = kind
            .of(container)
            .and_then(|probe| probe.termination_grace_period_seconds);
        own.unwrap_or_else(|| self.own_grace())
    }

    /// All init containers have passed in the running VM, or the others exist in it already.
    pub(crate) fn is_initialized(&self) -> bool {
        let started = self.containers().iter().any(|container| {
            self.records(&container.name)
                .first()
                .is_some_and(|record| self.is_current(record) || self.ready().is_none())
        });
        started
            || self
                .init_containers()
                .iter()
                .all(|container| self.has_passed(container))
    }

    /// Every container has ended and none runs again. Sidecars do not keep a pod going.
    pub(crate) fn is_finished(&self) -> bool {
        let ended = |container: &Container| {
            self.records(&container.name).first().is_some_and(|record| {
                record.state == ContainerState::Exited
                    && !self.memory.killed.contains(&record.id)
                    && !self.restarts(
                        container,
                        Role::Main,
                        record.config.attempt,
                        record.exit_code,
                    )
            })
        };
        self.has_init_failed() || self.containers().iter().all(ended)
    }
}

/// It has ended well.
pub(super) fn succeeded(record: &ContainerStatus) -> bool {
    record.state == ContainerState::Exited && record.exit_code == 0
}

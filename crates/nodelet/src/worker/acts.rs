//! Planned steps are begun, and broken off; what came of them is remembered.

use std::{sync::Arc, time::Duration};

use hypernetes_runtime::{ContainerState, ContainerStatus, SandboxStatus};
use hypernetes_telemetry::chain;
use hypernetes_types::ContainerId;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::task::{Id, JoinError};

use super::Worker;
use crate::{
    backoff::Backoff,
    events::Level,
    plan::{Action, Slot, Trouble, instant},
    resize, roles,
    steps::{Outcome, Start},
    stop::Ending,
};

impl Worker {
    pub(super) fn start(
        &mut self,
        action: &Action,
        pod: &Arc<Pod>,
        sandboxes: &[SandboxStatus],
        containers: &[ContainerStatus],
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
                    let start = Start {
                        pod: &pod,
                        container: &found,
                        sandbox,
                        attempt,
                        allocated: kept,
                    };
                    node.run_container(start).await
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

    pub(super) fn spawn(
        &mut self,
        slot: Slot,
        step: impl Future<Output = Outcome> + Send + 'static,
    ) {
        self.busy.insert(slot.clone());
        let handle = self.steps.spawn(step);
        self.slots.insert(handle.id(), (slot, handle));
    }

    pub(super) fn ended(&mut self, ended: Result<(Id, Outcome), JoinError>) {
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
                memory.retry = Backoff::default();
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

    /// Deletion does not wait for a pull or a boot, and a shorter grace not for a longer one.
    pub(super) fn interrupt(&mut self, pod: &Pod, gone: bool) {
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

    /// Ends the containers that take their new resources only with a new start.
    pub(super) fn restart_for_resize(&mut self, restarts: Vec<(String, ContainerId)>) {
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
}

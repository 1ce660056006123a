//! A pod whose containers stand still, as its annotation `hypernetes.io/paused` says.
//!
//! All of them do or none, and none is started meanwhile. Probes are not asked; what they found last
//! holds. The condition `hypernetes.io/Paused` tells how it stands, and the pod is not ready.

use hypernetes_runtime::{ContainerState, ContainerStatus};
use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, kinds::PAUSED_CONDITION};
use k8s_openapi::api::core::v1::Pod;

use crate::{
    events::Level,
    plan::{Action, Plan, Slot, View, Waiting},
    steps::{Node, Outcome},
    wishes::{self, Unfulfilled},
};

/// Containers of the running VM that are not yet as the annotation says. One that is being started
/// or ended is left alone.
fn differing<'a>(view: &'a View<'_>, paused: bool) -> Vec<&'a ContainerStatus> {
    let Some(sandbox) = view.ready() else {
        return Vec::new();
    };
    let records = view.containers.iter();
    records
        .filter(|record| {
            record.sandbox == sandbox.id
                && record.state == ContainerState::Running
                && record.paused != paused
                && !view
                    .busy
                    .contains(&Slot::Container(record.config.name.clone()))
        })
        .collect()
}

/// Has containers stand still or go on.
pub(crate) fn plan(view: &View<'_>, plan: &mut Plan) {
    let paused = wishes::is_paused(view.pod);
    let containers = differing(view, paused);
    if containers.is_empty() || view.busy.contains(&Slot::Pause) {
        return;
    }
    let trouble = view.memory.pause.as_ref();
    if let Some(again) = trouble.and_then(|trouble| trouble.waits_until(view.now)) {
        plan.wake_at(again);
        return;
    }
    let containers = containers.iter();
    plan.actions.push(Action::SetPaused {
        containers: containers
            .map(|record| (record.config.name.clone(), record.id.clone()))
            .collect(),
        paused,
    });
}

/// Why a container of a paused pod is not started.
pub(crate) fn waiting() -> Waiting {
    Waiting {
        reason: "Paused".to_owned(),
        message: "the pod is paused".to_owned(),
    }
}

/// The condition of a pod that is paused, or on its way there or back: whether it is, reason, message.
pub(crate) fn condition(view: &View<'_>) -> Option<(&'static str, (bool, &'static str, String))> {
    let paused = wishes::is_paused(view.pod);
    let stand =
        |record: &&ContainerStatus| record.state == ContainerState::Running && record.paused;
    let some = view.containers.iter().any(|record| stand(&record));
    if view.ready().is_none() || !(paused || some) {
        return None;
    }
    let trouble = view.memory.pause.as_ref();
    let said = match (trouble, paused, differing(view, paused).is_empty()) {
        (Some(trouble), ..) => (some, "Error", trouble.message.clone()),
        (None, true, true) => (true, "", String::new()),
        (None, true, false) => (false, "Pausing", String::new()),
        (None, false, _) => (true, "Unpausing", String::new()),
    };
    Some((PAUSED_CONDITION, said))
}

impl Node {
    /// Has containers stand still or go on.
    pub(crate) async fn set_paused(
        &self,
        pod: &Pod,
        containers: Vec<(String, ContainerId)>,
        paused: bool,
    ) -> Outcome {
        for (name, id) in containers {
            let said = |level, reason: &'static str, message| {
                self.events.pod(pod, Some(&name), level, reason, message);
            };
            match self.runtime.set_paused(&id, paused).await {
                Ok(()) if paused => {
                    said(Level::Normal, "Paused", format!("Paused container {name}"));
                }
                Ok(()) => {
                    let message = format!("Unpaused container {name}");
                    said(Level::Normal, "Unpaused", message);
                }
                Err(_ended) if !self.runs(&id).await => {}
                Err(error) => {
                    let message = chain(&error).to_string();
                    let reason = if paused {
                        "FailedPause"
                    } else {
                        "FailedUnpause"
                    };
                    said(Level::Warning, reason, format!("Error: {message}"));
                    return Outcome::Paused(Err(Unfulfilled::new(paused, message)));
                }
            }
        }
        Outcome::Paused(Ok(()))
    }

    async fn runs(&self, id: &ContainerId) -> bool {
        let record = self.runtime.container(id).await;
        record.is_some_and(|record| record.state == ContainerState::Running)
    }

    /// Lets a container go on that is to end: its preStop hook and its stop signal need that.
    pub(crate) async fn thaw(&self, pod: &Pod, id: &ContainerId) {
        let record = self.runtime.container(id).await;
        // A pause may still be on its way: this comes after it.
        let paused = wishes::is_paused(pod) || record.is_some_and(|record| record.paused);
        if paused && let Err(error) = self.runtime.set_paused(id, false).await {
            tracing::warn!(container = %id, error = %chain(&error), "cannot unpause a container");
        }
    }
}

#[cfg(test)]
mod tests {
    use hypernetes_types::kinds::PAUSED_ANNOTATION;

    use super::*;
    use crate::plan::tests::{World, at};

    fn world(annotation: &str) -> World {
        World::running().annotate(PAUSED_ANNOTATION, annotation)
    }

    fn said(world: &World) -> Option<(bool, &'static str)> {
        condition(&world.view()).map(|(_, (paused, reason, _))| (paused, reason))
    }

    #[test]
    fn containers_become_what_the_annotation_says() {
        let mut world = world("true");
        let id = world.containers[0].id.clone();
        let wanted = |paused| {
            vec![Action::SetPaused {
                containers: vec![("c".into(), id.clone())],
                paused,
            }]
        };
        assert_eq!(world.plan().actions, wanted(true));
        assert_eq!(said(&world), Some((false, "Pausing")));
        world.containers[0].paused = true;
        assert_eq!(world.plan().actions, []);
        assert_eq!(said(&world), Some((true, "")));
        world.pod.metadata.annotations = None;
        assert_eq!(world.plan().actions, wanted(false));
        assert_eq!(said(&world), Some((true, "Unpausing")));
        world.containers[0].paused = false;
        assert_eq!((world.plan().actions, said(&world)), (vec![], None));
    }

    #[test]
    fn what_is_busy_or_has_just_failed_waits() {
        let mut world = world("true");
        world.busy.insert(Slot::Container("c".into()));
        assert_eq!(world.plan().actions, []);
        world.busy.clear();
        world.memory.pause = Some(Unfulfilled {
            wanted: true,
            message: "no".into(),
            since: at(-1),
        });
        let planned = world.plan();
        assert_eq!((planned.actions, planned.wake), (vec![], Some(at(9))));
        assert_eq!(said(&world), Some((false, "Error")));
        world.now = at(10);
        assert_eq!(world.plan().actions.len(), 1);
    }

    #[test]
    fn nothing_starts_in_a_paused_pod() {
        let mut world = world("true");
        world.containers.clear();
        let planned = world.plan();
        assert_eq!(planned.actions, []);
        assert_eq!(planned.waiting["c"], waiting());
        world.pod.metadata.annotations = None;
        assert_eq!(world.plan().actions.len(), 1);
    }

    #[test]
    fn a_paused_pod_ends_when_it_is_deleted() {
        let mut world = world("true");
        world.containers[0].paused = true;
        world.gone = true;
        assert!(matches!(
            world.plan().actions[..],
            [Action::StopContainers { .. }]
        ));
    }
}

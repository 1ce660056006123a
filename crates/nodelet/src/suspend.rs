//! A pod whose VM is on the disk instead of in memory, as its annotation `hypernetes.io/suspended` says.
//!
//! Its containers are shown as they were, none is started or ended, no probe is asked; what the probes found
//! last holds. The condition `hypernetes.io/Suspended` tells how it stands, and the pod is not ready.

use hypernetes_runtime::SandboxStatus;
use hypernetes_telemetry::chain;
use hypernetes_types::{SandboxId, kinds::SUSPENDED_CONDITION};
use k8s_openapi::api::core::v1::Pod;

use crate::{
    events::Level,
    plan::{Action, Plan, Slot, View, Waiting},
    steps::{Node, Outcome},
    wishes::{self, Unfulfilled},
};

/// Has the VM go to the disk or come back. `true`: nothing else is to be done with the pod.
pub(crate) fn plan(view: &View<'_>, sandbox: &SandboxStatus, plan: &mut Plan) -> bool {
    let wanted = wishes::is_suspended(view.pod);
    if !wanted && !sandbox.suspended {
        return view.busy.contains(&Slot::Suspend);
    }
    if wanted == sandbox.suspended || !view.busy.is_empty() {
        // A container that is being started or ended comes first: it would be refused.
        return true;
    }
    let trouble = view.memory.suspend.as_ref();
    if let Some(again) = trouble.and_then(|trouble| trouble.waits_until(view.now)) {
        plan.wake_at(again);
        return true;
    }
    plan.actions.push(Action::SetSuspended {
        sandbox: sandbox.id.clone(),
        suspended: wanted,
    });
    true
}

/// Why a container of a suspended pod is not started.
pub(crate) fn waiting() -> Waiting {
    Waiting {
        reason: "Suspended".to_owned(),
        message: "the pod is suspended".to_owned(),
    }
}

/// The condition of a pod that is suspended, or on its way there or back: whether it is, reason, message.
pub(crate) fn condition(view: &View<'_>) -> Option<(&'static str, (bool, &'static str, String))> {
    let wanted = wishes::is_suspended(view.pod);
    let sandbox = view.ready()?;
    if !wanted && !sandbox.suspended {
        return None;
    }
    let is = sandbox.suspended;
    let said = match (view.memory.suspend.as_ref(), wanted, is) {
        (Some(trouble), ..) if wanted != is => (is, "Error", trouble.message.clone()),
        (_, true, true) => (true, "", String::new()),
        (_, true, false) => (false, "Suspending", String::new()),
        (_, false, _) => (true, "Resuming", String::new()),
    };
    Some((SUSPENDED_CONDITION, said))
}

impl Node {
    /// Has the VM go to the disk, or come back from it.
    pub(crate) async fn set_suspended(
        &self,
        pod: &Pod,
        sandbox: SandboxId,
        suspended: bool,
    ) -> Outcome {
        let done = match suspended {
            true => self.runtime.suspend_sandbox(&sandbox).await,
            false => self.runtime.resume_sandbox(&sandbox).await,
        };
        let said = |level, reason: &'static str, message| {
            self.events.pod(pod, None, level, reason, message);
        };
        let Err(error) = done else {
            let (reason, message) = match suspended {
                true => ("Suspended", "Suspended the pod's virtual machine"),
                false => ("Resumed", "Resumed the pod's virtual machine"),
            };
            said(Level::Normal, reason, message.to_owned());
            return Outcome::Suspended(Ok(()));
        };
        let message = chain(&error).to_string();
        let reason = match suspended {
            true => "FailedSuspend",
            false => "FailedResume",
        };
        said(Level::Warning, reason, format!("Error: {message}"));
        Outcome::Suspended(Err(Unfulfilled::new(suspended, message)))
    }
}

#[cfg(test)]
mod tests {
    use hypernetes_runtime::ContainerState;
    use hypernetes_types::kinds::{PAUSED_ANNOTATION, SUSPENDED_ANNOTATION};

    use super::*;
    use crate::plan::tests::{World, at};

    fn world(annotation: &str) -> World {
        World::running().annotate(SUSPENDED_ANNOTATION, annotation)
    }

    fn said(world: &World) -> Option<(bool, &'static str)> {
        condition(&world.view()).map(|(_, (is, reason, _))| (is, reason))
    }

    #[test]
    fn the_vm_becomes_what_the_annotation_says() {
        let mut world = world("true");
        let id = world.sandboxes[0].id.clone();
        let wanted = |suspended| {
            vec![Action::SetSuspended {
                sandbox: id.clone(),
                suspended,
            }]
        };
        assert_eq!(world.plan().actions, wanted(true));
        assert_eq!(said(&world), Some((false, "Suspending")));
        world.sandboxes[0].suspended = true;
        assert_eq!(world.plan().actions, []);
        assert_eq!(said(&world), Some((true, "")));
        world.pod.metadata.annotations = None;
        assert_eq!(world.plan().actions, wanted(false));
        assert_eq!(said(&world), Some((true, "Resuming")));
        world.sandboxes[0].suspended = false;
        assert_eq!((world.plan().actions, said(&world)), (vec![], None));
    }

    #[test]
    fn what_is_busy_or_has_just_failed_waits() {
        let mut world = world("true");
        world.busy.insert(Slot::Container("c".into()));
        assert_eq!(world.plan().actions, []);
        world.busy.clear();
        world.memory.suspend = Some(Unfulfilled {
            wanted: true,
            message: "no".into(),
            since: at(-1),
        });
        let planned = world.plan();
        assert_eq!((planned.actions, planned.wake), (vec![], Some(at(9))));
        assert_eq!(said(&world), Some((false, "Error")));
        world.now = at(10);
        assert_eq!(world.plan().actions.len(), 1);
        // Trouble with the one is none with the other.
        world.sandboxes[0].suspended = true;
        world.pod.metadata.annotations = None;
        world.now = at(0);
        world.memory.forget_trouble(&world.pod);
        assert_eq!(world.plan().actions.len(), 1);
    }

    #[test]
    fn whoever_asks_again_does_not_wait_for_what_failed_before() {
        let mut world = world("false");
        world.sandboxes[0].suspended = true;
        world.memory.suspend = Some(Unfulfilled {
            wanted: false,
            message: "no".into(),
            since: at(-1),
        });
        world.memory.forget_trouble(&world.pod);
        assert_eq!(
            (world.plan().actions, said(&world)),
            (vec![], Some((true, "Error")))
        );
        // Given up, and asked for once more.
        for (wish, wanted) in [
            ("true", Some((true, ""))),
            ("false", Some((true, "Resuming"))),
        ] {
            world = world.annotate(SUSPENDED_ANNOTATION, wish);
            world.memory.forget_trouble(&world.pod);
            assert_eq!(said(&world), wanted);
        }
        assert_eq!(world.plan().actions.len(), 1);
    }

    #[test]
    fn nothing_is_done_to_what_is_suspended() {
        let mut world = world("true");
        world.sandboxes[0].suspended = true;
        world.containers[0].state = ContainerState::Exited;
        let planned = world.plan();
        assert_eq!(planned.actions, []);
        // A pause has to wait until it goes on.
        world.containers[0].state = ContainerState::Running;
        let world = world.annotate(PAUSED_ANNOTATION, "true");
        assert_eq!(world.plan().actions, []);
    }

    #[test]
    fn nothing_starts_in_a_suspended_pod() {
        let mut world = world("true");
        world.sandboxes[0].suspended = true;
        world.containers.clear();
        let planned = world.plan();
        assert_eq!(planned.actions, []);
    }

    #[test]
    fn a_suspended_pod_is_removed_as_it_is() {
        let mut world = world("true");
        world.sandboxes[0].suspended = true;
        world.gone = true;
        assert!(matches!(
            world.plan().actions[..],
            [Action::RemoveSandboxes]
        ));
        world.gone = false;
        world.memory.failed = Some(("DeadlineExceeded".into(), String::new()));
        assert!(matches!(world.plan().actions[..], [Action::StopSandbox(_)]));
    }
}

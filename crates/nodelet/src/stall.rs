//! A pod whose VM stands still because the node's disk has no room for what it writes.
//!
//! It goes on by itself when there is room, and has lost nothing. Until then no probe is asked, so that none fails; the
//! condition `hypernetes.io/Stalled` says it, and the pod is not ready.

use hypernetes_types::kinds::STALLED_CONDITION;
use k8s_openapi::api::core::v1::Pod;

use crate::{
    events::{Level, Recorder},
    plan::View,
};

/// What is said of it.
pub(crate) const MESSAGE: &str =
    "the node's disk has no room for what the pod writes: it stands still until there is";

/// The condition of a pod that stands still: that it does, reason, message.
pub(crate) fn condition(view: &View<'_>) -> Option<(&'static str, (bool, &'static str, String))> {
    view.is_stalled().then(|| {
        (
            STALLED_CONDITION,
            (true, "NodeDiskFull", MESSAGE.to_owned()),
        )
    })
}

/// Tells that the pod stands still, or goes on.
pub(crate) fn say(events: &Recorder, pod: &Pod, stalled: bool) {
    let (level, message) = match stalled {
        true => (Level::Warning, MESSAGE),
        false => (
            Level::Normal,
            "the node's disk has room again: the pod goes on",
        ),
    };
    let reason = if stalled { "Stalled" } else { "WentOn" };
    events.pod(pod, None, level, reason, message.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::tests::World, status};

    #[test]
    fn a_pod_that_stands_still_says_so_and_is_not_ready() {
        let mut world = World::running();
        assert!(!world.plan().stalled);
        assert_eq!(condition(&world.view()), None);
        world.sandboxes[0].stalled = true;
        let plan = world.plan();
        assert!(plan.stalled && plan.actions.is_empty(), "{plan:?}");
        let built = status::build(&world.view(), &plan, std::net::Ipv4Addr::LOCALHOST.into());
        let said = |name: &str| {
            let conditions = built.conditions.iter().flatten();
            let found = conditions
                .filter(|condition| condition.type_ == name)
                .map(|condition| (condition.status.clone(), condition.reason.clone()));
            found.collect::<Vec<_>>()
        };
        let as_said =
            |status: &str, reason: &str| vec![(status.to_owned(), Some(reason.to_owned()))];
        assert_eq!(said(STALLED_CONDITION), as_said("True", "NodeDiskFull"));
        assert_eq!(said("Ready"), as_said("False", "Stalled"));
    }
}

//! Annotations of a pod by which a client says what no field of a pod can.
//!
//! | annotation | meaning |
//! | --- | --- |
//! | `hypernetes.io/max-restarts` | containers are restarted so many times at most, whatever `restartPolicy` would have done then |
//! | `hypernetes.io/stop-grace-seconds` | seconds that a stop at `activeDeadlineSeconds` may take, instead of `terminationGracePeriodSeconds`; with 0 there is no stop signal and no preStop hook, the containers are killed |
//! | `hypernetes.io/paused` | with `true` the containers stand still, and none is started |
//! | `hypernetes.io/timing` | with `true` events with the reason `Timing` say what the start's phases took |
//! | `hypernetes.io/suspended` | with `true` the VM is on the disk instead of in memory, and no container is started |
//!
//! And what is read once, when the pod's first VM starts: `hypernetes.io/clone-of` names the pod of the same
//! namespace that it goes on from, `hypernetes.io/clone-of-snapshot` the PodSnapshot.
//!
//! A value that is not a number, or not `true`, is as if it were not there.

use std::fmt;

use hypernetes_types::kinds::{
    CLONE_ANNOTATION, CLONE_SNAPSHOT_ANNOTATION, PAUSED_ANNOTATION, SUSPENDED_ANNOTATION,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

/// How long after a failure it is tried again.
const RETRY: SignedDuration = SignedDuration::from_secs(10);
const MAX_RESTARTS: &str = "hypernetes.io/max-restarts";
const TIMING: &str = "hypernetes.io/timing";
const STOP_GRACE: &str = "hypernetes.io/stop-grace-seconds";

fn number(pod: &Pod, key: &str) -> Option<u32> {
    pod.metadata.annotations.as_ref()?.get(key)?.parse().ok()
}

/// How often a container of the pod is restarted at most.
pub(crate) fn max_restarts(pod: &Pod) -> Option<u32> {
    number(pod, MAX_RESTARTS)
}

/// Whether events are to say how long the phases of its start took.
pub(crate) fn wants_timing(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.is_some_and(|all| all.get(TIMING).is_some_and(|value| value == "true"))
}

/// Seconds from the stop signal to the kill when a pod that is not deleted ends.
pub(crate) fn stop_grace(pod: &Pod) -> Option<i64> {
    number(pod, STOP_GRACE).map(i64::from)
}

/// Whether the containers of the pod shall stand still.
pub(crate) fn is_paused(pod: &Pod) -> bool {
    is_true(pod, PAUSED_ANNOTATION)
}

/// Whether the pod's memory shall be on the disk.
pub(crate) fn is_suspended(pod: &Pod) -> bool {
    is_true(pod, SUSPENDED_ANNOTATION)
}

/// What a pod goes on from, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CloneOf<'a> {
    Pod(&'a str),
    Snapshot(&'a str),
}

impl fmt::Display for CloneOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "pod {name}"),
            Self::Snapshot(name) => write!(f, "snapshot {name}"),
        }
    }
}

/// What this pod is a clone of.
pub(crate) fn clone_of(pod: &Pod) -> Option<CloneOf<'_>> {
    let annotations = pod.metadata.annotations.as_ref()?;
    let pod = annotations.get(CLONE_ANNOTATION).map(|it| CloneOf::Pod(it));
    pod.or_else(|| {
        let snapshot = annotations.get(CLONE_SNAPSHOT_ANNOTATION)?;
        Some(CloneOf::Snapshot(snapshot))
    })
}

/// What a pod's annotation asks for, or no longer asks for, and did not come about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unfulfilled {
    /// What was wanted.
    pub(crate) wanted: bool,
    pub(crate) message: String,
    pub(crate) since: Timestamp,
}

impl Unfulfilled {
    pub(crate) fn new(wanted: bool, message: String) -> Self {
        let since = Timestamp::now();
        Self {
            wanted,
            message,
            since,
        }
    }

    /// When it is tried again, unless it is time.
    pub(crate) fn waits_until(&self, now: Timestamp) -> Option<Timestamp> {
        let again = self.since.checked_add(RETRY).unwrap_or(now);
        (again > now).then_some(again)
    }
}

fn is_true(pod: &Pod, key: &str) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    let value = annotations.and_then(|all| all.get(key));
    value.is_some_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_count_and_nothing_else() {
        let pod = |value: &str| -> Pod {
            serde_json::from_value(
                json!({"metadata": {"annotations": {MAX_RESTARTS: value, STOP_GRACE: value}}}),
            )
            .unwrap()
        };
        assert_eq!(
            (max_restarts(&pod("3")), stop_grace(&pod("0"))),
            (Some(3), Some(0))
        );
        for bad in ["", "-1", "x", "1.5"] {
            assert_eq!(
                (max_restarts(&pod(bad)), stop_grace(&pod(bad))),
                (None, None),
                "{bad}"
            );
        }
        assert_eq!(max_restarts(&Pod::default()), None);
    }

    #[test]
    fn only_true_pauses() {
        for (value, paused) in [
            ("true", true),
            ("false", false),
            ("1", false),
            ("True", false),
        ] {
            let wishes = json!({PAUSED_ANNOTATION: value, SUSPENDED_ANNOTATION: value});
            let pod = json!({"metadata": {"annotations": wishes}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            assert_eq!(is_paused(&pod), paused, "{value}");
            assert_eq!(is_suspended(&pod), paused, "{value}");
        }
        assert!(!is_paused(&Pod::default()));
    }
}

//! Scheduling gates: a pod that has some is bound to the node when the last one is taken away.

use hypernetes_apimachinery::kinds::ResourceKind;
use serde_json::{Value, json};

use super::Engine;

pub(super) fn is_gated(pod: &Value) -> bool {
    pod["spec"]["schedulingGates"]
        .as_array()
        .is_some_and(|gates| !gates.is_empty())
}

/// Says of a new pod why it waits.
pub(super) fn mark(pod: &mut Value, now: &str) {
    pod["status"]["conditions"] = json!([{
        "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
        "message": "Scheduling is blocked due to non-empty scheduling gates",
        "lastProbeTime": null, "lastTransitionTime": now,
    }]);
}

impl Engine {
    /// Binds a pod whose last gate has just been taken away.
    pub(super) fn bind_ungated(&self, kind: &ResourceKind, new: &mut Value, old: &Value) {
        if kind.kind == "Pod" && is_gated(old) && !is_gated(new) {
            if let Some(conditions) = new["status"]["conditions"].as_array_mut() {
                conditions.retain(|condition| condition["reason"] != "SchedulingGated");
            }
            self.bind_to_node(kind, new);
        }
    }
}

//! Scheduling gates of pods.

use std::collections::HashSet;

use serde_json::Value;

use crate::meta::rules;

use super::{Found, Path, items, text};

fn names(pod: &Value) -> impl Iterator<Item = &str> {
    let gates = pod["spec"]["schedulingGates"]
        .as_array()
        .into_iter()
        .flatten();
    gates.map(|gate| text(gate, "name"))
}

/// Of a new pod.
pub(super) fn validate(pod: &Value, found: &mut Found) {
    let path = Path::root("spec").field("schedulingGates");
    let mut seen = HashSet::new();
    for (gate, at) in items(&pod["spec"]["schedulingGates"], &path) {
        let name = text(gate, "name");
        found.all_invalid(&at, name, rules::qualified_name(name));
        if !seen.insert(name) {
            found.duplicate(&at, &gate["name"]);
        }
    }
    if !seen.is_empty() && !text(&pod["spec"], "nodeName").is_empty() {
        found.forbidden(
            &Path::root("spec").field("nodeName"),
            "cannot be set until all schedulingGates have been cleared",
        );
    }
}

/// Of a pod that changes: gates go, and do not come. True if that is so.
pub(super) fn validate_update(new: &Value, old: &Value, found: &mut Found) -> bool {
    let before: HashSet<&str> = names(old).collect();
    let mut only_gone = true;
    for name in names(new).filter(|name| !before.contains(name)) {
        only_gone = false;
        found.forbidden(
            &Path::root("spec").field("schedulingGates"),
            format!("only deletion is allowed, but found new scheduling gate '{name}'"),
        );
    }
    only_gone
}

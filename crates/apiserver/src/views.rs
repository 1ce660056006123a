//! Kinds that are served under two versions and stored under one.

use hypernetes_apimachinery::{ResourceKind, kinds};
use serde_json::Value;

use crate::{autoscaling, events};

/// Whether objects of the kind are stored in another form.
pub(crate) fn is_view(kind: &ResourceKind) -> bool {
    events::is_view(kind) || autoscaling::is_view(kind)
}

/// The kind under which objects are stored, validated and defaulted.
pub(crate) fn stored_kind(kind: &'static ResourceKind) -> &'static ResourceKind {
    let stored = if events::is_view(kind) {
        kinds::by_resource("", "v1", "events")
    } else if autoscaling::is_view(kind) {
        kinds::by_resource(kind.group, "v2", kind.plural)
    } else {
        None
    };
    stored.unwrap_or(kind)
}

/// From what clients of the kind send to what is stored.
pub(crate) fn to_stored(kind: &ResourceKind, object: Value) -> Value {
    if events::is_view(kind) {
        events::to_stored(object)
    } else if autoscaling::is_view(kind) {
        autoscaling::to_stored(object)
    } else {
        object
    }
}

/// From what is stored to what clients of the kind see.
pub(crate) fn to_view(kind: &ResourceKind, object: Value) -> Value {
    if events::is_view(kind) {
        events::to_view(object)
    } else if autoscaling::is_view(kind) {
        autoscaling::to_view(object)
    } else {
        object
    }
}

/// A field selector in the words of what is stored.
pub(crate) fn stored_fields(kind: &ResourceKind, selector: &str) -> String {
    if events::is_view(kind) {
        events::stored_fields(selector)
    } else {
        selector.to_owned()
    }
}

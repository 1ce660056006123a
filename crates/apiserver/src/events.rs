//! The two views of events: core `v1` is stored, `events.k8s.io/v1` is made from it.

use hypernetes_apimachinery::ResourceKind;
use serde_json::{Map, Value, json};

/// Pairs of fields: core, events.k8s.io.
const RENAMED: [(&str, &str); 6] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];
const REPORTING: [(&str, &str); 2] = [
    ("reportingComponent", "reportingController"),
    ("reportingInstance", "reportingInstance"),
];

/// Whether objects of the kind are stored in another form.
pub(crate) fn is_view(kind: &ResourceKind) -> bool {
    kind.group == "events.k8s.io"
}

/// From what clients of `events.k8s.io/v1` send to what is stored.
pub(crate) fn to_stored(object: Value) -> Value {
    rename(object, "v1", |key| {
        find(key, |(_, new)| new, |(old, _)| old)
    })
}

/// From what is stored to what clients of `events.k8s.io/v1` see.
pub(crate) fn to_view(object: Value) -> Value {
    let mut out = rename(object, "events.k8s.io/v1", |key| {
        find(key, |(old, _)| old, |(_, new)| new)
    });
    if out.get("eventTime").is_none() {
        out["eventTime"] = Value::Null;
    }
    out
}

/// A field selector of `events.k8s.io/v1` in the words of what is stored.
pub(crate) fn stored_fields(selector: &str) -> String {
    selector
        .replace("regarding.", "involvedObject.")
        .replace("reportingController", "reportingComponent")
}

type Pair = (&'static str, &'static str);

fn find(
    key: &str,
    from: fn(Pair) -> &'static str,
    to: fn(Pair) -> &'static str,
) -> Option<&'static str> {
    RENAMED
        .into_iter()
        .chain(REPORTING)
        .find(|pair| from(*pair) == key)
        .map(to)
}

fn rename(object: Value, api_version: &str, name: impl Fn(&str) -> Option<&'static str>) -> Value {
    let Value::Object(fields) = object else {
        return object;
    };
    let mut out: Map<String, Value> = fields
        .into_iter()
        .map(|(key, value)| match name(&key) {
            Some(new) => (new.to_owned(), value),
            None => (key, value),
        })
        .collect();
    out.insert("apiVersion".into(), api_version.into());
    out.insert("kind".into(), json!("Event"));
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_the_way_there_and_back() {
        let view = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "a"},
            "eventTime": "2026-01-01T00:00:00.000000Z", "reason": "Started", "type": "Normal",
            "note": "n", "regarding": {"kind": "Pod", "name": "p"}, "action": "Start",
            "reportingController": "nodelet", "reportingInstance": "n1",
        });
        let stored = to_stored(view.clone());
        assert_eq!(stored["involvedObject"]["name"], "p");
        assert_eq!(stored["message"], "n");
        assert_eq!(stored["reportingComponent"], "nodelet");
        assert_eq!(stored["apiVersion"], "v1");
        assert_eq!(to_view(stored), view);
    }
}

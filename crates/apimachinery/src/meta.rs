//! Reading and writing `metadata` of an object.

use serde_json::{Map, Value};

use crate::kinds::NameRule;

fn text<'a>(object: &'a Value, field: &str) -> Option<&'a str> {
    object
        .get("metadata")?
        .get(field)?
        .as_str()
        .filter(|text| !text.is_empty())
}

/// `apiVersion`.
pub fn api_version(object: &Value) -> Option<&str> {
    object
        .get("apiVersion")?
        .as_str()
        .filter(|text| !text.is_empty())
}

/// `kind`.
pub fn kind(object: &Value) -> Option<&str> {
    object.get("kind")?.as_str().filter(|text| !text.is_empty())
}

/// `metadata.name`.
pub fn name(object: &Value) -> Option<&str> {
    text(object, "name")
}

/// `metadata.generateName`.
pub fn generate_name(object: &Value) -> Option<&str> {
    text(object, "generateName")
}

/// `metadata.namespace`.
pub fn namespace(object: &Value) -> Option<&str> {
    text(object, "namespace")
}

/// `metadata.uid`.
pub fn uid(object: &Value) -> Option<&str> {
    text(object, "uid")
}

/// `metadata.resourceVersion`.
pub fn resource_version(object: &Value) -> Option<&str> {
    text(object, "resourceVersion")
}

/// `metadata.creationTimestamp`.
pub fn creation_timestamp(object: &Value) -> Option<jiff::Timestamp> {
    text(object, "creationTimestamp")?.parse().ok()
}

/// `metadata.deletionTimestamp`.
pub fn deletion_timestamp(object: &Value) -> Option<jiff::Timestamp> {
    text(object, "deletionTimestamp")?.parse().ok()
}

/// Whether the object is being deleted.
pub fn is_deleting(object: &Value) -> bool {
    text(object, "deletionTimestamp").is_some()
}

/// `metadata.deletionGracePeriodSeconds`.
pub fn deletion_grace_seconds(object: &Value) -> Option<i64> {
    object
        .get("metadata")?
        .get("deletionGracePeriodSeconds")?
        .as_i64()
}

/// `metadata.generation`, 0 if absent.
pub fn generation(object: &Value) -> i64 {
    object
        .get("metadata")
        .and_then(|meta| meta.get("generation"))
        .and_then(Value::as_i64)
        .unwrap_or_default()
}

/// A label.
pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    labels(object)?.get(key)?.as_str()
}

/// `metadata.labels`.
pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    object.get("metadata")?.get("labels")?.as_object()
}

/// An annotation.
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    annotations(object)?.get(key)?.as_str()
}

/// `metadata.annotations`.
pub fn annotations(object: &Value) -> Option<&Map<String, Value>> {
    object.get("metadata")?.get("annotations")?.as_object()
}

/// `metadata.finalizers`.
pub fn finalizers(object: &Value) -> impl Iterator<Item = &str> {
    list(object, "finalizers").iter().filter_map(Value::as_str)
}

/// `metadata.ownerReferences`.
pub fn owner_references(object: &Value) -> &[Value] {
    list(object, "ownerReferences")
}

/// The owner that controls the object.
pub fn controller(object: &Value) -> Option<&Value> {
    owner_references(object)
        .iter()
        .find(|owner| owner["controller"] == true)
}

fn list<'a>(object: &'a Value, field: &str) -> &'a [Value] {
    object
        .get("metadata")
        .and_then(|meta| meta.get(field))
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// `metadata`, made if it is absent. `None`: the value is no object, or its metadata is none.
pub fn metadata_mut(object: &mut Value) -> Option<&mut Map<String, Value>> {
    let meta = object
        .as_object_mut()?
        .entry("metadata")
        .or_insert_with(empty);
    if meta.is_null() {
        *meta = empty();
    }
    meta.as_object_mut()
}

fn empty() -> Value {
    Value::Object(Map::new())
}

/// Sets a field of `metadata`.
pub fn set(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(meta) = metadata_mut(object) {
        meta.insert(field.to_owned(), value.into());
    }
}

/// Removes a field of `metadata`.
pub fn remove(object: &mut Value, field: &str) -> Option<Value> {
    object.get_mut("metadata")?.as_object_mut()?.remove(field)
}

/// Sets `metadata.resourceVersion`.
pub fn set_resource_version(object: &mut Value, revision: u64) {
    set(object, "resourceVersion", revision.to_string());
}

/// Sets a label.
pub fn set_label(object: &mut Value, key: &str, value: &str) {
    set_in(object, "labels", key, value);
}

/// Sets an annotation.
pub fn set_annotation(object: &mut Value, key: &str, value: &str) {
    set_in(object, "annotations", key, value);
}

fn set_in(object: &mut Value, field: &str, key: &str, value: &str) {
    let Some(meta) = metadata_mut(object) else {
        return;
    };
    let map = meta.entry(field).or_insert_with(empty);
    if !map.is_object() {
        *map = empty();
    }
    if let Some(map) = map.as_object_mut() {
        map.insert(key.to_owned(), value.into());
    }
}

/// Adds a finalizer. Returns whether it was not there.
pub fn add_finalizer(object: &mut Value, finalizer: &str) -> bool {
    if finalizers(object).any(|f| f == finalizer) {
        return false;
    }
    let Some(meta) = metadata_mut(object) else {
        return false;
    };
    let list = meta
        .entry("finalizers")
        .or_insert_with(|| Value::Array(Vec::new()));
    if !list.is_array() {
        *list = Value::Array(Vec::new());
    }
    if let Some(list) = list.as_array_mut() {
        list.push(finalizer.into());
    }
    true
}

/// Removes a finalizer. Returns whether it was there.
pub fn remove_finalizer(object: &mut Value, finalizer: &str) -> bool {
    let Some(meta) = metadata_mut(object) else {
        return false;
    };
    let Some(list) = meta.get_mut("finalizers").and_then(Value::as_array_mut) else {
        return false;
    };
    let before = list.len();
    list.retain(|f| f != finalizer);
    let removed = list.len() < before;
    if list.is_empty() {
        meta.remove("finalizers");
    }
    removed
}

/// The time as objects carry it: RFC 3339 in UTC, whole seconds.
pub fn format_time(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The time with microseconds, as leases and events carry it.
pub fn format_micro_time(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// Letters without vowels and look-alikes, so that no words come out.
const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
const MAX_GENERATED: usize = 63;

/// A name from `metadata.generateName`: the base cut to 58 characters and five random ones.
pub fn generate(base: &str) -> String {
    let mut end = base.len().min(MAX_GENERATED - SUFFIX_LENGTH);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = base[..end].to_owned();
    let random = *uuid::Uuid::new_v4().as_bytes();
    // The first bytes of a version 4 UUID are random; 27 letters out of 256 values are near enough
    // to uniform for a suffix that is checked for conflicts.
    for byte in &random[..SUFFIX_LENGTH] {
        name.push(SUFFIX_LETTERS[usize::from(*byte) % SUFFIX_LETTERS.len()].into());
    }
    name
}

/// Upstream's texts for names that are not well formed.
pub mod rules {
    const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric \
        characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  \
        or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
    const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters \
        or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. \
        'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
    const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case \
        alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character \
        (e.g. 'example.com', regex used for validation is \
        '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', \
        and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or \
        '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
    const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric \
        characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. \
        'MyValue',  or 'my_value',  or '12345', regex used for validation is \
        '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
    const ENV_NAME: &str = "a valid environment variable name must consist only of printable ASCII \
        characters other than '='";
    const CONFIG_KEY: &str = "a valid config key must consist of alphanumeric characters, '-', '_' \
        or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is \
        '[-._a-zA-Z0-9]+')";

    fn too_long(limit: usize) -> String {
        format!("must be no more than {limit} characters")
    }

    fn too_long_bytes(limit: usize) -> String {
        format!("must be no more than {limit} bytes")
    }

    fn is_label_text(text: &str) -> bool {
        let edge = |b: Option<&u8>| matches!(b, Some(b'a'..=b'z' | b'0'..=b'9'));
        let bytes = text.as_bytes();
        edge(bytes.first())
            && edge(bytes.last())
            && bytes
                .iter()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    }

    fn is_qualified_text(text: &str) -> bool {
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        edge(bytes.first())
            && edge(bytes.last())
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    }

    /// RFC 1123 label, at most 63 characters.
    pub fn label(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        if text.len() > 63 {
            found.push(too_long(63));
        }
        if !is_label_text(text) {
            found.push(LABEL.to_owned());
        }
        found
    }

    /// RFC 1035 label, at most 63 characters.
    pub fn label_1035(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        if text.len() > 63 {
            found.push(too_long(63));
        }
        if !is_label_text(text) || !text.starts_with(|c: char| c.is_ascii_lowercase()) {
            found.push(LABEL_1035.to_owned());
        }
        found
    }

    /// RFC 1123 subdomain, at most 253 characters.
    pub fn subdomain(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        if text.len() > 253 {
            found.push(too_long(253));
        }
        if !text.split('.').all(is_label_text) {
            found.push(SUBDOMAIN.to_owned());
        }
        found
    }

    /// One segment of a path.
    pub fn path_segment(text: &str) -> Vec<String> {
        if matches!(text, "." | "..") {
            return vec![format!("may not be '{text}'")];
        }
        ["/", "%"]
            .iter()
            .filter(|part| text.contains(**part))
            .map(|part| format!("may not contain '{part}'"))
            .collect()
    }

    /// Label key, finalizer: `[prefix/]name`.
    pub fn qualified_name(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        let parts: Vec<&str> = text.split('/').collect();
        let name = match parts.as_slice() {
            [name] => *name,
            [prefix, name] => {
                if prefix.is_empty() {
                    found.push("prefix part must be non-empty".to_owned());
                } else {
                    found.extend(
                        subdomain(prefix)
                            .into_iter()
                            .map(|m| format!("prefix part {m}")),
                    );
                }
                *name
            }
            _ => {
                let text = QUALIFIED.trim_start_matches("name part ");
                return vec![format!(
                    "a qualified name {text} with an optional DNS subdomain prefix and '/' (e.g. \
                     'example.com/MyName')"
                )];
            }
        };
        if name.is_empty() {
            found.push("name part must be non-empty".to_owned());
        } else if name.len() > 63 {
            found.push(format!("name part {}", too_long_bytes(63)));
        }
        if !is_qualified_text(name) {
            found.push(QUALIFIED.to_owned());
        }
        found
    }

    /// Value of a label.
    pub fn label_value(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        if text.len() > 63 {
            found.push(too_long_bytes(63));
        }
        if !text.is_empty() && !is_qualified_text(text) {
            found.push(LABEL_VALUE.to_owned());
        }
        found
    }

    /// Name of an environment variable.
    pub fn env_name(text: &str) -> Vec<String> {
        if !text.is_empty() && text.bytes().all(|b| matches!(b, 0x20..=0x7e) && b != b'=') {
            Vec::new()
        } else {
            vec![ENV_NAME.to_owned()]
        }
    }

    /// Key of a ConfigMap or Secret.
    pub fn config_key(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        if text.len() > 253 {
            found.push(too_long(253));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if text.is_empty() || !text.bytes().all(plain) {
            found.push(CONFIG_KEY.to_owned());
        } else if text == "." || text == ".." {
            found.push(format!("must not be '{text}'"));
        } else if text.starts_with("..") {
            found.push("must not start with '..'".to_owned());
        }
        found
    }

    /// Name of a port: an IANA service name.
    pub fn port_name(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        if text.len() > 15 {
            found.push(too_long(15));
        }
        let plain = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if text.is_empty() || !text.bytes().all(plain) {
            found.push(
                "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned(),
            );
        }
        if !text.bytes().any(|b| b.is_ascii_lowercase()) {
            found.push("must contain at least one letter (a-z)".to_owned());
        }
        if text.contains("--") {
            found.push("must not contain consecutive hyphens".to_owned());
        }
        if text.starts_with('-') || text.ends_with('-') {
            found.push("must not begin or end with a hyphen".to_owned());
        }
        found
    }

    /// Port number.
    pub fn port_number(port: i64) -> Vec<String> {
        if (1..=65535).contains(&port) {
            Vec::new()
        } else {
            vec!["must be between 1 and 65535, inclusive".to_owned()]
        }
    }
}

/// What is wrong with an object's name under its kind's rule, in upstream's words.
pub fn check_name(rule: NameRule, name: &str) -> Vec<String> {
    match rule {
        NameRule::Subdomain => rules::subdomain(name),
        NameRule::Label => rules::label(name),
        NameRule::Label1035 => rules::label_1035(name),
        NameRule::PathSegment => rules::path_segment(name),
    }
}

/// Removes the lists and maps of the metadata that have nothing in them, which Kubernetes' types leave out.
pub fn drop_empty(object: &mut Value) {
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
        let nothing = match metadata.get(field) {
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(entries)) => entries.is_empty(),
            Some(Value::Null) => true,
            _ => false,
        };
        if nothing {
            metadata.remove(field);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn generated_names_fit_a_label() {
        let name = generate("web-");
        assert_eq!(name.len(), 9);
        assert!(rules::label(&name).is_empty(), "{name}");
        assert_eq!(generate(&"x".repeat(100)).len(), 63);
        assert_ne!(generate("a"), generate("a"));
    }

    #[test]
    fn finalizers_are_added_once_and_leave_no_empty_list() {
        let mut object = json!({"metadata": {"name": "a"}});
        assert!(add_finalizer(&mut object, "x/y"));
        assert!(!add_finalizer(&mut object, "x/y"));
        assert!(remove_finalizer(&mut object, "x/y"));
        assert!(!remove_finalizer(&mut object, "x/y"));
        assert_eq!(object, json!({"metadata": {"name": "a"}}));
    }

    #[test]
    fn setters_make_what_is_missing() {
        let mut object = json!({"metadata": null});
        set_label(&mut object, "a", "b");
        set_resource_version(&mut object, 7);
        assert_eq!(label(&object, "a"), Some("b"));
        assert_eq!(resource_version(&object), Some("7"));
        let mut text = json!("x");
        set_label(&mut text, "a", "b");
        assert_eq!(text, json!("x"));
    }

    #[test]
    fn names_follow_their_rule() {
        assert!(check_name(NameRule::Subdomain, "a.b-c").is_empty());
        assert!(check_name(NameRule::PathSegment, "system:node").is_empty());
        assert_eq!(check_name(NameRule::PathSegment, ".."), ["may not be '..'"]);
        assert_eq!(
            check_name(NameRule::PathSegment, "a/b"),
            ["may not contain '/'"]
        );
        let found = check_name(NameRule::Label, "A");
        assert_eq!(
            found,
            [
                "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', \
              and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', \
              regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            ]
        );
        assert_eq!(
            check_name(NameRule::Label, &"a".repeat(64)),
            ["must be no more than 63 characters"]
        );
    }

    #[test]
    fn label_keys_and_values_are_checked() {
        assert!(rules::qualified_name("hypernetes.io/tenant").is_empty());
        assert_eq!(
            rules::qualified_name("/x"),
            ["prefix part must be non-empty"]
        );
        assert_eq!(rules::qualified_name("a/b/c").len(), 1);
        assert!(rules::label_value("").is_empty());
        assert!(!rules::label_value("-x").is_empty());
    }

    #[test]
    fn empty_lists_and_maps_of_the_metadata_go() {
        let mut object = serde_json::json!({"metadata": {
            "name": "a", "labels": {}, "annotations": {"k": "v"}, "finalizers": [], "ownerReferences": null,
        }});
        drop_empty(&mut object);
        let wanted = serde_json::json!({"metadata": {"name": "a", "annotations": {"k": "v"}}});
        assert_eq!(object, wanted);
    }

    #[test]
    fn times_are_whole_seconds_in_utc() {
        let time: jiff::Timestamp = "2026-11-23T10:00:00.5+02:00".parse().unwrap();
        assert_eq!(format_time(time), "2026-11-23T08:00:00Z");
        assert_eq!(format_micro_time(time), "2026-11-23T08:00:00.500000Z");
    }
}

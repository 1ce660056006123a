//! Who manages the fields of an object that is written.

use http::header;
use hypernetes_apimachinery::{
    Status,
    managed::{self, Writer},
    meta,
    validation::{ErrorKind, FieldError},
};
use serde_json::Value;

use super::{Call, Engine, strategy, strategy::Part};
use crate::{rbac::Action, status::Result};

/// Longest name of a manager.
const MAX_NAME: usize = 128;
/// The manager of clients that do not say who they are.
const UNKNOWN: &str = "unknown";

/// The name under which the call's client manages fields.
pub(crate) fn manager_of(call: &Call) -> String {
    if let Some(name) = call.query.text("fieldManager") {
        return name.to_owned();
    }
    let agent = call
        .headers
        .get(header::USER_AGENT)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        .unwrap_or_default();
    let name: String = agent
        .split('/')
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .scan(0, |length, c| {
            *length += c.len_utf8();
            (*length <= MAX_NAME).then_some(c)
        })
        .collect();
    if name.is_empty() {
        UNKNOWN.to_owned()
    } else {
        name
    }
}

/// The refusal of an option.
pub(crate) fn invalid_option(options: &str, error: FieldError) -> Status {
    Status::invalid("meta.k8s.io", options, "", &[error])
}

/// Checks `fieldManager`.
pub(crate) fn check_options(call: &Call, options: &str) -> Result<()> {
    let name = call.query.get("fieldManager").unwrap_or_default();
    let (kind, detail) = if name.len() > MAX_NAME {
        (
            ErrorKind::TooLong,
            format!("may not be more than {MAX_NAME} bytes"),
        )
    } else if name.chars().any(char::is_control) {
        (
            ErrorKind::Invalid,
            "should only contain printable characters".to_owned(),
        )
    } else {
        return Ok(());
    };
    let error = FieldError {
        kind,
        field: "fieldManager".into(),
        value: name.into(),
        detail,
    };
    Err(invalid_option(options, error))
}

/// Which fields at the top of an object a write of the part does not reach.
pub(super) fn ignored(call: &Call, part: Part) -> fn(&str) -> bool {
    match part {
        Part::Main if strategy::has_status(call.kind) => |name| name == "status",
        Part::Main => |_| false,
        Part::Status | Part::Approval => |name| name != "status",
        Part::Finalize | Part::Ephemeral | Part::Resize => |name| name != "spec",
    }
}

/// Takes out owners that are named twice. Returns the warning that upstream gives.
pub(crate) fn dedup_owners(object: &mut Value) -> Vec<String> {
    let Some(Value::Array(owners)) = object.pointer_mut("/metadata/ownerReferences") else {
        return Vec::new();
    };
    let mut seen: Vec<String> = Vec::new();
    let mut twice: Vec<String> = Vec::new();
    owners.retain(|owner| {
        let uid = owner["uid"].as_str().unwrap_or_default();
        if uid.is_empty() || !seen.iter().any(|s| s == uid) {
            seen.push(uid.to_owned());
            return true;
        }
        if !twice.iter().any(|t| t == uid) {
            twice.push(uid.to_owned());
        }
        false
    });
    if twice.is_empty() {
        return Vec::new();
    }
    vec![format!(
        ".metadata.ownerReferences contains duplicate entries; API server dedups owner references \
         in 1.20+, and may reject such requests as early as 1.24; please fix your requests; \
         duplicate UID(s) observed: {}",
        twice.join(",")
    )]
}

impl Engine {
    /// Notes in an object that is to be stored what the call has set.
    pub(crate) fn record(
        &self,
        call: &Call,
        part: Part,
        old: Option<&Value>,
        new: &mut Value,
    ) -> Result<()> {
        let (manager, api_version) = (manager_of(call), self.managed_version(call));
        let time = meta::format_time((self.clock)());
        let writer = Writer {
            manager: &manager,
            api_version: &api_version,
            subresource: subresource_of(call, part),
            time: &time,
            ignored: ignored(call, part),
        };
        managed::update(call.stored_schema()?, old, new, &writer).write(new);
        Ok(())
    }

    /// The version under which fields are noted: that of the stored form.
    pub(super) fn managed_version(&self, call: &Call) -> String {
        strategy::stored_kind(call.kind).api_version()
    }

    /// What is made by a write that could also have been a change must be allowed to be made.
    pub(crate) fn check_may_create(&self, call: &Call) -> Result<()> {
        let action = Action {
            verb: "create",
            ..Action::of(&call.info)
        };
        self.authorizer.check(&call.user, &action)
    }
}

/// The subresource under which fields are noted.
pub(super) fn subresource_of(call: &Call, part: Part) -> &str {
    match part {
        Part::Main => call.info.subresource.as_str(),
        Part::Status => "status",
        Part::Approval => "approval",
        Part::Finalize => "finalize",
        Part::Ephemeral => "ephemeralcontainers",
        Part::Resize => "resize",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_owner_is_named_once() {
        let mut object = json!({"metadata": {"ownerReferences": [
            {"uid": "1", "name": "a"}, {"uid": "2"}, {"uid": "1", "name": "b"}]}});
        let warnings = dedup_owners(&mut object);
        assert_eq!(
            object["metadata"]["ownerReferences"],
            json!([{"uid": "1", "name": "a"}, {"uid": "2"}])
        );
        assert!(warnings[0].ends_with("observed: 1"), "{warnings:?}");
        assert!(dedup_owners(&mut object).is_empty());
    }
}

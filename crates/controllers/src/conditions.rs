//! Conditions in a status: set in place, with the time of the last change of each.

use jiff::Timestamp;
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::error::ReconcileError;

/// One condition to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) kind: &'static str,
    pub(crate) ok: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// The status with these conditions and fields; the rest as it was. Times change only with states.
pub(crate) fn merged(
    status: &Value,
    generation: Option<i64>,
    conditions: &[Condition],
    fields: Value,
    now: Timestamp,
) -> Value {
    let before = status["conditions"].as_array().cloned().unwrap_or_default();
    let mut after: Vec<Value> = before
        .iter()
        .filter(|old| !conditions.iter().any(|new| old["type"] == new.kind))
        .cloned()
        .collect();
    for condition in conditions {
        let state = if condition.ok { "True" } else { "False" };
        let old = before.iter().find(|old| old["type"] == condition.kind);
        let since = old.filter(|old| old["status"] == state).map_or_else(
            || json!(rfc3339(now)),
            |old| old["lastTransitionTime"].clone(),
        );
        after.push(json!({
            "type": condition.kind,
            "status": state,
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": since,
            "observedGeneration": generation,
        }));
    }
    after.sort_by_key(|condition| condition["type"].as_str().unwrap_or_default().to_owned());
    let mut out = status.as_object().cloned().unwrap_or_default();
    if let Value::Object(fields) = fields {
        out.extend(fields);
    }
    out.insert("conditions".to_owned(), after.into());
    Value::Object(out)
}

fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Writes the status if it is another than the object has.
pub(crate) async fn write(
    api: &Api<DynamicObject>,
    object: &DynamicObject,
    conditions: &[Condition],
    fields: Value,
) -> Result<(), ReconcileError> {
    let before = &object.data["status"];
    let after = merged(
        before,
        object.metadata.generation,
        conditions,
        fields,
        Timestamp::now(),
    );
    if *before == after {
        return Ok(());
    }
    let patch = Patch::Merge(json!({"status": after}));
    match api
        .patch_status(&object.name_any(), &PatchParams::default(), &patch)
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(ReconcileError::api(format!(
            "write the status of {}",
            object.name_any()
        ))(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(ok: bool, message: &str) -> Condition {
        Condition {
            kind: "Ready",
            ok,
            reason: "Test",
            message: message.to_owned(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_time_changes_only_with_the_state() {
        let first = merged(
            &json!(null),
            Some(1),
            &[ready(true, "a")],
            json!({}),
            at(10),
        );
        let second = merged(
            &first,
            Some(2),
            &[ready(true, "b")],
            json!({"x": 1}),
            at(20),
        );
        let third = merged(&second, Some(2), &[ready(false, "c")], json!({}), at(30));
        let time = |status: &Value| status["conditions"][0]["lastTransitionTime"].clone();
        assert_eq!(time(&first), "1970-01-01T00:00:10Z");
        assert_eq!(time(&second), "1970-01-01T00:00:10Z");
        assert_eq!(time(&third), "1970-01-01T00:00:30Z");
        assert_eq!((&second["x"], &third["x"]), (&json!(1), &json!(1)));
    }

    #[test]
    fn conditions_of_others_stay() {
        let status = json!({"conditions": [{"type": "Foreign", "status": "True"}]});
        let after = merged(&status, None, &[ready(true, "")], json!({}), at(1));
        assert_eq!(after["conditions"].as_array().unwrap().len(), 2);
    }
}

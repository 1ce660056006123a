//! The patches of the Kubernetes API.

mod strategic;

use serde_json::Value;

pub use strategic::strategic_merge_patch;

/// Kind of a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchType {
    /// RFC 6902.
    Json,
    /// RFC 7386.
    Merge,
    /// Kubernetes' own, driven by the schema.
    StrategicMerge,
    /// Server-side apply.
    Apply,
}

impl PatchType {
    /// By media type, parameters ignored.
    pub fn from_content_type(content_type: &str) -> Option<Self> {
        match content_type.split(';').next()?.trim() {
            "application/json-patch+json" => Some(Self::Json),
            "application/merge-patch+json" => Some(Self::Merge),
            "application/strategic-merge-patch+json" => Some(Self::StrategicMerge),
            "application/apply-patch+yaml" => Some(Self::Apply),
            _ => None,
        }
    }
}

/// A patch that cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// The patch itself is wrong: 400.
    #[error("{0}")]
    Malformed(String),
    /// The patch does not fit the object: 422.
    #[error("{0}")]
    Inapplicable(String),
}

/// Most operations in one JSON patch, as upstream.
const MAX_OPERATIONS: usize = 10_000;
/// `copy` can double a value with each operation: the result is bounded.
const MAX_VALUES: usize = 1_000_000;

/// Applies an RFC 6902 patch.
///
/// # Errors
/// [`PatchError`]; the object is left as it was then.
pub fn json_patch(object: &Value, patch: &Value) -> Result<Value, PatchError> {
    let operations = patch.as_array().ok_or_else(|| {
        PatchError::Malformed(
            "json: cannot unmarshal object into Go value of type jsonpatch.Patch".into(),
        )
    })?;
    if operations.len() > MAX_OPERATIONS {
        return Err(PatchError::Malformed(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut out = object.clone();
    let mut copied = 0;
    for operation in operations {
        if operation["op"] == "copy" {
            let from = operation["from"].as_str().unwrap_or_default();
            copied += out.pointer(from).map_or(0, count);
            if copied > MAX_VALUES {
                return Err(PatchError::Malformed(
                    "the copies in the JSON patch are too large".into(),
                ));
            }
        }
        let operation: json_patch::PatchOperation = serde_json::from_value(operation.clone())
            .map_err(|error| PatchError::Malformed(error.to_string()))?;
        json_patch::patch(&mut out, std::slice::from_ref(&operation)).map_err(|error| {
            // One operation at a time: the index that the error counts is always 0.
            PatchError::Inapplicable(format!(
                "the server rejected our request due to an error in our request: {}",
                error.kind
            ))
        })?;
    }
    Ok(out)
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum(),
        Value::Object(object) => object.values().map(count).sum(),
        _ => 0,
    }
}

/// Applies an RFC 7386 merge patch.
pub fn merge_patch(object: &Value, patch: &Value) -> Value {
    let mut out = object.clone();
    json_patch::merge(&mut out, patch);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_patches_apply_in_order_or_not_at_all() {
        let object = json!({"a": {"b": [1, 2]}});
        let patch = json!([
            {"op": "test", "path": "/a/b/0", "value": 1},
            {"op": "add", "path": "/a/b/-", "value": 3},
            {"op": "remove", "path": "/a/b/0"},
        ]);
        assert_eq!(
            json_patch(&object, &patch).unwrap(),
            json!({"a": {"b": [2, 3]}})
        );
        let failing = json!([{"op": "test", "path": "/a/b/0", "value": 9}]);
        assert!(matches!(
            json_patch(&object, &failing),
            Err(PatchError::Inapplicable(_))
        ));
        assert!(matches!(
            json_patch(&object, &json!({})),
            Err(PatchError::Malformed(_))
        ));
        assert!(matches!(
            json_patch(&object, &json!([{"op": "x"}])),
            Err(PatchError::Malformed(_))
        ));
    }

    #[test]
    fn copies_cannot_grow_without_bound() {
        let mut operations = vec![json!({"op": "add", "path": "/a", "value": [1]})];
        for _ in 0..64 {
            operations.push(json!({"op": "copy", "from": "/a", "path": "/b"}));
            operations.push(json!({"op": "copy", "from": "/b", "path": "/a/-"}));
        }
        let result = json_patch(&json!({}), &Value::Array(operations));
        assert!(matches!(result, Err(PatchError::Malformed(_))));
    }

    #[test]
    fn merge_patches_remove_with_null() {
        let object = json!({"a": 1, "b": {"c": 2, "d": 3}});
        assert_eq!(
            merge_patch(&object, &json!({"a": null, "b": {"c": [1]}})),
            json!({"b": {"c": [1], "d": 3}})
        );
    }

    #[test]
    fn types_are_known_by_their_media_type() {
        assert_eq!(
            PatchType::from_content_type("application/json-patch+json; charset=utf-8"),
            Some(PatchType::Json)
        );
        assert_eq!(PatchType::from_content_type("application/json"), None);
    }
}

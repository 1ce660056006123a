//! The stored form of objects: canonical JSON that begins with `kind`, `apiVersion` and
//! `metadata.resourceVersion`, so that the revision can be put in and replaced without parsing.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use hypernetes_store::Revision;
use serde_json::{Map, Value};

const MARK: &[u8] = br#""metadata":{"resourceVersion":""#;

/// An object as bytes but for its revision.
#[derive(Debug)]
pub(crate) struct Encoded {
    head: Bytes,
    tail: Bytes,
}

impl Encoded {
    pub(crate) fn new(object: &Value) -> Self {
        let empty = Map::new();
        let fields = object.as_object().unwrap_or(&empty);
        let mut head = String::from("{");
        for key in ["kind", "apiVersion"] {
            if let Some(value) = fields.get(key) {
                head.push_str(&format!("\"{key}\":{value},"));
            }
        }
        head.push_str("\"metadata\":{\"resourceVersion\":\"");
        let mut tail = String::from("\"");
        let metadata = fields
            .get("metadata")
            .and_then(Value::as_object)
            .unwrap_or(&empty);
        for (key, value) in metadata.iter().filter(|(key, _)| *key != "resourceVersion") {
            push_field(&mut tail, key, value);
        }
        tail.push('}');
        let others = fields
            .iter()
            .filter(|(key, _)| !matches!(key.as_str(), "apiVersion" | "kind" | "metadata"));
        for (key, value) in others {
            push_field(&mut tail, key, value);
        }
        tail.push('}');
        Self {
            head: head.into(),
            tail: tail.into(),
        }
    }

    pub(crate) fn with_revision(&self, revision: Revision) -> Bytes {
        let revision = revision.to_string();
        let size = self.head.len() + revision.len() + self.tail.len();
        let mut out = BytesMut::with_capacity(size);
        out.put_slice(&self.head);
        out.put_slice(revision.as_bytes());
        out.put_slice(&self.tail);
        out.freeze()
    }

    pub(crate) fn to_store_value(self: &Arc<Self>) -> hypernetes_store::Value {
        let encoded = Arc::clone(self);
        hypernetes_store::Value::WithRevision(Arc::new(move |revision| {
            encoded.with_revision(revision)
        }))
    }
}

fn push_field(out: &mut String, key: &str, value: &Value) {
    out.push(',');
    out.push_str(&Value::from(key).to_string());
    out.push(':');
    out.push_str(&value.to_string());
}

/// The object of stored bytes.
pub(crate) fn decode(bytes: &[u8]) -> Value {
    // Only this server writes below its root; what it wrote is JSON.
    serde_json::from_slice(bytes).unwrap_or_default()
}

/// Stored bytes with another revision: what a watcher sees of a deletion.
pub(crate) fn replace_revision(bytes: &Bytes, revision: Revision) -> Bytes {
    let Some(start) = find(bytes, MARK).map(|at| at + MARK.len()) else {
        return bytes.clone();
    };
    let Some(length) = bytes[start..].iter().position(|b| *b == b'"') else {
        return bytes.clone();
    };
    let revision = revision.to_string();
    let mut out = BytesMut::with_capacity(bytes.len() + revision.len());
    out.put_slice(&bytes[..start]);
    out.put_slice(revision.as_bytes());
    out.put_slice(&bytes[start + length..]);
    out.freeze()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_revision_is_put_in_and_replaced() {
        let object = json!({
            "kind": "ConfigMap", "apiVersion": "v1",
            "metadata": {"name": "a", "resourceVersion": "7", "labels": {"x": "\"y\""}},
            "data": {"metadata": "{\"resourceVersion\":\""},
        });
        let encoded = Encoded::new(&object);
        let bytes = encoded.with_revision(12);
        let mut expected = object;
        expected["metadata"]["resourceVersion"] = "12".into();
        assert_eq!(decode(&bytes), expected);
        let later = replace_revision(&bytes, 345);
        expected["metadata"]["resourceVersion"] = "345".into();
        assert_eq!(decode(&later), expected);
    }

    #[test]
    fn an_object_without_metadata_is_still_json() {
        assert_eq!(
            decode(&Encoded::new(&json!({"data": 1})).with_revision(1)),
            json!({"metadata": {"resourceVersion": "1"}, "data": 1})
        );
    }
}

//! OpenAPI v2, which old clients read schemas from.
//!
//! The JSON form has all definitions and no paths. The protobuf form, which kubectl asks for when a kind
//! is not in OpenAPI v3, has no definitions either: what is not there it takes as not known, and says
//! that there is no such kind.

use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::Document;
use crate::definitions::raw;

/// Media type of the protobuf form.
pub const PROTOBUF_MEDIA_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
const TITLE: &str = "Kubernetes";
const VERSION: &str = "v1.36.2";

/// The document as JSON.
pub fn json() -> &'static Document {
    static DOCUMENT: OnceLock<Document> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let definitions: Map<String, Value> = raw()
            .into_iter()
            .map(|(name, definition)| (name, referring(definition)))
            .collect();
        Document::new(&json!({
            "swagger": "2.0",
            "info": {"title": TITLE, "version": VERSION},
            "paths": {},
            "definitions": definitions,
        }))
    })
}

/// The document as protobuf (`openapi.v2.Document`): its version and title.
pub fn protobuf() -> Vec<u8> {
    let text = |out: &mut Vec<u8>, number: u8, bytes: &[u8]| {
        // Wire type 2; no part is longer than one byte of length can say.
        out.push(number << 3 | 2);
        out.push(u8::try_from(bytes.len()).unwrap_or(0x7f));
        out.extend_from_slice(bytes);
    };
    let mut info = Vec::new();
    text(&mut info, 1, TITLE.as_bytes());
    text(&mut info, 2, VERSION.as_bytes());
    let mut out = Vec::new();
    text(&mut out, 1, b"2.0");
    text(&mut out, 2, &info);
    out
}

/// References as they are written in this version.
fn referring(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .map(|(key, value)| match (key.as_str(), value) {
                ("$ref", Value::String(name)) => (key, format!("#/definitions/{name}").into()),
                (_, value) => (key, referring(value)),
            })
            .collect(),
        Value::Array(values) => values.into_iter().map(referring).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_lead_to_definitions() {
        let document: Value = serde_json::from_slice(&json().body).unwrap();
        let definitions = document["definitions"].as_object().unwrap();
        let pod = &definitions["io.k8s.api.core.v1.Pod"]["properties"]["spec"];
        let name = pod["$ref"]
            .as_str()
            .unwrap()
            .strip_prefix("#/definitions/")
            .unwrap();
        assert!(definitions.contains_key(name), "{name}");
    }

    #[test]
    fn the_protobuf_form_is_a_message() {
        let bytes = protobuf();
        assert_eq!(&bytes[..5], b"\x0a\x032.0");
        assert_eq!(usize::from(bytes[6]), bytes.len() - 7);
    }
}

//! `meta.k8s.io/v1` Tables and partial metadata: what `kubectl get` shows.

mod age;
mod columns;
mod images;
mod legacy;
mod pod;
mod service;
mod storage;
mod workloads;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{kinds::ResourceKind, meta};

pub use age::human_duration;
pub use legacy::scale_table;

/// What a row carries beside its cells (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// The object's metadata.
    #[default]
    Metadata,
    /// The object.
    Object,
}

impl IncludeObject {
    /// The query parameter's value; empty is the default.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "None" => Some(Self::None),
            "" | "Metadata" => Some(Self::Metadata),
            "Object" => Some(Self::Object),
            _ => None,
        }
    }
}

/// A column: its head and how to read its cell.
struct Column {
    name: &'static str,
    kind: &'static str,
    format: &'static str,
    /// 0: always shown; 1: only with `-o wide`.
    priority: u8,
    cell: fn(&Value, Timestamp) -> Value,
}

impl Column {
    /// One of `columnDefinitions`.
    fn definition(&self) -> Value {
        json!({
            "name": self.name,
            "type": self.kind,
            "format": self.format,
            "description": "",
            "priority": self.priority,
        })
    }
}

/// The columns of a kind, as `columnDefinitions`.
pub fn columns(kind: &ResourceKind) -> Value {
    columns::of(kind).iter().map(Column::definition).collect()
}

/// The row of an object.
pub fn row(kind: &ResourceKind, object: &Value, include: IncludeObject, now: Timestamp) -> Value {
    let cells: Vec<Value> = columns::of(kind)
        .iter()
        .map(|column| (column.cell)(object, now))
        .collect();
    let mut out = json!({"cells": cells});
    match include {
        IncludeObject::None => {}
        IncludeObject::Metadata => out["object"] = partial_object_metadata(object),
        IncludeObject::Object => out["object"] = object.clone(),
    }
    if kind.kind == "Pod" {
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        if matches!(phase, "Succeeded" | "Failed") {
            out["conditions"] = json!([{"type": "Completed", "status": "True", "reason": phase,
                "message": "The pod has completed successfully or failed terminally."}]);
        }
    }
    out
}

/// The table of some objects. `list_meta` is the list's metadata; `headers` is false for all but
/// the first table of a watch.
pub fn table(
    kind: &ResourceKind,
    objects: &[&Value],
    include: IncludeObject,
    list_meta: &Value,
    headers: bool,
    now: Timestamp,
) -> Value {
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_meta,
        "columnDefinitions": if headers { columns(kind) } else { Value::Array(Vec::new()) },
        "rows": objects.iter().map(|o| row(kind, o, include, now)).collect::<Vec<_>>(),
    })
}

/// The object reduced to its type and metadata.
pub fn partial_object_metadata(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_default(),
    })
}

/// A list of metadata.
pub fn partial_object_metadata_list(objects: &[&Value], list_meta: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadataList",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_meta,
        "items": objects.iter().map(|o| partial_object_metadata(o)).collect::<Vec<_>>(),
    })
}

/// Text at a path; empty if it is absent.
fn text<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    path.iter()
        .try_fold(object, |value, key| value.get(key))
        .and_then(Value::as_str)
        .unwrap_or("")
}

/// The text, or a word for its absence.
fn or<'a>(text: &'a str, absent: &'a str) -> &'a str {
    if text.is_empty() { absent } else { text }
}

fn age(object: &Value, now: Timestamp) -> String {
    match meta::creation_timestamp(object) {
        Some(created) => age::since(created, now),
        None => "<unknown>".to_owned(),
    }
}

#[cfg(test)]
mod tests;

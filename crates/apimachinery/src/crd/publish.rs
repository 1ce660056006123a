//! Custom resources in OpenAPI.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
};

use serde_json::{Map, Value, json};

use super::compiled::with_envelope;
use crate::{
    definitions,
    kinds::ResourceKind,
    openapi::{self, Document},
};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// A kind with its schema.
#[derive(Debug, Clone)]
pub struct PublishedKind {
    /// The kind.
    pub kind: &'static ResourceKind,
    /// `openAPIV3Schema`.
    pub schema: Arc<Value>,
}

/// What all documents refer to.
fn common() -> &'static Map<String, Value> {
    static COMMON: OnceLock<Map<String, Value>> = OnceLock::new();
    COMMON.get_or_init(|| {
        let all = definitions::raw();
        let mut wanted: BTreeSet<String> = [
            "ObjectMeta",
            "ListMeta",
            "DeleteOptions",
            "Patch",
            "Status",
            "WatchEvent",
        ]
        .into_iter()
        .map(|name| format!("{META}.{name}"))
        .collect();
        let mut out = Map::new();
        while let Some(name) = wanted.pop_first() {
            if let Some(definition) = all.get(&name) {
                let schema = openapi::published(definition, &mut |reference| {
                    if !out.contains_key(reference) && reference != name {
                        wanted.insert(reference.to_owned());
                    }
                });
                out.insert(name, schema);
            }
        }
        out
    })
}

/// `com.example.v1.Widget`.
fn name_of(kind: &ResourceKind, name: &str) -> String {
    let mut parts: Vec<&str> = kind.group.split('.').collect();
    parts.reverse();
    format!("{}.{}.{name}", parts.join("."), kind.version)
}

/// The document of one group and version.
pub fn document(kinds: &[PublishedKind]) -> Document {
    let mut schemas = common().clone();
    let mut paths = Map::new();
    for published in kinds {
        let kind = published.kind;
        let (name, list) = (name_of(kind, kind.kind), name_of(kind, &kind.list_kind()));
        let types = |kind_name: &str| json!([{"group": kind.group, "version": kind.version, "kind": kind_name}]);
        let mut schema = openapi::published(&with_envelope(&published.schema, true), &mut |_| {});
        schema["x-kubernetes-group-version-kind"] = types(kind.kind);
        schemas.insert(name.clone(), schema);
        let of_list = json!({
            "description": format!("{} is a list of {}", kind.list_kind(), kind.kind),
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"allOf": [{"$ref": format!("#/components/schemas/{META}.ListMeta")}]},
                "items": {"type": "array",
                    "items": {"$ref": format!("#/components/schemas/{name}")}},
            },
            "x-kubernetes-group-version-kind": types(&kind.list_kind()),
        });
        schemas.insert(list.clone(), of_list);
        openapi::add_paths(&mut paths, kind, &name, Some(&list), true);
    }
    Document::new(&json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes CRD Swagger", "version": "v0.1.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }))
}

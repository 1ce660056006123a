//! OpenAPI v3 documents, made from the definitions and the kind table.
//!
//! One document per group and version, with what kubectl needs: the schemas with their extensions,
//! and for each kind a `patch` operation that says by its media types which patches the kind takes.
//! Made at first use and kept as bytes.

pub mod swagger;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha512};

use crate::{
    definitions::raw,
    kinds::{self, ResourceKind},
};

/// A document that is served as it is.
#[derive(Debug)]
pub struct Document {
    /// JSON.
    pub body: Bytes,
    /// Hexadecimal digest of the body: `hash` in paths, and the entity tag.
    pub hash: String,
}

impl Document {
    pub(crate) fn new(value: &Value) -> Self {
        let body = value.to_string();
        let mut hash = String::with_capacity(128);
        for byte in Sha512::digest(&body) {
            write!(hash, "{byte:02X}").expect("writing to a string cannot fail");
        }
        Self {
            body: body.into(),
            hash,
        }
    }
}

/// Documents by their path below `/openapi/v3/`.
fn documents() -> &'static BTreeMap<String, Document> {
    static DOCUMENTS: OnceLock<BTreeMap<String, Document>> = OnceLock::new();
    DOCUMENTS.get_or_init(|| {
        let definitions = raw();
        let mut versions: Vec<(&str, &str)> = Vec::new();
        for kind in kinds::all() {
            if !versions.contains(&(kind.group, kind.version)) {
                versions.push((kind.group, kind.version));
            }
        }
        versions
            .into_iter()
            .map(|(group, version)| {
                let document = Document::new(&make(&definitions, group, version));
                (path_of(group, version), document)
            })
            .collect()
    })
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("api/{version}")
    } else {
        format!("apis/{group}/{version}")
    }
}

/// `/openapi/v3`: the paths of the documents with their hashes. `more` are those of custom resources.
pub fn index(more: &[(String, Arc<Document>)]) -> Document {
    let known = documents()
        .iter()
        .map(|(path, document)| (path, document.hash.as_str()));
    let more = more
        .iter()
        .map(|(path, document)| (path, document.hash.as_str()));
    let paths: Map<String, Value> = known
        .chain(more)
        .map(|(path, hash)| {
            let url = format!("/openapi/v3/{path}?hash={hash}");
            (path.clone(), json!({"serverRelativeURL": url}))
        })
        .collect();
    Document::new(&json!({"paths": paths}))
}

/// `/openapi/v3/api/v1` (group empty) or `/openapi/v3/apis/GROUP/VERSION`.
pub fn document(group: &str, version: &str) -> Option<&'static Document> {
    documents().get(&path_of(group, version))
}

fn make(definitions: &Map<String, Value>, group: &str, version: &str) -> Value {
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    let mut paths = Map::new();
    for kind in kinds::all()
        .iter()
        .filter(|k| k.group == group && k.version == version)
    {
        let Some(name) = definition_of(definitions, group, version, kind.kind) else {
            continue;
        };
        wanted.insert(name.clone());
        let list = definition_of(definitions, group, version, &kind.list_kind());
        wanted.extend(list.clone());
        add_paths(&mut paths, kind, &name, list.as_deref(), false);
        for sub in kind.subresources {
            let (group, version) = (sub.group.unwrap_or(group), sub.version.unwrap_or(version));
            wanted.extend(definition_of(definitions, group, version, sub.kind));
        }
    }
    for name in ["DeleteOptions", "Patch", "Status", "WatchEvent"] {
        wanted.insert(format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}"));
    }
    let mut schemas = Map::new();
    while let Some(name) = wanted.pop_first() {
        let Some(definition) = definitions.get(&name) else {
            continue;
        };
        let schema = published(definition, &mut |reference| {
            if !schemas.contains_key(reference) && reference != name {
                wanted.insert(reference.to_owned());
            }
        });
        schemas.insert(name, schema);
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.2"},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

fn definition_of(
    definitions: &Map<String, Value>,
    group: &str,
    version: &str,
    kind: &str,
) -> Option<String> {
    let wanted = json!({"group": group, "version": version, "kind": kind});
    definitions
        .iter()
        .find(|(_, definition)| {
            definition["x-kubernetes-group-version-kind"]
                .as_array()
                .is_some_and(|kinds| kinds.contains(&wanted))
        })
        .map(|(name, _)| name.clone())
}

/// The form of OpenAPI 3.0: references to components, wrapped where other keywords stand beside.
pub(crate) fn published(value: &Value, refer: &mut impl FnMut(&str)) -> Value {
    match value {
        Value::Object(object) => {
            let mut out = Map::new();
            for (key, value) in object {
                match (key.as_str(), value) {
                    ("$ref", Value::String(name)) => {
                        refer(name);
                        let reference = json!({"$ref": format!("#/components/schemas/{name}")});
                        if object.len() == 1 {
                            return reference;
                        }
                        out.insert("allOf".into(), json!([reference]));
                        out.insert("default".into(), json!({}));
                    }
                    _ => {
                        out.insert(key.clone(), published(value, refer));
                    }
                }
            }
            Value::Object(out)
        }
        Value::Array(values) => values.iter().map(|value| published(value, refer)).collect(),
        other => other.clone(),
    }
}

pub(crate) fn add_paths(
    paths: &mut Map<String, Value>,
    kind: &ResourceKind,
    name: &str,
    list: Option<&str>,
    custom: bool,
) {
    let scope = if kind.namespaced {
        "/namespaces/{namespace}"
    } else {
        ""
    };
    let collection = format!(
        "/{}{scope}/{}",
        path_of(kind.group, kind.version),
        kind.plural
    );
    let reference = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    let types =
        json!([{"group": kind.group, "version": kind.version, "kind": kind.kind}])[0].clone();
    let parameter = |name: &str, at: &str| {
        let mut out =
            json!({"name": name, "in": at, "schema": {"type": "string", "uniqueItems": true}});
        if at == "path" {
            out["required"] = true.into();
        }
        out
    };
    let answer = |name: &str| {
        json!({"200": {"description": "OK",
            "content": {"application/json": {"schema": reference(name)}}}})
    };
    let operation = |action: &str, id: &str, answered: &str| {
        json!({
            "description": format!("{id} {}", kind.kind),
            "operationId": format!("{id}{}{}", capital(kind.version), kind.kind),
            "responses": answer(answered),
            "tags": [tag(kind)],
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": types,
        })
    };
    let body = |media: &[&str], name: &str| {
        let content: Map<String, Value> = media
            .iter()
            .map(|media| ((*media).to_owned(), json!({"schema": reference(name)})))
            .collect();
        json!({"content": content, "required": true})
    };
    let writing = json!([
        parameter("dryRun", "query"),
        parameter("fieldManager", "query"),
        parameter("fieldValidation", "query"),
    ]);

    let mut at_collection = Map::new();
    if kind.allows("create") {
        let mut post = operation("post", "create", name);
        post["parameters"] = writing.clone();
        post["requestBody"] = body(&["*/*"], name);
        at_collection.insert("post".into(), post);
    }
    if let Some(list) = list.filter(|_| kind.allows("list")) {
        let mut get = operation("list", "list", list);
        get["parameters"] = [
            "labelSelector",
            "fieldSelector",
            "limit",
            "continue",
            "watch",
        ]
        .map(|name| parameter(name, "query"))
        .into();
        at_collection.insert("get".into(), get);
    }
    let mut shared = Vec::new();
    if kind.namespaced {
        shared.push(parameter("namespace", "path"));
    }
    at_collection.insert("parameters".into(), shared.clone().into());
    paths.insert(collection.clone(), at_collection.into());

    if !kind.allows("get") {
        return;
    }
    let mut at_object = Map::new();
    at_object.insert("get".into(), operation("get", "read", name));
    let mut put = operation("put", "replace", name);
    put["parameters"] = writing.clone();
    put["requestBody"] = body(&["*/*"], name);
    at_object.insert("put".into(), put);
    let mut patch = operation("patch", "patch", name);
    let Value::Array(mut parameters) = writing else {
        return;
    };
    parameters.push(parameter("force", "query"));
    patch["parameters"] = parameters.into();
    // Of custom resources there is no strategic merge: clients take that from here.
    let media = [
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/apply-patch+yaml",
        "application/strategic-merge-patch+json",
    ];
    patch["requestBody"] = body(
        if custom { &media[..3] } else { &media },
        "io.k8s.apimachinery.pkg.apis.meta.v1.Patch",
    );
    at_object.insert("patch".into(), patch);
    let status = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";
    at_object.insert("delete".into(), operation("delete", "delete", status));
    shared.push(parameter("name", "path"));
    at_object.insert("parameters".into(), shared.into());
    paths.insert(format!("{collection}/{{name}}"), at_object.into());
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

fn tag(kind: &ResourceKind) -> String {
    let group = kind
        .group
        .split('.')
        .next()
        .filter(|g| !g.is_empty())
        .unwrap_or("core");
    format!("{group}_{}", kind.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(group: &str, version: &str) -> Value {
        serde_json::from_slice(&document(group, version).unwrap().body).unwrap()
    }

    #[test]
    fn every_version_is_indexed_with_its_hash() {
        let published: Vec<crate::crd::PublishedKind> = crate::crd::own_kinds()
            .iter()
            .map(|custom| crate::crd::PublishedKind {
                kind: custom.kind,
                schema: Arc::clone(&custom.source),
            })
            .collect();
        let own = vec![(
            "apis/hypernetes.io/v1alpha1".to_owned(),
            Arc::new(crate::crd::document(&published)),
        )];
        let index: Value = serde_json::from_slice(&index(&own).body).unwrap();
        let core = document("", "v1").unwrap();
        assert_eq!(core.hash.len(), 128);
        assert_eq!(
            index["paths"]["api/v1"]["serverRelativeURL"],
            format!("/openapi/v3/api/v1?hash={}", core.hash)
        );
        assert!(index["paths"]["apis/hypernetes.io/v1alpha1"].is_object());
        assert!(document("extensions", "v1").is_none());
    }

    #[test]
    fn a_kind_has_what_kubectl_looks_for() {
        let document = parsed("", "v1");
        let patch = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"];
        assert_eq!(
            patch["x-kubernetes-group-version-kind"],
            json!({"group": "", "version": "v1", "kind": "Pod"})
        );
        assert!(
            patch["parameters"]
                .as_array()
                .unwrap()
                .iter()
                .any(|p| p["name"] == "fieldValidation")
        );
        assert!(
            patch["requestBody"]["content"]["application/strategic-merge-patch+json"].is_object()
        );
        let pod = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"];
        assert_eq!(
            pod["properties"]["containers"]["x-kubernetes-patch-merge-key"],
            "name"
        );
    }

    #[test]
    fn every_reference_has_its_component() {
        fn check(value: &Value, schemas: &Value) {
            match value {
                Value::Object(object) => {
                    if let Some(Value::String(name)) = object.get("$ref") {
                        let name = name.strip_prefix("#/components/schemas/").unwrap();
                        assert!(schemas[name].is_object(), "{name}");
                    }
                    object.values().for_each(|v| check(v, schemas));
                }
                Value::Array(values) => values.iter().for_each(|v| check(v, schemas)),
                _ => {}
            }
        }
        for path in documents().keys() {
            let document: Value = serde_json::from_slice(&documents()[path].body).unwrap();
            check(&document, &document["components"]["schemas"]);
        }
    }
}

//! The definitions of this project's own kinds.

use std::sync::{Arc, OnceLock};

use serde_json::Value;

use super::{compiled::CustomKind, names};
use crate::{kinds::ResourceKind, strict};

static TEXT: &str = include_str!("../../data/crds.yaml");

/// The definitions, as they are to be created.
pub fn own_definitions() -> Vec<Value> {
    let parsed =
        strict::parse_yaml(TEXT.as_bytes()).expect("the file is YAML, which a test checks");
    match parsed.value {
        Value::Array(definitions) => definitions,
        _ => Vec::new(),
    }
}

/// The kinds of these definitions, compiled.
pub fn own_kinds() -> &'static [Arc<CustomKind>] {
    static KINDS: OnceLock<Vec<Arc<CustomKind>>> = OnceLock::new();
    KINDS.get_or_init(|| {
        let settled = own_definitions().into_iter().map(|mut definition| {
            names::settle(&mut definition, &[], "");
            definition
        });
        settled
            .flat_map(|definition| CustomKind::of_definition(&definition))
            .collect()
    })
}

/// One of these kinds.
pub(crate) fn own_kind(group: &str, version: &str, kind: &str) -> Option<&'static ResourceKind> {
    if group != hypernetes_types::kinds::GROUP {
        return None;
    }
    own_kinds()
        .iter()
        .map(|custom| custom.kind)
        .find(|k| k.version == version && k.kind == kind)
}

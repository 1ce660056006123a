//! Kinds made while the server runs live as long as it does: everything that works with a kind holds a
//! plain reference to it. Equal kinds are one.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, PoisonError},
};

use crate::kinds::{NameRule, ResourceKind, Subresource};

/// A text for good.
fn text(text: &str) -> &'static str {
    static TEXTS: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    let mut guard = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let texts = guard.get_or_insert_default();
    if let Some(known) = texts.get(text) {
        return known;
    }
    let new: &'static str = Box::leak(text.into());
    texts.insert(new);
    new
}

fn list(items: impl Iterator<Item = String>) -> &'static [&'static str] {
    let items: Vec<&'static str> = items.map(|item| text(&item)).collect();
    if items.is_empty() {
        &[]
    } else {
        Box::leak(items.into())
    }
}

/// What a kind is made from.
pub(super) struct Parts<'a> {
    pub(super) group: &'a str,
    pub(super) version: &'a str,
    pub(super) kind: &'a str,
    pub(super) plural: &'a str,
    pub(super) singular: &'a str,
    pub(super) short_names: Vec<String>,
    pub(super) categories: Vec<String>,
    pub(super) namespaced: bool,
    pub(super) status: bool,
    pub(super) scale: bool,
    pub(super) storage: &'a str,
    pub(super) name_rule: NameRule,
}

type Key = (&'static str, &'static str, &'static str);

/// The kind of these parts.
pub(super) fn kind(parts: Parts<'_>) -> &'static ResourceKind {
    static KINDS: Mutex<Option<HashMap<Key, Vec<&'static ResourceKind>>>> = Mutex::new(None);
    let key = (text(parts.group), text(parts.version), text(parts.plural));
    let mut guard = KINDS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = guard.get_or_insert_default().entry(key).or_default();
    let same = |kind: &&&'static ResourceKind| {
        kind.kind == parts.kind
            && kind.singular == parts.singular
            && kind.short_names.iter().eq(parts.short_names.iter())
            && kind.categories.iter().eq(parts.categories.iter())
            && kind.namespaced == parts.namespaced
            && kind.storage == parts.storage
            && kind.name_rule == parts.name_rule
            && kind.subresource("status").is_some() == parts.status
            && kind.subresource("scale").is_some() == parts.scale
    };
    if let Some(kind) = known.iter().find(same) {
        return kind;
    }
    let mut subresources: Vec<Subresource> = Vec::new();
    if parts.scale {
        subresources.push(Subresource {
            group: Some("autoscaling"),
            version: Some("v1"),
            ..crate::kinds::sub("scale", "Scale", crate::kinds::STATUS)
        });
    }
    if parts.status {
        subresources.push(crate::kinds::sub(
            "status",
            text(parts.kind),
            crate::kinds::STATUS,
        ));
    }
    let kind: &'static ResourceKind = Box::leak(Box::new(ResourceKind {
        short_names: list(parts.short_names.into_iter()),
        categories: list(parts.categories.into_iter()),
        namespaced: parts.namespaced,
        subresources: Box::leak(subresources.into()),
        storage: text(parts.storage),
        name_rule: parts.name_rule,
        ..crate::kinds::kind(key.0, key.1, text(parts.kind), key.2, text(parts.singular))
    }));
    known.push(kind);
    kind
}

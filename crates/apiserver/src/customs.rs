//! The custom resources that are served: definitions of the store, compiled.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use hypernetes_apimachinery::{
    ResourceKind,
    crd::{self, CustomKind, PublishedKind},
    openapi::Document,
};
use hypernetes_store::{Change, Store, StoreError, Watch};

use crate::{
    codec, keys,
    status::{self, Result},
};

const STORAGE: &str = "customresourcedefinitions";

/// Knows the custom resources. Every answer sees all definitions that were acknowledged before.
#[derive(Debug)]
pub(crate) struct Customs {
    store: Store,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    watch: Watch,
    /// By the key of their definition.
    kinds: BTreeMap<String, Vec<Arc<CustomKind>>>,
    /// By group and version; made when they are asked for.
    documents: BTreeMap<(String, String), Arc<Document>>,
}

impl Customs {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            state: Mutex::new(None),
        }
    }

    /// The kind served under a path.
    pub(crate) fn find(
        &self,
        group: &str,
        version: &str,
        plural: &str,
    ) -> Result<Option<Arc<CustomKind>>> {
        self.with(|state| {
            let key = format!("{}{STORAGE}/{plural}.{group}", keys::ROOT);
            let kinds = state.kinds.get(&key)?;
            kinds.iter().find(|k| k.kind.version == version).cloned()
        })
    }

    /// All served versions of all custom resources, the better versions first.
    pub(crate) fn all(&self) -> Result<Vec<&'static ResourceKind>> {
        self.with(|state| {
            let mut all: Vec<&'static ResourceKind> =
                state.kinds.values().flatten().map(|k| k.kind).collect();
            all.sort_by_key(|kind| {
                let version = std::cmp::Reverse(priority(kind.version));
                (kind.group, version, kind.plural)
            });
            all
        })
    }

    /// The OpenAPI document of a group and version.
    pub(crate) fn document(&self, group: &str, version: &str) -> Result<Option<Arc<Document>>> {
        self.with(|state| state.document(group, version))
    }

    /// All OpenAPI documents.
    pub(crate) fn documents(&self) -> Result<Vec<(String, Arc<Document>)>> {
        self.with(|state| {
            let mut versions: Vec<(&str, &str)> = Vec::new();
            for custom in state.kinds.values().flatten() {
                let version = (custom.kind.group, custom.kind.version);
                if !versions.contains(&version) {
                    versions.push(version);
                }
            }
            let documents = versions.into_iter().filter_map(|(group, version)| {
                let document = state.document(group, version)?;
                Some((format!("apis/{group}/{version}"), document))
            });
            documents.collect()
        })
    }

    fn with<T>(&self, ask: impl FnOnce(&mut State) -> T) -> Result<T> {
        // After a panic the state could be half done: it is then read anew.
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = match guard.take() {
            Some(mut state) => match state.catch_up() {
                Ok(()) => state,
                Err(StoreError::Lagged { .. }) => self.read().map_err(|e| status::of_store(&e))?,
                Err(error) => return Err(status::of_store(&error)),
            },
            None => self.read().map_err(|e| status::of_store(&e))?,
        };
        let answer = ask(&mut state);
        *guard = Some(state);
        Ok(answer)
    }

    fn read(&self) -> std::result::Result<State, StoreError> {
        let prefix = format!("{}{STORAGE}/", keys::ROOT);
        let mut state = State {
            watch: self.store.watch(&prefix, None)?,
            kinds: BTreeMap::new(),
            documents: BTreeMap::new(),
        };
        for entry in self.store.list(&prefix, None, None, None)?.entries {
            state.set(&entry.key, Some(&entry.value));
        }
        state.catch_up()?;
        Ok(state)
    }
}

impl State {
    fn catch_up(&mut self) -> std::result::Result<(), StoreError> {
        // Of many changes of one definition only the last is compiled.
        let mut last: BTreeMap<String, Arc<Change>> = BTreeMap::new();
        while let Some(change) = self.watch.try_next()? {
            last.insert(change.key.clone(), change);
        }
        for (key, change) in last {
            self.set(&key, change.value.as_deref());
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: Option<&[u8]>) {
        self.documents.clear();
        let kinds = value
            .map(|bytes| CustomKind::of_definition(&codec::decode(bytes)))
            .unwrap_or_default();
        if kinds.is_empty() {
            self.kinds.remove(key);
        } else {
            self.kinds.insert(key.to_owned(), kinds);
        }
    }

    fn document(&mut self, group: &str, version: &str) -> Option<Arc<Document>> {
        let key = (group.to_owned(), version.to_owned());
        if let Some(known) = self.documents.get(&key) {
            return Some(Arc::clone(known));
        }
        let kinds: Vec<PublishedKind> = self
            .kinds
            .values()
            .flatten()
            .filter(|custom| custom.kind.group == group && custom.kind.version == version)
            .map(|custom| PublishedKind {
                kind: custom.kind,
                schema: Arc::clone(&custom.source),
            })
            .collect();
        if kinds.is_empty() {
            return None;
        }
        let document = Arc::new(crd::document(&kinds));
        self.documents.insert(key, Arc::clone(&document));
        Some(document)
    }
}

/// Versions in upstream's order: `v2`, `v1`, `v1beta2`, `v1beta1`, `v1alpha1`, others.
fn priority(version: &str) -> (u8, u64, u64) {
    let parsed = || {
        let rest = version.strip_prefix('v')?;
        let end = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        let major: u64 = rest[..end].parse().ok()?;
        let (level, minor) = match &rest[end..] {
            "" => (3, 0),
            text => match text.strip_prefix("beta") {
                Some(minor) => (2, minor.parse().ok()?),
                None => (1, text.strip_prefix("alpha")?.parse().ok()?),
            },
        };
        Some((level, major, minor))
    };
    parsed().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_versions_come_first() {
        let mut versions = ["v1alpha1", "foo", "v1", "v2beta1", "v10", "v1beta2", "v2"];
        versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
        assert_eq!(
            versions,
            ["v10", "v2", "v1", "v2beta1", "v1beta2", "v1alpha1", "foo"]
        );
    }
}

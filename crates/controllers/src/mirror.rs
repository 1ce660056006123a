//! What a watch has shown, by namespace and name, without who has written which field: that would be the larger
//! half of it in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
};

use kube::{Resource, ResourceExt, runtime::watcher::Event};

/// Namespace and name.
pub(crate) type Key = (String, String);

/// The objects of one kind.
#[derive(Debug)]
pub(crate) struct Mirror<K> {
    objects: BTreeMap<Key, Arc<K>>,
    /// Met since the list began anew.
    listed: BTreeSet<Key>,
    complete: bool,
}

/// An object as it was and as it is.
pub(crate) type Change<K> = (Key, Option<Arc<K>>, Option<Arc<K>>);

impl<K> Default for Mirror<K> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            listed: BTreeSet::new(),
            complete: false,
        }
    }
}

impl<K: Resource + Debug> Mirror<K> {
    /// Takes an event in; what it changes.
    pub(crate) fn apply(&mut self, event: Event<K>) -> Vec<Change<K>> {
        match event {
            Event::Init => {
                self.listed.clear();
                Vec::new()
            }
            Event::InitApply(object) => {
                self.listed.insert(key(&object));
                vec![self.put(object)]
            }
            Event::InitDone => {
                self.complete = true;
                let listed = std::mem::take(&mut self.listed);
                let lost: Vec<Key> = self
                    .objects
                    .keys()
                    .filter(|key| !listed.contains(*key))
                    .cloned()
                    .collect();
                lost.into_iter().map(|key| self.remove(key)).collect()
            }
            Event::Apply(object) => vec![self.put(object)],
            Event::Delete(object) => vec![self.remove(key(&object))],
        }
    }

    /// Takes an object in that was just written.
    pub(crate) fn put(&mut self, mut object: K) -> Change<K> {
        object.meta_mut().managed_fields = None;
        let key = key(&object);
        let object = Arc::new(object);
        let old = self.objects.insert(key.clone(), Arc::clone(&object));
        (key, old, Some(object))
    }

    /// Forgets an object that was just deleted.
    pub(crate) fn remove(&mut self, key: Key) -> Change<K> {
        let old = self.objects.remove(&key);
        (key, old, None)
    }

    /// Whether all objects have been seen once.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<K>> {
        self.objects.get(key)
    }

    /// The objects of a namespace.
    pub(crate) fn of(&self, namespace: &str) -> impl Iterator<Item = (&Key, &Arc<K>)> {
        let from = (namespace.to_owned(), String::new());
        let namespace = namespace.to_owned();
        self.objects
            .range(from..)
            .take_while(move |(key, _object)| key.0 == namespace)
    }
}

fn key<K: Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::*;

    fn map(name: &str) -> ConfigMap {
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "a"}})).unwrap()
    }

    #[test]
    fn what_a_new_list_lacks_is_gone() {
        let mut mirror = Mirror::default();
        for event in [
            Event::Init,
            Event::InitApply(map("x")),
            Event::InitApply(map("y")),
        ] {
            mirror.apply(event);
        }
        assert!(!mirror.is_complete());
        assert!(mirror.apply(Event::InitDone).is_empty());
        assert!(mirror.is_complete());
        mirror.apply(Event::Init);
        mirror.apply(Event::InitApply(map("y")));
        let lost = mirror.apply(Event::InitDone);
        assert_eq!(lost[0].0, ("a".to_owned(), "x".to_owned()));
        assert!(lost[0].2.is_none());
        assert_eq!(mirror.of("a").count(), 1);
        assert_eq!(mirror.of("b").count(), 0);
    }
}

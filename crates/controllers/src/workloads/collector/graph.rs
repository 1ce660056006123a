//! Which objects there are, by id, and who is owned by whom.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kube::Resource;

use crate::{seen::Seen, workloads::cluster::Kind};

/// The graph, for several workers.
pub(super) type Shared = Mutex<Graph>;

pub(super) fn lock(graph: &Shared) -> MutexGuard<'_, Graph> {
    graph.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of an object.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) kind: Arc<Kind>,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) owners: Vec<String>,
    pub(super) deleting: bool,
    pub(super) finalizers: Vec<String>,
}

pub(super) enum Change {
    Seen(String, Box<Node>),
    Gone(String),
    /// All objects of a kind that there are; others have gone unseen.
    All(Arc<Kind>, HashSet<String>),
}

/// Objects by id, and who is owned by whom.
#[derive(Default)]
pub(super) struct Graph {
    pub(super) nodes: HashMap<String, Node>,
    dependents: HashMap<String, HashSet<String>>,
}

impl Graph {
    fn insert(&mut self, id: &str, node: Node) {
        self.forget_owners(id);
        for owner in &node.owners {
            self.dependents
                .entry(owner.clone())
                .or_default()
                .insert(id.to_owned());
        }
        self.nodes.insert(id.to_owned(), node);
    }

    fn remove(&mut self, id: &str) -> Option<Node> {
        self.forget_owners(id);
        self.nodes.remove(id)
    }

    fn forget_owners(&mut self, id: &str) {
        let Some(node) = self.nodes.get(id) else {
            return;
        };
        for owner in &node.owners {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(id);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
    }

    pub(super) fn dependents(&self, id: &str) -> impl Iterator<Item = &String> {
        self.dependents.get(id).into_iter().flatten()
    }

    /// Takes over a change; the objects that it concerns.
    pub(super) fn apply(&mut self, change: Change) -> Vec<String> {
        match change {
            Change::Seen(id, node) => {
                let mut concerned = Vec::new();
                if !node.owners.is_empty() || (node.deleting && !node.finalizers.is_empty()) {
                    concerned.push(id.clone());
                }
                // An owner that waits for its dependents may see one of them let go.
                concerned.extend(self.waiting(&node.owners));
                self.insert(&id, *node);
                concerned
            }
            Change::Gone(id) => {
                let owners = self.remove(&id).map(|node| node.owners).unwrap_or_default();
                let mut concerned: Vec<String> = self.dependents(&id).cloned().collect();
                concerned.extend(self.waiting(&owners));
                concerned
            }
            Change::All(kind, there) => {
                let of_kind = |node: &Node| *node.kind == *kind;
                let gone: Vec<String> = self
                    .nodes
                    .iter()
                    .filter(|(id, node)| of_kind(node) && !there.contains(*id))
                    .map(|(id, _)| id.clone())
                    .collect();
                gone.into_iter()
                    .flat_map(|id| self.apply(Change::Gone(id)))
                    .collect()
            }
        }
    }

    fn waiting(&self, owners: &[String]) -> Vec<String> {
        let waits = |id: &&String| self.nodes.get(*id).is_some_and(|node| node.deleting);
        owners.iter().filter(waits).cloned().collect()
    }
}

impl Node {
    /// The object's id and what is known of it.
    pub(super) fn of(kind: &Arc<Kind>, object: &Seen) -> Option<(String, Self)> {
        let metadata = object.meta();
        let owners = metadata.owner_references.iter().flatten();
        let node = Self {
            kind: kind.clone(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone()?,
            owners: owners.map(|owner| owner.uid.clone()).collect(),
            deleting: metadata.deletion_timestamp.is_some(),
            finalizers: metadata.finalizers.clone().unwrap_or_default(),
        };
        Some((metadata.uid.clone()?, node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: &str, owners: &[&str]) -> Change {
        let node = Node {
            kind: Arc::new(Kind::new("", "v1", "ConfigMap", "configmaps")),
            namespace: "n".into(),
            name: id.into(),
            owners: owners.iter().map(ToString::to_string).collect(),
            deleting: false,
            finalizers: Vec::new(),
        };
        Change::Seen(id.into(), Box::new(node))
    }

    #[test]
    fn a_change_concerns_dependents_of_what_goes() {
        let mut graph = Graph::default();
        assert!(graph.apply(seen("a", &[])).is_empty());
        assert_eq!(graph.apply(seen("b", &["a"])), ["b"]);
        assert_eq!(graph.apply(Change::Gone("a".into())), ["b"]);
        // It has another owner now.
        assert_eq!(graph.apply(seen("b", &["c"])), ["b"]);
        assert!(graph.apply(Change::Gone("a".into())).is_empty());
        let kind = Arc::new(Kind::new("", "v1", "ConfigMap", "configmaps"));
        graph.apply(seen("c", &[]));
        let there = ["b".to_owned()].into_iter().collect();
        assert_eq!(graph.apply(Change::All(kind, there)), ["b"]);
    }
}

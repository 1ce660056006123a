//! What holds of every sequence of applies.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Applied, ApplyError, Managers, Writer, apply};
use crate::{Schema, definitions};

fn schema() -> &'static Schema {
    definitions().by_kind("", "v1", "Pod").unwrap()
}

fn writer(manager: &str) -> Writer<'_> {
    Writer {
        manager,
        api_version: "v1",
        subresource: "",
        time: "2026-01-01T00:00:00Z",
        ignored: |_| false,
    }
}

fn word() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "c"])
}

/// A part of a pod: labels (a map), containers with ports (lists with keys), finalizers (a set),
/// a selector of nodes (an atomic map) and scalars.
fn config() -> impl Strategy<Value = Value> {
    let labels = prop::collection::btree_map(word(), word(), 0..3);
    let container = (
        prop::option::of(word()),
        prop::collection::btree_map(1i64..4, prop::option::of(word()), 0..3),
        prop::option::of(prop::collection::vec(word(), 0..3)),
    );
    let containers = prop::collection::btree_map(word(), container, 0..3);
    let finalizers = prop::collection::btree_set(word(), 0..3);
    let selector = prop::option::of(prop::collection::btree_map(word(), word(), 0..3));
    let host = prop::option::of(word());
    (labels, containers, finalizers, selector, host).prop_map(
        |(labels, containers, finalizers, selector, host)| {
            let mut out = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}});
            if !labels.is_empty() {
                out["metadata"]["labels"] = json!(labels);
            }
            if !finalizers.is_empty() {
                out["metadata"]["finalizers"] = json!(finalizers);
            }
            let containers: Vec<Value> = containers
                .into_iter()
                .map(|(name, (image, ports, args))| {
                    let mut out = json!({"name": name});
                    if let Some(image) = image {
                        out["image"] = image.into();
                    }
                    if !ports.is_empty() {
                        let ports: Vec<Value> = ports
                            .into_iter()
                            .map(|(port, name)| match name {
                                Some(name) => json!({"containerPort": port, "name": name}),
                                None => json!({"containerPort": port}),
                            })
                            .collect();
                        out["ports"] = ports.into();
                    }
                    if let Some(args) = args {
                        out["args"] = json!(args);
                    }
                    out
                })
                .collect();
            if !containers.is_empty() {
                out["spec"]["containers"] = containers.into();
            }
            if let Some(selector) = selector {
                out["spec"]["nodeSelector"] = json!(selector);
            }
            if let Some(host) = host {
                out["spec"]["hostname"] = host.into();
            }
            out
        },
    )
}

fn stored(applied: &Applied) -> Value {
    let mut out = applied.object.clone();
    applied.managers.write(&mut out);
    out
}

/// The values that an object has at its fields.
fn values(object: &Value, fields: &[String]) -> Vec<String> {
    let own = super::typed::fields_of(Some(schema()), object).paths();
    fields
        .iter()
        .filter(|field| own.contains(field))
        .cloned()
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Applying twice is applying once.
    #[test]
    fn apply_is_idempotent(first in config(), other in config()) {
        let live = stored(&apply(schema(), None, &other, &writer("other"), false).unwrap());
        let once = stored(&apply(schema(), Some(&live), &first, &writer("me"), true).unwrap());
        let twice = stored(&apply(schema(), Some(&once), &first, &writer("me"), false).unwrap());
        prop_assert_eq!(once, twice);
    }

    /// Without force, a manager never loses a field in silence: what another applies either leaves
    /// all its fields as they are, or is refused with the names of the fields.
    #[test]
    fn nobody_loses_a_field_in_silence(
        mine in config(),
        theirs in config(),
        later in config(),
    ) {
        let live = stored(&apply(schema(), None, &mine, &writer("me"), false).unwrap());
        let my_fields = super::typed::fields_of(Some(schema()), &mine).paths();
        let mut now = live;
        for config in [theirs, later] {
            match apply(schema(), Some(&now), &config, &writer("other"), false) {
                Ok(applied) => now = stored(&applied),
                Err(ApplyError::Conflicts(conflicts)) => {
                    prop_assert!(!conflicts.is_empty());
                    for conflict in conflicts {
                        prop_assert_eq!(&conflict.manager.name, "me");
                        prop_assert!(my_fields.contains(&conflict.field), "{}", conflict.field);
                    }
                }
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
            // My configuration is still wholly there: applying it again changes nothing of mine.
            prop_assert_eq!(values(&now, &my_fields).len(), my_fields.len());
            let again = apply(schema(), Some(&now), &mine, &writer("me"), false);
            let again = again.map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(&again.object["metadata"], &{
                let mut bare = now.clone();
                crate::meta::remove(&mut bare, "managedFields");
                bare["metadata"].clone()
            });
        }
    }

    /// What one manager no longer applies goes, unless another has it.
    #[test]
    fn what_nobody_applies_goes(mine in config(), theirs in config()) {
        let live = stored(&apply(schema(), None, &mine, &writer("me"), false).unwrap());
        let both = stored(&apply(schema(), Some(&live), &theirs, &writer("other"), true).unwrap());
        let empty = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}});
        let left = apply(schema(), Some(&both), &empty, &writer("me"), false).unwrap();
        let fields = super::typed::fields_of(Some(schema()), &theirs);
        let remaining = super::typed::fields_of(Some(schema()), &left.object);
        for field in fields.paths() {
            prop_assert!(remaining.paths().contains(&field), "{} is gone", field);
        }
        let others = Managers::of(&stored(&left));
        prop_assert!(others.0.keys().all(|manager| manager.name != "me"));
    }

    /// The written form of a set is read back as it was.
    #[test]
    fn sets_survive_being_written(config in config()) {
        let set = super::typed::fields_of(Some(schema()), &config);
        prop_assert_eq!(super::FieldSet::from_value(&set.to_value()), Some(set));
    }
}

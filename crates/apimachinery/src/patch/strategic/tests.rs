use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::definitions;

fn pod_schema() -> &'static Schema {
    definitions().by_api_version("v1", "Pod").unwrap()
}

fn patched(object: Value, patch: Value) -> Value {
    strategic_merge_patch(&object, &patch, pod_schema()).unwrap()
}

fn containers(items: Value) -> Value {
    json!({"spec": {"containers": items}})
}

#[test]
fn containers_are_merged_by_name() {
    let object = containers(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
    let patch = containers(json!([{"name": "b", "image": "2"}, {"name": "c", "image": "3"}]));
    assert_eq!(
        patched(object, patch),
        containers(json!([
            {"name": "a", "image": "1"},
            {"name": "b", "image": "2"},
            {"name": "c", "image": "3"},
        ]))
    );
}

#[test]
fn set_image_as_kubectl_sends_it() {
    let object = containers(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
    let patch = json!({"spec": {
        "$setElementOrder/containers": [{"name": "a"}, {"name": "b"}],
        "containers": [{"name": "a", "image": "2"}],
    }});
    assert_eq!(
        patched(object, patch),
        containers(json!([{"name": "a", "image": "2"}, {"name": "b", "image": "1"}]))
    );
}

#[test]
fn items_are_deleted_and_lists_replaced() {
    let object = || containers(json!([{"name": "a"}, {"name": "b"}]));
    let delete = containers(json!([{"name": "a", "$patch": "delete"}]));
    assert_eq!(
        patched(object(), delete),
        containers(json!([{"name": "b"}]))
    );
    let replace = containers(json!([{"name": "c"}, {"$patch": "replace"}]));
    assert_eq!(
        patched(object(), replace),
        containers(json!([{"name": "c"}]))
    );
}

#[test]
fn objects_are_replaced_and_deleted() {
    let object = json!({"metadata": {"labels": {"a": "1", "b": "2"}, "name": "x"}});
    let replace = json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}}});
    assert_eq!(
        patched(object.clone(), replace),
        json!({"metadata": {"labels": {"c": "3"}, "name": "x"}})
    );
    let delete = json!({"metadata": {"labels": {"$patch": "delete"}}});
    assert_eq!(
        patched(object.clone(), delete),
        json!({"metadata": {"name": "x"}})
    );
    let null = json!({"metadata": {"labels": {"a": null}}});
    assert_eq!(
        patched(object, null),
        json!({"metadata": {"labels": {"b": "2"}, "name": "x"}})
    );
}

#[test]
fn retain_keys_drops_the_other_members_of_a_union() {
    let object = json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}});
    let patch = json!({"spec": {"volumes": [
        {"name": "v", "$retainKeys": ["name", "secret"], "secret": {"secretName": "s"}},
    ]}});
    assert_eq!(
        patched(object.clone(), patch),
        json!({"spec": {"volumes": [{"name": "v", "secret": {"secretName": "s"}}]}})
    );
    let contradiction = json!({"spec": {"volumes": [
        {"name": "v", "$retainKeys": ["name"], "secret": {}},
    ]}});
    assert!(strategic_merge_patch(&object, &contradiction, pod_schema()).is_err());
}

#[test]
fn plain_lists_are_sets_where_the_schema_says_so() {
    let object = json!({"metadata": {"finalizers": ["a", "b"]}});
    let add = json!({"metadata": {"finalizers": ["b", "c"]}});
    assert_eq!(
        patched(object.clone(), add),
        json!({"metadata": {"finalizers": ["a", "b", "c"]}})
    );
    let delete = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}});
    assert_eq!(
        patched(object, delete),
        json!({"metadata": {"finalizers": ["b"]}})
    );
    let command = json!({"spec": {"containers": [{"name": "a", "command": ["x", "y"]}]}});
    let other = json!({"spec": {"containers": [{"name": "a", "command": ["z"]}]}});
    assert_eq!(patched(command, other.clone()), other);
}

#[test]
fn order_keeps_what_others_added_behind_its_predecessor() {
    let object = containers(json!([{"name": "a"}, {"name": "x"}, {"name": "b"}]));
    let patch = json!({"spec": {
        "$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
        "containers": [{"name": "a", "image": "i"}],
    }});
    assert_eq!(
        patched(object, patch),
        containers(json!([{"name": "b"}, {"name": "a", "image": "i"}, {"name": "x"}]))
    );
}

#[test]
fn ports_need_their_key() {
    let object = containers(json!([{"name": "a", "ports": [{"containerPort": 80}]}]));
    let patch = containers(json!([{"name": "a", "ports": [{"protocol": "TCP"}]}]));
    let error = strategic_merge_patch(&object, &patch, pod_schema()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "map: {\"protocol\":\"TCP\"} does not contain declared merge key: containerPort"
    );
    let unknown = json!({"spec": {"$patch": "explode"}});
    assert!(strategic_merge_patch(&object, &unknown, pod_schema()).is_err());
    assert!(strategic_merge_patch(&object, &json!([]), pod_schema()).is_err());
}

fn name() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "c", "d"]).prop_map(str::to_owned)
}

fn env() -> impl Strategy<Value = Value> {
    prop::collection::btree_map(name(), prop::option::of("[xyz]"), 0..4).prop_map(|env| {
        env.into_iter()
            .map(|(name, value)| match value {
                Some(value) => json!({"name": name, "value": value}),
                None => json!({"name": name}),
            })
            .collect()
    })
}

/// Pods whose lists hold each key once, as validation demands.
fn pod() -> impl Strategy<Value = Value> {
    let container = (
        prop::option::of("[12]"),
        env(),
        prop::collection::vec("[pq]", 0..3),
    );
    (
        prop::collection::btree_map(name(), container, 0..4),
        prop::collection::btree_map(name(), "[12]", 0..3),
        prop::collection::btree_set(name(), 0..3),
    )
        .prop_map(|(containers, labels, finalizers)| {
            let containers: Vec<Value> = containers
                .into_iter()
                .map(|(name, (image, env, command))| {
                    let mut out = json!({"name": name, "env": env, "command": command});
                    if let Some(image) = image {
                        out["image"] = image.into();
                    }
                    out
                })
                .collect();
            json!({"metadata": {"labels": labels, "finalizers": finalizers},
                "spec": {"containers": containers}})
        })
}

proptest! {
    #[test]
    fn applying_twice_is_applying_once(object in pod(), patch in pod()) {
        let once = strategic_merge_patch(&object, &patch, pod_schema()).unwrap();
        let twice = strategic_merge_patch(&once, &patch, pod_schema()).unwrap();
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn an_empty_patch_changes_nothing(object in pod()) {
        let same = strategic_merge_patch(&object, &json!({}), pod_schema()).unwrap();
        prop_assert_eq!(same, object);
    }

    /// k8s-openapi's generated merge knows the keys from the same upstream source.
    #[test]
    fn merging_agrees_with_k8s_openapi(object in pod(), patch in pod()) {
        use k8s_openapi::{DeepMerge, api::core::v1::Pod};

        let ours = strategic_merge_patch(&object, &patch, pod_schema()).unwrap();
        let ours: Pod = serde_json::from_value(ours).unwrap();
        let mut theirs: Pod = serde_json::from_value(object.clone()).unwrap();
        let mut other: Pod = serde_json::from_value(patch.clone()).unwrap();
        // Atomic lists are appended to by that merge, so they are taken from the patch; finalizers
        // keep duplicates there.
        for container in theirs.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
            let patched = other.spec.iter().flat_map(|spec| &spec.containers)
                .find(|c| c.name == container.name);
            if let Some(patched) = patched {
                container.command.clone_from(&patched.command);
            }
        }
        for container in other.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
            let known = theirs.spec.iter().flat_map(|spec| &spec.containers)
                .any(|c| c.name == container.name);
            if known {
                container.command = None;
            }
        }
        if let (Some(have), Some(add)) = (&theirs.metadata.finalizers, &mut other.metadata.finalizers) {
            add.retain(|finalizer| !have.contains(finalizer));
        }
        theirs.merge_from(other);
        prop_assert_eq!(serde_json::to_value(ours).unwrap(), serde_json::to_value(theirs).unwrap());
    }

    #[test]
    fn ordering_alone_loses_nothing(object in pod(), order in Just(["a", "b", "c", "d"]).prop_shuffle()) {
        let order: Vec<Value> = order.iter().map(|n| json!({"name": n})).collect();
        let patch = json!({"spec": {"$setElementOrder/containers": order}});
        let out = strategic_merge_patch(&object, &patch, pod_schema()).unwrap();
        let mut before = object["spec"]["containers"].as_array().unwrap().clone();
        let mut after = out["spec"]["containers"].as_array().unwrap().clone();
        let names: Vec<&Value> = after.iter().map(|c| &c["name"]).collect();
        let expected: Vec<&Value> =
            order.iter().map(|o| &o["name"]).filter(|n| names.contains(n)).collect();
        prop_assert_eq!(names, expected);
        before.sort_by_key(|c| c["name"].to_string());
        after.sort_by_key(|c| c["name"].to_string());
        prop_assert_eq!(before, after);
    }
}

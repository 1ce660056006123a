//! The cases of `data/apply-cases.yaml`.

use serde_json::{Value, json};

use super::{ApplyError, Managers, Writer, apply, set::FieldSet, update};
use crate::{Schema, definitions};

const CASES: &str = include_str!("../../data/apply-cases.yaml");

fn schema(name: &str) -> &'static Schema {
    static OURS: std::sync::OnceLock<Schema> = std::sync::OnceLock::new();
    match name {
        "ours" => OURS.get_or_init(|| {
            let text = CASES.split("\n---\n").next().unwrap();
            let source = crate::strict::parse_yaml(text.as_bytes()).unwrap().value;
            crate::definitions::compile_schema(&source)
        }),
        kind => {
            let (api_version, kind) = kind.split_once(' ').unwrap();
            definitions().by_api_version(api_version, kind).unwrap()
        }
    }
}

fn strip(object: &Value) -> Value {
    let mut out = object.clone();
    crate::meta::remove(&mut out, "managedFields");
    if let Value::Object(fields) = &mut out {
        fields.retain(|_, value| !value.is_null());
        if fields.get("metadata") == Some(&json!({})) {
            fields.remove("metadata");
        }
    }
    out
}

/// Runs one case: steps of `apply`, `force` or `update` by a manager, with what follows.
fn run(case: &Value) {
    let name = case["name"].as_str().unwrap();
    let schema = schema(case["schema"].as_str().unwrap_or("ours"));
    let mut live: Option<Value> = case.get("live").cloned();
    for (index, step) in case["steps"].as_array().unwrap().iter().enumerate() {
        let at = format!("{name}, step {index}");
        let time = format!("2026-01-01T00:00:{index:02}Z");
        let subresource = step["subresource"].as_str().unwrap_or_default();
        let status_only = subresource == "status";
        let writer = Writer {
            manager: step["by"].as_str().unwrap(),
            api_version: step["version"].as_str().unwrap_or("v1"),
            subresource,
            time: &time,
            ignored: if status_only {
                |name| name != "status"
            } else {
                |name| name == "status"
            },
        };
        let config = step.get("apply").or_else(|| step.get("force"));
        let outcome = match config {
            Some(config) => {
                let force = step.get("force").is_some();
                apply(schema, live.as_ref(), config, &writer, force).map(|applied| {
                    let mut object = applied.object;
                    applied.managers.write(&mut object);
                    object
                })
            }
            None => {
                let mut object = step["update"].clone();
                let managers = update(schema, live.as_ref(), &object, &writer);
                managers.write(&mut object);
                Ok(object)
            }
        };
        match (step.get("conflict"), outcome) {
            (None, Ok(object)) => live = Some(object),
            (Some(expected), Err(ApplyError::Conflicts(found))) => {
                let found: Vec<String> = found
                    .iter()
                    .map(|c| format!("{} {}", c.manager.name, c.field))
                    .collect();
                assert_eq!(&json!(found), expected, "{at}");
            }
            (Some(expected), Err(ApplyError::Malformed(text))) => {
                assert_eq!(&json!(text), expected, "{at}");
            }
            (expected, outcome) => panic!("{at}: {expected:?}, {outcome:#?}"),
        }
        let now = live.as_ref().unwrap_or(&Value::Null);
        if let Some(object) = step.get("object") {
            assert_eq!(strip(now), strip(object), "{at}");
        }
        if let Some(owned) = step.get("owned").and_then(Value::as_object) {
            let managers = Managers::of(now);
            let found: serde_json::Map<String, Value> = managers
                .0
                .iter()
                .map(|(manager, owned)| (manager.name.clone(), owned.fields.paths().into()))
                .collect();
            assert_eq!(&found, owned, "{at}");
        }
    }
}

#[test]
fn the_table_of_cases() {
    let mut count = 0;
    let mut failed = Vec::new();
    for text in CASES.split("\n---\n").skip(1) {
        let cases = crate::strict::parse_yaml(text.as_bytes()).unwrap();
        assert!(cases.duplicates.is_empty(), "{:?}", cases.duplicates);
        for case in cases.value.as_array().unwrap() {
            count += 1;
            if std::panic::catch_unwind(|| run(case)).is_err() {
                failed.push(case["name"].clone());
            }
        }
    }
    assert!(failed.is_empty(), "{} of {count}: {failed:?}", failed.len());
    assert!(count >= 100, "{count} cases");
}

#[test]
fn conflicts_read_as_upstreams() {
    let schema = schema("v1 ConfigMap");
    let writer = |manager| Writer {
        manager,
        api_version: "v1",
        subresource: "",
        time: "2026-01-01T00:00:00Z",
        ignored: |_| false,
    };
    let object = |a: &str, b: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"},
            "data": {"a": a, "b": b}})
    };
    let mut live = object("1", "1");
    update(schema, None, &live, &writer("kubectl-create")).write(&mut live);
    let one = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "2"}});
    assert_eq!(
        apply(schema, Some(&live), &one, &writer("me"), false)
            .unwrap_err()
            .to_string(),
        "Apply failed with 1 conflict: conflict with \"kubectl-create\" using v1: .data.a"
    );
    assert_eq!(
        apply(schema, Some(&live), &object("2", "2"), &writer("me"), false)
            .unwrap_err()
            .to_string(),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-create\" using v1:\n- .data.a\n- \
         .data.b"
    );
    let applied = apply(schema, None, &object("1", "1"), &writer("other"), false).unwrap();
    let mut live = applied.object;
    applied.managers.write(&mut live);
    assert_eq!(
        apply(schema, Some(&live), &one, &writer("me"), false)
            .unwrap_err()
            .to_string(),
        "Apply failed with 1 conflict: conflict with \"other\": .data.a"
    );
}

#[test]
fn kubectl_takes_over_what_its_client_side_apply_has_set() {
    let schema = schema("v1 ConfigMap");
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"},
        "data": {"a": "1"}});
    let mut live = config.clone();
    crate::meta::set_annotation(
        &mut live,
        "kubectl.kubernetes.io/last-applied-configuration",
        &config.to_string(),
    );
    let writer = |manager| Writer {
        manager,
        api_version: "v1",
        subresource: "",
        time: "2026-01-01T00:00:00Z",
        ignored: |_| false,
    };
    update(schema, None, &live, &writer("kubectl-client-side-apply")).write(&mut live);
    let mut changed = config;
    changed["data"]["a"] = "2".into();
    let applied = apply(schema, Some(&live), &changed, &writer("kubectl"), false).unwrap();
    assert_eq!(applied.object["data"]["a"], "2");
    assert!(apply(schema, Some(&live), &changed, &writer("helm"), false).is_err());
    let text = super::last_applied(Some(&live), &changed, "kubectl").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), changed);
    assert_eq!(super::last_applied(Some(&live), &changed, "helm"), None);
}

#[test]
fn of_many_updaters_the_oldest_are_joined() {
    let schema = schema("v1 ConfigMap");
    let mut live = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {}});
    let names: Vec<String> = (0..14).map(|n| format!("m{n:02}")).collect();
    for (index, name) in names.iter().enumerate() {
        let time = format!("2026-01-01T00:00:{index:02}Z");
        let writer = Writer {
            manager: name,
            api_version: "v1",
            subresource: "",
            time: &time,
            ignored: |_| false,
        };
        let mut new = live.clone();
        new["data"][name] = "x".into();
        let old = (index > 0).then_some(&live);
        update(schema, old, &new, &writer).write(&mut new);
        live = new;
    }
    let managers = Managers::of(&live);
    assert_eq!(managers.0.len(), 10);
    let all: FieldSet = managers.all_fields();
    for name in &names {
        assert!(all.paths().contains(&format!(".data.{name}")), "{name}");
    }
    assert!(managers.0.keys().any(|m| m.name == "ancient-changes"));
    assert!(managers.0.keys().any(|m| m.name == "m13"));
}

#[test]
fn an_object_without_managers_stays_without_until_somebody_applies() {
    let schema = schema("v1 ConfigMap");
    let old = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "1"}});
    let mut new = old.clone();
    new["data"]["b"] = "2".into();
    let writer = Writer {
        manager: "me",
        api_version: "v1",
        subresource: "",
        time: "2026-01-01T00:00:00Z",
        ignored: |_| false,
    };
    assert!(update(schema, Some(&old), &new, &writer).is_empty());
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"c": "3"}});
    let applied = apply(schema, Some(&old), &config, &writer, false).unwrap();
    let names: Vec<&str> = applied.managers.0.keys().map(|m| &*m.name).collect();
    assert_eq!(names, ["me", "before-first-apply"]);
}

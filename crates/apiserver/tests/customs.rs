//! Custom resources, from their definition to its end.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use common::{Client, Cluster};
use serde_json::{Value, json};

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const WIDGETS: &str = "/apis/example.org/v1/namespaces/default/widgets";

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "spec": {
                "type": "object",
                "required": ["size"],
                "x-kubernetes-validations": [
                    {"rule": "self.size <= self.max", "message": "size must not exceed max",
                        "fieldPath": ".size"},
                    {"rule": "!has(oldSelf.colour) || self.colour == oldSelf.colour",
                        "messageExpression": "'colour is ' + oldSelf.colour + ' for good'"},
                ],
                "properties": {
                    "size": {"type": "integer", "minimum": 1},
                    "max": {"type": "integer", "default": 10},
                    "colour": {"type": "string", "enum": ["red", "blue"], "default": "red"},
                    "name": {"type": "string", "maxLength": 5, "pattern": "^[a-z]+$"},
                    "port": {"x-kubernetes-int-or-string": true},
                    "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                    "replicas": {"type": "integer"},
                    "parts": {
                        "type": "array",
                        "x-kubernetes-list-type": "map",
                        "x-kubernetes-list-map-keys": ["name"],
                        "items": {"type": "object", "required": ["name"], "properties": {
                            "name": {"type": "string"}, "weight": {"type": "integer"},
                        }},
                    },
                },
            },
            "status": {"type": "object", "properties": {
                "phase": {"type": "string"}, "replicas": {"type": "integer"},
            }},
        },
    })
}

fn definition() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.org"},
        "spec": {
            "group": "example.org",
            "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"]},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": schema()},
                "subresources": {"status": {}},
                "selectableFields": [{"jsonPath": ".spec.colour"}],
                "additionalPrinterColumns": [
                    {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                ],
            }],
        },
    })
}

fn widget(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "example.org/v1", "kind": "Widget", "metadata": {"name": name}, "spec": spec})
}

async fn served() -> (Cluster, Client) {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let made = admin.create(CRDS, &definition()).await.expect(201);
    let condition = |name: &str| {
        let all = made["status"]["conditions"].as_array().unwrap();
        all.iter().find(|c| c["type"] == name).unwrap()["status"].clone()
    };
    assert_eq!(condition("Established"), "True");
    assert_eq!(condition("NamesAccepted"), "True");
    assert_eq!(made["spec"]["names"]["listKind"], "WidgetList");
    assert_eq!(made["status"]["storedVersions"], json!(["v1"]));
    (cluster, admin)
}

#[tokio::test]
async fn a_definition_is_served_at_once() {
    let (_cluster, admin) = served().await;
    let groups = admin.get("/apis").await.expect(200);
    assert!(groups.to_string().contains("example.org/v1"));
    let list = admin.get("/apis/example.org/v1").await.expect(200);
    assert_eq!(list["resources"][0]["shortNames"], json!(["wd"]));
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let aggregated = admin.ask("GET", "/apis", &[("accept", accept)], "").await;
    assert!(aggregated.text.contains("\"widgets\""));
    let index = admin.get("/openapi/v3").await.expect(200);
    assert!(index["paths"]["apis/example.org/v1"].is_object());
    let document = admin
        .get("/openapi/v3/apis/example.org/v1")
        .await
        .expect(200);
    let schema = &document["components"]["schemas"]["org.example.v1.Widget"];
    assert_eq!(schema["properties"]["spec"]["required"], json!(["size"]));
    assert_eq!(
        schema["x-kubernetes-group-version-kind"][0]["kind"],
        "Widget"
    );
    let patch =
        &document["paths"]["/apis/example.org/v1/namespaces/{namespace}/widgets/{name}"]["patch"];
    let media = patch["requestBody"]["content"].as_object().unwrap();
    assert!(!media.contains_key("application/strategic-merge-patch+json"));
}

#[tokio::test]
async fn objects_are_pruned_defaulted_and_validated() {
    let (_cluster, admin) = served().await;
    let spec = json!({"size": 3, "what": 1, "open": {"any": {"thing": 1}}, "port": "http"});
    let answer = admin.create(WIDGETS, &widget("a", &spec)).await;
    let warning = answer
        .headers
        .get("warning")
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    assert_eq!(warning, "299 - \"unknown field \\\"spec.what\\\"\"");
    let made = answer.expect(201);
    assert_eq!(
        made["spec"],
        json!({"size": 3, "max": 10, "colour": "red", "open": {"any": {"thing": 1}}, "port": "http"})
    );
    assert_eq!(made["metadata"]["generation"], 1);
    let strict = format!("{WIDGETS}?fieldValidation=Strict");
    let refused = admin.create(&strict, &widget("b", &spec)).await;
    assert_eq!(refused.code, 400);
    assert!(
        refused.text.contains("unknown field \\\"spec.what\\\""),
        "{}",
        refused.text
    );
    for (spec, message) in [
        (json!({}), "spec.size: Required value"),
        (
            json!({"size": "x"}),
            "spec.size: Invalid value: \"string\": spec.size in body must be of type integer: \
             \"string\"",
        ),
        (
            json!({"size": 0}),
            "spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1",
        ),
        (
            json!({"size": 1, "colour": "green"}),
            "spec.colour: Unsupported value: \"green\": supported values: \"red\", \"blue\"",
        ),
        (
            json!({"size": 1, "name": "A"}),
            "spec.name: Invalid value: \"A\": spec.name in body should match '^[a-z]+$'",
        ),
        (
            json!({"size": 1, "parts": [{"name": "x"}, {"name": "x"}]}),
            "spec.parts[1]: Duplicate value: {\"name\":\"x\"}",
        ),
        (
            json!({"size": 11}),
            "spec.size: Invalid value: \"object\": size must not exceed max",
        ),
    ] {
        let answer = admin.create(WIDGETS, &widget("bad", &spec)).await;
        assert_eq!(answer.code, 422, "{spec}: {}", answer.text);
        let found = answer.value["message"].as_str().unwrap();
        let head = "Widget.example.org \"bad\" is invalid: ";
        let found = found.strip_prefix(head).unwrap_or(found);
        assert!(
            found.trim_start_matches('[').starts_with(message),
            "{found}"
        );
    }
}

#[tokio::test]
async fn rules_compare_with_the_old_object() {
    let (_cluster, admin) = served().await;
    admin
        .create(WIDGETS, &widget("a", &json!({"size": 1})))
        .await
        .expect(201);
    let path = format!("{WIDGETS}/a");
    let refused = admin
        .patch(&path, "merge", &json!({"spec": {"colour": "blue"}}))
        .await;
    refused.refused(
        422,
        "Invalid",
        "Widget.example.org \"a\" is invalid: spec: Invalid value: \"object\": colour is red for good",
    );
    let changed = admin
        .patch(&path, "merge", &json!({"spec": {"size": 2}}))
        .await
        .expect(200);
    assert_eq!(changed["metadata"]["generation"], 2);
    let strategic = admin
        .patch(&path, "strategic-merge", &json!({"spec": {"size": 3}}))
        .await;
    assert_eq!(strategic.code, 415);
    // The status is written apart.
    let ignored = admin
        .patch(&path, "merge", &json!({"status": {"phase": "x"}}))
        .await
        .expect(200);
    assert!(ignored.get("status").is_none());
    let status = admin
        .patch(
            &format!("{path}/status"),
            "merge",
            &json!({"status": {"phase": "x"}}),
        )
        .await
        .expect(200);
    assert_eq!(status["status"]["phase"], "x");
    assert_eq!(status["metadata"]["generation"], 2);
    let applied = widget("a", &json!({"parts": [{"name": "x", "weight": 1}]}));
    let applied = admin
        .patch(&format!("{path}?fieldManager=me"), "apply", &applied)
        .await
        .expect(200);
    assert_eq!(applied["spec"]["size"], 2);
    let other = widget("a", &json!({"parts": [{"name": "x", "weight": 2}]}));
    let conflict = admin
        .patch(&format!("{path}?fieldManager=other"), "apply", &other)
        .await;
    conflict.refused(
        409,
        "Conflict",
        "Apply failed with 1 conflict: conflict with \"me\": .spec.parts[name=\"x\"].weight",
    );
}

#[tokio::test]
async fn columns_and_selectors_come_from_the_definition() {
    let (_cluster, admin) = served().await;
    for (name, colour) in [("a", "red"), ("b", "blue")] {
        let spec = json!({"size": 4, "colour": colour});
        admin
            .create(WIDGETS, &widget(name, &spec))
            .await
            .expect(201);
    }
    let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
    let table = admin
        .ask("GET", WIDGETS, &[("accept", accept)], "")
        .await
        .expect(200);
    let names: Vec<&str> = table["columnDefinitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["Name", "Size", "Age"]);
    assert_eq!(table["rows"][1]["cells"][0], "b");
    assert_eq!(table["rows"][1]["cells"][1], 4);
    let blue = admin
        .get(&format!("{WIDGETS}?fieldSelector=spec.colour%3Dblue"))
        .await
        .expect(200);
    assert_eq!(blue["items"].as_array().unwrap().len(), 1);
    assert_eq!(blue["items"][0]["metadata"]["name"], "b");
    let unknown = admin
        .get(&format!("{WIDGETS}?fieldSelector=spec.size%3D4"))
        .await;
    assert_eq!(unknown.code, 400);
}

#[tokio::test]
async fn definitions_are_checked() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let cases: [(&str, Value, &str); 9] = [
        (
            "/metadata/name",
            json!("x"),
            "metadata.name: Invalid value: \"x\": must be spec.names.plural+\".\"+spec.group",
        ),
        (
            "/spec/scope",
            json!("Global"),
            "spec.scope: Unsupported value: \"Global\"",
        ),
        (
            "/spec/conversion",
            json!({"strategy": "Webhook"}),
            "spec.conversion.strategy: Unsupported value: \"Webhook\"",
        ),
        (
            "/spec/versions/0/storage",
            json!(false),
            "must have exactly one version marked as storage version",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema",
            json!({"type": "object", "properties": {"spec": {"properties": {}}}}),
            "spec.validation.openAPIV3Schema.properties[spec].type: Required value: must not be empty for specified object fields",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema",
            json!({"type": "object", "properties": {"spec": {"type": "object", "x-kubernetes-validations": [{"rule": "self.size >"}]}}}),
            "spec.validation.openAPIV3Schema.properties[spec].x-kubernetes-validations[0].rule: Invalid value: \"self.size >\": compilation failed",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema",
            json!({"type": "object", "properties": {"a": {"type": "string", "default": 1}}}),
            "must be of type string: \"integer\"",
        ),
        (
            "/spec/versions/0/schema/openAPIV3Schema",
            json!({"type": "object", "properties": {"spec": {"type": "array"}}}),
            "spec.validation.openAPIV3Schema.properties[spec].items: Required value: must be specified",
        ),
        (
            "/spec/versions/0/selectableFields",
            json!([{"jsonPath": ".spec.parts"}]),
            "must point to a field of type string, boolean or integer",
        ),
    ];
    for (pointer, value, message) in cases {
        let mut bad = definition();
        if pointer == "/spec/conversion" {
            bad["spec"]["conversion"] = value;
        } else {
            *bad.pointer_mut(pointer).unwrap() = value;
        }
        let answer = admin.create(CRDS, &bad).await;
        assert_eq!(answer.code, 422, "{pointer}: {}", answer.text);
        let found = answer.value["message"].as_str().unwrap();
        assert!(found.contains(message), "{pointer}: {found}");
    }
    assert_eq!(admin.get("/apis/example.org").await.code, 404);
}

#[tokio::test]
async fn names_that_are_taken_wait_until_they_are_free() {
    let (_cluster, admin) = served().await;
    let mut second = definition();
    second["metadata"]["name"] = "gadgets.example.org".into();
    second["spec"]["names"] =
        json!({"plural": "gadgets", "kind": "Widget", "listKind": "GadgetList"});
    let made = admin.create(CRDS, &second).await.expect(201);
    let text = made["status"].to_string();
    assert!(text.contains("KindConflict"), "{text}");
    assert!(text.contains("\\\"Widget\\\" is already in use"), "{text}");
    let gadgets = "/apis/example.org/v1/namespaces/default/gadgets";
    assert_eq!(admin.get(gadgets).await.code, 404);
    let mut events = admin.watch(&format!("{CRDS}?watch=true")).await;
    admin
        .delete(&format!("{CRDS}/widgets.example.org"))
        .await
        .expect(200);
    loop {
        let event = events.next().await;
        let object = &event["object"];
        if object["metadata"]["name"] == "gadgets.example.org"
            && object["status"]
                .to_string()
                .contains("InitialNamesAccepted")
        {
            break;
        }
    }
    assert_eq!(admin.get(gadgets).await.code, 200);
}

#[tokio::test]
async fn with_the_definition_go_its_objects() {
    let (cluster, admin) = served().await;
    for name in ["a", "b"] {
        let spec = json!({"size": 4});
        admin
            .create(WIDGETS, &widget(name, &spec))
            .await
            .expect(201);
    }
    let mut events = admin
        .watch(&format!("{CRDS}?watch=true&resourceVersion=0"))
        .await;
    let deleted = admin
        .delete(&format!("{CRDS}/widgets.example.org"))
        .await
        .expect(200);
    assert_eq!(
        deleted["metadata"]["finalizers"],
        json!(["customresourcecleanup.apiextensions.k8s.io"])
    );
    while events.next().await["type"] != "DELETED" {}
    assert_eq!(admin.get(WIDGETS).await.code, 404);
    assert_eq!(admin.get("/apis/example.org/v1").await.code, 404);
    let left = cluster
        .store
        .list("api/widgets.example.org/", None, None, None);
    assert!(left.unwrap().entries.is_empty());
}

#[tokio::test]
async fn an_object_is_seen_in_every_version() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    let mut two = definition();
    let mut beta = two["spec"]["versions"][0].clone();
    beta["name"] = "v1beta1".into();
    beta["storage"] = false.into();
    beta["deprecated"] = true.into();
    two["spec"]["versions"].as_array_mut().unwrap().push(beta);
    admin.create(CRDS, &two).await.expect(201);
    let old = "/apis/example.org/v1beta1/namespaces/default/widgets";
    let mut object = widget("a", &json!({"size": 2}));
    object["apiVersion"] = "example.org/v1beta1".into();
    let answer = admin.create(old, &object).await;
    assert!(
        answer
            .headers
            .get("warning")
            .unwrap()
            .to_str()
            .unwrap()
            .contains("deprecated")
    );
    let made = answer.expect(201);
    assert_eq!(made["apiVersion"], "example.org/v1beta1");
    for (path, version) in [(WIDGETS, "v1"), (old, "v1beta1")] {
        let one = admin.get(&format!("{path}/a")).await.expect(200);
        assert_eq!(one["apiVersion"], format!("example.org/{version}"));
        let list = admin.get(path).await.expect(200);
        assert_eq!(
            list["items"][0]["apiVersion"],
            format!("example.org/{version}")
        );
    }
    let group = admin.get("/apis/example.org").await.expect(200);
    assert_eq!(group["preferredVersion"]["version"], "v1");
}

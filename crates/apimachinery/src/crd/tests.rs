//! The project's own definitions, and what is hostile in others.

use serde_json::{Value, json};

use super::{own_definitions, own_kinds, validate_definition};
use crate::strict::FieldValidation;

#[test]
fn our_own_definitions_are_right() {
    let definitions = own_definitions();
    assert_eq!(definitions.len(), 3);
    for definition in &definitions {
        let found: Vec<String> = validate_definition(&prepared(definition))
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(found.is_empty(), "{found:#?}");
    }
    let kinds: Vec<&str> = own_kinds().iter().map(|custom| custom.kind.kind).collect();
    assert_eq!(kinds, ["Tenant", "Network", "PodSnapshot"]);
}

fn prepared(definition: &Value) -> Value {
    let mut out = definition.clone();
    super::prepare(&mut out);
    out
}

fn problems(kind: &str, spec: &Value, old: Option<&Value>) -> Vec<String> {
    let custom = own_kinds().iter().find(|c| c.kind.kind == kind).unwrap();
    let object = |spec: &Value| {
        json!({"apiVersion": "hypernetes.io/v1alpha1", "kind": kind,
            "metadata": {"name": "x"}, "spec": spec})
    };
    let (object, old) = (object(spec), old.map(object));
    let reviewed = custom.review(object.clone().into(), FieldValidation::Strict);
    assert_eq!(reviewed.unwrap().0, object);
    let found = custom.validate(&object, old.as_ref());
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn the_rules_of_networks_hold_in_cel() {
    let network = |spec: Value| problems("Network", &spec, None);
    let fine = json!({"subnets": [{"cidr": "10.1.0.0/16", "gateway": "10.1.0.1", "dns": ["10.1.0.2"]}], "mtu": 1450});
    assert_eq!(network(fine.clone()), Vec::<String>::new());
    for (spec, expected) in [
        (
            json!({"subnets": []}),
            "spec.subnets: Invalid value: 0: spec.subnets in body should have at least 1 items",
        ),
        (json!({}), "spec.subnets: Required value"),
        (
            json!({"subnets": [{"cidr": "10.0.0.1/16"}]}),
            "spec.subnets[0].cidr: Invalid value: \"string\": must be the network address",
        ),
        (
            json!({"subnets": [{"cidr": "8.8.0.0/16"}]}),
            "spec.subnets[0].cidr: Invalid value: \"string\": must be inside a private range: 10.0.0.0/8, \
             172.16.0.0/12 or 192.168.0.0/16",
        ),
        (
            json!({"subnets": [{"cidr": "fd00::/64"}]}),
            "spec.subnets[0].cidr: Invalid value: \"string\": must be a valid IPv4 CIDR address, e.g. 10.244.0.0/16",
        ),
        (
            json!({"subnets": [{"cidr": "10.0.0.0/30"}]}),
            "spec.subnets[0].cidr: Invalid value: \"string\": prefix length must be between 8 and 29, inclusive",
        ),
        (
            json!({"subnets": [{"cidr": "10.1.0.0/16", "gateway": "10.2.0.1"}]}),
            "spec.subnets[0].gateway: Invalid value: \"object\": must be a host address inside the range",
        ),
        (
            json!({"subnets": [{"cidr": "10.1.0.0/16"}, {"cidr": "10.1.2.0/24"}]}),
            "spec.subnets: Invalid value: \"array\": must not overlap with another subnet",
        ),
        (
            json!({"subnets": [{"cidr": "10.1.0.0/16"}], "mtu": 1}),
            "spec.mtu: Invalid value: 1: spec.mtu in body should be greater than or equal to 576",
        ),
    ] {
        let found = network(spec.clone());
        assert!(found.iter().any(|f| f == expected), "{spec}: {found:#?}");
    }
    let changed = json!({"subnets": [{"cidr": "10.2.0.0/16"}]});
    assert_eq!(
        problems("Network", &changed, Some(&fine)),
        ["spec.subnets: Invalid value: \"object\": field is immutable"]
    );
}

#[test]
fn the_rules_of_snapshots_hold_in_cel() {
    let fine = json!({"podName": "web", "sizeLimit": "512Mi"});
    assert!(problems("PodSnapshot", &fine, None).is_empty());
    for (spec, field) in [
        (json!({}), "spec.podName"),
        (json!({"podName": ""}), "spec.podName"),
        (
            json!({"podName": "web", "sizeLimit": "0"}),
            "spec.sizeLimit",
        ),
        (
            json!({"podName": "web", "sizeLimit": "much"}),
            "spec.sizeLimit",
        ),
    ] {
        let found = problems("PodSnapshot", &spec, None);
        assert!(
            found.iter().any(|it| it.starts_with(field)),
            "{spec}: {found:#?}"
        );
    }
    for (field, value) in [("podName", "other"), ("sizeLimit", "1Gi")] {
        let mut changed = fine.clone();
        changed[field] = json!(value);
        assert_eq!(
            problems("PodSnapshot", &changed, Some(&fine)),
            ["spec: Invalid value: \"object\": field is immutable"]
        );
    }
}

#[test]
fn the_rules_of_tenants_hold_in_cel() {
    let tenant = |spec: Value| problems("Tenant", &spec, None);
    assert!(
        tenant(json!({"network": {"default": {"cidr": "10.244.0.0/16"}}, "kernels": ["a"]}))
            .is_empty()
    );
    let found = tenant(
        json!({"members": [{"kind": "Robot", "name": "", "role": "admin"}], "kernels": ["a", "a"]}),
    );
    assert_eq!(
        found,
        [
            "spec.kernels[1]: Duplicate value: \"a\"",
            "spec.members[0].kind: Unsupported value: \"Robot\": supported values: \"User\", \"Group\", \"ServiceAccount\"",
            "spec.members[0].name: Invalid value: \"\": spec.members[0].name in body should be at least 1 chars long",
        ]
    );
    let old = json!({"network": {"default": {"cidr": "10.244.0.0/16"}}});
    assert_eq!(
        problems("Tenant", &json!({}), Some(&old)),
        ["spec.network.default.cidr: Invalid value: \"object\": field is immutable"]
    );
}

fn with_rule(rule: &str) -> Value {
    json!({
        "metadata": {"name": "things.example.org"},
        "spec": {"group": "example.org", "scope": "Cluster", "conversion": {"strategy": "None"},
            "names": {"plural": "things", "singular": "thing", "kind": "Thing", "listKind": "ThingList"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object",
                    "x-kubernetes-validations": [{"rule": rule}],
                    "properties": {"l": {"type": "array", "items": {"type": "integer"}}}}}}}}]},
    })
}

#[test]
fn rules_are_bounded() {
    for (rule, word) in [
        ("(".repeat(3000) + "true" + &")".repeat(3000), ""),
        ("self.l".to_owned() + &".x".repeat(200) + " == 1", "nests"),
        ("object.x".to_owned(), "compilation failed"),
        ("x".repeat(10_000), "may not be more than"),
        (
            "self.l.all(a, self.l.all(b, self.l.all(c, a + b + c > 0)))".to_owned(),
            "budget",
        ),
    ] {
        let found = validate_definition(&with_rule(&rule));
        assert_eq!(found.len(), 1, "{}: {found:?}", &rule[..20.min(rule.len())]);
        assert!(found[0].detail.contains(word), "{}", found[0].detail);
    }
    assert!(validate_definition(&with_rule("self.l.all(a, a > 0)")).is_empty());
}

#[test]
fn a_large_object_does_not_run_for_ever() {
    let mut definition = with_rule("self.l.all(a, self.l.exists(b, b == a))");
    super::names::settle(&mut definition, &[], "");
    let custom = super::CustomKind::of_definition(&definition).remove(0);
    let object = |n: i64| json!({"spec": {"l": (0..n).collect::<Vec<_>>()}});
    assert!(custom.validate(&object(50), None).is_empty());
    let found = custom.validate(&object(100_000), None);
    assert!(
        found[0].detail.contains("running out of cost budget"),
        "{found:?}"
    );
}

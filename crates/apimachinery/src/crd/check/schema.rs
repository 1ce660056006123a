//! What makes a schema structural.

use serde_json::{Map, Value};

use super::Found;
use crate::crd::{
    cel,
    structural::{MAX_DEPTH, Structural, Type},
    validate::Findings,
};

/// Where a node stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Item,
    Field,
}

#[derive(Clone, Copy)]
struct At {
    level: Level,
    depth: usize,
    /// Values here can be found again in the old object.
    correlated: bool,
}

pub(super) fn check(schema: &Value, path: &str, found: &mut Found) {
    let at = At {
        level: Level::Root,
        depth: 0,
        correlated: true,
    };
    node(schema, path, at, found);
}

fn node(schema: &Value, path: &str, at: At, found: &mut Found) {
    let Some(fields) = schema.as_object() else {
        found.invalid(path, schema.clone(), "must be an object");
        return;
    };
    if at.depth > MAX_DEPTH {
        found.forbidden(path, format!("must not be nested deeper than {MAX_DEPTH}"));
        return;
    }
    let flag = |key: &str| schema[key] == true;
    let kind = schema["type"].as_str().unwrap_or_default();
    let at_type = format!("{path}.type");
    let (int_or_string, preserve, embedded) = (
        flag("x-kubernetes-int-or-string"),
        flag("x-kubernetes-preserve-unknown-fields"),
        flag("x-kubernetes-embedded-resource"),
    );
    if !kind.is_empty() && Type::parse(kind).is_none() {
        let all = ["array", "boolean", "integer", "number", "object", "string"];
        found.one_of(at_type.clone(), kind, &all);
    }
    if embedded && kind != "object" {
        let detail = "must be object if x-kubernetes-embedded-resource is true";
        if kind.is_empty() {
            found.required(at_type.clone(), detail);
        } else {
            found.invalid(at_type.clone(), kind, detail);
        }
    } else if kind.is_empty() && !int_or_string && !preserve {
        found.required(
            at_type.clone(),
            match at.level {
                Level::Root => "must not be empty at the root",
                Level::Item => "must not be empty for specified array items",
                Level::Field => "must not be empty for specified object fields",
            },
        );
    }
    if at.level == Level::Root && !kind.is_empty() && kind != "object" {
        found.invalid(at_type, kind, "must be object at the root");
    }
    if int_or_string {
        for (key, set) in [
            ("x-kubernetes-preserve-unknown-fields", preserve),
            ("x-kubernetes-embedded-resource", embedded),
        ] {
            if set {
                let detail = "must be false if x-kubernetes-int-or-string is true";
                found.invalid(format!("{path}.{key}"), true, detail);
            }
        }
        if !kind.is_empty() {
            let detail = "must be empty if x-kubernetes-int-or-string is true";
            found.invalid(format!("{path}.type"), kind, detail);
        }
    }
    keywords(fields, path, at, found);
    list_and_map(schema, path, found);
    let below = At {
        level: Level::Field,
        depth: at.depth + 1,
        ..at
    };
    for (name, value) in schema["properties"].as_object().into_iter().flatten() {
        let inner = format!("{path}.properties[{name}]");
        match name.as_str() {
            "metadata" if at.level == Level::Root => metadata(value, &inner, found),
            "apiVersion" | "kind" if at.level == Level::Root || embedded => {
                if value["type"] != "string" {
                    found.invalid(
                        format!("{inner}.type"),
                        value["type"].clone(),
                        "must be string",
                    );
                }
            }
            _ => node(value, &inner, below, found),
        }
    }
    if let value @ Value::Object(_) = &schema["additionalProperties"] {
        node(value, &format!("{path}.additionalProperties"), below, found);
    }
    match &schema["items"] {
        Value::Null if kind == "array" => {
            found.required(format!("{path}.items"), "must be specified");
        }
        Value::Null => {}
        Value::Array(_) => found.forbidden(
            format!("{path}.items"),
            "items must be a schema object and not an array",
        ),
        items => {
            let correlated = at.correlated && schema["x-kubernetes-list-type"] == "map";
            let below = At {
                level: Level::Item,
                depth: at.depth + 1,
                correlated,
            };
            node(items, &format!("{path}.items"), below, found);
        }
    }
    junctors(schema, path, at.depth, int_or_string, found);
    default(schema, path, found);
    cel::check(schema, path, at.correlated, &mut found.0);
}

/// The metadata of the root is implied; a schema may only bound its names.
fn metadata(schema: &Value, path: &str, found: &mut Found) {
    if schema["type"] != "object" {
        found.invalid(
            format!("{path}.type"),
            schema["type"].clone(),
            "must be object",
        );
    }
    let properties = schema["properties"].as_object().into_iter().flatten();
    let only_names = properties
        .map(|(name, _)| name)
        .all(|name| matches!(name.as_str(), "name" | "generateName"));
    let keys = schema.as_object().into_iter().flatten().map(|(key, _)| key);
    let only_these = keys
        .into_iter()
        .all(|key| matches!(key.as_str(), "type" | "properties" | "description"));
    if !only_names || !only_these {
        found.forbidden(
            path,
            "must not specify anything other than name and generateName, but metadata is \
             implicitly specified",
        );
    }
}

fn keywords(fields: &Map<String, Value>, path: &str, at: At, found: &mut Found) {
    if fields.contains_key("$ref") {
        found.forbidden(format!("{path}.$ref"), "$ref is not supported");
    }
    for key in [
        "definitions",
        "dependencies",
        "patternProperties",
        "additionalItems",
        "id",
    ] {
        if fields.contains_key(key) {
            found.forbidden(format!("{path}.{key}"), format!("{key} is not supported"));
        }
    }
    if fields.get("uniqueItems") == Some(&Value::Bool(true)) {
        found.forbidden(
            format!("{path}.uniqueItems"),
            "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
        );
    }
    match fields.get("additionalProperties") {
        None | Some(Value::Null) => {}
        Some(Value::Bool(false)) => found.forbidden(
            format!("{path}.additionalProperties"),
            "additionalProperties cannot be set to false",
        ),
        Some(_) if at.level == Level::Root => found.forbidden(
            format!("{path}.additionalProperties"),
            "must not be used at the root",
        ),
        Some(_)
            if fields
                .get("properties")
                .is_some_and(|p| p != &serde_json::json!({})) =>
        {
            found.forbidden(
                format!("{path}.additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            );
        }
        Some(_) => {}
    }
    pattern(fields.get("pattern"), path, found);
}

fn pattern(pattern: Option<&Value>, path: &str, found: &mut Found) {
    let Some(text) = pattern.and_then(Value::as_str).filter(|t| !t.is_empty()) else {
        return;
    };
    if let Err(error) = regex::Regex::new(text) {
        let why = error.to_string();
        let why = why.lines().last().unwrap_or_default().trim().to_owned();
        found.invalid(
            format!("{path}.pattern"),
            text,
            format!("must be a valid regular expression, but isn't: {why}"),
        );
    }
}

fn list_and_map(schema: &Value, path: &str, found: &mut Found) {
    let list_type = schema["x-kubernetes-list-type"].as_str();
    let keys = schema["x-kubernetes-list-map-keys"].as_array();
    if let Some(list_type) = list_type {
        let at = format!("{path}.x-kubernetes-list-type");
        found.one_of(at, list_type, &["atomic", "map", "set"]);
        if schema["type"] != "array" {
            found.invalid(
                format!("{path}.type"),
                schema["type"].clone(),
                "must be array if x-kubernetes-list-type is specified",
            );
        }
    }
    let items = &schema["items"];
    if list_type == Some("map") {
        let at = format!("{path}.x-kubernetes-list-map-keys");
        let keys = keys.map_or(&[][..], Vec::as_slice);
        if keys.is_empty() {
            found.required(
                at.clone(),
                "must not be empty if x-kubernetes-list-type is map",
            );
        }
        if items["type"] != "object" {
            found.invalid(
                format!("{path}.items.type"),
                items["type"].clone(),
                "must be object if parent array's x-kubernetes-list-type is map",
            );
        }
        for (index, key) in keys.iter().enumerate() {
            let name = key.as_str().unwrap_or_default();
            let Some(property) = items["properties"].get(name) else {
                found.invalid(
                    format!("{at}[{index}]"),
                    name,
                    "must be the name of an existing property in items",
                );
                continue;
            };
            let required = items["required"].as_array();
            let required = required.is_some_and(|all| all.iter().any(|r| r == name));
            if !required && property.get("default").is_none() {
                found.required(
                    format!("{path}.items.properties[{name}].default"),
                    "this property is in x-kubernetes-list-map-keys, so it must have a default or \
                     be a required property",
                );
            }
            if matches!(property["type"].as_str(), Some("array" | "object")) {
                found.invalid(
                    format!("{path}.items.properties[{name}].type"),
                    property["type"].clone(),
                    "must be a scalar type if parent array's x-kubernetes-list-type is map",
                );
            }
        }
    } else if keys.is_some_and(|keys| !keys.is_empty()) {
        found.invalid(
            format!("{path}.x-kubernetes-list-type"),
            list_type.unwrap_or_default(),
            "must be map if x-kubernetes-list-map-keys is non-empty",
        );
    }
    let is_granular = |schema: &Value| match schema["type"].as_str() {
        Some("object") => schema["x-kubernetes-map-type"] != "atomic",
        Some("array") => schema["x-kubernetes-list-type"] != "atomic",
        _ => false,
    };
    if list_type == Some("set") && is_granular(items) {
        found.invalid(
            format!("{path}.items"),
            items["type"].clone(),
            "must be a scalar, an atomic list or an atomic map if parent array's \
             x-kubernetes-list-type is set",
        );
    }
    if let Some(map_type) = schema["x-kubernetes-map-type"].as_str() {
        let at = format!("{path}.x-kubernetes-map-type");
        found.one_of(at, map_type, &["atomic", "granular"]);
        if schema["type"] != "object" {
            found.invalid(
                format!("{path}.type"),
                schema["type"].clone(),
                "must be object if x-kubernetes-map-type is specified",
            );
        }
    }
}

/// Under the words of logic only conditions on values stand, on fields that are specified outside.
fn junctors(schema: &Value, path: &str, depth: usize, int_or_string: bool, found: &mut Found) {
    for key in ["allOf", "anyOf", "oneOf"] {
        for (index, inner) in schema[key].as_array().into_iter().flatten().enumerate() {
            // The one exception: how an integer or a text is written in OpenAPI.
            let types = int_or_string;
            nested(
                inner,
                schema,
                &format!("{path}.{key}[{index}]"),
                depth + 1,
                types,
                found,
            );
        }
    }
    let not = &schema["not"];
    if not.is_object() {
        nested(not, schema, &format!("{path}.not"), depth + 1, false, found);
    }
}

fn nested(inner: &Value, outer: &Value, path: &str, depth: usize, types: bool, found: &mut Found) {
    if depth > MAX_DEPTH {
        found.forbidden(path, format!("must not be nested deeper than {MAX_DEPTH}"));
        return;
    }
    for (key, value) in inner.as_object().into_iter().flatten() {
        let at = format!("{path}.{key}");
        let detail = match key.as_str() {
            "type" if types => continue,
            "type"
            | "title"
            | "description"
            | "x-kubernetes-list-map-keys"
            | "x-kubernetes-validations" => "must be empty to be structural",
            "default"
            | "additionalProperties"
            | "x-kubernetes-list-type"
            | "x-kubernetes-map-type"
            | "externalDocs" => "must be undefined to be structural",
            "nullable"
            | "x-kubernetes-preserve-unknown-fields"
            | "x-kubernetes-embedded-resource"
            | "x-kubernetes-int-or-string"
                if value == true =>
            {
                "must be false to be structural"
            }
            _ => continue,
        };
        found.forbidden(at, detail);
    }
    pattern(inner.get("pattern"), path, found);
    for (name, value) in inner["properties"].as_object().into_iter().flatten() {
        let at = format!("{path}.properties[{name}]");
        if name == "metadata" {
            found.forbidden(at, "must not be specified in a nested context");
            continue;
        }
        let specified = outer["properties"].get(name);
        let specified = specified.or_else(|| {
            outer
                .get("additionalProperties")
                .filter(|value| value.is_object())
        });
        match specified {
            Some(outer) => nested(value, outer, &at, depth + 1, false, found),
            None => found.required(
                at,
                "because it is defined in an allOf, anyOf, oneOf or not: every field must be \
                 specified outside of these to be structural",
            ),
        }
    }
    if inner["items"].is_object() {
        let at = format!("{path}.items");
        nested(
            &inner["items"],
            &outer["items"],
            &at,
            depth + 1,
            false,
            found,
        );
    }
    junctors_of_nested(inner, outer, path, depth, types, found);
}

fn junctors_of_nested(
    inner: &Value,
    outer: &Value,
    path: &str,
    depth: usize,
    types: bool,
    found: &mut Found,
) {
    for key in ["allOf", "anyOf", "oneOf"] {
        for (index, value) in inner[key].as_array().into_iter().flatten().enumerate() {
            let at = format!("{path}.{key}[{index}]");
            nested(value, outer, &at, depth + 1, types, found);
        }
    }
    if inner["not"].is_object() {
        nested(
            &inner["not"],
            outer,
            &format!("{path}.not"),
            depth + 1,
            false,
            found,
        );
    }
}

fn default(schema: &Value, path: &str, found: &mut Found) {
    let Some(value) = schema.get("default").filter(|value| !value.is_null()) else {
        return;
    };
    let at = format!("{path}.default");
    let structural = Structural::parse(schema);
    let mut gone = Vec::new();
    structural.prune(&mut value.clone(), false, &mut String::new(), &mut gone);
    if let Some(field) = gone.first() {
        let detail = format!("must not have unknown fields: {field}");
        found.invalid(at, value.clone(), detail);
        return;
    }
    let mut completed = value.clone();
    structural.complete(&mut completed);
    let mut findings = Findings::default();
    structural.validate(&completed, None, &at, &mut findings);
    for error in findings.0 {
        found.add(error.kind, error.field, error.value, error.detail);
    }
}

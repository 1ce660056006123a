//! Rules for CustomResourceDefinitions themselves.

mod schema;

use serde_json::{Value, json};

use super::columns::parse_path;
use crate::{
    meta::{self, rules},
    validation::{ErrorKind, FieldError},
};

const MAX_VERSIONS: usize = 16;
const MAX_SELECTABLE: usize = 8;

pub(super) struct Found(pub(super) Vec<FieldError>);

impl Found {
    pub(super) fn add(
        &mut self,
        kind: ErrorKind,
        field: impl Into<String>,
        value: impl Into<Value>,
        detail: impl Into<String>,
    ) {
        if self.0.len() < 100 {
            self.0.push(FieldError {
                kind,
                field: field.into(),
                value: value.into(),
                detail: detail.into(),
            });
        }
    }

    pub(super) fn required(&mut self, field: impl Into<String>, detail: &str) {
        self.add(ErrorKind::Required, field, Value::Null, detail);
    }

    pub(super) fn invalid(
        &mut self,
        field: impl Into<String>,
        value: impl Into<Value>,
        detail: impl Into<String>,
    ) {
        self.add(ErrorKind::Invalid, field, value, detail);
    }

    pub(super) fn forbidden(&mut self, field: impl Into<String>, detail: impl Into<String>) {
        self.add(ErrorKind::Forbidden, field, Value::Null, detail);
    }

    fn one_of(&mut self, field: impl Into<String>, value: &str, supported: &[&str]) {
        if !supported.contains(&value) {
            let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
            let detail = format!("supported values: {}", list.join(", "));
            self.add(ErrorKind::NotSupported, field, value, detail);
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Fills in what a definition leaves out.
pub fn prepare(definition: &mut Value) {
    let Some(spec) = definition.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    spec.entry("conversion")
        .or_insert_with(|| json!({"strategy": "None"}));
    if let Some(names) = spec.get_mut("names").and_then(Value::as_object_mut) {
        let kind = names
            .get("kind")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        for (field, value) in [
            ("singular", kind.to_lowercase()),
            ("listKind", format!("{kind}List")),
        ] {
            let absent = names
                .get(field)
                .and_then(Value::as_str)
                .is_none_or(str::is_empty);
            if absent && !kind.is_empty() {
                names.insert(field.to_owned(), value.into());
            }
        }
    }
}

/// Everything wrong with a definition.
pub fn validate_definition(definition: &Value) -> Vec<FieldError> {
    let mut found = Found(Vec::new());
    let spec = &definition["spec"];
    let names = &spec["names"];
    let expected = format!("{}.{}", text(names, "plural"), text(spec, "group"));
    let name = meta::name(definition).unwrap_or_default();
    if name != expected {
        found.invalid(
            "metadata.name",
            name,
            "must be spec.names.plural+\".\"+spec.group",
        );
    }
    let group = text(spec, "group");
    if group.is_empty() {
        found.required("spec.group", "");
    } else {
        for detail in rules::subdomain(group) {
            found.invalid("spec.group", group, detail);
        }
        if !group.contains('.') {
            found.invalid(
                "spec.group",
                group,
                "should be a domain with at least one dot",
            );
        }
    }
    match text(spec, "scope") {
        "" => found.required("spec.scope", ""),
        scope => found.one_of("spec.scope", scope, &["Cluster", "Namespaced"]),
    }
    if spec["preserveUnknownFields"] == true {
        found.invalid(
            "spec.preserveUnknownFields",
            true,
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in \
             spec.versions[*].schema instead",
        );
    }
    match text(&spec["conversion"], "strategy") {
        "None" => {
            if !spec["conversion"]["webhook"].is_null() {
                found.forbidden(
                    "spec.conversion.webhook",
                    "should not be set when strategy is not set to Webhook",
                );
            }
        }
        "Webhook" => found.add(
            ErrorKind::NotSupported,
            "spec.conversion.strategy",
            "Webhook",
            "supported values: \"None\" (this server calls no conversion webhooks)",
        ),
        other => found.one_of("spec.conversion.strategy", other, &["None", "Webhook"]),
    }
    check_names(names, &mut found);
    check_versions(spec, &mut found);
    found.0
}

fn dns1035(name: &str) -> Vec<String> {
    let good = name.len() <= 63
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if good {
        return Vec::new();
    }
    vec![
        "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
         alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or \
         'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
            .to_owned(),
    ]
}

fn check_names(names: &Value, found: &mut Found) {
    for field in ["plural", "singular"] {
        let name = text(names, field);
        let at = format!("spec.names.{field}");
        if name.is_empty() {
            found.required(at, "");
            continue;
        }
        for detail in dns1035(name) {
            found.invalid(at.clone(), name, detail);
        }
    }
    for field in ["kind", "listKind"] {
        let name = text(names, field);
        let at = format!("spec.names.{field}");
        if name.is_empty() {
            found.required(at, "");
            continue;
        }
        for detail in dns1035(&name.to_lowercase()) {
            let detail = format!("may have mixed case, but should otherwise match: {detail}");
            found.invalid(at.clone(), name, detail);
        }
    }
    if !text(names, "kind").is_empty() && names["kind"] == names["listKind"] {
        found.invalid(
            "spec.names.listKind",
            text(names, "listKind"),
            "kind and listKind may not be the same",
        );
    }
    for field in ["shortNames", "categories"] {
        for (index, name) in names[field].as_array().into_iter().flatten().enumerate() {
            let name = name.as_str().unwrap_or_default();
            for detail in dns1035(name) {
                found.invalid(format!("spec.names.{field}[{index}]"), name, detail);
            }
        }
    }
}

fn check_versions(spec: &Value, found: &mut Found) {
    let versions = spec["versions"].as_array().map_or(&[][..], Vec::as_slice);
    if versions.is_empty() {
        found.required("spec.versions", "");
        return;
    }
    if versions.len() > MAX_VERSIONS {
        found.add(
            ErrorKind::TooMany,
            "spec.versions",
            versions.len(),
            format!("must have at most {MAX_VERSIONS} items"),
        );
        return;
    }
    let mut seen: Vec<&str> = Vec::new();
    let stored = versions.iter().filter(|v| v["storage"] == true).count();
    for (index, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{index}]");
        let name = text(version, "name");
        for detail in dns1035(name) {
            found.invalid(format!("{at}.name"), name, detail);
        }
        if seen.contains(&name) {
            found.invalid("spec.versions", name, "must contain unique version names");
        }
        seen.push(name);
        let schema = &version["schema"]["openAPIV3Schema"];
        if schema.is_null() {
            found.required(
                format!("{at}.schema.openAPIV3Schema"),
                "schemas are required",
            );
        } else {
            let path = if versions.len() == 1 {
                "spec.validation.openAPIV3Schema".to_owned()
            } else {
                format!("{at}.schema.openAPIV3Schema")
            };
            schema::check(schema, &path, found);
        }
        check_columns(version, &at, found);
        check_scale(version, &at, found);
        check_selectable(version, &at, found);
    }
    if stored != 1 {
        found.invalid(
            "spec.versions",
            seen.join(","),
            "must have exactly one version marked as storage version",
        );
    }
}

fn check_columns(version: &Value, at: &str, found: &mut Found) {
    let columns = version["additionalPrinterColumns"].as_array();
    for (index, column) in columns.into_iter().flatten().enumerate() {
        let at = format!("{at}.additionalPrinterColumns[{index}]");
        if text(column, "name").is_empty() {
            found.required(format!("{at}.name"), "");
        }
        match text(column, "type") {
            "" => {
                let all = "must be one of boolean,date,integer,number,string";
                found.required(format!("{at}.type"), all);
            }
            kind => found.one_of(
                format!("{at}.type"),
                kind,
                &["boolean", "date", "integer", "number", "string"],
            ),
        }
        let format = text(column, "format");
        if !format.is_empty() {
            let known = [
                "byte",
                "date",
                "date-time",
                "double",
                "float",
                "int32",
                "int64",
                "password",
            ];
            found.one_of(format!("{at}.format"), format, &known);
        }
        let path = text(column, "jsonPath");
        if path.is_empty() {
            found.required(format!("{at}.JSONPath"), "");
        } else if parse_path(path).is_none() {
            found.invalid(format!("{at}.JSONPath"), path, "is an invalid path");
        }
    }
}

fn simple_path(path: &str) -> bool {
    path.strip_prefix('.').is_some_and(|rest| {
        rest.split('.').all(|name| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
        })
    })
}

fn check_scale(version: &Value, at: &str, found: &mut Found) {
    let scale = &version["subresources"]["scale"];
    if scale.is_null() {
        return;
    }
    let at = format!("{at}.subresources.scale");
    for (field, root, required) in [
        ("specReplicasPath", ".spec.", true),
        ("statusReplicasPath", ".status.", true),
        ("labelSelectorPath", ".s", false),
    ] {
        let path = text(scale, field);
        let at = format!("{at}.{field}");
        if path.is_empty() {
            if required {
                found.required(at, "");
            }
        } else if !simple_path(path) {
            found.invalid(
                at,
                path,
                "should be a simple json path without array notation",
            );
        } else if !path.starts_with(root) {
            let detail = if required {
                format!("should be a json path under {}", root.trim_end_matches('.'))
            } else {
                "should be a json path under either .spec or .status".to_owned()
            };
            found.invalid(at, path, detail);
        }
    }
}

fn check_selectable(version: &Value, at: &str, found: &mut Found) {
    let fields = version["selectableFields"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    if fields.len() > MAX_SELECTABLE {
        found.add(
            ErrorKind::TooMany,
            format!("{at}.selectableFields"),
            fields.len(),
            format!("must have at most {MAX_SELECTABLE} items"),
        );
    }
    let mut seen: Vec<&str> = Vec::new();
    for (index, field) in fields.iter().enumerate() {
        let at = format!("{at}.selectableFields[{index}].jsonPath");
        let path = text(field, "jsonPath");
        if path.is_empty() {
            found.required(at, "");
            continue;
        }
        if seen.contains(&path) {
            found.add(ErrorKind::Duplicate, at, path, "");
            continue;
        }
        seen.push(path);
        if !simple_path(path) {
            found.invalid(at, path, "is an invalid path: should be a simple json path");
            continue;
        }
        if path.starts_with(".metadata.") {
            found.invalid(at, path, "must not point to fields in metadata");
            continue;
        }
        let schema = path[1..]
            .split('.')
            .try_fold(&version["schema"]["openAPIV3Schema"], |schema, name| {
                schema["properties"].get(name)
            });
        match schema.and_then(|schema| schema["type"].as_str()) {
            Some("string" | "boolean" | "integer") => {}
            _ => found.invalid(
                at,
                path,
                "is an invalid path: must point to a field of type string, boolean or integer. \
                 Enum string fields and strings with formats are allowed.",
            ),
        }
    }
}

/// What is wrong with a change of a definition beyond the new definition itself.
pub fn validate_definition_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Found(Vec::new());
    let established = super::names::is_true(old, "Established");
    if established {
        for pointer in ["/spec/scope", "/spec/group", "/spec/names/plural"] {
            let (is, was) = (new.pointer(pointer), old.pointer(pointer));
            if is != was {
                found.invalid(
                    pointer[1..].replace('/', "."),
                    is.cloned().unwrap_or_default(),
                    "field is immutable",
                );
            }
        }
    }
    let stored = old["status"]["storedVersions"].as_array();
    for (index, version) in stored.into_iter().flatten().enumerate() {
        let versions = new["spec"]["versions"].as_array().into_iter().flatten();
        if !versions.into_iter().any(|v| v["name"] == *version) {
            found.invalid(
                format!("status.storedVersions[{index}]"),
                version.clone(),
                "missing from spec.versions; v1 must remain in spec.versions until a storage \
                 migration ensures no data remains persisted in v1 and removes v1 from \
                 status.storedVersions"
                    .replace("v1", version.as_str().unwrap_or_default()),
            );
        }
    }
    found.0
}

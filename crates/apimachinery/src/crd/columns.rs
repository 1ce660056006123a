//! Columns of custom resources, by JSON paths.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::table::{self, IncludeObject};

/// A column of a table.
#[derive(Debug, Clone)]
pub(crate) struct PrinterColumn {
    name: String,
    kind: String,
    format: String,
    description: String,
    priority: i64,
    path: Vec<Step>,
}

/// One step of a JSON path.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    Field(String),
    Index(i64),
    All,
    /// Items whose value at a path is, or is not, this.
    Where(Vec<Step>, bool, Value),
}

/// Parses the JSON paths that columns use: fields, indices, `[*]` and `[?(@.a=="b")]`.
pub(crate) fn parse_path(text: &str) -> Option<Vec<Step>> {
    let text = text.trim();
    let text = text
        .strip_prefix('{')
        .and_then(|t| t.strip_suffix('}'))
        .unwrap_or(text);
    let mut out = Vec::new();
    let mut rest = text.strip_prefix('$').unwrap_or(text);
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let end = closing(after)?;
            out.push(bracket(after[..end].trim())?);
            rest = &after[end + 1..];
            continue;
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
        let (mut name, mut length, mut escaped) = (String::new(), 0, false);
        for c in rest.chars() {
            if !escaped && matches!(c, '.' | '[') {
                break;
            }
            length += c.len_utf8();
            escaped = c == '\\' && !escaped;
            if !escaped {
                name.push(c);
            }
        }
        if name.is_empty() || name.contains(['(', ')', '{', '}', ' ']) {
            return None;
        }
        out.push(if name == "*" {
            Step::All
        } else {
            Step::Field(name)
        });
        rest = &rest[length..];
    }
    (!out.is_empty()).then_some(out)
}

/// Where the bracket ends.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0, None);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return Some(at),
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    None
}

fn quoted(text: &str) -> Option<&str> {
    let strip = |q: char| text.strip_prefix(q)?.strip_suffix(q);
    strip('\'').or_else(|| strip('"'))
}

fn bracket(text: &str) -> Option<Step> {
    if text == "*" {
        return Some(Step::All);
    }
    if let Some(name) = quoted(text) {
        return Some(Step::Field(name.to_owned()));
    }
    if let Some(condition) = text.strip_prefix("?(").and_then(|t| t.strip_suffix(')')) {
        let (equal, (left, right)) = match condition.split_once("==") {
            Some(parts) => (true, parts),
            None => (false, condition.split_once("!=")?),
        };
        let path = parse_path(left.trim().strip_prefix('@')?)?;
        let right = right.trim();
        let value = match quoted(right) {
            Some(text) => text.into(),
            None => serde_json::from_str(right).ok()?,
        };
        return Some(Step::Where(path, equal, value));
    }
    text.parse().ok().map(Step::Index)
}

/// The values at a path.
fn values<'a>(value: &'a Value, path: &[Step]) -> Vec<&'a Value> {
    let Some((step, rest)) = path.split_first() else {
        return vec![value];
    };
    let next: Vec<&Value> = match (step, value) {
        (Step::Field(name), Value::Object(fields)) => fields.get(name).into_iter().collect(),
        (Step::Index(index), Value::Array(items)) => {
            let at = if *index < 0 {
                items
                    .len()
                    .checked_sub(usize::try_from(-index).unwrap_or(usize::MAX))
            } else {
                usize::try_from(*index).ok()
            };
            at.and_then(|at| items.get(at)).into_iter().collect()
        }
        (Step::All, Value::Array(items)) => items.iter().collect(),
        (Step::All, Value::Object(fields)) => fields.values().collect(),
        (Step::Where(path, equal, wanted), Value::Array(items)) => items
            .iter()
            .filter(|item| (values(item, path).first() == Some(&wanted)) == *equal)
            .collect(),
        _ => Vec::new(),
    };
    next.into_iter()
        .flat_map(|value| values(value, rest))
        .collect()
}

impl PrinterColumn {
    /// The columns of a version; those without any show the age.
    pub(crate) fn of_version(version: &Value) -> Vec<Self> {
        let listed = version["additionalPrinterColumns"].as_array();
        let mut out = vec![Self {
            name: "Name".into(),
            kind: "string".into(),
            format: "name".into(),
            description: "Name must be unique within a namespace.".into(),
            priority: 0,
            path: vec![Step::Field("metadata".into()), Step::Field("name".into())],
        }];
        let age =
            [json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})];
        let listed = listed.map_or(
            &age[..],
            |listed| {
                if listed.is_empty() { &age } else { listed }
            },
        );
        for column in listed {
            let text = |key: &str| column[key].as_str().unwrap_or_default().to_owned();
            let Some(path) = parse_path(&text("jsonPath")) else {
                continue;
            };
            out.push(Self {
                name: text("name"),
                kind: text("type"),
                format: text("format"),
                description: text("description"),
                priority: column["priority"].as_i64().unwrap_or_default(),
                path,
            });
        }
        out
    }

    fn head(&self) -> Value {
        json!({
            "name": self.name,
            "type": self.kind,
            "format": self.format,
            "description": self.description,
            "priority": self.priority,
        })
    }

    fn cell(&self, object: &Value, now: Timestamp) -> Value {
        let found = values(object, &self.path);
        let Some(value) = found.first() else {
            return Value::Null;
        };
        match self.kind.as_str() {
            "string" => match (found.as_slice(), value) {
                ([Value::String(text)], _) => text.as_str().into(),
                ([value @ (Value::Object(_) | Value::Array(_))], _) => value.to_string().into(),
                ([value], _) => value.to_string().into(),
                _ => Value::from(
                    found
                        .iter()
                        .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
                        .collect::<Vec<_>>()
                        .join(" "),
                ),
            },
            "integer" => value.as_i64().map_or(Value::Null, Value::from),
            "number" => value.as_f64().map_or(Value::Null, Value::from),
            "boolean" => value.as_bool().map_or(Value::Null, Value::from),
            "date" => match value
                .as_str()
                .and_then(|text| text.parse::<Timestamp>().ok())
            {
                Some(time) => table::human_duration(now.duration_since(time).as_secs()).into(),
                None => "<invalid>".into(),
            },
            _ => Value::Null,
        }
    }
}

/// The table of some objects.
pub(crate) fn table(
    columns: &[PrinterColumn],
    objects: &[&Value],
    include: IncludeObject,
    list_meta: &Value,
    headers: bool,
    now: Timestamp,
) -> Value {
    let rows = objects.iter().map(|object| {
        let cells: Vec<Value> = columns.iter().map(|c| c.cell(object, now)).collect();
        let mut row = json!({"cells": cells});
        match include {
            IncludeObject::None => {}
            IncludeObject::Metadata => row["object"] = table::partial_object_metadata(object),
            IncludeObject::Object => row["object"] = (*object).clone(),
        }
        row
    });
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_meta,
        "columnDefinitions": if headers {
            columns.iter().map(PrinterColumn::head).collect()
        } else {
            Vec::new()
        },
        "rows": rows.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_columns() {
        let object = json!({
            "metadata": {"annotations": {"a.b/c": "x"}},
            "spec": {"list": [{"n": 1}, {"n": 2}]},
            "status": {"conditions": [
                {"type": "Ready", "status": "True"}, {"type": "Synced", "status": "False"}]},
        });
        for (path, expected) in [
            (".spec.list[1].n", json!([2])),
            (".spec.list[-1].n", json!([2])),
            (".spec.list[*].n", json!([1, 2])),
            (
                ".status.conditions[?(@.type==\"Ready\")].status",
                json!(["True"]),
            ),
            (
                ".status.conditions[?(@.type=='Synced')].status",
                json!(["False"]),
            ),
            (
                ".status.conditions[?(@.type!='Synced')].status",
                json!(["True"]),
            ),
            (".metadata.annotations.a\\.b/c", json!(["x"])),
            (".metadata.annotations['a.b/c']", json!(["x"])),
            (".spec.nothing.here", json!([])),
        ] {
            let parsed = parse_path(path).unwrap_or_else(|| panic!("{path}"));
            assert_eq!(json!(values(&object, &parsed)), expected, "{path}");
        }
        for bad in ["", ".", ".a[", ".a[x]", ".a..b", ".a[?(b)]"] {
            assert_eq!(parse_path(bad), None, "{bad}");
        }
    }
}

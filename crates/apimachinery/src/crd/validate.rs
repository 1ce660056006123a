//! Validation of objects, in the words of Kubernetes' schema validation.

use serde_json::Value;

use super::structural::{Additional, Limits, Structural, Type};
use crate::validation::{ErrorKind, FieldError};

/// More findings than this are not collected.
const MAX_FINDINGS: usize = 100;

/// Findings as they come.
#[derive(Debug, Default)]
pub(super) struct Findings(pub(super) Vec<FieldError>);

impl Findings {
    fn add(&mut self, kind: ErrorKind, path: &str, value: Value, detail: impl Into<String>) {
        if self.0.len() < MAX_FINDINGS {
            self.0.push(FieldError {
                kind,
                field: if path.is_empty() { "<nil>" } else { path }.to_owned(),
                value,
                detail: detail.into(),
            });
        }
    }

    fn invalid(&mut self, path: &str, value: &Value, rule: &str) {
        let detail = format!("{path} in body {rule}");
        self.add(ErrorKind::Invalid, path, value.clone(), detail);
    }

    /// Whether rules would be evaluated on what is not as the schema says.
    pub(super) fn block_rules(&self) -> bool {
        self.0.iter().any(|error| {
            matches!(
                error.kind,
                ErrorKind::Required
                    | ErrorKind::TooLong
                    | ErrorKind::TooMany
                    | ErrorKind::TypeInvalid
            )
        })
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() && n.as_f64().is_some_and(|n| n.fract() != 0.0) => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_of(shape: Type, value: &Value) -> bool {
    match shape {
        Type::Number => value.is_number(),
        other => type_of(value) == other.text(),
    }
}

pub(super) fn child(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

impl Structural {
    /// Checks a value. What has not changed since `old` is not looked at again.
    pub(super) fn validate(
        &self,
        value: &Value,
        old: Option<&Value>,
        path: &str,
        found: &mut Findings,
    ) {
        if old.is_some_and(|old| old == value) {
            return;
        }
        if value.is_null() {
            if !self.nullable && !self.accepts_null() {
                self.type_mismatch(value, path, found);
            }
            return;
        }
        if self.int_or_string {
            if !matches!(type_of(value), "integer" | "string") {
                let detail = format!(
                    "{path} in body must be of type integer,string: {:?}",
                    type_of(value)
                );
                found.add(ErrorKind::TypeInvalid, path, type_of(value).into(), detail);
                return;
            }
        } else if self.shape.is_some_and(|shape| !is_of(shape, value)) {
            self.type_mismatch(value, path, found);
            return;
        }
        self.limits.check(value, path, found);
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let schema = match (self.properties.get(name), &self.additional) {
                        (Some(schema), _) => schema,
                        (None, Additional::Schema(schema)) => schema,
                        _ => continue,
                    };
                    let old = old.and_then(|old| old.get(name));
                    schema.validate(value, old, &child(path, name), found);
                }
            }
            Value::Array(items) => self.validate_items(items, old, path, found),
            _ => {}
        }
    }

    fn accepts_null(&self) -> bool {
        self.shape.is_none() && !self.int_or_string
    }

    fn type_mismatch(&self, value: &Value, path: &str, found: &mut Findings) {
        let wanted = self.shape.map_or("object", Type::text);
        let detail = format!(
            "{path} in body must be of type {wanted}: {:?}",
            type_of(value)
        );
        found.add(ErrorKind::TypeInvalid, path, type_of(value).into(), detail);
    }

    fn validate_items(
        &self,
        items: &[Value],
        old: Option<&Value>,
        path: &str,
        found: &mut Findings,
    ) {
        let key_of = |item: &Value| -> Value {
            self.keys
                .iter()
                .filter_map(|key| Some((key.clone(), item.get(key)?.clone())))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let mut seen = std::collections::HashSet::new();
        for (index, item) in items.iter().enumerate() {
            let at = format!("{path}[{index}]");
            if self.is_set || !self.keys.is_empty() {
                let key = if self.is_set {
                    item.clone()
                } else {
                    key_of(item)
                };
                if !seen.insert(key.to_string()) {
                    found.add(ErrorKind::Duplicate, &at, key, "");
                }
            }
            if let Some(schema) = &self.items {
                schema.validate(item, self.old_item(item, old), &at, found);
            }
        }
    }

    /// The item of the old list that an item is the same as, told by its keys.
    pub(super) fn old_item<'a>(&self, item: &Value, old: Option<&'a Value>) -> Option<&'a Value> {
        let old = old?.as_array()?;
        if self.keys.is_empty() {
            return None;
        }
        let same = |other: &&Value| self.keys.iter().all(|key| other.get(key) == item.get(key));
        old.iter().find(same)
    }

    fn accepts(&self, value: &Value, path: &str) -> bool {
        let mut found = Findings::default();
        self.validate(value, None, path, &mut found);
        found.0.is_empty()
    }
}

impl Limits {
    fn check(&self, value: &Value, path: &str, found: &mut Findings) {
        match value {
            Value::String(text) => self.check_text(value, text, path, found),
            Value::Number(_) => self.check_number(value, path, found),
            Value::Array(items) => {
                let (min, max) = self.items;
                let count = items.len() as u64;
                if max.is_some_and(|max| count > max) {
                    let detail = format!("must have at most {} items", max.unwrap_or_default());
                    found.add(ErrorKind::TooMany, path, count.into(), detail);
                }
                if let Some(min) = min.filter(|min| count < *min) {
                    found.invalid(
                        path,
                        &count.into(),
                        &format!("should have at least {min} items"),
                    );
                }
            }
            Value::Object(fields) => {
                let (min, max) = self.properties;
                let count = fields.len() as u64;
                if max.is_some_and(|max| count > max) {
                    let detail = format!("must have at most {} items", max.unwrap_or_default());
                    found.add(ErrorKind::TooMany, path, count.into(), detail);
                }
                if let Some(min) = min.filter(|min| count < *min) {
                    let rule = format!("should have at least {min} properties");
                    found.invalid(path, &count.into(), &rule);
                }
                for name in &self.required {
                    if !fields.contains_key(name) {
                        let at = child(path, name);
                        found.add(ErrorKind::Required, &at, Value::Null, "");
                    }
                }
            }
            _ => {}
        }
        if let Some(values) = &self.values
            && !values.contains(value)
        {
            let list: Vec<String> = values.iter().map(ToString::to_string).collect();
            let detail = format!("supported values: {}", list.join(", "));
            found.add(ErrorKind::NotSupported, path, value.clone(), detail);
        }
        self.check_junctors(value, path, found);
    }

    fn check_text(&self, value: &Value, text: &str, path: &str, found: &mut Findings) {
        let (min, max) = self.length;
        let length = text.chars().count() as u64;
        if let Some(max) = max.filter(|max| length > *max) {
            let detail = format!("may not be more than {max} bytes");
            found.add(ErrorKind::TooLong, path, Value::Null, detail);
        }
        if let Some(min) = min.filter(|min| length < *min) {
            found.invalid(path, value, &format!("should be at least {min} chars long"));
        }
        if let Some((source, pattern)) = &self.pattern
            && !pattern.is_match(text)
        {
            found.invalid(path, value, &format!("should match '{source}'"));
        }
        if let Some(format) = &self.format
            && !has_format(format, text)
        {
            found.invalid(path, value, &format!("must be of type {format}: {value}"));
        }
    }

    fn check_number(&self, value: &Value, path: &str, found: &mut Findings) {
        let Some(number) = value.as_f64() else { return };
        let compare = |bound: &Value| match (value.as_i64(), bound.as_i64()) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            _ => number.partial_cmp(&bound.as_f64()?),
        };
        if let Some((bound, exclusive)) = &self.maximum
            && let Some(order) = compare(bound)
            && (order.is_gt() || *exclusive && order.is_eq())
        {
            let than = if *exclusive {
                "less than"
            } else {
                "less than or equal to"
            };
            found.invalid(path, value, &format!("should be {than} {bound}"));
        }
        if let Some((bound, exclusive)) = &self.minimum
            && let Some(order) = compare(bound)
            && (order.is_lt() || *exclusive && order.is_eq())
        {
            let than = if *exclusive {
                "greater than"
            } else {
                "greater than or equal to"
            };
            found.invalid(path, value, &format!("should be {than} {bound}"));
        }
        if let Some(of) = self.multiple_of {
            let ratio = number / of;
            if (ratio - ratio.round()).abs() > 1e-9 {
                found.invalid(path, value, &format!("should be a multiple of {of}"));
            }
        }
        let fits = match self.format.as_deref() {
            Some("int32") => value.as_i64().is_some_and(|n| i32::try_from(n).is_ok()),
            Some("int64") => value.as_i64().is_some(),
            _ => true,
        };
        if !fits {
            let format = self.format.as_deref().unwrap_or_default();
            found.invalid(path, value, &format!("must be of type {format}: {value}"));
        }
    }

    fn check_junctors(&self, value: &Value, path: &str, found: &mut Findings) {
        let mut refuse = |text: String| found.add(ErrorKind::Invalid, path, "".into(), text);
        if !self.any_of.is_empty() && !self.any_of.iter().any(|schema| schema.accepts(value, path))
        {
            refuse(format!(
                "{path:?} must validate at least one schema (anyOf)"
            ));
        }
        if !self.one_of.is_empty() {
            let valid = self
                .one_of
                .iter()
                .filter(|s| s.accepts(value, path))
                .count();
            if valid != 1 {
                let which = match valid {
                    0 => "none valid".to_owned(),
                    n => format!("{n} valid alternatives"),
                };
                refuse(format!(
                    "{path:?} must validate one and only one schema (oneOf). Found {which}"
                ));
            }
        }
        if let Some(not) = &self.not
            && not.accepts(value, path)
        {
            refuse(format!("{path:?} must not validate the schema (not)"));
        }
        // Upstream shows what each schema finds, and that not all are met.
        let before = found.0.len();
        for schema in &self.all_of {
            schema.validate(value, None, path, found);
        }
        if found.0.len() > before {
            let text = format!("{path:?} must validate all the schemas (allOf)");
            found.add(ErrorKind::Invalid, path, "".into(), text);
        }
    }
}

/// Whether a text has a format; formats that are not known are not checked.
fn has_format(format: &str, text: &str) -> bool {
    match format {
        "date-time" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<ipnet::IpNet>().is_ok(),
        "uuid" | "uuid3" | "uuid4" | "uuid5" => uuid::Uuid::parse_str(text).is_ok(),
        "byte" => {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD
                .decode(text)
                .is_ok()
        }
        "duration" => is_duration(text),
        "hostname" => crate::meta::rules::subdomain(&text.to_lowercase()).is_empty(),
        "email" => text
            .split_once('@')
            .is_some_and(|(a, b)| !a.is_empty() && !b.is_empty()),
        _ => true,
    }
}

/// Go's form of durations: `1h2m3.5s`.
fn is_duration(text: &str) -> bool {
    let mut rest = text.trim_start_matches(['-', '+']);
    if rest == "0" {
        return true;
    }
    if rest.is_empty() {
        return false;
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(0);
        if digits == 0 {
            return false;
        }
        rest = &rest[digits..];
        let Some(unit) = ["ns", "us", "µs", "ms", "s", "m", "h"]
            .into_iter()
            .find(|unit| rest.starts_with(unit))
        else {
            return false;
        };
        rest = &rest[unit.len()..];
    }
    true
}

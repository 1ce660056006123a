//! A structural schema, parsed from `openAPIV3Schema`.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::Value;

use super::cel::Rules;

/// Deeper schemas are refused.
pub(super) const MAX_DEPTH: usize = 48;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
}

impl Type {
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "object" => Self::Object,
            "array" => Self::Array,
            "string" => Self::String,
            "integer" => Self::Integer,
            "number" => Self::Number,
            "boolean" => Self::Boolean,
            _ => return None,
        })
    }

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Array => "array",
            Self::String => "string",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
        }
    }
}

/// What fields beside the named ones may be.
#[derive(Debug, Default)]
pub(super) enum Additional {
    #[default]
    None,
    /// Anything.
    Any,
    Schema(Box<Structural>),
}

/// One node.
#[derive(Debug, Default)]
pub(super) struct Structural {
    pub(super) shape: Option<Type>,
    pub(super) nullable: bool,
    pub(super) int_or_string: bool,
    pub(super) preserve: bool,
    pub(super) embedded: bool,
    pub(super) properties: BTreeMap<String, Structural>,
    pub(super) additional: Additional,
    pub(super) items: Option<Box<Structural>>,
    pub(super) default: Option<Value>,
    /// Keys of a list of the type `map`.
    pub(super) keys: Vec<String>,
    pub(super) is_set: bool,
    pub(super) limits: Limits,
    pub(super) rules: Option<Rules>,
}

/// Conditions on a value.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) required: Vec<String>,
    pub(super) values: Option<Vec<Value>>,
    pub(super) pattern: Option<(String, Regex)>,
    pub(super) format: Option<String>,
    pub(super) length: (Option<u64>, Option<u64>),
    pub(super) items: (Option<u64>, Option<u64>),
    pub(super) properties: (Option<u64>, Option<u64>),
    /// Bound, and whether it is excluded.
    pub(super) minimum: Option<(Value, bool)>,
    pub(super) maximum: Option<(Value, bool)>,
    pub(super) multiple_of: Option<f64>,
    pub(super) all_of: Vec<Structural>,
    pub(super) any_of: Vec<Structural>,
    pub(super) one_of: Vec<Structural>,
    pub(super) not: Option<Box<Structural>>,
}

impl Structural {
    /// Parses a schema that has been checked; what is wrong in it is left out. Patterns and rules are
    /// compiled.
    pub(super) fn parse(source: &Value) -> Self {
        Self::node(source, true, 0)
    }

    fn node(source: &Value, with_rules: bool, depth: usize) -> Self {
        if depth > MAX_DEPTH {
            return Self::default();
        }
        let flag = |key: &str| source[key] == true;
        let below = |value: &Value| Self::node(value, with_rules, depth + 1);
        let properties = source["properties"].as_object();
        let items = source.get("items").filter(|items| items.is_object());
        let list_type = source["x-kubernetes-list-type"].as_str();
        let keys = source["x-kubernetes-list-map-keys"].as_array();
        Self {
            shape: source["type"].as_str().and_then(Type::parse),
            nullable: flag("nullable"),
            int_or_string: flag("x-kubernetes-int-or-string"),
            preserve: flag("x-kubernetes-preserve-unknown-fields"),
            embedded: flag("x-kubernetes-embedded-resource"),
            properties: properties
                .into_iter()
                .flatten()
                .map(|(name, value)| (name.clone(), below(value)))
                .collect(),
            additional: match &source["additionalProperties"] {
                Value::Bool(true) => Additional::Any,
                value @ Value::Object(_) => Additional::Schema(Box::new(below(value))),
                _ => Additional::None,
            },
            items: items.map(|items| Box::new(below(items))),
            default: source.get("default").filter(|v| !v.is_null()).cloned(),
            keys: if list_type == Some("map") {
                let keys = keys.into_iter().flatten().filter_map(Value::as_str);
                keys.map(str::to_owned).collect()
            } else {
                Vec::new()
            },
            is_set: list_type == Some("set"),
            limits: Limits::parse(source, depth),
            rules: with_rules.then(|| Rules::of(source)).flatten(),
        }
    }
}

impl Limits {
    fn parse(source: &Value, depth: usize) -> Self {
        let count = |key: &str| source[key].as_u64();
        let nested = |key: &str| -> Vec<Structural> {
            let values = source[key].as_array().into_iter().flatten();
            values
                .map(|value| Structural::node(value, false, depth + 1))
                .collect()
        };
        let bound = |key: &str, exclusive: &str| {
            let value = source.get(key).filter(|value| value.is_number())?;
            Some((value.clone(), source[exclusive] == true))
        };
        let required = source["required"].as_array().into_iter().flatten();
        let pattern = source["pattern"].as_str().filter(|text| !text.is_empty());
        Self {
            required: required
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            values: source["enum"].as_array().cloned(),
            pattern: pattern.and_then(|text| Some((text.to_owned(), Regex::new(text).ok()?))),
            format: source["format"].as_str().map(str::to_owned),
            length: (count("minLength"), count("maxLength")),
            items: (count("minItems"), count("maxItems")),
            properties: (count("minProperties"), count("maxProperties")),
            minimum: bound("minimum", "exclusiveMinimum"),
            maximum: bound("maximum", "exclusiveMaximum"),
            multiple_of: source["multipleOf"].as_f64().filter(|n| *n > 0.0),
            all_of: nested("allOf"),
            any_of: nested("anyOf"),
            one_of: nested("oneOf"),
            not: source
                .get("not")
                .filter(|not| not.is_object())
                .map(|not| Box::new(Structural::node(not, false, depth + 1))),
        }
    }
}

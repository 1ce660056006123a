//! Decoding of request bodies with Kubernetes' field validation.
//!
//! A body is parsed with its duplicate fields noted, then walked along the schema of its kind:
//! wrong types are errors in the words of Go's decoder, unknown fields are removed and reported.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::{Schema, definitions::Shape};

/// Findings beyond this number are not reported, as upstream does.
const MAX_FINDINGS: usize = 100;

/// What to do about unknown and duplicate fields (`fieldValidation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Drop them.
    Ignore,
    /// Drop them and warn.
    #[default]
    Warn,
    /// Refuse the request.
    Strict,
}

impl FieldValidation {
    /// The query parameter's value; empty is the default.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "Ignore" => Some(Self::Ignore),
            "" | "Warn" => Some(Self::Warn),
            "Strict" => Some(Self::Strict),
            _ => None,
        }
    }
}

/// A body that cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The text is not JSON or YAML.
    #[error("{0}")]
    Syntax(String),
    /// A value has the wrong type.
    #[error("{0}")]
    Type(String),
    /// Unknown or duplicate fields under [`FieldValidation::Strict`].
    #[error("strict decoding error: {}", .0.join(", "))]
    Strict(Vec<String>),
}

/// A parsed body with what is odd about it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parsed {
    /// The value; of duplicate fields the last.
    pub value: Value,
    /// `duplicate field "…"`, in order.
    pub duplicates: Vec<String>,
}

impl From<Value> for Parsed {
    fn from(value: Value) -> Self {
        Self {
            value,
            duplicates: Vec::new(),
        }
    }
}

/// Parses JSON.
///
/// # Errors
/// [`DecodeError::Syntax`].
pub fn parse_json(body: &[u8]) -> Result<Parsed, DecodeError> {
    let node: Node =
        serde_json::from_slice(body).map_err(|e| DecodeError::Syntax(e.to_string()))?;
    Ok(node.into_parsed())
}

/// Parses one YAML document. Anchors are bounded by the parser.
///
/// # Errors
/// [`DecodeError::Syntax`].
pub fn parse_yaml(body: &[u8]) -> Result<Parsed, DecodeError> {
    use serde_saphyr::options::DuplicateKeyPolicy;

    // JSON is nearly YAML, and its parser is faster and stricter.
    if body.trim_ascii_start().first() == Some(&b'{') {
        return parse_json(body);
    }
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        strict_booleans: true,
    };
    let node: Node = serde_saphyr::from_slice_with_options(body, options)
        .map_err(|e| DecodeError::Syntax(format!("error converting YAML to JSON: {e}")))?;
    Ok(node.into_parsed())
}

/// JSON that keeps every entry of an object.
enum Node {
    Leaf(Value),
    List(Vec<Node>),
    Object(Vec<(Key, Node)>),
}

struct Key(String);

impl Node {
    fn into_parsed(self) -> Parsed {
        let mut duplicates = Vec::new();
        let value = self.into_value(&mut String::new(), &mut duplicates);
        Parsed { value, duplicates }
    }

    fn into_value(self, path: &mut String, duplicates: &mut Vec<String>) -> Value {
        let length = path.len();
        match self {
            Self::Leaf(value) => value,
            Self::List(nodes) => {
                let mut out = Vec::with_capacity(nodes.len());
                for (index, node) in nodes.into_iter().enumerate() {
                    push_index(path, index);
                    out.push(node.into_value(path, duplicates));
                    path.truncate(length);
                }
                Value::Array(out)
            }
            Self::Object(entries) => {
                let mut out = Map::new();
                for (Key(key), node) in entries {
                    push_field(path, &key);
                    let value = node.into_value(path, duplicates);
                    if out.insert(key, value).is_some() {
                        note(duplicates, format!("duplicate field {path:?}"));
                    }
                    path.truncate(length);
                }
                Value::Object(out)
            }
        }
    }
}

fn note(findings: &mut Vec<String>, finding: String) {
    if findings.len() < MAX_FINDINGS && !findings.contains(&finding) {
        findings.push(finding);
    }
}

fn push_field(path: &mut String, name: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(name);
}

fn push_index(path: &mut String, index: usize) {
    path.push('[');
    path.push_str(&index.to_string());
    path.push(']');
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;

        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Leaf(
                    Number::from_f64(value).map_or(Value::Null, Value::Number),
                ))
            }

            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_string<E>(self, value: String) -> Result<Node, E> {
                Ok(Node::Leaf(value.into()))
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf(Value::Null))
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf(Value::Null))
            }

            fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<Node, D::Error> {
                Node::deserialize(value)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
                let mut out = Vec::new();
                while let Some(item) = items.next_element()? {
                    out.push(item);
                }
                Ok(Node::List(out))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
                let mut out = Vec::new();
                while let Some(entry) = entries.next_entry()? {
                    out.push(entry);
                }
                Ok(Node::Object(out))
            }
        }

        deserializer.deserialize_any(NodeVisitor)
    }
}

/// A key; YAML may write a number or a boolean where JSON needs text.
impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field name")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Key, E> {
                Ok(Key(value.to_owned()))
            }
        }

        deserializer.deserialize_any(KeyVisitor)
    }
}

/// Checks a parsed object against its schema: wrong types are refused; unknown fields are removed,
/// and with the duplicates either reported as warnings (returned) or refused.
///
/// # Errors
/// [`DecodeError::Type`], [`DecodeError::Strict`].
pub fn check(
    parsed: Parsed,
    schema: &Schema,
    mode: FieldValidation,
) -> Result<(Value, Vec<String>), DecodeError> {
    let Parsed {
        mut value,
        duplicates,
    } = parsed;
    let mut walk = Walk {
        path: String::new(),
        findings: Vec::new(),
    };
    walk.value(&mut value, schema, None)?;
    let mut findings = walk.findings;
    for duplicate in duplicates {
        note(&mut findings, duplicate);
    }
    match mode {
        FieldValidation::Ignore => Ok((value, Vec::new())),
        FieldValidation::Warn => Ok((value, findings)),
        FieldValidation::Strict if findings.is_empty() => Ok((value, findings)),
        FieldValidation::Strict => Err(DecodeError::Strict(findings)),
    }
}

/// Removes unknown fields and reports wrong types, for objects made by the server's own patching.
///
/// # Errors
/// [`DecodeError::Type`].
pub fn prune(value: Value, schema: &Schema) -> Result<Value, DecodeError> {
    check(value.into(), schema, FieldValidation::Ignore).map(|(value, _)| value)
}

struct Walk {
    path: String,
    findings: Vec<String>,
}

impl Walk {
    /// `owner` is Go's name of the struct that holds the value.
    fn value(
        &mut self,
        value: &mut Value,
        schema: &Schema,
        owner: Option<&str>,
    ) -> Result<(), DecodeError> {
        if value.is_null() {
            return Ok(());
        }
        match schema.shape() {
            Shape::Any => Ok(()),
            Shape::Object => self.object(value, schema, owner),
            Shape::Array => {
                let Value::Array(items) = value else {
                    return Err(self.mismatch(value, schema, owner));
                };
                let Some(schema) = schema.items() else {
                    return Ok(());
                };
                let length = self.path.len();
                for (index, item) in items.iter_mut().enumerate() {
                    push_index(&mut self.path, index);
                    self.value(item, schema, owner)?;
                    self.path.truncate(length);
                }
                Ok(())
            }
            Shape::String => self.expect(value.is_string(), value, schema, owner),
            Shape::Boolean => self.expect(value.is_boolean(), value, schema, owner),
            Shape::Number => self.expect(value.is_number(), value, schema, owner),
            Shape::Int64 => self.expect(
                value.as_i64().is_some() || whole(value),
                value,
                schema,
                owner,
            ),
            Shape::Int32 => {
                let fits = value.as_i64().is_some_and(|n| i32::try_from(n).is_ok());
                self.expect(fits || whole(value), value, schema, owner)
            }
            Shape::IntOrString => {
                let ok = value.is_string() || value.as_i64().is_some();
                self.expect(ok, value, schema, owner)
            }
            Shape::Bytes => match value.as_str() {
                None => Err(self.mismatch(value, schema, owner)),
                Some(text) => check_base64(text).map_err(|at| {
                    DecodeError::Type(format!("illegal base64 data at input byte {at}"))
                }),
            },
            Shape::Time | Shape::MicroTime => match value.as_str() {
                None => Err(self.mismatch(value, schema, owner)),
                Some(text) if text.parse::<jiff::Timestamp>().is_err() => {
                    Err(DecodeError::Type(format!(
                        "parsing time {text:?} as \"2006-01-02T15:04:05Z07:00\": cannot parse \
                         {text:?} as \"2006\""
                    )))
                }
                Some(_) => Ok(()),
            },
            Shape::Quantity => {
                let text = match &*value {
                    Value::String(text) => text.clone(),
                    Value::Number(number) => number.to_string(),
                    _ => return Err(self.mismatch(value, schema, owner)),
                };
                if text.parse::<crate::Quantity>().is_err() {
                    return Err(DecodeError::Type(
                        "quantities must match the regular expression \
                         '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
                            .to_owned(),
                    ));
                }
                // Numbers are kept as text, the one form that Go writes.
                *value = Value::String(text);
                Ok(())
            }
        }
    }

    fn object(
        &mut self,
        value: &mut Value,
        schema: &Schema,
        owner: Option<&str>,
    ) -> Result<(), DecodeError> {
        let Value::Object(object) = value else {
            return Err(self.mismatch(value, schema, owner));
        };
        if schema.is_open() {
            return Ok(());
        }
        let length = self.path.len();
        let is_map = schema.values().is_some();
        let owner = if is_map {
            owner
        } else {
            schema.type_name().or(owner)
        };
        let mut unknown = Vec::new();
        for (name, value) in object.iter_mut() {
            push_field(&mut self.path, name);
            match schema.property(name) {
                Some(schema) => self.value(value, schema, owner)?,
                None => {
                    note(&mut self.findings, format!("unknown field {:?}", self.path));
                    unknown.push(name.clone());
                }
            }
            self.path.truncate(length);
        }
        for name in unknown {
            object.remove(&name);
        }
        Ok(())
    }

    fn expect(
        &self,
        ok: bool,
        value: &Value,
        schema: &Schema,
        owner: Option<&str>,
    ) -> Result<(), DecodeError> {
        if ok {
            Ok(())
        } else {
            Err(self.mismatch(value, schema, owner))
        }
    }

    /// The words of Go's JSON decoder. It names fields without list indices.
    fn mismatch(&self, value: &Value, schema: &Schema, owner: Option<&str>) -> DecodeError {
        let found = match value {
            Value::Null => "null".to_owned(),
            Value::Bool(_) => "bool".to_owned(),
            Value::Number(number) if matches!(schema.shape(), Shape::Int32 | Shape::Int64) => {
                format!("number {number}")
            }
            Value::Number(_) => "number".to_owned(),
            Value::String(_) => "string".to_owned(),
            Value::Array(_) => "array".to_owned(),
            Value::Object(_) => "object".to_owned(),
        };
        let wanted = go_type(schema);
        let mut path = String::new();
        let mut inside = false;
        for c in self.path.chars() {
            match c {
                '[' => inside = true,
                ']' => inside = false,
                c if !inside => path.push(c),
                _ => {}
            }
        }
        DecodeError::Type(match owner {
            Some(owner) if !path.is_empty() => format!(
                "json: cannot unmarshal {found} into Go struct field {owner}.{path} of type {wanted}"
            ),
            _ => format!("json: cannot unmarshal {found} into Go value of type {wanted}"),
        })
    }
}

/// Clients of loosely typed languages write 1 as 1.0.
fn whole(value: &Value) -> bool {
    value
        .as_f64()
        .is_some_and(|n| value.is_f64() && n.fract() == 0.0 && n.abs() < 2e9)
}

fn go_type(schema: &Schema) -> String {
    match schema.shape() {
        Shape::Object => match (schema.values(), schema.definition_name()) {
            (Some(values), _) => format!("map[string]{}", go_type(values)),
            (None, Some(name)) => {
                let mut parts = name.rsplit('.');
                let kind = parts.next().unwrap_or_default();
                let package = parts.next().unwrap_or_default();
                format!("{package}.{kind}")
            }
            (None, None) => "map[string]interface {}".to_owned(),
        },
        Shape::Array => format!(
            "[]{}",
            schema.items().map_or("interface {}".into(), go_type)
        ),
        Shape::String => "string".to_owned(),
        Shape::Bytes => "[]uint8".to_owned(),
        Shape::Time => "v1.Time".to_owned(),
        Shape::MicroTime => "v1.MicroTime".to_owned(),
        Shape::Int32 => "int32".to_owned(),
        Shape::Int64 => "int64".to_owned(),
        Shape::Number => "float64".to_owned(),
        Shape::Boolean => "bool".to_owned(),
        Shape::IntOrString => "intstr.IntOrString".to_owned(),
        Shape::Quantity => "resource.Quantity".to_owned(),
        Shape::Any => "interface {}".to_owned(),
    }
}

/// Where the text stops being base64, as Go counts it: line breaks are allowed.
fn check_base64(text: &str) -> Result<(), usize> {
    use base64::{DecodeError::InvalidByte, Engine, engine::general_purpose::STANDARD};

    let breaks = text.bytes().any(|b| matches!(b, b'\r' | b'\n'));
    let plain = breaks.then(|| text.replace(['\r', '\n'], ""));
    match STANDARD.decode(plain.as_deref().unwrap_or(text)) {
        Ok(_) => Ok(()),
        Err(InvalidByte(at, _)) => Err(at),
        Err(_) => Err(text.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definitions;
    use serde_json::json;

    fn pod(body: &str, mode: FieldValidation) -> Result<(Value, Vec<String>), DecodeError> {
        let schema = definitions().by_api_version("v1", "Pod").unwrap();
        check(parse_json(body.as_bytes())?, schema, mode)
    }

    const ODD: &str = r#"{"metadata":{"name":"a","name":"b"},"spec":{"foo":1,
        "containers":[{"name":"c","bar":{},"image":"x","image":"y"}]}}"#;

    #[test]
    fn strict_refuses_with_every_field() {
        assert_eq!(
            pod(ODD, FieldValidation::Strict).unwrap_err().to_string(),
            "strict decoding error: unknown field \"spec.containers[0].bar\", unknown field \
             \"spec.foo\", duplicate field \"metadata.name\", duplicate field \
             \"spec.containers[0].image\""
        );
    }

    #[test]
    fn warn_and_ignore_drop_unknown_fields_and_take_the_last_duplicate() {
        let (value, warnings) = pod(ODD, FieldValidation::Warn).unwrap();
        assert_eq!(warnings.len(), 4);
        assert_eq!(
            value,
            json!({"metadata": {"name": "b"},
                "spec": {"containers": [{"name": "c", "image": "y"}]}})
        );
        assert_eq!(pod(ODD, FieldValidation::Ignore).unwrap(), (value, vec![]));
    }

    #[test]
    fn wrong_types_are_named_as_go_does() {
        for (body, words) in [
            (
                r#"{"spec":{"terminationGracePeriodSeconds":"x"}}"#,
                "json: cannot unmarshal string into Go struct field \
                 PodSpec.spec.terminationGracePeriodSeconds of type int64",
            ),
            (
                r#"{"spec":{"containers":{}}}"#,
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of \
                 type []v1.Container",
            ),
            (
                r#"{"spec":{"containers":[{"command":"sh"}]}}"#,
                "json: cannot unmarshal string into Go struct field \
                 Container.spec.containers.command of type []string",
            ),
            (
                r#"{"metadata":{"labels":{"a":1}}}"#,
                "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels.a \
                 of type string",
            ),
            (
                "[]",
                "json: cannot unmarshal array into Go value of type v1.Pod",
            ),
        ] {
            let error = pod(body, FieldValidation::Ignore).unwrap_err();
            assert_eq!(error.to_string(), words, "{body}");
        }
    }

    #[test]
    fn leaves_are_checked() {
        let secret = definitions().by_api_version("v1", "Secret").unwrap();
        let decode = |body: Value| prune(body, secret);
        assert!(decode(json!({"data": {"a": "aGk="}})).is_ok());
        assert_eq!(
            decode(json!({"data": {"a": "a!=="}}))
                .unwrap_err()
                .to_string(),
            "illegal base64 data at input byte 1"
        );
        assert!(decode(json!({"metadata": {"creationTimestamp": null}})).is_ok());
        assert!(decode(json!({"metadata": {"creationTimestamp": "soon"}})).is_err());
        let pod = definitions().by_api_version("v1", "Pod").unwrap();
        let limits = json!({"spec": {"containers": [{"resources": {"limits": {"cpu": 2}}}]}});
        assert_eq!(
            prune(limits, pod).unwrap()["spec"]["containers"][0]["resources"]["limits"]["cpu"],
            "2"
        );
    }

    #[test]
    fn yaml_is_taken_with_its_duplicates() {
        let parsed = parse_yaml(b"a: 1\nb: {c: x, c: 'y'}\n3: yes\n").unwrap();
        assert_eq!(parsed.value, json!({"a": 1, "b": {"c": "y"}, "3": "yes"}));
        assert_eq!(parsed.duplicates, ["duplicate field \"b.c\""]);
        assert!(parse_yaml(b"a: [").is_err());
        assert_eq!(parse_yaml(b" {\"a\":1}").unwrap().value, json!({"a": 1}));
    }

    #[test]
    fn a_bomb_of_anchors_is_refused() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..12 {
            let alias = format!("*a{}", level - 1);
            text.push_str(&format!(
                "a{level}: &a{level} [{}]\n",
                [alias.as_str(); 10].join(",")
            ));
        }
        assert!(parse_yaml(text.as_bytes()).is_err());
        assert!(parse_json("[".repeat(100_000).as_bytes()).is_err());
    }
}

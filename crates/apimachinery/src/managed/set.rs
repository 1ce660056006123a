//! Sets of fields: the tree behind `fieldsV1`.
//!
//! A path element is kept in its written form (`f:name`, `k:{"name":"a"}`, `v:"x"`, `i:0`), made
//! canonical when it is read: two elements are the same if their texts are.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{Schema, definitions::Shape};

/// Deeper than this no set is read: what a client sends as `managedFields` is bounded.
const MAX_DEPTH: usize = 64;

/// One step of a path, in its written form.
pub(crate) type Element = Box<str>;

/// A set of paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    nodes: BTreeMap<Element, Node>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Node {
    /// The path that ends here is in the set.
    member: bool,
    children: FieldSet,
}

impl FieldSet {
    /// Whether no path is in the set.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Whether the path of one element is in the set.
    pub(crate) fn has(&self, element: &str) -> bool {
        self.nodes.get(element).is_some_and(|node| node.member)
    }

    /// What is below an element.
    pub(crate) fn below(&self, element: &str) -> Option<&FieldSet> {
        let children = &self.nodes.get(element)?.children;
        (!children.is_empty()).then_some(children)
    }

    /// Adds the path of one element.
    pub(crate) fn add(&mut self, element: Element) {
        self.nodes.entry(element).or_default().member = true;
    }

    /// Adds paths below an element.
    pub(crate) fn add_below(&mut self, element: Element, set: &FieldSet) {
        if set.is_empty() {
            return;
        }
        let node = self.nodes.entry(element).or_default();
        node.children = std::mem::take(&mut node.children).union(set);
    }

    /// Paths that are in either set.
    #[must_use]
    pub fn union(mut self, other: &FieldSet) -> FieldSet {
        for (element, node) in &other.nodes {
            let mine = self.nodes.entry(element.clone()).or_default();
            mine.member |= node.member;
            mine.children = std::mem::take(&mut mine.children).union(&node.children);
        }
        self
    }

    fn combine(&self, other: &FieldSet, keep: fn(bool, bool) -> bool) -> FieldSet {
        static NOTHING: Node = Node {
            member: false,
            children: FieldSet {
                nodes: BTreeMap::new(),
            },
        };
        let mut out = FieldSet::default();
        for (element, node) in &self.nodes {
            let theirs = other.nodes.get(element).unwrap_or(&NOTHING);
            let member = keep(node.member, theirs.member);
            let children = node.children.combine(&theirs.children, keep);
            if member || !children.is_empty() {
                out.nodes.insert(element.clone(), Node { member, children });
            }
        }
        out
    }

    /// Paths of this set that are not in the other.
    #[must_use]
    pub fn difference(&self, other: &FieldSet) -> FieldSet {
        self.combine(other, |mine, theirs| mine && !theirs)
    }

    /// Paths that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        self.combine(other, |mine, theirs| mine && theirs)
    }

    /// Only what begins with an element, or only the rest.
    pub(crate) fn filter(&mut self, keep: impl Fn(&str) -> bool) {
        self.nodes.retain(|element, _| keep(element));
    }

    /// The set with every named field that leads to a path: what an object has by having the path.
    #[must_use]
    pub(crate) fn with_named_fields(&self, schema: Option<&Schema>) -> FieldSet {
        let mut out = FieldSet::default();
        for (element, node) in &self.nodes {
            let field = element.strip_prefix("f:");
            let below = schema.and_then(|schema| match field {
                Some(name) => schema.property(name),
                None => schema.items(),
            });
            let named = field.zip(schema).is_some_and(|(name, schema)| {
                schema.shape() == Shape::Object && schema.properties().any(|(n, _)| n == name)
            });
            let children = node.children.with_named_fields(below);
            let member = node.member || (named && !children.is_empty());
            out.nodes.insert(element.clone(), Node { member, children });
        }
        out
    }

    /// All paths, as errors write them: `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect(&mut String::new(), &mut out);
        out
    }

    fn collect(&self, path: &mut String, out: &mut Vec<String>) {
        let length = path.len();
        for (element, node) in &self.nodes {
            push_shown(path, element);
            if node.member {
                out.push(path.clone());
            }
            node.children.collect(path, out);
            path.truncate(length);
        }
    }

    /// The form of `fieldsV1`.
    pub fn to_value(&self) -> Value {
        let nodes = self.nodes.iter().map(|(element, node)| {
            let mut value = node.children.to_value();
            if node.member
                && !node.children.is_empty()
                && let Some(fields) = value.as_object_mut()
            {
                fields.insert(".".into(), Value::Object(Map::new()));
            }
            (element.to_string(), value)
        });
        Value::Object(nodes.collect())
    }

    /// Reads `fieldsV1`. `None`: it is not of that form.
    pub fn from_value(value: &Value) -> Option<FieldSet> {
        Self::read(value, 0)
    }

    fn read(value: &Value, depth: usize) -> Option<FieldSet> {
        if depth > MAX_DEPTH {
            return None;
        }
        let mut out = FieldSet::default();
        for (key, value) in value.as_object()? {
            if key == "." {
                continue;
            }
            let fields = value.as_object()?;
            let member = fields.is_empty() || fields.contains_key(".");
            let children = Self::read(value, depth + 1)?;
            out.nodes.insert(canonical(key)?, Node { member, children });
        }
        Some(out)
    }
}

/// The element of a named field.
pub(crate) fn field(name: &str) -> Element {
    format!("f:{name}").into()
}

/// The element of a value in a set.
pub(crate) fn value(value: &Value) -> Element {
    format!("v:{}", plain(value)).into()
}

/// The element of an item that is told by some of its fields.
pub(crate) fn key(fields: &Map<String, Value>) -> Element {
    let fields: BTreeMap<&str, Value> = fields.iter().map(|(k, v)| (&**k, plain(v))).collect();
    let text = serde_json::to_string(&fields).unwrap_or_default();
    format!("k:{text}").into()
}

/// Whole numbers without a fraction: `1.0` and `1` are one value.
#[expect(
    clippy::cast_possible_truncation,
    reason = "only whole numbers in the range of i64"
)]
fn plain(value: &Value) -> Value {
    match value.as_f64() {
        Some(n) if value.is_f64() && n.fract() == 0.0 && n.abs() < 9e15 => (n as i64).into(),
        _ => value.clone(),
    }
}

fn canonical(text: &str) -> Option<Element> {
    let (kind, rest) = text.split_once(':')?;
    match kind {
        "f" => Some(text.into()),
        "i" => rest.parse::<i64>().ok().map(|_| text.into()),
        "v" => Some(value(&serde_json::from_str(rest).ok()?)),
        "k" => match serde_json::from_str(rest).ok()? {
            Value::Object(fields) if !fields.is_empty() => Some(key(&fields)),
            _ => None,
        },
        _ => None,
    }
}

fn push_shown(path: &mut String, element: &str) {
    let (kind, rest) = element.split_once(':').unwrap_or(("f", element));
    match kind {
        "f" => {
            path.push('.');
            path.push_str(rest);
        }
        "k" => {
            let fields: Map<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let fields: Vec<String> = fields.iter().map(|(k, v)| format!("{k}={v}")).collect();
            path.push_str(&format!("[{}]", fields.join(",")));
        }
        "v" => path.push_str(&format!("[={rest}]")),
        _ => path.push_str(&format!("[{rest}]")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(value: Value) -> FieldSet {
        FieldSet::from_value(&value).unwrap()
    }

    #[test]
    fn the_written_form_is_read_back() {
        let written = json!({
            "f:metadata": {"f:labels": {".": {}, "f:a": {}}},
            "f:spec": {
                "f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:port": {}}},
                "f:names": {"v:\"x\"": {}},
                "f:list": {"i:3": {}},
            },
        });
        assert_eq!(set(written.clone()).to_value(), written);
    }

    #[test]
    fn keys_are_the_same_in_any_order() {
        assert_eq!(
            set(json!({"k:{\"b\":1.0,\"a\":\"x\"}": {}})),
            set(json!({"k:{\"a\":\"x\", \"b\":1}": {}}))
        );
    }

    #[test]
    fn what_is_no_set_is_refused() {
        for bad in [
            json!([]),
            json!({"x": {}}),
            json!({"f:a": 1}),
            json!({"k:{}": {}}),
            json!({"k:[1]": {}}),
            json!({"v:": {}}),
            json!({"i:x": {}}),
        ] {
            assert_eq!(FieldSet::from_value(&bad), None, "{bad}");
        }
        let mut deep = json!({});
        for _ in 0..100 {
            deep = json!({"f:a": deep});
        }
        assert_eq!(FieldSet::from_value(&deep), None);
    }

    #[test]
    fn algebra() {
        let a = set(json!({"f:x": {".": {}, "f:y": {}}, "f:z": {}}));
        let b = set(json!({"f:x": {"f:y": {}, "f:w": {}}}));
        assert_eq!(a.difference(&b), set(json!({"f:x": {}, "f:z": {}})));
        assert_eq!(a.intersection(&b), set(json!({"f:x": {"f:y": {}}})));
        assert_eq!(
            a.clone().union(&b),
            set(json!({"f:x": {".": {}, "f:y": {}, "f:w": {}}, "f:z": {}}))
        );
        assert!(a.difference(&a).is_empty());
    }

    #[test]
    fn paths_are_shown_as_upstream_shows_them() {
        let set = set(json!({"f:spec": {
            "f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}}},
            "f:args": {"v:\"-x\"": {}}, "f:l": {"i:0": {}},
        }}));
        assert_eq!(
            set.paths(),
            [
                ".spec.args[=\"-x\"]",
                ".spec.containers[name=\"c\"]",
                ".spec.containers[name=\"c\"].image",
                ".spec.l[0]",
            ]
        );
    }
}

//! Objects along their schema: which fields an object has, how two differ, one laid over another,
//! fields taken out.
//!
//! What is one field for these walks: scalars, `atomic` lists and maps, and whatever has no schema
//! but for maps of custom resources, which are taken apart. Lists with keys and sets are known by
//! the text of their items' elements.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::set::{self, Element, FieldSet};
use crate::{
    Schema,
    definitions::{ListType, Shape},
};

/// How a value is walked.
enum Atom<'a> {
    /// One field.
    Leaf,
    /// Field by field.
    Map(&'a Map<String, Value>),
    /// Item by item.
    List(&'a [Value], &'a Schema),
}

fn atom<'a>(schema: Option<&'a Schema>, value: &'a Value) -> Atom<'a> {
    match value {
        Value::Object(fields) => {
            let atomic = schema.is_none_or(|schema| {
                schema.atomic_map
                    || schema.resolve().atomic_map
                    || (schema.is_open() && !schema.separable())
            });
            if atomic {
                Atom::Leaf
            } else {
                Atom::Map(fields)
            }
        }
        Value::Array(items) => match schema {
            Some(schema)
                if schema.shape() == Shape::Array
                    && matches!(schema.list_type, Some(ListType::Map | ListType::Set)) =>
            {
                Atom::List(items, schema)
            }
            _ => Atom::Leaf,
        },
        _ => Atom::Leaf,
    }
}

/// The schema of a field of a map. Below a map without a schema there is none, but maps are still
/// taken apart.
fn property<'a>(schema: Option<&'a Schema>, name: &str) -> Option<&'a Schema> {
    let schema = schema?;
    schema
        .property(name)
        .or_else(|| schema.separable().then_some(schema))
}

/// Whether the schema names the field; keys of maps are not named.
fn is_named(schema: Option<&Schema>, name: &str) -> bool {
    schema.is_some_and(|schema| schema.properties().any(|(n, _)| n == name))
}

/// The element of a list's item; `None` if the item has none of its keys.
fn element(schema: &Schema, item: &Value) -> Option<Element> {
    if schema.list_type != Some(ListType::Map) {
        return Some(set::value(item));
    }
    let mut keys = Map::new();
    for name in &schema.list_map_keys {
        let default = || {
            schema
                .items()
                .and_then(|items| items.property(name))
                .and_then(|property| property.default.as_ref())
        };
        if let Some(value) = item.get(&**name).filter(|v| !v.is_null()).or_else(default) {
            keys.insert(name.to_string(), value.clone());
        }
    }
    (!keys.is_empty()).then(|| set::key(&keys))
}

/// The fields that an object has.
pub(crate) fn fields_of(schema: Option<&Schema>, value: &Value) -> FieldSet {
    let mut out = FieldSet::default();
    match atom(schema, value) {
        Atom::Leaf => {}
        Atom::Map(fields) => {
            for (name, value) in fields {
                let below = property(schema, name);
                let element = set::field(name);
                let empty = value.as_object().is_some_and(Map::is_empty);
                let leaf = !value.is_null() && matches!(atom(below, value), Atom::Leaf);
                if leaf || value.is_null() || empty || !is_named(schema, name) {
                    out.add(element.clone());
                }
                out.add_below(element, &fields_of(below, value));
            }
        }
        Atom::List(items, list) => {
            let mut seen: HashMap<Element, usize> = HashMap::new();
            for item in items {
                if let Some(element) = element(list, item) {
                    *seen.entry(element).or_default() += 1;
                }
            }
            for item in items {
                let Some(element) = element(list, item) else {
                    continue;
                };
                out.add(element.clone());
                if seen.get(&element) == Some(&1) {
                    out.add_below(element, &fields_of(list.items(), item));
                }
            }
        }
    }
    out
}

/// How two objects differ.
#[derive(Debug, Default)]
pub(crate) struct Difference {
    pub(crate) added: FieldSet,
    pub(crate) modified: FieldSet,
    pub(crate) removed: FieldSet,
}

/// What one step of a comparison finds: about the value itself, and below it.
#[derive(Default)]
struct Step {
    added: bool,
    modified: bool,
    removed: bool,
    below: Difference,
}

impl Difference {
    fn take(&mut self, element: &Element, step: Step) {
        for (set, member, below) in [
            (&mut self.added, step.added, step.below.added),
            (&mut self.modified, step.modified, step.below.modified),
            (&mut self.removed, step.removed, step.below.removed),
        ] {
            if member {
                set.add(element.clone());
            }
            set.add_below(element.clone(), &below);
        }
    }

    /// Keeps what begins with a field that is not to be ignored.
    pub(crate) fn filter(&mut self, keep: impl Fn(&str) -> bool) {
        self.added.filter(&keep);
        self.modified.filter(&keep);
        self.removed.filter(&keep);
    }
}

/// How `new` differs from `old`.
pub(crate) fn compare(schema: Option<&Schema>, old: &Value, new: &Value) -> Difference {
    compare_values(schema, Some(old), Some(new)).below
}

fn compare_values(schema: Option<&Schema>, old: Option<&Value>, new: Option<&Value>) -> Step {
    let mut step = Step {
        added: old.is_none(),
        removed: new.is_none(),
        ..Step::default()
    };
    let old_atom = old.map(|value| atom(schema, value));
    let new_atom = new.map(|value| atom(schema, value));
    match (old_atom, new_atom) {
        (None | Some(Atom::Map(_)), None | Some(Atom::Map(_))) => {
            let empty = Map::new();
            let old = old.and_then(Value::as_object).unwrap_or(&empty);
            let new = new.and_then(Value::as_object).unwrap_or(&empty);
            let mut names: Vec<&String> = old.keys().collect();
            names.extend(new.keys().filter(|name| !old.contains_key(*name)));
            for name in names {
                let below = property(schema, name);
                let found = compare_values(below, old.get(name), new.get(name));
                step.below.take(&set::field(name), found);
            }
        }
        (None | Some(Atom::List(..)), None | Some(Atom::List(..))) => {
            if let Some(list) = schema {
                compare_lists(list, items(old), items(new), &mut step.below);
            }
        }
        (old_atom, new_atom) => {
            if let (Some(old), Some(new)) = (old, new) {
                step.modified = !same(old, new);
                // What was taken apart on one side is gone, or is new, field by field.
                if step.modified {
                    if !matches!(old_atom, Some(Atom::Leaf)) {
                        step.below.removed = fields_of(schema, old);
                    }
                    if !matches!(new_atom, Some(Atom::Leaf)) {
                        step.below.added = fields_of(schema, new);
                    }
                }
            }
        }
    }
    step
}

fn items(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn compare_lists(list: &Schema, old: &[Value], new: &[Value], out: &mut Difference) {
    let mut order: Vec<Element> = Vec::new();
    let mut groups: HashMap<Element, (Vec<&Value>, Vec<&Value>)> = HashMap::new();
    for (is_new, items) in [(false, old), (true, new)] {
        for item in items {
            let Some(element) = element(list, item) else {
                continue;
            };
            let group = groups.entry(element.clone()).or_insert_with(|| {
                order.push(element);
                (Vec::new(), Vec::new())
            });
            if is_new {
                group.1.push(item);
            } else {
                group.0.push(item);
            }
        }
    }
    for element in order {
        let Some((old, new)) = groups.get(&element) else {
            continue;
        };
        let step = match (old.as_slice(), new.as_slice()) {
            (old @ ([] | [_]), new @ ([] | [_])) => {
                compare_values(list.items(), old.first().copied(), new.first().copied())
            }
            // Items that occur twice are one field as a whole.
            (old, new) => Step {
                added: old.is_empty(),
                removed: new.is_empty(),
                modified: !old.is_empty() && !new.is_empty() && old != new,
                ..Step::default()
            },
        };
        out.take(&element, step);
    }
}

/// Equality to which `1` and `1.0` are the same.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(_), Value::Number(_)) => a == b || a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

/// Lays a configuration over an object.
///
/// # Errors
/// The path of a list item that has none of its keys, or that occurs twice.
pub(crate) fn merge(
    schema: Option<&Schema>,
    live: &Value,
    config: &Value,
    path: &str,
) -> Result<Value, String> {
    match (atom(schema, live), atom(schema, config)) {
        (Atom::Map(old), Atom::Map(new)) => {
            let mut out = old.clone();
            for (name, value) in new {
                let below = property(schema, name);
                let path = format!("{path}.{name}");
                let merged = merge(below, old.get(name).unwrap_or(&Value::Null), value, &path)?;
                out.insert(name.clone(), merged);
            }
            Ok(Value::Object(out))
        }
        (_, Atom::Map(new)) => {
            let mut out = Map::new();
            for (name, value) in new {
                let path = format!("{path}.{name}");
                let merged = merge(property(schema, name), &Value::Null, value, &path)?;
                out.insert(name.clone(), merged);
            }
            Ok(Value::Object(out))
        }
        (live, Atom::List(new, list)) => {
            let old = match live {
                Atom::List(old, _) => old,
                _ => &[],
            };
            merge_lists(list, old, new, path)
        }
        (_, Atom::Leaf) => Ok(config.clone()),
    }
}

/// Items of the configuration keep its order; the others stay between those that they were between.
fn merge_lists(list: &Schema, old: &[Value], new: &[Value], path: &str) -> Result<Value, String> {
    let mut wanted: Vec<(Element, &Value)> = Vec::with_capacity(new.len());
    let mut names: HashSet<Element> = HashSet::new();
    for (index, item) in new.iter().enumerate() {
        let Some(element) = element(list, item) else {
            return Err(format!(
                "{path}: element {index}: associative list with keys has an element that omits \
                 key field {:?} (and doesn't have default value)",
                list.list_map_keys.first().map_or("", |key| key)
            ));
        };
        if !names.insert(element.clone()) {
            let mut shown = FieldSet::default();
            shown.add(element);
            let shown = shown.paths().concat();
            return Err(format!("{path}: duplicate entries for key {shown}"));
        }
        wanted.push((element, item));
    }
    let mut there: HashMap<Element, &Value> = HashMap::new();
    let mut live: Vec<(Option<Element>, &Value)> = Vec::with_capacity(old.len());
    for item in old {
        let element = element(list, item);
        if let Some(element) = &element {
            there.entry(element.clone()).or_insert(item);
        }
        live.push((element, item));
    }
    let mut out = Vec::with_capacity(old.len() + new.len());
    let mut live = live.into_iter().peekable();
    let mut merged: HashSet<&Element> = HashSet::new();
    let is_wanted = |element: &Option<Element>| element.as_ref().is_some_and(|e| names.contains(e));
    for (element, item) in &wanted {
        // What is not wanted and stands before the next wanted item stays before it.
        while let Some((next, other)) = live.next_if(|(next, _)| {
            !is_wanted(next) || next.as_ref().is_some_and(|next| merged.contains(next))
        }) {
            if !is_wanted(&next) {
                out.push(other.clone());
            }
        }
        live.next_if(|(next, _)| next.as_ref() == Some(element));
        let base = there.get(element).copied().unwrap_or(&Value::Null);
        out.push(merge(list.items(), base, item, path)?);
        merged.insert(element);
    }
    for (element, item) in live {
        if !is_wanted(&element) {
            out.push(item.clone());
        }
    }
    Ok(Value::Array(out))
}

/// The object without the fields of a set. What was emptied by that is null.
pub(crate) fn remove(schema: Option<&Schema>, value: &Value, fields: &FieldSet) -> Value {
    match atom(schema, value) {
        Atom::Leaf => value.clone(),
        Atom::Map(map) => {
            let mut out = Map::new();
            for (name, value) in map {
                let element = set::field(name);
                if fields.has(&element) {
                    continue;
                }
                let value = match fields.below(&element) {
                    Some(below) => remove(property(schema, name), value, below),
                    None => value.clone(),
                };
                out.insert(name.clone(), value);
            }
            if out.is_empty() && !map.is_empty() {
                Value::Null
            } else {
                Value::Object(out)
            }
        }
        Atom::List(items, list) => {
            let mut out = Vec::new();
            for item in items {
                let element = element(list, item);
                if element.as_ref().is_some_and(|element| fields.has(element)) {
                    continue;
                }
                out.push(match element.and_then(|e| fields.below(&e).cloned()) {
                    Some(below) => remove(list.items(), item, &below),
                    None => item.clone(),
                });
            }
            if out.is_empty() && !items.is_empty() {
                Value::Null
            } else {
                Value::Array(out)
            }
        }
    }
}

/// Takes out fields that are null, at every depth of maps.
pub(crate) fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

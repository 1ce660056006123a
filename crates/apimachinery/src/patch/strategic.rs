//! Strategic merge patch: a merge patch that knows which lists are merged by which key.
//!
//! Directives in a patch: `$patch: replace|delete|merge` for the object it stands in,
//! `$retainKeys: [...]` keeps only those fields, `$deleteFromPrimitiveList/F: [...]` removes values
//! from list `F`, `$setElementOrder/F: [...]` orders the merged list `F`.

use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::Schema;

use super::PatchError;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const SET_ORDER: &str = "$setElementOrder/";

/// Applies a strategic merge patch to an object of the schema's kind.
///
/// # Errors
/// [`PatchError::Malformed`].
pub fn strategic_merge_patch(
    object: &Value,
    patch: &Value,
    schema: &Schema,
) -> Result<Value, PatchError> {
    let Value::Object(patch) = patch else {
        return Err(malformed("a strategic merge patch must be an object"));
    };
    let empty = Map::new();
    let original = object.as_object().unwrap_or(&empty);
    merge_object(original, patch, Some(schema)).map(Value::Object)
}

fn malformed(text: impl Into<String>) -> PatchError {
    PatchError::Malformed(text.into())
}

fn merge_object(
    original: &Map<String, Value>,
    patch: &Map<String, Value>,
    schema: Option<&Schema>,
) -> Result<Map<String, Value>, PatchError> {
    match patch.get(PATCH).map(|directive| directive.as_str()) {
        None | Some(Some("merge")) => {}
        Some(Some("replace")) => return Ok(strip(patch)),
        Some(Some("delete")) => return Ok(Map::new()),
        Some(other) => {
            return Err(malformed(format!(
                "Unknown patch type found: {}",
                other.unwrap_or("<not a string>")
            )));
        }
    }
    let mut out = original.clone();
    if let Some(keys) = patch.get(RETAIN_KEYS) {
        let keys = keys
            .as_array()
            .ok_or_else(|| malformed("invalid patch format of retainKeys"))?;
        for key in patch.keys().filter(|key| !key.starts_with('$')) {
            // A field that is set and not retained contradicts itself; one that is set to null is
            // being removed.
            if !patch[key].is_null() && !keys.iter().any(|k| k == key) {
                return Err(malformed("patch has a field that is not in retainKeys"));
            }
        }
        out.retain(|key, _| keys.iter().any(|k| k == key));
    }
    for (key, values) in patch {
        let Some(field) = key.strip_prefix(DELETE_FROM) else {
            continue;
        };
        let values = values
            .as_array()
            .ok_or_else(|| malformed("invalid patch format of primitive list"))?;
        if let Some(Value::Array(list)) = out.get_mut(field) {
            list.retain(|value| !values.contains(value));
        }
    }
    for (key, change) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        let schema = schema.and_then(|schema| schema.property(key));
        let order = patch.get(&format!("{SET_ORDER}{key}"));
        match (out.remove(key), change) {
            (_, Value::Null) => {}
            (Some(Value::Object(old)), Value::Object(change)) => {
                let replaced = change.get(PATCH).is_some_and(|d| d == "delete");
                if !replaced {
                    out.insert(key.clone(), merge_object(&old, change, schema)?.into());
                }
            }
            (_, Value::Object(change)) => {
                if change.get(PATCH).is_none_or(|d| d != "delete") {
                    out.insert(
                        key.clone(),
                        merge_object(&Map::new(), change, schema)?.into(),
                    );
                }
            }
            (old, Value::Array(change)) => {
                let merged = match schema.filter(|schema| schema.merge) {
                    Some(schema) => {
                        let old = match old {
                            Some(Value::Array(old)) => old,
                            _ => Vec::new(),
                        };
                        merge_list(&old, change, schema, order)?
                    }
                    None => change.iter().map(strip_value).collect(),
                };
                out.insert(key.clone(), merged.into());
            }
            (_, change) => {
                out.insert(key.clone(), change.clone());
            }
        }
    }
    // An order may come alone, for a list that only changes its order.
    for (key, order) in patch {
        let Some(field) = key.strip_prefix(SET_ORDER) else {
            continue;
        };
        if patch.contains_key(field) {
            continue;
        }
        let schema = schema.and_then(|schema| schema.property(field));
        if let (Some(Value::Array(list)), Some(schema)) = (out.get_mut(field), schema) {
            let now = std::mem::take(list);
            *list = reorder(now, order, schema.merge_key.as_deref(), &[])?;
        }
    }
    Ok(out)
}

/// The object without its directives, as it is when it replaces something.
fn strip(patch: &Map<String, Value>) -> Map<String, Value> {
    patch
        .iter()
        .filter(|(key, value)| !key.starts_with('$') && !value.is_null())
        .map(|(key, value)| (key.clone(), strip_value(value)))
        .collect()
}

fn strip_value(value: &Value) -> Value {
    match value {
        Value::Object(object) => strip(object).into(),
        Value::Array(values) => values.iter().map(strip_value).collect(),
        other => other.clone(),
    }
}

fn merge_list(
    old: &[Value],
    patch: &[Value],
    schema: &Schema,
    order: Option<&Value>,
) -> Result<Vec<Value>, PatchError> {
    let Some(key) = schema.merge_key.as_deref() else {
        // Plain values: a set.
        let mut out = old.to_vec();
        for value in patch {
            if !out.contains(value) {
                out.push(value.clone());
            }
        }
        return match order {
            Some(order) => reorder(out, order, None, old),
            None => Ok(out),
        };
    };
    let directive = |item: &Value| item.get(PATCH).and_then(Value::as_str).map(str::to_owned);
    if patch
        .iter()
        .any(|item| directive(item).as_deref() == Some("replace"))
    {
        // One such item makes the others the whole list; itself it may be only the mark.
        return Ok(patch
            .iter()
            .filter_map(|item| {
                let stripped = strip_value(item);
                let is_mark =
                    item.get(PATCH).is_some() && stripped.as_object().is_some_and(Map::is_empty);
                (!is_mark).then_some(stripped)
            })
            .collect());
    }
    let items = schema.items();
    let mut out = old.to_vec();
    for item in patch {
        let change = item.as_object().ok_or_else(|| {
            malformed("invalid patch: a list that is merged by key must hold objects")
        })?;
        let value = change.get(key).ok_or_else(|| {
            malformed(format!(
                "map: {item} does not contain declared merge key: {key}"
            ))
        })?;
        let same = |candidate: &Value| candidate.get(key) == Some(value);
        match directive(item).as_deref() {
            Some("delete") => out.retain(|candidate| !same(candidate)),
            None | Some("merge") => match out.iter_mut().find(|candidate| same(candidate)) {
                Some(found) => {
                    let empty = Map::new();
                    let before = found.as_object().unwrap_or(&empty);
                    *found = merge_object(before, change, items)?.into();
                }
                None => out.push(merge_object(&Map::new(), change, items)?.into()),
            },
            Some(other) => return Err(malformed(format!("Unknown patch type found: {other}"))),
        }
    }
    match order {
        Some(order) => reorder(out, order, Some(key), old),
        None => Ok(out),
    }
}

/// Puts the items of `order` in that order. Items that are not in it were added by others: each
/// stays behind the item it followed on the server.
fn reorder(
    list: Vec<Value>,
    order: &Value,
    key: Option<&str>,
    old: &[Value],
) -> Result<Vec<Value>, PatchError> {
    let order = order
        .as_array()
        .ok_or_else(|| malformed("invalid patch format of setElementOrder list"))?;
    let id = |item: &Value| -> String {
        match key {
            Some(key) => item.get(key).unwrap_or(&Value::Null).to_string(),
            None => item.to_string(),
        }
    };
    let wanted: Vec<String> = order.iter().map(id).collect();
    let known: HashSet<&String> = wanted.iter().collect();
    if known.len() < wanted.len() {
        return Err(malformed("setElementOrder list has duplicates"));
    }
    let before: Vec<String> = if old.is_empty() {
        list.iter().map(id).collect()
    } else {
        old.iter().map(id).collect()
    };
    let mut named: Vec<Option<Value>> = vec![None; wanted.len()];
    let mut others = Vec::new();
    for item in list {
        let item_id = id(&item);
        match wanted.iter().position(|w| *w == item_id) {
            Some(at) => named[at] = Some(item),
            None => others.push((item_id, item)),
        }
    }
    let mut out: Vec<(String, Value)> = wanted
        .into_iter()
        .zip(named)
        .filter_map(|(id, item)| item.map(|item| (id, item)))
        .collect();
    for (item_id, item) in others {
        let previous = before.iter().position(|b| *b == item_id).and_then(|at| {
            before[..at]
                .iter()
                .rev()
                .find_map(|b| out.iter().position(|(id, _)| id == b))
        });
        let at = match (previous, before.contains(&item_id)) {
            (Some(previous), _) => previous + 1,
            (None, true) => 0,
            (None, false) => out.len(),
        };
        out.insert(at, (item_id, item));
    }
    Ok(out.into_iter().map(|(_, item)| item).collect())
}

#[cfg(test)]
mod tests;

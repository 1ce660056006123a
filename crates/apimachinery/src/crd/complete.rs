//! Pruning and defaulting.

use serde_json::{Map, Value};

use super::structural::{Additional, Structural};

/// Fields of the envelope of every object.
const ENVELOPE: [&str; 3] = ["apiVersion", "kind", "metadata"];

impl Structural {
    /// The schema of a field; `None` with `Some(())` beside it if anything goes.
    fn field(&self, name: &str) -> Known<'_> {
        if let Some(schema) = self.properties.get(name) {
            return Known::As(schema);
        }
        match &self.additional {
            Additional::Schema(schema) => Known::As(schema),
            Additional::Any => Known::Anything,
            Additional::None if self.preserve => Known::Anything,
            Additional::None => Known::Not,
        }
    }

    /// Takes out fields that the schema does not know, and tells their paths.
    pub(super) fn prune(
        &self,
        value: &mut Value,
        root: bool,
        path: &mut String,
        gone: &mut Vec<String>,
    ) {
        let length = path.len();
        match value {
            Value::Object(fields) => {
                let envelope = root || self.embedded;
                fields.retain(|name, value| {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(name);
                    let keep = if envelope && ENVELOPE.contains(&name.as_str()) {
                        true
                    } else {
                        match self.field(name) {
                            Known::As(schema) => {
                                schema.prune(value, false, path, gone);
                                true
                            }
                            Known::Anything => true,
                            Known::Not => {
                                gone.push(path.clone());
                                false
                            }
                        }
                    };
                    path.truncate(length);
                    keep
                });
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    for (index, item) in items.iter_mut().enumerate() {
                        path.push_str(&format!("[{index}]"));
                        schema.prune(item, false, path, gone);
                        path.truncate(length);
                    }
                }
            }
            _ => {}
        }
    }

    /// Fills in defaults. A null that the schema does not allow is as if it were not there.
    pub(super) fn complete(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, schema) in &self.properties {
                    let replace = match fields.get(name) {
                        None => schema.default.is_some(),
                        Some(Value::Null) => !schema.nullable && schema.default.is_some(),
                        Some(_) => false,
                    };
                    if replace && let Some(default) = &schema.default {
                        fields.insert(name.clone(), default.clone());
                    }
                    if let Some(value) = fields.get_mut(name) {
                        schema.complete(value);
                    }
                }
                if let Additional::Schema(schema) = &self.additional {
                    let others = fields
                        .iter_mut()
                        .filter(|(name, _)| !self.properties.contains_key(*name));
                    for (_, value) in others {
                        if value.is_null()
                            && !schema.nullable
                            && let Some(default) = &schema.default
                        {
                            *value = default.clone();
                        }
                        schema.complete(value);
                    }
                }
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    for item in items {
                        if item.is_null()
                            && !schema.nullable
                            && let Some(default) = &schema.default
                        {
                            *item = default.clone();
                        }
                        schema.complete(item);
                    }
                }
            }
            _ => {}
        }
    }

    /// Takes out nulls of fields that may not be null and have no default: upstream prunes them.
    pub(super) fn drop_nulls(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                self.drop_nulls_of(fields);
            }
            Value::Array(items) => {
                if let Some(schema) = &self.items {
                    items.iter_mut().for_each(|item| schema.drop_nulls(item));
                }
            }
            _ => {}
        }
    }

    fn drop_nulls_of(&self, fields: &mut Map<String, Value>) {
        for (name, schema) in &self.properties {
            if fields.get(name).is_some_and(Value::is_null)
                && !schema.nullable
                && schema.default.is_some()
            {
                fields.remove(name);
            }
            if let Some(value) = fields.get_mut(name) {
                schema.drop_nulls(value);
            }
        }
    }
}

enum Known<'a> {
    As(&'a Structural),
    Anything,
    Not,
}

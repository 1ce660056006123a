//! `metadata.managedFields`: managers with their sets.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::set::FieldSet;
use crate::meta;

/// More managers that update than this are not kept apart.
const MAX_UPDATERS: usize = 10;
/// Under this name go the fields of those that were there first.
const ANCIENT: &str = "ancient-changes";

/// How a manager came to its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// By server-side apply: what it no longer applies goes.
    Apply,
    /// By any other write.
    Update,
}

impl Operation {
    fn text(self) -> &'static str {
        match self {
            Self::Apply => "Apply",
            Self::Update => "Update",
        }
    }
}

/// Who manages fields. One that applies is the same in all versions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Manager {
    /// How.
    pub operation: Operation,
    /// Name.
    pub name: String,
    /// Version of an update; empty for apply.
    pub api_version: String,
    /// Subresource that was written; empty for the object itself.
    pub subresource: String,
}

impl Manager {
    /// As conflicts name it.
    pub fn shown(&self) -> String {
        let mut out = format!("{:?}", self.name);
        if !self.subresource.is_empty() {
            out.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == Operation::Update {
            out.push_str(&format!(" using {}", self.api_version));
        }
        out
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Owned {
    pub(crate) fields: FieldSet,
    pub(crate) api_version: String,
    /// RFC 3339.
    pub(crate) time: String,
}

/// All managers of an object.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Managers(pub(crate) BTreeMap<Manager, Owned>);

impl Managers {
    /// Reads `managedFields`. `None`: an entry is not as it should be.
    pub fn read(value: &Value) -> Option<Self> {
        let mut out = BTreeMap::new();
        for entry in value.as_array()? {
            let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
            let operation = match entry["operation"].as_str()? {
                "Apply" => Operation::Apply,
                "Update" => Operation::Update,
                _ => return None,
            };
            let fields = match &entry["fieldsV1"] {
                Value::Null => FieldSet::default(),
                value => FieldSet::from_value(value)?,
            };
            if !matches!(entry["fieldsType"].as_str(), Some("FieldsV1")) {
                return None;
            }
            let api_version = text("apiVersion");
            let manager = Manager {
                operation,
                name: text("manager"),
                api_version: match operation {
                    Operation::Apply => String::new(),
                    Operation::Update => api_version.clone(),
                },
                subresource: text("subresource"),
            };
            let owned = Owned {
                fields,
                api_version,
                time: text("time"),
            };
            match out.entry(manager) {
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(owned);
                }
                std::collections::btree_map::Entry::Occupied(mut place) => {
                    let before: &mut Owned = place.get_mut();
                    before.fields = std::mem::take(&mut before.fields).union(&owned.fields);
                    before.time = std::mem::take(&mut before.time).max(owned.time);
                }
            }
        }
        Some(Self(out))
    }

    /// The managers of a stored object; none if it has none that can be read.
    pub fn of(object: &Value) -> Self {
        Self::read(&object["metadata"]["managedFields"]).unwrap_or_default()
    }

    /// Whether nobody manages anything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The fields of a manager.
    pub fn fields(&self, manager: &Manager) -> Option<&FieldSet> {
        self.0.get(manager).map(|owned| &owned.fields)
    }

    /// Everything that somebody manages.
    pub(crate) fn all_fields(&self) -> FieldSet {
        self.0
            .values()
            .fold(FieldSet::default(), |all, owned| all.union(&owned.fields))
    }

    /// Joins the oldest of too many managers that update.
    pub(crate) fn cap(&mut self) {
        let updaters = |all: &BTreeMap<Manager, Owned>| {
            let mut out: Vec<(String, Manager)> = all
                .iter()
                .filter(|(manager, _)| manager.operation == Operation::Update)
                .map(|(manager, owned)| (owned.time.clone(), manager.clone()))
                .collect();
            out.sort();
            out
        };
        let listed = updaters(&self.0);
        if listed.len() <= MAX_UPDATERS {
            return;
        }
        // One place is needed for those that are joined, in each of their versions.
        let mut rest = listed.len();
        for (_, manager) in listed {
            if rest <= MAX_UPDATERS {
                break;
            }
            if manager.name == ANCIENT {
                continue;
            }
            let Some(owned) = self.0.remove(&manager) else {
                continue;
            };
            rest -= 1;
            let bucket = Manager {
                name: ANCIENT.into(),
                subresource: String::new(),
                ..manager
            };
            if let Some(before) = self.0.get_mut(&bucket) {
                before.fields = std::mem::take(&mut before.fields).union(&owned.fields);
                before.time = std::mem::take(&mut before.time).max(owned.time);
            } else {
                self.0.insert(bucket, owned);
                rest += 1;
            }
        }
    }

    /// The wire form, in upstream's order.
    pub fn to_value(&self) -> Value {
        let mut entries: Vec<(&Manager, &Owned)> = self.0.iter().collect();
        entries.sort_by(|(a, x), (b, y)| {
            (
                a.operation,
                &x.time,
                &a.name,
                &x.api_version,
                &a.subresource,
            )
                .cmp(&(
                    b.operation,
                    &y.time,
                    &b.name,
                    &y.api_version,
                    &b.subresource,
                ))
        });
        let entries = entries.into_iter().map(|(manager, owned)| {
            let mut out = Map::new();
            out.insert("manager".into(), manager.name.as_str().into());
            out.insert("operation".into(), manager.operation.text().into());
            out.insert("apiVersion".into(), owned.api_version.as_str().into());
            if !owned.time.is_empty() {
                out.insert("time".into(), owned.time.as_str().into());
            }
            out.insert("fieldsType".into(), "FieldsV1".into());
            out.insert("fieldsV1".into(), owned.fields.to_value());
            if !manager.subresource.is_empty() {
                out.insert("subresource".into(), manager.subresource.as_str().into());
            }
            Value::Object(out)
        });
        entries.collect()
    }

    /// Puts the wire form into an object.
    pub fn write(&self, object: &mut Value) {
        if self.is_empty() {
            meta::remove(object, "managedFields");
        } else {
            meta::set(object, "managedFields", self.to_value());
        }
    }
}

/// Whether what a client sent is the wish to forget all managers: one entry without content.
pub(crate) fn is_reset(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|entries| entries.len() == 1 && entries[0] == json!({}))
}

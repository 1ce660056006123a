//! Recording writes, and server-side apply.

use std::sync::OnceLock;

use serde_json::{Value, json};

use super::{
    entries::{Manager, Managers, Operation, Owned, is_reset},
    set::FieldSet,
    typed,
};
use crate::{Schema, meta};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The manager whose client-side apply is taken over by its server-side apply.
const KUBECTL: &str = "kubectl";
/// Manager of what an object had before anybody's fields were tracked.
const BEFORE: &str = "before-first-apply";

/// Who writes.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// Name of the manager.
    pub manager: &'a str,
    /// Version in which it writes.
    pub api_version: &'a str,
    /// Subresource, or empty.
    pub subresource: &'a str,
    /// RFC 3339.
    pub time: &'a str,
    /// Fields at the top of the object that this write does not reach.
    pub ignored: fn(&str) -> bool,
}

impl Writer<'_> {
    fn manager(&self, operation: Operation) -> Manager {
        Manager {
            operation,
            name: self.manager.to_owned(),
            api_version: match operation {
                Operation::Apply => String::new(),
                Operation::Update => self.api_version.to_owned(),
            },
            subresource: self.subresource.to_owned(),
        }
    }

    /// Whether paths that begin with an element count.
    fn counts(&self, element: &str) -> bool {
        element
            .strip_prefix("f:")
            .is_none_or(|name| !(self.ignored)(name))
    }
}

/// One field that another manager has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Who has it.
    pub manager: Manager,
    /// The field, `.spec.replicas`.
    pub field: String,
}

/// Why a configuration is not applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Others manage some of the fields, with other values.
    #[error("Apply failed with {}", shown(.0))]
    Conflicts(Vec<Conflict>),
    /// The configuration itself is wrong.
    #[error("{0}")]
    Malformed(String),
}

fn shown(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!(
            "1 conflict: conflict with {}: {}",
            one.manager.shown(),
            one.field
        );
    }
    let mut out = format!("{} conflicts: ", conflicts.len());
    let mut before: Option<&Manager> = None;
    for conflict in conflicts {
        if before != Some(&conflict.manager) {
            if before.is_some() {
                out.push('\n');
            }
            out.push_str(&format!("conflicts with {}:", conflict.manager.shown()));
            before = Some(&conflict.manager);
        }
        out.push_str(&format!("\n- {}", conflict.field));
    }
    out
}

/// An applied configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// The object, without its managers.
    pub object: Value,
    /// The managers as they are then.
    pub managers: Managers,
}

/// Without the fields that nobody manages.
fn stripped(fields: &FieldSet) -> FieldSet {
    static UNMANAGED: OnceLock<FieldSet> = OnceLock::new();
    fields.difference(UNMANAGED.get_or_init(unmanaged))
}

fn unmanaged() -> FieldSet {
    let nothing = json!({});
    let of_metadata: serde_json::Map<String, Value> = [
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "clusterName",
        "generation",
        "managedFields",
        "resourceVersion",
    ]
    .into_iter()
    .map(|name| (format!("f:{name}"), nothing.clone()))
    .chain([(".".to_owned(), nothing.clone())])
    .collect();
    let out = json!({"f:apiVersion": {}, "f:kind": {}, "f:metadata": of_metadata});
    FieldSet::from_value(&out).unwrap_or_default()
}

/// An object without its managers.
fn bare(object: &Value) -> Value {
    let mut out = object.clone();
    meta::remove(&mut out, "managedFields");
    out
}

/// What there is to compare with before an object is there.
fn nothing(object: &Value) -> Value {
    json!({"apiVersion": object["apiVersion"], "kind": object["kind"]})
}

/// Takes from all other managers what has changed. Returns what they lost by a change of value.
fn take_over(
    managers: &mut Managers,
    difference: &typed::Difference,
    own: &Manager,
) -> Vec<(Manager, FieldSet)> {
    let changed = difference.modified.clone().union(&difference.added);
    let mut lost = Vec::new();
    managers.0.retain(|manager, owned| {
        if manager == own {
            return true;
        }
        let conflict = owned.fields.intersection(&changed);
        owned.fields = owned
            .fields
            .difference(&conflict)
            .difference(&difference.removed);
        if !conflict.is_empty() {
            lost.push((manager.clone(), conflict));
        }
        !owned.fields.is_empty()
    });
    lost
}

/// Records a write. `old` is the stored object, nothing if the write makes it; `new` is what will
/// be stored, with the `managedFields` that the client sent. Its managers are returned.
///
/// An object that was stored before managers were recorded, or whose managers a client has
/// removed, stays without.
pub fn update(schema: &Schema, old: Option<&Value>, new: &Value, writer: &Writer<'_>) -> Managers {
    let sent = &new["metadata"]["managedFields"];
    let live = || old.map(Managers::of).unwrap_or_default();
    let mut managers = if !writer.subresource.is_empty() {
        live()
    } else if is_reset(sent) {
        Managers::default()
    } else {
        Managers::read(sent)
            .filter(|managers| !managers.is_empty())
            .unwrap_or_else(live)
    };
    if managers.is_empty() && old.is_some() {
        return managers;
    }
    // The managers of both are compared too, as one field; it is nobody's.
    match old {
        Some(old) => record(schema, old, new, writer, &mut managers),
        None => record(schema, &nothing(new), new, writer, &mut managers),
    }
    managers
}

fn record(
    schema: &Schema,
    before: &Value,
    after: &Value,
    writer: &Writer<'_>,
    managers: &mut Managers,
) {
    let own = writer.manager(Operation::Update);
    let mut difference = typed::compare(Some(schema), before, after);
    difference.filter(|element| writer.counts(element));
    // Under a name that nobody has, so that the writer's own fields count as those of the others:
    // it keeps what it has and takes what it changes.
    take_over(
        managers,
        &difference,
        &Manager {
            name: String::new(),
            ..own.clone()
        },
    );
    let taken = stripped(&difference.modified.union(&difference.added));
    for owned in managers.0.values_mut() {
        owned.fields = stripped(&owned.fields);
    }
    managers.0.retain(|_, owned| !owned.fields.is_empty());
    if taken.is_empty() {
        return;
    }
    let entry = managers.0.entry(own).or_insert_with(|| Owned {
        fields: FieldSet::default(),
        api_version: writer.api_version.to_owned(),
        time: String::new(),
    });
    entry.fields = std::mem::take(&mut entry.fields).union(&taken);
    writer.time.clone_into(&mut entry.time);
    managers.cap();
}

/// Lays a configuration over an object. `live` is the stored object, nothing if there is none.
///
/// # Errors
/// [`ApplyError`].
pub fn apply(
    schema: &Schema,
    live: Option<&Value>,
    config: &Value,
    writer: &Writer<'_>,
    force: bool,
) -> Result<Applied, ApplyError> {
    let managed = live.map(Managers::of).unwrap_or_default();
    let mut config = bare(config);
    typed::without_nulls(&mut config);
    let before = live.map_or_else(|| nothing(&config), bare);
    let mut managers = managed;
    if managers.is_empty() && live.is_some() {
        let first = Writer {
            manager: BEFORE,
            subresource: "",
            ignored: |_| false,
            ..*writer
        };
        record(schema, &nothing(&before), &before, &first, &mut managers);
    }
    let first_try = apply_to(schema, &before, &config, writer, &managers, force);
    match first_try {
        Err(ApplyError::Conflicts(conflicts)) if writer.manager == KUBECTL => {
            // What kubectl's client-side apply has set is kubectl's own.
            let allowed = last_applied_fields(schema, &before);
            let all_allowed = allowed.is_some_and(|allowed| {
                let allowed = allowed.paths();
                conflicts.iter().all(|c| allowed.contains(&c.field))
            });
            if all_allowed {
                apply_to(schema, &before, &config, writer, &managers, true)
            } else {
                Err(ApplyError::Conflicts(conflicts))
            }
        }
        other => other,
    }
}

fn apply_to(
    schema: &Schema,
    before: &Value,
    config: &Value,
    writer: &Writer<'_>,
    managers: &Managers,
    force: bool,
) -> Result<Applied, ApplyError> {
    let own = writer.manager(Operation::Apply);
    let mut merged =
        typed::merge(Some(schema), before, config, "").map_err(ApplyError::Malformed)?;
    typed::without_nulls(&mut merged);
    let mut set = typed::fields_of(Some(schema), config);
    set.filter(|element| writer.counts(element));
    let mut managers = managers.clone();
    let last = managers.0.insert(
        own.clone(),
        Owned {
            fields: set,
            api_version: writer.api_version.to_owned(),
            time: writer.time.to_owned(),
        },
    );
    let object = match &last {
        Some(last) => prune(schema, &merged, &managers, &last.fields),
        None => merged,
    };
    let mut difference = typed::compare(Some(schema), before, &object);
    difference.filter(|element| writer.counts(element));
    let lost = take_over(&mut managers, &difference, &own);
    if !force && !lost.is_empty() {
        let conflicts = lost.into_iter().flat_map(|(manager, fields)| {
            fields.paths().into_iter().map(move |field| Conflict {
                manager: manager.clone(),
                field,
            })
        });
        return Err(ApplyError::Conflicts(conflicts.collect()));
    }
    for owned in managers.0.values_mut() {
        owned.fields = stripped(&owned.fields);
    }
    managers.0.retain(|_, owned| !owned.fields.is_empty());
    // The time is that of the last change.
    if let (Some(last), Some(owned)) = (last, managers.0.get_mut(&own))
        && owned.fields == last.fields
        && owned.api_version == last.api_version
        && object == *before
    {
        owned.time = last.time;
    }
    Ok(Applied { object, managers })
}

/// Takes out of the merged object what was applied before, is not applied now, and is nobody's.
fn prune(schema: &Schema, merged: &Value, managers: &Managers, last: &FieldSet) -> Value {
    let schema = Some(schema);
    let last = last.with_named_fields(schema);
    let has = |object: &Value| typed::fields_of(schema, object).with_named_fields(schema);
    let without = |fields: &FieldSet| {
        let mut out = typed::remove(schema, merged, fields);
        typed::without_nulls(&mut out);
        out
    };
    let all = has(merged);
    let pruned = without(&last);
    // What others have comes back, with all that leads to it.
    let owned = managers.all_fields().with_named_fields(schema);
    let pruned = without(&all.difference(&has(&pruned).union(&owned)));
    // And so does what nobody had applied.
    without(&all.difference(&has(&pruned)).intersection(&last))
}

/// The fields of kubectl's client-side apply whose values are still the applied ones.
fn last_applied_fields(schema: &Schema, live: &Value) -> Option<FieldSet> {
    let text = meta::annotation(live, LAST_APPLIED)?;
    let mut applied: Value = serde_json::from_str(text).ok()?;
    typed::without_nulls(&mut applied);
    let fields = typed::fields_of(Some(schema), &applied);
    let difference = typed::compare(Some(schema), &applied, live);
    Some(fields.difference(&difference.modified.union(&difference.removed)))
}

/// What kubectl's annotation is to hold after its server-side apply of an object that has it, so
/// that its client-side apply can go on from there. `None`: the annotation stays away.
pub fn last_applied(live: Option<&Value>, config: &Value, manager: &str) -> Option<String> {
    let live = live?;
    if manager != KUBECTL || meta::annotation(live, LAST_APPLIED).is_none() {
        return None;
    }
    let mut config = bare(config);
    if let Some(Value::Object(annotations)) = config.pointer_mut("/metadata/annotations") {
        annotations.remove(LAST_APPLIED);
    }
    // As kubectl writes it, with a line end.
    Some(format!("{config}\n"))
}

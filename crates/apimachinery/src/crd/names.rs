//! Names of custom resources: which are accepted, and the conditions that say so.

use serde_json::{Value, json};

/// Finalizer of a definition that is being deleted while there are objects.
pub const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Whether a condition of a definition is true.
pub fn is_true(definition: &Value, condition: &str) -> bool {
    conditions(definition)
        .iter()
        .any(|c| c["type"] == condition && c["status"] == "True")
}

fn conditions(definition: &Value) -> &[Value] {
    definition["status"]["conditions"]
        .as_array()
        .map_or(&[], Vec::as_slice)
}

/// Sets a condition; its time changes with its status only.
pub fn set_condition(
    definition: &mut Value,
    condition: &str,
    status: bool,
    reason: &str,
    message: &str,
    now: &str,
) {
    let status = if status { "True" } else { "False" };
    let mut list = conditions(definition).to_vec();
    let old = list.iter().position(|c| c["type"] == condition);
    let time = match old {
        Some(at) if list[at]["status"] == status => list[at]["lastTransitionTime"].clone(),
        _ => now.into(),
    };
    let new = json!({
        "type": condition,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": time,
    });
    match old {
        Some(at) => list[at] = new,
        None => list.push(new),
    }
    definition["status"]["conditions"] = list.into();
}

/// Finds out which names of a definition are accepted, beside the others of its group, and sets its
/// status. Once established, it stays so.
pub fn settle(definition: &mut Value, others: &[Value], now: &str) {
    let group = definition["spec"]["group"].clone();
    let (mut resources, mut kinds): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    for other in others.iter().filter(|other| {
        other["spec"]["group"] == group
            && other["metadata"]["name"] != definition["metadata"]["name"]
    }) {
        let names = &other["status"]["acceptedNames"];
        resources.extend(
            ["plural", "singular"]
                .into_iter()
                .filter_map(|f| names[f].as_str()),
        );
        let short = names["shortNames"].as_array().into_iter().flatten();
        resources.extend(short.filter_map(Value::as_str));
        kinds.extend(
            ["kind", "listKind"]
                .into_iter()
                .filter_map(|f| names[f].as_str()),
        );
    }
    let wanted = definition["spec"]["names"].clone();
    let mut accepted = definition["status"]["acceptedNames"].clone();
    if !accepted.is_object() {
        accepted = json!({"plural": "", "kind": ""});
    }
    let mut conflict: Option<(&str, String)> = None;
    for (field, used, reason) in [
        ("plural", &resources, "PluralConflict"),
        ("singular", &resources, "SingularConflict"),
        ("kind", &kinds, "KindConflict"),
        ("listKind", &kinds, "ListKindConflict"),
    ] {
        let name = wanted[field].as_str().unwrap_or_default();
        if accepted[field] != name && used.contains(&name) {
            conflict = Some((reason, format!("{name:?} is already in use")));
        } else {
            accepted[field] = name.into();
        }
        if field == "singular" {
            let short = wanted["shortNames"]
                .as_array()
                .map_or(&[][..], Vec::as_slice);
            let mine = accepted["shortNames"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let taken: Vec<String> = short
                .iter()
                .filter(|name| !mine.contains(name))
                .filter_map(Value::as_str)
                .filter(|name| resources.contains(name))
                .map(|name| format!("{name:?} is already in use"))
                .collect();
            if taken.is_empty() {
                match wanted.get("shortNames") {
                    Some(short) => accepted["shortNames"] = short.clone(),
                    None => {
                        accepted.as_object_mut().map(|a| a.remove("shortNames"));
                    }
                }
            } else {
                conflict = Some(("ShortNamesConflict", taken.join(", ")));
            }
        }
    }
    if let Some(fields) = accepted.as_object_mut() {
        match wanted.get("categories") {
            Some(categories) => fields.insert("categories".into(), categories.clone()),
            None => fields.remove("categories"),
        };
    }
    if !definition["status"].is_object() {
        definition["status"] = json!({});
    }
    definition["status"]["acceptedNames"] = accepted;
    let established = is_true(definition, "Established");
    match &conflict {
        None => {
            let all_right = "no conflicts found";
            set_condition(
                definition,
                "NamesAccepted",
                true,
                "NoConflicts",
                all_right,
                now,
            );
            let reason = "the initial names have been accepted";
            set_condition(
                definition,
                "Established",
                true,
                "InitialNamesAccepted",
                reason,
                now,
            );
        }
        Some((reason, message)) => {
            set_condition(definition, "NamesAccepted", false, reason, message, now);
            if !established {
                let why = "not all names are accepted";
                set_condition(definition, "Established", false, "NotAccepted", why, now);
            }
        }
    }
    let versions = definition["spec"]["versions"]
        .as_array()
        .into_iter()
        .flatten();
    let storage = versions
        .into_iter()
        .find(|v| v["storage"] == true)
        .map(|v| v["name"].clone());
    let mut stored = definition["status"]["storedVersions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    if let Some(storage) = storage
        && !stored.contains(&storage)
    {
        stored.push(storage);
    }
    definition["status"]["storedVersions"] = stored.into();
}

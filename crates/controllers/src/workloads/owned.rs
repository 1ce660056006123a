//! Objects that belong to another one: found, taken over, let go, made.

use hypernetes_apimachinery::{meta, selector::LabelSelector};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use super::cluster::{Cluster, Kind, name, namespace, pods, uid};
use crate::error::ReconcileError;

/// A reference to the object that controls another.
pub(crate) fn controller_reference(owner: &Value) -> Value {
    json!({
        "apiVersion": owner["apiVersion"], "kind": owner["kind"],
        "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"],
        "controller": true, "blockOwnerDeletion": true,
    })
}

/// Whether the object is the other one's controller.
pub(crate) fn controls(owner: &Value, object: &Value) -> bool {
    meta::controller(object).is_some_and(|reference| reference["uid"] == owner["metadata"]["uid"])
}

/// The objects of a kind that the owner controls. Those that its selector finds and that nobody
/// controls are taken over; those that it does not find any more are let go.
pub(crate) async fn claim(
    cluster: &Cluster,
    owner: &Value,
    kind: &Kind,
) -> Result<Vec<Value>, ReconcileError> {
    let selector = LabelSelector::of_owner(owner).map_err(|error| ReconcileError::Invalid {
        field: "spec.selector",
        rule: error.to_string(),
    })?;
    let mut claimed = Vec::new();
    let concerned = |object: &Value| {
        let free = meta::controller(object).is_none();
        controls(owner, object) || (free && selector.matches(object))
    };
    let objects = cluster.list_kept(kind, namespace(owner), concerned);
    for object in objects.await? {
        let fits = selector.matches(&object);
        if controls(owner, &object) {
            if fits || meta::is_deleting(owner) {
                claimed.push(object);
            } else {
                release(cluster, owner, kind, &object).await?;
            }
            continue;
        }
        if meta::is_deleting(&object) || meta::is_deleting(owner) {
            continue;
        }
        if let Some(object) = adopt(cluster, owner, kind, &object).await? {
            claimed.push(object);
        }
    }
    Ok(claimed)
}

async fn adopt(
    cluster: &Cluster,
    owner: &Value,
    kind: &Kind,
    object: &Value,
) -> Result<Option<Value>, ReconcileError> {
    let mut references = meta::owner_references(object).to_vec();
    references.push(controller_reference(owner));
    let patch = references_patch(object, &references);
    cluster
        .patch(kind, (namespace(object), name(object)), "", &patch)
        .await
}

async fn release(
    cluster: &Cluster,
    owner: &Value,
    kind: &Kind,
    object: &Value,
) -> Result<(), ReconcileError> {
    let mut references = meta::owner_references(object).to_vec();
    references.retain(|reference| reference["uid"] != owner["metadata"]["uid"]);
    let patch = references_patch(object, &references);
    cluster
        .patch(kind, (namespace(object), name(object)), "", &patch)
        .await
        .map(|_| ())
}

/// With version and id: what was read is replaced, or nothing.
fn references_patch(object: &Value, references: &[Value]) -> Value {
    json!({"metadata": {
        "uid": uid(object),
        "resourceVersion": meta::resource_version(object),
        "ownerReferences": references,
    }})
}

/// A pod of a template.
pub(crate) fn pod_of(template: &Value, owner: &Value) -> Value {
    let mut metadata = Map::new();
    for field in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template["metadata"].get(field) {
            metadata.insert(field.into(), value.clone());
        }
    }
    metadata.insert(
        "generateName".into(),
        format!("{}-", base(name(owner))).into(),
    );
    metadata.insert("namespace".into(), namespace(owner).into());
    metadata.insert(
        "ownerReferences".into(),
        json!([controller_reference(owner)]),
    );
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
}

/// The beginning of a generated name that leaves room for the rest.
fn base(name: &str) -> &str {
    const ROOM: usize = 57;
    match name.char_indices().nth(ROOM) {
        Some((end, _)) => &name[..end],
        None => name,
    }
}

/// Makes pods, few at first and more as it goes well. Gives how many were made and, if one could not
/// be, why; the owner's events say it too.
pub(crate) async fn create_pods(
    cluster: &Cluster,
    owner: &Value,
    wanted: &[Value],
) -> (usize, Option<ReconcileError>) {
    let mut made = 0;
    let mut batch = 1;
    while made < wanted.len() {
        let end = (made + batch).min(wanted.len());
        let creations = wanted[made..end]
            .iter()
            .map(|pod| create_pod(cluster, owner, pod));
        for result in futures::future::join_all(creations).await {
            match result {
                Ok(()) => made += 1,
                Err(error) => return (made, Some(error)),
            }
        }
        batch *= 2;
    }
    (made, None)
}

async fn create_pod(cluster: &Cluster, owner: &Value, pod: &Value) -> Result<(), ReconcileError> {
    match cluster.create(&pods(), namespace(owner), pod).await {
        Ok(made) => {
            let message = format!("Created pod: {}", name(&made));
            cluster
                .event(owner, "Normal", "SuccessfulCreate", &message)
                .await;
            Ok(())
        }
        Err(error) => {
            let message = format!("Error creating: {}", error.said());
            cluster
                .event(owner, "Warning", "FailedCreate", &message)
                .await;
            Err(error)
        }
    }
}

/// Deletes pods, and says so in the owner's events.
pub(crate) async fn delete_pods(
    cluster: &Cluster,
    owner: &Value,
    unwanted: &[&Value],
) -> Result<(), ReconcileError> {
    for pod in unwanted {
        cluster.delete(&pods(), pod, None).await?;
        let message = format!("Deleted pod: {}", name(pod));
        cluster
            .event(owner, "Normal", "SuccessfulDelete", &message)
            .await;
    }
    Ok(())
}

// === states of pods ===

pub(crate) fn phase(pod: &Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

/// Neither ended nor ending.
pub(crate) fn is_active(pod: &Value) -> bool {
    !matches!(phase(pod), "Succeeded" | "Failed") && !meta::is_deleting(pod)
}

/// On its way to its end, which it has not reached.
pub(crate) fn is_terminating(pod: &Value) -> bool {
    !matches!(phase(pod), "Succeeded" | "Failed") && meta::is_deleting(pod)
}

fn ready_since(pod: &Value) -> Option<Timestamp> {
    let conditions = pod["status"]["conditions"].as_array()?;
    let ready = conditions
        .iter()
        .find(|condition| condition["type"] == "Ready" && condition["status"] == "True")?;
    let since = ready["lastTransitionTime"].as_str();
    Some(
        since
            .and_then(|since| since.parse().ok())
            .unwrap_or(Timestamp::UNIX_EPOCH),
    )
}

pub(crate) fn is_ready(pod: &Value) -> bool {
    ready_since(pod).is_some()
}

/// Whether a pod has been ready for so long; if not, when it will have been.
pub(crate) fn available(
    pod: &Value,
    seconds: i64,
    now: Timestamp,
) -> Result<(), Option<Timestamp>> {
    let Some(since) = ready_since(pod) else {
        return Err(None);
    };
    if seconds == 0 {
        return Ok(());
    }
    match since.checked_add(SignedDuration::from_secs(seconds)) {
        Ok(from) if from <= now => Ok(()),
        Ok(from) => Err(Some(from)),
        Err(_never) => Err(None),
    }
}

/// Pods in the order in which they are given up: what serves least and newest first.
pub(crate) fn sort_for_deletion(pods: &mut [&Value]) {
    let cost = |pod: &Value| -> i64 {
        meta::annotation(pod, "controller.kubernetes.io/pod-deletion-cost")
            .and_then(|text| text.parse().ok())
            .unwrap_or_default()
    };
    let restarts = |pod: &Value| -> i64 {
        let statuses = pod["status"]["containerStatuses"].as_array();
        let counts = statuses.into_iter().flatten();
        counts
            .filter_map(|status| status["restartCount"].as_i64())
            .max()
            .unwrap_or_default()
    };
    pods.sort_by_key(|pod| {
        let unbound = pod["spec"]["nodeName"]
            .as_str()
            .unwrap_or_default()
            .is_empty();
        let phase = match phase(pod) {
            "Pending" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let created = meta::creation_timestamp(pod).unwrap_or(Timestamp::UNIX_EPOCH);
        let ready = ready_since(pod);
        (
            !unbound,
            phase,
            ready.is_some(),
            cost(pod),
            std::cmp::Reverse(ready),
            -restarts(pod),
            std::cmp::Reverse(created),
        )
    });
}

// === conditions ===

/// Sets a condition in a status; its time changes only with its state.
pub(crate) fn set_condition(
    status: &mut Value,
    kind: &str,
    state: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let state = if state { "True" } else { "False" };
    let stamp = meta::format_time(now);
    let mut list = status["conditions"].as_array().cloned().unwrap_or_default();
    let old = list.iter().position(|condition| condition["type"] == kind);
    let since = old
        .map(|at| &list[at])
        .filter(|old| old["status"] == state)
        .map_or_else(
            || stamp.clone().into(),
            |old| old["lastTransitionTime"].clone(),
        );
    let condition = json!({"type": kind, "status": state, "reason": reason, "message": message,
        "lastTransitionTime": since});
    match old {
        Some(at) => list[at] = condition,
        None => list.push(condition),
    }
    status["conditions"] = list.into();
}

pub(crate) fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    let list = status["conditions"].as_array()?;
    list.iter().find(|condition| condition["type"] == kind)
}

pub(crate) fn is_true(status: &Value, kind: &str) -> bool {
    condition(status, kind).is_some_and(|condition| condition["status"] == "True")
}

pub(crate) fn remove_condition(status: &mut Value, kind: &str) {
    if let Some(list) = status["conditions"].as_array_mut() {
        list.retain(|condition| condition["type"] != kind);
        if list.is_empty()
            && let Some(status) = status.as_object_mut()
        {
            status.remove("conditions");
        }
    }
}

/// A whole number, zero if absent.
pub(crate) fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or_default()
}

/// A number, or a percentage of `total`.
pub(crate) fn amount(value: &Value, total: i64, up: bool) -> i64 {
    if let Some(number) = value.as_i64() {
        return number;
    }
    let percent: i64 = value
        .as_str()
        .and_then(|text| text.strip_suffix('%')?.parse().ok())
        .unwrap_or_default();
    let product = percent.saturating_mul(total);
    if up {
        product.saturating_add(99).div_euclid(100)
    } else {
        product.div_euclid(100)
    }
}

/// A number of things as JSON.
pub(crate) fn count(things: usize) -> i64 {
    i64::try_from(things).unwrap_or(i64::MAX)
}

/// A short text that stands for a template, made of letters that spell no words.
pub(crate) fn hash(value: &Value, salt: i64) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut sum: u32 = 0x811c_9dc5;
    let text = if salt == 0 {
        value.to_string()
    } else {
        format!("{value}{salt}")
    };
    for byte in text.bytes() {
        sum = (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    sum.to_string()
        .bytes()
        .map(|digit| char::from(LETTERS[usize::from(digit) % LETTERS.len()]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_rounded_as_asked() {
        assert_eq!(amount(&json!(3), 10, true), 3);
        assert_eq!(amount(&json!("25%"), 3, true), 1);
        assert_eq!(amount(&json!("25%"), 3, false), 0);
        assert_eq!(amount(&json!("100%"), 3, false), 3);
        assert_eq!(amount(&Value::Null, 3, true), 0);
    }

    #[test]
    fn what_serves_least_is_given_up_first() {
        let pod = |name: &str, phase: &str, ready: bool, created: &str| {
            json!({"metadata": {"name": name, "creationTimestamp": created}, "spec": {"nodeName": "n"},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"},
                    "lastTransitionTime": created}]}})
        };
        let pods = [
            pod("old", "Running", true, "2026-01-01T00:00:00Z"),
            pod("new", "Running", true, "2026-01-02T00:00:00Z"),
            pod("unready", "Running", false, "2026-01-01T00:00:00Z"),
            pod("pending", "Pending", false, "2026-01-01T00:00:00Z"),
        ];
        let mut order: Vec<&Value> = pods.iter().collect();
        sort_for_deletion(&mut order);
        let names: Vec<&str> = order.iter().map(|pod| name(pod)).collect();
        assert_eq!(names, ["pending", "unready", "new", "old"]);
    }

    #[test]
    fn a_pod_is_available_after_a_while() {
        let pod = json!({"status": {"conditions": [{"type": "Ready", "status": "True",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let ready = at("2026-01-01T00:00:10Z");
        assert_eq!(available(&pod, 0, at("2026-01-01T00:00:01Z")), Ok(()));
        assert_eq!(
            available(&pod, 10, at("2026-01-01T00:00:01Z")),
            Err(Some(ready))
        );
        assert_eq!(available(&pod, 10, ready), Ok(()));
        assert_eq!(available(&json!({}), 0, ready), Err(None));
    }

    #[test]
    fn hashes_differ_with_the_template_and_the_salt() {
        let (a, b) = (json!({"a": 1}), json!({"a": 2}));
        assert_eq!(hash(&a, 0), hash(&a, 0));
        assert_ne!(hash(&a, 0), hash(&b, 0));
        assert_ne!(hash(&a, 0), hash(&a, 1));
    }
}

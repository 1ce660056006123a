//! Which volume serves a claim: pure.

use hypernetes_apimachinery::{Quantity, meta, quota::quantity, selector::LabelSelector};
use serde_json::Value;

use super::{class_of, handle};

/// Whether a volume is given to this claim: by name, and by id once it was.
pub(super) fn is_for(volume: &Value, claim: &Value) -> bool {
    let reference = &volume["spec"]["claimRef"];
    let same = |field: &str| reference[field] == claim["metadata"][field];
    same("name") && same("namespace") && (is_unset(&reference["uid"]) || same("uid"))
}

fn is_unset(value: &Value) -> bool {
    value.as_str().unwrap_or_default().is_empty()
}

/// Whether nobody has a volume or is promised it.
pub(super) fn is_free(volume: &Value) -> bool {
    volume["spec"]["claimRef"].is_null()
}

pub(super) fn requested(claim: &Value) -> Quantity {
    quantity(&claim["spec"]["resources"]["requests"]["storage"]).unwrap_or_default()
}

pub(super) fn capacity(volume: &Value) -> Quantity {
    quantity(&volume["spec"]["capacity"]["storage"]).unwrap_or_default()
}

/// What of a volume does not serve the claim, in upstream's words.
pub(super) fn misfit(volume: &Value, claim: &Value) -> Option<&'static str> {
    if capacity(volume) < requested(claim) {
        return Some("requested PV is too small");
    }
    let class = volume["spec"]["storageClassName"]
        .as_str()
        .filter(|name| !name.is_empty());
    if class != class_of(claim) {
        return Some("storageClassName does not match");
    }
    let mode = |object: &Value| {
        object["spec"]["volumeMode"]
            .as_str()
            .unwrap_or("Filesystem")
            .to_owned()
    };
    if mode(volume) != mode(claim) {
        return Some("incompatible volumeMode");
    }
    let has = volume["spec"]["accessModes"].as_array();
    let all = claim["spec"]["accessModes"]
        .as_array()
        .is_some_and(|modes| {
            modes
                .iter()
                .all(|mode| has.is_some_and(|has| has.contains(mode)))
        });
    (!all).then_some("incompatible accessMode")
}

/// The smallest volume made by hand that serves a claim; one that is promised to it comes first.
pub(super) fn best<'a>(volumes: &'a [Value], claim: &Value) -> Option<&'a Value> {
    let usable = |volume: &&Value| {
        handle(volume).is_some() && !meta::is_deleting(volume) && misfit(volume, claim).is_none()
    };
    let promised = |volume: &&Value| !is_free(volume) && is_for(volume, claim);
    if let Some(volume) = volumes.iter().filter(promised).find(usable) {
        return Some(volume);
    }
    let selector = match &claim["spec"]["selector"] {
        Value::Null => None,
        selector => Some(LabelSelector::from_json(selector).ok()?),
    };
    volumes
        .iter()
        .filter(|volume| is_free(volume))
        .filter(usable)
        .filter(|volume| {
            selector
                .as_ref()
                .is_none_or(|selector| selector.matches_labels(meta::labels(volume)))
        })
        .min_by_key(|volume| (capacity(volume), meta::name(volume)))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "json! makes values")]
mod tests {
    use serde_json::json;

    use super::*;

    fn volume(name: &str, size: &str, more: Value) -> Value {
        let mut object = json!({"metadata": {"name": name, "labels": {"tier": name}}, "spec": {
            "capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "volumeMode": "Filesystem",
            "storageClassName": "s", "csi": {"driver": super::super::DRIVER, "volumeHandle": name}}});
        for (field, value) in more.as_object().unwrap() {
            object["spec"][field] = value.clone();
        }
        object
    }

    fn claim(more: Value) -> Value {
        let mut object = json!({"metadata": {"name": "c", "namespace": "n", "uid": "u"}, "spec": {
            "resources": {"requests": {"storage": "2Gi"}}, "accessModes": ["ReadWriteOnce"],
            "storageClassName": "s"}});
        for (field, value) in more.as_object().unwrap() {
            object["spec"][field] = value.clone();
        }
        object
    }

    #[test]
    fn the_smallest_that_serves_and_nobody_elses() {
        let theirs = json!({"claimRef": {"namespace": "other", "name": "c"}});
        let before = json!({"claimRef": {"namespace": "n", "name": "c", "uid": "before"}});
        let promised = json!({"claimRef": {"namespace": "n", "name": "c"}});
        let plain = |name, size| volume(name, size, json!({}));
        let cases = [
            (vec![plain("a", "1Gi")], json!({}), None),
            (
                vec![plain("a", "9Gi"), plain("b", "3Gi")],
                json!({}),
                Some("b"),
            ),
            (
                vec![volume("a", "2Gi", theirs), volume("b", "2Gi", before)],
                json!({}),
                None,
            ),
            (
                vec![plain("a", "2Gi"), volume("b", "9Gi", promised)],
                json!({}),
                Some("b"),
            ),
            (
                vec![plain("a", "2Gi"), plain("b", "9Gi")],
                json!({"selector": {"matchLabels": {"tier": "b"}}}),
                Some("b"),
            ),
            (
                vec![plain("a", "2Gi")],
                json!({"volumeMode": "Block"}),
                None,
            ),
            (
                vec![plain("a", "2Gi")],
                json!({"storageClassName": ""}),
                None,
            ),
            (
                vec![plain("a", "2Gi")],
                json!({"accessModes": ["ReadWriteOncePod"]}),
                None,
            ),
            (
                vec![volume(
                    "a",
                    "2Gi",
                    json!({"csi": {"driver": "x", "volumeHandle": "a"}}),
                )],
                json!({}),
                None,
            ),
        ];
        for (volumes, more, expected) in cases {
            let claim = claim(more);
            assert_eq!(
                best(&volumes, &claim).and_then(meta::name),
                expected,
                "{volumes:?}"
            );
        }
    }
}

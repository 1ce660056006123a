//! Claims and volumes as they are admitted: the class of those that name none, the finalizers by which
//! what is used stays, and who may ask for more.

use hypernetes_apimachinery::{
    Quantity, meta,
    quota::{amounts, quantity, show},
};
use serde_json::Value;

const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";
const BETA_CLASS: &str = "volume.beta.kubernetes.io/storage-class";
const CLAIM_PROTECTION: &str = "kubernetes.io/pvc-protection";
const VOLUME_PROTECTION: &str = "kubernetes.io/pv-protection";

/// Writes into a new claim the class that is the default, unless it names one (also an empty one, which is
/// none). Of several the youngest counts, as upstream.
pub(super) fn default_class(classes: &[Value], claim: &mut Value) {
    let named = !claim["spec"]["storageClassName"].is_null()
        || meta::annotation(claim, BETA_CLASS).is_some();
    if named {
        return;
    }
    let default = classes
        .iter()
        .filter(|class| meta::annotation(class, DEFAULT_CLASS) == Some("true"))
        .max_by_key(|class| {
            let name = std::cmp::Reverse(meta::name(class));
            (meta::creation_timestamp(class), name)
        });
    if let Some(name) = default.and_then(meta::name) {
        claim["spec"]["storageClassName"] = name.into();
    }
}

/// A claim or volume stays until nobody uses it.
pub(super) fn protect(kind: &str, object: &mut Value) {
    let finalizer = match kind {
        "PersistentVolumeClaim" => CLAIM_PROTECTION,
        _ => VOLUME_PROTECTION,
    };
    meta::add_finalizer(object, finalizer);
}

fn size(claim: &Value) -> Quantity {
    quantity(&claim["spec"]["resources"]["requests"]["storage"]).unwrap_or_default()
}

/// Whether a claim asks for another size than before.
pub(super) fn is_resized(new: &Value, old: &Value) -> bool {
    size(new) != size(old)
}

/// Refuses, in upstream's words, more room for a claim whose class does not give it.
pub(super) fn check_growth(classes: &[Value], new: &Value, old: &Value) -> Result<(), String> {
    if size(new) <= size(old) {
        return Ok(());
    }
    if old["status"]["phase"] != "Bound" {
        return Err("Only bound persistent volume claims can be expanded".to_owned());
    }
    let name = new["spec"]["storageClassName"].as_str().unwrap_or_default();
    let grows = classes.iter().any(|class| {
        meta::name(class) == Some(name) && class["allowVolumeExpansion"] == Value::Bool(true)
    });
    match grows {
        true => Ok(()),
        false => Err(
            "only dynamically provisioned pvc can be resized and the storageclass that provisions \
             the pvc must support resize"
                .to_owned(),
        ),
    }
}

/// What of a claim breaks the namespace's limits, as upstream puts it.
pub(super) fn check_limits(ranges: &[Value], claim: &Value) -> Result<(), String> {
    let items = ranges
        .iter()
        .flat_map(|range| range["spec"]["limits"].as_array().into_iter().flatten())
        .filter(|item| item["type"] == "PersistentVolumeClaim");
    let requests = &claim["spec"]["resources"]["requests"];
    let mut errors = Vec::new();
    for item in items {
        for (bound, word, is_over) in [("min", "minimum", false), ("max", "maximum", true)] {
            for (name, limit) in amounts(&item[bound]) {
                let head = format!(
                    "{word} {name} usage per PersistentVolumeClaim is {}",
                    show(&name, limit)
                );
                match requests.get(&name).and_then(quantity) {
                    None => errors.push(format!("{head}. No request is specified")),
                    Some(asked) if (is_over && asked > limit) || (!is_over && asked < limit) => {
                        errors.push(format!("{head}, but request is {}", show(&name, asked)));
                    }
                    Some(_) => {}
                }
            }
        }
    }
    match errors.as_slice() {
        [] => Ok(()),
        [only] => Err(only.clone()),
        all => Err(format!("[{}]", all.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn class(name: &str, made: &str, default: &str) -> Value {
        json!({"metadata": {"name": name, "creationTimestamp": made,
            "annotations": {DEFAULT_CLASS: default}}, "allowVolumeExpansion": name == "b"})
    }

    #[test]
    fn the_youngest_default_class_is_written_in() {
        let classes = [
            class("a", "2026-01-01T00:00:00Z", "true"),
            class("b", "2026-01-02T00:00:00Z", "true"),
            class("c", "2026-01-03T00:00:00Z", "false"),
        ];
        for (spec, expected) in [
            (json!({}), json!("b")),
            (json!({"storageClassName": ""}), json!("")),
            (json!({"storageClassName": "a"}), json!("a")),
        ] {
            let mut claim = json!({"metadata": {}, "spec": spec});
            default_class(&classes, &mut claim);
            assert_eq!(claim["spec"]["storageClassName"], expected);
        }
        let mut claim = json!({"metadata": {}, "spec": {}});
        default_class(&classes[2..], &mut claim);
        assert!(claim["spec"]["storageClassName"].is_null());
    }

    #[test]
    fn a_claim_grows_if_it_is_bound_and_its_class_lets_it() {
        let classes = [
            class("a", "2026-01-01T00:00:00Z", "true"),
            class("b", "2026-01-01T00:00:00Z", "true"),
        ];
        let claim = |size: &str, class: &str, phase: &str| {
            json!({"metadata": {}, "spec": {"storageClassName": class,
                "resources": {"requests": {"storage": size}}}, "status": {"phase": phase}})
        };
        for (size, class, phase, refusal) in [
            ("2Gi", "b", "Bound", None),
            ("1Gi", "a", "Pending", None),
            ("2Gi", "b", "Pending", Some("Only bound")),
            ("2Gi", "a", "Bound", Some("only dynamically provisioned")),
        ] {
            let (new, old) = (claim(size, class, phase), claim("1Gi", class, phase));
            let found = check_growth(&classes, &new, &old);
            match refusal {
                None => assert_eq!(found, Ok(())),
                Some(words) => assert!(found.unwrap_err().starts_with(words)),
            }
        }
    }

    #[test]
    fn limits_of_claims_hold() {
        let range = json!({"spec": {"limits": [{"type": "PersistentVolumeClaim",
            "min": {"storage": "1Gi"}, "max": {"storage": "2Gi"}}]}});
        let check = |size: &str| {
            let claim = json!({"spec": {"resources": {"requests": {"storage": size}}}});
            check_limits(std::slice::from_ref(&range), &claim)
        };
        assert_eq!(check("1Gi"), Ok(()));
        assert_eq!(
            check("3Gi").unwrap_err(),
            "maximum storage usage per PersistentVolumeClaim is 2Gi, but request is 3Gi"
        );
        assert_eq!(
            check("1Mi").unwrap_err(),
            "minimum storage usage per PersistentVolumeClaim is 1Gi, but request is 1Mi"
        );
    }
}

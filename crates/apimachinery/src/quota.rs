//! What objects count towards a ResourceQuota: the same sums when one is made and when all are
//! counted anew.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{Quantity, kinds::ResourceKind};

/// Amounts by resource name.
pub type Amounts = BTreeMap<String, Quantity>;

/// Resources of containers that a quota may bound.
const COMPUTE: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

/// A quantity in an object: text or number.
pub fn quantity(value: &Value) -> Option<Quantity> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

/// Reads a map of quantities.
pub fn amounts(map: &Value) -> Amounts {
    map.as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.clone(), quantity(value)?)))
        .collect()
}

/// Writes amounts as an object has them.
pub fn to_value(amounts: &Amounts) -> Value {
    let fields = amounts
        .iter()
        .map(|(name, quantity)| (name.clone(), show(name, *quantity).into()));
    Value::Object(fields.collect::<Map<_, _>>())
}

/// An amount as people write it: bytes in powers of two where they are whole, else in powers of ten.
pub fn show(name: &str, amount: Quantity) -> String {
    let bytes = ["memory", "storage", "hugepages"]
        .iter()
        .any(|word| name.contains(word));
    let units = amount.value();
    if !bytes || units < 1024 || Quantity::from_units(units) != amount {
        return amount.to_string();
    }
    let suffixes = ["Ei", "Pi", "Ti", "Gi", "Mi", "Ki"];
    for (power, suffix) in (1..=6).rev().zip(suffixes) {
        let unit = 1024_i64.pow(power);
        if units % unit == 0 {
            return format!("{}{suffix}", units / unit);
        }
    }
    for (power, suffix) in (1..=4).rev().zip(["T", "G", "M", "k"]) {
        let unit = 1000_i64.pow(power);
        if units % unit == 0 {
            return format!("{}{suffix}", units / unit);
        }
    }
    amount.to_string()
}

/// What one object of a kind counts.
pub fn usage(kind: &ResourceKind, object: &Value) -> Amounts {
    let mut out = Amounts::new();
    let one = Quantity::from_units(1);
    out.insert(format!("count/{}", kind.qualified_resource()), one);
    if is_snapshots(kind) {
        let size = quantity(&object["spec"]["sizeLimit"]);
        out.insert("requests.storage".into(), size.unwrap_or_default());
    }
    if !kind.group.is_empty() {
        return out;
    }
    match kind.plural {
        // What a pod that has ended had is free again.
        "pods" if has_ended(object) => {}
        "pods" => {
            out.insert("pods".into(), one);
            compute(&object["spec"], &mut out);
        }
        "services" => {
            out.insert("services".into(), one);
            let kind = object["spec"]["type"].as_str().unwrap_or_default();
            let ports = object["spec"]["ports"].as_array().map_or(0, Vec::len);
            let ports = Quantity::from_units(i64::try_from(ports).unwrap_or(i64::MAX));
            if kind == "LoadBalancer" {
                out.insert("services.loadbalancers".into(), one);
            }
            // Those of type LoadBalancer get none here.
            if kind == "NodePort" {
                out.insert("services.nodeports".into(), ports);
            }
        }
        "persistentvolumeclaims" => {
            out.insert("persistentvolumeclaims".into(), one);
            let size = storage_of(object);
            out.insert("requests.storage".into(), size);
            // The same of each class; the older way to name one comes first.
            let class = crate::meta::annotation(object, "volume.beta.kubernetes.io/storage-class")
                .or_else(|| object["spec"]["storageClassName"].as_str());
            if let Some(class) = class.filter(|class| !class.is_empty()) {
                let name =
                    |resource: &str| format!("{class}.storageclass.storage.k8s.io/{resource}");
                out.insert(name("persistentvolumeclaims"), one);
                out.insert(name("requests.storage"), size);
            }
        }
        "configmaps" | "secrets" | "resourcequotas" | "replicationcontrollers" => {
            out.insert(kind.plural.into(), one);
        }
        _ => {}
    }
    out
}

fn is_snapshots(kind: &ResourceKind) -> bool {
    kind.group == hypernetes_types::kinds::GROUP && kind.plural == "podsnapshots"
}

/// What a claim counts: what it asks for, and no less than what it has. One that asked for more in
/// vain counts what was set aside for it.
fn storage_of(claim: &Value) -> Quantity {
    let asked = quantity(&claim["spec"]["resources"]["requests"]["storage"]);
    let promised = quantity(&claim["status"]["allocatedResources"]["storage"]);
    asked.unwrap_or_default().max(promised.unwrap_or_default())
}

fn has_ended(pod: &Value) -> bool {
    matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    )
}

fn compute(spec: &Value, out: &mut Amounts) {
    for (field, prefixes) in [("requests", ["requests.", ""]), ("limits", ["limits.", ""])] {
        for (name, amount) in of_pod(spec, field) {
            out.insert(format!("{}{name}", prefixes[0]), amount);
            // `cpu` is short for `requests.cpu`.
            if field == "requests" && COMPUTE.contains(&name.as_str()) {
                out.insert(name, amount);
            }
        }
    }
}

/// Requests or limits of a pod as a whole: its containers together, or the most that its
/// initialization needs.
pub fn of_pod(spec: &Value, field: &str) -> Amounts {
    let each = |list: &'static str| spec[list].as_array().into_iter().flatten();
    let of = |container: &Value| amounts(&container["resources"][field]);
    let mut sum = Amounts::new();
    for container in each("containers") {
        add(&mut sum, &of(container));
    }
    // A sidecar runs beside the initialization that comes after it, and beside the containers.
    let mut sidecars = Amounts::new();
    let mut most = Amounts::new();
    for container in each("initContainers") {
        if container["restartPolicy"] == "Always" {
            add(&mut sidecars, &of(container));
            raise(&mut most, &sidecars);
        } else {
            let mut with = sidecars.clone();
            add(&mut with, &of(container));
            raise(&mut most, &with);
        }
    }
    add(&mut sum, &sidecars);
    raise(&mut sum, &most);
    add(&mut sum, &amounts(&spec["overhead"]));
    sum
}

/// Adds amounts to a sum.
pub fn add(sum: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let total = sum.entry(name.clone()).or_default();
        *total = *total + *amount;
    }
}

fn raise(most: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let entry = most.entry(name.clone()).or_default();
        *entry = (*entry).max(*amount);
    }
}

/// Whether a quota counts the object at all: it names a resource of the kind, and the object is in
/// its scopes.
pub fn counts(quota: &Value, kind: &ResourceKind, object: &Value) -> bool {
    let spec = &quota["spec"];
    let is_pod = kind.group.is_empty() && kind.plural == "pods";
    let scopes = spec["scopes"].as_array().into_iter().flatten();
    let expressions = spec["scopeSelector"]["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten();
    let mut all = scopes
        .map(|scope| (scope.as_str().unwrap_or_default(), "Exists", &Value::Null))
        .chain(expressions.map(|expression| {
            (
                expression["scopeName"].as_str().unwrap_or_default(),
                expression["operator"].as_str().unwrap_or_default(),
                &expression["values"],
            )
        }));
    all.all(|(scope, operator, values)| is_pod && in_scope(object, scope, operator, values))
}

fn in_scope(pod: &Value, scope: &str, operator: &str, values: &Value) -> bool {
    let spec = &pod["spec"];
    let ends = spec["activeDeadlineSeconds"].is_i64();
    let best_effort = pod["status"]["qosClass"] == "BestEffort";
    match scope {
        "Terminating" => ends,
        "NotTerminating" => !ends,
        "BestEffort" => best_effort,
        "NotBestEffort" => !best_effort,
        "PriorityClass" => {
            let class = spec["priorityClassName"].as_str().unwrap_or_default();
            let named = values
                .as_array()
                .is_some_and(|values| values.iter().any(|value| value == class));
            match operator {
                "In" => named,
                "NotIn" => !named,
                "Exists" => !class.is_empty(),
                "DoesNotExist" => class.is_empty(),
                _ => false,
            }
        }
        _ => false,
    }
}

/// Whether a quota may bound objects of the kind.
pub fn bounds_kind(hard: &Amounts, kind: &ResourceKind) -> bool {
    let count = format!("count/{}", kind.qualified_resource());
    hard.keys().any(|name| {
        if *name == count || is_snapshots(kind) && name == "requests.storage" {
            return true;
        }
        if !kind.group.is_empty() || name.starts_with("count/") {
            return false;
        }
        match kind.plural {
            "services" => name.starts_with("services"),
            "persistentvolumeclaims" => {
                name == "persistentvolumeclaims" || name.contains("storage")
            }
            "configmaps" | "secrets" | "resourcequotas" | "replicationcontrollers" => {
                name == kind.plural
            }
            "pods" => {
                let resource = name
                    .strip_prefix("requests.")
                    .or_else(|| name.strip_prefix("limits."))
                    .unwrap_or(name);
                name == "pods"
                    || COMPUTE.contains(&resource)
                    || resource.starts_with("hugepages-")
                    || resource.contains('/')
            }
            _ => false,
        }
    })
}

/// What of the amounts a quota bounds.
pub fn bounded(amounts: &Amounts, hard: &Amounts) -> Amounts {
    amounts
        .iter()
        .filter(|(name, _)| hard.contains_key(*name))
        .map(|(name, amount)| (name.clone(), *amount))
        .collect()
}

/// Compute resources that a quota bounds and a container does not give, as upstream's words:
/// `limits.cpu for: a,b; requests.cpu for: a`.
pub fn unspecified(pod: &Value, hard: &Amounts) -> Vec<String> {
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in hard.keys() {
        let (field, resource) = match name.split_once('.') {
            Some((field @ ("requests" | "limits"), resource)) => (field, resource),
            _ => ("requests", name.as_str()),
        };
        if !COMPUTE.contains(&resource) {
            continue;
        }
        for list in ["containers", "initContainers"] {
            for container in pod["spec"][list].as_array().into_iter().flatten() {
                if quantity(&container["resources"][field][resource]).is_none() {
                    let container = container["name"].as_str().unwrap_or_default();
                    missing.entry(name).or_default().push(container);
                }
            }
        }
    }
    missing
        .into_iter()
        .map(|(name, containers)| format!("{name} for: {}", containers.join(",")))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kinds::by_resource;

    fn text(amounts: &Amounts) -> String {
        let texts: Vec<String> = amounts.iter().map(|(n, q)| format!("{n}={q}")).collect();
        texts.join(",")
    }

    fn container(cpu: &str) -> Value {
        json!({"name": "c", "resources": {"requests": {"cpu": cpu}}})
    }

    #[test]
    fn a_snapshot_counts_as_storage() {
        let snapshots = crate::kinds::by_kind("hypernetes.io", "v1alpha1", "PodSnapshot").unwrap();
        let snapshot = json!({"spec": {"podName": "a", "sizeLimit": "1Gi"}});
        assert_eq!(
            text(&usage(snapshots, &snapshot)),
            "count/podsnapshots.hypernetes.io=1,requests.storage=1073741824"
        );
        for name in ["requests.storage", "count/podsnapshots.hypernetes.io"] {
            let hard = amounts(&json!({name: "1"}));
            assert!(bounds_kind(&hard, snapshots), "{name}");
        }
        assert!(!bounds_kind(&amounts(&json!({"pods": "1"})), snapshots));
    }

    #[test]
    fn a_pod_counts_its_containers_or_its_initialization() {
        let pods = by_resource("", "v1", "pods").unwrap();
        let mut pod = json!({"spec": {"containers": [container("1"), container("500m")]}});
        assert_eq!(
            text(&usage(pods, &pod)),
            "count/pods=1,cpu=1500m,pods=1,requests.cpu=1500m"
        );
        pod["spec"]["initContainers"] = json!([container("3")]);
        assert_eq!(text(&of_pod(&pod["spec"], "requests")), "cpu=3");
        let mut sidecar = container("1");
        sidecar["restartPolicy"] = "Always".into();
        pod["spec"]["initContainers"] = json!([sidecar, container("100m")]);
        assert_eq!(text(&of_pod(&pod["spec"], "requests")), "cpu=2500m");
        pod["status"]["phase"] = "Succeeded".into();
        assert_eq!(text(&usage(pods, &pod)), "count/pods=1");
    }

    #[test]
    fn a_claim_counts_for_itself_and_for_its_class() {
        let claims = by_resource("", "v1", "persistentvolumeclaims").unwrap();
        let mut claim = json!({"metadata": {}, "spec": {"storageClassName": "a",
            "resources": {"requests": {"storage": "1Gi"}}}});
        let of_class = |class: &str, size: &str| {
            format!(
                "{class}.storageclass.storage.k8s.io/persistentvolumeclaims=1,\
                 {class}.storageclass.storage.k8s.io/requests.storage={size},\
                 count/persistentvolumeclaims=1,persistentvolumeclaims=1,requests.storage={size}"
            )
        };
        let gi = "1073741824";
        assert_eq!(text(&usage(claims, &claim)), of_class("a", gi));
        claim["metadata"]["annotations"] = json!({"volume.beta.kubernetes.io/storage-class": "b"});
        claim["status"]["allocatedResources"] = json!({"storage": "2147483648"});
        assert_eq!(text(&usage(claims, &claim)), of_class("b", "2147483648"));
    }

    #[test]
    fn bytes_are_shown_in_powers_of_two() {
        for (name, text, shown) in [
            ("requests.memory", "1024Mi", "1Gi"),
            ("memory", "1500M", "1500M"),
            ("cpu", "1500m", "1500m"),
            ("pods", "2048", "2048"),
        ] {
            assert_eq!(show(name, text.parse().unwrap()), shown);
        }
    }

    #[test]
    fn scopes_choose_pods() {
        let pods = by_resource("", "v1", "pods").unwrap();
        let maps = by_resource("", "v1", "configmaps").unwrap();
        let quota = |scope: &str| json!({"spec": {"scopes": [scope]}});
        let pod =
            json!({"spec": {"activeDeadlineSeconds": 5}, "status": {"qosClass": "BestEffort"}});
        for (scope, counted) in [
            ("Terminating", true),
            ("NotTerminating", false),
            ("BestEffort", true),
            ("NotBestEffort", false),
        ] {
            assert_eq!(counts(&quota(scope), pods, &pod), counted, "{scope}");
            assert!(!counts(&quota(scope), maps, &json!({})));
        }
        assert!(counts(&json!({"spec": {}}), maps, &json!({})));
        let selector = json!({"spec": {"scopeSelector": {"matchExpressions": [
            {"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]}}});
        assert!(!counts(&selector, pods, &pod));
        assert!(counts(
            &selector,
            pods,
            &json!({"spec": {"priorityClassName": "high"}})
        ));
    }

    #[test]
    fn what_a_quota_bounds_must_be_given() {
        let pod = json!({"spec": {"containers": [container("1"), {"name": "d"}]}});
        let hard = amounts(&json!({"requests.cpu": "1", "limits.memory": "1Gi", "pods": 2}));
        assert_eq!(
            unspecified(&pod, &hard),
            ["limits.memory for: c,d", "requests.cpu for: d"]
        );
    }
}

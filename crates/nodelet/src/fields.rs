//! What the downward API tells a container of its pod and its resources.

use std::fmt::Write as _;

use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector};

use hypernetes_types::Quantity;

use crate::resources::{self, Capacity};

/// A selector that has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FieldsError {
    #[error("unsupported fieldPath: {0}")]
    Path(String),
    #[error("unsupported container resource: {0}")]
    Resource(String),
    #[error("container {0} not found")]
    Container(String),
    #[error("invalid divisor {0:?}")]
    Divisor(String),
}

/// What is known of the pod beside its object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PodFacts<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) node_name: &'a str,
    pub(crate) host_ip: &'a str,
    pub(crate) pod_ip: &'a str,
    pub(crate) capacity: Capacity,
}

/// Value of a `fieldRef`.
pub(crate) fn field(
    facts: &PodFacts<'_>,
    selector: &ObjectFieldSelector,
) -> Result<String, FieldsError> {
    let (meta, path) = (&facts.pod.metadata, selector.field_path.as_str());
    let spec = facts.pod.spec.as_ref();
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    Ok(match path {
        "metadata.name" => text(&meta.name),
        "metadata.namespace" => text(&meta.namespace),
        "metadata.uid" => text(&meta.uid),
        "metadata.labels" => lines(meta.labels.as_ref()),
        "metadata.annotations" => lines(meta.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.to_owned(),
        "spec.serviceAccountName" => spec
            .map(|spec| text(&spec.service_account_name))
            .unwrap_or_default(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.to_owned(),
        "status.podIP" | "status.podIPs" => facts.pod_ip.to_owned(),
        other => {
            let keyed = |prefix: &str| other.strip_prefix(prefix)?.strip_suffix("']");
            if let Some(key) = keyed("metadata.labels['") {
                meta.labels
                    .as_ref()
                    .and_then(|map| map.get(key))
                    .cloned()
                    .unwrap_or_default()
            } else if let Some(key) = keyed("metadata.annotations['") {
                meta.annotations
                    .as_ref()
                    .and_then(|map| map.get(key))
                    .cloned()
                    .unwrap_or_default()
            } else {
                return Err(FieldsError::Path(other.to_owned()));
            }
        }
    })
}

/// `key="escaped value"` lines, sorted, as the downward API volume has them.
fn lines(map: Option<&std::collections::BTreeMap<String, String>>) -> String {
    let mut text = String::new();
    for (key, value) in map.into_iter().flatten() {
        if !text.is_empty() {
            text.push('\n');
        }
        // `{:?}` escapes quotes, backslashes and control characters, as Go's %q does.
        write!(text, "{key}={value:?}").expect("a String takes everything");
    }
    text
}

/// Value of a `resourceFieldRef`; `own` is the container that asks, absent for volumes.
pub(crate) fn resource(
    facts: &PodFacts<'_>,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
) -> Result<String, FieldsError> {
    let named = selector
        .container_name
        .as_deref()
        .filter(|name| !name.is_empty());
    let container = match named {
        None => own.ok_or_else(|| FieldsError::Container(String::new()))?,
        Some(name) => facts
            .pod
            .spec
            .iter()
            .flat_map(|spec| {
                spec.containers
                    .iter()
                    .chain(spec.init_containers.iter().flatten())
            })
            .find(|container| container.name == name)
            .ok_or_else(|| FieldsError::Container(name.to_owned()))?,
    };
    let divisor_text = selector
        .divisor
        .as_ref()
        .map_or("1", |quantity| quantity.0.as_str())
        .trim();
    let divisor: Quantity = match divisor_text {
        "" | "0" => Quantity::from_units(1),
        text => text
            .parse()
            .map_err(|_invalid| FieldsError::Divisor(text.to_owned()))?,
    };
    let unknown = || FieldsError::Resource(selector.resource.clone());
    let (kind, name) = selector.resource.split_once('.').ok_or_else(unknown)?;
    // A container without a limit can use all of the node, which is what upstream tells it.
    let node = match name {
        "cpu" => Quantity::from_units(i64::from(facts.capacity.cpus)),
        "memory" => Quantity::from_units(facts.capacity.memory_bytes),
        "ephemeral-storage" => Quantity::from_units(facts.capacity.storage_bytes),
        _ => return Err(unknown()),
    };
    let amount = match kind {
        "limits" => resources::limit(container, name)
            .or_else(|| resources::pod_limit(facts.pod.spec.as_ref(), name))
            .unwrap_or(node),
        "requests" => resources::request(container, name).unwrap_or_default(),
        _ => return Err(unknown()),
    };
    let (amount, divisor) = if name == "cpu" {
        (amount.milli_value(), divisor.milli_value())
    } else {
        (amount.value(), divisor.value())
    };
    if divisor <= 0 {
        return Err(FieldsError::Divisor(divisor_text.to_owned()));
    }
    Ok(amount
        .saturating_add(divisor - 1)
        .div_euclid(divisor)
        .to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "acme", "uid": "u1",
                "labels": {"app": "w", "b": "say \"hi\""}, "annotations": {"x.io/y": "z"}},
            "spec": {"serviceAccountName": "default", "containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}}},
                {"name": "d"}]}
        }))
        .unwrap()
    }

    fn facts(pod: &Pod) -> PodFacts<'_> {
        PodFacts {
            pod,
            node_name: "n1",
            host_ip: "192.0.2.1",
            pod_ip: "10.244.0.2",
            capacity: Capacity {
                cpus: 4,
                memory_bytes: 8 << 30,
                storage_bytes: 1 << 30,
            },
        }
    }

    #[test]
    fn fields_of_the_pod() {
        let pod = pod();
        for (path, value) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "acme"),
            ("metadata.uid", "u1"),
            ("metadata.labels['app']", "w"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['x.io/y']", "z"),
            ("metadata.labels", "app=\"w\"\nb=\"say \\\"hi\\\"\""),
            ("spec.nodeName", "n1"),
            ("spec.serviceAccountName", "default"),
            ("status.hostIP", "192.0.2.1"),
            ("status.podIP", "10.244.0.2"),
        ] {
            let selector = ObjectFieldSelector {
                field_path: path.into(),
                ..Default::default()
            };
            assert_eq!(
                field(&facts(&pod), &selector).as_deref(),
                Ok(value),
                "{path}"
            );
        }
        let selector = ObjectFieldSelector {
            field_path: "spec.x".into(),
            ..Default::default()
        };
        assert_eq!(
            field(&facts(&pod), &selector),
            Err(FieldsError::Path("spec.x".into()))
        );
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        let pod = pod();
        for (container, name, divisor, value) in [
            ("c", "limits.cpu", "", "2"),
            ("c", "limits.cpu", "1m", "1500"),
            ("c", "limits.memory", "1Mi", "64"),
            ("c", "limits.memory", "", "67108864"),
            ("c", "requests.cpu", "1m", "1500"),
            ("d", "limits.cpu", "", "4"),
            ("d", "requests.memory", "", "0"),
        ] {
            let selector: ResourceFieldSelector = serde_json::from_value(json!({
                "containerName": container, "resource": name, "divisor": divisor}))
            .unwrap();
            assert_eq!(
                resource(&facts(&pod), None, &selector).as_deref(),
                Ok(value),
                "{container} {name} {divisor}"
            );
        }
    }
}

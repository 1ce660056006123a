//! Labels, annotations and finalizers that are the project's own, and the labels of namespaces.

use hypernetes_types::kinds::{
    CLONE_ANNOTATION, CLONE_SNAPSHOT_ANNOTATION, GROUP, KERNEL_ANNOTATION, NETWORK_LABEL,
    PAUSED_ANNOTATION, SUSPENDED_ANNOTATION, TENANT_LABEL,
};
use serde_json::Value;

use crate::{
    ALLOWED_KERNELS_ANNOTATION, AdmissionRequest, FieldError, Operation, POD_NETWORK_ANNOTATION,
};

/// Value of a label.
pub(crate) fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("labels")?.get(key)?.as_str()
}

/// Value of an annotation.
pub(crate) fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object
        .get("metadata")?
        .get("annotations")?
        .get(key)?
        .as_str()
}

/// Domain of labels and annotations by which a tenant's own command line keeps its records. Nothing
/// of the project trusts them.
const CLIENT_DOMAIN: &str = "hyper.hypernetes.io";
/// Annotations of a pod that the node honours and that may change while it runs.
const WISHES: [&str; 5] = [
    "hypernetes.io/max-restarts",
    "hypernetes.io/stop-grace-seconds",
    "hypernetes.io/timing",
    PAUSED_ANNOTATION,
    SUSPENDED_ANNOTATION,
];

/// Annotations of a pod that the node reads when it starts.
const FOR_THE_START: [&str; 4] = [
    KERNEL_ANNOTATION,
    POD_NETWORK_ANNOTATION,
    CLONE_ANNOTATION,
    CLONE_SNAPSHOT_ANNOTATION,
];

/// A pod is paused or it is not, and it is suspended or it is not.
pub(crate) fn check_paused(object: &Value, causes: &mut Vec<FieldError>) {
    let annotations = object
        .get("metadata")
        .and_then(|meta| meta.get("annotations"));
    for key in [PAUSED_ANNOTATION, SUSPENDED_ANNOTATION] {
        let value = annotations.and_then(|all| all.get(key));
        if value.is_some_and(|value| !matches!(value.as_str(), Some("true" | "false"))) {
            causes.push(FieldError::new(
                format!("metadata.annotations[{key}]"),
                "must be \"true\" or \"false\"",
            ));
        }
    }
}

/// Whether it can be the name of an object: a DNS subdomain.
fn is_name(name: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let plain = |c: char| edge(Some(c)) || matches!(c, '-' | '.');
    name.len() <= 253
        && name.chars().all(plain)
        && name
            .split('.')
            .all(|part| edge(part.chars().next()) && edge(part.chars().next_back()))
}

/// A clone names a pod or a snapshot of its own namespace.
pub(crate) fn check_clone(object: &Value, causes: &mut Vec<FieldError>) {
    let annotations = object
        .get("metadata")
        .and_then(|meta| meta.get("annotations"));
    let get = |key: &str| annotations.and_then(|all| all.get(key));
    for (key, what) in [
        (CLONE_ANNOTATION, "a pod"),
        (CLONE_SNAPSHOT_ANNOTATION, "a PodSnapshot"),
    ] {
        if get(key).is_some_and(|value| !value.as_str().is_some_and(is_name)) {
            causes.push(FieldError::new(
                format!("metadata.annotations[{key}]"),
                format!("must be the name of {what}: lower case alphanumeric characters, '-' or '.', and an alphanumeric character at start and end"),
            ));
        }
    }
    if get(CLONE_ANNOTATION).is_some() && get(CLONE_SNAPSHOT_ANNOTATION).is_some() {
        causes.push(FieldError::new(
            format!("metadata.annotations[{CLONE_SNAPSHOT_ANNOTATION}]"),
            format!("may not be set beside {CLONE_ANNOTATION}: a pod goes on from one of them"),
        ));
    }
}

/// Whether the key's prefix is `hypernetes.io` or below it.
fn is_reserved(key: &str) -> bool {
    let Some((domain, _name)) = key.split_once('/') else {
        return false;
    };
    domain != CLIENT_DOMAIN
        && (domain == GROUP
            || domain
                .strip_suffix(GROUP)
                .is_some_and(|rest| rest.ends_with('.')))
}

/// Keys under the project's domain whose value differs between the two objects.
fn changed_keys<'a>(map: &str, old: Option<&'a Value>, new: &'a Value) -> Vec<&'a str> {
    let entries = |object: &'a Value| object.get("metadata").and_then(|m| m.get(map)?.as_object());
    let (before, after) = (old.and_then(entries), entries(new));
    let mut keys: Vec<&str> = before
        .into_iter()
        .chain(after)
        .flatten()
        .map(|(key, _value)| key.as_str())
        .filter(|key| is_reserved(key))
        .filter(|key| before.and_then(|m| m.get(*key)) != after.and_then(|m| m.get(*key)))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

fn finalizers(object: &Value) -> Vec<&str> {
    object
        .get("metadata")
        .and_then(|meta| meta.get("finalizers")?.as_array())
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .filter(|name| is_reserved(name))
        .collect()
}

/// Labels, annotations and finalizers under `hypernetes.io/` belong to controllers and operators;
/// the exceptions are what users say with them.
pub(crate) fn check_reserved(
    request: &AdmissionRequest<'_>,
    object: &Value,
    causes: &mut Vec<FieldError>,
) {
    if request.is_operator() {
        return;
    }
    let pod = request.is_kind("", "Pod");
    for key in changed_keys("labels", request.old_object, object) {
        // The namespace's network is the members' to choose; its name is checked apart.
        if request.is_kind("", "Namespace") && key == NETWORK_LABEL {
            continue;
        }
        causes.push(FieldError::new(
            format!("metadata.labels[{key}]"),
            "labels under hypernetes.io/ are set by controllers only",
        ));
    }
    for key in changed_keys("annotations", request.old_object, object) {
        if pod && WISHES.contains(&key) {
            continue;
        }
        if pod && FOR_THE_START.contains(&key) {
            if request.operation == Operation::Update {
                causes.push(FieldError::new(
                    format!("metadata.annotations[{key}]"),
                    "may not change: it is read when the pod starts",
                ));
            }
            continue;
        }
        causes.push(FieldError::new(
            format!("metadata.annotations[{key}]"),
            if pod {
                "is not known: a pod may carry hypernetes.io/kernel, network, max-restarts, stop-grace-seconds, timing, paused, suspended, clone-of and clone-of-snapshot"
            } else {
                "annotations under hypernetes.io/ are set by controllers only"
            },
        ));
    }
    let (before, after) = (
        request.old_object.map(finalizers).unwrap_or_default(),
        finalizers(object),
    );
    for name in before
        .iter()
        .filter(|name| !after.contains(name))
        .chain(after.iter().filter(|name| !before.contains(name)))
    {
        causes.push(FieldError::new(
            "metadata.finalizers",
            format!("{name} is added and removed by controllers only"),
        ));
    }
}

/// A namespace's tenant is set once, by an operator; its network is one of its own.
pub(crate) fn check_namespace(
    request: &AdmissionRequest<'_>,
    object: &Value,
    causes: &mut Vec<FieldError>,
) {
    let field = |key: &str| format!("metadata.labels[{key}]");
    let (old, new) = (
        request.old_object.and_then(|old| label(old, TENANT_LABEL)),
        label(object, TENANT_LABEL),
    );
    if old.is_some() && old != new {
        // Even an operator may not move a namespace: its pods and network are the old tenant's.
        causes.push(FieldError::new(
            field(TENANT_LABEL),
            "a namespace keeps its tenant for ever",
        ));
    }
    if let Some(tenant) = new
        && let Err(error) = tenant.parse::<hypernetes_types::TenantName>()
    {
        causes.push(FieldError::new(field(TENANT_LABEL), error.to_string()));
    }
    if request.operation == Operation::Create
        && !request.is_operator()
        && new.is_none()
        && is_tenant_member(request)
    {
        causes.push(FieldError::new(
            "metadata.name",
            "a tenant's namespaces are made by its Tenant object",
        ));
    }
    if let Some(network) = label(object, NETWORK_LABEL)
        && let Some(detail) = foreign_network(network)
    {
        causes.push(FieldError::new(field(NETWORK_LABEL), detail));
    }
    if let Some(kernels) = annotation(object, ALLOWED_KERNELS_ANNOTATION) {
        for kernel in kernels
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
        {
            if let Err(error) = kernel.parse::<hypernetes_types::KernelName>() {
                causes.push(FieldError::new(
                    format!("metadata.annotations[{ALLOWED_KERNELS_ANNOTATION}]"),
                    error.to_string(),
                ));
            }
        }
    }
}

fn is_tenant_member(request: &AdmissionRequest<'_>) -> bool {
    let prefix = hypernetes_types::kinds::TENANT_GROUP_PREFIX;
    request.groups.iter().any(|group| group.starts_with(prefix))
}

/// Why the name cannot be a network of the namespace: only a plain name is one, so that nothing
/// can lead to another namespace's network.
pub(crate) fn foreign_network(name: &str) -> Option<&'static str> {
    name.parse::<hypernetes_types::TenantName>()
        .is_err()
        .then_some("must be the plain name (RFC 1123 label) of one Network in this namespace")
}

//! Pods in a tenant's namespace.

use hypernetes_types::{
    Bandwidth, EGRESS_BANDWIDTH_ANNOTATION, INGRESS_BANDWIDTH_ANNOTATION,
    kinds::{KERNEL_ANNOTATION, NETWORK_LABEL},
};
use serde_json::Value;

use crate::{
    ALLOWED_KERNELS_ANNOTATION, AdmissionRequest, FieldError, Operation, POD_NETWORK_ANNOTATION,
    RUNTIME_CLASS, meta,
};

/// Volumes that are neither the host's nor able to reach it.
const SAFE_VOLUMES: [&str; 8] = [
    "emptyDir",
    "configMap",
    "secret",
    "downwardAPI",
    "projected",
    "persistentVolumeClaim",
    "ephemeral",
    "image",
];

const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

pub(crate) fn check(request: &AdmissionRequest<'_>, object: &Value, causes: &mut Vec<FieldError>) {
    // Status and binding are written by the node and the scheduler, whose roles allow just that.
    if !matches!(request.subresource, "" | "ephemeralcontainers" | "resize") {
        return;
    }
    let spec = &object["spec"];
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        if is_set(&spec[field]) {
            causes.push(FieldError::new(
                format!("spec.{field}"),
                "a tenant's pod may not join the node's namespaces",
            ));
        }
    }
    if spec["hostUsers"] == Value::Bool(true) {
        causes.push(FieldError::new(
            "spec.hostUsers",
            "a tenant's pod may not ask for the node's user namespace",
        ));
    }
    if request.operation == Operation::Create && is_set(&spec["nodeName"]) {
        causes.push(FieldError::new(
            "spec.nodeName",
            "is chosen by the scheduler",
        ));
    }
    let class = &spec["runtimeClassName"];
    if is_set(class) && class.as_str() != Some(RUNTIME_CLASS) {
        causes.push(FieldError::new(
            "spec.runtimeClassName",
            format!("must be {RUNTIME_CLASS}: every pod of a tenant has a microVM of its own"),
        ));
    }
    let priority = spec["priorityClassName"].as_str().unwrap_or_default();
    if priority.starts_with("system-") {
        causes.push(FieldError::new(
            "spec.priorityClassName",
            "system classes are the operator's",
        ));
    }
    volumes(spec, causes);
    for list in CONTAINER_LISTS {
        for (index, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            check_container(container, &format!("spec.{list}[{index}]"), causes);
        }
    }
    if request.subresource.is_empty() && request.operation == Operation::Create {
        kernel(request, object, causes);
        network(object, causes);
        if let Err(error) = Bandwidth::read(|key| meta::annotation(object, key)) {
            let field = format!("metadata.annotations[{}]", error.annotation);
            causes.push(FieldError::new(field, error.to_string()));
        }
    }
    if let (Operation::Update, Some(old)) = (request.operation, request.old_object) {
        bandwidth_stays(old, object, causes);
    }
}

/// Asks for something: neither absent nor the empty value.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Number(number) => number.as_i64() != Some(0),
        _ => true,
    }
}

fn volumes(spec: &Value, causes: &mut Vec<FieldError>) {
    for (index, volume) in spec["volumes"].as_array().into_iter().flatten().enumerate() {
        for (source, value) in volume.as_object().into_iter().flatten() {
            if source == "name" || value.is_null() || SAFE_VOLUMES.contains(&source.as_str()) {
                continue;
            }
            causes.push(FieldError::new(
                format!("spec.volumes[{index}].{source}"),
                if source == "hostPath" {
                    "a tenant's pod may not see the node's file system"
                } else {
                    "volumes that the node would mount are not for tenants"
                },
            ));
        }
    }
}

fn check_container(container: &Value, path: &str, causes: &mut Vec<FieldError>) {
    if is_set(&container["securityContext"]["privileged"]) {
        causes.push(FieldError::new(
            format!("{path}.securityContext.privileged"),
            "privileged containers are not allowed in a tenant's namespace; a container has its \
             own kernel, and capabilities.add gives it what it needs there",
        ));
    }
    for (index, port) in container["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        for field in ["hostPort", "hostIP"] {
            if is_set(&port[field]) {
                causes.push(FieldError::new(
                    format!("{path}.ports[{index}].{field}"),
                    "a tenant's pod may not take ports of the node",
                ));
            }
        }
    }
}

fn kernel(request: &AdmissionRequest<'_>, object: &Value, causes: &mut Vec<FieldError>) {
    let Some(kernel) = meta::annotation(object, KERNEL_ANNOTATION) else {
        return;
    };
    let field = format!("metadata.annotations[{KERNEL_ANNOTATION}]");
    if let Err(error) = kernel.parse::<hypernetes_types::KernelName>() {
        causes.push(FieldError::new(field, error.to_string()));
        return;
    }
    let allowed = request
        .namespace_object
        .and_then(|ns| meta::annotation(ns, ALLOWED_KERNELS_ANNOTATION));
    if let Some(allowed) = allowed
        && !allowed.split(',').any(|name| name.trim() == kernel)
    {
        causes.push(FieldError::new(
            field,
            format!("kernel {kernel} is not allowed for this tenant; allowed: {allowed}"),
        ));
    }
}

/// Limits are set when the pod starts.
fn bandwidth_stays(old: &Value, object: &Value, causes: &mut Vec<FieldError>) {
    for key in [INGRESS_BANDWIDTH_ANNOTATION, EGRESS_BANDWIDTH_ANNOTATION] {
        if meta::annotation(old, key) != meta::annotation(object, key) {
            causes.push(FieldError::new(
                format!("metadata.annotations[{key}]"),
                "may not change: it is read when the pod starts",
            ));
        }
    }
}

fn network(object: &Value, causes: &mut Vec<FieldError>) {
    if let Some(name) = meta::annotation(object, POD_NETWORK_ANNOTATION)
        && let Some(detail) = meta::foreign_network(name)
    {
        causes.push(FieldError::new(
            format!("metadata.annotations[{POD_NETWORK_ANNOTATION}]"),
            detail,
        ));
    }
    if meta::label(object, NETWORK_LABEL).is_some() {
        causes.push(FieldError::new(
            format!("metadata.labels[{NETWORK_LABEL}]"),
            "is for namespaces; a pod names its network in the annotation of that name",
        ));
    }
}

/// The pod with the tenant's runtime class, if it names none.
pub(crate) fn defaulted(object: &Value) -> Option<Value> {
    let spec = object.get("spec")?;
    if is_set(&spec["runtimeClassName"]) {
        return None;
    }
    let mut object = object.clone();
    object
        .get_mut("spec")?
        .as_object_mut()?
        .insert("runtimeClassName".into(), RUNTIME_CLASS.into());
    Some(object)
}

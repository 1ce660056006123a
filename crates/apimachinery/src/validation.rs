//! The rules of each kind, with findings in upstream's words.

mod certificates;
mod cluster;
mod container;
mod error;
mod jobs;
mod legacy;
mod meta;
mod ours;
mod parts;
mod path;
mod pod;
mod policies;
mod service;
mod storage;
mod volume;
mod workloads;

use serde_json::Value;

use crate::kinds::ResourceKind;

pub use error::{ErrorKind, FieldError};
pub use parts::quality_of_service;
pub use path::Path;
pub use policies::SYSTEM_PRIORITIES;
pub use workloads::validate_scale;

/// Findings beyond this number are not collected: a hostile object shall not make a long answer.
const MAX_FINDINGS: usize = 100;

/// Everything wrong with a new object, its defaults filled in.
pub fn validate_create(kind: &ResourceKind, object: &Value) -> Vec<FieldError> {
    let mut found = Found::default();
    meta::validate(kind, object, &mut found);
    specific(kind, object, &mut found);
    found.errors
}

/// Everything wrong with a change of an object.
pub fn validate_update(kind: &ResourceKind, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Found::default();
    meta::validate(kind, new, &mut found);
    meta::validate_update(new, old, &mut found);
    specific(kind, new, &mut found);
    match (kind.group, kind.kind) {
        ("", "Pod") => pod::validate_update(new, old, &mut found),
        ("", "ConfigMap" | "Secret") => cluster::data_update(kind, new, old, &mut found),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => {
            cluster::binding_update(new, old, &mut found);
        }
        ("node.k8s.io", "RuntimeClass") => {
            found.immutable(&Path::root("handler"), &new["handler"], &old["handler"]);
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => {
            found
                .errors
                .extend(crate::crd::validate_definition_update(new, old));
        }
        ("apps" | "batch", _) => workloads::validate_update(kind, new, old, &mut found),
        ("autoscaling" | "policy" | "scheduling.k8s.io", _)
        | ("", "LimitRange" | "ResourceQuota") => {
            policies::validate_update(kind, new, old, &mut found);
        }
        ("storage.k8s.io", _) | ("", "PersistentVolume" | "PersistentVolumeClaim") => {
            storage::validate_update(kind, new, old, &mut found);
        }
        ("", "Service") => service::service_update(new, old, &mut found),
        ("discovery.k8s.io", "EndpointSlice") => {
            service::endpoint_slice_update(new, old, &mut found);
        }
        ("hypernetes.io", "Network") => ours::network_update(new, old, &mut found),
        ("hypernetes.io", "Tenant") => ours::tenant_update(new, old, &mut found),
        _ => {}
    }
    found.errors
}

/// Everything wrong with new ephemeral containers of a pod.
pub fn validate_ephemeral_update(kind: &ResourceKind, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Found::default();
    meta::validate_update(new, old, &mut found);
    specific(kind, new, &mut found);
    parts::ephemeral_update(new, old, &mut found);
    found.errors
}

/// Everything wrong with new resources of a pod's containers.
pub fn validate_resize(kind: &ResourceKind, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Found::default();
    meta::validate_update(new, old, &mut found);
    specific(kind, new, &mut found);
    parts::resize_update(new, old, &mut found);
    found.errors
}

/// Everything wrong with a change of an object's status; the spec is not looked at.
pub fn validate_status_update(kind: &ResourceKind, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Found::default();
    meta::validate(kind, new, &mut found);
    meta::validate_update(new, old, &mut found);
    match (kind.group, kind.kind) {
        ("", "Pod") => pod::validate_status(new, &mut found),
        ("certificates.k8s.io", _) => certificates::status(new, old, &mut found),
        _ => {}
    }
    found.errors
}

fn specific(kind: &ResourceKind, object: &Value, found: &mut Found) {
    match (kind.group, kind.kind) {
        ("", "Pod") => pod::validate(object, found),
        ("", "ConfigMap") => cluster::config_map(object, found),
        ("", "Secret") => cluster::secret(object, found),
        ("", "Service") => service::service(object, found),
        ("discovery.k8s.io", "EndpointSlice") => service::endpoint_slice(object, found),
        ("", "ReplicationController") => legacy::replication_controller(object, found),
        ("", "Endpoints") => legacy::endpoints(object, found),
        ("certificates.k8s.io", _) => certificates::request(object, found),
        ("coordination.k8s.io", "Lease") => cluster::lease(object, found),
        ("node.k8s.io", "RuntimeClass") => cluster::runtime_class(object, found),
        ("rbac.authorization.k8s.io", "Role") => cluster::role(object, true, found),
        ("rbac.authorization.k8s.io", "ClusterRole") => cluster::role(object, false, found),
        ("rbac.authorization.k8s.io", "RoleBinding") => cluster::binding(object, true, found),
        ("rbac.authorization.k8s.io", "ClusterRoleBinding") => {
            cluster::binding(object, false, found);
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => {
            found.errors.extend(crate::crd::validate_definition(object));
        }
        ("apps" | "batch", _) => workloads::validate(kind, object, found),
        ("autoscaling" | "policy" | "scheduling.k8s.io", _)
        | ("", "LimitRange" | "ResourceQuota") => policies::validate(kind, object, found),
        ("storage.k8s.io", _) | ("", "PersistentVolume" | "PersistentVolumeClaim") => {
            storage::validate(kind, object, found);
        }
        ("hypernetes.io", "Tenant") => ours::tenant(object, found),
        ("hypernetes.io", "Network") => ours::network(object, found),
        _ => {}
    }
}

/// Findings as they come.
#[derive(Debug, Default)]
struct Found {
    errors: Vec<FieldError>,
}

impl Found {
    fn add(&mut self, kind: ErrorKind, path: &Path, value: &Value, detail: impl Into<String>) {
        if self.errors.len() < MAX_FINDINGS {
            self.errors.push(FieldError {
                kind,
                field: path.to_string(),
                value: value.clone(),
                detail: detail.into(),
            });
        }
    }

    fn required(&mut self, path: &Path, detail: &str) {
        self.add(ErrorKind::Required, path, &Value::Null, detail);
    }

    fn invalid(&mut self, path: &Path, value: &Value, detail: impl Into<String>) {
        self.add(ErrorKind::Invalid, path, value, detail);
    }

    /// One finding for each text, as the name rules give them.
    fn all_invalid(&mut self, path: &Path, value: &str, details: Vec<String>) {
        for detail in details {
            self.invalid(path, &value.into(), detail);
        }
    }

    fn forbidden(&mut self, path: &Path, detail: impl Into<String>) {
        self.add(ErrorKind::Forbidden, path, &Value::Null, detail);
    }

    fn duplicate(&mut self, path: &Path, value: &Value) {
        self.add(ErrorKind::Duplicate, path, value, "");
    }

    fn not_supported(&mut self, path: &Path, value: &Value, supported: &[&str]) {
        let mut supported = supported.to_vec();
        supported.sort_unstable();
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = format!("supported values: {}", list.join(", "));
        self.add(ErrorKind::NotSupported, path, value, detail);
    }

    fn too_long(&mut self, path: &Path, limit: usize) {
        let detail = format!("may not be more than {limit} bytes");
        self.add(ErrorKind::TooLong, path, &Value::Null, detail);
    }

    fn one_of(&mut self, path: &Path, value: &Value, supported: &[&str]) {
        match value.as_str() {
            Some(text) if supported.contains(&text) => {}
            None | Some("") => self.required(path, ""),
            Some(_) => self.not_supported(path, value, supported),
        }
    }

    fn immutable(&mut self, path: &Path, new: &Value, old: &Value) {
        if new != old {
            self.invalid(path, new, "field is immutable");
        }
    }

    fn not_negative(&mut self, path: &Path, value: &Value) {
        if value.as_i64().is_some_and(|n| n < 0) {
            self.invalid(path, value, "must be greater than or equal to 0");
        }
    }
}

/// Items of a list with their paths; nothing if it is no list.
fn items<'a>(value: &'a Value, path: &Path) -> impl Iterator<Item = (&'a Value, Path)> + use<'a> {
    let path = path.clone();
    value
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
        .map(move |(index, item)| (item, path.index(index)))
}

/// Text of a field; empty if it is absent.
fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests;

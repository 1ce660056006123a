//! RoleBindings in a tenant's namespace: only the tenant's own members, only the tenant's roles.

use hypernetes_types::kinds::TENANT_GROUP_PREFIX;
use serde_json::Value;

use crate::{AdmissionRequest, FieldError};

/// ClusterRoles that a tenant may be given.
const ROLE_PREFIX: &str = "hypernetes-tenant-";

pub(crate) fn check(request: &AdmissionRequest<'_>, object: &Value, causes: &mut Vec<FieldError>) {
    let (Some(tenant), Some(namespace)) = (request.tenant(), request.namespace) else {
        return;
    };
    if request.is_operator() {
        return;
    }
    let role = &object["roleRef"];
    let (kind, name) = (
        role["kind"].as_str(),
        role["name"].as_str().unwrap_or_default(),
    );
    match kind {
        Some("Role") => {}
        Some("ClusterRole") if name.starts_with(ROLE_PREFIX) => {}
        _ => causes.push(FieldError::new(
            "roleRef",
            format!(
                "must be a Role of this namespace or a ClusterRole {ROLE_PREFIX}*, not {name:?}"
            ),
        )),
    }
    let members = format!("{TENANT_GROUP_PREFIX}{tenant}:");
    for (index, subject) in object["subjects"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let name = subject["name"].as_str().unwrap_or_default();
        let inside = match subject["kind"].as_str() {
            Some("Group") => name.starts_with(&members),
            Some("ServiceAccount") => subject["namespace"].as_str() == Some(namespace),
            _ => false,
        };
        if !inside {
            causes.push(FieldError::new(
                format!("subjects[{index}]"),
                format!(
                    "is outside the tenant: must be a group {members}* or a ServiceAccount of \
                     namespace {namespace}"
                ),
            ));
        }
    }
}

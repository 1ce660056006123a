//! Admission rules: what may be written, and what this node can run.
//!
//! Pure functions over JSON. The embedded API server calls [`admit`] on every write; behind a
//! webhook the same function serves an upstream cluster. [`unsupported`] is the node's table of
//! what it does: a pod that asks for more is refused with the names of the fields.
//!
//! Nothing here reads or writes anything, and nothing here trusts the shape of an object: a field
//! of the wrong type is treated as a value that is not allowed.
#![forbid(unsafe_code)]

mod binding;
mod field;
mod meta;
mod network;
mod pod;
mod service;
mod support;
mod tenant;

use serde_json::Value;

pub use field::FieldError;
pub use support::unsupported;

/// Name of the only runtime class.
pub const RUNTIME_CLASS: &str = "hypernetes";
/// Annotation of a namespace: kernels that its pods may name, separated by commas. Mirrored from
/// the Tenant's `spec.kernels`; absent = every imported kernel.
pub const ALLOWED_KERNELS_ANNOTATION: &str = "hypernetes.io/allowed-kernels";
/// Annotation of a namespace: how many ports of the node its services may have. Mirrored from the
/// Tenant's `spec.nodePorts`; absent = none.
pub const NODE_PORTS_ANNOTATION: &str = "hypernetes.io/node-ports";
/// Annotation of a pod: the network in its namespace that it joins, instead of the namespace's.
pub const POD_NETWORK_ANNOTATION: &str = "hypernetes.io/network";
/// Group of the project's own controllers where they do not run as `system:masters`.
pub const CONTROLLERS_GROUP: &str = "system:hypernetes:controllers";
/// Group that is above the rules for members.
pub const MASTERS_GROUP: &str = "system:masters";

/// What a write does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A new object.
    Create,
    /// A changed object: `object` after the change, `old_object` before it.
    Update,
    /// The object goes; `old_object` is it.
    Delete,
    /// A subresource that is called, such as `exec`.
    Connect,
}

/// Group, version and kind of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gvk<'a> {
    /// API group; empty for the core group.
    pub group: &'a str,
    /// Version.
    pub version: &'a str,
    /// Kind.
    pub kind: &'a str,
}

/// A write to be judged.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionRequest<'a> {
    /// What it does.
    pub operation: Operation,
    /// Name of the caller.
    pub user: &'a str,
    /// Groups of the caller.
    pub groups: &'a [String],
    /// Kind of the object.
    pub gvk: Gvk<'a>,
    /// Plural name of the resource.
    pub resource: &'a str,
    /// Subresource; empty for the object itself.
    pub subresource: &'a str,
    /// Namespace of the object, if its kind has one.
    pub namespace: Option<&'a str>,
    /// The Namespace object of `namespace`.
    pub namespace_object: Option<&'a Value>,
    /// The object as it would be stored; absent on delete.
    pub object: Option<&'a Value>,
    /// The object as it is; absent on create.
    pub old_object: Option<&'a Value>,
}

/// A write that may go on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// The object to store instead of the given one; `None` = unchanged.
    pub object: Option<Value>,
    /// Sentences for the client's `Warning:` headers.
    pub warnings: Vec<String>,
}

/// A write that may not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Denied {
    /// For people; names every field of `causes`.
    pub message: String,
    /// One for each offending field.
    pub causes: Vec<FieldError>,
}

impl Denied {
    fn from_causes(causes: Vec<FieldError>) -> Self {
        let list: Vec<String> = causes.iter().map(ToString::to_string).collect();
        Self {
            message: list.join("; "),
            causes,
        }
    }
}

impl AdmissionRequest<'_> {
    /// The caller is an operator or one of the project's controllers.
    pub(crate) fn is_operator(&self) -> bool {
        self.groups
            .iter()
            .any(|group| group == MASTERS_GROUP || group == CONTROLLERS_GROUP)
    }

    /// Tenant that owns the request's namespace.
    pub(crate) fn tenant(&self) -> Option<&str> {
        meta::label(
            self.namespace_object?,
            hypernetes_types::kinds::TENANT_LABEL,
        )
    }

    pub(crate) fn is_kind(&self, group: &str, kind: &str) -> bool {
        self.gvk.group == group && self.gvk.kind == kind
    }
}

/// Judges a write and gives the object its defaults.
///
/// Deletes and connects are judged by their roles alone and always pass here.
pub fn admit(request: &AdmissionRequest<'_>) -> Result<Outcome, Denied> {
    if matches!(request.operation, Operation::Delete | Operation::Connect) {
        return Ok(Outcome::default());
    }
    let Some(object) = request.object else {
        return Ok(Outcome::default());
    };
    let mut causes = Vec::new();
    let mut outcome = Outcome::default();
    meta::check_reserved(request, object, &mut causes);
    if request.is_kind("", "Namespace") {
        meta::check_namespace(request, object, &mut causes);
    }
    if request.is_kind(hypernetes_types::kinds::GROUP, "Network") && request.subresource.is_empty()
    {
        network::check(request, object, &mut causes);
    }
    if request.is_kind(hypernetes_types::kinds::GROUP, "Tenant") && request.subresource.is_empty() {
        tenant::check(object, &mut causes);
    }
    if request.is_kind("", "Service") && request.subresource.is_empty() {
        service::check(request, object, &mut causes);
    }
    if request.is_kind("", "Pod") && request.subresource.is_empty() {
        meta::check_paused(object, &mut causes);
        meta::check_clone(object, &mut causes);
    }
    if request.tenant().is_some() {
        if request.is_kind("rbac.authorization.k8s.io", "RoleBinding") {
            binding::check(request, object, &mut causes);
        }
        if request.is_kind("", "Pod") {
            pod::check(request, object, &mut causes);
            if causes.is_empty() && request.operation == Operation::Create {
                outcome.object = pod::defaulted(object);
            }
        }
    }
    if causes.is_empty() {
        Ok(outcome)
    } else {
        Err(Denied::from_causes(causes))
    }
}

#[cfg(test)]
mod tests;

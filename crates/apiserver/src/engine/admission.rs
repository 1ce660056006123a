//! What must hold of a write beyond the rules of its kind: namespaces that take objects, roles that
//! grant no more than their author holds, and the rules for tenants.

use hypernetes_apimachinery::{ResourceKind, Status, meta, validation::FieldError};
use hypernetes_identity::User;
use hypernetes_policy::{AdmissionRequest, Gvk, Operation, Outcome, admit, unsupported};
use hypernetes_store::Entry;
use serde_json::Value;

use super::{Call, Engine, strategy};
use crate::{
    authorizer::escalation,
    codec, definitions, keys,
    rbac::{Action, RoleRef, Rule},
    status::Result,
};

const RBAC: &str = "rbac.authorization.k8s.io";
/// Namespaces that stay.
const PERMANENT: [&str; 3] = ["default", "kube-system", "kube-public"];

impl Engine {
    /// The namespace that a new object goes into, which must exist and not be ending.
    pub(crate) fn open_namespace(
        &self,
        kind: &ResourceKind,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Entry>> {
        if !kind.namespaced {
            return Ok(None);
        }
        let entry = self
            .store
            .get(&keys::namespace(namespace))
            .ok_or_else(|| Status::not_found("", "namespaces", namespace))?;
        let object = codec::decode(&entry.value);
        if meta::is_deleting(&object) {
            let why = format!(
                "unable to create new content in namespace {namespace} because it is being \
                 terminated"
            );
            return Err(
                Status::forbidden(kind.group, kind.plural, name, &why).with_cause(
                    "NamespaceTerminating",
                    &format!("namespace {namespace} is being terminated"),
                    "metadata.namespace",
                ),
            );
        }
        Ok(Some(entry))
    }

    /// Refuses roles and bindings that grant more than their author holds.
    pub(crate) fn check_escalation(
        &self,
        call: &Call,
        object: &Value,
        old: Option<&Value>,
    ) -> Result<()> {
        if call.kind.group != RBAC {
            return Ok(());
        }
        let name = meta::name(object).unwrap_or_default();
        let namespace = call.info.namespace.as_str();
        match call.kind.kind {
            "Role" | "ClusterRole" => {
                if old.is_some_and(|old| old["rules"] == object["rules"]) {
                    return Ok(());
                }
                let exempt = self.may(&call.user, "escalate", call.kind.plural, namespace, name)?;
                self.check_holds(call, name, &Rule::of_role(object), exempt)
            }
            "RoleBinding" | "ClusterRoleBinding" => {
                let same = |old: &Value| {
                    old["roleRef"] == object["roleRef"] && old["subjects"] == object["subjects"]
                };
                if old.is_some_and(same) {
                    return Ok(());
                }
                let role = RoleRef::of_binding(object);
                let resource = if role.cluster {
                    "clusterroles"
                } else {
                    "roles"
                };
                let exempt = self.may(&call.user, "bind", resource, namespace, &role.name)?;
                match self.authorizer.rules_of_role(&role, namespace)? {
                    Some(rules) => self.check_holds(call, name, &rules, exempt),
                    // Upstream: a role that is not there grants nothing yet, but might later.
                    None if exempt => Ok(()),
                    None => Err(Status::not_found(RBAC, resource, &role.name)),
                }
            }
            _ => Ok(()),
        }
    }

    fn check_holds(&self, call: &Call, name: &str, rules: &[Rule], exempt: bool) -> Result<()> {
        if exempt {
            return Ok(());
        }
        let missing = self
            .authorizer
            .missing(&call.user, &call.info.namespace, rules)?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(escalation(
            &call.user,
            call.kind.group,
            call.kind.plural,
            name,
            &missing,
        ))
    }

    fn may(
        &self,
        user: &User,
        verb: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Result<bool> {
        let action = Action {
            verb,
            namespace,
            group: RBAC,
            resource,
            name,
            ..Action::default()
        };
        self.authorizer.allows(user, &action)
    }

    /// Binds a new pod to this server's node.
    pub(crate) fn bind_to_node(&self, kind: &ResourceKind, object: &mut Value) {
        let Some(node) = &self.node_name else { return };
        if kind.kind == "Pod"
            && object["spec"]["nodeName"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        {
            object["spec"]["nodeName"] = node.as_str().into();
        }
    }

    /// Refuses the deletion of what must stay.
    pub(crate) fn check_deletable(&self, call: &Call, name: &str) -> Result<()> {
        let group = hypernetes_types::kinds::GROUP;
        if definitions::is_definition(call.kind)
            && name.strip_suffix(group).is_some_and(|n| n.ends_with('.'))
        {
            let why = "the definitions of this server's own kinds may not be deleted";
            return Err(Status::forbidden(
                call.kind.group,
                call.kind.plural,
                name,
                why,
            ));
        }
        if call.kind.kind == "Namespace" && PERMANENT.contains(&name) {
            return Err(Status::forbidden(
                "",
                "namespaces",
                name,
                "this namespace may not be deleted",
            ));
        }
        Ok(())
    }
}

/// Refuses a pod that asks for what the node does not do, naming the fields: nothing is dropped in
/// silence.
fn check_supported(pod: &Value, old: Option<&Value>) -> Result<()> {
    let known = old.map(unsupported).unwrap_or_default();
    let errors: Vec<FieldError> = unsupported(pod)
        .into_iter()
        .filter(|error| !known.contains(error))
        .map(|error| FieldError::forbidden(&error.field, &error.detail))
        .collect();
    if errors.is_empty() {
        return Ok(());
    }
    Err(Status::invalid(
        "",
        "Pod",
        meta::name(pod).unwrap_or_default(),
        &errors,
    ))
}

// === the rules for tenants ===

/// What is judged, apart from the objects.
struct Judged<'a> {
    operation: Operation,
    subresource: &'a str,
    namespace_object: Option<Value>,
}

impl Engine {
    /// Judges a new object; the policy may complete it.
    pub(crate) fn admit_create(
        &self,
        call: &Call,
        object: &mut Value,
        home: Option<&Entry>,
    ) -> Result<Vec<String>> {
        let judged = Judged {
            operation: Operation::Create,
            subresource: "",
            namespace_object: home.map(|entry| codec::decode(&entry.value)),
        };
        let outcome = judge(call, &judged, Some(object), None)?;
        if let Some(changed) = outcome.object {
            *object = changed;
        }
        self.bound_create(call, object)?;
        if call.kind.kind == "Pod" {
            check_supported(object, None)?;
        }
        Ok(outcome.warnings)
    }

    /// Judges a changed object; the policy may complete it.
    pub(crate) fn admit_update(
        &self,
        call: &Call,
        object: &mut Value,
        old: &Value,
    ) -> Result<Vec<String>> {
        let judged = Judged {
            operation: Operation::Update,
            subresource: &call.info.subresource,
            namespace_object: self.namespace_object(call),
        };
        let outcome = judge(call, &judged, Some(object), Some(old))?;
        if let Some(changed) = outcome.object {
            *object = changed;
        }
        self.bound_update(call, object, old)?;
        if call.kind.kind == "Pod" {
            check_supported(object, Some(old))?;
        }
        Ok(outcome.warnings)
    }

    /// Judges a deletion.
    pub(crate) fn admit_delete(&self, call: &Call, old: &Value) -> Result<()> {
        let judged = Judged {
            operation: Operation::Delete,
            subresource: "",
            namespace_object: self.namespace_object(call),
        };
        judge(call, &judged, None, Some(old)).map(|_| ())
    }

    /// Judges the use of a subresource such as `exec`.
    pub(crate) fn admit_connect(&self, call: &Call, object: &Value) -> Result<()> {
        let judged = Judged {
            operation: Operation::Connect,
            subresource: &call.info.subresource,
            namespace_object: self.namespace_object(call),
        };
        judge(call, &judged, Some(object), Some(object)).map(|_| ())
    }

    fn namespace_object(&self, call: &Call) -> Option<Value> {
        let entry = self.store.get(&keys::namespace(&call.info.namespace))?;
        Some(codec::decode(&entry.value))
    }
}

fn judge(
    call: &Call,
    judged: &Judged<'_>,
    object: Option<&Value>,
    old: Option<&Value>,
) -> Result<Outcome> {
    let kind = strategy::stored_kind(call.kind);
    let request = AdmissionRequest {
        operation: judged.operation,
        user: &call.user.name,
        groups: &call.user.groups,
        gvk: Gvk {
            group: kind.group,
            version: kind.version,
            kind: kind.kind,
        },
        resource: kind.plural,
        subresource: judged.subresource,
        namespace: kind.namespaced.then_some(call.info.namespace.as_str()),
        namespace_object: judged.namespace_object.as_ref(),
        object,
        old_object: old,
    };
    admit(&request).map_err(|denied| {
        let name = object.or(old).and_then(meta::name).unwrap_or_default();
        let mut status =
            Status::forbidden(call.kind.group, call.kind.plural, name, &denied.message);
        for cause in &denied.causes {
            status = status.with_cause("FieldValueForbidden", &cause.detail, &cause.field);
        }
        status
    })
}

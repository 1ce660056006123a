//! Who may make a clone of a pod.

use hypernetes_apimachinery::{Status, meta};
use hypernetes_types::kinds::CLONE_ANNOTATION;
use serde_json::Value;

use super::{Call, Engine};
use crate::{rbac::Action, status::Result};

impl Engine {
    /// Refuses a clone whose author could not have looked into the source.
    ///
    /// A clone has in its memory what the source has. Who may exec in the source can read that; who may only
    /// create pods could otherwise read it in the clone. For whom a controller makes a pod is not known.
    pub(crate) fn check_clone(&self, call: &Call, object: &Value) -> Result<()> {
        if call.kind.kind != "Pod" || !call.kind.group.is_empty() {
            return Ok(());
        }
        let source = object["metadata"]["annotations"][CLONE_ANNOTATION].as_str();
        let Some(source) = source else {
            return Ok(());
        };
        let owners = object["metadata"]["ownerReferences"].as_array();
        let mut owners = owners.into_iter().flatten();
        if owners.any(|owner| owner["controller"] == true) {
            let name = meta::name(object).unwrap_or_default();
            let why = "a pod that belongs to a controller cannot be a clone";
            return Err(Status::forbidden("", "pods", name, why));
        }
        let action = Action {
            verb: "create",
            namespace: &call.info.namespace,
            resource: "pods",
            subresource: "exec",
            name: source,
            ..Action::default()
        };
        self.authorizer.check(&call.user, &action)
    }
}

//! Who may make a clone of a pod, and a snapshot.

use hypernetes_apimachinery::{Status, crd::own_kinds, meta};
use hypernetes_types::kinds::{CLONE_ANNOTATION, CLONE_SNAPSHOT_ANNOTATION, GROUP};
use serde_json::Value;

use super::{Call, Engine};
use crate::{codec, keys, rbac::Action, status::Result};

const SNAPSHOTS: &str = "podsnapshots";

impl Engine {
    /// Refuses a clone or a snapshot whose author could not have looked into the source.
    ///
    /// A clone has in its memory what the source has. Who may exec in the source can read that; who may only
    /// create pods could otherwise read it in the clone. For whom a controller makes a pod is not known.
    pub(crate) fn check_clone(&self, call: &Call, object: &Value) -> Result<()> {
        if call.kind.group == GROUP && call.kind.plural == SNAPSHOTS {
            let source = object["spec"]["podName"].as_str().unwrap_or_default();
            return self.check_sight(call, source);
        }
        if call.kind.kind != "Pod" || !call.kind.group.is_empty() {
            return Ok(());
        }
        let annotation = |key: &str| object["metadata"]["annotations"][key].as_str();
        let (pod, snapshot) = (
            annotation(CLONE_ANNOTATION),
            annotation(CLONE_SNAPSHOT_ANNOTATION),
        );
        if pod.is_none() && snapshot.is_none() {
            return Ok(());
        }
        let owners = object["metadata"]["ownerReferences"].as_array();
        let mut owners = owners.into_iter().flatten();
        if owners.any(|owner| owner["controller"] == true) {
            let name = meta::name(object).unwrap_or_default();
            let why = "a pod that belongs to a controller cannot be a clone";
            return Err(Status::forbidden("", "pods", name, why));
        }
        if let Some(pod) = pod {
            self.check_sight(call, pod)?;
        }
        match snapshot {
            Some(snapshot) => self.check_snapshot(call, snapshot),
            None => Ok(()),
        }
    }

    /// Who may go on from a snapshot may read it, and look into a pod like the one that it was taken of.
    fn check_snapshot(&self, call: &Call, name: &str) -> Result<()> {
        let read = Action {
            verb: "get",
            namespace: &call.info.namespace,
            group: GROUP,
            resource: SNAPSHOTS,
            name,
            ..Action::default()
        };
        self.authorizer.check(&call.user, &read)?;
        let missing = || Status::not_found(GROUP, SNAPSHOTS, name);
        let mut kinds = own_kinds().iter().map(|custom| custom.kind);
        let kind = kinds.find(|kind| kind.plural == SNAPSHOTS);
        let key = keys::object(kind.ok_or_else(missing)?, &call.info.namespace, name);
        let entry = self.store.get(&key).ok_or_else(missing)?;
        let snapshot = codec::decode(&entry.value);
        let source = snapshot["spec"]["podName"].as_str().unwrap_or_default();
        self.check_sight(call, source)
    }

    fn check_sight(&self, call: &Call, pod: &str) -> Result<()> {
        let action = Action {
            verb: "create",
            namespace: &call.info.namespace,
            resource: "pods",
            subresource: "exec",
            name: pod,
            ..Action::default()
        };
        self.authorizer.check(&call.user, &action)
    }
}

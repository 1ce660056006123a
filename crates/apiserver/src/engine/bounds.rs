//! What bounds pods beyond their own rules: limit ranges, priorities, quotas.
//!
//! Limits and priorities complete a new pod; quotas are charged in the same transaction that
//! makes the object, so that no two writes together take more than there is.

mod limits;
mod priority;
mod quota;
mod storage;

use hypernetes_apimachinery::{ResourceKind, Status, kinds};
use hypernetes_store::{Compare, Op};
use serde_json::Value;

use super::{Call, Engine};
use crate::{codec, keys, status::Result};

/// Writes that go into the transaction of the object that is charged.
#[derive(Debug, Default)]
pub(crate) struct Charge {
    pub(crate) compares: Vec<Compare>,
    pub(crate) ops: Vec<Op>,
}

impl Engine {
    /// Completes a new pod by the namespace's limits and its priority, and checks it against them.
    pub(crate) fn bound_create(&self, call: &Call, object: &mut Value) -> Result<()> {
        if is_storage(call.kind) {
            storage::protect(call.kind.kind, object);
        }
        if is_claim(call.kind) {
            storage::default_class(&self.objects("storageclasses", "")?, object);
            let ranges = self.objects("limitranges", &call.info.namespace)?;
            return storage::check_limits(&ranges, object)
                .map_err(|why| refusal(call, object, &why));
        }
        if !is_pod(call.kind) {
            return Ok(());
        }
        let ranges = self.objects("limitranges", &call.info.namespace)?;
        limits::complete(&ranges, object);
        limits::check(&ranges, object).map_err(|why| refusal(call, object, &why))?;
        let classes = self.objects("priorityclasses", "")?;
        priority::complete(&classes, object).map_err(|why| refusal(call, object, &why))
    }

    /// Checks a changed pod or claim against the namespace's limits.
    pub(crate) fn bound_update(&self, call: &Call, object: &Value, old: &Value) -> Result<()> {
        if is_claim(call.kind) && storage::is_resized(object, old) {
            let ranges = self.objects("limitranges", &call.info.namespace)?;
            let classes = self.objects("storageclasses", "")?;
            return storage::check_growth(&classes, object, old)
                .and_then(|()| storage::check_limits(&ranges, object))
                .map_err(|why| refusal(call, object, &why));
        }
        if !is_pod(call.kind) || resources(object) == resources(old) {
            return Ok(());
        }
        let ranges = self.objects("limitranges", &call.info.namespace)?;
        limits::check(&ranges, object).map_err(|why| refusal(call, object, &why))
    }

    /// Objects of a kind in a namespace.
    fn objects(&self, plural: &str, namespace: &str) -> Result<Vec<Value>> {
        let listed = self.listed(plural, namespace)?;
        Ok(listed.into_iter().map(|(_, object)| object).collect())
    }

    /// Objects of a kind in a namespace, with their revisions.
    fn listed(
        &self,
        plural: &str,
        namespace: &str,
    ) -> Result<Vec<(hypernetes_store::Entry, Value)>> {
        let group = match plural {
            "priorityclasses" => "scheduling.k8s.io",
            "storageclasses" => "storage.k8s.io",
            _ => "",
        };
        let kind = kinds::by_resource(group, "v1", plural).ok_or_else(Status::no_resource)?;
        let page = self
            .store
            .list(&keys::prefix(kind, namespace), None, None, None)
            .map_err(|error| crate::status::of_store(&error))?;
        let decoded = page.entries.into_iter().map(|entry| {
            let object = codec::decode(&entry.value);
            (entry, object)
        });
        Ok(decoded.collect())
    }
}

fn is_pod(kind: &ResourceKind) -> bool {
    kind.group.is_empty() && kind.plural == "pods"
}

fn is_claim(kind: &ResourceKind) -> bool {
    kind.group.is_empty() && kind.plural == "persistentvolumeclaims"
}

fn is_storage(kind: &ResourceKind) -> bool {
    is_claim(kind) || (kind.group.is_empty() && kind.plural == "persistentvolumes")
}

fn resources(pod: &Value) -> Vec<&Value> {
    let lists = ["containers", "initContainers"].into_iter();
    lists
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten())
        .map(|container| &container["resources"])
        .collect()
}

fn refusal(call: &Call, object: &Value, why: &str) -> Status {
    let name = hypernetes_apimachinery::meta::name(object).unwrap_or_default();
    Status::forbidden(call.kind.group, call.kind.plural, name, why)
}

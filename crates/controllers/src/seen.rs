//! What is decoded of an object that is looked at in passing: a watch shows whole objects, of which most controllers
//! need to know no more than whose they are.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::{Resource, api::ApiResource, core::DynamicResourceScope, runtime::watcher::Config};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// How a kind is watched: its objects come one after the other, where the pages of a list would be in memory as a whole,
/// once for each controller.
pub(crate) fn watching() -> Config {
    Config::default().streaming_lists()
}

/// An object's metadata, without who has written which field.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Seen {
    #[serde(deserialize_with = "metadata")]
    pub(crate) metadata: ObjectMeta,
}

/// A pod's metadata and volumes.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct SeenPod {
    #[serde(deserialize_with = "metadata")]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    pub(crate) spec: SeenSpec,
}

/// A pod's volumes.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct SeenSpec {
    #[serde(default)]
    pub(crate) volumes: Vec<Value>,
}

macro_rules! resource {
    ($type:ty) => {
        impl Resource for $type {
            type DynamicType = ApiResource;
            type Scope = DynamicResourceScope;

            fn kind(resource: &ApiResource) -> Cow<'_, str> {
                resource.kind.as_str().into()
            }

            fn group(resource: &ApiResource) -> Cow<'_, str> {
                resource.group.as_str().into()
            }

            fn version(resource: &ApiResource) -> Cow<'_, str> {
                resource.version.as_str().into()
            }

            fn api_version(resource: &ApiResource) -> Cow<'_, str> {
                resource.api_version.as_str().into()
            }

            fn plural(resource: &ApiResource) -> Cow<'_, str> {
                resource.plural.as_str().into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource!(Seen);
resource!(SeenPod);

/// What is skipped here is never built in memory, which `ObjectMeta` does with all that it knows.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    finalizers: Option<Vec<String>>,
}

fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let seen = Metadata::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: seen.name,
        namespace: seen.namespace,
        uid: seen.uid,
        resource_version: seen.resource_version,
        generation: seen.generation,
        creation_timestamp: seen.creation_timestamp,
        deletion_timestamp: seen.deletion_timestamp,
        labels: seen.labels,
        owner_references: seen.owner_references,
        finalizers: seen.finalizers,
        ..ObjectMeta::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_controllers_ask_for_is_seen_and_the_rest_is_not() {
        let pod = json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {
                "resourceVersion": "7", "name": "p", "namespace": "n", "uid": "u", "generation": 2,
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z",
                "labels": {"a": "b"}, "annotations": {"large": "x"}, "finalizers": ["f"],
                "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "ou",
                    "controller": true}],
                "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {"containers": [{"name": "c"}], "volumes": [{"name": "v", "ephemeral": {}}]},
            "status": {"phase": "Running"},
        });
        let whole: k8s_openapi::api::core::v1::Pod = serde_json::from_value(pod.clone()).unwrap();
        let expected = ObjectMeta {
            annotations: None,
            managed_fields: None,
            ..whole.metadata
        };
        let seen: Seen = serde_json::from_value(pod.clone()).unwrap();
        assert_eq!(seen.metadata, expected);
        let seen: SeenPod = serde_json::from_value(pod).unwrap();
        assert_eq!(seen.metadata, expected);
        assert_eq!(seen.spec.volumes, [json!({"name": "v", "ephemeral": {}})]);
    }

    #[test]
    fn a_bookmark_and_a_pod_without_volumes_are_read() {
        let mark = json!({"kind": "Pod", "apiVersion": "v1",
            "metadata": {"resourceVersion": "7", "creationTimestamp": null}, "spec": {"containers": null}});
        let seen: SeenPod = serde_json::from_value(mark).unwrap();
        assert_eq!(seen.metadata.resource_version.as_deref(), Some("7"));
        assert!(seen.spec.volumes.is_empty());
    }
}

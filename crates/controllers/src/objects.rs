//! Small verbs on objects that the reconcilers share.

use hypernetes_types::kinds::{CLEANUP_FINALIZER, GROUP, VERSION};
use kube::{
    Api, ResourceExt,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::error::{ReconcileError, code};

/// The kind `Tenant` as kube takes it.
pub(crate) fn tenant_resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, VERSION, "Tenant"))
}

/// The kind `Network` as kube takes it.
pub(crate) fn network_resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, VERSION, "Network"))
}

/// Makes the object unless one of its name is there; gives what is there.
pub(crate) async fn ensure<K>(api: &Api<K>, wanted: Value) -> Result<K, ReconcileError>
where
    K: Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = text(&wanted["metadata"]["name"]);
    let what = format!("{} {name}", text(&wanted["kind"]));
    let found = api
        .get_opt(&name)
        .await
        .map_err(ReconcileError::api(format!("read {what}")))?;
    if let Some(found) = found {
        return Ok(found);
    }
    let object: K = serde_json::from_value(wanted).map_err(|error| ReconcileError::Invalid {
        field: "object",
        rule: error.to_string(),
    })?;
    match api.create(&PostParams::default(), &object).await {
        Ok(made) => Ok(made),
        // Someone was quicker.
        Err(error) if code(&error) == Some(409) => api
            .get(&name)
            .await
            .map_err(ReconcileError::api(format!("read {what}"))),
        Err(error) => Err(ReconcileError::api(format!("create {what}"))(error)),
    }
}

/// Deletes an object that may not be there. True once it is gone.
pub(crate) async fn delete<K>(api: &Api<K>, name: &str) -> Result<bool, ReconcileError>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    match api.delete(name, &DeleteParams::default()).await {
        Ok(either) => Ok(either.is_right()),
        Err(error) if code(&error) == Some(404) => Ok(true),
        Err(error) => Err(ReconcileError::api(format!("delete {name}"))(error)),
    }
}

/// Sets or removes our finalizer; true if that was a change.
pub(crate) async fn set_finalizer(
    api: &Api<DynamicObject>,
    object: &DynamicObject,
    present: bool,
) -> Result<bool, ReconcileError> {
    let mut finalizers = object.finalizers().to_vec();
    if finalizers.iter().any(|name| name == CLEANUP_FINALIZER) == present {
        return Ok(false);
    }
    if present {
        finalizers.push(CLEANUP_FINALIZER.to_owned());
    } else {
        finalizers.retain(|name| name != CLEANUP_FINALIZER);
    }
    // With the resourceVersion: a list that was read is replaced only if it is still that list.
    let patch = json!({
        "metadata": {"finalizers": finalizers, "resourceVersion": object.resource_version()},
    });
    match api
        .patch(
            &object.name_any(),
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
    {
        Ok(_) => Ok(true),
        Err(error) if code(&error) == Some(404) => Ok(true),
        Err(error) => Err(ReconcileError::api(format!(
            "write finalizers of {}",
            object.name_any()
        ))(error)),
    }
}

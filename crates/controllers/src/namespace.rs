//! A namespace: what every one has, and how one is emptied.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
    core::ApiResource,
    discovery::{Discovery, Scope, verbs},
    runtime::controller::Action,
};
use serde_json::json;

use crate::{
    ControllersConfig,
    error::{ReconcileError, code},
    objects,
    seen::Seen,
    workloads::cluster::pods,
};

/// How soon an emptied namespace is looked at again if no event comes.
const AGAIN: Duration = Duration::from_millis(500);
/// Kinds that go last, once nothing uses them.
const LAST: &str = "networks";

/// Does what is next for one namespace.
pub(crate) async fn reconcile(
    namespace: &Namespace,
    context: &ControllersConfig,
) -> Result<Action, ReconcileError> {
    let name = namespace.name_any();
    if namespace.metadata.deletion_timestamp.is_some() {
        return empty(&name, &context.client).await;
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(context.client.clone(), &name);
    let account = json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "default", "namespace": name},
    });
    let maps: Api<ConfigMap> = Api::namespaced(context.client.clone(), &name);
    let root_ca = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "kube-root-ca.crt", "namespace": name},
        "data": {"ca.crt": context.ca_pem},
    });
    let both = async {
        objects::ensure(&accounts, account).await?;
        objects::ensure(&maps, root_ca).await?;
        Ok::<_, ReconcileError>(())
    };
    match both.await {
        Ok(()) => Ok(Action::await_change()),
        // Deleted meanwhile: the change is on its way.
        Err(ReconcileError::Api { source, .. }) if code(&source) == Some(403) => {
            Ok(Action::requeue(AGAIN))
        }
        Err(error) => Err(error),
    }
}

/// Deletes what is in the namespace, then lets it go.
async fn empty(name: &str, client: &Client) -> Result<Action, ReconcileError> {
    let pods: Api<Seen> = Api::namespaced_with(client.clone(), name, &pods().resource());
    let left = pods
        .list(&ListParams::default())
        .await
        .map_err(ReconcileError::api(format!(
            "list pods of namespace {name}"
        )))?;
    for pod in left
        .items
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
    {
        objects::delete(&pods, &pod.name_any()).await?;
    }
    if !left.items.is_empty() {
        return Ok(Action::requeue(AGAIN));
    }
    let kinds = namespaced_kinds(client).await?;
    let (last, first): (Vec<_>, Vec<_>) = kinds.into_iter().partition(|kind| kind.plural == LAST);
    for stage in [first, last] {
        let mut remaining = 0;
        for kind in stage {
            remaining += delete_all(name, &kind, client).await?;
        }
        if remaining > 0 {
            return Ok(Action::requeue(AGAIN));
        }
    }
    finalize(name, client).await?;
    Ok(Action::await_change())
}

/// Kinds that live in namespaces and can be listed and deleted.
async fn namespaced_kinds(client: &Client) -> Result<Vec<ApiResource>, ReconcileError> {
    let discovery = Discovery::new(client.clone())
        .run()
        .await
        .map_err(ReconcileError::api("find out which kinds there are"))?;
    let mut kinds = Vec::new();
    for group in discovery.groups() {
        for (kind, capabilities) in group.recommended_resources() {
            if capabilities.scope == Scope::Namespaced
                && capabilities.supports_operation(verbs::LIST)
                && capabilities.supports_operation(verbs::DELETE)
            {
                kinds.push(kind);
            }
        }
    }
    Ok(kinds)
}

/// Deletes all objects of a kind; how many are still there.
async fn delete_all(
    namespace: &str,
    kind: &ApiResource,
    client: &Client,
) -> Result<usize, ReconcileError> {
    let api: Api<Seen> = Api::namespaced_with(client.clone(), namespace, kind);
    let failed =
        |action: &str| ReconcileError::api(format!("{action} {} of {namespace}", kind.plural));
    let some = ListParams::default().limit(1);
    if api
        .list(&some)
        .await
        .map_err(failed("list"))?
        .items
        .is_empty()
    {
        return Ok(0);
    }
    api.delete_collection(&DeleteParams::background(), &ListParams::default())
        .await
        .map_err(failed("delete"))?;
    Ok(api
        .list(&ListParams::default())
        .await
        .map_err(failed("list"))?
        .items
        .len())
}

/// Takes the namespace's own finalizer away: the API server then removes it.
async fn finalize(name: &str, client: &Client) -> Result<(), ReconcileError> {
    let api: Api<Namespace> = Api::all(client.clone());
    let failed = || ReconcileError::api(format!("finalize namespace {name}"));
    let Some(mut namespace) = api.get_opt(name).await.map_err(failed())? else {
        return Ok(());
    };
    if let Some(spec) = &mut namespace.spec {
        spec.finalizers = Some(Vec::new());
    }
    let replaced = api
        .replace_subresource("finalize", name, &PostParams::default(), &namespace)
        .await;
    match replaced {
        Ok(_) => Ok(()),
        Err(error) if code(&error) == Some(404) => Ok(()),
        Err(error) => Err(failed()(error)),
    }
}

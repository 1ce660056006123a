//! A tenant: namespace, network, roles; and the way back.

use std::{collections::BTreeMap, time::Duration};

use hypernetes_identity::{TenantRole, tenant_group};
use hypernetes_types::{
    TenantName,
    kinds::{GROUP, TENANT_LABEL, VERSION},
};
use ipnet::Ipv4Net;
use k8s_openapi::api::{
    core::v1::{Namespace, ResourceQuota},
    rbac::v1::{ClusterRole, ClusterRoleBinding, RoleBinding},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams},
    runtime::controller::Action,
};
use serde_json::{Value, json};

use crate::{
    ControllersConfig,
    conditions::{self, Condition},
    error::ReconcileError,
    objects,
};

/// Address range of a tenant that names none.
const DEFAULT_CIDR: &str = "10.244.0.0/16";
const RBAC_GROUP: &str = "rbac.authorization.k8s.io";
/// On a namespace: how many ports of the node its services may have; absent if none.
const NODE_PORTS_ANNOTATION: &str = "hypernetes.io/node-ports";
const NODE_PORTS_QUOTA: &str = "node-ports";
const NODE_PORTS_RESOURCE: &str = "services.nodeports";
/// Bounds what the claims of a tenant ask for together.
const STORAGE_QUOTA: &str = "storage";
const STORAGE_RESOURCE: &str = "requests.storage";
/// Storage of a tenant that names none, and the word for as much as there is.
const DEFAULT_STORAGE: &str = "10Gi";
const UNLIMITED: &str = "unlimited";
/// On a namespace: kernels that its pods may name, as JSON; absent if any.
pub(crate) const KERNELS_ANNOTATION: &str = "hypernetes.io/allowed-kernels";

/// Does what is next for one tenant.
pub(crate) async fn reconcile(
    tenant: &DynamicObject,
    context: &ControllersConfig,
) -> Result<Action, ReconcileError> {
    let client = &context.client;
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &objects::tenant_resource());
    let name: TenantName =
        tenant
            .name_any()
            .parse()
            .map_err(|error: hypernetes_types::IdError| ReconcileError::Invalid {
                field: "metadata.name",
                rule: error.to_string(),
            })?;
    if tenant.metadata.deletion_timestamp.is_some() {
        return delete(tenant, &name, &api, client).await;
    }
    if objects::set_finalizer(&api, tenant, true).await? {
        // The write comes back as a change of the object.
        return Ok(Action::await_change());
    }
    let namespace = ensure_namespace(tenant, &name, client).await?;
    if let Some(why) = foreign(&namespace, &name) {
        let condition = Condition {
            kind: "Ready",
            ok: false,
            reason: "NamespaceTaken",
            message: why,
        };
        conditions::write(&api, tenant, &[condition], json!({})).await?;
        return Ok(Action::requeue(Duration::from_secs(30)));
    }
    ensure_node_ports(tenant, &namespace, &name, client).await?;
    ensure_storage(tenant, &name, client).await?;
    let network = ensure_network(tenant, &name, client).await?;
    ensure_roles(&name, client).await?;

    let network_ready = network.data["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let own = namespaces
        .list(&ListParams::default().labels(&format!("{TENANT_LABEL}={name}")))
        .await
        .map_err(ReconcileError::api("list the tenant's namespaces"))?;
    let names: Vec<String> = own.items.iter().map(ResourceExt::name_any).collect();
    let network_condition = Condition {
        kind: "NetworkReady",
        ok: network_ready,
        reason: if network_ready {
            "NetworkReady"
        } else {
            "NetworkPending"
        },
        message: if network_ready {
            String::new()
        } else {
            "network default is not ready".into()
        },
    };
    let ready = Condition {
        kind: "Ready",
        ok: network_ready,
        reason: if network_ready {
            "TenantReady"
        } else {
            "NetworkPending"
        },
        message: network_condition.message.clone(),
    };
    let fields = json!({"namespaces": names, "observedGeneration": tenant.metadata.generation});
    conditions::write(&api, tenant, &[network_condition, ready], fields).await?;
    Ok(Action::await_change())
}

/// Why the namespace is not this tenant's, if so.
fn foreign(namespace: &Namespace, name: &TenantName) -> Option<String> {
    match namespace.labels().get(TENANT_LABEL) {
        Some(owner) if owner == name.as_str() => None,
        Some(_) => Some(format!("namespace {name} belongs to another tenant")),
        None => Some(format!("namespace {name} exists and belongs to no tenant")),
    }
}

async fn ensure_namespace(
    tenant: &DynamicObject,
    name: &TenantName,
    client: &Client,
) -> Result<Namespace, ReconcileError> {
    let api: Api<Namespace> = Api::all(client.clone());
    let kernels = match &tenant.data["spec"]["kernels"] {
        Value::Array(names) => Some(Value::from(names.clone()).to_string()),
        _ => None,
    };
    let annotations: BTreeMap<&str, &String> = kernels
        .iter()
        .map(|kernels| (KERNELS_ANNOTATION, kernels))
        .collect();
    let wanted = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": name.as_str(),
            "labels": {TENANT_LABEL: name.as_str()},
            "annotations": annotations,
        },
    });
    let found = objects::ensure(&api, wanted).await?;
    let shown = found.annotations().get(KERNELS_ANNOTATION);
    if foreign(&found, name).is_none() && shown != kernels.as_ref() {
        let patch = json!({"metadata": {"annotations": {KERNELS_ANNOTATION: kernels}}});
        return api
            .patch(name.as_str(), &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map_err(ReconcileError::api(format!("annotate namespace {name}")));
    }
    Ok(found)
}

/// Lets services of the namespace have ports of the node, as many as the tenant's object says. The
/// quota is there before services may be of that type, and goes after them.
async fn ensure_node_ports(
    tenant: &DynamicObject,
    namespace: &Namespace,
    name: &TenantName,
    client: &Client,
) -> Result<(), ReconcileError> {
    let count = tenant.data["spec"]["nodePorts"].as_u64().unwrap_or(0);
    let annotation = (count > 0).then(|| count.to_string());
    let quotas: Api<ResourceQuota> = Api::namespaced(client.clone(), name.as_str());
    let shown = namespace.annotations().get(NODE_PORTS_ANNOTATION);
    if annotation.is_some() || shown.is_some() {
        let hard = json!({NODE_PORTS_RESOURCE: count.to_string()});
        ensure_quota(&quotas, NODE_PORTS_QUOTA, name, hard).await?;
    }
    if shown != annotation.as_ref() {
        let patch = json!({"metadata": {"annotations": {NODE_PORTS_ANNOTATION: annotation}}});
        Api::<Namespace>::all(client.clone())
            .patch(name.as_str(), &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map_err(ReconcileError::api(format!("annotate namespace {name}")))?;
    }
    Ok(())
}

/// Bounds the tenant's storage: one tenant does not fill the node unless an operator lets it.
async fn ensure_storage(
    tenant: &DynamicObject,
    name: &TenantName,
    client: &Client,
) -> Result<(), ReconcileError> {
    let quotas: Api<ResourceQuota> = Api::namespaced(client.clone(), name.as_str());
    let storage = tenant.data["spec"]["storage"].as_str();
    let storage = storage.unwrap_or(DEFAULT_STORAGE);
    if storage == UNLIMITED {
        objects::delete(&quotas, STORAGE_QUOTA).await?;
        return Ok(());
    }
    ensure_quota(
        &quotas,
        STORAGE_QUOTA,
        name,
        json!({STORAGE_RESOURCE: storage}),
    )
    .await
}

/// Makes a quota of the tenant's namespace say what it shall.
async fn ensure_quota(
    quotas: &Api<ResourceQuota>,
    quota: &str,
    tenant: &TenantName,
    hard: Value,
) -> Result<(), ReconcileError> {
    let wanted = json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": quota, "namespace": tenant.as_str()},
        "spec": {"hard": hard},
    });
    let found = objects::ensure(quotas, wanted).await?;
    let is = serde_json::to_value(&found).unwrap_or_default()["spec"]["hard"].take();
    if is != hard {
        let patch = Patch::Merge(json!({"spec": {"hard": hard}}));
        quotas
            .patch(quota, &PatchParams::default(), &patch)
            .await
            .map_err(ReconcileError::api(format!(
                "set quota {quota} of tenant {tenant}"
            )))?;
    }
    Ok(())
}

async fn ensure_network(
    tenant: &DynamicObject,
    name: &TenantName,
    client: &Client,
) -> Result<DynamicObject, ReconcileError> {
    let cidr = tenant.data["spec"]["network"]["default"]["cidr"]
        .as_str()
        .unwrap_or(DEFAULT_CIDR);
    let net: Ipv4Net = cidr.parse().map_err(|_wrong| ReconcileError::Invalid {
        field: "spec.network.default.cidr",
        rule: format!("{cidr:?} is no IPv4 address range"),
    })?;
    let gateway = net.hosts().next().ok_or_else(|| ReconcileError::Invalid {
        field: "spec.network.default.cidr",
        rule: format!("{cidr} has no room for pods"),
    })?;
    let api: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), name.as_str(), &objects::network_resource());
    let wanted = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Network",
        "metadata": {"name": "default", "namespace": name.as_str()},
        "spec": {
            "subnets": [{"cidr": net.trunc().to_string(), "gateway": gateway.to_string()}],
            "external": {"snat": true},
        },
    });
    objects::ensure(&api, wanted).await
}

/// Names of the cluster-wide role and binding that show a tenant to its members.
fn cluster_role_name(tenant: &TenantName) -> String {
    format!("hypernetes:tenant:{tenant}")
}

async fn ensure_roles(name: &TenantName, client: &Client) -> Result<(), ReconcileError> {
    let subject = |role: TenantRole| json!({"kind": "Group", "apiGroup": RBAC_GROUP, "name": tenant_group(name, role)});
    let bindings: Api<RoleBinding> = Api::namespaced(client.clone(), name.as_str());
    for role in TenantRole::ALL {
        let wanted = json!({
            "apiVersion": format!("{RBAC_GROUP}/v1"),
            "kind": "RoleBinding",
            "metadata": {"name": role.cluster_role(), "namespace": name.as_str()},
            "roleRef": {"apiGroup": RBAC_GROUP, "kind": "ClusterRole", "name": role.cluster_role()},
            "subjects": [subject(role)],
        });
        objects::ensure(&bindings, wanted).await?;
    }
    let metadata = json!({"name": cluster_role_name(name)});
    let role = json!({
        "apiVersion": format!("{RBAC_GROUP}/v1"),
        "kind": "ClusterRole",
        "metadata": metadata,
        "rules": [
            {"apiGroups": [GROUP], "resources": ["tenants", "tenants/status"], "resourceNames": [name.as_str()], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["namespaces"], "resourceNames": [name.as_str()], "verbs": ["get"]},
        ],
    });
    let roles: Api<ClusterRole> = Api::all(client.clone());
    objects::ensure(&roles, role).await?;
    let binding = json!({
        "apiVersion": format!("{RBAC_GROUP}/v1"),
        "kind": "ClusterRoleBinding",
        "metadata": metadata,
        "roleRef": {"apiGroup": RBAC_GROUP, "kind": "ClusterRole", "name": cluster_role_name(name)},
        "subjects": TenantRole::ALL.map(subject),
    });
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    objects::ensure(&bindings, binding).await?;
    Ok(())
}

/// Namespaces first, with all in them; then the roles; then the tenant itself.
async fn delete(
    tenant: &DynamicObject,
    name: &TenantName,
    api: &Api<DynamicObject>,
    client: &Client,
) -> Result<Action, ReconcileError> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let own = namespaces
        .list(&ListParams::default().labels(&format!("{TENANT_LABEL}={name}")))
        .await
        .map_err(ReconcileError::api("list the tenant's namespaces"))?;
    let mut left = Vec::new();
    for namespace in &own.items {
        let gone = namespace.metadata.deletion_timestamp.is_none()
            && objects::delete(&namespaces, &namespace.name_any()).await?;
        if !gone {
            left.push(namespace.name_any());
        }
    }
    if !left.is_empty() {
        let condition = Condition {
            kind: "Ready",
            ok: false,
            reason: "Deleting",
            message: format!("waiting for namespaces {}", left.join(", ")),
        };
        conditions::write(api, tenant, &[condition], json!({"namespaces": left})).await?;
        // The end of a namespace wakes this up; the timer is for an event that was missed.
        return Ok(Action::requeue(Duration::from_secs(5)));
    }
    let role = cluster_role_name(name);
    objects::delete(&Api::<ClusterRoleBinding>::all(client.clone()), &role).await?;
    objects::delete(&Api::<ClusterRole>::all(client.clone()), &role).await?;
    objects::set_finalizer(api, tenant, false).await?;
    Ok(Action::await_change())
}

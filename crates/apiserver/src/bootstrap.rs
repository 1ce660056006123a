//! Objects that every cluster has: the first namespaces, and the roles that others refer to.
//!
//! Roles are set to what is written here at every start; bindings and namespaces are only made if
//! they are not there, so that an operator may change them.

use http::HeaderMap;
use hypernetes_apimachinery::{ResourceKind, crd, kinds, meta, validation::SYSTEM_PRIORITIES};
use hypernetes_identity::{
    ALL_AUTHENTICATED, ALL_UNAUTHENTICATED, TenantRole, User, WORKLOAD_CONTROLLERS,
};
use serde_json::{Value, json};

use crate::{
    engine::{Call, DeleteOptions, Engine, Part},
    query::Query,
    request_info::RequestInfo,
    server::StartError,
    services,
};

const RBAC: &str = "rbac.authorization.k8s.io";
const IMAGES: &str = kinds::images::GROUP;
const NAMESPACES: [&str; 3] = ["default", "kube-system", "kube-public"];

/// Makes what is not there.
pub(crate) async fn ensure(engine: &Engine) -> Result<(), StartError> {
    for name in NAMESPACES {
        ensure_one(
            engine,
            "",
            "namespaces",
            json!({"metadata": {"name": name}}),
            false,
        )
        .await?;
    }
    for (name, value) in SYSTEM_PRIORITIES {
        let class = json!({
            "metadata": {"name": name},
            "value": value,
            "description": match name {
                "system-node-critical" => "Used for system critical pods that must not be moved \
                    from their current node.",
                _ => "Used for system critical pods that must run in the cluster, but can be \
                    moved to another node if necessary.",
            },
        });
        ensure_one(engine, "scheduling.k8s.io", "priorityclasses", class, false).await?;
    }
    for mut definition in crd::own_definitions() {
        crd::prepare(&mut definition);
        ensure_one(
            engine,
            "apiextensions.k8s.io",
            "customresourcedefinitions",
            definition,
            true,
        )
        .await?;
    }
    for (name, rules) in cluster_roles() {
        let role = json!({"metadata": metadata(name), "rules": rules});
        ensure_one(engine, RBAC, "clusterroles", role, true).await?;
    }
    for (name, role, groups) in BINDINGS {
        let subjects: Vec<Value> = groups
            .iter()
            .map(|group| json!({"kind": "Group", "apiGroup": RBAC, "name": group}))
            .collect();
        let binding = json!({
            "metadata": metadata(name),
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role},
            "subjects": subjects,
        });
        ensure_one(engine, RBAC, "clusterrolebindings", binding, false).await?;
    }
    ensure_one(engine, "", "services", api_service(engine), false).await
}

/// The service by which pods reach this server.
fn api_service(engine: &Engine) -> Value {
    json!({
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "clusterIP": services::api_address(engine.service_range).to_string(),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443}],
        },
    })
}

fn metadata(name: &str) -> Value {
    json!({"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}})
}

const BINDINGS: [(&str, &str, &[&str]); 6] = [
    ("cluster-admin", "cluster-admin", &["system:masters"]),
    (
        WORKLOAD_CONTROLLERS,
        "cluster-admin",
        &[WORKLOAD_CONTROLLERS],
    ),
    ("system:discovery", "system:discovery", &[ALL_AUTHENTICATED]),
    (
        "system:basic-user",
        "system:basic-user",
        &[ALL_AUTHENTICATED],
    ),
    (
        "system:public-info-viewer",
        "system:public-info-viewer",
        &[ALL_AUTHENTICATED, ALL_UNAUTHENTICATED],
    ),
    (
        "hypernetes:catalogue-viewer",
        "hypernetes:catalogue-viewer",
        &[ALL_AUTHENTICATED],
    ),
];

const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 8] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

fn paths(paths: &[&str]) -> Value {
    json!({"nonResourceURLs": paths, "verbs": ["get"]})
}

fn cluster_roles() -> Vec<(&'static str, Value)> {
    let mut roles = vec![
        (
            "cluster-admin",
            json!([
                {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
                {"nonResourceURLs": ["*"], "verbs": ["*"]},
            ]),
        ),
        (
            "system:discovery",
            json!([paths(&[
                "/api",
                "/api/*",
                "/apis",
                "/apis/*",
                "/healthz",
                "/livez",
                "/openapi",
                "/openapi/*",
                "/readyz",
                "/version",
                "/version/",
            ])]),
        ),
        (
            "system:public-info-viewer",
            json!([paths(&[
                "/healthz",
                "/livez",
                "/readyz",
                "/version",
                "/version/"
            ])]),
        ),
        (
            "system:basic-user",
            json!([
                rule(
                    "authorization.k8s.io",
                    &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                    &["create"],
                ),
                rule(
                    "authentication.k8s.io",
                    &["selfsubjectreviews"],
                    &["create"]
                ),
            ]),
        ),
        (
            // Names that every user of the cluster chooses from.
            "hypernetes:catalogue-viewer",
            json!([
                rule("node.k8s.io", &["runtimeclasses"], &READ),
                rule("scheduling.k8s.io", &["priorityclasses"], &READ),
                rule("storage.k8s.io", &["storageclasses"], &READ),
            ]),
        ),
    ];
    for role in TenantRole::ALL {
        roles.push((role.cluster_role(), tenant_rules(role)));
    }
    roles
}

const WORKLOADS: [&str; 11] = [
    "daemonsets",
    "daemonsets/status",
    "deployments",
    "deployments/scale",
    "deployments/status",
    "replicasets",
    "replicasets/scale",
    "replicasets/status",
    "statefulsets",
    "statefulsets/scale",
    "statefulsets/status",
];
const BATCH: [&str; 4] = ["cronjobs", "cronjobs/status", "jobs", "jobs/status"];
const AUTOSCALERS: [&str; 2] = [
    "horizontalpodautoscalers",
    "horizontalpodautoscalers/status",
];
const BUDGETS: [&str; 2] = ["poddisruptionbudgets", "poddisruptionbudgets/status"];

/// The resources but for their status.
fn only_objects<'a>(resources: &[&'a str]) -> Vec<&'a str> {
    let objects = resources.iter().filter(|name| !name.ends_with("/status"));
    objects.copied().collect()
}

/// What members of a tenant may do in its namespaces. Only kinds that live in a namespace, and
/// nothing that reaches beyond it.
fn tenant_rules(role: TenantRole) -> Value {
    let mut rules = vec![
        rule("", &["namespaces"], &["get"]),
        rule(
            "",
            &[
                "pods",
                "pods/log",
                "pods/status",
                "configmaps",
                "serviceaccounts",
                "events",
                "services",
                "services/status",
                "persistentvolumeclaims",
                "persistentvolumeclaims/status",
                "endpoints",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "replicationcontrollers/status",
            ],
            &READ,
        ),
        rule(
            "",
            &["limitranges", "resourcequotas", "resourcequotas/status"],
            &READ,
        ),
        rule("apps", &WORKLOADS, &READ),
        rule("apps", &["controllerrevisions"], &READ),
        rule("batch", &BATCH, &READ),
        rule("autoscaling", &AUTOSCALERS, &READ),
        rule("policy", &BUDGETS, &READ),
        rule("discovery.k8s.io", &["endpointslices"], &READ),
        rule("metrics.k8s.io", &["pods"], &["get", "list"]),
        rule("events.k8s.io", &["events"], &READ),
        rule("coordination.k8s.io", &["leases"], &READ),
        rule("hypernetes.io", &["networks", "networks/status"], &READ),
        rule(
            "hypernetes.io",
            &["podsnapshots", "podsnapshots/status"],
            &READ,
        ),
        rule(IMAGES, &["images"], &READ),
        rule(IMAGES, &["images/config"], &["get"]),
    ];
    if role >= TenantRole::Edit {
        rules.extend([
            rule(
                "",
                &[
                    "pods",
                    "configmaps",
                    "secrets",
                    "serviceaccounts",
                    "services",
                    "persistentvolumeclaims",
                    "replicationcontrollers",
                    "replicationcontrollers/scale",
                ],
                &WRITE,
            ),
            rule(
                "",
                &["pods/attach", "pods/exec", "pods/portforward"],
                &["create", "get"],
            ),
            rule("", &["pods/eviction", "serviceaccounts/token"], &["create"]),
            rule(
                "",
                &["pods/ephemeralcontainers", "pods/resize"],
                &["get", "patch", "update"],
            ),
            rule(IMAGES, &["images"], &["delete", "deletecollection"]),
            rule(
                IMAGES,
                &["images/pull", "images/push", "images/tag"],
                &["create"],
            ),
            rule(IMAGES, &["images/archive"], &["create", "get"]),
            // It uses the namespace's accounts.
            rule(IMAGES, &["images/tags"], &["get"]),
            // The status is the controllers' to write.
            rule("apps", &only_objects(&WORKLOADS), &WRITE),
            rule("batch", &only_objects(&BATCH), &WRITE),
            rule("autoscaling", &only_objects(&AUTOSCALERS), &WRITE),
            rule("policy", &only_objects(&BUDGETS), &WRITE),
            rule("coordination.k8s.io", &["leases"], &WRITE),
            rule("hypernetes.io", &["podsnapshots"], &WRITE),
        ]);
    }
    if role >= TenantRole::Admin {
        rules.extend([
            rule("hypernetes.io", &["networks"], &WRITE),
            rule(RBAC, &["roles", "rolebindings"], &WRITE),
            rule(
                "authorization.k8s.io",
                &["localsubjectaccessreviews"],
                &["create"],
            ),
        ]);
    }
    Value::Array(rules)
}

async fn ensure_one(
    engine: &Engine,
    group: &'static str,
    plural: &'static str,
    object: Value,
    keep: bool,
) -> Result<(), StartError> {
    let version = "v1";
    let kind: &'static ResourceKind =
        kinds::by_resource(group, version, plural).ok_or_else(|| StartError::Bootstrap {
            object: plural.to_owned(),
            message: "the kind is not served".into(),
        })?;
    let name = meta::name(&object).unwrap_or_default().to_owned();
    let namespace = meta::namespace(&object).unwrap_or_default().to_owned();
    let failed = |message: String| StartError::Bootstrap {
        object: format!("{plural} {name}"),
        message,
    };
    let mut object = object;
    object["apiVersion"] = kind.api_version().into();
    object["kind"] = kind.kind.into();
    let call = |verb: &'static str| Call {
        kind,
        custom: None,
        info: RequestInfo {
            verb,
            is_resource: true,
            group: group.into(),
            version: version.into(),
            resource: plural.into(),
            name: name.clone(),
            namespace: namespace.clone(),
            ..RequestInfo::default()
        },
        query: Query::default(),
        headers: HeaderMap::new(),
        user: User::system("system:apiserver"),
    };
    // The range of services may be another than at the last start.
    if services::is_service(kind)
        && let Ok((_entry, stored)) = engine.find(kind, &namespace, &name)
        && stored["spec"]["clusterIP"] != object["spec"]["clusterIP"]
    {
        let deleted = engine
            .delete_object(
                &call("delete"),
                &namespace,
                &name,
                &DeleteOptions::default(),
            )
            .await;
        deleted.map_err(|status| failed(status.message))?;
    }
    match engine.find(kind, &namespace, &name) {
        Err(_absent) => {
            let created = engine.create_object(&call("create"), object).await;
            created.map(|_| ()).map_err(|status| failed(status.message))
        }
        Ok((entry, stored))
            if keep && (stored["rules"] != object["rules"] || stored["spec"] != object["spec"]) =>
        {
            let mut changed = stored;
            for field in ["rules", "spec"] {
                if let Some(value) = object.get_mut(field) {
                    changed[field] = value.take();
                }
            }
            let replaced = engine
                .replace(&call("update"), Part::Main, &entry, changed, false)
                .await;
            replaced
                .map(|_| ())
                .map_err(|status| failed(status.message))
        }
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_roles_name_only_kinds_that_live_in_a_namespace() {
        for role in TenantRole::ALL {
            for rule in tenant_rules(role).as_array().unwrap() {
                let group = rule["apiGroups"][0].as_str().unwrap();
                for resource in rule["resources"].as_array().unwrap() {
                    let resource = resource.as_str().unwrap();
                    let plural = resource.split('/').next().unwrap();
                    let own = crd::own_kinds().iter().map(|custom| custom.kind);
                    let kind = kinds::all()
                        .iter()
                        .chain(own)
                        .find(|k| k.group == group && k.plural == plural);
                    let kind = kind.unwrap_or_else(|| panic!("{resource} is not served"));
                    let own = plural == "namespaces" && rule["verbs"] == json!(["get"]);
                    assert!(kind.namespaced || own, "{role}: {resource}");
                }
                let text = rule.to_string();
                for word in [
                    "*",
                    "escalate",
                    "bind\"",
                    "impersonate",
                    "finalize",
                    "nodes",
                ] {
                    assert!(!text.contains(word), "{role}: {text}");
                }
            }
        }
    }

    #[test]
    fn viewers_see_no_secrets() {
        assert!(
            !tenant_rules(TenantRole::View)
                .to_string()
                .contains("secrets")
        );
        assert!(
            tenant_rules(TenantRole::Edit)
                .to_string()
                .contains("secrets")
        );
    }
}

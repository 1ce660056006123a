//! What Kubernetes fills in when an object leaves it out.

mod legacy;
mod pod;
mod service;
mod storage;
mod workloads;

use serde_json::{Map, Value, json};

use crate::{kinds::ResourceKind, meta};

pub use pod::image_pull_policy;

/// Fills in the defaults of the kind. Applying it twice is the same as once.
pub fn apply(kind: &ResourceKind, object: &mut Value) {
    match (kind.group, kind.kind) {
        ("", "Pod") => {
            if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
                pod::apply(spec);
            }
        }
        ("", "Secret") => secret(object),
        ("", "Service") => service::service(object),
        ("discovery.k8s.io", "EndpointSlice") => service::endpoint_slice(object),
        ("", "ReplicationController") => legacy::replication_controller(object),
        ("", "Endpoints") => legacy::endpoints(object),
        ("", "Namespace") => namespace(object),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => crate::crd::prepare(object),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => binding(object),
        ("hypernetes.io", "Network") => network(object),
        ("storage.k8s.io", _) | ("", "PersistentVolume" | "PersistentVolumeClaim") => {
            storage::apply(kind, object);
        }
        ("apps" | "autoscaling" | "batch" | "policy" | "scheduling.k8s.io", _)
        | ("", "LimitRange" | "ResourceQuota") => workloads::apply(kind, object),
        _ => {}
    }
}

/// Sets a field that is absent, null or empty text.
fn fill(object: &mut Map<String, Value>, field: &str, value: impl Into<Value>) {
    let absent = match object.get(field) {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(_) => false,
    };
    if absent {
        object.insert(field.to_owned(), value.into());
    }
}

/// As [`fill`], for numbers to which zero means absent.
fn fill_number(object: &mut Map<String, Value>, field: &str, value: i64) {
    if object
        .get(field)
        .is_none_or(|v| v.is_null() || v.as_i64() == Some(0))
    {
        object.insert(field.to_owned(), value.into());
    }
}

fn object_in<'a>(
    object: &'a mut Map<String, Value>,
    field: &str,
) -> Option<&'a mut Map<String, Value>> {
    object.get_mut(field)?.as_object_mut()
}

fn objects_in<'a>(
    object: &'a mut Map<String, Value>,
    field: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    object
        .get_mut(field)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
}

fn secret(object: &mut Value) {
    use base64::{Engine, engine::general_purpose::STANDARD};

    let Some(secret) = object.as_object_mut() else {
        return;
    };
    fill(secret, "type", "Opaque");
    // Written but never read: it becomes data.
    if let Some(Value::Object(texts)) = secret.remove("stringData") {
        let data = secret
            .entry("data")
            .or_insert_with(|| Value::Object(Map::new()));
        if data.is_null() {
            *data = Value::Object(Map::new());
        }
        if let Some(data) = data.as_object_mut() {
            for (key, value) in texts {
                let text = value.as_str().unwrap_or_default();
                data.insert(key, STANDARD.encode(text).into());
            }
        }
    }
}

fn namespace(object: &mut Value) {
    // The same label on every namespace, so that selectors can name one.
    if let Some(name) = meta::name(object).map(str::to_owned) {
        meta::set_label(object, "kubernetes.io/metadata.name", &name);
    }
    let Some(namespace) = object.as_object_mut() else {
        return;
    };
    if meta_is_new(namespace) {
        let spec = namespace.entry("spec").or_insert_with(|| json!({}));
        if let Some(spec) = spec.as_object_mut() {
            let listed = spec.get("finalizers").and_then(Value::as_array);
            if !listed.is_some_and(|l| l.iter().any(|f| f == "kubernetes")) {
                let mut list = listed.cloned().unwrap_or_default();
                list.push("kubernetes".into());
                spec.insert("finalizers".into(), list.into());
            }
        }
        let status = namespace.entry("status").or_insert_with(|| json!({}));
        if let Some(status) = status.as_object_mut() {
            fill(status, "phase", "Active");
        }
    }
}

/// A namespace that is being deleted loses its finalizer for good.
fn meta_is_new(object: &Map<String, Value>) -> bool {
    object
        .get("metadata")
        .and_then(|m| m.get("deletionTimestamp"))
        .is_none_or(Value::is_null)
}

fn binding(object: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    let Some(binding) = object.as_object_mut() else {
        return;
    };
    if let Some(role) = object_in(binding, "roleRef") {
        fill(role, "apiGroup", GROUP);
    }
    for subject in objects_in(binding, "subjects") {
        if matches!(
            subject.get("kind").and_then(Value::as_str),
            Some("User" | "Group")
        ) {
            fill(subject, "apiGroup", GROUP);
        }
    }
}

fn network(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    for subnet in objects_in(spec, "subnets") {
        let cidr = subnet
            .get("cidr")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if let Ok(net) = cidr.parse::<ipnet::Ipv4Net>()
            && let Some(first) = net.hosts().next()
        {
            fill(subnet, "gateway", first.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_api_version;

    fn defaulted(api_version: &str, kind: &str, mut object: Value) -> Value {
        let kind = by_api_version(api_version, kind).unwrap();
        apply(kind, &mut object);
        let mut twice = object.clone();
        apply(kind, &mut twice);
        assert_eq!(object, twice);
        object
    }

    #[test]
    fn secrets_are_opaque_and_have_data_only() {
        assert_eq!(
            defaulted(
                "v1",
                "Secret",
                json!({"data": {"a": "YQ=="}, "stringData": {"b": "hi"}})
            ),
            json!({"type": "Opaque", "data": {"a": "YQ==", "b": "aGk="}})
        );
    }

    #[test]
    fn namespaces_carry_their_name_and_finalizer() {
        assert_eq!(
            defaulted("v1", "Namespace", json!({"metadata": {"name": "x"}})),
            json!({
                "metadata": {"name": "x", "labels": {"kubernetes.io/metadata.name": "x"}},
                "spec": {"finalizers": ["kubernetes"]},
                "status": {"phase": "Active"},
            })
        );
        let ending = json!({"metadata": {"name": "x", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {}});
        assert_eq!(defaulted("v1", "Namespace", ending)["spec"], json!({}));
    }

    #[test]
    fn bindings_name_the_group_of_users_and_roles() {
        let binding = json!({
            "subjects": [{"kind": "User", "name": "a"}, {"kind": "ServiceAccount", "name": "b"}],
            "roleRef": {"kind": "Role", "name": "r"},
        });
        let out = defaulted("rbac.authorization.k8s.io/v1", "RoleBinding", binding);
        assert_eq!(out["subjects"][0]["apiGroup"], "rbac.authorization.k8s.io");
        assert_eq!(out["subjects"][1].get("apiGroup"), None);
        assert_eq!(out["roleRef"]["apiGroup"], "rbac.authorization.k8s.io");
    }

    #[test]
    fn networks_have_a_gateway() {
        let network = json!({"spec": {"subnets": [{"cidr": "10.1.0.0/16"}, {"cidr": "x"}]}});
        let out = defaulted("hypernetes.io/v1alpha1", "Network", network);
        assert_eq!(out["spec"]["subnets"][0]["gateway"], "10.1.0.1");
        assert_eq!(out["spec"]["subnets"][1].get("gateway"), None);
    }

    #[test]
    fn a_small_pod_becomes_what_upstream_makes_of_it() {
        let pod = json!({"spec": {"containers": [{"name": "c", "image": "nginx"}]}});
        assert_eq!(
            defaulted("v1", "Pod", pod)["spec"],
            json!({
                "containers": [{
                    "name": "c",
                    "image": "nginx",
                    "imagePullPolicy": "Always",
                    "resources": {},
                    "terminationMessagePath": "/dev/termination-log",
                    "terminationMessagePolicy": "File",
                }],
                "dnsPolicy": "ClusterFirst",
                "enableServiceLinks": true,
                "restartPolicy": "Always",
                "schedulerName": "default-scheduler",
                "securityContext": {},
                "terminationGracePeriodSeconds": 30,
            })
        );
    }

    #[test]
    fn the_deeper_fields_of_pods() {
        let pod = json!({"spec": {
            "serviceAccountName": "sa",
            "hostNetwork": true,
            "tolerations": [{"key": "a"}],
            "volumes": [
                {"name": "a"},
                {"name": "b", "secret": {"secretName": "s"}},
                {"name": "c", "downwardAPI": {"items": [{"path": "p", "fieldRef": {"fieldPath": "metadata.name"}}]}},
                {"name": "d", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}},
                {"name": "e", "hostPath": {"path": "/"}},
            ],
            "containers": [{
                "name": "c",
                "image": "nginx:1.2",
                "ports": [{"containerPort": 80}],
                "env": [{"name": "E", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                "livenessProbe": {"httpGet": {"port": 80}},
                "startupProbe": {"grpc": {"port": 1}, "periodSeconds": 0},
                "lifecycle": {"preStop": {"httpGet": {"port": 1}}},
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "100m"}},
            }],
        }});
        let spec = &defaulted("v1", "Pod", pod)["spec"];
        assert_eq!(spec["serviceAccount"], "sa");
        assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
        assert_eq!(spec["volumes"][1]["secret"]["defaultMode"], 420);
        assert_eq!(
            spec["volumes"][2]["downwardAPI"]["items"][0]["fieldRef"]["apiVersion"],
            "v1"
        );
        let projected = &spec["volumes"][3]["projected"];
        assert_eq!(projected["defaultMode"], 420);
        assert_eq!(
            projected["sources"][0]["serviceAccountToken"]["expirationSeconds"],
            3600
        );
        assert_eq!(spec["volumes"][4]["hostPath"]["type"], "");
        let container = &spec["containers"][0];
        assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        assert_eq!(
            container["ports"][0],
            json!({"containerPort": 80, "hostPort": 80, "protocol": "TCP"})
        );
        assert_eq!(
            container["env"][0]["valueFrom"]["fieldRef"]["apiVersion"],
            "v1"
        );
        assert_eq!(
            container["livenessProbe"],
            json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3})
        );
        assert_eq!(container["startupProbe"]["grpc"]["service"], "");
        assert_eq!(container["startupProbe"]["periodSeconds"], 10);
        assert_eq!(
            container["lifecycle"]["preStop"]["httpGet"]["scheme"],
            "HTTP"
        );
        assert_eq!(
            container["resources"]["requests"],
            json!({"cpu": "100m", "memory": "1Gi"})
        );
    }
}

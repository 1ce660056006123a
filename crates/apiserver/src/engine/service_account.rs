//! Service accounts of new pods: which one a pod is, and the volume that its token comes in.
//!
//! What upstream's `ServiceAccount` admission does. It is done where tokens are served and the server was
//! told to ([`crate::ApiServerConfig::mount_tokens`]).

use std::time::Duration;

use hypernetes_apimachinery::{ResourceKind, Status, kinds, meta};
use serde_json::{Value, json};

use super::Engine;
use crate::{codec, keys, status::Result};

const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const VOLUME_PREFIX: &str = "kube-api-access-";
/// Seconds that a token lives; upstream adds seven so that it can tell its own tokens.
const TOKEN_SECONDS: i64 = 3607;
/// The account of a namespace is made right after the namespace: it is worth a short wait.
const ATTEMPTS: u32 = 20;
const WAIT: Duration = Duration::from_millis(100);

impl Engine {
    /// Gives a new pod its service account, and the account's token if it wants one.
    pub(crate) async fn admit_account(
        &self,
        kind: &ResourceKind,
        namespace: &str,
        pod: &mut Value,
    ) -> Result<()> {
        let accounts = kinds::by_resource("", "v1", "serviceaccounts");
        let Some(accounts) = accounts.filter(|kind| kind.subresource("token").is_some()) else {
            return Ok(());
        };
        if kind.kind != "Pod" || !self.mount_tokens || !pod["spec"].is_object() {
            return Ok(());
        }
        let name = match pod["spec"]["serviceAccountName"].as_str() {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => "default".to_owned(),
        };
        let account = self.account(accounts, namespace, &name).await;
        let account = account.ok_or_else(|| {
            let pod = meta::name(pod).unwrap_or_default();
            let why = format!(
                "error looking up service account {namespace}/{name}: serviceaccount \"{name}\" not found"
            );
            Status::forbidden("", "pods", pod, &why)
        })?;
        pod["spec"]["serviceAccountName"] = name.as_str().into();
        pod["spec"]["serviceAccount"] = name.into();
        let secrets = &account["imagePullSecrets"];
        if is_empty(&pod["spec"]["imagePullSecrets"]) && !is_empty(secrets) {
            pod["spec"]["imagePullSecrets"] = secrets.clone();
        }
        let wanted = [&pod["spec"], &account]
            .into_iter()
            .find_map(|of| of["automountServiceAccountToken"].as_bool());
        if wanted.unwrap_or(true) {
            mount(pod);
        }
        Ok(())
    }

    async fn account(&self, kind: &ResourceKind, namespace: &str, name: &str) -> Option<Value> {
        let key = keys::object(kind, namespace, name);
        for remaining in (0..ATTEMPTS).rev() {
            if let Some(entry) = self.store.get(&key) {
                return Some(codec::decode(&entry.value));
            }
            if remaining > 0 {
                tokio::time::sleep(WAIT).await;
            }
        }
        None
    }
}

fn is_empty(list: &Value) -> bool {
    list.as_array().is_none_or(Vec::is_empty)
}

/// Adds the token's volume, and mounts it wherever nothing else is mounted in its place.
fn mount(pod: &mut Value) {
    let volumes = pod["spec"]["volumes"].as_array();
    let found = volumes.into_iter().flatten().find_map(|volume| {
        let name = volume["name"].as_str()?;
        name.starts_with(VOLUME_PREFIX).then(|| name.to_owned())
    });
    let name = found
        .clone()
        .unwrap_or_else(|| meta::generate(VOLUME_PREFIX));
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        let containers = pod["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let Some(fields) = container.as_object_mut() else {
                continue;
            };
            let mounts = fields
                .entry("volumeMounts")
                .or_insert_with(|| Value::Array(Vec::new()));
            if mounts.is_null() {
                *mounts = Value::Array(Vec::new());
            }
            let Some(mounts) = mounts.as_array_mut() else {
                continue;
            };
            if mounts.iter().any(|mount| mount["mountPath"] == MOUNT_PATH) {
                continue;
            }
            mounts.push(json!({"name": name, "readOnly": true, "mountPath": MOUNT_PATH}));
            mounted = true;
        }
    }
    if found.is_some() || !mounted {
        return;
    }
    let volume = json!({"name": name, "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt",
            "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace",
            "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]}});
    match pod["spec"].get_mut("volumes").and_then(Value::as_array_mut) {
        Some(volumes) => volumes.push(volume),
        None => pod["spec"]["volumes"] = json!([volume]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_mounted_once_and_not_over_anything() {
        let mut pod = json!({"spec": {"containers": [
            {"name": "a"},
            {"name": "b", "volumeMounts": [{"name": "own", "mountPath": MOUNT_PATH}]}]}});
        mount(&mut pod);
        let volume = pod["spec"]["volumes"][0].clone();
        let name = volume["name"].as_str().unwrap();
        assert!(name.starts_with(VOLUME_PREFIX) && name.len() == VOLUME_PREFIX.len() + 5);
        assert_eq!(
            pod["spec"]["containers"][0]["volumeMounts"],
            json!([{"name": name, "readOnly": true, "mountPath": MOUNT_PATH}])
        );
        assert_eq!(
            pod["spec"]["containers"][1]["volumeMounts"][0]["name"],
            "own"
        );
        let once = pod.clone();
        mount(&mut pod);
        assert_eq!(pod, once);
    }
}

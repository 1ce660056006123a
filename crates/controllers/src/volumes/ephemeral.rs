//! Claims that pods bring themselves: each goes with its pod.

use hypernetes_apimachinery::meta;
use kube::{ResourceExt, api::DynamicObject};
use serde_json::{Value, json};

use super::{Context, claims, wait};
use crate::{
    Reconciled,
    workloads::cluster::{Cluster, name, namespace, pods, uid},
};

/// Makes the claims of a new pod.
pub(super) async fn reconcile(context: &Context, seen: &DynamicObject) -> Reconciled {
    let any = |pod: &Value| {
        let volumes = pod["volumes"].as_array().into_iter().flatten();
        volumes
            .into_iter()
            .any(|volume| volume["ephemeral"].is_object())
    };
    if !any(&seen.data["spec"]) {
        return wait();
    }
    let cluster: &Cluster = &context.cluster;
    let place = seen.namespace().unwrap_or_default();
    let Some(pod) = cluster.get(&pods(), &place, &seen.name_any()).await? else {
        return wait();
    };
    let ended = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    if ended || meta::is_deleting(&pod) {
        return wait();
    }
    for volume in pod["spec"]["volumes"].as_array().into_iter().flatten() {
        let template = &volume["ephemeral"]["volumeClaimTemplate"];
        if !template.is_object() {
            continue;
        }
        let own = format!(
            "{}-{}",
            name(&pod),
            volume["name"].as_str().unwrap_or_default()
        );
        if cluster
            .get(&claims(), namespace(&pod), &own)
            .await?
            .is_some()
        {
            continue;
        }
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {
                "name": own, "namespace": namespace(&pod),
                "labels": template["metadata"]["labels"],
                "annotations": template["metadata"]["annotations"],
                "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": name(&pod),
                    "uid": uid(&pod), "controller": true, "blockOwnerDeletion": true}],
            },
            "spec": template["spec"],
        });
        match cluster.create(&claims(), namespace(&pod), &claim).await {
            Ok(_) => {}
            Err(error) if error.is_already_exists() => {}
            Err(error) => {
                let said = format!("ephemeral volume controller: {}", error.said());
                cluster.event(&pod, "Warning", "FailedCreate", &said).await;
                return Err(error);
            }
        }
    }
    wait()
}

//! A network: kept until no pod is on it, then removed from the node.

use std::time::Duration;

use hypernetes_network::NetworkError;
use hypernetes_types::NetworkId;
use ipnet::IpNet;
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams},
    runtime::controller::Action,
};
use serde_json::json;

use crate::{
    ControllersConfig,
    conditions::{self, Condition},
    error::ReconcileError,
    objects,
    seen::Seen,
    workloads::cluster::pods,
};

/// Does what is next for one network.
pub(crate) async fn reconcile(
    network: &DynamicObject,
    context: &ControllersConfig,
) -> Result<Action, ReconcileError> {
    let namespace = network.namespace().unwrap_or_default();
    let api: Api<DynamicObject> = Api::namespaced_with(
        context.client.clone(),
        &namespace,
        &objects::network_resource(),
    );
    if network.metadata.deletion_timestamp.is_some() {
        return delete(network, &namespace, &api, context).await;
    }
    if objects::set_finalizer(&api, network, true).await? {
        return Ok(Action::await_change());
    }
    let cidr = network.data["spec"]["subnets"][0]["cidr"]
        .as_str()
        .unwrap_or_default();
    let (condition, total) = match cidr.parse::<IpNet>() {
        Ok(net) => (
            Condition {
                kind: "Ready",
                ok: true,
                reason: "NetworkReady",
                message: String::new(),
            },
            pod_addresses(&net),
        ),
        Err(error) => {
            let message = format!("spec.subnets[0].cidr: {error}");
            (
                Condition {
                    kind: "Ready",
                    ok: false,
                    reason: "InvalidSubnet",
                    message,
                },
                0,
            )
        }
    };
    conditions::write(&api, network, &[condition], json!({"ipsTotal": total})).await?;
    Ok(Action::await_change())
}

/// Addresses that pods can have: without network, broadcast and gateway.
fn pod_addresses(net: &IpNet) -> u64 {
    let bits = u32::from(net.max_prefix_len() - net.prefix_len());
    1u64.checked_shl(bits).unwrap_or(u64::MAX).saturating_sub(3)
}

async fn delete(
    network: &DynamicObject,
    namespace: &str,
    api: &Api<DynamicObject>,
    context: &ControllersConfig,
) -> Result<Action, ReconcileError> {
    let pods: Api<Seen> =
        Api::namespaced_with(context.client.clone(), namespace, &pods().resource());
    let users = pods
        .list(&ListParams::default())
        .await
        .map_err(ReconcileError::api(format!(
            "list pods of namespace {namespace}"
        )))?;
    // Which of several networks a pod is on is the node's knowledge; the node also says no below.
    if !users.items.is_empty() {
        return wait(network, api, format!("{} pods are left", users.items.len())).await;
    }
    if let Some(driver) = &context.networks {
        let id = format!("{namespace}.{}", network.name_any());
        let id: NetworkId =
            id.parse()
                .map_err(|error: hypernetes_types::IdError| ReconcileError::Invalid {
                    field: "metadata.name",
                    rule: error.to_string(),
                })?;
        match driver.delete_network(&id).await {
            Ok(()) | Err(NetworkError::NoNetwork(_)) => {}
            Err(error @ NetworkError::InUse { .. }) => {
                return wait(network, api, error.to_string()).await;
            }
            Err(source) => {
                let network = id.to_string();
                return Err(ReconcileError::Network {
                    network,
                    source: Box::new(source),
                });
            }
        }
    }
    objects::set_finalizer(api, network, false).await?;
    Ok(Action::await_change())
}

async fn wait(
    network: &DynamicObject,
    api: &Api<DynamicObject>,
    why: String,
) -> Result<Action, ReconcileError> {
    let condition = Condition {
        kind: "Ready",
        ok: false,
        reason: "Deleting",
        message: why,
    };
    conditions::write(api, network, &[condition], json!({})).await?;
    Ok(Action::requeue(Duration::from_millis(500)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_addresses_of_a_range_are_no_pods() {
        assert_eq!(pod_addresses(&"10.0.0.0/24".parse().unwrap()), 253);
        assert_eq!(pod_addresses(&"10.0.0.0/30".parse().unwrap()), 1);
        assert_eq!(pod_addresses(&"10.0.0.0/32".parse().unwrap()), 0);
    }
}

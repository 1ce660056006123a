//! The Node object, its heartbeat, its Lease, and the RuntimeClass.

use std::{path::Path, time::Duration};

use hypernetes_telemetry::chain;
use jiff::Timestamp;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Namespace, Node as NodeObject},
    node::v1::RuntimeClass,
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{NodeletError, config::NodeletConfig, resources::Capacity, status::seconds};

/// The API level that the node behaves like.
const KUBELET_VERSION: &str = concat!("v1.36.2+hypernetes.", env!("CARGO_PKG_VERSION"));
const RUNTIME_VERSION: &str = concat!("hypernetes://", env!("CARGO_PKG_VERSION"));
const LEASE_NAMESPACE: &str = "kube-node-lease";
const RENEW: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
/// Lease renewals between two status heartbeats: five minutes, as a kubelet.
const RENEWALS_PER_STATUS: u32 = 30;

/// What this machine has.
pub(crate) fn capacity(state_dir: &Path) -> Capacity {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let storage =
        rustix::fs::statvfs(state_dir).map_or(0, |fs| fs.f_blocks.saturating_mul(fs.f_frsize));
    Capacity {
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_bytes: total_memory(&memory),
        storage_bytes: i64::try_from(storage).unwrap_or(i64::MAX),
    }
}

fn total_memory(meminfo: &str) -> i64 {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<i64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

fn text_of(path: &str) -> String {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

fn os_image() -> String {
    text_of("/etc/os-release")
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or_else(
            || "Linux".to_owned(),
            |name| name.trim_matches('"').to_owned(),
        )
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The status as it is now; `since` is when the node became ready.
fn status(config: &NodeletConfig, capacity: Capacity, since: Timestamp, now: Timestamp) -> Value {
    let condition = |kind: &str, value: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": value, "reason": reason, "message": message,
            "lastHeartbeatTime": seconds(now), "lastTransitionTime": seconds(since),
        })
    };
    let amounts = json!({
        "cpu": capacity.cpus.to_string(),
        "memory": format!("{}Ki", capacity.memory_bytes / 1024),
        "ephemeral-storage": format!("{}Ki", capacity.storage_bytes / 1024),
        "pods": config.max_pods.to_string(),
    });
    json!({
        "capacity": amounts,
        "allocatable": amounts,
        "addresses": [
            {"type": "InternalIP", "address": config.address.to_string()},
            {"type": "Hostname", "address": config.node_name},
        ],
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory",
                "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure",
                "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID",
                "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "nodeInfo": {
            "architecture": architecture(),
            "bootID": text_of("/proc/sys/kernel/random/boot_id"),
            "containerRuntimeVersion": RUNTIME_VERSION,
            "kernelVersion": text_of("/proc/sys/kernel/osrelease"),
            "kubeProxyVersion": "",
            "kubeletVersion": KUBELET_VERSION,
            "machineID": text_of("/etc/machine-id"),
            "operatingSystem": "linux",
            "osImage": os_image(),
            "systemUUID": "",
        },
    })
}

/// Creates the object unless it is there.
async fn ensure<K>(api: &Api<K>, name: &str, object: Value) -> Result<(), NodeletError>
where
    K: Resource + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let object: K = serde_json::from_value(object).map_err(|source| NodeletError::Object {
        name: name.to_owned(),
        source,
    })?;
    match api.create(&PostParams::default(), &object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(source) => Err(NodeletError::Register {
            what: name.to_owned(),
            source: Box::new(source),
        }),
    }
}

/// Makes the Node, its status, the RuntimeClass and the Lease's namespace exist.
pub(crate) async fn register(
    client: &Client,
    config: &NodeletConfig,
    capacity: Capacity,
    since: Timestamp,
) -> Result<(), NodeletError> {
    let name = &config.node_name;
    let nodes = Api::<NodeObject>::all(client.clone());
    let labels = json!({
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": architecture(),
    });
    let object = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels},
    });
    ensure(&nodes, name, object).await?;
    heartbeat(&nodes, config, capacity, since)
        .await
        .map_err(|source| NodeletError::Register {
            what: format!("status of node {name}"),
            source: Box::new(source),
        })?;
    let class = json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
        "metadata": {"name": hypernetes_policy::RUNTIME_CLASS},
        "handler": hypernetes_policy::RUNTIME_CLASS,
    });
    let classes = Api::<RuntimeClass>::all(client.clone());
    ensure(&classes, hypernetes_policy::RUNTIME_CLASS, class).await?;
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": LEASE_NAMESPACE},
    });
    ensure(
        &Api::<Namespace>::all(client.clone()),
        LEASE_NAMESPACE,
        namespace,
    )
    .await?;
    renew(client, config).await
}

async fn heartbeat(
    nodes: &Api<NodeObject>,
    config: &NodeletConfig,
    capacity: Capacity,
    since: Timestamp,
) -> Result<(), kube::Error> {
    let patch = json!({"status": status(config, capacity, since, Timestamp::now())});
    let (name, params) = (&config.node_name, PatchParams::default());
    nodes
        .patch_status(name, &params, &Patch::Merge(&patch))
        .await
        .map(|_node| ())
}

async fn renew(client: &Client, config: &NodeletConfig) -> Result<(), NodeletError> {
    let name = &config.node_name;
    let leases = Api::<Lease>::namespaced(client.clone(), LEASE_NAMESPACE);
    let spec = json!({
        "holderIdentity": name,
        "leaseDurationSeconds": LEASE_SECONDS,
        "renewTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(Timestamp::now()),
    });
    let patch = json!({"spec": spec});
    match leases
        .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let lease = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": name, "namespace": LEASE_NAMESPACE}, "spec": spec,
            });
            ensure(&leases, name, lease).await
        }
        Err(source) => Err(NodeletError::Register {
            what: format!("lease of node {name}"),
            source: Box::new(source),
        }),
    }
}

/// Renews the Lease, and from time to time the status, until the node stops.
pub(crate) async fn keep_alive(
    client: Client,
    config: NodeletConfig,
    capacity: Capacity,
    since: Timestamp,
    stop: CancellationToken,
) {
    let nodes = Api::<NodeObject>::all(client.clone());
    let mut tick = tokio::time::interval(RENEW);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut renewals = 0u32;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = renew(&client, &config).await {
            tracing::warn!(error = %chain(&error), "cannot renew the node's lease");
        }
        renewals += 1;
        if renewals.is_multiple_of(RENEWALS_PER_STATUS)
            && let Err(error) = heartbeat(&nodes, &config, capacity, since).await
        {
            tracing::warn!(error = %chain(&error), "cannot write the node's status");
            // Somebody deleted the Node: it comes back.
            if let Err(error) = register(&client, &config, capacity, since).await {
                tracing::warn!(error = %chain(&error), "cannot register the node");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo() {
        assert_eq!(
            total_memory("MemTotal:       24576 kB\nMemFree: 1 kB\n"),
            24576 * 1024
        );
        assert_eq!(total_memory(""), 0);
    }

    #[test]
    fn status_is_a_valid_node_status() {
        let config = NodeletConfig::new(
            "n1",
            "192.0.2.1".parse().unwrap(),
            "/".into(),
            "10.42.0.0/16".parse().unwrap(),
        );
        let capacity = Capacity {
            cpus: 2,
            memory_bytes: 1 << 30,
            storage_bytes: 1 << 30,
        };
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let status: k8s_openapi::api::core::v1::NodeStatus =
            serde_json::from_value(status(&config, capacity, now, now)).unwrap();
        assert_eq!(status.capacity.unwrap()["memory"].0, "1048576Ki");
        let info = status.node_info.unwrap();
        assert!(info.kubelet_version.starts_with("v1.36.2+hypernetes"));
        assert!(info.container_runtime_version.starts_with("hypernetes://"));
        assert!(
            status
                .conditions
                .unwrap()
                .iter()
                .any(|c| c.type_ == "Ready" && c.status == "True")
        );
    }
}

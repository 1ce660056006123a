//! The long steps of a pod: each does one planned action to its end and says what came of it.

mod container;
mod sandbox;

use std::{net::IpAddr, sync::Arc};

use hypernetes_image::ImageStore;
use hypernetes_network::{NetworkDriver, NetworkError};
use hypernetes_runtime::{
    ContainerState, ContainerStatus, PodRuntime, SandboxState, SandboxStatus,
};
use hypernetes_telemetry::{chain, traces};
use hypernetes_types::{ContainerId, NetworkId, SandboxId};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{DeleteParams, Preconditions},
};
use tracing::Span;

pub(crate) use container::Start;

use crate::{
    access::ImageAccess,
    config::NodeletConfig,
    events::Recorder,
    fields::PodFacts,
    network::{self, Names},
    resize::ResizeState,
    resources::Capacity,
    services::Services,
    sources::Sources,
    stop::Hooks,
    tokens::Tokens,
    turns::Turns,
    volumes::Built,
    wishes::Unfulfilled,
};

/// Reason of events about how long something took.
const TIMING: &str = "Timing";

/// What every pod's task works with.
pub(crate) struct Node {
    pub(crate) config: NodeletConfig,
    pub(crate) host_ip: String,
    pub(crate) capacity: Capacity,
    pub(crate) client: Client,
    pub(crate) runtime: Arc<dyn PodRuntime>,
    pub(crate) networks: Arc<dyn NetworkDriver>,
    pub(crate) sources: Sources,
    pub(crate) tokens: Tokens,
    pub(crate) access: ImageAccess,
    /// Where namespaces' own images are, if the cluster has such.
    pub(crate) images: Option<ImageStore>,
    pub(crate) events: Recorder,
    pub(crate) names: Names,
    pub(crate) services: Services,
    pub(crate) gates: network::Gates,
    /// At starting VMs and copying them.
    pub(crate) boots: Turns,
    /// At making and starting containers.
    pub(crate) starts: Turns,
    pub(crate) hooks: Hooks,
}

/// What came of a step.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Nothing to remember.
    Done,
    /// The sandbox runs and its volumes are written.
    SandboxUp { sandbox: SandboxId, volumes: Built },
    /// There is no sandbox; try again later.
    SandboxFailed,
    /// The same, because the pod that it is a clone of could not be cloned: why.
    CloneFailed(String),
    /// The file volumes are up to date.
    Refreshed(Built),
    /// The containers have what they ask for; these run again for it.
    Resized(Result<Vec<(String, ContainerId)>, ResizeState>),
    /// The containers stand still or go on, as they should.
    Paused(Result<(), Unfulfilled>),
    /// The VM is on the disk or goes on, as it should.
    Suspended(Result<(), Unfulfilled>),
    /// The container runs.
    Started(String),
    /// The container does not run; why.
    Trouble {
        container: String,
        reason: &'static str,
        message: String,
    },
    /// The containers were told to stop.
    Stopped,
}

impl Node {
    pub(crate) fn facts<'a>(&'a self, pod: &'a Pod, pod_ip: &'a str) -> PodFacts<'a> {
        PodFacts {
            pod,
            node_name: &self.config.node_name,
            host_ip: &self.host_ip,
            pod_ip,
            capacity: self.capacity,
        }
    }

    /// Network and address of a sandbox.
    pub(crate) async fn place_of(&self, sandbox: &SandboxId) -> Option<(NetworkId, IpAddr)> {
        let status = self.runtime.sandbox(sandbox).await?;
        Some((status.config.network?, status.address?))
    }

    /// Takes the pod out of the API: nothing of it is on this node any more.
    pub(crate) async fn delete_object(&self, pod: &Pod) -> Outcome {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let name = pod.metadata.name.clone().unwrap_or_default();
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match Api::<Pod>::namespaced(self.client.clone(), &namespace)
            .delete(&name, &params)
            .await
        {
            Ok(_) => Outcome::Done,
            // Gone, or a new pod of the same name.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Outcome::Done,
            Err(error) => {
                tracing::warn!(namespace, pod = name, error = %chain(&error), "cannot delete a pod's object");
                Outcome::SandboxFailed
            }
        }
    }

    /// Takes networks off the node that no pod is on; the next pod brings its network back.
    pub(crate) async fn retire_networks(&self) {
        let networks = match self.networks.list_networks().await {
            Ok(networks) => networks,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "cannot list the node's networks");
                return;
            }
        };
        for network in networks {
            let gate = self.gates.of(&network.id);
            let Ok(_alone) = gate.try_write() else {
                continue;
            };
            match self.networks.delete_network(&network.id).await {
                Ok(()) | Err(NetworkError::InUse { .. } | NetworkError::NoNetwork(_)) => {}
                Err(error) => {
                    let network = network.id.as_str();
                    tracing::warn!(network, error = %chain(&error), "cannot take a network off the node");
                }
            }
        }
    }

    /// Sandboxes of a pod by attempt, with the containers of all of them.
    pub(crate) async fn records(&self, uid: &str) -> (Vec<SandboxStatus>, Vec<ContainerStatus>) {
        let mut sandboxes: Vec<_> = self
            .runtime
            .list_sandboxes()
            .await
            .into_iter()
            .filter(|sandbox| sandbox.config.metadata.uid == uid)
            .collect();
        sandboxes.sort_by_key(|sandbox| sandbox.config.metadata.attempt);
        let mut containers = Vec::new();
        for sandbox in &sandboxes {
            let dead = sandbox.state != SandboxState::Ready;
            containers.extend(
                self.runtime
                    .list_containers(Some(&sandbox.id))
                    .await
                    .into_iter()
                    .map(|mut record| {
                        // Nothing runs in a VM that is not there.
                        if dead && record.state == ContainerState::Running {
                            record.state = ContainerState::Unknown;
                        }
                        record
                    }),
            );
        }
        (sandboxes, containers)
    }
}

/// A span as part of the pod's trace.
fn traced(pod: &Pod, span: Span) -> Span {
    let meta = &pod.metadata;
    span.record("namespace", meta.namespace.as_deref());
    span.record("pod", meta.name.as_deref());
    traces::adopt_uid(&span, meta.uid.as_deref().unwrap_or_default());
    span
}

//! The long steps of a pod: each does one planned action to its end and says what came of it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use hypernetes_image::ImageStore;
use hypernetes_network::{NetworkDriver, NetworkError};
use hypernetes_runtime::{
    ContainerState, PodRuntime, RuntimeError, SandboxState, SeccompProfile, VolumeConfig,
    VolumeKind,
};
use hypernetes_telemetry::{chain, traces};
use hypernetes_types::{ContainerId, NetworkId, SandboxId};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use kube::{
    Api, Client,
    api::{DeleteParams, Preconditions},
};
use tokio::time::Instant;
use tracing::{Instrument, Span, field::Empty, info_span};

use crate::{
    access::ImageAccess,
    claims,
    config::NodeletConfig,
    container, env,
    events::{Level, Recorder},
    fields::PodFacts,
    handler::Subject,
    network::{self, Names},
    pull,
    resize::ResizeState,
    resources::Capacity,
    roles, sandbox,
    services::Services,
    sources::Sources,
    stop::{Ending, Hooks},
    timing,
    tokens::Tokens,
    turns::Turns,
    volumes::{self, Built},
    wishes::{self, Unfulfilled},
};

/// Reason of events about how long something took.
const TIMING: &str = "Timing";
/// A hook that does not end is broken off after a day, or with its pod.
const HOOK_LIMIT: Duration = Duration::from_secs(24 * 3600);

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
    /// At starting VMs.
    pub(crate) boots: Turns,
    /// At making and starting containers.
    pub(crate) starts: Turns,
    pub(crate) hooks: Hooks,
}

/// A volume that is not in the guest, as an event says it.
struct Unwritten {
    reason: &'static str,
    message: String,
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

    async fn build_volumes(
        &self,
        pod: &Pod,
        spec: &k8s_openapi::api::core::v1::PodSpec,
    ) -> Result<Built, volumes::VolumeError> {
        let builder = volumes::Builder {
            sources: &self.sources,
            tokens: &self.tokens,
            facts: self.facts(pod, ""),
        };
        builder.build(spec).await
    }

    /// Boots the pod's VM on its network and writes the volumes.
    pub(crate) async fn run_sandbox(
        &self,
        pod: &Pod,
        attempt: u32,
        before: Vec<SandboxId>,
    ) -> Outcome {
        let warn = |reason, message| {
            self.events.pod(pod, None, Level::Warning, reason, message);
            Outcome::SandboxFailed
        };
        let failed = |message: String| {
            warn(
                "FailedCreatePodSandBox",
                format!("Failed to create pod sandbox: {message}"),
            )
        };
        // Before the VM boots: a ConfigMap that is not there should not cost a boot.
        let Some(spec) = &pod.spec else {
            return failed("the pod has no spec".to_owned());
        };
        let content = match self.build_volumes(pod, spec).await {
            Ok(content) => content,
            Err(error) => return warn("FailedMount", error.to_string()),
        };
        let network = match network::lookup(&self.client, &self.config, pod).await {
            Ok(network) => network,
            Err(error) => return warn("NetworkNotReady", chain(&error).to_string()),
        };
        let gate = self.gates.of(&network.id);
        let _stays = gate.read().await;
        if let Err(error) = self.networks.ensure_network(&network).await {
            return failed(chain(&error).to_string());
        }
        if let Err(message) = self.services.tell(&network.id).await {
            return failed(message);
        }
        let config = match sandbox::config(pod, attempt, &network, &self.config, self.capacity) {
            Ok(config) => config,
            Err(error) => return failed(chain(&error).to_string()),
        };
        for old in before {
            // Its address is free for the new one only when it is down.
            if let Err(error) = self.runtime.stop_sandbox(&old).await {
                return warn(
                    "FailedKillPod",
                    format!("error killing pod: {}", chain(&error)),
                );
            }
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if let (Some(source), 0) = (wishes::clone_of(pod), attempt) {
            // All that the clone's processes read is in the guest before they go on.
            let cloned = self.clone_sandbox(pod, source, config, &content.volumes);
            return match self.boots.take(namespace, cloned).await {
                Ok(sandbox) => Outcome::SandboxUp {
                    sandbox,
                    volumes: content,
                },
                Err(message) => {
                    let said = format!("Failed to clone {source}: {message}");
                    self.events
                        .pod(pod, None, Level::Warning, "FailedClone", said);
                    Outcome::CloneFailed(message)
                }
            };
        }
        let asked = Instant::now();
        let run = async {
            let turn = asked.elapsed();
            (turn, self.runtime.run_sandbox(config).await)
        };
        let run = run.instrument(traced(
            pod,
            info_span!("StartSandbox", namespace = Empty, pod = Empty),
        ));
        let (turn, run) = self.boots.take(namespace, run).await;
        if let Ok(sandbox) = &run
            && wishes::wants_timing(pod)
            && let Some(mut took) = self.runtime.start_timing(sandbox).await
        {
            took.phases.insert(0, ("turn", turn));
            took.total += turn;
            let said = timing::of_sandbox(&took);
            self.events.pod(pod, None, Level::Normal, TIMING, said);
        }
        match run {
            Ok(sandbox) => match self.write_volumes(&sandbox, &content.volumes, pod).await {
                Ok(()) => Outcome::SandboxUp {
                    sandbox,
                    volumes: content,
                },
                Err(unwritten) => warn(unwritten.reason, unwritten.message),
            },
            Err(error) => failed(chain(&error).to_string()),
        }
    }

    /// Writes all volumes into a sandbox without containers.
    pub(crate) async fn fill_volumes(&self, pod: &Pod, sandbox: SandboxId) -> Outcome {
        let Some(spec) = &pod.spec else {
            return Outcome::SandboxFailed;
        };
        let filled = match self.build_volumes(pod, spec).await {
            Ok(content) => self
                .write_volumes(&sandbox, &content.volumes, pod)
                .await
                .map(|()| content),
            Err(error) => Err(Unwritten {
                reason: "FailedMount",
                message: error.to_string(),
            }),
        };
        match filled {
            Ok(volumes) => Outcome::SandboxUp { sandbox, volumes },
            Err(Unwritten { reason, message }) => {
                self.events.pod(pod, None, Level::Warning, reason, message);
                Outcome::SandboxFailed
            }
        }
    }

    async fn write_volumes(
        &self,
        sandbox: &SandboxId,
        volumes: &[VolumeConfig],
        pod: &Pod,
    ) -> Result<(), Unwritten> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        for volume in volumes {
            let written = self.runtime.write_volume(sandbox, volume.clone()).await;
            written.map_err(|error| match &error {
                RuntimeError::VolumeInUse { volume, by } => Unwritten {
                    reason: "FailedAttachVolume",
                    message: claims::multi_attach(namespace, volume, by),
                },
                error => Unwritten {
                    reason: "FailedMount",
                    message: format!(
                        "MountVolume.SetUp failed for volume \"{}\" : {}",
                        volume.name,
                        chain(error)
                    ),
                },
            })?;
        }
        Ok(())
    }

    /// Writes the file volumes whose content differs from `written`.
    pub(crate) async fn refresh_volumes(
        &self,
        pod: &Pod,
        sandbox: SandboxId,
        written: Vec<VolumeConfig>,
    ) -> Outcome {
        let Some(spec) = &pod.spec else {
            return Outcome::Done;
        };
        let content = match self.build_volumes(pod, spec).await {
            Ok(content) => content,
            // The pod keeps what it has, as with a kubelet.
            Err(error) => {
                self.events
                    .pod(pod, None, Level::Warning, "FailedMount", error.to_string());
                return Outcome::Done;
            }
        };
        let changed: Vec<_> = content
            .volumes
            .iter()
            .filter(|volume| matches!(volume.kind, VolumeKind::Files { .. }))
            .filter(|volume| !written.contains(volume))
            .cloned()
            .collect();
        match self.write_volumes(&sandbox, &changed, pod).await {
            Ok(()) => Outcome::Refreshed(content),
            Err(Unwritten { reason, message }) => {
                self.events.pod(pod, None, Level::Warning, reason, message);
                Outcome::Done
            }
        }
    }

    /// Network and address of a sandbox.
    pub(crate) async fn place_of(&self, sandbox: &SandboxId) -> Option<(NetworkId, IpAddr)> {
        let status = self.runtime.sandbox(sandbox).await?;
        Some((status.config.network?, status.address?))
    }

    /// Has the image, creates the container, starts it, runs its postStart hook.
    pub(crate) async fn run_container(
        self: &Arc<Self>,
        pod: &Pod,
        container: &Container,
        sandbox: SandboxId,
        attempt: u32,
        allocated: Option<ResourceRequirements>,
    ) -> Outcome {
        let name = Some(container.name.as_str());
        let trouble = |reason, message: String| {
            self.events.pod(
                pod,
                name,
                Level::Warning,
                "Failed",
                format!("Error: {message}"),
            );
            Outcome::Trouble {
                container: container.name.clone(),
                reason,
                message,
            }
        };
        let begun = Instant::now();
        let image = match pull::ensure(self, pod, container).await {
            Ok(image) => image,
            Err(none) => {
                return Outcome::Trouble {
                    container: container.name.clone(),
                    reason: none.reason,
                    message: none.message,
                };
            }
        };
        let pulled = begun.elapsed();
        let place = self.place_of(&sandbox).await;
        let pod_ip = place
            .as_ref()
            .map(|(_, address)| address.to_string())
            .unwrap_or_default();
        let facts = self.facts(pod, &pod_ip);
        let links = pod
            .spec
            .as_ref()
            .is_none_or(|spec| spec.enable_service_links != Some(false));
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let services = self.services.environment(namespace, links);
        let built = env::build(&self.sources, &facts, container, services).await;
        let environment = match built {
            Ok(environment) => environment,
            Err(error) => return trouble("CreateContainerConfigError", chain(&error).to_string()),
        };
        let mut wanted = container.clone();
        if let Some(resources) = allocated {
            wanted.resources = Some(resources);
        } else if let Err(message) = self.make_room(pod, &sandbox).await {
            return trouble("CreateContainerError", message);
        }
        let seccomp = match self.seccomp(pod, container, &sandbox).await {
            Ok(seccomp) => seccomp,
            Err(message) => return trouble("CreateContainerConfigError", message),
        };
        let parts = container::Parts {
            seccomp,
            attempt,
            image_id: image.id.to_string(),
            environment,
            images: match self.image_volumes(pod, container).await {
                Ok(images) => images,
                Err(none) => {
                    return Outcome::Trouble {
                        container: container.name.clone(),
                        reason: none.reason,
                        message: none.message,
                    };
                }
            },
            devices: match claims::devices(&self.client, pod, container).await {
                Ok(devices) => devices,
                Err(error) => {
                    return trouble("CreateContainerConfigError", chain(&error).to_string());
                }
            },
            target: match self.target_of(pod, &container.name, &sandbox).await {
                Ok(target) => target,
                Err(message) => return trouble("CreateContainerError", message),
            },
        };
        if let Err(message) = container::check_non_root(pod, container, &image.config.user) {
            return trouble("CreateContainerConfigError", message);
        }
        let config = match container::config(pod, &wanted, parts) {
            Ok(config) => config,
            Err(error) => {
                return trouble("CreateContainerConfigError", chain(&error).to_string());
            }
        };
        let prepared = begun.elapsed();
        let start = async {
            let turn = begun.elapsed();
            let id = match self.runtime.create_container(&sandbox, config).await {
                Ok(id) => id,
                Err(error) => {
                    if let RuntimeError::VolumeInUse { volume, by } = &error {
                        let said = claims::multi_attach(namespace, volume, by);
                        self.events
                            .pod(pod, None, Level::Warning, "FailedAttachVolume", said);
                    }
                    return Err(trouble("CreateContainerError", chain(&error).to_string()));
                }
            };
            let created = begun.elapsed();
            let said = format!("Created container: {}", container.name);
            self.events.pod(pod, name, Level::Normal, "Created", said);
            match self.runtime.start_container(&id).await {
                Ok(()) => Ok((id, turn, created)),
                Err(error) => Err(trouble("RunContainerError", chain(&error).to_string())),
            }
        };
        let span = info_span!(
            "StartContainer",
            namespace = Empty,
            pod = Empty,
            container = container.name
        );
        let start = start.instrument(traced(pod, span));
        let (id, turn, created) = match self.starts.take(namespace, start).await {
            Ok(started) => started,
            Err(trouble) => return trouble,
        };
        let said = format!("Started container {}", container.name);
        self.events.pod(pod, name, Level::Normal, "Started", said);
        if wishes::wants_timing(pod) {
            let parts = [
                ("image", pulled),
                ("specification", prepared - pulled),
                ("turn", turn - prepared),
                ("create", created - turn),
                ("start", begun.elapsed() - created),
            ];
            let said = timing::of_container(&container.name, &parts);
            self.events.pod(pod, name, Level::Normal, TIMING, said);
        }
        let hook = container
            .lifecycle
            .as_ref()
            .and_then(|lifecycle| lifecycle.post_start.as_ref());
        let Some(hook) = hook else {
            return Outcome::Started(container.name.clone());
        };
        let subject = Subject {
            node: self,
            container,
            id: &id,
            place: place.clone(),
        };
        // Upstream has no limit for it either; the pod's deletion breaks it off.
        let Err(message) = subject.hook(hook, HOOK_LIMIT).await else {
            return Outcome::Started(container.name.clone());
        };
        let said = "PostStartHook failed".to_owned();
        self.events
            .pod(pod, name, Level::Warning, "FailedPostStartHook", said);
        let grace = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.termination_grace_period_seconds);
        let ending = Ending {
            name: container.name.clone(),
            id,
            place,
        };
        let why = "FailedPostStartHook".to_owned();
        self.kill_container(pod, ending, why, grace.unwrap_or(30))
            .await;
        Outcome::Trouble {
            container: container.name.clone(),
            reason: "PostStartHookError",
            message,
        }
    }

    /// The system call filter of the node's that a container names.
    async fn seccomp(
        &self,
        pod: &Pod,
        container: &Container,
        sandbox: &SandboxId,
    ) -> Result<Option<SeccompProfile>, String> {
        let root = self.config.seccomp_profiles.as_deref();
        let Some(path) = container::seccomp_file(pod, container, root)? else {
            return Ok(None);
        };
        let kernel = self.runtime.sandbox(sandbox).await;
        let kernel = kernel
            .and_then(|sandbox| sandbox.kernel_release)
            .unwrap_or_default();
        let read = move || hypernetes_runtime::read_seccomp_profile(&path, &kernel);
        let read = tokio::task::spawn_blocking(read).await;
        let profile = read.map_err(|_panic| "reading the file was lost".to_owned());
        profile
            .and_then(|profile| profile)
            .map(Some)
            .map_err(|why| format!("securityContext.seccompProfile.localhostProfile: {why}"))
    }

    /// The running container that an ephemeral one looks into.
    async fn target_of(
        &self,
        pod: &Pod,
        name: &str,
        sandbox: &SandboxId,
    ) -> Result<Option<ContainerId>, String> {
        let Some(target) = roles::target(pod, name) else {
            return Ok(None);
        };
        let records = self.runtime.list_containers(Some(sandbox)).await;
        records
            .into_iter()
            .find(|record| record.config.name == target && record.state == ContainerState::Running)
            .map(|record| Some(record.id))
            .ok_or_else(|| format!("unable to find target container {target}"))
    }

    /// The images that the container mounts as volumes, by volume.
    async fn image_volumes(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<BTreeMap<String, String>, pull::NoImage> {
        let mut images = BTreeMap::new();
        let volumes = pod
            .spec
            .iter()
            .flat_map(|spec| spec.volumes.iter().flatten());
        for volume in volumes {
            let mounts = container.volume_mounts.iter().flatten();
            let mounted = mounts.into_iter().any(|mount| mount.name == volume.name);
            if let (Some(source), true) = (&volume.image, mounted) {
                let pulled = Container {
                    name: container.name.clone(),
                    image: source.reference.clone(),
                    image_pull_policy: source.pull_policy.clone(),
                    ..Container::default()
                };
                let image = pull::ensure(self, pod, &pulled).await?;
                images.insert(volume.name.clone(), image.id.to_string());
            }
        }
        Ok(images)
    }

    /// Powers the VM off.
    pub(crate) async fn stop_sandbox(&self, pod: &Pod, id: SandboxId) -> Outcome {
        match self.runtime.stop_sandbox(&id).await {
            Ok(()) => Outcome::Done,
            Err(error) => {
                let said = format!("error killing pod: {}", chain(&error));
                self.events
                    .pod(pod, None, Level::Warning, "FailedKillPod", said);
                Outcome::SandboxFailed
            }
        }
    }

    /// Forgets sandboxes; their logs go with the last one.
    pub(crate) async fn remove_sandboxes(
        &self,
        pod: &Pod,
        ids: Vec<SandboxId>,
        all: bool,
    ) -> Outcome {
        for id in ids {
            if let Err(error) = self.runtime.remove_sandbox(&id).await {
                let said = format!("error killing pod: {}", chain(&error));
                self.events
                    .pod(pod, None, Level::Warning, "FailedKillPod", said);
                return Outcome::SandboxFailed;
            }
        }
        self.retire_networks().await;
        if all {
            let meta = &pod.metadata;
            let text = |value: &Option<String>| value.clone().unwrap_or_default();
            let logs = self.config.log_directory(
                &text(&meta.namespace),
                &text(&meta.name),
                &text(&meta.uid),
            );
            match tokio::fs::remove_dir_all(&logs).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %logs.display(), %error, "cannot remove a pod's logs");
                }
                _ => {}
            }
        }
        Outcome::Done
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

    /// Removes a sandbox that no pod is behind.
    pub(crate) async fn remove_orphan(&self, id: &SandboxId) {
        if let Err(error) = self.runtime.remove_sandbox(id).await {
            tracing::warn!(sandbox = %id, error = %chain(&error), "cannot remove a sandbox without a pod");
        }
        self.retire_networks().await;
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
    pub(crate) async fn records(
        &self,
        uid: &str,
    ) -> (
        Vec<hypernetes_runtime::SandboxStatus>,
        Vec<hypernetes_runtime::ContainerStatus>,
    ) {
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

//! A pod's containers.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use hypernetes_image::Image;
use hypernetes_runtime::{ContainerConfig, ContainerState, RuntimeError, SeccompProfile};
use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, NetworkId, SandboxId};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use tokio::time::Instant;
use tracing::{Instrument, field::Empty, info_span};

use super::{Node, Outcome, TIMING, traced};
use crate::{
    claims, container, env, events::Level, handler::Subject, pull, roles, stop::Ending, timing,
    wishes,
};

/// A hook that does not end is broken off after a day, or with its pod.
const HOOK_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Why a container does not run.
struct NotStarted {
    reason: &'static str,
    message: String,
    /// There are events of it.
    told: bool,
}

impl From<pull::NoImage> for NotStarted {
    fn from(none: pull::NoImage) -> Self {
        Self {
            reason: none.reason,
            message: none.message,
            told: true,
        }
    }
}

fn not_started(reason: &'static str, message: impl Into<String>) -> NotStarted {
    NotStarted {
        reason,
        message: message.into(),
        told: false,
    }
}

/// A container that is to run.
pub(crate) struct Start<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) sandbox: SandboxId,
    pub(crate) attempt: u32,
    /// What it has instead of what it asks for.
    pub(crate) allocated: Option<ResourceRequirements>,
}

/// Network and address of the pod.
type Place = Option<(NetworkId, IpAddr)>;

impl Node {
    /// Has the image, creates the container, starts it, runs its postStart hook.
    pub(crate) async fn run_container(self: &Arc<Self>, start: Start<'_>) -> Outcome {
        let name = &start.container.name;
        let Err(failed) = self.try_run_container(&start).await else {
            return Outcome::Started(name.clone());
        };
        let NotStarted {
            reason,
            message,
            told,
        } = failed;
        if !told {
            let said = format!("Error: {message}");
            self.events
                .pod(start.pod, Some(name), Level::Warning, "Failed", said);
        }
        Outcome::Trouble {
            container: name.clone(),
            reason,
            message,
        }
    }

    async fn try_run_container(self: &Arc<Self>, start: &Start<'_>) -> Result<(), NotStarted> {
        let (pod, container) = (start.pod, start.container);
        let name = Some(container.name.as_str());
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let begun = Instant::now();
        let image = pull::ensure(self, pod, container).await?;
        let pulled = begun.elapsed();
        let place = self.place_of(&start.sandbox).await;
        let config = self.specify(start, &image, place.as_ref()).await?;
        let prepared = begun.elapsed();
        let run = async {
            let turn = begun.elapsed();
            let created = self.runtime.create_container(&start.sandbox, config).await;
            let id = created.map_err(|error| {
                if let RuntimeError::VolumeInUse { volume, by } = &error {
                    let said = claims::multi_attach(namespace, volume, by);
                    self.events
                        .pod(pod, None, Level::Warning, "FailedAttachVolume", said);
                }
                not_started("CreateContainerError", chain(&error).to_string())
            })?;
            let created = begun.elapsed();
            let said = format!("Created container: {}", container.name);
            self.events.pod(pod, name, Level::Normal, "Created", said);
            let started = self.runtime.start_container(&id).await;
            started.map_err(|error| not_started("RunContainerError", chain(&error).to_string()))?;
            Ok::<_, NotStarted>((id, turn, created))
        };
        let span = info_span!(
            "StartContainer",
            namespace = Empty,
            pod = Empty,
            container = container.name
        );
        let run = run.instrument(traced(pod, span));
        let (id, turn, created) = self.starts.take(namespace, run).await?;
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
        self.post_start(start, id, place).await
    }

    /// The container as the runtime makes it.
    async fn specify(
        self: &Arc<Self>,
        start: &Start<'_>,
        image: &Image,
        place: Option<&(NetworkId, IpAddr)>,
    ) -> Result<ContainerConfig, NotStarted> {
        let (pod, container) = (start.pod, start.container);
        let wrong = |message: String| not_started("CreateContainerConfigError", message);
        let unmade = |message: String| not_started("CreateContainerError", message);
        let pod_ip = place.map(|(_, address)| address.to_string());
        let pod_ip = pod_ip.unwrap_or_default();
        let facts = self.facts(pod, &pod_ip);
        let links = pod
            .spec
            .as_ref()
            .is_none_or(|spec| spec.enable_service_links != Some(false));
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let services = self.services.environment(namespace, links);
        let environment = env::build(&self.sources, &facts, container, services).await;
        let environment = environment.map_err(|error| wrong(chain(&error).to_string()))?;
        let mut wanted = container.clone();
        if let Some(resources) = &start.allocated {
            wanted.resources = Some(resources.clone());
        } else {
            let room = self.make_room(pod, &start.sandbox).await;
            room.map_err(unmade)?;
        }
        let seccomp = self.seccomp(pod, container, &start.sandbox).await;
        let seccomp = seccomp.map_err(wrong)?;
        let images = self.image_volumes(pod, container).await?;
        let devices = claims::devices(&self.client, pod, container).await;
        let devices = devices.map_err(|error| wrong(chain(&error).to_string()))?;
        let target = self.target_of(pod, &container.name, &start.sandbox).await;
        let parts = container::Parts {
            seccomp,
            attempt: start.attempt,
            image_id: image.id.to_string(),
            environment,
            images,
            devices,
            target: target.map_err(unmade)?,
        };
        container::check_non_root(pod, container, &image.config.user).map_err(wrong)?;
        let config = container::config(pod, &wanted, parts);
        config.map_err(|error| wrong(chain(&error).to_string()))
    }

    /// Runs the postStart hook, if there is one, and kills the container if it fails.
    async fn post_start(
        self: &Arc<Self>,
        start: &Start<'_>,
        id: ContainerId,
        place: Place,
    ) -> Result<(), NotStarted> {
        let (pod, container) = (start.pod, start.container);
        let hooks = container.lifecycle.as_ref();
        let Some(hook) = hooks.and_then(|hooks| hooks.post_start.as_ref()) else {
            return Ok(());
        };
        let subject = Subject {
            node: self,
            container,
            id: &id,
            place: place.clone(),
        };
        // Upstream has no limit for it either; the pod's deletion breaks it off.
        let Err(message) = subject.hook(hook, HOOK_LIMIT).await else {
            return Ok(());
        };
        let (name, said) = (Some(container.name.as_str()), "PostStartHook failed");
        let reason = "FailedPostStartHook";
        self.events
            .pod(pod, name, Level::Warning, reason, said.to_owned());
        let spec = pod.spec.as_ref();
        let grace = spec.and_then(|spec| spec.termination_grace_period_seconds);
        let ending = Ending {
            name: container.name.clone(),
            id,
            place,
        };
        self.kill_container(pod, ending, reason.to_owned(), grace.unwrap_or(30))
            .await;
        Err(NotStarted {
            reason: "PostStartHookError",
            message,
            told: true,
        })
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
}

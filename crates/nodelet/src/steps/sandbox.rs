//! A pod's VM and its volumes.

use hypernetes_runtime::{RuntimeError, VolumeConfig, VolumeKind};
use hypernetes_telemetry::chain;
use hypernetes_types::SandboxId;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use tokio::time::Instant;
use tracing::{Instrument, field::Empty, info_span};

use super::{Node, Outcome, TIMING, traced};
use crate::{
    claims,
    events::Level,
    network, sandbox, timing,
    volumes::{self, Built},
    wishes,
};

/// A volume that is not in the guest, as an event says it.
struct Unwritten {
    reason: &'static str,
    message: String,
}

impl Node {
    async fn build_volumes(
        &self,
        pod: &Pod,
        spec: &PodSpec,
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

    /// Removes a sandbox that no pod is behind.
    pub(crate) async fn remove_orphan(&self, id: &SandboxId) {
        if let Err(error) = self.runtime.remove_sandbox(id).await {
            tracing::warn!(sandbox = %id, error = %chain(&error), "cannot remove a sandbox without a pod");
        }
        self.retire_networks().await;
    }
}

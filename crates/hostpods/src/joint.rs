//! Pods in VMs and pods on the host behind one interface.

use std::{collections::HashSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use hypernetes_image::{Credentials, Image, ImageError};
use hypernetes_runtime::{
    CloneConfig, CloneSource, Connection, ContainerConfig, ContainerStatus, ContainerUpdate,
    DiskUsage, ExecConfig, HostDevice, NodeFigures, PodRuntime, PullProgress, RuntimeError,
    RuntimeEvent, SandboxConfig, SandboxStats, SandboxStatus, SandboxUpdate, Session,
    SnapshotConfig, SnapshotStatus, Timing, VolumeConfig,
};
use hypernetes_types::{ContainerId, Digest, ImageReference, SandboxId, SnapshotId};
use hypernetes_vmm::HostShare;
use tokio::sync::broadcast::{self, error::RecvError};

use crate::runtime::HostRuntime;

/// Changes that a slow listener may fall behind.
const EVENTS: usize = 1024;

/// Sends each call to the runtime that has the pod. A new pod goes to the host if its
/// configuration says so, and to a VM otherwise.
#[derive(Debug)]
pub struct JointRuntime {
    vms: Arc<dyn PodRuntime>,
    host: Arc<HostRuntime>,
    events: broadcast::Sender<RuntimeEvent>,
}

impl JointRuntime {
    /// Joins the two. Call within the asynchronous runtime.
    pub fn new(vms: Arc<dyn PodRuntime>, host: Arc<HostRuntime>) -> Self {
        let events = broadcast::channel(EVENTS).0;
        for from in [Arc::clone(&vms), Arc::clone(&host) as Arc<dyn PodRuntime>] {
            tokio::spawn(forward(
                from.events(),
                Arc::downgrade(&from),
                events.clone(),
            ));
        }
        Self { vms, host, events }
    }

    fn of_sandbox(&self, id: &SandboxId) -> &dyn PodRuntime {
        match self.host.inner.sandbox(id) {
            Ok(_) => self.host.as_ref(),
            Err(_) => self.vms.as_ref(),
        }
    }

    fn of_container(&self, id: &ContainerId) -> &dyn PodRuntime {
        match self.host.inner.container(id) {
            Ok(_) => self.host.as_ref(),
            Err(_) => self.vms.as_ref(),
        }
    }
}

/// Passes changes on. A listener that fell behind tells of everything: then nothing is missed.
async fn forward(
    mut from: broadcast::Receiver<RuntimeEvent>,
    runtime: std::sync::Weak<dyn PodRuntime>,
    to: broadcast::Sender<RuntimeEvent>,
) {
    loop {
        match from.recv().await {
            // Nobody may be listening.
            Ok(event) => drop(to.send(event)),
            Err(RecvError::Lagged(_)) => {
                let Some(runtime) = runtime.upgrade() else {
                    return;
                };
                for sandbox in runtime.list_sandboxes().await {
                    drop(to.send(RuntimeEvent::Sandbox(sandbox.id)));
                }
                for container in runtime.list_containers(None).await {
                    let event = RuntimeEvent::Container(container.sandbox, container.id);
                    drop(to.send(event));
                }
            }
            Err(RecvError::Closed) => return,
        }
    }
}

#[async_trait]
impl PodRuntime for JointRuntime {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxId, RuntimeError> {
        match config.host {
            Some(_) => self.host.run_sandbox(config).await,
            None => self.vms.run_sandbox(config).await,
        }
    }

    async fn clone_sandbox(
        &self,
        config: SandboxConfig,
        clone: CloneConfig,
    ) -> Result<SandboxId, RuntimeError> {
        let of = match &clone.source {
            CloneSource::Sandbox(id) => self.of_sandbox(id),
            CloneSource::Snapshot(_) => self.vms.as_ref(),
        };
        of.clone_sandbox(config, clone).await
    }

    async fn take_snapshot(&self, config: SnapshotConfig) -> Result<SnapshotStatus, RuntimeError> {
        let of = self.of_sandbox(&config.source);
        of.take_snapshot(config).await
    }

    async fn list_snapshots(&self) -> Vec<SnapshotStatus> {
        self.vms.list_snapshots().await
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        self.vms.remove_snapshot(id).await
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.of_sandbox(id).stop_sandbox(id).await
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.of_sandbox(id).remove_sandbox(id).await
    }

    async fn sandbox(&self, id: &SandboxId) -> Option<SandboxStatus> {
        self.of_sandbox(id).sandbox(id).await
    }

    async fn list_sandboxes(&self) -> Vec<SandboxStatus> {
        let mut all = self.vms.list_sandboxes().await;
        all.extend(self.host.list_sandboxes().await);
        all
    }

    async fn write_volume(&self, id: &SandboxId, volume: VolumeConfig) -> Result<(), RuntimeError> {
        self.of_sandbox(id).write_volume(id, volume).await
    }

    async fn share(&self, id: &SandboxId, share: HostShare) -> Result<String, RuntimeError> {
        self.of_sandbox(id).share(id, share).await
    }

    async fn attach_device(&self, id: &SandboxId, device: HostDevice) -> Result<u32, RuntimeError> {
        self.of_sandbox(id).attach_device(id, device).await
    }

    async fn grow_volume(&self, id: &SandboxId, volume: &str) -> Result<(), RuntimeError> {
        self.of_sandbox(id).grow_volume(id, volume).await
    }

    async fn detach_unused(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.of_sandbox(id).detach_unused(id).await
    }

    async fn resize_sandbox(
        &self,
        id: &SandboxId,
        update: SandboxUpdate,
    ) -> Result<(), RuntimeError> {
        self.of_sandbox(id).resize_sandbox(id, update).await
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId, RuntimeError> {
        self.of_sandbox(sandbox)
            .create_container(sandbox, config)
            .await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.of_container(id).start_container(id).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        self.of_container(id).stop_container(id, grace).await
    }

    async fn set_paused(&self, id: &ContainerId, paused: bool) -> Result<(), RuntimeError> {
        self.of_container(id).set_paused(id, paused).await
    }

    async fn suspend_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.of_sandbox(id).suspend_sandbox(id).await
    }

    async fn resume_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.of_sandbox(id).resume_sandbox(id).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.of_container(id).remove_container(id).await
    }

    async fn update_container(
        &self,
        id: &ContainerId,
        update: ContainerUpdate,
    ) -> Result<(), RuntimeError> {
        self.of_container(id).update_container(id, update).await
    }

    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.of_container(id).reopen_log(id).await
    }

    async fn container(&self, id: &ContainerId) -> Option<ContainerStatus> {
        self.of_container(id).container(id).await
    }

    async fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus> {
        if let Some(id) = sandbox {
            return self.of_sandbox(id).list_containers(sandbox).await;
        }
        let mut all = self.vms.list_containers(None).await;
        all.extend(self.host.list_containers(None).await);
        all
    }

    async fn stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        self.of_sandbox(id).stats(id).await
    }

    async fn detailed_stats(&self, id: &SandboxId) -> Result<SandboxStats, RuntimeError> {
        self.of_sandbox(id).detailed_stats(id).await
    }

    /// Of the VMs: host pods start none.
    async fn drain(&self) {
        self.vms.drain().await;
    }

    async fn figures(&self) -> NodeFigures {
        self.vms.figures().await
    }

    async fn console(&self, id: &SandboxId) -> Result<String, RuntimeError> {
        self.of_sandbox(id).console(id).await
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.events.subscribe()
    }

    async fn exec(&self, id: &ContainerId, config: ExecConfig) -> Result<Session, RuntimeError> {
        self.of_container(id).exec(id, config).await
    }

    async fn exec_in_guest(
        &self,
        id: &ContainerId,
        config: ExecConfig,
    ) -> Result<Session, RuntimeError> {
        self.of_container(id).exec_in_guest(id, config).await
    }

    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        self.of_container(id).attach(id, stdin).await
    }

    async fn start_timing(&self, id: &SandboxId) -> Option<Timing> {
        self.of_sandbox(id).start_timing(id).await
    }

    async fn attach_first(&self, id: &ContainerId, stdin: bool) -> Result<Session, RuntimeError> {
        self.of_container(id).attach_first(id, stdin).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Connection, RuntimeError> {
        self.of_sandbox(id).port_forward(id, port).await
    }

    async fn pull_image(
        &self,
        reference: &ImageReference,
        credentials: Credentials,
        progress: Option<PullProgress>,
    ) -> Result<Image, RuntimeError> {
        self.vms.pull_image(reference, credentials, progress).await
    }

    async fn image(&self, reference: &str) -> Option<Image> {
        self.vms.image(reference).await
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        self.vms.list_images().await
    }

    async fn remove_image(&self, reference: &str) -> Result<(), RuntimeError> {
        let used: HashSet<Digest> = self.host.images_in_use();
        if let Some(image) = self.vms.image(reference).await
            && used.contains(&image.id)
        {
            return Err(ImageError::InUse(reference.chars().take(128).collect()).into());
        }
        self.vms.remove_image(reference).await
    }

    async fn disk_usage(&self) -> Result<DiskUsage, RuntimeError> {
        let mut usage = self.vms.disk_usage().await?;
        let host = self.host.disk_usage().await?.containers;
        // Both are below one state directory.
        usage.containers.used_bytes = usage.containers.used_bytes.saturating_add(host.used_bytes);
        usage.containers.files = usage.containers.files.saturating_add(host.files);
        Ok(usage)
    }
}

//! Stopping and removing: everything a sandbox holds goes, in an order that can be repeated.

use std::{sync::Arc, time::Duration};

use hypernetes_agent_api::{AgentClient, v1};
use hypernetes_vmm::Vm;
use tokio::time::timeout;

use super::{Actor, guest::Ending};
use crate::{
    container,
    error::RuntimeError,
    logs::{beneath, format::now_nanos},
    sandbox::{self, Phase},
    scratch::{blocking, remove_directory},
};

/// What a container that ended with its sandbox is told to have returned: killed.
pub(crate) const KILLED: i32 = 137;

impl Actor {
    /// Stops the sandbox. Repeated after a failure it goes on where it failed.
    pub(super) async fn stop(&mut self) -> Result<(), RuntimeError> {
        // Wanted by whoever asked; harmless if the handle has done it already.
        self.stopping.cancel();
        if matches!(self.record.phase, Phase::Stopped | Phase::Removing) {
            return Ok(());
        }
        Box::pin(self.wake_to_flush()).await;
        self.advance("stop", sandbox::Event::StopAsked)?;
        self.save().await?;
        self.publish_sandbox();
        if let Some(vm) = self.vm.clone().filter(|vm| vm.exit().is_none()) {
            self.quiesce(&vm).await;
        }
        self.release().await?;
        self.publish_sandbox();
        Ok(())
    }

    /// Asks the guest to end in good order. A guest that does not answer is not asked twice.
    async fn quiesce(&mut self, vm: &Arc<dyn Vm>) {
        let patience = self.shared.config.deadlines.shutdown;
        let Some(client) = self.connected(vm).await else {
            return;
        };
        if self.end_containers(&client, patience).await.is_none() {
            return;
        }
        // The reply may be lost with the VM.
        drop(client.shutdown(v1::ShutdownRequest {}, patience).await);
        // What is in the guest's memory of a volume that outlives it is not to be lost.
        let patience = match self.record.attached.is_empty() {
            true => patience,
            false => self.shared.config.deadlines.flush,
        };
        if timeout(patience, vm.wait()).await.is_err() {
            tracing::warn!("the guest did not power off in time and is killed");
        }
    }

    /// The guest, if there is a session. With volumes that are to be written back it is waited for a
    /// moment: the node may have come back just now.
    async fn connected(&self, vm: &Arc<dyn Vm>) -> Option<AgentClient> {
        let mut link = self.link.as_ref()?.state.clone();
        let patience = match self.record.attached.is_empty() {
            true => Duration::ZERO,
            false => self.shared.config.deadlines.readopt,
        };
        let connected = link.wait_for(|link| link.client.is_some());
        tokio::select! {
            link = timeout(patience, connected) => link.ok()?.ok()?.client.clone(),
            _ = vm.wait() => None,
        }
    }

    /// Kills what still runs, waits for its last output, and asks how it ended.
    async fn end_containers(&mut self, client: &AgentClient, patience: Duration) -> Option<()> {
        let live = |phase: container::Phase| phase.is_live();
        let running: Vec<_> = self
            .members
            .values()
            .filter(|member| live(member.record.phase))
            .collect();
        if running.is_empty() {
            return Some(());
        }
        let kills = running.iter().map(|member| {
            let id = member.record.id.to_string();
            client.signal(
                v1::SignalRequest {
                    id,
                    signal: 9,
                    all: true,
                },
                patience,
            )
        });
        for result in futures::future::join_all(kills).await {
            if let Err(error @ hypernetes_agent_api::AgentError::Deadline { .. }) = result {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(error, "the guest does not answer and is killed");
                return None;
            }
        }
        let pumps = running.iter().filter_map(|member| member.pump.as_ref());
        let drained = pumps.map(|pump| {
            let mut drained = pump.drained();
            async move { drop(drained.wait_for(|drained| *drained).await) }
        });
        let drain = futures::future::join_all(drained);
        if timeout(self.shared.config.deadlines.drain, drain)
            .await
            .is_err()
        {
            tracing::warn!("some output was not written before the sandbox was stopped");
        }
        let list = client
            .list_containers(v1::ListContainersRequest {}, patience)
            .await
            .ok()?;
        for state in list.containers {
            if let (Some(id), Some(exit)) = (self.known(&state.id), state.exit) {
                let drained = self.members[&id]
                    .pump
                    .as_ref()
                    .is_some_and(|pump| *pump.drained().borrow());
                let ending = Ending::of_guest(&exit, now_nanos(), drained);
                self.container_ended(&id, ending).await;
            }
        }
        Some(())
    }

    /// Frees VM and lease. The sandbox is `Stopped` afterwards.
    async fn release(&mut self) -> Result<(), RuntimeError> {
        let id = self.record.id.clone();
        if let Some(vm) = &self.vm {
            vm.kill().await?;
        }
        // Also finds a VM that was launched and not recorded.
        self.shared
            .config
            .vmm
            .destroy(&self.shared.run_dir(&id))
            .await?;
        // Only now nobody writes any more.
        self.detach_volumes().await?;
        self.forget_suspended().await?;
        self.record.set_frozen(None);
        self.link = None;
        self.vm = None;
        self.plugged.clear();
        self.late.abort_all();
        let ending = Ending {
            code: KILLED,
            reason: "Error".into(),
            message: "the sandbox was stopped".into(),
            finished_unix_nanos: now_nanos(),
            drained: true,
        };
        self.end_all(&ending).await?;
        self.shared.config.network.detach(&id).await?;
        self.record.vm = None;
        if self.record.phase == Phase::Stopping {
            self.advance("stop", sandbox::Event::Released)?;
            self.save().await?;
        }
        Ok(())
    }

    /// After a start that failed: nothing stays but the record.
    pub(super) async fn undo_start(&mut self) -> Result<(), RuntimeError> {
        self.save().await?;
        let id = self.record.id.clone();
        self.release().await?;
        self.shared.scratch.remove(&id).await?;
        remove_directory(self.shared.run_dir(&id)).await?;
        self.remove_log_directory().await
    }

    /// Removes the sandbox and all that belongs to it; the record last. Repeated after a failure it
    /// goes on where it failed.
    pub(super) async fn remove(&mut self) -> Result<(), RuntimeError> {
        self.stopping.cancel();
        if matches!(
            self.record.phase,
            Phase::Ready | Phase::Suspending | Phase::Suspended | Phase::Resuming | Phase::Failed
        ) {
            self.stop().await?;
        }
        let id = self.record.id.clone();
        self.advance("remove", sandbox::Event::RemoveAsked)?;
        self.save().await?;
        self.publish_sandbox();
        self.release().await?;
        let containers: Vec<_> = self.members.keys().cloned().collect();
        for container in &containers {
            self.remove_log(container).await?;
        }
        self.remove_log_directory().await?;
        remove_directory(self.shared.run_dir(&id)).await?;
        self.shared.scratch.remove(&id).await?;
        self.shared
            .records
            .delete_sandbox(&id, containers.iter())
            .await?;
        self.members.clear();
        for container in &containers {
            self.shared.forget_container(container);
        }
        self.shared.free_uid(self.record.uid);
        self.gone = true;
        self.publish_sandbox();
        Ok(())
    }

    /// Removes a container's log. Idempotent.
    pub(super) async fn remove_log(
        &mut self,
        id: &hypernetes_types::ContainerId,
    ) -> Result<(), RuntimeError> {
        let Some(member) = self.members.get_mut(id) else {
            return Ok(());
        };
        member.pump = None;
        let root = self.record.config.log_directory.clone();
        let path = member.record.config.log_path.clone();
        let checkpoint = self.checkpoint(id);
        blocking(format!("remove log {}", path.display()), move || {
            match std::fs::remove_file(checkpoint) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            beneath::remove_file(&root, &path)
        })
        .await
    }

    async fn remove_log_directory(&self) -> Result<(), RuntimeError> {
        if !self.record.owns_log_directory {
            return Ok(());
        }
        let path = self.record.config.log_directory.clone();
        blocking(
            format!("remove log directory {}", path.display()),
            move || {
                use std::io::ErrorKind::{DirectoryNotEmpty, NotFound};
                // What somebody else has put there stays.
                match std::fs::remove_dir(path) {
                    Err(error) if !matches!(error.kind(), NotFound | DirectoryNotEmpty) => {
                        Err(error)
                    }
                    _ => Ok(()),
                }
            },
        )
        .await
    }
}

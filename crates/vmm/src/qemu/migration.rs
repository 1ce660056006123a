//! QEMU's migration through a pipe: the VMM is handed one end, and the other is ours, so that its sandbox needs
//! neither files nor processes for it.

use std::{io, os::fd::OwnedFd};

use serde_json::json;
use tokio::{net::unix::pipe, sync::broadcast};

use super::{
    qmp::{QmpError, QmpEvent},
    vm::QemuVm,
};
use crate::VmmError;

/// Name of the pipe in QEMU.
const PIPE: &str = "migration";
/// The most that a pipe holds without a privilege.
pub(super) const CHUNK: usize = 1 << 20;

/// What a migration moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transfer {
    /// Processor and devices: the memory stays in a file that both VMMs have.
    Devices,
    /// The memory too.
    Everything,
}

/// Tells how a migration goes.
pub(super) type Events = broadcast::Receiver<QmpEvent>;

impl QemuVm {
    /// Has the VMM write its VM, which stands still, into a pipe.
    pub(super) async fn migrate_out(
        &self,
        transfer: Transfer,
        action: &str,
    ) -> Result<(pipe::Receiver, Events), VmmError> {
        let (ours, theirs) = self.pipe()?;
        let ours = pipe::Receiver::from_owned_fd(ours).map_err(self.file_failed())?;
        let events = self.pass_pipe(transfer, theirs, action).await?;
        self.begin("migrate", action).await?;
        Ok((ours, events))
    }

    /// Hands the VMM a pipe for the VM that it waits for. [`Self::take_in`] has it read.
    pub(super) async fn migrate_in(
        &self,
        transfer: Transfer,
        action: &str,
    ) -> Result<(pipe::Sender, Events), VmmError> {
        let (theirs, ours) = self.pipe()?;
        let ours = pipe::Sender::from_owned_fd(ours).map_err(self.file_failed())?;
        let events = self.pass_pipe(transfer, theirs, action).await?;
        Ok((ours, events))
    }

    /// Has the VMM read. It answers when it has begun to, which is not before somebody writes.
    pub(super) async fn take_in(&self, action: &str) -> Result<(), VmmError> {
        self.begin("migrate-incoming", action).await
    }

    async fn begin(&self, command: &str, action: &str) -> Result<(), VmmError> {
        let uri = json!({ "uri": format!("fd:{PIPE}") });
        let begun = self.qmp.execute(command, uri).await;
        begun.map(drop).map_err(self.failed(action))
    }

    async fn pass_pipe(
        &self,
        transfer: Transfer,
        theirs: OwnedFd,
        action: &str,
    ) -> Result<Events, VmmError> {
        let prepared = self.prepare_migration(transfer).await;
        prepared.map_err(self.failed(action))?;
        let events = self.qmp.subscribe();
        let name = json!({ "fdname": PIPE });
        let passed = self.qmp.execute_with_fd("getfd", name, theirs).await;
        passed.map_err(self.failed(action))?;
        Ok(events)
    }

    async fn prepare_migration(&self, transfer: Transfer) -> Result<(), QmpError> {
        let capability = |name: &str, on: bool| json!({ "capability": name, "state": on });
        let ignore_shared = capability("x-ignore-shared", transfer == Transfer::Devices);
        let capabilities = json!({ "capabilities": [ignore_shared, capability("events", true)] });
        self.qmp
            .execute("migrate-set-capabilities", capabilities)
            .await?;
        // The guest has the template's MAC address until it is told its own: nobody is to hear of it.
        // There is no network to be spared: as fast as the pipe takes it.
        let parameters = json!({ "announce-rounds": 0, "max-bandwidth": 1_u64 << 40 });
        self.qmp
            .execute("migrate-set-parameters", parameters)
            .await?;
        Ok(())
    }

    /// Waits until all of it is there.
    pub(super) async fn migrated(&self, mut events: Events, action: &str) -> Result<(), VmmError> {
        let failed = self.failed(action);
        let ended = async {
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    () = self.qmp.closed() => return Err(QmpError::Closed),
                };
                let event = match event {
                    Ok(event) => event,
                    Err(broadcast::error::RecvError::Lagged(_)) => continue,
                    Err(broadcast::error::RecvError::Closed) => return Err(QmpError::Closed),
                };
                if event.name != "MIGRATION" {
                    continue;
                }
                match event.data["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed") => {
                        return Err(QmpError::Protocol("the migration has failed".to_owned()));
                    }
                    _ => {}
                }
            }
        };
        ended.await.map_err(failed)
    }

    /// Reader's and writer's end.
    fn pipe(&self) -> Result<(OwnedFd, OwnedFd), VmmError> {
        let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (reader, writer) = pipe.map_err(|e| self.file_failed()(e.into()))?;
        // A smaller one is slower and no worse.
        let resized = rustix::pipe::fcntl_setpipe_size(&reader, CHUNK);
        if let Err(e) = resized {
            tracing::debug!(error = %e, "the pipe stays small");
        }
        Ok((reader, writer))
    }

    pub(super) fn file_failed(&self) -> impl FnOnce(io::Error) -> VmmError + use<> {
        let path = self.record.run_dir.clone();
        move |source| VmmError::Io {
            action: "move the state of the VM of",
            path,
            source,
        }
    }
}

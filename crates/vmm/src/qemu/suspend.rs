//! Suspend and resume: QEMU's migration into a file and out of it, all memory included.
//!
//! Our process copies between the pipe and the file: what a captured VMM writes is bounded.

use std::{fs::File, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use super::{
    migration::{CHUNK, Transfer},
    qmp::QmpError,
    restore::CLOSE,
    vm::QemuVm,
};
use crate::{
    Suspended, VmmError,
    suspended::{StateWriter, punch_empty_pages},
};

/// How long it may take at least, and bytes in a second that a disk takes and gives at least.
const PATIENCE: Duration = Duration::from_secs(60);
const RATE: u64 = 8 << 20;

fn patience(bytes: u64) -> Duration {
    PATIENCE + Duration::from_secs(bytes / RATE)
}

impl QemuVm {
    /// See [`crate::Vm::suspend`].
    pub(super) async fn suspend_to(&self, to: File, limit: u64) -> Result<(), VmmError> {
        let action = "suspend the VM";
        if self.is_plugged().await.map_err(self.failed(action))? {
            return Err(VmmError::Spec {
                field: "shares",
                rule: "must not be in use: a directory of the host that the guest sees has its state outside of the VM".to_owned(),
            });
        }
        let _no_change = self.disks.lock().await;
        self.end_channel();
        if timeout(CLOSE, self.agent_closed()).await.is_err() {
            tracing::debug!(vm = %self.record.sandbox, "the agent keeps its port open");
        }
        let written = async {
            self.qmp
                .execute("stop", json!({}))
                .await
                .map_err(self.failed(action))?;
            let write = self.write_state(StateWriter::new(to, limit), action);
            let waited = patience(limit);
            timeout(waited, write)
                .await
                .unwrap_or_else(|_late| Err(self.failed(action)(QmpError::Timeout(waited))))
        };
        if let Err(error) = written.await {
            if let Err(undo) = self.run_on().await {
                tracing::error!(vm = %self.record.sandbox, error = %undo, "cannot let a VM go on");
            }
            return Err(error);
        }
        Ok(())
    }

    async fn write_state(&self, mut writer: StateWriter, action: &str) -> Result<(), VmmError> {
        let (mut ours, events) = self.migrate_out(Transfer::Everything, action).await?;
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            let mut source = (&mut ours).take((CHUNK - chunk.len()) as u64);
            let read = source.read_buf(&mut chunk).await;
            let ended = read.map_err(self.file_failed())? == 0 && chunk.len() < CHUNK;
            if chunk.len() < CHUNK && !ended {
                continue;
            }
            (writer, chunk) = self
                .blocking(move || {
                    writer.write(&chunk)?;
                    chunk.clear();
                    Ok((writer, chunk))
                })
                .await?;
            if ended {
                break;
            }
        }
        self.migrated(events, action).await?;
        let maker = self.maker.clone();
        self.blocking(move || writer.finish(&maker)).await
    }

    /// Gives a VM that waits for it what was suspended. It stands still afterwards.
    pub(super) async fn restore_suspended(
        &self,
        suspended: Arc<Suspended>,
        memory: Vec<OwnedFd>,
        bytes: u64,
    ) -> Result<(), VmmError> {
        let action = "resume the VM";
        let work = async {
            let (mut ours, events) = self.migrate_in(Transfer::Everything, action).await?;
            let feed = async {
                let mut reader = suspended.read().map_err(self.file_failed())?;
                let mut chunk = vec![0; CHUNK];
                loop {
                    let count;
                    (reader, chunk, count) = self
                        .blocking(move || {
                            let count = reader.read(&mut chunk)?;
                            Ok((reader, chunk, count))
                        })
                        .await?;
                    if count == 0 {
                        break;
                    }
                    match ours.write_all(&chunk[..count]).await {
                        // It says why when it is asked.
                        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
                        other => other.map_err(self.file_failed())?,
                    }
                }
                drop(ours);
                Ok(reader)
            };
            let ((), reader) = tokio::try_join!(self.take_in(action), feed)?;
            self.migrated(events, action).await?;
            self.blocking(move || {
                reader.check()?;
                let mut memory = memory.into_iter().map(File::from);
                memory.try_for_each(|file| punch_empty_pages(&file))
            })
            .await
        };
        let waited = patience(bytes);
        timeout(waited, work)
            .await
            .unwrap_or_else(|_late| Err(self.failed(action)(QmpError::Timeout(waited))))
    }

    /// See [`crate::Vm::resume`].
    pub(super) async fn run_on(&self) -> Result<(), VmmError> {
        let action = "let the VM go on";
        let deadline = Instant::now() + self.deadline;
        loop {
            let state = self.qmp.execute("query-migrate", json!({})).await;
            let state = state.map_err(self.failed(action))?;
            let moves = ["setup", "active", "device", "pre-switchover", "cancelling"];
            let status = state["status"].as_str().unwrap_or_default();
            if !moves.contains(&status) {
                break;
            }
            if Instant::now() > deadline {
                return Err(self.failed(action)(QmpError::Timeout(self.deadline)));
            }
            if status != "cancelling" {
                self.qmp
                    .execute("migrate_cancel", json!({}))
                    .await
                    .map_err(self.failed(action))?;
            }
            sleep(Duration::from_millis(10)).await;
        }
        self.qmp
            .execute("cont", json!({}))
            .await
            .map(drop)
            .map_err(self.failed(action))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, VmmError> {
        match spawn_blocking(work).await {
            Ok(result) => result.map_err(self.file_failed()),
            Err(e) => Err(self.file_failed()(io::Error::other(e))),
        }
    }
}

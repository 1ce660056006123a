//! Templates: QEMU's migration, with the memory left where it is.
//!
//! `x-ignore-shared` keeps memory out of the stream: what remains is the state of processor and devices.

use std::{
    os::fd::{OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};

use super::{migration::Transfer, qmp::QmpError, vm::QemuVm};
use crate::{Disk, Template, Vm, VmmError, template::Shape};

/// More state than this is not ours: it is some 300 kB.
const MAX_STATE: u64 = 16 << 20;
/// How long the guest may take to see that nobody talks to it any more.
pub(super) const CLOSE: Duration = Duration::from_secs(5);
impl QemuVm {
    /// Stops the VM and takes its state out. The memory still has the VMM as a writer.
    pub(super) async fn save_memory(&self) -> Result<(Shape, OwnedFd, Vec<u8>), VmmError> {
        let action = "save a template";
        let savable = self
            .savable
            .lock()
            .expect("no holder of this lock panics")
            .take();
        let Some((shape, memory)) = savable else {
            return Err(VmmError::Spec {
                field: "origin",
                rule: "must be savable for a template, which can be made once".to_owned(),
            });
        };
        if timeout(CLOSE, self.agent_closed()).await.is_err() {
            tracing::debug!(vm = %self.record().sandbox, "the agent keeps its port open");
        }
        self.qmp
            .execute("stop", json!({}))
            .await
            .map_err(self.failed(action))?;
        let (ours, events) = self.migrate_out(Transfer::Devices, action).await?;
        let mut state = Vec::new();
        let work = async {
            let read = ours.take(MAX_STATE).read_to_end(&mut state).await;
            read.map_err(self.file_failed())?;
            self.migrated(events, action).await
        };
        self.in_time(action, work).await?;
        Ok((shape, memory, state))
    }

    /// Waits until the guest has closed the agent's port: whoever starts from a template would have
    /// to end the former session first.
    pub(super) async fn agent_closed(&self) {
        loop {
            let devices = self.qmp.execute("query-chardev", json!({})).await;
            let open = devices.is_ok_and(|devices| {
                let agent = devices
                    .as_array()
                    .and_then(|all| all.iter().find(|device| device["label"] == "agent"));
                agent.is_some_and(|agent| agent["frontend-open"] == true)
            });
            if !open {
                return;
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// Gives a VM that waits for it the state of a template, and lets it run.
    pub(super) async fn restore(
        &self,
        template: Arc<Template>,
        memory: Option<RawFd>,
        disks: Vec<Disk>,
    ) -> Result<(), VmmError> {
        let action = "start from a template";
        let (mut ours, events) = self.migrate_in(Transfer::Devices, action).await?;
        let work = async {
            let feed = async {
                let written = ours.write_all(&template.state).await;
                drop(ours);
                written.map_err(self.file_failed())
            };
            tokio::try_join!(self.take_in(action), feed)?;
            self.migrated(events, action).await
        };
        self.in_time(action, work).await?;
        if let Some(memory) = memory {
            self.check_memory(&template, memory, action)?;
        }
        for disk in disks {
            self.plug_disk(disk).await?;
        }
        self.qmp
            .execute("cont", json!({}))
            .await
            .map_err(self.failed(action))?;
        Ok(())
    }

    /// Under which number the VMM has opened the template's memory. The first VM shows it; with the
    /// later ones the launcher has counted on it.
    fn check_memory(
        &self,
        template: &crate::Template,
        passed: RawFd,
        action: &str,
    ) -> Result<(), VmmError> {
        let found = memory_fd(self.process.pid, template, passed)
            .map_err(|e| self.control(action.to_owned(), &e.to_string()))?;
        let expected = *template.memory_fd.get_or_init(|| found);
        if expected == found {
            return Ok(());
        }
        let message = format!("the VMM has its memory at descriptor {found}, not {expected}");
        Err(self.control(action.to_owned(), &message))
    }

    async fn in_time<T>(
        &self,
        action: &str,
        work: impl Future<Output = Result<T, VmmError>>,
    ) -> Result<T, VmmError> {
        timeout(self.deadline, work)
            .await
            .unwrap_or_else(|_late| Err(self.failed(action)(QmpError::Timeout(self.deadline))))
    }
}

/// The descriptor of a process that is the template's memory, opened by the process itself.
fn memory_fd(pid: u32, template: &crate::Template, passed: RawFd) -> std::io::Result<RawFd> {
    use std::os::unix::fs::MetadataExt;
    let ours = rustix::fs::fstat(&template.memory)?;
    let mut found = None;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // A descriptor may be closed meanwhile.
        let Ok(meta) = std::fs::metadata(entry.path()) else {
            continue;
        };
        if number != passed && meta.dev() == ours.st_dev && meta.ino() == ours.st_ino {
            found = Some(number);
        }
    }
    found.ok_or_else(|| std::io::Error::other("the VMM has not opened the guest memory"))
}

//! Templates: QEMU's migration, with the memory left where it is.
//!
//! `x-ignore-shared` keeps memory out of the stream: what remains is the state of processor and
//! devices, which goes through a pipe whose VMM's end is passed along, so that the VMM's sandbox
//! needs neither files nor processes for it.

use std::{
    os::fd::{OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::broadcast,
    time::{sleep, timeout},
};

use super::{
    qmp::{QmpError, QmpEvent},
    vm::QemuVm,
};
use crate::{Disk, Template, Vm, VmmError, template::Shape};

/// More state than this is not ours: it is some 300 kB.
const MAX_STATE: u64 = 16 << 20;
/// How long the guest may take to see that nobody talks to it any more.
pub(super) const CLOSE: Duration = Duration::from_secs(5);
/// Name of the pipe in QEMU.
const PIPE: &str = "template";

/// What a migration moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transfer {
    /// Processor and devices: the memory stays in a file that both VMMs have.
    Devices,
    /// The memory too.
    Everything,
}

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
        let pipe_failed = |e: std::io::Error| self.control(action.to_owned(), &e.to_string());
        if timeout(CLOSE, self.agent_closed()).await.is_err() {
            tracing::debug!(vm = %self.record().sandbox, "the agent keeps its port open");
        }
        self.qmp
            .execute("stop", json!({}))
            .await
            .map_err(self.failed(action))?;
        self.prepare_migration(Transfer::Devices)
            .await
            .map_err(self.failed(action))?;
        let mut events = self.qmp.subscribe();
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| pipe_failed(e.into()))?;
        let ours = pipe::Receiver::from_owned_fd(ours).map_err(pipe_failed)?;
        let pass = json!({ "fdname": PIPE });
        self.qmp
            .execute_with_fd("getfd", pass, theirs)
            .await
            .map_err(self.failed(action))?;
        self.qmp
            .execute("migrate", json!({ "uri": format!("fd:{PIPE}") }))
            .await
            .map_err(self.failed(action))?;
        let mut state = Vec::new();
        let work = async {
            ours.take(MAX_STATE)
                .read_to_end(&mut state)
                .await
                .map_err(pipe_failed)?;
            self.migrated(&mut events)
                .await
                .map_err(self.failed(action))
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
        let pipe_failed = |e: std::io::Error| self.control(action.to_owned(), &e.to_string());
        self.prepare_migration(Transfer::Devices)
            .await
            .map_err(self.failed(action))?;
        let mut events = self.qmp.subscribe();
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| pipe_failed(e.into()))?;
        let mut ours = pipe::Sender::from_owned_fd(ours).map_err(pipe_failed)?;
        let pass = json!({ "fdname": PIPE });
        self.qmp
            .execute_with_fd("getfd", pass, theirs)
            .await
            .map_err(self.failed(action))?;
        let work = async {
            let uri = json!({ "uri": format!("fd:{PIPE}") });
            let load = async {
                self.qmp
                    .execute("migrate-incoming", uri)
                    .await
                    .map_err(self.failed(action))
            };
            let feed = async {
                ours.write_all(&template.state).await.map_err(pipe_failed)?;
                drop(ours);
                Ok::<_, VmmError>(())
            };
            tokio::try_join!(load, feed)?;
            self.migrated(&mut events)
                .await
                .map_err(self.failed(action))
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

    pub(super) async fn prepare_migration(&self, transfer: Transfer) -> Result<(), QmpError> {
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

    pub(super) async fn migrated(
        &self,
        events: &mut broadcast::Receiver<QmpEvent>,
    ) -> Result<(), QmpError> {
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

//! A running QEMU: disks, channel, console and end.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use hypernetes_types::CpuSet;
use serde_json::json;
use tokio::{
    sync::{broadcast, watch},
    task::JoinSet,
    time::timeout,
};

use super::{
    console::{Console, printable},
    disk,
    qmp::{Qmp, QmpError},
    share::{self, Shares},
    stall,
};
use crate::{
    Channel, Disk, HostShare, Template, Vm, VmEvent, VmExit, VmRecord, VmmError,
    channel::ChannelSlot,
    launcher::cgroup,
    process::{ExitStatus, Process},
    run_dir::{AGENT, RunDir},
    template::Shape,
};

/// How long a panicked kernel may take to reboot, which ends QEMU, before it is killed.
const PANIC_GRACE: Duration = Duration::from_secs(2);
/// How long the sockets of a dead process may take to be read to their end.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a killed process may take to vanish.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// How much of the VMM's own messages is told.
const MAX_MESSAGES: u64 = 4096;

/// Why the guest stopped, by QEMU's SHUTDOWN event.
pub(crate) type ShutdownReason = Arc<Mutex<Option<(bool, String)>>>;

/// The parts of a VM that has just been launched or adopted.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) record: VmRecord,
    /// Driver and version of the VMM.
    pub(crate) maker: String,
    pub(crate) process: Process,
    pub(crate) qmp: Qmp,
    pub(crate) console: Console,
    pub(crate) messages: File,
    pub(crate) savable: Option<(Shape, OwnedFd)>,
    pub(crate) shutdown: ShutdownReason,
    pub(crate) deadline: Duration,
    pub(crate) shares: Shares,
}

/// A VM whose VMM is QEMU. Dropping it leaves the VM running.
#[derive(Debug)]
pub(crate) struct QemuVm {
    pub(super) record: VmRecord,
    pub(super) maker: String,
    pub(super) run: RunDir,
    pub(super) process: Process,
    /// Where the VMM is now: it may have been launched for nobody yet.
    pub(super) cgroup: Arc<OnceLock<String>>,
    pub(super) qmp: Arc<Qmp>,
    console: Arc<Console>,
    channel: ChannelSlot,
    /// One change of disks at a time: QEMU's names are checked, then used.
    pub(super) disks: Arc<tokio::sync::Mutex<()>>,
    /// Memory that a template can be made of, once.
    pub(super) savable: Mutex<Option<(Shape, OwnedFd)>>,
    events: broadcast::Sender<VmEvent>,
    exit: watch::Receiver<Option<VmExit>>,
    stalled: watch::Receiver<bool>,
    pub(super) deadline: Duration,
    pub(super) shares: Shares,
    _tasks: JoinSet<()>,
}

impl QemuVm {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            record,
            maker,
            process,
            qmp,
            console,
            messages,
            savable,
            shutdown,
            deadline,
            shares,
        } = parts;
        let (events, _) = broadcast::channel(16);
        let (exit_out, exit) = watch::channel(None);
        let (qmp, console) = (Arc::new(qmp), Arc::new(console));
        let run = RunDir::new(&record.run_dir);
        let cgroup = Arc::new(OnceLock::new());
        if let Some(path) = record.cgroup.clone() {
            drop(cgroup.set(path));
        }
        let watcher = Watcher {
            process: process.clone(),
            console: Arc::clone(&console),
            qmp: Arc::clone(&qmp),
            messages,
            shutdown,
            run: run.clone(),
            cgroup: Arc::clone(&cgroup),
            server_lost: shares.lost(),
            exit: exit_out,
            events: events.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(watcher.run());
        let disks = Arc::default();
        let (stalled_out, stalled) = watch::channel(false);
        tasks.spawn(stall::watch(
            record.sandbox.clone(),
            Arc::clone(&qmp),
            Arc::clone(&disks),
            stalled_out,
        ));
        Self {
            record,
            maker,
            run,
            process,
            cgroup,
            qmp,
            console,
            channel: ChannelSlot::default(),
            disks,
            savable: Mutex::new(savable),
            events,
            exit,
            stalled,
            deadline,
            shares,
            _tasks: tasks,
        }
    }

    pub(super) fn failed(&self, action: impl Into<String>) -> impl FnOnce(QmpError) -> VmmError {
        let (action, sandbox) = (action.into(), self.record.sandbox.clone());
        move |e| match e {
            QmpError::Closed => VmmError::Gone { sandbox },
            QmpError::Timeout(waited) => VmmError::Timeout {
                action,
                sandbox,
                waited,
            },
            other => VmmError::Control {
                action,
                sandbox,
                message: other.to_string(),
            },
        }
    }

    pub(super) fn control(&self, action: String, message: &str) -> VmmError {
        let sandbox = self.record.sandbox.clone();
        VmmError::Control {
            action,
            sandbox,
            message: message.to_owned(),
        }
    }

    /// Ends whoever talks to the agent.
    pub(super) fn end_channel(&self) {
        self.channel.end_former();
    }

    async fn slots(&self) -> Result<Vec<u32>, QmpError> {
        let answer = self.qmp.execute("query-block", json!({})).await?;
        let mut slots: Vec<u32> = answer
            .as_array()
            .ok_or_else(|| QmpError::Protocol("query-block".to_owned()))?
            .iter()
            .filter_map(|device| disk::slot_of_node(device["inserted"]["node-name"].as_str()?))
            .collect();
        slots.sort_unstable();
        slots.dedup();
        Ok(slots)
    }

    /// Takes down what is below a disk's device. What is not there is no error.
    async fn remove_backend(&self, slot: u32) -> Result<(), QmpError> {
        let tolerate = |answer: Result<_, QmpError>| match answer {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        };
        let node = json!({ "node-name": disk::node_name(slot) });
        tolerate(self.qmp.execute("blockdev-del", node).await)?;
        tolerate(
            self.qmp
                .execute("remove-fd", json!({ "fdset-id": slot }))
                .await,
        )
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn record(&self) -> VmRecord {
        VmRecord {
            cgroup: self.cgroup.get().cloned(),
            ..self.record.clone()
        }
    }

    async fn plug_disk(&self, disk: Disk) -> Result<(), VmmError> {
        let (slot, read_only, kind, fd) = disk::prepare(disk)?;
        let action = format!("plug disk {slot}");
        let _turn = self.disks.lock().await;
        if self
            .slots()
            .await
            .map_err(self.failed(&action))?
            .contains(&slot)
        {
            return Err(self.control(action, "the slot is occupied"));
        }
        // A plug that was cancelled may have left its lower half.
        self.remove_backend(slot)
            .await
            .map_err(self.failed(&action))?;
        let plug = async {
            let set = json!({ "fdset-id": slot });
            self.qmp.execute_with_fd("add-fd", set, fd).await?;
            self.qmp
                .execute("blockdev-add", disk::blockdev(slot, read_only, kind))
                .await?;
            self.qmp.execute("device_add", disk::device(slot)).await
        };
        if let Err(e) = plug.await {
            if let Err(undo) = self.remove_backend(slot).await {
                tracing::warn!(vm = %self.record.sandbox, slot, error = %undo, "cannot undo a failed plug");
            }
            return Err(self.failed(action)(e));
        }
        Ok(())
    }

    async fn unplug_disk(&self, slot: u32) -> Result<(), VmmError> {
        let action = format!("unplug disk {slot}");
        let _turn = self.disks.lock().await;
        let mut events = self.qmp.subscribe();
        let device = disk::device_id(slot);
        match self
            .qmp
            .execute("device_del", json!({ "id": device }))
            .await
        {
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(self.failed(action)(e)),
            Ok(_) => {
                let deleted = async {
                    loop {
                        match events.recv().await {
                            Ok(event) => {
                                if event.name == "DEVICE_DELETED" && event.data["device"] == device
                                {
                                    return Ok(());
                                }
                            }
                            // Missed events may have held ours: let the backend decide.
                            Err(broadcast::error::RecvError::Lagged(_)) => return Ok(()),
                            Err(broadcast::error::RecvError::Closed) => {
                                return Err(QmpError::Closed);
                            }
                        }
                    }
                };
                let closed = self.qmp.closed();
                let waited = tokio::select! {
                    waited = timeout(self.deadline, deleted) => waited,
                    () = closed => Ok(Err(QmpError::Closed)),
                };
                waited
                    .unwrap_or(Err(QmpError::Timeout(self.deadline)))
                    .map_err(self.failed(&action))?;
            }
        }
        self.remove_backend(slot).await.map_err(self.failed(action))
    }

    async fn resize_disk(&self, slot: u32, bytes: u64) -> Result<(), VmmError> {
        let _turn = self.disks.lock().await;
        let arguments = json!({ "node-name": disk::node_name(slot), "size": bytes });
        let resized = self.qmp.execute("block_resize", arguments).await;
        resized
            .map(drop)
            .map_err(self.failed(format!("resize disk {slot}")))
    }

    async fn list_disks(&self) -> Result<Vec<u32>, VmmError> {
        self.slots().await.map_err(self.failed("list disks"))
    }

    async fn share(&self, share: HostShare) -> Result<String, VmmError> {
        self.share_host(share).await
    }

    async fn set_extra_memory(&self, mib: u32) -> Result<u32, VmmError> {
        self.resize_memory(mib).await
    }

    async fn set_cpus(&self, cpus: Option<&CpuSet>) -> Result<(), VmmError> {
        self.pin(cpus).await
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, VmmError> {
        if self.exit().is_some() {
            return Err(VmmError::Gone {
                sandbox: self.record.sandbox.clone(),
            });
        }
        self.channel.end_former();
        // QEMU listens again once it has seen the end of the former connection; until then ours
        // waits in the socket's queue.
        match self.run.connect(AGENT).await {
            Ok(stream) => Ok(Box::new(self.channel.put(stream))),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Err(VmmError::Gone {
                sandbox: self.record.sandbox.clone(),
            }),
            Err(source) => Err(VmmError::Io {
                action: "connect to",
                path: self.record.run_dir.join(AGENT),
                source,
            }),
        }
    }

    fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.events.subscribe()
    }

    fn exit(&self) -> Option<VmExit> {
        self.exit.borrow().clone()
    }

    async fn wait(&self) -> VmExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(exit)) => exit.clone(),
            _ => VmExit::VmmDied {
                status: "no longer watched".to_owned(),
            },
        }
    }

    fn stalled(&self) -> watch::Receiver<bool> {
        self.stalled.clone()
    }

    fn console_tail(&self) -> String {
        self.console.tail()
    }

    async fn save(&self) -> Result<Template, VmmError> {
        let saved = self.save_memory().await;
        let killed = self.kill().await;
        let (shape, memory, state) = saved?;
        killed?;
        // Only now has the memory no writer any more.
        Template::new(shape, memory, state)
            .await
            .map_err(|e| self.control("seal the template".to_owned(), &e.to_string()))
    }

    async fn suspend(&self, to: File, limit: u64) -> Result<(), VmmError> {
        self.suspend_to(to, limit).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.run_on().await
    }

    async fn join_cgroup(&self, cgroup: &str) -> Result<(), VmmError> {
        self.enter_cgroup(cgroup)
    }

    async fn stand_back(&self, back: bool) -> Result<(), VmmError> {
        self.set_priority(back)
    }

    async fn kill(&self) -> Result<(), VmmError> {
        let sandbox = || self.record.sandbox.clone();
        self.process
            .kill()
            .map_err(|e| self.control("kill".to_owned(), &e.to_string()))?;
        timeout(KILL_DEADLINE, self.wait())
            .await
            .map_err(|_elapsed| VmmError::Timeout {
                action: "kill".to_owned(),
                sandbox: sandbox(),
                waited: KILL_DEADLINE,
            })?;
        Ok(())
    }
}

/// Waits for the end of the process, finds out the reason, clears up and tells.
struct Watcher {
    process: Process,
    console: Arc<Console>,
    qmp: Arc<Qmp>,
    messages: File,
    shutdown: ShutdownReason,
    run: RunDir,
    cgroup: Arc<OnceLock<String>>,
    server_lost: Arc<AtomicBool>,
    exit: watch::Sender<Option<VmExit>>,
    events: broadcast::Sender<VmEvent>,
}

impl Watcher {
    async fn run(self) {
        let status = tokio::select! {
            status = self.process.exited() => status,
            () = self.after_panic() => self.process.exited().await,
        };
        let status = status.unwrap_or(ExitStatus::Unknown);
        // The last words are in the sockets: read them before judging.
        let words = async {
            self.qmp.closed().await;
            self.console.ended().await;
        };
        drop(timeout(DRAIN, words).await);
        let exit = self.judge(status);
        let cgroup = self.cgroup.get().map(String::as_str);
        clear_up(&self.run, cgroup).await;
        self.exit.send_replace(Some(exit.clone()));
        drop(self.events.send(VmEvent::Exited(exit)));
    }

    async fn after_panic(&self) {
        self.console.panicked().await;
        tokio::time::sleep(PANIC_GRACE).await;
        if let Err(e) = self.process.kill() {
            tracing::warn!(error = %e, "cannot kill the VMM of a panicked guest");
        }
    }

    fn judge(&self, status: ExitStatus) -> VmExit {
        if let Some(console_tail) = self.console.panic_tail() {
            return VmExit::Panic { console_tail };
        }
        if self.server_lost.load(Ordering::Relaxed) {
            let status = "the server of its host directories ended".to_owned();
            return VmExit::VmmDied { status };
        }
        let reason = self
            .shutdown
            .lock()
            .expect("no holder of this lock panics")
            .clone();
        match reason {
            Some((true, _)) => VmExit::Shutdown,
            reason => {
                let mut text = status.to_string();
                if let Some((false, reason)) = reason {
                    text.push_str(&format!(" ({reason})"));
                }
                let said = read_messages(&self.messages);
                if !said.is_empty() {
                    text.push_str(&format!(": {said}"));
                }
                VmExit::VmmDied { status: text }
            }
        }
    }
}

/// What the VMM printed, as far as it fits.
pub(crate) fn read_messages(mut messages: &File) -> String {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    while (bytes.len() as u64) < MAX_MESSAGES {
        match messages.read(&mut chunk) {
            Ok(count @ 1..) => bytes.extend_from_slice(&chunk[..count]),
            // Nothing left, with a writer (EAGAIN) or without.
            _ => break,
        }
    }
    printable(&bytes).trim().to_owned()
}

/// Removes the traces of a VM whose process is dead: cgroup, sockets, launch record. The record last: whoever is killed
/// in between finds the cgroup by it.
pub(crate) async fn clear_up(run: &RunDir, group: Option<&str>) {
    share::end_server(run).await;
    if let Some(group) = group {
        remove_group(group).await;
    }
    if let Err(e) = run.remove_live_files() {
        tracing::warn!(path = %run.path().display(), error = %e, "cannot remove sockets");
    }
}

async fn remove_group(group: &str) {
    // A dead process leaves its cgroup a moment after it can be reaped.
    for attempt in 0..20_u64 {
        match cgroup::remove(group) {
            Ok(()) => return,
            Err(e) if attempt == 19 => {
                tracing::warn!(cgroup = group, error = %e, "cannot remove the cgroup");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(5 * (attempt + 1))).await,
        }
    }
}

//! A VM that becomes a file, and goes on from it.
//!
//! ```text
//! suspend: be promised room ─ record Suspending ─ write memory.new ─ name it memory.vm ─ kill the VMM ─ record Suspended
//! resume:  record Resuming ─ start a VMM, record it ─ remove memory.vm ─ let it go on ─ record Ready
//! ```
//! Whether `memory.vm` is there decides what a restart in between makes of it (see
//! [`recovery`](crate::recovery)): the file is good for one VM, and is gone before that VM has changed the
//! disks that belong to it.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypernetes_agent_api::{AgentClient, FEATURE_PAUSE};
use hypernetes_network::Lease;
use hypernetes_types::{ContainerId, Digest};
use hypernetes_vmm::{Disk, Origin, Suspended, Vm, VmmError};
use tokio::time::sleep;

use super::{Actor, Late, boot::Parts, containers::invalid, not_found};
use crate::{
    beat::beat,
    container,
    error::RuntimeError,
    identity::{SCRATCH_SLOT, network_request},
    records::{Suspension, VmSize},
    room::{Need, Promise},
    sandbox::{Event, Phase},
    scratch::blocking,
};

/// How often a VM that stands still is told to go on before it counts as lost.
pub(crate) const GO_ON_ATTEMPTS: u32 = 4;
const GO_ON_PAUSE: Duration = Duration::from_millis(100);

impl Actor {
    /// Frees the VM's memory. On an error it runs on.
    pub(super) async fn suspend(&mut self) -> Result<(), RuntimeError> {
        let action = "suspend the sandbox";
        if self.record.phase == Phase::Suspended {
            // An earlier attempt may have failed at the very end of the VMM.
            return Ok(self.shared.config.vmm.destroy(&self.run_dir()).await?);
        }
        let vm = self.ready_vm(action)?;
        self.check_suspendable()?;
        let need = Need {
            what: "the memory",
            least: 1,
            most: self.most_state(),
        };
        let room = self.promised(action, need).await?;
        self.unplug_unused().await?;
        self.settle_endings().await;
        // What could not be stored is asked of the guest again after a restart; of a file nobody can ask.
        let members: Vec<_> = self.members.values().map(|it| it.record.clone()).collect();
        if !members.is_empty() {
            self.shared.records.put_containers(&members).await?;
        }
        let VmSize { vcpus, memory_mib } = self.first_size();
        let slots = self.plugged.iter().copied().collect();
        self.record.set_suspension(Some(Suspension {
            vcpus,
            memory_mib,
            slots,
            still: false,
        }));
        let (frozen, client) = (self.to_freeze(), self.client(action).await);
        let freezable = match (frozen, client) {
            (Ok(frozen), Ok(client)) if client.has(FEATURE_PAUSE) => Some((frozen, client)),
            _ => None,
        };
        let frozen = freezable.as_ref().map(|(frozen, _)| frozen.clone());
        self.record.set_frozen(frozen);
        self.advance(action, Event::SuspendAsked)?;
        if let Err(error) = self.save().await {
            self.record.set_suspension(None);
            self.record.set_frozen(None);
            self.advance(action, Event::SuspendUndone)?;
            return Err(error);
        }
        self.publish_sandbox();
        if let Some((frozen, client)) = freezable {
            self.freeze_for_clones(&vm, &client, &frozen).await;
        }
        self.end_sessions();
        let stopping = self.stopping.clone();
        let file = self.shared.suspended_file(&self.record.id);
        let written = tokio::select! {
            written = self.write_memory(&vm, file, room.bytes()) => written,
            () = stopping.cancelled() => Err(self.refused(action)),
        };
        if let Err(error) = written {
            self.undo_suspend(vm).await;
            return Err(room.explain(error));
        }
        drop(room);
        // Nothing is undone from here on: the file is what the sandbox is.
        if let Err(error) = vm.kill().await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(error, "cannot end the VMM of a suspended VM yet");
        }
        let destroyed = self.shared.config.vmm.destroy(&self.run_dir()).await;
        self.vm = None;
        self.plugged.clear();
        self.pinned = Some(None);
        self.record.vm = None;
        self.advance(action, Event::SuspendDone)?;
        let saved = self.save().await;
        self.publish_sandbox();
        destroyed?;
        saved
    }

    /// Room on the disk, before anything stands still for it. A stop ends the wait for it.
    pub(super) async fn promised(
        &self,
        action: &'static str,
        need: Need,
    ) -> Result<Promise, RuntimeError> {
        tokio::select! {
            promise = self.shared.room.promise(need) => promise,
            () = self.stopping.cancelled() => Err(self.refused(action)),
        }
    }

    /// Has the containers stand still in the VM that becomes a file, so that a clone can go on from it. They go on
    /// with the guest's next session. One that does not stand still does not keep the pod from being suspended.
    async fn freeze_for_clones(
        &mut self,
        vm: &Arc<dyn Vm>,
        client: &AgentClient,
        containers: &[ContainerId],
    ) {
        match self.freeze(vm, client, containers).await {
            Ok(()) => {
                if let Some(suspension) = &mut self.record.suspension {
                    suspension.still = true;
                }
            }
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(
                    error,
                    "a pod is suspended with processes that go on at once"
                );
            }
        }
    }

    /// Has a suspended VM go on. On an error it stays suspended.
    pub(super) async fn resume(&mut self) -> Result<(), RuntimeError> {
        let action = "resume the sandbox";
        let stopping = self.stopping.clone();
        if self.record.phase == Phase::Ready {
            return Ok(());
        }
        if stopping.is_cancelled() {
            return Err(self.refused(action));
        }
        self.begin_resume(action).await?;
        let vm = tokio::select! {
            vm = self.bring_back() => vm,
            () = stopping.cancelled() => Err(self.refused(action)),
        };
        self.go_on(action, vm).await?;
        // The clock stood still with the VM. The guest sets it with the next beat at the latest.
        let client = self.client(action).await;
        let call = self.shared.config.deadlines.call;
        let set = async { beat(&client?, call).await.map_err(|e| self.unanswered(&e)) };
        if let Err(error) = set.await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(error, "a resumed guest does not answer yet");
        }
        // Whoever asked finds the containers at work. If they cannot be told yet, the next session does.
        self.thaw().await;
        Ok(())
    }

    /// What a guest has in memory of volumes that outlive it is written back before they are given away:
    /// it goes on for that, and is then stopped as any.
    pub(super) async fn wake_to_flush(&mut self) {
        let action = "write back the sandbox's volumes";
        if self.record.phase != Phase::Suspended || self.record.attached.is_empty() {
            return;
        }
        let woken = async {
            self.begin_resume(action).await?;
            let vm = self.bring_back().await;
            self.go_on(action, vm).await
        };
        if let Err(error) = woken.await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(
                error,
                "what a suspended pod had in memory of its volumes is lost"
            );
        }
    }

    /// Removes what a suspended VM has left. Idempotent.
    pub(super) async fn forget_suspended(&mut self) -> Result<(), RuntimeError> {
        if self.record.suspension.is_none() {
            return Ok(());
        }
        let file = self.shared.suspended_file(&self.record.id);
        remove_durably(draft(&file)).await?;
        remove_durably(file).await?;
        self.record.set_suspension(None);
        Ok(())
    }

    fn run_dir(&self) -> PathBuf {
        self.shared.run_dir(&self.record.id)
    }

    fn unanswered(&self, error: &hypernetes_agent_api::AgentError) -> RuntimeError {
        crate::guest::error(&self.record.id, "set its clock", error)
    }

    /// Refuses what would not be there when the VM goes on.
    pub(super) fn check_suspendable(&self) -> Result<(), RuntimeError> {
        let mut devices = self
            .members
            .values()
            .flat_map(|member| &member.record.config.devices);
        if devices.any(|device| device.volume.is_empty()) || !self.pending.is_empty() {
            let rule = "must not be the host's own in a sandbox that is suspended";
            return Err(invalid("devices", rule));
        }
        Ok(())
    }

    /// Lets containers whose end is known have their end: what waits for it would not survive.
    pub(super) async fn settle_endings(&mut self) {
        let waits = |member: &super::Member| member.ending && member.record.phase.is_live();
        while self.members.values().any(waits) {
            match self.late.join_next().await {
                Some(Ok(Late::Ended(id, ending))) => self.container_ended(&id, ending).await,
                Some(Ok(Late::Drained(id))) => self.container_drained(&id).await,
                Some(Err(_)) => {}
                None => return,
            }
        }
    }

    /// Nobody talks to the guest any more. Logs go on where they are when somebody does again.
    pub(super) fn end_sessions(&mut self) {
        self.late.abort_all();
        self.link = None;
        for member in self.members.values_mut() {
            member.pump = None;
        }
        self.publish();
    }

    /// Writes the VM, which stands still from then on, into a file of this name: so many bytes at most.
    pub(super) async fn write_memory(
        &self,
        vm: &Arc<dyn Vm>,
        file: PathBuf,
        limit: u64,
    ) -> Result<(), RuntimeError> {
        let draft = draft(&file);
        let opened = blocking(format!("make {}", draft.display()), {
            let draft = draft.clone();
            move || {
                if let Some(parent) = draft.parent() {
                    std::fs::create_dir_all(parent)?;
                }
                remove(&draft)?;
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&draft)
            }
        });
        vm.suspend(opened.await?, limit).await?;
        blocking(format!("name {}", file.display()), move || {
            std::fs::rename(draft, &file)?;
            // The directory is as new as its first file, and has not been synced before.
            file.ancestors().take(2).try_for_each(sync_parent)
        })
        .await
    }

    /// What a VM of this size can be in a file: each page with its address, and its devices.
    pub(super) fn most_state(&self) -> u64 {
        let size = self.first_size();
        let most = self.record.config.extras.max_memory_mib;
        // Memory comes in blocks of 128 MiB.
        let memory = u64::from(size.memory_mib.max(most)) + 128;
        (memory + memory / 64 + 64) << 20
    }

    /// The VM that was to become a file goes on.
    async fn undo_suspend(&mut self, vm: Arc<dyn Vm>) {
        let told = |what: &str, error: RuntimeError| {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(error, "{what}");
        };
        let file = self.shared.suspended_file(&self.record.id);
        // If the file has its name already, a restart would go on from it: it goes first.
        for path in [file.clone(), draft(&file)] {
            if let Err(error) = remove_durably(path).await {
                told("cannot remove what is left of a suspend", error);
            }
        }
        if let Err(error) = let_go_on(vm.as_ref()).await {
            told("a VM that stands still does not go on", error.into());
            // Its end is told as any VM's.
            if let Err(error) = vm.kill().await {
                told("cannot kill a VM", error.into());
            }
        }
        self.record.set_suspension(None);
        if let Err(error) = self.advance("suspend the sandbox", Event::SuspendUndone) {
            told("cannot undo a suspend", error);
        }
        if let Err(error) = self.save().await {
            told("cannot store that a suspend was undone", error);
        }
        self.take_up(vm).await;
        self.publish_sandbox();
    }

    /// Logs, events and disks of a VM that goes on.
    pub(super) async fn take_up(&mut self, vm: Arc<dyn Vm>) {
        match vm.exit() {
            // Found by whoever waits for it.
            Some(_) => self.vm = Some(vm),
            None => self.adopted(vm).await,
        }
    }

    async fn begin_resume(&mut self, action: &'static str) -> Result<(), RuntimeError> {
        self.advance(action, Event::ResumeAsked)?;
        if let Err(error) = self.save().await {
            self.advance(action, Event::ResumeUndone)?;
            return Err(error);
        }
        self.publish_sandbox();
        Ok(())
    }

    /// Starts a VM from the file. It stands still.
    async fn bring_back(&mut self) -> Result<Arc<dyn Vm>, RuntimeError> {
        // One that could not be ended has the same disks open.
        self.shared.config.vmm.destroy(&self.run_dir()).await?;
        let path = self.shared.suspended_file(&self.record.id);
        let action = format!("open the suspended VM {}", path.display());
        let suspended = blocking(action, move || Suspended::open(File::open(path)?)).await?;
        let parts = self.suspended_parts().await?;
        let place = |lease: &Lease| (lease.address, lease.mac.clone());
        let had = self.record.lease.as_ref().map(place);
        let has = parts.attachment.as_ref().map(|it| place(&it.lease));
        if has != had {
            let rule = "must be the one that the sandbox had before it was suspended";
            return Err(invalid("address", rule));
        }
        let vm = self
            .launch(parts, Origin::Suspended(Arc::new(suspended)))
            .await?;
        // It may go on from here on, and nobody else from this file again.
        remove_durably(self.shared.suspended_file(&self.record.id)).await?;
        Ok(vm)
    }

    /// What a VM from the file is launched with.
    pub(super) async fn suspended_parts(&self) -> Result<Parts, RuntimeError> {
        let suspension = self.record.suspension.clone();
        let Some(suspension) = suspension else {
            return Err(self.refused("resume the sandbox"));
        };
        let config = &self.record.config;
        let kernels = &self.shared.config.kernels;
        let kernel = kernels.prepare(config.kernel.as_ref(), &self.shared.config.hyperstart);
        let kernel = kernel.await?;
        let disks = self.open_disks(&suspension.slots).await?;
        let attachment = match &config.network {
            Some(network) => {
                let driver = &self.shared.config.network;
                let request = network_request(config);
                Some(driver.attach(&self.record.id, network, &request).await?)
            }
            None => None,
        };
        Ok(Parts {
            attachment,
            disks,
            kernel,
            size: VmSize {
                vcpus: suspension.vcpus,
                memory_mib: suspension.memory_mib,
            },
        })
    }

    /// Lets the VM go on, or undoes its start.
    async fn go_on(
        &mut self,
        action: &'static str,
        vm: Result<Arc<dyn Vm>, RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let file = self.shared.suspended_file(&self.record.id);
        let look = format!("look for {}", file.display());
        let error = match vm {
            Ok(vm) => {
                let resumed = let_go_on(vm.as_ref()).await;
                if resumed.is_err()
                    && let Err(error) = vm.kill().await
                {
                    let error = hypernetes_telemetry::chain(&error).to_string();
                    tracing::error!(error, "cannot kill a VM that does not go on");
                }
                self.record.set_suspension(None);
                self.advance(action, Event::Resumed)?;
                let saved = self.save().await;
                self.take_up(vm).await;
                self.publish_sandbox();
                resumed?;
                return saved;
            }
            Err(error) => error,
        };
        // Cut short behind the removal of the file, there is a VM to go on.
        let whole = blocking(look, move || file.try_exists()).await;
        if let (Ok(false), Some(vm)) = (&whole, self.vm.clone()) {
            return Box::pin(self.go_on(action, Ok(vm))).await;
        }
        self.vm = None;
        self.plugged.clear();
        let destroyed = self.shared.config.vmm.destroy(&self.run_dir()).await;
        self.record.vm = None;
        self.advance(action, Event::ResumeUndone)?;
        let saved = self.save().await;
        self.publish_sandbox();
        for undo in [
            destroyed.map_err(RuntimeError::from),
            saved,
            whole.map(drop),
        ] {
            if let Err(undo) = undo {
                let undo = hypernetes_telemetry::chain(&undo).to_string();
                tracing::error!(error = undo, "cannot undo a resume");
            }
        }
        Err(error)
    }

    /// The disks in these slots, open once more.
    async fn open_disks(&self, slots: &[u32]) -> Result<Vec<Disk>, RuntimeError> {
        let mut layers = self.open_layers().await?;
        let mut disks = Vec::with_capacity(slots.len());
        for &slot in slots {
            let volume = self.record.attached.iter().find(|disk| disk.slot == slot);
            let (file, read_only) = if slot == SCRATCH_SLOT {
                (self.shared.scratch.open(&self.record.id).await?, false)
            } else if let Some(disk) = volume {
                let driver = self.volume_driver()?;
                let pod = self.record.id.to_string();
                let device = driver.attach(&disk.volume, &pod, disk.read_only).await?;
                (device.file, device.read_only)
            } else if self.record.disks.iter().any(|disk| disk.slot == slot) {
                let scratch = &self.shared.scratch;
                (scratch.open_volume(&self.record.id, slot).await?, false)
            } else {
                let layer = layers.remove(&slot);
                (layer.ok_or_else(|| not_found("disk", slot))?, true)
            };
            disks.push(Disk {
                slot,
                file,
                read_only,
            });
        }
        Ok(disks)
    }

    /// The layers that containers have, by slot.
    async fn open_layers(&self) -> Result<BTreeMap<u32, File>, RuntimeError> {
        let records = || self.members.values().map(|member| &member.record);
        let live =
            |record: &&crate::records::ContainerRecord| record.phase != container::Phase::Creating;
        let slots: BTreeMap<Digest, u32> = records()
            .flat_map(|record| record.all_layers())
            .map(|layer| (layer.diff_id.clone(), layer.slot))
            .collect();
        let images: std::collections::BTreeSet<&str> = records()
            .filter(live)
            .flat_map(|record| record.image_ids())
            .collect();
        let mut files = BTreeMap::new();
        for image in images {
            let (_image, layers) = self.open_image(image).await?;
            for (diff_id, file) in layers {
                if let Some(slot) = slots.get(&diff_id) {
                    files.insert(*slot, file);
                }
            }
        }
        Ok(files)
    }
}

/// Lets a VM that stands still go on. A VMM that refuses is asked again: its pod is lost otherwise.
pub(crate) async fn let_go_on(vm: &dyn Vm) -> Result<(), VmmError> {
    let mut attempt = 1;
    loop {
        match vm.resume().await {
            Err(error) if attempt < GO_ON_ATTEMPTS && !matches!(error, VmmError::Gone { .. }) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(error, "a VM that stands still does not go on yet");
                attempt += 1;
                sleep(GO_ON_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// The name of a file that is not whole yet.
pub(crate) fn draft(file: &Path) -> PathBuf {
    file.with_extension("new")
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Has it be on the disk what the directory says that a file is in. Blocks.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent().map(File::open) {
        None => Ok(()),
        // Nothing is in a directory that is not there.
        Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Some(directory) => directory?.sync_all(),
    }
}

/// Removes a file for good: it does not come back after a power failure. Idempotent.
pub(super) async fn remove_durably(path: PathBuf) -> Result<(), RuntimeError> {
    blocking(format!("remove {}", path.display()), move || {
        remove(&path)?;
        sync_parent(&path)
    })
    .await
}

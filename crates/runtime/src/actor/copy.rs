//! A VM that is copied, with its memory and its disks, for a sandbox that is to go on from there.
//!
//! ```text
//! be promised room ─ record `frozen` ─ freeze the containers ─ write memory.vm ─ copy the disks ─ let the VM go on
//!                 ─ let the containers go on ─ record without `frozen`
//! ```
//! A guest that cannot be told to let its containers go on is told so with its next session.
//! Of a sandbox that is suspended the file is copied: its containers were frozen before.
//!
//! The containers stand still before the memory is taken, so that in the clone nothing of the tenant's runs
//! before it is a pod of its own. What is copied lies below the source's directory until the clone takes it:
//! a clone that has gone meanwhile leaves nothing behind. A restart in between has the VM and the containers
//! go on, and removes what was copied: a clone that did not become ready is undone (see
//! [`recovery`](crate::recovery)).

use std::{ops::RangeInclusive, path::PathBuf, sync::Arc};

use hypernetes_agent_api::{AgentClient, FEATURE_CLONE, FEATURE_PAUSE, v1};
use hypernetes_types::ContainerId;
use hypernetes_vmm::Vm;
use tokio::time::Instant;

use super::{
    Actor,
    containers::{invalid, unknown_to_guest},
};
use crate::{
    api::SandboxConfig,
    container::Phase,
    error::RuntimeError,
    identity::SCRATCH_SLOT,
    records::{ContainerRecord, CopiedState, Suspension, VmSize},
    room::{Need, Promise, is_over},
    sandbox::Phase as SandboxPhase,
    scratch::{blocking, copy_sparse, remove_directory},
    usage,
};

const ACTION: &str = "copy the sandbox";
/// As in the directory of a sandbox that is suspended.
pub(crate) const MEMORY: &str = "memory.vm";

/// What a copy is for.
#[derive(Debug)]
pub(crate) struct CopyPlan {
    /// The id of a clone or of a snapshot.
    pub(crate) target: String,
    /// What the clone is to be. A snapshot has the source's shape.
    pub(crate) wanted: Option<Box<SandboxConfig>>,
    /// Bytes that it may take on the disk.
    pub(crate) limit: Option<u64>,
}

/// What a clone goes on from.
#[derive(Debug)]
pub(crate) struct Copied {
    /// Memory and disks, by the names that a sandbox's own have. Whoever asked moves them.
    pub(crate) directory: CopyDirectory,
    pub(crate) state: CopiedState,
}

/// Room for memory and disks.
struct CopyRoom {
    room: Promise,
    /// How many bytes of it are for the memory.
    memory: u64,
}

/// A directory that goes with whoever has it.
#[derive(Debug)]
pub(crate) struct CopyDirectory(pub(crate) PathBuf);

impl Drop for CopyDirectory {
    fn drop(&mut self) {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let path = self.0.display();
                tracing::error!(%path, %error, "cannot remove what was copied of a sandbox");
            }
            _ => {}
        }
    }
}

impl Actor {
    /// Copies the VM for another sandbox or a snapshot. It goes on, whatever comes of it.
    pub(super) async fn copy_for(&mut self, plan: &CopyPlan) -> Result<Copied, RuntimeError> {
        if self.record.phase == SandboxPhase::Suspended {
            return self.copy_suspended(plan).await;
        }
        let vm = self.ready_vm(ACTION)?;
        // Of an earlier copy, whose session has not begun yet.
        self.thaw().await;
        if self.record.frozen.is_some() {
            let state = "with containers that do not go on from an earlier clone".to_owned();
            return Err(RuntimeError::State {
                action: ACTION,
                kind: "sandbox",
                id: self.record.id.to_string(),
                state,
            });
        }
        self.check_clonable(plan.wanted.as_deref())?;
        self.unplug_unused().await?;
        self.settle_endings().await;
        let frozen = self.to_freeze()?;
        let slots: Vec<u32> = self.plugged.iter().copied().collect();
        let memory = 1..=self.most_state();
        let room = self.room_for_copy(plan.limit, memory, &slots).await?;
        let client = self.client(ACTION).await?;
        if !client.has(FEATURE_PAUSE) || !client.has(FEATURE_CLONE) {
            return Err(unknown_to_guest("clone"));
        }
        self.record.set_frozen(Some(frozen.clone()));
        if let Err(error) = self.save().await {
            self.record.set_frozen(None);
            return Err(error);
        }
        self.publish();
        let stopping = self.stopping.clone();
        let copied = tokio::select! {
            copied = self.freeze_and_copy(&vm, &client, plan, frozen, room) => copied,
            () = stopping.cancelled() => Err(self.refused(ACTION)),
        };
        drop(client);
        self.go_on_after_copy(vm).await;
        if !self.stopping.is_cancelled() {
            self.thaw().await;
        }
        copied
    }

    /// Refuses what two pods cannot both have, and a clone that is another VM than its source.
    fn check_clonable(&self, wanted: Option<&SandboxConfig>) -> Result<(), RuntimeError> {
        let own = &self.record.config;
        self.check_suspendable()?;
        if !self.record.attached.is_empty() {
            let rule = "must be the pod's own: a volume that outlives it cannot be cloned with it";
            return Err(invalid("volumes", rule));
        }
        if own.extras.shares {
            let rule = "must be false: directories of the host cannot be cloned";
            return Err(invalid("extras.shares", rule));
        }
        check_ports(own)?;
        let huge = |record: &ContainerRecord| !record.config.resources.huge_pages.is_empty();
        if self.members.values().any(|member| huge(&member.record)) {
            return Err(invalid(
                "huge_pages",
                "must be empty in a pod that is cloned",
            ));
        }
        wanted.map_or(Ok(()), |wanted| check_same(own, wanted))
    }

    /// The containers that run. One that is on its way somewhere has to be there first.
    pub(super) fn to_freeze(&self) -> Result<Vec<ContainerId>, RuntimeError> {
        let mut running = Vec::new();
        for (id, member) in &self.members {
            match member.record.phase {
                Phase::Running if member.record.paused => {}
                Phase::Running => running.push(id.clone()),
                Phase::Exited => {}
                phase @ (Phase::Creating | Phase::Created | Phase::Starting | Phase::Removing) => {
                    return Err(self.refused_container("clone", id, phase));
                }
            }
        }
        Ok(running)
    }

    /// Has containers stand still. On an error some of them do.
    pub(super) async fn freeze(
        &self,
        vm: &Arc<dyn Vm>,
        client: &AgentClient,
        containers: &[ContainerId],
    ) -> Result<(), RuntimeError> {
        let deadline = self.shared.config.deadlines.call;
        for id in containers {
            let request = v1::PauseRequest {
                id: id.to_string(),
                paused: true,
            };
            self.with_vm(ACTION, vm, async {
                match client.pause(request, deadline).await {
                    // It has ended just now.
                    Err(error) if error.code() == Some(tonic::Code::FailedPrecondition) => Ok(()),
                    Err(error) => Err(crate::guest::error(&self.record.id, ACTION, &error)),
                    Ok(_) => Ok(()),
                }
            })
            .await?;
        }
        Ok(())
    }

    async fn freeze_and_copy(
        &mut self,
        vm: &Arc<dyn Vm>,
        client: &AgentClient,
        plan: &CopyPlan,
        frozen: Vec<ContainerId>,
        CopyRoom { mut room, memory }: CopyRoom,
    ) -> Result<Copied, RuntimeError> {
        self.freeze(vm, client, &frozen).await?;
        self.end_sessions();
        let VmSize { vcpus, memory_mib } = self.first_size();
        let slots: Vec<u32> = self.plugged.iter().copied().collect();
        let directory = self.copy_directory(&plan.target).await?;
        let file = directory.0.join(MEMORY);
        let written = self.write_memory(vm, file, memory).await;
        written.map_err(|error| match plan.limit {
            Some(limit) if is_over(&error) && memory < self.most_state() => {
                too_large(limit, limit.saturating_add(1))
            }
            _ => room.explain(error),
        })?;
        // The guest may have written more before its VM stood still.
        room.renew(self.size_of_disks(&slots).await?).await?;
        self.copy_disks(&slots, &directory.0).await?;
        check_size(&directory, plan.limit).await?;
        let suspension = Suspension {
            vcpus,
            memory_mib,
            slots,
            still: true,
        };
        Ok(self.copied(directory, suspension, frozen))
    }

    /// Copies the files of a VM that is suspended. It stays so.
    async fn copy_suspended(&self, plan: &CopyPlan) -> Result<Copied, RuntimeError> {
        self.check_clonable(plan.wanted.as_deref())?;
        let still = |it: &Suspension| it.still;
        let suspension = self.record.suspension.clone().filter(still);
        let (Some(suspension), Some(frozen)) = (suspension, self.record.frozen.clone()) else {
            let state = "suspended with processes that did not stand still: resume it first";
            return Err(RuntimeError::State {
                action: ACTION,
                kind: "sandbox",
                id: self.record.id.to_string(),
                state: state.to_owned(),
            });
        };
        let file = self.shared.suspended_file(&self.record.id);
        let look = file.clone();
        let action = format!("look at {}", look.display());
        let memory = blocking(action, move || Ok(look.metadata()?.len())).await?;
        let (limit, slots) = (plan.limit, &suspension.slots);
        let _room = self.room_for_copy(limit, memory..=memory, slots).await?;
        let directory = self.copy_directory(&plan.target).await?;
        let (from, to) = (file, directory.0.join(MEMORY));
        let action = format!("copy {}", from.display());
        blocking(action, move || copy_sparse(&from, &to).map(drop)).await?;
        self.copy_disks(&suspension.slots, &directory.0).await?;
        check_size(&directory, plan.limit).await?;
        Ok(self.copied(directory, suspension, frozen))
    }

    /// Room for a memory of so many bytes, and for the disks that the guest writes. What may not be kept, or would
    /// not fit, is refused before anything stands still for it.
    async fn room_for_copy(
        &self,
        limit: Option<u64>,
        memory: RangeInclusive<u64>,
        slots: &[u32],
    ) -> Result<CopyRoom, RuntimeError> {
        let disks = self.size_of_disks(slots).await?;
        let most = disks.saturating_add(*memory.end());
        let mut need = Need {
            what: "the copy",
            least: disks.saturating_add(*memory.start()),
            most,
        };
        if let Some(limit) = limit {
            if need.least > limit {
                return Err(too_large(limit, need.least));
            }
            // Who said how much it may be is told at once, and not after its source has stood still for it.
            need.most = most.min(limit);
            need.least = need.most;
        }
        let room = self.promised(ACTION, need).await?;
        let memory = room.bytes() - disks;
        Ok(CopyRoom { room, memory })
    }

    /// Bytes that the disks take which the guest writes. A copy has their holes, too, and takes no more.
    async fn size_of_disks(&self, slots: &[u32]) -> Result<u64, RuntimeError> {
        let (scratch, id) = (&self.shared.scratch, &self.record.id);
        let mut bytes = 0;
        for volume in self.written_disks(slots) {
            bytes += scratch.allocated(id, volume).await?;
        }
        Ok(bytes)
    }

    async fn copy_directory(&self, target: &str) -> Result<CopyDirectory, RuntimeError> {
        let directory = self.shared.copies(&self.record.id).join(target);
        remove_directory(directory.clone()).await?;
        Ok(CopyDirectory(directory))
    }

    fn copied(
        &self,
        directory: CopyDirectory,
        suspension: Suspension,
        frozen: Vec<ContainerId>,
    ) -> Copied {
        let records = self.members.values().map(|member| member.record.clone());
        Copied {
            directory,
            state: CopiedState {
                suspension,
                size: self.record.size,
                lease: self.record.lease.clone(),
                disks: self.record.disks.clone(),
                containers: records.collect(),
                frozen,
            },
        }
    }

    /// Copies the disks that the guest writes. The VM stands still.
    async fn copy_disks(&self, slots: &[u32], to: &std::path::Path) -> Result<(), RuntimeError> {
        for volume in self.written_disks(slots) {
            let scratch = &self.shared.scratch;
            scratch.copy(&self.record.id, volume, to).await?;
        }
        Ok(())
    }

    /// The disks in these slots that the guest writes: the pod's own, or that of the volume in a slot. Nobody writes
    /// layers.
    fn written_disks(&self, slots: &[u32]) -> Vec<Option<u32>> {
        let has = |slot| self.record.disks.iter().any(|disk| disk.slot == slot);
        let written = slots.iter().filter_map(|&slot| match slot {
            SCRATCH_SLOT => Some(None),
            _ => has(slot).then_some(Some(slot)),
        });
        written.collect()
    }

    /// The VM goes on. Its containers stand still until they are thawed.
    async fn go_on_after_copy(&mut self, vm: Arc<dyn Vm>) {
        // Whoever talked to the guest still talks to one that has been told to stand still.
        self.end_sessions();
        if let Err(error) = super::let_go_on(vm.as_ref()).await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(error, "a VM that was copied does not go on");
            // Its end is told as any VM's.
            if let Err(error) = vm.kill().await {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::error!(error, "cannot kill a VM");
            }
        }
        self.take_up(vm).await;
        self.publish();
    }

    /// Whether a container stands still only because its VM was copied.
    pub(super) fn is_frozen(&self, id: &ContainerId) -> bool {
        let frozen = self.record.frozen.as_ref();
        frozen.is_some_and(|frozen| frozen.contains(id))
    }

    /// Has the containers go on that stand still because their VM was copied or suspended. What cannot be done
    /// is tried at the beginning of the guest's next session.
    pub(super) async fn thaw(&mut self) {
        let Some(frozen) = self.record.frozen.clone() else {
            return;
        };
        let thawed = async {
            let action = "let containers go on";
            let vm = self.ready_vm(action)?;
            let client = self.client(action).await?;
            let deadline = self.shared.config.deadlines.call;
            for id in &frozen {
                // Paused meanwhile: it stays so.
                let member = self.members.get(id);
                if member.is_none_or(|member| member.record.paused) {
                    continue;
                }
                let request = v1::PauseRequest {
                    id: id.to_string(),
                    paused: false,
                };
                self.with_vm(action, &vm, async {
                    use tonic::Code::{FailedPrecondition, NotFound};
                    match client.pause(request, deadline).await {
                        // It has ended.
                        Err(error)
                            if matches!(error.code(), Some(FailedPrecondition | NotFound)) =>
                        {
                            Ok(())
                        }
                        Err(error) => Err(crate::guest::error(&self.record.id, action, &error)),
                        Ok(_) => Ok(()),
                    }
                })
                .await?;
            }
            Ok::<_, RuntimeError>(())
        };
        let thawed = thawed.await;
        if let Err(error) = thawed {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(error, "containers that were frozen do not go on yet");
            return;
        }
        self.record.set_frozen(None);
        // What the guest listed before is old.
        self.thawed = Some(Instant::now());
        if let Err(error) = self.save().await {
            // A restarted node has them go on once more, which changes nothing.
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(error, "cannot store that a sandbox's containers go on");
        }
        self.publish_sandbox();
    }
}

/// Refuses a clone that would not be the VM that was copied.
pub(crate) fn check_same(own: &SandboxConfig, wanted: &SandboxConfig) -> Result<(), RuntimeError> {
    check_ports(wanted)?;
    let same = |field: &str, same: bool| match same {
        true => Ok(()),
        false => Err(invalid(
            field,
            "must be as that of the sandbox that is cloned",
        )),
    };
    same(
        "metadata.namespace",
        own.metadata.namespace == wanted.metadata.namespace,
    )?;
    same("vcpus", own.vcpus == wanted.vcpus)?;
    same("memory_mib", own.memory_mib == wanted.memory_mib)?;
    same("extras", own.extras == wanted.extras)?;
    same("scratch_mib", own.scratch_mib == wanted.scratch_mib)?;
    same("kernel", own.kernel == wanted.kernel)?;
    same("network", own.network == wanted.network)?;
    same("sysctls", own.sysctls == wanted.sysctls)?;
    same(
        "user_namespace",
        own.user_namespace == wanted.user_namespace,
    )?;
    same(
        "share_process_namespace",
        own.share_process_namespace == wanted.share_process_namespace,
    )
}

fn check_ports(config: &SandboxConfig) -> Result<(), RuntimeError> {
    if config.host_ports.is_empty() {
        return Ok(());
    }
    let rule = "must be empty: a port of the node leads to one pod";
    Err(invalid("host_ports", rule))
}

/// Has what a copy takes on the disk, if that is not more than it may.
async fn check_size(directory: &CopyDirectory, limit: Option<u64>) -> Result<(), RuntimeError> {
    let Some(limit) = limit else { return Ok(()) };
    let size = usage::of_tree(directory.0.clone()).await?.used_bytes;
    match size <= limit {
        true => Ok(()),
        false => Err(too_large(limit, size)),
    }
}

fn too_large(limit: u64, size: u64) -> RuntimeError {
    let rule = format!("is {limit} bytes, and what is to be kept takes {size} at least");
    invalid("size_limit", rule)
}

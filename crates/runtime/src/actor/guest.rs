//! What the guest and its VM do by themselves.

use std::sync::Arc;

use hypernetes_agent_api::v1;
use hypernetes_types::ContainerId;
use hypernetes_vmm::{Vm, VmExit};
use tokio::time::Instant;

use super::{Actor, Late, Member, boot::failure, release::KILLED};
use crate::{
    container::{Event, Phase},
    error::RuntimeError,
    guest::{exit_code, exit_message, exit_reason},
    identity::SCRATCH_SLOT,
    link::{GuestEvent, Link},
    logs::{file::LogFile, format::now_nanos},
    sandbox,
};

/// A guest that makes containers up is not asked to remove more of them than this at a time.
const MOST_STRANGERS: usize = 64;

/// How many removed containers are remembered, for the sake of what the guest said of them last.
const REMEMBERED: usize = 16;

/// How a container ended.
#[derive(Debug, Clone)]
pub(super) struct Ending {
    pub(super) code: i32,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) finished_unix_nanos: i64,
    /// Its output is complete.
    pub(super) drained: bool,
}

impl Ending {
    /// As the guest tells, but for the time.
    pub(super) fn of_guest(exit: &v1::Exit, finished_unix_nanos: i64, drained: bool) -> Self {
        Self {
            code: exit_code(exit),
            reason: exit_reason(exit).to_owned(),
            message: exit_message(exit),
            finished_unix_nanos,
            drained,
        }
    }
}

impl Actor {
    /// Takes over a VM that survived a restart of this process.
    pub(super) async fn adopted(&mut self, vm: Arc<dyn Vm>) {
        let used = self
            .members
            .values()
            .flat_map(|member| member.record.all_slots());
        let used: Vec<u32> = used.collect();
        self.plugged = match vm.list_disks().await {
            Ok(slots) => slots.into_iter().collect(),
            // Believed to be as recorded; a wrong belief shows as a refused plug.
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(error, "cannot list the disks of an adopted VM");
                let volumes = self.record.disk_slots();
                used.into_iter()
                    .chain(volumes)
                    .chain([SCRATCH_SLOT])
                    .collect()
            }
        };
        self.vm = Some(Arc::clone(&vm));
        self.pinned = None;
        self.pin_or_tell().await;
        self.link = Some(Link::spawn(
            &self.record.id,
            vm,
            None,
            &self.shared.config.deadlines,
        ));
        let pumped: Vec<_> = self
            .members
            .values()
            .filter(|member| {
                let record = &member.record;
                record.phase.is_live() || (record.phase == Phase::Exited && !record.drained)
            })
            .map(|member| member.record.id.clone())
            .collect();
        for id in pumped {
            let log = self.open_log(&id, LogFile::open).await;
            if let Err(error) = &log {
                let error = hypernetes_telemetry::chain(error).to_string();
                tracing::warn!(container = %id, error, "cannot open a container log yet");
            }
            self.start_pump(&id, log.ok());
            if self.members[&id].record.phase == Phase::Exited {
                self.await_drain(&id);
            }
        }
        self.publish();
    }

    pub(super) async fn vm_exited(&mut self, exit: &VmExit) {
        let console = self
            .vm
            .take()
            .map(|vm| vm.console_tail())
            .unwrap_or_default();
        self.link = None;
        self.plugged.clear();
        self.late.abort_all();
        let was = self.record.phase;
        let ran = matches!(
            was,
            sandbox::Phase::Ready | sandbox::Phase::Suspending | sandbox::Phase::Resuming
        );
        if self.advance("run", sandbox::Event::VmExited).is_err() || !ran {
            return;
        }
        let failure = failure(exit, &console);
        tracing::warn!(
            reason = failure.reason,
            message = failure.message,
            "the VM ended by itself"
        );
        let ending = Ending {
            code: KILLED,
            reason: failure.reason.clone(),
            message: failure.message.clone(),
            finished_unix_nanos: now_nanos(),
            drained: true,
        };
        self.record.failure = Some(failure);
        let saved = self.save().await;
        let ended = self.end_all(&ending).await;
        for error in [saved, ended].into_iter().filter_map(Result::err) {
            // A restarted node finds the VM gone and comes to the same end.
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(error, "cannot store the end of a VM");
        }
        self.publish_sandbox();
    }

    /// Ends all containers that live, in one write.
    pub(super) async fn end_all(&mut self, ending: &Ending) -> Result<(), RuntimeError> {
        let mut ended = Vec::new();
        for member in self
            .members
            .values_mut()
            .filter(|member| member.record.phase.is_live())
        {
            if let Ok(phase) = member.record.phase.next(Event::Ended) {
                member.record.phase = phase;
                apply(&mut member.record, ending);
                ended.push(member.record.clone());
            }
        }
        if ended.is_empty() {
            return Ok(());
        }
        // Shown once it is stored, so that a restart shows the same end. If it cannot be, a restart
        // finds another one.
        let stored = self.shared.records.put_containers(&ended).await;
        self.publish();
        for record in &ended {
            self.publish_container(&record.id);
        }
        stored
    }

    pub(super) async fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Changed(state) => self.container_changed(&state).await,
            GuestEvent::Listed(asked, states) => self.listed(asked, states).await,
            GuestEvent::Reset => {
                tracing::error!("the guest has forgotten that it is a pod: its VM is killed");
                if let Some(vm) = self.vm.clone()
                    && let Err(error) = vm.kill().await
                {
                    let error = hypernetes_telemetry::chain(&error).to_string();
                    tracing::error!(error, "cannot kill a VM");
                }
            }
        }
    }

    /// One of our containers by the guest's text, or nothing.
    pub(super) fn known(&mut self, id: &str) -> Option<ContainerId> {
        let id = id.parse::<ContainerId>().ok();
        if id.as_ref().is_some_and(|id| self.removed.contains(id)) {
            return None;
        }
        let id = id.filter(|id| self.members.contains_key(id));
        if id.is_none() {
            self.anomaly("the guest speaks of a container that does not exist");
        }
        id
    }

    /// Takes a container out that the guest has removed. A removal ends what still runs, and the word
    /// of that end may come after the answer.
    pub(super) fn take_member(&mut self, id: &ContainerId) -> Option<Member> {
        let member = self.members.remove(id)?;
        if self.removed.len() == REMEMBERED {
            self.removed.pop_front();
        }
        self.removed.push_back(id.clone());
        Some(member)
    }

    /// Has it back, because its record could not be deleted.
    pub(super) fn put_back(&mut self, id: &ContainerId, member: Member) {
        self.removed.retain(|removed| removed != id);
        self.members.insert(id.clone(), member);
    }

    fn anomaly(&mut self, what: &'static str) {
        self.anomalies = self.anomalies.saturating_add(1);
        // The first one is told, then ever fewer.
        if self.anomalies.is_power_of_two() {
            tracing::warn!(count = self.anomalies, "{what}");
        }
    }

    /// A session has begun: the guest's list against ours.
    async fn listed(&mut self, asked: Instant, states: Vec<v1::ContainerState>) {
        let mut unheard: Vec<_> = self
            .members
            .values()
            .filter(|member| member.record.phase.is_live() && member.live_since < asked)
            .map(|member| member.record.id.clone())
            .collect();
        let ours = |state: &&v1::ContainerState| {
            let id = state.id.parse::<ContainerId>();
            id.is_ok_and(|id| self.members.contains_key(&id))
        };
        let (known, strangers): (Vec<_>, Vec<_>) = states.iter().partition(ours);
        for state in known {
            self.container_changed(state).await;
            if self.thawed.is_none_or(|thawed| thawed < asked) {
                self.listed_paused(state).await;
            }
            unheard.retain(|id| id.as_str() != state.id);
        }
        self.forget_strangers(&strangers).await;
        for id in unheard {
            let exit = v1::Exit {
                code: KILLED,
                message: "the guest has lost the container".into(),
                ..Default::default()
            };
            self.container_ended(&id, Ending::of_guest(&exit, now_nanos(), true))
                .await;
        }
        self.finish_half_done().await;
    }

    /// Has the guest remove what no record names: containers that were removed when nobody could ask it.
    async fn forget_strangers(&mut self, strangers: &[&v1::ContainerState]) {
        for state in strangers.iter().take(MOST_STRANGERS) {
            self.anomaly("the guest has a container that does not exist");
            let Ok(id) = state.id.parse() else { continue };
            if let Err(error) = self.forget_in_guest(&id).await {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(container = %id, error, "the guest does not remove a container yet");
                return;
            }
        }
    }

    /// Undoes creations and finishes removals that a restart, or a lost session, cut short.
    async fn finish_half_done(&mut self) {
        let phase_is = |wanted: Phase| move |member: &&super::Member| member.record.phase == wanted;
        let ids = |wanted| -> Vec<ContainerId> {
            self.members
                .values()
                .filter(phase_is(wanted))
                .map(|member| member.record.id.clone())
                .collect()
        };
        let (creating, removing) = (ids(Phase::Creating), ids(Phase::Removing));
        self.thaw().await;
        for id in creating {
            self.undo_create(&id).await;
        }
        for id in removing {
            if let Err(error) = self.remove_container(&id).await {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(container = %id, error, "cannot finish the removal of a container yet");
            }
        }
        if let Err(error) = self.unplug_unused().await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(error, "cannot unplug an unused disk");
        }
    }

    async fn container_changed(&mut self, state: &v1::ContainerState) {
        let Some(id) = self.known(&state.id) else {
            return;
        };
        match state.phase() {
            v1::ContainerPhase::Running => self.container_runs(&id).await,
            v1::ContainerPhase::Exited => {
                let exit = state.exit.clone().unwrap_or_default();
                self.await_ending(&id, &exit);
            }
            v1::ContainerPhase::Created | v1::ContainerPhase::Unknown => {}
        }
    }

    pub(super) async fn container_runs(&mut self, id: &ContainerId) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        let was = member.record.phase;
        match was.next(Event::Started) {
            Ok(phase) if phase != was => member.record.phase = phase,
            Ok(_) => return,
            Err(_refused) => {
                // An ended container's late "running" is usual; anything else is a lie.
                if was == Phase::Created {
                    self.anomaly("the guest runs a container that nobody started");
                }
                return;
            }
        }
        member.record.started_unix_nanos = now_nanos();
        let record = member.record.clone();
        self.store_or_tell(&record).await;
        self.publish_container(id);
    }

    /// The end is told once its last output is in the log, or after a while.
    fn await_ending(&mut self, id: &ContainerId, exit: &v1::Exit) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        if member.ending || !member.record.phase.is_live() {
            return;
        }
        member.ending = true;
        let drained = member.pump.as_ref().map(crate::logs::pump::Pump::drained);
        let (id, mut ending) = (id.clone(), Ending::of_guest(exit, now_nanos(), true));
        let patience = self.shared.config.deadlines.drain;
        self.late.spawn(async move {
            if let Some(mut drained) = drained {
                let wait = drained.wait_for(|drained| *drained);
                ending.drained = tokio::time::timeout(patience, wait).await.is_ok();
            }
            Late::Ended(id, ending)
        });
    }

    pub(super) async fn container_ended(&mut self, id: &ContainerId, ending: Ending) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        let was = member.record.phase;
        let Ok(phase) = was.next(Event::Ended) else {
            return;
        };
        if was == phase {
            return;
        }
        member.record.phase = phase;
        apply(&mut member.record, &ending);
        let record = member.record.clone();
        if !ending.drained {
            self.await_drain(id);
        }
        self.store_or_tell(&record).await;
        self.publish_container(id);
        self.pin_or_tell().await;
    }

    /// Notes when an ended container's output is complete, however long that takes.
    fn await_drain(&mut self, id: &ContainerId) {
        let Some(pump) = self.members.get(id).and_then(|member| member.pump.as_ref()) else {
            return;
        };
        let (mut drained, id) = (pump.drained(), id.clone());
        self.late.spawn(async move {
            // The pump's end is the end of the output too.
            drop(drained.wait_for(|drained| *drained).await);
            Late::Drained(id)
        });
    }

    pub(super) async fn container_drained(&mut self, id: &ContainerId) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        member.record.drained = true;
        let record = member.record.clone();
        self.store_or_tell(&record).await;
    }

    /// Stores what the guest did by itself. Refusing to see it would help nobody.
    async fn store_or_tell(&self, record: &crate::records::ContainerRecord) {
        if let Err(error) = self.shared.records.put_container(record).await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(container = %record.id, error, "cannot store a container's new state");
        }
    }
}

fn apply(record: &mut crate::records::ContainerRecord, ending: &Ending) {
    record.exit_code = ending.code;
    record.reason.clone_from(&ending.reason);
    record.message.clone_from(&ending.message);
    record.finished_unix_nanos = ending.finished_unix_nanos;
    record.drained = ending.drained;
}

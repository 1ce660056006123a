//! Containers that stand still.
//!
//! The guest knows best: the record comes after its answer, and what a restart cut off in between is
//! put right by the list that begins a session. What a guest tells unasked changes nothing, so that
//! one that changes its mind a hundred times a second costs the node no writes.

use hypernetes_agent_api::{FEATURE_PAUSE, v1};
use hypernetes_types::ContainerId;

use super::{Actor, containers::unknown_to_guest, not_found};
use crate::{container::Phase, error::RuntimeError};

impl Actor {
    /// Has a running container stand still, or go on.
    pub(super) async fn set_paused(
        &mut self,
        id: &ContainerId,
        paused: bool,
    ) -> Result<(), RuntimeError> {
        let action = match paused {
            true => "pause a container",
            false => "unpause a container",
        };
        let member = self
            .members
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        let phase = member.record.phase;
        if phase != Phase::Running {
            return Err(self.refused_container(action, id, phase));
        }
        let vm = self.ready_vm(action)?;
        let client = self.client(action).await?;
        if !client.has(FEATURE_PAUSE) {
            return Err(unknown_to_guest("paused"));
        }
        let request = v1::PauseRequest {
            id: id.to_string(),
            paused,
        };
        let deadline = self.shared.config.deadlines.call;
        let sandbox = self.record.id.clone();
        self.with_vm(action, &vm, async {
            let answered = client.pause(request, deadline).await;
            answered
                .map(drop)
                .map_err(|error| crate::guest::error(&sandbox, action, &error))
        })
        .await?;
        self.note_paused(id, paused).await
    }

    /// What the list says that begins a session.
    pub(super) async fn listed_paused(&mut self, state: &v1::ContainerState) {
        let Some(id) = self.known(&state.id) else {
            return;
        };
        if self.is_frozen(&id) {
            return;
        }
        if let Err(error) = self.note_paused(&id, state.paused).await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::error!(container = %id, error, "cannot store that a container is paused");
        }
    }

    async fn note_paused(&mut self, id: &ContainerId, paused: bool) -> Result<(), RuntimeError> {
        let Some(member) = self.members.get_mut(id) else {
            return Ok(());
        };
        if member.record.phase != Phase::Running || member.record.paused == paused {
            return Ok(());
        }
        member.record.paused = paused;
        let record = member.record.clone();
        self.publish_container(id);
        self.shared.records.put_container(&record).await
    }
}

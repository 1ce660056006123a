//! What happens to sandboxes and containers, as a stream (`GetContainerEvents`).
//!
//! The runtime only says that something has changed. A subscriber has a picture of what it was told
//! last, and gets what leads from there to what is: created, started, stopped, deleted, each once and in
//! this order, however fast it went. So a reader that is slow misses nothing of what it knows about:
//! what the runtime said meanwhile is lost, the picture is not, and the next look at everything goes
//! on from it. Only a container that came and went in between was never there for it. What is held
//! for a subscriber is its picture and [`QUEUE`] events.
//!
//! As with other runtimes a sandbox has events too, under its own id.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use hypernetes_runtime::{
    ContainerState, ContainerStatus, RuntimeEvent, SandboxState, SandboxStatus,
};
use hypernetes_types::{ContainerId, SandboxId};
use tokio::sync::{OwnedSemaphorePermit, broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, codegen::BoxStream};

use crate::{
    container, sandbox,
    service::{Service, now_nanos},
    v1::{self, ContainerEventType as Kind},
};

/// Readers at a time.
pub(crate) const SUBSCRIBERS: usize = 16;
/// Events that wait for one reader.
const QUEUE: usize = 64;

/// How far somebody was told that a thing has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Created,
    Started,
    Stopped,
}

/// What leads from one stage to a later one; `skipped` = it never started.
fn steps(from: Option<Stage>, to: Stage, skipped: bool) -> Vec<Kind> {
    let all = [
        (Stage::Created, Kind::ContainerCreatedEvent),
        (Stage::Started, Kind::ContainerStartedEvent),
        (Stage::Stopped, Kind::ContainerStoppedEvent),
    ];
    all.into_iter()
        .filter(|(stage, _)| from.is_none_or(|from| *stage > from) && *stage <= to)
        .filter(|(stage, _)| !(skipped && *stage == Stage::Started))
        .map(|(_, kind)| kind)
        .collect()
}

/// What one subscriber was told.
#[derive(Debug, Default)]
struct Picture {
    /// With the status that was told last, for the end of it has none.
    sandboxes: BTreeMap<SandboxId, (Stage, SandboxStatus)>,
    containers: BTreeMap<ContainerId, (Stage, SandboxId)>,
}

/// Something to tell: of whom, what, and as part of which sandbox.
type Told = (String, Kind, SandboxStatus);

impl Picture {
    /// A sandbox as it is, or is no more. One that never was ready is not told of: for the kubelet
    /// it failed to come.
    fn sandbox(&mut self, id: &SandboxId, now: Option<SandboxStatus>) -> Vec<Told> {
        let known = self.sandboxes.get(id).map(|(stage, _)| *stage);
        let told = |kinds: Vec<Kind>, status: &SandboxStatus| -> Vec<Told> {
            let one = |kind| (id.to_string(), kind, status.clone());
            kinds.into_iter().map(one).collect()
        };
        let stage = match now.as_ref().map(|status| status.state) {
            Some(SandboxState::Starting) => return Vec::new(),
            Some(SandboxState::Ready) => Some(Stage::Started),
            Some(SandboxState::NotReady | SandboxState::Removing) => Some(Stage::Stopped),
            None => None,
        };
        match (known, stage, now) {
            (_, Some(Stage::Started), Some(status)) => {
                let events = told(steps(known, Stage::Started, false), &status);
                let stage = known.unwrap_or(Stage::Started);
                self.sandboxes.insert(id.clone(), (stage, status));
                events
            }
            (Some(_), Some(_), Some(status)) => {
                let events = told(steps(known, Stage::Stopped, false), &status);
                self.sandboxes.insert(id.clone(), (Stage::Stopped, status));
                events
            }
            (Some(_), _, None) => {
                let own: Vec<ContainerId> = self
                    .containers
                    .iter()
                    .filter(|(_, (_, sandbox))| sandbox == id)
                    .map(|(id, _)| id.clone())
                    .collect();
                let ends = own.iter().flat_map(|own| self.container(own, id, None));
                let mut events: Vec<Told> = ends.collect();
                let Some((stage, mut last)) = self.sandboxes.remove(id) else {
                    return events;
                };
                last.state = SandboxState::NotReady;
                let mut kinds = steps(Some(stage), Stage::Stopped, false);
                kinds.push(Kind::ContainerDeletedEvent);
                events.extend(told(kinds, &last));
                events
            }
            (None, _, _) | (Some(_), None, Some(_)) => Vec::new(),
        }
    }

    /// A container as it is, or is no more.
    fn container(
        &mut self,
        id: &ContainerId,
        sandbox: &SandboxId,
        now: Option<&ContainerStatus>,
    ) -> Vec<Told> {
        let Some((_, of)) = self.sandboxes.get(sandbox).cloned() else {
            // With its sandbox its end has been told, or the sandbox's beginning has not.
            self.containers.remove(id);
            return Vec::new();
        };
        let known = self.containers.get(id).map(|(stage, _)| *stage);
        let never = now.is_some_and(|status| status.started_unix_nanos == 0);
        let stage = match (now.map(|status| status.state), known) {
            (Some(ContainerState::Created), _) => Some(Stage::Created),
            (Some(ContainerState::Running), _) => Some(Stage::Started),
            (Some(ContainerState::Exited), _) => Some(Stage::Stopped),
            // Its guest does not answer: nothing has happened that can be told.
            (Some(ContainerState::Unknown), known) => known.or(Some(Stage::Started)),
            (None, _) => None,
        };
        let kinds = match stage {
            Some(stage) => {
                let told = known.max(Some(stage)).unwrap_or(stage);
                self.containers.insert(id.clone(), (told, sandbox.clone()));
                steps(known, stage, never)
            }
            None => match self.containers.remove(id) {
                Some((stage, _)) => {
                    let mut kinds = steps(Some(stage), Stage::Stopped, stage == Stage::Created);
                    kinds.push(Kind::ContainerDeletedEvent);
                    kinds
                }
                None => Vec::new(),
            },
        };
        let one = |kind| (id.to_string(), kind, of.clone());
        kinds.into_iter().map(one).collect()
    }

    /// Everything as it is.
    fn all(&mut self, sandboxes: Vec<SandboxStatus>, containers: &[ContainerStatus]) -> Vec<Told> {
        let mut told = Vec::new();
        let there: BTreeSet<SandboxId> = sandboxes.iter().map(|one| one.id.clone()).collect();
        for status in sandboxes {
            let id = status.id.clone();
            told.extend(self.sandbox(&id, Some(status)));
        }
        let known: BTreeMap<ContainerId, SandboxId> = self
            .containers
            .iter()
            .map(|(id, (_, sandbox))| (id.clone(), sandbox.clone()))
            .collect();
        for status in containers {
            told.extend(self.container(&status.id, &status.sandbox, Some(status)));
        }
        for (id, sandbox) in known {
            if !containers.iter().any(|status| status.id == id) {
                told.extend(self.container(&id, &sandbox, None));
            }
        }
        let gone: Vec<SandboxId> = self
            .sandboxes
            .keys()
            .filter(|id| !there.contains(id))
            .cloned()
            .collect();
        for id in gone {
            told.extend(self.sandbox(&id, None));
        }
        told
    }
}

type Sender = mpsc::Sender<Result<v1::ContainerEventResponse, Status>>;

/// Events from now on, until the reader goes or the server stops.
pub(crate) fn stream(
    service: &Service,
) -> Result<Response<BoxStream<v1::ContainerEventResponse>>, Status> {
    let permit = service.subscribers.clone().try_acquire_owned();
    let permit = permit.map_err(|_none| {
        Status::resource_exhausted(format!("{SUBSCRIBERS} readers of events are there already"))
    })?;
    let (tx, rx) = mpsc::channel(QUEUE);
    let (service, closing) = (service.clone(), service.closing.clone());
    let tasks = service.tasks.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = closing.cancelled() => {}
            () = tx.closed() => {}
            () = tell(&service, &tx, permit) => {}
        }
    });
    Ok(Response::new(ReceiverStream::new(rx).boxed()))
}

async fn tell(service: &Service, tx: &Sender, _permit: OwnedSemaphorePermit) {
    // Before the first look, or what happens in between would be nobody's.
    let mut changes = service.runtime.events();
    let mut picture = Picture::default();
    drop(look(service, &mut picture).await);
    loop {
        let told = match changes.recv().await {
            Ok(RuntimeEvent::Sandbox(id)) => {
                picture.sandbox(&id, service.runtime.sandbox(&id).await)
            }
            Ok(RuntimeEvent::Container(sandbox, id)) => {
                let status = service.runtime.container(&id).await;
                picture.container(&id, &sandbox, status.as_ref())
            }
            Err(RecvError::Lagged(missed)) => {
                tracing::debug!(missed, "a reader of events is slow: looking at everything");
                look(service, &mut picture).await
            }
            Err(RecvError::Closed) => return,
        };
        for (id, kind, sandbox) in told {
            if tx
                .send(Ok(event(service, id, kind, &sandbox).await))
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

async fn look(service: &Service, picture: &mut Picture) -> Vec<Told> {
    let sandboxes = service.runtime.list_sandboxes().await;
    let containers = service.runtime.list_containers(None).await;
    picture.all(sandboxes, &containers)
}

async fn event(
    service: &Service,
    id: String,
    kind: Kind,
    of: &SandboxStatus,
) -> v1::ContainerEventResponse {
    v1::ContainerEventResponse {
        container_id: id,
        container_event_type: kind.into(),
        created_at: now_nanos(),
        pod_sandbox_status: Some(sandbox::full(of)),
        containers_statuses: containers(service, &of.id).await,
    }
}

/// The statuses of a sandbox's containers, oldest first, with their last words in place.
pub(crate) async fn containers(service: &Service, of: &SandboxId) -> Vec<v1::ContainerStatus> {
    let mut found = service.runtime.list_containers(Some(of)).await;
    found.sort_by_key(|status| status.created_unix_nanos);
    for status in &mut found {
        service.tell_end(status).await;
    }
    found.iter().map(container::full).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_told_once_and_in_order() {
        use Kind::{ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent};
        for (from, to, skipped, told) in [
            (None, Stage::Created, false, &[ContainerCreatedEvent][..]),
            (
                None,
                Stage::Stopped,
                false,
                &[
                    ContainerCreatedEvent,
                    ContainerStartedEvent,
                    ContainerStoppedEvent,
                ],
            ),
            (
                None,
                Stage::Stopped,
                true,
                &[ContainerCreatedEvent, ContainerStoppedEvent],
            ),
            (
                Some(Stage::Created),
                Stage::Started,
                false,
                &[ContainerStartedEvent],
            ),
            (Some(Stage::Started), Stage::Started, false, &[]),
            (Some(Stage::Stopped), Stage::Started, false, &[]),
        ] {
            assert_eq!(steps(from, to, skipped), told, "{from:?} {to:?}");
        }
    }
}

//! The connection to one guest's agent, kept up for as long as its VM runs.
//!
//! One task connects, subscribes to events, lists, and then passes on what comes; when the session
//! breaks it starts again. A guest that breaks sessions on purpose is met with growing pauses, one
//! that floods events with a rate limit: the node reads no faster, and the guest's own window fills.
//! One that is silent is asked now and then; without an answer its session is over.

use std::{sync::Arc, time::Duration};

use hypernetes_agent_api::{AgentClient, AgentError, ConnectOptions, v1};
use hypernetes_types::SandboxId;
use hypernetes_vmm::Vm;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::{backoff::Backoff, beat::beat, config::Deadlines};

/// Events that may wait for the sandbox's task.
const QUEUE: usize = 32;
/// Events per second that a guest may cause on and on, and how many at once.
const EVENT_RATE: u32 = 100;
const EVENT_BURST: u32 = 1000;

/// Whether the agent can be called.
#[derive(Debug, Clone)]
pub(crate) struct LinkState {
    pub(crate) client: Option<AgentClient>,
    /// Since when it is like that.
    pub(crate) since: Instant,
}

impl LinkState {
    fn new(client: Option<AgentClient>) -> Self {
        Self {
            client,
            since: Instant::now(),
        }
    }
}

/// What the guest tells.
#[derive(Debug)]
pub(crate) enum GuestEvent {
    /// A session has begun; all containers as the guest had them at some moment after the instant.
    Listed(Instant, Vec<v1::ContainerState>),
    /// One container changed.
    Changed(v1::ContainerState),
    /// The guest has forgotten that it is a pod: it was reset.
    Reset,
}

/// A kept-up connection; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) state: watch::Receiver<LinkState>,
    pub(crate) events: mpsc::Receiver<GuestEvent>,
    _task: AbortOnDropHandle<()>,
}

impl Link {
    /// Keeps up the connection to the agent of `vm`, starting with `first` if there is one already.
    pub(crate) fn spawn(
        sandbox: &SandboxId,
        vm: Arc<dyn Vm>,
        first: Option<AgentClient>,
        deadlines: &Deadlines,
    ) -> Self {
        let (state_tx, state) = watch::channel(LinkState::new(first.clone()));
        let (events_tx, events) = mpsc::channel(QUEUE);
        let keeper = Keeper {
            vm,
            state: state_tx,
            events: events_tx,
            call: deadlines.call,
            beat: deadlines.beat,
            limiter: Limiter::new(),
        };
        let span = tracing::info_span!(parent: None, "link", sandbox = %sandbox);
        let task = AbortOnDropHandle::new(tokio::spawn(keeper.run(first).instrument(span)));
        Self {
            state,
            events,
            _task: task,
        }
    }
}

/// Opens the channel of a VM and starts a session on it.
pub(crate) async fn connect(vm: &dyn Vm, deadline: Duration) -> Result<AgentClient, ConnectError> {
    let attempt = async {
        let channel = vm.open_channel().await.map_err(ConnectError::Channel)?;
        let build = env!("CARGO_PKG_VERSION").to_owned();
        AgentClient::connect(channel, ConnectOptions { build, deadline })
            .await
            .map_err(ConnectError::Agent)
    };
    timeout(deadline, attempt)
        .await
        .unwrap_or(Err(ConnectError::Late(deadline)))
}

/// The first session with an agent, as soon as there can be one: its guest may still be booting.
/// Has no deadline of its own; `waited` is for one attempt.
pub(crate) async fn connect_when_up(vm: &dyn Vm, waited: Duration) -> AgentClient {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
    loop {
        // The preamble repeats itself until the agent is there: one attempt is usually enough,
        // however long the boot takes.
        match connect(vm, waited).await {
            Ok(client) => return client,
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::debug!(error, "no session with the agent yet");
            }
        }
        backoff.wait().await;
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("cannot open the agent's channel")]
    Channel(#[source] hypernetes_vmm::VmmError),
    #[error("cannot talk to the agent")]
    Agent(#[source] AgentError),
    #[error("no session within {0:?}")]
    Late(Duration),
}

struct Keeper {
    vm: Arc<dyn Vm>,
    state: watch::Sender<LinkState>,
    events: mpsc::Sender<GuestEvent>,
    call: Duration,
    beat: Duration,
    limiter: Limiter,
}

impl Keeper {
    async fn run(mut self, mut first: Option<AgentClient>) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let client = match first.take() {
                Some(client) => Ok(client),
                None => connect(self.vm.as_ref(), self.call).await,
            };
            match client {
                Ok(client) => {
                    let begun = Instant::now();
                    let end = self.session(client).await;
                    self.state.send_if_modified(|state| {
                        let lost = state.client.is_some();
                        if lost {
                            *state = LinkState::new(None);
                        }
                        lost
                    });
                    match end {
                        SessionEnd::Abandoned => return,
                        SessionEnd::Broken(reason) => {
                            tracing::debug!(reason, "the session with the agent ended");
                        }
                    }
                    if begun.elapsed() > Duration::from_secs(10) {
                        backoff.reset();
                    }
                }
                Err(error) => {
                    tracing::debug!(error = %hypernetes_telemetry::chain(&error), "no session with the agent");
                }
            }
            if self.vm.exit().is_some() {
                return;
            }
            backoff.wait().await;
        }
    }

    async fn session(&mut self, client: AgentClient) -> SessionEnd {
        let broken = |what: &str| SessionEnd::Broken(what.to_owned());
        let mut raw = client.client();
        let subscription = timeout(self.call, raw.events(v1::EventsRequest {})).await;
        let mut events = match subscription {
            Err(_late) => return broken("Events is not answered"),
            Ok(Err(status)) => return broken(&crate::guest::clean(status.message())),
            Ok(Ok(response)) => response.into_inner(),
        };
        let asked = Instant::now();
        let list = match client
            .list_containers(v1::ListContainersRequest {}, self.call)
            .await
        {
            Ok(list) => list.containers,
            Err(error) => {
                return SessionEnd::Broken(hypernetes_telemetry::chain(&error).to_string());
            }
        };
        let first = if client.hello().configured || self.state.borrow().client.is_some() {
            GuestEvent::Listed(asked, list)
        } else {
            GuestEvent::Reset
        };
        // The list first: whoever sees the client finds the containers in their right states.
        if self.events.send(first).await.is_err() {
            return SessionEnd::Abandoned;
        }
        if self.state.borrow().client.is_none() {
            self.state
                .send_replace(LinkState::new(Some(client.clone())));
        }
        let alive = beats(&client, self.beat, self.call);
        tokio::pin!(alive);
        loop {
            let event = tokio::select! {
                event = events.message() => event,
                silence = &mut alive => return SessionEnd::Broken(silence),
            };
            match event {
                Ok(Some(v1::Event {
                    event: Some(v1::event::Event::Container(state)),
                })) => {
                    self.limiter.admit().await;
                    if self.events.send(GuestEvent::Changed(state)).await.is_err() {
                        return SessionEnd::Abandoned;
                    }
                }
                Ok(Some(v1::Event { event: None })) => self.limiter.admit().await,
                Ok(None) => return broken("the guest ended the events"),
                Err(status) => return broken(&crate::guest::clean(status.message())),
            }
        }
    }
}

/// Looks after a guest until it does not answer, and says so.
async fn beats(client: &AgentClient, every: Duration, call: Duration) -> String {
    loop {
        sleep(every).await;
        if let Err(error) = beat(client, call).await {
            return hypernetes_telemetry::chain(&error).to_string();
        }
    }
}

enum SessionEnd {
    /// Nobody wants to know any more.
    Abandoned,
    Broken(String),
}

/// A token bucket.
#[derive(Debug)]
struct Limiter {
    tokens: u32,
    filled: Instant,
}

impl Limiter {
    fn new() -> Self {
        Self {
            tokens: EVENT_BURST,
            filled: Instant::now(),
        }
    }

    async fn admit(&mut self) {
        if self.tokens == 0 {
            let gained = self.filled.elapsed().as_millis() * u128::from(EVENT_RATE) / 1000;
            self.tokens = u32::try_from(gained)
                .unwrap_or(EVENT_BURST)
                .min(EVENT_BURST);
            self.filled = Instant::now();
            if self.tokens == 0 {
                sleep(Duration::from_secs(1) / EVENT_RATE).await;
                self.tokens = 1;
                self.filled = Instant::now();
            }
        }
        self.tokens -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn floods_are_slowed_down() {
        let mut limiter = Limiter::new();
        let begin = Instant::now();
        for _ in 0..EVENT_BURST {
            limiter.admit().await;
        }
        assert_eq!(begin.elapsed(), Duration::ZERO);
        for _ in 0..EVENT_RATE * 2 {
            limiter.admit().await;
        }
        assert!(begin.elapsed() >= Duration::from_millis(1900));
    }
}

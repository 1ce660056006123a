//! A scriptable agent over in-memory streams: what a test of the node's side needs in place of a VM.
//!
//! [`FakeAgent`] keeps containers like HyperStart does, without running anything: a test makes them
//! write ([`FakeAgent::output`]) and end ([`FakeAgent::exit`]). Each call can be made to fail, stall
//! or lie ([`FakeAgent::set_behaviour`]), and [`rogue`] has streams of guests that do not speak the
//! protocol at all. State outlives connections: [`FakeAgent::connect`] may be called again, which
//! ends the former session, as a virtio-serial port does.

pub mod rogue;
mod service;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    io::DuplexStream,
    sync::{broadcast, watch},
    task::AbortHandle,
};

use crate::{sync::guest_sync, v1};

/// The calls of the protocol, as keys for scripts and records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "named as in the protocol")]
pub enum Method {
    Hello,
    ConfigureSandbox,
    Forget,
    Personalize,
    WriteVolume,
    CreateContainer,
    StartContainer,
    UpdateContainer,
    Resize,
    GrowDisk,
    Clock,
    Pause,
    Signal,
    RemoveContainer,
    ListContainers,
    Events,
    Output,
    Stdin,
    Exec,
    ResizeTty,
    Forward,
    Stats,
    Shutdown,
}

/// How a call is answered.
#[derive(Debug, Clone, Default)]
pub enum Behaviour {
    /// As the protocol says.
    #[default]
    Normal,
    /// With this status.
    Fail(tonic::Code, String),
    /// Never.
    Stall,
    /// Normally, but the response is padded beyond the size limit where it has room for that
    /// (`Hello`, `ListContainers`, `Output`); elsewhere the same as `Normal`.
    Oversize,
}

/// What an exec answers: standard output, standard error, exit code.
pub type ExecResult = (Vec<u8>, Vec<u8>, i32);
type ExecHook = Arc<dyn Fn(&v1::ExecStart, &[u8]) -> ExecResult + Send + Sync>;
type SignalHook = Arc<dyn Fn(&FakeAgent, &str, u32) + Send + Sync>;

/// One stream of a fake container: everything ever written.
#[derive(Debug, Default, Clone)]
struct FakeStream {
    data: Vec<u8>,
    acked: u64,
    eof: bool,
}

#[derive(Debug, Clone)]
struct FakeContainer {
    request: v1::CreateContainerRequest,
    state: v1::ContainerState,
    streams: [FakeStream; 2],
    stdin: Vec<u8>,
    stdin_closed: bool,
}

#[derive(Clone)]
struct State {
    hello: v1::HelloResponse,
    sandbox: Option<v1::ConfigureSandboxRequest>,
    volumes: BTreeMap<String, v1::Volume>,
    grown: BTreeMap<u32, u64>,
    containers: BTreeMap<String, FakeContainer>,
    behaviours: HashMap<Method, Behaviour>,
    calls: Vec<Method>,
    exec: ExecHook,
    on_signal: SignalHook,
    session: Option<AbortHandle>,
    /// Nanoseconds that its clock is ahead of ours.
    clock_ahead: i64,
    next_pid: i32,
}

/// See the module.
#[derive(Clone)]
pub struct FakeAgent {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<v1::ContainerState>,
    /// Counts changes of output and state, for those who wait for one.
    changed: watch::Sender<u64>,
}

impl std::fmt::Debug for FakeAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeAgent")
            .field("containers", &self.lock().containers)
            .finish_non_exhaustive()
    }
}

impl Default for FakeAgent {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeAgent {
    /// Another agent that has what this one has now, as in a copy of its VM. Nobody has called it yet.
    pub fn fork(&self) -> Self {
        let state = State {
            calls: Vec::new(),
            session: None,
            ..self.lock().clone()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            events: broadcast::channel(1024).0,
            changed: watch::channel(0).0,
        }
    }

    /// An agent that was just booted. SIGKILL and SIGTERM end its containers, exec echoes stdin.
    pub fn new() -> Self {
        let state = State {
            hello: v1::HelloResponse {
                version: crate::PROTOCOL_VERSION,
                build: "fake".into(),
                kernel_release: "6.12.0-fake".into(),
                configured: false,
                features: crate::FEATURES.iter().map(|&name| name.into()).collect(),
            },
            sandbox: None,
            volumes: BTreeMap::new(),
            grown: BTreeMap::new(),
            containers: BTreeMap::new(),
            behaviours: HashMap::new(),
            calls: Vec::new(),
            exec: Arc::new(|_, stdin| (stdin.to_vec(), Vec::new(), 0)),
            on_signal: Arc::new(|agent, id, signal| {
                if signal == 9 || signal == 15 {
                    agent.exit_with(
                        id,
                        v1::Exit {
                            code: 128 + signal.cast_signed(),
                            signal,
                            ..Default::default()
                        },
                    );
                }
            }),
            session: None,
            clock_ahead: 0,
            next_pid: 100,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            events: broadcast::channel(1024).0,
            changed: watch::channel(0).0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// The node's end of a new stream to this agent; the former session ends. Needs a runtime.
    pub fn connect(&self) -> DuplexStream {
        let (node, guest) = tokio::io::duplex(64 * 1024);
        let agent = self.clone();
        let session = tokio::spawn(async move {
            if let Ok(stream) = guest_sync(guest).await {
                // However it ended, the next `connect` starts afresh.
                drop(crate::server::serve(stream, agent).await);
            }
        });
        if let Some(former) = self.lock().session.replace(session.abort_handle()) {
            former.abort();
        }
        node
    }

    /// Ends the session, as a crash of the VMM would. Containers stay.
    pub fn disconnect(&self) {
        if let Some(session) = self.lock().session.take() {
            session.abort();
        }
    }

    /// Scripts the answers to one call from now on.
    pub fn set_behaviour(&self, method: Method, behaviour: Behaviour) {
        self.lock().behaviours.insert(method, behaviour);
    }

    /// Replaces what `Hello` answers.
    pub fn set_hello(&self, hello: v1::HelloResponse) {
        self.lock().hello = hello;
    }

    /// Scripts exec: from the start message and all of stdin to the result.
    pub fn on_exec(
        &self,
        hook: impl Fn(&v1::ExecStart, &[u8]) -> ExecResult + Send + Sync + 'static,
    ) {
        self.lock().exec = Arc::new(hook);
    }

    /// Scripts signals to running containers; the default ends them on SIGKILL and SIGTERM.
    pub fn on_signal(&self, hook: impl Fn(&Self, &str, u32) + Send + Sync + 'static) {
        self.lock().on_signal = Arc::new(hook);
    }

    /// Makes a container write. Unknown ids are ignored.
    pub fn output(&self, id: &str, stream: v1::Stream, data: &[u8]) {
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.streams[stream as usize]
                .data
                .extend_from_slice(data);
        }
        self.touch();
    }

    /// Ends a container with a code.
    pub fn exit(&self, id: &str, code: i32) {
        self.exit_with(
            id,
            v1::Exit {
                code,
                ..Default::default()
            },
        );
    }

    /// Ends a container. Unknown and ended ones are ignored.
    pub fn exit_with(&self, id: &str, exit: v1::Exit) {
        let state = {
            let mut state = self.lock();
            let Some(container) = state.containers.get_mut(id) else {
                return;
            };
            if container.state.exit.is_some() {
                return;
            }
            container.state.phase = v1::ContainerPhase::Exited.into();
            container.state.exit = Some(v1::Exit {
                finished_unix_nanos: 1_700_000_001_000_000_000,
                ..exit
            });
            container
                .streams
                .iter_mut()
                .for_each(|stream| stream.eof = true);
            container.state.clone()
        };
        self.emit(state);
    }

    /// Sends an event, true or not.
    pub fn emit(&self, state: v1::ContainerState) {
        // Nobody may be listening.
        drop(self.events.send(state));
        self.touch();
    }

    /// Replaces what is listed of a container: a lie.
    pub fn set_state(&self, id: &str, lie: v1::ContainerState) {
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.state = lie;
        }
        self.touch();
    }

    /// The calls that arrived, in order.
    pub fn calls(&self) -> Vec<Method> {
        self.lock().calls.clone()
    }

    /// The requests of the containers that exist, by id.
    pub fn containers(&self) -> BTreeMap<String, v1::CreateContainerRequest> {
        self.lock()
            .containers
            .iter()
            .map(|(id, c)| (id.clone(), c.request.clone()))
            .collect()
    }

    /// State of a container.
    pub fn state(&self, id: &str) -> Option<v1::ContainerState> {
        self.lock()
            .containers
            .get(id)
            .map(|container| container.state.clone())
    }

    /// What a container got on stdin, and whether it was closed.
    pub fn stdin(&self, id: &str) -> Option<(Vec<u8>, bool)> {
        self.lock()
            .containers
            .get(id)
            .map(|c| (c.stdin.clone(), c.stdin_closed))
    }

    /// Bytes of a stream that the node has acknowledged.
    pub fn acked(&self, id: &str, stream: v1::Stream) -> Option<u64> {
        self.lock()
            .containers
            .get(id)
            .map(|c| c.streams[stream as usize].acked)
    }

    /// The sandbox configuration, once it has come.
    pub fn sandbox(&self) -> Option<v1::ConfigureSandboxRequest> {
        self.lock().sandbox.clone()
    }

    /// Disks that it was told to have become larger, by slot, and their sizes.
    pub fn grown(&self) -> BTreeMap<u32, u64> {
        self.lock().grown.clone()
    }

    /// The volumes written so far, by name.
    pub fn volumes(&self) -> BTreeMap<String, v1::Volume> {
        self.lock().volumes.clone()
    }

    /// Puts its clock ahead of ours, or behind.
    pub fn set_clock_ahead(&self, nanos: i64) {
        self.lock().clock_ahead = nanos;
        self.touch();
    }

    /// Nanoseconds that its clock is ahead of ours.
    pub fn clock_ahead(&self) -> i64 {
        self.lock().clock_ahead
    }

    /// Waits until the agent's state satisfies a condition. Without a deadline of its own.
    pub async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !condition(self) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

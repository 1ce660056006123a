//! The generated server trait over [`FakeAgent`]'s state.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Behaviour, FakeAgent, FakeContainer, FakeStream, Method};
use crate::{
    MAX_CHUNK_SIZE, MAX_MESSAGE_SIZE, PROTOCOL_VERSION,
    server::{Agent, Replies, Requests},
    status::{Code, Status},
    v1,
};

type Answer<T> = Result<T, Status>;
const STARTED: i64 = 1_700_000_000_000_000_000;

impl FakeAgent {
    /// Records the call and applies its script. `true`: oversize the answer.
    async fn enter(&self, method: Method) -> Result<bool, Status> {
        let behaviour = {
            let mut state = self.lock();
            state.calls.push(method);
            state.behaviours.get(&method).cloned().unwrap_or_default()
        };
        self.touch();
        match behaviour {
            Behaviour::Normal => Ok(false),
            Behaviour::Oversize => Ok(true),
            Behaviour::Fail(code, message) => Err(Status::new(code_of(code), message)),
            Behaviour::Stall => std::future::pending().await,
        }
    }

    fn missing(id: &str) -> Status {
        Status::new(Code::NotFound, format!("no container {id}"))
    }
}

impl Agent for FakeAgent {
    async fn hello(&self, request: v1::HelloRequest) -> Answer<v1::HelloResponse> {
        let oversize = self.enter(Method::Hello).await?;
        if request.min_version > PROTOCOL_VERSION {
            return Err(Status::failed_precondition("no common protocol version"));
        }
        let state = self.lock();
        let mut hello = state.hello.clone();
        hello.configured |= state.sandbox.is_some();
        if oversize {
            hello.build = "x".repeat(MAX_MESSAGE_SIZE + 1);
        }
        Ok(hello)
    }

    async fn configure_sandbox(
        &self,
        request: v1::ConfigureSandboxRequest,
    ) -> Answer<v1::ConfigureSandboxResponse> {
        self.enter(Method::ConfigureSandbox).await?;
        self.lock().sandbox = Some(request);
        self.touch();
        Ok(Default::default())
    }

    async fn forget(&self, _: v1::ForgetRequest) -> Answer<v1::ForgetResponse> {
        self.enter(Method::Forget).await?;
        {
            let mut state = self.lock();
            let rehearsed = state.sandbox.as_ref().is_some_and(|known| known.rehearsal);
            if !rehearsed || !state.containers.is_empty() {
                return Err(Status::failed_precondition("the sandbox is no rehearsal"));
            }
            state.sandbox = None;
            state.volumes.clear();
        }
        self.touch();
        Ok(Default::default())
    }

    async fn personalize(
        &self,
        request: v1::PersonalizeRequest,
    ) -> Answer<v1::PersonalizeResponse> {
        self.enter(Method::Personalize).await?;
        let mut state = self.lock();
        if state.sandbox.is_none() {
            return Err(Status::failed_precondition("the sandbox is not configured"));
        }
        state.sandbox = request.sandbox;
        for v1::Renamed { from, to } in request.containers {
            if let Some(mut container) = state.containers.remove(&from) {
                container.request.id.clone_from(&to);
                container.state.id.clone_from(&to);
                state.containers.insert(to, container);
            }
        }
        drop(state);
        self.touch();
        Ok(Default::default())
    }

    async fn write_volume(
        &self,
        request: v1::WriteVolumeRequest,
    ) -> Answer<v1::WriteVolumeResponse> {
        self.enter(Method::WriteVolume).await?;
        let volume = request
            .volume
            .ok_or_else(|| Status::invalid_argument("no volume"))?;
        self.lock().volumes.insert(volume.name.clone(), volume);
        self.touch();
        Ok(Default::default())
    }

    async fn create_container(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Answer<v1::CreateContainerResponse> {
        self.enter(Method::CreateContainer).await?;
        let user = request
            .process
            .as_ref()
            .and_then(|process| process.user.clone())
            .unwrap_or_default();
        let created = {
            let mut state = self.lock();
            if state.sandbox.is_none() {
                return Err(Status::failed_precondition("the sandbox is not configured"));
            }
            if state.containers.contains_key(&request.id) {
                return Err(Status::already_exists(format!(
                    "container {} exists",
                    request.id
                )));
            }
            state.next_pid += 1;
            let container = FakeContainer {
                state: v1::ContainerState {
                    id: request.id.clone(),
                    phase: v1::ContainerPhase::Created.into(),
                    pid: state.next_pid,
                    ..Default::default()
                },
                streams: Default::default(),
                stdin: Vec::new(),
                stdin_closed: false,
                request,
            };
            let created = container.state.clone();
            state.containers.insert(created.id.clone(), container);
            created
        };
        self.emit(created);
        Ok(v1::CreateContainerResponse { user: Some(user) })
    }

    async fn start_container(
        &self,
        request: v1::StartContainerRequest,
    ) -> Answer<v1::StartContainerResponse> {
        self.enter(Method::StartContainer).await?;
        let id = request.id;
        let running = {
            let mut state = self.lock();
            let container = state
                .containers
                .get_mut(&id)
                .ok_or_else(|| Self::missing(&id))?;
            if container.state.phase() != v1::ContainerPhase::Created {
                return Err(Status::failed_precondition(format!(
                    "container {id} is not created"
                )));
            }
            container.state.phase = v1::ContainerPhase::Running.into();
            container.state.started_unix_nanos = STARTED;
            container.state.clone()
        };
        self.emit(running);
        Ok(v1::StartContainerResponse {
            started_unix_nanos: STARTED,
        })
    }

    async fn update_container(
        &self,
        request: v1::UpdateContainerRequest,
    ) -> Answer<v1::UpdateContainerResponse> {
        self.enter(Method::UpdateContainer).await?;
        let v1::UpdateContainerRequest { id, resources } = request;
        let mut state = self.lock();
        let container = state
            .containers
            .get_mut(&id)
            .ok_or_else(|| Self::missing(&id))?;
        container.request.resources = resources;
        Ok(Default::default())
    }

    async fn grow_disk(&self, request: v1::GrowDiskRequest) -> Answer<v1::GrowDiskResponse> {
        self.enter(Method::GrowDisk).await?;
        let v1::GrowDiskRequest { slot, bytes } = request;
        self.lock().grown.insert(slot, bytes);
        self.touch();
        Ok(Default::default())
    }

    async fn resize(&self, request: v1::ResizeRequest) -> Answer<v1::ResizeResponse> {
        self.enter(Method::Resize).await?;
        let vcpus = request.vcpus;
        Ok(v1::ResizeResponse {
            vcpus,
            memory_total: 0,
        })
    }

    async fn clock(&self, request: v1::ClockRequest) -> Answer<v1::ClockResponse> {
        self.enter(Method::Clock).await?;
        let mut state = self.lock();
        let change = request.adjust_nanos;
        state.clock_ahead = state.clock_ahead.saturating_add(change);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_nanos();
        let unix_nanos = i64::try_from(now)
            .unwrap_or(i64::MAX)
            .saturating_add(state.clock_ahead);
        Ok(v1::ClockResponse { unix_nanos })
    }

    async fn pause(&self, request: v1::PauseRequest) -> Answer<v1::PauseResponse> {
        self.enter(Method::Pause).await?;
        let v1::PauseRequest { id, paused } = request;
        let changed = {
            let mut state = self.lock();
            let container = state
                .containers
                .get_mut(&id)
                .ok_or_else(|| Self::missing(&id))?;
            if container.state.phase() != v1::ContainerPhase::Running {
                let message = format!("container {id} is not running");
                return Err(Status::failed_precondition(message));
            }
            container.state.paused = paused;
            container.state.clone()
        };
        self.emit(changed);
        Ok(Default::default())
    }

    async fn signal(&self, request: v1::SignalRequest) -> Answer<v1::SignalResponse> {
        self.enter(Method::Signal).await?;
        let v1::SignalRequest { id, signal, .. } = request;
        let hook = {
            let state = self.lock();
            let container = state
                .containers
                .get(&id)
                .ok_or_else(|| Self::missing(&id))?;
            container
                .state
                .exit
                .is_none()
                .then(|| state.on_signal.clone())
        };
        if let Some(hook) = hook {
            hook(self, &id, signal);
        }
        Ok(Default::default())
    }

    async fn remove_container(
        &self,
        request: v1::RemoveContainerRequest,
    ) -> Answer<v1::RemoveContainerResponse> {
        self.enter(Method::RemoveContainer).await?;
        let removed = self.lock().containers.remove(&request.id);
        self.touch();
        let released_slots = removed
            .map(|container| container.request.layer_slots)
            .unwrap_or_default();
        Ok(v1::RemoveContainerResponse { released_slots })
    }

    async fn list_containers(
        &self,
        _: v1::ListContainersRequest,
    ) -> Answer<v1::ListContainersResponse> {
        let oversize = self.enter(Method::ListContainers).await?;
        let mut containers: Vec<_> = self
            .lock()
            .containers
            .values()
            .map(|c| c.state.clone())
            .collect();
        if oversize {
            containers.push(v1::ContainerState {
                id: "x".repeat(MAX_MESSAGE_SIZE),
                ..Default::default()
            });
        }
        Ok(v1::ListContainersResponse { containers })
    }

    async fn events(
        &self,
        _: v1::EventsRequest,
        replies: Replies<v1::Event>,
    ) -> Result<(), Status> {
        self.enter(Method::Events).await?;
        replies.follow(self.events.subscribe()).await
    }

    async fn output(
        &self,
        mut acks: Requests<v1::OutputAck>,
        replies: Replies<v1::OutputChunk>,
    ) -> Result<(), Status> {
        let oversize = self.enter(Method::Output).await?;
        let first = acks.expect().await?;
        let id = first.id.clone();
        if !self.lock().containers.contains_key(&id) {
            return Err(Self::missing(&id));
        }
        replies.accept();
        let mut changed = self.changed.subscribe();
        let mut at = [first.stdout, first.stderr];
        let mut done = [false; 2];
        loop {
            let Some(mut streams) = self.lock().containers.get(&id).map(|c| c.streams.clone())
            else {
                return Ok(());
            };
            for (index, FakeStream { data, eof, acked }) in streams.iter_mut().enumerate() {
                // What was acknowledged is gone.
                at[index] = at[index].max(*acked);
                let start = usize::try_from(at[index])
                    .unwrap_or(usize::MAX)
                    .min(data.len());
                for piece in data[start..].chunks(MAX_CHUNK_SIZE) {
                    let piece = if oversize {
                        vec![0; MAX_MESSAGE_SIZE + 1]
                    } else {
                        piece.to_vec()
                    };
                    let offset = at[index];
                    at[index] += piece.len() as u64;
                    let chunk = v1::OutputChunk {
                        stream: i32::try_from(index).unwrap_or_default(),
                        offset,
                        data: piece,
                        eof: false,
                    };
                    replies.send(&chunk).await?;
                }
                if *eof && !done[index] {
                    done[index] = true;
                    let stream = i32::try_from(index).unwrap_or_default();
                    let chunk = v1::OutputChunk {
                        stream,
                        offset: at[index],
                        data: Vec::new(),
                        eof: true,
                    };
                    replies.send(&chunk).await?;
                }
            }
            if done == [true; 2] {
                return Ok(());
            }
            tokio::select! {
                change = changed.changed() => if change.is_err() { return Ok(()) },
                ack = acks.message() => {
                    // The node may stop acknowledging and go on reading.
                    let Ok(Some(ack)) = ack else {
                        if changed.changed().await.is_err() { return Ok(()) }
                        continue;
                    };
                    if let Some(container) = self.lock().containers.get_mut(&id) {
                        container.streams[0].acked = container.streams[0].acked.max(ack.stdout);
                        container.streams[1].acked = container.streams[1].acked.max(ack.stderr);
                    }
                    self.touch();
                }
            }
        }
    }

    async fn stdin(&self, mut chunks: Requests<v1::StdinChunk>) -> Answer<v1::StdinResponse> {
        self.enter(Method::Stdin).await?;
        let mut id = String::new();
        while let Some(chunk) = chunks.message().await? {
            if id.is_empty() {
                id = chunk.id;
            }
            {
                let mut state = self.lock();
                let container = state
                    .containers
                    .get_mut(&id)
                    .ok_or_else(|| Self::missing(&id))?;
                container.stdin.extend(chunk.data);
                container.stdin_closed |= chunk.close;
            }
            self.touch();
        }
        Ok(Default::default())
    }

    async fn exec(
        &self,
        mut inputs: Requests<v1::ExecInput>,
        replies: Replies<v1::ExecOutput>,
    ) -> Result<(), Status> {
        use v1::{exec_input::Input, exec_output::Output};
        self.enter(Method::Exec).await?;
        let Some(Input::Start(start)) = inputs.message().await?.and_then(|input| input.input)
        else {
            return Err(Status::invalid_argument("the first message is not start"));
        };
        let hook = {
            let state = self.lock();
            let id = &start.container_id;
            let container = state.containers.get(id).ok_or_else(|| Self::missing(id))?;
            if container.state.phase() != v1::ContainerPhase::Running {
                return Err(Status::failed_precondition(format!(
                    "container {id} is not running"
                )));
            }
            if container.state.paused && !start.guest {
                return Err(Status::failed_precondition(format!(
                    "container {id} is paused"
                )));
            }
            state.exec.clone()
        };
        let output = async |output| {
            let output = Some(output);
            replies.send(&v1::ExecOutput { output }).await
        };
        output(Output::Started(true)).await?;
        let mut stdin = Vec::new();
        let mut wants_stdin = start.stdin;
        while wants_stdin {
            match inputs
                .message()
                .await
                .map(|message| message.and_then(|input| input.input))
            {
                Ok(Some(Input::Stdin(data))) => stdin.extend(data),
                Ok(Some(Input::Start(_) | Input::Resize(_) | Input::Signal(_))) => {}
                Ok(Some(Input::CloseStdin(_)) | None) => wants_stdin = false,
                Err(error) => return Err(error),
            }
        }
        let (stdout, stderr, code) = hook(&start, &stdin);
        for piece in stdout.chunks(MAX_CHUNK_SIZE) {
            output(Output::Stdout(piece.to_vec())).await?;
        }
        for piece in stderr.chunks(MAX_CHUNK_SIZE) {
            output(Output::Stderr(piece.to_vec())).await?;
        }
        output(Output::Exit(v1::Exit {
            code,
            ..Default::default()
        }))
        .await
    }

    async fn resize_tty(&self, request: v1::ResizeTtyRequest) -> Answer<v1::ResizeTtyResponse> {
        self.enter(Method::ResizeTty).await?;
        let id = request.id;
        match self.lock().containers.contains_key(&id) {
            true => Ok(Default::default()),
            false => Err(Self::missing(&id)),
        }
    }

    async fn forward(
        &self,
        mut inputs: Requests<v1::ForwardChunk>,
        replies: Replies<v1::ForwardChunk>,
    ) -> Result<(), Status> {
        self.enter(Method::Forward).await?;
        replies.accept();
        // An echo server on every port.
        while let Some(v1::ForwardChunk { data, eof, .. }) = inputs.message().await? {
            let chunk = v1::ForwardChunk { port: 0, data, eof };
            replies.send(&chunk).await?;
        }
        let end = v1::ForwardChunk {
            eof: true,
            ..Default::default()
        };
        replies.send(&end).await
    }

    async fn stats(&self, _: v1::StatsRequest) -> Answer<v1::StatsResponse> {
        self.enter(Method::Stats).await?;
        let stats = |id: &String| v1::ContainerStats {
            id: id.clone(),
            pids: 1,
            ..Default::default()
        };
        let containers = self.lock().containers.keys().map(stats).collect();
        Ok(v1::StatsResponse {
            memory_total: 128 << 20,
            memory_available: 96 << 20,
            containers,
            interfaces: Vec::new(),
        })
    }

    async fn shutdown(&self, _: v1::ShutdownRequest) -> Answer<v1::ShutdownResponse> {
        self.enter(Method::Shutdown).await?;
        let agent = self.clone();
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            agent.disconnect();
        });
        Ok(Default::default())
    }
}

/// The same code in this crate's words.
fn code_of(code: tonic::Code) -> Code {
    Code::from(u8::try_from(i32::from(code)).unwrap_or_default())
}

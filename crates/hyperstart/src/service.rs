//! The protocol's calls. Changes run to their end even if the node drops the call: a half-made
//! container would be nobody's.

use crate::{
    console::log, container, error::GuestError, exec, forward, pause, pod::Pod, request, resize,
    sandbox, stats,
};
use hypernetes_agent_api::{
    FEATURES, MIN_PROTOCOL_VERSION, PROTOCOL_VERSION,
    server::{Agent, Replies, Requests},
    status::Status,
    v1,
};

type Answer<T> = Result<T, Status>;

/// Runs work that a dropped call must not cut off.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, GuestError>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Status::internal("the agent gave up")),
    }
}

impl Agent for Pod {
    fn traced(&self, method: &str, traceparent: &str) {
        // On the console, which says when: the guest has no way to a collector.
        let parent: String = traceparent.escape_default().take(64).collect();
        log!("{} of trace {parent}", method.escape_default());
    }

    async fn hello(&self, request: v1::HelloRequest) -> Answer<v1::HelloResponse> {
        let v1::HelloRequest {
            min_version,
            max_version,
            build,
        } = request;
        let version = max_version.min(PROTOCOL_VERSION);
        if version < min_version.max(MIN_PROTOCOL_VERSION) {
            return Err(Status::failed_precondition(format!(
                "the node speaks protocol {min_version} to {max_version}, this agent {MIN_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
            )));
        }
        log!(
            "connected to node build {}",
            build.escape_default().take(64).collect::<String>()
        );
        Ok(v1::HelloResponse {
            version,
            build: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            configured: self.is_configured(),
            features: FEATURES.iter().map(|&name| name.into()).collect(),
        })
    }

    async fn configure_sandbox(
        &self,
        request: v1::ConfigureSandboxRequest,
    ) -> Answer<v1::ConfigureSandboxResponse> {
        let (pod, request) = (self.clone(), request);
        to_the_end(async move {
            pod.configure(request).await?;
            Ok(v1::ConfigureSandboxResponse {})
        })
        .await
    }

    async fn forget(&self, _: v1::ForgetRequest) -> Answer<v1::ForgetResponse> {
        let pod = self.clone();
        to_the_end(async move {
            Pod::forget_rehearsal(&pod).await?;
            Ok(v1::ForgetResponse {})
        })
        .await
    }

    async fn personalize(
        &self,
        request: v1::PersonalizeRequest,
    ) -> Answer<v1::PersonalizeResponse> {
        let (pod, request) = (self.clone(), request);
        to_the_end(async move {
            pod.personalize(request).await?;
            Ok(v1::PersonalizeResponse {})
        })
        .await
    }

    async fn write_volume(
        &self,
        request: v1::WriteVolumeRequest,
    ) -> Answer<v1::WriteVolumeResponse> {
        let v1::WriteVolumeRequest { volume, gid } = request;
        let volume = volume.ok_or_else(|| Status::invalid_argument("no volume"))?;
        let pod = self.clone();
        to_the_end(async move {
            Pod::write_volume(&pod, volume, gid).await?;
            Ok(v1::WriteVolumeResponse {})
        })
        .await
    }

    async fn create_container(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Answer<v1::CreateContainerResponse> {
        let (pod, request) = (self.clone(), request);
        to_the_end(async move {
            let user = container::create(&pod, request).await?;
            Ok(v1::CreateContainerResponse { user: Some(user) })
        })
        .await
    }

    async fn start_container(
        &self,
        request: v1::StartContainerRequest,
    ) -> Answer<v1::StartContainerResponse> {
        let (pod, id) = (self.clone(), request.id);
        to_the_end(async move {
            let started_unix_nanos = pod.container(&id)?.start(&pod).await?;
            Ok(v1::StartContainerResponse { started_unix_nanos })
        })
        .await
    }

    async fn update_container(
        &self,
        request: v1::UpdateContainerRequest,
    ) -> Answer<v1::UpdateContainerResponse> {
        let v1::UpdateContainerRequest { id, resources } = request;
        let limits = request::limits(resources.as_ref())?;
        let container = self.container(&id)?;
        // One that has ended gets nothing new: what it was promised goes with its removal.
        container.check_live()?;
        self.huge_pages().promise(&id, &limits.huge_pages).await?;
        container.update(&limits)?;
        Ok(v1::UpdateContainerResponse {})
    }

    async fn resize(&self, request: v1::ResizeRequest) -> Answer<v1::ResizeResponse> {
        to_the_end(resize::apply(request.vcpus)).await
    }

    async fn grow_disk(&self, request: v1::GrowDiskRequest) -> Answer<v1::GrowDiskResponse> {
        let v1::GrowDiskRequest { slot, bytes } = request;
        let pod = self.clone();
        to_the_end(async move {
            Pod::grow_disk(&pod, slot, bytes).await?;
            Ok(v1::GrowDiskResponse {})
        })
        .await
    }

    async fn clock(&self, request: v1::ClockRequest) -> Answer<v1::ClockResponse> {
        let unix_nanos = sandbox::adjust_clock(request.adjust_nanos)?;
        Ok(v1::ClockResponse { unix_nanos })
    }

    async fn pause(&self, request: v1::PauseRequest) -> Answer<v1::PauseResponse> {
        let (pod, v1::PauseRequest { id, paused }) = (self.clone(), request);
        to_the_end(async move {
            pause::set(&pod, &id, paused).await?;
            Ok(v1::PauseResponse {})
        })
        .await
    }

    async fn signal(&self, request: v1::SignalRequest) -> Answer<v1::SignalResponse> {
        let v1::SignalRequest { id, signal, all } = request;
        self.container(&id)?.signal(signal, all)?;
        Ok(v1::SignalResponse {})
    }

    async fn remove_container(
        &self,
        request: v1::RemoveContainerRequest,
    ) -> Answer<v1::RemoveContainerResponse> {
        let (pod, id) = (self.clone(), request.id);
        to_the_end(async move {
            let released_slots = container::remove(&pod, &id).await?;
            Ok(v1::RemoveContainerResponse { released_slots })
        })
        .await
    }

    async fn list_containers(
        &self,
        _: v1::ListContainersRequest,
    ) -> Answer<v1::ListContainersResponse> {
        let containers = self
            .containers()
            .iter()
            .map(|container| container.state())
            .collect();
        Ok(v1::ListContainersResponse { containers })
    }

    async fn events(
        &self,
        _: v1::EventsRequest,
        replies: Replies<v1::Event>,
    ) -> Result<(), Status> {
        replies.follow(self.subscribe()).await
    }

    async fn output(
        &self,
        mut acks: Requests<v1::OutputAck>,
        replies: Replies<v1::OutputChunk>,
    ) -> Result<(), Status> {
        let start = acks.expect().await?;
        let output = self.container(&start.id)?.output.clone();
        replies.accept();
        output.serve(start, acks, replies).await
    }

    async fn stdin(&self, mut chunks: Requests<v1::StdinChunk>) -> Answer<v1::StdinResponse> {
        let mut chunk = chunks.expect().await?;
        let container = self.container(&chunk.id)?;
        loop {
            let written = container.input.write(&chunk.data).await;
            written.map_err(|error| {
                Status::internal(format!("cannot write to the container: {error}"))
            })?;
            if chunk.close {
                container.input.close().await;
            }
            chunk = match chunks.message().await? {
                Some(next) => next,
                None => break,
            };
        }
        if container.stdin_once() {
            container.input.close().await;
        }
        Ok(v1::StdinResponse {})
    }

    async fn exec(
        &self,
        mut inputs: Requests<v1::ExecInput>,
        replies: Replies<v1::ExecOutput>,
    ) -> Result<(), Status> {
        let Some(v1::exec_input::Input::Start(start)) = inputs.expect().await?.input else {
            return Err(Status::invalid_argument("the first message is not start"));
        };
        let container = self.container(&start.container_id)?;
        let exec = exec::start(self, &container, &start).await?;
        exec.serve(inputs, replies).await
    }

    async fn resize_tty(&self, request: v1::ResizeTtyRequest) -> Answer<v1::ResizeTtyResponse> {
        let v1::ResizeTtyRequest { id, size } = request;
        let size = size.ok_or_else(|| Status::invalid_argument("no size"))?;
        self.container(&id)?.resize(size.width, size.height)?;
        Ok(v1::ResizeTtyResponse {})
    }

    async fn forward(
        &self,
        mut inputs: Requests<v1::ForwardChunk>,
        replies: Replies<v1::ForwardChunk>,
    ) -> Result<(), Status> {
        let start = inputs.expect().await?;
        let stream = forward::connect(start.port).await?;
        replies.accept();
        forward::serve(stream, start.data, inputs, replies).await;
        Ok(())
    }

    async fn stats(&self, request: v1::StatsRequest) -> Answer<v1::StatsResponse> {
        let detail = request.detail;
        Ok(stats::collect(self, detail).await)
    }

    async fn shutdown(&self, _: v1::ShutdownRequest) -> Answer<v1::ShutdownResponse> {
        log!("the node ends the machine");
        let pod = self.clone();
        tokio::spawn(async move {
            pod.shut_down().await;
            // Not reached unless the reboot failed.
            sandbox::power_off();
        });
        Ok(v1::ShutdownResponse {})
    }
}

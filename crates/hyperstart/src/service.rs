//! The protocol's calls. Changes run to their end even if the node drops the call: a half-made
//! container would be nobody's.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use hypernetes_agent_api::{
    FEATURES, MIN_PROTOCOL_VERSION, PROTOCOL_VERSION,
    v1::{self, agent_server::Agent},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    console::log, container, error::GuestError, exec, forward, pause, pod::Pod, request, resize,
    sandbox, stats,
};

type Answer<T> = Result<Response<T>, Status>;
type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
/// Messages of a stream that wait for HTTP/2 to take them.
const QUEUE: usize = 2;

/// Runs work that a dropped call must not cut off.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, GuestError>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(Response::new(result?)),
        Err(_) => Err(Status::internal("the agent gave up")),
    }
}

async fn first<T>(inputs: &mut Streaming<T>) -> Result<T, Status> {
    inputs
        .message()
        .await?
        .ok_or_else(|| Status::invalid_argument("no first message"))
}

#[tonic::async_trait]
impl Agent for Pod {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Answer<v1::HelloResponse> {
        let v1::HelloRequest {
            min_version,
            max_version,
            build,
        } = request.into_inner();
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
        Ok(Response::new(v1::HelloResponse {
            version,
            build: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            configured: self.is_configured(),
            features: FEATURES.iter().map(|&name| name.into()).collect(),
        }))
    }

    async fn configure_sandbox(
        &self,
        request: Request<v1::ConfigureSandboxRequest>,
    ) -> Answer<v1::ConfigureSandboxResponse> {
        let (pod, request) = (self.clone(), request.into_inner());
        to_the_end(async move {
            pod.configure(request).await?;
            Ok(v1::ConfigureSandboxResponse {})
        })
        .await
    }

    async fn forget(&self, _: Request<v1::ForgetRequest>) -> Answer<v1::ForgetResponse> {
        let pod = self.clone();
        to_the_end(async move {
            Pod::forget_rehearsal(&pod).await?;
            Ok(v1::ForgetResponse {})
        })
        .await
    }

    async fn personalize(
        &self,
        request: Request<v1::PersonalizeRequest>,
    ) -> Answer<v1::PersonalizeResponse> {
        let (pod, request) = (self.clone(), request.into_inner());
        to_the_end(async move {
            pod.personalize(request).await?;
            Ok(v1::PersonalizeResponse {})
        })
        .await
    }

    async fn write_volume(
        &self,
        request: Request<v1::WriteVolumeRequest>,
    ) -> Answer<v1::WriteVolumeResponse> {
        let v1::WriteVolumeRequest { volume, gid } = request.into_inner();
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
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let (pod, request) = (self.clone(), request.into_inner());
        to_the_end(async move {
            let user = container::create(&pod, request).await?;
            Ok(v1::CreateContainerResponse { user: Some(user) })
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let (pod, id) = (self.clone(), request.into_inner().id);
        to_the_end(async move {
            let started_unix_nanos = pod.container(&id)?.start(&pod).await?;
            Ok(v1::StartContainerResponse { started_unix_nanos })
        })
        .await
    }

    async fn update_container(
        &self,
        request: Request<v1::UpdateContainerRequest>,
    ) -> Answer<v1::UpdateContainerResponse> {
        let v1::UpdateContainerRequest { id, resources } = request.into_inner();
        let limits = request::limits(resources.as_ref())?;
        let container = self.container(&id)?;
        // One that has ended gets nothing new: what it was promised goes with its removal.
        container.check_live()?;
        self.huge_pages().promise(&id, &limits.huge_pages).await?;
        container.update(&limits)?;
        Ok(Response::new(v1::UpdateContainerResponse {}))
    }

    async fn resize(&self, request: Request<v1::ResizeRequest>) -> Answer<v1::ResizeResponse> {
        to_the_end(resize::apply(request.into_inner().vcpus)).await
    }

    async fn grow_disk(
        &self,
        request: Request<v1::GrowDiskRequest>,
    ) -> Answer<v1::GrowDiskResponse> {
        let v1::GrowDiskRequest { slot, bytes } = request.into_inner();
        let pod = self.clone();
        to_the_end(async move {
            Pod::grow_disk(&pod, slot, bytes).await?;
            Ok(v1::GrowDiskResponse {})
        })
        .await
    }

    async fn clock(&self, request: Request<v1::ClockRequest>) -> Answer<v1::ClockResponse> {
        let unix_nanos = sandbox::adjust_clock(request.into_inner().adjust_nanos)?;
        Ok(Response::new(v1::ClockResponse { unix_nanos }))
    }

    async fn pause(&self, request: Request<v1::PauseRequest>) -> Answer<v1::PauseResponse> {
        let (pod, v1::PauseRequest { id, paused }) = (self.clone(), request.into_inner());
        to_the_end(async move {
            pause::set(&pod, &id, paused).await?;
            Ok(v1::PauseResponse {})
        })
        .await
    }

    async fn signal(&self, request: Request<v1::SignalRequest>) -> Answer<v1::SignalResponse> {
        let v1::SignalRequest { id, signal, all } = request.into_inner();
        self.container(&id)?.signal(signal, all)?;
        Ok(Response::new(v1::SignalResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let (pod, id) = (self.clone(), request.into_inner().id);
        to_the_end(async move {
            let released_slots = container::remove(&pod, &id).await?;
            Ok(v1::RemoveContainerResponse { released_slots })
        })
        .await
    }

    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        let containers = self
            .containers()
            .iter()
            .map(|container| container.state())
            .collect();
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    type EventsStream = AnswerStream<v1::Event>;
    async fn events(&self, _: Request<v1::EventsRequest>) -> Answer<Self::EventsStream> {
        let events = BroadcastStream::new(self.subscribe()).map(|state| match state {
            Ok(state) => Ok(v1::Event {
                event: Some(v1::event::Event::Container(state)),
            }),
            // The caller lists and subscribes again.
            Err(_) => Err(Status::data_loss("events were missed")),
        });
        Ok(Response::new(Box::pin(events)))
    }

    type OutputStream = AnswerStream<v1::OutputChunk>;
    async fn output(
        &self,
        request: Request<Streaming<v1::OutputAck>>,
    ) -> Answer<Self::OutputStream> {
        let mut acks = request.into_inner();
        let start = first(&mut acks).await?;
        let output = self.container(&start.id)?.output.clone();
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(output.serve(start, acks, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn stdin(
        &self,
        request: Request<Streaming<v1::StdinChunk>>,
    ) -> Answer<v1::StdinResponse> {
        let mut chunks = request.into_inner();
        let mut chunk = first(&mut chunks).await?;
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
        Ok(Response::new(v1::StdinResponse {}))
    }

    type ExecStream = AnswerStream<v1::ExecOutput>;
    async fn exec(&self, request: Request<Streaming<v1::ExecInput>>) -> Answer<Self::ExecStream> {
        let mut inputs = request.into_inner();
        let Some(v1::exec_input::Input::Start(start)) = first(&mut inputs).await?.input else {
            return Err(Status::invalid_argument("the first message is not start"));
        };
        let container = self.container(&start.container_id)?;
        let exec = exec::start(self, &container, &start).await?;
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(exec.serve(inputs, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn resize_tty(
        &self,
        request: Request<v1::ResizeTtyRequest>,
    ) -> Answer<v1::ResizeTtyResponse> {
        let v1::ResizeTtyRequest { id, size } = request.into_inner();
        let size = size.ok_or_else(|| Status::invalid_argument("no size"))?;
        self.container(&id)?.resize(size.width, size.height)?;
        Ok(Response::new(v1::ResizeTtyResponse {}))
    }

    type ForwardStream = AnswerStream<v1::ForwardChunk>;
    async fn forward(
        &self,
        request: Request<Streaming<v1::ForwardChunk>>,
    ) -> Answer<Self::ForwardStream> {
        let mut inputs = request.into_inner();
        let start = first(&mut inputs).await?;
        let stream = forward::connect(start.port).await?;
        let (tx, rx) = mpsc::channel(QUEUE);
        tokio::spawn(forward::serve(stream, start.data, inputs, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Answer<v1::StatsResponse> {
        let detail = request.into_inner().detail;
        Ok(Response::new(stats::collect(self, detail).await))
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Answer<v1::ShutdownResponse> {
        log!("the node ends the machine");
        let pod = self.clone();
        tokio::spawn(async move {
            pod.shut_down().await;
            // Not reached unless the reboot failed.
            sandbox::power_off();
        });
        Ok(Response::new(v1::ShutdownResponse {}))
    }
}

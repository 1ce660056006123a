//! A client of the runtime interface, the same for each runtime.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use hyper_util::rt::TokioIo;
use hypernetes_cri::v1::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A connection to a runtime.
pub(crate) struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    logs: tempfile::TempDir,
}

/// A pod with one container.
pub(crate) struct Pod {
    sandbox: String,
    pub(crate) container: String,
    /// Of RunPodSandbox, CreateContainer and StartContainer together.
    pub(crate) took: Duration,
}

impl Client {
    pub(crate) async fn connect(socket: PathBuf) -> Result<Self> {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            logs: tempfile::tempdir()?,
        })
    }

    pub(crate) async fn pull(&mut self, image: &str) -> Result<()> {
        let image = v1::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        };
        let request = v1::PullImageRequest {
            image: Some(image),
            ..Default::default()
        };
        self.images.pull_image(request).await?;
        Ok(())
    }

    pub(crate) async fn pod(&mut self, name: &str, image: &str) -> Result<Pod> {
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs.path().join(name).display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        let watch = Instant::now();
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let sandbox = self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata {
                    name: "main".to_owned(),
                    attempt: 0,
                }),
                image: Some(v1::ImageSpec {
                    image: image.to_owned(),
                    ..Default::default()
                }),
                command: vec!["sleep".to_owned(), "100000".to_owned()],
                log_path: "main.log".to_owned(),
                linux: Some(v1::LinuxContainerConfig::default()),
                ..Default::default()
            }),
            sandbox_config: Some(config),
        };
        let container = self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id;
        let request = v1::StartContainerRequest {
            container_id: container.clone(),
        };
        self.runtime.start_container(request).await?;
        Ok(Pod {
            sandbox,
            container,
            took: watch.elapsed(),
        })
    }

    pub(crate) async fn exec(&mut self, container: &str, command: &[&str]) -> Result<Duration> {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 60,
        };
        let watch = Instant::now();
        let answer = self.runtime.exec_sync(request).await?.into_inner();
        let took = watch.elapsed();
        ensure!(answer.exit_code == 0, "{command:?} failed");
        Ok(took)
    }

    /// The smallest question of the interface that only the container's surroundings can answer.
    pub(crate) async fn stats(&mut self, container: &str) -> Result<Duration> {
        let request = v1::ContainerStatsRequest {
            container_id: container.to_owned(),
        };
        let watch = Instant::now();
        self.runtime.container_stats(request).await?;
        Ok(watch.elapsed())
    }

    /// Stops and removes a pod; returns how long that took.
    pub(crate) async fn remove(&mut self, pod: &Pod) -> Result<Duration> {
        let watch = Instant::now();
        let pod_sandbox_id = pod.sandbox.clone();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id };
        self.runtime.stop_pod_sandbox(request).await?;
        let pod_sandbox_id = pod.sandbox.clone();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.remove_pod_sandbox(request).await?;
        Ok(watch.elapsed())
    }
}

//! A server on a runtime in memory, and its clients.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper_util::rt::TokioIo;
use hypernetes_cri::{
    CriConfig, CriServer, NodeNetwork, PodNetwork,
    v1::{
        self, image_service_client::ImageServiceClient,
        runtime_service_client::RuntimeServiceClient,
    },
};
use hypernetes_network::{FakeDriver, NetworkDriver, NetworkSpec};
use hypernetes_runtime::fake::FakeRuntime;
use tokio::{net::UnixStream, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

pub(crate) struct Bed {
    adjust: Adjust,
    pub(crate) temp: tempfile::TempDir,
    pub(crate) runtime: FakeRuntime,
    pub(crate) networks: Arc<FakeDriver>,
    pub(crate) client: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    pub(crate) metrics: SocketAddr,
    pub(crate) stop: CancellationToken,
    pub(crate) server: Option<JoinHandle<()>>,
    _guard: DropGuard,
}

pub(crate) fn network() -> NetworkSpec {
    NetworkSpec {
        id: "default".parse().unwrap(),
        cidr: "10.88.0.0/16".parse().unwrap(),
        gateway: "10.88.0.1".parse().unwrap(),
        egress: true,
        node_access: true,
        mtu: 1500,
        domain: "cluster.local".into(),
    }
}

/// A channel to a socket.
pub(crate) async fn connect(socket: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .unwrap()
}

/// Changes the node's configuration of a test.
pub(crate) type Adjust = fn(&mut CriConfig);

async fn serve(
    adjust: Adjust,
    directory: &Path,
    runtime: &FakeRuntime,
    networks: &Arc<FakeDriver>,
    stop: CancellationToken,
) -> (JoinHandle<()>, SocketAddr) {
    let mut config = CriConfig::new(directory.join("state"));
    config.kubelet_dir = directory.join("kubelet");
    config.metrics_address = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    adjust(&mut config);
    let driver: Arc<dyn NetworkDriver> = networks.clone();
    let network = NodeNetwork::new(driver, PodNetwork::Own(network()), Vec::new());
    let server = CriServer::new(config, Arc::new(runtime.clone()), network)
        .await
        .unwrap();
    let listener = CriServer::bind(&directory.join("run/cri.sock")).unwrap();
    let metrics = server.metrics_address().unwrap();
    let served = tokio::spawn(async move { server.serve(listener, stop).await.unwrap() });
    (served, metrics)
}

impl Bed {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With another configuration of the node.
    pub(crate) async fn with(adjust: Adjust) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::new();
        runtime.add_image("web", hypernetes_image::ImageConfig::default());
        let networks = Arc::new(FakeDriver::new());
        let stop = CancellationToken::new();
        let (server, metrics) = serve(adjust, temp.path(), &runtime, &networks, stop.clone()).await;
        let channel = connect(temp.path().join("run/cri.sock")).await;
        Self {
            adjust,
            temp,
            runtime,
            networks,
            client: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            metrics,
            _guard: stop.clone().drop_guard(),
            stop,
            server: Some(server),
        }
    }

    /// Ends the server, has something done, and serves again on the same runtime.
    pub(crate) async fn restart_after(&mut self, meanwhile: impl FnOnce()) {
        self.stop.cancel();
        self.server.take().unwrap().await.unwrap();
        meanwhile();
        self.stop = CancellationToken::new();
        self._guard = self.stop.clone().drop_guard();
        let stop = self.stop.clone();
        let adjust = self.adjust;
        let (server, metrics) = serve(
            adjust,
            self.temp.path(),
            &self.runtime,
            &self.networks,
            stop,
        )
        .await;
        (self.server, self.metrics) = (Some(server), metrics);
        let channel = connect(self.temp.path().join("run/cri.sock")).await;
        self.client = RuntimeServiceClient::new(channel.clone());
        self.images = ImageServiceClient::new(channel);
    }

    /// The request for a pod of this name, with its own log directory.
    pub(crate) fn pod(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "acme".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.logs(name).to_str().unwrap().into(),
            labels: [("app".to_owned(), name.to_owned())].into(),
            annotations: [("note".to_owned(), "kept, as \"it\" is".to_owned())].into(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/besteffort/podx".into(),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    seccomp: Some(v1::SecurityProfile::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(crate) fn logs(&self, name: &str) -> PathBuf {
        self.temp.path().join("pods").join(name)
    }

    /// A container as the kubelet asks for it.
    pub(crate) fn container(name: &str) -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: "web".into(),
                user_specified_image: "registry.example/web:1".into(),
                ..Default::default()
            }),
            labels: [("container".to_owned(), name.to_owned())].into(),
            annotations: [("hash".to_owned(), "0a1b".to_owned())].into(),
            log_path: format!("{name}/0.log"),
            ..Default::default()
        }
    }

    pub(crate) async fn run(&mut self, config: v1::PodSandboxConfig) -> Result<String, Status> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        let answer = self.client.run_pod_sandbox(request).await?;
        Ok(answer.into_inner().pod_sandbox_id)
    }

    pub(crate) async fn create(
        &mut self,
        sandbox: &str,
        config: v1::ContainerConfig,
    ) -> Result<String, Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: None,
        };
        let answer = self.client.create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    pub(crate) async fn start(&mut self, id: &str) -> Result<(), Status> {
        let container_id = id.to_owned();
        let request = v1::StartContainerRequest { container_id };
        self.client.start_container(request).await.map(drop)
    }

    /// A pod `name` with a running container `c`.
    pub(crate) async fn running(&mut self, name: &str) -> (String, String) {
        let sandbox = self.run(self.pod(name)).await.unwrap();
        let container = self.create(&sandbox, Self::container("c")).await.unwrap();
        self.start(&container).await.unwrap();
        (sandbox, container)
    }

    pub(crate) async fn status(&mut self, id: &str) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let answer = self.client.container_status(request).await?;
        Ok(answer.into_inner().status.unwrap())
    }

    pub(crate) async fn sandbox_status(
        &mut self,
        id: &str,
    ) -> Result<v1::PodSandboxStatus, Status> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: false,
        };
        let answer = self.client.pod_sandbox_status(request).await?;
        Ok(answer.into_inner().status.unwrap())
    }
}

/// Asserts a code, and a word of the message.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, word: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(word), "{status:?}");
}

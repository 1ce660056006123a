//! A client of the runtime interface, with the words of a test.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use hypernetes_cri::v1::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use hypernetes_testkit::Node;
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue},
};
use tonic::transport::{Channel, Endpoint};

/// An emulated guest on a loaded host is slow, not dead.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// A connection to a node. It does not outlive the daemon.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
}

/// A pod as a kubelet would ask for it, with nothing special.
pub(crate) fn sandbox(node: &Node, name: &str) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: log_dir(node, name).to_str().unwrap().into(),
        linux: Some(v1::LinuxPodSandboxConfig::default()),
        ..Default::default()
    }
}

pub(crate) fn log_dir(node: &Node, pod: &str) -> std::path::PathBuf {
    node.dir().join("logs").join(pod)
}

/// A container of a shell script.
pub(crate) fn shell(name: &str, image: &str, script: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        command: vec!["sh".into(), "-c".into(), script.into()],
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig::default()),
        ..Default::default()
    }
}

impl Client {
    pub(crate) async fn of(node: &Node) -> Self {
        let socket = node.socket();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await
            .unwrap();
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel).max_decoding_message_size(16 << 20),
        }
    }

    /// The image's id.
    pub(crate) async fn pull(&mut self, image: &str) -> String {
        let request = v1::PullImageRequest {
            image: Some(v1::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let pulled = self.images.pull_image(request).await.unwrap();
        pulled.into_inner().image_ref
    }

    pub(crate) async fn run(&mut self, config: &v1::PodSandboxConfig) -> String {
        self.try_run(config).await.unwrap()
    }

    pub(crate) async fn try_run(
        &mut self,
        config: &v1::PodSandboxConfig,
    ) -> Result<String, tonic::Status> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let answer = self.runtime.run_pod_sandbox(request).await?;
        Ok(answer.into_inner().pod_sandbox_id)
    }

    pub(crate) async fn create(
        &mut self,
        pod: &str,
        sandbox: &v1::PodSandboxConfig,
        config: &v1::ContainerConfig,
    ) -> String {
        self.try_create(pod, sandbox, config).await.unwrap()
    }

    pub(crate) async fn try_create(
        &mut self,
        pod: &str,
        sandbox: &v1::PodSandboxConfig,
        config: &v1::ContainerConfig,
    ) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config.clone()),
            sandbox_config: Some(sandbox.clone()),
        };
        let answer = self.runtime.create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    pub(crate) async fn start(&mut self, id: &str) {
        let container_id = id.into();
        let request = v1::StartContainerRequest { container_id };
        self.runtime.start_container(request).await.unwrap();
    }

    /// Standard output and exit code.
    pub(crate) async fn exec(&mut self, id: &str, script: &str) -> (String, i32) {
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: vec!["sh".into(), "-c".into(), script.into()],
            timeout: 0,
        };
        let answer = self.runtime.exec_sync(request).await.unwrap().into_inner();
        let error = String::from_utf8_lossy(&answer.stderr);
        assert_eq!(error, "", "{script}");
        (String::from_utf8(answer.stdout).unwrap(), answer.exit_code)
    }

    pub(crate) async fn status(&mut self, id: &str) -> v1::ContainerStatus {
        let request = v1::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let answer = self.runtime.container_status(request).await.unwrap();
        answer.into_inner().status.unwrap()
    }

    pub(crate) async fn sandbox_status(&mut self, id: &str) -> v1::PodSandboxStatus {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: false,
        };
        let answer = self.runtime.pod_sandbox_status(request).await.unwrap();
        answer.into_inner().status.unwrap()
    }

    /// Waits for a container's end, as a kubelet does: by asking.
    pub(crate) async fn ended(&mut self, id: &str, patience: Duration) -> v1::ContainerStatus {
        let ask = async {
            loop {
                let status = self.status(id).await;
                if status.state() == v1::ContainerState::ContainerExited {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(patience, ask).await.unwrap()
    }

    pub(crate) async fn stop(&mut self, pod: &str) {
        let pod_sandbox_id = pod.into();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id };
        self.runtime.stop_pod_sandbox(request).await.unwrap();
    }

    pub(crate) async fn remove(&mut self, pod: &str) {
        let pod_sandbox_id = pod.into();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.remove_pod_sandbox(request).await.unwrap();
    }

    /// Begins a program with streams, over a one-time URL.
    pub(crate) async fn stream(
        &mut self,
        id: &str,
        command: &[&str],
    ) -> WebSocketStream<TcpStream> {
        let request = v1::ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty: false,
            stdin: true,
            stdout: true,
            stderr: true,
        };
        let url = self.runtime.exec(request).await.unwrap().into_inner().url;
        let rest = url.strip_prefix("http://").unwrap();
        let (host, path) = rest.split_once('/').unwrap();
        let mut request = format!("ws://{host}/{path}").into_client_request().unwrap();
        request.headers_mut().insert(
            "sec-websocket-protocol",
            HeaderValue::from_static("v5.channel.k8s.io"),
        );
        let stream = TcpStream::connect(host).await.unwrap();
        client_async(request, stream).await.unwrap().0
    }
}

/// Sends what `input` gives until it gives nothing, then the end; hands each piece of standard
/// output to `output`. The status that came last.
pub(crate) async fn pump(
    socket: WebSocketStream<TcpStream>,
    mut input: impl FnMut() -> Option<Bytes> + Send,
    mut output: impl FnMut(&[u8]) + Send,
) -> String {
    let (mut sink, mut source) = socket.split();
    let write = async {
        while let Some(piece) = input() {
            let message = [b"\0", piece.as_ref()].concat();
            sink.send(Message::Binary(message.into())).await.unwrap();
        }
        let end = Bytes::from_static(&[255, 0]);
        sink.send(Message::Binary(end)).await.unwrap();
    };
    let read = async {
        let mut status = String::new();
        while let Some(Ok(Message::Binary(data))) = source.next().await {
            match data.split_first() {
                Some((1, rest)) => output(rest),
                Some((3, rest)) => status.push_str(&String::from_utf8_lossy(rest)),
                _other => {}
            }
        }
        status
    };
    tokio::join!(write, read).1
}

/// What is after the stamp, the stream and the tag of each line of a log, with the line's end where
/// the tag is `F`. All lines must be in the API's format.
pub(crate) fn log_content(path: &Path, mut content: impl FnMut(&[u8])) -> u64 {
    use std::io::BufRead;
    let file = std::fs::File::open(path).unwrap();
    let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
    let (mut line, mut count) = (Vec::new(), 0);
    while reader.read_until(b'\n', &mut line).unwrap() > 0 {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let stamp = parts.next().unwrap();
        assert!(stamp.ends_with(b"Z") || stamp.contains(&b'+'), "{stamp:?}");
        assert_eq!(parts.next().unwrap(), b"stdout");
        let tag = parts.next().unwrap().to_vec();
        let rest = parts.next().unwrap();
        match tag.as_slice() {
            b"F" => content(rest),
            b"P" => content(rest.strip_suffix(b"\n").unwrap()),
            other => panic!("{other:?}"),
        }
        count += 1;
        line.clear();
    }
    count
}

/// Removes the pod and ends the daemon, which leaves nothing.
pub(crate) async fn end(node: &mut Node, mut client: Client, pod: &str) {
    client.stop(pod).await;
    client.remove(pod).await;
    node.stop();
    // The kernel ends namespaces and processes in its own time.
    hypernetes_testkit::eventually("nothing is left", PATIENCE, || {
        let picture = node.host_picture();
        picture
            .is_clean()
            .then_some(())
            .ok_or(format!("{picture:?}"))
    });
}

//! One pod from pull to removal through the real daemon, in a real microVM.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "all of this program is a test"
)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use hypernetes_cri::v1::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use hypernetes_testkit::{Node, Registry, can_run_pods, eventually};
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::{
    client_async,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

/// An emulated guest on a loaded host is slow, not dead.
const PATIENCE: Duration = Duration::from_secs(120);
const UID: &str = "0a1b2c3d-test";

const CIDR: &str = "10.89.0.0/24";
const METRICS: &str = "metricsAddress: 127.0.0.1:0\n";

async fn channel(node: &Node) -> Channel {
    let socket = node.socket();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .unwrap()
}

/// The bind mount that a kubelet makes for a `subPath`, for as long as the value lives.
struct SubPath(PathBuf);

impl SubPath {
    fn bind(pod: &Path) -> Self {
        let real = pod.join("volumes/kubernetes.io~empty-dir/work/sub");
        let place = pod.join("volume-subpaths/work/brief/3");
        fs::create_dir_all(&real).unwrap();
        fs::create_dir_all(&place).unwrap();
        hypernetes_testkit::run(Command::new("mount").arg("--bind").arg(real).arg(&place));
        Self(place)
    }
}

impl Drop for SubPath {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg(&self.0).status();
        if !ended.is_ok_and(|status| status.success()) {
            eprintln!("{} is still mounted", self.0.display());
        }
    }
}

/// Updates the ConfigMap, as the kubelet's atomic writer does.
fn update(kubelet: &Path, version: &str, greeting: &str) {
    let map = kubelet
        .join("pods")
        .join(UID)
        .join("volumes/kubernetes.io~configmap/settings");
    let old = fs::read_link(map.join("..data")).unwrap();
    fs::create_dir(map.join(version)).unwrap();
    fs::write(map.join(version).join("greeting"), greeting).unwrap();
    symlink(version, map.join("..data_tmp")).unwrap();
    fs::rename(map.join("..data_tmp"), map.join("..data")).unwrap();
    fs::remove_dir_all(map.join(old)).unwrap();
}

/// What a kubelet prepares for a pod: a ConfigMap in its layout, an emptyDir, /etc/hosts.
fn prepare(kubelet: &Path) {
    let pod = kubelet.join("pods").join(UID);
    let map = pod.join("volumes/kubernetes.io~configmap/settings");
    fs::create_dir_all(map.join("..2026_01_01")).unwrap();
    fs::create_dir_all(pod.join("volumes/kubernetes.io~empty-dir/work")).unwrap();
    fs::write(map.join("..2026_01_01/greeting"), "hello from the host").unwrap();
    symlink("..2026_01_01", map.join("..data")).unwrap();
    symlink("..data/greeting", map.join("greeting")).unwrap();
    fs::create_dir_all(pod.join("containers/brief")).unwrap();
    fs::write(pod.join("containers/brief/0a1b"), "").unwrap();
    fs::write(
        pod.join("etc-hosts"),
        "127.0.0.1 localhost\n192.0.2.7 seven\n",
    )
    .unwrap();
}

fn sandbox(logs: &Path) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "pod".into(),
            uid: UID.into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: "pod".into(),
        log_directory: logs.to_str().unwrap().into(),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container(kubelet: &Path, image: &str) -> v1::ContainerConfig {
    let mount = |host: &str, path: &str, readonly| v1::Mount {
        container_path: path.into(),
        host_path: kubelet
            .join("pods")
            .join(UID)
            .join(host)
            .to_str()
            .unwrap()
            .into(),
        readonly,
        ..Default::default()
    };
    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done";
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: "main".into(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        command: vec!["sh".into(), "-c".into(), script.into()],
        log_path: "main/0.log".into(),
        mounts: vec![
            mount(
                "volumes/kubernetes.io~configmap/settings",
                "/settings",
                true,
            ),
            mount("volumes/kubernetes.io~empty-dir/work", "/work", false),
            mount("etc-hosts", "/etc/hosts", false),
        ],
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(v1::LinuxContainerSecurityContext {
                run_as_user: Some(v1::Int64Value { value: 0 }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Client {
    async fn of(node: &Node) -> Self {
        let channel = channel(node).await;
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        }
    }

    /// Waits for a container's end, as a kubelet does: by asking.
    async fn ended(&mut self, id: &str) -> v1::ContainerStatus {
        let ask = async {
            loop {
                let request = v1::ContainerStatusRequest {
                    container_id: id.into(),
                    verbose: false,
                };
                let answer = self.runtime.container_status(request).await.unwrap();
                let status = answer.into_inner().status.unwrap();
                if status.state() == v1::ContainerState::ContainerExited {
                    return status;
                }
            }
        };
        tokio::time::timeout(PATIENCE, ask).await.unwrap()
    }

    /// Waits until a running container reads this in its file.
    async fn reads(&mut self, id: &str, greeting: &str) {
        let script = "until [ \"$(cat /settings/greeting)\" = \"$0\" ]; do sleep 0.1; done";
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: vec!["sh".into(), "-c".into(), script.into(), greeting.into()],
            timeout: 100,
        };
        let answer = self.runtime.exec_sync(request).await.unwrap().into_inner();
        assert_eq!(answer.exit_code, 0);
    }

    async fn exec(&mut self, id: &str, script: &str) -> (String, i32) {
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: vec!["sh".into(), "-c".into(), script.into()],
            timeout: 60,
        };
        let answer = self.runtime.exec_sync(request).await.unwrap().into_inner();
        let text = [answer.stdout, answer.stderr].concat();
        (String::from_utf8(text).unwrap(), answer.exit_code)
    }
}

/// The words of a log, which must all be whole lines in the API's format.
fn words(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| {
            let parts: Vec<&str> = line.splitn(4, ' ').collect();
            assert!(parts[0].ends_with('Z') || parts[0].contains('+'), "{line}");
            assert_eq!((parts[1], parts[2]), ("stdout", "F"), "{line}");
            parts[3].to_owned()
        })
        .collect()
}

/// Sends `input` through `cat` over a one-time URL.
async fn through_cat(client: &mut Client, id: &str, input: &[u8]) -> (Vec<u8>, String) {
    let request = v1::ExecRequest {
        container_id: id.into(),
        cmd: vec!["cat".into()],
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    };
    let url = client.runtime.exec(request).await.unwrap().into_inner().url;
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut request = format!("ws://{host}/{path}").into_client_request().unwrap();
    request.headers_mut().insert(
        "sec-websocket-protocol",
        HeaderValue::from_static("v5.channel.k8s.io"),
    );
    let stream = TcpStream::connect(host).await.unwrap();
    let (mut socket, _) = client_async(request, stream).await.unwrap();
    let message = [b"\0", input].concat();
    socket.send(Message::Binary(message.into())).await.unwrap();
    let end = Bytes::from_static(&[255, 0]);
    socket.send(Message::Binary(end)).await.unwrap();
    let (mut output, mut status) = (Vec::new(), String::new());
    while let Some(Ok(message)) = socket.next().await {
        let Message::Binary(data) = message else {
            break;
        };
        match data.split_first() {
            Some((1, rest)) => output.extend_from_slice(rest),
            Some((3, rest)) => status.push_str(&String::from_utf8_lossy(rest)),
            _ => {}
        }
    }
    (output, status)
}

/// Pods come and go at the same time, and do not take the network from each other.
async fn several_at_once(client: &Client, logs: &Path) {
    let pod = async |number: u32| {
        let mut runtime = client.runtime.clone();
        let mut config = sandbox(&logs.join(number.to_string()));
        let metadata = config.metadata.as_mut().unwrap();
        metadata.uid = format!("several-{number}");
        let request = v1::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        let id = runtime.run_pod_sandbox(request).await.unwrap();
        let pod_sandbox_id = id.into_inner().pod_sandbox_id;
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        runtime.stop_pod_sandbox(request).await.unwrap();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
        runtime.remove_pod_sandbox(request).await.unwrap();
    };
    tokio::join!(pod(1), pod(2), pod(3), pod(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_through_the_runtime_interface() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start(CIDR, METRICS);
    let kubelet = node.kubelet_dir();
    let logs = node.dir().join("logs");
    prepare(&kubelet);
    let mut client = Client::of(&node).await;

    let version = client.runtime.version(v1::VersionRequest::default()).await;
    assert_eq!(version.unwrap().into_inner().runtime_name, "hypernetes");
    let image = registry.image("busybox:1");
    let request = v1::PullImageRequest {
        image: Some(v1::ImageSpec {
            image: image.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let image_id = client
        .images
        .pull_image(request)
        .await
        .unwrap()
        .into_inner()
        .image_ref;

    let request = v1::RunPodSandboxRequest {
        config: Some(sandbox(&logs)),
        runtime_handler: "hyper".into(),
    };
    let pod = client.runtime.run_pod_sandbox(request).await.unwrap();
    let pod = pod.into_inner().pod_sandbox_id;
    let request = v1::PodSandboxStatusRequest {
        pod_sandbox_id: pod.clone(),
        verbose: true,
    };
    let status = client
        .runtime
        .pod_sandbox_status(request)
        .await
        .unwrap()
        .into_inner();
    let address = status.status.unwrap().network.unwrap().ip;
    assert!(address.starts_with("10.89.0."), "{address}");

    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(container(&kubelet, &image_id)),
        sandbox_config: Some(sandbox(&logs)),
    };
    let id = client.runtime.create_container(request).await.unwrap();
    let id = id.into_inner().container_id;
    let request = v1::StartContainerRequest {
        container_id: id.clone(),
    };
    client.runtime.start_container(request).await.unwrap();

    // The log, in the format that the kubelet reads.
    let log = logs.join("main/0.log");
    let written = |least: usize| {
        eventually("the log is written", PATIENCE, || {
            let count = words(&log).len();
            (count >= least)
                .then_some(())
                .ok_or_else(|| format!("{count} lines"))
        });
    };
    written(3);
    assert_eq!(words(&log)[..3], ["line 0", "line 1", "line 2"]);

    // Files of the host's, and what is not the host's.
    let (text, code) = client.exec(&id, "cat /settings/greeting; exit 3").await;
    assert_eq!((text.as_str(), code), ("hello from the host", 3));
    let (text, _) = client
        .exec(
            &id,
            "echo kept > /work/f; cat /work/f; grep seven /etc/hosts",
        )
        .await;
    assert_eq!(text, "kept\n192.0.2.7 seven\n");
    let (text, _) = client.exec(&id, "echo x > /settings/y").await;
    assert!(text.contains("Read-only"), "{text}");
    update(&kubelet, "..2026_01_02", "hello again");
    client.reads(&id, "hello again").await;
    let host = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    assert_ne!(client.exec(&id, "uname -r").await.0.trim(), host);

    // Last words are where the kubelet reads them.
    let mut brief = container(&kubelet, &image_id);
    brief.metadata.as_mut().unwrap().name = "brief".into();
    brief.log_path = "brief/0.log".into();
    brief.command[2] =
        "echo below > /sub/file; echo last words > /dev/termination-log; exit 4".into();
    let pod_dir = kubelet.join("pods").join(UID);
    let sub_path = SubPath::bind(&pod_dir);
    brief.mounts.push(v1::Mount {
        container_path: "/sub".into(),
        host_path: sub_path.0.to_str().unwrap().into(),
        ..Default::default()
    });
    let words_file = pod_dir.join("containers/brief/0a1b");
    brief.mounts.push(v1::Mount {
        container_path: "/dev/termination-log".into(),
        host_path: words_file.to_str().unwrap().into(),
        ..Default::default()
    });
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(brief),
        sandbox_config: Some(sandbox(&logs)),
    };
    let brief = client.runtime.create_container(request).await.unwrap();
    let brief = brief.into_inner().container_id;
    let request = v1::StartContainerRequest {
        container_id: brief.clone(),
    };
    client.runtime.start_container(request).await.unwrap();
    let ended = client.ended(&brief).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (4, "Error"));
    assert_eq!(fs::read_to_string(&words_file).unwrap(), "last words\n");
    drop(sub_path);
    assert_eq!(client.exec(&id, "cat /work/sub/file").await.0, "below\n");

    // A late command is killed, and says so with its own code.
    let request = v1::ExecSyncRequest {
        container_id: id.clone(),
        cmd: vec!["sleep".into(), "4321".into()],
        timeout: 1,
    };
    let late = client.runtime.exec_sync(request).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late:?}");
    let mut left = 1;
    for _ in 0..100 {
        let (text, _) = client.exec(&id, "ps | grep -c '[s]leep 4321'").await;
        left = text.trim().parse().unwrap();
        if left == 0 {
            break;
        }
    }
    assert_eq!(left, 0, "the late command still runs");

    let input: Vec<u8> = (0..200_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let (output, status) = through_cat(&mut client, &id, &input).await;
    assert!(output == input, "{} of {} bytes", output.len(), input.len());
    assert!(status.contains("Success"), "{status}");

    // Limits change while it runs; what is used is told.
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    client
        .runtime
        .update_container_resources(request)
        .await
        .unwrap();
    let request = v1::ContainerStatsRequest {
        container_id: id.clone(),
    };
    let stats = client
        .runtime
        .container_stats(request)
        .await
        .unwrap()
        .into_inner();
    let stats = stats.stats.unwrap();
    let memory = stats.memory.unwrap();
    let (used, free) = (
        memory.working_set_bytes.unwrap().value,
        memory.available_bytes.unwrap().value,
    );
    assert_eq!(used + free, 96 << 20);
    assert!(used > 0 && stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let request = v1::PodSandboxStatsRequest {
        pod_sandbox_id: pod.clone(),
    };
    let stats = client
        .runtime
        .pod_sandbox_stats(request)
        .await
        .unwrap()
        .into_inner();
    let network = stats.stats.unwrap().linux.unwrap().network.unwrap();
    assert_eq!(network.default_interface.unwrap().name, "eth0");

    // The log is taken away and goes on; so it does over a crash of the node.
    fs::rename(&log, logs.join("main/0.log.1")).unwrap();
    let request = v1::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    client.runtime.reopen_container_log(request).await.unwrap();
    written(3);
    node.kill();
    // The kubelet begins a rotation that the node does not see, and updates a file.
    fs::rename(&log, logs.join("main/0.log.2")).unwrap();
    update(&kubelet, "..2026_01_03", "hello while you were away");
    node.spawn();
    let mut client = Client::of(&node).await;
    client.reads(&id, "hello while you were away").await;
    written(3);
    update(&kubelet, "..2026_01_04", "hello for the last time");
    client.reads(&id, "hello for the last time").await;
    let all = ["main/0.log.1", "main/0.log.2", "main/0.log"].map(|name| words(&logs.join(name)));
    let all = all.concat();
    for (index, line) in all.iter().enumerate() {
        assert_eq!(line, &format!("line {index}"), "a gap, or a line twice");
    }

    let request = v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    };
    client.runtime.stop_container(request).await.unwrap();
    let request = v1::ContainerStatusRequest {
        container_id: id.clone(),
        verbose: false,
    };
    let status = client
        .runtime
        .container_status(request)
        .await
        .unwrap()
        .into_inner();
    let status = status.status.unwrap();
    assert_eq!(status.state(), v1::ContainerState::ContainerExited);
    assert_eq!((status.exit_code, status.image_id), (137, image_id.clone()));
    let limits = status.resources.unwrap().linux.unwrap();
    assert_eq!(limits.memory_limit_in_bytes, 96 << 20);

    Box::pin(several_at_once(&client, &logs)).await;

    let request = v1::RemoveContainerRequest { container_id: id };
    client.runtime.remove_container(request).await.unwrap();
    let request = v1::StopPodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    client.runtime.stop_pod_sandbox(request).await.unwrap();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    client.runtime.remove_pod_sandbox(request).await.unwrap();
    let request = v1::RemoveImageRequest {
        image: Some(v1::ImageSpec {
            image,
            ..Default::default()
        }),
    };
    client.images.remove_image(request).await.unwrap();
    let list = v1::ListImagesRequest::default();
    let images = client
        .images
        .list_images(list)
        .await
        .unwrap()
        .into_inner()
        .images;
    assert!(images.is_empty(), "{images:?}");
    drop(client);
    node.stop();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
    let left = fs::read_dir(node.state().join("runtime/sandboxes"));
    assert_eq!(left.map_or(0, Iterator::count), 0);
}

/// A block device of the host, 64 MiB of zeros. `None`, with the reason printed, where there is none.
struct LoopDevice {
    path: String,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    fn new() -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output()
            .unwrap();
        if !made.status.success() {
            let reason = String::from_utf8_lossy(&made.stderr);
            hypernetes_testkit::skip(&format!("no block device: {}", reason.trim()));
            return None;
        }
        let path = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        Some(Self { path, _file: file })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let ended = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
        if !ended.is_ok_and(|status| status.success()) {
            eprintln!("{} is still there", self.path);
        }
    }
}

/// Memory of the VMM that is resident, in MiB.
fn resident(node: &Node) -> u64 {
    let [vmm] = node.vmm_processes()[..] else {
        panic!("not one VM");
    };
    let path = format!("/proc/{vmm}/smaps_rollup");
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with("Rss:")).unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() / 1024
}

/// Processes of the server of the only VM's host directories: the one that waits, the one that serves.
fn servers(node: &Node) -> Vec<i64> {
    let vm = fs::read_dir(node.run_dir().join("vm")).unwrap();
    let record = vm
        .flatten()
        .find_map(|entry| fs::read_to_string(entry.path().join("server.json")).ok());
    let Some(record) = record else {
        return Vec::new();
    };
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    let first = record["pid"].as_i64().unwrap();
    let below = fs::read_to_string(format!("/proc/{first}/task/{first}/children"));
    let below = below.unwrap_or_default();
    let below = below.split_whitespace().map(|pid| pid.parse().unwrap());
    std::iter::once(first).chain(below).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_given_images_directories_and_a_larger_vm() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let disk = LoopDevice::new();
    let device = disk
        .as_ref()
        .map_or("/dev/none", |disk| &disk.path)
        .to_owned();
    let mut node = Node::prepare(None, CIDR);
    let temp = node.dir().to_owned();
    let shared = format!(
        "hostPaths:\n  shared:\n    - path: {0}/data\n    - {{path: {0}/fixed, readOnly: true}}\n  devices: [{device}]\n",
        temp.display()
    );
    node.configure_vm("  resizeVCPUs: 2\n  resizeMemoryMiB: 1024\n", &shared);
    node.spawn();
    let at = |name: &str| temp.join(name).to_str().unwrap().to_owned();
    for name in ["data", "fixed", "outside"] {
        fs::create_dir(at(name)).unwrap();
        fs::write(Path::new(&at(name)).join("file"), name).unwrap();
    }
    symlink(at("outside"), at("data/way-out")).unwrap();
    let (kubelet, logs) = (node.kubelet_dir(), at("logs"));
    let logs = Path::new(&logs);
    prepare(&kubelet);
    let mut client = Client::of(&node).await;
    let image = Some(v1::ImageSpec {
        image: registry.image("busybox:1"),
        ..Default::default()
    });
    let request = v1::PullImageRequest {
        image: image.clone(),
        ..Default::default()
    };
    let pulled = client.images.pull_image(request).await.unwrap();
    let image_id = pulled.into_inner().image_ref;
    let request = v1::RunPodSandboxRequest {
        config: Some(sandbox(logs)),
        runtime_handler: String::new(),
    };
    let pod = client.runtime.run_pod_sandbox(request).await.unwrap();
    let pod = pod.into_inner().pod_sandbox_id;
    assert_eq!(servers(&node), [] as [i64; 0], "nobody has asked for one");

    let create = async |client: &mut Client, name: &str, mounts: &[v1::Mount]| {
        let mut config = container(&kubelet, &image_id);
        config.metadata.as_mut().unwrap().name = name.into();
        config.log_path = format!("{name}/0.log");
        config.command[2] = "sleep 100000".into();
        config.mounts = mounts.to_vec();
        let linux = config.linux.as_mut().unwrap();
        linux.resources = Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 192 << 20,
            ..Default::default()
        });
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox(logs)),
        };
        let created = client.runtime.create_container(request).await?;
        let container_id = created.into_inner().container_id;
        let request = v1::StartContainerRequest {
            container_id: container_id.clone(),
        };
        client.runtime.start_container(request).await.unwrap();
        Ok::<_, tonic::Status>(container_id)
    };
    let of_image = |sub_path: &str| v1::Mount {
        container_path: "/image".into(),
        readonly: true,
        image: image.clone(),
        image_sub_path: sub_path.into(),
        ..Default::default()
    };
    let of_host = |path: &str, to: &str, readonly| v1::Mount {
        container_path: to.into(),
        host_path: at(path),
        readonly,
        ..Default::default()
    };

    // What cannot be mounted is refused, with the reason that a kubelet looks for.
    for sub_path in ["no/such", "proc/../../etc"] {
        let refused = create(&mut client, "refused", &[of_image(sub_path)]).await;
        let status = refused.unwrap_err();
        let named = status.message().starts_with("ImageVolumeMountFailed: ");
        assert!(
            named || status.message().contains("image_sub_path"),
            "{status:?}"
        );
    }
    for path in ["outside", "data/way-out"] {
        let refused = create(&mut client, "refused", &[of_host(path, "/x", true)]).await;
        assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument, "{path}");
    }
    let writable = of_host("fixed", "/fixed", false);
    assert!(create(&mut client, "refused", &[writable]).await.is_err());

    let mounts = [
        of_image("bin"),
        of_host("data", "/data", false),
        of_host("fixed", "/fixed", true),
        of_host("data/file", "/one", true),
    ];
    let id = create(&mut client, "main", &mounts).await.unwrap();
    let (text, code) = client
        .exec(&id, "/image/busybox echo ran; touch /image/x")
        .await;
    assert!(
        text.starts_with("ran\n") && text.contains("Read-only"),
        "{text}"
    );
    assert_eq!(code, 1);
    let (text, _) = client.exec(&id, "cat /data/file /fixed/file /one").await;
    assert_eq!(text, "datafixeddata");
    let script = "echo new > /data/new; chown 1234:77 /data/new; mknod /data/disk b 8 0; \
                  touch /fixed/x; echo x > /one";
    let (text, _) = client.exec(&id, script).await;
    assert!(text.contains("not permitted"), "no devices: {text}");
    assert_eq!(text.matches("Read-only").count(), 2, "{text}");
    {
        use std::os::unix::fs::MetadataExt;
        let meta = fs::metadata(at("data/new")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 77));
    }
    assert!(!Path::new(&at("data/disk")).exists());

    // The server is locked up: it sees what is shared, and root there is nobody here.
    let server = *servers(&node).last().unwrap();
    let seen = fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap();
    assert_eq!(seen.lines().count(), 4, "{seen}");
    let status = fs::read_to_string(format!("/proc/{server}/status")).unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t0000000000000000"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&server.to_string()), of("self"), "{namespace}");
    }

    // The VM grows with its container, and goes back.
    let resize = async |client: &mut Client, memory_limit_in_bytes, cpu_quota| {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes,
                cpu_quota,
                cpu_period: 100_000,
                ..Default::default()
            }),
            ..Default::default()
        };
        client.runtime.update_container_resources(request).await
    };
    let numbers = async |client: &mut Client| {
        let script = "nproc; sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo";
        let (text, _) = client.exec(&id, script).await;
        let mut lines = text.lines().map(|line| line.parse::<u64>().unwrap());
        (lines.next().unwrap(), lines.next().unwrap() >> 10)
    };
    let (cpus, small) = numbers(&mut client).await;
    assert_eq!(cpus, 1);
    let cores = std::thread::available_parallelism().unwrap().get().min(2) as u64;
    resize(&mut client, 1024 << 20, 200_000).await.unwrap();
    let (cpus, large) = numbers(&mut client).await;
    assert_eq!(cpus, cores);
    assert!(large >= small + 700, "{small} to {large} MiB");
    let before = resident(&node);
    let (text, code) = client
        .exec(&id, "dd if=/dev/zero of=/dev/null bs=600M count=1")
        .await;
    assert_eq!(code, 0, "{text}");
    assert!(resident(&node) > before + 300, "the memory was used");
    node.kill();
    node.spawn();
    let mut client = Client::of(&node).await;
    assert_eq!(*servers(&node).last().unwrap(), server, "it lives on");
    assert_eq!(numbers(&mut client).await, (cores, large));
    resize(&mut client, 192 << 20, 100_000).await.unwrap();
    assert_eq!(numbers(&mut client).await, (1, small));
    eventually("the host has its memory back", PATIENCE, || {
        let now = resident(&node);
        (now < before + 200)
            .then_some(())
            .ok_or(format!("{now} MiB, {before} before"))
    });
    let refused = resize(&mut client, 1 << 40, 0).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);

    // What is shared already is found again, and more can be shared.
    fs::create_dir(at("data/more")).unwrap();
    let mounts = [
        of_host("data", "/data", false),
        of_host("data/more", "/more", false),
    ];
    let second = create(&mut client, "second", &mounts).await.unwrap();
    let (text, _) = client.exec(&second, "cat /data/new; touch /more/x").await;
    assert_eq!(text, "new\n");
    assert!(Path::new(&at("data/more/x")).exists());
    let seen = fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap();
    assert_eq!(seen.lines().count(), 5, "{seen}");

    // A block device of the host is the container's, and the host's again when that is gone.
    if let Some(disk) = &disk {
        let with_device = async |client: &mut Client, name: &str| {
            let mut config = container(&kubelet, &image_id);
            config.metadata.as_mut().unwrap().name = name.into();
            config.log_path = format!("{name}/0.log");
            config.command[2] = "sleep 100000".into();
            config.mounts.clear();
            config.devices.push(v1::Device {
                host_path: disk.path.clone(),
                container_path: "/dev/xvda".into(),
                permissions: "rwm".into(),
            });
            let request = v1::CreateContainerRequest {
                pod_sandbox_id: pod.clone(),
                config: Some(config),
                sandbox_config: Some(sandbox(logs)),
            };
            let created = client.runtime.create_container(request).await?;
            Ok::<_, tonic::Status>(created.into_inner().container_id)
        };
        let id = with_device(&mut client, "block").await.unwrap();
        let request = v1::StartContainerRequest {
            container_id: id.clone(),
        };
        client.runtime.start_container(request).await.unwrap();
        let (text, code) = client
            .exec(&id, "echo block > /dev/xvda && sync && head -c 5 /dev/xvda")
            .await;
        assert_eq!((text.as_str(), code), ("block", 0));
        let busy = with_device(&mut client, "other").await.unwrap_err();
        assert!(busy.message().contains("in use"), "{busy:?}");
        let request = v1::RemoveContainerRequest { container_id: id };
        client.runtime.remove_container(request).await.unwrap();
        assert_eq!(fs::read(&disk.path).unwrap()[..5], *b"block");
    }

    // A pod without its server is ended.
    let pid = rustix::process::Pid::from_raw(i32::try_from(server).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let ended = client.ended(&id).await;
    assert_eq!(ended.reason, "VmmDied");
    assert!(
        ended.message.contains("host directories"),
        "{}",
        ended.message
    );
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    client.runtime.remove_pod_sandbox(request).await.unwrap();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
    drop(client);
    node.stop();
}

/// The user namespace of the confined pod.
fn users() -> v1::UserNamespace {
    let ids = vec![v1::IdMapping {
        host_id: 200_000,
        container_id: 0,
        length: 65_536,
    }];
    v1::UserNamespace {
        mode: v1::NamespaceMode::Pod.into(),
        uids: ids.clone(),
        gids: ids,
    }
}

/// A container of the confined pod. With a target it sees the processes of that one.
fn confined(kubelet: &Path, image: &str, name: &str, target: &str) -> v1::ContainerConfig {
    let mut config = container(kubelet, image);
    config.metadata.as_mut().unwrap().name = name.into();
    config.log_path = format!("{name}/0.log");
    // Memory of its own.
    let held = "held=$(head -c 6000000 /dev/zero | tr '\\0' x); ";
    config.command[2].insert_str(0, held);
    // The layers of its own root once more, as a volume.
    config.mounts.push(v1::Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(v1::ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        ..Default::default()
    });
    let profile = kubelet.join("seccomp/deny.json");
    config.linux = Some(v1::LinuxContainerConfig {
        resources: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        }),
        security_context: Some(v1::LinuxContainerSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                pid: match target {
                    "" => v1::NamespaceMode::Container.into(),
                    _ => v1::NamespaceMode::Target.into(),
                },
                target_id: target.into(),
                userns_options: Some(users()),
                ..Default::default()
            }),
            seccomp: Some(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Localhost.into(),
                localhost_ref: profile.to_str().unwrap().into(),
            }),
            ..Default::default()
        }),
    });
    config
}

/// What the guest's kernel says of the container whose cgroup this shell is in, by metric.
const GUEST: &str = "cd /sys/fs/cgroup; \
    echo container_memory_usage_bytes $(cat memory.current); \
    echo container_memory_max_usage_bytes $(cat memory.peak); \
    while read key value; do case $key in \
        anon) echo container_memory_rss $value;; file) echo container_memory_cache $value;; \
        kernel) echo container_memory_kernel_usage $value;; esac; done < memory.stat; \
    while read key value; do case $key in \
        usage_usec) echo container_cpu_usage_seconds_total $((value / 1000000));; \
        user_usec) echo container_cpu_user_seconds_total $((value / 1000000));; esac; done < cpu.stat; \
    echo container_network_transmit_packets_total $(cat /sys/class/net/eth0/statistics/tx_packets); \
    echo container_network_receive_bytes_total $(cat /sys/class/net/eth0/statistics/rx_bytes); \
    set -- $(stat -f -c '%b %S %c' /); \
    echo container_fs_limit_bytes $(($1 * $2)); echo container_fs_inodes_total $3";

impl Client {
    async fn guest(&mut self, id: &str) -> Vec<(String, u64)> {
        let (text, code) = self.exec(id, GUEST).await;
        assert_eq!(code, 0, "{text}");
        let pair = |line: &str| {
            let (name, value) = line.split_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        };
        text.lines().map(pair).collect()
    }

    /// Values of a pod's metrics and of one of its containers', the first of each family.
    async fn metrics(&mut self, pod: &str, id: &str) -> std::collections::BTreeMap<String, u64> {
        let request = v1::ListPodSandboxMetricsRequest {};
        let all = self
            .runtime
            .list_pod_sandbox_metrics(request)
            .await
            .unwrap();
        let all = all.into_inner().pod_metrics;
        let one = all.iter().find(|one| one.pod_sandbox_id == pod).unwrap();
        let own = |one: &&v1::ContainerMetrics| one.container_id == id;
        let container = one.container_metrics.iter().find(own).unwrap();
        let mut values = std::collections::BTreeMap::new();
        for metric in one.metrics.iter().chain(&container.metrics) {
            let value = metric.value.unwrap().value;
            values.entry(metric.name.clone()).or_insert(value);
        }
        values
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_confined_and_measured() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start(CIDR, METRICS);
    let kubelet = node.kubelet_dir();
    let logs = node.dir().join("logs");
    prepare(&kubelet);
    fs::create_dir_all(kubelet.join("seccomp")).unwrap();
    fs::write(
        kubelet.join("seccomp/deny.json"),
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#,
    )
    .unwrap();
    let mut client = Client::of(&node).await;
    let events = v1::GetEventsRequest {};
    let events = client.runtime.get_container_events(events).await.unwrap();
    let mut events = events.into_inner();
    let request = v1::PullImageRequest {
        image: Some(v1::ImageSpec {
            image: registry.image("busybox:1"),
            ..Default::default()
        }),
        ..Default::default()
    };
    let image = client.images.pull_image(request).await.unwrap();
    let image = image.into_inner().image_ref;

    let mut config = sandbox(&logs);
    let linux = config.linux.as_mut().unwrap();
    let options = &mut linux.security_context.as_mut().unwrap().namespace_options;
    options.as_mut().unwrap().userns_options = Some(users());
    let request = v1::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    };
    let pod = client.runtime.run_pod_sandbox(request).await.unwrap();
    let pod = pod.into_inner().pod_sandbox_id;
    let mut start = async |container: v1::ContainerConfig| {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.clone(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let id = client.runtime.create_container(request).await.unwrap();
        let container_id = id.into_inner().container_id;
        let request = v1::StartContainerRequest {
            container_id: container_id.clone(),
        };
        client.runtime.start_container(request).await.unwrap();
        container_id
    };
    let main = start(confined(&kubelet, &image, "main", "")).await;
    let debug = start(confined(&kubelet, &image, "debug", &main)).await;

    let (text, _) = client
        .exec(
            &main,
            "tr -s ' ' < /proc/self/uid_map; stat -c %u /bin/busybox /settings/greeting; \
             /image/bin/busybox stat -c %u /image/bin/busybox; touch /work/f && stat -c %u /work/f; chmod 600 /work/f",
        )
        .await;
    assert!(text.starts_with(" 0 200000 65536\n0\n0\n0\n0\n"), "{text}");
    assert!(text.contains("Permission denied"), "{text}");
    let (text, _) = client.exec(&debug, "tr '\\0' ' ' < /proc/1/cmdline").await;
    assert!(text.contains("echo line"), "{text}");

    eventually("both hold their memory", PATIENCE, || {
        let written = |name: &str| !words(&logs.join(name).join("0.log")).is_empty();
        let both = written("main") && written("debug");
        both.then_some(()).ok_or("not yet".to_owned())
    });
    // What is told is what the guest says, before or after.
    let (text, code) = client
        .exec(
            &main,
            "head -c 20000000 /dev/urandom > /dev/shm/a && head -c 8000000 /dev/urandom > /data && sync",
        )
        .await;
    assert_eq!(code, 0, "{text}");
    let before = client.guest(&main).await;
    let told = client.metrics(&pod, &main).await;
    let after = client.guest(&main).await;
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        // What the shell that asks takes itself, while it asks.
        let own = match name.starts_with("container_memory_") {
            true => 512 * 1024,
            false => 1,
        };
        let (least, most) = (before.min(after) * 9 / 10, before.max(after) * 11 / 10 + 1);
        let least = least.saturating_sub(own);
        let told = told[name];
        assert!(
            (least..=most).contains(&told),
            "{name}: {told} is not in {least}..={most}"
        );
    }
    let written = told["container_fs_usage_bytes"];
    assert!((7_900_000..9_000_000).contains(&written), "{written}");
    assert!(told["container_memory_usage_bytes"] > 20_000_000);
    assert_eq!(told["container_processes"], 2);
    assert_eq!(told["container_spec_memory_limit_bytes"], 128 << 20);

    // Everything was told in order: of the sandbox, and of both containers.
    use v1::ContainerEventType::{ContainerCreatedEvent, ContainerStartedEvent};
    for id in [&pod, &main, &debug] {
        for kind in [ContainerCreatedEvent, ContainerStartedEvent] {
            let event = tokio::time::timeout(PATIENCE, events.message()).await;
            let event = event.unwrap().unwrap().unwrap();
            assert_eq!(
                (&event.container_id, event.container_event_type()),
                (id, kind)
            );
        }
    }

    // The node's own metrics are where its log says.
    let log = fs::read_to_string(node.dir().join("node.log")).unwrap();
    let address = log.lines().find(|line| line.contains("metrics are served"));
    let address = address.unwrap().rsplit("127.0.0.1:").next().unwrap();
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    let mut stream = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let text = std::io::read_to_string(stream).unwrap();
    for line in [
        "hypernetes_node_sandboxes{state=\"ready\"} 1",
        "hypernetes_node_containers{state=\"running\"} 2",
        "hypernetes_node_calls_total{method=\"StartContainer\",code=\"Ok\"} 2",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    let memory = text.lines().find_map(|line| {
        line.strip_prefix(
            "hypernetes_node_sandbox_host_memory_bytes{namespace=\"default\",pod=\"pod\"",
        )
    });
    let memory: u64 = memory.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(memory > 28_000_000, "{memory}");

    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    client.runtime.remove_pod_sandbox(request).await.unwrap();
    drop((client, events));
    node.stop();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
}

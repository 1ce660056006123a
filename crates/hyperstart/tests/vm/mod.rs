//! A microVM with a built HyperStart, a busybox image on an erofs disk, and an agent to talk to.

use std::{
    fs::{self, File},
    io::Cursor,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use hypernetes_agent_api::{AgentClient, ConnectOptions, v1};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout},
};

/// Slot of the scratch disk.
pub(crate) const SCRATCH: u32 = 1;
/// Slot of the image's only layer.
pub(crate) const LAYER: u32 = 2;
/// For a call that the guest answers at once, on a loaded machine and under emulation.
pub(crate) const SOON: Duration = Duration::from_secs(60);

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The kernel to boot: HYPERNETES_KERNEL (a vmlinux or its directory), or the built HyperKernel.
fn kernel() -> Result<PathBuf, String> {
    let path = match std::env::var_os("HYPERNETES_KERNEL") {
        Some(path) => PathBuf::from(path),
        None => run(&mut Command::new(workspace().join("kernel/build")))?.into(),
    };
    Ok(if path.is_dir() {
        path.join("vmlinux")
    } else {
        path
    })
}

/// HyperStart: HYPERNETES_HYPERSTART, or built here.
fn hyperstart() -> Result<PathBuf, String> {
    match std::env::var_os("HYPERNETES_HYPERSTART") {
        Some(path) => Ok(path.into()),
        None => run(&mut Command::new(
            workspace().join("crates/hyperstart/build-guest"),
        ))
        .map(PathBuf::from),
    }
}

/// Why no VM can be booted here, if so.
pub(crate) fn missing() -> Option<String> {
    for tool in ["qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "busybox"] {
        let found = std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).exists()));
        if !found && !Path::new("/usr/sbin").join(tool).exists() {
            return Some(format!("{tool} is missing"));
        }
    }
    (!rustix::process::geteuid().is_root()).then(|| "image files must belong to root".to_owned())
}

fn initramfs(target: &Path) {
    let program = fs::read(hyperstart().unwrap()).unwrap();
    let entries = [(
        cpio::NewcBuilder::new("init").mode(0o100_755),
        Cursor::new(program),
    )];
    cpio::write_cpio(entries.into_iter(), File::create(target).unwrap()).unwrap();
}

/// Busybox with its libraries, two users and some odd files.
fn image(dir: &Path, target: &Path) {
    let root = dir.join("image");
    for path in [
        "bin",
        "etc",
        "tmp",
        "lib64",
        "lib/x86_64-linux-gnu",
        "var/www",
    ] {
        fs::create_dir_all(root.join(path)).unwrap();
    }
    let busybox = run(Command::new("sh").args(["-c", "command -v busybox"])).unwrap();
    fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    for applet in run(Command::new(&busybox).arg("--list"))
        .unwrap()
        .lines()
        .filter(|applet| *applet != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    // A static busybox has none.
    for library in run(Command::new("ldd").arg(&busybox))
        .unwrap_or_default()
        .split_whitespace()
    {
        if library.starts_with('/') {
            let place = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::copy(library, place).unwrap();
        }
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/var/www:/bin/sh\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nweb:x:33:\nlogs:x:44:web\n",
    )
    .unwrap();
    fs::write(root.join("bin/plain"), "no program").unwrap();
    run(Command::new("mkfs.erofs").arg("-T0").arg(target).arg(&root)).unwrap();
}

/// A running VM. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Vm {
    dir: tempfile::TempDir,
    qemu: Child,
}

impl Vm {
    pub(crate) fn boot() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        initramfs(&path("initramfs"));
        image(dir.path(), &path("layer"));
        File::create(path("scratch"))
            .unwrap()
            .set_len(512 << 20)
            .unwrap();
        let ext4 = ["-q", "-F", "-m0", "-O", "^has_journal,^resize_inode"];
        run(Command::new("/usr/sbin/mkfs.ext4")
            .args(ext4)
            .arg(path("scratch")))
        .unwrap();

        let mhz = fs::read_to_string("/proc/cpuinfo").unwrap();
        let mhz = mhz.lines().find_map(|line| {
            line.strip_prefix("cpu MHz")?
                .split(": ")
                .nth(1)?
                .parse::<f64>()
                .ok()
        });
        let khz = mhz.unwrap() * 1000.0;
        let disk = |slot: u32, name: &str, read_only: &str| {
            [
                "-blockdev".to_owned(),
                format!(
                    "driver=raw,node-name=d{slot},read-only={read_only},file.driver=file,file.filename={}",
                    path(name).display()
                ),
                "-device".to_owned(),
                format!("scsi-hd,bus=scsi0.0,channel=0,scsi-id={slot},lun=0,drive=d{slot}"),
            ]
        };
        let qemu = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-M",
                "microvm,acpi=off",
                "-global",
                "virtio-mmio.force-legacy=false",
            ])
            .args([
                "-m",
                "256",
                "-smp",
                "1",
                "-accel",
                "tcg,tb-size=32",
                "-cpu",
                "max,-cx16,-erms,-fsrm",
            ])
            .arg("-kernel")
            .arg(kernel().unwrap())
            .arg("-initrd")
            .arg(path("initramfs"))
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz={khz:.0} tsc=reliable"
            ))
            .arg("-serial")
            .arg(format!("file:{}", path("console").display()))
            .args([
                "-device",
                "virtio-serial-device,id=vs0,max_ports=8",
                "-chardev",
            ])
            .arg(format!(
                "socket,id=c0,path={},server=on,wait=off",
                path("agent").display()
            ))
            .args([
                "-device",
                "virtserialport,chardev=c0,name=agent.0,bus=vs0.0",
            ])
            .args([
                "-device",
                "virtio-scsi-device,id=scsi0,num_queues=1",
                "-device",
                "virtio-rng-device",
            ])
            .args([
                "-netdev",
                "user,id=n0,restrict=on",
                "-device",
                "virtio-net-device,netdev=n0,mac=02:00:00:00:00:05",
            ])
            .args(disk(SCRATCH, "scratch", "off"))
            .args(disk(LAYER, "layer", "on"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { dir, qemu }
    }

    /// The stream to the agent, once QEMU listens.
    pub(crate) async fn stream(&self) -> UnixStream {
        let deadline = Instant::now() + SOON;
        loop {
            match UnixStream::connect(self.dir.path().join("agent")).await {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}: {}", self.console()),
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn connect(&self) -> AgentClient {
        let options = ConnectOptions {
            build: "test".into(),
            deadline: SOON,
        };
        match AgentClient::connect(self.stream().await, options).await {
            Ok(client) => client,
            Err(error) => panic!("{error:?}; console: {}", self.console()),
        }
    }

    pub(crate) fn console(&self) -> String {
        let bytes = fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the VMM has ended by itself.
    pub(crate) async fn ended(&mut self) {
        let ended = timeout(SOON, async {
            while self.qemu.try_wait().unwrap().is_none() {
                sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(
            ended.await.is_ok(),
            "the VM does not end: {}",
            self.console()
        );
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- console\n{}---", self.console());
        }
        // Both fail only if it has ended.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// The sandbox of a pod, with the scratch disk in `slot`.
pub(crate) fn sandbox(slot: u32) -> v1::ConfigureSandboxRequest {
    v1::ConfigureSandboxRequest {
        hostname: "pod-1".into(),
        unix_nanos: 1_800_000_000_000_000_000,
        seed: vec![7; 32],
        scratch_slot: slot,
        interfaces: vec![v1::Interface {
            mac: "02:00:00:00:00:05".into(),
            name: "eth0".into(),
            addresses: vec!["10.1.2.3/32".into(), "fd00::3/128".into()],
            routes: vec![
                v1::Route {
                    destination: "0.0.0.0/0".into(),
                    gateway: "169.254.1.1".into(),
                },
                v1::Route {
                    destination: "169.254.1.1/32".into(),
                    gateway: String::new(),
                },
            ],
            mtu: 1450,
            device_mac: String::new(),
        }],
        sysctls: [(
            "net.ipv4.ip_unprivileged_port_start".to_owned(),
            "80".to_owned(),
        )]
        .into(),
        files: vec![
            v1::File {
                path: "/etc/hosts".into(),
                content: b"127.0.0.1 localhost me\n".to_vec(),
                mode: 0,
                uid: 0,
            },
            v1::File {
                path: "/etc/hostname".into(),
                content: b"pod-1\n".to_vec(),
                mode: 0,
                uid: 0,
            },
        ],
        ..Default::default()
    }
}

pub(crate) fn process(args: &[&str]) -> v1::Process {
    v1::Process {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["PATH=/bin".into()],
        seccomp_default: true,
        ..Default::default()
    }
}

/// A container that runs a shell script.
pub(crate) fn shell(id: &str, script: &str) -> v1::CreateContainerRequest {
    v1::CreateContainerRequest {
        id: id.into(),
        layer_slots: vec![LAYER],
        process: Some(process(&["sh", "-c", script])),
        masked_paths: hypernetes_agent_api::defaults::MASKED_PATHS
            .iter()
            .map(|path| (*path).to_owned())
            .collect(),
        readonly_paths: hypernetes_agent_api::defaults::READONLY_PATHS
            .iter()
            .map(|path| (*path).to_owned())
            .collect(),
        ..Default::default()
    }
}

/// A container's whole life.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) exit: v1::Exit,
}

/// What the tests do with an agent again and again.
pub(crate) trait Drive {
    async fn create(&self, request: v1::CreateContainerRequest) -> v1::User;
    async fn start(&self, id: &str);
    async fn wait(&self, id: &str) -> v1::Exit;
    async fn output(&self, id: &str) -> (Vec<u8>, Vec<u8>);
    async fn remove(&self, id: &str) -> Vec<u32>;
    async fn stdin(&self, id: &str, chunks: &[&[u8]], close: bool);
    /// Waits until the output of a container contains something.
    async fn until_output(&self, id: &str, text: &str);
    async fn run(&self, request: v1::CreateContainerRequest) -> Outcome {
        let id = request.id.clone();
        self.create(request).await;
        self.start(&id).await;
        let (stdout, stderr) = self.output(&id).await;
        let exit = self.wait(&id).await;
        self.remove(&id).await;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Outcome {
            stdout: text(stdout),
            stderr: text(stderr),
            exit,
        }
    }
}

pub(crate) fn ack(id: &str, stdout: u64, stderr: u64) -> v1::OutputAck {
    v1::OutputAck {
        id: id.into(),
        stdout,
        stderr,
    }
}

impl Drive for AgentClient {
    async fn create(&self, request: v1::CreateContainerRequest) -> v1::User {
        let id = request.id.clone();
        self.create_container(request, SOON)
            .await
            .unwrap_or_else(|error| panic!("{id}: {error:?}"))
            .user
            .unwrap()
    }

    async fn start(&self, id: &str) {
        let response = self
            .start_container(v1::StartContainerRequest { id: id.into() }, SOON)
            .await
            .unwrap();
        assert!(response.started_unix_nanos >= 1_800_000_000_000_000_000);
    }

    async fn wait(&self, id: &str) -> v1::Exit {
        let mut events = self
            .client()
            .events(v1::EventsRequest {})
            .await
            .unwrap()
            .into_inner();
        let wait = async {
            loop {
                let list = self
                    .list_containers(v1::ListContainersRequest {}, SOON)
                    .await
                    .unwrap();
                let state = list
                    .containers
                    .into_iter()
                    .find(|state| state.id == id)
                    .unwrap();
                if let Some(exit) = state.exit {
                    assert_eq!(state.phase, i32::from(v1::ContainerPhase::Exited));
                    return exit;
                }
                events.message().await.unwrap().unwrap();
            }
        };
        timeout(SOON, wait)
            .await
            .unwrap_or_else(|_| panic!("{id} does not end"))
    }

    async fn output(&self, id: &str) -> (Vec<u8>, Vec<u8>) {
        let (acks, queue) = tokio::sync::mpsc::channel(16);
        acks.send(ack(id, 0, 0)).await.unwrap();
        let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
        let mut chunks = self.client().output(queue).await.unwrap().into_inner();
        let mut streams = [Vec::new(), Vec::new()];
        let read = async {
            while let Some(chunk) = chunks.message().await.unwrap() {
                let stream = &mut streams[usize::try_from(chunk.stream).unwrap()];
                assert_eq!(chunk.offset, stream.len() as u64);
                stream.extend(chunk.data);
                // The guest ends the call itself after the last chunk.
                drop(
                    acks.send(ack(id, streams[0].len() as u64, streams[1].len() as u64))
                        .await,
                );
            }
        };
        timeout(SOON, read)
            .await
            .unwrap_or_else(|_| panic!("the output of {id} does not end"));
        let [stdout, stderr] = streams;
        (stdout, stderr)
    }

    async fn remove(&self, id: &str) -> Vec<u32> {
        let request = v1::RemoveContainerRequest { id: id.into() };
        self.remove_container(request, SOON)
            .await
            .unwrap()
            .released_slots
    }

    async fn stdin(&self, id: &str, chunks: &[&[u8]], close: bool) {
        let mut all: Vec<_> = chunks
            .iter()
            .map(|data| v1::StdinChunk {
                id: id.into(),
                data: data.to_vec(),
                close: false,
            })
            .collect();
        all.push(v1::StdinChunk {
            id: id.into(),
            data: Vec::new(),
            close,
        });
        let call = async { self.client().stdin(tokio_stream::iter(all)).await.unwrap() };
        timeout(SOON, call).await.unwrap();
    }

    async fn until_output(&self, id: &str, text: &str) {
        let first = tokio_stream::StreamExt::chain(
            tokio_stream::iter([ack(id, 0, 0)]),
            tokio_stream::pending(),
        );
        let mut chunks = self.client().output(first).await.unwrap().into_inner();
        let mut seen = String::new();
        let read = async {
            while !seen.contains(text) {
                let chunk = chunks
                    .message()
                    .await
                    .unwrap()
                    .unwrap_or_else(|| panic!("{id} ended after {seen:?}"));
                seen.push_str(&String::from_utf8_lossy(&chunk.data));
            }
        };
        let done = timeout(SOON, read).await;
        assert!(done.is_ok(), "{id} does not say {text:?}: {seen:?}");
    }
}

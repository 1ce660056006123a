//! Pods in real microVMs: QEMU, the built kernel, the built HyperStart, an image in a real store.
//!
//! Its own `main`, because the driver starts this very program again as the VMM's launcher.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "all of this file is a test"
)]

#[path = "real/frozen.rs"]
mod frozen;
#[path = "real/persistent.rs"]
mod persistent;
#[path = "real/pinned.rs"]
mod pinned;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    time::Duration,
};

use hypernetes_image::ImageStore;
use hypernetes_kernel::KernelCatalog;
use hypernetes_network::FakeDriver;
use hypernetes_runtime::{
    ContainerConfig, ContainerState, ContainerStatus, Deadlines, Defaults, DnsConfig, ExecConfig,
    MountConfig, NodeRuntime, Output, PodRuntime, ResourceConfig, RuntimeConfig, SandboxConfig,
    SandboxMetadata, SandboxState, SecurityConfig, TemplateConfig, UidRange, VolumeConfig,
    VolumeKind,
};
use hypernetes_store::{Store, StoreConfig};
use hypernetes_testkit::{busybox_archive, stdout};
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_vmm::qemu::{QemuConfig, QemuDriver};

const POD: &str = "pods_run_in_real_vms";
const TESTS: [&str; 2] = [POD, "volumes_outlive_pods"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("vmm-launch") => {
            let descriptor = arguments.get(2).and_then(|text| text.parse().ok()).unwrap();
            let error = hypernetes_vmm::launcher::exec_from_fd(descriptor);
            eprintln!("vmm-launch: {error}");
            return ExitCode::FAILURE;
        }
        Some("--list") => {
            // As test runners ask; none is ignored.
            if !arguments.iter().any(|argument| argument == "--ignored") {
                for test in TESTS {
                    println!("{test}: test");
                }
            }
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    if let Some(reason) = missing() {
        println!("SKIP: {reason}");
        return ExitCode::SUCCESS;
    }
    hypernetes_telemetry::init(
        &std::env::var("RUST_LOG").unwrap_or_default(),
        Default::default(),
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let named = |test: &&str| arguments.iter().any(|argument| argument == test);
    let all = !TESTS.iter().any(named);
    for test in TESTS.into_iter().filter(|test| all || named(test)) {
        match test {
            POD => runtime.block_on(pods_run_in_real_vms()),
            _ => runtime.block_on(persistent::volumes_outlive_pods()),
        }
        println!("{test} ... ok");
    }
    ExitCode::SUCCESS
}

fn missing() -> Option<String> {
    for tool in [
        "qemu-system-x86_64",
        "mkfs.ext4",
        "busybox",
        "tar",
        "sha256sum",
    ] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
        if !places.any(|place| place.join(tool).exists()) {
            return Some(format!("{tool} is missing"));
        }
    }
    (!rustix::process::geteuid().is_root())
        .then(|| "VMMs get users of their own: needs root".to_owned())
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

struct Bed {
    temp: tempfile::TempDir,
    config: RuntimeConfig,
}

impl Bed {
    async fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let state = temp.path().join("state");
        let kernel = stdout(&mut Command::new(workspace().join("kernel/build")));
        let hyperstart = std::env::var_os("HYPERNETES_HYPERSTART").map_or_else(
            || {
                stdout(&mut Command::new(
                    workspace().join("crates/hyperstart/build-guest"),
                ))
                .into()
            },
            PathBuf::from,
        );
        let kernels = Arc::new(KernelCatalog::open(&state).unwrap());
        let name = "hyperkernel".parse().unwrap();
        kernels.add_built(&name, Path::new(&kernel)).unwrap();
        kernels.set_default(&name).unwrap();
        let images = ImageStore::open(state.join("images"), Default::default()).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/tmp:/bin/sh\n";
        let group = "root:x:0:\nweb:x:33:\n";
        let archive = busybox_archive(temp.path(), passwd, group, "SIGKILL");
        images.load(&archive).await.unwrap();
        let vmm = QemuDriver::detect(QemuConfig::new(state.join("vmm")))
            .await
            .unwrap();
        let config = RuntimeConfig {
            state_dir: state.join("runtime"),
            run_dir: temp.path().join("run"),
            store: Store::open(&state.join("store.redb"), StoreConfig::default()).unwrap(),
            images: Arc::new(images),
            network: Arc::new(FakeDriver::new()),
            vmm: Arc::new(vmm),
            volumes: None,
            kernels: Arc::new(kernels),
            hyperstart,
            uid_range: UidRange::default(),
            defaults: Defaults {
                mkfs: "/usr/sbin/mkfs.ext4".into(),
                ..Defaults::default()
            },
            deadlines: Deadlines {
                boot: Duration::from_secs(240),
                ..Deadlines::default()
            },
            templates: TemplateConfig { most: 0, pool: 0 },
            others: Vec::new(),
        };
        Self { temp, config }
    }

    async fn open(&self) -> NodeRuntime {
        NodeRuntime::open(self.config.clone()).await.unwrap()
    }

    fn sandbox(&self, name: &str) -> SandboxConfig {
        SandboxConfig {
            metadata: SandboxMetadata {
                name: name.into(),
                namespace: "test".into(),
                uid: name.into(),
                attempt: 0,
            },
            hostname: name.into(),
            network: None,
            requested_address: None,
            host_ports: Vec::new(),
            bandwidth: hypernetes_types::Bandwidth::default(),
            kernel: None,
            vcpus: 1,
            memory_mib: 256,
            extras: Default::default(),
            scratch_mib: 256,
            dns: DnsConfig::default(),
            hosts: Vec::new(),
            sysctls: BTreeMap::new(),
            share_process_namespace: false,
            user_namespace: None,
            log_directory: self.temp.path().join("logs"),
            cgroup_parent: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            memo: String::new(),
            host: None,
        }
    }

    fn log(&self, container: &str) -> Vec<String> {
        let text = fs::read_to_string(self.temp.path().join("logs").join(container).join("0.log"));
        text.unwrap_or_default()
            .lines()
            .map(|line| line.splitn(4, ' ').nth(3).unwrap().to_owned())
            .collect()
    }

    /// The VMMs' process ids, as recorded.
    fn vmm_pids(&self) -> Vec<rustix::process::Pid> {
        let records = self
            .config
            .store
            .list("/node/sandboxes/", None, None, None)
            .unwrap();
        let pid = |value: &[u8]| {
            let record: serde_json::Value = serde_json::from_slice(value).ok()?;
            rustix::process::Pid::from_raw(i32::try_from(record["vm"]["pid"].as_i64()?).ok()?)
        };
        records
            .entries
            .iter()
            .filter_map(|entry| pid(&entry.value))
            .collect()
    }
}

impl Drop for Bed {
    /// VMs outlive their runtime: a test that fails must end them.
    fn drop(&mut self) {
        for pid in self.vmm_pids() {
            let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
            if name.is_ok_and(|name| name.starts_with("qemu")) {
                // It may have ended meanwhile.
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        }
    }
}

fn container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.into(),
        attempt: 0,
        image: "busybox:test".into(),
        command: vec!["sh".into(), "-c".into(), script.into()],
        args: Vec::new(),
        env: vec![("GREETING".into(), "hello".into())],
        working_dir: String::new(),
        mounts: vec![MountConfig {
            volume: "shared".into(),
            image: String::new(),
            destination: "/shared".into(),
            sub_path: String::new(),
            readonly: false,
        }],
        devices: Vec::new(),
        tty: false,
        stdin: false,
        stdin_once: false,
        pid_target: None,
        security: SecurityConfig {
            run_as_user: Some(0),
            ..SecurityConfig::default()
        },
        resources: ResourceConfig::default(),
        stop_signal: None,
        log_path: format!("{name}/0.log").into(),
        termination_path: "/dev/termination-log".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        memo: String::new(),
        host: None,
    }
}

async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), wait)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

async fn start(runtime: &NodeRuntime, sandbox: &SandboxId, config: ContainerConfig) -> ContainerId {
    let id = runtime.create_container(sandbox, config).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    id
}

async fn exec(
    runtime: &NodeRuntime,
    id: &ContainerId,
    command: &[&str],
    stdin: Option<&str>,
) -> (String, i32) {
    let command = command.iter().map(|&part| part.to_owned()).collect();
    let config = ExecConfig {
        command,
        stdin: stdin.is_some(),
        tty: false,
    };
    let mut session = runtime.exec(id, config).await.unwrap();
    if let (Some(sender), Some(text)) = (session.stdin.take(), stdin) {
        sender.send(text.to_owned().into()).await.unwrap();
    }
    let mut text = Vec::new();
    while let Some(Output::Stdout(data) | Output::Stderr(data)) = session.output.recv().await {
        text.extend_from_slice(&data);
    }
    (
        String::from_utf8(text).unwrap(),
        session.exit.await.unwrap().unwrap(),
    )
}

async fn exited(runtime: &NodeRuntime, id: &ContainerId) -> ContainerStatus {
    let ended = async || runtime.container(id).await.unwrap().state == ContainerState::Exited;
    eventually("a container ends", ended).await;
    runtime.container(id).await.unwrap()
}

fn assert_counts_up(lines: &[String]) {
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(line, &format!("line {index}"), "a gap, or a line twice");
    }
}

async fn write_empty(
    runtime: &NodeRuntime,
    sandbox: &SandboxId,
    name: &str,
    size_limit: u64,
    gid: Option<u32>,
) {
    let kind = VolumeKind::EmptyDir {
        memory: false,
        size_limit,
    };
    let volume = VolumeConfig {
        name: name.into(),
        kind,
        gid,
    };
    runtime.write_volume(sandbox, volume).await.unwrap();
}

fn mount_of(volume: &str, destination: &str, sub_path: &str) -> MountConfig {
    MountConfig {
        volume: volume.into(),
        image: String::new(),
        destination: destination.into(),
        sub_path: sub_path.into(),
        readonly: false,
    }
}

/// Containers that mount the limited volumes `small` (4 MiB, group 2000), `tiny` (one byte) and
/// `wide` (200 MiB).
fn with_limits(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        mounts: vec![
            mount_of("shared", "/shared", ""),
            mount_of("small", "/small", ""),
            mount_of("small", "/part", "sub/part"),
            mount_of("tiny", "/tiny", ""),
            mount_of("wide", "/wide", ""),
        ],
        ..container(name, script)
    }
}

/// What is written beyond an emptyDir's limit fails, and nothing else does.
async fn limits_hold(bed: &Bed, runtime: &NodeRuntime, sandbox: &SandboxId) -> ContainerId {
    const LIMIT: u64 = 4 << 20;
    const WIDE: u64 = 200 << 20;
    for _ in 0..2 {
        write_empty(runtime, sandbox, "small", LIMIT, Some(2000)).await;
        write_empty(runtime, sandbox, "tiny", 1, None).await;
        write_empty(runtime, sandbox, "wide", WIDE, None).await;
    }
    let writer = start(runtime, sandbox, with_limits("writer", "exec sleep 1000")).await;
    let sh = async |script: &str| exec(runtime, &writer, &["sh", "-c", script], None).await;
    let look = "ls -A /small /tiny; stat -c '%a %u %g' /small /tiny";
    let (text, _) = sh(look).await;
    assert_eq!(text, "/small:\nsub\n\n/tiny:\n2777 0 2000\n777 0 0\n");

    let (text, _) = sh("df -Pk /wide | tail -n 1").await;
    let room: u64 = text.split_whitespace().nth(3).unwrap().parse().unwrap();
    let short = (WIDE / 1024).checked_sub(room);
    assert!(short.is_some_and(|kib| kib <= 8), "{text}");

    let (text, code) = sh("dd if=/dev/zero of=/small/big bs=4k count=4096").await;
    assert!(
        code != 0 && text.contains("No space left on device"),
        "{text}"
    );
    // To a block: two directories are in it too, made for the sub path.
    let (text, _) = sh("sync; stat -c %s /small/big; df -P /small | tail -n 1").await;
    let size: u64 = text.lines().next().unwrap().parse().unwrap();
    println!("of {LIMIT} bytes {size} could be written: {text}");
    assert!((LIMIT - 4 * 4096..=LIMIT).contains(&size), "{text}");
    let (text, code) = sh("echo more > /part/file").await;
    assert!(
        code != 0 && text.contains("No space left on device"),
        "{text}"
    );
    let (text, code) = sh("dd if=/dev/zero of=/shared/big bs=1M count=16 && rm /shared/big").await;
    assert_eq!(code, 0, "{text}");

    // What is deleted goes back to the node, and can be written again.
    let file = bed.temp.path().join("state/runtime/sandboxes");
    let file = file.join(sandbox.as_str()).join("volume-254.ext4");
    let used = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&file).unwrap()) * 512;
    println!("the disk of a full volume has {} bytes", used());
    assert!(used() >= LIMIT - 4 * 4096);
    assert_eq!(sh("rm /small/big && sync").await.1, 0);
    eventually("the node's file shrinks", async || used() < LIMIT / 4).await;
    assert_eq!(sh("echo kept > /part/file").await, (String::new(), 0));
    assert_eq!(sh("echo a > /tiny/a").await, (String::new(), 0));
    let (text, code) = sh("echo b > /tiny/b").await;
    assert!(
        code != 0 && text.contains("No space left on device"),
        "{text}"
    );
    writer
}

async fn pods_run_in_real_vms() {
    let bed = Bed::new().await;
    let runtime = bed.open().await;
    let sandbox = runtime.run_sandbox(bed.sandbox("pod")).await.unwrap();
    println!(
        "timing: {:?}",
        runtime.start_timing(&sandbox).await.unwrap()
    );
    write_empty(&runtime, &sandbox, "shared", 0, None).await;
    let writer = limits_hold(&bed, &runtime, &sandbox).await;

    let count = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done";
    let counter = start(&runtime, &sandbox, container("counter", count)).await;
    let second = "echo $GREETING from $(hostname); echo left > /shared/note; echo oops >&2; printf unfinished; \
        echo last words > /dev/termination-log; exit 3";
    let second = start(&runtime, &sandbox, container("second", second)).await;
    let ended = async || runtime.container(&second).await.unwrap().state == ContainerState::Exited;
    eventually("the second container ends", ended).await;
    let status = runtime.container(&second).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert_eq!(status.message, "last words\n");
    let mut lines = bed.log("second");
    lines.sort();
    assert_eq!(lines, ["hello from pod", "oops", "unfinished"]);

    // Another kernel than the host's, the same emptyDir, true exit codes, stdin to its end.
    let release = runtime
        .sandbox(&sandbox)
        .await
        .unwrap()
        .kernel_release
        .unwrap();
    assert_eq!(
        exec(&runtime, &counter, &["uname", "-r"], None).await,
        (format!("{release}\n"), 0)
    );
    assert_eq!(
        exec(&runtime, &counter, &["cat", "/shared/note"], None).await,
        ("left\n".into(), 0)
    );
    assert_eq!(
        exec(&runtime, &counter, &["sh", "-c", "exit 42"], None)
            .await
            .1,
        42
    );
    assert_eq!(
        exec(&runtime, &counter, &["cat"], Some("through")).await,
        ("through".into(), 0)
    );
    assert_eq!(
        exec(&runtime, &counter, &["no-such-program"], None).await.1,
        127
    );
    runtime.remove_container(&second).await.unwrap();
    runtime.remove_container(&writer).await.unwrap();

    // The runtime goes away and comes back, twice; the container never notices.
    let mut runtime = runtime;
    for _ in 0..2 {
        let before = bed.log("counter").len();
        drop(runtime);
        runtime = bed.open().await;
        assert_eq!(
            runtime.recovery_report().adopted,
            1,
            "{:?}",
            runtime.recovery_report()
        );
        assert_eq!(
            runtime.container(&counter).await.unwrap().state,
            ContainerState::Running
        );
        eventually("more lines", async || {
            bed.log("counter").len() > before + 20
        })
        .await;
        assert_counts_up(&bed.log("counter"));
    }
    assert_eq!(
        exec(&runtime, &counter, &["echo", "again"], None).await,
        ("again\n".into(), 0)
    );

    let runtime = frozen::containers_stand_still(&bed, runtime, &sandbox).await;
    frozen::capabilities_are_ambient(&bed, &runtime, &sandbox).await;
    let runtime = pinned::vcpus_stay_on_named_cpus(&bed, runtime, &sandbox).await;

    // The layers' disks are still there for a new container after the adoption.
    let script = "id -u; cat /etc/hostname /small/sub/part/file; dd if=/dev/zero of=/part/x bs=4k \
        count=4096 2>&1 | grep -o 'No space'";
    let third = start(&runtime, &sandbox, with_limits("third", script)).await;
    let ended = async || runtime.container(&third).await.unwrap().state == ContainerState::Exited;
    eventually("the third container ends", ended).await;
    assert_eq!(bed.log("third"), ["0", "pod", "kept", "No space"]);

    let pid = bed.vmm_pids()[0];
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let begun = tokio::time::Instant::now();
    let ended = async || runtime.container(&counter).await.unwrap().state == ContainerState::Exited;
    eventually("the counter ends", ended).await;
    println!("the VMM's death was told after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(runtime.container(&counter).await.unwrap().reason, "VmmDied");
    let status = runtime.sandbox(&sandbox).await.unwrap();
    assert_eq!(
        (status.state, status.failure.unwrap().reason.as_str()),
        (SandboxState::NotReady, "VmmDied")
    );
    runtime.remove_sandbox(&sandbox).await.unwrap();

    // Stopped in good order.
    let sandbox = runtime.run_sandbox(bed.sandbox("next")).await.unwrap();
    let sleeper = start(
        &runtime,
        &sandbox,
        ContainerConfig {
            mounts: Vec::new(),
            ..container("sleeper", "echo up; exec sleep 1000")
        },
    )
    .await;
    eventually("its output", async || bed.log("sleeper") == ["up"]).await;
    let begun = tokio::time::Instant::now();
    runtime.stop_sandbox(&sandbox).await.unwrap();
    println!("stopped in {:?}", begun.elapsed());
    assert_eq!(runtime.container(&sleeper).await.unwrap().exit_code, 137);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    for directory in ["run", "state/runtime/sandboxes", "logs"] {
        let left: Vec<_> = fs::read_dir(bed.temp.path().join(directory))
            .into_iter()
            .flatten()
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

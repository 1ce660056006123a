//! Host pods with the installed OCI runtime and monitor, an image in a real store, real mounts and
//! cgroups.
//!
//! Its own `main`, because it starts itself again: as the first process of a shared process
//! namespace, and as a daemon that is killed at any moment. `HYPERNETES_OCI_RUNTIME` names another
//! runtime than runc.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "all of this file is a test"
)]

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use hypernetes_hostpods::{HostConfig, HostRuntime, Programs};
use hypernetes_image::ImageStore;
use hypernetes_network::FakeDriver;
use hypernetes_runtime::{
    ContainerConfig, ContainerState, ContainerStatus, ContainerUpdate, DnsConfig, ExecConfig,
    HostContainer, HostLimits, HostMount, HostMountSource, HostPod, Output, PidNamespace,
    PodRuntime, Propagation, ResourceConfig, RuntimeError, SandboxConfig, SandboxMetadata,
    SandboxState, Seccomp, SecurityConfig, Session, TtySize,
};
use hypernetes_store::{Durability, Op, Store, StoreConfig, Value};
use hypernetes_testkit::{busybox_archive, run};
use hypernetes_types::{ContainerId, SandboxId};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

const TESTS: [&str; 7] = [
    "containers_live_and_die",
    "people_talk_to_them",
    "pods_share_what_they_ask_for",
    "requests_that_cannot_be_leave_nothing",
    "containers_outlive_the_daemon",
    "pods_do_not_outlive_the_host",
    "a_daemon_killed_anywhere_leaves_nothing",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("pause-pod") => {
            let Err(error) = hypernetes_hostpods::pause();
            eprintln!("pause-pod: {error}");
            return ExitCode::FAILURE;
        }
        Some("--list") => {
            // As test runners ask; none is ignored.
            if !arguments.iter().any(|argument| argument == "--ignored") {
                TESTS.iter().for_each(|name| println!("{name}: test"));
            }
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let programs = match missing() {
        Ok(programs) => programs,
        Err(reason) => {
            println!("SKIP: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    hypernetes_telemetry::init(
        &std::env::var("RUST_LOG").unwrap_or_default(),
        Default::default(),
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if arguments.get(1).map(String::as_str) == Some("daemon") {
        let bed = Bed::at(Path::new(&arguments[2]), programs);
        runtime.block_on(bed.some_work());
        return ExitCode::SUCCESS;
    }
    // A name, if one is given, is that of the test to run.
    let only = TESTS
        .iter()
        .find(|name| arguments.iter().any(|argument| argument == **name));
    for name in TESTS
        .iter()
        .filter(|name| only.is_none_or(|only| only == *name))
    {
        let work = async {
            match *name {
                "containers_live_and_die" => containers_live_and_die(&programs).await,
                "people_talk_to_them" => people_talk_to_them(&programs).await,
                "pods_share_what_they_ask_for" => pods_share_what_they_ask_for(&programs).await,
                "requests_that_cannot_be_leave_nothing" => {
                    requests_that_cannot_be_leave_nothing(&programs).await;
                }
                "containers_outlive_the_daemon" => containers_outlive_the_daemon(&programs).await,
                "pods_do_not_outlive_the_host" => pods_do_not_outlive_the_host(&programs).await,
                "a_daemon_killed_anywhere_leaves_nothing" => {
                    a_daemon_killed_anywhere_leaves_nothing(&programs).await;
                }
                name => panic!("{name} is no test"),
            }
        };
        runtime.block_on(Box::pin(work));
        println!("{name} ... ok");
    }
    ExitCode::SUCCESS
}

fn missing() -> Result<Programs, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("namespaces and mounts: needs root".to_owned());
    }
    for tool in ["busybox", "tar", "sha256sum", "setsid"] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|place| place.join(tool).exists()) {
            return Err(format!("{tool} is missing"));
        }
    }
    let oci = std::env::var_os("HYPERNETES_OCI_RUNTIME").unwrap_or_else(|| "runc".into());
    Programs::find(Path::new(&oci), Path::new("conmon")).map_err(|error| error.to_string())
}

async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, look: impl Fn() -> F) -> T {
    let found = timeout(PATIENCE, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    found.await.unwrap_or_else(|_late| panic!("never: {what}"))
}

struct Bed {
    dir: PathBuf,
    programs: Programs,
    _temp: Option<tempfile::TempDir>,
}

impl Bed {
    async fn new(programs: &Programs) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let images = ImageStore::open(temp.path().join("images"), Default::default()).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/tmp:/bin/sh\n";
        let group = "root:x:0:\nweb:x:34:\nlogs:x:50:web\n";
        let archive = busybox_archive(temp.path(), passwd, group, "SIGUSR1");
        images.load(&archive).await.unwrap();
        let mut bed = Self::at(temp.path(), programs.clone());
        bed._temp = Some(temp);
        bed
    }

    fn at(dir: &Path, programs: Programs) -> Self {
        Self {
            dir: dir.to_owned(),
            programs,
            _temp: None,
        }
    }

    fn config(&self, store: Store) -> HostConfig {
        let images = ImageStore::open(self.dir.join("images"), Default::default()).unwrap();
        HostConfig {
            state_dir: self.dir.join("state"),
            run_dir: self.dir.join("run"),
            store,
            images: Arc::new(images),
            network: Arc::new(FakeDriver::new()),
            programs: self.programs.clone(),
            pause: vec![std::env::current_exe().unwrap().into(), "pause-pod".into()],
            patience: PATIENCE,
        }
    }

    /// A daemon that was killed just now may have left a child that has not let go of it yet.
    async fn open(&self) -> HostRuntime {
        let path = self.dir.join("store.redb");
        let open = || async { Store::open(&path, StoreConfig::default()).ok() };
        let store = eventually("the store to be let go", open).await;
        HostRuntime::open(self.config(store)).await.unwrap()
    }

    fn pod(&self, name: &str) -> SandboxConfig {
        SandboxConfig {
            user_namespace: None,
            metadata: SandboxMetadata {
                name: name.into(),
                namespace: "kube-system".into(),
                uid: name.into(),
                attempt: 0,
            },
            hostname: name.into(),
            network: None,
            requested_address: None,
            host_ports: Vec::new(),
            bandwidth: hypernetes_types::Bandwidth::default(),
            extras: Default::default(),
            kernel: None,
            vcpus: 1,
            memory_mib: 256,
            scratch_mib: 256,
            dns: DnsConfig::default(),
            hosts: Vec::new(),
            sysctls: BTreeMap::new(),
            share_process_namespace: false,
            log_directory: self.dir.join("logs").join(name),
            cgroup_parent: Some(format!("/{}/{name}", self.cgroup())),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            memo: String::new(),
            host: Some(HostPod::default()),
        }
    }

    fn log(&self, pod: &str, container: &str) -> Vec<String> {
        let path = self
            .dir
            .join("logs")
            .join(pod)
            .join(container)
            .join("0.log");
        content(&path)
    }

    /// What a daemon does until it is killed.
    async fn some_work(&self) {
        let runtime = self.open().await;
        println!("open");
        let pod = SandboxConfig {
            share_process_namespace: true,
            ..self.pod("crash")
        };
        let pod = runtime.run_sandbox(pod).await.unwrap();
        for name in ["a", "b"] {
            let config = container(name, "echo up; sleep 1000");
            let id = runtime.create_container(&pod, config).await.unwrap();
            runtime.start_container(&id).await.unwrap();
        }
        println!("up");
        runtime.remove_sandbox(&pod).await.unwrap();
        println!("done");
    }

    /// The cgroup of its pods. Beds are used beside each other.
    fn cgroup(&self) -> String {
        let name = self.dir.file_name().unwrap().to_string_lossy();
        format!("hypernetes-hostpods-test-{}", name.trim_matches('.'))
    }

    /// What is left on the host of pods that are gone.
    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = self.dir.to_str().unwrap();
        found.extend(
            table
                .lines()
                .filter(|line| line.contains(ours))
                .map(str::to_owned),
        );
        for line in table.lines().filter(|line| line.contains(" - cgroup")) {
            let group = Path::new(line.split(' ').nth(4).unwrap()).join(self.cgroup());
            found.extend(group.exists().then(|| group.display().to_string()));
        }
        for place in ["state/c", "run/s", "run/l", "run/oci", "logs"] {
            let entries = fs::read_dir(self.dir.join(place));
            found.extend(
                entries
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|e| e.path().display().to_string()),
            );
        }
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let program = line.split(' ').next().unwrap_or_default();
            let tool = ["conmon", "runc", "crun"]
                .iter()
                .any(|tool| program.ends_with(tool));
            if tool && line.contains(ours) {
                found.push(line);
            }
        }
        found
    }

    fn assert_clean(&self) {
        let left = self.leftovers();
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }
}

/// The content of a log's lines.
fn content(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = |line: &str| line.splitn(4, ' ').nth(3).map(str::to_owned);
    text.lines().filter_map(line).collect()
}

fn container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        pid_target: None,
        devices: Vec::new(),
        name: name.into(),
        attempt: 0,
        image: "busybox:test".into(),
        command: vec!["sh".into(), "-c".into(), script.into()],
        args: Vec::new(),
        env: vec![("GREETING".into(), "hello".into())],
        working_dir: "/tmp".into(),
        mounts: Vec::new(),
        tty: false,
        stdin: false,
        stdin_once: false,
        security: SecurityConfig {
            run_as_user: Some(0),
            ..Default::default()
        },
        resources: ResourceConfig::default(),
        stop_signal: None,
        log_path: PathBuf::from(format!("{name}/0.log")),
        termination_path: String::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        memo: String::new(),
        host: Some(HostContainer {
            seccomp: Seccomp::RuntimeDefault,
            ..Default::default()
        }),
    }
}

async fn started(runtime: &HostRuntime, pod: &SandboxId, config: ContainerConfig) -> ContainerId {
    let id = runtime.create_container(pod, config).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    id
}

async fn ended(runtime: &HostRuntime, id: &ContainerId) -> ContainerStatus {
    eventually("the end of a container", || async {
        let status = runtime.container(id).await.unwrap();
        (status.state == ContainerState::Exited).then_some(status)
    })
    .await
}

async fn collect(mut session: Session) -> (String, String, Result<i32, RuntimeError>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(piece) = timeout(PATIENCE, session.output.recv()).await.unwrap() {
        match piece {
            Output::Stdout(data) => out.extend_from_slice(&data),
            Output::Stderr(data) => err.extend_from_slice(&data),
        }
    }
    let code = timeout(PATIENCE, session.exit).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(out), text(err), code)
}

async fn exec(runtime: &HostRuntime, id: &ContainerId, script: &str) -> (String, String, i32) {
    let config = ExecConfig {
        command: vec!["sh".into(), "-c".into(), script.into()],
        ..Default::default()
    };
    let (out, err, code) = collect(runtime.exec(id, config).await.unwrap()).await;
    (out, err, code.unwrap())
}

async fn containers_live_and_die(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let runtime = bed.open().await;
    let pod = runtime.run_sandbox(bed.pod("life")).await.unwrap();
    assert_eq!(runtime.run_sandbox(bed.pod("life")).await.unwrap(), pod);
    assert_eq!(
        runtime.sandbox(&pod).await.unwrap().state,
        SandboxState::Ready
    );

    // As the image says: user, environment; and as asked.
    let mut config = container("user", "id; pwd; echo $GREETING; cat /proc/self/status");
    config.security.run_as_user = None;
    config.security.no_new_privs = true;
    let id = started(&runtime, &pod, config).await;
    let status = ended(&runtime, &id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    let user = status.user.unwrap();
    assert_eq!(
        (user.uid, user.gid, user.groups.as_slice()),
        (33, 34, &[50][..])
    );
    let log = bed.log("life", "user");
    assert_eq!(
        log[..3],
        [
            "uid=33(web) gid=34(web) groups=34(web),50(logs)",
            "/tmp",
            "hello"
        ]
    );
    for wanted in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        assert!(log.iter().any(|line| line == wanted), "{wanted} in {log:?}");
    }

    // Ends of all kinds.
    let id = started(&runtime, &pod, container("fail", "exit 3")).await;
    let status = ended(&runtime, &id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    let mut config = container("oom", "x=a; while true; do x=$x$x; done");
    config.host.as_mut().unwrap().limits.memory = 16 << 20;
    let id = started(&runtime, &pod, config).await;
    let status = ended(&runtime, &id).await;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    let mut config = container("nothing", "");
    config.command = vec!["/no/such/program".into()];
    let id = runtime.create_container(&pod, config).await.unwrap();
    let error = runtime.start_container(&id).await.unwrap_err().to_string();
    assert!(error.to_lowercase().contains("no such file"), "{error}");
    let status = runtime.container(&id).await.unwrap();
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "ContainerCannotRun")
    );

    // The image's stop signal first; SIGKILL for whoever does not listen.
    let script = "trap 'echo bye; exit 7' USR1; echo up; while true; do sleep 0.1; done";
    let id = started(&runtime, &pod, container("polite", script)).await;
    eventually("the trap", || async {
        (bed.log("life", "polite") == ["up"]).then_some(())
    })
    .await;
    runtime.stop_container(&id, PATIENCE).await.unwrap();
    let status = runtime.container(&id).await.unwrap();
    assert_eq!(status.exit_code, 7);
    assert_eq!(bed.log("life", "polite"), ["up", "bye"]);
    let id = started(
        &runtime,
        &pod,
        container("deaf", "trap '' USR1; sleep 1000"),
    )
    .await;
    runtime
        .stop_container(&id, Duration::from_millis(300))
        .await
        .unwrap();
    assert_eq!(runtime.container(&id).await.unwrap().exit_code, 137);

    // Statistics and limits.
    let id = started(&runtime, &pod, container("busy", "sleep 1000")).await;
    let stats = runtime.stats(&pod).await.unwrap();
    assert_eq!(stats.containers.len(), 1);
    assert!(
        stats.containers[0].memory_usage > 0 && stats.containers[0].pids >= 1,
        "{stats:?}"
    );
    let update = ContainerUpdate {
        resources: ResourceConfig::default(),
        memo: "new".into(),
        host: Some(HostLimits {
            memory: 64 << 20,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
    };
    runtime.update_container(&id, update).await.unwrap();
    assert_eq!(runtime.container(&id).await.unwrap().config.memo, "new");
    let (limit, _, _) = exec(
        &runtime,
        &id,
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null",
    )
    .await;
    assert_eq!(limit.trim(), (64 << 20).to_string());

    // Images of containers stay; and nothing stays of a pod.
    assert!(runtime.remove_image("busybox:test").await.is_err());
    runtime.remove_sandbox(&pod).await.unwrap();
    runtime.remove_sandbox(&pod).await.unwrap();
    assert!(runtime.list_containers(None).await.is_empty());
    bed.assert_clean();
    runtime.remove_image("busybox:test").await.unwrap();
}

async fn people_talk_to_them(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let runtime = bed.open().await;
    let pod = runtime.run_sandbox(bed.pod("talk")).await.unwrap();
    let id = started(&runtime, &pod, container("c", "sleep 1000")).await;

    let (out, err, code) = exec(&runtime, &id, "echo out; echo err >&2; exit 5").await;
    assert_eq!((out.as_str(), err.as_str(), code), ("out\n", "err\n", 5));
    // Input, and its end.
    let mut config = ExecConfig {
        command: vec!["cat".into()],
        tty: false,
        stdin: true,
    };
    let mut session = runtime.exec(&id, config.clone()).await.unwrap();
    let stdin = session.stdin.take().unwrap();
    stdin.send(Bytes::from_static(b"through")).await.unwrap();
    drop(stdin);
    assert_eq!(collect(session).await.0, "through");
    // A program that is not there is no exit code.
    config.command = vec!["/no/such/program".into()];
    let (_, _, code) = collect(runtime.exec(&id, config).await.unwrap()).await;
    let error = code.unwrap_err().to_string().to_lowercase();
    assert!(error.contains("no such file"), "{error}");
    // A caller that goes takes the process along.
    let config = ExecConfig {
        command: vec!["sleep".into(), "4321".into()],
        ..Default::default()
    };
    let session = runtime.exec(&id, config).await.unwrap();
    let running = || async { exec(&runtime, &id, "ps | grep -c '[s]leep 4321'").await.0 };
    eventually("the process", || async {
        (running().await.trim() == "1").then_some(())
    })
    .await;
    drop(session);
    eventually("its end", || async {
        (running().await.trim() == "0").then_some(())
    })
    .await;

    // A terminal and its size.
    let config = ExecConfig {
        command: vec!["sh".into()],
        tty: true,
        stdin: true,
    };
    let mut session = runtime.exec(&id, config).await.unwrap();
    let size = TtySize {
        width: 91,
        height: 37,
    };
    let resize = session.resize.take().unwrap();
    let stdin = session.stdin.take().unwrap();
    let mut seen = String::new();
    timeout(PATIENCE, async {
        while !seen.contains("37 91") {
            resize.send(size).await.unwrap();
            stdin
                .send(Bytes::from_static(b"stty size\n"))
                .await
                .unwrap();
            let piece = session.output.recv().await;
            let Some(Output::Stdout(data)) = piece else {
                panic!("{piece:?} after {seen}")
            };
            seen.push_str(&String::from_utf8_lossy(&data));
        }
    })
    .await
    .unwrap();
    stdin.send(Bytes::from_static(b"exit 9\n")).await.unwrap();
    assert_eq!(collect(session).await.2.unwrap(), 9);

    // The first process's own streams.
    let mut config = container("asks", "read line; echo got $line; read again || echo end");
    (config.stdin, config.stdin_once) = (true, true);
    let id = started(&runtime, &pod, config).await;
    let mut session = runtime.attach(&id, true).await.unwrap();
    let stdin = session.stdin.take().unwrap();
    stdin.send(Bytes::from_static(b"words\n")).await.unwrap();
    drop(stdin);
    let (out, _, code) = collect(session).await;
    assert_eq!((out.as_str(), code.unwrap()), ("got words\nend\n", 0));
    assert_eq!(bed.log("talk", "asks"), ["got words", "end"]);

    // With a terminal.
    let mut config = container(
        "terminal",
        "read line; until stty size | grep -q '37 91'; do usleep 20000; done; echo sized; exit 6",
    );
    (config.stdin, config.tty) = (true, true);
    let id = started(&runtime, &pod, config).await;
    let mut session = runtime.attach(&id, true).await.unwrap();
    session.resize.take().unwrap().send(size).await.unwrap();
    let stdin = session.stdin.take().unwrap();
    stdin.send(Bytes::from_static(b"go\n")).await.unwrap();
    let (out, _, code) = collect(session).await;
    assert!(out.contains("sized"), "{out}");
    assert_eq!(code.unwrap(), 6);

    // A port of the host's localhost.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut ours = runtime.port_forward(&pod, port).await.unwrap();
    let (mut theirs, _) = listener.accept().await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut ours, b"ping")
        .await
        .unwrap();
    let mut heard = [0; 4];
    tokio::io::AsyncReadExt::read_exact(&mut theirs, &mut heard)
        .await
        .unwrap();
    assert_eq!(&heard, b"ping");
    drop(listener);
    assert!(runtime.port_forward(&pod, port).await.is_err());

    // A log that was taken away goes on in a new file, with nothing lost between the two.
    let script = "i=0; while [ $i -lt 400 ]; do echo $i; i=$((i+1)); usleep 2000; done";
    let id = started(&runtime, &pod, container("writes", script)).await;
    let log = bed.dir.join("logs/talk/writes/0.log");
    let old = log.with_extension("old");
    eventually("some lines", || async {
        (content(&log).len() > 20).then_some(())
    })
    .await;
    fs::rename(&log, &old).unwrap();
    runtime.reopen_log(&id).await.unwrap();
    assert!(log.exists());
    let before = content(&old).len();
    runtime.reopen_log(&id).await.unwrap();
    ended(&runtime, &id).await;
    assert_eq!(content(&old).len(), before);
    let all: Vec<String> = content(&old).into_iter().chain(content(&log)).collect();
    assert_eq!(all, (0..400).map(|n| n.to_string()).collect::<Vec<_>>());

    fs::remove_file(old).unwrap();
    runtime.remove_sandbox(&pod).await.unwrap();
    fs::remove_dir_all(bed.dir.join("logs/talk")).unwrap_or_default();
    bed.assert_clean();
}

async fn pods_share_what_they_ask_for(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let runtime = bed.open().await;
    let with_pid = |name: &str, script: &str, pid| {
        let mut config = container(name, script);
        config.host.as_mut().unwrap().pid = pid;
        config
    };
    let first = "cat /proc/1/comm; ps | grep -c 'sleep 777'";

    // Own, and the host's.
    let pod = runtime.run_sandbox(bed.pod("apart")).await.unwrap();
    started(&runtime, &pod, container("other", "sleep 777")).await;
    for (name, pid, expected) in [
        ("own", PidNamespace::Own, "sh"),
        (
            "host",
            PidNamespace::Host,
            fs::read_to_string("/proc/1/comm").unwrap().trim(),
        ),
    ] {
        let id = started(&runtime, &pod, with_pid(name, first, pid)).await;
        ended(&runtime, &id).await;
        assert_eq!(bed.log("apart", name)[0], expected);
    }
    // What a container leaves behind in the host's process namespace goes with it.
    let script = "sleep 778 & sleep 0.2";
    let id = started(
        &runtime,
        &pod,
        with_pid("leaves", script, PidNamespace::Host),
    )
    .await;
    ended(&runtime, &id).await;
    let found = Command::new("pgrep")
        .args(["-f", "^sleep 778"])
        .status()
        .unwrap();
    assert!(!found.success());

    // One that the pod shares, whose first process reaps.
    let config = SandboxConfig {
        share_process_namespace: true,
        ..bed.pod("together")
    };
    let shared = runtime.run_sandbox(config).await.unwrap();
    started(
        &runtime,
        &shared,
        with_pid("other", "sleep 777", PidNamespace::Pod),
    )
    .await;
    let script = "ps; (sleep 0.1 & exec true); sleep 0.5; ps | grep -c Z";
    let id = started(
        &runtime,
        &shared,
        with_pid("sees", script, PidNamespace::Pod),
    )
    .await;
    ended(&runtime, &id).await;
    let log = bed.log("together", "sees");
    assert!(log.iter().any(|line| line.contains("sleep 777")), "{log:?}");
    // That of another container.
    let target = started(&runtime, &pod, container("target", "exec sleep 779")).await;
    let joined = with_pid(
        "debug",
        "cat /proc/1/cmdline",
        PidNamespace::Container(target),
    );
    let id = started(&runtime, &pod, joined).await;
    ended(&runtime, &id).await;
    assert_eq!(bed.log("apart", "debug")[0], "sleep\u{0}779\u{0}");

    // Files of the host, read-only to the bottom, and an image.
    let data = bed.dir.join("data");
    fs::create_dir_all(data.join("sub")).unwrap();
    let mut config = container(
        "mounts",
        "echo new > /data/file; echo x > /ro/file; cat /image/etc/passwd | head -n1; echo x > /image/x; ls /made",
    );
    let mount = |source, destination: &str, readonly| HostMount {
        source,
        destination: destination.into(),
        readonly,
        recursive_readonly: readonly,
        propagation: Propagation::Private,
    };
    let path = |path: &Path| HostMountSource::Path(path.to_owned());
    let made = bed.dir.join("made/here");
    config.host.as_mut().unwrap().mounts = vec![
        mount(path(&data), "/data", false),
        mount(path(&data), "/ro", true),
        mount(path(&made), "/made", false),
        mount(
            HostMountSource::Image {
                image: "busybox:test".into(),
                sub_path: String::new(),
            },
            "/image",
            true,
        ),
    ];
    let id = started(&runtime, &pod, config).await;
    ended(&runtime, &id).await;
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "new\n");
    let log = bed.log("apart", "mounts");
    assert!(
        log.contains(&"root:x:0:0::/root:/bin/sh".to_owned()),
        "{log:?}"
    );
    assert_eq!(
        log.iter().filter(|line| line.contains("Read-only")).count(),
        2,
        "{log:?}"
    );
    assert!(made.is_dir());

    for pod in [pod, shared] {
        runtime.stop_sandbox(&pod).await.unwrap();
        assert_eq!(
            runtime.sandbox(&pod).await.unwrap().state,
            SandboxState::NotReady
        );
        runtime.remove_sandbox(&pod).await.unwrap();
    }
    bed.assert_clean();
}

async fn requests_that_cannot_be_leave_nothing(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let runtime = bed.open().await;
    let mut bad = bed.pod("bad");
    bad.sysctls.insert("kernel.panic".into(), "1".into());
    let error = runtime.run_sandbox(bad).await.unwrap_err().to_string();
    assert!(error.contains("sysctls[kernel.panic]"), "{error}");
    assert!(runtime.list_sandboxes().await.is_empty());
    let pod = runtime.run_sandbox(bed.pod("good")).await.unwrap();
    let change = |change: &dyn Fn(&mut ContainerConfig)| {
        let mut config = container("c", "true");
        change(&mut config);
        config
    };
    for (config, field) in [
        (
            change(&|c| {
                c.security.run_as_user = None;
                c.security.run_as_username = "nobody".into();
            }),
            "run_as_user",
        ),
        (
            change(&|c| c.security.add_capabilities = vec!["FLY".into()]),
            "capabilities",
        ),
        (change(&|c| c.log_path = "a:b.log".into()), "log_path"),
        (
            change(&|c| {
                let host = c.host.as_mut().unwrap();
                host.seccomp = Seccomp::Localhost("/no/such/profile".into());
            }),
            "seccomp.localhost_ref",
        ),
        (
            change(&|c| c.host.as_mut().unwrap().pid = PidNamespace::Pod),
            "host.pid",
        ),
        (
            change(&|c| {
                c.host.as_mut().unwrap().mounts = vec![HostMount {
                    source: HostMountSource::Image {
                        image: "busybox:test".into(),
                        sub_path: "no/such".into(),
                    },
                    destination: "/x".into(),
                    readonly: true,
                    recursive_readonly: false,
                    propagation: Propagation::Private,
                }];
            }),
            "image_sub_path",
        ),
    ] {
        let error = runtime.create_container(&pod, config).await.unwrap_err();
        assert!(error.to_string().contains(field), "{field}: {error}");
    }
    assert!(runtime.list_containers(None).await.is_empty());
    runtime.remove_sandbox(&pod).await.unwrap();
    bed.assert_clean();
}

async fn containers_outlive_the_daemon(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let runtime = bed.open().await;
    let pod = runtime.run_sandbox(bed.pod("outlives")).await.unwrap();
    let script = "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); usleep 20000; done; exit 4";
    let ends = started(&runtime, &pod, container("ends", script)).await;
    let stays = started(&runtime, &pod, container("stays", "sleep 1000")).await;
    let waits = runtime
        .create_container(&pod, container("waits", "echo late"))
        .await
        .unwrap();
    drop(runtime);
    // Nobody is there when it ends.
    let code = bed.dir.join(format!("state/c/{ends}/exit/{ends}"));
    eventually("the exit code", || async { code.exists().then_some(()) }).await;
    let runtime = bed.open().await;
    let report = runtime.recovery_report();
    assert_eq!(
        (report.adopted + report.ended, report.failures.len()),
        (2, 0),
        "{report:?}"
    );
    let status = ended(&runtime, &ends).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (4, "Error"));
    let lines: Vec<String> = (0..60).map(|n| n.to_string()).collect();
    assert_eq!(bed.log("outlives", "ends"), lines);
    let state = runtime.container(&stays).await.unwrap().state;
    assert_eq!(state, ContainerState::Running);
    assert_eq!(exec(&runtime, &stays, "echo here").await.0, "here\n");
    runtime.start_container(&waits).await.unwrap();
    ended(&runtime, &waits).await;
    assert_eq!(bed.log("outlives", "waits"), ["late"]);
    runtime.remove_sandbox(&pod).await.unwrap();
    bed.assert_clean();
}

async fn pods_do_not_outlive_the_host(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let runtime = bed.open().await;
    let config = SandboxConfig {
        share_process_namespace: true,
        ..bed.pod("boots")
    };
    let pod = runtime.run_sandbox(config).await.unwrap();
    let runs = started(&runtime, &pod, container("runs", "sleep 1000")).await;
    let waits = container("waits", "true");
    let waits = runtime.create_container(&pod, waits).await.unwrap();
    drop(runtime);
    // As if the records were of another boot; what is left of this one is as good as an orphan.
    let store = eventually("the store to be let go", || async {
        Store::open(&bed.dir.join("store.redb"), StoreConfig::default()).ok()
    })
    .await;
    let page = store
        .list("/node/host/sandboxes/", None, None, None)
        .unwrap();
    for entry in page.entries {
        let mut record: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
        record["boot"] = "another".into();
        let value = Value::Bytes(record.to_string().into());
        let put = vec![Op::Put(entry.key.to_string(), value)];
        store.txn(Vec::new(), put, Durability::Sync).await.unwrap();
    }
    drop(store);
    let runtime = bed.open().await;
    let report = runtime.recovery_report();
    assert!(
        report.adopted == 0 && report.failures.is_empty(),
        "{report:?}"
    );
    let sandbox = runtime.sandbox(&pod).await.unwrap();
    assert_eq!(sandbox.state, SandboxState::NotReady);
    assert_eq!(sandbox.failure.unwrap().reason, "NodeRestarted");
    for (id, reason) in [(&runs, "NodeRestarted"), (&waits, "ContainerCannotRun")] {
        let status = runtime.container(id).await.unwrap();
        assert_eq!(status.state, ContainerState::Exited);
        assert_eq!((status.exit_code, status.reason.as_str()), (137, reason));
    }
    runtime.remove_sandbox(&pod).await.unwrap();
    bed.assert_clean();
}

async fn a_daemon_killed_anywhere_leaves_nothing(programs: &Programs) {
    let bed = Bed::new(programs).await;
    let this = std::env::current_exe().unwrap();
    // How long the work takes when nobody interferes.
    let begun = std::time::SystemTime::now();
    run(Command::new(&this).arg("daemon").arg(&bed.dir));
    let whole = begun.elapsed().unwrap();
    bed.assert_clean();
    let rounds = 24;
    for round in 0..rounds {
        let mut daemon = Command::new(&this)
            .arg("daemon")
            .arg(&bed.dir)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        sleep(whole * round / rounds).await;
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        let runtime = bed.open().await;
        let report = runtime.recovery_report().clone();
        assert!(report.failures.is_empty(), "round {round}: {report:?}");
        for sandbox in runtime.list_sandboxes().await {
            for container in runtime.list_containers(Some(&sandbox.id)).await {
                let known = [
                    ContainerState::Created,
                    ContainerState::Running,
                    ContainerState::Exited,
                ];
                assert!(
                    known.contains(&container.state),
                    "round {round}: {container:?}"
                );
            }
            runtime.remove_sandbox(&sandbox.id).await.unwrap();
        }
        drop(runtime);
        let left = bed.leftovers();
        assert!(
            left.is_empty(),
            "round {round}, {report:?}, left behind:\n{}",
            left.join("\n")
        );
    }
}

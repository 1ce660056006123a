//! Boots real microVMs and drives their agents. One VM per group: booting is what costs.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::too_many_lines,
    reason = "a test fails by panicking, and says why it is skipped"
)]

mod vm;

use hypernetes_agent_api::{
    AgentClient,
    v1::{self, exec_input::Input, exec_output::Output},
};
use tokio::{io::AsyncWriteExt, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use vm::{Drive, LAYER, SCRATCH, SOON, Vm, ack, process, sandbox, shell};

/// Runs a group on a VM of its own, or says why not.
async fn group(run: impl AsyncFnOnce(&mut Vm)) {
    if let Some(reason) = vm::missing() {
        println!("SKIP: {reason}");
        return;
    }
    let mut vm = Vm::boot();
    run(&mut vm).await;
}

fn volume(destination: &str, name: &str) -> v1::Mount {
    v1::Mount {
        destination: destination.into(),
        source: Some(v1::mount::Source::Volume(name.into())),
        ..Default::default()
    }
}

async fn write_volume(client: &AgentClient, name: &str, kind: v1::volume::Kind) {
    let volume = Some(v1::Volume {
        name: name.into(),
        kind: Some(kind),
    });
    client
        .write_volume(v1::WriteVolumeRequest { volume, gid: None }, SOON)
        .await
        .unwrap();
}

fn code_of<T: std::fmt::Debug>(result: Result<T, hypernetes_agent_api::AgentError>) -> tonic::Code {
    result.unwrap_err().code().unwrap()
}

async fn kill(client: &AgentClient, id: &str, signal: u32, all: bool) {
    client
        .signal(
            v1::SignalRequest {
                id: id.into(),
                signal,
                all,
            },
            SOON,
        )
        .await
        .unwrap();
}

/// One exec: its inputs, and what it said.
struct Exec {
    inputs: mpsc::Sender<v1::ExecInput>,
    outputs: tonic::Streaming<v1::ExecOutput>,
}

impl Exec {
    async fn start(client: &AgentClient, id: &str, process: v1::Process, stdin: bool) -> Self {
        let (inputs, queue) = mpsc::channel(16);
        let start = v1::ExecStart {
            container_id: id.into(),
            process: Some(process),
            stdin,
            guest: false,
        };
        inputs
            .send(v1::ExecInput {
                input: Some(Input::Start(start)),
            })
            .await
            .unwrap();
        let call = client.client();
        let outputs = async move {
            { call }
                .exec(ReceiverStream::new(queue))
                .await
                .unwrap()
                .into_inner()
        };
        let outputs = timeout(SOON, outputs).await.unwrap();
        Self { inputs, outputs }
    }

    async fn send(&self, input: Input) {
        self.inputs
            .send(v1::ExecInput { input: Some(input) })
            .await
            .unwrap();
    }

    async fn next(&mut self) -> Option<Output> {
        timeout(SOON, self.outputs.message())
            .await
            .unwrap()
            .unwrap()
            .map(|output| output.output.unwrap())
    }

    async fn finish(mut self) -> (String, String, v1::Exit) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next().await.expect("an exec ends with its exit") {
                Output::Started(started) => assert!(started),
                Output::Stdout(bytes) => stdout.extend(bytes),
                Output::Stderr(bytes) => stderr.extend(bytes),
                Output::Exit(exit) => {
                    assert!(self.next().await.is_none());
                    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                    return (text(stdout), text(stderr), exit);
                }
            }
        }
    }
}

async fn sh(client: &AgentClient, id: &str, script: &str) -> String {
    let (stdout, stderr, exit) = Exec::start(client, id, process(&["sh", "-c", script]), false)
        .await
        .finish()
        .await;
    assert_eq!(exit.code, 0, "{script}: {stdout} {stderr}");
    stdout.trim().to_owned()
}

#[tokio::test]
async fn containers_live_as_they_should() {
    group(async |vm| {
        let client = vm.connect().await;
        assert!(!client.hello().configured);
        assert!(
            client.hello().kernel_release.starts_with("6."),
            "{:?}",
            client.hello()
        );
        let early = client.create_container(shell("early", "true"), SOON).await;
        assert_eq!(code_of(early), tonic::Code::FailedPrecondition);
        client
            .configure_sandbox(sandbox(SCRATCH), SOON)
            .await
            .unwrap();
        client
            .configure_sandbox(sandbox(SCRATCH), SOON)
            .await
            .unwrap();
        let other = v1::ConfigureSandboxRequest {
            hostname: "other".into(),
            ..sandbox(SCRATCH)
        };
        assert_eq!(
            code_of(client.configure_sandbox(other, SOON).await),
            tonic::Code::AlreadyExists
        );

        Box::pin(exit_codes(&client)).await;
        Box::pin(lifecycle(&client)).await;
        Box::pin(standard_input(&client)).await;
        Box::pin(terminal(&client)).await;
        Box::pin(exec(&client)).await;
        Box::pin(identity(&client)).await;
        Box::pin(filters(&client)).await;
        Box::pin(other_processes(&client)).await;
        Box::pin(network(&client)).await;
        Box::pin(limits(&client)).await;
        assert_eq!(client.remove("none").await, Vec::<u32>::new());

        let list = client
            .list_containers(v1::ListContainersRequest {}, SOON)
            .await
            .unwrap();
        assert!(list.containers.is_empty(), "{list:?}");
        // The answer may be lost with the machine.
        drop(client.shutdown(v1::ShutdownRequest {}, SOON).await);
        vm.ended().await;
        let console = vm.console();
        assert!(!console.contains("cannot"), "{console}");
    })
    .await;
}

async fn exit_codes(client: &AgentClient) {
    println!("exit codes");
    let outcome = client.run(shell("zero", "echo out; echo err >&2")).await;
    assert_eq!(
        (
            outcome.stdout.as_str(),
            outcome.stderr.as_str(),
            outcome.exit.code
        ),
        ("out\n", "err\n", 0)
    );
    let outcome = client.run(shell("three", "exit 3")).await;
    assert_eq!(
        (
            outcome.exit.code,
            outcome.exit.signal,
            outcome.exit.oom_killed
        ),
        (3, 0, false)
    );
    for (id, args, code, why) in [
        ("missing", &["no-such-program"][..], 127, "not found"),
        ("missing-path", &["/no/such"], 127, "no such file"),
        ("plain", &["plain"], 126, "permission denied"),
        ("directory", &["/etc"], 126, "permission denied"),
    ] {
        let outcome = client
            .run(v1::CreateContainerRequest {
                process: Some(process(args)),
                ..shell(id, "")
            })
            .await;
        assert_eq!(outcome.exit.code, code, "{id}: {outcome:?}");
        assert!(outcome.exit.message.contains(why), "{id}: {outcome:?}");
    }
}

async fn lifecycle(client: &AgentClient) {
    println!("lifecycle");
    client
        .create(shell(
            "life",
            "trap 'echo caught; exit 7' TERM; echo up; while :; do sleep 0.1; done",
        ))
        .await;
    assert_eq!(
        code_of(client.create_container(shell("life", ""), SOON).await),
        tonic::Code::AlreadyExists
    );
    client.start("life").await;
    let again = client
        .start_container(v1::StartContainerRequest { id: "life".into() }, SOON)
        .await;
    assert_eq!(code_of(again), tonic::Code::FailedPrecondition);
    client.until_output("life", "up").await;
    kill(client, "life", 15, false).await;
    assert_eq!(client.wait("life").await.code, 7);
    kill(client, "life", 15, false).await;
    let (stdout, _) = client.output("life").await;
    assert_eq!(stdout, b"up\ncaught\n");
    assert_eq!(client.remove("life").await, [LAYER]);

    for all in [false, true] {
        client
            .create(shell("killed", "sleep 1000 & sleep 1000"))
            .await;
        client.start("killed").await;
        kill(client, "killed", 9, all).await;
        let exit = client.wait("killed").await;
        assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, 9, false));
        client.remove("killed").await;
    }
    // Never started, and removed while it runs.
    client.create(shell("created", "true")).await;
    let early = client
        .signal(
            v1::SignalRequest {
                id: "created".into(),
                signal: 15,
                all: false,
            },
            SOON,
        )
        .await;
    assert_eq!(code_of(early), tonic::Code::FailedPrecondition);
    kill(client, "created", 9, false).await;
    assert_eq!(client.wait("created").await.code, 137);
    client.remove("created").await;
    client.create(shell("running", "sleep 1000")).await;
    client.start("running").await;
    client.create(shell("beside", "sleep 1000")).await;
    assert_eq!(
        client.remove("running").await,
        Vec::<u32>::new(),
        "the other uses the layer"
    );
    assert_eq!(client.remove("beside").await, [LAYER]);

    for bad in [
        v1::CreateContainerRequest {
            layer_slots: vec![],
            ..shell("bad", "")
        },
        v1::CreateContainerRequest {
            id: "../bad".into(),
            ..shell("bad", "")
        },
        v1::CreateContainerRequest {
            mounts: vec![volume("/v", "unknown")],
            ..shell("bad", "")
        },
        v1::CreateContainerRequest {
            mounts: vec![volume("/proc/sys", "unknown")],
            ..shell("bad", "")
        },
        v1::CreateContainerRequest {
            process: Some(v1::Process {
                user: Some(v1::User {
                    username: "nobody-here".into(),
                    ..Default::default()
                }),
                ..process(&["true"])
            }),
            ..shell("bad", "")
        },
    ] {
        assert_eq!(
            code_of(client.create_container(bad, SOON).await),
            tonic::Code::InvalidArgument
        );
    }
}

async fn standard_input(client: &AgentClient) {
    println!("standard input");
    client
        .create(v1::CreateContainerRequest {
            stdin: true,
            ..shell("cat", "cat; echo end")
        })
        .await;
    client.start("cat").await;
    client.stdin("cat", &[b"one ", b"two\n"], false).await;
    client.until_output("cat", "one two").await;
    client.stdin("cat", &[b"three\n"], true).await;
    let (stdout, _) = client.output("cat").await;
    assert_eq!(stdout, b"one two\nthree\nend\n");
    client.remove("cat").await;
    let once = v1::CreateContainerRequest {
        stdin: true,
        stdin_once: true,
        ..shell("once", "cat")
    };
    client.create(once).await;
    client.start("once").await;
    client.stdin("once", &[b"x"], false).await;
    assert_eq!(client.wait("once").await.code, 0);
    client.remove("once").await;
    // Without stdin there is an empty one.
    assert_eq!(
        client.run(shell("null", "cat; echo end")).await.stdout,
        "end\n"
    );
}

async fn terminal(client: &AgentClient) {
    println!("terminal");
    let mut request = shell(
        "tty",
        "tty; test -c /dev/console && stty size && read x && stty size && cat",
    );
    request.stdin = true;
    request.process.as_mut().unwrap().tty = true;
    request.process.as_mut().unwrap().width = 100;
    request.process.as_mut().unwrap().height = 30;
    client.create(request).await;
    client.start("tty").await;
    client.until_output("tty", "30 100").await;
    let size = Some(v1::TtySize {
        width: 120,
        height: 40,
    });
    client
        .resize_tty(
            v1::ResizeTtyRequest {
                id: "tty".into(),
                size,
            },
            SOON,
        )
        .await
        .unwrap();
    client.stdin("tty", &[b"\n"], false).await;
    client.until_output("tty", "40 120").await;
    client.stdin("tty", &[], true).await;
    let exit = client.wait("tty").await;
    let (stdout, stderr) = client.output("tty").await;
    let text = String::from_utf8_lossy(&stdout);
    assert!(
        exit.code == 0 && text.starts_with("/dev/pts/0\r\n") && stderr.is_empty(),
        "{exit:?} {text}"
    );
    client.remove("tty").await;
}

async fn exec(client: &AgentClient) {
    println!("exec");
    client.create(shell("host", "sleep 1000")).await;
    client.start("host").await;
    let cat = Exec::start(
        client,
        "host",
        process(&["sh", "-c", "cat; echo err >&2; exit 5"]),
        true,
    )
    .await;
    cat.send(Input::Stdin(b"in".to_vec())).await;
    cat.send(Input::CloseStdin(true)).await;
    let (stdout, stderr, exit) = cat.finish().await;
    assert_eq!(
        (stdout.as_str(), stderr.as_str(), exit.code),
        ("in", "err\n", 5)
    );
    let (.., exit) = Exec::start(client, "host", process(&["nothing"]), false)
        .await
        .finish()
        .await;
    assert_eq!(exit.code, 127);
    assert!(exit.message.contains("not found"));

    // The container's own namespaces: its processes, its root.
    assert_eq!(
        sh(client, "host", "cat /proc/1/cmdline | tr '\\0' ' '").await,
        "sleep 1000"
    );
    assert_eq!(sh(client, "host", "cat /proc/self/cgroup").await, "0::/");
    assert_eq!(
        sh(
            client,
            "host",
            "ls -d /layers /scratch /newroot 2>/dev/null | wc -l"
        )
        .await,
        "0"
    );
    // Nothing of the agent's is open in it: the three streams, and what ls itself opens.
    assert_eq!(sh(client, "host", "ls /proc/self/fd | wc -l").await, "4");

    let terminal = v1::Process {
        tty: true,
        width: 90,
        height: 20,
        ..process(&["sh", "-c", "stty size; read x; stty size"])
    };
    let mut tty = Exec::start(client, "host", terminal, true).await;
    let mut seen = String::new();
    while !seen.contains("20 90") {
        match tty.next().await {
            Some(Output::Stdout(bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            Some(Output::Started(_)) => {}
            other => panic!("{other:?} after {seen:?}"),
        }
    }
    tty.send(Input::Resize(v1::TtySize {
        width: 91,
        height: 21,
    }))
    .await;
    tty.send(Input::Stdin(b"\n".to_vec())).await;
    let (stdout, _, exit) = tty.finish().await;
    assert!(
        stdout.contains("21 91") && exit.code == 0,
        "{stdout} {exit:?}"
    );

    let mut killed = Exec::start(client, "host", process(&["sleep", "1001"]), false).await;
    assert!(matches!(killed.next().await, Some(Output::Started(true))));
    killed.send(Input::Signal(15)).await;
    assert_eq!(killed.finish().await.2.code, 143);

    // A dropped call takes its processes along.
    let mut dropped = Exec::start(
        client,
        "host",
        process(&["sh", "-c", "sleep 1002 & sleep 1003"]),
        false,
    )
    .await;
    assert!(matches!(dropped.next().await, Some(Output::Started(true))));
    drop(dropped);
    let gone = "n=0; while pgrep() { ps -o args | grep -v grep | grep -q 'sleep 100[23]'; }; pgrep; do sleep 0.1; n=$((n+1)); test $n -lt 300 || exit 1; done";
    sh(client, "host", gone).await;
    client.remove("host").await;
    let start = Input::Start(v1::ExecStart {
        container_id: "host".into(),
        ..Default::default()
    });
    let late = client
        .client()
        .exec(tokio_stream::iter([v1::ExecInput { input: Some(start) }]))
        .await;
    assert_eq!(late.unwrap_err().code(), tonic::Code::NotFound);
}

async fn identity(client: &AgentClient) {
    println!("identity");
    let status = "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status | tr '\\n\\t' '  '";
    let outcome = client.run(shell("caps", status)).await;
    for line in [
        "CapInh: 0000000000000000",
        "CapEff: 00000000a80425fb",
        "CapBnd: 00000000a80425fb",
        "NoNewPrivs: 0",
        "Seccomp: 2",
    ] {
        assert!(outcome.stdout.contains(line), "{line}: {}", outcome.stdout);
    }
    let mut request = shell(
        "web",
        &format!("id; pwd; echo $HOME; echo x > /dev/stdout; {status}"),
    );
    let web = request.process.as_mut().unwrap();
    web.user = Some(v1::User {
        username: "web".into(),
        additional_gids: vec![55],
        ..Default::default()
    });
    web.cwd = "/made/for/it".into();
    web.no_new_privs = true;
    web.capabilities = Some(v1::Capabilities {
        add: vec!["NET_ADMIN".into()],
        drop: vec!["ALL".into()],
        ..Default::default()
    });
    let user = client.create(request).await;
    assert_eq!(
        (user.uid, user.gid, user.additional_gids),
        (33, 33, vec![44, 55])
    );
    client.start("web").await;
    let (stdout, stderr) = client.output("web").await;
    let text = String::from_utf8_lossy(&stdout);
    assert!(
        text.starts_with("uid=33(web) gid=33(web) groups=44(logs),55\n/made/for/it\n/var/www\nx\n"),
        "{text}"
    );
    for line in [
        "CapEff: 0000000000001000",
        "CapAmb: 0000000000001000",
        "CapBnd: 0000000000001000",
        "NoNewPrivs: 1",
    ] {
        assert!(
            text.contains(line),
            "{line}: {text} {}",
            String::from_utf8_lossy(&stderr)
        );
    }
    client.remove("web").await;

    let mut readonly = shell(
        "readonly",
        "touch /x; touch /t/x && echo tmpfs; touch /dev/shm/x && echo shm",
    );
    readonly.readonly_rootfs = true;
    let tmpfs = Some(v1::mount::Source::Tmpfs(v1::Tmpfs {
        size: 1 << 20,
        mode: 0,
    }));
    readonly.mounts = vec![v1::Mount {
        destination: "/t".into(),
        source: tmpfs,
        ..Default::default()
    }];
    let outcome = client.run(readonly).await;
    assert!(
        outcome.stdout == "tmpfs\nshm\n" && outcome.stderr.contains("Read-only"),
        "{outcome:?}"
    );

    let script = "mount -t tmpfs x /tmp 2>&1; chroot / true && echo chroot; cat /proc/interrupts | wc -c; \
        echo 1 > /proc/sys/kernel/panic; touch /sys/x; hostname; cat /etc/hosts /etc/hostname; ulimit -n";
    let outcome = client.run(shell("confined", script)).await;
    assert!(
        outcome
            .stdout
            .contains("chroot\n0\npod-1\n127.0.0.1 localhost me\npod-1\n65536\n"),
        "{outcome:?}"
    );
    assert!(outcome.stdout.contains("permission denied"), "{outcome:?}");
    assert_eq!(
        outcome.stderr.matches("Read-only").count(),
        2,
        "{outcome:?}"
    );
    let mut privileged = shell(
        "privileged",
        "mount -t tmpfs x /tmp && ls /dev | grep -c '^sd'",
    );
    privileged.privileged = true;
    assert_eq!(client.run(privileged).await.stdout, "2\n");
}

/// A filter with one rule.
fn filter(
    default: (v1::SeccompAction, u32),
    names: &[&str],
    action: (v1::SeccompAction, u32),
) -> v1::SeccompProfile {
    v1::SeccompProfile {
        default_action: default.0.into(),
        default_data: default.1,
        rules: vec![v1::SeccompRule {
            names: names.iter().map(|&name| name.into()).collect(),
            action: action.0.into(),
            data: action.1,
            ..Default::default()
        }],
        ..Default::default()
    }
}

async fn filters(client: &AgentClient) {
    use v1::SeccompAction::{SeccompAllow, SeccompErrno};
    println!("filters");
    let filtered = |id: &str, script: &str, profile: v1::SeccompProfile| {
        let mut request = shell(id, script);
        let process = request.process.as_mut().unwrap();
        process.seccomp_default = false;
        process.seccomp = Some(profile);
        request
    };
    let names = ["chmod", "fchmodat", "fchmodat2", "no_such_call"];
    let denied = filter((SeccompAllow, 0), &names, (SeccompErrno, 13));
    let script = "touch /tmp/f; chmod 400 /tmp/f; grep Seccomp: /proc/self/status";
    let outcome = client.run(filtered("denied", script, denied.clone())).await;
    assert!(outcome.stderr.contains("Permission denied"), "{outcome:?}");
    assert_eq!(outcome.stdout, "Seccomp:\t2\n");

    // One more process in the container is under the filter that its request has.
    let container = filtered("host", "sleep 1000", denied.clone());
    client.create(container).await;
    client.start("host").await;
    let mut process = process(&["sh", "-c", "chmod 400 /tmp"]);
    process.seccomp_default = false;
    process.seccomp = Some(denied);
    let (_, stderr, exit) = Exec::start(client, "host", process, false)
        .await
        .finish()
        .await;
    assert!(
        exit.code != 0 && stderr.contains("Permission denied"),
        "{stderr}"
    );
    client.remove("host").await;

    // Nothing of what comes before the program's own calls needs to be allowed.
    let needed = "access arch_prctl brk close dup2 execve exit_group fcntl fstat getcwd geteuid getpid \
        getppid getrandom getuid ioctl lseek mmap mprotect munmap newfstatat openat pread64 prlimit64 \
        read rseq rt_sigaction rt_sigprocmask set_robust_list set_tid_address stat uname write writev";
    let names: Vec<&str> = needed.split_whitespace().collect();
    let allowed = filter((SeccompErrno, 1), &names, (SeccompAllow, 0));
    let mut request = filtered("allowed", "echo alive; kill -0 1 || echo held", allowed);
    request.process.as_mut().unwrap().no_new_privs = true;
    let outcome = client.run(request).await;
    assert_eq!(outcome.stdout, "alive\nheld\n", "{outcome:?}");
}

async fn other_processes(client: &AgentClient) {
    println!("processes of another container");
    let joining = |id: &str, target: &str, script: &str| v1::CreateContainerRequest {
        pid_target: target.into(),
        ..shell(id, script)
    };
    let unknown = client
        .create_container(joining("x", "none", "true"), SOON)
        .await;
    assert_eq!(code_of(unknown), tonic::Code::NotFound);
    client.create(shell("target", "exec sleep 4711")).await;
    let early = client
        .create_container(joining("x", "target", "true"), SOON)
        .await;
    assert_eq!(code_of(early), tonic::Code::FailedPrecondition);
    client.start("target").await;
    let script = "tr '\\0' ' ' < /proc/1/cmdline; echo; test $$ != 1 && echo beside; \
        readlink /proc/1/ns/pid > /tmp/1; readlink /proc/self/ns/pid | cmp - /tmp/1 && echo same";
    let outcome = client.run(joining("look", "target", script)).await;
    assert_eq!(outcome.stdout, "sleep 4711 \nbeside\nsame\n", "{outcome:?}");
    // Without the namespace of another it sees itself only.
    let outcome = client.run(shell("alone", "echo $$")).await;
    assert_eq!(outcome.stdout, "1\n");

    client
        .create(joining("debug", "target", "sleep 1000"))
        .await;
    client.start("debug").await;
    kill(client, "target", 9, false).await;
    client.wait("target").await;
    assert_eq!(
        client.wait("debug").await.signal,
        9,
        "the namespace ends with its first process"
    );
    let late = client
        .create_container(joining("x", "target", "true"), SOON)
        .await;
    assert_eq!(code_of(late), tonic::Code::FailedPrecondition);
    client.remove("debug").await;
    client.remove("target").await;
}

async fn network(client: &AgentClient) {
    println!("network");
    let script = "ip -o addr show dev eth0; cat /sys/class/net/eth0/mtu; ip route; ip addr show dev lo; \
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let outcome = client.run(shell("net", script)).await;
    for line in [
        "10.1.2.3/32",
        "fd00::3/128",
        "1450",
        "default via 169.254.1.1 dev eth0",
        "127.0.0.1/8",
        "\n80\n",
    ] {
        assert!(outcome.stdout.contains(line), "{line}: {outcome:?}");
    }
    let empty = v1::volume::Kind::EmptyDir(v1::EmptyDir::default());
    write_volume(client, "shared", empty).await;
    let mut server = shell(
        "server",
        "echo from-server > /data/file; nc -ll -p 8080 -e cat",
    );
    server.mounts = vec![volume("/data", "shared")];
    client.create(server).await;
    client.start("server").await;
    let mut peer = shell(
        "peer",
        "until nc 127.0.0.1 8080 < /etc/hostname; do sleep 0.1; done; cat /data/file; touch /data/x",
    );
    peer.mounts = vec![v1::Mount {
        readonly: true,
        ..volume("/data", "shared")
    }];
    let outcome = client.run(peer).await;
    assert!(
        outcome.stdout == "pod-1\nfrom-server\n" && outcome.stderr.contains("Read-only"),
        "{outcome:?}"
    );

    // From the node: bytes there and back, then each direction's end.
    let (inputs, queue) = mpsc::channel(8);
    inputs
        .send(v1::ForwardChunk {
            port: 8080,
            ..Default::default()
        })
        .await
        .unwrap();
    let mut outputs = client
        .client()
        .forward(ReceiverStream::new(queue))
        .await
        .unwrap()
        .into_inner();
    inputs
        .send(v1::ForwardChunk {
            data: b"hello".to_vec(),
            ..Default::default()
        })
        .await
        .unwrap();
    let mut heard = Vec::new();
    while heard.len() < 5 {
        heard.extend(
            timeout(SOON, outputs.message())
                .await
                .unwrap()
                .unwrap()
                .unwrap()
                .data,
        );
    }
    assert_eq!(heard, b"hello");
    inputs
        .send(v1::ForwardChunk {
            eof: true,
            ..Default::default()
        })
        .await
        .unwrap();
    let last = timeout(SOON, outputs.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(last.eof && last.data.is_empty());
    let closed = tokio_stream::iter([v1::ForwardChunk {
        port: 9,
        ..Default::default()
    }]);
    assert_eq!(
        client.client().forward(closed).await.unwrap_err().code(),
        tonic::Code::Unavailable
    );
    client.remove("server").await;

    // A link that a container left in a volume leads nobody out of it.
    let mut planter = shell(
        "planter",
        "ln -s / /data/up; ln -s /etc /data/etc; mkdir /data/ok",
    );
    planter.mounts = vec![volume("/data", "shared")];
    client.run(planter).await;
    for (sub_path, fits) in [
        ("ok", true),
        ("new/dir", true),
        ("up", false),
        ("up/etc", false),
        ("etc", false),
        ("../x", false),
    ] {
        let mut request = shell("sub", "true");
        request.mounts = vec![v1::Mount {
            sub_path: sub_path.into(),
            ..volume("/data", "shared")
        }];
        let created = client.create_container(request, SOON).await;
        assert_eq!(created.is_ok(), fits, "{sub_path}: {created:?}");
        client.remove("sub").await;
    }
}

async fn limits(client: &AgentClient) {
    println!("limits");
    let mut hog = shell("hog", "dd if=/dev/zero of=/dev/null bs=200M count=1");
    hog.resources = Some(v1::Resources {
        memory_limit: 24 << 20,
        pids_limit: 20,
        cpu_shares: 512,
        ..Default::default()
    });
    let outcome = client.run(hog).await;
    assert!(
        outcome.exit.code == 137 && outcome.exit.oom_killed,
        "{outcome:?}"
    );
    let mut forks = shell(
        "forks",
        "i=0; while [ $i -lt 50 ]; do sleep 100 & i=$((i+1)); done",
    );
    forks.resources = Some(v1::Resources {
        pids_limit: 10,
        ..Default::default()
    });
    let outcome = client.run(forks).await;
    assert!(outcome.stderr.contains("can't fork"), "{outcome:?}");
    client.create(shell("stats", "sleep 1000")).await;
    client.start("stats").await;
    let stats = client
        .stats(v1::StatsRequest::default(), SOON)
        .await
        .unwrap();
    assert!(
        stats.memory_total > 100 << 20 && stats.memory_available > 0,
        "{stats:?}"
    );
    let own = &stats.containers[0];
    assert!(
        own.id == "stats" && own.pids == 1 && own.memory_usage > 0 && own.cpu_usage_nanos > 0,
        "{stats:?}"
    );
    client.remove("stats").await;
}

#[tokio::test]
async fn nothing_is_lost_over_connections() {
    group(async |vm| {
        // Remains of a session that never was.
        let mut raw = vm.stream().await;
        raw.write_all(&[0x1e; 1000]).await.unwrap();
        raw.write_all(b"\x1eHNSYNC1 00").await.unwrap();
        drop(raw);
        let client = vm.connect().await;
        let request = v1::ConfigureSandboxRequest {
            share_process_namespace: true,
            ..sandbox(0)
        };
        client
            .configure_sandbox(request.clone(), SOON)
            .await
            .unwrap();

        // More output than the ring holds, read over three connections, one of which dies mid-stream.
        let mut writer = shell("writer", "seq 1 100000; echo done >&2");
        writer.output_buffer = 64 * 1024;
        client.create(writer).await;
        client.start("writer").await;
        let mut text = Vec::new();
        read_some(&client, &mut text, 100_000, true).await;
        let acknowledged = text.len();
        read_some(&client, &mut text, 30_000, false).await;
        assert!(text.len() > acknowledged);
        drop(client);

        let client = vm.connect().await;
        assert!(client.hello().configured);
        client.configure_sandbox(request, SOON).await.unwrap();
        // What was read but not acknowledged is still there.
        text.truncate(acknowledged);
        read_some(&client, &mut text, usize::MAX, true).await;
        let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
        assert!(
            text == expected.as_bytes(),
            "{} of {} bytes",
            text.len(),
            expected.len()
        );
        assert_eq!(client.wait("writer").await.code, 0);
        client.remove("writer").await;

        second_reader(&client).await;
        files(&client).await;
        orphans(&client).await;
        drop(client.shutdown(v1::ShutdownRequest {}, SOON).await);
        vm.ended().await;
    })
    .await;
}

/// Reads standard output on from what there is, until there is `more`.
async fn read_some(client: &AgentClient, text: &mut Vec<u8>, more: usize, acknowledge: bool) {
    let end = text.len().saturating_add(more);
    let (acks, queue) = mpsc::channel(16);
    acks.send(ack("writer", text.len() as u64, 0))
        .await
        .unwrap();
    let mut chunks = client
        .client()
        .output(ReceiverStream::new(queue))
        .await
        .unwrap()
        .into_inner();
    while text.len() < end {
        let Some(chunk) = timeout(SOON, chunks.message()).await.unwrap().unwrap() else {
            break;
        };
        if chunk.stream() == v1::Stream::Stdout {
            assert_eq!(chunk.offset, text.len() as u64);
            text.extend(chunk.data);
        }
        if acknowledge {
            drop(acks.send(ack("writer", text.len() as u64, 0)).await);
        }
    }
    if acknowledge {
        // The guest has taken the acknowledgement when it answers a later call.
        client
            .stats(v1::StatsRequest::default(), SOON)
            .await
            .unwrap();
    }
}

async fn second_reader(client: &AgentClient) {
    println!("second reader");
    client.create(shell("talk", "echo hi; sleep 1000")).await;
    client.start("talk").await;
    let open = || {
        tokio_stream::StreamExt::chain(
            tokio_stream::iter([ack("talk", 0, 0)]),
            tokio_stream::pending(),
        )
    };
    let mut old = client.client().output(open()).await.unwrap().into_inner();
    assert_eq!(
        timeout(SOON, old.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .data,
        b"hi\n"
    );
    let mut new = client.client().output(open()).await.unwrap().into_inner();
    assert_eq!(
        timeout(SOON, new.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .data,
        b"hi\n"
    );
    assert_eq!(
        timeout(SOON, old.message())
            .await
            .unwrap()
            .unwrap_err()
            .code(),
        tonic::Code::Aborted
    );
    client.remove("talk").await;
}

async fn files(client: &AgentClient) {
    println!("files");
    let content = |text: &str| {
        let file = |path: &str| v1::File {
            path: path.into(),
            content: text.as_bytes().to_vec(),
            mode: 0o440,
            uid: 0,
        };
        v1::volume::Kind::Files(v1::FilesVolume {
            files: vec![file("a"), file("deep/b")],
            default_mode: 0,
            gid: Some(44),
        })
    };
    write_volume(client, "conf", content("start")).await;
    let script = "stat -c '%a %g' -L /v/a; echo ready; while :; do cd /v/..data/.; A=$(cat a 2>/dev/null); B=$(cat deep/b 2>/dev/null); \
        [ -n \"$A\" ] && [ -n \"$B\" ] && [ \"$A\" != \"$B\" ] && echo TORN $A $B; [ \"$A\" = end ] && break; done; cat /v/a /v/deep/b";
    let mut reader = shell("reader", script);
    reader.mounts = vec![v1::Mount {
        readonly: true,
        ..volume("/v", "conf")
    }];
    client.create(reader).await;
    client.start("reader").await;
    client.until_output("reader", "ready").await;
    for version in 0..100 {
        write_volume(client, "conf", content(&version.to_string())).await;
    }
    write_volume(client, "conf", content("end")).await;
    assert_eq!(client.wait("reader").await.code, 0);
    let (stdout, _) = client.output("reader").await;
    assert_eq!(String::from_utf8_lossy(&stdout), "440 44\nready\nendend");
    client.remove("reader").await;
}

async fn orphans(client: &AgentClient) {
    println!("orphans");
    let script =
        "i=0; while [ $i -lt 1000 ]; do ( ( : ) & ); i=$((i+1)); done; echo made; sleep 1000";
    client.create(shell("forker", script)).await;
    client.start("forker").await;
    client.until_output("forker", "made").await;
    // The pod's processes are in one namespace, whose first process is nobody's container.
    let clean = "n=0; while grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null | grep -q .; do sleep 0.1; n=$((n+1)); test $n -lt 300 || exit 1; done; cat /proc/1/comm";
    assert_ne!(sh(client, "forker", clean).await, "sh");
    client
        .create(shell("neighbour", "ps -o args | grep -c 'sleep 100[0]'"))
        .await;
    client.start("neighbour").await;
    assert_eq!(client.wait("neighbour").await.code, 0);
    client.remove("neighbour").await;
    client.remove("forker").await;
}

#[tokio::test]
async fn containers_can_have_a_root_of_their_own() {
    Box::pin(group(async |vm| {
        let client = vm.connect().await;
        let ids = Some(v1::IdMapping {
            first: 100_000,
            count: 65_536,
        });
        let request = v1::ConfigureSandboxRequest {
            user_namespace: Some(v1::UserNamespace {
                uids: ids,
                gids: ids,
            }),
            ..sandbox(SCRATCH)
        };
        let bad = v1::ConfigureSandboxRequest {
            user_namespace: Some(v1::UserNamespace::default()),
            ..request.clone()
        };
        let refused = client.configure_sandbox(bad, SOON).await;
        assert_eq!(code_of(refused), tonic::Code::InvalidArgument);
        client.configure_sandbox(request, SOON).await.unwrap();
        owners(&client).await;
        rights(&client).await;
        drop(client.shutdown(v1::ShutdownRequest {}, SOON).await);
        vm.ended().await;
        let console = vm.console();
        assert!(!console.contains("cannot"), "{console}");
    }))
    .await;
}

/// Of everything that a container sees its root is the owner, as of an image without namespace.
async fn owners(client: &AgentClient) {
    println!("owners");
    for (name, memory) in [("disk", false), ("memory", true)] {
        let empty = v1::EmptyDir {
            memory,
            ..Default::default()
        };
        write_volume(client, name, v1::volume::Kind::EmptyDir(empty)).await;
    }
    let file = |path: &str, uid| v1::File {
        path: path.into(),
        content: b"text".to_vec(),
        mode: 0o600,
        uid,
    };
    let config = v1::FilesVolume {
        files: vec![file("root", 0), file("web", 33)],
        ..Default::default()
    };
    write_volume(client, "config", v1::volume::Kind::Files(config)).await;
    let script = "tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; id -u; \
        echo more >> /etc/passwd; mkdir /new; touch /disk/a /memory/a /sub/a; \
        for f in / /bin/busybox /etc/passwd /etc/hosts /new /made /made/here /dev /dev/null /dev/shm \
            /disk /disk/a /memory /memory/a /sub /sub/a /config/root /config/web /end; \
        do stat -Lc '%n %u:%g' $f; done | grep -v ' 0:0$'; \
        cat /config/root /etc/hosts; echo said > /end; echo 'mine' > /etc/hosts && cat /etc/hosts";
    let mut request = shell("owners", script);
    request.process.as_mut().unwrap().cwd = "/made/here".into();
    request.termination_path = "/end".into();
    request.mounts = vec![
        volume("/disk", "disk"),
        volume("/memory", "memory"),
        volume("/config", "config"),
        v1::Mount {
            sub_path: "below/it".into(),
            ..volume("/sub", "disk")
        },
    ];
    let outcome = client.run(request).await;
    assert_eq!(
        outcome.stdout,
        " 0 100000 65536\n 0 100000 65536\n0\n/config/web 33:0\ntext127.0.0.1 localhost me\nmine\n",
        "{outcome:?}"
    );
    let mut web = shell(
        "web",
        "id; touch /disk/web; stat -Lc %u:%g /disk/web /disk/a /proc/self; echo > /dev/stdout",
    );
    web.mounts = vec![volume("/disk", "disk")];
    web.process.as_mut().unwrap().user = Some(v1::User {
        username: "web".into(),
        ..Default::default()
    });
    let opened = shell("open", "chmod 777 /disk");
    let mounts = web.mounts.clone();
    client
        .run(v1::CreateContainerRequest { mounts, ..opened })
        .await;
    let outcome = client.run(web).await;
    assert_eq!(
        outcome.stdout, "uid=33(web) gid=33(web) groups=44(logs)\n33:33\n0:0\n33:33\n\n",
        "{outcome:?}"
    );
    let mut beyond = shell("beyond", "true");
    beyond.process.as_mut().unwrap().user = Some(v1::User {
        uid: 70_000,
        ..Default::default()
    });
    let refused = client.create_container(beyond, SOON).await;
    assert_eq!(code_of(refused), tonic::Code::InvalidArgument);
}

/// Its root may do what the capabilities say, in its own namespaces and nowhere else.
async fn rights(client: &AgentClient) {
    println!("rights");
    let script = "ping -c 1 -W 5 127.0.0.1 > /dev/null && echo ping; ip -o addr show dev eth0 | grep -c 10.1.2.3; \
        hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ls /sys/class/net | grep eth0; \
        grep -E 'CapEff|Seccomp:' /proc/self/status | tr '\\t\\n' '  '";
    let outcome = client.run(shell("net", script)).await;
    assert_eq!(
        outcome.stdout, "ping\n1\npod-1\n80\neth0\nCapEff: 00000000a80425fb Seccomp: 2 ",
        "{outcome:?}"
    );
    let stats = client
        .stats(v1::StatsRequest::default(), SOON)
        .await
        .unwrap();
    assert_eq!(stats.interfaces[0].name, "eth0");

    let script = "mount -t tmpfs x /tmp && echo mounted; umount /etc/hosts 2> /dev/null || echo locked; \
        ip link set eth0 mtu 1400 && echo network; hostname other && hostname; hostname pod-1; \
        echo 1 > /proc/sys/kernel/panic || echo kernel; mknod /tmp/n c 1 3 || echo node; \
        head -c 1 /dev/sda > /dev/null || echo disk";
    let mut privileged = shell("privileged", script);
    privileged.privileged = true;
    let outcome = client.run(privileged).await;
    assert_eq!(
        outcome.stdout, "mounted\nlocked\nnetwork\nother\nkernel\nnode\ndisk\n",
        "{outcome:?}"
    );

    client.create(shell("host", "sleep 1000")).await;
    client.start("host").await;
    let all =
        "tr -s ' ' < /proc/self/uid_map; id -u; echo x > /made; stat -c %u /made; tty || true";
    assert_eq!(
        sh(client, "host", all).await,
        "0 100000 65536\n0\n0\nnot a tty"
    );
    let mut process = process(&["sh", "-c", "stat -c %u:%g $(tty); echo > /dev/tty"]);
    process.tty = true;
    let (stdout, _, exit) = Exec::start(client, "host", process, false)
        .await
        .finish()
        .await;
    assert_eq!((stdout.trim(), exit.code), ("0:5", 0), "{stdout}");
    client.remove("host").await;
}

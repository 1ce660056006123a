//! Clients in other languages, and suites of clients that nobody here wrote, against the real daemon.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of a test fail by panic and report by print"
)]

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout, tool, workspace_root,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);

fn clients() -> PathBuf {
    workspace_root().join("tests/clients")
}

/// What a suite's program printed, whether it has succeeded or not.
fn report(command: &mut Command) -> (bool, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

// === Python ===

/// Tests of the Python client that no server of this version can pass.
const PYTHON_EXCLUDED: &[(&str, &str)] = &[
    (
        "test_cluster_custom_resources",
        "defines its resource in apiextensions.k8s.io/v1beta1, which went with Kubernetes 1.22",
    ),
    (
        "test_namespaced_custom_resources",
        "defines its resource in apiextensions.k8s.io/v1beta1, which went with Kubernetes 1.22",
    ),
    (
        "test_async_namespaced_custom_resources",
        "defines its resource in apiextensions.k8s.io/v1beta1, which went with Kubernetes 1.22",
    ),
];

#[test]
fn the_python_client_passes_its_own_tests() {
    if !can_run_pods() {
        return;
    }
    let python = tool("python-clients").remove(0);
    let daemon = Daemon::start(DaemonOptions::default());
    let package = stdout(Command::new(&python).args([
        "-c",
        "import kubernetes, os; print(os.path.dirname(kubernetes.__file__))",
    ]));
    let mut command = Command::new(&python);
    command
        .args([
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "conftest",
            "-q",
            "--tb=short",
        ])
        .arg(Path::new(&package).join("dynamic/test_client.py"))
        .env("PYTHONPATH", clients().join("python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("KUBECONFIG", daemon.admin_kubeconfig())
        .env("HOME", daemon.dir())
        .current_dir(daemon.dir());
    let mut selected = Vec::new();
    for (name, why) in PYTHON_EXCLUDED {
        println!("not run: {name}: {why}");
        selected.push(format!("not {name}"));
    }
    command.args(["-k", &selected.join(" and ")]);
    let (passed, text) = report(&mut command);
    println!("{text}");
    assert!(passed && text.contains("9 passed, 3 deselected"), "{text}");
}

/// The operator of `tests/clients/python` in a process of its own.
struct Operator {
    child: Child,
    log: PathBuf,
}

impl Operator {
    fn start(python: &Path, daemon: &Daemon) -> Self {
        let log = daemon.dir().join("operator.log");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        let child = Command::new(python)
            .args([
                "-m",
                "kopf",
                "run",
                "--namespace",
                "default",
                "--standalone",
            ])
            .arg(clients().join("python/operator_under_test.py"))
            .env("KUBECONFIG", daemon.admin_kubeconfig())
            .env("HOME", daemon.dir())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!(
                "the operator's last lines:\n{}",
                lines[lines.len().saturating_sub(30)..].join("\n")
            );
        }
    }
}

fn greet(daemon: &Daemon, name: &str, whom: &str) {
    let file = daemon.dir().join("greeting.yaml");
    let text = format!(
        "apiVersion: clients.example.org/v1\nkind: Greeting\nmetadata: {{name: {name}}}\nspec: {{whom: {whom}}}\n"
    );
    std::fs::write(&file, text).unwrap();
    run(daemon.kubectl(&["apply", "-f"]).arg(&file));
}

/// Waits until resource, status and what the operator has made of them agree.
fn greeted(daemon: &Daemon, name: &str, text: &str) {
    eventually(&format!("{name} is greeted"), LIMIT, || {
        let status = daemon
            .kubectl(&[
                "get",
                "greeting",
                name,
                "-o",
                "jsonpath={.status.text} {.status.observedGeneration} {.metadata.generation}",
            ])
            .output()
            .unwrap();
        let map = daemon
            .kubectl(&[
                "get",
                "configmap",
                &format!("greeting-{name}"),
                "-o",
                "jsonpath={.data.text}",
            ])
            .output()
            .unwrap();
        let (status, map) = (
            String::from_utf8_lossy(&status.stdout).into_owned(),
            String::from_utf8_lossy(&map.stdout).into_owned(),
        );
        let whole = status.strip_prefix(text).is_some_and(|rest| {
            let numbers: Vec<&str> = rest.split_whitespace().collect();
            matches!(numbers.as_slice(), [seen, is] if seen == is)
        });
        if whole && map == text {
            Ok(())
        } else {
            Err(format!("status {status:?}, map {map:?}"))
        }
    });
}

fn gone(daemon: &Daemon, what: &[&str]) {
    eventually(&format!("{what:?} is gone"), LIMIT, || {
        let found = stdout(
            &mut daemon.kubectl(&[&["get", "--ignore-not-found", "-o", "name"], what].concat()),
        );
        if found.is_empty() { Ok(()) } else { Err(found) }
    });
}

#[test]
fn an_operator_in_python_loses_nothing_over_crashes() {
    if !can_run_pods() {
        return;
    }
    let python = tool("python-clients").remove(0);
    let mut daemon = Daemon::start(DaemonOptions::default());
    run(daemon
        .kubectl(&["apply", "-f"])
        .arg(clients().join("python/greetings.yaml")));
    run(&mut daemon.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd/greetings.clients.example.org",
        "--timeout=30s",
    ]));
    let mut operator = Operator::start(&python, &daemon);
    greet(&daemon, "one", "ann");
    greeted(&daemon, "one", "hello ann");
    let finalizers = stdout(&mut daemon.kubectl(&[
        "get",
        "greeting",
        "one",
        "-o",
        "jsonpath={.metadata.finalizers}",
    ]));
    assert_eq!(finalizers, r#"["clients.example.org/operator"]"#);
    let table = stdout(&mut daemon.kubectl(&["get", "gr", "one", "--no-headers"]));
    assert_eq!(
        table.split_whitespace().collect::<Vec<_>>(),
        ["one", "ann", "hello", "ann"],
        "{table}"
    );

    // The server is killed; the watch goes on where it was, and what is new comes.
    daemon.kill();
    daemon.start_again();
    greet(&daemon, "two", "bob");
    greet(&daemon, "one", "eve");
    greeted(&daemon, "two", "hello bob");
    greeted(&daemon, "one", "hello eve");

    // Killed right after a write that it has acknowledged: the event is not lost. The operator stands
    // still meanwhile: of its own write, whose answer is lost, it takes the event for a conflict and
    // waits for another, which never comes.
    operator.signal(rustix::process::Signal::STOP);
    greet(&daemon, "three", "joe");
    daemon.kill();
    daemon.start_again();
    operator.signal(rustix::process::Signal::CONT);
    greeted(&daemon, "three", "hello joe");

    // Deletions wait for the operator, also when both have been away.
    operator.kill();
    run(&mut daemon.kubectl(&["delete", "greeting", "one", "--wait=false"]));
    greet(&daemon, "two", "max");
    daemon.kill();
    daemon.start_again();
    let held = stdout(&mut daemon.kubectl(&[
        "get",
        "greeting",
        "one",
        "-o",
        "jsonpath={.metadata.deletionTimestamp}",
    ]));
    assert!(!held.is_empty(), "the finalizer holds it");
    let _second = Operator::start(&python, &daemon);
    gone(&daemon, &["greeting", "one"]);
    gone(&daemon, &["configmap", "greeting-one"]);
    greeted(&daemon, "two", "hello max");
    run(&mut daemon.kubectl(&["delete", "greeting", "--all", "--timeout=60s"]));
    gone(&daemon, &["configmap", "greeting-two", "greeting-three"]);
}

// === JavaScript ===

/// The informer of `tests/clients/node`, and what it has said.
struct Informer {
    child: Child,
    stdin: ChildStdin,
    said: Receiver<Value>,
    waiting: VecDeque<Value>,
}

impl Informer {
    fn start(namespace: &str, selector: &str, kubeconfig: &Path, daemon: &Daemon) -> Self {
        let paths = tool("node-clients");
        // Modules are looked for beside the program.
        let program = daemon.dir().join("informer.mjs");
        std::fs::copy(clients().join("node/informer.mjs"), &program).unwrap();
        std::os::unix::fs::symlink(&paths[1], daemon.dir().join("node_modules")).unwrap();
        let mut child = Command::new(&paths[0])
            .arg(program)
            .args([namespace, selector])
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (out, said) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Ok(value) = serde_json::from_str(&line) else {
                    continue;
                };
                if out.send(value).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take().unwrap();
        Self {
            child,
            stdin,
            said,
            waiting: VecDeque::new(),
        }
    }

    /// The next line that is wanted; others are kept for later.
    fn hear(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        if let Some(at) = self.waiting.iter().position(&wanted) {
            return self.waiting.remove(at).unwrap();
        }
        loop {
            let Ok(line) = self.said.recv_timeout(LIMIT) else {
                panic!("{what}: not heard; there were {:?}", self.waiting);
            };
            if wanted(&line) {
                return line;
            }
            self.waiting.push_back(line);
        }
    }

    fn event(&mut self, event: &str, name: &str, value: &str) -> Value {
        self.hear(&format!("{event} {name} {value}"), |line| {
            line["event"] == event && line["name"] == name && line["value"] == value
        })
    }

    fn command(&mut self, text: &str) {
        writeln!(self.stdin, "{text}").unwrap();
    }
}

impl Drop for Informer {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn an_informer_in_javascript_sees_everything_over_a_crash() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let kubeconfig = daemon.tenant("acme", "10.90.0.0/24");
    let k = |daemon: &Daemon, args: &[&str]| stdout(&mut daemon.kubectl_as(&kubeconfig, args));
    k(
        &daemon,
        &[
            "run",
            "box",
            &format!("--image={}", registry.image("busybox:1")),
            "--",
            "sleep",
            "infinity",
        ],
    );
    let put = |daemon: &Daemon, name: &str, value: &str| {
        k(
            daemon,
            &[
                "create",
                "configmap",
                name,
                &format!("--from-literal=value={value}"),
            ],
        );
        k(daemon, &["label", "configmap", name, "seen=yes"]);
    };
    let change = |daemon: &Daemon, name: &str, value: &str| {
        let patch = format!(r#"{{"data":{{"value":"{value}"}}}}"#);
        k(daemon, &["patch", "configmap", name, "-p", &patch]);
    };
    put(&daemon, "before", "1");
    let mut informer = Informer::start("acme", "seen=yes", &kubeconfig, &daemon);
    informer.event("add", "before", "1");
    put(&daemon, "after", "1");
    informer.event("add", "after", "1");
    change(&daemon, "after", "2");
    informer.event("update", "after", "2");
    // What is not selected any more is gone for it.
    k(&daemon, &["label", "configmap", "before", "seen-"]);
    informer.hear("delete before", |line| {
        line["event"] == "delete" && line["name"] == "before"
    });

    daemon.kill();
    daemon.start_again();
    change(&daemon, "after", "3");
    informer.event("update", "after", "3");
    put(&daemon, "later", "1");
    informer.event("add", "later", "1");
    k(&daemon, &["delete", "configmap", "after"]);
    informer.hear("delete after", |line| {
        line["event"] == "delete" && line["name"] == "after"
    });

    // Through a WebSocket, into a pod that has outlived the daemon.
    k(
        &daemon,
        &["wait", "--for=condition=Ready", "pod/box", "--timeout=200s"],
    );
    informer.command("exec box through the socket");
    let exec = informer.hear("exec", |line| line["event"] == "exec");
    assert_eq!(
        exec["out"],
        "through the socketto stderr\n"
            .strip_suffix("to stderr\n")
            .unwrap(),
        "{exec}"
    );
    assert_eq!(exec["status"], "Failure", "{exec}");
    assert_eq!(exec["causes"][0]["message"], "3", "{exec}");
    informer.command("stop");
    eventually("the informer ends", LIMIT, || {
        let ended = informer.child.try_wait().unwrap();
        ended.map(|_| ()).ok_or_else(|| "it runs".to_owned())
    });
}

// === the crates of kube ===

/// Tests of the crates that do not hold here.
const KUBE_EXCLUDED: &[(&str, &str)] = &[
    (
        "test::pod_can_exec_and_write_to_stdin_from_node_proxy",
        "asks a kubelet's own port for an exec; the node agent has none",
    ),
    (
        "events::test::event_recorder_attaches_events_without_namespace",
        "asks for the ComponentStatus of a scheduler: deprecated with Kubernetes 1.19, and not served",
    ),
];

#[test]
fn the_kube_crates_pass_their_own_tests() {
    if !can_run_pods() {
        return;
    }
    let programs = tool("kube-tests");
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    daemon.wait_template();
    let mut total = 0;
    for program in programs {
        let name = program.file_name().unwrap().to_string_lossy().into_owned();
        let sources = program.parent().unwrap().parent().unwrap().join(&name);
        let mut command = Command::new(&program);
        // Some wait for a moment that their pod must have started in: not all at a time.
        command
            .args(["--ignored", "--test-threads=1"])
            .current_dir(sources)
            .env("KUBECONFIG", daemon.admin_kubeconfig())
            .env("BUSYBOX", registry.image("busybox:1"))
            .env("HOME", daemon.dir());
        for (test, why) in KUBE_EXCLUDED {
            println!("not run: {test}: {why}");
            command.args(["--skip", test]);
        }
        let (passed, text) = report(&mut command);
        println!("{name}:\n{text}");
        assert!(passed, "{name}:\n{text}");
        total += text.lines().filter(|line| line.ends_with("... ok")).count();
    }
    assert!(total >= 28, "{total} tests were run");
}

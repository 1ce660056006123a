//! Services, their names and ports of the node, as pods of two tenants with the same addresses see
//! them.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is one module"
)]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use hypernetes_testkit::{Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, stdout};

const PATIENCE: Duration = Duration::from_secs(120);
/// Of the service `echo` in both tenants.
const CLUSTER_IP: &str = "10.96.100.1";

/// A member of a tenant.
struct Member<'a> {
    daemon: &'a Daemon,
    kubeconfig: PathBuf,
}

impl Member<'_> {
    fn kubectl(&self, args: &[&str]) -> Command {
        self.daemon.kubectl_as(&self.kubeconfig, args)
    }

    fn create(&self, name: &str, manifest: &str) -> Output {
        let file = self.daemon.dir().join(name);
        fs::write(&file, manifest).unwrap();
        self.kubectl(&["create", "-f"]).arg(&file).output().unwrap()
    }

    fn made(&self, name: &str, manifest: &str) {
        let output = self.create(name, manifest);
        assert!(output.status.success(), "{output:?}");
    }

    /// What a script prints in a pod; empty if it fails.
    fn inside(&self, pod: &str, script: &str) -> String {
        let output = self
            .kubectl(&["exec", pod, "--", "sh", "-c", script])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Waits until a script prints what `good` likes.
    fn until(&self, pod: &str, script: &str, good: impl Fn(&str) -> bool) -> String {
        eventually(script, PATIENCE, || {
            let text = self.inside(pod, script);
            if good(&text) { Ok(text) } else { Err(text) }
        })
    }

    fn ready(&self, pods: &[&str]) {
        let mut args = vec!["wait", "--for=condition=Ready", "--timeout=240s", "pod"];
        args.extend(pods);
        run(&mut self.kubectl(&args));
    }
}

fn pod(name: &str, image: &str, app: &str, script: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {app}}}}}\nspec:\n  \
         hostname: {name}-host\n  subdomain: peers\n  terminationGracePeriodSeconds: 1\n  \
         containers:\n  - name: main\n    image: {image}\n    command: [sh, -c, '{script}']\n    \
         ports: [{{name: line, containerPort: 7777}}]\n---\n"
    )
}

fn echo(name: &str, image: &str) -> String {
    let script = format!("netprobe udp-echo 53 {name} & exec netprobe tcp-echo 7777 {name}");
    pod(name, image, "echo", &script)
}

fn services() -> String {
    let service = |name: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  selector: {{app: \
             echo}}\n  ports:\n  - {{name: line, port: 80, targetPort: line}}\n  - {{name: dns, \
             port: 53, protocol: UDP}}\n{more}---\n"
        )
    };
    service("echo", &format!("  clusterIP: {CLUSTER_IP}\n"))
        + &service("sticky", "  sessionAffinity: ClientIP\n")
        + &service("peers", "  clusterIP: None\n")
}

/// Ten answers, each once, in order.
const MANY: &str = "netprobe tcp echo 80 x 10 | sort -u | tr '\\n' ' '";

#[test]
fn services_of_two_tenants_with_the_same_addresses() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let tenants = ["acme", "globex"].map(|name| daemon.tenant(name, "10.99.0.0/24"));
    let image = registry.image("net:1");
    both_serve(&daemon, &tenants, &image);
    let [acme, globex] = &tenants;
    names(&daemon, acme, globex);
    addresses(&daemon, acme);
    node_ports(&daemon, acme, globex);
    api_server(&daemon, acme);
    changes(&mut daemon, acme);
    for name in ["acme", "globex"] {
        run(&mut daemon.hypernetes(&["tenant", "delete", name]));
    }
    eventually("nothing is left", Duration::from_secs(30), || {
        let picture = daemon.host_picture();
        picture
            .is_clean()
            .then_some(())
            .ok_or(format!("{picture:?}"))
    });
}

fn member<'a>(daemon: &'a Daemon, kubeconfig: &Path) -> Member<'a> {
    Member {
        daemon,
        kubeconfig: kubeconfig.to_owned(),
    }
}

fn both_serve(daemon: &Daemon, tenants: &[PathBuf; 2], image: &str) {
    let [acme, globex] = [0, 1].map(|index| member(daemon, &tenants[index]));
    for one in [&acme, &globex] {
        one.made("services.yaml", &services());
    }
    let client = pod("box", image, "client", "sleep infinity");
    acme.made(
        "acme.yaml",
        &(echo("one", image) + &echo("two", image) + &client),
    );
    globex.made("globex.yaml", &(echo("three", image) + &client));
    acme.ready(&["one", "two", "box"]);
    globex.ready(&["three", "box"]);

    acme.until("box", MANY, |text| text == "one x two x");
    globex.until("box", MANY, |text| text == "three x");
    let by_udp = "netprobe udp echo 53 x 10 | sort -u | tr '\\n' ' '";
    acme.until("box", by_udp, |text| text == "one x two x");
    globex.until("box", by_udp, |text| text == "three x");
    // To itself, by the service's address.
    acme.until("one", MANY, |text| text == "one x two x");
    let sticky = MANY.replace("echo 80", "sticky 80");
    let text = acme.until("box", &sticky, |text| !text.is_empty());
    assert!(text == "one x" || text == "two x", "{text}");
    // A port that the service has not.
    let refused = acme.inside("box", "netprobe tcp echo 81 x 2>&1");
    assert!(refused.contains("refused"), "{refused}");
    let env = acme.inside("box", "env");
    for line in [
        format!("ECHO_SERVICE_HOST={CLUSTER_IP}"),
        "ECHO_SERVICE_PORT_DNS=53".to_owned(),
        "KUBERNETES_SERVICE_HOST=10.96.0.1".to_owned(),
    ] {
        assert!(env.lines().any(|one| one == line), "{line}: {env}");
    }
}

fn names(daemon: &Daemon, acme: &Path, globex: &Path) {
    let (acme, globex) = (member(daemon, acme), member(daemon, globex));
    let dns = |who: &Member<'_>, kind: &str, name: &str| {
        let text = who.inside("box", &format!("netprobe dns {kind} {name}"));
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let domain = "acme.svc.cluster.local";
    let peers = |name: &str| format!("SRV 7777 {name}-host.peers.{domain}");
    assert_eq!(
        dns(&acme, "SRV", &format!("_line._tcp.peers.{domain}")),
        ["NOERROR".to_owned(), peers("one"), peers("two")]
    );
    assert_eq!(
        dns(&acme, "A", &format!("peers.{domain}")).len(),
        3,
        "a headless service is its pods"
    );
    assert_eq!(
        dns(&acme, "A", &format!("one-host.peers.{domain}")).len(),
        2
    );
    assert_eq!(
        dns(&acme, "SRV", &format!("_dns._udp.echo.{domain}")),
        ["NOERROR".to_owned(), format!("SRV 53 echo.{domain}")]
    );
    let reverse = "1.100.96.10.in-addr.arpa";
    assert_eq!(dns(&acme, "PTR", reverse)[1], format!("PTR echo.{domain}"));
    assert_eq!(
        dns(&globex, "PTR", reverse)[1],
        "PTR echo.globex.svc.cluster.local"
    );
    // By the search list, as programs ask.
    for name in ["echo", "echo.acme", "echo.acme.svc"] {
        let text = acme.inside("box", &format!("netprobe tcp {name} 80 x"));
        assert!(text.ends_with(" x"), "{name}: {text}");
    }
    // Foreign names are nowhere.
    for name in ["echo", "peers", "one-host.peers", "_line._tcp.peers"] {
        for kind in ["A", "SRV"] {
            assert_eq!(
                dns(&globex, kind, &format!("{name}.{domain}")),
                ["NXDOMAIN"],
                "{kind} {name}"
            );
        }
    }
}

fn addresses(daemon: &Daemon, acme: &Path) {
    let acme = member(daemon, acme);
    let shown = stdout(&mut acme.kubectl(&["get", "service", "echo", "--no-headers"]));
    let words: Vec<&str> = shown.split_whitespace().collect();
    assert_eq!(
        words[..5],
        ["echo", "ClusterIP", CLUSTER_IP, "<none>", "80/TCP,53/UDP"]
    );
    let service = |spec: &str| {
        let text =
            format!("{{apiVersion: v1, kind: Service, metadata: {{name: more}}, spec: {spec}}}");
        let output = acme.create("more.yaml", &text);
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    for (spec, why) in [
        (
            format!("{{clusterIP: {CLUSTER_IP}, ports: [{{port: 80}}]}}"),
            "failed to allocate IP 10.96.100.1: provided IP is already allocated",
        ),
        (
            "{clusterIP: 10.97.0.1, ports: [{port: 80}]}".to_owned(),
            "is not in the valid range. The range of valid IPs is 10.96.0.0/16",
        ),
        (
            "{type: NodePort, ports: [{port: 80}]}".to_owned(),
            "spec.type: NodePort: the tenant may not have ports of the node",
        ),
        (
            "{externalIPs: [192.0.2.1], ports: [{port: 80}]}".to_owned(),
            "spec.externalIPs: is not supported",
        ),
    ] {
        let (ok, text) = service(&spec);
        assert!(!ok && text.contains(why), "{spec}: {text}");
    }
    let (ok, text) = service("{type: LoadBalancer, ports: [{port: 80}]}");
    assert!(ok, "{text}");
    let shown = stdout(&mut acme.kubectl(&["get", "service", "more", "--no-headers"]));
    assert!(shown.contains("<pending>"), "{shown}");
    run(&mut acme.kubectl(&["delete", "service", "more"]));
}

/// What a service says at a port of the node; empty if nobody is there.
fn at_node(port: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(format!("127.0.0.1:{port}")) else {
        return String::new();
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let mut line = String::new();
    let said = stream.write_all(b"x\n").and_then(|()| {
        let mut reader = BufReader::new(&stream);
        reader.read_line(&mut line)
    });
    said.map_or(String::new(), |_length| line.trim().to_owned())
}

fn node_ports(daemon: &Daemon, acme: &Path, globex: &Path) {
    let (acme, globex) = (member(daemon, acme), member(daemon, globex));
    let service = |name: &str| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{type: NodePort, \
             selector: {{app: echo}}, ports: [{{port: 80, targetPort: line}}]}}}}"
        )
    };
    let allow = |count: &str| {
        let patch = format!("{{\"spec\":{{\"nodePorts\":{count}}}}}");
        run(&mut daemon.kubectl(&["patch", "tenant", "acme", "--type=merge", "-p", &patch]));
    };
    allow("1");
    eventually("the tenant may", PATIENCE, || {
        let output = acme.create("door.yaml", &service("door"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(text)
    });
    let second = acme.create("more.yaml", &service("more"));
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains("exceeded quota: node-ports"), "{text}");
    let foreign = globex.create("door.yaml", &service("door"));
    let text = String::from_utf8_lossy(&foreign.stderr);
    assert!(text.contains("spec.nodePorts"), "{text}");

    let shown = |path: &str| stdout(&mut acme.kubectl(&["get", "service", "door", "-o", path]));
    let port = shown("jsonpath={.spec.ports[0].nodePort}");
    let listed = stdout(&mut acme.kubectl(&["get", "service", "door", "--no-headers"]));
    assert!(listed.contains(&format!("80:{port}/TCP")), "{listed}");
    for who in ["one x", "two x"] {
        eventually(&format!("{who} at the node"), PATIENCE, || {
            let text = at_node(&port);
            (text == who).then_some(()).ok_or(text)
        });
    }
    run(&mut acme.kubectl(&["delete", "service", "door"]));
    eventually("the port is closed", PATIENCE, || {
        TcpStream::connect(format!("127.0.0.1:{port}"))
            .map_or(Ok(()), |_stream| Err("it is open".to_owned()))
    });
    allow("null");
    eventually("the tenant may not", PATIENCE, || {
        let output = acme.create("door.yaml", &service("door"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (!output.status.success()).then_some(()).ok_or_else(|| {
            run(&mut acme.kubectl(&["delete", "service", "door"]));
            text
        })
    });
}

fn api_server(daemon: &Daemon, acme: &Path) {
    // Plain text is answered with an alert (21) of TLS 1.2's record layer: it is the API server.
    let acme = member(daemon, acme);
    let ask = "netprobe tcp kubernetes.default.svc 443 hello | od -A n -t u1 | head -n 1";
    acme.until("box", ask, |text| text.starts_with("21 "));
    let view = |path: &str| {
        stdout(&mut daemon.kubectl(&["config", "view", "--raw", "-o", &format!("jsonpath={path}")]))
    };
    let server = view("{.clusters[0].cluster.server}");
    let port = server.rsplit(':').next().unwrap();
    let authority = daemon.dir().join("ca.pem");
    let decoded = stdout(Command::new("bash").args([
        "-c",
        "echo \"$0\" | base64 -d",
        &view("{.clusters[0].cluster.certificate-authority-data}"),
    ]));
    fs::write(&authority, decoded).unwrap();
    for name in ["kubernetes.default.svc", "10.96.0.1"] {
        let version = stdout(
            Command::new("curl")
                .args(["-sS", "--noproxy", "*", "--cacert"])
                .arg(&authority)
                .arg("--connect-to")
                .arg(format!("{name}:443:127.0.0.1:{port}"))
                .arg(format!("https://{name}/version")),
        );
        assert!(version.contains("gitVersion"), "{name}: {version}");
    }
}

fn changes(daemon: &mut Daemon, acme: &Path) {
    let lines = |daemon: &Daemon| {
        let text = stdout(&mut daemon.kubectl_as(acme, &["logs", "holder"]));
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let goes_on = |daemon: &Daemon, from: usize| {
        eventually("the connection goes on", PATIENCE, || {
            let now = lines(daemon);
            (now.len() > from + 3)
                .then_some(now)
                .ok_or_else(|| format!("{from} lines"))
        })
    };
    let holding = {
        let acme = member(daemon, acme);
        let image = stdout(&mut acme.kubectl(&[
            "get",
            "pod",
            "one",
            "-o",
            "jsonpath={.spec.containers[0].image}",
        ]));
        acme.made(
            "holder.yaml",
            &pod("holder", &image, "client", "exec netprobe hold echo 80"),
        );
        acme.ready(&["holder"]);
        goes_on(daemon, 0)
    };
    let who = holding[0].split(' ').next().unwrap().to_owned();
    let other = if who == "one" { "two" } else { "one" };
    {
        // The other endpoint goes, and the service gets another port.
        let acme = member(daemon, acme);
        run(&mut acme.kubectl(&["delete", "pod", other, "--now"]));
        let only = format!("{who} x");
        acme.until("box", MANY, |text| text == only);
        let port = r#"[{"op": "add", "path": "/spec/ports/-", "value": {"name": "more", "port": 81, "targetPort": "line"}}]"#;
        run(&mut acme.kubectl(&["patch", "service", "echo", "--type=json", "-p", port]));
        acme.until("box", "netprobe tcp echo 81 x", |text| text == only);
    }
    let before = goes_on(daemon, lines(daemon).len()).len();
    daemon.kill();
    daemon.start_again();
    let after = goes_on(daemon, before);
    let expected: Vec<String> = (1..=after.len()).map(|n| format!("{who} {n}")).collect();
    assert_eq!(after, expected, "one connection all the time");
    let acme = member(daemon, acme);
    acme.until("box", MANY, |text| text == format!("{who} x"));
    // Its last pod goes: connections are refused, not lost.
    run(&mut acme.kubectl(&["delete", "pod", &who, "--now"]));
    acme.until("box", "netprobe tcp echo 80 x 2>&1", |text| {
        text.contains("refused")
    });
}

/// A name server as clusters run it needs no more than what a pod gets that asks for nothing.
#[test]
fn a_name_server_lives_in_a_pod_of_the_default_size() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let tenant = daemon.tenant("acme", "10.99.0.0/24");
    let acme = member(&daemon, &tenant);
    let (server, client) = (registry.image("dns:1"), registry.image("net:1"));
    acme.made(
        "dns.yaml",
        &format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: names}}\nspec: {{clusterIP: {CLUSTER_IP}, \
             selector: {{app: names}}, ports: [{{port: 53, protocol: UDP}}]}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: names, labels: {{app: names}}}}\nspec:\n  \
             containers:\n  - name: dnsmasq\n    image: {server}\n    args: [dnsmasq, --keep-in-foreground, \
             --user=root, --no-resolv, --no-hosts, --cache-size=10000, \
             '--host-record=answer.example,192.0.2.7', '--address=/many.example/192.0.2.8']\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: box}}\nspec:\n  terminationGracePeriodSeconds: 1\n  \
             dnsPolicy: None\n  dnsConfig: {{nameservers: [{CLUSTER_IP}]}}\n  containers: [{{name: box, \
             image: {client}, command: [sleep, infinity]}}]\n"
        ),
    );
    acme.ready(&["names", "box"]);
    acme.until("box", "netprobe dns A answer.example", |text| {
        text.contains("192.0.2.7")
    });
    let many =
        "for i in $(seq 20); do netprobe dns A name-$i.many.example; done | grep -c 192.0.2.8";
    assert_eq!(acme.inside("box", many), "20");
    let state = stdout(&mut acme.kubectl(&[
        "get",
        "pod",
        "names",
        "-o",
        "jsonpath={.spec.containers[0].resources} {.status.containerStatuses[0].restartCount} \
         {.status.containerStatuses[0].ready}",
    ]));
    assert_eq!(state, "{} 0 true");
}

#[test]
fn ports_of_the_node() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let image = registry.image("web:1");
    let pod = |name: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{\
             terminationGracePeriodSeconds: 1, containers: [{{name: web, image: '{image}', ports: \
             [{{containerPort: 8080, hostPort: 28088}}]}}]}}}}"
        )
    };
    let fetch = || {
        let output = Command::new("curl")
            .args(["-sS", "--noproxy", "*", "--max-time", "5"])
            .arg("http://127.0.0.1:28088/")
            .output()
            .unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    {
        let admin = member(&daemon, &daemon.admin_kubeconfig());
        admin.made("web.yaml", &pod("web"));
        let page = eventually("the page is served", PATIENCE, fetch);
        assert!(page.contains("web:1"), "{page}");
        admin.made("second.yaml", &pod("second"));
        let events = [
            "get",
            "events",
            "--field-selector",
            "involvedObject.name=second",
        ];
        eventually("the conflict is told", PATIENCE, || {
            let text = stdout(&mut admin.kubectl(&events));
            match text.contains("didn't have free ports for the requested pod ports") {
                true => Ok(()),
                false => Err(text),
            }
        });
        run(&mut admin.kubectl(&["delete", "pod", "second", "--now"]));
    }
    daemon.kill();
    assert!(fetch().is_ok(), "without a daemon too");
    daemon.start_again();
    eventually("the page is served again", PATIENCE, fetch);
    run(&mut daemon.kubectl(&["delete", "pod", "web", "--now"]));
    assert!(fetch().is_err());
    eventually("nothing is left", Duration::from_secs(30), || {
        let picture = daemon.host_picture();
        picture
            .is_clean()
            .then_some(())
            .ok_or(format!("{picture:?}"))
    });
}

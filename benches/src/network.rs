//! Throughput of one TCP connection between pods, by a service's address, and from the node through
//! a port of its own, beside a veth pair between two namespaces of the host. In turns.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, eventually, run, stdout, workspace_root,
};
use serde_json::{Value, json};

use crate::stats::Samples;

/// Rounds, and seconds for which each pumps.
const ROUNDS: usize = 5;
const SECONDS: u64 = 4;
/// Of the node, and in the pod.
const HOST_PORT: u16 = 28_099;
const PORT: u16 = 5001;
const SERVICE: &str = "10.96.200.1";
const ADDRESSES: [&str; 2] = ["198.51.100.1", "198.51.100.2"];

/// Two namespaces with a link, and a sink in the second.
struct Floor {
    names: [String; 2],
    sink: Child,
}

fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split_whitespace()));
}

fn netprobe() -> String {
    let program = workspace_root().join("tests/images/netprobe.pl");
    program.display().to_string()
}

impl Floor {
    fn new() -> Result<Self> {
        let names = ["a", "b"].map(|end| format!("hnbench-{}-{end}", std::process::id()));
        let [a, b] = &names;
        for arguments in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("-n {a} link add e0 type veth peer name e0 netns {b}"),
            format!("-n {a} addr add {}/24 dev e0", ADDRESSES[0]),
            format!("-n {b} addr add {}/24 dev e0", ADDRESSES[1]),
            format!("-n {a} link set e0 up"),
            format!("-n {b} link set e0 up"),
        ] {
            ip(&arguments);
        }
        let sink = Command::new("ip")
            .args([
                "netns",
                "exec",
                b,
                "perl",
                &netprobe(),
                "sink",
                &PORT.to_string(),
            ])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start the floor's sink")?;
        Ok(Self { names, sink })
    }

    fn source(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[0], "perl", &netprobe()]);
        command.args(source(ADDRESSES[1], PORT));
        command
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        // Both end with the measurement, whatever came of it.
        self.sink.kill().ok();
        self.sink.wait().ok();
        for name in &self.names {
            Command::new("ip")
                .args(["netns", "delete", name])
                .status()
                .ok();
        }
    }
}

fn source(address: &str, port: u16) -> Vec<String> {
    vec![
        "source".to_owned(),
        address.to_owned(),
        port.to_string(),
        SECONDS.to_string(),
    ]
}

/// Megabits a second of a source that prints bytes and seconds.
fn pump(command: &mut Command) -> Result<f64> {
    let text = stdout(command);
    let mut words = text.split_whitespace();
    let mut number = || -> Result<f64> { Ok(words.next().context("no figure")?.parse()?) };
    let (bytes, seconds) = (number()?, number()?);
    Ok(bytes * 8.0 / seconds / 1e6)
}

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== network: one TCP connection, {SECONDS} s, {ROUNDS} times in turns");
    tokio::task::spawn_blocking(measure_blocking).await?
}

fn measure_blocking() -> Result<Value> {
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    let image = registry.image("net:1");
    let manifest = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: sink}}\nspec: {{clusterIP: {SERVICE}, \
         selector: {{app: sink}}, ports: [{{port: {PORT}}}]}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: sink, labels: {{app: sink}}}}\nspec: \
         {{containers: [{{name: c, image: '{image}', command: [netprobe, sink, '{PORT}'], ports: \
         [{{containerPort: {PORT}, hostPort: {HOST_PORT}}}]}}]}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: source}}\nspec: {{containers: [{{name: c, \
         image: '{image}', command: [sleep, infinity]}}]}}\n"
    );
    let file = daemon.dir().join("network.yaml");
    fs::write(&file, manifest)?;
    run(daemon.kubectl(&["create", "-f"]).arg(&file));
    let wait = [
        "wait",
        "--for=condition=Ready",
        "--timeout=240s",
        "pod/sink",
        "pod/source",
    ];
    run(&mut daemon.kubectl(&wait));
    let address =
        stdout(&mut daemon.kubectl(&["get", "pod", "sink", "-o", "jsonpath={.status.podIP}"]));
    let from_pod = |to: &str| {
        let mut command = daemon.kubectl(&["exec", "source", "--", "netprobe"]);
        command.args(source(to, PORT));
        command
    };
    eventually("the service is there", Duration::from_secs(60), || {
        let short = [
            "exec", "source", "--", "netprobe", "source", SERVICE, "5001", "0.1",
        ];
        let output = daemon.kubectl(&short).output();
        match output.is_ok_and(|output| output.status.success()) {
            true => Ok(()),
            false => Err("no connection".to_owned()),
        }
    });
    let from_node = || {
        let mut command = Command::new("perl");
        command.arg(netprobe()).args(source("127.0.0.1", HOST_PORT));
        command
    };
    let floor = Floor::new()?;
    eventually("the floor's sink listens", Duration::from_secs(10), || {
        let output = floor.source().arg("0").output();
        match output.is_ok_and(|output| output.status.success()) {
            true => Ok(()),
            false => Err("no connection".to_owned()),
        }
    });
    let names = ["veth", "pod_to_pod", "pod_to_service", "node_to_host_port"];
    let mut rates = names.map(|_name| Vec::new());
    for _round in 0..ROUNDS {
        let commands = [
            floor.source(),
            from_pod(&address),
            from_pod(SERVICE),
            from_node(),
        ];
        for (mut command, rates) in commands.into_iter().zip(&mut rates) {
            rates.push(pump(&mut command)?);
        }
    }
    let samples = rates.map(Samples::new);
    let base = samples[0].median();
    let mut out = json!({});
    for (name, samples) in names.iter().zip(&samples) {
        let ratio = samples.median() / base;
        println!(
            "{name:18} {} ratio {ratio:.3} (target 0.8)",
            samples.line("Mbit/s")
        );
        out[*name] = json!({"mbit_per_s": samples.json(), "ratio": ratio});
    }
    Ok(out)
}

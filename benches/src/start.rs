//! Request → first byte of a container's output, beside a bare boot and a bare restore, in turns.

use anyhow::{Context, Result};
use hypernetes_testkit::Registry;
use serde_json::{Value, json};

use crate::{
    bare::Bare,
    machine::accelerator,
    processes::cpu_seconds,
    server::{Server, has_pool},
    stats::{Samples, millis},
};

/// Starts that warm the page cache.
const THROWN_AWAY: usize = 3;
/// VMs that a daemon with a pool keeps.
const POOL: usize = 3;

/// What was measured of one daemon.
struct Node {
    name: &'static str,
    server: Server,
    /// VMs that wait for its pods, where it has any.
    pool: usize,
    /// What is timed is not a pod's start but that it goes on after a suspend.
    resumes: bool,
    /// Milliseconds from the request to the first byte; of CPU time of the daemon; seconds of the whole tree.
    pods: Vec<f64>,
    daemon_cpu: Vec<f64>,
    tree_cpu: Vec<f64>,
}

impl Node {
    fn new(name: &'static str, server: Server, pool: usize) -> Self {
        Self {
            name,
            server,
            pool,
            resumes: false,
            pods: Vec::new(),
            daemon_cpu: Vec::new(),
            tree_cpu: Vec::new(),
        }
    }

    async fn start_one(&mut self, number: usize) -> Result<()> {
        let pid = self.server.daemon.pid();
        let own = || cpu_seconds(pid).unwrap_or(0.0);
        if self.pool > 0 {
            self.server.wait_idle_vms(self.pool).await?;
        }
        let name = format!("start-{number}");
        if self.resumes {
            self.server.pod(&name).await?;
            self.server.suspend(&name).await?;
        }
        let before = (own(), self.server.cpu_seconds());
        let took = match self.resumes {
            true => self.server.resume(&name).await?,
            false => self.server.pod(&name).await?,
        };
        let mut spent = (own() - before.0, self.server.cpu_seconds() - before.1);
        self.server.delete(&[name]).await?;
        if self.pool > 0 {
            // What was taken is replaced, some time.
            self.server.wait_idle_vms(self.pool).await?;
            spent.1 = self.server.cpu_seconds() - before.1;
        }
        if number >= THROWN_AWAY {
            self.pods.push(millis(took));
            self.daemon_cpu.push(spent.0 * 1e3);
            self.tree_cpu.push(spent.1);
        }
        Ok(())
    }

    /// How many of its pods took a VM out of the pool.
    fn pool_hits(&self) -> usize {
        self.server
            .daemon
            .log_text()
            .matches("from_pool=true")
            .count()
    }
}

pub(crate) async fn measure(starts: usize) -> Result<Value> {
    println!(
        "\n== start of a pod: API request → first byte of its output ({starts} times, in turns with bare boots and restores)"
    );
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut cold = Server::booting(&registry).await?;
    // A pod that stays: its VMM's command line is what the bare VMM gets.
    cold.pod("reference").await?;
    let pid = *cold.daemon.vmm_processes().first().context("a VMM runs")?;
    println!("VMs run under {}", accelerator(pid));
    let bare = Bare::prepare(pid)?;
    let template = Bare::prepare(pid)?.into_template()?;
    cold.delete(&["reference".to_owned()]).await?;
    let mut nodes = vec![Node::new("boot", cold, 0)];
    let server = Server::with_template(&registry, &[]).await?;
    nodes.push(Node::new("template", server, 0));
    let server = Server::with_template(&registry, &[]).await?;
    nodes.push(Node {
        resumes: true,
        ..Node::new("suspend", server, 0)
    });
    if has_pool() {
        let server = Server::with_template(&registry, &["--pool", &POOL.to_string()]).await?;
        nodes.push(Node::new("pool", server, POOL));
    } else {
        println!("this daemon keeps no VMs in reserve (--pool): that row is left out");
    }
    let (mut boots, mut restores) = (Vec::new(), Vec::new());
    for number in 0..starts + THROWN_AWAY {
        let (boot, restore) = (bare.boot()?.took, template.restore()?.took);
        for node in &mut nodes {
            node.start_one(number).await?;
        }
        if number >= THROWN_AWAY {
            boots.push(boot);
            restores.push(restore);
        }
    }
    let (boots, restores) = (Samples::millis(&boots), Samples::millis(&restores));
    println!("bare boot:         {}", boots.line("ms"));
    println!("bare restore:      {}", restores.line("ms"));
    let mut result = json!({
        "bare_ms": boots.json(), "bare_restore_ms": restores.json(), "bare_command": bare.command_line(),
    });
    for node in nodes {
        if node.pool > 0 {
            println!(
                "{} of {} pods took a VM out of the pool; its CPU time is with the stop and with a new VM for the pool",
                node.pool_hits(),
                starts + THROWN_AWAY
            );
            result["from_pool"] = json!(node.pool_hits());
        }
        let pods = Samples::new(node.pods);
        let (daemon, tree) = (Samples::new(node.daemon_cpu), Samples::new(node.tree_cpu));
        let to_boot = pods.median() / boots.median();
        let to_restore = pods.median() / restores.median();
        let (boot_target, restore_target) = match node.name {
            "boot" => (" (target 1.15)", ""),
            "template" => ("", " (target 1.3)"),
            _ => ("", ""),
        };
        println!("pod from {:9} {}", node.name, pods.line("ms"));
        println!(
            "    ratio of medians to the bare boot {to_boot:.2}{boot_target}, to the bare restore {to_restore:.2}{restore_target}; CPU of one start: {:.2} s in all, {:.0} ms of it the daemon's",
            tree.median(),
            daemon.median()
        );
        result[node.name] = json!({
            "pod_ms": pods.json(), "daemon_cpu_ms": daemon.json(), "tree_cpu_seconds": tree.json(),
            "ratio": to_boot, "ratio_to_restore": to_restore,
        });
        node.server.end().await?;
    }
    let samples = |name: &str| {
        let samples = result[name]["pod_ms"].as_array().into_iter().flatten();
        Samples::new(samples.filter_map(Value::as_f64).collect())
    };
    let boot = samples("boot");
    let mut to_boot = json!({});
    for name in ["template", "suspend", "pool"] {
        if result[name].is_null() {
            continue;
        }
        let pods = samples(name);
        let (median, tail) = (
            pods.median() / boot.median(),
            pods.quantile(0.95) / boot.median(),
        );
        println!("{name} to a pod that boots: {median:.2}, its p95 {tail:.2}");
        to_boot[name] = json!({"median": median, "p95": tail});
    }
    result["to_boot"] = to_boot;
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(result)
}

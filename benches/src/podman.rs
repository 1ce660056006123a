//! Debian's podman with crun, the quickest of the usual ways to a container without a daemon: the same program
//! of the same image, by podman's own command line, which is the only way to it. Where crun does not run
//! (its 1.8 refuses cgroups of both versions beside each other), with runc.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use hypernetes_testkit::{Registry, run};
use serde_json::{Value, json};

use crate::{
    processes::{busy_seconds, family, processes, pss_kib},
    stats::{Samples, mib},
};

/// Containers whose memory is looked at.
const IDLE: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// Podman with directories of its own. Its containers end with the value.
struct Podman {
    dir: tempfile::TempDir,
    runtime: &'static str,
    image: String,
}

impl Podman {
    fn command(&self) -> Command {
        let mut command = Command::new("podman");
        command
            .arg("--root")
            .arg(self.dir.path().join("root"))
            .arg("--runroot")
            .arg(self.dir.path().join("run"))
            .args([
                "--runtime",
                self.runtime,
                "--cgroup-manager",
                "cgroupfs",
                "--events-backend",
                "none",
            ]);
        command
    }

    fn new(registry: &Registry) -> Result<Self> {
        let mut podman = Self {
            dir: tempfile::tempdir()?,
            runtime: "crun",
            image: registry.image("busybox:1"),
        };
        run(podman
            .command()
            .args(["pull", "-q", "--tls-verify=false", &podman.image]));
        let probe = podman
            .run("probe", &podman.dir.path().join("probe.log"), "true")
            .output()?;
        if !probe.status.success() {
            println!(
                "podman with crun does not run here: {}",
                String::from_utf8_lossy(&probe.stderr).trim()
            );
            podman.runtime = "runc";
        }
        // One that could not start is there too.
        podman
            .command()
            .args(["rm", "--force", "--time", "0", "--all"])
            .output()?;
        Ok(podman)
    }

    fn run(&self, name: &str, log: &Path, script: &str) -> Command {
        let mut command = self.command();
        command
            .args([
                "run",
                "--detach",
                "--network",
                "none",
                "--name",
                name,
                "--log-driver",
                "k8s-file",
            ])
            // The default limits are beyond what a machine may allow its own root.
            .args([
                "--ulimit",
                "nofile=1024:1024",
                "--ulimit",
                "nproc=1024:1024",
            ])
            .arg("--log-opt")
            .arg(format!("path={}", log.display()))
            .args([&self.image, "sh", "-c", script]);
        command
    }

    /// From the start of the command to the first byte of the container's output in its log.
    fn start(&self, name: &str) -> Result<Duration> {
        let log = self.dir.path().join(format!("{name}.log"));
        let script = format!("echo {name}; exec sleep 100000");
        let begun = Instant::now();
        let mut child = self
            .run(name, &log, &script)
            .stdout(Stdio::null())
            .spawn()?;
        while !fs::read_to_string(&log).is_ok_and(|log| log.contains(name)) {
            if begun.elapsed() > PATIENCE {
                bail!("podman's container wrote nothing within {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let took = begun.elapsed();
        if !child.wait()?.success() {
            bail!("podman run failed");
        }
        Ok(took)
    }

    fn remove(&self, name: &str) {
        run(self.command().args(["rm", "--force", "--time", "0", name]));
    }

    /// Monitors and containers.
    fn processes(&self) -> Vec<u32> {
        let mark = self.dir.path().display().to_string();
        family(&processes(|line| {
            line.contains("conmon") && line.contains(&mark)
        }))
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let removed = self
            .command()
            .args(["rm", "--force", "--time", "0", "--all"])
            .output();
        if !removed.is_ok_and(|output| output.status.success()) {
            println!(
                "containers of podman are left in {}",
                self.dir.path().display()
            );
        }
        // Its storage may be a mount.
        Command::new("umount")
            .arg(self.dir.path().join("root/overlay"))
            .output()
            .ok();
    }
}

/// What was measured, or nothing where podman is not installed.
pub(crate) fn measure(starts: usize) -> Result<Option<Value>> {
    if Command::new("podman").arg("--version").output().is_err() {
        println!("podman is not installed (scripts/install-deps --bench): its rows are left out");
        return Ok(None);
    }
    let registry = Registry::start();
    let podman = Podman::new(&registry)?;
    let (mut times, mut stops) = (Vec::new(), Vec::new());
    let mut before = busy_seconds();
    for number in 0..=starts {
        let name = format!("start-{number}");
        times.push(podman.start(&name)?);
        let begun = Instant::now();
        podman.remove(&name);
        stops.push(begun.elapsed());
        if number == 0 {
            // The first one is no container's price.
            times.clear();
            stops.clear();
            before = busy_seconds();
        }
    }
    let cpu = (busy_seconds() - before) / starts as f64;
    for number in 0..IDLE {
        podman.start(&format!("idle-{number}"))?;
    }
    let kib = podman
        .processes()
        .into_iter()
        .filter_map(pss_kib)
        .sum::<u64>()
        / IDLE as u64;
    let (times, stops) = (Samples::millis(&times), Samples::millis(&stops));
    println!(
        "podman and {} (no network, no daemon; from the start of `podman run`):",
        podman.runtime
    );
    println!("  start to the first byte: {}", times.line("ms"));
    println!("  rm --force: {}", stops.line("ms"));
    println!("  a container's whole life: {cpu:.2} CPU seconds of the machine");
    println!("  memory: {:.1} MiB (PSS) a container of {IDLE}", mib(kib));
    Ok(Some(json!({
        "runtime": podman.runtime,
        "start_ms": times.json(), "stop_ms": stops.json(), "cpu_seconds_per_container": cpu, "pss_kib_per_container": kib,
    })))
}

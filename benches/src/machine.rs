//! What the figures were taken on and with, and whether it had nothing else to do.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hypernetes_testkit::release_dir;
use serde_json::{Map, Value, json};

use crate::stats::cores;

/// Load beyond which figures are not worth much.
const MOST_LOAD: f64 = 0.5;
/// How long a build or another run may take to be out of the load's mean.
const SETTLE: Duration = Duration::from_secs(240);

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn load() -> f64 {
    let text = read("/proc/loadavg");
    text.split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(f64::NAN)
}

/// Holds the lock of the machine's measurements.
pub(crate) fn lock() -> Result<File> {
    let path = std::env::temp_dir().join("hypernetes-bench.lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    if file.try_lock().is_err() {
        bail!("another measurement runs: {} is locked", path.display());
    }
    Ok(file)
}

/// Waits until the machine has nothing else to do. `busy`: measures anyway.
pub(crate) fn wait_idle(busy: bool) -> Result<()> {
    let begun = Instant::now();
    let mut told = false;
    while load() > MOST_LOAD {
        if busy {
            println!(
                "the load is {}: figures will be worse than on an idle machine",
                load()
            );
            return Ok(());
        }
        if !told {
            println!(
                "the load is {}: waiting until it is below {MOST_LOAD}",
                load()
            );
            told = true;
        }
        if begun.elapsed() > SETTLE {
            bail!(
                "the load is still {}: stop what else runs, or measure anyway with --busy",
                load()
            );
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    Ok(())
}

/// First line of what a program says, standard error included.
fn says(program: &Path, arguments: &[&str]) -> Value {
    let Ok(output) = Command::new(program).args(arguments).output() else {
        return Value::Null;
    };
    let text = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    let text = String::from_utf8_lossy(&text).into_owned();
    json!(text.lines().next().map(str::trim))
}

/// Machine and versions of everything that takes part.
pub(crate) fn describe() -> Value {
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: ").map(str::to_owned));
    let mut versions = Map::new();
    let ours = release_dir().join("hypernetes");
    for (name, program, argument) in [
        ("hypernetes", ours.as_path(), "--version"),
        ("qemu", Path::new("qemu-system-x86_64"), "--version"),
        ("containerd", Path::new("containerd"), "--version"),
        ("runc", Path::new("runc"), "--version"),
        ("podman", Path::new("podman"), "--version"),
        ("crun", Path::new("crun"), "--version"),
    ] {
        versions.insert(name.to_owned(), says(program, &[argument]));
    }
    json!({
        "cpu": cpu,
        "cores": cores(),
        "memory": read("/proc/meminfo").lines().next(),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "guest_kernel": fs::read_to_string(release_dir().join("kernel-path")).ok().map(|path| path.trim().to_owned()),
        "load": read("/proc/loadavg"),
        "versions": versions,
    })
}

pub(crate) fn print(machine: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    println!(
        "machine: {} cores ({}), Linux {}, load {}",
        machine["cores"],
        text(&machine["cpu"]),
        text(&machine["kernel"]),
        text(&machine["load"])
    );
    for (name, version) in machine["versions"].as_object().into_iter().flatten() {
        println!(
            "  {name}: {}",
            version
                .as_str()
                .unwrap_or("not installed: its rows are left out")
        );
    }
    println!("  guest kernel: {}", text(&machine["guest_kernel"]));
    println!("page cache: warm (the first starts of each kind are thrown away)");
}

/// How VMs of this daemon run, from the command line of one.
pub(crate) fn accelerator(vmm: u32) -> String {
    let line = fs::read(format!("/proc/{vmm}/cmdline")).unwrap_or_default();
    let words: Vec<String> = line
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let after = |name: &str| {
        let at = words.iter().position(|word| word == name)?;
        words.get(at + 1).cloned()
    };
    format!(
        "{}, machine {}",
        after("-accel").unwrap_or_default(),
        after("-M").unwrap_or_default()
    )
}

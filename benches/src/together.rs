//! Pods at once: what is the machine's own limit, and what is lost beyond it.
//!
//! A machine cannot be faster than the CPU seconds of one start, times the pods, over its cores. What takes
//! longer waits: for a lock, for a timer, for something that goes one by one. Stops and leftovers are
//! looked at here too, for there are as many of them.

use std::time::{Duration, Instant};

use anyhow::Result;
use hypernetes_testkit::Registry;
use serde_json::{Value, json};

use crate::{
    server::{Server, names},
    stats::{Samples, cores, millis},
};

const STEPS: [usize; 3] = [5, 10, 20];
/// Starts one by one, of which the CPU seconds are taken, after one that is thrown away.
const SINGLE: usize = 5;
/// After the last pod has gone, in which everything else must have gone too.
const CLEAN: Duration = Duration::from_secs(30);

pub(crate) async fn measure() -> Result<Value> {
    println!(
        "\n== pods at once (from a template): wall time beside (pods x CPU seconds of one / {} cores)",
        cores()
    );
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut server = Server::with_template(&registry, &[]).await?;
    let (mut walls, mut cpus, mut stops) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..=SINGLE {
        let before = server.cpu_seconds();
        let name = format!("single-{number}");
        let took = server.pod(&name).await?;
        let spent = server.cpu_seconds() - before;
        let stop = server.delete(&[name]).await?;
        if number > 0 {
            walls.push(took);
            cpus.push(spent);
            stops.push(stop);
        }
    }
    let (wall, cpu) = (Samples::millis(&walls), Samples::new(cpus));
    println!(
        "  one: {}; {:.2} CPU seconds",
        wall.line("ms"),
        cpu.median()
    );
    let mut rows = Vec::new();
    for count in STEPS {
        let before = server.cpu_seconds();
        let pods = names(&format!("of-{count}"), count);
        let begun = Instant::now();
        let times = server.pods(&pods).await?;
        let wall = begun.elapsed().as_secs_f64();
        let spent = server.cpu_seconds() - before;
        let stop = server.delete(&pods).await?;
        let floor = count as f64 * cpu.median() / cores() as f64;
        let ratio = wall / floor;
        println!(
            "{count:3} at once: {wall:.2} s, {spent:.2} CPU seconds ({:.2} a pod); ratio {ratio:.2} (target 1.2); all stopped in {:.0} ms",
            spent / count as f64,
            millis(stop)
        );
        rows.push(json!({
            "pods": count, "wall_seconds": wall, "cpu_seconds": spent, "ratio": ratio,
            "first_bytes_ms": Samples::millis(&times).json(), "stop_ms": millis(stop),
        }));
    }
    let stops = Samples::millis(&stops);
    println!("stop of one, DELETE → its VM is gone: {}", stops.line("ms"));
    let left = tokio::task::block_in_place(|| leftovers(&server));
    println!("left over after the last stop: {left:?} (must be nothing)");
    anyhow::ensure!(left.is_empty(), "something is left over");
    let pod_cpu = cpu.json();
    server.end().await?;
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(json!({
        "single_ms": wall.json(), "single_cpu_seconds": pod_cpu, "at_once": rows, "stop_ms": stops.json(),
        "left_over": left,
    }))
}

/// Processes, links, mounts, cgroups and files that no pod has any more.
fn leftovers(server: &Server) -> Vec<String> {
    let look = || {
        let picture = server.daemon.host_picture();
        let files = server.daemon.pod_files();
        let mut left: Vec<String> = files
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        if !picture.is_clean() {
            left.push(format!("{picture:?}"));
        }
        left
    };
    let end = Instant::now() + CLEAN;
    loop {
        let left = look();
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

//! Pods at once: what is the machine's own limit, and what is lost beyond it.
//!
//! A machine cannot be faster than the CPU seconds of one start, times the pods, over its cores. What takes
//! longer waits: for a lock, for a timer, for something that goes one by one. Stops and leftovers are
//! looked at here too, for there are as many of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

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
    let (wall, cpu, stops) = one_by_one(&mut server, "single").await?;
    println!(
        "  one: {}; {:.2} CPU seconds",
        wall.line("ms"),
        cpu.median()
    );
    let beside = {
        let _busy = Busy::other_cores();
        one_by_one(&mut server, "beside").await?.1
    };
    println!(
        "  one, while the other cores are busy: {:.2} CPU seconds",
        beside.median()
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
        let floor = |cpu: &Samples| count as f64 * cpu.median() / cores() as f64;
        let (ratio, to_busy) = (wall / floor(&cpu), wall / floor(&beside));
        println!(
            "{count:3} at once: {wall:.2} s, {spent:.2} CPU seconds ({:.2} a pod); ratio {ratio:.2} (target 1.2), {to_busy:.2} to a start beside busy cores; all stopped in {:.0} ms",
            spent / count as f64,
            millis(stop)
        );
        rows.push(json!({
            "pods": count, "wall_seconds": wall, "cpu_seconds": spent, "ratio": ratio,
            "ratio_to_busy": to_busy,
            "first_bytes_ms": Samples::millis(&times).json(), "stop_ms": millis(stop),
        }));
    }
    println!("stop of one, DELETE → its VM is gone: {}", stops.line("ms"));
    let left = tokio::task::block_in_place(|| leftovers(&server));
    println!("left over after the last stop: {left:?} (must be nothing)");
    anyhow::ensure!(left.is_empty(), "something is left over");
    let (pod_cpu, beside_cpu) = (cpu.json(), beside.json());
    server.end().await?;
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(json!({
        "single_ms": wall.json(), "single_cpu_seconds": pod_cpu, "beside_cpu_seconds": beside_cpu,
        "at_once": rows, "stop_ms": stops.json(),
        "left_over": left,
    }))
}

/// Times, CPU seconds and times of the stop of pods that start one after another.
async fn one_by_one(server: &mut Server, prefix: &str) -> Result<(Samples, Samples, Samples)> {
    let (mut walls, mut cpus, mut stops) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..=SINGLE {
        let before = server.cpu_seconds();
        let name = format!("{prefix}-{number}");
        let took = server.pod(&name).await?;
        // What a pod does after its first line, others at once wait for.
        server.wait_idle_vms(1).await?;
        let spent = server.cpu_seconds() - before;
        let stop = server.delete(&[name]).await?;
        if number > 0 {
            walls.push(took);
            cpus.push(spent);
            stops.push(stop);
        }
    }
    Ok((
        Samples::millis(&walls),
        Samples::new(cpus),
        Samples::millis(&stops),
    ))
}

/// Threads that do nothing but take time, on all cores but one: cores share caches, and some are threads of one.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn other_cores() -> Self {
        let go_on = Arc::new(AtomicBool::new(true));
        for _ in 1..cores() {
            let go_on = Arc::clone(&go_on);
            std::thread::spawn(move || {
                let mut number = 1_u64;
                while go_on.load(Ordering::Relaxed) {
                    for _ in 0..10_000 {
                        number = std::hint::black_box(number.wrapping_mul(31).rotate_left(7));
                    }
                }
            });
        }
        Self(go_on)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
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

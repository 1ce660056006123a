//! What a daemon with idle pods takes: CPU time over some minutes, and memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hypernetes_testkit::Registry;
use serde_json::{Value, json};

use crate::{
    processes::{cpu_seconds, rss_kib, status_kib},
    server::{Server, names},
    stats::mib,
};

const PODS: usize = 20;
/// What starts of pods leave to do is over by then.
const SETTLE: Duration = Duration::from_secs(20);
const CPU_TARGET: f64 = 0.5;
const RSS_TARGET_MIB: f64 = 80.0;

pub(crate) async fn measure(seconds: u64) -> Result<Value> {
    println!("\n== the daemon with {PODS} idle pods, for {seconds} s");
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut server = Server::with_template(&registry, &[]).await?;
    // One after another: how they start is no matter here.
    for name in names("idle", PODS) {
        server.pod(&name).await?;
    }
    tokio::time::sleep(SETTLE).await;
    let daemon = server.daemon.pid();
    let vmms = server.daemon.vmm_processes();
    let own = || cpu_seconds(daemon).context("the daemon runs");
    let of_vmms = || vmms.iter().filter_map(|pid| cpu_seconds(*pid)).sum::<f64>();
    let (begun, before, vmms_before) = (Instant::now(), own()?, of_vmms());
    let mut curve = Vec::new();
    while begun.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let rss = rss_kib(daemon).context("the daemon runs")?;
        curve.push((begun.elapsed().as_secs_f64(), own()? - before, rss));
    }
    let passed = begun.elapsed().as_secs_f64();
    let cpu = (own()? - before) / passed * 100.0;
    let guests = (of_vmms() - vmms_before) / passed * 100.0 / PODS as f64;
    let rss = curve.iter().map(|(_, _, rss)| *rss).max().unwrap_or(0);
    let anonymous = status_kib(daemon, "RssAnon").context("the daemon runs")?;
    println!(
        "daemon: {cpu:.2} % of a core (target {CPU_TARGET}), at most {:.1} MiB RSS (target {RSS_TARGET_MIB}), {:.1} of it anonymous and the rest its program; a VMM {guests:.2} % of a core",
        mib(rss),
        mib(anonymous)
    );
    server.end().await?;
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(json!({
        "pods": PODS, "seconds": passed, "daemon_cpu_percent": cpu, "daemon_rss_kib": rss, "daemon_anonymous_kib": anonymous,
        "vmm_cpu_percent": guests, "samples": curve,
    }))
}

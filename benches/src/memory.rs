//! Host memory of idle pods, beside the bare VMM with the same kernel.

use anyhow::{Context, Result};
use hypernetes_testkit::{Daemon, DaemonOptions, Registry, run};
use serde_json::{Value, json};

use crate::{
    bare::Bare,
    client::Endpoint,
    start::pod,
    stats::{pss_kib, rss_kib},
};

const STEPS: [usize; 3] = [1, 5, 20];

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== host memory (PSS) of idle pods");
    let (registry, daemon) = tokio::task::spawn_blocking(|| {
        let registry = Registry::start();
        let daemon = Daemon::start(DaemonOptions::default());
        run(&mut daemon.hypernetes(&["image", "pull", "-q", &registry.image("busybox:1")]));
        (registry, daemon)
    })
    .await?;
    let endpoint = Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?;
    let mut connection = endpoint.connect().await?;
    let image = registry.image("busybox:1");
    let mut rows = Vec::new();
    let mut bare = None;
    let mut running = 0;
    for step in STEPS {
        while running < step {
            pod(&mut connection, &daemon, &format!("idle-{running}"), &image).await?;
            running += 1;
        }
        let pids = daemon.vmm_processes();
        if bare.is_none() {
            bare = Some(Bare::prepare(*pids.first().context("a VMM runs")?)?);
        }
        // As many bare VMs as pods, so that what processes share is shared by as many.
        let floor = bare.as_ref().context("prepared above")?;
        let total = |pids: &[u32]| pids.iter().filter_map(|pid| pss_kib(*pid)).sum::<u64>();
        let pods = total(&pids) / step as u64;
        let vms = (0..step)
            .map(|_| floor.boot())
            .collect::<Result<Vec<_>>>()?;
        let bare_pids: Vec<u32> = vms.iter().map(crate::bare::BareVm::pid).collect();
        let bare_pss = total(&bare_pids) / step as u64;
        drop(vms);
        let own = rss_kib(daemon.pid()).context("the daemon runs")?;
        let ratio = pods as f64 / bare_pss as f64;
        println!(
            "{step:3} pods: {:.1} MiB a pod; bare VMM {:.1} MiB; ratio {ratio:.2} (target 1.2); daemon {:.1} MiB",
            pods as f64 / 1024.0,
            bare_pss as f64 / 1024.0,
            own as f64 / 1024.0
        );
        rows.push(json!({
            "pods": step, "pss_kib_per_pod": pods, "bare_pss_kib": bare_pss, "ratio": ratio,
            "daemon_rss_kib": own,
        }));
    }
    tokio::task::spawn_blocking(move || drop((daemon, registry))).await?;
    Ok(json!(rows))
}

//! Host memory of idle pods, beside the bare VMM with the same kernel.

use anyhow::{Context, Result};
use hypernetes_testkit::{Daemon, DaemonOptions, Registry, run};
use serde_json::{Value, json};

use crate::{
    bare::Bare,
    client::Endpoint,
    start::pod,
    stats::{pss_kib, rss_kib, template_kib},
};

const STEPS: [usize; 3] = [1, 5, 20];

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== host memory (PSS) of idle pods");
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut tables = json!({});
    for (name, args) in [("template", &[][..]), ("boot", &["--templates", "0"][..])] {
        println!("pods from {name}:");
        tables[name] = rows(&registry, args).await?;
    }
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(tables)
}

async fn rows(registry: &Registry, args: &[&str]) -> Result<Value> {
    let options = DaemonOptions {
        args: args.iter().map(Into::into).collect(),
        ..DaemonOptions::default()
    };
    let image = registry.image("busybox:1");
    let name = image.clone();
    let templates = args.is_empty();
    let (daemon, floor_of, template) = tokio::task::spawn_blocking(move || {
        let daemon = Daemon::start(options);
        run(&mut daemon.hypernetes(&["image", "pull", "-q", &name]));
        // The bare VMM boots: its command line is that of a pod which does.
        let floor_of = templates.then(|| {
            let daemon = Daemon::start(DaemonOptions {
                args: ["--templates", "0"].iter().map(Into::into).collect(),
                ..DaemonOptions::default()
            });
            run(&mut daemon.hypernetes(&["image", "pull", "-q", &name]));
            daemon
        });
        // Held by the daemon for all pods together.
        let template = if templates { daemon.wait_template() } else { 0 };
        (daemon, floor_of, template)
    })
    .await?;
    let mut bare = None;
    if let Some(other) = floor_of {
        let endpoint = Endpoint::from_kubeconfig(&other.admin_kubeconfig())?;
        let mut connection = endpoint.connect().await?;
        pod(&mut connection, &other, "reference", &image).await?;
        bare = Some(Bare::prepare(
            *other.vmm_processes().first().context("a VMM runs")?,
        )?);
        tokio::task::spawn_blocking(move || drop(other)).await?;
    }
    let endpoint = Endpoint::from_kubeconfig(&daemon.admin_kubeconfig())?;
    let mut connection = endpoint.connect().await?;
    let mut rows = Vec::new();
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
        // Of the template, what no pod has touched is in no process: one that maps most tells.
        let touched = pids.iter().filter_map(|pid| template_kib(*pid)).max();
        let untouched = template.saturating_sub(touched.unwrap_or(0));
        let pods = (total(&pids) + untouched) / step as u64;
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
            "daemon_rss_kib": own, "template_kib": template,
        }));
    }
    tokio::task::spawn_blocking(move || drop(daemon)).await?;
    Ok(json!(rows))
}

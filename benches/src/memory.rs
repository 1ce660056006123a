//! Host memory of idle pods, beside bare VMMs with the same kernel: one that boots, and one restored from a
//! template, as the pods are.

use anyhow::{Context, Result};
use hypernetes_testkit::Registry;
use serde_json::{Value, json};

use crate::{
    bare::{Bare, BareTemplate, BareVm},
    processes::{VmmMemory, available_kib, pss_kib, rss_kib},
    server::{Server, has_pool},
    stats::mib,
};

const STEPS: [usize; 3] = [1, 5, 20];

/// Where bare VMs come from.
enum Floor {
    Boot(Bare),
    Restore(BareTemplate),
}

impl Floor {
    fn start(&self) -> Result<BareVm> {
        match self {
            Self::Boot(bare) => bare.boot(),
            Self::Restore(template) => template.restore(),
        }
    }

    /// What its template takes, in KiB.
    fn template_kib(&self) -> Result<u64> {
        match self {
            Self::Boot(_) => Ok(0),
            Self::Restore(template) => template.kib(),
        }
    }
}

/// Memory of one of some VMs, in KiB. What none of them has touched of their template is in no process: it is
/// added in equal parts.
fn of_one(pids: &[u32], template: u64) -> (u64, VmmMemory) {
    let mean = VmmMemory::mean(pids);
    let untouched = template.saturating_sub(mean.template_resident);
    let total = pids.iter().filter_map(|pid| pss_kib(*pid)).sum::<u64>() + untouched;
    (total / (pids.len() as u64).max(1), mean)
}

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== host memory (PSS) of idle pods");
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut cold = Server::booting(&registry).await?;
    cold.pod("reference").await?;
    let pid = *cold.daemon.vmm_processes().first().context("a VMM runs")?;
    let floors = [
        Floor::Boot(Bare::prepare(pid)?),
        Floor::Restore(Bare::prepare(pid)?.into_template()?),
    ];
    cold.delete(&["reference".to_owned()]).await?;
    let warm = Server::with_template(&registry, &[]).await?;
    let [boot, restore] = &floors;
    println!("pods from a template, beside bare clones and bare boots:");
    let template = rows(warm, &[("clone", restore, 1.1), ("boot", boot, 1.2)]).await?;
    println!("pods that boot, beside bare boots:");
    let boot = rows(cold, &[("boot", boot, 1.2)]).await?;
    let pool = match has_pool() {
        true => waiting(&registry).await?,
        false => Value::Null,
    };
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(json!({"template": template, "boot": boot, "pool": pool}))
}

/// VMs that wait for a pod: clones of the same template as pods, in which nobody has made a container.
async fn waiting(registry: &Registry) -> Result<Value> {
    let count = STEPS[STEPS.len() - 1];
    let server = Server::with_template(registry, &["--pool", &count.to_string()]).await?;
    server.wait_idle_vms(count).await?;
    let (vms, parts) = of_one(&server.daemon.vmm_processes(), server.template_kib);
    println!(
        "{count} VMs of a pool, nobody's yet: {:.1} MiB each ({})",
        mib(vms),
        parts.line()
    );
    server.end().await?;
    Ok(json!({"vms": count, "pss_kib": vms, "parts": parts.json()}))
}

async fn rows(mut server: Server, floors: &[(&str, &Floor, f64)]) -> Result<Value> {
    let mut rows = Vec::new();
    let available = available_kib().context("/proc/meminfo")?;
    for step in STEPS {
        while server.daemon.vmm_processes().len() < step {
            let number = server.daemon.vmm_processes().len();
            server.pod(&format!("idle-{number}")).await?;
        }
        let (pods, of_pods) = of_one(&server.daemon.vmm_processes(), server.template_kib);
        let taken =
            available.saturating_sub(available_kib().context("/proc/meminfo")?) / step as u64;
        let own = rss_kib(server.daemon.pid()).context("the daemon runs")?;
        println!(
            "{step:3} pods: {:.1} MiB a pod ({}); {:.1} MiB less available on the machine for each; daemon {:.1} MiB",
            mib(pods),
            of_pods.line(),
            mib(taken),
            mib(own)
        );
        let mut row = json!({
            "pods": step, "pss_kib_per_pod": pods, "parts": of_pods.json(), "daemon_rss_kib": own,
            "template_kib": server.template_kib, "available_kib_per_pod": taken,
        });
        for (name, floor, target) in floors {
            // As many bare VMs as pods, so that what processes share is shared by as many.
            let vms = (0..step)
                .map(|_| floor.start())
                .collect::<Result<Vec<_>>>()?;
            let pids: Vec<u32> = vms.iter().map(BareVm::pid).collect();
            let (bare, parts) = of_one(&pids, floor.template_kib()?);
            drop(vms);
            let ratio = pods as f64 / bare as f64;
            // KVM has no translated code.
            let without =
                |kib: u64, parts: &VmmMemory| kib.saturating_sub(parts.translations) as f64;
            let lean = without(pods, &of_pods) / without(bare, &parts);
            println!(
                "    bare {name}: {:.1} MiB ({}); ratio {ratio:.2} (target {target}), without translated code {lean:.2}",
                mib(bare),
                parts.line()
            );
            row[format!("bare_{name}")] = json!({
                "pss_kib": bare, "parts": parts.json(), "ratio": ratio, "ratio_without_translations": lean,
            });
        }
        rows.push(row);
    }
    server.end().await?;
    Ok(json!(rows))
}

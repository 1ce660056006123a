//! What a VM costs beside its containers: the VMM's own memory, the guest's kernel and HyperStart, and the
//! smallest pod that still runs.

use std::time::Instant;

use anyhow::{Context, Result};
use hypernetes_testkit::{Registry, stdout};
use serde_json::{Value, json};

use crate::{
    processes::{VmmMemory, rss_kib, status_line_kib},
    server::{Server, pod},
    stats::{mib, millis},
};

/// Limit of the pod whose VMM is looked at, and of the smallest one.
const USUAL: &str = "128Mi";
const SMALL: &str = "32Mi";
const HYPERSTART_TARGET_MIB: f64 = 2.0;

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== beside the containers: VMM, guest kernel, HyperStart");
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut server = Server::with_template(&registry, &["--allow-guest-exec"]).await?;
    let image = server.image.clone();
    let mut result = json!({});

    // The second starts from a template of the size if the first already did.
    for limit in [USUAL, SMALL] {
        let name = format!("idle-{}", limit.to_lowercase());
        let body = pod(&name, &image, &json!({"limits": {"memory": limit}}));
        let before = server.daemon.vmm_processes();
        server.create(&body).await?;
        server.wait_phase(&name, "Running").await?;
        let vmm = server
            .daemon
            .vmm_processes()
            .into_iter()
            .find(|pid| !before.contains(pid));
        let vmm = vmm.context("the pod has a VM")?;
        let (rss, parts) = (
            rss_kib(vmm).context("the VMM runs")?,
            VmmMemory::of(vmm).context("the VMM runs")?,
        );
        let overhead = rss.saturating_sub(parts.guest_resident);
        let meminfo = in_vm(&server, &name, "/proc/meminfo");
        let kib =
            |name: &str| status_line_kib(&meminfo, name).context("/proc/meminfo of the guest");
        let (total, available) = (kib("MemTotal")?, kib("MemAvailable")?);
        let status = in_vm(&server, &name, "/proc/1/status");
        let hyperstart =
            |name: &str| status_line_kib(&status, name).context("/proc/1/status of the guest");
        let resident = hyperstart("VmRSS")?;
        // The program is a file of the initial RAM file system, which may be either kind.
        let program = hyperstart("RssFile")? + hyperstart("RssShmem")?;
        println!(
            "pod with a limit of {limit}: VMM {:.1} MiB RSS beside {:.1} MiB of guest memory, {:.1} MiB of it (PSS) its own; translated code {:.1} MiB of that",
            mib(overhead),
            mib(parts.guest_resident),
            mib(parts.overhead()),
            mib(parts.translations)
        );
        println!(
            "    guest: {:.1} MiB in all, {:.1} used; HyperStart {:.2} MiB RSS (target {HYPERSTART_TARGET_MIB}): {:.2} anonymous, {:.2} the program",
            mib(total),
            mib(total.saturating_sub(available)),
            mib(resident),
            mib(hyperstart("RssAnon")?),
            mib(program)
        );
        result[limit] = json!({
            "vmm_overhead_rss_kib": overhead, "vmm_rss_kib": rss, "parts": parts.json(),
            "guest_total_kib": total, "guest_available_kib": available, "hyperstart_rss_kib": resident,
            "hyperstart_anonymous_kib": hyperstart("RssAnon")?, "hyperstart_program_kib": program,
        });
    }

    let mut body = pod("small", &image, &json!({"limits": {"memory": SMALL}}));
    body["spec"]["containers"][0]["command"] = json!(["true"]);
    let begun = Instant::now();
    server.create(&body).await?;
    server.wait_phase("small", "Succeeded").await?;
    let took = millis(begun.elapsed());
    println!("a pod with a limit of {SMALL} boots, runs `true` and has succeeded in {took:.0} ms");
    result["small_true_ms"] = json!(took);
    server.end().await?;
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(result)
}

/// A file as a program in the VM itself sees it.
fn in_vm(server: &Server, pod: &str, path: &str) -> String {
    let name = format!("default/{pod}");
    tokio::task::block_in_place(|| {
        stdout(
            &mut server
                .daemon
                .hypernetes(&["debug", &name, "--", "cat", path]),
        )
    })
}

//! Memory that a guest has freed comes back to the host: how much of 512 MiB, and how soon.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypernetes_testkit::{Registry, run};
use serde_json::{Value, json};

use crate::{
    processes::rss_kib,
    server::{Server, pod},
    stats::mib,
};

const BALLAST_MIB: u64 = 512;
/// How long is looked, and after how much of it there is a target.
const LOOK: Duration = Duration::from_secs(60);
const TARGET_AFTER: Duration = Duration::from_secs(30);
const TARGET: f64 = 0.8;

pub(crate) async fn measure() -> Result<Value> {
    println!("\n== {BALLAST_MIB} MiB that a guest fills and frees: what comes back to the host");
    let registry = tokio::task::spawn_blocking(Registry::start).await?;
    let mut result = json!({});
    for (name, server) in [
        ("template", Server::with_template(&registry, &[]).await?),
        ("boot", Server::booting(&registry).await?),
    ] {
        result[name] = one(server, name).await?;
    }
    tokio::task::spawn_blocking(move || drop(registry)).await?;
    Ok(result)
}

/// A pod with room for the ballast.
fn large(name: &str, image: &str) -> Value {
    let mut pod = pod(name, image, &json!({"limits": {"memory": "768Mi"}}));
    pod["spec"]["volumes"] =
        json!([{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "640Mi"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "m", "mountPath": "/m"}]);
    pod
}

async fn one(mut server: Server, kind: &str) -> Result<Value> {
    // Templates of a size are made when it has come twice: the third pod is from one.
    let pods = if kind == "template" { 3 } else { 1 };
    for number in 0..pods {
        let name = format!("large-{number}");
        let body = large(&name, &server.image.clone());
        server.create(&body).await?;
        server.wait_phase(&name, "Running").await?;
        if number + 1 == pods {
            break;
        }
        server.delete(&[name]).await?;
        if number == 1 {
            let end = Instant::now() + Duration::from_secs(120);
            while server
                .daemon
                .log_text()
                .matches("a template is ready")
                .count()
                < 2
            {
                ensure!(Instant::now() < end, "no template of this size is made");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    let from_template = !server
        .daemon
        .log_text()
        .lines()
        .rfind(|line| line.contains("from_template"))
        .context("no pod is ready")?
        .contains("from_template=false");
    ensure!(
        from_template == (kind == "template"),
        "the pod did not start from what was meant"
    );
    let vmm = *server
        .daemon
        .vmm_processes()
        .first()
        .context("a VMM runs")?;
    let rss = || rss_kib(vmm).context("the VMM has ended");
    let exec = |server: &Server, script: &str| {
        let name = format!("large-{}", pods - 1);
        tokio::task::block_in_place(|| {
            run(&mut server
                .daemon
                .kubectl(&["exec", &name, "--", "sh", "-c", script]))
        });
    };
    let idle = rss()?;
    exec(
        &server,
        &format!("dd if=/dev/zero of=/m/ballast bs=1M count={BALLAST_MIB} 2> /dev/null"),
    );
    let full = rss()?;
    ensure!(
        full > idle + (BALLAST_MIB << 10) * 9 / 10,
        "the ballast is not in memory: {idle}, then {full} KiB"
    );
    exec(&server, "rm /m/ballast");
    let begun = Instant::now();
    let (mut curve, mut last_line) = (Vec::new(), 0);
    let back = |now: u64| full.saturating_sub(now) as f64 / (full - idle) as f64;
    while begun.elapsed() < LOOK {
        let (at, now) = (begun.elapsed(), rss()?);
        curve.push((at.as_secs_f64(), now));
        if at.as_secs() >= last_line {
            last_line = at.as_secs() + 10;
            println!(
                "  {kind}: after {:3.0} s {:5.1} MiB, {:3.0} % back",
                at.as_secs_f64(),
                mib(now),
                back(now) * 100.0
            );
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let when = |share: f64| {
        curve
            .iter()
            .find(|(_, now)| back(*now) >= share)
            .map(|(at, _)| *at)
    };
    let in_time = curve
        .iter()
        .rfind(|(at, _)| *at <= TARGET_AFTER.as_secs_f64())
        .map_or(0.0, |(_, now)| back(*now));
    println!(
        "  {kind}: {:.1} MiB idle, {:.1} full; {:.0} % back after 30 s (target {:.0}); {}",
        mib(idle),
        mib(full),
        in_time * 100.0,
        TARGET * 100.0,
        when(TARGET).map_or("80 % never".to_owned(), |at| format!(
            "80 % after {at:.1} s"
        ))
    );
    server.end().await?;
    Ok(json!({
        "idle_kib": idle, "full_kib": full, "curve": curve, "share_after_30s": in_time, "seconds_to_80_percent": when(TARGET),
    }))
}

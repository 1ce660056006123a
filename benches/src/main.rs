//! Measures what users wait for and pay for, as ratios to floors measured in the same run.
//!
//! | part | what |
//! | --- | --- |
//! | `start` | request → first byte of a container's output, beside a bare boot and a bare restore in the same VMM |
//! | `together` | 5, 10 and 20 pods at once, beside what their CPU seconds take; stops and leftovers |
//! | `memory` | host memory a pod, beside those bare VMs, and what it consists of |
//! | `reclaim` | memory that a guest has freed |
//! | `footprint` | VMM, guest kernel and HyperStart beside the containers; the smallest pod |
//! | `idle` | the daemon with 20 idle pods over five minutes |
//! | `api` | rates and latencies of the API server and what it holds in memory |
//! | `scale` | the same with 10,000 pods, 1,000 watchers, and its start with 50,000 objects |
//! | `runtime` | the runtime interface beside containerd with runc; podman with crun |
//! | `network` | throughput between pods, beside a veth pair |
//!
//! Raw samples go to a JSON file.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    reason = "a measuring program prints figures, and waits for other processes by looking again"
)]

mod api;
mod bare;
mod client;
mod containerd;
mod cri;
mod fan_out;
mod footprint;
mod idle;
mod machine;
mod memory;
mod network;
mod podman;
mod processes;
mod qmp;
mod reclaim;
mod runtime;
mod scale;
mod server;
mod start;
mod stats;
mod together;
mod watch;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value};

/// What to measure
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Start of a pod
    Start,
    /// Pods at once, stops, leftovers
    Together,
    /// Memory of pods and daemon
    Memory,
    /// Memory that a guest has freed
    Reclaim,
    /// VMM, guest kernel, HyperStart; the smallest pod
    Footprint,
    /// The daemon with idle pods
    Idle,
    /// The API server
    Api,
    /// The API server with 10,000 pods and 1,000 watchers
    Scale,
    /// The runtime interface, beside containerd and runc; podman and crun
    Runtime,
    /// Throughput between pods, beside a veth pair
    Network,
}

impl What {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    async fn measure(self, options: &Options) -> Result<Value> {
        match self {
            Self::Start => start::measure(options.starts).await,
            Self::Together => together::measure().await,
            Self::Memory => memory::measure().await,
            Self::Reclaim => reclaim::measure().await,
            Self::Footprint => footprint::measure().await,
            Self::Idle => idle::measure(options.idle_seconds).await,
            Self::Api => api::measure().await,
            Self::Scale => scale::measure().await,
            Self::Runtime => Box::pin(runtime::measure(options.starts)).await,
            Self::Network => network::measure().await,
        }
    }
}

/// Benchmarks of Hypernetes
#[derive(Debug, Parser)]
struct Options {
    /// What to measure; everything by default
    what: Vec<What>,
    /// Starts to time
    #[arg(long, default_value_t = 20)]
    starts: usize,
    /// Seconds for which the daemon with idle pods is looked at
    #[arg(long, default_value_t = 300)]
    idle_seconds: u64,
    /// Measure although the machine has other work
    #[arg(long)]
    busy: bool,
    /// File for the raw samples
    #[arg(long, default_value = "target/bench.json")]
    output: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        anyhow::bail!("a TLS provider is installed already");
    }
    let _lock = machine::lock()?;
    machine::wait_idle(options.busy)?;
    let wanted = match options.what.as_slice() {
        [] => What::value_variants(),
        some => some,
    };
    let machine = machine::describe();
    machine::print(&machine);
    let mut samples = Map::new();
    samples.insert("machine".into(), machine);
    if let Some(dir) = options.output.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    for what in wanted {
        let result = runtime.block_on(what.measure(&options))?;
        samples.insert(what.name(), result);
        // After each part: what was measured is not lost with what comes later.
        std::fs::write(&options.output, serde_json::to_vec_pretty(&samples)?)?;
    }
    println!("\nraw samples: {}", options.output.display());
    Ok(())
}

//! Measures what users wait for and pay for, as ratios to floors measured in the same run.
//!
//! `start`: request → first byte of a container's output, beside the bare boot of the same kernel in
//! the same VMM. `memory`: host memory a pod, beside that bare VMM. `api`: rates and latencies of the
//! API server and what it holds in memory. `scale`: the same with 10,000 pods, 1,000 watchers, and its start
//! with 50,000 objects. `runtime`: the runtime interface beside containerd with
//! runc. `network`: throughput between pods, beside a veth pair. Raw samples go to a JSON file.
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
mod fan_out;
mod memory;
mod network;
mod runtime;
mod scale;
mod start;
mod stats;
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
    /// Memory of pods and daemon
    Memory,
    /// The API server
    Api,
    /// The API server with 10,000 pods and 1,000 watchers
    Scale,
    /// The runtime interface, beside containerd and runc
    Runtime,
    /// Throughput between pods, beside a veth pair
    Network,
}

/// Benchmarks of Hypernetes
#[derive(Debug, Parser)]
struct Options {
    /// What to measure; everything by default
    what: Vec<What>,
    /// Starts to time
    #[arg(long, default_value_t = 20)]
    starts: usize,
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
    let all = [
        What::Start,
        What::Memory,
        What::Api,
        What::Scale,
        What::Runtime,
        What::Network,
    ];
    let wanted = if options.what.is_empty() {
        &all[..]
    } else {
        &options.what
    };
    let mut samples = Map::new();
    samples.insert("machine".into(), stats::machine());
    println!("{}", stats::machine_line());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    for what in wanted {
        let (name, result): (&str, Value) = match what {
            What::Start => ("start", runtime.block_on(start::measure(options.starts))?),
            What::Memory => ("memory", runtime.block_on(memory::measure())?),
            What::Api => ("api", runtime.block_on(api::measure())?),
            What::Scale => ("scale", runtime.block_on(scale::measure())?),
            What::Network => ("network", runtime.block_on(network::measure())?),
            What::Runtime => (
                "runtime",
                runtime.block_on(runtime::measure(options.starts))?,
            ),
        };
        samples.insert(name.into(), result);
    }
    if let Some(dir) = options.output.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(&options.output, serde_json::to_vec_pretty(&samples)?)?;
    println!("raw samples: {}", options.output.display());
    Ok(())
}

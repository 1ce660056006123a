//! Figures from samples, and what machine they were taken on.

use std::fs;

use serde_json::{Value, json};

/// Sorted samples of one quantity.
#[derive(Debug, Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The value below which a share of the samples lies, `0.5` for the median.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index between 0 and the length"
        )]
        let index = (share * last as f64).round() as usize;
        self.0.get(index).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// `median (p95, max)` in the unit.
    pub(crate) fn line(&self, unit: &str) -> String {
        format!(
            "median {:.1} {unit}, p95 {:.1}, max {:.1} ({} samples)",
            self.median(),
            self.quantile(0.95),
            self.quantile(1.0),
            self.0.len()
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!(self.0)
    }
}

/// Proportional set size of a process in KiB: memory that it would free by ending.
pub(crate) fn pss_kib(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find(|line| line.starts_with("Pss:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Pages of a template that a VMM maps and has not changed, in KiB: its PSS has them already.
pub(crate) fn template_kib(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let mut inside = false;
    let mut sum = 0_u64;
    for line in text.lines() {
        let first = line.split_whitespace().next()?;
        if !first.ends_with(':') {
            inside = line.contains("guest-memory");
        } else if inside && ["Rss:", "Anonymous:"].contains(&first) {
            // What is resident and not a copy of its own. Of a memfd all pages count as dirty.
            let kib = line.split_whitespace().nth(1)?.parse::<u64>().ok()?;
            sum = match first {
                "Rss:" => sum.saturating_add(kib),
                _ => sum.saturating_sub(kib),
            };
        }
    }
    Some(sum)
}

/// Resident set size of a process in KiB.
pub(crate) fn rss_kib(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// User and system time of a process in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}

pub(crate) fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: ").map(str::to_owned));
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").trim(),
    })
}

pub(crate) fn machine_line() -> String {
    let machine = machine();
    format!(
        "machine: {} cores ({}), Linux {}, load {}",
        machine["cores"],
        machine["cpu"].as_str().unwrap_or("unknown"),
        machine["kernel"].as_str().unwrap_or("unknown"),
        machine["load"].as_str().unwrap_or("unknown")
    )
}

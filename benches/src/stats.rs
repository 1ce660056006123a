//! Figures from samples.

use std::time::Duration;

use serde_json::{Value, json};

/// Sorted samples of one quantity.
#[derive(Debug, Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// Times in milliseconds.
    pub(crate) fn millis(times: &[Duration]) -> Self {
        Self::new(times.iter().map(|time| millis(*time)).collect())
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

    /// `median, p95, p99, max` in the unit.
    pub(crate) fn line(&self, unit: &str) -> String {
        format!(
            "median {:.1} {unit}, p95 {:.1}, p99 {:.1}, max {:.1} ({} samples)",
            self.median(),
            self.quantile(0.95),
            self.quantile(0.99),
            self.quantile(1.0),
            self.0.len()
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!(self.0)
    }
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Cores of the machine.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

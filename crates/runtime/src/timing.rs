//! How long each phase of a sandbox's start took.

use std::time::Duration;

use tokio::time::Instant;

/// Phases of a sandbox's start. Network, scratch and kernel overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timing {
    /// Name and length, in the order in which they ended: `request` (until the intent is durable),
    /// `network`, `scratch`, `kernel`, `vmm` (until the VMM answers), `boot` (until the agent
    /// answers), `configure`. Of a VM from the pool `take` stands for those from `vmm` to `boot`.
    pub phases: Vec<(&'static str, Duration)>,
    /// The VM went on where a template was, instead of booting.
    pub from_template: bool,
    /// It had done so before it was asked for, and waited in the pool.
    pub from_pool: bool,
    /// From the request to the ready sandbox.
    pub total: Duration,
}

/// A clock for one phase.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

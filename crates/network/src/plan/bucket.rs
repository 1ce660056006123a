//! Limits of traffic as token buckets (tc-tbf(8)).

use std::time::Duration;

/// How long a sender may have been idle and still make up for it.
const BURST: Duration = Duration::from_millis(100);
/// The least burst: a packet as large as a device passes them on at once.
const LEAST_BURST: u64 = 64 * 1024;
/// The longest burst, which keeps low rates true; the CNI plugin counts it in 32 bits of 64 ns.
const LONGEST_BURST: Duration = Duration::from_secs(200);
/// How long a packet waits before others are dropped.
const LATENCY: Duration = Duration::from_millis(50);

/// A rate, and how much may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that pass without waiting after a pause.
    pub burst: u32,
    /// Most bytes that wait.
    pub queue: u32,
}

impl Bucket {
    /// The bucket of a limit in bits per second, at least 1000.
    pub fn new(bits_per_second: u64) -> Self {
        let rate = bits_per_second / 8;
        let within = |time: Duration| {
            let bytes = u128::from(rate) * time.as_millis() / 1000;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        // In bits it must fit 32 bits too.
        let most = within(LONGEST_BURST).min(u64::from(u32::MAX / 8));
        let burst = within(BURST).max(LEAST_BURST).min(most);
        let saturated = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self {
            rate,
            burst: saturated(burst),
            queue: saturated(burst.saturating_add(within(LATENCY))),
        }
    }

    /// The burst as CNI plugins want it.
    pub(crate) fn burst_bits(&self) -> u64 {
        u64::from(self.burst) * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_large_enough_for_a_packet_and_small_enough_to_limit() {
        let mbit = Bucket::new(100_000_000);
        assert_eq!((mbit.rate, mbit.burst), (12_500_000, 1_250_000));
        assert_eq!(mbit.queue, 1_250_000 + 625_000);
        assert_eq!(Bucket::new(1_000_000).burst, 65_536);
        // Least and most that a pod can ask for.
        assert_eq!(Bucket::new(1_000).burst, 25_000);
        let most = Bucket::new(1_000_000_000_000_000);
        assert_eq!((most.burst, most.queue), (u32::MAX / 8, u32::MAX));
        assert!(most.burst_bits() <= u64::from(u32::MAX));
    }
}

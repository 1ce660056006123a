//! How many queries a pod may ask.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use tokio::time::Instant;

const PER_SECOND: f64 = 500.0;
const BURST: f64 = 1000.0;
/// More askers than that at a time there are not: sources were checked against the leases.
const MAX_SOURCES: usize = 65_536;

/// A token bucket per source.
#[derive(Debug, Default)]
pub(crate) struct Buckets(HashMap<IpAddr, (f64, Instant)>);

impl Buckets {
    /// Whether `source` may ask once more at `at`.
    pub(crate) fn take(&mut self, source: IpAddr, at: Instant) -> bool {
        if self.0.len() >= MAX_SOURCES {
            let full = Duration::from_secs_f64(BURST / PER_SECOND);
            self.0
                .retain(|_source, (_tokens, last)| at.duration_since(*last) < full);
        }
        let (tokens, last) = self.0.entry(source).or_insert((BURST, at));
        *tokens = (*tokens + at.duration_since(*last).as_secs_f64() * PER_SECOND).min(BURST);
        *last = at;
        let allowed = *tokens >= 1.0;
        if allowed {
            *tokens -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_others_are_not() {
        let mut buckets = Buckets::default();
        let start = Instant::now();
        let (loud, quiet) = ("10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap());
        let allowed = (0..5000).filter(|_query| buckets.take(loud, start)).count();
        assert_eq!(allowed, 1000);
        assert!(buckets.take(quiet, start));
        let later = start + Duration::from_secs(1);
        let allowed = (0..5000).filter(|_query| buckets.take(loud, later)).count();
        assert!((499..=500).contains(&allowed), "{allowed}");
    }
}

//! Growing delays between tries, as a kubelet has them: 10 s, doubling to 5 min, forgotten after
//! 10 min of peace.

use jiff::{SignedDuration, Timestamp};

const FIRST: SignedDuration = SignedDuration::from_secs(10);
const MAX: SignedDuration = SignedDuration::from_secs(300);
const FORGET: SignedDuration = SignedDuration::from_secs(600);

/// Delay before the next try of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Backoff {
    delay: Option<SignedDuration>,
    updated: Option<Timestamp>,
}

impl Backoff {
    /// When the next try may be, if something ended at `since`; `None` = at once.
    pub(crate) fn until(&self, since: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let delay = self.delay?;
        if self.is_forgotten(since) {
            return None;
        }
        let until = since.checked_add(delay).ok()?;
        (until > now).then_some(until)
    }

    /// The delay in force, in whole seconds.
    pub(crate) fn seconds(&self) -> i64 {
        self.delay.map_or(0, |delay| delay.as_secs())
    }

    /// Notes a try at `now` of what had ended at `since`.
    pub(crate) fn next(&mut self, since: Timestamp, now: Timestamp) {
        self.delay = Some(match self.delay {
            Some(delay) if !self.is_forgotten(since) => (delay * 2).min(MAX),
            _ => FIRST,
        });
        self.updated = Some(now);
    }

    fn is_forgotten(&self, since: Timestamp) -> bool {
        self.updated
            .is_none_or(|updated| since.duration_since(updated) > FORGET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn the_first_try_is_at_once_and_then_delays_double() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until(at(100), at(100)), None);
        let mut now = 100;
        for delay in [10, 20, 40, 80, 160, 300, 300] {
            backoff.next(at(now), at(now));
            assert_eq!(backoff.seconds(), delay);
            now += 1;
            assert_eq!(backoff.until(at(now), at(now)), Some(at(now + delay)));
            assert_eq!(backoff.until(at(now), at(now + delay)), None);
        }
    }

    #[test]
    fn ten_minutes_of_peace_forget() {
        let mut backoff = Backoff::default();
        backoff.next(at(0), at(0));
        backoff.next(at(15), at(15));
        assert_eq!(backoff.seconds(), 20);
        assert_eq!(backoff.until(at(700), at(700)), None);
        backoff.next(at(700), at(700));
        assert_eq!(backoff.seconds(), 10);
    }
}

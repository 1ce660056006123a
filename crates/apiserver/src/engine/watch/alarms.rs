//! When a watch ends, and when a bookmark is due.

use std::{pin::Pin, time::Duration};

use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// What ends a watch or is due beside its changes. The timers live as long as the watch: made anew for each event,
/// they would cost more than the event.
pub(super) struct Alarms {
    shutdown: CancellationToken,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    end: Pin<Box<Sleep>>,
    /// Only if bookmarks were asked for.
    bookmark: Option<Pin<Box<Sleep>>>,
    interval: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alarm {
    End,
    Bookmark,
}

impl Alarms {
    pub(super) fn new(
        shutdown: &CancellationToken,
        life: Duration,
        bookmarks: Option<Duration>,
    ) -> Self {
        let now = Instant::now();
        Self {
            shutdown: shutdown.clone(),
            cancelled: Box::pin(shutdown.clone().cancelled_owned()),
            end: Box::pin(sleep_until(now + life)),
            bookmark: bookmarks.map(|interval| Box::pin(sleep_until(now + interval))),
            interval: bookmarks.unwrap_or_default(),
        }
    }

    /// What has come due, without waiting for it.
    pub(super) fn due(&self) -> Option<Alarm> {
        let now = Instant::now();
        if now >= self.end.deadline() || self.shutdown.is_cancelled() {
            return Some(Alarm::End);
        }
        let bookmark = self.bookmark.as_ref();
        bookmark
            .is_some_and(|sleep| now >= sleep.deadline())
            .then_some(Alarm::Bookmark)
    }

    /// What comes due next. Cancel-safe.
    pub(super) async fn next(&mut self) -> Alarm {
        let bookmark = async {
            match &mut self.bookmark {
                Some(sleep) => sleep.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = &mut self.cancelled => Alarm::End,
            () = &mut self.end => Alarm::End,
            () = bookmark => Alarm::Bookmark,
        }
    }

    pub(super) fn set_bookmark(&mut self) {
        let next = Instant::now() + self.interval;
        if let Some(sleep) = &mut self.bookmark {
            sleep.as_mut().reset(next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bookmarks_come_again_and_the_end_comes_once() {
        let (life, interval) = (Duration::from_secs(25), Duration::from_secs(10));
        let token = CancellationToken::new();
        let mut alarms = Alarms::new(&token, life, Some(interval));
        assert_eq!(alarms.due(), None);
        for _ in 0..2 {
            assert_eq!(alarms.next().await, Alarm::Bookmark);
            assert_eq!(alarms.due(), Some(Alarm::Bookmark));
            alarms.set_bookmark();
            assert_eq!(alarms.due(), None);
        }
        assert_eq!(alarms.next().await, Alarm::End);
        assert_eq!(alarms.due(), Some(Alarm::End));
    }

    #[tokio::test(start_paused = true)]
    async fn without_bookmarks_only_the_end_or_a_shutdown_is_waited_for() {
        let token = CancellationToken::new();
        let mut alarms = Alarms::new(&token, Duration::from_secs(60), None);
        token.cancel();
        assert_eq!(alarms.due(), Some(Alarm::End));
        assert_eq!(alarms.next().await, Alarm::End);
    }
}

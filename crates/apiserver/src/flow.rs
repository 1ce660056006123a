//! How many requests each user may have under way.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use hypernetes_apimachinery::Status;
use hypernetes_identity::{MASTERS, User};

use crate::{config::Limits, status::Result};

/// Name of a user, and whether it is about streams.
type Key = (String, bool);
type Counts = Arc<Mutex<HashMap<Key, usize>>>;

/// Counts of users with requests under way.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    counts: Counts,
}

/// A place in the count, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Option<(Counts, Key)>);

impl Flow {
    /// Takes a place for one request.
    pub(crate) fn enter(&self, user: &User, long_running: bool, limits: &Limits) -> Result<Place> {
        if user.is_in(MASTERS) {
            return Ok(Place(None));
        }
        let limit = if long_running {
            limits.long_running_per_user
        } else {
            limits.in_flight_per_user
        };
        let key = (user.name.clone(), long_running);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key.clone()).or_default();
        if *count >= limit {
            return Err(Status::too_many_requests(
                "too many requests of this user are under way, please try again later",
                1,
            ));
        }
        *count += 1;
        Ok(Place(Some((Arc::clone(&self.counts), key))))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((counts, key)) = self.0.take() else {
            return;
        };
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_does_not_take_anothers_places() {
        let flow = Flow::default();
        let limits = Limits {
            in_flight_per_user: 2,
            long_running_per_user: 1,
            ..Limits::default()
        };
        let (a, b) = (User::authenticated("a", []), User::authenticated("b", []));
        let first = flow.enter(&a, false, &limits).unwrap();
        let _second = flow.enter(&a, false, &limits).unwrap();
        let refused = flow.enter(&a, false, &limits).unwrap_err();
        assert_eq!(
            (refused.code, refused.details.unwrap().retry_after_seconds),
            (429, 1)
        );
        let _other = flow.enter(&b, false, &limits).unwrap();
        let _watch = flow.enter(&a, true, &limits).unwrap();
        assert!(flow.enter(&a, true, &limits).is_err());
        drop(first);
        let _again = flow.enter(&a, false, &limits).unwrap();
        let system = User::system("s");
        let places: Vec<_> = (0..10)
            .map(|_| flow.enter(&system, false, &limits).unwrap())
            .collect();
        drop(places);
    }

    #[test]
    fn nothing_is_kept_of_users_without_requests() {
        let flow = Flow::default();
        drop(
            flow.enter(&User::authenticated("a", []), false, &Limits::default())
                .unwrap(),
        );
        assert!(flow.counts.lock().unwrap().is_empty());
    }
}

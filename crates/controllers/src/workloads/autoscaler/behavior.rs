//! How fast a number of replicas may change.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

/// What autoscalers have recommended and done, by id.
pub(in crate::workloads) type Memory = HashMap<String, Lately>;

const USUAL_DOWN_WINDOW: i64 = 300;
/// Nothing is remembered for longer.
const LONGEST: SignedDuration = SignedDuration::from_secs(3600);

/// What one autoscaler has recommended and done.
#[derive(Debug, Clone, Default)]
pub(in crate::workloads) struct Lately {
    recommended: Vec<(Timestamp, i64)>,
    /// Changes: up above zero, down below.
    changed: Vec<(Timestamp, i64)>,
}

impl Lately {
    /// Remembers a change.
    pub(super) fn scaled(&mut self, from: i64, to: i64, now: Timestamp) {
        self.changed.push((now, to - from));
    }

    /// What may be had now of what is wanted.
    pub(super) fn bound(
        &mut self,
        behavior: &Value,
        current: i64,
        wanted: i64,
        now: Timestamp,
    ) -> i64 {
        self.recommended
            .retain(|(at, _)| now.duration_since(*at) <= LONGEST);
        self.changed
            .retain(|(at, _)| now.duration_since(*at) <= LONGEST);
        self.recommended.push((now, wanted));
        let (up, down) = (&behavior["scaleUp"], &behavior["scaleDown"]);
        let window = |rules: &Value, usual: i64| {
            let seconds = rules["stabilizationWindowSeconds"]
                .as_i64()
                .unwrap_or(usual);
            SignedDuration::from_secs(seconds)
        };
        let within = |window: SignedDuration| {
            let all = self.recommended.iter();
            all.filter(move |(at, _)| now.duration_since(*at) <= window)
                .map(|(_, wanted)| *wanted)
        };
        // Up no further than the least, down no further than the most of what was wanted lately.
        let least = within(window(up, 0)).min().unwrap_or(wanted);
        let most = within(window(down, USUAL_DOWN_WINDOW))
            .max()
            .unwrap_or(wanted);
        let steady = current.max(least).min(most);
        if steady > current {
            steady.min(self.limit_up(up, current, now))
        } else if steady < current {
            steady.max(self.limit_down(down, current, now))
        } else {
            steady
        }
    }

    fn since(&self, seconds: i64, now: Timestamp, up: bool) -> i64 {
        let window = SignedDuration::from_secs(seconds);
        self.changed
            .iter()
            .filter(|(at, change)| now.duration_since(*at) < window && (*change > 0) == up)
            .map(|(_, change)| change.abs())
            .sum()
    }

    fn limit_up(&self, rules: &Value, current: i64, now: Timestamp) -> i64 {
        let limits = policies(rules, &[("Pods", 4, 15), ("Percent", 100, 15)]);
        let limits = limits.into_iter().map(|(kind, value, seconds)| {
            let start = current - self.since(seconds, now, true);
            if kind == "Pods" {
                start + value
            } else {
                (start * (100 + value) + 99).div_euclid(100)
            }
        });
        match rules["selectPolicy"].as_str() {
            Some("Disabled") => current,
            Some("Min") => limits.min().unwrap_or(current),
            _ => limits.max().unwrap_or(current),
        }
    }

    fn limit_down(&self, rules: &Value, current: i64, now: Timestamp) -> i64 {
        let limits = policies(rules, &[("Percent", 100, 15)]);
        let limits = limits.into_iter().map(|(kind, value, seconds)| {
            let start = current + self.since(seconds, now, false);
            if kind == "Pods" {
                start - value
            } else {
                (start * (100 - value)).div_euclid(100)
            }
        });
        match rules["selectPolicy"].as_str() {
            Some("Disabled") => current,
            Some("Min") => limits.max().unwrap_or(current),
            _ => limits.min().unwrap_or(current),
        }
    }
}

fn policies<'a>(rules: &'a Value, usual: &[(&'a str, i64, i64)]) -> Vec<(&'a str, i64, i64)> {
    let Some(list) = rules["policies"].as_array() else {
        return usual.to_vec();
    };
    list.iter()
        .map(|policy| {
            (
                policy["type"].as_str().unwrap_or_default(),
                policy["value"].as_i64().unwrap_or_default(),
                policy["periodSeconds"].as_i64().unwrap_or_default(),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn up_at_once_and_down_after_a_while() {
        let mut lately = Lately::default();
        assert_eq!(
            lately.bound(&Value::Null, 1, 100, at(0)),
            5,
            "four more at most"
        );
        lately.scaled(1, 5, at(0));
        assert_eq!(
            lately.bound(&Value::Null, 5, 100, at(5)),
            5,
            "in the same period"
        );
        assert_eq!(
            lately.bound(&Value::Null, 5, 100, at(20)),
            10,
            "twice as many"
        );
        let mut lately = Lately::default();
        lately.bound(&Value::Null, 5, 5, at(0));
        assert_eq!(lately.bound(&Value::Null, 5, 1, at(100)), 5);
        assert_eq!(lately.bound(&Value::Null, 5, 1, at(301)), 1);
    }

    #[test]
    fn policies_bound_each_step() {
        let behavior = json!({"scaleDown": {"stabilizationWindowSeconds": 0,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}});
        let mut lately = Lately::default();
        assert_eq!(lately.bound(&behavior, 5, 1, at(0)), 4);
        lately.scaled(5, 4, at(0));
        assert_eq!(lately.bound(&behavior, 4, 1, at(30)), 4);
        assert_eq!(lately.bound(&behavior, 4, 1, at(61)), 3);
        let off =
            json!({"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Disabled"}});
        assert_eq!(Lately::default().bound(&off, 5, 1, at(0)), 5);
    }
}

//! From the use of pods to a number of them.

use hypernetes_apimachinery::{Quantity, meta, quota};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::workloads::owned::{count, is_ready, phase};

/// What is this near is right.
const TOLERANCE: f64 = 0.1;
/// For how long after its start a pod that is not ready is taken for starting.
const START: SignedDuration = SignedDuration::from_secs(300);

/// What the use shall be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    /// Percent of what is requested.
    Utilization(i64),
    /// Thousandths for each pod.
    Average(i64),
}

impl Target {
    pub(super) fn of(target: &Value) -> Option<Self> {
        if let Some(percent) = target["averageUtilization"].as_i64() {
            return Some(Self::Utilization(percent));
        }
        quota::quantity(&target["averageValue"]).map(|amount| Self::Average(amount.milli_value()))
    }
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sample {
    /// Thousandths that are used; `None` if nobody knows.
    pub(super) used: Option<i128>,
    /// Thousandths that are requested, if each container says so.
    pub(super) requested: Option<i128>,
    /// It is starting: its use says nothing yet.
    pub(super) unready: bool,
}

impl Sample {
    /// `None`: the pod does not count, since it is going or has failed.
    pub(super) fn of(
        pod: &Value,
        resource: &str,
        container: Option<&str>,
        used: Option<i128>,
        now: Timestamp,
    ) -> Option<Self> {
        if meta::is_deleting(pod) || phase(pod) == "Failed" {
            return None;
        }
        let mut requested = Some(0);
        for own in pod["spec"]["containers"].as_array().into_iter().flatten() {
            if container.is_none_or(|only| own["name"] == only) {
                let amount = quota::quantity(&own["resources"]["requests"][resource]);
                requested = requested
                    .zip(amount)
                    .map(|(sum, amount): (i128, Quantity)| sum + i128::from(amount.milli_value()));
            }
        }
        let started: Option<Timestamp> = pod["status"]["startTime"]
            .as_str()
            .and_then(|text| text.parse().ok());
        let young = started.is_none_or(|start| now.duration_since(start) < START);
        let unready = phase(pod) == "Pending" || (resource == "cpu" && !is_ready(pod) && young);
        Some(Self {
            used,
            requested,
            unready,
        })
    }
}

/// What the use is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Current {
    percent: Option<i64>,
    average: i64,
}

impl Current {
    pub(super) fn show(self, resource: &str) -> Value {
        let average = if resource == "cpu" {
            format!("{}m", self.average)
        } else {
            (self.average / 1000).to_string()
        };
        let mut out = json!({"averageValue": average});
        if let Some(percent) = self.percent {
            out["averageUtilization"] = percent.into();
        }
        out
    }
}

/// How many pods there should be, and what the use of those that there are is.
pub(super) fn replicas(
    samples: &[Sample],
    target: Target,
    current: i64,
) -> Result<(i64, Current), String> {
    if matches!(target, Target::Utilization(_))
        && samples.iter().any(|sample| sample.requested.is_none())
    {
        return Err("failed to get RESOURCE utilization: missing request for RESOURCE".to_owned());
    }
    let measured: Vec<&Sample> = samples
        .iter()
        .filter(|sample| !sample.unready && sample.used.is_some())
        .collect();
    if measured.is_empty() {
        return Err(
            "failed to get RESOURCE utilization: did not receive metrics for targeted pods (pods \
             might be unready)"
                .to_owned(),
        );
    }
    let missing: Vec<&Sample> = samples
        .iter()
        .filter(|sample| !sample.unready && sample.used.is_none())
        .collect();
    let unready = samples.iter().filter(|sample| sample.unready).count();
    let sum =
        |samples: &[&Sample]| -> i128 { samples.iter().filter_map(|sample| sample.used).sum() };
    let requested = |samples: &[&Sample]| -> i128 {
        samples.iter().filter_map(|sample| sample.requested).sum()
    };
    let used = sum(&measured);
    let is = Current {
        percent: matches!(target, Target::Utilization(_))
            .then(|| whole(100.0 * fraction(used, requested(&measured)))),
        average: whole(fraction(used, i128::from(count(measured.len())))),
    };
    let ratio = |used: i128, of: &[&Sample]| match target {
        Target::Utilization(percent) => {
            100.0 * fraction(used, requested(of)) / fraction(i128::from(percent), 1)
        }
        Target::Average(amount) => {
            fraction(used, i128::from(count(of.len()))) / fraction(i128::from(amount), 1)
        }
    };
    let first = ratio(used, &measured);
    if missing.is_empty() && (unready == 0 || first <= 1.0) {
        if (1.0 - first).abs() <= TOLERANCE {
            return Ok((current, is));
        }
        return Ok((
            up(first * fraction(i128::from(count(measured.len())), 1)),
            is,
        ));
    }
    // With what is not known taken for what changes least.
    let mut all = measured.clone();
    let mut used = used;
    if first < 1.0 {
        for sample in &missing {
            all.push(sample);
            used += match target {
                Target::Utilization(percent) => {
                    sample.requested.unwrap_or_default() * i128::from(percent.max(100)) / 100
                }
                Target::Average(amount) => i128::from(amount),
            };
        }
    } else {
        all.extend(&missing);
        all.extend(samples.iter().filter(|sample| sample.unready));
    }
    let second = ratio(used, &all);
    let turned = (first < 1.0 && second > 1.0) || (first > 1.0 && second < 1.0);
    if (1.0 - second).abs() <= TOLERANCE || turned {
        return Ok((current, is));
    }
    let wanted = up(second * fraction(i128::from(count(all.len())), 1));
    if (second < 1.0 && wanted > current) || (second > 1.0 && wanted < current) {
        return Ok((current, is));
    }
    Ok((wanted, is))
}

#[allow(
    clippy::cast_precision_loss,
    reason = "amounts of one machine are far below 2^53"
)]
fn fraction(over: i128, under: i128) -> f64 {
    if under == 0 {
        0.0
    } else {
        over as f64 / under as f64
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "saturates; a number of replicas is bounded afterwards"
)]
fn up(value: f64) -> i64 {
    // Sums of fractions may be a little above a whole number.
    (value - 1e-9).ceil() as i64
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "saturates; it is only shown"
)]
fn whole(value: f64) -> i64 {
    value as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(used: impl Into<Option<i128>>, unready: bool) -> Sample {
        Sample {
            used: used.into(),
            requested: Some(1000),
            unready,
        }
    }

    #[test]
    fn use_decides_the_number() {
        let half = Target::Utilization(50);
        let cases = [
            // used by each, current, wanted
            (vec![sample(500, false); 2], 2, 2),
            (vec![sample(540, false); 2], 2, 2),
            (vec![sample(1000, false); 2], 2, 4),
            (vec![sample(100, false); 4], 4, 1),
            // Pods that start do not call for more than they would make up for.
            (vec![sample(1000, false), sample(0, true)], 2, 2),
            (
                vec![sample(1000, false), sample(1000, false), sample(0, true)],
                3,
                4,
            ),
            // Nobody knows what one uses: it is taken for busy when there would be less.
            (vec![sample(100, false), sample(None, false)], 2, 2),
        ];
        for (samples, current, wanted) in cases {
            let (replicas, _) = replicas(&samples, half, current).unwrap();
            assert_eq!(replicas, wanted, "{samples:?}");
        }
        let (wanted, is) = replicas(&[sample(300, false)], Target::Average(100), 1).unwrap();
        assert_eq!((wanted, is.average), (3, 300));
        assert!(replicas(&[sample(None, false)], half, 1).is_err());
        let mut silent = sample(1, false);
        silent.requested = None;
        assert!(
            replicas(&[silent], half, 1)
                .unwrap_err()
                .contains("missing request")
        );
    }
}

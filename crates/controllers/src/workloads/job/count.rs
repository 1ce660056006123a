//! How many of a job's pods have succeeded and failed.

use std::collections::HashSet;

use hypernetes_apimachinery::meta;
use serde_json::{Value, json};

use super::{Indexes, TRACKING, failure, index_of, is_indexed, number};
use crate::workloads::owned::{count as number_of, phase};

/// The count as it is and as it is to be written.
#[derive(Debug, Default)]
pub(super) struct Count {
    succeeded: usize,
    failed: usize,
    /// Ids of pods that are counted when they have lost their finalizer.
    succeeding: Vec<String>,
    failing: Vec<String>,
    /// Ids of pods that are not counted at all.
    ignored: HashSet<String>,
    completed: Indexes,
    given_up: Indexes,
}

impl Count {
    /// From the status and the pods that there are.
    pub(super) fn of(job: &Value, pods: &[Value]) -> Self {
        let status = &job["status"];
        let stored = |field: &str| usize::try_from(number(&status[field])).unwrap_or_default();
        let end = job["spec"]["completions"].as_u64().unwrap_or_default();
        let indexes = |field: &str| Indexes::parse(status[field].as_str().unwrap_or_default(), end);
        let mut count = Self {
            succeeded: stored("succeeded"),
            failed: stored("failed"),
            completed: indexes("completedIndexes"),
            given_up: indexes("failedIndexes"),
            ..Self::default()
        };
        let tracked = |id: &str| {
            pods.iter()
                .any(|pod| meta::uid(pod) == Some(id) && is_tracked(pod))
        };
        let uncounted = &status["uncountedTerminatedPods"];
        for id in texts(&uncounted["succeeded"]) {
            if tracked(&id) {
                count.succeeding.push(id);
            } else {
                count.succeeded += 1;
            }
        }
        for id in texts(&uncounted["failed"]) {
            if tracked(&id) {
                count.failing.push(id);
            } else {
                count.failed += 1;
            }
        }
        for pod in pods.iter().filter(|pod| is_tracked(pod)) {
            count.take(job, pod);
        }
        if is_indexed(job) {
            count.give_up(job, pods);
            count.succeeded = count.completed.len();
            count.succeeding.clear();
        }
        count
    }

    fn take(&mut self, job: &Value, pod: &Value) {
        let id = meta::uid(pod).unwrap_or_default().to_owned();
        if self.succeeding.contains(&id) || self.failing.contains(&id) {
            return;
        }
        if phase(pod) == "Succeeded" {
            match index_of(pod).filter(|_| is_indexed(job)) {
                Some(index) => {
                    self.completed.insert(index);
                    self.ignored.insert(id);
                }
                None => self.succeeding.push(id),
            }
        } else if has_failed(job, pod) {
            if job["spec"]["suspend"] == true || failure::is_ignored(job, pod) {
                self.ignored.insert(id);
            } else {
                self.failing.push(id);
            }
        }
    }

    /// Indexes that have failed as often as one may.
    fn give_up(&mut self, job: &Value, pods: &[Value]) {
        let Some(limit) = job["spec"]["backoffLimitPerIndex"].as_u64() else {
            return;
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let failed = |index: u64| {
            let own = pods.iter().filter(|pod| index_of(pod) == Some(index));
            let failed = own.filter(|pod| has_failed(job, pod) && !failure::is_ignored(job, pod));
            (
                failed.clone().count(),
                failed.into_iter().any(|pod| failure::fails_index(job, pod)),
            )
        };
        for index in pods.iter().filter_map(index_of) {
            let (times, at_once) = failed(index);
            if (times > limit || at_once) && !self.completed.contains(index) {
                self.given_up.insert(index);
            }
        }
    }

    pub(super) fn succeeded(&self) -> usize {
        self.succeeded + self.succeeding.len()
    }

    pub(super) fn failed(&self) -> usize {
        self.failed + self.failing.len()
    }

    pub(super) fn completed(&self) -> &Indexes {
        &self.completed
    }

    pub(super) fn failed_indexes(&self) -> &Indexes {
        &self.given_up
    }

    /// Whether no pod waits to be counted.
    pub(super) fn is_settled(&self) -> bool {
        self.succeeding.is_empty() && self.failing.is_empty()
    }

    /// Whether the job has what it was for.
    pub(super) fn is_enough(&self, job: &Value, active: usize) -> bool {
        match job["spec"]["completions"].as_u64() {
            Some(wanted) => self.succeeded() >= usize::try_from(wanted).unwrap_or(usize::MAX),
            None => self.succeeded() > 0 && active == 0,
        }
    }

    /// The first indexes that nobody works on.
    pub(super) fn free_indexes(&self, job: &Value, active: &[&Value], many: usize) -> Vec<u64> {
        let end = job["spec"]["completions"].as_u64().unwrap_or_default();
        let taken: HashSet<u64> = active.iter().filter_map(|pod| index_of(pod)).collect();
        (0..end)
            .filter(|index| {
                !taken.contains(index)
                    && !self.completed.contains(*index)
                    && !self.given_up.contains(*index)
            })
            .take(many)
            .collect()
    }

    /// Pods whose end the written status holds.
    pub(super) fn counted<'a>(&'a self, pods: &'a [Value]) -> impl Iterator<Item = &'a Value> {
        pods.iter().filter(|pod| {
            let id = meta::uid(pod).unwrap_or_default();
            is_tracked(pod)
                && (self.ignored.contains(id)
                    || self
                        .succeeding
                        .iter()
                        .chain(&self.failing)
                        .any(|own| own == id))
        })
    }

    pub(super) fn write(&mut self, job: &Value, status: &mut Value) {
        let mut uncounted = json!({});
        if !self.succeeding.is_empty() {
            uncounted["succeeded"] = json!(self.succeeding);
        }
        if !self.failing.is_empty() {
            uncounted["failed"] = json!(self.failing);
        }
        status["uncountedTerminatedPods"] = uncounted;
        for (field, value) in [("succeeded", self.succeeded), ("failed", self.failed)] {
            if value > 0 {
                status[field] = number_of(value).into();
            }
        }
        if is_indexed(job) {
            for (field, indexes) in [
                ("completedIndexes", &self.completed),
                ("failedIndexes", &self.given_up),
            ] {
                if indexes.len() > 0 {
                    status[field] = indexes.to_string().into();
                }
            }
        }
    }
}

fn is_tracked(pod: &Value) -> bool {
    meta::finalizers(pod).any(|finalizer| finalizer == TRACKING)
}

/// A pod that is being deleted will not succeed any more; whether it is waited for is the job's to
/// say.
fn has_failed(job: &Value, pod: &Value) -> bool {
    if phase(pod) == "Failed" {
        return true;
    }
    job["spec"]["podReplacementPolicy"] != "Failed"
        && meta::is_deleting(pod)
        && phase(pod) != "Succeeded"
}

fn texts(value: &Value) -> Vec<String> {
    let texts = value.as_array().into_iter().flatten();
    texts.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, phase: &str, tracked: bool) -> Value {
        let finalizers = if tracked {
            json!([TRACKING])
        } else {
            json!([])
        };
        json!({"metadata": {"uid": id, "finalizers": finalizers}, "status": {"phase": phase}})
    }

    #[test]
    fn a_pod_is_counted_once() {
        let mut job = json!({"spec": {"completions": 2}, "status": {}});
        let before = [
            pod("a", "Succeeded", true),
            pod("b", "Failed", true),
            pod("c", "Running", true),
        ];
        let mut count = Count::of(&job, &before);
        assert_eq!((count.succeeded(), count.failed()), (1, 1));
        let mut status = json!({});
        count.write(&job, &mut status);
        assert_eq!(
            status,
            json!({"uncountedTerminatedPods": {"succeeded": ["a"], "failed": ["b"]}})
        );
        assert_eq!(count.counted(&before).count(), 2);
        // The daemon has died here: the same is found again.
        job["status"] = status;
        let count = Count::of(&job, &before);
        assert_eq!((count.succeeded(), count.failed()), (1, 1));
        // Finalizers are gone, one pod too.
        let after = [pod("a", "Succeeded", false), pod("c", "Running", true)];
        let mut count = Count::of(&job, &after);
        let mut status = job["status"].clone();
        count.write(&job, &mut status);
        assert_eq!(
            status,
            json!({"uncountedTerminatedPods": {}, "succeeded": 1, "failed": 1})
        );
        job["status"] = status;
        let count = Count::of(&job, &after);
        assert_eq!((count.succeeded(), count.failed()), (1, 1));
    }

    #[test]
    fn indexes_are_done_one_by_one() {
        let job = json!({"spec": {"completions": 3, "completionMode": "Indexed", "backoffLimitPerIndex": 0},
            "status": {"completedIndexes": "0"}});
        let indexed = |id: &str, phase: &str, index: &str| {
            let mut pod = pod(id, phase, true);
            meta::set_annotation(&mut pod, super::super::INDEX, index);
            pod
        };
        let pods = [indexed("a", "Succeeded", "2"), indexed("b", "Failed", "1")];
        let count = Count::of(&job, &pods);
        assert_eq!(count.completed.to_string(), "0,2");
        assert_eq!(count.given_up.to_string(), "1");
        assert!(count.free_indexes(&job, &[], 5).is_empty());
    }
}

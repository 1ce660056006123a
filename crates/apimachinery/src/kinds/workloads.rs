//! Workloads, and what bounds them: `apps`, `batch`, `autoscaling`, `policy`, `scheduling.k8s.io`,
//! quotas.

use super::{ResourceKind, STATUS, Subresource, kind, sub};

/// `scale`: one body for all kinds that have a number of replicas.
pub(super) const SCALE: Subresource = Subresource {
    group: Some("autoscaling"),
    version: Some("v1"),
    ..sub("scale", "Scale", STATUS)
};

pub(super) const CONTROLLER_REVISIONS: ResourceKind = kind(
    "apps",
    "v1",
    "ControllerRevision",
    "controllerrevisions",
    "controllerrevision",
);

pub(super) const DAEMON_SETS: ResourceKind = ResourceKind {
    short_names: &["ds"],
    categories: &["all"],
    subresources: &[sub("status", "DaemonSet", STATUS)],
    ..kind("apps", "v1", "DaemonSet", "daemonsets", "daemonset")
};

pub(super) const DEPLOYMENTS: ResourceKind = ResourceKind {
    short_names: &["deploy"],
    categories: &["all"],
    subresources: &[SCALE, sub("status", "Deployment", STATUS)],
    ..kind("apps", "v1", "Deployment", "deployments", "deployment")
};

pub(super) const REPLICA_SETS: ResourceKind = ResourceKind {
    short_names: &["rs"],
    categories: &["all"],
    subresources: &[SCALE, sub("status", "ReplicaSet", STATUS)],
    ..kind("apps", "v1", "ReplicaSet", "replicasets", "replicaset")
};

pub(super) const STATEFUL_SETS: ResourceKind = ResourceKind {
    short_names: &["sts"],
    categories: &["all"],
    subresources: &[SCALE, sub("status", "StatefulSet", STATUS)],
    ..kind("apps", "v1", "StatefulSet", "statefulsets", "statefulset")
};

pub(super) const AUTOSCALERS: ResourceKind = ResourceKind {
    short_names: &["hpa"],
    categories: &["all"],
    subresources: &[sub("status", "HorizontalPodAutoscaler", STATUS)],
    ..kind(
        "autoscaling",
        "v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        "horizontalpodautoscaler",
    )
};

pub(super) const CRON_JOBS: ResourceKind = ResourceKind {
    short_names: &["cj"],
    categories: &["all"],
    subresources: &[sub("status", "CronJob", STATUS)],
    ..kind("batch", "v1", "CronJob", "cronjobs", "cronjob")
};

pub(super) const JOBS: ResourceKind = ResourceKind {
    categories: &["all"],
    subresources: &[sub("status", "Job", STATUS)],
    ..kind("batch", "v1", "Job", "jobs", "job")
};

pub(super) const DISRUPTION_BUDGETS: ResourceKind = ResourceKind {
    short_names: &["pdb"],
    subresources: &[sub("status", "PodDisruptionBudget", STATUS)],
    ..kind(
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        "poddisruptionbudget",
    )
};

pub(super) const PRIORITY_CLASSES: ResourceKind = ResourceKind {
    short_names: &["pc"],
    namespaced: false,
    ..kind(
        "scheduling.k8s.io",
        "v1",
        "PriorityClass",
        "priorityclasses",
        "priorityclass",
    )
};

pub(super) const LIMIT_RANGES: ResourceKind = ResourceKind {
    short_names: &["limits"],
    ..kind("", "v1", "LimitRange", "limitranges", "limitrange")
};

pub(super) const RESOURCE_QUOTAS: ResourceKind = ResourceKind {
    short_names: &["quota"],
    subresources: &[sub("status", "ResourceQuota", STATUS)],
    ..kind("", "v1", "ResourceQuota", "resourcequotas", "resourcequota")
};

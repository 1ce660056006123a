//! Kinds that others have taken the place of, which clients still ask for.

use super::{ResourceKind, STATUS, kind, sub, workloads::SCALE};

pub(super) const ENDPOINTS: ResourceKind = ResourceKind {
    short_names: &["ep"],
    ..kind("", "v1", "Endpoints", "endpoints", "endpoints")
};

pub(super) const REPLICATION_CONTROLLERS: ResourceKind = ResourceKind {
    short_names: &["rc"],
    categories: &["all"],
    subresources: &[SCALE, sub("status", "ReplicationController", STATUS)],
    ..kind(
        "",
        "v1",
        "ReplicationController",
        "replicationcontrollers",
        "replicationcontroller",
    )
};

/// A view of `autoscaling/v2`.
pub(super) const AUTOSCALERS_V1: ResourceKind = ResourceKind {
    short_names: &["hpa"],
    categories: &["all"],
    subresources: &[sub("status", "HorizontalPodAutoscaler", STATUS)],
    ..kind(
        "autoscaling",
        "v1",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        "horizontalpodautoscaler",
    )
};

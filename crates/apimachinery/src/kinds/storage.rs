//! Persistent volumes: claims, volumes, classes, and what storage drivers say of themselves.

use super::{ResourceKind, STATUS, kind, sub};

const GROUP: &str = "storage.k8s.io";

pub(super) const CLAIMS: ResourceKind = ResourceKind {
    short_names: &["pvc"],
    subresources: &[sub("status", "PersistentVolumeClaim", STATUS)],
    ..kind(
        "",
        "v1",
        "PersistentVolumeClaim",
        "persistentvolumeclaims",
        "persistentvolumeclaim",
    )
};

pub(super) const VOLUMES: ResourceKind = ResourceKind {
    short_names: &["pv"],
    namespaced: false,
    subresources: &[sub("status", "PersistentVolume", STATUS)],
    ..kind(
        "",
        "v1",
        "PersistentVolume",
        "persistentvolumes",
        "persistentvolume",
    )
};

pub(super) const DRIVERS: ResourceKind = ResourceKind {
    namespaced: false,
    ..kind(GROUP, "v1", "CSIDriver", "csidrivers", "csidriver")
};

pub(super) const DRIVERS_OF_NODES: ResourceKind = ResourceKind {
    namespaced: false,
    ..kind(GROUP, "v1", "CSINode", "csinodes", "csinode")
};

pub(super) const CAPACITIES: ResourceKind = kind(
    GROUP,
    "v1",
    "CSIStorageCapacity",
    "csistoragecapacities",
    "csistoragecapacity",
);

pub(super) const CLASSES: ResourceKind = ResourceKind {
    short_names: &["sc"],
    namespaced: false,
    ..kind(
        GROUP,
        "v1",
        "StorageClass",
        "storageclasses",
        "storageclass",
    )
};

pub(super) const ATTACHMENTS: ResourceKind = ResourceKind {
    namespaced: false,
    subresources: &[sub("status", "VolumeAttachment", STATUS)],
    ..kind(
        GROUP,
        "v1",
        "VolumeAttachment",
        "volumeattachments",
        "volumeattachment",
    )
};

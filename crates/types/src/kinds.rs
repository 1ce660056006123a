//! Names of the project's own API: group, labels, annotations.

/// API group of `Tenant`, `Network` and `PodSnapshot`.
pub const GROUP: &str = "hypernetes.io";
/// Version of the API group.
pub const VERSION: &str = "v1alpha1";
/// Label of a namespace: the tenant that owns it. Set by controllers only.
pub const TENANT_LABEL: &str = "hypernetes.io/tenant";
/// Label of a namespace: the network its pods join, by default `default`.
pub const NETWORK_LABEL: &str = "hypernetes.io/network";
/// Annotation of a pod: the guest kernel it boots.
pub const KERNEL_ANNOTATION: &str = "hypernetes.io/kernel";
/// Annotation of a pod: `"true"` has its containers stand still, `"false"` go on.
pub const PAUSED_ANNOTATION: &str = "hypernetes.io/paused";
/// Condition of a pod whose containers stand still, or should.
pub const PAUSED_CONDITION: &str = "hypernetes.io/Paused";
/// Annotation of a pod: `"true"` frees its memory and keeps it on the disk, `"false"` has it go on.
pub const SUSPENDED_ANNOTATION: &str = "hypernetes.io/suspended";
/// Condition of a pod whose memory is on the disk, or should be.
pub const SUSPENDED_CONDITION: &str = "hypernetes.io/Suspended";
/// Condition of a pod whose VM stands still by itself, with the reason `NodeDiskFull`.
pub const STALLED_CONDITION: &str = "hypernetes.io/Stalled";
/// Annotation of a pod: the pod of the same namespace that its VM goes on from, when it starts first.
pub const CLONE_ANNOTATION: &str = "hypernetes.io/clone-of";
/// Annotation of a pod: the `PodSnapshot` of the same namespace that its VM goes on from, when it starts first.
pub const CLONE_SNAPSHOT_ANNOTATION: &str = "hypernetes.io/clone-of-snapshot";
/// Finalizer of everything that owns something outside the API.
pub const CLEANUP_FINALIZER: &str = "hypernetes.io/cleanup";
/// Prefix of the groups that a tenant's members are in: `hypernetes:tenant:<tenant>:<role>`.
pub const TENANT_GROUP_PREFIX: &str = "hypernetes:tenant:";

//! Labels and annotations by which pods are docker's containers.

/// Labels and annotations of hyper's own begin so.
pub(crate) const PREFIX: &str = "hyper.hypernetes.io/";
/// Label: the container's name.
pub(crate) const NAME: &str = "hyper.hypernetes.io/name";
/// Annotation: the container's id, 64 hexadecimal digits.
pub(crate) const ID: &str = "hyper.hypernetes.io/id";
/// Annotation: how often the container was created from its record; the highest counts.
pub(crate) const RUN: &str = "hyper.hypernetes.io/run";
/// Annotation: restart policy as it was given.
pub(crate) const RESTART: &str = "hyper.hypernetes.io/restart";
/// Annotation: the container is removed when it has ended.
pub(crate) const AUTO_REMOVE: &str = "hyper.hypernetes.io/auto-remove";
/// Annotation: docker labels of the container, as a JSON object.
pub(crate) const LABELS: &str = "hyper.hypernetes.io/labels";
/// Annotation: published ports, as a JSON list.
pub(crate) const PORTS: &str = "hyper.hypernetes.io/ports";
/// Annotation: when the container was created first.
pub(crate) const CREATED: &str = "hyper.hypernetes.io/created";
/// Label: compose project.
pub(crate) const PROJECT: &str = "hyper.hypernetes.io/project";
/// Label: compose service.
pub(crate) const SERVICE: &str = "hyper.hypernetes.io/service";
/// Label of Secrets that `login` makes: the registry as a label can hold it.
pub(crate) const REGISTRY: &str = "hyper.hypernetes.io/registry";
/// Annotation that the node honours: how often a container of the pod is restarted at most.
pub(crate) const MAX_RESTARTS: &str = "hypernetes.io/max-restarts";
/// Annotation that the node honours: seconds that a stop may take, instead of the pod's own.
pub(crate) const STOP_GRACE: &str = "hypernetes.io/stop-grace-seconds";
/// Annotation that the node honours: with `true` the pod's containers stand still.
pub(crate) const PAUSED: &str = "hypernetes.io/paused";
/// Condition by which the node says that they do, or why not.
pub(crate) const PAUSED_CONDITION: &str = "hypernetes.io/Paused";
/// Annotation that the node honours: with `true` it tells in events what the start's phases took.
pub(crate) const TIMING: &str = "hypernetes.io/timing";
/// Annotation that the node honours: with `true` the pod's memory is on the disk.
pub(crate) const SUSPENDED: &str = "hypernetes.io/suspended";
/// Condition by which the node says that it is, or why not.
pub(crate) const SUSPENDED_CONDITION: &str = "hypernetes.io/Suspended";
/// Condition by which the node says that the pod stands still until the node's disk has room for what it writes.
pub(crate) const STALLED_CONDITION: &str = "hypernetes.io/Stalled";
/// Annotation that the node honours: the pod that this one goes on from.
pub(crate) const CLONE_OF: &str = "hypernetes.io/clone-of";
/// The snapshot that a pod goes on from.
pub(crate) const CLONE_OF_SNAPSHOT: &str = "hypernetes.io/clone-of-snapshot";
/// Annotation that the node honours: kernel of the pod.
pub(crate) const KERNEL: &str = "hypernetes.io/kernel";
/// Annotation that the node honours: network of the pod.
pub(crate) const NETWORK: &str = "hypernetes.io/network";
/// Scheduling gate of a container that is created and not started.
pub(crate) const GATE: &str = "hyper.hypernetes.io/created";

//! Failure of a runtime operation.

/// Why the runtime could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// No such sandbox, container or image.
    #[error("{kind} {id} does not exist")]
    NotFound {
        /// What.
        kind: &'static str,
        /// Which.
        id: String,
    },
    /// Not possible in the present state.
    #[error("cannot {action}: {kind} {id} is {state}")]
    State {
        /// What was asked.
        action: &'static str,
        /// Of what.
        kind: &'static str,
        /// Which.
        id: String,
        /// Where it stands.
        state: String,
    },
    /// Not possible while the container stands still.
    #[error("container {0} is paused, unpause the container before exec")]
    Paused(String),
    /// The request is wrong.
    #[error("invalid {field}: {rule}")]
    Invalid {
        /// Field.
        field: String,
        /// What would be right.
        rule: String,
    },
    /// The guest did not do it.
    #[error("the guest of sandbox {sandbox} could not {action}: {message}")]
    Guest {
        /// Which.
        sandbox: String,
        /// What was attempted.
        action: &'static str,
        /// Its words, bounded and cleaned.
        message: String,
    },
    /// The guest did not answer in time.
    #[error("the guest of sandbox {sandbox} did not answer within {waited:?} to {action}")]
    GuestSilent {
        /// Which.
        sandbox: String,
        /// What was attempted.
        action: &'static str,
        /// Deadline.
        waited: std::time::Duration,
    },
    /// Another sandbox has the volume.
    #[error("volume {volume} is in use by {}", by.join(", "))]
    VolumeInUse {
        /// Which.
        volume: String,
        /// Pods that have it, as `namespace/name`.
        by: Vec<String>,
    },
    /// A volume cannot be had.
    #[error(transparent)]
    Volume(#[from] hypernetes_volume::VolumeError),
    /// An image is missing or broken.
    #[error(transparent)]
    Image(#[from] hypernetes_image::ImageError),
    /// An image cannot be mounted in a container.
    #[error("cannot mount an image: {0}")]
    ImageVolume(String),
    /// The network refused.
    #[error(transparent)]
    Network(#[from] hypernetes_network::NetworkError),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] hypernetes_vmm::VmmError),
    /// A program of the host's that runs its containers did not do it.
    #[error("cannot {action}: {message}")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// Its words, bounded and cleaned.
        message: String,
    },
    /// The memory of a VM, or a copy of it with its disks, does not fit on the node's disk.
    #[error(
        "the node's disk has no room for {what}: it may need {needed_mib} MiB, and {usable_mib} MiB can be had"
    )]
    NoRoom {
        /// What.
        what: &'static str,
        /// The most that it can take, in MiB.
        needed_mib: u64,
        /// What it could have had, in MiB.
        usable_mib: u64,
    },
    /// State cannot be kept.
    #[error("cannot {action}")]
    Storage {
        /// What was attempted.
        action: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

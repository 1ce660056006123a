//! Why a step could not be done.

/// Failure of one step of a reconciliation; it is tried again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconcileError {
    /// The API server refused or was not there.
    #[error("cannot {action}")]
    Api {
        /// What was attempted, on what.
        action: String,
        /// Cause.
        #[source]
        source: Box<kube::Error>,
    },
    /// The node could not remove a network.
    #[error("cannot remove network {network} from the node")]
    Network {
        /// Which.
        network: String,
        /// Cause.
        #[source]
        source: Box<hypernetes_network::NetworkError>,
    },
    /// The driver of volumes could not do it.
    #[error("cannot work on volume {volume}")]
    Volume {
        /// Which.
        volume: String,
        /// Cause.
        #[source]
        source: Box<hypernetes_volume::VolumeError>,
    },
    /// The object breaks a rule that admission should have seen.
    #[error("invalid {field}: {rule}")]
    Invalid {
        /// Field.
        field: &'static str,
        /// What would be right.
        rule: String,
    },
}

impl ReconcileError {
    pub(crate) fn api(action: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let action = action.into();
        move |source| Self::Api {
            action,
            source: Box::new(source),
        }
    }

    /// The object was written by someone else meanwhile.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source, .. } if code(source) == Some(409))
    }
}

/// HTTP status of an API error.
pub(crate) fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

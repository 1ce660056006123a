//! OCI images: pull, verify, store, and turn layers into read-only disks.
//!
//! A layer becomes one uncompressed erofs file, named by its diff id and shared by every pod. Tar
//! entries are never unpacked into a host file system: they go straight into the disk image, so a
//! hostile archive has no path on the host to escape to.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, path::PathBuf};

use hypernetes_types::{Digest, ImageReference};
use serde::{Deserialize, Serialize};

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Identity everywhere: the digest of the image's configuration.
    pub id: Digest,
    /// Digest of the manifest that was stored.
    pub manifest: Digest,
    /// Names with tag that point here.
    pub tags: Vec<ImageReference>,
    /// Names with digest that point here (`repository@sha256:…`).
    pub digests: Vec<ImageReference>,
    /// What the image says about running it.
    pub config: ImageConfig,
    /// Layers, lowest first.
    pub layers: Vec<Layer>,
    /// Bytes of all layers, compressed, and the configuration.
    pub size: u64,
    /// RFC 3339, from the configuration.
    pub created: Option<String>,
    /// `amd64`.
    pub architecture: String,
}

/// The run-time part of an image's configuration (OCI image spec, config).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `user[:group]`, names or numbers; empty for root.
    pub user: String,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Program and first arguments.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// Working directory; empty for `/`.
    pub working_dir: String,
    /// Signal name or number, empty for SIGTERM.
    pub stop_signal: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Paths declared as volumes.
    pub volumes: Vec<String>,
}

/// One layer as a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of the uncompressed tar; names the disk.
    pub diff_id: Digest,
    /// Digest of the blob that was fetched.
    pub blob: Digest,
    /// The erofs file.
    pub disk: PathBuf,
    /// Bytes of the disk.
    pub disk_size: u64,
}

/// User and password for a registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    /// No account.
    #[default]
    Anonymous,
    /// Basic or, through the registry's token server, bearer.
    Basic {
        /// User.
        username: String,
        /// Password.
        password: String,
    },
    /// A ready registry token.
    Bearer(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets never reach a log.
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(…)",
            Self::Bearer(_) => "Bearer(…)",
        })
    }
}

/// What a pull tells while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullEvent {
    /// Manifest found; so many layers, so many bytes.
    Resolved {
        /// The manifest's digest.
        manifest: Digest,
        /// Blob digests with sizes.
        layers: Vec<(Digest, u64)>,
    },
    /// Bytes of a layer that have arrived so far.
    Progress {
        /// Which blob.
        layer: Digest,
        /// Bytes so far.
        bytes: u64,
    },
    /// The layer is a disk.
    LayerDone {
        /// Which blob.
        layer: Digest,
        /// It was there before.
        cached: bool,
    },
}

pub mod erofs;
mod error;
mod flight;
mod layer;
mod limits;
mod manifest;
mod registry;
mod store;
mod tarball;

pub use error::ImageError;
pub use limits::Limits;
pub use registry::RegistryConfig;
pub use store::{
    ArchiveStream, Content, ContentId, Hold, ImageStore, Inspection, KeepOptions, Progress,
    PullOptions, PushEvent, PushProgress, Quiet, Removed, Saved, StoreConfig, Usage,
};

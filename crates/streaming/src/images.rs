//! What a node does with the images of a namespace: fetch, send, take in and give out.
//!
//! The node keeps contents, the API server names them (objects of kind Image). Nothing that is here is
//! dropped while an [`ImageHold`] lives, so that content and name can follow each other without a gap.

use std::any::Any;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use tokio::sync::mpsc;

/// Content of an image: digests of its configuration and of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageContent {
    /// Digest of the configuration: the image's id.
    pub id: String,
    /// Digest of the manifest.
    pub manifest: String,
}

/// Content that is on the node now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFound {
    /// What.
    pub content: ImageContent,
    /// Names that its archive gave it.
    pub names: Vec<String>,
    /// The digest by which the registry has it.
    pub digest: Option<String>,
    /// Bytes of its layers, unpacked.
    pub size: u64,
    /// Bytes of its blobs.
    pub content_size: u64,
    /// When it was built, RFC 3339.
    pub created: Option<String>,
    /// `linux/amd64`.
    pub platform: String,
}

/// How far an operation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageEvent {
    /// What will be moved.
    Resolved {
        /// Digests and sizes of blobs, lowest layer first.
        layers: Vec<(String, u64)>,
    },
    /// Bytes of a layer so far.
    Progress {
        /// Digest of the blob.
        layer: String,
        /// Bytes.
        bytes: u64,
    },
    /// A layer is where it was to go.
    LayerDone {
        /// Digest of the blob.
        layer: String,
        /// It was there before.
        existed: bool,
    },
}

/// Takes the events of an operation.
pub type ImageEvents = mpsc::UnboundedSender<ImageEvent>;
/// Keeps contents from being dropped.
pub type ImageHold = Box<dyn Any + Send + Sync>;
/// An archive on its way.
pub type ArchiveBytes = BoxStream<'static, std::io::Result<Bytes>>;

/// What a namespace may take in.
#[derive(Debug, Clone, Default)]
pub struct ImageAllowance {
    /// What it has already: only their layers need not come anew.
    pub known: Vec<ImageContent>,
    /// Most bytes.
    pub limit: u64,
}

/// Why an operation on images failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageFailure {
    /// No such image here or in the registry. 404.
    #[error("{0}")]
    NotFound(String),
    /// The request, image or archive is wrong. 400.
    #[error("{0}")]
    Invalid(String),
    /// The registry refused. 403.
    #[error("{0}")]
    Denied(String),
    /// More than the namespace may have. 403.
    #[error("{0}")]
    TooLarge(String),
    /// The registry cannot be reached. 503.
    #[error("{0}")]
    Unavailable(String),
    /// Something broke. 500.
    #[error("{0}")]
    Internal(String),
}

/// What a node offers for images. Accounts are the documents of the caller's pull secrets
/// (`.dockerconfigjson`); the caller has been authorized.
#[async_trait]
pub trait NodeImages: Send + Sync {
    /// Keeps everything that is here until the value is dropped.
    async fn hold(&self) -> Result<ImageHold, ImageFailure>;
    /// Whether content is here.
    async fn has(&self, content: &ImageContent) -> bool;
    /// Fetches what a registry has under a name.
    async fn pull(
        &self,
        image: &str,
        accounts: Vec<Bytes>,
        allowance: ImageAllowance,
        events: ImageEvents,
    ) -> Result<ImageFound, ImageFailure>;
    /// Sends content to a registry under a name; returns the manifest's digest and size.
    async fn push(
        &self,
        content: &ImageContent,
        target: &str,
        accounts: Vec<Bytes>,
        events: ImageEvents,
    ) -> Result<(String, u64), ImageFailure>;
    /// Takes in all images of an archive.
    async fn load(
        &self,
        archive: ArchiveBytes,
        allowance: ImageAllowance,
    ) -> Result<Vec<ImageFound>, ImageFailure>;
    /// Writes contents with names into an archive.
    async fn save(
        &self,
        images: Vec<(ImageContent, Vec<String>)>,
    ) -> Result<ArchiveBytes, ImageFailure>;
    /// Manifest and configuration, as JSON.
    async fn documents(&self, content: &ImageContent) -> Result<(String, String), ImageFailure>;
    /// Tags that a registry lists for a name's repository.
    async fn tags(&self, image: &str, accounts: Vec<Bytes>) -> Result<Vec<String>, ImageFailure>;
}

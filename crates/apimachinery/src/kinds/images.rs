//! A namespace's own images.

use super::{ResourceKind, kind, sub};

/// Group of images.
pub const GROUP: &str = "images.hypernetes.io";

/// Images are made by subresources alone: an object cannot claim content that its namespace has not
/// shown to have.
pub(super) const IMAGES: ResourceKind = ResourceKind {
    short_names: &["img"],
    verbs: &["delete", "deletecollection", "get", "list", "watch"],
    subresources: &[
        sub("archive", "ImageArchiveOptions", &["create", "get"]),
        sub("config", "ImageConfigOptions", &["get"]),
        sub("pull", "ImagePullOptions", &["create"]),
        sub("push", "ImagePushOptions", &["create"]),
        sub("tag", "ImageTagOptions", &["create"]),
        sub("tags", "ImageTagsOptions", &["get"]),
    ],
    ..kind(GROUP, "v1alpha1", "Image", "images", "image")
};

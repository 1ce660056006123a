//! Kinds about the cluster itself: certificates, and which API versions there are.

use super::{READ_ONLY, ResourceKind, STATUS, kind, sub};

pub(super) const SIGNING_REQUESTS: ResourceKind = ResourceKind {
    short_names: &["csr"],
    namespaced: false,
    subresources: &[
        sub("approval", "CertificateSigningRequest", STATUS),
        sub("status", "CertificateSigningRequest", STATUS),
    ],
    ..kind(
        "certificates.k8s.io",
        "v1",
        "CertificateSigningRequest",
        "certificatesigningrequests",
        "certificatesigningrequest",
    )
};

/// Made from the versions that are served; not stored.
pub(super) const API_SERVICES: ResourceKind = ResourceKind {
    categories: &["api-extensions"],
    namespaced: false,
    verbs: READ_ONLY,
    storage: "",
    ..kind(
        "apiregistration.k8s.io",
        "v1",
        "APIService",
        "apiservices",
        "apiservice",
    )
};

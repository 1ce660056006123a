//! Who is calling: the cluster's certificate authority, client certificates, users and groups.
//!
//! A user is a name with groups; what it may do is decided elsewhere. Certificates carry the name
//! as CN and the groups as O, as Kubernetes has it. Members of a tenant are in the group
//! `hypernetes:tenant:<tenant>:<role>` (see [`tenant_group`]).
//!
//! Keys are files of mode 0600, written whole or not at all.
#![forbid(unsafe_code)]

mod authenticator;
mod authority;
mod certificate;
mod files;
mod kubeconfig;
mod service_account;
mod user;

pub use authenticator::{
    AuthenticationError, Authenticator, CertificateAuthenticator, PeerCertificate,
};
pub use authority::{Authority, AuthorityError, Credentials, SigningKey};
pub use certificate::{CertificateError, user_of_certificate};
pub use files::{FileError, write_private};
pub use kubeconfig::Kubeconfig;
pub use service_account::{
    BoundObject, KubernetesClaims, SERVICE_ACCOUNT_ISSUER, TokenClaims, TokenError, TokenKey,
};
pub use user::{
    ALL_AUTHENTICATED, ALL_UNAUTHENTICATED, ANONYMOUS, MASTERS, TenantRole, User,
    WORKLOAD_CONTROLLERS, tenant_group, tenant_of_group,
};

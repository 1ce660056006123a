//! The words that every room shares: identifiers, digests, image references, quantities.
//!
//! Everything here is plain data: parsed once at an edge, valid ever after, no I/O.
#![forbid(unsafe_code)]

mod bandwidth;
mod cpu_set;
mod digest;
mod id;
pub mod kinds;
mod page_size;
mod quantity;
mod reference;

pub use bandwidth::{
    Bandwidth, BandwidthError, EGRESS_BANDWIDTH_ANNOTATION, INGRESS_BANDWIDTH_ANNOTATION,
};
pub use cpu_set::{CpuSet, CpuSetError};
pub use digest::{Digest, DigestError};
pub use id::{
    ContainerId, ExecId, IdError, KernelName, NetworkId, SandboxId, SnapshotId, TenantName,
};
pub use page_size::{PageSize, PageSizeError};
pub use quantity::{Quantity, QuantityError};
pub use reference::{ImageReference, ReferenceError};

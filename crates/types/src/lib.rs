//! The words that every room shares: identifiers, digests, image references, quantities.
//!
//! Everything here is plain data: parsed once at an edge, valid ever after, no I/O.
#![forbid(unsafe_code)]

mod cpu_set;
mod digest;
mod id;
pub mod kinds;
mod page_size;
mod quantity;
mod reference;

pub use cpu_set::{CpuSet, CpuSetError};
pub use digest::{Digest, DigestError};
pub use id::{
    ContainerId, ExecId, IdError, KernelName, NetworkId, SandboxId, SnapshotId, TenantName,
};
pub use page_size::{PageSize, PageSizeError};
pub use quantity::{Quantity, QuantityError};
pub use reference::{ImageReference, ReferenceError};

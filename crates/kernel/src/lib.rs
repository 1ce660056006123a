//! Kernels as data.
//!
//! A guest's kernel is an entry of a [`KernelCatalog`], with a name that a pod may ask for. It comes
//! from this project's own configuration ([`hyperkernel`]) or from a distribution's package
//! ([`import`]); either way the catalog packs it with HyperStart into an [`initramfs`] when a VM is
//! to boot it. What a kernel must be able to do is [`requirements`], and nothing here boots one.
//!
//! Everything blocks: callers in async code use a blocking thread.
#![forbid(unsafe_code)]

mod archive;
mod catalog;
mod config;
mod error;
pub mod hyperkernel;
pub mod import;
pub mod initramfs;
mod module;

pub use catalog::{KernelCatalog, KernelEntry, Machine, Origin, PreparedKernel};
pub use config::{Config, Finding, Requirement, Severity, check_config, requirements};
pub use error::KernelError;
pub use hypernetes_types::KernelName;

//! What the runtime needs of images and kernels, so that tests can do without either.

use std::{fmt::Debug, fs::File, path::Path, sync::Arc};

use async_trait::async_trait;
use hypernetes_image::{Credentials, Image, ImageError, ImageStore, PullOptions};
use hypernetes_kernel::{KernelCatalog, KernelError};
use hypernetes_types::{ImageReference, KernelName};
use hypernetes_vmm::{GuestKernel, Machine};

use crate::{api::PullProgress, error::RuntimeError, records::storage};

/// Images on this node.
#[async_trait]
pub trait Images: Send + Sync + Debug {
    /// Makes an image be in the store.
    async fn pull(
        &self,
        reference: &ImageReference,
        credentials: Credentials,
        progress: Option<PullProgress>,
    ) -> Result<Image, ImageError>;
    /// Finds an image by reference, id or start of an id.
    async fn get(&self, name: &str) -> Result<Image, ImageError>;
    /// Opens the disks of an image's layers for reading, in the order of [`Image::layers`].
    async fn open_layers(&self, image: &Image) -> Result<Vec<File>, ImageError>;
}

#[async_trait]
impl Images for ImageStore {
    async fn pull(
        &self,
        reference: &ImageReference,
        credentials: Credentials,
        progress: Option<PullProgress>,
    ) -> Result<Image, ImageError> {
        let options = PullOptions {
            credentials,
            progress,
            ..Default::default()
        };
        Self::pull(self, reference, &options).await
    }

    async fn get(&self, name: &str) -> Result<Image, ImageError> {
        Self::get(self, name).await
    }

    async fn open_layers(&self, image: &Image) -> Result<Vec<File>, ImageError> {
        Self::open_layers(self, image).await
    }
}

/// Guest kernels on this node.
#[async_trait]
pub trait Kernels: Send + Sync + Debug {
    /// The files to boot a kernel with this HyperStart; `None` = the default kernel.
    async fn prepare(
        &self,
        kernel: Option<&KernelName>,
        hyperstart: &Path,
    ) -> Result<GuestKernel, RuntimeError>;
}

#[async_trait]
impl Kernels for Arc<KernelCatalog> {
    async fn prepare(
        &self,
        kernel: Option<&KernelName>,
        hyperstart: &Path,
    ) -> Result<GuestKernel, RuntimeError> {
        let (catalog, kernel, hyperstart) =
            (Self::clone(self), kernel.cloned(), hyperstart.to_owned());
        let asked = kernel
            .as_ref()
            .map_or_else(|| "(default)".to_owned(), ToString::to_string);
        let prepare = move || {
            let name = match kernel {
                Some(name) => name,
                None => catalog.default_kernel()?.name,
            };
            KernelCatalog::prepare(&catalog, &name, &hyperstart)
        };
        let prepared = tokio::task::spawn_blocking(prepare)
            .await
            .map_err(|error| storage(format!("prepare kernel {asked}"), error))?;
        let prepared = prepared.map_err(|error| match error {
            KernelError::NotFound { .. } | KernelError::NoDefault => RuntimeError::NotFound {
                kind: "kernel",
                id: asked,
            },
            error => storage(format!("prepare kernel {asked}"), error),
        })?;
        Ok(GuestKernel {
            kernel: prepared.kernel,
            initrd: prepared.initrd,
            machine: match prepared.machine {
                hypernetes_kernel::Machine::Microvm => Machine::Microvm,
                hypernetes_kernel::Machine::Q35 => Machine::Q35,
            },
            extra_cmdline: String::new(),
        })
    }
}

//! What the runtime needs of images and kernels, so that tests can do without either.

use std::{collections::HashSet, fmt::Debug, fs::File, path::Path, sync::Arc};

use async_trait::async_trait;
use hypernetes_image::{Credentials, Image, ImageError, ImageStore, PullOptions};
use hypernetes_kernel::{KernelCatalog, KernelError};
use hypernetes_types::{Digest, ImageReference, KernelName};
use hypernetes_vmm::{GuestKernel, Machine};

use crate::{
    api::{FilesystemUsage, PullProgress},
    error::RuntimeError,
    records::storage,
};

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
    /// All images.
    async fn list(&self) -> Result<Vec<Image>, ImageError>;
    /// Forgets an image with all of its names, unless it is in use.
    async fn remove(&self, id: &Digest, in_use: &HashSet<Digest>) -> Result<(), ImageError>;
    /// What they take on their disk.
    async fn usage(&self) -> Result<FilesystemUsage, ImageError>;
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

    async fn list(&self) -> Result<Vec<Image>, ImageError> {
        Self::list(self).await
    }

    async fn remove(&self, id: &Digest, in_use: &HashSet<Digest>) -> Result<(), ImageError> {
        Self::remove(self, &id.to_string(), in_use).await.map(drop)
    }

    async fn usage(&self) -> Result<FilesystemUsage, ImageError> {
        let usage = Self::usage(self).await?;
        Ok(FilesystemUsage {
            path: self.root().to_owned(),
            used_bytes: usage.layer_bytes.saturating_add(usage.blob_bytes),
            // A layer is one file, an image three: record, manifest, configuration.
            files: usage.layers.saturating_add(usage.images.saturating_mul(3)),
        })
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

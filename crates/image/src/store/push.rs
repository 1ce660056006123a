//! Sending kept content to a registry.

use std::fs::File;

use hypernetes_types::{Digest, ImageReference};

use super::{ContentId, ImageStore, disk};
use crate::{
    Credentials, ImageError,
    manifest::Descriptor,
    registry::{Access, Repository, Role},
};

/// What a push tells while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PushEvent {
    /// What will be sent: layers' blobs with sizes, lowest first.
    Resolved {
        /// Blob digests with sizes.
        layers: Vec<(Digest, u64)>,
    },
    /// Bytes of a layer that have been sent so far.
    Progress {
        /// Which blob.
        layer: Digest,
        /// Bytes so far.
        bytes: u64,
    },
    /// The registry has the layer.
    LayerDone {
        /// Which blob.
        layer: Digest,
        /// It was there before.
        existed: bool,
    },
}

/// Takes the events of a push.
pub type PushProgress = std::sync::Arc<dyn Fn(PushEvent) + Send + Sync>;

impl ImageStore {
    /// Sends kept content to the registry of `target`, under its tag. Returns the manifest's digest and
    /// size. The caller holds a [`super::Hold`].
    pub async fn push(
        &self,
        content: &ContentId,
        target: &ImageReference,
        credentials: &Credentials,
        progress: PushProgress,
    ) -> Result<(Digest, u64), ImageError> {
        let id = content.clone();
        let (manifest, bytes, config) = self
            .blocking(move |inner| {
                inner.kept(&id)?;
                let (manifest, bytes) = inner.kept_manifest(&id.manifest)?;
                let config = inner.read_blob(&manifest.config.digest)?;
                Ok((manifest, bytes, config))
            })
            .await?;
        progress(PushEvent::Resolved {
            layers: manifest
                .layers
                .iter()
                .map(|l| (l.digest.clone(), l.size))
                .collect(),
        });
        let (repository, first) = self.writable(&manifest.config, target, credentials).await?;
        let mut sent = std::collections::HashSet::new();
        for layer in &manifest.layers {
            if !sent.insert(layer.digest.clone()) {
                continue;
            }
            let existed = repository.has_blob(layer).await?;
            if !existed {
                let path = self.inner.content_path(&layer.digest);
                let open = || File::open(&path).map_err(disk::failed("open", &path));
                repository.upload(layer, &open, &progress).await?;
            }
            progress(PushEvent::LayerDone {
                layer: layer.digest.clone(),
                existed,
            });
        }
        if !first {
            repository.upload_bytes(&manifest.config, config).await?;
        }
        let size = bytes.len() as u64;
        let name = match (target.tag(), target.digest()) {
            (Some(tag), _) => tag.to_owned(),
            (None, Some(_)) => content.manifest.to_string(),
            (None, None) => "latest".to_owned(),
        };
        repository
            .put_manifest(&name, &manifest.media_type, bytes)
            .await?;
        Ok((content.manifest.clone(), size))
    }

    /// Tags of the repository of `reference`, as the registry lists them.
    pub async fn tags(
        &self,
        reference: &ImageReference,
        credentials: &Credentials,
        most: usize,
    ) -> Result<Vec<String>, ImageError> {
        let mut failure = None;
        for place in Repository::candidates(&self.inner.transport, reference, credentials)? {
            if place.role() == Role::Mirror {
                continue;
            }
            match place.tags(most).await {
                Err(error @ (ImageError::Unavailable { .. } | ImageError::PlainHttp { .. }))
                    if place.role() == Role::Probe =>
                {
                    failure = Some(error);
                }
                result => return result,
            }
        }
        Err(failure.unwrap_or_else(|| ImageError::NotFound(reference.to_string())))
    }

    /// The place of the registry that answers, and whether it has the blob.
    async fn writable(
        &self,
        blob: &Descriptor,
        target: &ImageReference,
        credentials: &Credentials,
    ) -> Result<(Repository, bool), ImageError> {
        let mut failure = None;
        for place in Repository::candidates(&self.inner.transport, target, credentials)? {
            if place.role() == Role::Mirror {
                continue;
            }
            let place = place.with(Access::Push);
            match place.has_blob(blob).await {
                Ok(has) => return Ok((place, has)),
                Err(error @ (ImageError::Unavailable { .. } | ImageError::PlainHttp { .. }))
                    if place.role() == Role::Probe =>
                {
                    failure = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(failure.unwrap_or_else(|| ImageError::NotFound(target.to_string())))
    }
}

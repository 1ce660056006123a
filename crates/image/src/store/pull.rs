//! Fetching an image from a registry.

use std::{
    io::{self, Read},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use hypernetes_types::{Digest, ImageReference};
use reqwest::StatusCode;
use tokio::sync::mpsc;

use super::{ImageStore, Inner, disk, origins::Asked};
use crate::{
    Credentials, Image, ImageError, Layer, PullEvent,
    layer::{self, Compression, Promise},
    manifest::{Config, Descriptor, Document, Manifest, select},
    registry::{Fetched, Repository, Role},
    tarball::invalid,
};

/// Layers that are fetched at a time.
pub(super) const PARALLEL: usize = 3;
/// Pieces of a layer between the network and the disk writer.
pub(super) const CHANNEL: usize = 32;
const ATTEMPTS: u32 = 5;

/// Takes the events of a pull.
pub type Progress = Box<dyn Fn(PullEvent) + Send + Sync>;

/// How to pull.
#[derive(Default)]
pub struct PullOptions {
    /// Who asks.
    pub credentials: Credentials,
    /// Fetch every layer, even those that are here.
    pub force: bool,
    /// Told what happens.
    pub progress: Option<Progress>,
}

impl std::fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullOptions")
            .field("credentials", &self.credentials)
            .field("force", &self.force)
            .finish_non_exhaustive()
    }
}

impl PullOptions {
    pub(super) fn tell(&self, event: PullEvent) {
        if let Some(progress) = &self.progress {
            progress(event);
        }
    }
}

impl ImageStore {
    /// Makes the image that `reference` names now be in the store. The registry is asked, unless
    /// the reference has a digest and is here. Who pulls the same at the same time waits for the
    /// first and shares its layers.
    ///
    /// Dropping the future leaves at most whole layers, which the next collection takes.
    pub async fn pull(
        &self,
        reference: &ImageReference,
        options: &PullOptions,
    ) -> Result<Image, ImageError> {
        let _turn = self.inner.flights.take(format!("pull {reference}")).await;
        if reference.digest().is_some() && !options.force {
            match self.get(&reference.to_string()).await {
                Ok(image) => return self.with_tag(image, reference).await,
                Err(ImageError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let pulls = self
            .blocking(|inner| disk::lock_shared(&inner.root.join("pulls.lock")))
            .await?;
        let (repository, top) = self.resolve(reference, options).await?;
        let top_digest = top.digest.clone();
        let manifest = self.platform_manifest(&repository, reference, top).await?;
        let image = self
            .fetch(&repository, reference, manifest, options)
            .await?;
        let mut names = vec![reference.with_digest(top_digest)];
        names.extend(tag_only(reference));
        let image = self
            .blocking(move |inner| inner.commit(&image, &names))
            .await?;
        drop(pulls);
        self.blocking(|inner| {
            let _changes = inner.lock()?;
            inner.collect()
        })
        .await?;
        Ok(image)
    }

    /// An image that is here gets the tag that it was asked for with.
    async fn with_tag(
        &self,
        image: Image,
        reference: &ImageReference,
    ) -> Result<Image, ImageError> {
        match tag_only(reference) {
            Some(tag) if !image.tags.contains(&tag) => {
                self.blocking(move |inner| inner.commit(&image, &[tag]))
                    .await
            }
            _ => Ok(image),
        }
    }

    /// Asks the places that may have the image, in order.
    pub(super) async fn resolve(
        &self,
        reference: &ImageReference,
        options: &PullOptions,
    ) -> Result<(Repository, Fetched), ImageError> {
        let inner = &self.inner;
        let wanted = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.as_str(),
            (None, tag) => tag.unwrap_or("latest"),
        };
        let mut failure = None;
        for place in Repository::candidates(&inner.transport, reference, &options.credentials)? {
            match place
                .manifest(wanted, reference.digest(), &inner.limits)
                .await
            {
                Ok(fetched) => return Ok((place, fetched)),
                Err(error) if place.role() == Role::Mirror => {
                    tracing::debug!(mirror = place.place(), %error, "a mirror does not have it");
                }
                Err(error @ (ImageError::Unavailable { .. } | ImageError::PlainHttp { .. }))
                    if place.role() == Role::Probe =>
                {
                    failure = Some(error);
                }
                // What the probe met tells more than a TLS port's answer to plain http.
                Err(error) => {
                    return Err(match failure {
                        Some(first @ ImageError::Unavailable { .. }) => first,
                        _ => error,
                    });
                }
            }
        }
        Err(failure.unwrap_or_else(|| ImageError::NotFound(reference.to_string())))
    }

    /// Goes from an index to the manifest for this machine.
    pub(super) async fn platform_manifest(
        &self,
        repository: &Repository,
        reference: &ImageReference,
        top: Fetched,
    ) -> Result<(Manifest, Vec<u8>), ImageError> {
        let entries = match top.document {
            Document::Manifest(manifest) => return Ok((manifest, top.bytes)),
            Document::Index(entries) => entries,
        };
        let entry = select(&entries).map_err(|available| ImageError::NoPlatform {
            reference: Box::new(reference.clone()),
            available,
        })?;
        let digest = entry.digest.clone();
        let limits = &self.inner.limits;
        let fetched = repository
            .manifest(digest.as_str(), Some(&digest), limits)
            .await?;
        match fetched.document {
            Document::Manifest(manifest) => Ok((manifest, fetched.bytes)),
            Document::Index(_) => Err(invalid("index", "an index inside an index")),
        }
    }

    async fn fetch(
        &self,
        repository: &Repository,
        reference: &ImageReference,
        (manifest, manifest_bytes): (Manifest, Vec<u8>),
        options: &PullOptions,
    ) -> Result<Image, ImageError> {
        options.tell(PullEvent::Resolved {
            manifest: layer::digest_of(&manifest_bytes),
            layers: manifest
                .layers
                .iter()
                .map(|l| (l.digest.clone(), l.size))
                .collect(),
        });
        let limit = self.inner.limits.max_config_size;
        let config_bytes = repository.small_blob(&manifest.config, limit).await?;
        let config = Config::parse(&config_bytes)?;
        if !config.is_ours() {
            let available =
                crate::tarball::shown(format!("{}/{}", config.os, config.architecture).as_bytes());
            return Err(ImageError::NoPlatform {
                reference: Box::new(reference.clone()),
                available,
            });
        }
        let plan = plan_layers(&manifest, &config)?;
        // An image may hold the same layer twice; fetch it once.
        let mut distinct = plan.clone();
        distinct.sort_by(|a, b| a.1.cmp(&b.1));
        distinct.dedup_by(|a, b| a.1 == b.1);
        let layers: Vec<Layer> = futures::stream::iter(distinct)
            .map(|(blob, diff_id, compression)| {
                self.layer(repository, options, blob, diff_id, compression)
            })
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        let layers = plan
            .iter()
            .map(|(_, diff_id, _)| {
                layers
                    .iter()
                    .find(|l| l.diff_id == *diff_id)
                    .cloned()
                    .expect("all were fetched")
            })
            .collect();
        self.blocking(move |inner| {
            inner.describe(&manifest, &manifest_bytes, &config_bytes, config, layers)
        })
        .await
    }

    async fn layer(
        &self,
        repository: &Repository,
        options: &PullOptions,
        blob: Descriptor,
        diff_id: Digest,
        compression: Compression,
    ) -> Result<Layer, ImageError> {
        let _turn = self.inner.flights.take(format!("layer {diff_id}")).await;
        let asked = Asked::new(repository, &options.credentials);
        if !options.force {
            let (wanted, digest, asked) = (diff_id.clone(), blob.digest.clone(), asked.clone());
            let here = self
                .blocking(move |inner| {
                    let may = inner.may_have(&wanted, &asked)?;
                    Ok(may.then(|| inner.layer_here(wanted, digest)).flatten())
                })
                .await?;
            if let Some(layer) = here {
                options.tell(PullEvent::LayerDone {
                    layer: blob.digest,
                    cached: true,
                });
                return Ok(layer);
            }
        }
        let expected = blob.clone();
        let write = move |inner: &Inner, source: ChannelRead| {
            let layer = inner.import_layer(source, &expected, diff_id, compression)?;
            inner.note_origin(&layer.diff_id, &asked)?;
            Ok(layer)
        };
        self.fetch_layer(repository, options, &blob, write).await
    }

    /// Fetches a layer for whoever writes it, which is done where it may block.
    pub(super) async fn fetch_layer(
        &self,
        repository: &Repository,
        options: &PullOptions,
        blob: &Descriptor,
        write: impl FnOnce(&Inner, ChannelRead) -> Result<Layer, ImageError> + Send + 'static,
    ) -> Result<Layer, ImageError> {
        let (sender, receiver) = mpsc::channel(CHANNEL);
        let write = self.blocking(move |inner| write(inner, ChannelRead::new(receiver)));
        let limit = Duration::from_secs(120 + blob.size / (16 << 10));
        let fetch = async {
            match tokio::time::timeout(limit, stream_blob(repository, options, blob, sender)).await
            {
                Ok(result) => result,
                Err(_elapsed) => {
                    Err(repository.unavailable(format!("layer too slow: not within {limit:?}")))
                }
            }
        };
        let (fetched, written) = tokio::join!(fetch, write);
        // A network failure also ends the writer, with an error that would only confuse.
        fetched?;
        let layer = written?;
        options.tell(PullEvent::LayerDone {
            layer: blob.digest.clone(),
            cached: false,
        });
        Ok(layer)
    }
}

/// Only the name and tag of a reference, if it has a tag.
fn tag_only(reference: &ImageReference) -> Option<ImageReference> {
    let tag = reference.tag()?;
    let text = format!("{}/{}:{tag}", reference.registry(), reference.repository());
    Some(text.parse().expect("a part of a reference is a reference"))
}

/// Pairs a manifest's blobs with the diff ids that the configuration promises for them.
pub(super) fn plan_layers(
    manifest: &Manifest,
    config: &Config,
) -> Result<Vec<(Descriptor, Digest, Compression)>, ImageError> {
    if manifest.layers.len() != config.diff_ids.len() {
        let rule = format!(
            "{} diff ids for {} layers",
            config.diff_ids.len(),
            manifest.layers.len()
        );
        return Err(invalid("configuration", rule));
    }
    let pair = |(blob, diff_id): (&Descriptor, &Digest)| {
        Ok((blob.clone(), diff_id.clone(), blob.compression()?))
    };
    manifest
        .layers
        .iter()
        .zip(&config.diff_ids)
        .map(pair)
        .collect()
}

/// Sends a blob's bytes to the disk writer; goes on where it was when the connection breaks.
async fn stream_blob(
    repository: &Repository,
    options: &PullOptions,
    blob: &Descriptor,
    sink: mpsc::Sender<Bytes>,
) -> Result<(), ImageError> {
    let (mut at, mut told) = (0_u64, 0);
    let mut attempt = 0;
    loop {
        let mut response = repository.blob(blob, at).await?;
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            0
        } else {
            at
        };
        let mut reason = String::new();
        loop {
            let mut chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    reason = format!(": {error}");
                    break;
                }
            };
            let known = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
            skip -= known as u64;
            let chunk = chunk.split_off(known);
            at += chunk.len() as u64;
            if at > blob.size {
                let rule = format!("the registry sends more than its {} bytes", blob.size);
                return Err(invalid(format!("layer {}", blob.digest), rule));
            }
            if sink.send(chunk).await.is_err() {
                // The writer has stopped, and says why.
                return Ok(());
            }
            if at - told >= 512 << 10 || at == blob.size {
                told = at;
                options.tell(PullEvent::Progress {
                    layer: blob.digest.clone(),
                    bytes: at,
                });
            }
        }
        if at == blob.size {
            return Ok(());
        }
        attempt += 1;
        if attempt == ATTEMPTS {
            let message = format!(
                "layer {} ended after {at} of {} bytes{reason}",
                blob.digest, blob.size
            );
            return Err(repository.unavailable(message));
        }
        tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
    }
}

/// The blocking end of a layer's stream.
pub(super) struct ChannelRead {
    source: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl ChannelRead {
    pub(super) fn new(source: mpsc::Receiver<Bytes>) -> Self {
        Self {
            source,
            piece: Bytes::new(),
        }
    }
}

impl Read for ChannelRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.source.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

impl Inner {
    /// The layer, if its disk is here.
    pub(super) fn layer_here(&self, diff_id: Digest, blob: Digest) -> Option<Layer> {
        let disk = self.layer_path(&diff_id);
        let disk_size = std::fs::metadata(&disk).ok()?.len();
        Some(Layer {
            diff_id,
            blob,
            disk,
            disk_size,
        })
    }

    /// Turns a blob into a disk under its diff id, if it is what it is said to be.
    pub(super) fn import_layer(
        &self,
        source: impl Read,
        blob: &Descriptor,
        diff_id: Digest,
        compression: Compression,
    ) -> Result<Layer, ImageError> {
        if blob.size > self.limits.max_layer_size {
            let rule = format!(
                "a layer may have at most {} bytes",
                self.limits.max_layer_size
            );
            return Err(invalid(format!("layer {}", blob.digest), rule));
        }
        let mut temp = disk::Temp::create(&self.tmp())?;
        let promise = Promise {
            blob: &blob.digest,
            diff_id: &diff_id,
        };
        let written = layer::convert(source, compression, &promise, &mut temp.file, &self.limits)?;
        let disk = self.layer_path(&diff_id);
        temp.keep(&disk)?;
        Ok(Layer {
            diff_id,
            blob: blob.digest.clone(),
            disk,
            disk_size: written.size,
        })
    }

    /// Stores an image's documents and makes its record, without names.
    pub(super) fn describe(
        &self,
        manifest: &Manifest,
        manifest_bytes: &[u8],
        config_bytes: &[u8],
        config: Config,
        layers: Vec<Layer>,
    ) -> Result<Image, ImageError> {
        let digest = self.write_blob(manifest_bytes)?;
        let id = self.write_blob(config_bytes)?;
        let blobs = manifest
            .layers
            .iter()
            .map(|l| l.size)
            .fold(0, u64::saturating_add);
        Ok(Image {
            id,
            manifest: digest,
            tags: Vec::new(),
            digests: Vec::new(),
            config: config.run,
            layers,
            size: blobs.saturating_add(config_bytes.len() as u64),
            created: config.created,
            architecture: config.architecture,
        })
    }
}

//! Taking in images whose blobs are kept: from a registry, or from an archive that arrives as a stream.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, pin_mut};
use hypernetes_types::{Digest, ImageReference};
use tokio::sync::mpsc;

use super::{
    Content, ImageStore, Inner, KeepOptions,
    content::Budget,
    disk,
    load::Loader,
    pull::{CHANNEL, ChannelRead, PARALLEL, PullOptions, plan_layers},
};
use crate::{
    Image, ImageError, Layer, PullEvent,
    layer::{self, Compression},
    manifest::{Config, Descriptor},
    registry::Repository,
    tarball::invalid,
};

/// What a fetch has brought.
pub(super) struct Kept {
    pub(super) image: Image,
    /// The digest that the registry gave the reference.
    pub(super) top: Digest,
}

impl ImageStore {
    pub(super) async fn fetch_kept(
        &self,
        reference: &ImageReference,
        options: &PullOptions,
        budget: Budget,
    ) -> Result<Kept, ImageError> {
        let budget = Arc::new(budget);
        let (repository, top) = self.resolve(reference, options).await?;
        let digest = top.digest.clone();
        let (manifest, manifest_bytes) =
            self.platform_manifest(&repository, reference, top).await?;
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
        budget.take((config_bytes.len() + manifest_bytes.len()) as u64)?;
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
        let mut distinct = plan.clone();
        distinct.sort_by(|a, b| a.1.cmp(&b.1));
        distinct.dedup_by(|a, b| a.1 == b.1);
        let layers: Vec<Layer> = futures::stream::iter(distinct)
            .map(|(blob, diff_id, compression)| {
                self.kept_blob(
                    &repository,
                    options,
                    budget.clone(),
                    blob,
                    diff_id,
                    compression,
                )
            })
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        let mut ordered = Vec::new();
        for (_, diff_id, _) in &plan {
            let layer = layers.iter().find(|layer| layer.diff_id == *diff_id);
            ordered.extend(layer.cloned());
        }
        let image = self
            .blocking(move |inner| {
                inner.describe(&manifest, &manifest_bytes, &config_bytes, config, ordered)
            })
            .await?;
        Ok(Kept { image, top: digest })
    }

    async fn kept_blob(
        &self,
        repository: &Repository,
        options: &PullOptions,
        budget: Arc<Budget>,
        blob: Descriptor,
        diff_id: Digest,
        compression: Compression,
    ) -> Result<Layer, ImageError> {
        let (wanted, descriptor, shared) = (diff_id.clone(), blob.clone(), budget.clone());
        let here = self
            .blocking(move |inner| inner.kept_layer(&descriptor, &wanted, &shared))
            .await?;
        if let Some(layer) = here {
            options.tell(PullEvent::LayerDone {
                layer: blob.digest,
                cached: true,
            });
            return Ok(layer);
        }
        if blob.size > budget.left() {
            return Err(budget.over());
        }
        let expected = blob.clone();
        let write = move |inner: &Inner, source: ChannelRead| {
            inner.import_kept(source, &expected, diff_id, compression, &budget)
        };
        self.fetch_layer(repository, options, &blob, write).await
    }

    /// Takes in all images of an archive that arrives as a stream: an OCI layout or a docker-archive, as
    /// a tar file, plain or packed by gzip or zstd. The caller holds a [`super::Hold`] until it has named
    /// the contents.
    pub async fn load_content(
        &self,
        archive: impl Stream<Item = io::Result<Bytes>> + Send,
        keep: &KeepOptions,
    ) -> Result<Vec<Content>, ImageError> {
        let (sender, receiver) = mpsc::channel(CHANNEL);
        let (known, limit) = (keep.known.clone(), keep.limit);
        let write = self.blocking(move |inner| {
            // Blobs are in it once; what is packed is bounded again when it is unpacked.
            let most = limit.saturating_add(64 << 20);
            let mut temp = disk::Temp::create(&inner.tmp())?;
            let budget = inner.budget(&known, limit);
            unpack(ChannelRead::new(receiver), &mut temp.file, most).map_err(|source| {
                match source.downcast::<ImageError>() {
                    Ok(error) => error,
                    Err(source) => ImageError::Io {
                        action: "take the archive in".to_owned(),
                        source,
                    },
                }
            })?;
            let mut loader = Loader::new(inner, Some(&budget));
            loader.load(temp.path(), "the archive")?;
            Ok(loader.contents)
        });
        let send = async {
            pin_mut!(archive);
            while let Some(piece) = archive.next().await {
                let piece = piece.map_err(|source| ImageError::Io {
                    action: "read the archive".to_owned(),
                    source,
                })?;
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
            drop(sender);
            Ok(())
        };
        let (sent, written) = tokio::join!(send, write);
        sent?;
        written
    }
}

/// Writes an archive to a file, unpacked, at most so many bytes.
fn unpack(mut source: impl Read, out: &mut std::fs::File, most: u64) -> io::Result<()> {
    let mut start = Vec::new();
    source.by_ref().take(4).read_to_end(&mut start)?;
    let compression = Compression::sniff(&start);
    let whole = io::Cursor::new(start).chain(source);
    let unpacked: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(whole),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(whole)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(whole)?),
    };
    let written = io::copy(&mut unpacked.take(most + 1), out)?;
    if written > most {
        return Err(io::Error::other(ImageError::TooLarge { limit: most }));
    }
    if written < 1024 {
        return Err(io::Error::other(invalid(
            "the archive",
            "is not a tar file",
        )));
    }
    out.flush()
}

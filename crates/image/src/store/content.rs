//! Images whose blobs are kept as they came, so that they can be pushed and saved again.
//!
//! ```text
//! content/<hex>               layers' blobs, by digest
//! kept/<id>-<manifest>        empty: this image's blobs and record stay until it is released
//! ```
//!
//! Such an image has no name in this store; whoever keeps it has the names (objects of kind Image).
//! A marker is written after the blobs and before the record, and what no keeper names any more is
//! released by [`Quiet::release`]: so a crash leaves at most an image that the next release drops.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{Read, Write},
    path::PathBuf,
    str::FromStr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use hypernetes_types::{Digest, ImageReference};
use serde_json::Value;

use super::{ImageStore, Inner, disk, pull::PullOptions};
use crate::{
    Image, ImageError, Layer, Limits,
    layer::{self, Compression, Promise},
    manifest::{Descriptor, Document, Manifest},
    tarball::invalid,
};

/// One image's content: its configuration, and the manifest through which its blobs are found.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentId {
    /// Digest of the configuration.
    pub id: Digest,
    /// Digest of the manifest.
    pub manifest: Digest,
}

impl ContentId {
    fn file_name(&self) -> String {
        format!("{}-{}", self.id.hex(), self.manifest.hex())
    }

    fn of_file_name(name: &str) -> Option<Self> {
        let (id, manifest) = name.split_once('-')?;
        let digest = |hex: &str| Digest::from_str(&format!("sha256:{hex}")).ok();
        Some(Self {
            id: digest(id)?,
            manifest: digest(manifest)?,
        })
    }
}

/// What a keeper may take in.
#[derive(Debug, Clone, Default)]
pub struct KeepOptions {
    /// Contents that the keeper has already: their layers are not fetched again. Other layers are, even
    /// if they are here, so that nobody gets or notices what is another keeper's.
    pub known: Vec<ContentId>,
    /// Most bytes, blobs and disks together.
    pub limit: u64,
}

/// Content that has been taken in. It stays at least until this value is dropped.
#[derive(Debug)]
pub struct Content {
    /// The image, without names.
    pub image: Image,
    /// What keeps it.
    pub content: ContentId,
    /// Names that its archive gives it.
    pub names: Vec<ImageReference>,
    /// The digest by which the registry has it: of the index, or the manifest.
    pub digest: Option<Digest>,
    /// Platform, `linux/amd64`.
    pub platform: String,
    /// Bytes of the disks of its layers.
    pub size: u64,
    /// Bytes of the blobs.
    pub blobs: u64,
}

/// While it lives, nothing is released or collected.
#[derive(Debug)]
pub struct Hold {
    _pulls: File,
}

/// While it lives, nothing is taken in: who names what can be looked up without a race.
#[derive(Debug)]
pub struct Quiet {
    store: ImageStore,
    alone: File,
}

/// How much may still be taken in.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicU64,
    whole: u64,
    /// Blobs that need not be proven.
    known: Mutex<HashSet<Digest>>,
}

impl Budget {
    pub(super) fn take(&self, bytes: u64) -> Result<(), ImageError> {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            })
            .map(|_before| ())
            .map_err(|_left| self.over())
    }

    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    pub(super) fn over(&self) -> ImageError {
        ImageError::TooLarge { limit: self.whole }
    }

    fn known(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ImageStore {
    /// Keeps everybody from releasing what is here.
    pub async fn hold(&self) -> Result<Hold, ImageError> {
        self.blocking(|inner| {
            disk::lock_shared(&inner.root.join("pulls.lock")).map(|_pulls| Hold { _pulls })
        })
        .await
    }

    /// Waits for nobody: `None` while something is being taken in.
    pub async fn quiet(&self) -> Result<Option<Quiet>, ImageError> {
        let store = self.clone();
        let alone = self
            .blocking(|inner| disk::try_lock(&inner.root.join("pulls.lock")))
            .await?;
        Ok(alone.map(|alone| Quiet { store, alone }))
    }

    /// The kept image of that content.
    pub async fn content(&self, content: &ContentId) -> Result<Image, ImageError> {
        let content = content.clone();
        self.blocking(move |inner| inner.kept(&content)).await
    }

    /// Manifest and configuration of kept content, as they came.
    pub async fn documents(&self, content: &ContentId) -> Result<(Value, Value), ImageError> {
        let content = content.clone();
        self.blocking(move |inner| {
            inner.kept(&content)?;
            let read = |digest: &Digest| {
                let bytes = inner.read_blob(digest)?;
                let path = inner.blob_path(digest);
                serde_json::from_slice(&bytes).map_err(|e| disk::broken(&path, &e))
            };
            Ok((read(&content.manifest)?, read(&content.id)?))
        })
        .await
    }

    /// Fetches what `reference` names now, and keeps its blobs. The caller holds a [`Hold`] until it has
    /// named the content.
    pub async fn pull_content(
        &self,
        reference: &ImageReference,
        options: &PullOptions,
        keep: &KeepOptions,
    ) -> Result<Content, ImageError> {
        let (known, limit) = (keep.known.clone(), keep.limit);
        let budget = self
            .blocking(move |inner| Ok(inner.budget(&known, limit)))
            .await?;
        let fetched = self.fetch_kept(reference, options, budget).await?;
        let digest = Some(fetched.top);
        let image = fetched.image;
        self.blocking(move |inner| inner.keep(&image, Vec::new(), digest))
            .await
    }
}

impl Quiet {
    /// Drops all kept content but `named`; what a container uses is dropped another time. Says how
    /// many were dropped and how many have to wait.
    pub async fn release(
        self,
        named: HashSet<ContentId>,
        in_use: HashSet<Digest>,
    ) -> Result<(usize, usize), ImageError> {
        let Self { store, alone } = self;
        store
            .blocking(move |inner| {
                let _changes = inner.lock()?;
                let (mut gone, mut waiting) = (0, 0);
                for content in inner.all_kept()? {
                    if named.contains(&content) {
                        continue;
                    }
                    let others = inner.all_kept()?;
                    let shared = others
                        .iter()
                        .any(|other| other.id == content.id && *other != content);
                    let references = inner.references()?;
                    let is_named = references.values().any(|id| *id == content.id);
                    if !shared && !is_named {
                        if in_use.contains(&content.id) {
                            waiting += 1;
                            continue;
                        }
                        // Record before marker: what has no marker is nobody's business any more.
                        disk::remove(&inner.record_path(&content.id))?;
                    }
                    disk::remove(&inner.kept_path(&content))?;
                    gone += 1;
                }
                inner.collect_alone()?;
                drop(alone);
                Ok((gone, waiting))
            })
            .await
    }
}

impl Inner {
    pub(super) fn content_path(&self, blob: &Digest) -> PathBuf {
        self.root.join("content").join(blob.hex())
    }

    fn kept_path(&self, content: &ContentId) -> PathBuf {
        self.root.join("kept").join(content.file_name())
    }

    pub(super) fn all_kept(&self) -> Result<Vec<ContentId>, ImageError> {
        let names = disk::names(&self.root.join("kept"))?;
        Ok(names
            .iter()
            .filter_map(|name| ContentId::of_file_name(name))
            .collect())
    }

    /// Whether somebody keeps the image, so that losing its last name is not its end.
    pub(super) fn is_kept(&self, id: &Digest) -> Result<bool, ImageError> {
        Ok(self.all_kept()?.iter().any(|content| content.id == *id))
    }

    pub(super) fn kept(&self, content: &ContentId) -> Result<Image, ImageError> {
        let missing = || ImageError::NotFound(content.id.to_string());
        if !self.kept_path(content).exists() {
            return Err(missing());
        }
        self.record(&content.id, &super::References::new())?
            .ok_or_else(missing)
    }

    pub(super) fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.blob_path(digest);
        fs::read(&path).map_err(disk::failed("read", &path))
    }

    /// The manifest of kept content, with its bytes.
    pub(super) fn kept_manifest(&self, digest: &Digest) -> Result<(Manifest, Vec<u8>), ImageError> {
        let bytes = self.read_blob(digest)?;
        match Document::parse(&bytes, None, &self.limits)? {
            Document::Manifest(manifest) => Ok((manifest, bytes)),
            Document::Index(_) => Err(invalid("manifest", "an index where a manifest was kept")),
        }
    }

    pub(super) fn budget(&self, known: &[ContentId], limit: u64) -> Budget {
        let blobs = known
            .iter()
            .filter(|content| self.kept_path(content).exists())
            .filter_map(|content| self.kept_manifest(&content.manifest).ok())
            .flat_map(|(manifest, _)| manifest.layers.into_iter().map(|layer| layer.digest));
        Budget {
            left: AtomicU64::new(limit),
            whole: limit,
            known: Mutex::new(blobs.collect()),
        }
    }

    /// The layer, if its blob and its disk are here and the keeper has them already.
    pub(super) fn kept_layer(
        &self,
        blob: &Descriptor,
        diff_id: &Digest,
        budget: &Budget,
    ) -> Result<Option<Layer>, ImageError> {
        if !budget.known().contains(&blob.digest) || !self.content_path(&blob.digest).exists() {
            return Ok(None);
        }
        let Some(layer) = self.layer_here(diff_id.clone(), blob.digest.clone()) else {
            return Ok(None);
        };
        budget.take(blob.size.saturating_add(layer.disk_size))?;
        Ok(Some(layer))
    }

    /// Turns a blob into a disk and keeps the blob too.
    pub(super) fn import_kept(
        &self,
        source: impl Read,
        blob: &Descriptor,
        diff_id: Digest,
        compression: Compression,
        budget: &Budget,
    ) -> Result<Layer, ImageError> {
        budget.take(blob.size)?;
        let limits = Limits {
            max_layer_size: self.limits.max_layer_size.min(budget.left()),
            ..self.limits.clone()
        };
        let mut raw = disk::Temp::create(&self.tmp())?;
        let mut temp = disk::Temp::create(&self.tmp())?;
        let tee = Tee {
            source: source.take(blob.size + 1),
            copy: &mut raw.file,
        };
        let promise = Promise {
            blob: &blob.digest,
            diff_id: &diff_id,
        };
        let written = layer::convert(tee, compression, &promise, &mut temp.file, &limits);
        let written = written.map_err(|error| match error {
            ImageError::Invalid { rule, .. } if rule.contains("may have at most") => budget.over(),
            error => error,
        })?;
        budget.take(written.size)?;
        raw.keep(&self.content_path(&blob.digest))?;
        let disk = self.layer_path(&diff_id);
        temp.keep(&disk)?;
        // From here on it has been proven.
        budget.known().insert(blob.digest.clone());
        Ok(Layer {
            diff_id,
            blob: blob.digest.clone(),
            disk,
            disk_size: written.size,
        })
    }

    /// Marks an image as kept and writes its record. Its documents and layers are here.
    pub(super) fn keep(
        &self,
        image: &Image,
        names: Vec<ImageReference>,
        digest: Option<Digest>,
    ) -> Result<Content, ImageError> {
        let content = ContentId {
            id: image.id.clone(),
            manifest: image.manifest.clone(),
        };
        disk::write(&self.tmp(), &self.kept_path(&content), b"")?;
        let image = self.commit(image, &[])?;
        let (manifest, _) = self.kept_manifest(&content.manifest)?;
        let mut disks = HashSet::new();
        let size = image
            .layers
            .iter()
            .filter(|layer| disks.insert(layer.diff_id.clone()))
            .map(|layer| layer.disk_size)
            .fold(0, u64::saturating_add);
        let mut seen = HashSet::new();
        let blobs = manifest
            .layers
            .iter()
            .chain([&manifest.config])
            .filter(|blob| seen.insert(blob.digest.clone()))
            .map(|blob| blob.size)
            .fold(0, u64::saturating_add);
        Ok(Content {
            platform: format!("linux/{}", image.architecture),
            image,
            content,
            names,
            digest,
            size,
            blobs,
        })
    }

    /// What collection must leave: documents and blobs of kept content. Markers that lost their record are
    /// removed. Call with the locks.
    pub(super) fn kept_blobs(&self) -> Result<(HashSet<String>, HashSet<String>), ImageError> {
        let (mut documents, mut blobs) = (HashSet::new(), HashSet::new());
        for content in self.all_kept()? {
            if !self.record_path(&content.id).exists() {
                disk::remove(&self.kept_path(&content))?;
                continue;
            }
            documents.insert(content.id.hex().to_owned());
            documents.insert(content.manifest.hex().to_owned());
            let (manifest, _) = self.kept_manifest(&content.manifest)?;
            blobs.extend(
                manifest
                    .layers
                    .iter()
                    .map(|layer| layer.digest.hex().to_owned()),
            );
        }
        Ok((documents, blobs))
    }
}

/// Copies what is read.
struct Tee<'a, R> {
    source: R,
    copy: &'a mut File,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.source.read(buffer)?;
        self.copy.write_all(&buffer[..got])?;
        Ok(got)
    }
}

//! The images of this node.
//!
//! ```text
//! blobs/<hex>          manifests and configurations, by digest
//! layers/<hex>.erofs   disks, by diff id
//! images/<hex>.json    one record per image, by the digest of its configuration
//! references.json      names, with tag or digest, of images
//! content/, kept/      see `content`
//! origins/<hex>        where a layer has come from, by diff id, see `origins`
//! tmp/                 what is being written
//! lock, pulls.lock     see below
//! ```
//!
//! Every file is written aside, synced and renamed; names are switched last. So whatever the moment
//! of a crash, what is under its final name is whole, and what is not is cleaned at the next start.
//!
//! Several processes may use a store: changes of records and names hold `lock`; a pull holds
//! `pulls.lock` shared until its record is written, and layers are only collected by who can have it
//! alone. Nothing is cached in memory.

mod content;
mod disk;
mod load;
mod origins;
mod pull;
mod push;
mod remove;
mod save;
mod take;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use hypernetes_types::{Digest, ImageReference};
use serde_json::Value;

use crate::{
    Image, ImageError, Limits, RegistryConfig, flight::Flights, registry::Transport, tarball::shown,
};
pub use content::{Content, ContentId, Hold, KeepOptions, Quiet};
pub use pull::{Progress, PullOptions};
pub use push::{PushEvent, PushProgress};
pub use remove::Removed;
pub use save::{ArchiveStream, Saved};

/// How a store works.
#[derive(Debug, Clone, Default)]
pub struct StoreConfig {
    /// Bounds on what is read.
    pub limits: Limits,
    /// Where registries are and how far they are trusted.
    pub registry: RegistryConfig,
}

/// An image with the documents it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// The record.
    pub image: Image,
    /// The manifest, as JSON.
    pub manifest: Value,
    /// The configuration, as JSON.
    pub config: Value,
}

/// What the store takes on its disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Images.
    pub images: u64,
    /// Layers.
    pub layers: u64,
    /// Bytes allocated for layers.
    pub layer_bytes: u64,
    /// Bytes allocated for manifests and configurations.
    pub blob_bytes: u64,
}

/// The images of this node. Clones share their pulls.
#[derive(Debug, Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    limits: Limits,
    transport: Arc<Transport>,
    flights: Flights,
}

/// Names of images.
type References = BTreeMap<ImageReference, Digest>;

impl ImageStore {
    /// Opens a store, making it if it is not there, and cleans what a crash has left. Blocks on the
    /// disk.
    pub fn open(root: PathBuf, config: StoreConfig) -> Result<Self, ImageError> {
        for part in [
            "blobs", "content", "images", "kept", "layers", "origins", "tmp",
        ] {
            let dir = root.join(part);
            fs::create_dir_all(&dir).map_err(disk::failed("create", &dir))?;
        }
        let transport = Arc::new(Transport::new(config.registry)?);
        let inner = Inner {
            root,
            limits: config.limits,
            transport,
            flights: Flights::default(),
        };
        disk::clean_tmp(&inner.root.join("tmp"))?;
        let store = Self {
            inner: Arc::new(inner),
        };
        {
            let _changes = store.inner.lock()?;
            store.inner.drop_dangling_names()?;
            store.inner.collect()?;
        }
        Ok(store)
    }

    /// Where it is on the disk.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Finds an image by reference, id, or the first 12 or more digits of an id.
    pub async fn get(&self, name: &str) -> Result<Image, ImageError> {
        let name = name.to_owned();
        self.blocking(move |inner| inner.find(&name)).await
    }

    /// All images, by id.
    pub async fn list(&self) -> Result<Vec<Image>, ImageError> {
        self.blocking(|inner| inner.images()).await
    }

    /// An image with its documents.
    pub async fn inspect(&self, name: &str) -> Result<Inspection, ImageError> {
        let name = name.to_owned();
        self.blocking(move |inner| {
            let image = inner.find(&name)?;
            let document = |digest: &Digest| {
                let path = inner.blob_path(digest);
                let bytes = fs::read(&path).map_err(disk::failed("read", &path))?;
                serde_json::from_slice(&bytes).map_err(|e| disk::broken(&path, &e))
            };
            let (manifest, config) = (document(&image.manifest)?, document(&image.id)?);
            Ok(Inspection {
                image,
                manifest,
                config,
            })
        })
        .await
    }

    /// What the store takes on its disk.
    pub async fn usage(&self) -> Result<Usage, ImageError> {
        self.blocking(|inner| {
            let (layers, layer_bytes) = disk::allocated(&inner.root.join("layers"))?;
            let (_, blob_bytes) = disk::allocated(&inner.root.join("blobs"))?;
            let images = inner.record_ids()?.len() as u64;
            Ok(Usage {
                images,
                layers,
                layer_bytes,
                blob_bytes,
            })
        })
        .await
    }

    /// Opens an image's layers, lowest first, for reading only. An open layer stays readable
    /// whatever happens to the store.
    pub async fn open_layers(&self, image: &Image) -> Result<Vec<File>, ImageError> {
        let layers = image.layers.clone();
        self.blocking(move |inner| {
            let open = |layer: &crate::Layer| {
                let path = inner.layer_path(&layer.diff_id);
                File::open(&path).map_err(disk::failed("open", &path))
            };
            layers.iter().map(open).collect()
        })
        .await
    }

    /// Runs disk work off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(ImageError::Io {
                action: "finish work on the image store".to_owned(),
                source: std::io::Error::other(error),
            }),
        }
    }
}

impl Inner {
    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("{}.erofs", diff_id.hex()))
    }

    fn record_path(&self, id: &Digest) -> PathBuf {
        self.root.join("images").join(format!("{}.json", id.hex()))
    }

    fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Held while records and names change.
    fn lock(&self) -> Result<File, ImageError> {
        disk::lock(&self.root.join("lock"))
    }

    fn references(&self) -> Result<References, ImageError> {
        let path = self.root.join("references.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| disk::broken(&path, &e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(References::new()),
            Err(e) => Err(disk::failed("read", &path)(e)),
        }
    }

    fn write_references(&self, references: &References) -> Result<(), ImageError> {
        let bytes = serde_json::to_vec_pretty(references).expect("names are text");
        disk::write(&self.tmp(), &self.root.join("references.json"), &bytes)
    }

    /// Stores a blob under its digest.
    fn write_blob(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let digest = crate::layer::digest_of(bytes);
        let path = self.blob_path(&digest);
        if !path.exists() {
            disk::write(&self.tmp(), &path, bytes)?;
        }
        Ok(digest)
    }

    /// Writes an image's record and gives it these names, taking them from others.
    fn commit(&self, image: &Image, names: &[ImageReference]) -> Result<Image, ImageError> {
        let _changes = self.lock()?;
        if image
            .layers
            .iter()
            .any(|layer| !self.layer_path(&layer.diff_id).exists())
        {
            // Removed since it was looked up.
            return Err(ImageError::NotFound(image.id.to_string()));
        }
        let mut record = image.clone();
        (record.tags, record.digests) = (Vec::new(), Vec::new());
        let bytes = serde_json::to_vec_pretty(&record).expect("a record is plain data");
        disk::write(&self.tmp(), &self.record_path(&image.id), &bytes)?;
        let mut references = self.references()?;
        for name in names {
            references.insert(name.clone(), image.id.clone());
        }
        if !names.is_empty() {
            self.write_references(&references)?;
        }
        self.record(&image.id, &references)?
            .ok_or_else(|| ImageError::NotFound(image.id.to_string()))
    }

    fn record_ids(&self) -> Result<Vec<Digest>, ImageError> {
        let mut ids = Vec::new();
        for name in disk::names(&self.root.join("images"))? {
            let digest = name
                .strip_suffix(".json")
                .map(|hex| format!("sha256:{hex}").parse());
            if let Some(Ok(id)) = digest {
                ids.push(id);
            }
        }
        ids.sort();
        Ok(ids)
    }

    fn record(&self, id: &Digest, references: &References) -> Result<Option<Image>, ImageError> {
        let path = self.record_path(id);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(disk::failed("read", &path)(e)),
        };
        let mut image: Image =
            serde_json::from_slice(&bytes).map_err(|e| disk::broken(&path, &e))?;
        for (name, _) in references.iter().filter(|(_, target)| *target == id) {
            let list = if name.digest().is_some() {
                &mut image.digests
            } else {
                &mut image.tags
            };
            list.push(name.clone());
        }
        for layer in &mut image.layers {
            layer.disk = self.layer_path(&layer.diff_id);
        }
        Ok(Some(image))
    }

    fn images(&self) -> Result<Vec<Image>, ImageError> {
        let references = self.references()?;
        let mut images = Vec::new();
        for id in self.record_ids()? {
            images.extend(self.record(&id, &references)?);
        }
        Ok(images)
    }

    fn find(&self, name: &str) -> Result<Image, ImageError> {
        let missing = || ImageError::NotFound(shown(name.as_bytes()));
        let references = self.references()?;
        if let Ok(id) = name.parse::<Digest>() {
            return self.record(&id, &references)?.ok_or_else(missing);
        }
        if let Some(id) = self.by_prefix(name)? {
            return self.record(&id, &references)?.ok_or_else(missing);
        }
        let reference: ImageReference = name.parse().map_err(|_not_a_name| missing())?;
        let id = named(&references, &reference).ok_or_else(missing)?;
        self.record(id, &references)?.ok_or_else(missing)
    }

    /// The one image whose id begins so.
    fn by_prefix(&self, prefix: &str) -> Result<Option<Digest>, ImageError> {
        let digits = prefix.strip_prefix("sha256:").unwrap_or(prefix);
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if digits.len() < 12 || digits.len() > 64 || !digits.bytes().all(hex) {
            return Ok(None);
        }
        let mut found = self
            .record_ids()?
            .into_iter()
            .filter(|id| id.hex().starts_with(digits));
        let first = found.next();
        Ok(if found.next().is_none() { first } else { None })
    }

    /// Forgets names of records that a crash or a hand has removed.
    fn drop_dangling_names(&self) -> Result<(), ImageError> {
        let references = self.references()?;
        let mut kept = references.clone();
        kept.retain(|_, id| self.record_path(id).exists());
        if kept.len() < references.len() {
            self.write_references(&kept)?;
        }
        Ok(())
    }
}

/// The image with this name. A name with tag and digest is found by its digest.
fn named<'r>(references: &'r References, name: &ImageReference) -> Option<&'r Digest> {
    match name.digest() {
        Some(digest) => references.get(&name.with_digest(digest.clone())),
        None => references.get(name),
    }
}

/// The directory of a path that was made by this module.
fn parent(path: &Path) -> &Path {
    path.parent().expect("paths in the store have a parent")
}

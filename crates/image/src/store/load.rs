//! Images from files: an OCI layout (directory or tar) and what `docker save` writes.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use hypernetes_types::{Digest, ImageReference};
use serde::Deserialize;

use super::{Content, ImageStore, Inner, content::Budget, disk, pull::plan_layers};
use crate::{
    Image, ImageError, Layer,
    layer::{self, Compression},
    manifest::{self, Config, Descriptor, Document, Manifest, select},
    tarball::{EntryKind, Tarball, invalid, shown},
};

const IMAGE_NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const MAX_IMAGES: usize = 1000;
/// Members of an archive; images have a few each.
const MAX_MEMBERS: usize = 50_000;
/// Bytes of a member's name. Longer ones name nothing that is looked for.
const MAX_MEMBER_NAME: usize = 1024;

/// Opens the file of a layer.
type OpenLayer<'a> = dyn Fn(&Descriptor) -> Result<Box<dyn Read>, ImageError> + 'a;

impl ImageStore {
    /// Takes in all images for this machine of an OCI layout (directory or tar) or a docker-archive.
    /// They keep the names that the file gives them.
    pub async fn load(&self, path: &Path) -> Result<Vec<Image>, ImageError> {
        let path = path.to_owned();
        self.blocking(move |inner| {
            let _pulls = disk::lock_shared(&inner.root.join("pulls.lock"))?;
            let mut loader = Loader::new(inner, None);
            loader.load(&path, &path.display().to_string())?;
            Ok(loader.images)
        })
        .await
    }
}

/// One archive on its way into the store.
pub(super) struct Loader<'a> {
    inner: &'a Inner,
    /// Set if the blobs are kept, and then no names are given.
    keep: Option<&'a Budget>,
    /// What has been taken in, so that nothing is read as often as an archive names it.
    layers: HashMap<(Digest, Digest), Layer>,
    described: HashMap<String, Descriptor>,
    images: Vec<Image>,
    /// With `keep`: what was taken in.
    pub(super) contents: Vec<Content>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(inner: &'a Inner, keep: Option<&'a Budget>) -> Self {
        Self {
            inner,
            keep,
            layers: HashMap::new(),
            described: HashMap::new(),
            images: Vec::new(),
            contents: Vec::new(),
        }
    }

    /// Takes in all images of the archive at `path`, which messages call `what`.
    pub(super) fn load(&mut self, path: &Path, what: &str) -> Result<(), ImageError> {
        let archive = Archive::open(path, what, self.inner)?;
        if archive.has("index.json") {
            self.load_layout(&archive)
        } else if archive.has("manifest.json") {
            self.load_docker(&archive)
        } else {
            Err(invalid(
                what,
                "is neither an OCI layout (index.json) nor a docker-archive (manifest.json)",
            ))
        }
    }

    fn load_layout(&mut self, archive: &Archive) -> Result<(), ImageError> {
        let limits = &self.inner.limits;
        let index = archive.read("index.json", limits.max_manifest_size)?;
        let Document::Index(entries) = Document::parse(&index, Some(manifest::OCI_INDEX), limits)?
        else {
            return Err(invalid("index.json", "must be an index"));
        };
        if entries.len() > MAX_IMAGES {
            return Err(invalid(
                "index.json",
                format!("more than {MAX_IMAGES} images"),
            ));
        }
        let mut names: BTreeMap<Digest, Vec<ImageReference>> = BTreeMap::new();
        for entry in &entries {
            names
                .entry(entry.digest.clone())
                .or_default()
                .extend(name_of(entry));
        }
        for (digest, names) in names {
            let entry = entries
                .iter()
                .find(|e| e.digest == digest)
                .expect("taken from the entries");
            self.load_entry(archive, entry, names)?;
        }
        Ok(())
    }

    fn load_entry(
        &mut self,
        archive: &Archive,
        entry: &Descriptor,
        names: Vec<ImageReference>,
    ) -> Result<(), ImageError> {
        let limits = &self.inner.limits;
        let bytes = archive.blob(entry, limits.max_manifest_size)?;
        let (manifest, bytes) = match Document::parse(&bytes, Some(&entry.media_type), limits)? {
            Document::Manifest(manifest) => (manifest, bytes),
            Document::Index(inner) => {
                let entry = select(&inner).map_err(|available| {
                    invalid(
                        entry.digest.to_string(),
                        format!("no linux/amd64 image, only {available}"),
                    )
                })?;
                let bytes = archive.blob(entry, limits.max_manifest_size)?;
                match Document::parse(&bytes, Some(&entry.media_type), limits)? {
                    Document::Manifest(manifest) => (manifest, bytes),
                    Document::Index(_) => return Err(invalid("index", "an index inside an index")),
                }
            }
        };
        let config = archive.blob(&manifest.config, limits.max_config_size)?;
        let open = |blob: &Descriptor| archive.open_file(&blob_name(&blob.digest));
        self.take_in(&manifest, &bytes, &config, names, &open)
    }

    fn load_docker(&mut self, archive: &Archive) -> Result<(), ImageError> {
        let limits = &self.inner.limits;
        let list = archive.read("manifest.json", limits.max_manifest_size)?;
        let list: Vec<DockerImage> = serde_json::from_slice(&list)
            .map_err(|e| invalid("manifest.json", format!("is not a docker-archive's: {e}")))?;
        if list.is_empty() || list.len() > MAX_IMAGES {
            return Err(invalid("manifest.json", format!("{} images", list.len())));
        }
        for entry in list {
            let config = archive.read(&entry.config, limits.max_config_size)?;
            let (mut layers, mut places) = (Vec::new(), HashMap::new());
            if entry.layers.is_empty() || entry.layers.len() > limits.max_layers {
                let rule = format!("an image of {} layers", entry.layers.len());
                return Err(invalid("manifest.json", rule));
            }
            for place in entry.layers {
                let place = archive.resolve(&place)?;
                let descriptor = match self.described.get(&place) {
                    Some(known) => known.clone(),
                    None => {
                        let found = describe_file(archive.open_file(&place)?)?;
                        self.described.insert(place.clone(), found.clone());
                        found
                    }
                };
                places.insert(descriptor.digest.clone(), place);
                layers.push(descriptor);
            }
            // The archive has no manifest; this one says what it holds.
            let manifest = Manifest {
                schema_version: 2,
                media_type: manifest::OCI_MANIFEST.to_owned(),
                config: Descriptor::of(manifest::OCI_CONFIG, &config),
                layers,
            };
            let bytes = serde_json::to_vec(&manifest).expect("a manifest is plain data");
            let names = entry.repo_tags.unwrap_or_default();
            let names: Vec<ImageReference> = names.iter().filter_map(|n| n.parse().ok()).collect();
            let open = |blob: &Descriptor| archive.open_file(&places[&blob.digest]);
            self.take_in(&manifest, &bytes, &config, names, &open)?;
        }
        Ok(())
    }

    fn take_in(
        &mut self,
        manifest: &Manifest,
        manifest_bytes: &[u8],
        config_bytes: &[u8],
        names: Vec<ImageReference>,
        open: &OpenLayer<'_>,
    ) -> Result<(), ImageError> {
        let config = Config::parse(config_bytes)?;
        if !config.is_ours() {
            let platform = shown(format!("{}/{}", config.os, config.architecture).as_bytes());
            return Err(invalid(
                "configuration",
                format!("is for {platform}, not linux/amd64"),
            ));
        }
        let mut layers = Vec::new();
        for (blob, diff_id, compression) in plan_layers(manifest, &config)? {
            let key = (blob.digest.clone(), diff_id.clone());
            let layer = match (self.layers.get(&key), self.keep) {
                (Some(layer), _) => layer.clone(),
                (None, None) => {
                    self.inner
                        .import_layer(open(&blob)?, &blob, diff_id, compression)?
                }
                (None, Some(budget)) => match self.inner.kept_layer(&blob, &diff_id, budget)? {
                    Some(layer) => layer,
                    None => {
                        self.inner
                            .import_kept(open(&blob)?, &blob, diff_id, compression, budget)?
                    }
                },
            };
            self.layers.insert(key, layer.clone());
            layers.push(layer);
        }
        let inner = self.inner;
        let image = inner.describe(manifest, manifest_bytes, config_bytes, config, layers)?;
        match self.keep {
            None => self.images.push(inner.commit(&image, &names)?),
            Some(budget) => {
                budget.take((manifest_bytes.len() + config_bytes.len()) as u64)?;
                self.contents.push(inner.keep(&image, names, None)?);
            }
        }
        Ok(())
    }
}

/// The full name that an index entry carries; a bare tag is not a name.
fn name_of(entry: &Descriptor) -> Option<ImageReference> {
    let annotations = entry.annotations.as_ref()?;
    if let Some(name) = annotations.get(IMAGE_NAME) {
        return name.parse().ok();
    }
    annotations
        .get(REF_NAME)
        .filter(|name| name.contains('/'))
        .and_then(|name| name.parse().ok())
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Reads a layer file once to know its digest, size and packing.
fn describe_file(mut file: Box<dyn Read>) -> Result<Descriptor, ImageError> {
    use sha2::Digest as _;
    let failed = |source| ImageError::Io {
        action: "read a layer of the archive".to_owned(),
        source,
    };
    let mut hash = sha2::Sha256::new();
    let (mut size, mut start) = (0_u64, Vec::new());
    let mut buffer = vec![0; 128 << 10];
    loop {
        let got = file.read(&mut buffer).map_err(failed)?;
        if got == 0 {
            break;
        }
        if start.len() < 4 {
            start.extend_from_slice(&buffer[..got.min(4)]);
        }
        hash.update(&buffer[..got]);
        size += got as u64;
    }
    let suffix = match Compression::sniff(&start) {
        Compression::None => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    Ok(Descriptor {
        media_type: format!("{}{suffix}", manifest::OCI_LAYER),
        digest: Digest::from_sha256(hash.finalize().into()),
        size,
        platform: None,
        annotations: None,
    })
}

/// Files by name: a directory, or a tar file with the place of each member.
enum Archive {
    Directory(PathBuf),
    Tar {
        path: PathBuf,
        members: HashMap<String, Member>,
    },
}

enum Member {
    File { offset: u64, size: u64 },
    Link(String),
}

impl Archive {
    fn open(path: &Path, what: &str, inner: &Inner) -> Result<Self, ImageError> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let mut file = File::open(path).map_err(disk::failed("open", path))?;
        let mut start = [0; 4];
        let got = file.read(&mut start).map_err(disk::failed("read", path))?;
        if Compression::sniff(&start[..got]) != Compression::None {
            return Err(invalid(what, "is compressed: unpack it first"));
        }
        file.rewind().map_err(disk::failed("read", path))?;
        let counted = CountRead {
            inner: BufReader::with_capacity(128 << 10, file),
            at: 0,
        };
        let mut tarball = Tarball::new(counted, &inner.limits);
        let mut members = HashMap::new();
        while let Some(entry) = tarball.next()? {
            if members.len() >= MAX_MEMBERS {
                return Err(invalid(
                    what,
                    format!("has more than {MAX_MEMBERS} members"),
                ));
            }
            let Some(name) = member_name(entry.path) else {
                continue;
            };
            let name = plain(&name);
            let member = match entry.kind {
                EntryKind::File if entry.sparse.is_none() => Member::File {
                    offset: tarball.source().at,
                    size: entry.size,
                },
                EntryKind::Symlink | EntryKind::HardLink => {
                    let Some(target) = member_name(entry.link) else {
                        continue;
                    };
                    let base = match entry.kind {
                        EntryKind::Symlink => name.rsplit_once('/').map_or("", |(dir, _)| dir),
                        _ => "",
                    };
                    Member::Link(plain(&format!("{base}/{target}")))
                }
                _ => continue,
            };
            members.insert(name, member);
        }
        Ok(Self::Tar {
            path: path.to_owned(),
            members,
        })
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Directory(dir) => dir.join(name).is_file(),
            Self::Tar { members, .. } => members.contains_key(name),
        }
    }

    fn open_file(&self, name: &str) -> Result<Box<dyn Read>, ImageError> {
        let missing = || invalid(shown(name.as_bytes()), "is not in the archive");
        match self {
            Self::Directory(dir) => {
                // Names come from the directory's own documents, which may be hostile.
                if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
                    return Err(missing());
                }
                let path = dir.join(name);
                if fs::symlink_metadata(&path).is_ok_and(|m| !m.is_file()) {
                    return Err(missing());
                }
                let file = File::open(&path).map_err(disk::failed("open", &path))?;
                Ok(Box::new(BufReader::new(file)))
            }
            Self::Tar { path, members } => match members.get(&self.resolve(name)?) {
                Some(Member::File { offset, size }) => {
                    let mut file = File::open(path).map_err(disk::failed("open", path))?;
                    file.seek(SeekFrom::Start(*offset))
                        .map_err(disk::failed("read", path))?;
                    Ok(Box::new(BufReader::new(file.take(*size))))
                }
                _ => Err(missing()),
            },
        }
    }

    /// The name of the file that a name leads to.
    fn resolve(&self, name: &str) -> Result<String, ImageError> {
        let missing = || invalid(shown(name.as_bytes()), "is not in the archive");
        let Self::Tar { members, .. } = self else {
            return Ok(name.to_owned());
        };
        let mut name = plain(name);
        for _ in 0..8 {
            match members.get(&name).ok_or_else(missing)? {
                Member::Link(target) => name.clone_from(target),
                Member::File { .. } => return Ok(name),
            }
        }
        Err(missing())
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        self.open_file(name)?
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| ImageError::Io {
                action: format!("read {}", shown(name.as_bytes())),
                source,
            })?;
        if bytes.len() as u64 > limit {
            return Err(invalid(
                shown(name.as_bytes()),
                format!("is larger than {limit} bytes"),
            ));
        }
        Ok(bytes)
    }

    fn blob(&self, blob: &Descriptor, limit: u64) -> Result<Vec<u8>, ImageError> {
        let bytes = self.read(&blob_name(&blob.digest), limit)?;
        let actual = layer::digest_of(&bytes);
        if actual == blob.digest {
            Ok(bytes)
        } else {
            Err(ImageError::DigestMismatch {
                expected: blob.digest.clone(),
                actual,
            })
        }
    }
}

fn member_name(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes)
        .ok()
        .filter(|name| name.len() <= MAX_MEMBER_NAME)
}

/// A member's name without `.`, `..` and empty parts. It is only ever a key, never a path.
fn plain(name: &str) -> String {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

struct CountRead<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Read for CountRead<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.at += got as u64;
        Ok(got)
    }
}

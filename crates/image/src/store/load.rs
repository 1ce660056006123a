//! Images from files: an OCI layout (directory or tar) and what `docker save` writes.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use hypernetes_types::{Digest, ImageReference};
use serde::Deserialize;

use super::{ImageStore, Inner, disk, pull::plan_layers};
use crate::{
    Image, ImageError,
    layer::{self, Compression},
    manifest::{self, Config, Descriptor, Document, Manifest, select},
    tarball::{EntryKind, Tarball, invalid, shown},
};

const IMAGE_NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const MAX_IMAGES: usize = 1000;

/// Opens the file of a layer.
type OpenLayer<'a> = dyn Fn(&Descriptor) -> Result<Box<dyn Read>, ImageError> + 'a;

impl ImageStore {
    /// Takes in all images for this machine of an OCI layout (directory or tar) or a docker-archive.
    /// They keep the names that the file gives them.
    pub async fn load(&self, path: &Path) -> Result<Vec<Image>, ImageError> {
        let path = path.to_owned();
        self.blocking(move |inner| {
            let _pulls = disk::lock_shared(&inner.root.join("pulls.lock"))?;
            let archive = Archive::open(&path, inner)?;
            if archive.has("index.json") {
                inner.load_layout(&archive)
            } else if archive.has("manifest.json") {
                inner.load_docker(&archive)
            } else {
                Err(invalid(
                    path.display().to_string(),
                    "is neither an OCI layout (index.json) nor a docker-archive (manifest.json)",
                ))
            }
        })
        .await
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Inner {
    fn load_layout(&self, archive: &Archive) -> Result<Vec<Image>, ImageError> {
        let index = archive.read("index.json", self.limits.max_manifest_size)?;
        let Document::Index(entries) =
            Document::parse(&index, Some(manifest::OCI_INDEX), &self.limits)?
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
        let mut images = Vec::new();
        for (digest, names) in names {
            let entry = entries
                .iter()
                .find(|e| e.digest == digest)
                .expect("taken from the entries");
            images.push(self.load_entry(archive, entry, &names)?);
        }
        Ok(images)
    }

    fn load_entry(
        &self,
        archive: &Archive,
        entry: &Descriptor,
        names: &[ImageReference],
    ) -> Result<Image, ImageError> {
        let limits = &self.limits;
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

    fn load_docker(&self, archive: &Archive) -> Result<Vec<Image>, ImageError> {
        let list = archive.read("manifest.json", self.limits.max_manifest_size)?;
        let list: Vec<DockerImage> = serde_json::from_slice(&list)
            .map_err(|e| invalid("manifest.json", format!("is not a docker-archive's: {e}")))?;
        if list.is_empty() || list.len() > MAX_IMAGES {
            return Err(invalid("manifest.json", format!("{} images", list.len())));
        }
        let mut images = Vec::new();
        for entry in list {
            let config = archive.read(&entry.config, self.limits.max_config_size)?;
            let (mut layers, mut places) = (Vec::new(), HashMap::new());
            if entry.layers.is_empty() || entry.layers.len() > self.limits.max_layers {
                let rule = format!("an image of {} layers", entry.layers.len());
                return Err(invalid("manifest.json", rule));
            }
            for place in entry.layers {
                let descriptor = describe_file(archive.open_file(&place)?)?;
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
            images.push(self.take_in(&manifest, &bytes, &config, &names, &open)?);
        }
        Ok(images)
    }

    fn take_in(
        &self,
        manifest: &Manifest,
        manifest_bytes: &[u8],
        config_bytes: &[u8],
        names: &[ImageReference],
        open: &OpenLayer<'_>,
    ) -> Result<Image, ImageError> {
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
            layers.push(self.import_layer(open(&blob)?, &blob, diff_id, compression)?);
        }
        let image = self.describe(manifest, manifest_bytes, config_bytes, config, layers)?;
        self.commit(&image, names)
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
    fn open(path: &Path, inner: &Inner) -> Result<Self, ImageError> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let mut file = File::open(path).map_err(disk::failed("open", path))?;
        let mut start = [0; 4];
        let got = file.read(&mut start).map_err(disk::failed("read", path))?;
        if Compression::sniff(&start[..got]) != Compression::None {
            return Err(invalid(
                path.display().to_string(),
                "is compressed: unpack it first",
            ));
        }
        file.rewind().map_err(disk::failed("read", path))?;
        let counted = CountRead {
            inner: BufReader::with_capacity(128 << 10, file),
            at: 0,
        };
        let mut tarball = Tarball::new(counted, &inner.limits);
        let mut members = HashMap::new();
        while let Some(entry) = tarball.next()? {
            if members.len() as u64 >= inner.limits.max_entries {
                return Err(invalid(path.display().to_string(), "has too many members"));
            }
            let Ok(name) = String::from_utf8(entry.path) else {
                continue;
            };
            let name = plain(&name);
            let member = match entry.kind {
                EntryKind::File if entry.sparse.is_none() => Member::File {
                    offset: tarball.source().at,
                    size: entry.size,
                },
                EntryKind::Symlink | EntryKind::HardLink => {
                    let Ok(target) = String::from_utf8(entry.link) else {
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
            Self::Tar { path, members } => {
                let mut name = plain(name);
                for _ in 0..8 {
                    match members.get(&name).ok_or_else(missing)? {
                        Member::Link(target) => name.clone_from(target),
                        Member::File { offset, size } => {
                            let mut file = File::open(path).map_err(disk::failed("open", path))?;
                            file.seek(SeekFrom::Start(*offset))
                                .map_err(disk::failed("read", path))?;
                            return Ok(Box::new(BufReader::new(file.take(*size))));
                        }
                    }
                }
                Err(missing())
            }
        }
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

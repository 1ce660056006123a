//! Kept content as an archive: an OCI layout that is a docker-archive as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Write},
};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use hypernetes_types::{Digest, ImageReference};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{ContentId, Hold, ImageStore, Inner, disk};
use crate::{ImageError, manifest};

/// Pieces between the disk and the client.
const CHANNEL: usize = 16;
const PIECE: usize = 128 << 10;

/// One image of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// What.
    pub content: ContentId,
    /// Names that it has in the archive.
    pub names: Vec<ImageReference>,
}

/// An archive as it is written.
pub type ArchiveStream = BoxStream<'static, io::Result<Bytes>>;

/// Blobs of an archive, by digest.
type Blobs = BTreeMap<Digest, Source>;

/// Files at the top of an archive.
type Documents = Vec<(&'static str, Vec<u8>)>;

enum Source {
    Bytes(Vec<u8>),
    /// A file of that many bytes.
    Content(u64),
}

impl ImageStore {
    /// Writes images into one archive. `hold` lives as long as the stream.
    pub async fn save(&self, images: Vec<Saved>, hold: Hold) -> Result<ArchiveStream, ImageError> {
        let inner = self.inner.clone();
        // What is not there is told before the first byte.
        let (blobs, documents) = self
            .blocking(move |inner| inner.plan_archive(&images))
            .await?;
        let (sender, receiver) = mpsc::channel(CHANNEL);
        tokio::task::spawn_blocking(move || {
            let _hold = hold;
            let mut out = io::BufWriter::with_capacity(PIECE, ChannelWrite(sender.clone()));
            let written = inner.write_archive(&mut out, &blobs, &documents);
            if let Err(error) = written.and_then(|()| out.flush())
                && error.kind() != io::ErrorKind::BrokenPipe
            {
                tracing::warn!(%error, "an archive of images ends early");
                // The client may be gone as well.
                drop(sender.blocking_send(Err(error)));
            }
        });
        let pieces = stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|piece| (piece, receiver))
        });
        Ok(pieces.boxed())
    }
}

impl Inner {
    fn plan_archive(&self, images: &[Saved]) -> Result<(Blobs, Documents), ImageError> {
        let mut blobs = Blobs::new();
        let (mut entries, mut list): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
        for saved in images {
            self.kept(&saved.content)?;
            let (manifest, bytes) = self.kept_manifest(&saved.content.manifest)?;
            let config = self.read_blob(&saved.content.id)?;
            let layers: Vec<String> = manifest
                .layers
                .iter()
                .map(|layer| format!("blobs/sha256/{}", layer.digest.hex()))
                .collect();
            for layer in &manifest.layers {
                let path = self.content_path(&layer.digest);
                let size = std::fs::metadata(&path)
                    .map_err(disk::failed("look at", &path))?
                    .len();
                blobs.insert(layer.digest.clone(), Source::Content(size));
            }
            let descriptor = |annotations: Option<Value>| {
                let mut entry = json!({
                    "mediaType": manifest.media_type,
                    "digest": saved.content.manifest,
                    "size": bytes.len(),
                    "platform": {"architecture": "amd64", "os": "linux"},
                });
                if let Some(annotations) = annotations {
                    entry["annotations"] = annotations;
                }
                entry
            };
            if saved.names.is_empty() {
                entries.push(descriptor(None));
            }
            for name in &saved.names {
                entries.push(descriptor(Some(json!({
                    "io.containerd.image.name": name.to_string(),
                    "org.opencontainers.image.ref.name": name.tag().unwrap_or_default(),
                }))));
            }
            let tags: BTreeSet<String> = saved
                .names
                .iter()
                .filter(|name| name.tag().is_some())
                .map(familiar)
                .collect();
            list.push(json!({
                "Config": format!("blobs/sha256/{}", saved.content.id.hex()),
                "RepoTags": if tags.is_empty() { Value::Null } else { json!(tags) },
                "Layers": layers,
            }));
            blobs.insert(saved.content.id.clone(), Source::Bytes(config));
            blobs.insert(saved.content.manifest.clone(), Source::Bytes(bytes));
        }
        let index = json!({
            "schemaVersion": 2, "mediaType": manifest::OCI_INDEX, "manifests": entries,
        });
        let documents = vec![
            ("index.json", index.to_string().into_bytes()),
            ("manifest.json", Value::Array(list).to_string().into_bytes()),
            (
                "oci-layout",
                json!({"imageLayoutVersion": "1.0.0"})
                    .to_string()
                    .into_bytes(),
            ),
        ];
        Ok((blobs, documents))
    }

    fn write_archive(
        &self,
        out: &mut impl Write,
        blobs: &Blobs,
        documents: &[(&str, Vec<u8>)],
    ) -> io::Result<()> {
        let mut tar = tar::Builder::new(out);
        for directory in ["blobs/", "blobs/sha256/"] {
            append(&mut tar, directory, 0, io::empty())?;
        }
        for (digest, source) in blobs {
            let name = format!("blobs/sha256/{}", digest.hex());
            match source {
                Source::Bytes(bytes) => append(&mut tar, &name, bytes.len() as u64, &bytes[..])?,
                Source::Content(size) => {
                    let file = File::open(self.content_path(digest))?;
                    append(&mut tar, &name, *size, file.take(*size))?;
                }
            }
        }
        for (name, bytes) in documents {
            append(&mut tar, name, bytes.len() as u64, &bytes[..])?;
        }
        tar.finish()
    }
}

/// One member: the same bytes whenever it is written.
fn append(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    size: u64,
    data: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    let directory = name.ends_with('/');
    header.set_entry_type(if directory {
        tar::EntryType::Directory
    } else {
        tar::EntryType::Regular
    });
    header.set_mode(if directory { 0o755 } else { 0o644 });
    header.set_size(size);
    tar.append_data(&mut header, name, data)
}

/// A name as users write it.
fn familiar(name: &ImageReference) -> String {
    let text = name.to_string();
    let short = text.strip_prefix("docker.io/").unwrap_or(&text);
    short.strip_prefix("library/").unwrap_or(short).to_owned()
}

struct ChannelWrite(mpsc::Sender<io::Result<Bytes>>);

impl Write for ChannelWrite {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0
            .blocking_send(Ok(Bytes::copy_from_slice(buffer)))
            .map_err(|_gone| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

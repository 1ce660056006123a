//! `hypernetes image`: the node's image store. It may be used beside a running daemon.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result};
use hypernetes_image::{
    Credentials, Image as StoredImage, ImageStore, PullEvent, PullOptions, RegistryConfig,
    StoreConfig,
};
use hypernetes_types::{Digest, ImageReference};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{admin, cli::Image, paths::Paths, terminal};

/// Runs one `image` verb.
pub(crate) async fn run(paths: &Paths, command: Image) -> Result<()> {
    match command {
        Image::Pull {
            reference,
            creds,
            insecure_registries,
            quiet,
        } => {
            let reference: ImageReference = reference.parse()?;
            let registry = RegistryConfig {
                insecure_registries,
                ..RegistryConfig::default()
            };
            let store = open(
                paths,
                StoreConfig {
                    registry,
                    ..StoreConfig::default()
                },
            )?;
            let bars = std::sync::Arc::new(Bars::new(quiet));
            let shown = bars.clone();
            let options = PullOptions {
                credentials: credentials(creds)?,
                progress: Some(Box::new(move |event| shown.show(event))),
                ..PullOptions::default()
            };
            let image = store.pull(&reference, &options).await;
            bars.finish();
            let image = image?;
            if !quiet {
                terminal::line(&format!("Digest: {}", image.manifest));
            }
            terminal::line(image.id.as_str());
        }
        Image::Load { input } => {
            for image in open(paths, StoreConfig::default())?.load(&input).await? {
                let name = image
                    .tags
                    .first()
                    .map_or_else(|| image.id.to_string(), ToString::to_string);
                terminal::line(&format!("Loaded image: {name}"));
            }
        }
        Image::Ls { quiet, json } => {
            let images = open(paths, StoreConfig::default())?.list().await?;
            list(&images, quiet, json)?;
        }
        Image::Rm { images } => {
            let store = open(paths, StoreConfig::default())?;
            let in_use = admin::images_in_use(&paths.admin_socket()).await?;
            for name in images {
                let removed = store.remove(&name, &in_use).await?;
                for reference in removed.untagged {
                    terminal::line(&format!("Untagged: {reference}"));
                }
                for digest in removed.deleted.iter().chain(&removed.layers) {
                    terminal::line(&format!("Deleted: {digest}"));
                }
            }
        }
        Image::Inspect { images } => {
            let store = open(paths, StoreConfig::default())?;
            let mut found = Vec::new();
            for name in images {
                let seen = store.inspect(&name).await?;
                let mut value = serde_json::to_value(seen.image)?;
                value["ociConfig"] = seen.config;
                value["ociManifest"] = seen.manifest;
                found.push(value);
            }
            terminal::line(&serde_json::to_string_pretty(&found)?);
        }
    }
    Ok(())
}

fn open(paths: &Paths, config: StoreConfig) -> Result<ImageStore> {
    ImageStore::open(paths.images(), config).context("cannot open the image store")
}

fn credentials(text: Option<String>) -> Result<Credentials> {
    let Some(text) = text else {
        return Ok(Credentials::Anonymous);
    };
    let (username, password) = text
        .split_once(':')
        .context("invalid --creds: must be user:password")?;
    Ok(Credentials::Basic {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

fn list(images: &[StoredImage], quiet: bool, json: bool) -> Result<()> {
    if json {
        terminal::line(&serde_json::to_string_pretty(images)?);
        return Ok(());
    }
    if quiet {
        images
            .iter()
            .for_each(|image| terminal::line(image.id.as_str()));
        return Ok(());
    }
    let short = |image: &StoredImage| image.id.hex()[..12].to_owned();
    let mut rows = Vec::new();
    for image in images {
        let size = terminal::human_bytes(image.size);
        if image.tags.is_empty() {
            let name = image
                .digests
                .first()
                .map_or("<none>".to_owned(), |reference| {
                    format!("{}/{}", reference.registry(), reference.repository())
                });
            rows.push(vec![name, "<none>".to_owned(), short(image), size.clone()]);
        }
        for tag in &image.tags {
            let name = format!("{}/{}", tag.registry(), tag.repository());
            let label = tag.tag().unwrap_or("<none>").to_owned();
            rows.push(vec![name, label, short(image), size.clone()]);
        }
    }
    terminal::table(&["REPOSITORY", "TAG", "IMAGE ID", "SIZE"], rows);
    Ok(())
}

/// Progress bars, one a layer, as docker shows them. Hidden when standard error is no terminal.
struct Bars {
    all: Option<MultiProgress>,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    fn new(quiet: bool) -> Self {
        Self {
            all: (!quiet).then(MultiProgress::new),
            layers: Mutex::default(),
        }
    }

    fn show(&self, event: PullEvent) {
        let Some(all) = &self.all else { return };
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            PullEvent::Resolved { layers: blobs, .. } => {
                let style = ProgressStyle::with_template(
                    "{prefix:12}: {msg:16} [{bar:30}] {bytes:>10}/{total_bytes:<10}",
                )
                .expect("the template is valid")
                .progress_chars("=> ");
                for (digest, size) in blobs {
                    let bar = all.add(ProgressBar::new(size));
                    bar.set_style(style.clone());
                    bar.set_prefix(digest.hex()[..12].to_owned());
                    bar.set_message("Pulling fs layer");
                    layers.insert(digest, bar);
                }
            }
            PullEvent::Progress { layer, bytes } => {
                if let Some(bar) = layers.get(&layer) {
                    bar.set_message("Downloading");
                    bar.set_position(bytes);
                }
            }
            PullEvent::LayerDone { layer, cached } => {
                if let Some(bar) = layers.get(&layer) {
                    bar.set_position(bar.length().unwrap_or(0));
                    bar.finish_with_message(if cached {
                        "Already exists"
                    } else {
                        "Pull complete"
                    });
                }
            }
        }
    }

    fn finish(&self) {
        for bar in self
            .layers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

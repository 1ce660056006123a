//! `hypernetes image`: the node's image store, through the daemon if one runs.

use std::{collections::HashMap, sync::Arc};

use anyhow::{Context, Result};
use hypernetes_image::{Image as StoredImage, ImageStore, PullEvent, StoreConfig};
use hypernetes_types::Digest;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use crate::{
    admin::{self, Backend, Event, Request},
    cli::Image,
    lock::StateLock,
    paths::Paths,
    terminal,
};

/// Runs one `image` verb.
pub(crate) async fn run(paths: &Paths, command: Image) -> Result<()> {
    match command {
        Image::Pull { reference, creds, insecure_registries, quiet } => {
            let request = Request::ImagePull {
                reference: reference.clone(),
                credentials: creds,
                insecure: insecure_registries,
            };
            let bars = Bars::new(quiet);
            let image: StoredImage = ask(paths, request, |event| bars.show(event)).await?;
            bars.finish();
            if !quiet {
                terminal::line(&format!("Digest: {}", image.manifest));
            }
            terminal::line(image.id.as_str());
            Ok(())
        }
        Image::Load { input } => {
            let path = std::path::absolute(&input)?;
            let images: Vec<StoredImage> = ask(paths, Request::ImageLoad { path }, |_| {}).await?;
            for image in images {
                let name = image.tags.first().map_or_else(|| image.id.to_string(), ToString::to_string);
                terminal::line(&format!("Loaded image: {name}"));
            }
            Ok(())
        }
        Image::Ls { quiet, json } => {
            let images: Vec<StoredImage> = ask(paths, Request::ImageList, |_| {}).await?;
            list(&images, quiet, json)
        }
        Image::Rm { images } => {
            let removed: Vec<Vec<String>> =
                ask(paths, Request::ImageRemove { images }, |_| {}).await?;
            for line in removed.into_iter().flatten() {
                terminal::line(&line);
            }
            Ok(())
        }
        Image::Inspect { images } => {
            let found: serde_json::Value =
                ask(paths, Request::ImageInspect { images }, |_| {}).await?;
            terminal::line(&serde_json::to_string_pretty(&found)?);
            Ok(())
        }
    }
}

/// Asks the daemon, or does it here under the state directory's lock.
async fn ask<T: serde::de::DeserializeOwned>(
    paths: &Paths,
    request: Request,
    mut progress: impl FnMut(PullEvent),
) -> Result<T> {
    if let Some(value) = admin::ask(&paths.admin_socket(), &request, &mut progress).await? {
        return Ok(serde_json::from_value(value)?);
    }
    let _lock = StateLock::take(paths)?;
    let images = ImageStore::open(paths.images(), StoreConfig::default())
        .context("cannot open the image store")?;
    let backend = Backend {
        images: Arc::new(images),
        store: None,
        in_use: Arc::new(Vec::new),
    };
    let (events, mut queue) = mpsc::unbounded_channel();
    let work = backend.handle(request, events);
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            Some(Event::Progress(event)) = queue.recv() => progress(event),
            result = &mut work => return Ok(serde_json::from_value(result?)?),
        }
    }
}

fn list(images: &[StoredImage], quiet: bool, json: bool) -> Result<()> {
    if json {
        terminal::line(&serde_json::to_string_pretty(images)?);
        return Ok(());
    }
    if quiet {
        images.iter().for_each(|image| terminal::line(image.id.as_str()));
        return Ok(());
    }
    let short = |image: &StoredImage| image.id.hex()[..12].to_owned();
    let mut rows = Vec::new();
    for image in images {
        let size = terminal::human_bytes(image.size);
        if image.tags.is_empty() {
            let name = image.digests.first().map_or("<none>".to_owned(), |reference| {
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
    layers: std::cell::RefCell<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    fn new(quiet: bool) -> Self {
        Self { all: (!quiet).then(MultiProgress::new), layers: std::cell::RefCell::default() }
    }

    fn show(&self, event: PullEvent) {
        let Some(all) = &self.all else { return };
        let mut layers = self.layers.borrow_mut();
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
                    bar.finish_with_message(if cached { "Already exists" } else { "Pull complete" });
                }
            }
        }
    }

    fn finish(&self) {
        for bar in self.layers.borrow().values() {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

//! Images of namespaces: their contents in this node's store, and who may use them.

use std::{collections::HashSet, str::FromStr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use hypernetes_apimachinery::kinds;
use hypernetes_image::{
    Content, ContentId, Credentials, Image, ImageError, ImageStore, KeepOptions, PullEvent,
    PullOptions, PushEvent, Saved,
};
use hypernetes_runtime::PodRuntime;
use hypernetes_streaming::{
    ArchiveBytes, ImageAllowance, ImageContent, ImageEvent, ImageEvents, ImageFailure, ImageFound,
    ImageHold, NodeImages,
};
use hypernetes_telemetry::chain;
use hypernetes_types::{Digest, ImageReference};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{Config, Event, watcher},
    },
};
use tokio_util::sync::CancellationToken;

use crate::pull::accounts;

/// How long it may take until what nobody names is dropped, besides when a name goes.
const SWEEP: Duration = Duration::from_secs(300);
/// Until the next try where something was in the way.
const SOON: Duration = Duration::from_secs(5);
/// Tags of a registry's repository.
const MAX_TAGS: usize = 10_000;

/// The store as the API server uses it.
#[derive(Debug)]
pub(crate) struct Contents(pub(crate) ImageStore);

fn failure(error: &ImageError) -> ImageFailure {
    let text = chain(error).to_string();
    match error {
        ImageError::NotFound(_) | ImageError::NoSuchImage { .. } => ImageFailure::NotFound(text),
        ImageError::Unauthorized { .. } => ImageFailure::Denied(text),
        ImageError::Unavailable { .. } | ImageError::PlainHttp { .. } => {
            ImageFailure::Unavailable(text)
        }
        ImageError::TooLarge { .. } => ImageFailure::TooLarge(text),
        ImageError::DigestMismatch { .. }
        | ImageError::NoPlatform { .. }
        | ImageError::Invalid { .. } => ImageFailure::Invalid(text),
        // Paths of this machine are not for tenants.
        _ => {
            tracing::warn!(error = %text, "the image store failed");
            ImageFailure::Internal("the node's image store failed".to_owned())
        }
    }
}

fn content_id(content: &ImageContent) -> Option<ContentId> {
    Some(ContentId {
        id: content.id.parse().ok()?,
        manifest: content.manifest.parse().ok()?,
    })
}

fn known(content: &ImageContent) -> Result<ContentId, ImageFailure> {
    content_id(content).ok_or_else(|| ImageFailure::NotFound(format!("image {}", content.id)))
}

fn reference(image: &str) -> Result<ImageReference, ImageFailure> {
    ImageReference::from_str(image).map_err(|error| ImageFailure::Invalid(error.to_string()))
}

fn keep(allowance: &ImageAllowance) -> KeepOptions {
    KeepOptions {
        known: allowance.known.iter().filter_map(content_id).collect(),
        limit: allowance.limit,
    }
}

fn found(content: Content) -> ImageFound {
    ImageFound {
        content: ImageContent {
            id: content.content.id.to_string(),
            manifest: content.content.manifest.to_string(),
        },
        names: content.names.iter().map(ToString::to_string).collect(),
        digest: content.digest.map(|digest| digest.to_string()),
        size: content.size,
        content_size: content.blobs,
        created: content.image.created,
        platform: content.platform,
    }
}

fn of_pull(event: PullEvent) -> ImageEvent {
    match event {
        PullEvent::Resolved { layers, .. } => ImageEvent::Resolved {
            layers: sizes(layers),
        },
        PullEvent::Progress { layer, bytes } => ImageEvent::Progress {
            layer: layer.to_string(),
            bytes,
        },
        PullEvent::LayerDone { layer, cached } => ImageEvent::LayerDone {
            layer: layer.to_string(),
            existed: cached,
        },
    }
}

fn of_push(event: PushEvent) -> ImageEvent {
    match event {
        PushEvent::Resolved { layers } => ImageEvent::Resolved {
            layers: sizes(layers),
        },
        PushEvent::Progress { layer, bytes } => ImageEvent::Progress {
            layer: layer.to_string(),
            bytes,
        },
        PushEvent::LayerDone { layer, existed } => ImageEvent::LayerDone {
            layer: layer.to_string(),
            existed,
        },
    }
}

fn sizes(layers: Vec<(Digest, u64)>) -> Vec<(String, u64)> {
    let texts = layers.into_iter();
    texts
        .map(|(digest, size)| (digest.to_string(), size))
        .collect()
}

/// The accounts of these documents for an image, or nobody's.
fn accounts_for(documents: &[Bytes], reference: &ImageReference) -> Vec<Credentials> {
    let all = documents.iter();
    let found: Vec<_> = all
        .flat_map(|document| accounts(document, false, reference))
        .collect();
    if found.is_empty() {
        vec![Credentials::Anonymous]
    } else {
        found
    }
}

/// Tries each account until one is taken, or the failure is not about accounts.
async fn with_accounts<T, Fut>(
    accounts: Vec<Credentials>,
    attempt: impl Fn(Credentials) -> Fut,
) -> Result<T, ImageFailure>
where
    Fut: Future<Output = Result<T, ImageError>>,
{
    let mut last = None;
    for account in accounts {
        match attempt(account).await {
            Ok(value) => return Ok(value),
            Err(error @ (ImageError::Unauthorized { .. } | ImageError::NoSuchImage { .. })) => {
                last = Some(error);
            }
            Err(error) => return Err(failure(&error)),
        }
    }
    Err(last.map_or_else(
        || ImageFailure::Internal("there was no account to try".to_owned()),
        |error| failure(&error),
    ))
}

#[async_trait]
impl NodeImages for Contents {
    async fn hold(&self) -> Result<ImageHold, ImageFailure> {
        match self.0.hold().await {
            Ok(hold) => Ok(Box::new(hold)),
            Err(error) => Err(failure(&error)),
        }
    }

    async fn has(&self, content: &ImageContent) -> bool {
        match content_id(content) {
            Some(content) => self.0.content(&content).await.is_ok(),
            None => false,
        }
    }

    async fn pull(
        &self,
        image: &str,
        documents: Vec<Bytes>,
        allowance: ImageAllowance,
        events: ImageEvents,
    ) -> Result<ImageFound, ImageFailure> {
        let reference = reference(image)?;
        let keep = keep(&allowance);
        let content = with_accounts(accounts_for(&documents, &reference), |credentials| {
            let events = events.clone();
            let options = PullOptions {
                credentials,
                progress: Some(Box::new(move |event| {
                    // Whoever listened is gone, and with it this pull.
                    let _gone = events.send(of_pull(event)).is_err();
                })),
                ..PullOptions::default()
            };
            let (reference, keep) = (&reference, &keep);
            async move { self.0.pull_content(reference, &options, keep).await }
        })
        .await?;
        Ok(found(content))
    }

    async fn push(
        &self,
        content: &ImageContent,
        target: &str,
        documents: Vec<Bytes>,
        events: ImageEvents,
    ) -> Result<(String, u64), ImageFailure> {
        let (target, content) = (reference(target)?, known(content)?);
        let (digest, size) = with_accounts(accounts_for(&documents, &target), |credentials| {
            let events = events.clone();
            let (target, content) = (&target, &content);
            async move {
                let tell = Arc::new(move |event| {
                    let _gone = events.send(of_push(event)).is_err();
                });
                self.0.push(content, target, &credentials, tell).await
            }
        })
        .await?;
        Ok((digest.to_string(), size))
    }

    async fn load(
        &self,
        archive: ArchiveBytes,
        allowance: ImageAllowance,
    ) -> Result<Vec<ImageFound>, ImageFailure> {
        let contents = self
            .0
            .load_content(archive, &keep(&allowance))
            .await
            .map_err(|error| failure(&error))?;
        Ok(contents.into_iter().map(found).collect())
    }

    async fn save(
        &self,
        images: Vec<(ImageContent, Vec<String>)>,
    ) -> Result<ArchiveBytes, ImageFailure> {
        let hold = self.0.hold().await.map_err(|error| failure(&error))?;
        let mut saved = Vec::new();
        for (content, names) in &images {
            saved.push(Saved {
                content: known(content)?,
                names: names.iter().filter_map(|name| name.parse().ok()).collect(),
            });
        }
        let archive = self.0.save(saved, hold).await;
        archive.map_err(|error| failure(&error))
    }

    async fn documents(&self, content: &ImageContent) -> Result<(String, String), ImageFailure> {
        let documents = self.0.documents(&known(content)?).await;
        let (manifest, config) = documents.map_err(|error| failure(&error))?;
        Ok((manifest.to_string(), config.to_string()))
    }

    async fn tags(&self, image: &str, documents: Vec<Bytes>) -> Result<Vec<String>, ImageFailure> {
        let reference = reference(image)?;
        with_accounts(accounts_for(&documents, &reference), |credentials| {
            let reference = &reference;
            async move { self.0.tags(reference, &credentials, MAX_TAGS).await }
        })
        .await
    }
}

fn resource() -> ApiResource {
    ApiResource {
        group: kinds::images::GROUP.to_owned(),
        version: "v1alpha1".to_owned(),
        api_version: format!("{}/v1alpha1", kinds::images::GROUP),
        kind: "Image".to_owned(),
        plural: "images".to_owned(),
    }
}

fn content_of(object: &DynamicObject) -> Option<ContentId> {
    let digest = |field: &str| object.data["status"][field].as_str()?.parse().ok();
    Some(ContentId {
        id: digest("id")?,
        manifest: digest("manifest")?,
    })
}

/// The namespace's own image of that name, if it has one.
pub(crate) async fn own(
    client: &Client,
    store: &ImageStore,
    namespace: &str,
    reference: &ImageReference,
) -> Option<Image> {
    let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, &resource());
    let object = match api.get_opt(&reference.object_name()).await {
        Ok(object) => object?,
        Err(error) => {
            tracing::warn!(error = %chain(&error), "cannot look a namespace's image up");
            return None;
        }
    };
    if object.data["spec"]["name"] != reference.to_string() {
        return None;
    }
    match store.content(&content_of(&object)?).await {
        Ok(image) => Some(image),
        Err(error) => {
            let name = object.metadata.name.unwrap_or_default();
            tracing::warn!(namespace, name, error = %chain(&error), "an Image has lost its content");
            None
        }
    }
}

/// Drops contents that no Image names and no container uses, until `stop`.
pub(crate) async fn run(
    client: Client,
    store: ImageStore,
    runtime: Arc<dyn PodRuntime>,
    stop: CancellationToken,
) {
    let api = Api::<DynamicObject>::all_with(client, &resource());
    let mut changes = watcher(api.clone(), Config::default())
        .default_backoff()
        .boxed();
    let mut pause = Duration::ZERO;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {
                pause = match sweep(&api, &store, &*runtime).await {
                    Ok(true) => SWEEP,
                    Ok(false) => SOON,
                    Err(error) => {
                        tracing::warn!(%error, "cannot drop images that nobody names");
                        SOON
                    }
                };
            }
            Some(event) = changes.next() => {
                // A name that was moved leaves content behind as well as one that is gone.
                if matches!(event, Ok(Event::Delete(_) | Event::Apply(_))) {
                    pause = Duration::from_millis(200).min(pause);
                }
            }
        }
    }
}

/// One sweep; `false` if it has to be done again soon.
async fn sweep(
    api: &Api<DynamicObject>,
    store: &ImageStore,
    runtime: &dyn PodRuntime,
) -> Result<bool, String> {
    let Some(quiet) = store.quiet().await.map_err(|e| chain(&e).to_string())? else {
        return Ok(false);
    };
    // From here on no content gets a name that the list does not have.
    let objects = api
        .list(&ListParams::default())
        .await
        .map_err(|e| chain(&e).to_string())?;
    let named: HashSet<ContentId> = objects.iter().filter_map(content_of).collect();
    let mut in_use = HashSet::new();
    for container in runtime.list_containers(None).await {
        in_use.extend(container.image_id.parse::<Digest>());
        for mount in &container.config.mounts {
            in_use.extend(mount.image.parse::<Digest>());
        }
    }
    for snapshot in runtime.list_snapshots().await {
        let ids = snapshot.image_ids.iter();
        in_use.extend(ids.flat_map(|id| id.parse::<Digest>()));
    }
    let (gone, waiting) = quiet
        .release(named, in_use)
        .await
        .map_err(|e| chain(&e).to_string())?;
    if gone > 0 {
        tracing::info!(gone, waiting, "dropped images that nobody names");
    }
    Ok(waiting == 0)
}

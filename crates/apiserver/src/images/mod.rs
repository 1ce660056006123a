//! Images of a namespace (`images.hypernetes.io`).
//!
//! The objects are names; the node keeps the contents ([`NodeImages`]). An object is only ever made by
//! what shows that the namespace has the content: a pull that the registry has allowed, an archive with
//! all of it, or another name of the namespace's own. While content is without a name, a hold of the
//! node's keeps it.
//!
//! `-` stands for no object in particular in `images/-/archive` and `images/-/tags`.

mod names;
mod wire;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::StreamExt as _;
use http::Response;
use http_body_util::BodyStream;
use hypernetes_apimachinery::{ResourceKind, Status, kinds, meta};
use hypernetes_streaming::{ImageAllowance, ImageContent, NodeImages};
use hypernetes_types::ImageReference;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    body::{self, ApiBody},
    engine::{Call, not_found},
    rbac::Action,
    server::Inner,
    service::Slot,
    status::Result,
};
use wire::{Work, of_failure};

/// Pulls, pushes and loads of one namespace at a time; more wait.
const AT_ONCE: usize = 4;
/// Secrets that a request may name.
const MAX_SECRETS: usize = 16;
/// Images of one archive.
const MAX_SAVED: usize = 100;
/// Tags that are asked for.
const MAX_TAGS: usize = 10_000;
/// An image or none.
const NONE: &str = "-";

/// Whether the kind is that of images.
pub(crate) fn is_image(kind: &ResourceKind) -> bool {
    kind.group == kinds::images::GROUP
}

/// Who has a turn.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Weak<Semaphore>>>);

impl Turns {
    async fn take(&self, namespace: &str) -> Option<(Arc<Semaphore>, OwnedSemaphorePermit)> {
        let semaphore = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, turn| turn.strong_count() > 0);
            let found = all.get(namespace).and_then(Weak::upgrade);
            let semaphore = found.unwrap_or_else(|| Arc::new(Semaphore::new(AT_ONCE)));
            all.insert(namespace.to_owned(), Arc::downgrade(&semaphore));
            semaphore
        };
        let permit = semaphore.clone().acquire_owned().await.ok()?;
        Some((semaphore, permit))
    }
}

/// Body of `pull`, `push` and `tag`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Asked {
    /// `ImagePullOptions` and the like; not looked at.
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    #[serde(rename = "kind")]
    _kind: Option<String>,
    /// Name of the image; for `push` the image's own if it is empty.
    image: String,
    /// Secrets with accounts for the registry.
    secrets: Vec<String>,
}

/// One request for a subresource of images.
pub(crate) struct Images<'a> {
    pub(crate) inner: &'a Arc<Inner>,
    pub(crate) call: &'a Call,
}

impl Images<'_> {
    /// Serves the subresource.
    pub(crate) async fn serve(&self, body: ApiBody, slot: Slot) -> Result<Response<ApiBody>> {
        let node = self
            .inner
            .images
            .clone()
            .ok_or_else(|| Status::unavailable("this API server has no node to keep images"))?;
        let (verb, info) = (self.call.info.verb, &self.call.info);
        match (info.subresource.as_str(), verb) {
            ("pull", _) => self.pull(node, &body::read(body).await?, slot),
            ("push", _) => self.push(node, &body::read(body).await?, slot),
            ("tag", _) => self.tag(&*node, &body::read(body).await?).await,
            ("archive", "create") => self.load(&*node, body, slot).await,
            ("archive", _) => self.save(&*node, slot).await,
            ("config", _) => self.config(&*node).await,
            ("tags", _) => self.tags(&*node).await,
            _ => Err(Status::method_not_allowed()),
        }
    }

    fn asked(&self, bytes: &Bytes) -> Result<Asked> {
        if bytes.is_empty() {
            return Ok(Asked::default());
        }
        serde_json::from_slice(bytes)
            .map_err(|error| Status::bad_request(format!("the body is not understood: {error}")))
    }

    /// The image that is asked for; the path must be its object's.
    fn named(&self, image: &str) -> Result<ImageReference> {
        let reference = reference_of(image)?;
        let name = reference.object_name();
        if self.call.info.name != name {
            return Err(Status::bad_request(format!(
                "metadata.name: the Image of {reference} is called {name:?}"
            )));
        }
        Ok(reference)
    }

    fn object(&self) -> Result<Value> {
        let info = &self.call.info;
        self.inner
            .engine
            .find(self.call.kind, &info.namespace, &info.name)
            .map(|(_, object)| object)
    }

    /// Accounts of the secrets that a request names. Those that are not there are passed over, as for
    /// pods.
    fn accounts<'s>(&self, secrets: impl Iterator<Item = &'s str>) -> Result<Vec<Bytes>> {
        let kind = kinds::by_resource("", "v1", "secrets").ok_or_else(Status::no_resource)?;
        let mut found = Vec::new();
        for (count, name) in secrets.enumerate() {
            if count == MAX_SECRETS {
                return Err(Status::bad_request(format!(
                    "secrets: must have at most {MAX_SECRETS} items"
                )));
            }
            if name.is_empty() || name.contains('/') {
                return Err(Status::bad_request(format!(
                    "secrets: invalid name {name:?}"
                )));
            }
            let namespace = &self.call.info.namespace;
            let Ok((_, secret)) = self.inner.engine.find(kind, namespace, name) else {
                continue;
            };
            let data = |key: &str| {
                let text = secret["data"][key].as_str()?;
                STANDARD.decode(text).ok()
            };
            if let Some(document) = data(".dockerconfigjson") {
                found.push(document.into());
            } else if let Some(document) = data(".dockercfg") {
                let auths: Value = serde_json::from_slice(&document).unwrap_or_default();
                found.push(json!({"auths": auths}).to_string().into());
            }
        }
        Ok(found)
    }

    /// What the namespace has, and how much more it may.
    fn allowance(&self) -> Result<ImageAllowance> {
        let known = self.inner.contents_of(&self.call.info.namespace)?;
        let used = known
            .values()
            .fold(0_u64, |sum, size| sum.saturating_add(*size));
        let limit = self.inner.engine.limits.image_bytes;
        Ok(ImageAllowance {
            known: known.into_keys().collect(),
            limit: limit.saturating_sub(used),
        })
    }

    fn pull(
        &self,
        node: Arc<dyn NodeImages>,
        bytes: &Bytes,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        let asked = self.asked(bytes)?;
        let reference = self.named(&asked.image)?;
        let accounts = self.accounts(asked.secrets.iter().map(String::as_str))?;
        let name = reference.to_string();
        Ok(self.work(slot, move |work: Work| async move {
            let images = work.images();
            let allowance = images.allowance()?;
            let _hold = node.hold().await.map_err(|error| of_failure(&error))?;
            let found = node
                .pull(&name, accounts, allowance, work.events.clone())
                .await
                .map_err(|error| of_failure(&error))?;
            let named = work
                .inner
                .name(&work.call, Some(&reference), &found)
                .await?;
            Ok(vec![
                json!({"type": "DONE", "changed": named.changed, "object": named.object}),
            ])
        }))
    }

    fn push(
        &self,
        node: Arc<dyn NodeImages>,
        bytes: &Bytes,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        let asked = self.asked(bytes)?;
        let object = self.object()?;
        let own = object["spec"]["name"].as_str().unwrap_or_default();
        let target = match (asked.image.as_str(), own) {
            ("", "") => {
                return Err(Status::bad_request(
                    "image: required: the image has no name",
                ));
            }
            ("", own) => reference_of(own)?,
            (given, _) => reference_of(given)?,
        };
        let accounts = self.accounts(asked.secrets.iter().map(String::as_str))?;
        let content = content_of(&object)?;
        Ok(self.work(slot, move |work: Work| async move {
            let _hold = node.hold().await.map_err(|error| of_failure(&error))?;
            let (digest, size) = node
                .push(&content, &target.to_string(), accounts, work.events.clone())
                .await
                .map_err(|error| of_failure(&error))?;
            work.inner
                .pushed(&work.call, &target, &content, &digest)
                .await?;
            Ok(vec![
                json!({"type": "DONE", "digest": digest, "size": size}),
            ])
        }))
    }

    async fn tag(&self, node: &dyn NodeImages, bytes: &Bytes) -> Result<Response<ApiBody>> {
        let reference = reference_of(&self.asked(bytes)?.image)?;
        if reference.digest().is_some() {
            return Err(Status::bad_request(
                "image: a name with a digest cannot be given",
            ));
        }
        // From here on nothing is dropped: the source is looked up anew.
        let _hold = node.hold().await.map_err(|error| of_failure(&error))?;
        let source = self.object()?;
        let content = content_of(&source)?;
        if !node.has(&content).await {
            return Err(Status::not_found("", "image content", &content.id));
        }
        let named = self
            .inner
            .copy(self.call, &reference, &source["status"])
            .await?;
        Ok(body::json_value(201, &named.object))
    }

    /// The answer begins when the archive has been read: not every client listens before.
    async fn load(
        &self,
        node: &dyn NodeImages,
        body: ApiBody,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        if self.call.info.name != NONE {
            return Err(Status::bad_request(format!(
                "an archive has the names of its images in it: send it to images/{NONE}/archive"
            )));
        }
        let _open = slot;
        let archive = BodyStream::new(body)
            .filter_map(|frame| async {
                match frame {
                    Ok(frame) => frame.into_data().ok().map(Ok),
                    Err(error) => Some(Err(std::io::Error::other(error))),
                }
            })
            .boxed();
        let _turn = self.inner.turns.take(&self.call.info.namespace).await;
        let allowance = self.allowance()?;
        let _hold = node.hold().await.map_err(|error| of_failure(&error))?;
        let found = node
            .load(archive, allowance)
            .await
            .map_err(|error| of_failure(&error))?;
        let mut lines = String::new();
        for image in &found {
            let names = image.names.iter().filter_map(|name| name.parse().ok());
            let names: Vec<ImageReference> = names.collect();
            let mut named = Vec::new();
            if names.is_empty() {
                named.push(self.inner.name(self.call, None, image).await?);
            }
            for name in names {
                named.push(self.inner.name(self.call, Some(&name), image).await?);
            }
            for one in named {
                let line = json!({"type": "DONE", "changed": one.changed, "object": one.object});
                lines.push_str(&line.to_string());
                lines.push('\n');
            }
        }
        Ok(body::json(200, lines))
    }

    async fn save(&self, node: &dyn NodeImages, slot: Slot) -> Result<Response<ApiBody>> {
        let (query, info) = (&self.call.query, &self.call.info);
        let mut objects: Vec<(&str, bool)> = query.all("image").map(|name| (name, true)).collect();
        objects.extend(query.all("untagged").map(|name| (name, false)));
        if info.name != NONE {
            objects.push((&info.name, true));
        }
        if objects.is_empty() || objects.len() > MAX_SAVED {
            return Err(Status::bad_request(format!(
                "image: 1 to {MAX_SAVED} images are saved at a time"
            )));
        }
        let mut images: Vec<(ImageContent, Vec<String>)> = Vec::new();
        for (name, tagged) in objects {
            let action = Action {
                name,
                ..Action::of(info)
            };
            self.inner
                .engine
                .authorizer
                .check(&self.call.user, &action)?;
            if name.is_empty() || name.contains('/') {
                return Err(not_found(self.call.kind, name));
            }
            let (_, object) = self
                .inner
                .engine
                .find(self.call.kind, &info.namespace, name)?;
            let content = content_of(&object)?;
            let own = object["spec"]["name"]
                .as_str()
                .filter(|own| tagged && !own.is_empty());
            match images.iter_mut().find(|(known, _)| *known == content) {
                Some((_, names)) => names.extend(own.map(str::to_owned)),
                None => images.push((content, own.map(str::to_owned).into_iter().collect())),
            }
        }
        let archive = node
            .save(images)
            .await
            .map_err(|error| of_failure(&error))?;
        let shutdown = self.inner.engine.shutdown.clone();
        Ok(body::stream("application/x-tar", archive, shutdown, slot))
    }

    async fn config(&self, node: &dyn NodeImages) -> Result<Response<ApiBody>> {
        let content = content_of(&self.object()?)?;
        let (manifest, config) = node
            .documents(&content)
            .await
            .map_err(|error| of_failure(&error))?;
        let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
        Ok(body::json_value(
            200,
            &json!({"manifest": parse(&manifest), "config": parse(&config)}),
        ))
    }

    async fn tags(&self, node: &dyn NodeImages) -> Result<Response<ApiBody>> {
        if self.call.info.name != NONE {
            return Err(Status::bad_request(format!(
                "a registry's tags are at images/{NONE}/tags?image=REPOSITORY"
            )));
        }
        let query = &self.call.query;
        let reference = reference_of(query.get("image").unwrap_or_default())?;
        let accounts = self.accounts(query.all("secrets"))?;
        let mut tags = node
            .tags(&reference.to_string(), accounts)
            .await
            .map_err(|error| of_failure(&error))?;
        tags.truncate(MAX_TAGS);
        let name = format!("{}/{}", reference.registry(), reference.repository());
        Ok(body::json_value(200, &json!({"name": name, "tags": tags})))
    }
}

fn reference_of(image: &str) -> Result<ImageReference> {
    image
        .parse()
        .map_err(|error| Status::bad_request(format!("image: {error}")))
}

/// What an object is about.
fn content_of(object: &Value) -> Result<ImageContent> {
    let text = |field: &str| object["status"][field].as_str().map(str::to_owned);
    match (text("id"), text("manifest")) {
        (Some(id), Some(manifest)) => Ok(ImageContent { id, manifest }),
        _ => {
            let name = meta::name(object).unwrap_or_default();
            Err(Status::internal(&format!("image {name:?} has no content")))
        }
    }
}

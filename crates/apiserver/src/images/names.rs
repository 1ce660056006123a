//! Giving names: the writes of Image objects.

use std::collections::BTreeMap;

use hypernetes_apimachinery::{Status, kinds, meta};
use hypernetes_streaming::{ImageContent, ImageFound};
use hypernetes_types::ImageReference;
use serde_json::{Value, json};

use super::content_of;
use crate::{
    codec,
    engine::{Call, DeleteOptions},
    keys,
    server::Inner,
    status::{self, Result},
};

const ATTEMPTS: usize = 16;

/// A name that points where it was asked to.
pub(super) struct Named {
    pub(super) object: Value,
    /// It did not before.
    pub(super) changed: bool,
}

impl Inner {
    /// A namespace's images.
    pub(super) fn images_of(&self, namespace: &str) -> Result<Vec<Value>> {
        let kind = kinds::by_resource(kinds::images::GROUP, "v1alpha1", "images")
            .ok_or_else(Status::no_resource)?;
        let page = self
            .engine
            .store
            .list(&keys::prefix(kind, namespace), None, None, None)
            .map_err(|error| status::of_store(&error))?;
        let entries = page.entries.iter();
        Ok(entries.map(|entry| codec::decode(&entry.value)).collect())
    }

    /// A namespace's contents with the bytes that each counts.
    pub(super) fn contents_of(&self, namespace: &str) -> Result<BTreeMap<ImageContent, u64>> {
        let mut found = BTreeMap::new();
        for object in self.images_of(namespace)? {
            if let Ok(content) = content_of(&object) {
                found.insert(content, counted(&object["status"]));
            }
        }
        Ok(found)
    }

    /// Gives content a name, or keeps it without one.
    pub(super) async fn name(
        &self,
        call: &Call,
        name: Option<&ImageReference>,
        found: &ImageFound,
    ) -> Result<Named> {
        let mut status = json!({
            "id": found.content.id,
            "manifest": found.content.manifest,
            "size": found.size,
            "contentSize": found.content_size,
            "platform": found.platform,
        });
        if let Some(created) = &found.created {
            status["created"] = created.as_str().into();
        }
        if let Some(digest) = &found.digest {
            status["digest"] = digest.as_str().into();
        }
        let known = self.contents_of(&call.info.namespace)?;
        if !known.contains_key(&found.content) {
            let used = known
                .values()
                .fold(0_u64, |sum, size| sum.saturating_add(*size));
            let limit = self.engine.limits.image_bytes;
            if used.saturating_add(counted(&status)) > limit {
                return Err(Status::failure(
                    403,
                    "Forbidden",
                    format!(
                        "the images of namespace {:?} may have {limit} bytes together: remove some \
                         first",
                        call.info.namespace
                    ),
                ));
            }
        }
        match name {
            Some(name) => self.point(call, name, &status).await,
            None => {
                let images = self.images_of(&call.info.namespace)?;
                let same = |image: &Value| content_of(image).is_ok_and(|c| c == found.content);
                match images.into_iter().find(same) {
                    Some(object) => Ok(Named {
                        object,
                        changed: false,
                    }),
                    None => self.nameless(call, &status).await,
                }
            }
        }
    }

    /// Another name for content of the namespace.
    pub(super) async fn copy(
        &self,
        call: &Call,
        name: &ImageReference,
        status: &Value,
    ) -> Result<Named> {
        let mut status = status.clone();
        // The registry knows it by this digest under its old name alone.
        if let Some(fields) = status.as_object_mut() {
            fields.remove("digest");
        }
        self.point(call, name, &status).await
    }

    /// Makes a name point to content; what it pointed to before stays without a name.
    async fn point(&self, call: &Call, name: &ImageReference, status: &Value) -> Result<Named> {
        let namespace = call.info.namespace.as_str();
        let (object_name, full) = (name.object_name(), name.to_string());
        let mut attempts = 0;
        loop {
            attempts += 1;
            let object = match self.engine.find(call.kind, namespace, &object_name) {
                Ok((entry, mut object)) => {
                    if object["spec"]["name"] != full {
                        let other = object["spec"]["name"].as_str().unwrap_or_default();
                        return Err(Status::conflict(
                            call.kind.group,
                            call.kind.plural,
                            &object_name,
                            &format!("image {other} has the object of that name"),
                        ));
                    }
                    let same = content_of(&object)? == content_of(&json!({"status": status}))?;
                    let digest_known = status["digest"].is_null()
                        || object["status"]["digest"] == status["digest"];
                    if same && digest_known {
                        return Ok(Named {
                            object,
                            changed: false,
                        });
                    }
                    if !same {
                        self.leave(call, &object_name, &object["status"]).await?;
                    }
                    object["status"] = status.clone();
                    let written = self.engine.overwrite(call, &entry, &object, false).await?;
                    written.then_some((object, !same))
                }
                Err(missing) if missing.code == 404 => {
                    let object = json!({
                        "apiVersion": call.kind.api_version(), "kind": call.kind.kind,
                        "metadata": {"name": object_name},
                        "spec": {"name": full},
                        "status": status,
                    });
                    match self.engine.create_object(call, object).await {
                        Ok(written) => Some((written.object, true)),
                        Err(error) if error.reason == "AlreadyExists" => None,
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            };
            if let Some((object, changed)) = object {
                self.drop_nameless(call, status).await?;
                return Ok(Named { object, changed });
            }
            if attempts == ATTEMPTS {
                return Err(Status::modified(
                    call.kind.group,
                    call.kind.plural,
                    &object_name,
                ));
            }
        }
    }

    /// Before a name is taken from content: it gets the object without a name if that was the last.
    async fn leave(&self, call: &Call, object_name: &str, status: &Value) -> Result<()> {
        let others = self.images_of(&call.info.namespace)?;
        let elsewhere = others.iter().any(|other| {
            meta::name(other) != Some(object_name) && other["status"]["id"] == status["id"]
        });
        if !elsewhere {
            self.nameless(call, status).await?;
        }
        Ok(())
    }

    /// The object of content without a name.
    async fn nameless(&self, call: &Call, status: &Value) -> Result<Named> {
        let object_name = nameless_name(status);
        let object = json!({
            "apiVersion": call.kind.api_version(), "kind": call.kind.kind,
            "metadata": {"name": object_name},
            "spec": {"name": ""},
            "status": status,
        });
        match self.engine.create_object(call, object).await {
            Ok(written) => Ok(Named {
                object: written.object,
                changed: true,
            }),
            Err(error) if error.reason == "AlreadyExists" => {
                let (_, object) =
                    self.engine
                        .find(call.kind, &call.info.namespace, &object_name)?;
                Ok(Named {
                    object,
                    changed: false,
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Content that has got a name needs no object without one.
    async fn drop_nameless(&self, call: &Call, status: &Value) -> Result<()> {
        let name = nameless_name(status);
        let options = DeleteOptions::default();
        match self
            .engine
            .delete_object(call, &call.info.namespace, &name, &options)
            .await
        {
            Ok(_) => Ok(()),
            Err(error) if error.code == 404 => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Notes the digest by which a registry has got an image, if its name is one of the namespace's.
    pub(super) async fn pushed(
        &self,
        call: &Call,
        target: &ImageReference,
        content: &ImageContent,
        digest: &str,
    ) -> Result<()> {
        let name = target.object_name();
        for _ in 0..ATTEMPTS {
            let Ok((entry, mut object)) = self.engine.find(call.kind, &call.info.namespace, &name)
            else {
                return Ok(());
            };
            if content_of(&object)? != *content
                || object["spec"]["name"] != target.to_string()
                || object["status"]["digest"] == digest
            {
                return Ok(());
            }
            object["status"]["digest"] = digest.into();
            if self.engine.overwrite(call, &entry, &object, false).await? {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What an image counts against the bound of its namespace.
fn counted(status: &Value) -> u64 {
    let number = |field: &str| status[field].as_u64().unwrap_or_default();
    number("size").saturating_add(number("contentSize"))
}

/// Name of the object of content without a name.
fn nameless_name(status: &Value) -> String {
    let id = status["id"].as_str().unwrap_or_default();
    id.replace(':', "-")
}

//! The image service.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use hypernetes_image::{Credentials, Image, ImageError};
use hypernetes_runtime::{FilesystemUsage, RuntimeError};
use hypernetes_types::ImageReference;
use serde_json::json;
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{
    lookup::shown,
    pages::pages,
    service::{Service, now_nanos},
    status::CriError,
    v1::{self, image_service_server::ImageService},
};

/// The name in a request, which must be there.
fn named(image: Option<&v1::ImageSpec>) -> Result<&str, CriError> {
    image
        .map(|image| image.image.as_str())
        .filter(|name| !name.is_empty())
        .ok_or_else(|| CriError::invalid("image.image", "must be given"))
}

/// An image as the API has it.
fn image(image: &Image) -> v1::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<i64>().ok();
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.tags.iter().map(ToString::to_string).collect(),
        repo_digests: image.digests.iter().map(ToString::to_string).collect(),
        size: image.size,
        uid: uid.map(|value| v1::Int64Value { value }),
        username: match uid {
            Some(_) => String::new(),
            None => user.to_owned(),
        },
        spec: None,
        pinned: false,
    }
}

fn info(image: &Image) -> BTreeMap<String, String> {
    let info = json!({
        "manifest": image.manifest.to_string(),
        "architecture": image.architecture,
        "created": image.created,
        "layers": image.layers.iter().map(|layer| layer.diff_id.to_string()).collect::<Vec<_>>(),
        "imageSpec": { "config": {
            "User": image.config.user,
            "Env": image.config.env,
            "Entrypoint": image.config.entrypoint,
            "Cmd": image.config.cmd,
            "WorkingDir": image.config.working_dir,
            "Labels": image.config.labels,
        } },
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

/// An account for a registry, by whichever fields carry it.
fn credentials(auth: Option<&v1::AuthConfig>) -> Result<Credentials, CriError> {
    let Some(auth) = auth else {
        return Ok(Credentials::Anonymous);
    };
    if !auth.identity_token.is_empty() {
        let rule = "identity tokens are not served by this node: a user or a registry token";
        return Err(CriError::invalid("auth.identity_token", rule));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Credentials::Bearer(auth.registry_token.clone()));
    }
    if !auth.username.is_empty() || !auth.password.is_empty() {
        return Ok(Credentials::Basic {
            username: auth.username.clone(),
            password: auth.password.clone(),
        });
    }
    if auth.auth.is_empty() {
        return Ok(Credentials::Anonymous);
    }
    // As Docker's configuration files have it. The value itself is a secret.
    let wrong = || CriError::invalid("auth.auth", "must be user:password in base64");
    let text = STANDARD.decode(&auth.auth).map_err(|_wrong| wrong())?;
    let text = String::from_utf8(text).map_err(|_wrong| wrong())?;
    let (username, password) = text.split_once(':').ok_or_else(wrong)?;
    Ok(Credentials::Basic {
        username: username.to_owned(),
        password: password.trim_end_matches('\0').to_owned(),
    })
}

fn filesystem(usage: &FilesystemUsage) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: now_nanos(),
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: usage.path.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(v1::UInt64Value {
            value: usage.used_bytes,
        }),
        inodes_used: Some(v1::UInt64Value { value: usage.files }),
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let filter = request.into_inner().filter.and_then(|filter| filter.image);
        let name = filter.map(|image| image.image).unwrap_or_default();
        let images = if name.is_empty() {
            self.runtime().list_images().await.map_err(CriError::from)?
        } else {
            self.runtime().image(&name).await.into_iter().collect()
        };
        Ok(Response::new(v1::ListImagesResponse {
            images: images.iter().map(image).collect(),
        }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let found = self.runtime().image(named(request.image.as_ref())?).await;
        let info = match (&found, request.verbose) {
            (Some(found), true) => info(found),
            _ => BTreeMap::new(),
        };
        Ok(Response::new(v1::ImageStatusResponse {
            image: found.as_ref().map(image),
            info,
        }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let request = request.into_inner();
        let name = named(request.image.as_ref())?;
        let reference: ImageReference = name.parse().map_err(|_wrong| {
            CriError::invalid("image.image", format!("{:?} is no reference", shown(name)))
        })?;
        let credentials = credentials(request.auth.as_ref())?;
        let pulled = self
            .runtime()
            .pull_image(&reference, credentials, None)
            .await
            .map_err(CriError::from)?;
        tracing::info!(image = %reference, id = %pulled.id, "an image was pulled");
        Ok(Response::new(v1::PullImageResponse {
            image_ref: pulled.id.to_string(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let request = request.into_inner();
        match self
            .runtime()
            .remove_image(named(request.image.as_ref())?)
            .await
        {
            Ok(()) | Err(RuntimeError::Image(ImageError::NotFound(_))) => {
                Ok(Response::new(v1::RemoveImageResponse {}))
            }
            Err(error) => Err(CriError::from(error).into()),
        }
    }

    async fn image_fs_info(
        &self,
        _: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        let usage = self.runtime().disk_usage().await.map_err(CriError::from)?;
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![filesystem(&usage.images)],
            container_filesystems: vec![filesystem(&usage.containers)],
        }))
    }

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<BoxStream<v1::StreamImagesResponse>>, Status> {
        let filter = request.into_inner().filter;
        let request = Request::new(v1::ListImagesRequest { filter });
        let images = self.list_images(request).await?.into_inner().images;
        pages(images, |images| v1::StreamImagesResponse { images })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_come_in_several_fields() {
        let auth = |change: fn(&mut v1::AuthConfig)| {
            let mut auth = v1::AuthConfig::default();
            change(&mut auth);
            credentials(Some(&auth))
        };
        let basic = Credentials::Basic {
            username: "u".into(),
            password: "p:q".into(),
        };
        assert_eq!(credentials(None).unwrap(), Credentials::Anonymous);
        assert_eq!(auth(|_| {}).unwrap(), Credentials::Anonymous);
        assert_eq!(
            auth(|auth| {
                auth.username = "u".into();
                auth.password = "p:q".into();
            })
            .unwrap(),
            basic
        );
        assert_eq!(
            auth(|auth| auth.auth = STANDARD.encode("u:p:q")).unwrap(),
            basic
        );
        assert_eq!(
            auth(|auth| auth.registry_token = "t".into()).unwrap(),
            Credentials::Bearer("t".into())
        );
        assert!(auth(|auth| auth.auth = "%".into()).is_err());
        assert!(auth(|auth| auth.identity_token = "t".into()).is_err());
    }
}

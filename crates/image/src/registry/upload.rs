//! The registry's side of a push (OCI distribution specification), and the list of tags.

use std::{fs::File, sync::Arc, time::Duration};

use futures::TryStreamExt as _;
use reqwest::{Body, Method, Response, StatusCode, Url, header};
use serde::Deserialize;
use tokio_util::io::ReaderStream;

use super::{Repository, transport};
use crate::{ImageError, PushEvent, PushProgress, manifest::Descriptor, tarball::shown};

/// How long an answer without much content may take.
const ANSWER: Duration = Duration::from_secs(60);
const TRIES: u32 = 3;
/// Bytes of one page of tags.
const MAX_TAGS_PAGE: u64 = 4 << 20;
/// Tags that are asked for at once.
const PAGE: usize = 1000;

/// What the account must be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read.
    Pull,
    /// Read and write.
    Push,
}

impl Access {
    /// Actions of a token's scope.
    pub(super) fn actions(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "pull,push",
        }
    }
}

#[derive(Deserialize)]
struct Tags {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl Repository {
    /// The same place for more than reading.
    pub(crate) fn with(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    fn url(&self, path: &str) -> Result<Url, ImageError> {
        self.base
            .join(path)
            .map_err(|e| self.unavailable(e.to_string()))
    }

    /// Sends a request whose body can be made anew, answering one challenge.
    async fn ask(
        &self,
        method: Method,
        url: &Url,
        headers: &[(header::HeaderName, String)],
        body: impl Fn() -> Result<Option<Body>, ImageError>,
        limit: Duration,
    ) -> Result<Response, ImageError> {
        let mut asked = false;
        loop {
            let authorization = self.authorization.lock().await.clone();
            // What the registry names elsewhere (an upload's place) gets no credentials.
            let authorization = authorization.filter(|_| url.origin() == self.base.origin());
            let sent = self.transport.send(
                method.clone(),
                url,
                headers,
                body()?,
                authorization.as_ref(),
            );
            let response = match tokio::time::timeout(limit, sent).await {
                Ok(Ok(response)) => response,
                Ok(Err(failure)) => return Err(failure.error),
                Err(_elapsed) => {
                    return Err(self.unavailable(format!("no answer within {limit:?}")));
                }
            };
            if response.status() == StatusCode::UNAUTHORIZED && !asked {
                asked = true;
                let fresh = self.authorize(&response).await?;
                if fresh.is_none() {
                    return Err(self.refusal(response).await);
                }
                *self.authorization.lock().await = fresh;
                continue;
            }
            return Ok(response);
        }
    }

    /// Whether the registry has a blob in this repository.
    pub(crate) async fn has_blob(&self, blob: &Descriptor) -> Result<bool, ImageError> {
        let url = self.url(&format!("blobs/{}", blob.digest))?;
        let response = self
            .ask(Method::HEAD, &url, &[], || Ok(None), ANSWER)
            .await?;
        match response.status() {
            status if status.is_success() || status.is_redirection() => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.refusal(response).await),
        }
    }

    /// Sends a blob's file.
    pub(crate) async fn upload(
        &self,
        blob: &Descriptor,
        open: &(dyn Fn() -> Result<File, ImageError> + Sync),
        progress: &PushProgress,
    ) -> Result<(), ImageError> {
        let limit = Duration::from_secs(120 + blob.size / (16 << 10));
        let mut tries = 0;
        loop {
            tries += 1;
            let body = || {
                let file = tokio::fs::File::from_std(open()?);
                let (digest, progress) = (blob.digest.clone(), Arc::clone(progress));
                let (mut at, mut told) = (0_u64, 0_u64);
                let size = blob.size;
                let pieces =
                    ReaderStream::with_capacity(file, 128 << 10).inspect_ok(move |piece| {
                        at += piece.len() as u64;
                        if at - told >= 512 << 10 || at == size {
                            told = at;
                            progress(PushEvent::Progress {
                                layer: digest.clone(),
                                bytes: at,
                            });
                        }
                    });
                Ok(Some(Body::wrap_stream(pieces)))
            };
            match self.send_blob(blob, body, limit).await {
                Err(ImageError::Unavailable { .. }) if tries < TRIES => {
                    tokio::time::sleep(Duration::from_millis(200 << tries)).await;
                }
                result => return result,
            }
        }
    }

    /// Sends a small blob.
    pub(crate) async fn upload_bytes(
        &self,
        blob: &Descriptor,
        bytes: Vec<u8>,
    ) -> Result<(), ImageError> {
        let bytes = bytes::Bytes::from(bytes);
        let body = || Ok(Some(Body::from(bytes.clone())));
        self.send_blob(blob, body, ANSWER).await
    }

    async fn send_blob(
        &self,
        blob: &Descriptor,
        body: impl Fn() -> Result<Option<Body>, ImageError>,
        limit: Duration,
    ) -> Result<(), ImageError> {
        let url = self.url("blobs/uploads/")?;
        let response = self
            .ask(
                Method::POST,
                &url,
                &[(header::CONTENT_LENGTH, "0".to_owned())],
                || Ok(None),
                ANSWER,
            )
            .await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.refusal(response).await);
        }
        let place = response
            .headers()
            .get(header::LOCATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| url.join(text).ok());
        let Some(mut place) = place else {
            return Err(self.unavailable("it takes an upload and names no place for it"));
        };
        if !self.transport.may_visit(&place, &url) {
            return Err(self.unavailable(format!(
                "an upload to {} is not made",
                shown(transport::authority(&place).as_bytes())
            )));
        }
        place
            .query_pairs_mut()
            .append_pair("digest", blob.digest.as_str());
        let headers = [
            (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
            (header::CONTENT_LENGTH, blob.size.to_string()),
        ];
        let response = self.ask(Method::PUT, &place, &headers, body, limit).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::OK | StatusCode::NO_CONTENT => Ok(()),
            _ => Err(self.refusal(response).await),
        }
    }

    /// Stores a manifest under a tag or digest.
    pub(crate) async fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        bytes: Vec<u8>,
    ) -> Result<(), ImageError> {
        let url = self.url(&format!("manifests/{name}"))?;
        let bytes = bytes::Bytes::from(bytes);
        let headers = [(header::CONTENT_TYPE, media_type.to_owned())];
        let body = || Ok(Some(Body::from(bytes.clone())));
        let response = self.ask(Method::PUT, &url, &headers, body, ANSWER).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::OK => Ok(()),
            _ => Err(self.refusal(response).await),
        }
    }

    /// The first tags of the repository, in the registry's order.
    pub(crate) async fn tags(&self, most: usize) -> Result<Vec<String>, ImageError> {
        let mut found: Vec<String> = Vec::new();
        while found.len() < most {
            let mut url = self.url("tags/list")?;
            url.query_pairs_mut()
                .append_pair("n", &PAGE.min(most).to_string());
            if let Some(last) = found.last() {
                url.query_pairs_mut().append_pair("last", last);
            }
            let response = self
                .ask(Method::GET, &url, &[], || Ok(None), ANSWER)
                .await?;
            if !response.status().is_success() {
                return Err(self.refusal(response).await);
            }
            let more = response.headers().contains_key(header::LINK);
            let body = self.body(response, MAX_TAGS_PAGE, "list of tags").await?;
            let page: Tags = serde_json::from_slice(&body)
                .map_err(|e| self.unavailable(format!("its list of tags is none: {e}")))?;
            let before = found.len();
            found.extend(page.tags.unwrap_or_default());
            if !more || found.len() == before {
                break;
            }
        }
        found.truncate(most);
        Ok(found)
    }
}

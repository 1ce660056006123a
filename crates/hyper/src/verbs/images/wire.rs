//! Requests to the API for images.

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper_util::{client::legacy, rt::TokioExecutor};
use kube::client::{Body, ConfigExt as _};
use serde_json::Value;
use tower::{ServiceBuilder, ServiceExt as _};

use crate::{
    cluster::Cluster,
    error::{Failure, Result},
};

const GROUP: &str = "images.hypernetes.io";
/// Bytes of one line, or of an answer that is read whole.
const MOST: usize = 32 << 20;

/// The path of a namespace's images, or of something below.
pub(super) fn path(cluster: &Cluster, rest: &str) -> String {
    format!(
        "/apis/{GROUP}/v1alpha1/namespaces/{}/images{rest}",
        cluster.namespace
    )
}

/// A text as part of a query.
pub(super) fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A body that is sent or comes piece by piece.
pub(super) type Stream = UnsyncBoxBody<Bytes, BoxError>;

/// A request that the API did not do.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) code: StatusCode,
    pub(super) message: String,
    /// The API knows the resource: what is missing is the object.
    pub(super) is_served: bool,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self::daemon(refused.message)
    }
}

/// Sends a request; what is no success is a refusal.
pub(super) async fn send(
    cluster: &Cluster,
    method: Method,
    path: &str,
    body: Body,
) -> Result<Result<Stream, Refused>> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body)
        .map_err(Failure::plain)?;
    let response = cluster.client.send(request).await?;
    judge(response.map(|body| body.map_err(Into::into).boxed_unsync())).await
}

/// Sends a body that is too large to have at once, which the cluster's client cannot: over a connection
/// of its own, with the same credentials.
pub(super) async fn upload(
    cluster: &Cluster,
    path: &str,
    body: Stream,
) -> Result<Result<Stream, Refused>> {
    let config = &cluster.config;
    let connection = config.rustls_https_connector()?;
    let client: legacy::Client<_, Stream> =
        legacy::Client::builder(TokioExecutor::new()).build(connection);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(http::header::CONTENT_TYPE, "application/x-tar")
        .body(body)
        .map_err(Failure::plain)?;
    let response = service.oneshot(request).await.map_err(|error| {
        Failure::plain(format_args!(
            "Cannot connect to the cluster: {}",
            hypernetes_telemetry::chain(&*error)
        ))
    })?;
    judge(response.map(|body| body.map_err(Into::into).boxed_unsync())).await
}

async fn judge(response: http::Response<Stream>) -> Result<Result<Stream, Refused>> {
    let code = response.status();
    let body = response.into_body();
    if code.is_success() {
        return Ok(Ok(body));
    }
    let bytes = whole(body).await?;
    let status: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let text = status["message"].as_str().map_or_else(
        || String::from_utf8_lossy(&bytes).trim().to_owned(),
        str::to_owned,
    );
    Ok(Err(Refused {
        code,
        message: text,
        is_served: !status["details"]["kind"].is_null() || code != StatusCode::NOT_FOUND,
    }))
}

/// Reads an answer to its end.
pub(super) async fn whole(mut body: Stream) -> Result<Bytes> {
    let mut bytes = BytesMut::new();
    while let Some(piece) = next(&mut body).await? {
        if bytes.len() + piece.len() > MOST {
            return Err(Failure::plain("the server's answer is too long"));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}

/// The next piece of an answer.
pub(super) async fn next(body: &mut Stream) -> Result<Option<Bytes>> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Err(error)) => {
                return Err(Failure::plain(format_args!(
                    "the connection to the cluster broke: {error}"
                )));
            }
            Some(Ok(frame)) => {
                if let Ok(piece) = frame.into_data() {
                    return Ok(Some(piece));
                }
            }
        }
    }
}

/// Gets one JSON document.
pub(super) async fn get(cluster: &Cluster, path: &str) -> Result<Result<Value, Refused>> {
    match send(cluster, Method::GET, path, Body::empty()).await? {
        Err(refused) => Ok(Err(refused)),
        Ok(body) => {
            let bytes = whole(body).await?;
            let value = serde_json::from_slice(&bytes).map_err(Failure::plain)?;
            Ok(Ok(value))
        }
    }
}

/// Posts a request whose answer is lines of JSON; returns the last ones, of `DONE`.
pub(super) async fn operate(
    cluster: &Cluster,
    path: &str,
    body: Value,
    tell: impl FnMut(&Value),
) -> Result<Vec<Value>> {
    let body = Body::from(body.to_string().into_bytes());
    lines(send(cluster, Method::POST, path, body).await??, tell).await
}

/// Reads lines of JSON; returns those of `DONE`.
pub(super) async fn lines(mut answer: Stream, mut tell: impl FnMut(&Value)) -> Result<Vec<Value>> {
    let mut pending = BytesMut::new();
    let mut done = Vec::new();
    while let Some(piece) = next(&mut answer).await? {
        pending.extend_from_slice(&piece);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line = pending.split_to(end);
            pending.advance(1);
            let event: Value = serde_json::from_slice(&line).map_err(Failure::plain)?;
            match event["type"].as_str() {
                Some("DONE") => done.push(event),
                Some("ERROR") => {
                    let message = event["object"]["message"].as_str().unwrap_or_default();
                    return Err(Failure::daemon(message));
                }
                _ => tell(&event),
            }
        }
        if pending.len() > MOST {
            return Err(Failure::plain("the server's answer is too long"));
        }
    }
    if done.is_empty() {
        return Err(Failure::plain(
            "the connection to the cluster ended before the operation did",
        ));
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn queries_are_escaped() {
        assert_eq!(escaped("a.b:5000/c_d@x"), "a.b%3A5000%2Fc_d%40x");
    }
}

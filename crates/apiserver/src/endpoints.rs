//! Paths that are no resources: discovery, OpenAPI, version, health, metrics.

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use hypernetes_apimachinery::{ResourceKind, Status, discovery, openapi};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    config::VersionInfo,
    customs::Customs,
    metrics::Metrics,
    negotiate,
    query::Query,
    status::Result,
};

/// What these paths show.
pub(crate) struct Endpoints<'a> {
    pub(crate) version: &'a VersionInfo,
    pub(crate) server_address: &'a str,
    pub(crate) metrics: &'a Metrics,
    pub(crate) ready: bool,
    pub(crate) customs: &'a Customs,
}

const PATHS: [&str; 13] = [
    "/api",
    "/api/v1",
    "/apis",
    "/healthz",
    "/healthz/ping",
    "/livez",
    "/livez/ping",
    "/metrics",
    "/openapi/v2",
    "/openapi/v3",
    "/readyz",
    "/readyz/ping",
    "/version",
];

impl Endpoints<'_> {
    pub(crate) async fn serve(
        &self,
        method: &Method,
        path: &str,
        query: &Query,
        headers: &HeaderMap,
    ) -> Result<Response<ApiBody>> {
        let path = if path.len() > 1 {
            path.trim_end_matches('/')
        } else {
            path
        };
        let more = match path.starts_with("/apis") {
            true => self.customs.all()?,
            false => Vec::new(),
        };
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let known = match segments.as_slice() {
            [""] => Ok(json_value(&json!({"paths": PATHS}))),
            ["version"] => Ok(json_value(&self.version_body())),
            [path @ ("healthz" | "livez")] if query.flag("verbose") => Ok(verbose(path)),
            ["readyz"] if self.ready && query.flag("verbose") => Ok(verbose("readyz")),
            ["healthz" | "livez"] | ["healthz" | "livez", "ping"] => Ok(body::text(200, "ok")),
            ["readyz"] | ["readyz", "ping"] if self.ready => Ok(body::text(200, "ok")),
            ["readyz"] | ["readyz", "ping"] => Ok(body::text(503, "shutting down")),
            ["metrics"] => Ok(self.metrics.all().await),
            ["api"] if negotiate::wants_aggregated(headers) => Ok(aggregated(true, &[])),
            ["apis"] if negotiate::wants_aggregated(headers) => Ok(aggregated(false, &more)),
            ["api"] => Ok(json_value(&discovery::api_versions(self.server_address))),
            ["apis"] => Ok(json_value(&discovery::api_group_list(&more))),
            ["apis", group] => found(discovery::api_group(group, &more)),
            ["api", version] => found(discovery::api_resource_list("", version, &[])),
            ["apis", group, version] => found(discovery::api_resource_list(group, version, &more)),
            ["openapi", "v2"] if negotiate::wants_protobuf(headers) => Ok(body::with_type(
                200,
                openapi::swagger::PROTOBUF_MEDIA_TYPE,
                body::full(openapi::swagger::protobuf()),
            )),
            ["openapi", "v2"] => Ok(document(openapi::swagger::json(), query, headers)),
            ["openapi", "v3"] => {
                let index = openapi::index(&self.customs.documents()?);
                Ok(document(&index, query, headers))
            }
            ["openapi", "v3", "api", version] => open_api("", version, query, headers),
            ["openapi", "v3", "apis", group, version] => {
                match self.customs.document(group, version)? {
                    Some(found) => Ok(document(&found, query, headers)),
                    None => open_api(group, version, query, headers),
                }
            }
            _ => Err(page_not_found()),
        };
        if known.is_ok() && !matches!(*method, Method::GET | Method::HEAD) {
            return Err(Status::method_not_allowed());
        }
        known
    }

    fn version_body(&self) -> Value {
        let version = self.version.git_version.trim_start_matches('v');
        let mut numbers = version.split('.');
        json!({
            "major": numbers.next().unwrap_or_default(),
            "minor": numbers.next().unwrap_or_default(),
            "gitVersion": self.version.git_version,
            "gitCommit": self.version.git_commit,
            "gitTreeState": "clean",
            "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "none",
            "compiler": "rustc",
            "platform": format!("{}/{}", std::env::consts::OS, arch()),
        })
    }
}

/// A health check that names its parts.
fn verbose(path: &str) -> Response<ApiBody> {
    body::text(200, format!("[+]ping ok\n{path} check passed\n"))
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn json_value(value: &Value) -> Response<ApiBody> {
    body::json_value(200, value)
}

fn found(value: Option<Value>) -> Result<Response<ApiBody>> {
    value
        .map(|value| json_value(&value))
        .ok_or_else(page_not_found)
}

fn page_not_found() -> Status {
    Status::no_resource()
}

fn aggregated(core: bool, more: &[&'static ResourceKind]) -> Response<ApiBody> {
    let bytes = discovery::aggregated(core, more).to_string();
    let mut response = body::with_type(200, discovery::AGGREGATED_MEDIA_TYPE, body::full(bytes));
    response
        .headers_mut()
        .insert(header::VARY, HeaderValue::from_static("Accept"));
    response
}

fn open_api(
    group: &str,
    version: &str,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Response<ApiBody>> {
    let found = openapi::document(group, version).ok_or_else(page_not_found)?;
    Ok(document(found, query, headers))
}

fn document(found: &openapi::Document, query: &Query, headers: &HeaderMap) -> Response<ApiBody> {
    let tag = format!("\"{}\"", found.hash);
    let fresh = headers
        .get(header::IF_NONE_MATCH)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|tags| tags.split(',').any(|t| t.trim() == tag));
    let mut response = body::json(200, found.body.clone());
    if fresh {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = body::full("");
    }
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, value);
    }
    if query.get("hash") == Some(found.hash.as_str()) {
        // The hash is in the address: what is there never changes.
        headers.insert(
            header::CACHE_CONTROL,
            HeaderValue::from_static("public, immutable, max-age=31536000"),
        );
    }
    response
}

//! Which form an answer takes, and in which form a body came.

use http::{HeaderMap, header};
use hypernetes_apimachinery::{Status, table::IncludeObject};

use crate::{query::Query, status::Result};

const ACCEPTED: [&str; 1] = ["application/json"];
const BODIES: [&str; 3] = [
    "application/json",
    "application/yaml",
    "application/vnd.kubernetes.protobuf",
];

/// Form of an object in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// As it is.
    Object,
    /// `PartialObjectMetadata`.
    Metadata,
    /// `Table`.
    Table(IncludeObject),
}

/// The first form of the `Accept` header that can be had.
pub(crate) fn view(headers: &HeaderMap, query: &Query) -> Result<View> {
    let mut any = false;
    for value in headers.get_all(header::ACCEPT) {
        let Ok(value) = value.to_str() else { continue };
        for range in value
            .split(',')
            .map(str::trim)
            .filter(|range| !range.is_empty())
        {
            any = true;
            if let Some(view) = one_view(range, query)? {
                return Ok(view);
            }
        }
    }
    if any {
        Err(Status::not_acceptable(&ACCEPTED))
    } else {
        Ok(View::Object)
    }
}

fn one_view(range: &str, query: &Query) -> Result<Option<View>> {
    let mut parts = range.split(';').map(str::trim);
    let media_type = parts.next().unwrap_or_default();
    if !matches!(media_type, "application/json" | "application/*" | "*/*") {
        return Ok(None);
    }
    let (mut form, mut group, mut version) = (None, None, None);
    for parameter in parts {
        match parameter.split_once('=') {
            Some(("as", value)) => form = Some(value),
            Some(("g", value)) => group = Some(value),
            Some(("v", value)) => version = Some(value),
            _ => {}
        }
    }
    let known = matches!(group, None | Some("meta.k8s.io")) && matches!(version, None | Some("v1"));
    Ok(match form {
        None => Some(View::Object),
        Some(_) if !known => None,
        Some("Table") => {
            let text = query.get("includeObject").unwrap_or_default();
            let include = IncludeObject::parse(text).ok_or_else(|| {
                Status::bad_request(format!("unrecognized includeObject value: {text:?}"))
            })?;
            Some(View::Table(include))
        }
        Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Some(View::Metadata),
        Some(_) => None,
    })
}

/// Whether the client wants the protobuf form of OpenAPI v2.
pub(crate) fn wants_protobuf(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|accepted| accepted.contains("proto-openapi.spec.v2"))
}

/// Whether the client asks for discovery in the aggregated form.
pub(crate) fn wants_aggregated(headers: &HeaderMap) -> bool {
    let ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    ranges
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .find_map(|range| {
            let aggregated = range.contains("as=APIGroupDiscoveryList");
            if aggregated {
                return (range.contains("g=apidiscovery.k8s.io")
                    && range.split(';').any(|p| p.trim() == "v=v2"))
                .then_some(true);
            }
            let plain = range.starts_with("application/json") || range.starts_with("*/*");
            plain.then_some(false)
        })
        == Some(true)
}

/// Form of a request body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyForm {
    Json,
    Yaml,
    Protobuf,
}

/// The form that `Content-Type` names; JSON if there is none.
pub(crate) fn body_form(headers: &HeaderMap) -> Result<BodyForm> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(BodyForm::Json);
    };
    let text = value.to_str().unwrap_or_default();
    match text.split(';').next().unwrap_or_default().trim() {
        "application/json" | "" | "*/*" => Ok(BodyForm::Json),
        "application/yaml" => Ok(BodyForm::Yaml),
        "application/vnd.kubernetes.protobuf" => Ok(BodyForm::Protobuf),
        _ => Err(Status::unsupported_media_type(&BODIES)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(text: &str) -> Result<View> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, text.parse().unwrap());
        view(&headers, &Query::default())
    }

    #[test]
    fn the_first_form_that_can_be_had_is_taken() {
        let table = Ok(View::Table(IncludeObject::Metadata));
        assert_eq!(
            accept("application/json;as=Table;v=v1;g=meta.k8s.io,application/json"),
            table
        );
        assert_eq!(
            accept("application/vnd.kubernetes.protobuf,application/json"),
            Ok(View::Object)
        );
        assert_eq!(
            accept("application/json;as=Table;v=v9,application/json"),
            Ok(View::Object)
        );
        assert_eq!(
            accept("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"),
            Ok(View::Metadata)
        );
        assert_eq!(accept("*/*"), Ok(View::Object));
        assert_eq!(accept("application/cbor").unwrap_err().code, 406);
        assert_eq!(view(&HeaderMap::new(), &Query::default()), Ok(View::Object));
    }

    #[test]
    fn unknown_bodies_are_refused() {
        let form = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, text.parse().unwrap());
            body_form(&headers)
        };
        assert_eq!(form("application/json; charset=utf-8"), Ok(BodyForm::Json));
        assert_eq!(
            form("application/vnd.kubernetes.protobuf"),
            Ok(BodyForm::Protobuf)
        );
        assert_eq!(form("application/cbor").unwrap_err().code, 415);
    }

    #[test]
    fn aggregated_discovery_is_told_from_the_first_understood_range() {
        let ask = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, text.parse().unwrap());
            wants_aggregated(&headers)
        };
        assert!(ask(
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"
        ));
        assert!(!ask("application/json"));
        assert!(!ask(
            "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json"
        ));
    }
}

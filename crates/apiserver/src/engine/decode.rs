//! Request bodies → objects of the kind that the path names.

use http::HeaderMap;
use hypernetes_apimachinery::{
    ResourceKind, Schema, Status, definitions, meta, protobuf,
    strict::{self, FieldValidation, Parsed},
};
use serde_json::Value;

use super::Call;
use crate::{
    negotiate::{self, BodyForm},
    query::Query,
    status::{self, Result},
    views,
};

/// Group, version and kind that a body must have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected<'a> {
    pub(crate) group: &'a str,
    pub(crate) version: &'a str,
    pub(crate) kind: &'a str,
}

impl<'a> Expected<'a> {
    pub(crate) fn of(kind: &'a ResourceKind) -> Self {
        Self {
            group: kind.group,
            version: kind.version,
            kind: kind.kind,
        }
    }

    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

/// The query's `fieldValidation`.
pub(crate) fn field_validation(query: &Query) -> Result<FieldValidation> {
    let text = query.get("fieldValidation").unwrap_or_default();
    FieldValidation::parse(text).ok_or_else(|| {
        Status::bad_request(format!(
            "fieldValidation: Unsupported value: {text:?}: supported values: \"\", \"Ignore\", \
             \"Strict\", \"Warn\""
        ))
    })
}

/// Decodes a body of the expected kind. Returns the object and warnings about odd fields.
pub(crate) fn body(
    bytes: &[u8],
    headers: &HeaderMap,
    query: &Query,
    expected: Expected<'_>,
) -> Result<(Value, Vec<String>)> {
    let mode = field_validation(query)?;
    let schema = definitions()
        .by_kind(expected.group, expected.version, expected.kind)
        .ok_or_else(|| Status::internal("there is no schema for the kind"))?;
    let parsed = parsed(bytes, headers, expected)?;
    reviewed(parsed, expected, schema, mode)
}

/// Decodes a body of the kind that a call is about.
pub(crate) fn object(bytes: &[u8], call: &Call) -> Result<(Value, Vec<String>)> {
    let mode = field_validation(&call.query)?;
    let expected = Expected::of(call.kind);
    let parsed = parsed(bytes, &call.headers, expected)?;
    let (object, warnings) = reviewed_for(call, parsed, mode)?;
    Ok((stored(call.kind, object), warnings))
}

/// The form in which an object is stored.
pub(crate) fn stored(kind: &ResourceKind, object: Value) -> Value {
    views::to_stored(kind, object)
}

/// Parses a body without a look at its fields.
pub(crate) fn parsed(bytes: &[u8], headers: &HeaderMap, expected: Expected<'_>) -> Result<Parsed> {
    let api_version = expected.api_version();
    let form = negotiate::body_form(headers)?;
    let parsed = match form {
        // Clients may send protobuf under any name: the magic tells.
        _ if bytes.starts_with(protobuf::MAGIC) => Parsed {
            value: protobuf::decode(bytes).map_err(|error| status::of_protobuf(&error))?,
            duplicates: Vec::new(),
        },
        BodyForm::Protobuf => {
            return Err(status::of_protobuf(&protobuf::ProtobufError::Magic));
        }
        BodyForm::Json => strict::parse_json(bytes)
            .map_err(|error| status::of_decode(&error, expected.kind, &api_version))?,
        BodyForm::Yaml => strict::parse_yaml(bytes)
            .map_err(|error| status::of_decode(&error, expected.kind, &api_version))?,
    };
    Ok(parsed)
}

/// Checks type and fields of what was parsed for a call's kind.
pub(crate) fn reviewed_for(
    call: &Call,
    mut parsed: Parsed,
    mode: FieldValidation,
) -> Result<(Value, Vec<String>)> {
    let expected = Expected::of(call.kind);
    let Some(custom) = &call.custom else {
        return reviewed(parsed, expected, call.schema()?, mode);
    };
    identify(&mut parsed, expected)?;
    let (object, mut warnings) = custom
        .review(parsed, mode)
        .map_err(|error| status::of_decode(&error, expected.kind, &expected.api_version()))?;
    warnings.extend(custom.deprecated.clone());
    Ok((object, warnings))
}

/// Checks type and fields of what was parsed.
pub(crate) fn reviewed(
    mut parsed: Parsed,
    expected: Expected<'_>,
    schema: &Schema,
    mode: FieldValidation,
) -> Result<(Value, Vec<String>)> {
    identify(&mut parsed, expected)?;
    strict::check(parsed, schema, mode)
        .map_err(|error| status::of_decode(&error, expected.kind, &expected.api_version()))
}

/// Checks, or fills in, the type of what was parsed.
fn identify(parsed: &mut Parsed, expected: Expected<'_>) -> Result<()> {
    let api_version = expected.api_version();
    if !parsed.value.is_object() {
        return Err(Status::bad_request(format!(
            "the request body is not an object of kind {}",
            expected.kind
        )));
    }
    match meta::api_version(&parsed.value) {
        None | Some("") => parsed.value["apiVersion"] = api_version.as_str().into(),
        Some(given) if given == api_version => {}
        Some(given) => {
            return Err(Status::bad_request(format!(
                "the API version in the data ({given}) does not match the expected API version \
                 ({api_version})"
            )));
        }
    }
    match meta::kind(&parsed.value) {
        None | Some("") => parsed.value["kind"] = expected.kind.into(),
        Some(given) if given == expected.kind => {}
        Some(given) => {
            return Err(Status::bad_request(format!(
                "the kind in the data ({given}) does not match the expected kind ({})",
                expected.kind
            )));
        }
    }
    Ok(())
}

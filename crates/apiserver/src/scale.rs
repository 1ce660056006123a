//! `scale`: the number of replicas of a kind that has one, behind one form for all of them.

use bytes::Bytes;
use http::{Response, header};
use hypernetes_apimachinery::{
    Status, definitions, meta,
    patch::{self, PatchType},
    selector::LabelSelector,
    strict, validation,
};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    engine::{Call, Engine, Expected, Part, decode_body},
    negotiate,
    status::{self, Result},
};

const EXPECTED: Expected<'static> = Expected {
    group: "autoscaling",
    version: "v1",
    kind: "Scale",
};
const ATTEMPTS: usize = 100;
const PATCH_TYPES: [&str; 3] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];

/// The scale of an object.
fn scale_of(object: &Value) -> Value {
    let metadata = &object["metadata"];
    let mut out = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {},
        "spec": {},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or_default()},
    });
    for field in [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
    ] {
        if let Some(value) = metadata.get(field) {
            meta::set(&mut out, field, value.clone());
        }
    }
    let replicas = object["spec"]["replicas"].as_i64().unwrap_or_default();
    if replicas != 0 {
        out["spec"]["replicas"] = replicas.into();
    }
    if let Ok(selector) = LabelSelector::from_json(&object["spec"]["selector"]) {
        out["status"]["selector"] = selector.to_string().into();
    }
    out
}

/// Serves `scale`.
pub(crate) async fn serve(
    engine: &Engine,
    call: &Call,
    bytes: &Bytes,
) -> Result<Response<ApiBody>> {
    negotiate::view(&call.headers, &call.query)?;
    let info = &call.info;
    if info.verb == "get" {
        let (entry, mut object) = engine.find(call.kind, &info.namespace, &info.name)?;
        meta::set_resource_version(&mut object, entry.mod_revision);
        return Ok(body::json_value(200, &scale_of(&object)));
    }
    let dry_run = call.is_dry_run()?;
    for _ in 0..ATTEMPTS {
        let (entry, mut object) = engine.find(call.kind, &info.namespace, &info.name)?;
        meta::set_resource_version(&mut object, entry.mod_revision);
        let old = scale_of(&object);
        let wanted = match info.verb {
            "update" => decode_body(bytes, &call.headers, &call.query, EXPECTED)?.0,
            _ => patched(call, &old, bytes)?,
        };
        let errors = validation::validate_scale(&wanted);
        if !errors.is_empty() {
            return Err(Status::invalid("autoscaling", "Scale", &info.name, &errors));
        }
        let version = meta::resource_version(&wanted).unwrap_or_default();
        let conditional = info.verb == "update" && !version.is_empty();
        if !version.is_empty() && version != entry.mod_revision.to_string() {
            return Err(Status::modified(
                call.kind.group,
                call.kind.plural,
                &info.name,
            ));
        }
        let replicas = wanted["spec"]["replicas"].as_i64().unwrap_or_default();
        object["spec"]["replicas"] = replicas.into();
        let written = engine
            .replace(call, Part::Main, &entry, object, dry_run)
            .await?;
        if let Some(written) = written {
            return Ok(body::json_value(200, &scale_of(&written.object)));
        }
        if conditional {
            break;
        }
    }
    Err(Status::modified(
        call.kind.group,
        call.kind.plural,
        &info.name,
    ))
}

fn patched(call: &Call, old: &Value, bytes: &Bytes) -> Result<Value> {
    let content_type = call
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let unsupported = || Status::unsupported_media_type(&PATCH_TYPES);
    let patch_type = PatchType::from_content_type(content_type)
        .filter(|patch_type| *patch_type != PatchType::Apply)
        .ok_or_else(unsupported)?;
    let parsed = strict::parse_json(bytes)
        .map_err(|error| status::of_decode(&error, EXPECTED.kind, &EXPECTED.api_version()))?;
    let failed = |error| status::of_patch(&error, call.kind, &call.info.name);
    let value = match patch_type {
        PatchType::Json => patch::json_patch(old, &parsed.value).map_err(failed)?,
        PatchType::Merge => patch::merge_patch(old, &parsed.value),
        _ => {
            let schema = definitions()
                .by_kind(EXPECTED.group, EXPECTED.version, EXPECTED.kind)
                .ok_or_else(|| Status::internal("there is no schema for Scale"))?;
            patch::strategic_merge_patch(old, &parsed.value, schema).map_err(failed)?
        }
    };
    // Through the same checks as a body that is sent whole.
    let json = [(
        header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    )];
    let headers = json.into_iter().collect();
    let text = value.to_string();
    Ok(decode_body(text.as_bytes(), &headers, &call.query, EXPECTED)?.0)
}

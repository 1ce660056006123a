//! `scale`: the number of replicas of a kind that has one, behind one form for all of them.

use bytes::Bytes;
use http::{Response, header};
use hypernetes_apimachinery::{
    Status, definitions, meta,
    patch::{self, PatchType},
    selector::LabelSelector,
    strict, table, validation,
};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    engine::{Call, Engine, Expected, Part, decode_body},
    negotiate::{self, View},
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

/// Where the scale of the built-in kinds is.
const REPLICAS: [&str; 2] = ["/spec/replicas", "/status/replicas"];

/// JSON pointers of the wanted number and of the number that there are.
fn pointers(call: &Call) -> [&str; 2] {
    let custom = call
        .custom
        .as_ref()
        .and_then(|custom| custom.scale.as_ref());
    custom.map_or(REPLICAS, |scale| [&scale.spec, &scale.status])
}

/// The scale of an object.
fn scale_of(call: &Call, object: &Value) -> Value {
    let metadata = &object["metadata"];
    let [wanted, there] = pointers(call);
    let number = |pointer: &str| object.pointer(pointer).and_then(Value::as_i64);
    let mut out = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {},
        "spec": {},
        "status": {"replicas": number(there).unwrap_or_default()},
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
    let replicas = number(wanted).unwrap_or_default();
    if replicas != 0 {
        out["spec"]["replicas"] = replicas.into();
    }
    match &call.custom {
        // Custom resources keep their selector as text.
        Some(custom) => {
            let pointer = custom.scale.as_ref().and_then(|s| s.selector.as_deref());
            let selector = pointer.and_then(|pointer| object.pointer(pointer)?.as_str());
            if let Some(selector) = selector.filter(|text| !text.is_empty()) {
                out["status"]["selector"] = selector.into();
            }
        }
        None => {
            if let Ok(selector) = LabelSelector::of_owner(object) {
                out["status"]["selector"] = selector.to_string().into();
            }
        }
    }
    out
}

/// Sets a number at a JSON pointer, with the objects that lead to it.
fn set_number(object: &mut Value, pointer: &str, number: i64) {
    let mut at = object;
    for name in pointer.split('/').filter(|name| !name.is_empty()) {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[name];
    }
    *at = number.into();
}

/// A scale in the form that the client asks for.
fn answer(engine: &Engine, view: View, scale: &Value) -> Response<ApiBody> {
    let metadata = json!({"resourceVersion": scale["metadata"]["resourceVersion"]});
    match view {
        View::Object => body::json_value(200, scale),
        View::Metadata => body::json_value(200, &table::partial_object_metadata(scale)),
        View::Table(_) => {
            let now = (engine.clock)();
            body::json_value(200, &table::scale_table(scale, &metadata, now))
        }
    }
}

/// Serves `scale`.
pub(crate) async fn serve(
    engine: &Engine,
    call: &Call,
    bytes: &Bytes,
) -> Result<Response<ApiBody>> {
    let view = negotiate::view(&call.headers, &call.query)?;
    let info = &call.info;
    if info.verb == "get" {
        let (entry, mut object) = engine.find(call.kind, &info.namespace, &info.name)?;
        meta::set_resource_version(&mut object, entry.mod_revision);
        return Ok(answer(engine, view, &scale_of(call, &object)));
    }
    if info.verb == "patch" && is_apply(call) {
        return apply(engine, call, view, bytes).await;
    }
    let dry_run = call.is_dry_run()?;
    for _ in 0..ATTEMPTS {
        let (entry, mut object) = engine.find(call.kind, &info.namespace, &info.name)?;
        meta::set_resource_version(&mut object, entry.mod_revision);
        let old = scale_of(call, &object);
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
        set_number(&mut object, pointers(call)[0], replicas);
        let written = engine
            .replace(call, Part::Main, &entry, object, dry_run)
            .await?;
        if let Some(written) = written {
            return Ok(answer(engine, view, &scale_of(call, &written.object)));
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

fn is_apply(call: &Call) -> bool {
    let content_type = call.headers.get(header::CONTENT_TYPE);
    content_type
        .and_then(|value| value.to_str().ok())
        .and_then(PatchType::from_content_type)
        == Some(PatchType::Apply)
}

/// Server-side apply of a scale: of the one field of the object behind it.
async fn apply(
    engine: &Engine,
    call: &Call,
    view: View,
    bytes: &Bytes,
) -> Result<Response<ApiBody>> {
    let json = [(
        header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/yaml"),
    )];
    let headers = json.into_iter().collect();
    let (wanted, _) = decode_body(bytes, &headers, &call.query, EXPECTED)?;
    let errors = validation::validate_scale(&wanted);
    if !errors.is_empty() {
        let name = &call.info.name;
        return Err(Status::invalid("autoscaling", "Scale", name, &errors));
    }
    let mut config = json!({
        "apiVersion": call.kind.api_version(),
        "kind": call.kind.kind,
        "metadata": {"name": call.info.name},
    });
    if let Some(version) = meta::resource_version(&wanted) {
        meta::set(&mut config, "resourceVersion", version);
    }
    if let Some(replicas) = wanted["spec"]["replicas"].as_i64() {
        set_number(&mut config, pointers(call)[0], replicas);
    }
    let written = engine.apply_config(call, Part::Main, &config).await?;
    Ok(answer(engine, view, &scale_of(call, &written.object)))
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

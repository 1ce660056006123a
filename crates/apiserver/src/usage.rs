//! `metrics.k8s.io`: what nodes and pods use. Nothing of it is stored: it is joined from the objects that are
//! there and the latest figures of the node.

use http::Response;
use hypernetes_apimachinery::{Status, kinds, table, usage};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    codec,
    engine::{Call, Engine, ListOptions},
    keys,
    negotiate::{self, View},
    status::Result,
};

/// Whether the request is for resource metrics.
pub(crate) fn is_usage(kind: &hypernetes_apimachinery::ResourceKind) -> bool {
    kind.group == usage::GROUP
}

/// `get` and `list`.
pub(crate) fn serve(engine: &Engine, call: &Call) -> Result<Response<ApiBody>> {
    // Metrics are about objects of the same plural name in the core group.
    let of = kinds::by_resource("", "v1", call.kind.plural).ok_or_else(Status::no_resource)?;
    let metrics = |object: &Value| match of.kind {
        "Pod" => engine.usage.of_pod(object),
        _ => engine.usage.of_node(object),
    };
    let info = &call.info;
    match info.verb {
        "get" => {
            let entry = engine
                .store
                .get(&keys::object(of, &info.namespace, &info.name));
            let found = entry.and_then(|entry| metrics(&codec::decode(&entry.value)));
            engine.one(call, 200, &found.ok_or_else(|| call.not_found())?)
        }
        "list" => {
            let view = negotiate::view(&call.headers, &call.query)?;
            let options = ListOptions::parse(&call.query, call.kind, None)?;
            let prefix = keys::prefix(of, &info.namespace);
            let page = engine
                .store
                .list(&prefix, None, None, None)
                .map_err(|error| crate::status::of_store(&error))?;
            let found: Vec<Value> = page
                .entries
                .iter()
                .filter_map(|entry| metrics(&codec::decode(&entry.value)))
                .filter(|object| options.selection.matches(object))
                .collect();
            let objects: Vec<&Value> = found.iter().collect();
            let metadata = json!({});
            let value = match view {
                View::Object => json!({
                    "kind": call.kind.list_kind(),
                    "apiVersion": call.kind.api_version(),
                    "metadata": metadata,
                    "items": objects,
                }),
                View::Metadata => table::partial_object_metadata_list(&objects, &metadata),
                View::Table(include) => {
                    let now = (engine.clock)();
                    table::table(call.kind, &objects, include, &metadata, true, now)
                }
            };
            Ok(body::json_value(200, &value))
        }
        _ => Err(Status::method_not_allowed()),
    }
}

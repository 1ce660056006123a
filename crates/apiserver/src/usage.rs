//! `metrics.k8s.io`: what nodes and pods use. Nothing of it is stored: it is joined from the objects that are
//! there and the latest figures of the node.

use http::Response;
use hypernetes_apimachinery::{Status, kinds, usage};
use serde_json::{Value, json};

use crate::{
    body::ApiBody,
    codec,
    engine::{Call, Engine},
    keys,
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
            let prefix = keys::prefix(of, &info.namespace);
            let page = engine
                .store
                .list(&prefix, None, None, None)
                .map_err(|error| crate::status::of_store(&error))?;
            let found: Vec<Value> = page
                .entries
                .iter()
                .filter_map(|entry| metrics(&codec::decode(&entry.value)))
                .collect();
            engine.computed(call, &found, &json!({}))
        }
        _ => Err(Status::method_not_allowed()),
    }
}

//! `apiregistration.k8s.io`: the versions that are served, as objects. All are served by this server
//! itself; none can be added.

use std::collections::BTreeSet;

use http::Response;
use hypernetes_apimachinery::{ResourceKind, Status, kinds, table};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    engine::{Call, Engine, ListOptions},
    negotiate::{self, View},
    status::Result,
};

pub(crate) fn is_api_service(kind: &ResourceKind) -> bool {
    kind.group == "apiregistration.k8s.io"
}

/// `get` and `list`.
pub(crate) fn serve(engine: &Engine, call: &Call) -> Result<Response<ApiBody>> {
    let all = all(engine)?;
    match call.info.verb {
        "get" => {
            let found = all
                .iter()
                .find(|one| one["metadata"]["name"] == call.info.name.as_str());
            engine.one(call, 200, found.ok_or_else(|| call.not_found())?)
        }
        "list" => {
            let view = negotiate::view(&call.headers, &call.query)?;
            let options = ListOptions::parse(&call.query, call.kind, None)?;
            let objects: Vec<&Value> = all
                .iter()
                .filter(|object| options.selection.matches(object))
                .collect();
            let metadata = json!({"resourceVersion": engine.store.revision().to_string()});
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

fn all(engine: &Engine) -> Result<Vec<Value>> {
    let mut versions: BTreeSet<(&str, &str)> = BTreeSet::new();
    for kind in kinds::all().iter().chain(engine.customs.all()?) {
        if !is_api_service(kind) {
            versions.insert((kind.group, kind.version));
        }
    }
    let one = |(group, version): (&str, &str)| {
        json!({
            "kind": "APIService",
            "apiVersion": "apiregistration.k8s.io/v1",
            "metadata": {
                "name": format!("{version}.{group}"),
                "labels": {"kube-aggregator.kubernetes.io/automanaged": "onstart"},
            },
            "spec": {
                "group": group,
                "version": version,
                "groupPriorityMinimum": if group.is_empty() { 18000 } else { 17000 },
                "versionPriority": 15,
            },
            "status": {"conditions": [{
                "type": "Available", "status": "True", "reason": "Local",
                "message": "Local APIServices are always available",
                "lastTransitionTime": null,
            }]},
        })
    };
    Ok(versions.into_iter().map(one).collect())
}

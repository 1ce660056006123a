//! `apiregistration.k8s.io`: the versions that are served, as objects. All are served by this server
//! itself; none can be added.

use std::collections::BTreeSet;

use http::Response;
use hypernetes_apimachinery::{ResourceKind, Status, kinds};
use serde_json::{Value, json};

use crate::{
    body::ApiBody,
    engine::{Call, Engine},
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
            let metadata = json!({"resourceVersion": engine.store.revision().to_string()});
            engine.computed(call, &all, &metadata)
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

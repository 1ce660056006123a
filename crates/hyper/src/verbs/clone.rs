//! `clone`: a second container that goes on from where a running one is.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{launch, publish, snapshot, watch};
use crate::{
    cli::CloneOptions,
    cluster::{self, Cluster},
    error::{Failure, Result},
    meta,
    model::{self, Container, State},
    names, terminal,
};

/// Labels by which controllers find pods of their own: the clone is nobody's.
const OF_CONTROLLERS: [&str; 4] = [
    "pod-template-hash",
    "controller-revision-hash",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
];
/// What a pod says of its own run, not of what runs in it.
const OF_THE_RUN: [&str; 8] = [
    meta::CLONE_OF,
    meta::CLONE_OF_SNAPSHOT,
    meta::PAUSED,
    meta::SUSPENDED,
    meta::STOP_GRACE,
    meta::PORTS,
    meta::RUN,
    "kubectl.kubernetes.io/last-applied-configuration",
];

/// What is cloned.
struct Source {
    pod: Pod,
    /// As errors call it.
    what: String,
    /// Annotation by which the node knows it, and its value.
    mark: (&'static str, String),
    new_name: Option<String>,
}

/// `clone`.
pub(crate) async fn run(cluster: &Cluster, options: &CloneOptions) -> Result<()> {
    let all = cluster.containers().await?;
    let source = match (&options.snapshot, &options.container) {
        (Some(snapshot), new_name) => {
            let pod = snapshot::template(cluster, snapshot).await?;
            Source {
                pod,
                what: format!("snapshot {snapshot}"),
                mark: (meta::CLONE_OF_SNAPSHOT, snapshot.clone()),
                new_name: new_name.clone(),
            }
        }
        (None, container) => {
            let container = find_live(&all, container.as_deref().unwrap_or_default())?;
            Source {
                what: format!("container {}", container.id),
                mark: (meta::CLONE_OF, container.pod_name().to_owned()),
                pod: container.pod,
                new_name: options.new_name.clone(),
            }
        }
    };
    check_cluster(cluster, "clone").await?;
    let name = match &source.new_name {
        Some(name) => name.trim_start_matches('/').to_owned(),
        None => {
            let pod = source.pod.metadata.name.as_deref().unwrap_or_default();
            format!("{}-{}", names::of_pod(pod), names::suffix())
        }
    };
    names::check(&name)?;
    let made_by_hyper = label(&source.pod, meta::NAME).is_some();
    let id = names::new_id();
    let own = made_by_hyper.then_some(id.as_str());
    let (key, value) = &source.mark;
    let pod = clone_of(&source.pod, (key, value), &name, own)?;
    if let Some(other) = all.iter().find(|other| other.name == name) {
        return Err(launch::conflict_with(other, &name));
    }
    let pod = launch::post(cluster, pod, &name).await?;
    let container = model::containers(vec![pod])
        .pop()
        .ok_or_else(|| Failure::plain("the server answered without a container"))?;
    match watch::started(cluster, &container).await? {
        watch::Started::Yes(_) => {
            terminal::line(if made_by_hyper { &id } else { &name });
            Ok(())
        }
        watch::Started::No(_, message) => {
            cluster.remove(&container, Some(0)).await?;
            Err(Failure::daemon(format_args!(
                "Cannot clone {}: {message}",
                source.what
            )))
        }
    }
}

/// Refuses a verb that only nodes of Hypernetes can do.
pub(super) async fn check_cluster(cluster: &Cluster, verb: &str) -> Result<()> {
    match cluster.is_hypernetes().await? {
        true => Ok(()),
        false => Err(Failure::refused(
            verb,
            "the cluster's nodes cannot do it; `hyper run` starts the image anew",
        )),
    }
}

/// A container that runs, stands still or is suspended.
pub(super) fn find_live(all: &[Container], wanted: &str) -> Result<Container> {
    let source = find(all, wanted)?;
    match source.state() {
        State::Running | State::Paused | State::Suspended => Ok(source),
        State::Created | State::Restarting | State::Removing | State::Exited | State::Dead => Err(
            Failure::daemon(format_args!("container {} is not running", source.id)),
        ),
    }
}

/// The container of a name or id, or one of the pod of this name: all containers of a pod are cloned.
fn find(all: &[Container], wanted: &str) -> Result<Container> {
    let of_pod = || all.iter().find(|it| it.pod_name() == wanted).cloned();
    cluster::find(all.to_vec(), wanted).or_else(|missing| of_pod().ok_or(missing))
}

fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a String> {
    pod.metadata.labels.as_ref()?.get(key)
}

/// The pod of the clone, with the id of the container that it is, if it is to be one of hyper's.
fn clone_of(source: &Pod, mark: (&str, &str), name: &str, id: Option<&str>) -> Result<Value> {
    let whole = serde_json::to_value(source).map_err(Failure::plain)?;
    let owners = source.metadata.owner_references.iter().flatten();
    let mut labels: BTreeMap<String, String> = match owners
        .into_iter()
        .any(|owner| owner.controller == Some(true))
    {
        // Its controller would take the clone for a pod too many.
        true => BTreeMap::new(),
        false => source.metadata.labels.clone().unwrap_or_default(),
    };
    labels.retain(|key, _| !OF_CONTROLLERS.contains(&key.as_str()));
    let mut annotations = source.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| !OF_THE_RUN.contains(&key.as_str()));
    annotations.insert(mark.0.to_owned(), mark.1.to_owned());
    let mut spec = whole["spec"].clone();
    if let Some(fields) = spec.as_object_mut() {
        for field in [
            "nodeName",
            "activeDeadlineSeconds",
            "ephemeralContainers",
            "hostname",
            "subdomain",
            "schedulingGates",
        ] {
            fields.remove(field);
        }
    }
    let pod = match id {
        Some(id) => {
            labels.insert(meta::NAME.to_owned(), name.to_owned());
            labels.insert(publish::SHORT_ID.to_owned(), id[..12].to_owned());
            annotations.insert(meta::ID.to_owned(), id.to_owned());
            annotations.insert(meta::CREATED.to_owned(), jiff::Timestamp::now().to_string());
            spec["hostname"] = id[..12].into();
            names::of_pod(name)
        }
        None => name.to_owned(),
    };
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod, "labels": labels, "annotations": annotations},
        "spec": spec,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(more: &Value) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "web-1", "labels": {"app": "web", "pod-template-hash": "x"},
                "annotations": {"a": "b", meta::PAUSED: "true", meta::PORTS: "[]", meta::CLONE_OF_SNAPSHOT: "s"}},
            "spec": {"nodeName": "n", "hostname": "h", "restartPolicy": "Never",
                "containers": [{"name": "c", "image": "x"}]}});
        let meta = pod["metadata"].as_object_mut().unwrap();
        meta.extend(more.as_object().unwrap().clone());
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn a_clone_has_what_runs_and_not_who_it_is() {
        let clone = clone_of(&pod(&json!({})), (meta::CLONE_OF, "web-1"), "copy", None).unwrap();
        assert_eq!(
            clone,
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "copy", "labels": {"app": "web"},
                    "annotations": {"a": "b", "hypernetes.io/clone-of": "web-1"}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}})
        );
        let id = "0123456789abcdef";
        let clone = clone_of(
            &pod(&json!({})),
            (meta::CLONE_OF, "web-1"),
            "My_copy",
            Some(id),
        )
        .unwrap();
        assert_eq!(clone["metadata"]["name"], "my-copy");
        assert_eq!(clone["metadata"]["labels"][meta::NAME], "My_copy");
        assert_eq!(clone["metadata"]["annotations"][meta::ID], id);
        assert_eq!(clone["spec"]["hostname"], "0123456789ab");
    }

    #[test]
    fn a_controller_does_not_find_the_clone_of_its_pod() {
        let owner = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "u",
            "controller": true}]);
        let pod = pod(&json!({"ownerReferences": owner}));
        let clone = clone_of(&pod, (meta::CLONE_OF, "web-1"), "copy", None).unwrap();
        assert_eq!(clone["metadata"]["labels"], json!({}));
        assert!(clone["metadata"]["ownerReferences"].is_null());
    }
}

//! `snapshot`: objects of kind PodSnapshot in the namespace.

use std::collections::BTreeMap;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, PostParams},
    runtime::watcher::watch_object,
};
use serde_json::{Value, json};

use super::{clone, each, inspect as print};
use crate::{
    cli::{ListOptions, SnapshotCommand},
    cluster::Cluster,
    error::{Failure, Result},
    format::{Filters, Row, Rows},
    names as naming, terminal, units,
};

const GROUP: &str = "hypernetes.io";
const VERSION: &str = "v1alpha1";
const KIND: &str = "PodSnapshot";

const ROWS: Rows<'_> = Rows {
    default: &["Name", "Container", "Size", "Status", "CreatedSince"],
    headers: &[
        ("Name", "SNAPSHOT"),
        ("Container", "CONTAINER"),
        ("Size", "SIZE"),
        ("Status", "STATUS"),
        ("CreatedSince", "CREATED"),
        ("CreatedAt", "CREATED AT"),
        ("SizeLimit", "SIZE LIMIT"),
        ("Labels", "LABELS"),
    ],
    quiet: "Name",
};

fn api(cluster: &Cluster) -> Api<DynamicObject> {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, VERSION, KIND));
    Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &kind)
}

fn missing(name: &str) -> Failure {
    Failure::daemon(format_args!("snapshot {name} not found"))
}

fn ready(snapshot: &DynamicObject) -> Option<&Value> {
    let conditions = snapshot.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|it| it["type"] == "Ready")
}

/// `ready`, or what it waits for.
fn status(snapshot: &DynamicObject) -> String {
    match ready(snapshot) {
        Some(condition) if condition["status"] == "True" => "ready".to_owned(),
        Some(condition) => condition["reason"]
            .as_str()
            .unwrap_or_default()
            .to_lowercase(),
        None => "pending".to_owned(),
    }
}

fn text<'a>(snapshot: &'a DynamicObject, part: &str, field: &str) -> &'a str {
    snapshot.data[part][field].as_str().unwrap_or_default()
}

fn object(snapshot: &DynamicObject) -> Value {
    let meta = &snapshot.metadata;
    json!({
        "Name": meta.name,
        "Id": meta.uid.as_deref().unwrap_or_default().replace('-', ""),
        "Created": meta.creation_timestamp.as_ref().map(|time| time.0.to_string()),
        "Container": snapshot.data["spec"]["podName"],
        "SizeLimit": snapshot.data["spec"]["sizeLimit"],
        "Labels": meta.labels,
        "Status": status(snapshot),
        "Message": ready(snapshot).map(|it| it["message"].clone()),
        "Taken": snapshot.data["status"]["creationTime"],
        "Size": snapshot.data["status"]["sizeBytes"],
    })
}

/// Names of the namespace's snapshots.
pub(crate) async fn names(cluster: &Cluster) -> Result<Vec<String>> {
    let all = api(cluster).list(&ListParams::default()).await?;
    Ok(all
        .items
        .into_iter()
        .filter_map(|it| it.metadata.name)
        .collect())
}

/// The pod that a snapshot was taken of, as it was.
pub(super) async fn template(cluster: &Cluster, name: &str) -> Result<Pod> {
    let snapshot = api(cluster).get_opt(name).await?;
    let snapshot = snapshot.ok_or_else(|| missing(name))?;
    if status(&snapshot) != "ready" {
        return Err(Failure::daemon(format_args!(
            "snapshot {name} is not ready"
        )));
    }
    let mut pod = snapshot.data["status"]["template"].clone();
    pod["metadata"]["name"] = snapshot.data["spec"]["podName"].clone();
    serde_json::from_value(pod).map_err(Failure::plain)
}

/// Runs one verb.
pub(crate) async fn run(cluster: &Cluster, command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Ls(options) => list(cluster, &options).await,
        SnapshotCommand::Create {
            size_limit,
            container,
            name,
        } => create(cluster, &container, name, size_limit).await,
        SnapshotCommand::Inspect { format, names } => {
            let mut objects = Vec::new();
            for name in names {
                let snapshot = api(cluster).get_opt(&name).await?;
                objects.push(object(&snapshot.ok_or_else(|| missing(&name))?));
            }
            print::print(&objects, format.as_deref())
        }
        SnapshotCommand::Rm { force, names } => {
            let api = &api(cluster);
            each(&names, |name| async move {
                match api.delete(&name, &DeleteParams::default()).await {
                    Ok(_) => Ok(Some(name)),
                    Err(kube::Error::Api(status)) if status.code == 404 && force => Ok(Some(name)),
                    Err(kube::Error::Api(status)) if status.code == 404 => Err(missing(&name)),
                    Err(error) => Err(error.into()),
                }
            })
            .await
        }
    }
}

async fn list(cluster: &Cluster, options: &ListOptions) -> Result<()> {
    let filters = Filters::parse(&options.filter, &["name", "label", "container"])?;
    let now = jiff::Timestamp::now();
    let mut rows = Vec::new();
    for snapshot in api(cluster).list(&ListParams::default()).await?.items {
        let labels: BTreeMap<String, String> = snapshot.metadata.labels.clone().unwrap_or_default();
        let name = snapshot.metadata.name.clone().unwrap_or_default();
        let container = text(&snapshot, "spec", "podName").to_owned();
        let kept = filters.any("name", |wanted| name.contains(wanted))
            && filters.any("container", |wanted| container == wanted)
            && filters.labels("label", &labels);
        if !kept {
            continue;
        }
        let created = snapshot.metadata.creation_timestamp.as_ref();
        let size = snapshot.data["status"]["sizeBytes"].as_u64();
        let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
        rows.push(Row::from([
            ("Name", name),
            ("Container", container),
            ("Size", size.map(units::decimal_bytes).unwrap_or_default()),
            ("Status", status(&snapshot)),
            (
                "CreatedSince",
                created
                    .map(|it| units::human_ago(it.0, now))
                    .unwrap_or_default(),
            ),
            (
                "CreatedAt",
                created
                    .map(|it| units::created_at(it.0))
                    .unwrap_or_default(),
            ),
            ("SizeLimit", text(&snapshot, "spec", "sizeLimit").to_owned()),
            ("Labels", labels.collect::<Vec<_>>().join(",")),
        ]));
    }
    terminal::out(&ROWS.print(&rows, options.format.as_deref(), options.quiet)?);
    Ok(())
}

/// Makes a snapshot and waits until it is whole. One that failed is removed.
async fn create(
    cluster: &Cluster,
    container: &str,
    name: Option<String>,
    size_limit: Option<String>,
) -> Result<()> {
    let source = clone::find_live(&cluster.containers().await?, container)?;
    clone::check_cluster(cluster, "snapshot").await?;
    let api = api(cluster);
    let name = name.unwrap_or_else(|| {
        let pod = naming::of_pod(source.pod_name());
        format!("{pod}-{}", naming::suffix())
    });
    let mut spec = json!({"podName": source.pod_name()});
    if let Some(limit) = size_limit {
        spec["sizeLimit"] = limit.into();
    }
    let snapshot: DynamicObject = serde_json::from_value(json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": KIND,
        "metadata": {"name": name}, "spec": spec,
    }))
    .map_err(Failure::plain)?;
    match api.create(&PostParams::default(), &snapshot).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            return Err(Failure::daemon(format_args!(
                "snapshot {name} already exists"
            )));
        }
        Err(error) => return Err(error.into()),
    }
    let Err(why) = taken(&api, &name).await? else {
        terminal::line(&name);
        return Ok(());
    };
    api.delete(&name, &DeleteParams::default()).await?;
    Err(Failure::daemon(format_args!(
        "Cannot take a snapshot of container {}: {why}",
        source.id
    )))
}

/// Waits until a snapshot is whole, or it is known why it is not.
async fn taken(api: &Api<DynamicObject>, name: &str) -> Result<std::result::Result<(), String>> {
    let mut changes = watch_object(api.clone(), name).boxed();
    while let Some(change) = changes.next().await {
        let snapshot = match change {
            Ok(snapshot) => snapshot,
            // The watch starts again by itself; what stays wrong, a request says.
            Err(_) => api.get_opt(name).await?,
        };
        let snapshot = snapshot.ok_or_else(|| missing(name))?;
        match ready(&snapshot) {
            Some(condition) if condition["status"] == "True" => return Ok(Ok(())),
            Some(condition) if condition["reason"] != "Taking" => {
                let message = condition["message"].as_str().unwrap_or_default();
                return Ok(Err(message.to_owned()));
            }
            _ => {}
        }
    }
    Err(Failure::plain("the connection to the cluster was lost"))
}

//! `volume`: PersistentVolumeClaims of the namespace, where the cluster serves them.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};

use super::{each, inspect as print};
use crate::{
    cli::VolumeCommand,
    cluster::Cluster,
    error::{Failure, Result},
    format::{Filters, Row, Rows},
    names, spec, terminal,
};

const ROWS: Rows<'_> = Rows {
    default: &["Driver", "Name"],
    headers: &[
        ("Driver", "DRIVER"),
        ("Name", "VOLUME NAME"),
        ("Labels", "LABELS"),
        ("Mountpoint", "MOUNTPOINT"),
        ("Scope", "SCOPE"),
        ("Size", "SIZE"),
        ("Status", "STATUS"),
    ],
    quiet: "Name",
};

/// A claim of docker's options.
pub(crate) fn claim(
    name: &str,
    size: &str,
    class: Option<&str>,
    labels: &[(String, String)],
) -> Result<PersistentVolumeClaim> {
    let labels: serde_json::Map<String, Value> = labels
        .iter()
        .map(|(key, value)| (key.clone(), value.clone().into()))
        .collect();
    let mut object = json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    });
    if let Some(class) = class {
        object["spec"]["storageClassName"] = class.into();
    }
    serde_json::from_value(object).map_err(Failure::plain)
}

async fn served(cluster: &Cluster) -> Result<()> {
    if cluster.serves("persistentvolumeclaims").await? {
        return Ok(());
    }
    Err(Failure::refused(
        "volume",
        "this cluster serves no persistent volumes; `run -v /PATH` is a volume that lives as long as the container",
    ))
}

fn object(claim: &PersistentVolumeClaim) -> Value {
    let spec = claim.spec.clone().unwrap_or_default();
    json!({
        "Name": claim.metadata.name,
        "CreatedAt": claim.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()),
        "Driver": spec.storage_class_name.clone().unwrap_or_else(|| "default".to_owned()),
        "Labels": claim.metadata.labels,
        "Mountpoint": "",
        "Options": {"size": spec.resources.and_then(|resources| resources.requests).and_then(|requests| requests.get("storage").map(|size| size.0.clone()))},
        "Scope": "global",
        "Status": {"phase": claim.status.as_ref().and_then(|status| status.phase.clone())},
    })
}

/// A volume for `hyper inspect`.
pub(crate) async fn inspect(cluster: &Cluster, name: &str) -> Result<Option<Value>> {
    match cluster.api::<PersistentVolumeClaim>().get_opt(name).await {
        Ok(claim) => Ok(claim.as_ref().map(object)),
        // A kind that is not served, or not for this user.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Runs one verb.
pub(crate) async fn run(cluster: &Cluster, command: VolumeCommand) -> Result<()> {
    served(cluster).await?;
    let api = cluster.api::<PersistentVolumeClaim>();
    match command {
        VolumeCommand::Ls(options) => {
            let filters = Filters::parse(&options.filter, &["name", "label", "driver"])?;
            let mut rows = Vec::new();
            for claim in api.list(&ListParams::default()).await?.items {
                let labels = claim.metadata.labels.clone().unwrap_or_default();
                let value = object(&claim);
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let (name, driver) = (text(&value["Name"]), text(&value["Driver"]));
                if filters.any("name", |wanted| name.contains(wanted))
                    && filters.any("driver", |wanted| wanted == driver)
                    && filters.labels("label", &labels)
                {
                    let labels: Vec<String> = labels
                        .iter()
                        .map(|(key, value)| format!("{key}={value}"))
                        .collect();
                    rows.push(Row::from([
                        ("Driver", driver),
                        ("Name", name),
                        ("Labels", labels.join(",")),
                        ("Mountpoint", String::new()),
                        ("Scope", "global".to_owned()),
                        ("Size", text(&value["Options"]["size"])),
                        ("Status", text(&value["Status"]["phase"])),
                    ]));
                }
            }
            terminal::out(&ROWS.print(&rows, options.format.as_deref(), options.quiet)?);
            Ok(())
        }
        VolumeCommand::Create { opt, label, name } => {
            let (mut size, mut class) = ("1Gi".to_owned(), None);
            for (key, value) in spec::key_values(&opt, "opt")? {
                match key.as_str() {
                    "size" => size = value,
                    "class" | "type" => class = Some(value),
                    other => {
                        return Err(Failure::daemon(format_args!(
                            "create: invalid option: \"{other}\"; the options are size and class"
                        )));
                    }
                }
            }
            let labels = spec::key_values(&label, "label")?;
            let name = name.unwrap_or_else(|| names::new_id().chars().take(32).collect());
            match api
                .create(
                    &PostParams::default(),
                    &claim(&name, &size, class.as_deref(), &labels)?,
                )
                .await
            {
                Ok(_) => {}
                // docker: a volume that is there already is fine.
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                Err(error) => return Err(error.into()),
            }
            terminal::line(&name);
            Ok(())
        }
        VolumeCommand::Inspect { format, names } => {
            let mut objects = Vec::new();
            for name in names {
                let claim = api
                    .get_opt(&name)
                    .await?
                    .ok_or_else(|| Failure::daemon(format_args!("get {name}: no such volume")))?;
                objects.push(object(&claim));
            }
            print::print(&objects, format.as_deref())
        }
        VolumeCommand::Rm { force, names } => {
            let users = cluster.containers().await?;
            let (api, users) = (&api, &users);
            each(&names, |name| async move {
                if let Some(user) = users
                    .iter()
                    .find(|container| super::list::mounts(container).contains(&name))
                {
                    return Err(Failure::daemon(format_args!(
                        "remove {name}: volume is in use - [{}]",
                        user.id
                    )));
                }
                match api.delete(&name, &DeleteParams::default()).await {
                    Ok(_) => Ok(Some(name)),
                    Err(kube::Error::Api(status)) if status.code == 404 && force => Ok(Some(name)),
                    Err(kube::Error::Api(status)) if status.code == 404 => {
                        Err(Failure::daemon(format_args!("get {name}: no such volume")))
                    }
                    Err(error) => Err(error.into()),
                }
            })
            .await
        }
    }
}

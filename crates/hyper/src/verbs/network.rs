//! `network`: objects of kind Network in the namespace.

use kube::{
    Api,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, PostParams},
};
use serde_json::{Value, json};

use super::{each, inspect as print};
use crate::{
    cli::NetworkCommand,
    cluster::Cluster,
    error::{Failure, Result},
    format::{Filters, Row, Rows},
    spec, terminal,
};

const ROWS: Rows<'_> = Rows {
    default: &["ID", "Name", "Driver", "Scope"],
    headers: &[
        ("ID", "NETWORK ID"),
        ("Name", "NAME"),
        ("Driver", "DRIVER"),
        ("Scope", "SCOPE"),
        ("IPv6", "IPV6"),
        ("Internal", "INTERNAL"),
        ("Labels", "LABELS"),
        ("CreatedAt", "CREATED AT"),
        ("Subnet", "SUBNET"),
    ],
    quiet: "ID",
};

const ONE_NETWORK: &str = "a container is on one network, which run --network chooses";

fn api(cluster: &Cluster) -> Api<DynamicObject> {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(
        "hypernetes.io",
        "v1alpha1",
        "Network",
    ));
    Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &kind)
}

fn id(network: &DynamicObject) -> String {
    network
        .metadata
        .uid
        .clone()
        .unwrap_or_default()
        .replace('-', "")
}

fn object(network: &DynamicObject) -> Value {
    json!({
        "Name": network.metadata.name,
        "Id": id(network),
        "Created": network.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()),
        "Scope": "local",
        "Driver": "hypernetes",
        "EnableIPv6": false,
        "IPAM": {"Driver": "default", "Config": [{"Subnet": network.data["spec"]["subnets"][0]["cidr"]}]},
        "Internal": false,
        "Labels": network.metadata.labels,
        "Status": network.data["status"],
    })
}

/// A network for `hyper inspect`.
pub(crate) async fn inspect(cluster: &Cluster, name: &str) -> Result<Option<Value>> {
    match api(cluster).get_opt(name).await {
        Ok(network) => Ok(network.as_ref().map(object)),
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Runs one verb.
pub(crate) async fn run(cluster: &Cluster, command: NetworkCommand) -> Result<()> {
    let api = api(cluster);
    match command {
        NetworkCommand::Ls(options) => {
            let filters = Filters::parse(&options.filter, &["name", "label", "driver", "id"])?;
            let mut rows = Vec::new();
            for network in api.list(&ListParams::default()).await?.items {
                let labels = network.metadata.labels.clone().unwrap_or_default();
                let (name, id) = (
                    network.metadata.name.clone().unwrap_or_default(),
                    id(&network),
                );
                let kept = filters.any("name", |wanted| name.contains(wanted))
                    && filters.any("id", |wanted| id.starts_with(wanted))
                    && filters.any("driver", |wanted| wanted == "hypernetes")
                    && filters.labels("label", &labels);
                if kept {
                    let labels: Vec<String> = labels
                        .iter()
                        .map(|(key, value)| format!("{key}={value}"))
                        .collect();
                    rows.push(Row::from([
                        (
                            "ID",
                            if options.no_trunc {
                                id
                            } else {
                                id.chars().take(12).collect()
                            },
                        ),
                        ("Name", name),
                        ("Driver", "hypernetes".to_owned()),
                        ("Scope", "local".to_owned()),
                        ("IPv6", "false".to_owned()),
                        ("Internal", "false".to_owned()),
                        ("Labels", labels.join(",")),
                        (
                            "CreatedAt",
                            network
                                .metadata
                                .creation_timestamp
                                .as_ref()
                                .map(|time| crate::units::created_at(time.0))
                                .unwrap_or_default(),
                        ),
                        (
                            "Subnet",
                            network.data["spec"]["subnets"][0]["cidr"]
                                .as_str()
                                .unwrap_or_default()
                                .to_owned(),
                        ),
                    ]));
                }
            }
            terminal::out(&ROWS.print(&rows, options.format.as_deref(), options.quiet)?);
            Ok(())
        }
        NetworkCommand::Create {
            subnet,
            driver,
            label,
            name,
        } => {
            if let Some(driver) =
                driver.filter(|driver| !matches!(driver.as_str(), "bridge" | "hypernetes"))
            {
                return Err(Failure::refused(
                    format_args!("network create --driver {driver}"),
                    "there is one kind of network, which is the tenant's own",
                ));
            }
            let subnet = subnet.ok_or_else(|| {
                Failure::usage("network create needs --subnet, such as 10.5.0.0/16")
            })?;
            let labels: serde_json::Map<String, Value> = spec::key_values(&label, "label")?
                .into_iter()
                .map(|(key, value)| (key, value.into()))
                .collect();
            let network: DynamicObject = serde_json::from_value(json!({
                "apiVersion": "hypernetes.io/v1alpha1", "kind": "Network",
                "metadata": {"name": name, "labels": labels}, "spec": {"subnets": [{"cidr": subnet}]},
            }))
            .map_err(Failure::plain)?;
            match api.create(&PostParams::default(), &network).await {
                Ok(network) => terminal::line(&id(&network)),
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                    return Err(Failure::daemon(format_args!(
                        "network with name {name} already exists"
                    )));
                }
                Err(error) => return Err(error.into()),
            }
            Ok(())
        }
        NetworkCommand::Inspect { format, names } => {
            let mut objects = Vec::new();
            for name in names {
                let network = api
                    .get_opt(&name)
                    .await?
                    .ok_or_else(|| Failure::daemon(format_args!("network {name} not found")))?;
                objects.push(object(&network));
            }
            print::print(&objects, format.as_deref())
        }
        NetworkCommand::Rm { force, names } => {
            let api = &api;
            each(&names, |name| async move {
                match api.delete(&name, &DeleteParams::default()).await {
                    Ok(_) => Ok(Some(name)),
                    Err(kube::Error::Api(status)) if status.code == 404 && force => Ok(Some(name)),
                    Err(kube::Error::Api(status)) if status.code == 404 => {
                        Err(Failure::daemon(format_args!("network {name} not found")))
                    }
                    Err(error) => Err(error.into()),
                }
            })
            .await
        }
        NetworkCommand::Connect(_) => Err(Failure::refused("network connect", ONE_NETWORK)),
        NetworkCommand::Disconnect(_) => Err(Failure::refused("network disconnect", ONE_NETWORK)),
    }
}

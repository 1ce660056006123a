//! Published ports: a Service of type LoadBalancer beside the pod.

use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;

use crate::{
    cluster::Cluster,
    error::{Failure, Result},
    meta,
    model::{Container, PublishedPort},
    names,
};

/// Label of the pods and the Service of one container: the first digits of its id.
pub(crate) const SHORT_ID: &str = "hyper.hypernetes.io/short-id";

/// Refuses before anything is made what cannot be published.
pub(crate) async fn check(cluster: &Cluster, ports: &[PublishedPort], name: &str) -> Result<()> {
    let Some(first) = ports.first() else {
        return Ok(());
    };
    if let Some(port) = ports
        .iter()
        .find(|port| !port.address.is_empty() && port.address != "0.0.0.0")
    {
        return Err(Failure::refused(
            format_args!("publishing on the address {}", port.address),
            format_args!(
                "for your own machine alone: kubectl port-forward pod/{} {}:{}",
                names::of_pod(name),
                port.host.max(1024),
                port.container
            ),
        ));
    }
    if cluster.serves("services").await? {
        return Ok(());
    }
    Err(Failure::refused(
        format_args!("-p {}:{}", first.host, first.container),
        format_args!(
            "this cluster serves no Services; for your own machine: kubectl port-forward pod/{} {}:{}",
            names::of_pod(name),
            if first.host == 0 {
                first.container
            } else {
                first.host
            },
            first.container
        ),
    ))
}

/// Makes the Service.
pub(crate) async fn publish(
    cluster: &Cluster,
    container: &Container,
    ports: &[PublishedPort],
) -> Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = ports
        .iter()
        .map(|port| {
            let host = if port.host == 0 { port.container } else { port.host };
            json!({"name": format!("p{host}-{}", port.protocol), "port": host, "targetPort": port.container, "protocol": port.protocol.to_ascii_uppercase()})
        })
        .collect();
    let service: Service = serde_json::from_value(json!({
        "metadata": {
            "name": format!("hyper-{}", container.short_id()),
            "labels": {SHORT_ID: container.short_id(), meta::NAME: container.name},
        },
        "spec": {"type": "LoadBalancer", "selector": {SHORT_ID: container.short_id()}, "ports": list},
    }))
    .map_err(Failure::plain)?;
    cluster
        .api::<Service>()
        .create(&PostParams::default(), &service)
        .await?;
    Ok(())
}

/// Removes the Service of a container that goes.
pub(crate) async fn withdraw(cluster: &Cluster, container: &Container) -> Result<()> {
    if container.ports().is_empty() {
        return Ok(());
    }
    let services = cluster.api::<Service>();
    let mine = ListParams::default().labels(&format!("{SHORT_ID}={}", container.short_id()));
    for service in services.list(&mine).await?.items {
        let name = service.metadata.name.unwrap_or_default();
        match services.delete(&name, &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Addresses under which the published ports are reached.
pub(crate) async fn addresses(cluster: &Cluster, container: &Container) -> Result<Vec<String>> {
    if container.ports().is_empty() {
        return Ok(Vec::new());
    }
    let mine = ListParams::default().labels(&format!("{SHORT_ID}={}", container.short_id()));
    let services = cluster.api::<Service>().list(&mine).await?;
    let ingress = services
        .items
        .into_iter()
        .filter_map(|service| service.status?.load_balancer?.ingress)
        .flatten();
    Ok(ingress
        .filter_map(|ingress| ingress.ip.or(ingress.hostname))
        .collect())
}

//! Published ports: ports of the machine, or a Service of type LoadBalancer beside the pod.

use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, ListParams, PostParams};
use rand::Rng as _;
use serde_json::{Value, json};

use crate::{
    cluster::Cluster,
    error::{Failure, Result},
    meta,
    model::{Container, PublishedPort},
    names,
};

/// Label of the pods and the Service of one container: the first digits of its id.
pub(crate) const SHORT_ID: &str = "hyper.hypernetes.io/short-id";

/// How ports are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// On the machine that the container runs on, as docker does.
    HostPort,
    /// On the address of a Service of type LoadBalancer.
    LoadBalancer,
}

/// The way for a cluster: one machine has ports of its own, many have load balancers.
pub(crate) async fn way(cluster: &Cluster, ports: &[PublishedPort]) -> Result<Way> {
    if ports.is_empty() || cluster.is_hypernetes().await? {
        return Ok(Way::HostPort);
    }
    if let Some(port) = ports
        .iter()
        .find(|port| !matches!(port.address.as_str(), "" | "0.0.0.0"))
    {
        return Err(Failure::refused(
            format_args!("publishing on the address {}", port.address),
            "a load balancer has one address; leave it out",
        ));
    }
    Ok(Way::LoadBalancer)
}

/// Writes ports of the machine into a pod; docker chooses those that are not said.
pub(crate) fn take_host_ports(pod: &mut Value, ports: &mut [PublishedPort]) {
    for port in ports.iter_mut() {
        if port.host == 0 {
            port.host = rand::rng().random_range(32_768..=60_999);
        }
    }
    let list = pod["spec"]["containers"][0]["ports"].as_array_mut();
    for listed in list.into_iter().flatten() {
        let same = |port: &&PublishedPort| {
            listed["containerPort"] == port.container
                && listed["protocol"] == port.protocol.to_ascii_uppercase()
        };
        if let Some(port) = ports.iter().find(same) {
            listed["hostPort"] = port.host.into();
            if !port.address.is_empty() {
                listed["hostIP"] = port.address.clone().into();
            }
        }
    }
    // One port of the container on several of the machine.
    let mut more = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let first = ports.iter().position(|other| {
            (other.container, &other.protocol) == (port.container, &port.protocol)
        });
        if first != Some(index) {
            let mut entry = json!({"containerPort": port.container, "protocol": port.protocol.to_ascii_uppercase(), "hostPort": port.host});
            if !port.address.is_empty() {
                entry["hostIP"] = port.address.clone().into();
            }
            more.push(entry);
        }
    }
    if let Some(list) = pod["spec"]["containers"][0]["ports"].as_array_mut() {
        list.extend(more);
    }
}

/// A refusal of ports of the machine, with what a tenant does instead.
pub(crate) fn explain(failure: Failure, ports: &[PublishedPort], name: &str) -> Failure {
    match ports.first() {
        Some(port)
            if failure.message.contains("hostPort") && failure.message.contains("tenant") =>
        {
            Failure::refused(
                format_args!("-p {}:{}", port.host, port.container),
                format_args!(
                    "the machine's ports are not a tenant's; other containers reach it without -p, and you by: kubectl port-forward pod/{} {}:{}",
                    names::of_pod(name),
                    port.host,
                    port.container
                ),
            )
        }
        _ => failure,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host: u16, container: u16) -> PublishedPort {
        PublishedPort {
            host,
            container,
            protocol: "tcp".to_owned(),
            address: String::new(),
        }
    }

    #[test]
    fn ports_of_the_machine_are_written_into_the_pod() {
        let mut pod = json!({"spec": {"containers": [{"ports": [{"containerPort": 80, "protocol": "TCP"}, {"containerPort": 9, "protocol": "TCP"}]}]}});
        let mut ports = [port(8080, 80), port(8081, 80)];
        ports[1].address = "127.0.0.1".to_owned();
        take_host_ports(&mut pod, &mut ports);
        assert_eq!(
            pod["spec"]["containers"][0]["ports"],
            json!([
                {"containerPort": 80, "protocol": "TCP", "hostPort": 8080},
                {"containerPort": 9, "protocol": "TCP"},
                {"containerPort": 80, "protocol": "TCP", "hostPort": 8081, "hostIP": "127.0.0.1"},
            ])
        );
        let mut any = [port(0, 80)];
        take_host_ports(&mut pod, &mut any);
        assert!(any[0].host >= 32_768);
    }

    #[test]
    fn a_tenant_is_told_what_to_do_instead() {
        let refused = Failure::daemon(
            "pods \"web\" is forbidden: spec.containers[0].ports[0].hostPort: a tenant's pod may not take ports of the node",
        );
        let told = explain(refused, &[port(8080, 80)], "web");
        assert_eq!(told.code, 125);
        assert!(
            told.message
                .ends_with("kubectl port-forward pod/web 8080:80"),
            "{told}"
        );
    }
}

//! Creating a container: its pod, and what the pod needs beside itself.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use kube::api::{ListParams, PostParams};
use serde_json::{Value, json};

use super::publish;
use crate::{
    cli::Create,
    cluster::Cluster,
    error::{Failure, OWN, Result},
    meta,
    model::{self, Container},
    names,
    spec::{self, Identity, Plan},
};

/// How often another name is tried.
const TRIES: usize = 8;

/// What the caller says of a new container.
#[derive(Debug, Clone, Default)]
pub(crate) struct Launch {
    /// Nobody stays attached.
    pub(crate) detached: bool,
    /// It is not to be started yet.
    pub(crate) gated: bool,
    /// Labels of the pod beside those of the flags.
    pub(crate) labels: Vec<(&'static str, String)>,
    /// Annotations of the pod beside those of the flags.
    pub(crate) annotations: Vec<(&'static str, String)>,
}

/// Creates a container. Every failure is hyper's own: 125.
pub(crate) async fn create(
    cluster: &Cluster,
    options: &Create,
    launch: &Launch,
) -> Result<Container> {
    Box::pin(make(cluster, options, launch))
        .await
        .map_err(|error| error.with_code(OWN))
}

async fn make(cluster: &Cluster, options: &Create, launch: &Launch) -> Result<Container> {
    for stream in &options.attach {
        if !matches!(
            stream.to_ascii_lowercase().as_str(),
            "stdin" | "stdout" | "stderr"
        ) {
            return Err(Failure::usage("valid streams are STDIN, STDOUT and STDERR"));
        }
    }
    if let Some(name) = &options.name {
        names::check(name)?;
    }
    let existing = cluster.containers().await?;
    let mut identity = Identity {
        name: String::new(),
        id: names::new_id(),
        created: Timestamp::now(),
        detached: launch.detached,
    };
    identity.name = match &options.name {
        Some(name) => name.trim_start_matches('/').to_owned(),
        None => (0..TRIES)
            .map(|_| names::generate())
            .find(|name| existing.iter().all(|container| container.name != *name))
            .unwrap_or_else(|| format!("{}-{}", names::generate(), names::suffix())),
    };
    conflict(&existing, &identity.name)?;
    let mut plan = spec::plan(options, &identity)?;
    if let Some(flag) = plan.needs_hypernetes
        && !cluster.is_hypernetes().await?
    {
        return Err(Failure::refused(
            flag,
            "the cluster's nodes do not count restarts; use on-failure",
        ));
    }
    let way = publish::way(cluster, &plan.ports).await?;
    if way == publish::Way::HostPort && !plan.ports.is_empty() {
        publish::take_host_ports(&mut plan.pod, &mut plan.ports);
        plan.pod["metadata"]["annotations"][meta::PORTS] = json!(plan.ports).to_string().into();
    }
    claims(cluster, &plan).await?;
    if launch.gated {
        plan.pod["spec"]["schedulingGates"] = json!([{"name": meta::GATE}]);
    }
    plan.pod["metadata"]["labels"][publish::SHORT_ID] = identity.id[..12].into();
    for (key, value) in &launch.labels {
        plan.pod["metadata"]["labels"][key] = value.clone().into();
    }
    for (key, value) in &launch.annotations {
        plan.pod["metadata"]["annotations"][key] = value.clone().into();
    }
    let secrets = pull_secrets(cluster).await?;
    if !secrets.is_empty() {
        plan.pod["spec"]["imagePullSecrets"] = secrets.into();
    }
    let pod = post(cluster, plan.pod, &identity.name)
        .await
        .map_err(|error| publish::explain(error, &plan.ports, &identity.name))?;
    let container = model::containers(vec![pod])
        .pop()
        .ok_or_else(|| Failure::plain("the server answered without a container"))?;
    if way == publish::Way::LoadBalancer
        && let Err(error) = publish::publish(cluster, &container, &plan.ports).await
    {
        cluster.remove(&container, Some(0)).await?;
        return Err(error);
    }
    if let Some(path) = &options.cidfile {
        std::fs::write(path, &container.id).map_err(|error| {
            Failure::plain(format_args!(
                "failed to write the container ID to the file: {error}"
            ))
        })?;
    }
    Ok(container)
}

fn conflict(existing: &[Container], name: &str) -> Result<()> {
    match existing.iter().find(|container| container.name == name) {
        None => Ok(()),
        Some(other) => Err(conflict_with(other, name)),
    }
}

/// The name is another container's.
pub(super) fn conflict_with(other: &Container, name: &str) -> Failure {
    Failure::daemon(format_args!(
        "Conflict. The container name \"/{name}\" is already in use by container \"{}\". You have to remove (or rename) that container to be able to reuse that name.",
        other.id
    ))
}

/// Creates the pod. Its name can be another container's that was renamed: then it gets an ending.
pub(crate) async fn post(cluster: &Cluster, mut pod: Value, name: &str) -> Result<Pod> {
    let base = pod["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    for _try in 0..TRIES {
        let object: Pod = serde_json::from_value(pod.clone()).map_err(Failure::plain)?;
        match cluster.pods().create(&PostParams::default(), &object).await {
            Ok(pod) => return Ok(pod),
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                conflict(&cluster.containers().await?, name)?;
                pod["metadata"]["name"] = format!("{base}-{}", names::suffix()).into();
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::daemon(format_args!(
        "no name is left for a pod of container {name}"
    )))
}

/// Secrets that `login` made in the namespace.
async fn pull_secrets(cluster: &Cluster) -> Result<Vec<Value>> {
    let names = pull_secret_names(cluster).await?;
    Ok(names
        .into_iter()
        .map(|name| json!({"name": name}))
        .collect())
}

/// Their names.
pub(super) async fn pull_secret_names(cluster: &Cluster) -> Result<Vec<String>> {
    let secrets = cluster.api::<Secret>();
    match secrets
        .list(&ListParams::default().labels(meta::REGISTRY))
        .await
    {
        Ok(list) => Ok(list
            .items
            .into_iter()
            .filter_map(|secret| secret.metadata.name)
            .collect()),
        // Who may not read Secrets has not logged in with them.
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Named volumes are claims; one that is not there is made.
async fn claims(cluster: &Cluster, plan: &Plan) -> Result<()> {
    if plan.claims.is_empty() {
        return Ok(());
    }
    if !cluster.serves("persistentvolumeclaims").await? {
        return Err(Failure::refused(
            format_args!("the named volume {}", plan.claims[0].name),
            "this cluster serves no persistent volumes; `-v /PATH` is a volume that lives as long as the container",
        ));
    }
    let api = cluster.api::<PersistentVolumeClaim>();
    for claim in &plan.claims {
        if api.get_opt(&claim.name).await?.is_none() {
            let object = super::volume::claim(&claim.name, "1Gi", None, &[])?;
            api.create(&PostParams::default(), &object).await?;
        }
    }
    Ok(())
}

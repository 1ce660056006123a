//! `compose up`: from what the file says to containers.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service as KubeService;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;
use sha2::Digest as _;

use super::{CONFIG, NUMBER, containers, number_of, progress, service_of};
use crate::{
    cli::Up,
    cluster::Cluster,
    compose::{Condition, Project, Service},
    error::{Failure, Result},
    logs::Query,
    meta,
    model::{self, Container, State},
    terminal,
    verbs::{
        launch::{self, Launch},
        lifecycle, run as start, watch,
    },
};

/// `up`.
pub(crate) async fn run(cluster: &Cluster, project: &Project, options: &Up) -> Result<()> {
    if options.force_recreate && options.no_recreate {
        return Err(Failure::usage(
            "--force-recreate and --no-recreate are incompatible",
        ));
    }
    project.check(&options.services)?;
    let order = match (options.services.as_slice(), options.no_deps) {
        ([], _) => project.order(None)?,
        (only, false) => project.order(Some(only))?,
        (only, true) => only.to_vec(),
    };
    let replicas = scales(project, &options.scale)?;
    names(cluster, project, &order).await?;
    orphans(cluster, project, options.remove_orphans).await?;
    let mut mine = Vec::new();
    for name in &order {
        let service = &project.services[name];
        if !options.no_deps {
            for (dependency, condition) in &service.depends_on {
                wait_for(cluster, project, dependency, *condition).await?;
            }
        }
        let wanted = replicas.get(name).copied().unwrap_or(service.replicas);
        mine.extend(Box::pin(ensure(cluster, project, name, service, wanted, options)).await?);
    }
    if options.wait {
        for name in &order {
            let condition = if project.services[name].create.health_cmd.is_some() {
                Condition::Healthy
            } else {
                Condition::Started
            };
            wait_for(cluster, project, name, condition).await?;
        }
    }
    if options.detach || options.wait {
        return Ok(());
    }
    stay(cluster, &mine, options.timeout).await
}

/// Shows output until all has ended or the user has seen enough; then everything is stopped.
async fn stay(cluster: &Cluster, mine: &[Container], timeout: Option<i64>) -> Result<()> {
    let names: Vec<&str> = mine
        .iter()
        .map(|container| container.name.as_str())
        .collect();
    terminal::note(&format!("Attaching to {}", names.join(", ")));
    let query = Query {
        follow: true,
        split: cluster.is_hypernetes().await?,
        ..Query::default()
    };
    let current: Vec<Container> = mine
        .iter()
        .map(|container| Container {
            earlier: Vec::new(),
            ..container.clone()
        })
        .collect();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        printed = super::print_logs(cluster, &current, &query, true) => printed,
        _ = tokio::signal::ctrl_c() => leave(cluster, mine, timeout).await,
        _ = terminate.recv() => leave(cluster, mine, timeout).await,
    }
}

async fn leave(cluster: &Cluster, mine: &[Container], timeout: Option<i64>) -> Result<()> {
    terminal::note("Gracefully stopping...");
    for container in mine.iter().rev() {
        lifecycle::stop_container(cluster, container, timeout).await?;
        progress(&container.name, "Stopped");
    }
    Err(Failure::exit(130))
}

fn scales(project: &Project, given: &[String]) -> Result<BTreeMap<String, u32>> {
    let mut scales = BTreeMap::new();
    for text in given {
        let wrong = || {
            Failure::usage(format_args!(
                "invalid --scale option \"{text}\". Should be SERVICE=NUM"
            ))
        };
        let (name, count) = text.split_once('=').ok_or_else(wrong)?;
        project.check(&[name.to_owned()])?;
        scales.insert(name.to_owned(), count.parse().map_err(|_bad| wrong())?);
    }
    Ok(scales)
}

/// A digest of all that makes a container what it is.
fn config_of(service: &Service) -> String {
    // Debug prints every field.
    let digest = sha2::Sha256::digest(format!("{:?}", service.create).as_bytes());
    digest
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn name_of(project: &Project, name: &str, service: &Service, number: u32) -> String {
    service
        .container_name
        .clone()
        .unwrap_or_else(|| format!("{}-{name}-{number}", project.name))
}

/// Has as many containers of a service as are wanted, as the file says.
async fn ensure(
    cluster: &Cluster,
    project: &Project,
    name: &str,
    service: &Service,
    wanted: u32,
    options: &Up,
) -> Result<Vec<Container>> {
    let all = containers(cluster, &project.name).await?;
    let (kept, surplus): (Vec<_>, Vec<_>) = all
        .into_iter()
        .filter(|container| service_of(container) == name)
        .partition(|container| (1..=wanted).contains(&number_of(container)));
    for container in surplus {
        lifecycle::stop_container(cluster, &container, options.timeout).await?;
        super::remove(cluster, &cluster.find(&container.id).await?).await?;
        progress(&container.name, "Removed");
    }
    let mut mine = Vec::new();
    for number in 1..=wanted {
        let mut create = service.create.clone();
        create.name = Some(name_of(project, name, service, number));
        if let Some(pull) = &options.pull {
            create.pull.clone_from(pull);
        }
        let config = config_of(service);
        let old = kept.iter().find(|container| number_of(container) == number);
        if let Some(old) = old {
            let same = model::annotation(&old.pod, CONFIG) == Some(config.as_str());
            if (same && !options.force_recreate) || options.no_recreate {
                match old.state() {
                    State::Paused => crate::verbs::pause::set(cluster, old, false).await?,
                    State::Suspended => {
                        crate::verbs::pause::set_suspended(cluster, old, false).await?;
                    }
                    _ => {}
                }
                if old.state().is_up() {
                    progress(&old.name, "Running");
                    mine.push(old.clone());
                } else {
                    mine.push(begin(cluster, &lifecycle::start_one(cluster, old).await?).await?);
                }
                continue;
            }
            lifecycle::stop_container(cluster, old, options.timeout).await?;
            super::remove(cluster, &cluster.find(&old.id).await?).await?;
            progress(&old.name, "Recreate");
        }
        let launch = Launch {
            detached: true,
            gated: false,
            labels: vec![
                (meta::PROJECT, project.name.clone()),
                (meta::SERVICE, name.to_owned()),
            ],
            annotations: vec![(NUMBER, number.to_string()), (CONFIG, config)],
        };
        let container = launch::create(cluster, &create, &launch).await?;
        progress(&container.name, "Created");
        mine.push(begin(cluster, &container).await?);
    }
    Ok(mine)
}

/// Waits for the start. What cannot start is removed again.
async fn begin(cluster: &Cluster, container: &Container) -> Result<Container> {
    match start::start(cluster, container, true).await? {
        Ok(container) => {
            progress(&container.name, "Started");
            Ok(container)
        }
        Err(failure) => {
            super::remove(cluster, container).await?;
            Err(failure)
        }
    }
}

/// Waits until a service that others depend on is as they want it.
async fn wait_for(
    cluster: &Cluster,
    project: &Project,
    name: &str,
    condition: Condition,
) -> Result<()> {
    for container in containers(cluster, &project.name).await? {
        if service_of(&container) != name {
            continue;
        }
        if condition == Condition::Healthy && container.health().is_none() {
            return Err(Failure::plain(format_args!(
                "dependency failed to start: container {} has no healthcheck configured",
                container.name
            )));
        }
        if condition != Condition::Started {
            progress(&container.name, "Waiting");
        }
        let bad = watch::until(cluster, &container, |now| {
            let Some(now) = now else {
                return Some(Some("is gone".to_owned()));
            };
            match (condition, now.state()) {
                (Condition::Started, State::Running | State::Exited) => Some(None),
                (Condition::Healthy, State::Running) if now.health() == Some("healthy") => {
                    Some(None)
                }
                (Condition::Completed, State::Exited) if now.exit_code() == 0 => Some(None),
                (Condition::Healthy | Condition::Completed, State::Exited) => {
                    Some(Some(format!("exited ({})", now.exit_code())))
                }
                (_, State::Dead | State::Removing) => Some(Some("cannot start".to_owned())),
                _ => None,
            }
        })
        .await?;
        if let Some(bad) = bad {
            return Err(Failure::plain(format_args!(
                "dependency failed to start: container {} {bad}",
                container.name
            )));
        }
        match condition {
            Condition::Healthy => progress(&container.name, "Healthy"),
            Condition::Completed => progress(&container.name, "Exited"),
            Condition::Started => {}
        }
    }
    Ok(())
}

async fn orphans(cluster: &Cluster, project: &Project, remove: bool) -> Result<()> {
    for container in containers(cluster, &project.name).await? {
        if project.services.contains_key(service_of(&container)) {
            continue;
        }
        if remove {
            super::remove(cluster, &container).await?;
            progress(&container.name, "Removed");
        } else {
            terminal::note(&format!(
                "Found orphan container {} for this project. If you removed or renamed this service in your compose file, you can run this command with the --remove-orphans flag to clean it up.",
                container.name
            ));
        }
    }
    Ok(())
}

/// Services find each other by name: a headless Service for each, where the cluster serves them.
async fn names(cluster: &Cluster, project: &Project, order: &[String]) -> Result<()> {
    if !cluster.serves("services").await? {
        if order.len() > 1 {
            terminal::note(
                "hyper: this cluster serves no Services: containers do not find each other by name",
            );
        }
        return Ok(());
    }
    let api = cluster.api::<KubeService>();
    for name in order {
        let service: KubeService = serde_json::from_value(json!({
            "metadata": {"name": name.replace('_', "-").to_ascii_lowercase(), "labels": {meta::PROJECT: project.name, meta::SERVICE: name}},
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": true, "selector": {meta::PROJECT: project.name, meta::SERVICE: name}},
        }))
        .map_err(Failure::plain)?;
        match api.create(&PostParams::default(), &service).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                let kube_name = service.metadata.name.unwrap_or_default();
                let there = api.get(&kube_name).await?;
                let owner = there
                    .metadata
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(meta::PROJECT));
                if owner != Some(&project.name) {
                    return Err(Failure::plain(format_args!(
                        "the name {kube_name} is taken in namespace {} by a Service that is not of project {}: one namespace has each name once",
                        cluster.namespace, project.name
                    )));
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Removes the Services of a project.
pub(crate) async fn remove_names(cluster: &Cluster, project: &str) -> Result<()> {
    if !cluster.serves("services").await? {
        return Ok(());
    }
    let api = cluster.api::<KubeService>();
    let mine = ListParams::default().labels(&format!("{}={project}", meta::PROJECT));
    for service in api.list(&mine).await?.items {
        match api
            .delete(
                &service.metadata.name.unwrap_or_default(),
                &DeleteParams::default(),
            )
            .await
        {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

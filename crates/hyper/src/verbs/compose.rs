//! `compose`, `up` and `down`.

mod up;

use serde_json::Value;

use super::{exec, images, lifecycle, list, publish};
use crate::{
    cli::{ComposeCommand, ComposeFiles, Down, Services, Up},
    cluster::{Cluster, Target},
    compose::{self, Project},
    error::{Failure, Result},
    format::{Row, Rows},
    logs::Query,
    meta,
    model::{self, Container},
    spec, terminal, units,
};

/// Annotation: which container of its service it is.
pub(crate) const NUMBER: &str = "hyper.hypernetes.io/number";
/// Annotation: digest of what the file said when the container was made.
pub(crate) const CONFIG: &str = "hyper.hypernetes.io/config";

/// The containers of a project, by service and number.
pub(crate) async fn containers(cluster: &Cluster, project: &str) -> Result<Vec<Container>> {
    let mut mine: Vec<Container> = cluster
        .containers()
        .await?
        .into_iter()
        .filter(|container| model::label(&container.pod, meta::PROJECT) == Some(project))
        .collect();
    mine.sort_by_key(|container| (service_of(container).to_owned(), number_of(container)));
    Ok(mine)
}

pub(crate) fn service_of(container: &Container) -> &str {
    model::label(&container.pod, meta::SERVICE).unwrap_or_default()
}

pub(crate) fn number_of(container: &Container) -> u32 {
    model::annotation(&container.pod, NUMBER)
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

/// A line of progress, as compose prints them.
pub(crate) fn progress(container: &str, what: &str) {
    terminal::note(&format!(" Container {container}  {what}"));
}

/// Those of some services; all if none is named.
async fn chosen(
    cluster: &Cluster,
    project: &Project,
    services: &[String],
) -> Result<Vec<Container>> {
    project.check(services)?;
    let all = containers(cluster, &project.name).await?;
    Ok(all
        .into_iter()
        .filter(|container| {
            services.is_empty()
                || services
                    .iter()
                    .any(|service| service == service_of(container))
        })
        .collect())
}

/// Runs one verb.
pub(crate) async fn run(
    target: &Target,
    files: &ComposeFiles,
    command: ComposeCommand,
) -> Result<()> {
    if let ComposeCommand::Ls { format, quiet, all } = &command {
        return projects(&target.connect().await?, format.as_deref(), *quiet, *all).await;
    }
    let project = compose::load(files)?;
    if let ComposeCommand::Config {
        format,
        services,
        quiet,
    } = &command
    {
        return config(&project, format, *services, *quiet);
    }
    let cluster = &target.connect().await?;
    match command {
        ComposeCommand::Up(options) => Box::pin(up::run(cluster, &project, &options)).await,
        ComposeCommand::Scale { no_deps, scales } => {
            let options = scaled(no_deps, scales)?;
            Box::pin(up::run(cluster, &project, &options)).await
        }
        ComposeCommand::Down(options) => Box::pin(down(cluster, &project, &options)).await,
        ComposeCommand::Ps {
            all,
            format,
            quiet,
            services,
            only,
        } => {
            let found = chosen(cluster, &project, &only).await?;
            let found: Vec<_> = found
                .into_iter()
                .filter(|container| all || container.state().is_up())
                .collect();
            ps(&found, format.as_deref(), quiet, services)
        }
        ComposeCommand::Logs {
            follow,
            tail,
            timestamps,
            since,
            until,
            no_log_prefix,
            services,
        } => {
            let now = jiff::Timestamp::now();
            let time = |text: &Option<String>| {
                text.as_deref()
                    .map(|text| units::parse_time(text, now))
                    .transpose()
            };
            let query = Query {
                follow,
                since: time(&since)?,
                until: time(&until)?,
                tail: super::logs::tail(&tail),
                timestamps,
                split: cluster.is_hypernetes().await?,
                prefix: String::new(),
            };
            let found = chosen(cluster, &project, &services).await?;
            print_logs(cluster, &found, &query, !no_log_prefix).await
        }
        ComposeCommand::Exec {
            detach,
            env,
            index,
            no_tty,
            workdir,
            service_and_command,
        } => {
            let (service, command) = service_and_command
                .split_first()
                .ok_or_else(|| Failure::usage("a service and a command are needed"))?;
            project.check(std::slice::from_ref(service))?;
            let found = containers(cluster, &project.name).await?;
            let container = found
                .into_iter()
                .find(|container| service_of(container) == service && number_of(container) == index)
                .ok_or_else(|| {
                    Failure::plain(format_args!("service \"{service}\" is not running"))
                })?;
            let tty = !no_tty && terminal::stdin_is_terminal();
            let options = crate::cli::Exec {
                detach,
                detach_keys: "ctrl-p,ctrl-q".to_owned(),
                env,
                env_file: Vec::new(),
                interactive: true,
                privileged: false,
                tty,
                user: None,
                workdir,
                container_and_command: Vec::new(),
            };
            exec::in_container(cluster, &container, &options, command).await
        }
        ComposeCommand::Start(options) => {
            for container in chosen(cluster, &project, &options.services).await? {
                lifecycle::start_one(cluster, &container).await?;
                progress(&container.name, "Started");
            }
            Ok(())
        }
        ComposeCommand::Stop(options) => stop(cluster, &project, &options).await,
        ComposeCommand::Restart(options) => {
            for container in chosen(cluster, &project, &options.services).await? {
                lifecycle::restart_one(cluster, &container, options.timeout).await?;
                progress(&container.name, "Started");
            }
            Ok(())
        }
        ComposeCommand::Kill { signal, services } => {
            let name = spec::signal(&signal)?;
            for container in chosen(cluster, &project, &services).await? {
                if container.state().is_up() {
                    lifecycle::kill_one(cluster, &container, &name).await?;
                    progress(&container.name, "Killed");
                }
            }
            Ok(())
        }
        ComposeCommand::Rm {
            force: _,
            stop: first,
            services,
        } => {
            for container in chosen(cluster, &project, &services).await? {
                if first {
                    lifecycle::stop_container(cluster, &container, None).await?;
                } else if !container.state().is_over() {
                    continue;
                }
                lifecycle::remove_one(cluster, &cluster.find(&container.id).await?, false).await?;
                progress(&container.name, "Removed");
            }
            Ok(())
        }
        ComposeCommand::Pull { services } => {
            project.check(&services)?;
            for (name, service) in &project.services {
                if services.is_empty() || services.contains(name) {
                    images::fetch(
                        cluster,
                        service.create.image(),
                        service.create.platform.as_deref(),
                        true,
                    )
                    .await?;
                    terminal::note(&format!(" {name} Pulled"));
                }
            }
            Ok(())
        }
        ComposeCommand::Ls { .. } | ComposeCommand::Config { .. } => Ok(()),
    }
}

fn config(project: &Project, format: &str, services: bool, quiet: bool) -> Result<()> {
    if quiet {
        return Ok(());
    }
    if services {
        for name in project.order(None)? {
            terminal::line(&name);
        }
        return Ok(());
    }
    let whole: &Value = &project.whole;
    match format {
        "json" => terminal::line(&serde_json::to_string_pretty(whole).map_err(Failure::plain)?),
        "yaml" => terminal::out(&serde_saphyr::to_string(whole).map_err(Failure::plain)?),
        other => {
            return Err(Failure::usage(format_args!(
                "unsupported format \"{other}\""
            )));
        }
    }
    Ok(())
}

/// `scale` is an `up` of the named services that leaves what is there.
fn scaled(no_deps: bool, scale: Vec<String>) -> Result<Up> {
    let mut services = Vec::new();
    for text in &scale {
        let (service, _) = text
            .split_once('=')
            .ok_or_else(|| Failure::plain(format_args!("invalid scale specifier: {text}")))?;
        services.push(service.to_owned());
    }
    Ok(Up {
        detach: true,
        wait: false,
        force_recreate: false,
        no_recreate: true,
        no_deps,
        remove_orphans: false,
        scale,
        pull: None,
        timeout: None,
        services,
    })
}

async fn stop(cluster: &Cluster, project: &Project, options: &Services) -> Result<()> {
    let mut found = chosen(cluster, project, &options.services).await?;
    let order = project.order(None)?;
    // What others depend on stops last.
    found.sort_by_key(|container| {
        std::cmp::Reverse(order.iter().position(|name| name == service_of(container)))
    });
    for container in found {
        lifecycle::stop_container(cluster, &container, options.timeout).await?;
        progress(&container.name, "Stopped");
    }
    Ok(())
}

async fn down(cluster: &Cluster, project: &Project, options: &Down) -> Result<()> {
    project.check(&options.services)?;
    let order = project.order(None)?;
    let mut found: Vec<Container> = containers(cluster, &project.name)
        .await?
        .into_iter()
        .filter(|container| {
            let service = service_of(container);
            match options.services.as_slice() {
                [] => options.remove_orphans || project.services.contains_key(service),
                only => only.iter().any(|name| name == service),
            }
        })
        .collect();
    found.sort_by_key(|container| {
        std::cmp::Reverse(order.iter().position(|name| name == service_of(container)))
    });
    for container in found {
        lifecycle::stop_container(cluster, &container, options.timeout).await?;
        if let Ok(now) = cluster.find(&container.id).await {
            lifecycle::remove_one(cluster, &now, true).await?;
        }
        progress(&container.name, "Removed");
    }
    if options.services.is_empty() {
        up::remove_names(cluster, &project.name).await?;
        if options.volumes
            && !project.volumes.is_empty()
            && cluster.serves("persistentvolumeclaims").await?
        {
            let api = cluster.api::<k8s_openapi::api::core::v1::PersistentVolumeClaim>();
            for name in &project.volumes {
                match api.delete(name, &kube::api::DeleteParams::default()).await {
                    Ok(_) => terminal::note(&format!(" Volume {name}  Removed")),
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    Ok(())
}

const ROWS: Rows<'_> = Rows {
    default: &[
        "Name",
        "Image",
        "Command",
        "Service",
        "RunningFor",
        "Status",
        "Ports",
    ],
    headers: &[
        ("ID", "CONTAINER ID"),
        ("Name", "NAME"),
        ("Names", "NAMES"),
        ("Image", "IMAGE"),
        ("Command", "COMMAND"),
        ("Service", "SERVICE"),
        ("Project", "PROJECT"),
        ("RunningFor", "CREATED"),
        ("State", "STATE"),
        ("Status", "STATUS"),
        ("ExitCode", "EXIT CODE"),
        ("Ports", "PORTS"),
    ],
    quiet: "ID",
};

fn ps(found: &[Container], format: Option<&str>, quiet: bool, services: bool) -> Result<()> {
    if services {
        let names: std::collections::BTreeSet<&str> = found.iter().map(service_of).collect();
        names.into_iter().for_each(terminal::line);
        return Ok(());
    }
    let now = jiff::Timestamp::now();
    let rows: Vec<Row> = found
        .iter()
        .map(|container| {
            let mut row = list::row(container, false, now);
            row.insert("Name", container.name.clone());
            row.insert("Service", service_of(container).to_owned());
            row.insert(
                "Project",
                model::label(&container.pod, meta::PROJECT)
                    .unwrap_or_default()
                    .to_owned(),
            );
            row.insert("ExitCode", container.exit_code().to_string());
            row
        })
        .collect();
    terminal::out(&ROWS.print(&rows, format, quiet)?);
    Ok(())
}

/// Logs of several containers at once, each line with its container's name.
pub(crate) async fn print_logs(
    cluster: &Cluster,
    found: &[Container],
    query: &Query,
    prefix: bool,
) -> Result<()> {
    let short = |container: &Container| {
        let service = service_of(container);
        format!("{service}-{}", number_of(container))
    };
    let width = found
        .iter()
        .map(|container| short(container).len())
        .max()
        .unwrap_or(0);
    let prints = found.iter().enumerate().map(|(index, container)| {
        let name = short(container);
        let text = match (prefix, terminal::colours()) {
            (false, _) => String::new(),
            (true, false) => format!("{name:<width$}  | "),
            (true, true) => format!("\x1b[{}m{name:<width$}  |\x1b[0m ", 31 + (index + 5) % 6),
        };
        let query = Query {
            prefix: text,
            ..query.clone()
        };
        super::logs::of_container(cluster, container, query)
    });
    futures::future::join_all(prints)
        .await
        .into_iter()
        .collect()
}

const PROJECTS: Rows<'_> = Rows {
    default: &["Name", "Status"],
    headers: &[("Name", "NAME"), ("Status", "STATUS")],
    quiet: "Name",
};

async fn projects(cluster: &Cluster, format: Option<&str>, quiet: bool, all: bool) -> Result<()> {
    let mut counts =
        std::collections::BTreeMap::<String, std::collections::BTreeMap<&str, usize>>::new();
    for container in cluster.containers().await? {
        if let Some(project) = model::label(&container.pod, meta::PROJECT) {
            *counts
                .entry(project.to_owned())
                .or_default()
                .entry(container.state().as_str())
                .or_default() += 1;
        }
    }
    let rows: Vec<Row> = counts
        .into_iter()
        .filter(|(_, states)| all || states.contains_key("running"))
        .map(|(name, states)| {
            let states: Vec<String> = states
                .into_iter()
                .map(|(state, count)| format!("{state}({count})"))
                .collect();
            Row::from([("Name", name), ("Status", states.join(", "))])
        })
        .collect();
    terminal::out(&PROJECTS.print(&rows, format, quiet)?);
    Ok(())
}

/// Withdraws what is published of a container and removes it.
pub(crate) async fn remove(cluster: &Cluster, container: &Container) -> Result<()> {
    publish::withdraw(cluster, container).await?;
    lifecycle::remove_one(cluster, container, true).await
}

//! `version` and `info`.

use serde_json::{Value, json};

use crate::{
    cli::Format,
    cluster::Target,
    error::{Failure, Result},
    format::render,
    model::State,
    terminal,
};

/// Docker's command line that flags, outputs and exit codes follow.
const DOCKER: &str = "28";

/// `version`.
pub(crate) async fn version(target: &Target, options: &Format) -> Result<()> {
    let context = target
        .read()
        .ok()
        .and_then(|config| target.context.clone().or(config.current_context))
        .unwrap_or_default();
    let client = json!({
        "Version": hypernetes_telemetry::VERSION, "DockerVersion": DOCKER, "ApiVersion": "v1", "Os": "linux", "Arch": std::env::consts::ARCH, "Context": context,
    });
    let server = async {
        let cluster = target.connect().await?;
        let version = cluster.client.apiserver_version().await?;
        Ok::<Value, Failure>(json!({
            "Version": version.git_version, "ApiVersion": format!("{}.{}", version.major, version.minor), "Os": version.platform.split('/').next().unwrap_or("linux"),
            "Arch": version.platform.split('/').nth(1).unwrap_or_default(), "GitCommit": version.git_commit, "BuildTime": version.build_date,
        }))
    }
    .await;
    let mut whole = json!({"Client": client, "Server": null});
    if let Ok(server) = &server {
        whole["Server"] = server.clone();
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match &options.format {
        Some(format) => terminal::line(&render(format, &whole)?),
        None => {
            let mut lines = vec!["Client: Hyper".to_owned()];
            let mut add = |name: &str, value: String| {
                lines.push(format!(" {:<18} {value}", format!("{name}:")));
            };
            add("Version", text(&whole["Client"]["Version"]));
            add("Docker flags", format!("as of {DOCKER}"));
            add("OS/Arch", format!("linux/{}", std::env::consts::ARCH));
            add("Context", context);
            if whole["Server"].is_object() {
                lines.push(String::new());
                lines.push("Server: Kubernetes API".to_owned());
                let mut add = |name: &str, value: String| {
                    lines.push(format!(" {:<18} {value}", format!("{name}:")));
                };
                add("Version", text(&whole["Server"]["Version"]));
                add(
                    "OS/Arch",
                    format!(
                        "{}/{}",
                        text(&whole["Server"]["Os"]),
                        text(&whole["Server"]["Arch"])
                    ),
                );
            }
            terminal::line(&lines.join("\n"));
        }
    }
    server.map(drop)
}

/// `info`.
pub(crate) async fn info(target: &Target, options: &Format) -> Result<()> {
    let cluster = target.connect().await?;
    let version = cluster.client.apiserver_version().await?;
    let containers = cluster.containers().await?;
    let count = |states: &[State]| {
        containers
            .iter()
            .filter(|container| states.contains(&container.state()))
            .count()
    };
    let running = count(&[State::Running, State::Restarting]);
    let paused = count(&[State::Paused, State::Suspended]);
    let stopped = containers.len() - running - paused;
    let images: std::collections::BTreeSet<String> = containers
        .iter()
        .map(crate::model::Container::image)
        .collect();
    let object = json!({
        "Containers": containers.len(), "ContainersRunning": running, "ContainersPaused": paused, "ContainersStopped": stopped,
        "Images": images.len(), "ServerVersion": version.git_version, "OperatingSystem": "Hypernetes", "OSType": "linux",
        "Name": cluster.server, "Namespace": cluster.namespace, "Tenant": cluster.tenant().await,
        "DefaultRuntime": "hypernetes", "SecurityOptions": ["name=microvm"],
    });
    if let Some(format) = &options.format {
        terminal::line(&render(format, &object)?);
        return Ok(());
    }
    let mut lines = vec![
        "Client: Hyper".to_owned(),
        format!(" Version:    {}", hypernetes_telemetry::VERSION),
        String::new(),
        "Server:".to_owned(),
    ];
    lines.push(format!(" Containers: {}", containers.len()));
    lines.push(format!(
        "  Running: {running}\n  Paused: {paused}\n  Stopped: {stopped}"
    ));
    lines.push(format!(" Images: {}", images.len()));
    lines.push(format!(" Server Version: {}", version.git_version));
    lines.push(" Isolation: a microVM for each container".to_owned());
    lines.push(format!(
        " API Server: {}\n Namespace: {}",
        cluster.server, cluster.namespace
    ));
    terminal::line(&lines.join("\n"));
    Ok(())
}

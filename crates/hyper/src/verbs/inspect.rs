//! `inspect`.

use serde_json::{Value, json};

use crate::{
    cli::Inspect,
    cluster::{self, Cluster},
    error::{Failure, Result},
    format::render,
    model::{Container, State, unescaped},
    terminal,
};

/// docker's time for never.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// A container in the form of docker's API.
pub(crate) fn object(container: &Container) -> Value {
    let spec = container.spec();
    let pod = container.pod.spec.clone().unwrap_or_default();
    let state = container.state();
    let command = container.command();
    let (path, args) = command
        .split_first()
        .map_or((String::new(), Vec::new()), |(path, args)| {
            (path.clone(), args.to_vec())
        });
    let time = |time: Option<jiff::Timestamp>| {
        time.map_or_else(|| NEVER.to_owned(), |time| time.to_string())
    };
    let context = spec.security_context.clone().unwrap_or_default();
    let capabilities = context.capabilities.clone().unwrap_or_default();
    let limits = spec
        .resources
        .clone()
        .unwrap_or_default()
        .limits
        .unwrap_or_default();
    let quantity = |name: &str| {
        limits
            .get(name)
            .map(|quantity| quantity.0.clone())
            .unwrap_or_default()
    };
    let (policy, retries) = container
        .restart_policy()
        .split_once(':')
        .unwrap_or((container.restart_policy(), "0"));
    let ended = container.ended().filter(|_| !state.is_up());
    let status = container.pod.status.clone().unwrap_or_default();
    let address = status.pod_ip.clone().unwrap_or_default();
    let error = container
        .waiting()
        .map(|(_, message)| message)
        .or(status.message)
        .unwrap_or_default();
    let user = match (context.run_as_user, context.run_as_group) {
        (Some(user), Some(group)) => format!("{user}:{group}"),
        (Some(user), None) => user.to_string(),
        _ => String::new(),
    };
    let environment: Vec<String> = spec
        .env
        .iter()
        .flatten()
        .map(|variable| {
            format!(
                "{}={}",
                variable.name,
                unescaped(variable.value.as_deref().unwrap_or_default())
            )
        })
        .collect();
    let mut ports = json!({});
    let mut bindings = json!({});
    for port in spec.ports.iter().flatten() {
        let key = format!(
            "{}/{}",
            port.container_port,
            port.protocol
                .as_deref()
                .unwrap_or("TCP")
                .to_ascii_lowercase()
        );
        ports[key] = Value::Null;
    }
    for port in container.ports() {
        let key = format!("{}/{}", port.container, port.protocol);
        let binding = json!({"HostIp": port.address, "HostPort": if port.host == 0 { String::new() } else { port.host.to_string() }});
        for map in [&mut ports, &mut bindings] {
            match map[&key].as_array_mut() {
                Some(list) => list.push(binding.clone()),
                None => map[&key] = json!([binding]),
            }
        }
    }
    let mut state_object = json!({
        "Status": state.as_str(),
        "Running": state.is_up() || state == State::Restarting,
        "Paused": state == State::Paused,
        "Restarting": state == State::Restarting,
        "OOMKilled": ended.is_some_and(|end| end.reason.as_deref() == Some("OOMKilled")),
        "Dead": state == State::Dead,
        "Pid": i32::from(state.is_up()),
        "ExitCode": container.exit_code(),
        "Error": if state.is_up() { String::new() } else { error },
        "StartedAt": time(container.started()),
        "FinishedAt": time(container.finished()),
    });
    if let Some(health) = container.health() {
        state_object["Health"] = json!({"Status": health, "FailingStreak": 0, "Log": []});
    }
    let image_id = container
        .status()
        .map(|status| status.image_id.clone())
        .unwrap_or_default();
    json!({
        "Id": container.id,
        "Created": container.created().to_string(),
        "Path": path,
        "Args": args,
        "State": state_object,
        "Image": image_id,
        "Name": format!("/{}", container.name),
        "RestartCount": container.status().map_or(0, |status| status.restart_count),
        "Platform": "linux",
        "Driver": "hypernetes",
        "HostConfig": {
            "NetworkMode": container.network(),
            "PortBindings": bindings,
            "RestartPolicy": {"Name": policy, "MaximumRetryCount": retries.parse::<u32>().unwrap_or(0)},
            "AutoRemove": container.auto_remove(),
            "CapAdd": capabilities.add,
            "CapDrop": capabilities.drop,
            "Dns": pod.dns_config.as_ref().and_then(|dns| dns.nameservers.clone()).unwrap_or_default(),
            "Memory": crate::units::parse_bytes(&quantity("memory")).unwrap_or(0),
            "NanoCpus": nano_cpus(&quantity("cpu")),
            "Privileged": context.privileged.unwrap_or(false),
            "ReadonlyRootfs": context.read_only_root_filesystem.unwrap_or(false),
            "Runtime": pod.runtime_class_name.clone().unwrap_or_else(|| "hypernetes".to_owned()),
        },
        "Mounts": mounts(container),
        "Config": {
            "Hostname": pod.hostname.clone().unwrap_or_else(|| container.pod_name().to_owned()),
            "User": user,
            "ExposedPorts": spec.ports.iter().flatten().map(|port| (format!("{}/{}", port.container_port, port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase()), json!({}))).collect::<serde_json::Map<_, _>>(),
            "Tty": spec.tty.unwrap_or(false),
            "OpenStdin": spec.stdin.unwrap_or(false),
            "StdinOnce": spec.stdin_once.unwrap_or(false),
            "Env": environment,
            "Cmd": spec.args.iter().flatten().map(|arg| unescaped(arg)).collect::<Vec<_>>(),
            "Image": container.image(),
            "WorkingDir": spec.working_dir.clone().unwrap_or_default(),
            "Entrypoint": spec.command.as_ref().map(|command| command.iter().map(|arg| unescaped(arg)).collect::<Vec<_>>()),
            "Labels": container.labels(),
            "StopSignal": spec.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.clone()).unwrap_or_else(|| "SIGTERM".to_owned()),
            "StopTimeout": pod.termination_grace_period_seconds,
        },
        "NetworkSettings": {
            "Ports": ports,
            "IPAddress": address,
            "Networks": {container.network(): {"IPAddress": address}},
        },
        "Pod": {"Name": container.pod_name(), "Namespace": container.pod.metadata.namespace, "Node": pod.node_name, "Uid": container.pod.metadata.uid},
    })
}

fn nano_cpus(quantity: &str) -> i64 {
    match quantity.strip_suffix('m') {
        Some(milli) => milli.parse::<i64>().unwrap_or(0) * 1_000_000,
        None => crate::units::parse_cpus(quantity).unwrap_or(0) * 1_000_000,
    }
}

fn mounts(container: &Container) -> Vec<Value> {
    let volumes = container
        .pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten())
        .collect::<Vec<_>>();
    container
        .spec()
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| {
            let volume = volumes.iter().find(|volume| volume.name == mount.name);
            let claim = volume.and_then(|volume| volume.persistent_volume_claim.as_ref());
            let memory = volume
                .and_then(|volume| volume.empty_dir.as_ref())
                .is_some_and(|dir| dir.medium.as_deref() == Some("Memory"));
            json!({
                "Type": if memory { "tmpfs" } else { "volume" },
                "Name": claim.map_or(mount.name.as_str(), |claim| claim.claim_name.as_str()),
                "Destination": mount.mount_path,
                "RW": !mount.read_only.unwrap_or(false),
            })
        })
        .collect()
}

/// Prints objects as docker does: a list of all, or each through the format.
pub(crate) fn print(objects: &[Value], format: Option<&str>) -> Result<()> {
    match format {
        None => {
            let text = serde_json::to_string_pretty(objects).map_err(Failure::plain)?;
            // docker indents by four.
            let text: Vec<String> = text
                .lines()
                .map(|line| {
                    let body = line.trim_start_matches(' ');
                    format!("{}{body}", " ".repeat((line.len() - body.len()) * 2))
                })
                .collect();
            terminal::line(&text.join("\n"));
        }
        Some(format) => {
            for object in objects {
                terminal::line(&render(format, object)?);
            }
        }
    }
    Ok(())
}

/// `inspect`.
pub(crate) async fn run(cluster: &Cluster, options: &Inspect) -> Result<()> {
    let kind = options.kind.as_deref().unwrap_or("");
    if !matches!(kind, "" | "container" | "network" | "volume") {
        return Err(Failure::plain(format_args!(
            "unknown type: {kind:?}: must be one of \"container\", \"network\", \"volume\""
        )));
    }
    let all = cluster.containers().await?;
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for name in &options.names {
        let mut object = None;
        if matches!(kind, "" | "container") {
            match cluster::find(all.clone(), name) {
                Ok(container) => object = Some(self::object(&container)),
                Err(error) if error.message.contains("multiple IDs") => {
                    missing.push(error.message);
                    continue;
                }
                Err(_) => {}
            }
        }
        if object.is_none() && matches!(kind, "" | "network") {
            object = super::network::inspect(cluster, name).await?;
        }
        if object.is_none() && matches!(kind, "" | "volume") {
            object = super::volume::inspect(cluster, name).await?;
        }
        match object {
            Some(object) => found.push(object),
            None => missing.push(match kind {
                "" => format!("Error: No such object: {name}"),
                "container" => format!("Error response from daemon: No such container: {name}"),
                kind => format!("Error response from daemon: {kind} {name} not found"),
            }),
        }
    }
    if options.format.is_none() || !found.is_empty() {
        print(&found, options.format.as_deref())?;
    }
    for message in &missing {
        terminal::note(message);
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Failure::exit(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        self,
        tests::{pod, status},
    };

    #[test]
    fn fields_that_scripts_read() {
        let mut web = pod(
            "web",
            'a',
            status(
                "Running",
                json!({"running": {"startedAt": "2026-01-02T03:00:00Z"}}),
            ),
        );
        web.status.as_mut().unwrap().pod_ip = Some("10.0.0.2".into());
        let container = model::containers(vec![web]).remove(0);
        let object = object(&container);
        for (template, text) in [
            (
                "{{.State.Running}} {{.State.Status}} {{.State.ExitCode}}",
                "true running 0",
            ),
            ("{{.Name}} {{.Config.Image}}", "/web busybox:1"),
            ("{{.NetworkSettings.IPAddress}}", "10.0.0.2"),
            (
                "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
                "10.0.0.2",
            ),
            ("{{json .Config.Cmd}}", "[\"-c\",\"x\"]"),
            (
                "{{.State.StartedAt}} {{.State.FinishedAt}}",
                "2026-01-02T03:00:00Z 0001-01-01T00:00:00Z",
            ),
            ("{{.HostConfig.RestartPolicy.Name}}", "no"),
        ] {
            assert_eq!(render(template, &object).unwrap(), text, "{template}");
        }
    }
}

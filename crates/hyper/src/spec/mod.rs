//! From docker's flags to a pod: a pure function, but for files that flags name.

mod flags;
mod ports;
mod volumes;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

pub(crate) use flags::{environment, key_values, lines_of, signal};
pub(crate) use ports::parse as parse_ports;
pub(crate) use volumes::Claim;

use crate::{
    cli::Create,
    error::{Failure, Result},
    meta,
    model::PublishedPort,
    names, units,
};

/// Seconds that docker gives a container to stop.
const STOP_TIMEOUT: i64 = 10;
/// Least memory limit that docker takes.
const LEAST_MEMORY: i64 = 6 << 20;

/// Who the container is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) created: Timestamp,
    /// Nobody stays attached to it.
    pub(crate) detached: bool,
}

/// A container to be.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The pod.
    pub(crate) pod: Value,
    /// Named volumes.
    pub(crate) claims: Vec<Claim>,
    /// Published ports.
    pub(crate) ports: Vec<PublishedPort>,
    /// The node has to honour an annotation.
    pub(crate) needs_hypernetes: Option<&'static str>,
}

/// The pod of a command line.
pub(crate) fn plan(create: &Create, identity: &Identity) -> Result<Plan> {
    let ports = parse_ports(&create.publish)?;
    let volumes = volumes::plan(create)?;
    let (restart, most) = restart_policy(create)?;
    let pod_name = names::of_pod(&identity.name);
    let labels = labels(create)?;
    let container = container(create, identity, &pod_name, &ports, &volumes)?;
    let mut annotations = json!({
        meta::ID: identity.id,
        meta::CREATED: identity.created.to_string(),
        meta::RESTART: create.restart,
    });
    let note = |annotations: &mut Value, key: &str, value: String| annotations[key] = value.into();
    if !labels.is_empty() {
        note(&mut annotations, meta::LABELS, json!(labels).to_string());
    }
    if !ports.is_empty() {
        note(&mut annotations, meta::PORTS, json!(ports).to_string());
    }
    if create.rm {
        note(&mut annotations, meta::AUTO_REMOVE, "true".to_owned());
    }
    if let Some(most) = most {
        note(&mut annotations, meta::MAX_RESTARTS, most.to_string());
    }
    if let Some(kernel) = &create.kernel {
        note(&mut annotations, meta::KERNEL, kernel.clone());
    }
    if let Some(network) = network(create)? {
        note(&mut annotations, meta::NETWORK, network);
    }
    for (key, value) in key_values(&create.annotation, "annotation")? {
        note(&mut annotations, &key, value);
    }
    let mut pod_labels = Map::new();
    for (key, value) in &labels {
        if flags::is_kubernetes_label(key, value) {
            pod_labels.insert(key.clone(), value.clone().into());
        }
    }
    pod_labels.insert(meta::NAME.to_owned(), identity.name.clone().into());
    let mut spec = json!({
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": create.stop_timeout.unwrap_or(STOP_TIMEOUT).max(0),
        "hostname": hostname(create, identity)?,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "containers": [container],
    });
    if !volumes.pod.is_empty() {
        spec["volumes"] = volumes.pod.clone().into();
    }
    if create.stop_signal.is_some() {
        spec["os"] = json!({"name": "linux"});
    }
    if create.init {
        spec["shareProcessNamespace"] = true.into();
    }
    pod_fields(create, &mut spec)?;
    Ok(Plan {
        pod: json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod_name, "labels": pod_labels, "annotations": annotations},
            "spec": spec,
        }),
        claims: volumes.claims,
        ports,
        needs_hypernetes: most.map(|_| "--restart on-failure:N"),
    })
}

/// Kubernetes' policy, and the most restarts there may be.
fn restart_policy(create: &Create) -> Result<(&'static str, Option<u32>)> {
    let policy = create.restart.as_str();
    let (name, count) = policy
        .split_once(':')
        .map_or((policy, None), |(name, count)| (name, Some(count)));
    let found = match (name, count) {
        ("no" | "", None) => return Ok(("Never", None)),
        ("on-failure", None) => ("OnFailure", None),
        ("on-failure", Some(count)) => {
            let most: u32 = count.parse().map_err(|_bad| {
                Failure::usage(
                    "invalid restart policy format: maximum retry count must be an integer",
                )
            })?;
            ("OnFailure", (most > 0).then_some(most))
        }
        ("always" | "unless-stopped", None) => ("Always", None),
        ("always" | "unless-stopped", Some(_)) => {
            return Err(Failure::daemon(format_args!(
                "invalid restart policy: maximum retry count can only be used with 'on-failure'"
            ))
            .with_code(125));
        }
        _ => {
            return Err(Failure::daemon(format_args!(
                "invalid restart policy: unknown policy '{name}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
            ))
            .with_code(125));
        }
    };
    if create.rm {
        return Err(Failure::usage(
            "conflicting options: cannot specify both --restart and --rm",
        ));
    }
    Ok(found)
}

fn hostname(create: &Create, identity: &Identity) -> Result<String> {
    let Some(name) = &create.hostname else {
        return Ok(identity.id.chars().take(12).collect());
    };
    let valid = !name.is_empty()
        && name.len() <= 63
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if valid {
        return Ok(name.clone());
    }
    Err(Failure::usage(format_args!(
        "invalid hostname '{name}': lower case letters, digits and '-', at most 63 characters"
    )))
}

fn network(create: &Create) -> Result<Option<String>> {
    match create.network.as_deref() {
        None | Some("default" | "bridge") => Ok(None),
        Some("host") => Err(Failure::refused(
            "--network host",
            "a container has a kernel of its own and no part of the host's network; publish ports with -p",
        )),
        Some("none") => Err(Failure::refused(
            "--network none",
            "a container is always on a network of its tenant's; nobody else is on it",
        )),
        Some(other) if other.starts_with("container:") => Err(Failure::refused(
            "--network container:NAME",
            "containers that share a network are containers of one pod: use kubectl apply",
        )),
        Some(other) => Ok(Some(other.to_owned())),
    }
}

/// docker's labels.
fn labels(create: &Create) -> Result<std::collections::BTreeMap<String, String>> {
    let mut given = Vec::new();
    for file in &create.label_file {
        given.extend(lines_of(file)?);
    }
    given.extend(create.label.iter().cloned());
    Ok(given
        .into_iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (label, String::new()),
        })
        .collect())
}

fn container(
    create: &Create,
    identity: &Identity,
    name: &str,
    ports: &[PublishedPort],
    volumes: &volumes::Volumes,
) -> Result<Value> {
    let mut container = json!({
        "name": name,
        "image": create.image(),
        "imagePullPolicy": match create.pull.as_str() {
            "missing" => "IfNotPresent",
            "always" => "Always",
            "never" => "Never",
            other => {
                return Err(Failure::usage(format_args!("invalid pull option: '{other}': must be one of \"always\", \"missing\" or \"never\"")));
            }
        },
    });
    if create.image().is_empty() {
        return Err(Failure::usage("invalid reference format"));
    }
    if let Some(platform) = &create.platform
        && !matches!(platform.as_str(), "linux/amd64" | "linux" | "amd64")
    {
        return Err(Failure::refused(
            format_args!("--platform {platform}"),
            "the nodes are linux/amd64",
        ));
    }
    let mut set = |key: &str, value: Value| container[key] = value;
    if let Some(entrypoint) = &create.entrypoint {
        set("command", json!([flags::literal(entrypoint)]));
    }
    if !create.command().is_empty() {
        set(
            "args",
            create
                .command()
                .iter()
                .map(|arg| flags::literal(arg))
                .collect(),
        );
    }
    let environment = environment(&create.env_file, &create.env)?;
    if !environment.is_empty() {
        set(
            "env",
            environment
                .iter()
                .map(|(key, value)| json!({"name": key, "value": flags::literal(value)}))
                .collect(),
        );
    }
    if let Some(dir) = &create.workdir {
        if !dir.starts_with('/') {
            return Err(Failure::daemon(format_args!(
                "the working directory '{dir}' is invalid, it needs to be an absolute path"
            ))
            .with_code(125));
        }
        set("workingDir", dir.clone().into());
    }
    if create.interactive {
        set("stdin", true.into());
        set("stdinOnce", (!identity.detached).into());
    }
    if create.tty {
        set("tty", true.into());
    }
    let listed = flags::exposed(&create.expose, ports)?;
    if !listed.is_empty() {
        set("ports", listed.into());
    }
    if !volumes.mounts.is_empty() {
        set("volumeMounts", volumes.mounts.clone().into());
    }
    if let Some(resources) = resources(create)? {
        set("resources", resources);
    }
    if let Some(context) = flags::security(create)? {
        set("securityContext", context);
    }
    if let Some(probe) = flags::health(create)? {
        set("readinessProbe", probe);
    }
    if let Some(signal) = &create.stop_signal {
        set("lifecycle", json!({"stopSignal": flags::signal(signal)?}));
    }
    Ok(container)
}

fn resources(create: &Create) -> Result<Option<Value>> {
    let mut resources = json!({});
    let memory = create
        .memory
        .as_deref()
        .map(units::parse_bytes)
        .transpose()?;
    if let Some(bytes) = memory.filter(|bytes| *bytes > 0) {
        if bytes < LEAST_MEMORY {
            return Err(Failure::daemon("Minimum memory limit allowed is 6MB").with_code(125));
        }
        resources["limits"]["memory"] = bytes.to_string().into();
    }
    if let Some(cpus) = &create.cpus {
        let milli = units::parse_cpus(cpus)?;
        if milli > 0 {
            resources["limits"]["cpu"] = format!("{milli}m").into();
        }
    }
    if let Some(reserved) = &create.memory_reservation {
        resources["requests"]["memory"] = units::parse_bytes(reserved)?.to_string().into();
    }
    Ok(resources
        .as_object()
        .is_some_and(|map| !map.is_empty())
        .then_some(resources))
}

fn pod_fields(create: &Create, spec: &mut Value) -> Result<()> {
    if !create.dns.is_empty() || !create.dns_search.is_empty() || !create.dns_option.is_empty() {
        let mut dns = json!({});
        if !create.dns.is_empty() {
            spec["dnsPolicy"] = "None".into();
            dns["nameservers"] = create.dns.clone().into();
        }
        if !create.dns_search.is_empty() {
            dns["searches"] = create.dns_search.clone().into();
        }
        if !create.dns_option.is_empty() {
            dns["options"] = create
                .dns_option
                .iter()
                .map(|option| match option.split_once(':') {
                    Some((name, value)) => json!({"name": name, "value": value}),
                    None => json!({"name": option}),
                })
                .collect();
        }
        spec["dnsConfig"] = dns;
    }
    let mut aliases = Vec::new();
    for host in &create.add_host {
        let (name, address) = host
            .split_once('=')
            .or_else(|| host.split_once(':'))
            .ok_or_else(|| Failure::usage(format_args!("invalid argument \"{host}\" for \"--add-host\" flag: bad format for add-host: \"{host}\"")))?;
        let address = address.trim_start_matches('[').trim_end_matches(']');
        if address == "host-gateway" {
            return Err(Failure::refused(
                "--add-host NAME:host-gateway",
                "a container does not reach its host",
            ));
        }
        if address.parse::<std::net::IpAddr>().is_err() {
            return Err(Failure::usage(format_args!(
                "invalid argument \"{host}\" for \"--add-host\" flag: invalid IP address in add-host: \"{address}\""
            )));
        }
        aliases.push(json!({"ip": address, "hostnames": [name]}));
    }
    if !aliases.is_empty() {
        spec["hostAliases"] = aliases.into();
    }
    let mut context = json!({});
    if !create.sysctl.is_empty() {
        context["sysctls"] = key_values(&create.sysctl, "sysctl")?
            .into_iter()
            .map(|(name, value)| json!({"name": name, "value": value}))
            .collect();
    }
    if !create.group_add.is_empty() {
        let mut groups = Vec::new();
        for group in &create.group_add {
            groups.push(flags::numeric_id("--group-add", group)?);
        }
        context["supplementalGroups"] = groups.into();
    }
    if context.as_object().is_some_and(|map| !map.is_empty()) {
        spec["securityContext"] = context;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! One service: the keys that are known, and the flags of `run` that they are.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;

use super::{file::mapping, interpolate::parse_env_file, project::Condition};
use crate::{
    cli::Create,
    error::{Failure, Result},
};

/// A service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    /// What `run` would be told.
    pub(crate) create: Create,
    pub(crate) replicas: u32,
    pub(crate) depends_on: BTreeMap<String, Condition>,
    pub(crate) profiles: Vec<String>,
    /// The name of its only container.
    pub(crate) container_name: Option<String>,
}

struct Reader<'a> {
    service: &'a str,
    directory: &'a Path,
}

impl Reader<'_> {
    fn wrong(&self, key: &str, what: impl std::fmt::Display) -> Failure {
        Failure::usage(format_args!("services.{}.{key} {what}", self.service))
    }

    fn text(&self, key: &str, value: &Value) -> Result<String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            Value::Bool(flag) => Ok(flag.to_string()),
            _ => Err(self.wrong(key, "must be a string")),
        }
    }

    fn flag(&self, key: &str, value: &Value) -> Result<bool> {
        match value {
            Value::Bool(flag) => Ok(*flag),
            Value::String(text) if text == "true" => Ok(true),
            Value::String(text) if text == "false" => Ok(false),
            _ => Err(self.wrong(key, "must be a boolean")),
        }
    }

    /// A list of texts, or one text.
    fn texts(&self, key: &str, value: &Value) -> Result<Vec<String>> {
        match value {
            Value::Null => Ok(Vec::new()),
            Value::Array(list) => list.iter().map(|item| self.text(key, item)).collect(),
            other => Ok(vec![self.text(key, other)?]),
        }
    }

    /// `KEY=VALUE` of a list or a mapping.
    fn pairs(&self, key: &str, value: &Value, between: char) -> Result<Vec<String>> {
        match value {
            Value::Object(map) => map
                .iter()
                .map(|(name, value)| match value {
                    Value::Null => Ok(name.clone()),
                    value => Ok(format!("{name}{between}{}", self.text(key, value)?)),
                })
                .collect(),
            other => self.texts(key, other),
        }
    }

    /// Words of a command: a list as it is, a text as a shell splits it.
    fn words(&self, key: &str, value: &Value) -> Result<Vec<String>> {
        match value {
            Value::String(text) => {
                shlex::split(text).ok_or_else(|| self.wrong(key, "has a quote that does not end"))
            }
            other => self.texts(key, other),
        }
    }
}

impl Service {
    /// Reads a service. A key that is not known is an error.
    pub(super) fn of(
        name: &str,
        value: &Value,
        directory: &Path,
        variables: &Volumes,
    ) -> Result<Self> {
        let reader = Reader {
            service: name,
            directory,
        };
        let Value::Object(keys) = value else {
            return Err(Failure::usage(format_args!(
                "services.{name} must be a mapping"
            )));
        };
        let mut service = Self {
            create: Create {
                restart: "no".to_owned(),
                pull: "missing".to_owned(),
                ..Create::default()
            },
            replicas: 1,
            depends_on: BTreeMap::new(),
            profiles: Vec::new(),
            container_name: None,
        };
        let (mut image, mut entrypoint, mut command) = (None, Vec::new(), Vec::new());
        for (key, value) in keys {
            match key.as_str() {
                "image" => image = Some(reader.text(key, value)?),
                "command" => command = reader.words(key, value)?,
                "entrypoint" => entrypoint = reader.words(key, value)?,
                "scale" => service.replicas = reader.number(key, value)?,
                "deploy" => service.deploy(&reader, value)?,
                "depends_on" => service.depends_on = reader.depends_on(value)?,
                "profiles" => service.profiles = reader.texts(key, value)?,
                "container_name" => service.container_name = Some(reader.text(key, value)?),
                "healthcheck" => service.health(&reader, value)?,
                "networks" => service.create.network = reader.network(value)?,
                "volumes" => service.create.volume = reader.volumes(value, variables)?,
                "ports" => service.create.publish = reader.ports(value)?,
                "env_file" => reader.env_files(value, &mut service.create)?,
                _ if key.starts_with("x-") => {}
                _ => service.simple(&reader, key, value)?,
            }
        }
        let image = image.ok_or_else(|| {
            let build = if keys.contains_key("build") {
                ": build elsewhere, push, and name the image"
            } else {
                ""
            };
            Failure::usage(format_args!("service \"{name}\" has no image{build}"))
        })?;
        service.create.image_and_command = vec![image];
        if let Some((first, rest)) = entrypoint.split_first() {
            service.create.entrypoint = Some(first.clone());
            service
                .create
                .image_and_command
                .extend(rest.iter().cloned());
        }
        service.create.image_and_command.extend(command);
        Ok(service)
    }

    /// Keys that are flags of `run`.
    fn simple(&mut self, reader: &Reader<'_>, key: &str, value: &Value) -> Result<()> {
        let create = &mut self.create;
        match key {
            "environment" => create.env.extend(reader.pairs(key, value, '=')?),
            "labels" => create.label = reader.pairs(key, value, '=')?,
            "annotations" => create.annotation = reader.pairs(key, value, '=')?,
            "working_dir" => create.workdir = Some(reader.text(key, value)?),
            "user" => create.user = Some(reader.text(key, value)?),
            "group_add" => create.group_add = reader.texts(key, value)?,
            "hostname" => create.hostname = Some(reader.text(key, value)?),
            "restart" => create.restart = reader.text(key, value)?,
            "mem_limit" => create.memory = Some(reader.text(key, value)?),
            "mem_reservation" => create.memory_reservation = Some(reader.text(key, value)?),
            "cpus" => create.cpus = Some(reader.text(key, value)?),
            "read_only" => create.read_only = reader.flag(key, value)?,
            "tty" => create.tty = reader.flag(key, value)?,
            "stdin_open" => create.interactive = reader.flag(key, value)?,
            "init" => create.init = reader.flag(key, value)?,
            "cap_add" => create.cap_add = reader.texts(key, value)?,
            "cap_drop" => create.cap_drop = reader.texts(key, value)?,
            "security_opt" => create.security_opt = reader.texts(key, value)?,
            "tmpfs" => create.tmpfs = reader.texts(key, value)?,
            "dns" => create.dns = reader.texts(key, value)?,
            "dns_search" => create.dns_search = reader.texts(key, value)?,
            "dns_opt" => create.dns_option = reader.texts(key, value)?,
            "extra_hosts" => create.add_host = reader.pairs(key, value, '=')?,
            "sysctls" => create.sysctl = reader.pairs(key, value, '=')?,
            "expose" => create.expose = reader.texts(key, value)?,
            "shm_size" => create.shm_size = Some(reader.text(key, value)?),
            "stop_signal" => create.stop_signal = Some(reader.text(key, value)?),
            "stop_grace_period" => {
                let time = crate::units::parse_duration(&reader.text(key, value)?)?;
                create.stop_timeout = i64::try_from(time.as_secs()).ok();
            }
            "platform" => create.platform = Some(reader.text(key, value)?),
            "pull_policy" => {
                create.pull = match reader.text(key, value)?.as_str() {
                    "if_not_present" => "missing".to_owned(),
                    other => other.to_owned(),
                };
            }
            "privileged" if value == &Value::Bool(false) => {}
            "network_mode" => create.network = Some(reader.text(key, value)?),
            "build" => return Err(reader.wrong(key, "is not supported: build elsewhere, push, and name the image")),
            "privileged" => return Err(reader.wrong(key, "is not supported: a container has a kernel of its own, and cap_add gives it what it needs there")),
            "secrets" | "configs" => return Err(reader.wrong(key, "is not supported: keep it in a Secret or ConfigMap with kubectl")),
            "ulimits" => return Err(reader.wrong(key, "is not supported: set it in the command")),
            "extends" => return Err(reader.wrong(key, "is not supported: name several files with -f")),
            _ => {
                return Err(Failure::usage(format_args!("services.{} additional properties '{key}' not allowed", reader.service)));
            }
        }
        Ok(())
    }

    fn deploy(&mut self, reader: &Reader<'_>, value: &Value) -> Result<()> {
        for (key, value) in mapping(value, &format!("services.{}.deploy", reader.service))?
            .into_iter()
            .flatten()
        {
            match key.as_str() {
                "replicas" => self.replicas = reader.number("deploy.replicas", value)?,
                "mode" if value == "replicated" => {}
                "labels" => self
                    .create
                    .label
                    .extend(reader.pairs("deploy.labels", value, '=')?),
                "resources" => {
                    for (kind, values) in mapping(value, "deploy.resources")?.into_iter().flatten()
                    {
                        for (name, value) in
                            mapping(values, "deploy.resources")?.into_iter().flatten()
                        {
                            let text = Some(reader.text("deploy.resources", value)?);
                            match (kind.as_str(), name.as_str()) {
                                ("limits", "memory") => self.create.memory = text,
                                ("limits", "cpus") => self.create.cpus = text,
                                ("reservations", "memory") => self.create.memory_reservation = text,
                                _ => return Err(reader.wrong(&format!("deploy.resources.{kind}.{name}"), "is not supported: limits.memory, limits.cpus, reservations.memory are")),
                            }
                        }
                    }
                }
                "restart_policy" => {
                    let condition = value["condition"].as_str().unwrap_or("any");
                    let most = value["max_attempts"].as_u64();
                    self.create.restart = match (condition, most) {
                        ("none", _) => "no".to_owned(),
                        ("on-failure", Some(most)) => format!("on-failure:{most}"),
                        ("on-failure", None) => "on-failure".to_owned(),
                        ("any", _) => "always".to_owned(),
                        (other, _) => {
                            return Err(reader.wrong(
                                "deploy.restart_policy.condition",
                                format_args!("{other:?} is not none, on-failure or any"),
                            ));
                        }
                    };
                }
                _ => return Err(reader.wrong(&format!("deploy.{key}"), "is not supported")),
            }
        }
        Ok(())
    }

    fn health(&mut self, reader: &Reader<'_>, value: &Value) -> Result<()> {
        for (key, value) in mapping(value, &format!("services.{}.healthcheck", reader.service))?
            .into_iter()
            .flatten()
        {
            let text = || reader.text(&format!("healthcheck.{key}"), value);
            match key.as_str() {
                "test" => {
                    let words = match value {
                        Value::String(command) => vec!["CMD-SHELL".to_owned(), command.clone()],
                        other => reader.texts("healthcheck.test", other)?,
                    };
                    self.create.health_cmd = match words.split_first() {
                        Some((first, _)) if first == "NONE" => None,
                        Some((first, rest)) if first == "CMD-SHELL" => Some(rest.join(" ")),
                        Some((first, rest)) if first == "CMD" => {
                            Some(shlex::try_join(rest.iter().map(String::as_str)).map_err(
                                |_nul| reader.wrong("healthcheck.test", "has a zero byte"),
                            )?)
                        }
                        _ => {
                            return Err(reader.wrong(
                                "healthcheck.test",
                                "must begin with NONE, CMD or CMD-SHELL",
                            ));
                        }
                    };
                }
                "interval" => self.create.health_interval = Some(text()?),
                "timeout" => self.create.health_timeout = Some(text()?),
                "start_period" => self.create.health_start_period = Some(text()?),
                "retries" => {
                    self.create.health_retries =
                        i32::try_from(reader.number("healthcheck.retries", value)?).ok();
                }
                "disable" => {
                    if reader.flag("healthcheck.disable", value)? {
                        self.create.health_cmd = None;
                    }
                }
                _ => return Err(reader.wrong(&format!("healthcheck.{key}"), "is not supported")),
            }
        }
        Ok(())
    }
}

/// Named volumes of the file: their names in the cluster.
pub(super) type Volumes = BTreeMap<String, String>;

impl Reader<'_> {
    fn number(&self, key: &str, value: &Value) -> Result<u32> {
        self.text(key, value)?
            .parse()
            .map_err(|_bad| self.wrong(key, "must be an integer"))
    }

    fn depends_on(&self, value: &Value) -> Result<BTreeMap<String, Condition>> {
        let Value::Object(map) = value else {
            let names = self.texts("depends_on", value)?;
            return Ok(names
                .into_iter()
                .map(|name| (name, Condition::Started))
                .collect());
        };
        let mut found = BTreeMap::new();
        for (name, rules) in map {
            for key in rules.as_object().into_iter().flat_map(|rules| rules.keys()) {
                if !matches!(key.as_str(), "condition" | "required" | "restart") {
                    return Err(self.wrong(&format!("depends_on.{name}.{key}"), "is not supported"));
                }
            }
            let condition = match rules["condition"].as_str() {
                None | Some("service_started") => Condition::Started,
                Some("service_healthy") => Condition::Healthy,
                Some("service_completed_successfully") => Condition::Completed,
                Some(other) => {
                    return Err(self.wrong(
                        &format!("depends_on.{name}.condition"),
                        format_args!("{other:?} is not known"),
                    ));
                }
            };
            found.insert(name.clone(), condition);
        }
        Ok(found)
    }

    /// A container is on one network.
    fn network(&self, value: &Value) -> Result<Option<String>> {
        let names: Vec<String> = match value {
            Value::Object(map) => map.keys().cloned().collect(),
            other => self.texts("networks", other)?,
        };
        match names.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(one.clone())),
            _ => Err(self.wrong("networks", "has several: a container is on one network")),
        }
    }

    fn volumes(&self, value: &Value, known: &Volumes) -> Result<Vec<String>> {
        let Value::Array(list) = value else {
            return Err(self.wrong("volumes", "must be a list"));
        };
        let name = |source: &str| -> Result<String> {
            if source.starts_with(['/', '.', '~']) {
                return Err(self.wrong("volumes", format_args!("{source}: no part of any host is seen in a container; keep files in a volume or an image")));
            }
            known.get(source).cloned().ok_or_else(|| {
                Failure::usage(format_args!(
                    "service \"{}\" refers to undefined volume {source}: invalid compose project",
                    self.service
                ))
            })
        };
        let mut volumes = Vec::new();
        for item in list {
            if let Value::Object(map) = item {
                let text = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or_default();
                for key in map.keys() {
                    if !matches!(
                        key.as_str(),
                        "type" | "source" | "target" | "read_only" | "volume"
                    ) {
                        return Err(self.wrong(&format!("volumes.{key}"), "is not supported"));
                    }
                }
                if !matches!(text("type"), "" | "volume") {
                    return Err(self.wrong(
                        "volumes.type",
                        format_args!(
                            "{:?} is not supported: volume is, and the key tmpfs",
                            text("type")
                        ),
                    ));
                }
                let suffix = if map.get("read_only") == Some(&Value::Bool(true)) {
                    ":ro"
                } else {
                    ""
                };
                volumes.push(match text("source") {
                    "" => format!("{}{suffix}", text("target")),
                    source => format!("{}:{}{suffix}", name(source)?, text("target")),
                });
                continue;
            }
            let item = self.text("volumes", item)?;
            volumes.push(match item.split_once(':') {
                Some((source, rest)) => format!("{}:{rest}", name(source)?),
                None => item,
            });
        }
        Ok(volumes)
    }

    fn ports(&self, value: &Value) -> Result<Vec<String>> {
        let Value::Array(list) = value else {
            return Err(self.wrong("ports", "must be a list"));
        };
        list.iter()
            .map(|item| {
                let Value::Object(map) = item else {
                    return self.text("ports", item);
                };
                for key in map.keys() {
                    if !matches!(
                        key.as_str(),
                        "target"
                            | "published"
                            | "protocol"
                            | "host_ip"
                            | "mode"
                            | "name"
                            | "app_protocol"
                    ) {
                        return Err(self.wrong(&format!("ports.{key}"), "is not supported"));
                    }
                }
                let text = |key: &str| map.get(key).map(|value| self.text(key, value)).transpose();
                let target =
                    text("target")?.ok_or_else(|| self.wrong("ports.target", "is required"))?;
                let protocol = text("protocol")?.unwrap_or_else(|| "tcp".to_owned());
                Ok(match (text("host_ip")?, text("published")?) {
                    (Some(address), published) => format!(
                        "{address}:{}:{target}/{protocol}",
                        published.unwrap_or_default()
                    ),
                    (None, Some(published)) => format!("{published}:{target}/{protocol}"),
                    (None, None) => format!("{target}/{protocol}"),
                })
            })
            .collect()
    }

    /// Variables of files come before the service's own.
    fn env_files(&self, value: &Value, create: &mut Create) -> Result<()> {
        let items = match value {
            Value::Array(list) => list.clone(),
            other => vec![other.clone()],
        };
        let mut variables = Vec::new();
        for item in items {
            let (path, required) = match &item {
                Value::Object(map) => (
                    map.get("path")
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned(),
                    map.get("required") != Some(&Value::Bool(false)),
                ),
                other => (self.text("env_file", other)?, true),
            };
            let path = self.directory.join(path);
            match std::fs::read_to_string(&path) {
                Ok(text) => variables.extend(
                    parse_env_file(&text)
                        .into_iter()
                        .map(|(key, value)| format!("{key}={value}")),
                ),
                Err(_) if !required => {}
                Err(error) => {
                    return Err(Failure::usage(format_args!(
                        "env file {} not found: {error}",
                        path.display()
                    )));
                }
            }
        }
        variables.append(&mut create.env);
        create.env = variables;
        Ok(())
    }
}

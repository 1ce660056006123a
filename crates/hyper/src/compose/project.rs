//! A project: its services and the order in which they start.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Value, json};

use super::{file::mapping, service::Service};
use crate::error::{Failure, Result};

/// What of a service another one waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    Started,
    Healthy,
    Completed,
}

/// What a compose file says.
#[derive(Debug, Clone)]
pub(crate) struct Project {
    pub(crate) name: String,
    /// Services that are to run, by name.
    pub(crate) services: BTreeMap<String, Service>,
    /// Names in the cluster of the volumes that are the project's own.
    pub(crate) volumes: Vec<String>,
    /// The file as it is understood.
    pub(crate) whole: Value,
}

impl Project {
    pub(super) fn of(
        whole: &Value,
        name: String,
        directory: &Path,
        profiles: &[String],
    ) -> Result<Self> {
        let mut volumes = BTreeMap::new();
        let mut own = Vec::new();
        for (key, value) in mapping(&whole["volumes"], "volumes")?.into_iter().flatten() {
            for option in value.as_object().into_iter().flat_map(|map| map.keys()) {
                if !(matches!(option.as_str(), "name" | "external" | "labels")
                    || option.starts_with("x-"))
                {
                    return Err(Failure::usage(format_args!(
                        "volumes.{key} additional properties '{option}' not allowed"
                    )));
                }
            }
            let real = match value["name"].as_str() {
                Some(name) => name.to_owned(),
                None if value["external"] == Value::Bool(true) => key.clone(),
                None => format!("{name}-{key}").replace('_', "-"),
            };
            if value["external"] != Value::Bool(true) {
                own.push(real.clone());
            }
            volumes.insert(key.clone(), real);
        }
        let networks = networks(whole)?;
        let mut all = BTreeMap::new();
        for (service, value) in mapping(&whole["services"], "services")?
            .into_iter()
            .flatten()
        {
            let mut parsed = Service::of(service, value, directory, &volumes)?;
            if let Some(network) = &parsed.create.network
                && !matches!(network.as_str(), "default" | "bridge" | "host" | "none")
            {
                let real = networks.get(network).ok_or_else(|| {
                    Failure::usage(format_args!("service \"{service}\" refers to undefined network {network}: invalid compose project"))
                })?;
                parsed.create.network = real.clone();
            }
            if parsed.container_name.is_some() && parsed.replicas > 1 {
                return Err(Failure::usage(format_args!(
                    "services.{service}.container_name: a service of several containers has no one name"
                )));
            }
            all.insert(service.clone(), parsed);
        }
        if all.is_empty() {
            return Err(Failure::usage("no service selected"));
        }
        for (service, parsed) in &all {
            if let Some(missing) = parsed
                .depends_on
                .keys()
                .find(|name| !all.contains_key(*name))
            {
                return Err(Failure::usage(format_args!(
                    "service \"{service}\" depends on undefined service \"{missing}\": invalid compose project"
                )));
            }
        }
        let every = profiles.iter().any(|profile| profile == "*");
        let services = all
            .into_iter()
            .filter(|(_, service)| {
                every
                    || service.profiles.is_empty()
                    || service
                        .profiles
                        .iter()
                        .any(|profile| profiles.contains(profile))
            })
            .collect();
        let mut printed = whole.clone();
        printed["name"] = json!(name);
        if let Some(map) = printed.as_object_mut() {
            map.remove("version");
        }
        let project = Self {
            name,
            services,
            volumes: own,
            whole: printed,
        };
        project.order(None)?;
        Ok(project)
    }

    /// Services in the order in which they start: those that `only` names and what they depend on.
    pub(crate) fn order(&self, only: Option<&[String]>) -> Result<Vec<String>> {
        let mut ordered = Vec::new();
        let mut open = BTreeSet::new();
        let wanted: Vec<&String> = match only {
            Some(names) => names.iter().collect(),
            None => self.services.keys().collect(),
        };
        for name in wanted {
            self.visit(name, &mut open, &mut ordered)?;
        }
        Ok(ordered)
    }

    fn visit(
        &self,
        name: &str,
        open: &mut BTreeSet<String>,
        ordered: &mut Vec<String>,
    ) -> Result<()> {
        if ordered.iter().any(|done| done == name) {
            return Ok(());
        }
        let service = self
            .services
            .get(name)
            .ok_or_else(|| Failure::usage(format_args!("no such service: {name}")))?;
        if !open.insert(name.to_owned()) {
            return Err(Failure::usage(format_args!(
                "dependency cycle detected: {}",
                open.iter().cloned().collect::<Vec<_>>().join(" -> ")
            )));
        }
        for dependency in service.depends_on.keys() {
            self.visit(dependency, open, ordered)?;
        }
        open.remove(name);
        ordered.push(name.to_owned());
        Ok(())
    }

    /// Checks names of services that somebody typed.
    pub(crate) fn check(&self, names: &[String]) -> Result<()> {
        match names.iter().find(|name| !self.services.contains_key(*name)) {
            Some(name) => Err(Failure::plain(format_args!("no such service: {name}"))),
            None => Ok(()),
        }
    }
}

/// Networks of the file: `None` is the namespace's usual one.
fn networks(whole: &Value) -> Result<BTreeMap<String, Option<String>>> {
    let mut found = BTreeMap::from([("default".to_owned(), None)]);
    for (key, value) in mapping(&whole["networks"], "networks")?
        .into_iter()
        .flatten()
    {
        for option in value.as_object().into_iter().flat_map(|map| map.keys()) {
            if !(matches!(option.as_str(), "name" | "external" | "driver" | "labels")
                || option.starts_with("x-"))
            {
                return Err(Failure::usage(format_args!(
                    "networks.{key} additional properties '{option}' not allowed"
                )));
            }
        }
        let external = value["external"] == Value::Bool(true);
        let name = value["name"].as_str().map(str::to_owned);
        if !external && key != "default" {
            return Err(Failure::usage(format_args!(
                "networks.{key}: make the network with `hyper network create` and say external: true; without it services are on the namespace's network"
            )));
        }
        found.insert(
            key.clone(),
            if external {
                Some(name.unwrap_or_else(|| key.clone()))
            } else {
                None
            },
        );
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::needless_pass_by_value, reason = "tests give literals")]
    fn project(value: Value) -> Result<Project> {
        Project::of(&value, "shop".to_owned(), Path::new("."), &[])
    }

    #[test]
    fn services_start_after_what_they_depend_on() {
        let shop = project(json!({"services": {
            "web": {"image": "w", "depends_on": {"db": {"condition": "service_healthy"}, "cache": {"condition": "service_started"}}},
            "cache": {"image": "c"},
            "db": {"image": "d", "depends_on": ["disk"]},
            "disk": {"image": "k"},
            "debug": {"image": "x", "profiles": ["debug"]},
        }}))
        .unwrap();
        assert_eq!(shop.order(None).unwrap(), ["cache", "disk", "db", "web"]);
        assert_eq!(
            shop.order(Some(&["db".to_owned()])).unwrap(),
            ["disk", "db"]
        );
        assert_eq!(shop.services["web"].depends_on["db"], Condition::Healthy);
        assert!(
            shop.order(Some(&["debug".to_owned()])).is_err(),
            "its profile is not on"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (value, said) in [
            (
                json!({"services": {"a": {"image": "i", "sizes": 1}}}),
                "hyper: services.a additional properties 'sizes' not allowed",
            ),
            (
                json!({"services": {"a": {}}}),
                "hyper: service \"a\" has no image",
            ),
            (
                json!({"services": {"a": {"build": "."}}}),
                "hyper: services.a.build is not supported",
            ),
            (
                json!({"services": {"a": {"image": "i", "depends_on": ["b"]}}}),
                "hyper: service \"a\" depends on undefined service \"b\"",
            ),
            (
                json!({"services": {"a": {"image": "i", "depends_on": ["b"]}, "b": {"image": "i", "depends_on": ["a"]}}}),
                "hyper: dependency cycle detected: a -> b",
            ),
            (
                json!({"services": {"a": {"image": "i", "volumes": ["./src:/src"]}}}),
                "hyper: services.a.volumes ./src: no part of any host",
            ),
            (
                json!({"services": {"a": {"image": "i", "volumes": ["data:/d"]}}}),
                "hyper: service \"a\" refers to undefined volume data",
            ),
            (
                json!({"services": {"a": {"image": "i", "networks": ["blue"]}}}),
                "hyper: service \"a\" refers to undefined network blue",
            ),
            (json!({"services": {}}), "hyper: no service selected"),
            (
                json!({"services": {"a": {"image": "i", "privileged": true}}}),
                "hyper: services.a.privileged is not supported",
            ),
        ] {
            let error = project(value).expect_err(said);
            assert!(error.message.starts_with(said), "{}", error.message);
        }
    }

    #[test]
    fn keys_are_flags_of_run() {
        let shop = project(json!({
            "volumes": {"data": null},
            "services": {"a": {
                "image": "i:1", "command": "sh -c 'echo hi'", "environment": {"A": 1, "B": null}, "ports": ["80:80", {"target": 53, "published": 53, "protocol": "udp"}],
                "volumes": ["data:/d:ro", "/cache"], "deploy": {"replicas": 2, "resources": {"limits": {"memory": "64m", "cpus": "0.5"}}},
                "healthcheck": {"test": ["CMD", "test", "-e", "/ok file"], "interval": "2s"}, "restart": "unless-stopped", "stop_grace_period": "1m",
            }},
        }))
        .unwrap();
        let service = &shop.services["a"];
        assert_eq!(
            service.create.image_and_command,
            ["i:1", "sh", "-c", "echo hi"]
        );
        assert_eq!(service.create.env, ["A=1", "B"]);
        assert_eq!(service.create.publish, ["80:80", "53:53/udp"]);
        assert_eq!(service.create.volume, ["shop-data:/d:ro", "/cache"]);
        assert_eq!(
            (
                service.replicas,
                service.create.memory.as_deref(),
                service.create.cpus.as_deref()
            ),
            (2, Some("64m"), Some("0.5"))
        );
        assert_eq!(
            service.create.health_cmd.as_deref(),
            Some("test -e '/ok file'")
        );
        assert_eq!(
            (service.create.restart.as_str(), service.create.stop_timeout),
            ("unless-stopped", Some(60))
        );
    }
}

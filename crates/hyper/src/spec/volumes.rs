//! `--volume`, `--mount`, `--tmpfs` and `--shm-size`.

use serde_json::{Value, json};

use crate::{
    cli::Create,
    error::{Failure, Result},
    units,
};

const NO_BIND: &str = "no part of any host is seen in a container; copy files in with `hyper cp`, or keep them in a volume";

/// A named volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) name: String,
}

/// What the pod and its container get.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    pub(super) pod: Vec<Value>,
    pub(super) mounts: Vec<Value>,
    pub(super) claims: Vec<Claim>,
}

impl Volumes {
    fn next_name(&self) -> String {
        format!("volume-{}", self.pod.len())
    }

    fn add(&mut self, source: Value, path: &str, read_only: bool) -> Result<()> {
        if !path.starts_with('/') || path == "/" {
            return Err(Failure::daemon(format_args!(
                "invalid mount config for type \"volume\": invalid mount path: '{path}' mount path must be absolute"
            ))
            .with_code(125));
        }
        if self.mounts.iter().any(|mount| mount["mountPath"] == path) {
            return Err(
                Failure::daemon(format_args!("Duplicate mount point: {path}")).with_code(125),
            );
        }
        let name = self.next_name();
        let mut volume = source;
        volume["name"] = name.clone().into();
        self.pod.push(volume);
        let mut mount = json!({"name": name, "mountPath": path});
        if read_only {
            mount["readOnly"] = true.into();
        }
        self.mounts.push(mount);
        Ok(())
    }

    fn named(&mut self, name: &str, path: &str, read_only: bool) -> Result<()> {
        check_name(name)?;
        let source = json!({"persistentVolumeClaim": {"claimName": name}});
        self.add(source, path, read_only)?;
        if !self.claims.iter().any(|claim| claim.name == name) {
            self.claims.push(Claim {
                name: name.to_owned(),
            });
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<()> {
    let valid = name.len() <= 63
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.'))
        && name
            .chars()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric())
        && name
            .chars()
            .last()
            .is_some_and(|c| c.is_ascii_alphanumeric());
    if valid {
        return Ok(());
    }
    Err(Failure::usage(format_args!(
        "invalid volume name '{name}': lower case letters, digits, '-' and '.', at most 63 characters"
    )))
}

pub(super) fn plan(create: &Create) -> Result<Volumes> {
    let mut volumes = Volumes::default();
    for flag in &create.volume {
        volume(flag, &mut volumes)?;
    }
    for flag in &create.mount {
        mount(flag, &mut volumes)?;
    }
    for flag in &create.tmpfs {
        let (path, options) = flag.split_once(':').unwrap_or((flag, ""));
        let (source, read_only) =
            memory(flag, options.split(',').filter(|option| !option.is_empty()))?;
        volumes.add(source, path, read_only)?;
    }
    if let Some(size) = &create.shm_size {
        let bytes = units::parse_bytes(size)?;
        volumes.add(
            json!({"emptyDir": {"medium": "Memory", "sizeLimit": bytes.to_string()}}),
            "/dev/shm",
            false,
        )?;
    }
    Ok(volumes)
}

/// `[SOURCE:]PATH[:OPTIONS]`.
fn volume(flag: &str, volumes: &mut Volumes) -> Result<()> {
    let parts: Vec<&str> = flag.split(':').collect();
    let (source, path, options) = match parts.as_slice() {
        [path] => ("", *path, ""),
        [path, options] if path.starts_with('/') && matches!(*options, "ro" | "rw") => {
            ("", *path, *options)
        }
        [source, path] => (*source, *path, ""),
        [source, path, options] => (*source, *path, *options),
        _ => {
            return Err(Failure::usage(format_args!(
                "invalid volume specification: '{flag}'"
            )));
        }
    };
    let mut read_only = false;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            "rw" | "z" | "Z" | "nocopy" => {}
            other => {
                return Err(Failure::daemon(format_args!("invalid mode: {other}")).with_code(125));
            }
        }
    }
    match source {
        "" => volumes.add(json!({"emptyDir": {}}), path, read_only),
        source if source.starts_with(['/', '.', '~']) => {
            Err(Failure::refused(format_args!("-v {flag}"), NO_BIND))
        }
        name => volumes.named(name, path, read_only),
    }
}

/// `type=…,source=…,target=…`.
fn mount(flag: &str, volumes: &mut Volumes) -> Result<()> {
    let invalid = |what: &str| {
        Failure::usage(format_args!(
            "invalid argument \"{flag}\" for \"--mount\" flag: {what}"
        ))
    };
    let (mut kind, mut source, mut target, mut read_only) = ("volume", "", "", false);
    let mut rest = Vec::new();
    for part in flag.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match key {
            "type" => kind = value,
            "source" | "src" => source = value,
            "target" | "destination" | "dst" => target = value,
            "readonly" | "ro" => read_only = !matches!(value, "false" | "0"),
            "volume-nocopy" => {}
            "tmpfs-size" => rest.push(format!("size={value}")),
            other => return Err(invalid(&format!("unexpected key '{other}' in '{part}'"))),
        }
    }
    if target.is_empty() {
        return Err(invalid("target is required"));
    }
    match kind {
        "volume" if source.is_empty() => volumes.add(json!({"emptyDir": {}}), target, read_only),
        "volume" => volumes.named(source, target, read_only),
        "tmpfs" => {
            let (source, _) = memory(flag, rest.iter().map(String::as_str))?;
            volumes.add(source, target, read_only)
        }
        "bind" => Err(Failure::refused(format_args!("--mount {flag}"), NO_BIND)),
        other => Err(invalid(&format!("mount type \"{other}\" unknown"))),
    }
}

/// A directory in memory with tmpfs options.
fn memory<'a>(flag: &str, options: impl Iterator<Item = &'a str>) -> Result<(Value, bool)> {
    let mut source = json!({"emptyDir": {"medium": "Memory"}});
    let mut read_only = false;
    for option in options {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        match key {
            "size" => {
                source["emptyDir"]["sizeLimit"] = units::parse_bytes(value)?.to_string().into();
            }
            "ro" => read_only = true,
            "rw" | "nosuid" | "nodev" => {}
            _ => {
                return Err(Failure::refused(
                    format_args!("option {option} of tmpfs {flag}"),
                    "the options are size, ro and rw",
                ));
            }
        }
    }
    Ok((source, read_only))
}

//! `context`: the contexts of the kubeconfig.

use std::{
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::inspect;
use crate::{
    cli::{ContextCommand, ListOptions},
    cluster::Target,
    error::{Failure, Result},
    format::{Filters, Row, Rows},
    terminal,
};

const ROWS: Rows<'_> = Rows {
    default: &["Name", "Description", "DockerEndpoint", "Error"],
    headers: &[
        ("Name", "NAME"),
        ("Description", "DESCRIPTION"),
        ("DockerEndpoint", "API SERVER"),
        ("Current", "CURRENT"),
        ("Error", "ERROR"),
    ],
    quiet: "Name",
};

/// The file that changes go to: the named one, the first of `$KUBECONFIG`, or the usual one.
fn path_of(target: &Target) -> Result<PathBuf> {
    if let Some(path) = &target.kubeconfig {
        return Ok(path.clone());
    }
    if let Some(list) = std::env::var_os("KUBECONFIG")
        && let Some(first) = std::env::split_paths(&list).find(|path| !path.as_os_str().is_empty())
    {
        return Ok(first);
    }
    std::env::var_os("HOME")
        .map(|home| PathBuf::from(home).join(".kube/config"))
        .ok_or_else(|| Failure::plain("set KUBECONFIG or HOME"))
}

/// The file as it is, with fields that hyper does not know.
fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::plain(format_args!("{}: {error}", path.display())))?;
    serde_saphyr::from_str(&text)
        .map_err(|error| Failure::plain(format_args!("{}: {error}", path.display())))
}

/// Replaces the file at once; it holds credentials.
fn write(path: &Path, config: &Value) -> Result<()> {
    let failed =
        |error: std::io::Error| Failure::plain(format_args!("{}: {error}", path.display()));
    let text = serde_saphyr::to_string(config).map_err(Failure::plain)?;
    let real = path.canonicalize().map_err(failed)?;
    let beside = real.with_extension(format!("hyper-{}", crate::names::suffix()));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(failed)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    std::fs::rename(&beside, &real).map_err(failed)
}

fn find<'a>(config: &'a Value, list: &str, name: &str) -> Option<&'a Value> {
    config[list]
        .as_array()?
        .iter()
        .find(|entry| entry["name"] == name)
}

fn missing(name: &str) -> Failure {
    Failure::plain(format_args!(
        "context \"{name}\": context not found: it is not in the kubeconfig"
    ))
}

fn server<'a>(config: &'a Value, context: &Value) -> &'a str {
    let cluster = context["context"]["cluster"].as_str().unwrap_or_default();
    find(config, "clusters", cluster)
        .and_then(|cluster| cluster["cluster"]["server"].as_str())
        .unwrap_or_default()
}

/// Runs one verb.
pub(crate) fn run(target: &Target, command: ContextCommand) -> Result<()> {
    let path = path_of(target)?;
    let mut config = read(&path)?;
    let current = target.context.clone().unwrap_or_else(|| {
        config["current-context"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    });
    match command {
        ContextCommand::Ls(options) => list(&config, &current, &options),
        ContextCommand::Show => {
            terminal::line(&current);
            Ok(())
        }
        ContextCommand::Use { name } => {
            find(&config, "contexts", &name).ok_or_else(|| missing(&name))?;
            config["current-context"] = name.clone().into();
            write(&path, &config)?;
            terminal::line(&name);
            terminal::note(&format!("Current context is now \"{name}\""));
            Ok(())
        }
        ContextCommand::Inspect { format, names } => {
            let names = if names.is_empty() {
                vec![current]
            } else {
                names
            };
            let mut objects = Vec::new();
            for name in names {
                let context = find(&config, "contexts", &name).ok_or_else(|| missing(&name))?;
                objects.push(json!({
                    "Name": name,
                    "Metadata": {"Namespace": context["context"]["namespace"], "User": context["context"]["user"], "Cluster": context["context"]["cluster"]},
                    "Endpoints": {"kubernetes": {"Host": server(&config, context)}},
                }));
            }
            inspect::print(&objects, format.as_deref())
        }
        ContextCommand::Create {
            from,
            namespace,
            docker,
            name,
        } => {
            if find(&config, "contexts", &name).is_some() {
                return Err(Failure::plain(format_args!(
                    "context \"{name}\" already exists"
                )));
            }
            let mut context = match docker {
                Some(endpoint) => of_endpoint(&config, &endpoint)?,
                None => {
                    let from = from.unwrap_or(current);
                    find(&config, "contexts", &from).ok_or_else(|| missing(&from))?["context"]
                        .clone()
                }
            };
            if let Some(namespace) = namespace {
                context["namespace"] = namespace.into();
            }
            if let Some(contexts) = config["contexts"].as_array_mut() {
                contexts.push(json!({"name": name, "context": context}));
            }
            write(&path, &config)?;
            terminal::line(&name);
            terminal::note(&format!("Successfully created context \"{name}\""));
            Ok(())
        }
        ContextCommand::Rm { force, names } => {
            for name in &names {
                find(&config, "contexts", name).ok_or_else(|| missing(name))?;
                if *name == current && !force {
                    return Err(Failure::plain(format_args!(
                        "context \"{name}\" is in use, set -f flag to force remove"
                    )));
                }
            }
            if let Some(contexts) = config["contexts"].as_array_mut() {
                contexts
                    .retain(|context| !names.iter().any(|name| context["name"] == name.as_str()));
            }
            if names.contains(&current) {
                config["current-context"] = "".into();
            }
            write(&path, &config)?;
            names.iter().for_each(|name| terminal::line(name));
            Ok(())
        }
    }
}

/// A context of a cluster that the kubeconfig knows by its address.
fn of_endpoint(config: &Value, endpoint: &str) -> Result<Value> {
    let host = endpoint
        .split(',')
        .find_map(|part| part.strip_prefix("host="))
        .ok_or_else(|| {
            Failure::usage(format_args!(
                "invalid --docker \"{endpoint}\": host=https://… is expected"
            ))
        })?;
    let context = config["contexts"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|context| server(config, context) == host);
    context.map(|context| context["context"].clone()).ok_or_else(|| {
        Failure::plain(format_args!("no cluster of the kubeconfig is at {host}: its owner gives you a kubeconfig with your credentials"))
    })
}

fn list(config: &Value, current: &str, options: &ListOptions) -> Result<()> {
    Filters::parse(&options.filter, &[])?;
    let contexts = config["contexts"].as_array().cloned().unwrap_or_default();
    let rows: Vec<Row> = contexts
        .iter()
        .map(|context| {
            let name = context["name"].as_str().unwrap_or_default();
            let marked = name == current;
            let namespace = context["context"]["namespace"]
                .as_str()
                .unwrap_or("default");
            Row::from([
                (
                    "Name",
                    if marked && options.format.is_none() && !options.quiet {
                        format!("{name} *")
                    } else {
                        name.to_owned()
                    },
                ),
                ("Description", format!("namespace {namespace}")),
                ("DockerEndpoint", server(config, context).to_owned()),
                ("Current", marked.to_string()),
                ("Error", String::new()),
            ])
        })
        .collect();
    terminal::out(&ROWS.print(&rows, options.format.as_deref(), options.quiet)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_keep_what_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Config\nextra: kept\ncurrent-context: a\nclusters:\n- name: k\n  cluster: {server: https://h}\n\
             contexts:\n- name: a\n  context: {cluster: k, user: u, namespace: n}\nusers: []\n",
        )
        .unwrap();
        let target = Target {
            kubeconfig: Some(path.clone()),
            ..Target::default()
        };
        let create = ContextCommand::Create {
            from: None,
            namespace: Some("m".into()),
            docker: None,
            name: "b".into(),
        };
        run(&target, create).unwrap();
        run(&target, ContextCommand::Use { name: "b".into() }).unwrap();
        let config = read(&path).unwrap();
        assert_eq!(config["extra"], "kept");
        assert_eq!(config["current-context"], "b");
        assert_eq!(
            find(&config, "contexts", "b").unwrap()["context"],
            json!({"cluster": "k", "user": "u", "namespace": "m"})
        );
        let remove = |force| ContextCommand::Rm {
            force,
            names: vec!["b".into()],
        };
        assert_eq!(
            run(&target, remove(false)).unwrap_err().message,
            "context \"b\" is in use, set -f flag to force remove"
        );
        run(&target, remove(true)).unwrap();
        assert!(find(&read(&path).unwrap(), "contexts", "b").is_none());
        let error = run(&target, ContextCommand::Use { name: "zz".into() }).unwrap_err();
        assert!(error.message.contains("context not found"), "{error}");
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
}

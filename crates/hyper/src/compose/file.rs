//! Reading compose files: finding them, variables, one file over another.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{
    interpolate::{interpolate, parse_env_file},
    project::Project,
};
use crate::{
    cli::ComposeFiles,
    error::{Failure, Result},
};

/// Names of the file, in the order in which they are looked for.
const NAMES: [&str; 4] = [
    "compose.yaml",
    "compose.yml",
    "docker-compose.yaml",
    "docker-compose.yml",
];
/// A file larger than this is none.
const LARGEST: u64 = 8 << 20;

/// The project of the files that are named, or of the file of this or a directory above.
pub(crate) fn load(options: &ComposeFiles) -> Result<Project> {
    let files = match options.file.as_slice() {
        [] => vec![search(
            options
                .project_directory
                .as_deref()
                .unwrap_or(Path::new(".")),
        )?],
        files => files.to_vec(),
    };
    let directory = match (&options.project_directory, files[0].parent()) {
        (Some(directory), _) => directory.clone(),
        (None, Some(parent)) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let variables = variables(options, &directory)?;
    let mut whole = Value::Null;
    for file in &files {
        let mut one = parse(file)?;
        expand(&mut one, &variables)?;
        check_shape(&one, file)?;
        merge(&mut whole, one);
    }
    let name = project_name(options, &whole, &directory)?;
    Project::of(&whole, name, &directory, &options.profile)
}

fn search(from: &Path) -> Result<PathBuf> {
    let start = std::path::absolute(from).map_err(Failure::plain)?;
    for directory in start.ancestors() {
        for name in NAMES {
            let path = directory.join(name);
            if path.is_file() {
                return Ok(path);
            }
        }
    }
    Err(Failure::plain("no configuration file provided: not found").with_code(14))
}

/// Variables: the environment before files.
fn variables(options: &ComposeFiles, directory: &Path) -> Result<BTreeMap<String, String>> {
    let mut variables = BTreeMap::new();
    let usual = directory.join(".env");
    let files = match options.env_file.as_slice() {
        [] if usual.is_file() => vec![usual],
        files => files.to_vec(),
    };
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|error| {
            Failure::usage(format_args!(
                "couldn't read env file {}: {error}",
                file.display()
            ))
        })?;
        variables.extend(parse_env_file(&text));
    }
    variables.extend(
        std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))),
    );
    Ok(variables)
}

fn parse(path: &Path) -> Result<Value> {
    let named =
        |error: &dyn std::fmt::Display| Failure::usage(format_args!("{}: {error}", path.display()));
    let size = std::fs::metadata(path)
        .map_err(|error| named(&error))?
        .len();
    if size > LARGEST {
        return Err(named(&"the file is too large"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
    serde_saphyr::from_str(&text).map_err(|error| named(&error))
}

/// Replaces variables in all values, not in keys.
fn expand(value: &mut Value, variables: &BTreeMap<String, String>) -> Result<()> {
    match value {
        Value::String(text) if text.contains('$') => *text = interpolate(text, variables)?,
        Value::Array(list) => {
            for item in list {
                expand(item, variables)?;
            }
        }
        Value::Object(map) => {
            for item in map.values_mut() {
                expand(item, variables)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn check_shape(value: &Value, path: &Path) -> Result<()> {
    let Value::Object(map) = value else {
        return Err(Failure::usage(format_args!(
            "{}: top-level object must be a mapping",
            path.display()
        )));
    };
    for key in map.keys() {
        if !(matches!(
            key.as_str(),
            "version" | "name" | "services" | "networks" | "volumes"
        ) || key.starts_with("x-"))
        {
            let advice = match key.as_str() {
                "secrets" | "configs" => "; keep it in a Secret or ConfigMap with kubectl",
                "include" => "; name several files with -f",
                _ => "",
            };
            return Err(Failure::usage(format_args!(
                "{}: additional properties '{key}' not allowed{advice}",
                path.display()
            )));
        }
    }
    Ok(())
}

/// Lays one file over another: mappings key by key, lists end to end, but for commands.
fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                match under.get_mut(&key) {
                    Some(old) if !matches!(key.as_str(), "command" | "entrypoint") => {
                        merge(old, value);
                    }
                    _ => {
                        under.insert(key, value);
                    }
                }
            }
        }
        (Value::Array(under), Value::Array(over)) => {
            for item in over {
                if !under.contains(&item) {
                    under.push(item);
                }
            }
        }
        (under, over) => *under = over,
    }
}

/// The project's name: said, of the file, or of the directory.
fn project_name(options: &ComposeFiles, whole: &Value, directory: &Path) -> Result<String> {
    let said = options
        .project_name
        .clone()
        .or_else(|| whole["name"].as_str().map(str::to_owned));
    if let Some(name) = said {
        let valid = name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_'))
            && name
                .chars()
                .next()
                .is_some_and(|c| c.is_ascii_alphanumeric())
            && name
                .chars()
                .last()
                .is_some_and(|c| c.is_ascii_alphanumeric())
            && name.len() <= 40;
        if !valid {
            return Err(Failure::usage(format_args!(
                "invalid project name \"{name}\": must consist only of lowercase alphanumeric characters, hyphens, and underscores as well as start with a letter or number"
            )));
        }
        return Ok(name);
    }
    let absolute = directory
        .canonicalize()
        .map_err(|error| Failure::usage(format_args!("{}: {error}", directory.display())))?;
    let name: String = absolute
        .file_name()
        .map(|name| name.to_string_lossy().to_ascii_lowercase())
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        .take(40)
        .collect();
    let name = name.trim_matches(['-', '_']).to_owned();
    if name.is_empty() {
        return Err(Failure::usage(
            "project name must not be empty; use --project-name",
        ));
    }
    Ok(name)
}

/// A mapping, or nothing.
pub(super) fn mapping<'a>(value: &'a Value, what: &str) -> Result<Option<&'a Map<String, Value>>> {
    match value {
        Value::Null => Ok(None),
        Value::Object(map) => Ok(Some(map)),
        _ => Err(Failure::usage(format_args!("{what} must be a mapping"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options(files: &[&Path]) -> ComposeFiles {
        ComposeFiles {
            file: files.iter().map(|path| (*path).to_owned()).collect(),
            project_name: None,
            project_directory: None,
            profile: Vec::new(),
            env_file: Vec::new(),
        }
    }

    #[test]
    fn files_lie_over_one_another_and_variables_come_from_dot_env() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one.yaml"), dir.path().join("two.yaml"));
        std::fs::write(dir.path().join(".env"), "HYPER_TEST_TAG=7\n").unwrap();
        std::fs::write(&one, "name: shop\nservices:\n  web:\n    image: \"web:${HYPER_TEST_TAG}\"\n    command: [a]\n    ports: [\"80:80\"]\n").unwrap();
        std::fs::write(
            &two,
            "services:\n  web:\n    command: [b]\n    ports: [\"81:81\"]\n",
        )
        .unwrap();
        let project = load(&options(&[&one, &two])).unwrap();
        assert_eq!(project.name, "shop");
        let web = &project.services["web"];
        assert_eq!(web.create.image_and_command, ["web:7", "b"]);
        assert_eq!(web.create.publish, ["80:80", "81:81"]);
    }

    #[test]
    fn an_unknown_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("compose.yaml");
        std::fs::write(&path, "services: {}\nsecrets: {}\n").unwrap();
        let error = load(&options(&[&path])).unwrap_err();
        assert!(
            error
                .message
                .contains("additional properties 'secrets' not allowed"),
            "{error}"
        );
        assert_eq!(error.code, 125);
    }

    #[test]
    fn lists_are_joined_and_scalars_exchanged() {
        let mut under = json!({"a": [1], "b": {"c": 1, "d": 2}, "command": ["x"]});
        merge(
            &mut under,
            json!({"a": [1, 2], "b": {"c": 3}, "command": ["y"]}),
        );
        assert_eq!(
            under,
            json!({"a": [1, 2], "b": {"c": 3, "d": 2}, "command": ["y"]})
        );
    }
}

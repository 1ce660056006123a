//! Network configuration lists (CNI specification, section 1) as administrators put them down.

use std::{fs, io, path::Path};

use hypernetes_types::{EGRESS_BANDWIDTH_ANNOTATION, INGRESS_BANDWIDTH_ANNOTATION};
use serde_json::{Map, Value, json};

use crate::{NetworkError, PodNetworkRequest};

/// Largest configuration file.
const MAX_SIZE: u64 = 1 << 20;
/// Most plugins of a list.
const MAX_PLUGINS: usize = 32;
/// Versions of the specification that this runtime speaks, the latest last.
const VERSIONS: [&str; 6] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "1.1.1"];

/// A checked configuration list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConfList {
    /// Its name.
    pub(super) name: String,
    /// Version of the specification that its plugins are spoken to in.
    pub(super) version: String,
    /// `disableCheck`.
    pub(super) disable_check: bool,
    /// `disableGC`.
    pub(super) disable_gc: bool,
    plugins: Vec<Map<String, Value>>,
}

fn not_ready(message: impl Into<String>) -> NetworkError {
    NetworkError::NotReady(message.into())
}

impl ConfList {
    /// The list that is in force: the first file of the directory in the order of names.
    pub(super) fn load(dir: &Path) -> Result<Self, NetworkError> {
        let none = || {
            not_ready(format!(
                "no network configuration (*.conflist, *.conf, *.json) in {}",
                dir.display()
            ))
        };
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(none()),
            other => {
                other.map_err(|error| not_ready(format!("read {}: {error}", dir.display())))?
            }
        };
        let is_config = |path: &Path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conflist" | "conf" | "json"))
        };
        let mut paths: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_config(path))
            .collect();
        paths.sort();
        let path = paths.into_iter().next().ok_or_else(none)?;
        let bad = |why: String| not_ready(format!("{}: {why}", path.display()));
        let size = fs::metadata(&path).map_err(|error| bad(error.to_string()))?;
        if size.len() > MAX_SIZE {
            return Err(bad(format!("must be at most {MAX_SIZE} bytes")));
        }
        let bytes = fs::read(&path).map_err(|error| bad(error.to_string()))?;
        let value = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        Self::parse(value).map_err(bad)
    }

    /// A list, or the configuration of one plugin, which is a list of one.
    pub(super) fn parse(value: Value) -> Result<Self, String> {
        let Value::Object(mut list) = value else {
            return Err("must be a JSON object".to_owned());
        };
        let text = |map: &Map<String, Value>, field: &str| -> Result<String, String> {
            match map.get(field) {
                Some(Value::String(text)) => Ok(text.clone()),
                None => Ok(String::new()),
                Some(_) => Err(format!("{field} must be a string")),
            }
        };
        let flag = |map: &Map<String, Value>, field: &str| match map.get(field) {
            Some(Value::Bool(value)) => Ok(*value),
            None => Ok(false),
            // Written so by some tools (CNI 1.1, section 1).
            Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
            Some(_) => Err(format!("{field} must be a boolean")),
        };
        let name = text(&list, "name")?;
        let mut characters = name.chars();
        let first = characters.next().is_some_and(|c| c.is_ascii_alphanumeric());
        if !first || !characters.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c)) {
            return Err(format!(
                "name {name:?} must be letters, digits, '_', '.' and '-', beginning with a letter or digit"
            ));
        }
        let mut version = text(&list, "cniVersion")?;
        // A list for several versions names them apart (CNI 1.1, section 1).
        if let Some(Value::Array(versions)) = list.get("cniVersions") {
            let spoken = |known: &&&str| versions.iter().any(|value| value.as_str() == Some(known));
            if let Some(best) = VERSIONS.iter().rev().find(spoken) {
                version = (*best).to_owned();
            }
        }
        if !VERSIONS.contains(&version.as_str()) {
            return Err(format!(
                "cniVersion {version:?} is not spoken here; it must be one of {}",
                VERSIONS.join(", ")
            ));
        }
        let (disable_check, disable_gc) = (flag(&list, "disableCheck")?, flag(&list, "disableGC")?);
        let plugins = match list.remove("plugins") {
            None => vec![Value::Object(list)],
            Some(Value::Array(plugins)) => plugins,
            Some(_) => return Err("plugins must be a list".to_owned()),
        };
        if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
            return Err(format!("plugins must be 1 to {MAX_PLUGINS}"));
        }
        let plugins = plugins
            .into_iter()
            .enumerate()
            .map(|(at, plugin)| {
                let Value::Object(plugin) = plugin else {
                    return Err(format!("plugins[{at}] must be an object"));
                };
                let kind = text(&plugin, "type").map_err(|why| format!("plugins[{at}].{why}"))?;
                // It becomes a file name.
                if kind.is_empty() || kind.contains(['/', '\\', '\0']) || kind.starts_with('.') {
                    return Err(format!(
                        "plugins[{at}].type {kind:?} must be the name of a program"
                    ));
                }
                Ok(plugin)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name,
            version,
            disable_check,
            disable_gc,
            plugins,
        })
    }

    /// As it is kept with a pod, for what is run for it later: [`ConfList::parse`] takes it back.
    pub(super) fn to_value(&self) -> Value {
        json!({
            "name": self.name,
            "cniVersion": self.version,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "plugins": self.plugins,
        })
    }

    /// Names of the plugins' programs, in order.
    pub(super) fn types(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().map(|plugin| {
            plugin
                .get("type")
                .and_then(Value::as_str)
                .unwrap_or_default()
        })
    }

    /// Whether a plugin says that it takes this part of the runtime's configuration.
    fn has_capability(&self, name: &str) -> bool {
        self.plugins.iter().any(|plugin| capable(plugin, name))
    }

    /// Refuses a pod that asks for what no plugin does.
    pub(super) fn check_capabilities(
        &self,
        request: &PodNetworkRequest,
    ) -> Result<(), NetworkError> {
        let missing = |what: &str, capability: &str| {
            not_ready(format!(
                "{what} need a plugin with the capability {capability}, which configuration {:?} has not",
                self.name
            ))
        };
        if !request.host_ports.is_empty() && !self.has_capability("portMappings") {
            return Err(missing("host ports", "portMappings (portmap)"));
        }
        if request.bandwidth.is_limited() && !self.has_capability("bandwidth") {
            let annotations = format!(
                "annotations {INGRESS_BANDWIDTH_ANNOTATION} and {EGRESS_BANDWIDTH_ANNOTATION}"
            );
            return Err(missing(&annotations, "bandwidth (bandwidth)"));
        }
        Ok(())
    }

    /// What plugin `at` is given on its standard input (section 3, "Deriving execution
    /// configuration").
    pub(super) fn input(
        &self,
        at: usize,
        runtime: &Map<String, Value>,
        previous: Option<&Value>,
        more: Option<(&str, Value)>,
    ) -> Vec<u8> {
        let mut input = self.plugins.get(at).cloned().unwrap_or_default();
        let given: Map<_, _> = runtime
            .iter()
            .filter(|(name, _)| capable(&input, name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        input.remove("capabilities");
        input.insert("name".into(), self.name.clone().into());
        input.insert("cniVersion".into(), self.version.clone().into());
        if !given.is_empty() {
            input.insert("runtimeConfig".into(), Value::Object(given));
        }
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.clone());
        }
        if let Some((name, value)) = more {
            input.insert(name.into(), value);
        }
        Value::Object(input).to_string().into_bytes()
    }
}

fn capable(plugin: &Map<String, Value>, name: &str) -> bool {
    plugin
        .get("capabilities")
        .and_then(|all| all.get(name))
        .and_then(Value::as_bool)
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> Value {
        json!({
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {"type": "bridge", "bridge": "cni0"},
                {"type": "portmap", "capabilities": {"portMappings": true, "other": false}},
            ],
        })
    }

    #[test]
    fn a_plugin_gets_what_it_can_do_and_no_more() {
        let list = ConfList::parse(list()).unwrap();
        let runtime = json!({"portMappings": [{"hostPort": 1}], "other": 1});
        let runtime = runtime.as_object().unwrap();
        let result = json!({"ips": []});
        let input =
            |at| serde_json::from_slice::<Value>(&list.input(at, runtime, Some(&result), None));
        assert_eq!(
            input(0).unwrap(),
            json!({"type": "bridge", "bridge": "cni0", "name": "pods", "cniVersion": "1.0.0", "prevResult": {"ips": []}})
        );
        assert_eq!(
            input(1).unwrap()["runtimeConfig"],
            json!({"portMappings": [{"hostPort": 1}]})
        );
        assert!(list.has_capability("portMappings") && !list.has_capability("other"));
        assert_eq!(list.types().collect::<Vec<_>>(), ["bridge", "portmap"]);
        assert_eq!(ConfList::parse(list.to_value()).unwrap(), list);
    }

    #[test]
    fn one_plugin_is_a_list_of_one() {
        let one = json!({"cniVersion": "0.4.0", "name": "one", "type": "ptp", "mtu": 1400});
        let list = ConfList::parse(one).unwrap();
        assert_eq!(list.types().collect::<Vec<_>>(), ["ptp"]);
    }

    #[test]
    fn the_latest_common_version_is_spoken() {
        let mut value = list();
        value["cniVersions"] = json!(["0.4.0", "1.1.0", "9.0.0"]);
        assert_eq!(ConfList::parse(value).unwrap().version, "1.1.0");
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_field() {
        for (change, word) in [
            (json!({"name": "a/b"}), "name"),
            (json!({"name": ""}), "name"),
            (json!({"cniVersion": "0.2.0"}), "cniVersion"),
            (json!({"plugins": []}), "plugins"),
            (json!({"plugins": {}}), "plugins"),
            (json!({"plugins": [{"type": "../x"}]}), "plugins[0].type"),
            (json!({"plugins": [{"type": 1}]}), "plugins[0].type"),
            (json!({"disableCheck": 1}), "disableCheck"),
        ] {
            let mut value = list();
            value
                .as_object_mut()
                .unwrap()
                .extend(change.as_object().unwrap().clone());
            let error = ConfList::parse(value).unwrap_err();
            assert!(error.contains(word), "{change}: {error}");
        }
    }

    #[test]
    fn the_first_file_counts() {
        let dir = tempfile::tempdir().unwrap();
        let load = || ConfList::load(dir.path());
        let missing = load().unwrap_err().to_string();
        assert!(missing.contains("no network configuration"), "{missing}");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("00-readme.txt", "not a configuration");
        write("20-b.conflist", &list().to_string());
        write(
            "10-a.conf",
            r#"{"cniVersion":"1.0.0","name":"first","type":"ptp"}"#,
        );
        assert_eq!(load().unwrap().name, "first");
        write("05.json", "{");
        let broken = load().unwrap_err().to_string();
        assert!(broken.contains("05.json"), "{broken}");
    }
}

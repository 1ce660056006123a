//! ConfigMaps and Secrets that pods refer to, read when they are needed.

use std::collections::BTreeMap;

use bytes::Bytes;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::{Api, Client, ResourceExt as _};

/// Keys and their content.
pub(crate) type Data = BTreeMap<String, Bytes>;

/// Why a source cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error("{kind} \"{name}\" not found")]
    NotFound { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    Key {
        key: String,
        kind: &'static str,
        namespace: String,
        name: String,
    },
    #[error("references non-existent config key: {key}")]
    Item { key: String },
    #[error("cannot read {kind} {name}")]
    Api {
        kind: &'static str,
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
}

/// A kind and name in a pod's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum SourceName {
    ConfigMap(String),
    Secret(String),
    Claim(String),
}

/// Reads sources through the API.
#[derive(Clone)]
pub(crate) struct Sources {
    client: Client,
}

impl Sources {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Where claims are read.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Text and binary data of a ConfigMap; `None` if it is optional and absent.
    pub(crate) async fn config_map(
        &self,
        namespace: &str,
        name: &str,
        optional: bool,
    ) -> Result<Option<Data>, SourceError> {
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        let found = api.get_opt(name).await.map_err(|source| SourceError::Api {
            kind: "configmap",
            name: name.to_owned(),
            source: Box::new(source),
        })?;
        let Some(map) = found else {
            return absent("configmap", name, optional);
        };
        let text = map
            .data
            .into_iter()
            .flatten()
            .map(|(key, value)| (key, Bytes::from(value)));
        let binary = map
            .binary_data
            .into_iter()
            .flatten()
            .map(|(key, value)| (key, Bytes::from(value.0)));
        Ok(Some(text.chain(binary).collect()))
    }

    /// Data of a Secret; `None` if it is optional and absent.
    pub(crate) async fn secret(
        &self,
        namespace: &str,
        name: &str,
        optional: bool,
    ) -> Result<Option<Data>, SourceError> {
        let api = Api::<Secret>::namespaced(self.client.clone(), namespace);
        let found = api.get_opt(name).await.map_err(|source| SourceError::Api {
            kind: "secret",
            name: name.to_owned(),
            source: Box::new(source),
        })?;
        let Some(secret) = found else {
            return absent("secret", name, optional);
        };
        Ok(Some(
            secret
                .data
                .into_iter()
                .flatten()
                .map(|(key, value)| (key, Bytes::from(value.0)))
                .collect(),
        ))
    }
}

fn absent(kind: &'static str, name: &str, optional: bool) -> Result<Option<Data>, SourceError> {
    if optional {
        Ok(None)
    } else {
        Err(SourceError::NotFound {
            kind,
            name: name.to_owned(),
        })
    }
}

/// All sources that the pod names, so that a change of one wakes the pod.
pub(crate) fn referenced(pod: &Pod) -> Vec<SourceName> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let mut names = Vec::new();
    for volume in spec.volumes.iter().flatten() {
        if let Some(claim) = crate::claims::name_of(&pod.name_any(), volume) {
            names.push(SourceName::Claim(claim));
        }
        if let Some(map) = &volume.config_map {
            names.push(SourceName::ConfigMap(map.name.clone()));
        }
        if let Some(name) = volume
            .secret
            .as_ref()
            .and_then(|secret| secret.secret_name.clone())
        {
            names.push(SourceName::Secret(name));
        }
        let projected = volume.projected.iter();
        for part in projected.flat_map(|projected| projected.sources.iter().flatten()) {
            if let Some(map) = &part.config_map {
                names.push(SourceName::ConfigMap(map.name.clone()));
            }
            if let Some(secret) = &part.secret {
                names.push(SourceName::Secret(secret.name.clone()));
            }
        }
    }
    for secret in spec.image_pull_secrets.iter().flatten() {
        names.push(SourceName::Secret(secret.name.clone()));
    }
    for (container, _) in crate::roles::all(spec) {
        for from in container.env_from.iter().flatten() {
            if let Some(reference) = &from.config_map_ref {
                names.push(SourceName::ConfigMap(reference.name.clone()));
            }
            if let Some(reference) = &from.secret_ref {
                names.push(SourceName::Secret(reference.name.clone()));
            }
        }
        for from in container
            .env
            .iter()
            .flatten()
            .filter_map(|env| env.value_from.as_ref())
        {
            if let Some(key) = &from.config_map_key_ref {
                names.push(SourceName::ConfigMap(key.name.clone()));
            }
            if let Some(key) = &from.secret_key_ref {
                names.push(SourceName::Secret(key.name.clone()));
            }
        }
    }
    names.sort();
    names.dedup();
    names
}

//! Images: pull policy and the accounts that a pod brings for registries.

use std::{str::FromStr, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hypernetes_image::{Credentials, Image};
use hypernetes_runtime::{PodRuntime, RuntimeError};
use hypernetes_telemetry::chain;
use hypernetes_types::ImageReference;
use k8s_openapi::api::core::v1::{Container, Pod};
use serde::Deserialize;
use tokio::time::Instant;

use crate::{events::Level, plan::Waiting, sources::Sources, steps::Node};

/// Accounts that are tried for one image.
const MAX_ACCOUNTS: usize = 16;

/// `.dockerconfigjson`, and with the map alone `.dockercfg`.
#[derive(Debug, Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Debug, Clone, Deserialize)]
struct DockerAuth {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    registrytoken: String,
}

impl DockerAuth {
    fn credentials(&self) -> Option<Credentials> {
        if !self.registrytoken.is_empty() {
            return Some(Credentials::Bearer(self.registrytoken.clone()));
        }
        if !self.username.is_empty() {
            return Some(Credentials::Basic {
                username: self.username.clone(),
                password: self.password.clone(),
            });
        }
        let text = String::from_utf8(STANDARD.decode(self.auth.trim()).ok()?).ok()?;
        let (username, password) = text.split_once(':')?;
        Some(Credentials::Basic {
            username: username.to_owned(),
            password: password.to_owned(),
        })
    }
}

/// Accounts in a secret's document that are for the image, the most exact first.
pub(crate) fn accounts(
    document: &[u8],
    bare: bool,
    reference: &ImageReference,
) -> Vec<Credentials> {
    let auths = if bare {
        serde_json::from_slice(document).unwrap_or_default()
    } else {
        serde_json::from_slice::<DockerConfig>(document)
            .map(|c| c.auths)
            .unwrap_or_default()
    };
    let wanted = format!("{}/{}", reference.registry(), reference.repository());
    let mut found: Vec<(usize, Credentials)> = auths
        .iter()
        .filter_map(|(key, auth)| {
            let key = key
                .trim_start_matches("https://")
                .trim_start_matches("http://");
            let key = key
                .trim_end_matches('/')
                .trim_end_matches("/v1")
                .trim_end_matches("/v2");
            let key = match key.strip_prefix("index.docker.io") {
                Some(rest) => format!("docker.io{rest}"),
                None => key.to_owned(),
            };
            let matches = wanted
                .strip_prefix(&key)
                .is_some_and(|rest| rest.starts_with('/'))
                || wanted == key;
            matches
                .then(|| auth.credentials().map(|account| (key.len(), account)))
                .flatten()
        })
        .collect();
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, account)| account).collect()
}

/// Accounts of the pod's pull secrets. Secrets that do not exist are passed over, as upstream does.
async fn pod_accounts(
    sources: &Sources,
    pod: &Pod,
    reference: &ImageReference,
) -> Vec<Credentials> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let secrets = pod
        .spec
        .iter()
        .flat_map(|spec| spec.image_pull_secrets.iter().flatten());
    let mut all = Vec::new();
    for secret in secrets {
        match sources.secret(namespace, &secret.name, true).await {
            Ok(Some(data)) => {
                if let Some(document) = data.get(".dockerconfigjson") {
                    all.extend(accounts(document, false, reference));
                } else if let Some(document) = data.get(".dockercfg") {
                    all.extend(accounts(document, true, reference));
                }
            }
            Ok(None) => tracing::debug!(secret = secret.name, "a pull secret does not exist"),
            Err(error) => {
                tracing::warn!(secret = secret.name, error = %chain(&error), "cannot read a pull secret");
            }
        }
    }
    all.truncate(MAX_ACCOUNTS);
    all
}

/// Why there is no image.
#[derive(Debug)]
pub(crate) struct NoImage {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl NoImage {
    pub(crate) fn is_pull(waiting: &Waiting) -> bool {
        waiting.reason == "ImagePullBackOff"
    }
}

/// Makes the container's image be in the store, as its pull policy says.
pub(crate) async fn ensure(
    node: &Node,
    pod: &Pod,
    container: &Container,
) -> Result<Image, NoImage> {
    let (runtime, events) = (&node.runtime, &node.events);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = Some(container.name.as_str());
    let image = container.image.as_deref().unwrap_or_default();
    let reference = match ImageReference::from_str(image) {
        Ok(reference) => reference,
        Err(error) => {
            let message = format!("Failed to apply default image tag \"{image}\": {error}");
            events.pod(pod, name, Level::Warning, "InspectFailed", message.clone());
            events.pod(
                pod,
                name,
                Level::Warning,
                "Failed",
                "Error: InvalidImageName".to_owned(),
            );
            return Err(NoImage {
                reason: "InvalidImageName",
                message,
            });
        }
    };
    let policy =
        container
            .image_pull_policy
            .as_deref()
            .unwrap_or(if reference.tag() == Some("latest") {
                "Always"
            } else {
                "IfNotPresent"
            });
    if policy != "Always"
        && let Some(store) = &node.images
        && let Some(found) = crate::images::own(&node.client, store, namespace, &reference).await
    {
        let message = format!("Container image \"{image}\" already present on machine");
        events.pod(pod, name, Level::Normal, "Pulled", message);
        return Ok(found);
    }
    let accounts = pod_accounts(&node.sources, pod, &reference).await;
    let present = runtime.image(&reference.to_string()).await;
    if policy != "Always" {
        let usable = present
            .clone()
            .filter(|image| node.access.allows(&image.id.to_string(), namespace));
        if let Some(found) = usable {
            let message = format!("Container image \"{image}\" already present on machine");
            events.pod(pod, name, Level::Normal, "Pulled", message);
            return Ok(found);
        }
        if policy == "Never" {
            let message =
                format!("Container image \"{image}\" is not present with pull policy of Never");
            events.pod(
                pod,
                name,
                Level::Warning,
                "ErrImageNeverPull",
                message.clone(),
            );
            events.pod(
                pod,
                name,
                Level::Warning,
                "Failed",
                "Error: ErrImageNeverPull".to_owned(),
            );
            return Err(NoImage {
                reason: "ErrImageNeverPull",
                message,
            });
        }
    }
    events.pod(
        pod,
        name,
        Level::Normal,
        "Pulling",
        format!("Pulling image \"{image}\""),
    );
    let begun = Instant::now();
    match pull(runtime, &reference, accounts).await {
        Ok((found, with_account)) => {
            let id = found.id.to_string();
            let was_there = present.is_some_and(|image| image.id == found.id);
            if let Err(error) = node.access.pulled(&id, namespace, with_account, was_there) {
                // Without the note the image would be open to every tenant.
                let message = format!("cannot note who may use image \"{image}\": {error}");
                events.pod(pod, name, Level::Warning, "Failed", message.clone());
                return Err(NoImage {
                    reason: "ErrImagePull",
                    message,
                });
            }
            let took = go_duration(begun.elapsed());
            let message = format!(
                "Successfully pulled image \"{image}\" in {took} ({took} including waiting). \
                 Image size: {} bytes.",
                found.size
            );
            events.pod(pod, name, Level::Normal, "Pulled", message);
            Ok(found)
        }
        Err(error) => {
            let message = chain(&error).to_string();
            let said = format!("Failed to pull image \"{image}\": {message}");
            events.pod(pod, name, Level::Warning, "Failed", said);
            events.pod(
                pod,
                name,
                Level::Warning,
                "Failed",
                "Error: ErrImagePull".to_owned(),
            );
            Err(NoImage {
                reason: "ErrImagePull",
                message,
            })
        }
    }
}

/// Tries the accounts in turn, or none at all if the pod brings none. Says whether it took one.
async fn pull(
    runtime: &Arc<dyn PodRuntime>,
    reference: &ImageReference,
    accounts: Vec<Credentials>,
) -> Result<(Image, bool), RuntimeError> {
    let mut last = None;
    for account in accounts {
        match runtime.pull_image(reference, account, None).await {
            Ok(image) => return Ok((image, true)),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error),
        None => {
            let image = runtime
                .pull_image(reference, Credentials::Anonymous, None)
                .await?;
            Ok((image, false))
        }
    }
}

/// A duration as Go prints it, to milliseconds.
pub(crate) fn go_duration(duration: std::time::Duration) -> String {
    let millis = duration.as_millis();
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    let fraction = format!("{}.{:03}", rest / 1000, rest % 1000);
    let seconds = fraction.trim_end_matches('0').trim_end_matches('.');
    if minutes > 0 {
        format!("{minutes}m{seconds}s")
    } else {
        format!("{seconds}s")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn accounts_are_found_by_registry_and_path() {
        let document = br#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "YTpi"},
            "registry.local:5000": {"username": "u", "password": "p"},
            "registry.local:5000/team": {"auth": "dDp0"},
            "broken": {"auth": "!!"}}}"#;
        let of = |image: &str| accounts(document, false, &image.parse().unwrap());
        let basic = |username: &str, password: &str| Credentials::Basic {
            username: username.into(),
            password: password.into(),
        };
        assert_eq!(of("busybox"), [basic("a", "b")]);
        assert_eq!(of("registry.local:5000/x"), [basic("u", "p")]);
        assert_eq!(
            of("registry.local:5000/team/x"),
            [basic("t", "t"), basic("u", "p")]
        );
        assert_eq!(of("registry.local:5000/teamx/y"), [basic("u", "p")]);
        assert!(of("other.local/x").is_empty());
        assert!(accounts(b"nonsense", false, &"busybox".parse().unwrap()).is_empty());
        assert_eq!(
            accounts(
                br#"{"docker.io": {"auth": "YTpi"}}"#,
                true,
                &"busybox".parse().unwrap()
            ),
            [basic("a", "b")]
        );
    }

    #[test]
    fn durations_read_like_go() {
        for (millis, text) in [
            (0, "0ms"),
            (350, "350ms"),
            (1000, "1s"),
            (1234, "1.234s"),
            (61_500, "1m1.5s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(millis)), text);
        }
    }
}

//! The cluster, as the caller's kubeconfig names it.

use std::{path::PathBuf, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::{
    cli::Cli,
    error::{Failure, Result},
    model::{self, Container},
};

/// How long a finished `--rm` container of somebody who has gone stays: the caller may still read it.
const LEFT_BEHIND: i64 = 10;

/// Where to find the cluster.
#[derive(Debug, Clone, Default)]
pub(crate) struct Target {
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) context: Option<String>,
    pub(crate) namespace: Option<String>,
}

impl Target {
    pub(crate) fn of(cli: &Cli) -> Self {
        Self {
            kubeconfig: cli.kubeconfig.clone(),
            context: cli.context.clone(),
            namespace: cli.namespace.clone(),
        }
    }

    /// The kubeconfig as it is.
    pub(crate) fn read(&self) -> Result<Kubeconfig> {
        let read = match &self.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        read.map_err(|error| {
            Failure::plain(format_args!(
                "Cannot read the kubeconfig (set KUBECONFIG or --kubeconfig): {}",
                hypernetes_telemetry::chain(&error)
            ))
        })
    }

    /// A client of the cluster.
    pub(crate) async fn connect(&self) -> Result<Cluster> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let wrong = |error: &dyn std::error::Error| {
            Failure::plain(format_args!(
                "Cannot use the kubeconfig: {}",
                hypernetes_telemetry::chain(error)
            ))
        };
        let mut config = Config::from_custom_kubeconfig(self.read()?, &options)
            .await
            .map_err(|error| wrong(&error))?;
        // Logs and watches may be silent for long.
        config.read_timeout = None;
        config.connect_timeout = Some(Duration::from_secs(15));
        let namespace = self
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config.clone()).map_err(|error| wrong(&error))?;
        Ok(Cluster {
            client,
            config: config.into(),
            namespace,
            server,
        })
    }
}

/// A client of one namespace.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// What the client was made from, for what it cannot send.
    pub(crate) config: std::sync::Arc<Config>,
    pub(crate) namespace: String,
    pub(crate) server: String,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("server", &self.server)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// All containers, newest first. What `--rm` was said of and nobody waits for is removed.
    pub(crate) async fn containers(&self) -> Result<Vec<Container>> {
        let pods = self.pods().list(&ListParams::default()).await?;
        let now = Timestamp::now();
        let (left, kept): (Vec<_>, Vec<_>) = model::containers(pods.items)
            .into_iter()
            .partition(|container| is_left_behind(container, now));
        for container in left {
            self.remove(&container, Some(0)).await?;
        }
        Ok(kept)
    }

    /// The container of a name, an id, or the beginning of an id.
    pub(crate) async fn find(&self, wanted: &str) -> Result<Container> {
        find(self.containers().await?, wanted)
    }

    /// Deletes all pods of a container. One that is gone is no error.
    pub(crate) async fn remove(&self, container: &Container, grace: Option<u32>) -> Result<()> {
        for pod in container.pods() {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let params = DeleteParams {
                grace_period_seconds: grace,
                preconditions: Some(kube::api::Preconditions {
                    uid: pod.metadata.uid.clone(),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            match self.pods().delete(name, &params).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether the server is a Hypernetes: then its node honours annotations of `hypernetes.io`.
    pub(crate) async fn is_hypernetes(&self) -> Result<bool> {
        let version = self.client.apiserver_version().await?;
        Ok(version.git_version.contains("hypernetes"))
    }

    /// Whether the core group has a resource.
    pub(crate) async fn serves(&self, resource: &str) -> Result<bool> {
        let list = self.client.list_core_api_resources("v1").await?;
        Ok(list.resources.iter().any(|served| served.name == resource))
    }

    /// The tenant that owns the namespace, if that can be known.
    pub(crate) async fn tenant(&self) -> Option<String> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let namespace = namespaces.get(&self.namespace).await.ok()?;
        namespace
            .metadata
            .labels?
            .get("hypernetes.io/tenant")
            .cloned()
    }
}

fn is_left_behind(container: &Container, now: Timestamp) -> bool {
    container.auto_remove()
        && container.state().is_over()
        && container
            .finished()
            .is_none_or(|time| now.as_second() - time.as_second() > LEFT_BEHIND)
}

/// Finds one of `containers` as docker does: name, id, beginning of an id.
pub(crate) fn find(containers: Vec<Container>, wanted: &str) -> Result<Container> {
    let name = wanted.strip_prefix('/').unwrap_or(wanted);
    let missing = || Failure::daemon(format_args!("No such container: {wanted}"));
    if name.is_empty() {
        return Err(Failure::plain(
            "invalid container name or ID: value is empty",
        ));
    }
    if let Some(exact) = containers
        .iter()
        .position(|container| container.name == name || container.id == name)
    {
        return containers.into_iter().nth(exact).ok_or_else(missing);
    }
    let mut by_prefix = containers
        .into_iter()
        .filter(|container| container.id.starts_with(name));
    match (by_prefix.next(), by_prefix.next()) {
        (None, _) => Err(missing()),
        (Some(container), None) => Ok(container),
        (Some(_), Some(_)) => Err(Failure::daemon(format_args!(
            "multiple IDs found with provided prefix: {wanted}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests::{pod, status};

    #[test]
    fn containers_are_found_by_name_id_and_prefix() {
        let all = || {
            model::containers(vec![
                pod("web", 'a', json!({})),
                pod("db", 'b', json!({})),
                pod("abc", 'c', json!({})),
            ])
        };
        let found = |wanted: &str| find(all(), wanted).map(|container| container.name);
        assert_eq!(found("web").unwrap(), "web");
        assert_eq!(found("/db").unwrap(), "db");
        assert_eq!(found("bbb").unwrap(), "db");
        assert_eq!(found("abc").unwrap(), "abc", "a name before an id");
        assert_eq!(
            found("nope").unwrap_err().message,
            "Error response from daemon: No such container: nope"
        );
        let mut twins = all();
        twins.extend(model::containers(vec![pod("x", 'd', json!({}))]));
        let mut second = pod("y", 'd', json!({}));
        second
            .metadata
            .annotations
            .as_mut()
            .unwrap()
            .insert(crate::meta::ID.into(), format!("{}e", "d".repeat(63)));
        twins.extend(model::containers(vec![second]));
        assert_eq!(
            find(twins, "ddd").unwrap_err().message,
            "Error response from daemon: multiple IDs found with provided prefix: ddd"
        );
    }

    #[test]
    fn what_rm_left_is_left_behind_after_a_while() {
        let mut gone = pod(
            "x",
            'a',
            status(
                "Succeeded",
                json!({"terminated": {"exitCode": 0, "finishedAt": "2026-01-02T03:00:00Z"}}),
            ),
        );
        gone.metadata
            .annotations
            .as_mut()
            .unwrap()
            .insert(crate::meta::AUTO_REMOVE.into(), "true".into());
        let container = model::containers(vec![gone]).remove(0);
        assert!(!is_left_behind(
            &container,
            "2026-01-02T03:00:05Z".parse().unwrap()
        ));
        assert!(is_left_behind(
            &container,
            "2026-01-02T03:00:11Z".parse().unwrap()
        ));
    }
}

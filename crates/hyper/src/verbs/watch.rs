//! Waiting for what a container becomes.

use futures::StreamExt as _;
use kube::runtime::watcher::watch_object;

use crate::{
    cluster::Cluster,
    error::{Failure, Result},
    model::{self, Container},
};

/// Looks at a container's present pod until `look` gives something. `None` is a pod that is gone.
pub(crate) async fn until<T>(
    cluster: &Cluster,
    container: &Container,
    mut look: impl FnMut(Option<&Container>) -> Option<T>,
) -> Result<T> {
    let mut changes = watch_object(cluster.pods(), container.pod_name()).boxed();
    while let Some(change) = changes.next().await {
        let pod = match change {
            Ok(pod) => pod,
            // The watch starts again by itself; what stays wrong, a request says.
            Err(_) => cluster.pods().get_opt(container.pod_name()).await?,
        };
        let pod = pod.filter(|pod| pod.metadata.uid == container.pod.metadata.uid);
        let now = pod.map(|pod| Container {
            pod,
            ..container.clone()
        });
        if let Some(found) = look(now.as_ref()) {
            return Ok(found);
        }
    }
    Err(Failure::plain("the connection to the cluster was lost"))
}

/// How a start went.
#[derive(Debug, Clone)]
pub(crate) enum Started {
    /// It runs, or has run.
    Yes(Box<Container>),
    /// It will not: reason and message.
    No(String, String),
}

/// Reasons for which a container does not start, and will not by waiting.
const HOPELESS: [&str; 9] = [
    "CloneError",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "StartError",
];

/// Waits until the container runs or has ended, or cannot start.
pub(crate) async fn started(cluster: &Cluster, container: &Container) -> Result<Started> {
    until(cluster, container, |now| {
        let Some(now) = now else {
            return Some(Started::No(
                "Removed".to_owned(),
                format!("No such container: {}", container.name),
            ));
        };
        if let Some((reason, message)) = now.waiting()
            && HOPELESS.contains(&reason.as_str())
        {
            return Some(Started::No(reason, message));
        }
        match now.state() {
            model::State::Running
            | model::State::Paused
            | model::State::Suspended
            | model::State::Exited
            | model::State::Restarting => Some(Started::Yes(Box::new(now.clone()))),
            model::State::Dead => {
                let status = now.pod.status.clone().unwrap_or_default();
                Some(Started::No(
                    status.reason.unwrap_or_default(),
                    status.message.unwrap_or_default(),
                ))
            }
            model::State::Created | model::State::Removing => None,
        }
    })
    .await
}

/// Waits until nothing of the container runs, or it is gone, and gives its exit code.
pub(crate) async fn ended(cluster: &Cluster, container: &Container) -> Result<Option<i32>> {
    until(cluster, container, |now| match now {
        None => Some(None),
        Some(now) if now.state().is_over() => Some(Some(now.exit_code())),
        Some(_) => None,
    })
    .await
}

/// Waits until the container's present pod is gone.
pub(crate) async fn gone(cluster: &Cluster, container: &Container) -> Result<()> {
    until(cluster, container, |now| now.is_none().then_some(())).await
}

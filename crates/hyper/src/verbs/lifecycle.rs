//! `start`, `stop`, `restart`, `kill`, `rm`, `wait`, `rename`, `prune`.
//!
//! Kubernetes deletes pods and does not stop them. Here a stopped container is a pod that has passed its
//! `activeDeadlineSeconds`: it has ended, and keeps its name, its exit code and its log. Started again,
//! the container gets a new pod of the same id; the old ones stay for their logs.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{AttachParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::{
    each, launch, pause, publish,
    run::{self, Foreground},
    watch,
};
use crate::{
    cli::{Kill, Prune, Remove, Rename, Restart, Start, Stop, Wait},
    cluster::Cluster,
    error::{Failure, Result},
    format::Filters,
    meta,
    model::{self, Container, State},
    names, spec, streams, terminal, units,
};

/// Earlier pods that are kept for their logs.
const KEPT_RUNS: usize = 3;

async fn patch(cluster: &Cluster, pod: &str, patch: &Value) -> Result<Pod> {
    Ok(cluster
        .pods()
        .patch(pod, &PatchParams::default(), &Patch::Merge(patch))
        .await?)
}

/// Says that a container is to stop, without waiting for it.
pub(crate) async fn begin_stop(
    cluster: &Cluster,
    container: &Container,
    grace: Option<i64>,
) -> Result<()> {
    let mut change = json!({"spec": {"activeDeadlineSeconds": 1}});
    if let Some(seconds) = grace {
        // docker: a negative time is no limit.
        let seconds = if seconds < 0 {
            i64::from(u32::MAX)
        } else {
            seconds
        };
        change["metadata"]["annotations"][meta::STOP_GRACE] = seconds.to_string().into();
    }
    match patch(cluster, container.pod_name(), &change).await {
        Err(error) if error.message.contains("not found") => Ok(()),
        other => other.map(drop),
    }
}

async fn stop_one(cluster: &Cluster, container: &Container, grace: Option<i64>) -> Result<()> {
    if container.is_gated() || container.state().is_over() {
        return Ok(());
    }
    begin_stop(cluster, container, grace).await?;
    watch::ended(cluster, container).await.map(drop)
}

/// `stop`.
pub(crate) async fn stop(cluster: &Cluster, options: &Stop) -> Result<()> {
    if let Some(signal) = &options.signal {
        return Err(Failure::refused(
            format_args!("stop --signal {signal}"),
            "say it when the container is made, with run --stop-signal, or send it with kill -s",
        ));
    }
    let stops = options.names.containers.iter().map(|name| async move {
        let container = cluster.find(name).await?;
        stop_one(cluster, &container, options.timeout).await?;
        Ok(name.clone())
    });
    report(futures::future::join_all(stops).await)
}

/// Prints names that went well, says what did not.
fn report(results: Vec<Result<String>>) -> Result<()> {
    let mut failed = None;
    for result in results {
        match result {
            Ok(name) => terminal::line(&name),
            Err(error) => {
                terminal::note(&error.message);
                failed = Some(error.code.max(1));
            }
        }
    }
    failed.map_or(Ok(()), |code| Err(Failure::exit(code)))
}

/// `start`.
pub(crate) async fn start(cluster: &Cluster, options: &Start) -> Result<()> {
    let names = &options.names.containers;
    if !(options.attach || options.interactive) {
        return each(names, |name| async move {
            let container = cluster.find(&name).await?;
            started(cluster, &container).await?;
            Ok(Some(name))
        })
        .await;
    }
    let [name] = names.as_slice() else {
        return Err(Failure::plain(
            "you cannot start and attach multiple containers at once",
        ));
    };
    let container = cluster.find(name).await?;
    let container = start_one(cluster, &container).await?;
    let container = run::start(cluster, &container, false).await??;
    let spec = container.spec();
    let foreground = Foreground {
        stdin: options.interactive && spec.stdin.unwrap_or(false),
        tty: spec.tty.unwrap_or(false),
        keys: streams::detach_keys(&options.detach_keys)?,
        sig_proxy: true,
        from_start: true,
    };
    match Box::pin(foreground.follow(cluster, &container)).await? {
        Some(code) => run::finish(code),
        None => Ok(()),
    }
}

/// Starts a container that was created or has ended.
pub(crate) async fn start_one(cluster: &Cluster, container: &Container) -> Result<Container> {
    if container.is_gated() {
        let pod = patch(
            cluster,
            container.pod_name(),
            &json!({"spec": {"schedulingGates": null}}),
        )
        .await?;
        return Ok(Container {
            pod,
            ..container.clone()
        });
    }
    match container.state() {
        State::Exited | State::Dead => Box::pin(again(cluster, container)).await,
        State::Removing => Err(Failure::daemon(format_args!(
            "container is marked for removal and cannot be started: {}",
            container.name
        ))),
        State::Paused => Err(Failure::daemon(
            "cannot start a paused container, try unpause instead",
        )),
        State::Suspended => Err(Failure::daemon(
            "cannot start a suspended container, try resume instead",
        )),
        State::Running | State::Created | State::Restarting => Ok(container.clone()),
    }
}

/// A new pod for a container that has ended.
async fn again(cluster: &Cluster, container: &Container) -> Result<Container> {
    if container.name.contains('/') {
        return Err(Failure::daemon(format_args!(
            "{} is one of several containers of a pod: start the pod with the tool that made it",
            container.name
        )));
    }
    let pod = renewed(container)?;
    let pod = launch::post(cluster, pod, "").await?;
    // The newest run counts from now on. What is too old goes.
    let mut earlier: Vec<Pod> = container.pods().cloned().collect();
    let surplus = earlier.len().saturating_sub(KEPT_RUNS);
    for old in earlier.drain(..surplus) {
        let name = old.metadata.name.unwrap_or_default();
        match cluster
            .pods()
            .delete(&name, &kube::api::DeleteParams::default())
            .await
        {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Container {
        pod,
        earlier,
        ..container.clone()
    })
}

/// The pod of the next run.
fn renewed(container: &Container) -> Result<Value> {
    let old = serde_json::to_value(&container.pod).map_err(Failure::plain)?;
    let mut labels: BTreeMap<String, String> =
        container.pod.metadata.labels.clone().unwrap_or_default();
    labels.insert(meta::NAME.to_owned(), container.name.clone());
    let mut annotations: BTreeMap<String, String> = container
        .pod
        .metadata
        .annotations
        .clone()
        .unwrap_or_default();
    annotations.remove(meta::STOP_GRACE);
    annotations.remove(meta::PAUSED);
    annotations.remove(meta::SUSPENDED);
    // What starts again starts from its image.
    annotations.remove(meta::CLONE_OF);
    annotations.insert(meta::ID.to_owned(), container.id.clone());
    annotations.insert(meta::CREATED.to_owned(), container.created().to_string());
    annotations.insert(
        meta::RUN.to_owned(),
        (model::run_number(&container.pod) + 1).to_string(),
    );
    let mut spec = old["spec"].clone();
    if let Some(fields) = spec.as_object_mut() {
        for field in ["nodeName", "activeDeadlineSeconds", "ephemeralContainers"] {
            fields.remove(field);
        }
    }
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("{}-{}", names::of_pod(&container.name), names::suffix()), "labels": labels, "annotations": annotations},
        "spec": spec,
    }))
}

/// `restart`.
pub(crate) async fn restart(cluster: &Cluster, options: &Restart) -> Result<()> {
    each(&options.names.containers, |name| async move {
        let container = cluster.find(&name).await?;
        restart_one(cluster, &container, options.timeout).await?;
        Ok(Some(name))
    })
    .await
}

/// Stops and starts one container.
pub(crate) async fn restart_one(
    cluster: &Cluster,
    container: &Container,
    grace: Option<i64>,
) -> Result<Container> {
    stop_one(cluster, container, grace).await?;
    let now = cluster.find(&container.id).await?;
    started(cluster, &now).await
}

/// Starts a container and waits until it runs, as docker does.
async fn started(cluster: &Cluster, container: &Container) -> Result<Container> {
    let begun = start_one(cluster, container).await?;
    run::start(cluster, &begun, true).await?
}

/// Stops one container and waits for it.
pub(crate) async fn stop_container(
    cluster: &Cluster,
    container: &Container,
    grace: Option<i64>,
) -> Result<()> {
    stop_one(cluster, container, grace).await
}

/// Sends a signal to the first process of a container.
pub(crate) async fn signal(cluster: &Cluster, container: &Container, name: &str) -> Result<()> {
    let shared = container
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.share_process_namespace)
        .unwrap_or(false);
    if shared {
        return Err(Failure::refused(
            format_args!("kill -s {name} of a container with --init"),
            "only KILL; its first process is not the container's",
        ));
    }
    let params = AttachParams::default()
        .stdout(true)
        .stderr(true)
        .container(container.spec().name);
    let short = name.trim_start_matches("SIG").to_owned();
    let command = ["kill".to_owned(), format!("-{short}"), "1".to_owned()];
    let mut process = super::exec::open(cluster, container, &command, &params).await?;
    let status = match process.take_status() {
        Some(status) => status.await,
        None => None,
    };
    match streams::exit_of(status.as_ref())? {
        0 => Ok(()),
        code => Err(Failure::daemon(format_args!(
            "cannot kill container: {}: kill in the container ended with {code}",
            container.name
        ))),
    }
}

/// `kill`.
pub(crate) async fn kill(cluster: &Cluster, options: &Kill) -> Result<()> {
    let name = spec::signal(&options.signal)?;
    let name = name.as_str();
    each(&options.names.containers, |wanted| async move {
        let container = cluster.find(&wanted).await?;
        kill_one(cluster, &container, name).await?;
        Ok(Some(wanted))
    })
    .await
}

/// Sends a signal to one container that runs.
pub(crate) async fn kill_one(cluster: &Cluster, container: &Container, name: &str) -> Result<()> {
    if !container.state().is_up() {
        return Err(Failure::daemon(format_args!(
            "cannot kill container: {}: container {} is not running",
            container.name, container.id
        )));
    }
    if name != "SIGKILL" {
        // It could not take the signal.
        match container.state() {
            State::Paused => pause::set(cluster, container, false).await?,
            State::Suspended => pause::set_suspended(cluster, container, false).await?,
            _ => {}
        }
        return signal(cluster, container, name).await;
    }
    stop_one(cluster, container, Some(0)).await
}

/// `rm`.
pub(crate) async fn remove(cluster: &Cluster, options: &Remove) -> Result<()> {
    each(&options.names.containers, |name| async move {
        let container = match cluster.find(&name).await {
            Ok(container) => container,
            Err(error) if options.force && error.message.contains("No such container") => {
                terminal::note(&error.message);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        remove_one(cluster, &container, options.force).await?;
        Ok(Some(name))
    })
    .await
}

/// Removes one container and waits until it is gone.
pub(crate) async fn remove_one(
    cluster: &Cluster,
    container: &Container,
    force: bool,
) -> Result<()> {
    let state = container.state();
    if state == State::Paused && !force {
        return Err(Failure::daemon(format_args!(
            "cannot remove container \"/{}\": container is paused and must be unpaused first",
            container.name
        )));
    }
    if state == State::Suspended && !force {
        return Err(Failure::daemon(format_args!(
            "cannot remove container \"/{}\": container is suspended and must be resumed first",
            container.name
        )));
    }
    if matches!(state, State::Running | State::Restarting) && !force {
        let (what, advice) = match state {
            State::Restarting => (
                "restarting",
                "stop the container before removing or force remove",
            ),
            _ => (
                "running",
                "stop the container before removing or force remove",
            ),
        };
        return Err(Failure::daemon(format_args!(
            "cannot remove container \"/{}\": container is {what}: {advice}",
            container.name
        )));
    }
    publish::withdraw(cluster, container).await?;
    cluster.remove(container, force.then_some(1)).await?;
    watch::gone(cluster, container).await
}

/// `wait`.
pub(crate) async fn wait(cluster: &Cluster, options: &Wait) -> Result<()> {
    each(&options.names.containers, |name| async move {
        let container = cluster.find(&name).await?;
        let code = watch::ended(cluster, &container).await?;
        Ok(Some(code.unwrap_or(137).to_string()))
    })
    .await
}

/// `rename`.
pub(crate) async fn rename(cluster: &Cluster, options: &Rename) -> Result<()> {
    let new = options.new_name.trim_start_matches('/');
    names::check(new)?;
    let all = cluster.containers().await?;
    let taken = all
        .iter()
        .find(|other| other.name == new)
        .map(|other| other.id.clone());
    let container = crate::cluster::find(all, &options.container)?;
    if container.name == new {
        return Err(Failure::daemon(
            "Renaming a container with the same name as its current name",
        ));
    }
    if let Some(id) = taken {
        return Err(Failure::daemon(format_args!(
            "Error when allocating new name: Conflict. The container name \"/{new}\" is already in use by container \"{id}\". You have to remove (or rename) that container to be able to reuse that name."
        )));
    }
    let change = json!({"metadata": {"labels": {meta::NAME: new}, "annotations": {meta::ID: container.id, meta::CREATED: container.created().to_string()}}});
    for pod in container.pods() {
        patch(
            cluster,
            pod.metadata.name.as_deref().unwrap_or_default(),
            &change,
        )
        .await?;
    }
    Ok(())
}

/// `container prune`.
pub(crate) async fn prune(cluster: &Cluster, options: &Prune) -> Result<()> {
    let filters = Filters::parse(&options.filter, &["until", "label"])?;
    if !options.force {
        terminal::out(
            "WARNING! This will remove all stopped containers.\nAre you sure you want to continue? [y/N] ",
        );
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err(Failure::plain("container prune has been cancelled"));
        }
    }
    let now = jiff::Timestamp::now();
    let mut until = None;
    for text in filters.values("until") {
        until = Some(units::parse_time(text, now)?);
    }
    let mut removed = Vec::new();
    for container in cluster.containers().await? {
        let idle = container.state().is_over() || container.is_gated();
        let old = until.is_none_or(|until| container.created() < until);
        if idle
            && old
            && filters.labels("label", &container.labels())
            && !container.name.contains('/')
        {
            remove_one(cluster, &container, false).await?;
            removed.push(container.id);
        }
    }
    if !removed.is_empty() {
        terminal::line(&format!("Deleted Containers:\n{}\n", removed.join("\n")));
    }
    terminal::line("Total reclaimed space: 0B");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{pod, status};

    #[test]
    fn the_next_run_is_the_same_container() {
        let mut old = pod(
            "web",
            'a',
            status("Failed", json!({"terminated": {"exitCode": 137}})),
        );
        let fields = old.spec.as_mut().unwrap();
        fields.node_name = Some("node".into());
        fields.active_deadline_seconds = Some(1);
        old.metadata
            .annotations
            .as_mut()
            .unwrap()
            .insert(meta::STOP_GRACE.into(), "0".into());
        let container = model::containers(vec![old.clone()]).remove(0);
        let next: Pod = serde_json::from_value(renewed(&container).unwrap()).unwrap();
        assert!(next.spec.as_ref().unwrap().node_name.is_none());
        assert!(
            next.spec
                .as_ref()
                .unwrap()
                .active_deadline_seconds
                .is_none()
        );
        assert_eq!(model::annotation(&next, meta::STOP_GRACE), None);
        let both = model::containers(vec![old, next]);
        assert_eq!(both.len(), 1);
        assert_eq!(
            (both[0].id.as_str(), both[0].name.as_str()),
            (container.id.as_str(), "web")
        );
        assert_eq!(both[0].created(), container.created());
        assert_eq!(model::run_number(&both[0].pod), 1);
    }
}

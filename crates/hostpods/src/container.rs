//! A container on the host, from its making to its end.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypernetes_image::Image;
use hypernetes_runtime::{
    ContainerConfig, HostMountSource, PidNamespace, RuntimeError, first_process, signal_number,
};
use hypernetes_telemetry::chain;
use hypernetes_types::ContainerId;
use tokio::time::timeout;

use crate::{
    cgroup::Hierarchies,
    monitor::{self, Launch},
    records::{
        ContainerPhase, ContainerRecord, ImageVolume, SandboxPhase, SandboxRecord, blocking,
        invalid, state, storage,
    },
    rootfs,
    runtime::{Container, Inner, Sandbox},
    spec, user,
};

/// Exit code of what was killed.
pub(crate) const KILLED: i32 = 137;
/// Exit code of what could not be run.
const NOT_RUN: i32 = 128;
const SIGKILL: u32 = 9;

/// Makes a container, or finds the one of the same name and attempt. Call with the sandbox's work
/// lock.
pub(crate) async fn create(
    inner: &Arc<Inner>,
    sandbox: &Sandbox,
    config: ContainerConfig,
) -> Result<ContainerId, RuntimeError> {
    let pod = sandbox.record();
    if pod.phase != SandboxPhase::Ready || pod.failure.is_some() {
        let phase = format!("{:?}", pod.phase).to_lowercase();
        return Err(state("create a container", "sandbox", &pod.id, phase));
    }
    for container in inner.containers_of(Some(&pod.id)) {
        let known = container.record();
        if known.config.name == config.name && known.config.attempt == config.attempt {
            return Ok(known.id);
        }
    }
    check(&pod, &config)?;
    let image = inner.config.images.get(&config.image).await?;
    let mut volumes = Vec::new();
    for mount in config.host.iter().flat_map(|host| &host.mounts) {
        if let HostMountSource::Image { image, .. } = &mount.source {
            volumes.push(inner.config.images.get(image).await?);
        }
    }
    let mut record = ContainerRecord::new(&pod, config);
    record.image_id = image.id.to_string();
    record.image_ref = match image.digests.first() {
        Some(digest) => digest.to_string(),
        None => image.id.to_string(),
    };
    record.stop_signal = match record.config.stop_signal {
        Some(signal) => signal,
        None if image.config.stop_signal.is_empty() => 15,
        None => signal_number(&image.config.stop_signal).unwrap_or(15),
    };
    let container = Container::new(record.clone());
    let made = make(inner, &pod, &container, &image, &volumes).await;
    if let Err(error) = made {
        if let Err(left) = discard(inner, &container).await {
            tracing::error!(container = %record.id, error = %chain(&left), "cannot undo the making of a container");
        }
        return Err(error);
    }
    Ok(record.id)
}

fn check(pod: &SandboxRecord, config: &ContainerConfig) -> Result<(), RuntimeError> {
    let host = config.host.as_ref();
    let host = host.ok_or_else(|| invalid("host", "must be given for a container on the host"))?;
    if host.pid == PidNamespace::Pod && !pod.config.share_process_namespace {
        return Err(invalid("host.pid", "the pod shares no process namespace"));
    }
    if config.pid_target.is_some() {
        return Err(invalid(
            "pid_target",
            "of a container on the host is host.pid",
        ));
    }
    if !config.mounts.is_empty() {
        return Err(invalid(
            "mounts",
            "of guest volumes are not for a container on the host",
        ));
    }
    let log = pod.config.log_directory.join(&config.log_path);
    // What the monitor's option cannot carry.
    if log.to_str().is_none_or(|path| path.contains([':', '\0'])) {
        return Err(invalid("log_path", "must be UTF-8 without ':'"));
    }
    Ok(())
}

/// Stores the intent, mounts, and writes the configuration.
async fn make(
    inner: &Arc<Inner>,
    pod: &SandboxRecord,
    container: &Arc<Container>,
    image: &Image,
    volumes: &[Image],
) -> Result<(), RuntimeError> {
    let id = container.record().id;
    let (bundle, run_dir) = (inner.bundle(&id), inner.config.run_dir.clone());
    let mut layers = inner.layers.lock().await;
    let own = layers.reserve(image, &id);
    let others: Vec<ImageVolume> = volumes
        .iter()
        .map(|volume| ImageVolume {
            id: volume.id.to_string(),
            layers: layers.reserve(volume, &id),
        })
        .collect();
    let all = others.iter().map(|volume| &volume.layers).chain([&own]);
    for layers in all {
        rootfs::check(layers, &run_dir, &bundle)?;
    }
    let record = inner
        .change_container(container, |record| {
            record.layers = own;
            record.volumes = others;
        })
        .await?;
    inner.insert_container(container);
    let (mounted, place) = (record.clone(), bundle.clone());
    let (image, volumes) = (image.clone(), volumes.to_vec());
    let config = image.config.clone();
    blocking("mount the container's image", move || {
        rootfs::prepare(&image, &mounted.layers, &run_dir, &place)?;
        for (index, (volume, mounted)) in volumes.iter().zip(&mounted.volumes).enumerate() {
            rootfs::prepare_volume(volume, &mounted.layers, &run_dir, &place, index)?;
        }
        Ok(())
    })
    .await?;
    drop(layers);
    let target_pid = target(inner, &record)?;
    let (sandbox_dir, pod) = (inner.sandbox_dir(&pod.id), pod.clone());
    let user = tokio::task::spawn_blocking(move || {
        configure(&record, &pod, &config, &bundle, &sandbox_dir, target_pid)
    });
    let user = user
        .await
        .map_err(|lost| storage("configure the container", lost))??;
    let created = |record: &mut ContainerRecord| {
        record.user = Some(user);
        record.phase = ContainerPhase::Created;
    };
    inner.change_container(container, created).await.map(drop)
}

/// The process namespace of the container that this one is to join.
fn target(inner: &Inner, record: &ContainerRecord) -> Result<Option<PathBuf>, RuntimeError> {
    let PidNamespace::Container(target) = record.host().pid else {
        return Ok(None);
    };
    let unusable = || {
        invalid(
            "host.pid",
            "the target must be a running container of the pod",
        )
    };
    let other = inner
        .container(&target)
        .map_err(|_unknown| unusable())?
        .record();
    if other.sandbox != record.sandbox || other.phase != ContainerPhase::Running {
        return Err(unusable());
    }
    let pid = fs::read_to_string(inner.bundle(&target).join("pid"));
    let pid = pid.map_err(|error| storage("find the target container", error))?;
    Ok(Some(format!("/proc/{}/ns/pid", pid.trim()).into()))
}

fn configure(
    record: &ContainerRecord,
    pod: &SandboxRecord,
    image: &hypernetes_image::ImageConfig,
    bundle: &Path,
    sandbox: &Path,
    target_pid: Option<PathBuf>,
) -> Result<hypernetes_runtime::ContainerUser, RuntimeError> {
    let host = pod.config.host.unwrap_or_default();
    let first = first_process(image, &record.config, &pod.hostname())?;
    let user = user::resolve(&record.config.security, &image.user, &bundle.join("rootfs"))?;
    let place = spec::Place {
        bundle,
        sandbox,
        host_ipc: host.host_ipc,
        netns: pod.netns(),
        target_pid,
        args: first.args,
        env: first.env,
        cwd: first.cwd,
        user: &user,
    };
    spec::write(record, &place)?;
    Ok(user)
}

/// Runs a container's program. Call with the sandbox's work lock.
pub(crate) async fn start(
    inner: &Arc<Inner>,
    container: &Arc<Container>,
) -> Result<(), RuntimeError> {
    let record = container.record();
    match record.phase {
        ContainerPhase::Created => {}
        ContainerPhase::Running => return Ok(()),
        phase => {
            let phase = format!("{phase:?}").to_lowercase();
            return Err(state("start", "container", &record.id, phase));
        }
    }
    let starting = |record: &mut ContainerRecord| record.phase = ContainerPhase::Starting;
    inner.change_container(container, starting).await?;
    if let Err(error) = launch(inner, container, &record).await {
        let message = error.to_string();
        if let Err(left) = clear_processes(inner, &record).await {
            tracing::error!(container = %record.id, error = %chain(&left), "cannot clear a failed start away");
        }
        let failed =
            |record: &mut ContainerRecord| record.end(NOT_RUN, "ContainerCannotRun", message);
        inner.change_container(container, failed).await?;
        return Err(error);
    }
    watch(inner, container);
    Ok(())
}

async fn launch(
    inner: &Arc<Inner>,
    container: &Container,
    record: &ContainerRecord,
) -> Result<(), RuntimeError> {
    if let Some(directory) = record.log_path.parent() {
        let made = tokio::fs::create_dir_all(directory).await;
        made.map_err(|error| storage("make the directory of the log", error))?;
    }
    let job = Launch {
        id: record.id.clone(),
        bundle: inner.bundle(&record.id),
        log: record.log_path.clone(),
        tty: record.config.tty,
        stdin: record.config.stdin,
        stdin_once: record.config.stdin_once,
        cgroup: record.monitor_cgroup.clone(),
    };
    let (programs, oci) = (inner.config.programs.clone(), inner.oci.clone());
    let launched = tokio::task::spawn_blocking(move || monitor::launch(&job, &programs, &oci));
    let pid = launched
        .await
        .map_err(|lost| storage("start the container's monitor", lost))??;
    let watched = |record: &mut ContainerRecord| record.monitor = Some(pid);
    inner.change_container(container, watched).await?;
    let started = crate::records::now_nanos();
    inner.oci.start(&record.id).await?;
    let running = |record: &mut ContainerRecord| {
        record.phase = ContainerPhase::Running;
        record.started_unix_nanos = started;
    };
    inner.change_container(container, running).await.map(drop)
}

/// Waits in the background for the end of a running container and writes it down.
pub(crate) fn watch(inner: &Arc<Inner>, container: &Arc<Container>) {
    let record = container.record();
    let found = record
        .monitor
        .and_then(|pid| monitor::find(pid, &record.id).ok().flatten());
    let (inner, container) = (Arc::downgrade(inner), Arc::clone(container));
    tokio::spawn(async move {
        if let Some(process) = found {
            process.ended().await;
        }
        let Some(inner) = inner.upgrade() else { return };
        if let Err(error) = conclude(&inner, &container).await {
            tracing::error!(container = %record.id, error = %chain(&error), "cannot write a container's end down");
        }
    });
}

/// Writes down how a container ended whose monitor is gone.
pub(crate) async fn conclude(inner: &Inner, container: &Container) -> Result<(), RuntimeError> {
    let record = container.record();
    if !record.phase.is_live() {
        return Ok(());
    }
    let (bundle, id, group) = (
        inner.bundle(&record.id),
        record.id.clone(),
        record.cgroup.clone(),
    );
    let (code, oom) = blocking("read a container's exit code", move || {
        let oom = Hierarchies::read()?.oom_killed(&group) || monitor::saw_oom(&bundle);
        Ok((monitor::exit_code(&bundle, &id), oom))
    })
    .await?;
    // What the first process leaves behind does not outlive it, whatever namespace it is in.
    if let Err(error) = clear_processes(inner, &record).await {
        tracing::error!(container = %record.id, error = %chain(&error), "cannot clear an ended container away");
    }
    let (code, reason, message) = match code {
        Some(KILLED) if oom => (KILLED, "OOMKilled", String::new()),
        Some(0) => (0, "Completed", String::new()),
        Some(code) => (code, "Error", String::new()),
        None => (
            KILLED,
            "MonitorDied",
            "the container's monitor ended before the container, which was killed".to_owned(),
        ),
    };
    let ended = |record: &mut ContainerRecord| record.end(code, reason, message);
    inner.change_container(container, ended).await.map(drop)
}

/// Writes down that a container did not survive a boot of the host.
pub(crate) async fn lose(inner: &Inner, container: &Container) -> Result<(), RuntimeError> {
    let record = container.record();
    clear_processes(inner, &record).await?;
    let (bundle, id) = (inner.bundle(&record.id), record.id.clone());
    let action = "read a container's exit code";
    let code = blocking(action, move || Ok(monitor::exit_code(&bundle, &id))).await?;
    let message = "the host was booted anew".to_owned();
    let lost = |record: &mut ContainerRecord| {
        record.end(code.unwrap_or(KILLED), "NodeRestarted", message);
    };
    inner.change_container(container, lost).await.map(drop)
}

/// Ends all processes of a container and its monitor, and makes the OCI runtime forget it.
/// Idempotent.
pub(crate) async fn clear_processes(
    inner: &Inner,
    record: &ContainerRecord,
) -> Result<(), RuntimeError> {
    let patience = inner.config.patience;
    let cgroups = blocking("find the host's cgroups", Hierarchies::read).await?;
    // The monitor first: it must not have another container made.
    if let Some(process) = monitor::left_behind(&inner.bundle(&record.id), &record.id) {
        let alone = cgroups.kill(&record.cgroup, patience).await;
        // It notes the end of its container and ends.
        if alone.is_err() || timeout(patience, process.ended()).await.is_err() {
            process.kill();
        }
    }
    cgroups.kill(&record.monitor_cgroup, patience).await?;
    cgroups.kill(&record.cgroup, patience).await?;
    inner.oci.delete(&record.id).await?;
    let (group, monitor) = (record.cgroup.clone(), record.monitor_cgroup.clone());
    blocking("remove a container's cgroups", move || {
        cgroups.remove(&group)?;
        cgroups.remove(&monitor)
    })
    .await
}

/// Ends a container: its stop signal, then `grace`, then SIGKILL.
pub(crate) async fn stop(
    inner: &Inner,
    container: &Container,
    grace: Duration,
) -> Result<(), RuntimeError> {
    let record = container.record();
    if !record.phase.is_live() {
        return Ok(());
    }
    let is_live = || container.record().phase.is_live();
    if !grace.is_zero() {
        match inner.oci.kill(&record.id, record.stop_signal, false).await {
            Ok(()) => {
                if timeout(grace, container.ended()).await.is_ok() {
                    return Ok(());
                }
            }
            Err(error) if is_live() => {
                tracing::warn!(container = %record.id, error = %chain(&error), "cannot ask a container to end");
            }
            Err(_ended) => {}
        }
    }
    if is_live()
        && let Err(error) = inner.oci.kill(&record.id, SIGKILL, true).await
    {
        // It may have ended meanwhile; its group tells.
        tracing::debug!(container = %record.id, error = %chain(&error), "the OCI runtime does not kill");
        let cgroups = blocking("find the host's cgroups", Hierarchies::read).await?;
        cgroups.kill(&record.cgroup, inner.config.patience).await?;
    }
    match timeout(inner.config.patience, container.ended()).await {
        Ok(_code) => Ok(()),
        Err(late) => Err(storage("end a container", late)),
    }
}

/// Ends and forgets a container. Call with the sandbox's work lock.
pub(crate) async fn remove(inner: &Inner, container: &Container) -> Result<(), RuntimeError> {
    stop(inner, container, Duration::ZERO).await?;
    discard(inner, container).await
}

/// Takes away all that there is of a container. Idempotent.
pub(crate) async fn discard(inner: &Inner, container: &Container) -> Result<(), RuntimeError> {
    let removing = |record: &mut ContainerRecord| record.phase = ContainerPhase::Removing;
    let record = inner.change_container(container, removing).await?;
    clear_processes(inner, &record).await?;
    let (bundle, log) = (inner.bundle(&record.id), record.log_path.clone());
    let depth = record
        .config
        .log_path
        .components()
        .count()
        .saturating_sub(1);
    blocking("clear a container away", move || {
        rootfs::clear(&bundle)?;
        match fs::remove_file(&log) {
            Err(error) if !gone(&error) => return Err(error),
            _ => {}
        }
        // Directories of the log alone, as far as nothing of others is in them.
        let own = log.ancestors().skip(1).take(depth);
        own.map_while(|directory| fs::remove_dir(directory).ok())
            .for_each(drop);
        Ok(())
    })
    .await?;
    let mut layers = inner.layers.lock().await;
    let (unneeded, run_dir) = (
        layers.unneeded_without(&record.id),
        inner.config.run_dir.clone(),
    );
    blocking("unmount layers", move || {
        unneeded
            .into_iter()
            .try_for_each(|slot| rootfs::unmount_layer(&run_dir, slot))
    })
    .await?;
    layers.release(&record.id);
    drop(layers);
    inner.records.delete_container(&record.id).await?;
    inner.forget_container(&record);
    Ok(())
}

fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

//! What a runtime does with what an earlier one left behind.
//!
//! | phase in the record | what is done |
//! | --- | --- |
//! | sandbox `Starting` | undone |
//! | sandbox `Ready` | kept; after a boot of the host it has failed |
//! | sandbox `Stopping`, `Removing` | stopped or removed to the end |
//! | container `Creating`, `Removing` | removed |
//! | container `Starting` | its processes are killed, it could not run |
//! | container `Running` | its monitor is watched again, or its exit code read; after a boot it has ended |
//!
//! Then goes what no record names: containers of the OCI runtime, directories, mounts.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::Path,
    str::FromStr,
    sync::{Arc, PoisonError},
};

use hypernetes_runtime::RuntimeError;
use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, SandboxId};

use crate::{
    config::HostConfig,
    container,
    records::{ContainerPhase, ContainerRecord, SandboxPhase, blocking, storage},
    rootfs::{self, Layers},
    runtime::{Container, Inner, Sandbox},
    sandbox,
};

/// What a runtime found at its start, and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostReport {
    /// Containers that run on.
    pub adopted: usize,
    /// Containers that had ended meanwhile.
    pub ended: usize,
    /// Sandboxes and containers whose making or end was half done.
    pub settled: usize,
    /// What belonged to nobody.
    pub orphans: usize,
    /// What could not be done and will be tried again when somebody asks, or at the next start.
    pub failures: Vec<String>,
}

/// Makes the directories, for root alone: set-user-id programs of images are in them.
pub(crate) fn make_directories(config: &HostConfig) -> io::Result<()> {
    for directory in [&config.state_dir, &config.run_dir] {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    }
    for directory in [
        config.state_dir.join("c"),
        config.run_dir.join("s"),
        config.run_dir.join("l"),
        config.run_dir.join("oci"),
    ] {
        fs::create_dir_all(directory)?;
    }
    Ok(())
}

pub(crate) async fn recover(inner: &Arc<Inner>) -> Result<HostReport, RuntimeError> {
    let mut report = HostReport::default();
    let (mut sandboxes, mut containers) = (inner.records.sandboxes()?, inner.records.containers()?);
    // Without its sandbox a container cannot be left by us; it would never go away by itself.
    let known = |id: &SandboxId| sandboxes.iter().any(|record| record.id == *id);
    let (mut kept, orphans): (Vec<_>, Vec<_>) = containers
        .drain(..)
        .partition(|record| known(&record.sandbox));
    let survived: Vec<SandboxId> = sandboxes
        .iter()
        .filter(|record| record.boot == inner.boot)
        .map(|record| record.id.clone())
        .collect();
    // Mounts do not survive a boot.
    for record in &mut kept {
        if !survived.contains(&record.sandbox) {
            record.layers.clear();
            for volume in &mut record.volumes {
                volume.layers.clear();
            }
        }
    }
    *inner.layers.lock().await = Layers::of(kept.iter().chain(&orphans));
    for record in sandboxes.drain(..) {
        let mut all = inner
            .sandboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.insert(record.id.clone(), Sandbox::new(record));
    }
    for record in orphans {
        let container = Container::new(record);
        inner.insert_container(&container);
        settle(&mut report, container::discard(inner, &container).await);
    }
    for record in kept {
        inner.insert_container(&Container::new(record));
    }
    for sandbox in inner.all_sandboxes() {
        of_sandbox(inner, &sandbox, &mut report).await;
    }
    remove_orphans(inner, &mut report).await?;
    Ok(report)
}

fn settle(report: &mut HostReport, result: Result<(), RuntimeError>) {
    match result {
        Ok(()) => report.settled += 1,
        Err(error) => {
            let error = chain(&error).to_string();
            tracing::error!(error, "cannot finish what was half done");
            report.failures.push(error);
        }
    }
}

async fn of_sandbox(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>, report: &mut HostReport) {
    let _work = sandbox.work.lock().await;
    let record = sandbox.record();
    let lost = record.boot != inner.boot;
    for container in inner.containers_of(Some(&record.id)) {
        let phase = container.record().phase;
        match phase {
            ContainerPhase::Creating | ContainerPhase::Removing => {
                settle(report, container::discard(inner, &container).await);
            }
            ContainerPhase::Starting => {
                settle(report, abandon(inner, &container).await);
            }
            ContainerPhase::Running if lost => {
                settle(report, container::lose(inner, &container).await);
            }
            ContainerPhase::Running => match of_running(inner, &container).await {
                Ok(true) => report.adopted += 1,
                Ok(false) => report.ended += 1,
                Err(error) => report.failures.push(chain(&error).to_string()),
            },
            ContainerPhase::Created if lost => {
                let message = "the host was booted anew before it was started".to_owned();
                let end = |record: &mut ContainerRecord| {
                    record.end(container::KILLED, "ContainerCannotRun", message);
                };
                settle(
                    report,
                    inner.change_container(&container, end).await.map(drop),
                );
            }
            ContainerPhase::Created | ContainerPhase::Exited => {}
        }
    }
    match record.phase {
        SandboxPhase::Starting | SandboxPhase::Removing => {
            settle(report, sandbox::remove(inner, sandbox).await);
        }
        SandboxPhase::Stopping => settle(report, sandbox::stop(inner, sandbox).await),
        SandboxPhase::Ready if lost && record.failure.is_none() => {
            settle(report, sandbox::lose(inner, sandbox).await);
        }
        SandboxPhase::Ready if record.config.share_process_namespace => {
            let file = inner.sandbox_dir(&record.id).join("pause.pid");
            let pid = fs::read_to_string(file).ok();
            let pid = pid.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
            sandbox::watch_pause(inner, sandbox, pid, None);
        }
        SandboxPhase::Ready | SandboxPhase::Stopped => {}
    }
}

/// Ends a container whose start was cut short.
async fn abandon(inner: &Inner, container: &Container) -> Result<(), RuntimeError> {
    container::clear_processes(inner, &container.record()).await?;
    let message = "the node's daemon ended while the container was starting".to_owned();
    let end = |record: &mut ContainerRecord| {
        record.end(container::KILLED, "ContainerCannotRun", message);
    };
    inner.change_container(container, end).await.map(drop)
}

/// Whether a container runs on. If it does not, its end is written down.
async fn of_running(inner: &Arc<Inner>, container: &Arc<Container>) -> Result<bool, RuntimeError> {
    let record = container.record();
    let pid = record.monitor.unwrap_or(0);
    let alive = crate::monitor::find(pid, &record.id)
        .map_err(|error| storage("find a container's monitor", error))?
        .is_some();
    if alive {
        container::watch(inner, container);
    } else {
        container::conclude(inner, container).await?;
    }
    Ok(alive)
}

fn ids<T: FromStr>(directory: &Path) -> io::Result<Vec<T>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        // Only names that can be ours: whatever else is there is somebody else's.
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse().ok()));
    }
    Ok(found)
}

/// Removes what is in our directories and in no record.
async fn remove_orphans(inner: &Arc<Inner>, report: &mut HostReport) -> Result<(), RuntimeError> {
    let (state, run) = (inner.config.state_dir.clone(), inner.config.run_dir.clone());
    let (bundles, made, shared, slots) = blocking("look for orphans", move || {
        Ok((
            ids::<ContainerId>(&state.join("c"))?,
            ids::<ContainerId>(&run.join("oci"))?,
            ids::<SandboxId>(&run.join("s"))?,
            ids::<u32>(&run.join("l"))?,
        ))
    })
    .await?;
    for id in made.into_iter().filter(|id| inner.container(id).is_err()) {
        match inner.oci.delete(&id).await {
            Ok(()) => report.orphans += 1,
            Err(error) => report.failures.push(chain(&error).to_string()),
        }
    }
    for id in bundles
        .into_iter()
        .filter(|id| inner.container(id).is_err())
    {
        let bundle = inner.bundle(&id);
        clear(report, move || rootfs::clear(&bundle)).await;
    }
    for id in shared.into_iter().filter(|id| inner.sandbox(id).is_err()) {
        let directory = inner.sandbox_dir(&id);
        clear(report, move || {
            crate::namespaces::unpin(&directory)?;
            rootfs::unmount(&directory.join("shm"))?;
            rootfs::remove_directory(&directory)
        })
        .await;
    }
    let layers = inner.layers.lock().await;
    for slot in slots.into_iter().filter(|slot| !layers.is_used(*slot)) {
        let run = inner.config.run_dir.clone();
        clear(report, move || rootfs::unmount_layer(&run, slot)).await;
    }
    Ok(())
}

async fn clear(report: &mut HostReport, work: impl FnOnce() -> io::Result<()> + Send + 'static) {
    match blocking("clear away what belongs to nobody", work).await {
        Ok(()) => report.orphans += 1,
        Err(error) => report.failures.push(chain(&error).to_string()),
    }
}

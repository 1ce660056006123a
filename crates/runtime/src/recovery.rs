//! What a runtime does with what an earlier one left behind.
//!
//! | phase in the record | what is done |
//! | --- | --- |
//! | `Starting` | undone: VM killed, lease, disk, directories and record removed |
//! | `Ready` | VM adopted, and going on if it was being copied for a clone; if it is gone, the sandbox has failed and its containers have exited |
//! | `Suspending` | finished if all of the VM is in its file, else the VM goes on |
//! | `Suspended` | kept; a VMM that could not be ended is; if the VM's file is gone, as `Ready` if the VM is |
//! | `Resuming` | undone if the file is still there: no VM has gone on from it; else its VM is adopted |
//! | `Failed`, `Stopped` | kept |
//! | `Stopping` | stopped to the end; a VM that has volumes which outlive it is asked to write them back |
//! | `Removing` | removed to the end |
//!
//! Snapshots that were being made or removed are removed. Then everything in the runtime's directories that no record
//! names goes, and volumes that are attached to
//! sandboxes which do not have them are detached. Adopted guests are given
//! a moment to answer, so that their containers are known when callers first ask; a guest that does
//! not answer holds up nobody for longer.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypernetes_types::{SandboxId, SnapshotId};
use hypernetes_vmm::{Vm, VmmError};
use tokio::time::{sleep, timeout};

use crate::{
    actor::{self, Handle, Start},
    api::Failure,
    container,
    error::RuntimeError,
    logs::format::now_nanos,
    records::{ContainerRecord, SandboxRecord},
    sandbox::{Event, Phase},
    scratch::{blocking, remove_directory},
    shared::Shared,
};

/// Attempts to adopt a VM that is there and does not answer.
const ADOPT_ATTEMPTS: u32 = 3;

/// What a runtime found at its start, and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// VMs that run on.
    pub adopted: usize,
    /// Sandboxes whose VM had ended meanwhile.
    pub lost: usize,
    /// Starts that were undone.
    pub undone: usize,
    /// Stops and removals that were finished.
    pub finished: usize,
    /// Directories that belonged to no sandbox.
    pub orphans: usize,
    /// What could not be done and will be tried again when somebody asks, or at the next start.
    pub failures: Vec<String>,
}

type Found = (HashMap<SandboxId, Handle>, RecoveryReport);

pub(crate) async fn recover(shared: &Arc<Shared>) -> Result<Found, RuntimeError> {
    let records = shared.records.sandboxes()?;
    let mut containers: HashMap<SandboxId, Vec<ContainerRecord>> = HashMap::new();
    for record in shared.records.containers()? {
        containers
            .entry(record.sandbox.clone())
            .or_default()
            .push(record);
    }
    let mut report = RecoveryReport::default();
    report.failures.extend(shared.snapshots.recover().await?);
    for record in &records {
        shared.reserve_uid(record.uid);
    }
    let with_lease = records.iter().filter(|record| record.phase.keeps_lease());
    let alive = with_lease.map(|record| record.id.clone());
    let alive: Vec<SandboxId> = alive.chain(shared.config.others.clone()).collect();
    shared.config.network.recover(&alive).await?;

    let mut handles = HashMap::new();
    let mut adopted = Vec::new();
    for record in records {
        let id = record.id.clone();
        let members = containers.remove(&id).unwrap_or_default();
        // What it is after what was cut short is decided: with a VM, or as a file.
        let record = match record.phase {
            Phase::Suspending | Phase::Resuming => match settle_suspension(shared, record).await {
                Ok(record) => record,
                Err((record, error)) => {
                    report.failures.push(format!("sandbox {id}: {error}"));
                    record
                }
            },
            _ => record,
        };
        // Of clones that did not become ready, and of snapshots.
        if let Err(error) = remove_directory(shared.copies(&id)).await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            report.failures.push(format!("sandbox {id}: {error}"));
        }
        // Its VMM may have outlived the attempt to end it.
        if record.phase == Phase::Suspended
            && let Err(error) = shared.config.vmm.destroy(&shared.run_dir(&id)).await
        {
            let error = hypernetes_telemetry::chain(&error).to_string();
            report.failures.push(format!("sandbox {id}: {error}"));
        }
        let phase = record.phase;
        let handle = match phase {
            Phase::Ready | Phase::Suspending | Phase::Resuming => {
                match adopt(shared, &record).await {
                    Ok(vm) => {
                        report.adopted += 1;
                        // It stands still if it was being copied; its containers go on with the session.
                        if record.frozen.is_some()
                            && let Err(error) = actor::let_go_on(vm.as_ref()).await
                        {
                            let error = hypernetes_telemetry::chain(&error).to_string();
                            report.failures.push(format!("sandbox {id}: {error}"));
                        }
                        let handle = actor::spawn(shared, record, members, Start::Adopted(vm));
                        adopted.push(handle.clone());
                        handle
                    }
                    Err(message) => {
                        report.lost += 1;
                        tracing::warn!(sandbox = %id, message, "a VM did not survive");
                        let (record, members) = lose(shared, record, members, message).await?;
                        actor::spawn(shared, record, members, Start::Rest)
                    }
                }
            }
            Phase::Suspended if is_gone(shared, &record).await => {
                report.lost += 1;
                let message = "the file that its suspended VM was in is gone";
                tracing::error!(sandbox = %id, message, "a VM did not survive");
                let mut record = record;
                record.set_suspension(None);
                record.phase = Phase::Ready;
                let (record, members) = lose(shared, record, members, message.into()).await?;
                actor::spawn(shared, record, members, Start::Rest)
            }
            // Its guest may be writing back what its volumes are to keep.
            Phase::Stopping if !record.attached.is_empty() => {
                let start = match adopt(shared, &record).await {
                    Ok(vm) => Start::Adopted(vm),
                    Err(_ended) => Start::Rest,
                };
                actor::spawn(shared, record, members, start)
            }
            Phase::Starting
            | Phase::Suspended
            | Phase::Failed
            | Phase::Stopping
            | Phase::Stopped
            | Phase::Removing => actor::spawn(shared, record, members, Start::Rest),
        };
        handles.insert(id, (handle, phase));
    }
    // A container without a sandbox cannot be left by us; it would never go away by itself.
    for orphan in containers.into_values().flatten() {
        shared.records.delete_container(&orphan.id).await?;
    }
    settle(handles.values(), &mut report).await;
    let known: HashMap<SandboxId, Handle> = handles
        .into_iter()
        .filter(|(_, (handle, _))| !handle.snapshot.borrow().gone)
        .map(|(id, (handle, _))| (id, handle))
        .collect();
    remove_orphans(shared, &known, &mut report).await;
    remove_orphan_snapshots(shared, &mut report).await;
    detach_gone(shared, &known, &mut report).await;
    await_guests(&adopted, shared.config.deadlines.readopt).await;
    Ok((known, report))
}

/// Finishes or undoes what was half done, all at once: each may wait for a VMM.
async fn settle(handles: impl Iterator<Item = &(Handle, Phase)>, report: &mut RecoveryReport) {
    let work = handles.map(|(handle, phase)| async move {
        let result = match phase {
            Phase::Starting | Phase::Removing => handle.remove().await,
            Phase::Stopping => handle.stop().await,
            Phase::Ready
            | Phase::Suspending
            | Phase::Suspended
            | Phase::Resuming
            | Phase::Failed
            | Phase::Stopped => Ok(()),
        };
        (handle, *phase, result)
    });
    for (handle, phase, result) in futures::future::join_all(work).await {
        match (phase, result) {
            (_, Err(error)) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::error!(sandbox = %handle.id, error, "cannot finish what was half done");
                report
                    .failures
                    .push(format!("sandbox {}: {error}", handle.id));
            }
            (Phase::Starting, Ok(())) => report.undone += 1,
            (Phase::Stopping | Phase::Removing, Ok(())) => report.finished += 1,
            (
                Phase::Ready
                | Phase::Suspending
                | Phase::Suspended
                | Phase::Resuming
                | Phase::Failed
                | Phase::Stopped,
                Ok(()),
            ) => {}
        }
    }
}

/// Decides by the file whether a suspend or a resume that was cut short is finished or undone.
async fn settle_suspension(
    shared: &Shared,
    record: SandboxRecord,
) -> Result<SandboxRecord, (SandboxRecord, String)> {
    let failed = |error: &RuntimeError| hypernetes_telemetry::chain(error).to_string();
    let file = shared.suspended_file(&record.id);
    let look = blocking(format!("look for {}", file.display()), move || {
        let whole = file.try_exists()?;
        // What was being written when it was cut short; there may be none.
        drop(std::fs::remove_file(actor::draft(&file)));
        Ok(whole)
    });
    let whole = match look.await {
        Ok(whole) => whole,
        Err(error) => return Err((record, failed(&error))),
    };
    let mut settled = record.clone();
    if whole {
        // A VMM that is still there goes next, and if not, before it is resumed.
        settled.vm = None;
        settled.phase = Phase::Suspended;
    } else {
        let going_on = async {
            let vm = adopt(shared, &record).await?;
            let resumed = actor::let_go_on(vm.as_ref()).await;
            resumed.map_err(|error| hypernetes_telemetry::chain(&error).to_string())
        };
        // A VM that is gone is found to be so in a moment.
        if let Err(message) = going_on.await {
            tracing::warn!(sandbox = %record.id, message, "a VM that stood still does not go on");
        }
        settled.set_suspension(None);
        settled.phase = Phase::Ready;
    }
    match shared.records.put_sandbox(&settled).await {
        Ok(()) => Ok(settled),
        Err(error) => Err((record, failed(&error))),
    }
}

/// Whether somebody has taken away what a suspended VM was in.
async fn is_gone(shared: &Shared, record: &SandboxRecord) -> bool {
    let file = shared.suspended_file(&record.id);
    let action = format!("look for {}", file.display());
    let there = blocking(action, move || file.try_exists()).await;
    there.is_ok_and(|there| !there)
}

async fn adopt(shared: &Shared, record: &SandboxRecord) -> Result<Arc<dyn Vm>, String> {
    let Some(vm) = &record.vm else {
        return Err("its VM is not recorded".into());
    };
    let mut attempt = 1;
    loop {
        match shared.config.vmm.adopt(vm).await {
            Ok(vm) => return Ok(Arc::from(vm)),
            Err(error @ VmmError::Gone { .. }) => return Err(error.to_string()),
            Err(error) if attempt >= ADOPT_ATTEMPTS => {
                return Err(hypernetes_telemetry::chain(&error).to_string());
            }
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(sandbox = %record.id, error, "cannot adopt a VM yet");
                attempt += 1;
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Writes down that a VM ended while nobody looked, or cannot be controlled any more.
async fn lose(
    shared: &Shared,
    mut record: SandboxRecord,
    mut containers: Vec<ContainerRecord>,
    message: String,
) -> Result<(SandboxRecord, Vec<ContainerRecord>), RuntimeError> {
    if let Err(error) = shared.config.vmm.destroy(&shared.run_dir(&record.id)).await {
        let error = hypernetes_telemetry::chain(&error).to_string();
        tracing::error!(sandbox = %record.id, error, "cannot clear away what is left of a VM");
    }
    let failure = Failure {
        reason: "VmmDied".into(),
        message,
    };
    for container in containers
        .iter_mut()
        .filter(|container| container.phase.is_live())
    {
        if let Ok(phase) = container.phase.next(container::Event::Ended) {
            container.phase = phase;
            container.exit_code = actor::KILLED;
            container.reason.clone_from(&failure.reason);
            container.message.clone_from(&failure.message);
            container.finished_unix_nanos = now_nanos();
            container.drained = true;
        }
    }
    shared.records.put_containers(&containers).await?;
    record.failure = Some(failure);
    record.vm = None;
    record.phase = record.phase.next(Event::VmExited).unwrap_or(record.phase);
    shared.records.put_sandbox(&record).await?;
    Ok((record, containers))
}

/// Removes directories that belong to no sandbox, and VMs that run in them.
async fn remove_orphans(
    shared: &Shared,
    known: &HashMap<SandboxId, Handle>,
    report: &mut RecoveryReport,
) {
    let mut found: BTreeMap<PathBuf, bool> = BTreeMap::new();
    let templates = shared.template_dir();
    for (root, has_vm) in [
        (shared.config.run_dir.as_path(), true),
        (templates.as_path(), true),
        (shared.scratch.root(), false),
    ] {
        match directories(root).await {
            Ok(directories) => found.extend(directories.into_iter().map(|path| (path, has_vm))),
            Err(error) => report
                .failures
                .push(hypernetes_telemetry::chain(&error).to_string()),
        }
    }
    for (path, has_vm) in found {
        // Only names that can be ours: whatever else is there is somebody else's.
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(Ok(id)) = name.map(str::parse::<SandboxId>) else {
            continue;
        };
        if known.contains_key(&id) {
            continue;
        }
        let removed = async {
            if has_vm {
                shared.config.vmm.destroy(&path).await?;
            }
            remove_directory(path.clone()).await
        };
        match removed.await {
            Ok(()) => report.orphans += 1,
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                report.failures.push(format!("{}: {error}", path.display()));
            }
        }
    }
}

/// Removes directories that belong to no snapshot.
async fn remove_orphan_snapshots(shared: &Shared, report: &mut RecoveryReport) {
    let removed = async {
        for path in directories(shared.snapshots.root()).await? {
            let name = path.file_name().and_then(|name| name.to_str());
            let id = name.and_then(|name| name.parse::<SnapshotId>().ok());
            if id.is_some_and(|id| !shared.snapshots.knows(&id)) {
                remove_directory(path).await?;
                report.orphans += 1;
            }
        }
        Ok::<_, RuntimeError>(())
    };
    if let Err(error) = removed.await {
        let error = hypernetes_telemetry::chain(&error).to_string();
        report.failures.push(format!("snapshots: {error}"));
    }
}

/// Gives back volumes that a sandbox had of which nothing is left, a VM least of all.
async fn detach_gone(
    shared: &Shared,
    known: &HashMap<SandboxId, Handle>,
    report: &mut RecoveryReport,
) {
    let Some(driver) = &shared.config.volumes else {
        return;
    };
    let detached = async {
        for volume in driver.list().await? {
            for pod in &volume.attached_to {
                // Others than sandboxes are somebody else's business.
                let Ok(id) = pod.parse::<SandboxId>() else {
                    continue;
                };
                let has = known.get(&id).is_some_and(|handle| {
                    let snapshot = handle.snapshot.borrow();
                    let mut attached = snapshot.record.attached.iter();
                    attached.any(|disk| disk.volume == volume.id)
                });
                // A VMM that could not be ended still has its directory, and may have the volume.
                if has || shared.run_dir(&id).exists() && !known.contains_key(&id) {
                    continue;
                }
                tracing::warn!(volume = %volume.id, sandbox = %id, "a volume was nobody's");
                driver.detach(&volume.id, pod).await?;
            }
        }
        Ok::<_, RuntimeError>(())
    };
    if let Err(error) = detached.await {
        let error = hypernetes_telemetry::chain(&error).to_string();
        report.failures.push(format!("volumes: {error}"));
    }
}

async fn directories(root: &Path) -> Result<Vec<PathBuf>, RuntimeError> {
    let root = root.to_owned();
    blocking(format!("list {}", root.display()), move || {
        let entries = match std::fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    })
    .await
}

async fn await_guests(adopted: &[Handle], patience: Duration) {
    let sessions = adopted.iter().map(|handle| async {
        let mut snapshot = handle.snapshot.clone();
        let Ok(linked) = snapshot.wait_for(|snapshot| snapshot.link.is_some()).await else {
            return;
        };
        let link = linked.link.clone();
        drop(linked);
        if let Some(mut link) = link {
            drop(link.wait_for(|link| link.client.is_some()).await);
        }
    });
    // Those that are late are connected in the background.
    drop(timeout(patience, futures::future::join_all(sessions)).await);
}

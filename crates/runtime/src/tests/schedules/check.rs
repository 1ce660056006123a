//! What must hold of a runtime that has settled.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Mutex,
};

use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_volume::VolumeDriver;

use super::{
    client::volume,
    model::{Container, Model, Pod},
};
use crate::{
    container::Phase,
    identity::SCRATCH_SLOT,
    records::{ContainerRecord, Records, SandboxRecord},
    testing::{STDOUT, World},
    *,
};

type Verdict = Result<(), String>;

fn claim(holds: bool, otherwise: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// What is shown, by id.
struct Shown {
    sandboxes: BTreeMap<SandboxId, SandboxStatus>,
    containers: BTreeMap<ContainerId, ContainerStatus>,
    records: Vec<SandboxRecord>,
    container_records: Vec<ContainerRecord>,
}

impl Shown {
    async fn new(world: &World, runtime: &NodeRuntime) -> Self {
        let records = Records::new(world.store.clone());
        let sandboxes = runtime.list_sandboxes().await;
        let containers = runtime.list_containers(None).await;
        Self {
            sandboxes: sandboxes
                .into_iter()
                .map(|it| (it.id.clone(), it))
                .collect(),
            containers: containers
                .into_iter()
                .map(|it| (it.id.clone(), it))
                .collect(),
            records: records.sandboxes().unwrap(),
            container_records: records.containers().unwrap(),
        }
    }

    /// Whether it must have a VM.
    fn is_up(&self, id: &SandboxId) -> bool {
        let status = self.sandboxes.get(id);
        status.is_some_and(|status| status.state == SandboxState::Ready && !status.suspended)
    }
}

/// What the runtime shows, what is on the node, and what callers know are the same.
pub(super) async fn agreement(
    world: &World,
    runtime: &NodeRuntime,
    model: &Mutex<Model>,
) -> Verdict {
    let shown = Shown::new(world, runtime).await;
    host(world, &shown).await?;
    guests(world, &shown)?;
    volumes(world, &shown, model).await?;
    let mut model = model.lock().unwrap();
    for pod in model.pods.values_mut() {
        // It stood still and was told to go on in vain, as often as that is tried.
        let stuck = world.stuck.lock().unwrap();
        let times = pod.sandbox.as_ref().and_then(|id| stuck.get(id));
        pod.lost |= times >= Some(&crate::actor::GO_ON_ATTEMPTS);
    }
    for id in &model.gone {
        let back = shown.sandboxes.contains_key(id);
        claim(!back, || format!("sandbox {id} was removed and is back"))?;
    }
    for id in &model.gone_containers {
        let back = shown.containers.contains_key(id);
        claim(!back, || format!("container {id} was removed and is back"))?;
    }
    for (number, pod) in &model.pods {
        told(world, &shown, *number, pod)?;
    }
    Ok(())
}

async fn host(world: &World, shown: &Shown) -> Verdict {
    let ids: BTreeSet<String> = shown.sandboxes.keys().map(ToString::to_string).collect();
    let recorded: BTreeSet<String> = shown.records.iter().map(|it| it.id.to_string()).collect();
    claim(ids == recorded, || {
        format!("shown {ids:?}, recorded {recorded:?}")
    })?;
    let up = shown.sandboxes.keys().filter(|id| shown.is_up(id));
    let ready: BTreeSet<_> = up.cloned().collect();
    let vms: BTreeSet<_> = world.vmm.sandboxes().into_iter().collect();
    claim(ready == vms, || format!("ready {ready:?}, VMs {vms:?}"))?;
    let keeps = shown.records.iter().filter(|it| it.phase.keeps_lease());
    let (keeps, leases) = (keeps.count(), world.network.leases().await);
    claim(keeps == leases, || {
        format!("{leases} leases for {keeps} sandboxes")
    })?;
    for directory in ["run", "state/sandboxes"] {
        let names = names(&world.temp.path().join(directory));
        let nobodys = names.iter().find(|name| !ids.contains(*name));
        claim(nobodys.is_none(), || {
            format!("{directory} has {nobodys:?}, of no sandbox")
        })?;
    }
    let uids: BTreeSet<u32> = shown.records.iter().map(|it| it.uid).collect();
    claim(uids.len() == shown.records.len(), || {
        "a user id is used twice".into()
    })?;
    let mut pods = BTreeSet::new();
    for record in &shown.records {
        let metadata = &record.config.metadata;
        let once = pods.insert((metadata.uid.clone(), metadata.attempt));
        claim(once, || format!("{metadata:?} has two sandboxes"))?;
    }
    for container in shown.containers.values() {
        let known = shown.sandboxes.contains_key(&container.sandbox);
        claim(known, || {
            format!("container {} has no sandbox", container.id)
        })?;
    }
    Ok(())
}

fn guests(world: &World, shown: &Shown) -> Verdict {
    for record in shown.records.iter().filter(|it| shown.is_up(&it.id)) {
        let id = &record.id;
        let members: Vec<_> = shown
            .container_records
            .iter()
            .filter(|it| it.sandbox == *id)
            .collect();
        let half = members
            .iter()
            .find(|it| matches!(it.phase, Phase::Creating | Phase::Removing));
        claim(half.is_none(), || format!("half done: {half:?}"))?;
        let theirs = world.agent(id).containers();
        // One that the guest has lost has ended.
        let lost = members
            .iter()
            .find(|it| it.phase.is_live() && !theirs.contains_key(it.id.as_str()));
        claim(lost.is_none(), || format!("not in the guest: {lost:?}"))?;
        let nobodys = theirs
            .keys()
            .find(|theirs| !members.iter().any(|it| it.id.as_str() == *theirs));
        claim(nobodys.is_none(), || {
            format!("only in the guest: {nobodys:?}")
        })?;
        // A volume's disk is recorded before it is there.
        // One that the guest has lost before anybody was told of it has ended without its disks.
        let live = members.iter().filter(|it| it.phase.is_live());
        let needed = live.flat_map(|it| it.all_slots());
        let needed: BTreeSet<u32> = needed.chain([SCRATCH_SLOT]).collect();
        let known = members.iter().flat_map(|it| it.all_slots());
        let known = known.chain(record.disk_slots());
        let known: BTreeSet<u32> = known.chain([SCRATCH_SLOT]).collect();
        let disks: BTreeSet<u32> = world
            .vmm
            .disks(id)
            .unwrap_or_default()
            .into_iter()
            .collect();
        claim(needed.is_subset(&disks) && disks.is_subset(&known), || {
            format!("{id} needs disks {needed:?}, may have {known:?} and has {disks:?}")
        })?;
    }
    Ok(())
}

async fn volumes(world: &World, shown: &Shown, model: &Mutex<Model>) -> Verdict {
    let volumes = world.volumes.inner.list().await.unwrap();
    for info in &volumes {
        for pod in &info.attached_to {
            let record = shown.records.iter().find(|it| it.id.as_str() == pod);
            let has = record.is_some_and(|it| it.attached.iter().any(|d| d.volume == info.id));
            claim(has, || {
                format!("volume {} is attached to {pod}, which has it not", info.id)
            })?;
        }
    }
    let model = model.lock().unwrap();
    for (number, pod) in &model.pods {
        let Some(id) = pod
            .sandbox
            .as_ref()
            .filter(|_| pod.has_volume && !pod.stop_asked)
        else {
            continue;
        };
        let of = volume(*number);
        let info = volumes.iter().find(|info| info.id.as_str() == of);
        let attached = info.is_some_and(|info| info.attached_to.contains(&id.to_string()));
        claim(attached, || format!("volume {of} is not attached to {id}"))?;
    }
    Ok(())
}

/// What the caller of a pod was told.
fn told(world: &World, shown: &Shown, number: u8, pod: &Pod) -> Verdict {
    let Some(id) = pod.sandbox.as_ref().filter(|_| !pod.remove_asked) else {
        return Ok(());
    };
    let Some(status) = shown.sandboxes.get(id) else {
        return Err(format!("sandbox {id} of pod {number} is lost"));
    };
    let ready = status.state == SandboxState::Ready;
    claim(ready || pod.stop_asked || pod.lost, || {
        format!("nobody has ended {id}: {status:?}")
    })?;
    claim(!(ready && pod.stopped), || {
        format!("{id} was stopped and is ready")
    })?;
    if let Some(suspended) = pod.suspended.filter(|_| !pod.stop_asked && !pod.lost) {
        claim(suspended == status.suspended, || {
            format!("suspended or not: {status:?}")
        })?;
    }
    for container in pod.containers.values() {
        let Some(id) = container.id.as_ref().filter(|_| !container.remove_asked) else {
            continue;
        };
        let Some(status) = shown.containers.get(id) else {
            return Err(format!("container {id} of pod {number} is lost"));
        };
        let suspended = shown.sandboxes[&status.sandbox].suspended;
        container_told(pod, container, status, suspended)?;
        log(world, pod, container, status, suspended)?;
    }
    Ok(())
}

fn container_told(
    pod: &Pod,
    container: &Container,
    status: &ContainerStatus,
    suspended: bool,
) -> Verdict {
    let state = status.state;
    let wrong = |what: &str| format!("{what}: {status:?}, {container:?}, lost {}", pod.lost);
    let left_alone = !pod.lost && !pod.stop_asked;
    let exited = state == ContainerState::Exited;
    claim(state != ContainerState::Unknown, || wrong("not known"))?;
    claim(
        !container.started || state != ContainerState::Created,
        || wrong("not started"),
    )?;
    claim(
        container.start_asked || state != ContainerState::Running,
        || wrong("not asked for"),
    )?;
    claim(container.end_asked || !left_alone || !exited, || {
        wrong("ended by nobody")
    })?;
    if let Some(code) = container.exit.filter(|_| left_alone && !suspended) {
        claim(exited && status.exit_code == code, || {
            wrong("ended by itself")
        })?;
    }
    if let Some(seen) = container.seen {
        let now = (status.exit_code, status.finished_unix_nanos);
        claim(exited && now == seen, || wrong("its end has changed"))?;
    }
    if let Some(paused) = container
        .paused
        .filter(|_| state == ContainerState::Running)
    {
        claim(paused == status.paused, || wrong("paused or not"))?;
    }
    let memo = &status.config.memo;
    let known = container.memo.told == *memo || container.memo.asked.contains(memo);
    claim(known, || wrong("an update is lost"))
}

/// Every line that counts is in the log once, in order.
fn log(
    world: &World,
    pod: &Pod,
    container: &Container,
    status: &ContainerStatus,
    suspended: bool,
) -> Verdict {
    if container.torn {
        return Ok(());
    }
    let current = status.log_path.to_string_lossy().into_owned();
    let mut lines = Vec::new();
    for file in container.rotated.iter().chain([&current]) {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        for line in text.lines() {
            let content = line.splitn(4, ' ').nth(3);
            lines.push(content.unwrap_or("(no line of a log)").to_owned());
        }
    }
    let whole = &container.lines;
    let prefix = lines.len() <= whole.len() && lines[..] == whole[..lines.len()];
    claim(prefix, || format!("the log has {lines:?} of {whole:?}"))?;
    if !pod.lost && !pod.stop_asked && !suspended {
        return claim(lines.len() == whole.len(), || {
            format!(
                "the log has {} of {} lines of {}",
                lines.len(),
                whole.len(),
                status.id
            )
        });
    }
    let bytes: usize = lines.iter().map(|line| line.len() + 1).sum();
    let acked = world
        .agent(&status.sandbox)
        .acked(status.id.as_str(), STDOUT);
    let acked = acked
        .and_then(|acked| usize::try_from(acked).ok())
        .unwrap_or(0);
    claim(bytes >= acked, || {
        format!("{bytes} bytes are in the log, {acked} were freed")
    })
}

/// Notes what callers see.
pub(super) async fn note(runtime: &NodeRuntime, model: &Mutex<Model>) {
    let shown = runtime.list_containers(None).await;
    let mut model = model.lock().unwrap();
    let containers = model
        .pods
        .values_mut()
        .flat_map(|pod| pod.containers.values_mut());
    for container in containers {
        let status = shown
            .iter()
            .find(|it| Some(&it.id) == container.id.as_ref());
        if let Some(status) = status
            && status.state == ContainerState::Exited
            && !container.remove_asked
        {
            container.seen = Some((status.exit_code, status.finished_unix_nanos));
        }
    }
}

/// Nothing of any sandbox is left.
pub(super) async fn nothing_left(world: &World) -> Verdict {
    let vms = world.vmm.sandboxes();
    claim(vms.is_empty(), || format!("VMs {vms:?}"))?;
    let leases = world.network.leases().await;
    claim(leases == 0, || format!("{leases} leases"))?;
    for volume in world.volumes.inner.list().await.unwrap() {
        claim(volume.attached_to.is_empty(), || format!("{volume:?}"))?;
    }
    let left = world
        .store
        .list("/node/", None, None, None)
        .unwrap()
        .entries;
    claim(left.is_empty(), || format!("records {left:?}"))?;
    for directory in ["run", "state/sandboxes", "logs"] {
        let left = names(&world.temp.path().join(directory));
        claim(left.is_empty(), || format!("{directory} has {left:?}"))?;
    }
    Ok(())
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.collect()
}

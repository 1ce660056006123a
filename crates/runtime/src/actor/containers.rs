//! Creating, starting, signalling and removing containers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use hypernetes_agent_api::{
    AgentClient, FEATURE_AMBIENT_CAPABILITIES, FEATURE_HUGE_PAGES, FEATURE_PID_TARGET,
    FEATURE_SECCOMP_PROFILE, IMAGE_VOLUME_FAILED, defaults, v1,
};
use hypernetes_image::{Image, ImageError};
use hypernetes_types::{ContainerId, Digest};
use hypernetes_vmm::{Disk, Vm};
use hypernetes_volume::VolumeMode;

use super::{Actor, Member, not_found};
use crate::{
    api::{ContainerConfig, ContainerUpdate, ContainerUser, DeviceConfig},
    container::{Event, Phase},
    error::RuntimeError,
    guest::clean,
    identity::SCRATCH_SLOT,
    logs::{
        beneath,
        file::LogFile,
        format::now_nanos,
        pump::{Pump, PumpSpec, Reopener},
    },
    process::{container_process, resources, signal_number},
    records::{ContainerRecord, LayerSlot, MountedImage, StoredProcess},
    sandbox,
    scratch::blocking,
};

/// Slots of the SCSI bus that layers can have.
const LAYER_SLOTS: std::ops::RangeInclusive<u32> = SCRATCH_SLOT + 1..=254;
/// The first version of the protocol in which limits can name files of the cgroup.
const PROTOCOL_WITH_UNIFIED: u32 = 2;
/// The first version of the protocol in which the image's groups can be left out.
const PROTOCOL_WITH_STRICT_GROUPS: u32 = 3;
/// Groups that are taken from a guest.
const MAX_GROUPS: usize = 1024;
/// Containers of one sandbox.
const MAX_CONTAINERS: usize = 256;

pub(super) fn invalid(field: &str, rule: impl Into<String>) -> RuntimeError {
    RuntimeError::Invalid {
        field: field.to_owned(),
        rule: rule.into(),
    }
}

/// Layers of an image, lowest first, and their open disks.
type OpenLayers = Vec<(Digest, File)>;

/// Which layer has which slot, while a container is planned.
struct Slots {
    known: BTreeMap<Digest, u32>,
    taken: BTreeSet<u32>,
    plugged: BTreeSet<u32>,
    /// Disks that are to be plugged.
    files: BTreeMap<u32, File>,
}

impl Slots {
    /// Gives every layer a slot: the one that it has already, or a free one.
    fn give(&mut self, layers: OpenLayers) -> Result<Vec<LayerSlot>, RuntimeError> {
        let mut slots: Vec<LayerSlot> = Vec::new();
        // From the top: of a layer that is there twice only the upper one can be seen.
        for (diff_id, file) in layers.into_iter().rev() {
            if slots.iter().any(|layer| layer.diff_id == diff_id) {
                continue;
            }
            let slot = match self.known.get(&diff_id) {
                Some(slot) => *slot,
                None => LAYER_SLOTS
                    .clone()
                    .find(|slot| !self.taken.contains(slot))
                    .ok_or_else(|| {
                        let rule = format!("a sandbox can have {} in all", LAYER_SLOTS.count());
                        invalid("image layers", rule)
                    })?,
            };
            self.taken.insert(slot);
            self.known.insert(diff_id.clone(), slot);
            if !self.plugged.contains(&slot) {
                self.files.insert(slot, file);
            }
            slots.push(LayerSlot { diff_id, slot });
        }
        slots.reverse();
        Ok(slots)
    }
}

/// The guest was booted by an earlier release, which would leave the field unread.
pub(crate) fn unknown_to_guest(field: &str) -> RuntimeError {
    let rule = "is not known to the guest of an earlier release: make the pod anew";
    invalid(field, rule)
}

impl Actor {
    /// Creates a container, or finds the one of the same name and attempt.
    pub(super) async fn create(
        &mut self,
        config: ContainerConfig,
    ) -> Result<ContainerId, RuntimeError> {
        let action = "create a container";
        let vm = self.ready_vm(action)?;
        let same = |record: &ContainerRecord| {
            record.config.name == config.name && record.config.attempt == config.attempt
        };
        if let Some(record) = self
            .members
            .values()
            .map(|member| &member.record)
            .find(|record| same(record))
        {
            let (id, phase) = (record.id.clone(), record.phase);
            match phase {
                Phase::Created | Phase::Starting | Phase::Running | Phase::Exited => return Ok(id),
                Phase::Removing => return Err(self.refused_container("create", &id, phase)),
                // Left behind by an attempt that failed.
                Phase::Creating => self.undo_create(&id).await,
            }
            if self.members.contains_key(&id) {
                return Err(self.refused_container("create", &id, phase));
            }
        }
        if self.members.len() >= MAX_CONTAINERS {
            return Err(invalid(
                "containers",
                format!("must be at most {MAX_CONTAINERS} per sandbox"),
            ));
        }
        if config
            .devices
            .iter()
            .any(|device| !device.volume.is_empty())
        {
            Self::check_disk_volumes(&self.client(action).await?)?;
        }
        for device in &config.devices {
            if device.volume.is_empty() {
                continue;
            }
            let (volume, mode) = (device.volume.as_str(), VolumeMode::Block);
            Box::pin(self.ensure_attached(&vm, volume, device.read_only, mode)).await?;
        }
        let (image, layers) = self.open_image(&config.image).await?;
        let mut mounted = Vec::new();
        for mount in config.mounts.iter().filter(|mount| !mount.image.is_empty()) {
            let opened = self.open_image(&mount.image).await;
            mounted.push(opened.map_err(|error| {
                let error = hypernetes_telemetry::chain(&error).to_string();
                RuntimeError::ImageVolume(error)
            })?);
        }
        let (record, request, layers) = self.plan(config, &image, layers, mounted)?;
        let id = record.id.clone();
        self.shared.records.put_container(&record).await?;
        for device in &record.config.devices {
            self.pending.remove(&device.slot);
        }
        self.members.insert(id.clone(), Member::new(record));
        self.shared.add_container(&id, &self.record.id);
        if let Err(error) = Box::pin(self.prepare_container(&id, &vm, request, layers)).await {
            self.undo_create(&id).await;
            return Err(error);
        }
        self.publish_container(&id);
        Ok(id)
    }

    pub(super) async fn open_image(&self, name: &str) -> Result<(Image, OpenLayers), RuntimeError> {
        let images = &self.shared.config.images;
        let image = images.get(name).await?;
        let files = images.open_layers(&image).await?;
        let diff_ids = image.layers.iter().map(|layer| layer.diff_id.clone());
        let layers: Vec<_> = diff_ids.zip(files).collect();
        if layers.len() != image.layers.len() {
            return Err(ImageError::NotFound(name.to_owned()).into());
        }
        Ok((image, layers))
    }

    /// What will be done, without doing any of it.
    #[allow(
        clippy::type_complexity,
        reason = "a name for this triple would say no more"
    )]
    fn plan(
        &self,
        config: ContainerConfig,
        image: &Image,
        layers: OpenLayers,
        mounted: Vec<(Image, OpenLayers)>,
    ) -> Result<
        (
            ContainerRecord,
            v1::CreateContainerRequest,
            BTreeMap<u32, File>,
        ),
        RuntimeError,
    > {
        if let Some(device) = config
            .devices
            .iter()
            .find(|device| device.volume.is_empty() && !self.pending.contains(&device.slot))
        {
            let rule = format!("has no device in slot {}: attach it again", device.slot);
            return Err(invalid("devices", rule));
        }
        if !beneath::is_plain(&config.log_path) {
            return Err(invalid(
                "log_path",
                "must be relative and made of plain names",
            ));
        }
        let mut others = self.members.values().map(|member| &member.record.config);
        if others.any(|other| other.log_path == config.log_path) {
            let rule = "must not be another container's of the sandbox";
            return Err(invalid("log_path", rule));
        }
        crate::cpus::check(&config.resources)?;
        let target = config.pid_target.as_ref();
        if let Some(id) = target.filter(|id| !self.is_running(id)) {
            let rule = format!("must be a running container of the sandbox; {id} is none");
            return Err(invalid("pid_target", rule));
        }
        let process = container_process(&image.config, &config, &self.record.config.hostname)?;
        let stop_signal = match (config.stop_signal, image.config.stop_signal.as_str()) {
            (Some(signal), _) => signal,
            (None, "") => 15,
            (None, text) => signal_number(text).unwrap_or(15),
        };
        let mut slots = self.slots();
        let layers = slots.give(layers)?;
        let mut images = Vec::with_capacity(mounted.len());
        for (image, layers) in mounted {
            images.push(MountedImage {
                image_id: image.id.to_string(),
                layers: slots.give(layers)?,
            });
        }
        let user = process.user.clone().unwrap_or_default();
        let mut record =
            ContainerRecord::new(ContainerId::random(), self.record.id.clone(), config);
        record.image_id = image.id.to_string();
        record.image_ref = image_ref(image);
        record.stop_signal = stop_signal;
        record.layers = layers;
        record.set_images(images);
        record.created_unix_nanos = now_nanos();
        record.process = StoredProcess {
            env: process.env.clone(),
            cwd: process.cwd.clone(),
            username: user.username,
        };
        let mut request = create_request(&record, process)?;
        request.devices = self.devices(&record.config);
        Ok((record, request, slots.files))
    }

    /// The container's block devices, by the slots of their disks.
    fn devices(&self, config: &ContainerConfig) -> Vec<v1::Device> {
        let attached = &self.record.attached;
        let slot = |volume: &str| {
            let disk = attached.iter().find(|disk| disk.volume.as_str() == volume);
            disk.map(|disk| disk.slot)
        };
        let device = |device: &DeviceConfig| {
            Some(v1::Device {
                destination: device.destination.clone(),
                slot: match device.volume.as_str() {
                    "" => device.slot,
                    volume => slot(volume)?,
                },
            })
        };
        config.devices.iter().filter_map(device).collect()
    }

    fn is_running(&self, id: &ContainerId) -> bool {
        let member = self.members.get(id);
        member.is_some_and(|member| member.record.phase == Phase::Running)
    }

    /// The slots as they are taken now.
    fn slots(&self) -> Slots {
        let layers = self.members.values();
        let layers = layers.flat_map(|member| member.record.all_layers());
        let known: BTreeMap<Digest, u32> = layers
            .map(|layer| (layer.diff_id.clone(), layer.slot))
            .collect();
        // A slot that is plugged and in no record is on its way out.
        let taken = known
            .values()
            .copied()
            .chain(self.plugged.iter().copied())
            .chain(self.record.disk_slots())
            .collect();
        Slots {
            known,
            taken,
            plugged: self.plugged.clone(),
            files: BTreeMap::new(),
        }
    }

    async fn prepare_container(
        &mut self,
        id: &ContainerId,
        vm: &Arc<dyn Vm>,
        request: v1::CreateContainerRequest,
        layers: BTreeMap<u32, File>,
    ) -> Result<(), RuntimeError> {
        let action = "create a container";
        self.pin(None).await?;
        for (slot, file) in layers {
            // Noted before it is done: if it is cut short, the disk may be there.
            self.plugged.insert(slot);
            let plug = async {
                Ok(vm
                    .plug_disk(Disk {
                        slot,
                        file,
                        read_only: true,
                    })
                    .await?)
            };
            self.with_vm(action, vm, plug).await?;
        }
        let log = self.open_log(id, LogFile::create).await?;
        let client = self.client(action).await?;
        let unified = request.resources.as_ref();
        let unified = unified.is_some_and(|resources| !resources.unified.is_empty());
        if unified && client.hello().version < PROTOCOL_WITH_UNIFIED {
            let rule = "is not known to the guest of an earlier release: make the pod anew";
            return Err(invalid("unified", rule));
        }
        let user = request
            .process
            .as_ref()
            .and_then(|process| process.user.as_ref());
        let strict = user.is_some_and(|user| user.only_additional_gids);
        if strict && client.hello().version < PROTOCOL_WITH_STRICT_GROUPS {
            let rule = "are not known to the guest of an earlier release: make the pod anew";
            return Err(invalid("only_supplemental_groups", rule));
        }
        let seccomp = request.process.as_ref();
        let seccomp = seccomp.is_some_and(|process| process.seccomp.is_some());
        if seccomp && !client.has(FEATURE_SECCOMP_PROFILE) {
            return Err(unknown_to_guest("seccomp"));
        }
        let ambient = request.process.as_ref();
        let ambient = ambient.and_then(|process| process.capabilities.as_ref());
        let ambient = ambient.is_some_and(|capabilities| !capabilities.ambient.is_empty());
        if ambient && !client.has(FEATURE_AMBIENT_CAPABILITIES) {
            return Err(unknown_to_guest("ambient_capabilities"));
        }
        let huge = request.resources.as_ref();
        let huge = huge.is_some_and(|limits| limits.huge_pages.iter().any(|huge| huge.limit > 0));
        if huge && !client.has(FEATURE_HUGE_PAGES) {
            return Err(unknown_to_guest("huge_pages"));
        }
        if !request.pid_target.is_empty() && !client.has(FEATURE_PID_TARGET) {
            return Err(unknown_to_guest("pid_target"));
        }
        let deadline = self.shared.config.deadlines.call;
        let sandbox = self.record.id.clone();
        let created = self
            .with_vm(action, vm, async {
                let created = Box::pin(client.create_container(request, deadline)).await;
                created.map_err(|error| image_volume(crate::guest::error(&sandbox, action, &error)))
            })
            .await?;
        let Some(member) = self.members.get_mut(id) else {
            return Err(not_found("container", id));
        };
        let uid = created.user.as_ref().map(|user| user.uid);
        member.record.user = created.user.map(|user| ContainerUser {
            uid: user.uid,
            gid: user.gid,
            groups: user.additional_gids.into_iter().take(MAX_GROUPS).collect(),
        });
        if member.record.config.security.run_as_non_root && uid.is_none_or(|uid| uid == 0) {
            return Err(invalid("run_as_non_root", "the image's user is root"));
        }
        let was = member.record.phase;
        // A list that the guest made before this moment may not have it.
        member.live_since = tokio::time::Instant::now();
        member.record.phase = was.next(Event::Prepared).unwrap_or(was);
        let record = member.record.clone();
        if let Err(error) = self.shared.records.put_container(&record).await {
            // In memory too it is not created yet, so that it is undone.
            if let Some(member) = self.members.get_mut(id) {
                member.record.phase = was;
            }
            return Err(error);
        }
        self.start_pump(id, Some(log));
        Ok(())
    }

    /// Takes back a creation, as far as the guest lets us. What is left is found by the next
    /// session, or goes with the sandbox.
    pub(super) async fn undo_create(&mut self, id: &ContainerId) {
        let undone = async {
            self.forget_in_guest(id).await?;
            self.remove_log(id).await?;
            let member = self.take_member(id);
            let deleted = match self.unplug_unused().await {
                Ok(()) => self.shared.records.delete_container(id).await,
                Err(error) => Err(error),
            };
            // As long as there is a record it must be known: a later container of the same name has
            // the same log, which the next session would remove with this one.
            if let (Err(_), Some(member)) = (&deleted, member) {
                self.put_back(id, member);
            }
            deleted
        };
        match undone.await {
            Ok(()) => {
                self.shared.forget_container(id);
                self.pin_or_tell().await;
            }
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(container = %id, error, "cannot undo the creation of a container yet");
            }
        }
    }

    /// Makes the guest forget a container, if there is a guest.
    pub(super) async fn forget_in_guest(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let action = "remove a container";
        let Some(vm) = self.vm.clone().filter(|vm| vm.exit().is_none()) else {
            return Ok(());
        };
        if self.record.phase != sandbox::Phase::Ready {
            return Ok(());
        }
        let client = self.client(action).await?;
        let deadline = self.shared.config.deadlines.call;
        let request = v1::RemoveContainerRequest { id: id.to_string() };
        self.with_vm(action, &vm, async {
            match client.remove_container(request, deadline).await {
                Err(error) if error.code() != Some(tonic::Code::NotFound) => {
                    Err(crate::guest::error(&self.record.id, action, &error))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    /// Unplugs disks that neither a container nor a volume has.
    pub(super) async fn unplug_unused(&mut self) -> Result<(), RuntimeError> {
        let Some(vm) = self.vm.clone().filter(|vm| vm.exit().is_none()) else {
            return Ok(());
        };
        let used: BTreeSet<u32> = self
            .members
            .values()
            .flat_map(|member| member.record.all_slots())
            .chain(self.pending.iter().copied())
            .chain(self.record.disk_slots())
            .chain([SCRATCH_SLOT])
            .collect();
        let unused: Vec<u32> = self.plugged.difference(&used).copied().collect();
        for slot in unused {
            let unplug = async { Ok(vm.unplug_disk(slot).await?) };
            self.with_vm("unplug a disk", &vm, unplug).await?;
            self.plugged.remove(&slot);
        }
        Ok(())
    }

    pub(super) fn checkpoint(&self, id: &ContainerId) -> PathBuf {
        self.shared.checkpoints(&self.record.id).join(id.as_str())
    }

    /// Opens a container's log, as new or where its last whole line ends.
    pub(super) async fn open_log(
        &self,
        id: &ContainerId,
        open: fn(&Path, &Path, PathBuf) -> std::io::Result<LogFile>,
    ) -> Result<LogFile, RuntimeError> {
        let member = self
            .members
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        let root = self.record.config.log_directory.clone();
        let path = member.record.config.log_path.clone();
        let checkpoint = self.checkpoint(id);
        let action = format!("open log {}", root.join(&path).display());
        blocking(action, move || open(&root, &path, checkpoint)).await
    }

    pub(super) fn start_pump(&mut self, id: &ContainerId, log: Option<LogFile>) {
        let checkpoint = self.checkpoint(id);
        let (Some(member), Some(link)) = (self.members.get_mut(id), &self.link) else {
            return;
        };
        member.pump = Some(Pump::spawn(PumpSpec {
            container: id.clone(),
            log_root: self.record.config.log_directory.clone(),
            log_path: member.record.config.log_path.clone(),
            checkpoint,
            log,
            link: link.state.clone(),
            deadline: self.shared.config.deadlines.call,
            tty: member.record.config.tty,
        }));
    }

    pub(super) async fn start_container(&mut self, id: &ContainerId) -> Result<(), RuntimeError> {
        let action = "start a container";
        let phase = self
            .members
            .get(id)
            .ok_or_else(|| not_found("container", id))?
            .record
            .phase;
        if phase == Phase::Running {
            return Ok(());
        }
        let next = phase.next(Event::StartAsked);
        let next = next.map_err(|_refused| self.refused_container("start", id, phase))?;
        let vm = self.ready_vm(action)?;
        let client = self.client(action).await?;
        let Some(member) = self.members.get_mut(id) else {
            return Err(not_found("container", id));
        };
        let mut intent = member.record.clone();
        intent.phase = next;
        self.shared.records.put_container(&intent).await?;
        member.record = intent;
        let deadline = self.shared.config.deadlines.call;
        let request = v1::StartContainerRequest { id: id.to_string() };
        let sandbox = self.record.id.clone();
        let started = self
            .with_vm(action, &vm, async {
                match client.start_container(request, deadline).await {
                    Ok(_) => Ok(()),
                    // An earlier attempt came through, its answer did not.
                    Err(error) if error.code() == Some(tonic::Code::FailedPrecondition) => {
                        listed_as_started(&client, id, deadline)
                            .await
                            .ok_or_else(|| crate::guest::error(&sandbox, action, &error))
                    }
                    Err(error) => Err(crate::guest::error(&sandbox, action, &error)),
                }
            })
            .await;
        started?;
        self.container_runs(id).await;
        Ok(())
    }

    pub(super) async fn signal(
        &mut self,
        id: &ContainerId,
        signal: u32,
        all: bool,
    ) -> Result<(), RuntimeError> {
        let action = "signal a container";
        let Some(member) = self.members.get(id) else {
            return Ok(());
        };
        match member.record.phase {
            Phase::Starting | Phase::Running | Phase::Created => {}
            Phase::Creating | Phase::Exited | Phase::Removing => return Ok(()),
        }
        let vm = self.ready_vm(action)?;
        let client = self.client(action).await?;
        let deadline = self.shared.config.deadlines.call;
        let request = v1::SignalRequest {
            id: id.to_string(),
            signal,
            all,
        };
        let sandbox = self.record.id.clone();
        self.with_vm(action, &vm, async {
            match client.signal(request, deadline).await {
                Err(error) if error.code() != Some(tonic::Code::NotFound) => {
                    Err(crate::guest::error(&sandbox, action, &error))
                }
                _ => Ok(()),
            }
        })
        .await
    }

    /// Changes limits. The record comes after the guest: what is shown is in force, and whoever
    /// gets an error asks again.
    pub(super) async fn update_container(
        &mut self,
        id: &ContainerId,
        update: ContainerUpdate,
    ) -> Result<(), RuntimeError> {
        let action = "update a container";
        let member = self
            .members
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        let phase = member.record.phase;
        if !phase.is_live() {
            return Err(self.refused_container("update", id, phase));
        }
        crate::cpus::check(&update.resources)?;
        let mut intent = member.record.clone();
        intent.config.resources = update.resources;
        intent.config.memo = update.memo;
        let vm = self.ready_vm(action)?;
        let client = self.client(action).await?;
        let request = v1::UpdateContainerRequest {
            id: id.to_string(),
            resources: Some(resources(&intent.config.resources)),
        };
        let deadline = self.shared.config.deadlines.call;
        let sandbox = self.record.id.clone();
        let cpus = &intent.config.resources.cpuset_cpus;
        self.pin(Some((id, cpus))).await?;
        let updated = self
            .with_vm(action, &vm, async {
                let updated = client.update_container(request, deadline).await;
                updated
                    .map(drop)
                    .map_err(|error| crate::guest::error(&sandbox, action, &error))
            })
            .await;
        if updated.is_err() {
            self.pin_or_tell().await;
        }
        updated?;
        self.shared.records.put_container(&intent).await?;
        if let Some(member) = self.members.get_mut(id) {
            member.record = intent;
        }
        self.publish_container(id);
        Ok(())
    }

    /// The pump of a container, to be told that its log was taken away.
    pub(super) fn reopener(&self, id: &ContainerId) -> Result<Reopener, RuntimeError> {
        let member = self
            .members
            .get(id)
            .ok_or_else(|| not_found("container", id))?;
        let phase = member.record.phase;
        member
            .pump
            .as_ref()
            .filter(|_| phase.is_live())
            .map(|pump| pump.reopener.clone())
            .ok_or_else(|| self.refused_container("reopen the log of", id, phase))
    }

    pub(super) async fn remove_container(&mut self, id: &ContainerId) -> Result<(), RuntimeError> {
        if self.record.phase.is_suspended() {
            return Err(self.refused("remove a container"));
        }
        let Some(member) = self.members.get_mut(id) else {
            return Ok(());
        };
        if member.record.phase != Phase::Removing {
            let mut intent = member.record.clone();
            if let Ok(phase) = intent.phase.next(Event::RemoveAsked) {
                intent.phase = phase;
            }
            self.shared.records.put_container(&intent).await?;
            member.record = intent;
            self.publish();
        }
        self.forget_in_guest(id).await?;
        self.remove_log(id).await?;
        // Its slots are free only when no other container has them.
        let Some(member) = self.take_member(id) else {
            return Ok(());
        };
        let unplugged = self.unplug_unused().await;
        let deleted = match unplugged {
            Ok(()) => self.shared.records.delete_container(id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = deleted {
            self.put_back(id, member);
            return Err(error);
        }
        self.shared.forget_container(id);
        self.publish_container(id);
        self.pin_or_tell().await;
        Ok(())
    }
}

async fn listed_as_started(
    client: &AgentClient,
    id: &ContainerId,
    deadline: std::time::Duration,
) -> Option<()> {
    let list = client
        .list_containers(v1::ListContainersRequest {}, deadline)
        .await
        .ok()?;
    let state = list
        .containers
        .iter()
        .find(|state| state.id == id.as_str())?;
    matches!(
        state.phase(),
        v1::ContainerPhase::Running | v1::ContainerPhase::Exited
    )
    .then_some(())
}

/// Tells apart why a guest could not make a container, by the word that the protocol has for it.
fn image_volume(error: RuntimeError) -> RuntimeError {
    match &error {
        RuntimeError::Guest { message, .. } => match message.strip_prefix(IMAGE_VOLUME_FAILED) {
            Some(why) => RuntimeError::ImageVolume(why.trim_start_matches(": ").to_owned()),
            None => error,
        },
        _ => error,
    }
}

/// `repository@digest` if the image has such a name, else its id.
fn image_ref(image: &Image) -> String {
    image
        .digests
        .first()
        .map_or_else(|| image.id.to_string(), ToString::to_string)
}

fn create_request(
    record: &ContainerRecord,
    process: v1::Process,
) -> Result<v1::CreateContainerRequest, RuntimeError> {
    let config = &record.config;
    let paths = |told: &Option<Vec<String>>, usual: &[&str]| -> Vec<String> {
        match told {
            Some(paths) => paths.clone(),
            None if config.security.privileged => Vec::new(),
            None => usual.iter().map(|&path| path.to_owned()).collect(),
        }
    };
    let mut mounts = Vec::with_capacity(config.mounts.len());
    let mut images = record.images.iter();
    for mount in &config.mounts {
        if !mount.destination.starts_with('/') || mount.destination.contains('\0') {
            return Err(invalid(
                "mounts",
                format!(
                    "destination {:?} must be absolute",
                    clean(&mount.destination)
                ),
            ));
        }
        mounts.push(v1::Mount {
            destination: mount.destination.clone(),
            source: Some(match mount.image.is_empty() {
                true => v1::mount::Source::Volume(mount.volume.clone()),
                false => {
                    let image = images.next().map(|image| image.layers.as_slice());
                    let layers = image.unwrap_or_default().iter();
                    v1::mount::Source::Image(v1::Layers {
                        slots: layers.map(|layer| layer.slot).collect(),
                    })
                }
            }),
            sub_path: mount.sub_path.clone(),
            readonly: mount.readonly,
        });
    }
    Ok(v1::CreateContainerRequest {
        id: record.id.to_string(),
        name: config.name.clone(),
        termination_path: config.termination_path.clone(),
        devices: Vec::new(),
        layer_slots: record.layers.iter().map(|layer| layer.slot).collect(),
        process: Some(process),
        mounts,
        readonly_rootfs: config.security.readonly_rootfs,
        resources: Some(resources(&config.resources)),
        privileged: config.security.privileged,
        masked_paths: paths(&config.security.masked_paths, defaults::MASKED_PATHS),
        readonly_paths: paths(&config.security.readonly_paths, defaults::READONLY_PATHS),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        output_buffer: 0,
        pid_target: config
            .pid_target
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
    })
}

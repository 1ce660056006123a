//! Volumes that outlive the pod: attached for as long as its VM may use them.
//!
//! A volume is in the sandbox's record before its driver is asked for it, and until the driver has
//! taken it back; that is done when the VMM is dead, never before. So whatever a crash leaves behind is
//! found in the record and made good with the sandbox.

use std::{sync::Arc, time::Duration};

use hypernetes_agent_api::{AgentClient, FEATURE_DISK_VOLUMES, v1};
use hypernetes_vmm::{Disk, Vm};
use hypernetes_volume::{VolumeDriver, VolumeError, VolumeId, VolumeMode};

use super::{
    Actor,
    containers::{invalid, unknown_to_guest},
    not_found,
};
use crate::{error::RuntimeError, records::AttachedDisk};

/// How long a guest may take to replay a journal, to give many files a group, or to grow. Whoever stops
/// the sandbox does not wait for that.
pub(super) const VOLUME_READY: Duration = Duration::from_secs(600);

impl Actor {
    pub(super) fn volume_driver(&self) -> Result<Arc<dyn VolumeDriver>, RuntimeError> {
        let driver = self.shared.config.volumes.clone();
        driver.ok_or_else(|| invalid("volume", "must be of another kind: this node keeps none"))
    }

    /// Whether the guest can have such volumes at all.
    pub(super) fn check_disk_volumes(client: &AgentClient) -> Result<(), RuntimeError> {
        match client.has(FEATURE_DISK_VOLUMES) {
            true => Ok(()),
            false => Err(unknown_to_guest("volume")),
        }
    }

    /// Slot of a volume's disk, attached and plugged.
    pub(super) async fn ensure_attached(
        &mut self,
        vm: &Arc<dyn Vm>,
        volume: &str,
        read_only: bool,
        mode: VolumeMode,
    ) -> Result<u32, RuntimeError> {
        let id: VolumeId = volume.parse()?;
        let driver = self.volume_driver()?;
        let known = self.record.attached.iter().find(|disk| disk.volume == id);
        let slot = match known {
            Some(disk) if (disk.read_only, disk.mode) == (read_only, mode) => disk.slot,
            Some(_) => {
                let rule = format!("must be one way for all of the sandbox's uses of {id}");
                return Err(invalid("volume", rule));
            }
            None => {
                let info = driver.get(&id).await?;
                let info = info.ok_or_else(|| not_found("volume", &id))?;
                if info.mode != mode {
                    let rule = format!("must be {:?}, as volume {id} is", info.mode);
                    return Err(invalid("volume mode", rule));
                }
                self.record_attached(&id, read_only, mode).await?
            }
        };
        if self.plugged.contains(&slot) {
            return Ok(slot);
        }
        let pod = self.record.id.to_string();
        let device = match driver.attach(&id, &pod, read_only).await {
            Ok(device) => device,
            Err(error) => {
                self.forget_attached(driver.as_ref(), &id).await;
                return Err(self.explain(error));
            }
        };
        // Noted before it is done: if it is cut short, the disk may be there.
        self.plugged.insert(slot);
        let plug = async {
            Ok(vm
                .plug_disk(Disk {
                    slot,
                    file: device.file,
                    read_only: device.read_only,
                })
                .await?)
        };
        let plugged = self.with_vm("plug a volume's disk", vm, plug).await;
        if let Err(error) = plugged {
            let unplug = async { Ok(vm.unplug_disk(slot).await?) };
            match self.with_vm("unplug a volume's disk", vm, unplug).await {
                Ok(()) => {
                    self.plugged.remove(&slot);
                    self.forget_attached(driver.as_ref(), &id).await;
                }
                // The VM may have it: it stays the sandbox's until the VM has ended.
                Err(error) => {
                    let error = hypernetes_telemetry::chain(&error).to_string();
                    tracing::warn!(volume = %id, error, "cannot take back a volume's disk yet");
                }
            }
            return Err(error);
        }
        Ok(slot)
    }

    async fn record_attached(
        &mut self,
        id: &VolumeId,
        read_only: bool,
        mode: VolumeMode,
    ) -> Result<u32, RuntimeError> {
        let slot = self.free_volume_slot("volumes")?;
        let before = self.record.clone();
        let mut attached = before.attached.clone();
        attached.push(AttachedDisk {
            volume: id.clone(),
            slot,
            read_only,
            mode,
        });
        self.record.set_attached(attached);
        if let Err(error) = self.save().await {
            self.record = before;
            return Err(error);
        }
        Ok(slot)
    }

    /// Gives up a volume that the VM does not have. What cannot be undone now is done when the sandbox
    /// stops.
    async fn forget_attached(&mut self, driver: &dyn VolumeDriver, id: &VolumeId) {
        let undone = async {
            // An attachment that failed may be written down all the same.
            driver.detach(id, self.record.id.as_str()).await?;
            let before = self.record.clone();
            let mut attached = before.attached.clone();
            attached.retain(|disk| disk.volume != *id);
            self.record.set_attached(attached);
            let saved = self.save().await;
            if saved.is_err() {
                self.record = before;
            }
            saved
        };
        if let Err(error) = undone.await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(volume = %id, error, "cannot give up a volume yet");
        }
    }

    /// Gives all volumes back, after the VMM has ended. Repeated after a failure it goes on.
    pub(super) async fn detach_volumes(&mut self) -> Result<(), RuntimeError> {
        if self.record.attached.is_empty() {
            return Ok(());
        }
        let driver = self.volume_driver()?;
        for disk in &self.record.attached {
            driver.detach(&disk.volume, self.record.id.as_str()).await?;
        }
        self.record.set_attached(Vec::new());
        Ok(())
    }

    /// Lets the guest see a volume's new size.
    pub(super) async fn grow_volume(&mut self, volume: &str) -> Result<(), RuntimeError> {
        let action = "grow a volume";
        let id: VolumeId = volume.parse()?;
        let disk = self.record.attached.iter().find(|disk| disk.volume == id);
        // What is plugged later is seen in its size of then, and what is only read does not grow.
        let Some(slot) = disk
            .filter(|disk| !disk.read_only)
            .map(|disk| disk.slot)
            .filter(|slot| self.plugged.contains(slot))
        else {
            return Ok(());
        };
        let driver = self.volume_driver()?;
        let vm = self.ready_vm(action)?;
        let client = self.client(action).await?;
        Self::check_disk_volumes(&client)?;
        let info = driver.get(&id).await?;
        let bytes = info.ok_or_else(|| not_found("volume", &id))?.bytes;
        let sandbox = self.record.id.clone();
        self.with_vm(action, &vm, async {
            vm.resize_disk(slot, bytes).await?;
            let request = v1::GrowDiskRequest { slot, bytes };
            let grown = client.grow_disk(request, VOLUME_READY).await;
            grown
                .map(drop)
                .map_err(|error| crate::guest::error(&sandbox, action, &error))
        })
        .await
    }

    /// A driver's error in the words of pods.
    fn explain(&self, error: VolumeError) -> RuntimeError {
        let VolumeError::InUse { id, by } = error else {
            return error.into();
        };
        let records = self.shared.records.sandboxes().unwrap_or_default();
        let name = |sandbox: String| {
            let record = records.iter().find(|record| record.id.as_str() == sandbox);
            record.map_or(sandbox, |record| {
                let metadata = &record.config.metadata;
                format!("{}/{}", metadata.namespace, metadata.name)
            })
        };
        RuntimeError::VolumeInUse {
            volume: id.to_string(),
            by: by.into_iter().map(name).collect(),
        }
    }
}
